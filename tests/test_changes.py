"""What people change on a placed pipeline works as on one that is not, or is refused in a sentence.

Every component sits on a virtual GPU of its own, in numbers; the reference is diffusers' pipeline on the CPU, changed
likewise.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from around import Placed, Small, call, diffusers_own, place_apart, same
from diffusers import SanaControlNetPipeline
from drawing import encode_one_at_a_time

from sana_deploy import load_pipeline, place, unplace
from sana_deploy.api import compile_spec
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.errors import RunError

Change = Callable[[SanaControlNetPipeline], object]


@pytest.fixture
def placed(tiny: Path, small: Small) -> Placed:
    return place_apart(tiny, small)


def lora(pipeline: SanaControlNetPipeline) -> dict[str, torch.Tensor]:
    width, generator = pipeline.transformer.config.num_attention_heads * 32, torch.Generator().manual_seed(1)
    return {
        f"transformer.transformer_blocks.0.attn1.to_q.lora_{side}.weight": torch.randn(*shape, generator=generator)
        for side, shape in (("A", (2, width)), ("B", (width, 2)))
    }


def fuse(pipeline: SanaControlNetPipeline, safe: bool) -> None:
    pipeline.load_lora_weights(lora(pipeline))
    pipeline.fuse_lora(components=["transformer"], safe_fusing=safe)
    pipeline.unload_lora_weights()


def in_float8(pipeline: SanaControlNetPipeline) -> None:
    for module in (pipeline.transformer, pipeline.controlnet):
        module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def halved(pipeline: SanaControlNetPipeline) -> None:
    pipeline.transformer.half()
    pipeline.controlnet.to(torch.float16)


def assigned(pipeline: SanaControlNetPipeline) -> None:
    for value in pipeline.transformer.proj_out.parameters():
        value.data = value.data * 0.5


CHANGES: dict[str, Change] = {
    "fuse_lora": lambda pipeline: fuse(pipeline, safe=False),
    "fuse_lora safely": lambda pipeline: fuse(pipeline, safe=True),
    "layerwise casting": in_float8,
    "float16": halved,
    "assigned data": assigned,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_draw_what_they_draw_on_the_cpu(placed: Placed, change: Change) -> None:
    before = placed.images()
    change(placed.reference)
    with placed.host:
        change(placed.pipeline)
    after = placed.images()
    assert same(after, call(placed.reference))
    assert not same(after, before)
    for name in COMPONENTS:
        here, there = getattr(placed.reference, name), getattr(placed.pipeline, name)
        for (key, one), other in zip(here.named_parameters(), there.parameters(), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape) == (other.held.dtype, other.held.shape), key


def test_halved_weights_take_half_the_bytes_and_count_as_weights(placed: Placed) -> None:
    ledger = placed.host.ledger
    before = list(ledger.weights)
    with placed.host:
        placed.pipeline.transformer.half()
    assert ledger.weights[2] == pytest.approx(before[2] / 2, rel=0.01)
    assert [ledger.weights[gpu] for gpu in (0, 1, 3)] == [before[gpu] for gpu in (0, 1, 3)]
    pools = [placed.host.pools[gpu] for gpu in range(4)]
    assert ledger.activations == pytest.approx(pools, abs=512), "what graphs keep, and nothing else"


def test_a_component_that_was_moved_is_refused_until_it_is_back(placed: Placed) -> None:
    before, ledger = placed.images(), placed.host.ledger
    vae_bytes = ledger.weights[1]
    with placed.host:
        placed.pipeline.vae.to("vgpu:3")
    assert ledger.weights[1] == 0
    assert {value.device.index for value in placed.pipeline.vae.parameters()} == {3}
    with pytest.raises(RunError, match="vae was moved to vgpu:3 after it was placed on vgpu:1") as caught:
        placed.images()
    assert "unplace(pipeline)" in caught.value.hint
    with placed.host:
        placed.pipeline.vae.to("vgpu:1")
    assert ledger.weights[1] == vae_bytes
    assert same(placed.images(), before)


def test_a_moved_component_of_a_pipeline_here_is_refused_too(small: Small) -> None:
    pipeline = load_pipeline(compile_spec(small("precision=fp32")))
    pipeline.text_encoder.to("meta")
    with pytest.raises(RunError, match="text_encoder was moved to meta after it was placed on cpu"):
        call(pipeline)


def test_a_call_in_inference_mode_draws_the_same(placed: Placed) -> None:
    with torch.inference_mode():
        inside, reference = placed.images(), call(placed.reference)
    assert same(inside, reference)
    assert same(placed.images(), inside), "and a call outside it afterwards works"


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
def test_copying_a_placed_pipeline_is_refused_and_the_hint_works(small: Small, copier: Callable[[Any], Any]) -> None:
    pipeline = load_pipeline(compile_spec(small("precision=fp32")))
    for part in (pipeline, pipeline.transformer):
        with pytest.raises(RunError, match="a placed pipeline cannot be copied or pickled") as caught:
            copier(part)
        assert "unplace(pipeline)" in caught.value.hint
    assert copier(unplace(pipeline))


def test_copied_when_unplaced_both_work_on_their_own_weights(placed: Placed, tiny: Path) -> None:
    with pytest.raises(RunError, match="a placed pipeline cannot be copied"):
        copy.deepcopy(placed.pipeline)
    weights = list(placed.host.ledger.weights)
    here = encode_one_at_a_time(copy.deepcopy(SanaControlNetPipeline.from_pretrained(tiny)))
    with placed.host, torch.no_grad():
        copied = copy.deepcopy(unplace(placed.pipeline))
        assert placed.host.ledger.weights == [2 * size for size in weights]
        place(copied, placed.resolved)
        place(placed.pipeline, placed.resolved)
        for pipeline in (copied, here):
            for name in ("vae", "transformer"):
                for value in getattr(pipeline, name).parameters():
                    value.mul_(0.9)
        changed = call(copied)
    assert same(changed, call(here)), "the copy works on its own weights"
    assert same(placed.images(), call(placed.reference)), "and the original on its own"
    assert not np.allclose(changed, call(placed.reference), atol=0.01)


@pytest.mark.parametrize("whole", [True, False])
def test_group_offload_is_refused_as_diffusers_refuses_the_others(small: Small, whole: bool) -> None:
    pipeline = load_pipeline(compile_spec(small("precision=fp32", "hardware.allow=[]")))
    before = call(pipeline)
    target = pipeline if whole else pipeline.transformer
    for name in ("enable_group_offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        if whole or name == "enable_group_offload":
            with pytest.raises(ValueError, match=r"device mapping strategy.*reset_device_map"):
                getattr(target, name)(torch.device("cpu"))
    assert same(call(pipeline), before)
    pipeline.reset_device_map()
    pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert same(call(pipeline), before)


def test_saving_from_virtual_gpus_writes_the_weights_in_numbers(placed: Placed, tiny: Path, tmp_path: Path) -> None:
    placed.pipeline.save_pretrained(tmp_path)
    saved, original = (SanaControlNetPipeline.from_pretrained(folder) for folder in (tmp_path, tiny))
    for name in COMPONENTS:
        there = getattr(saved, name).state_dict()
        for key, value in getattr(original, name).state_dict().items():
            assert torch.equal(there[key], value), key


@pytest.mark.parametrize("part", ["pipeline", *COMPONENTS])
def test_saving_shapes_is_refused(tiny: Path, small: Small, tmp_path: Path, part: str) -> None:
    pipeline = place_apart(tiny, small, fidelity="shapes").pipeline
    with pytest.raises(RunError, match="a rehearsal in shapes has no values to read or save") as caught:
        (pipeline if part == "pipeline" else getattr(pipeline, part)).save_pretrained(tmp_path)
    assert "machine.fidelity=numbers" in caught.value.hint


def test_placing_says_once_what_it_casts(tiny: Path, small: Small, caplog: pytest.LogCaptureFixture) -> None:
    resolved = compile_spec(small("precision=mixed_bf16")).resolve()
    pipeline = diffusers_own(tiny)
    with caplog.at_level(logging.WARNING, "sana_deploy"):
        place(pipeline, resolved)
    said = [record.getMessage() for record in caplog.records if "place cast" in record.getMessage()]
    wanted = {name: part.dtype for name, part in resolved.plan.components.items()}
    assert len(said) == 1
    for dtype in set(wanted.values()):
        names = ", ".join(name for name in COMPONENTS if wanted[name] == dtype)
        assert f"{names} from float32 to {dtype}" in said[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sana_deploy"):
        place(unplace(pipeline), resolved)
    assert "place cast" not in caplog.text, "they have their dtypes already"
