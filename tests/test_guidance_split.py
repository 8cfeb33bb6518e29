"""The halves of guidance on two devices: the ordinary call, the picture of one device, whatever happens in between.

A CPU computes other last places for other numbers of rows, so that pictures are compared within 2e-6 where the whole is
compared with its halves, and bit for bit where both have halves or both are whole.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaControlNetPipeline
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from repeating import RepeatingHost

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.plan.artifact import ResolvedPlan
from sana_deploy.run.audit import Recorder, audit, in_float32
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.graphed_forward import GraphedForward
from sana_deploy.run.hook import border_of
from sana_deploy.run.host import PresentHost
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import place, unplace
from sana_deploy.run.quantize import is_quantized, parts_of
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.split_tensor import SplitTensor
from sana_deploy.run.traffic import floating

Small = Callable[..., DeploySpec]
Change = Callable[[DiffusionPipeline], object]
pytestmark = pytest.mark.usefixtures("short_prompts")
UNITS = {"transformer.1": "cpu", "controlnet.1": "cpu"}
ROUNDING = 2e-6


def resolved_plan(spec: DeploySpec, split: bool = True, runtime: str = "eager") -> ResolvedPlan:
    """A plan for the CPU, which would not be split."""
    resolved = compile_spec(spec).resolve()
    plan = resolved.plan.model_copy(update={"runtime": runtime})
    return replace(resolved, plan=plan, unit_devices=UNITS if split else {})


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.steps=3")


@pytest.fixture
def pipeline(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec))


@pytest.fixture
def whole(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec, split=False))


def drawn(
    pipeline: DiffusionPipeline, spec: DeploySpec, state: RequestState | None = None, **shape: Any
) -> torch.Tensor:
    workload = spec.workload.bounds.model_copy(update=shape)
    guidance = {} if workload.guided else {"guidance_scale": 1.0}
    request = spec.workload.request.model_copy(update=guidance)
    pixels, _ = run_request(pipeline, workload, request, state=state)
    return pixels


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def graphed(module: torch.nn.Module) -> GraphedForward:
    found = module._old_forward
    assert isinstance(found, GraphedForward)
    return found


def called(pipeline: DiffusionPipeline, spec: DeploySpec, **shape: Any) -> Counter[str]:
    state = RequestState()
    drawn(pipeline, spec, state, **shape)
    return state.calls


def test_the_picture_is_that_of_one_device_and_each_unit_works_in_every_step(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    state, seen = RequestState(), []
    state.observers.append(lambda event, call: seen.append((event, call)))
    shapes: dict[str, set[int]] = {}
    state.on_inputs.append(
        lambda name, _, args, kwargs: shapes.setdefault(name, set()).add(len(args[0]) if args else 0)
    )
    assert apart(drawn(pipeline, spec, state), drawn(whole, spec)) < ROUNDING
    order = ["controlnet.1", "controlnet", "transformer.1", "transformer"]
    inside = [(event, f"{unit}.forward") for unit in order for event in ("enter", "leave")]
    assert seen[-2 - 3 * 8 : -2] == inside * 3, "the other device is given its half first"
    assert {name: shapes[name] for name in order} == {name: {1} for name in order}
    assert state.remarks == []
    assert apart(drawn(pipeline, spec, batch=2), drawn(whole, spec, batch=2)) < ROUNDING


def test_the_controlnet_is_visibly_at_work_in_both_halves(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    request = spec.workload.request.model_copy(update={"conditioning_scale": 0.0})
    off, _ = run_request(pipeline, spec.workload.bounds, request)
    off_whole, _ = run_request(whole, spec.workload.bounds, request)
    assert apart(off, off_whole) < ROUNDING
    assert apart(off, drawn(pipeline, spec)) > 1e-4


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_without_guidance_the_home_units_draw_alone_to_the_bits_of_one_device(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec, batch: int
) -> None:
    state = RequestState()
    picture = drawn(pipeline, spec, state, guided=False, batch=batch)
    assert torch.equal(picture, drawn(whole, spec, guided=False, batch=batch))
    assert not {*UNITS} & {*state.calls}
    assert state.remarks == []
    assert {*UNITS} <= {*called(pipeline, spec)}, "the next request has guidance again"
    assert not {*UNITS} & {*called(pipeline, spec, guided=False, batch=2)}


def test_a_module_that_is_called_by_itself_works_by_itself(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    rows = {name: torch.randn(2, *shape) for name, shape in inputs(pipeline).items()}
    called_by_hand = dict(**rows, timestep=torch.tensor([500, 500]), return_dict=False)
    state = border_of(pipeline).state
    for _ in range(2):
        with torch.no_grad():
            pipeline.transformer(**called_by_hand)
        drawn(pipeline, spec)  # a request of its own state
    assert state.calls["transformer"] == 2
    assert "transformer.1" not in state.calls


def inputs(pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
    config = pipeline.transformer.config
    return {"hidden_states": (config.in_channels, 2, 3), "encoder_hidden_states": (4, config.caption_channels)}


def test_requests_in_threads_with_and_without_guidance_do_not_mix(
    pipeline: DiffusionPipeline, spec: DeploySpec
) -> None:
    found: dict[tuple[str, bool], torch.Tensor] = {}

    def draw(name: str, guided: bool) -> None:
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        one = SanaControlNetPipeline(**{**pipeline.components, "scheduler": scheduler})
        one.hf_device_map = pipeline.hf_device_map
        for method in ("encode_prompt", "maybe_free_model_hooks"):
            setattr(one, method, getattr(pipeline, method))
        found[name, guided] = drawn(one, spec, batch=2, guided=guided)

    for guided in (True, False):
        draw("alone", guided)
    threads = [threading.Thread(target=draw, args=(f"together {i}", i % 2 == 0)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(picture, found["alone", guided]) for (_, guided), picture in found.items())


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference mode"])
@pytest.mark.parametrize("in_place", [False, True])
def test_residuals_that_the_caller_changes_are_the_changed_ones_in_both_halves(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec, in_place: bool, inference: bool
) -> None:
    def weaken(_: Any, __: Any, output: Any) -> Any:
        weights = torch.tensor([0.1, 2.0]).reshape(2, 1, 1)
        changed = [residual.mul_(weights) if in_place else residual * weights for residual in output[0]]
        return (changed,)

    plain = drawn(pipeline, spec)
    for one in (pipeline, whole):
        one.controlnet.register_forward_hook(weaken)
    with torch.inference_mode(inference):
        picture, expected = drawn(pipeline, spec), drawn(whole, spec)
    assert apart(picture, expected) < ROUNDING
    assert apart(picture, plain) > 1e-4


def test_residuals_of_another_step_are_used_where_the_caller_skips_the_controlnet(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    plain = drawn(pipeline, spec)
    for one in (pipeline, whole):
        once = one.controlnet.forward
        kept: list[Any] = []

        def first_only(*args: Any, once: Any = once, kept: list[Any] = kept, **kwargs: Any) -> Any:
            kept[:] = kept or [once(*args, **kwargs)]
            return kept[0]

        one.controlnet.forward = first_only
    picture = drawn(pipeline, spec)
    assert apart(picture, drawn(whole, spec)) < ROUNDING
    assert apart(picture, plain) > 1e-5


def test_ordinary_residuals_are_cut(pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec) -> None:
    def doubled(_: Any, args: Any, kwargs: Any) -> Any:
        kept = kwargs["controlnet_block_samples"]
        return args, {**kwargs, "controlnet_block_samples": tuple(2 * residual for residual in kept)}

    for one in (pipeline, whole):
        one.transformer.register_forward_pre_hook(doubled, with_kwargs=True)
    assert apart(drawn(pipeline, spec), drawn(whole, spec)) < ROUNDING
    assert {*UNITS} <= {*called(pipeline, spec)}


def test_embeddings_that_a_callback_changes_are_cut_anew(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    def change(_: Any, step: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            return {"prompt_embeds": kwargs["prompt_embeds"] * 0.5, "latents": kwargs["latents"] + 0.1}
        kwargs["prompt_embeds"].mul_(0.5)
        return kwargs

    pictures = [
        one("a cat", control_image=torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)),
            negative_prompt="grey", height=64, width=96, num_inference_steps=3, output_type="pt",
            generator=torch.Generator().manual_seed(2), use_resolution_binning=False, callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]).images
        for one in (pipeline, whole)
    ]  # fmt: skip
    assert apart(*pictures) < ROUNDING
    assert border_of(pipeline).state.calls["transformer.1"] == 3
    assert border_of(pipeline).state.halves is None, "the call has ended, and keeps nothing"


def lora(pipeline: DiffusionPipeline) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    for name in ("transformer", "controlnet"):
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
        getattr(pipeline, name).add_adapter(config, "style")


def fused(pipeline: DiffusionPipeline) -> None:
    lora(pipeline)
    pipeline.transformer.fuse_lora(lora_scale=0.7)


def scaled(pipeline: DiffusionPipeline) -> None:
    lora(pipeline)
    pipeline.transformer.set_adapters("style", 0.25)


def new_state(pipeline: DiffusionPipeline) -> None:
    for name in ("transformer", "controlnet"):
        module = getattr(pipeline, name)
        module.load_state_dict({key: value * 0.9 for key, value in module.state_dict().items()})


def in_place(pipeline: DiffusionPipeline) -> None:
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(0.8)


def through_data(pipeline: DiffusionPipeline) -> None:
    pipeline.controlnet.controlnet_blocks[0].weight.data.add_(0.1)
    pipeline.transformer.proj_out.weight.data.mul_(0.8)


def other_layer(pipeline: DiffusionPipeline) -> None:
    torch.manual_seed(5)
    old = pipeline.transformer.proj_out
    pipeline.transformer.proj_out = torch.nn.Linear(old.in_features, old.out_features).requires_grad_(False)


def other_attention(pipeline: DiffusionPipeline) -> None:
    for block in pipeline.transformer.transformer_blocks:
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
        block.attn1.to_v.weight = torch.nn.Parameter(block.attn1.to_v.weight * 1.5)


CHANGES: list[Change] = [lora, scaled, fused, new_state, in_place, through_data, other_layer, other_attention]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("runtime", ["eager", "graphs"])
def test_both_halves_follow_what_is_done_to_the_component(
    whole: DiffusionPipeline, spec: DeploySpec, change: Change, runtime: str
) -> None:
    host = RepeatingHost()
    pipeline = load_pipeline(resolved_plan(spec, runtime=runtime), host=host)
    plain = drawn(pipeline, spec)
    for one in (pipeline, whole):
        change(one)
    picture = drawn(pipeline, spec)
    assert apart(picture, drawn(whole, spec)) < ROUNDING
    assert apart(picture, plain) > 1e-4, "the change is one that shows"
    assert {*UNITS} <= {*called(pipeline, spec)}, "and both units work on"


def test_adapters_may_be_turned_off_and_taken_away_again(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    plain = drawn(pipeline, spec)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipeline.transformer.add_adapter(config, "style")
    styled = drawn(pipeline, spec)
    pipeline.transformer.disable_adapters()
    assert torch.equal(drawn(pipeline, spec), plain)
    pipeline.transformer.enable_adapters()
    assert torch.equal(drawn(pipeline, spec), styled)
    assert apart(styled, plain) > 1e-4
    pipeline.transformer.delete_adapters("style")
    assert torch.equal(drawn(pipeline, spec), plain)


def test_a_cast_of_one_component_reaches_its_copy(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    for one in (pipeline, whole):
        one.transformer.to(torch.bfloat16)  # residuals in float32 are cast by the pipeline
    state = RequestState()
    seen: dict[str, set[torch.dtype]] = {}
    state.on_outputs.append(
        lambda name, _, output: seen.setdefault(name, set()).update(one.dtype for one in floating(output))
    )
    picture = drawn(pipeline, spec, state)
    assert seen["transformer"] == seen["transformer.1"] == {torch.bfloat16}
    assert apart(picture, drawn(whole, spec)) < 0.05, "bfloat16 rounds"
    assert state.remarks == []


class RowsTogether(SanaLinearAttnProcessor2_0):
    """An attention processor from elsewhere: it lets the second half of the rows see the first."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = super().__call__(attn, hidden_states, *args, **kwargs)
        return made + made.mean(dim=0, keepdim=True)


