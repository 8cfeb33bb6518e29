"""The ordinary pipeline call with text encoder, transformer and ControlNet in graphs: the bits of eager, in any case.

A CPU has no CUDA graphs: here a recording repeats the work itself, into the tensors that it made first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, SanaControlNetPipeline
from repeating import RepeatingHost
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.run.audit import Recorder, audit, in_float32
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.graphed_forward import GraphedForward
from sana_deploy.run.hook import border_of, forget_graphs
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import bind, unplace
from sana_deploy.run.request_state import RequestState

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")
GRAPHED = ("text_encoder", "transformer", "controlnet")


def resolved_plan(spec: DeploySpec, runtime: str = "graphs") -> ResolvedPlan:
    """A plan for the CPU, which would be eager."""
    resolved = compile_spec(spec).resolve()
    return replace(resolved, plan=resolved.plan.model_copy(update={"runtime": runtime}))


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.steps=4")


@pytest.fixture
def host() -> RepeatingHost:
    return RepeatingHost()


@pytest.fixture
def pipeline(spec: DeploySpec, host: RepeatingHost) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec), host=host)


@pytest.fixture
def eager(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec, "eager"))


def drawn(pipeline: DiffusionPipeline, spec: DeploySpec, state: RequestState | None = None, **shape: Any) -> bytes:
    workload, request = spec.workload.bounds.model_copy(update=shape), spec.workload.request
    request = request.model_copy(update={} if workload.guided else {"guidance_scale": 1.0})
    pixels, _ = run_request(pipeline, workload, request, state=state)
    assert isinstance(pixels, torch.Tensor)
    return pixels.float().numpy().tobytes()


def graphed(pipeline: DiffusionPipeline, name: str) -> GraphedForward:
    found = getattr(pipeline, name)._old_forward
    assert isinstance(found, GraphedForward)
    return found


def test_the_picture_has_the_bits_of_eager_in_every_request(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec, host: RepeatingHost
) -> None:
    state = RequestState()
    assert drawn(pipeline, spec, state) == drawn(eager, spec)
    assert host.made.recorded == 3
    assert [graphed(pipeline, name).replays for name in GRAPHED] == [1, 3, 3], "of two prompts in one form, and steps"
    assert drawn(pipeline, spec) == drawn(eager, spec)
    assert [graphed(pipeline, name).replays for name in GRAPHED] == [1, 7, 7], "the second request captures nothing"
    assert host.made.recorded == 3
    assert state.eager_sentences() == []
    assert not isinstance(vars(pipeline.vae).get("_old_forward"), GraphedForward)


def test_the_text_encoder_is_replayed_for_every_new_prompt_and_keeps_no_keys_and_values(
    small: Small, host: RepeatingHost, eager: DiffusionPipeline
) -> None:
    spec = small("precision=fp32", "workload.steps=2", "runtime.prompt_cache=0")
    pipeline = load_pipeline(resolved_plan(spec), host=host)
    for number, prompt in enumerate(("a barn", "a mill", "a barn"), start=1):
        asked = spec.workload.request.model_copy(update={"prompt": prompt})
        assert torch.equal(*(run_request(one, spec.workload.bounds, asked)[0] for one in (pipeline, eager)))
        assert graphed(pipeline, "text_encoder").replays == 2 * number - 1
    (graphs,) = border_of(pipeline).graphs.values()
    assert graphs is not None
    assert set(next(iter(graphs.graphs.values())).result) == {"last_hidden_state"}


def test_the_text_encoder_is_eager_where_its_weights_travel_or_values_decide_what_it_does(
    small: Small, host: RepeatingHost, eager: DiffusionPipeline, spec: DeploySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, state = load_pipeline(resolved_plan(spec), host=host), RequestState()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "other", eager_attention_forward)
    for one in (pipeline, eager):
        vars(one.text_encoder.config)["_attn_implementation_internal"] = "other"
    assert drawn(pipeline, spec, state) == drawn(eager, spec)
    assert state.eager_sentences() == [
        "the text_encoder ran eagerly in 2 of 2 calls: other attention goes by the values of the mask"
    ]
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        whole = pipeline.text_encoder(ids, attention_mask=mask, use_cache=True)
    assert whole.past_key_values is not None
    monkeypatch.setattr("sana_deploy.run.place.waiting_device", lambda resolved, name: f"elsewhere, {name}")
    bind(unplace(pipeline), resolved_plan(spec), host)
    assert not isinstance(vars(pipeline.text_encoder)["_old_forward"], GraphedForward)


def test_sdpa_attention_is_graphed_where_it_is_given_a_mask(
    small: Small, host: RepeatingHost, eager: DiffusionPipeline
) -> None:
    """transformers gives sdpa no mask where no token is padding, unless work is captured."""
    spec = small("precision=fp32", "workload.steps=1", "runtime.prompt_cache=0")
    pipeline = load_pipeline(resolved_plan(spec), host=host)
    for one in (pipeline, eager):
        vars(one.text_encoder.config)["_attn_implementation_internal"] = "sdpa"
        for layer in one.text_encoder.layers:  # which this attention has not, in recent versions
            layer.self_attn.attn_logit_softcapping = None
    for prompt, said in (("a barn", []), ("barn " * 1000, ["1 of 2 calls: without padding"])):
        asked, state = spec.workload.request.model_copy(update={"prompt": prompt}), RequestState()
        pixels = run_request(pipeline, spec.workload.bounds, asked, state=state)[0]
        assert torch.equal(pixels, run_request(eager, spec.workload.bounds, asked)[0])
        assert [part for part in said if part not in str(state.eager_sentences())] == []
        assert len(state.eager_sentences()) == len(said)
    assert graphed(pipeline, "text_encoder").replays > 0


def test_the_transformer_reads_residuals_where_the_controlnet_s_graph_writes_them(
    pipeline: DiffusionPipeline, spec: DeploySpec
) -> None:
    drawn(pipeline, spec)
    (graphs,) = border_of(pipeline).graphs.values()
    assert graphs is not None
    _, controlnet, transformer = graphs.graphs.values()
    assert sum(own is None for own in transformer.inputs) == len(controlnet.result[0])
    assert all(own is not None for own in controlnet.inputs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_graph_serves_every_conditioning_scale(small: Small, host: RepeatingHost, precision: str) -> None:
    spec = small(f"precision={precision}", "workload.steps=3")
    pipeline, eager = load_pipeline(resolved_plan(spec), host=host), load_pipeline(resolved_plan(spec, "eager"))
    found = []
    for scale in (1.0, 0.5, 0.3, 1.0):
        request = spec.workload.request.model_copy(update={"conditioning_scale": scale})
        pixels = [run_request(one, spec.workload.bounds, request)[0] for one in (pipeline, eager)]
        assert torch.equal(*pixels)
        found.append(pixels[0])
    assert host.made.recorded == 3, "one of them is the text encoder's"
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_requests_of_two_shapes_take_turns(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec, host: RepeatingHost
) -> None:
    shapes: list[dict[str, Any]] = [{}, {"height": 96}, {}, {"height": 96}, {"guided": False, "batch": 3}]
    for shape in shapes:
        assert drawn(pipeline, spec, **shape) == drawn(eager, spec, **shape), shape
    assert host.made.recorded == 7, "one of them is the text encoder's"


def test_graphs_that_are_forgotten_are_made_anew(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec, host: RepeatingHost
) -> None:
    before = drawn(pipeline, spec)
    forget_graphs(pipeline)
    (graphs,) = border_of(pipeline).graphs.values()
    assert graphs is not None
    assert not graphs.graphs
    assert drawn(pipeline, spec) == before == drawn(eager, spec)
    assert host.made.recorded == 5, "the text encoder's once, since its results are kept"
    forget_graphs(eager)


def test_the_plan_bounds_how_many_graphs_are_kept(
    small: Small, host: RepeatingHost, eager: DiffusionPipeline, spec: DeploySpec
) -> None:
    few = small("precision=fp32", "workload.steps=4", "runtime.most_graphs=2")
    pipeline = load_pipeline(resolved_plan(few), host=host)
    shapes: list[dict[str, Any]] = [{}, {"height": 96}, {}]
    for shape in shapes:
        assert drawn(pipeline, spec, **shape) == drawn(eager, spec, **shape)
    (graphs,) = border_of(pipeline).graphs.values()
    assert graphs is not None
    assert (len(graphs.graphs), host.made.recorded) == (2, 7)


def test_without_graphs_on_the_device_the_plan_runs_eagerly(spec: DeploySpec) -> None:
    pipeline, state = load_pipeline(resolved_plan(spec)), RequestState()
    drawn(pipeline, spec, state)
    assert not any(isinstance(getattr(pipeline, name)._old_forward, GraphedForward) for name in GRAPHED)
    assert state.eager_sentences() == [], "there was nothing to say no to"


@pytest.mark.parametrize("undo", [unplace, SanaControlNetPipeline.reset_device_map])
def test_taking_the_placement_off_gives_the_class_s_own_forward_back(
    pipeline: DiffusionPipeline, spec: DeploySpec, undo: Callable[[Any], object]
) -> None:
    drawn(pipeline, spec)
    (graphs,) = border_of(pipeline).graphs.values()
    undo(pipeline)
    assert graphs is not None
    assert not graphs.graphs, "and the memory of graphs"
    for name in GRAPHED:
        module = getattr(pipeline, name)
        assert module.forward.__func__ is type(module).forward
        assert "_old_forward" not in vars(module)


def test_lora_is_captured_anew_when_it_is_loaded_scaled_and_unloaded(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec, host: RepeatingHost
) -> None:
    peft = pytest.importorskip("peft")
    plain = drawn(pipeline, spec)
    for one in (pipeline, eager):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
        one.transformer.add_adapter(config, "style")
    styled = drawn(pipeline, spec)
    assert styled == drawn(eager, spec) != plain
    assert host.made.recorded == 4, "only the transformer's"
    for one in (pipeline, eager):
        one.transformer.set_adapters("style", 0.25)
    assert drawn(pipeline, spec) == drawn(eager, spec) not in (plain, styled)
    for one in (pipeline, eager):
        one.transformer.disable_adapters()
    assert drawn(pipeline, spec) == plain
    for one in (pipeline, eager):
        one.transformer.delete_adapters("style")
    assert drawn(pipeline, spec) == drawn(eager, spec) == plain
    assert graphed(pipeline, "transformer").replays > 0


def test_a_failed_capture_is_eager_and_stands_in_the_outcome(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec, host: RepeatingHost
) -> None:
    host.made.failing, state = True, RequestState()
    assert drawn(pipeline, spec, state) == drawn(eager, spec)
    reason = "its capture failed: operation not permitted when stream is capturing"
    counts = {"text_encoder": "1 of 2", "controlnet": "3 of 4", "transformer": "3 of 4"}
    assert state.eager_sentences() == [
        f"the {name} ran eagerly in {count} calls: {reason}" for name, count in counts.items()
    ]


def test_threads_with_a_request_each_draw_their_own_pictures(
    pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec
) -> None:
    seeds = (1, 2, 3)
    requests = {seed: spec.workload.request.model_copy(update={"seed": seed, "prompt": f"{seed}"}) for seed in seeds}
    found: dict[tuple[str, int], torch.Tensor] = {}

    def draw(name: str, placed: DiffusionPipeline, seed: int) -> None:
        scheduler = type(placed.scheduler).from_config(placed.scheduler.config)
        one = SanaControlNetPipeline(**{**placed.components, "scheduler": scheduler})
        one.hf_device_map = placed.hf_device_map
        found[name, seed], _ = run_request(one, spec.workload.bounds, requests[seed])

    for seed in seeds:
        draw("alone", eager, seed)
    drawn(pipeline, spec)
    threads = [threading.Thread(target=draw, args=("together", pipeline, seed)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found["alone", seed], found["together", seed]) for seed in seeds)
    assert not torch.equal(found["alone", 1], found["alone", 2])


def test_the_guard_names_the_component_whose_graph_gave_nan(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    drawn(pipeline, spec)
    with torch.no_grad():
        next(pipeline.controlnet.controlnet_blocks.parameters()).fill_(float("nan"))  # read anew by the graph
    with pytest.raises(RunError, match="the controlnet gave NaN or infinity in float32 during denoise"):
        generate(pipeline, spec.workload.bounds, spec.workload.request)


def test_the_audit_compares_what_graphs_gave(pipeline: DiffusionPipeline, small: Small, host: RepeatingHost) -> None:
    spec = small("precision=bf16", "workload.steps=3")
    resolved, recorder, state = resolved_plan(spec), Recorder(), RequestState()
    recorder.attach(state)
    drawn_by = load_pipeline(resolved, host=host)
    images, _ = generate(drawn_by, spec.workload.bounds, spec.workload.request, state=state)
    assert host.made.recorded == 3
    found = audit(recorder, images, resolved.plan, in_float32(spec, compile_spec), spec.workload)
    assert {row.component for row in found.borders} == set(resolved.plan.device_map)
    assert all(np.isfinite(row.relative_error) for row in found.borders)


def test_a_quantised_transformer_is_graphed_too(small: Small, tiny: Path) -> None:
    pytest.importorskip("torchao")
    spec, host = small("precision=int8", "workload.steps=3"), RepeatingHost()
    pipeline, plain = load_pipeline(resolved_plan(spec), host=host), load_pipeline(resolved_plan(spec, "eager"))
    assert drawn(pipeline, spec) == drawn(plain, spec)
    assert host.made.recorded == 3
