"""Prompts that come again are not encoded again: the same bits, found by content, forgotten when anything changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from sana_deploy import rehearse
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.run.audit import Recorder
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.hook import border_of
from sana_deploy.run.host import PresentHost
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import bind, unplace
from sana_deploy.run.request_state import RequestState

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")


class Counting:
    """Counts how often the text encoder of a pipeline worked."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.count = 0
        pipeline.text_encoder.norm.register_forward_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=mixed_bf16", "workload.steps=2")


@pytest.fixture
def pipeline(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(compile_spec(spec))


@pytest.fixture
def worked(pipeline: DiffusionPipeline) -> Counting:
    return Counting(pipeline)


@pytest.fixture
def plain(small: Small, tiny: Path) -> DiffusionPipeline:
    return load_pipeline(compile_spec(small("precision=mixed_bf16", "workload.steps=2", "runtime.prompt_cache=0")))


def drawn(pipeline: DiffusionPipeline, spec: DeploySpec, state: RequestState | None = None, **said: Any) -> bytes:
    pixels, _ = run_request(pipeline, spec.workload.bounds, spec.workload.request.model_copy(update=said), state=state)
    assert isinstance(pixels, torch.Tensor)
    return pixels.float().numpy().tobytes()


def hits(pipeline: DiffusionPipeline, spec: DeploySpec, **said: Any) -> int:
    state = RequestState()
    drawn(pipeline, spec, state, **said)
    return state.prompt_cache_hits


def test_a_prompt_that_comes_again_is_not_encoded_again_and_gives_the_same_bits(
    pipeline: DiffusionPipeline, plain: DiffusionPipeline, spec: DeploySpec, worked: Counting
) -> None:
    first, second = RequestState(), RequestState()
    pictures = [drawn(pipeline, spec, first), drawn(pipeline, spec, second)]
    assert pictures == 2 * [drawn(plain, spec)]
    assert (first.prompt_cache_hits, second.prompt_cache_hits, worked.count) == (0, 2, 2)


def test_another_prompt_is_encoded_and_the_negative_one_is_found(
    pipeline: DiffusionPipeline, plain: DiffusionPipeline, spec: DeploySpec, worked: Counting
) -> None:
    drawn(pipeline, spec)
    state = RequestState()
    assert drawn(pipeline, spec, state, prompt="a red barn") == drawn(plain, spec, prompt="a red barn")
    assert (state.prompt_cache_hits, worked.count) == (1, 3)


def test_another_mask_or_shape_is_another_call(pipeline: DiffusionPipeline, worked: Counting) -> None:
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        full = pipeline.text_encoder(ids, attention_mask=mask)[0]
        mask[0, 5:] = 0
        cut = pipeline.text_encoder(ids, attention_mask=mask)[0]
        assert not torch.equal(full, cut)
        pipeline.text_encoder(ids.to(torch.int32), attention_mask=mask)
        pipeline.text_encoder(ids.view(2, 4), attention_mask=mask.view(2, 4))
    assert worked.count == 4


def test_what_is_handed_out_is_nobody_else_s(pipeline: DiffusionPipeline, worked: Counting) -> None:
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        results = []
        for _ in range(3):
            result = pipeline.text_encoder(ids, attention_mask=mask)
            results.append(result[0].clone())
            result[0].zero_()
        ids.add_(1)
        other = pipeline.text_encoder(ids, attention_mask=mask)[0]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], other)
    assert worked.count == 2


def test_calls_that_the_pipeline_does_not_make_get_everything_each_time(
    pipeline: DiffusionPipeline, worked: Counting
) -> None:
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(2):
            result = pipeline.text_encoder(ids, attention_mask=mask, use_cache=True)
            assert result.past_key_values is not None
            assert len(pipeline.text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states) > 1
    assert worked.count == 4
    assert pipeline.text_encoder(ids, attention_mask=mask)[0].shape == result[0].shape, "gradients are recorded"
    assert worked.count == 5


