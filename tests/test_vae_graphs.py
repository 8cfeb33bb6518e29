"""Encode and decode of the VAE in graphs: planned where Python would bind them, and the bits of eager.

A CPU has no CUDA graphs: here a recording repeats the work itself, into the tensors that it made first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from repeating import RepeatingHost

from sana_deploy import Plan, compile_plan
from sana_deploy._units import MIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec, VirtualMachine
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.virtual_machine import describe_machine
from sana_deploy.plan import cost
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.call_graphs import in_graphs, launch_bound
from sana_deploy.plan.cost import slot_use
from sana_deploy.plan.execution import executed, pool_bytes
from sana_deploy.plan.knobs import under
from sana_deploy.plan.profile import PipelineProfile, profile_pipeline
from sana_deploy.run.generate import run_request
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.request_state import RequestState

Small = Callable[..., DeploySpec]
BOTH = ["vae.encode", "vae.decode"]
LARGE = ["model=sana_1600m_controlnet", "machine=virtual", "hardware=single_gpu", "precision=mixed_bf16"]
pytestmark = pytest.mark.usefixtures("short_prompts")


def side(pixels: int) -> list[str]:
    return [f"workload.height={pixels}", f"workload.width={pixels}"]


def planned(*overrides: str) -> Plan:
    return compile_plan([*LARGE, "machine.gpus=h100", *overrides])


def loaded(spec: DeploySpec, host: RepeatingHost, calls: list[str]) -> DiffusionPipeline:
    """A pipeline on the CPU, which has graphs of these calls besides its forwards; of none where `calls` is empty."""
    resolved = compile_spec(spec).resolve()
    update = {"runtime": "graphs" if calls else "eager", "graphed_calls": calls}
    return load_pipeline(replace(resolved, plan=resolved.plan.model_copy(update=update)), host=host)


def drawn(pipeline: DiffusionPipeline, spec: DeploySpec, state: RequestState | None = None, **shape: Any) -> bytes:
    pixels, _ = run_request(pipeline, spec.workload.bounds.model_copy(update=shape), spec.workload.request, state=state)
    assert isinstance(pixels, torch.Tensor)
    return pixels.float().numpy().tobytes()


@pytest.fixture
def spec(small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.steps=1", "runtime.prompt_cache=0")


@pytest.fixture
def pipeline(spec: DeploySpec) -> DiffusionPipeline:
    return loaded(spec, RepeatingHost(), BOTH)


@pytest.fixture
def eager(spec: DeploySpec) -> DiffusionPipeline:
    return loaded(spec, RepeatingHost(), [])


def replays(pipeline: DiffusionPipeline) -> list[int]:
    return [one.replays for one in pipeline.vae._hf_hook.methods.values()]


def kept(pipeline: DiffusionPipeline) -> list[str]:
    """The components of the graphs that are there."""
    (graphs,) = border_of(pipeline).graphs.values()
    assert graphs is not None
    return [key[0].name for key in graphs.graphs if isinstance(key, tuple)]


def test_both_calls_are_replayed_from_the_second_picture_on_bit_for_bit(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec
) -> None:
    state = RequestState()
    for number in range(4):
        seeded = spec.model_copy(deep=True)
        seeded.workload.__dict__["seed"] = number
        assert drawn(pipeline, seeded, state) == drawn(eager, seeded)
        assert replays(pipeline) == [number, number]
    assert state.eager_sentences() == []


def test_results_are_those_of_the_class_and_no_later_call_writes_over_them(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline
) -> None:
    latents = torch.randn(3, 1, 32, 2, 2, generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad():
        for one in latents:
            pair = [placed.vae.decode(one) for placed in (pipeline, eager)]
            assert all(isinstance(output, DecoderOutput) for output in pair)
            found.append([output.sample for output in pair])
            whole, plain = (placed.vae.decode(one, return_dict=False) for placed in (pipeline, eager))
            assert isinstance(whole, tuple)
            assert torch.equal(whole[0], plain[0])
            images = pair[1].sample
            coded = [placed.vae.encode(images).latent for placed in (pipeline, eager)]
            assert torch.equal(*coded)
    assert all(torch.equal(*pair) for pair in found)
    assert replays(pipeline) == [2, 4]


SLICED, TILED = "the VAE takes one image at a time", "the VAE takes tiles"


@pytest.mark.parametrize(
    ("enable", "says", "encodes"),
    [
        (lambda vae: vae.enable_slicing(), f"1 of 2 calls: {SLICED}", 2),
        (lambda vae: vae.enable_tiling(32, 32, 32, 32), f"2 of 2 calls: {TILED}", 1),
    ],
    ids=["slices", "tiles"],
)
def test_what_takes_an_image_in_parts_is_eager_and_says_so(
    pipeline: DiffusionPipeline,
    eager: DiffusionPipeline,
    spec: DeploySpec,
    enable: Callable[[Any], object],
    says: str,
    encodes: int,
) -> None:
    for _ in range(2):
        assert drawn(pipeline, spec, batch=2) == drawn(eager, spec, batch=2)
    assert replays(pipeline) == [1, 1]
    for one in (pipeline, eager):
        enable(one.vae)
    state = RequestState()
    assert drawn(pipeline, spec, state, batch=2) == drawn(eager, spec, batch=2)
    assert state.eager_sentences() == [f"the vae ran eagerly in {says}"]
    assert replays(pipeline) == [encodes, 1], "one control image is no slice"
    assert "vae" not in kept(pipeline), "an eager call has the memory that graphs kept"


def test_new_weights_are_captured_anew(pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec) -> None:
    before = [drawn(pipeline, spec) for _ in range(3)]
    for one in (pipeline, eager):
        layer = one.vae.decoder.conv_out
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
    assert drawn(pipeline, spec) == drawn(eager, spec) != before[0]
    assert drawn(pipeline, spec) == drawn(eager, spec)


def test_a_new_size_is_not_eager_beside_what_large_graphs_keep(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec
) -> None:
    for _ in range(2):
        drawn(pipeline, spec)
    assert kept(pipeline).count("vae") == 2
    there = []
    border_of(pipeline).on_outputs.append(lambda name, *_: there.append(kept(pipeline)) if name == "vae" else None)
    plain: dict[str, Any] = {}
    wide: dict[str, Any] = {"height": 96}
    assert drawn(pipeline, spec, **wide) == drawn(eager, spec, **wide)
    assert there[0] == [], "all of them, since memory of their pool comes back when no graph of it is left"
    assert "vae" not in there[1]
    for shape in (plain, wide, plain, wide):
        assert drawn(pipeline, spec, **shape) == drawn(eager, spec, **shape)
    assert kept(pipeline).count("vae") == 4, "two calls of two sizes"
    assert replays(pipeline) == [5, 5], "no form is eager twice"


def test_memory_that_ends_in_a_capture_is_given_back_and_the_call_is_eager(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(pipeline, spec)
    recorder = border_of(pipeline).host.recorder(torch.device("cpu"))
    assert recorder is not None

    def full(work: object) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(recorder, "record", full)
    state = RequestState()
    assert drawn(pipeline, spec, state) == drawn(eager, spec)
    assert "the vae ran eagerly in 2 of 2 calls: its capture failed: out of memory" in state.eager_sentences()


def test_plans_say_which_calls_are_in_graphs_and_none_where_the_gpu_is_busy() -> None:
    found = {pixels: planned("runtime=graphs", *side(pixels)) for pixels in (512, 1024, 2048)}
    assert [plan.graphed_calls for plan in found.values()] == [BOTH, BOTH, []]
    assert planned("runtime=compiled", *side(512)).graphed_calls == BOTH
    assert planned("runtime=eager", *side(512)).graphed_calls == []
    assert planned("runtime=graphs", *side(1024), "workload.batch=4").graphed_calls == ["vae.encode"]
    for plan in (found[2048], planned("runtime=eager", *side(512))):
        assert plan.slots[0].first_pool_bytes is None
    assert planned("runtime=graphs", *side(1024), "machine.gpus=rtx4090").graphed_calls == []


def test_no_call_is_in_graphs_where_a_knob_saves_memory_or_the_pool_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roomy = planned("runtime=graphs", *side(512)).slots[0]
    offload = planned("runtime=graphs", *side(512), "hardware=custom_map", "hardware.knobs=[text_encoder_offload]",
                      "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}")  # fmt: skip
    assert (offload.graphed_calls, offload.slots[0].pool_bytes) == ([], roomy.first_pool_bytes)
    monkeypatch.setattr(cost, "pool_bytes", lambda size: 2**37 if size > 300 * MIB else pool_bytes(size))
    tight = planned("runtime=graphs", *side(512))
    assert (tight.runtime, tight.graphed_calls, tight.slots[0].pool_bytes) == ("graphs", [], roomy.first_pool_bytes)
    assert planned("hardware.allow=[]", *side(512)).graphed_calls == [], "auto goes the same way"


def profile_of(pixels: int) -> PipelineProfile:
    spec = compose_spec([*LARGE, "machine.gpus=h100", *side(pixels)])
    profile = profile_pipeline(open_checkpoint(spec.model), spec.workload.bounds, spec.precision.formats, lambda *_: {})
    gpus = describe_machine(VirtualMachine(kind="virtual", gpus="h100")).gpus
    return under(in_graphs(executed(profile, "graphs"), launch_bound(gpus)), ["encode_once"])


def test_the_pool_is_that_of_the_largest_call_and_the_first_request_has_a_smaller_one() -> None:
    profile = profile_of(1024)
    plain = in_graphs(profile, lambda part, phase: False)
    here = dict.fromkeys(profile.parts, 0)
    use, without = (slot_use(one, here, 0) for one in (profile, plain))
    vae = profile.components["vae"]
    steady = sum(part.steady_bytes for part in profile.parts.values())
    assert use.pool_bytes == pool_bytes(vae.activations["prepare"]) + steady
    assert use.first_pool_bytes == without.pool_bytes == without.first_pool_bytes
    assert use.peak_bytes == without.peak_bytes, "what an eager call takes beside a small pool"
    alone = slot_use(profile, {"vae": 0}, 0)
    assert alone.pool_bytes == use.pool_bytes - steady
    pixels = 3 * 1024 * 1024 * 2
    assert alone.activation_bytes == alone.pool_bytes + 3 * pixels, "as decoded, halved, and between 0 and 1"
    assert slot_use(profile, {"vae": "cpu"}, "cpu").pool_bytes == 0


def test_requests_of_another_size_are_admitted_with_the_calls_that_the_plan_names() -> None:
    plan = planned("runtime=graphs", *side(1024))
    admission = Admission(plan.resolve(), open_checkpoint(plan.spec.model))
    smaller = plan.spec.workload.bounds.model_copy(update={"height": 512, "width": 512})
    need = admission.need(smaller)
    assert need.peak_bytes < plan.slots[0].peak_bytes
    other = compile_plan([*LARGE, "machine.gpus=h100", "runtime=graphs", *side(2048)])
    without = Admission(other.resolve(), open_checkpoint(other.spec.model))
    seconds = [one.seconds(smaller) for one in (admission, without)]
    assert seconds[0] is not None
    assert seconds[1] is not None
    assert seconds[0] < seconds[1], "an encode and a decode that wait for Python"
