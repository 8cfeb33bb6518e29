"""Components that are dealt by layers over two devices: the bits of diffusers' own pipeline, and what may be done to
a placed one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from around import STRIPES
from conftest import SMALL
from drawing import encode_one_at_a_time
from family import call, diffusers_own
from peft import LoraConfig

from sana_deploy import place, unplace
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.errors import RunError
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.rehearsal.host import VirtualHost
from sana_deploy.rehearsal.rehearse import open_host, rehearse_request
from sana_deploy.run.layers import DealtForward
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.traffic import Traffic

Layers = Mapping[str, int]
CARDS = ("machine=virtual", "machine.gpus=3xrtx4090", "hardware=custom_map", "runtime=eager")
PLACES = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 1%s}"
BOTH: Layers = {"text_encoder": 2, "transformer": 2}


def dealt(resolved: ResolvedPlan, layers: Layers, device: str) -> ResolvedPlan:
    """The plan with the other blocks of components on `device`."""
    plan = resolved.plan.model_copy(update={"split": "layers", "layers": dict(layers)})
    return replace(resolved, plan=plan, unit_devices={f"{name}.1": device for name in layers})


def resolved_for(model: str, layers: Layers, *overrides: str, others: str = "vgpu:2") -> ResolvedPlan:
    place = PLACES % (", controlnet: 0" if model == "tiny" else "")
    precision = overrides or ("precision=fp32",)
    resolved = compile_spec(compose_spec([f"model={model}", *SMALL, *precision, *CARDS, place])).resolve()
    return dealt(resolved, layers, others)


def loaded(resolved: ResolvedPlan) -> tuple[Any, VirtualHost]:
    host = open_host(resolved, "numbers")
    return load_pipeline(resolved, host=host), host


def devices(module: torch.nn.Module) -> set[str]:
    return {str(value.device) for value in (*module.parameters(), *module.buffers())}


# the same bits


@pytest.mark.parametrize(
    ("model", "layers"),
    [("tiny_sana", {"text_encoder": 5}), ("tiny_pag", {"transformer": 1}), ("tiny_sprint", BOTH)],
)
def test_the_picture_is_diffusers_own_bit_for_bit(model: str, layers: Layers) -> None:
    resolved = resolved_for(model, layers)
    pipeline, host = loaded(resolved)
    with host:
        ours = call(pipeline)
    assert np.array_equal(np.asarray(ours), np.asarray(call(diffusers_own(resolved.plan.pipeline))))


@pytest.mark.parametrize(("layers", "residuals", "first", "there"), [(20, 7, 5, 3), (20, 7, 12, 0), (3, 2, 1, 1)])
def test_a_residual_of_the_last_block_stays_at_home(layers: int, residuals: int, first: int, there: int) -> None:
    border = SimpleNamespace(state=SimpleNamespace(traffic=Traffic()))
    forward = SimpleNamespace(
        others=SimpleNamespace(first=first), blocks=range(first, layers), device=torch.device("meta"), border=border,
        layers=SimpleNamespace(added="residuals"),
    )  # fmt: skip
    found = DealtForward._added(forward, [torch.zeros(1) for _ in range(residuals)])  # type: ignore[arg-type]
    moved = [number for number, one in enumerate(found) if one.device.type == "meta"]
    assert moved == [number for number in range(residuals) if first <= number + 1 < layers - 1]
    assert len(moved) == there


@pytest.mark.parametrize("first", [1, 2, 3])
def test_residuals_of_a_controlnet_reach_blocks_on_both_gpus(first: int) -> None:
    resolved = resolved_for("tiny", {"transformer": first})
    pipeline, host = loaded(resolved)
    given = {"control_image": STRIPES.resize((96, 64)), "controlnet_conditioning_scale": 0.7}
    with host:
        ours = call(pipeline, **given)
    theirs: Any = encode_one_at_a_time(diffusers_own(resolved.plan.pipeline))
    assert np.array_equal(np.asarray(ours), np.asarray(call(theirs, **given)))


def test_on_the_cpu_a_dealt_pipeline_draws_what_it_drew_before_and_is_as_it_was_afterwards() -> None:
    spec = compose_spec(["model=tiny_sana", *SMALL, "precision=fp32", "hardware=single_gpu"])
    resolved = dealt(compile_spec(spec).resolve(), BOTH, "cpu")
    pipeline = diffusers_own(resolved.plan.pipeline)
    before, blocks = call(pipeline), pipeline.transformer.transformer_blocks
    place(pipeline, resolved)
    assert np.array_equal(call(pipeline), before)
    unplace(pipeline)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)
    assert np.array_equal(call(copy.deepcopy(pipeline)), before)


# where things are


def test_each_gpu_holds_its_blocks_and_nothing_else_of_the_component() -> None:
    pipeline, host = loaded(resolved_for("tiny_sana", BOTH))
    for name, home, attribute in (
        ("text_encoder", "vgpu:0", "layers"),
        ("transformer", "vgpu:1", "transformer_blocks"),
    ):
        module, blocks = getattr(pipeline, name), list(getattr(getattr(pipeline, name), attribute))
        assert devices(module) == {home, "vgpu:2"}
        assert [devices(block) for block in blocks] == [{home}] * 2 + [{"vgpu:2"}] * (len(blocks) - 2)
    weights = sum(value.nbytes for name in BOTH for value in getattr(pipeline, name).parameters()
                  if value.device.index == 2)  # fmt: skip
    assert weights <= host.ledger.weights[2] <= weights + 512 * 100


@pytest.mark.usefixtures("short_prompts")
def test_hidden_states_cross_twice_a_step_and_what_blocks_share_once() -> None:
    resolved = resolved_for("tiny_sana", {"transformer": 2}, others="vgpu:0")
    pipeline, host = loaded(resolved)
    moved = rehearse_request(pipeline, resolved, host).report.transfers
    there = {
        one.tensor: one.bytes_per_step
        for one in moved
        if one.bytes_per_step and (one.src, one.dst) == ("vgpu:1", "vgpu:0")
    }
    back = {
        one.tensor: one.bytes_per_step
        for one in moved
        if one.bytes_per_step and (one.src, one.dst) == ("vgpu:0", "vgpu:1")
    }
    config = pipeline.transformer.config
    width, rows, size = config.num_attention_heads * config.attention_head_dim, 2, 4
    assert back == {"hidden_states": 2 * 3 * width * rows * size}
    assert there == {
        **back,
        "encoder_hidden_states": 32 * width * rows * size,
        "encoder_attention_mask": 32 * rows * size,
        "timestep": 6 * width * rows * size,
    }


def test_a_block_that_was_moved_since_is_refused() -> None:
    pipeline, host = loaded(resolved_for("tiny_sana", {"transformer": 2}))
    with host:
        pipeline.transformer.transformer_blocks[2].to("cpu")
        with pytest.raises(RunError, match=r"transformer\.1 was moved to cpu after it was placed on vgpu:2"):
            call(pipeline)


# what is done to a placed pipeline


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
def test_in_other_formats_it_draws_what_the_whole_draws(precision: str) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    pictures = []
    for layers in (BOTH, {}):
        pipeline, host = loaded(resolved_for("tiny_sana", layers, f"precision={precision}"))
        with host:
            pictures.append(np.asarray(call(pipeline)))
    assert np.array_equal(pictures[0], pictures[1])


def test_lora_layers_work_in_blocks_on_both_gpus() -> None:
    pictures = []
    for layers in (BOTH, {}):
        pipeline, host = loaded(resolved_for("tiny_sana", layers))
        with host:
            before = np.asarray(call(pipeline))
            torch.manual_seed(0)
            pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=True))
            with torch.no_grad():
                for name, value in pipeline.transformer.named_parameters():
                    if "lora_B" in name:
                        value.fill_(0.05)
                    elif "lora_A" in name:
                        value.fill_(0.02)
            pictures.append(np.asarray(call(pipeline)))
        assert not np.array_equal(before, pictures[-1])
    assert np.array_equal(pictures[0], pictures[1])


def test_taken_off_what_was_loaded_dealt_is_whole_on_the_cpu() -> None:
    pipeline, host = loaded(resolved_for("tiny_sana", BOTH))
    with host:
        unplace(pipeline)
    assert devices(pipeline.transformer) == devices(pipeline.text_encoder) == {"cpu"}
    assert devices(pipeline.vae) == {"vgpu:0"}