def looking_at_rows_together(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer.transformer_blocks[0].attn1.set_processor(RowsTogether())


def hook_inside(pipeline: DiffusionPipeline) -> None:
    pipeline.transformer.transformer_blocks[0].register_forward_hook(
        lambda _, __, output: output + output.mean(dim=0, keepdim=True)
    )


def forward_inside(pipeline: DiffusionPipeline) -> None:
    block = pipeline.transformer.transformer_blocks[0]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 1.1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            looking_at_rows_together,
            "transformer_blocks.0.attn1 has the attention processor RowsTogether, which may look",
        ),
        (hook_inside, "transformer_blocks.0 has hooks"),
        (forward_inside, "transformer_blocks.0 has another forward than its class"),
        (lambda pipeline: pipeline.transformer.train(), "the module is in training mode"),
    ],
)
def test_what_may_need_all_rows_gets_them_and_the_outcome_says_so(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec, change: Change, why: str
) -> None:
    for one in (pipeline, whole):
        one.transformer.eval()
        change(one)
    state = RequestState()
    picture = drawn(pipeline, spec, state)
    assert apart(picture, drawn(whole, spec)) < ROUNDING
    assert state.calls["transformer.1"] == 0
    assert state.calls["controlnet.1"] == 3, "the other component is split as before"
    (remark,) = state.remarks
    assert remark.startswith(f"the transformer computed both halves of guidance on one device: {why}")


