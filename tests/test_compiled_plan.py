"""`runtime=compiled` in plans: seconds beside measurements, memory as that of graphs, and what it does to pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_runtimes import H100, LARGE, profile_of, side, step

from sana_deploy import rehearse
from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.runtime import RUNTIMES, Execution
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.cost import slot_use
from sana_deploy.plan.execution import executed
from sana_deploy.plan.streaming import streamed
from sana_deploy.report.wording import runtime_words

Small = Callable[..., DeploySpec]
MEASURED = {
    # model, pixels, batch: milliseconds of a step of transformer and ControlNet with guidance, their blocks compiled
    # and in graphs; one H100 80GB, torch 2.11, float16
    ("sana_1600m_controlnet", 512, 1): 8.0,
    ("sana_1600m_controlnet", 1024, 1): 22.7,
    ("sana_1600m_controlnet", 1024, 4): 80.5,
    ("sana_1600m_controlnet", 2048, 1): 81.2,
    ("sana_600m_controlnet", 512, 1): 5.8,
    ("sana_600m_controlnet", 1024, 1): 12.7,
    ("sana_600m_controlnet", 2048, 1): 44.3,
}


@pytest.mark.parametrize("key", MEASURED)
def test_the_seconds_of_a_step_are_those_measured_within_a_twentieth(key: tuple[str, int, int]) -> None:
    assert step(profile_of(*key), "compiled") == pytest.approx(MEASURED[key], rel=0.05)


def test_a_compiled_plan_is_faster_than_one_of_graphs_and_keeps_as_much_memory() -> None:
    graphs, compiled = (compile_plan([LARGE, *H100, *side(1024), f"runtime={mode}"]) for mode in ("graphs", "compiled"))
    assert (compiled.runtime, compiled.knobs, compiled.device_map) == ("compiled", graphs.knobs, graphs.device_map)
    assert compiled.slots == graphs.slots
    assert compiled.slots[0].pool_bytes > 0
    assert compiled.basis["slots.*.pool_bytes"] == "estimated"
    shares = {phase: compiled.estimates.seconds[phase] / value for phase, value in graphs.estimates.seconds.items()}
    assert shares["encode"] == shares["prepare"] == shares["decode"] == 1
    assert 0.6 < shares["denoise"] < 0.75
    assert runtime_words(compiled) == "runtime compiled (rounding)"
    assert Plan.from_values(compiled.model_dump(mode="json"), "memory") == compiled
    assert compiled.digest != graphs.digest


@pytest.mark.parametrize("execution", ["graphs", "compiled"])
def test_text_encoder_and_loop_are_in_graphs_and_the_vae_is_not(execution: Execution) -> None:
    profile = profile_of("sana_1600m_controlnet", 512, 1)
    changed = executed(profile, execution)
    assert {name for name, part in changed.parts.items() if part.graphed} == {
        "text_encoder", "transformer", "controlnet",
    }  # fmt: skip
    assert changed.components["vae"].execution == "eager"
    assert executed(changed, "eager") == profile, "and back"
    uses = [slot_use(executed(profile, how), {"vae": 0}, 0) for how in RUNTIMES]
    assert uses[0] == uses[1] == uses[2], "a VAE alone keeps no pool"


def test_residuals_of_a_controlnet_apart_are_streamed_as_those_of_graphs() -> None:
    profile = profile_of("sana_1600m_controlnet", 1024, 1)
    kept = {how: streamed(executed(profile, how)) for how in RUNTIMES}
    assert kept["compiled"] == kept["graphs"] != kept["eager"] == ()


def test_auto_never_takes_it() -> None:
    for pixels in (512, 1024, 2048):
        assert compile_plan([LARGE, *H100, *side(pixels)]).runtime in ("eager", "graphs")


def test_where_its_memory_does_not_fit_auto_is_offered() -> None:
    request = [LARGE, *H100, *side(512), "hardware=single_gpu", "hardware.allow=[encode_once]"]
    (slot,) = compile_plan([*request, "runtime=eager"]).slots
    used = f"machine.used={(slot.available_bytes - slot.peak_bytes) // 2**20 - 20}MiB"
    with pytest.raises(InfeasibleError, match="lacks memory on GPU 0") as caught:
        compile_plan([*request, used, "runtime=compiled"])
    assert caught.value.hint.startswith("this fits: runtime=auto")


def test_on_the_cpu_it_is_eager_and_the_plan_says_so(small: Small, machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small("runtime=compiled"), machine())
    assert plan.runtime == "eager"
    (remark,) = [one for one in plan.diagnostics if one.where == "runtime.mode"]
    assert (remark.type, remark.severity) == ("no_graphs", "warning")


@pytest.mark.usefixtures("short_prompts")
def test_a_rehearsal_finds_the_memory_that_is_planned_and_compiles_nothing(small: Small) -> None:
    one = ["machine=virtual", "machine.gpus=h100", "hardware=single_gpu"]
    plan = compile_spec(small(LARGE, *one, *side(512), "runtime=compiled"))
    (gpu,) = rehearse(plan).report.gpus
    assert abs(gpu.planned_error) < 0.02
    drawn = [rehearse(compile_spec(small(*one, "precision=fp32", f"runtime={mode}"))) for mode in ("eager", "compiled")]
    assert drawn[0].images[0].tobytes() == drawn[1].images[0].tobytes()
    assert "compile" not in drawn[1].measured.seconds


@pytest.mark.parametrize("gpu", ["p100", "v100"])
def test_gpus_that_inductor_refuses_run_eagerly_and_are_not_offered_it(gpu: str) -> None:
    older = gpu == "p100"
    machine = ("machine=virtual", f"machine.gpus={gpu}", "hardware=single_gpu")
    asked = compile_plan(["model=sana_600m_controlnet", *machine, *side(1024), "runtime=compiled", "precision=auto"])
    said = [one for one in asked.diagnostics if one.type == "old_gpu"]
    assert asked.runtime == ("eager" if older else "compiled")
    assert [one.message.partition(", it")[0].split(",")[0] for one in said] == older * [
        "runtime=compiled needs compute capability 7.0"
    ]
    offered = compile_plan(
        ["model=sana_600m_controlnet", *machine, *side(1024), "runtime=eager", "precision=auto"]
    ).faster
    assert any(one.runtime == "compiled" for one in offered) is not older
