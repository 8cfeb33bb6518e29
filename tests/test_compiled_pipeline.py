"""`runtime=compiled` in the ordinary pipeline call: blocks compiled, in graphs, and as they were where that fails.

A CPU has no graphs, and runs eagerly in plans: here it gets both. `eager` and `aot_eager` are backends of
`torch.compile` that trace as Inductor does and run PyTorch's own kernels; Inductor needs a C++ compiler on a CPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaControlNetPipeline
from repeating import RepeatingHost
from test_compiled import Failing
from test_graphed_pipeline import resolved_plan

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.run import compiled
from sana_deploy.run.audit import Recorder, audit, in_float32
from sana_deploy.run.generate import generate, run_request
from sana_deploy.run.hook import BorderHook, border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import place, unplace
from sana_deploy.run.request_state import RequestState

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")
LOOPED = ("transformer", "controlnet")


class CompilingHost(RepeatingHost):
    """This machine, with a CPU that has graphs and a compiler."""

    def __init__(self, backend: str = "eager") -> None:
        super().__init__()
        self.backend = backend

    def compiler(self, device: torch.device) -> str:
        return self.backend


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


@pytest.fixture
def spec(tiny: Path, small: Small) -> DeploySpec:
    return small("precision=fp32", "workload.steps=4")


@pytest.fixture
def host() -> CompilingHost:
    return CompilingHost()


@pytest.fixture
def whole(spec: DeploySpec, host: CompilingHost) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec, "compiled"), host=host)


@pytest.fixture
def loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the VAE as it is, which takes longest to trace."""
    use = BorderHook.use_compiler

    def use_in_loop(hook: BorderHook, module: torch.nn.Module, regions: Any) -> None:
        if hook.name in LOOPED:
            use(hook, module, regions)

    monkeypatch.setattr(BorderHook, "use_compiler", use_in_loop)


@pytest.fixture
def pipeline(spec: DeploySpec, host: CompilingHost, loop_alone: None) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec, "compiled"), host=host)


@pytest.fixture
def eager(spec: DeploySpec) -> DiffusionPipeline:
    return load_pipeline(resolved_plan(spec, "eager"))


def drawn(pipeline: DiffusionPipeline, spec: DeploySpec, state: RequestState | None = None, **shape: Any) -> Any:
    bounds = spec.workload.bounds.model_copy(update=shape)
    pixels, _ = run_request(pipeline, bounds, spec.workload.request, state=state)
    return pixels


def compiled_blocks(pipeline: DiffusionPipeline) -> dict[str, int]:
    """How many modules of each component are compiled."""
    return {
        name: sum(module._compiled_call_impl is not None for module in getattr(pipeline, name).modules())
        for name in border_of(pipeline).pipeline.names
    }


def test_the_blocks_and_halves_that_the_description_names_are_compiled_once_for_all_alike(
    whole: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec, host: CompilingHost
) -> None:
    first, began = RequestState(), list[str]()
    first.compiling.on_start = began.append
    pipeline, reference, asked = whole, drawn(eager, spec), spec.workload
    _, measured = generate(pipeline, asked.bounds, asked, state=first)
    assert 0 < measured.seconds["compile"] < measured.seconds["generate"]
    layers = [len(getattr(pipeline, name).transformer_blocks) for name in LOOPED]
    assert compiled_blocks(pipeline) == {"text_encoder": 0, "vae": 0, "transformer": layers[0], "controlnet": layers[1]}
    assert began == ["controlnet"], "all blocks at once, since those of tiny are alike"
    assert host.made.recorded == 3, "the text encoder, transformer and ControlNet are in graphs"
    assert first.compiling.sentences() == first.eager_sentences() == []
    again = RequestState()
    assert torch.equal(drawn(pipeline, spec, again), reference), "the same kernels, traced"
    assert again.compiling.seconds == 0, "a second request finds everything compiled"


@pytest.mark.parametrize("undo", [unplace, SanaControlNetPipeline.reset_device_map])
def test_taking_the_placement_off_takes_the_compiled_code_off(
    pipeline: DiffusionPipeline, spec: DeploySpec, undo: Callable[[Any], object]
) -> None:
    drawn(pipeline, spec)
    undo(pipeline)
    for name in pipeline.components:
        module = getattr(pipeline, name)
        if isinstance(module, torch.nn.Module):
            assert not any("_compiled_call_impl" in vars(layer) for layer in module.modules()), name
            assert "_old_forward" not in vars(module)
    for name in LOOPED:
        module = getattr(pipeline, name)
        assert module.forward.__func__ is type(module).forward