def test_a_module_that_cannot_be_copied_runs_whole(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, spec: DeploySpec
) -> None:
    pipeline.transformer.guard = threading.Lock()
    for one in (pipeline, whole):
        in_place(one)
    state = RequestState()
    assert apart(drawn(pipeline, spec, state), drawn(whole, spec)) < ROUNDING
    assert state.remarks == [
        "the transformer computed both halves of guidance on one device: it cannot be copied: "
        "cannot pickle '_thread.lock' object"
    ]
    del pipeline.transformer.guard
    in_place(pipeline)
    assert called(pipeline, spec)["transformer.1"] == 3, "until it can"


def test_gradients_go_through_the_component_s_own_module(pipeline: DiffusionPipeline) -> None:
    from sana_deploy.run.halves import Halves

    border_of(pipeline).state.halves = Halves()
    rows = {name: torch.randn(2, *shape) for name, shape in inputs(pipeline).items()}
    pipeline.transformer.requires_grad_(True)
    made = pipeline.transformer(**rows, timestep=torch.tensor([500, 500]), return_dict=False)[0]
    made.sum().backward()
    assert pipeline.transformer.proj_out.weight.grad is not None
    assert border_of(pipeline).state.calls["transformer.1"] == 0


def test_graphs_of_both_units_have_the_bits_of_eager_halves(spec: DeploySpec, pipeline: DiffusionPipeline) -> None:
    host, state = RepeatingHost(), RequestState()
    replayed = load_pipeline(resolved_plan(spec, runtime="graphs"), host=host)
    assert torch.equal(drawn(replayed, spec, state), drawn(pipeline, spec))
    assert host.made.recorded == 4
    assert torch.equal(drawn(replayed, spec), drawn(pipeline, spec))
    assert host.made.recorded == 4, "the second request captures nothing"
    assert state.eager_sentences() == []
    (graphs,) = border_of(replayed).graphs.values()
    assert graphs is not None
    reading = [sum(own is None for own in graph.inputs) for graph in graphs.graphs.values()]
    residuals = len(replayed.controlnet.controlnet_blocks)
    assert sorted(reading) == [0, 0, residuals, residuals], "each denoiser reads its ControlNet's residuals in place"