CHANGES: dict[str, Callable[[Any], object]] = {
    "values": lambda model: model.layers[0].mlp.down_proj.weight.mul_(2),
    "values past PyTorch's count": lambda model: model.layers[0].mlp.down_proj.weight.data.mul_(2),
    "weights": lambda model: setattr(
        model.norm, "weight", torch.nn.Parameter(model.norm.weight + 1, requires_grad=False)
    ),
    "a loaded state": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    "a layer": lambda model: setattr(model.layers[0], "mlp", torch.nn.Identity()),
    "a hook": lambda model: model.layers[0].register_forward_hook(lambda *found: found[-1] * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_encoder_that_changed_encodes_anew(
    pipeline: DiffusionPipeline, plain: DiffusionPipeline, spec: DeploySpec, worked: Counting, change: str
) -> None:
    before = drawn(pipeline, spec)
    for one in (pipeline, plain):
        with torch.no_grad():
            CHANGES[change](one.text_encoder)
    assert drawn(pipeline, spec) == drawn(plain, spec) != before
    assert worked.count == 4
    assert hits(pipeline, spec) == 2


def test_lora_of_the_text_encoder_encodes_anew(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    peft = pytest.importorskip("peft")
    before = drawn(pipeline, spec)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.inject_adapter_in_model(config, pipeline.text_encoder, "style")
    assert drawn(pipeline, spec) != before
    styled = drawn(pipeline, spec)
    for layer in tuned.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("style", 0.0)
    assert drawn(pipeline, spec) == before != styled


def test_settings_of_pytorch_belong_to_what_is_kept(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    drawn(pipeline, spec)
    torch.use_deterministic_algorithms(True)
    try:
        assert hits(pipeline, spec) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert hits(pipeline, spec) == 2


def test_the_oldest_prompt_makes_room(small: Small, tiny: Path) -> None:
    spec = small("precision=mixed_bf16", "workload.steps=2", "runtime.prompt_cache=2")
    pipeline = load_pipeline(compile_spec(spec))
    assert [hits(pipeline, spec, prompt=prompt) for prompt in ("a", "a", "b", "a")] == [0, 2, 1, 1]


def test_zero_keeps_nothing(plain: DiffusionPipeline, spec: DeploySpec) -> None:
    assert hits(plain, spec) == hits(plain, spec) == 0


def _note(events: list[tuple[str, str]], event: str, call: str) -> None:
    events.append((event, call))


def test_whoever_listens_at_the_border_hears_of_it_and_the_outcome_counts_it(
    pipeline: DiffusionPipeline, spec: DeploySpec
) -> None:
    found = []
    for _ in range(2):
        events, recorder, state = list[tuple[str, str]](), Recorder(), RequestState()
        state.observers.append(functools.partial(_note, events))
        recorder.attach(state)
        _, measured = generate(pipeline, spec.workload.bounds, spec.workload.request, state=state)
        found.append((events, recorder, measured))
    (events, recorder, first), (again, heard, second) = found
    assert events == again
    assert (first.prompt_cache_hits, second.prompt_cache_hits) == (0, 2)
    assert set(second.seconds) == set(first.seconds)
    key = ("text_encoder", "forward")
    assert torch.equal(*(one.results[key]["last_hidden_state"] for one in (recorder, heard)))
    assert torch.equal(recorder.inputs[key][0][0], heard.inputs[key][0][0])


def test_the_guard_still_names_a_text_encoder_that_gave_nan(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    with torch.no_grad():
        pipeline.text_encoder.norm.weight.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(RunError, match="the text_encoder gave NaN or infinity in bfloat16 during encode"):
            generate(pipeline, spec.workload.bounds, spec.workload.request)


def test_offloaded_weights_do_not_travel_for_a_prompt_that_is_known(
    pipeline: DiffusionPipeline, spec: DeploySpec, plain: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    unplace(pipeline)
    monkeypatch.setattr("sana_deploy.run.place.waiting_device", lambda resolved, name: f"elsewhere, {name}")
    bind(pipeline, compile_spec(spec).resolve(), PresentHost())
    weights, journeys = border_of(pipeline).offloaded["text_encoder"], list[bool]()
    arrive = weights.arrive

    def noted(user: RequestState) -> None:
        journeys.append(weights.there)
        arrive(user)

    monkeypatch.setattr(weights, "arrive", noted)
    exact = drawn(plain, spec)
    assert drawn(pipeline, spec) == exact
    assert len(journeys) == 2
    assert drawn(pipeline, spec) == exact
    assert len(journeys) == 2
    assert journeys == [False, True]
    assert not weights.there
    assert drawn(pipeline, spec, negative_prompt="blurred") == drawn(plain, spec, negative_prompt="blurred")
    assert len(journeys) == 3
    with torch.no_grad():
        for one in (pipeline, plain):
            one.text_encoder.norm.weight.add_(1)
    assert drawn(pipeline, spec) == drawn(plain, spec) != exact


def test_taking_the_placement_off_ends_it(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    drawn(pipeline, spec)
    unplace(pipeline)
    encoder = pipeline.text_encoder
    assert encoder.forward.__func__ is type(encoder).forward


@pytest.mark.parametrize("fidelity", ["shapes", "numbers"])
def test_a_rehearsal_keeps_nothing(small: Small, fidelity: Any) -> None:
    plan = compile_spec(small("machine=virtual", "machine.gpus=h100", "workload.steps=2"))
    ended = rehearse(plan, fidelity)
    assert ended.measured.prompt_cache_hits == 0


def test_the_text_encoder_makes_what_the_pipeline_reads_and_nothing_else(
    plain: DiffusionPipeline, pipeline: DiffusionPipeline
) -> None:
    """Keys and values to go on from would take memory, and copy a number from the CPU, which no CUDA graph may do."""
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.int64)
    whole = unplace(plain).text_encoder
    with torch.no_grad():
        wanted = whole(ids, attention_mask=mask)
        got = pipeline.text_encoder(ids, attention_mask=mask)
    assert wanted.past_key_values is not None
    assert got.past_key_values is None
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)
