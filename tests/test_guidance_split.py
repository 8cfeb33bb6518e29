"""The halves of guidance on two devices: the ordinary call gives the picture of one device.

The whole is compared with its halves within rounding, and bit for bit where both have halves or both are whole.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaControlNetPipeline
from halved import ROUNDING, UNITS, apart, called, drawn, resolved_plan
from repeating import RepeatingHost
from torch.utils import _pytree as pytree

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.run.audit import Recorder, audit, in_float32
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.halves import Halves
from sana_deploy.run.hook import border_of
from sana_deploy.run.host import PresentHost
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import place, unplace
from sana_deploy.run.quantize import is_quantized, parts_of
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.split_tensor import SplitTensor, as_whole

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.steps=3")


@pytest.fixture
def pipeline(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec))


@pytest.fixture
def whole(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec, split=False))


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


@pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])
@pytest.mark.parametrize("return_dict", [False, True])
def test_any_form_of_a_call_has_the_form_of_the_module_s_own_result(
    pipeline: DiffusionPipeline, whole: DiffusionPipeline, named: bool, return_dict: bool
) -> None:
    rows = {name: torch.randn(4, *shape) for name, shape in inputs(pipeline).items()}
    rows["timestep"] = torch.full((4,), 500)
    options: dict[str, Any] = {"return_dict": return_dict, "attention_kwargs": {"scale": 0.5}}
    given: dict[str, dict[str, Any]] = {
        "controlnet": {"controlnet_cond": rows["hidden_states"], "conditioning_scale": torch.tensor(0.5)},
        "transformer": {"encoder_attention_mask": torch.ones(4, 4)},
    }
    border_of(pipeline).state.halves = Halves()
    for name, more in given.items():
        args, kwargs = ((), {**rows, **more}) if named else (tuple(rows.values()), more)
        with torch.no_grad():
            made = [getattr(one, name)(*args, **kwargs, **options) for one in (pipeline, whole)]
        assert type(made[0]) is type(made[1])
        halved, plain = (pytree.tree_leaves(as_whole(one)) for one in made)
        assert len(halved) == len(plain)
        assert all(apart(a, b) < 1e-4 * float(b.abs().max()) for a, b in zip(halved, plain, strict=True))
        assert border_of(pipeline).state.calls[f"{name}.1"] == 1


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


def test_gradients_go_through_the_component_s_own_module(pipeline: DiffusionPipeline) -> None:
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
    assert host.made.recorded == 5, "two of either component, and the text encoder's"
    assert torch.equal(drawn(replayed, spec), drawn(pipeline, spec))
    assert host.made.recorded == 5, "the second request captures nothing"
    assert state.eager_sentences() == []
    (graphs,) = border_of(replayed).graphs.values()
    assert graphs is not None
    reading = [sum(own is None for own in graph.inputs) for graph in graphs.graphs.values()]
    residuals = len(replayed.controlnet.controlnet_blocks)
    assert sorted(reading) == [0, 0, 0, residuals, residuals], "each denoiser reads its ControlNet's residuals in place"


def test_the_memory_of_graphs_comes_back_when_a_copy_is_made_anew(spec: DeploySpec) -> None:
    host = RepeatingHost()
    pipeline = load_pipeline(resolved_plan(spec, runtime="graphs"), host=host)
    drawn(pipeline, spec)
    (graphs,) = border_of(pipeline).graphs.values()
    assert graphs is not None
    for _ in range(3):
        pipeline.transformer.proj_out.weight.data.mul_(0.9)
        drawn(pipeline, spec)
        assert len(graphs.graphs) == 5, "four, and the text encoder's"


def test_the_guard_names_the_unit_whose_result_is_nan(pipeline: DiffusionPipeline, spec: DeploySpec) -> None:
    def broken(name: str, _: str, args: Any, kwargs: Any) -> None:
        if name == "transformer.1":
            args[0].fill_(float("nan"))

    state = RequestState()
    state.on_inputs.append(broken)
    with pytest.raises(RunError, match=r"the transformer\.1 gave NaN or infinity in float32 during denoise") as caught:
        generate(pipeline, spec.workload.bounds, spec.workload.request, state=state)
    assert caught.value.where == "precision.components.transformer"
    assert state.halves is None, "a request that failed keeps no tensors either"


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