@pytest.mark.parametrize(("at", "name"), [(1, "controlnet"), pytest.param(3, "vae", marks=pytest.mark.slow)])
def test_where_compiling_fails_the_component_runs_uncompiled_and_the_outcome_says_why(
    at: int, name: str, eager: DiffusionPipeline, spec: DeploySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of tiny's ControlNet come in two variants: the first reads its input across channels."""
    use = BorderHook.use_compiler

    def use_in_part(hook: BorderHook, module: torch.nn.Module, regions: Any) -> None:
        use(hook, module, {"controlnet": regions, "vae": ("decoder",)}.get(hook.name, ()))

    monkeypatch.setattr(BorderHook, "use_compiler", use_in_part)
    failing = Failing(at)
    monkeypatch.setattr(compiled, "_backend", lambda _: failing)
    host = CompilingHost()
    pipeline, reference = load_pipeline(resolved_plan(spec, "compiled"), host=host), drawn(eager, spec)
    for _ in range(2):
        state = RequestState()
        assert torch.equal(drawn(pipeline, spec, state), reference)
        assert state.compiling.sentences() == [f"the {name} ran uncompiled: compiling failed: no kernel for this"]
        assert not state.eager_sentences(), "in graphs all the same"
    assert host.made.recorded == 3
    assert {part for part, count in compiled_blocks(pipeline).items() if count} == {"controlnet", "vae"} - {name}


@pytest.mark.slow
def test_lora_is_compiled_anew(pipeline: DiffusionPipeline, eager: DiffusionPipeline, spec: DeploySpec) -> None:
    peft = pytest.importorskip("peft")
    plain = drawn(pipeline, spec)
    for one in (pipeline, eager):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
        one.transformer.add_adapter(config, "style")
    state = RequestState()
    styled = drawn(pipeline, spec, state)
    assert torch.equal(styled, drawn(eager, spec))
    assert not torch.equal(styled, plain)
    assert state.compiling.seconds > 0
    assert not state.compiling.sentences()
    for one in (pipeline, eager):
        one.transformer.delete_adapters("style")
    assert torch.equal(drawn(pipeline, spec), plain)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_weights_are_compiled_too(small: Small, tiny: Path, loop_alone: None, precision: str) -> None:
    pytest.importorskip("torchao")
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    spec, state = small(f"precision={precision}", "workload.steps=3"), RequestState()
    plain = load_pipeline(resolved_plan(spec, "eager"))
    pipeline = load_pipeline(resolved_plan(spec, "compiled"), host=CompilingHost("aot_eager"))
    assert torch.equal(drawn(pipeline, spec, state), drawn(plain, spec))
    assert not state.compiling.sentences()
    assert compiled_blocks(pipeline)["transformer"]


def test_the_audit_compares_with_eager_float32(small: Small, tiny: Path, host: CompilingHost, loop_alone: None) -> None:
    spec = small("precision=bf16", "workload.steps=3", "runtime=compiled")
    resolved, recorder, state = resolved_plan(spec, "compiled"), Recorder(), RequestState()
    recorder.attach(state)
    pipeline = load_pipeline(resolved, host=host)
    images, _ = generate(pipeline, spec.workload.bounds, spec.workload.request, state=state)
    asked: list[DeploySpec] = []

    def planned(one: DeploySpec) -> Any:
        asked.append(one)
        return compile_spec(one)

    found = audit(recorder, images, resolved.plan, in_float32(spec, planned), spec.workload)
    assert asked[0].runtime.mode == "eager"
    assert {row.component for row in found.borders} == set(resolved.plan.device_map)
    assert all(0 < row.relative_error < 0.05 for row in found.borders)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler on a CPU")
def test_inductor_draws_the_picture_up_to_rounding_and_keeps_its_code_in_the_cache_folder(
    spec: DeploySpec, eager: DiffusionPipeline, cache: Path, loop_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    pipeline, state = load_pipeline(resolved_plan(spec, "compiled"), host=CompilingHost("inductor")), RequestState()
    reference, found = drawn(eager, spec), drawn(pipeline, spec, state)
    assert not state.compiling.sentences()
    assert compiled_blocks(pipeline)["transformer"]
    assert 0 < float((found - reference).abs().max()) < 2e-5, "rounding, and Inductor's"
    assert any((cache / "inductor").rglob("*.py"))
    again = place(unplace(pipeline), resolved_plan(spec, "eager"))
    assert torch.equal(drawn(again, spec), reference)