def test_the_memory_of_graphs_comes_back_when_a_copy_is_made_anew(spec: DeploySpec) -> None:
    host = RepeatingHost()
    pipeline = load_pipeline(resolved_plan(spec, runtime="graphs"), host=host)
    drawn(pipeline, spec)
    (graphs,) = border_of(pipeline).graphs.values()
    assert graphs is not None
    for _ in range(3):
        in_place(pipeline)
        drawn(pipeline, spec)
        assert len(graphs.graphs) == 4


def test_the_guard_names_the_unit_whose_result_is_nan(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    def broken(name: str, _: str, args: Any, kwargs: Any) -> None:
        if name == "transformer.1":
            args[0].fill_(float("nan"))

    state = RequestState()
    state.on_inputs.append(broken)
    with pytest.raises(RunError, match=r"the transformer\.1 gave NaN or infinity in float32 during denoise") as caught:
        generate(pipeline, spec.workload.bounds, spec.workload.request, state=state)
    assert caught.value.where == "precision.components.transformer"


def test_the_audit_compares_each_unit(small: Small) -> None:
    spec = small("precision=bf16", "workload.steps=2")
    resolved, recorder, state = resolved_plan(spec), Recorder(), RequestState()
    recorder.attach(state)
    images, _ = generate(load_pipeline(resolved), spec.workload.bounds, spec.workload.request, state=state)
    found = audit(recorder, images, resolved.plan, in_float32(spec, compile_spec), spec.workload)
    rows = {row.component: row for row in found.borders}
    assert {*rows} == {*resolved.plan.device_map, *UNITS}
    for unit in UNITS:
        assert rows[unit].phase == "denoise"
        assert 0 < rows[unit].relative_error < 0.1


@pytest.mark.parametrize(("precision", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_copies_of_quantised_weights_are_quantised(small: Small, precision: str, library: str) -> None:
    pytest.importorskip(library)
    spec = small(f"precision={precision}", "workload.steps=2")
    split, one = load_pipeline(resolved_plan(spec)), load_pipeline(resolved_plan(spec, split=False))
    state = RequestState()
    assert apart(drawn(split, spec, state), drawn(one, spec)) < 0.1, "in bfloat16"
    assert state.calls["transformer.1"] == 2
    made = split.transformer.forward.mirror._copy.proj_out.weight
    assert is_quantized(made)
    assert all(
        torch.equal(a, b) for a, b in zip(parts_of(made), parts_of(split.transformer.proj_out.weight), strict=True)
    )


@pytest.mark.parametrize("undo", [unplace, SanaControlNetPipeline.reset_device_map])
def test_a_pipeline_in_memory_is_split_and_taking_that_off_frees_the_copies(
    tiny: Path, spec: DeploySpec, whole: DiffusionPipeline, undo: Callable[[Any], object]
) -> None:
    pipeline = SanaControlNetPipeline.from_pretrained(tiny)
    own = vars(pipeline).keys() - {"hf_device_map"}
    place(pipeline, resolved_plan(spec))
    assert {*UNITS} <= {*pipeline.hf_device_map}
    assert apart(drawn(pipeline, spec), drawn(whole, spec)) < ROUNDING
    copies = [weakref.ref(pipeline.transformer.forward.mirror._copy)]
    undo(pipeline)
    gc.collect()
    assert [copy() for copy in copies] == [None]
    for name in ("transformer", "controlnet"):
        module = getattr(pipeline, name)
        assert module.forward.__func__ is type(module).forward
    assert {"encode_prompt", "maybe_free_model_hooks"}.isdisjoint(vars(pipeline).keys() - own)


class NoRoom(PresentHost):
    """A host whose second device is full."""

    def copy_module(self, module: torch.nn.Module, unit: str, device: torch.device) -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.20 GiB.")


def test_no_room_for_the_second_half_is_an_error_of_loading(spec: DeploySpec) -> None:
    with pytest.raises(RunError, match="out of memory while copying components for the second half") as caught:
        load_pipeline(resolved_plan(spec), host=NoRoom())
    assert caught.value.where == "hardware.split"


def test_placing_without_room_leaves_the_pipeline_as_it_was(
    tiny: Path, spec: DeploySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = SanaControlNetPipeline.from_pretrained(tiny)
    monkeypatch.setattr(PresentHost, "copy_module", NoRoom.copy_module)
    with pytest.raises(RunError, match="out of memory"):
        place(pipeline, resolved_plan(spec))
    assert pipeline.hf_device_map is None
    assert not any(hasattr(one, "_hf_hook") for one in pipeline.components.values())


def test_a_root_hook_sees_the_whole_call(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    seen: list[tuple[int, tuple[int, ...], bool]] = []

    def look(_: Any, args: Any, output: Any) -> None:
        first = output[0]
        residual = first if isinstance(first, torch.Tensor) else first[0]
        seen.append((args[0].shape[0], tuple(residual.shape[:1]), isinstance(residual, SplitTensor)))

    for name in ("controlnet", "transformer"):
        getattr(pipeline, name).register_forward_hook(look)
    drawn(pipeline, spec)
    assert seen == [(2, (2,), True), (2, (2,), False)] * 3
