"""`runtime=auto|eager|graphs`: seconds and memory of graphs beside measurements, and what the planner makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from sana_deploy._units import MIB
from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.runtime import RUNTIMES, Execution
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError, UsageError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.known_gpus import KNOWN_GPUS
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.cost import host_bytes, slot_use
from sana_deploy.plan.diff import compare
from sana_deploy.plan.execution import executed, pool_bytes
from sana_deploy.plan.knobs import under
from sana_deploy.plan.profile import PipelineProfile, profile_pipeline
from sana_deploy.plan.records import Place
from sana_deploy.plan.saved_request import saved_plan
from sana_deploy.plan.seconds import component_phases, step_seconds
from sana_deploy.plan.setting import Setting, Tried

H100 = ["machine=virtual", "machine.gpus=h100"]
LARGE = "model=sana_1600m_controlnet"
MEASURED = {
    # model, pixels, batch: milliseconds of a step of transformer and ControlNet with guidance, MiB of the pool of their
    # graphs; one H100 80GB, torch 2.11, float16
    ("sana_1600m_controlnet", 512, 1): (11.9, 110),
    ("sana_1600m_controlnet", 1024, 1): (33.9, 346),
    ("sana_1600m_controlnet", 512, 4): (34.8, 364),
    ("sana_1600m_controlnet", 1024, 4): (124.1, 1172),
    ("sana_1600m_controlnet", 2048, 1): (124.6, 1172),
    ("sana_600m_controlnet", 512, 1): (8.9, 74),
    ("sana_600m_controlnet", 1024, 1): (20.4, 210),
    ("sana_600m_controlnet", 512, 4): (20.4, 214),
    ("sana_600m_controlnet", 1024, 4): (70.7, 614),
    ("sana_600m_controlnet", 2048, 1): (73.5, 614),
}


def side(pixels: int, batch: int = 1) -> list[str]:
    return [f"workload.height={pixels}", f"workload.width={pixels}", f"workload.batch={batch}"]


LOOPS = (("transformer",), ("transformer", "controlnet"))


def unknown(*_: object) -> NoReturn:
    """What these components need ships with the package."""
    raise AssertionError


@cache
def profile_of(model: str, pixels: int, batch: int) -> PipelineProfile:
    spec = compose_spec([f"model={model}", "precision=mixed_bf16", *side(pixels, batch)])
    checkpoint = open_checkpoint(spec.model)
    return profile_pipeline(checkpoint, spec.workload.bounds, spec.precision.formats, measure=unknown)


def step(profile: PipelineProfile, execution: Execution) -> float:
    """Milliseconds of a step on an H100."""
    looped = executed(profile, execution).components
    return 1e3 * sum(step_seconds(looped[name], KNOWN_GPUS["h100"]) for name in ("transformer", "controlnet"))


def test_the_seconds_of_a_step_are_those_measured_within_a_quarter_and_most_within_a_twentieth() -> None:
    ratios = {key: step(profile_of(*key), "graphs") / ms for key, (ms, _) in MEASURED.items()}
    assert all(0.8 < ratio < 1.25 for ratio in ratios.values()), ratios
    close = [ratio for ratio in ratios.values() if abs(ratio - 1) <= 0.05]
    assert len(close) >= 0.8 * len(ratios), ratios


def test_eager_is_as_fast_where_the_gpu_is_busy_and_waits_for_python_where_it_is_not() -> None:
    for key in MEASURED:
        ratio = step(profile_of(*key), "graphs") / step(profile_of(*key), "eager")
        busy = key[1:] in ((1024, 4), (2048, 1))
        assert ratio > 0.98 if busy else ratio < 0.65, (key, ratio)


@pytest.mark.parametrize("key", MEASURED)
def test_the_pool_of_graphs_is_planned_as_measured_or_a_little_above(key: tuple[str, int, int]) -> None:
    profile = executed(profile_of(*key), "graphs")
    use = slot_use(profile, {"transformer": 0, "controlnet": 0}, 0)
    measured = MEASURED[key][1]
    steady = sum(profile.components[name].steady_bytes for name in ("transformer", "controlnet"))
    assert 0.98 * measured <= (use.pool_bytes - steady) / MIB <= measured + 45
    alone = slot_use(profile, {"transformer": 0, "controlnet": 0}, 0)
    assert alone.activation_bytes >= alone.pool_bytes == use.pool_bytes, "one pool, in the fullest phase too"


def test_what_graphs_keep_is_there_in_every_phase_in_the_place_of_a_step_s_activations() -> None:
    eager = profile_of("sana_1600m_controlnet", 1024, 1)
    graphed = executed(eager, "graphs")
    denoiser, residuals = eager.components["transformer"], eager.crossings[-2]
    assert residuals.tensor == "controlnet_block_samples"
    steady = sum(part.steady_bytes for part in eager.components.values())
    pool = pool_bytes(denoiser.activations["denoise"]) + steady
    everything = dict.fromkeys(eager.parts, 0)
    was, now = (slot_use(one, everything, 0) for one in (eager, graphed))
    assert (was.phase, now.phase) == ("prepare", "prepare")
    assert now.activation_bytes - was.activation_bytes == pool
    alone, together = (slot_use(graphed, dict.fromkeys(names, 0), 0) for names in LOOPS)
    others = {phase: size for phase, size in denoiser.activations.items() if phase != "denoise"}
    streamed = {phase: size + residuals.bytes_each * (phase != "decode") for phase, size in others.items()}
    own = pool - eager.components["controlnet"].steady_bytes
    assert alone.activation_bytes == own + max(*streamed.values(), residuals.bytes_each), "they come to one place"
    others["decode"] -= residuals.bytes_each
    assert together.activation_bytes == pool + max(*others.values(), residuals.bytes_each), "a graph's are in the pool"
    apart = slot_use(graphed, {**everything, "controlnet": 1}, 1)
    net = eager.components["controlnet"]
    least = pool_bytes(net.activations["denoise"] + round(0.6 * residuals.bytes_each)) + net.steady_bytes
    assert apart.activation_bytes == least, "they leave from the pool"
    on_host: dict[str, Place] = dict.fromkeys(eager.parts, "cpu")
    assert slot_use(graphed, on_host, "cpu") == slot_use(eager, on_host, "cpu"), "a CPU has no graphs"


def test_the_text_encoder_s_graphs_share_the_pool_and_stay_eager_where_its_weights_travel() -> None:
    eager = profile_of("sana_1600m_controlnet", 512, 1)
    graphed, encoder = executed(eager, "graphs"), eager.components["text_encoder"]
    embeddings = sum(one.bytes_each for one in eager.crossings if one.src == "text_encoder")
    largest = max(eager.components[name].activations["denoise"] for name in ("transformer", "controlnet"))
    assert encoder.activations["encode"] < largest
    steady = sum(part.steady_bytes for part in eager.components.values())
    kept = slot_use(graphed, dict.fromkeys(eager.parts, 0), 0).pool_bytes - steady
    assert kept == pool_bytes(largest), "that of the largest"
    pool = pool_bytes(encoder.activations["encode"])
    alone = slot_use(graphed, {"text_encoder": 0}, 0)
    assert (alone.pool_bytes, alone.activation_bytes) == (pool, pool + embeddings), "they are copied out of the pool"
    waiting = under(graphed, ["text_encoder_offload"])
    assert waiting.components["text_encoder"].execution == "eager"
    assert slot_use(waiting, {"text_encoder": 0}, 0).pool_bytes == 0
    rates = KNOWN_GPUS["h100"]
    seconds = [component_phases(one.components["text_encoder"], one.steps, rates)["encode"] for one in (eager, graphed)]
    assert seconds[1] < 0.5 * seconds[0], "two calls of 26 layers that Python need not launch"


@pytest.mark.parametrize("execution", RUNTIMES)
def test_the_table_of_the_host_agrees_with_the_arithmetic(execution: Execution) -> None:
    profile = executed(profile_of("sana_1600m_controlnet", 1024, 1), execution)
    vae = replace(profile.components["vae"], unsplit_bytes=3 * MIB, workspaces={"prepare": 500 * MIB})
    profile = replace(profile, components={**profile.components, "vae": vae}, vae_under={})
    setting = Setting.of(0, Tried((), profile), [Gpu(0, "NVIDIA L4", 2**34, 2**34, (8, 9), 58)])
    names = list(profile.parts)
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), count):
            placement = {name: "cpu" if i in chosen else 0 for i, name in enumerate(names)}
            assert setting.on_host[sum(1 << i for i in chosen)] == host_bytes(profile, placement)  # type: ignore[arg-type]
    assert np.all(setting.on_host <= setting.needs)


def remark_of(plan: Plan) -> str:
    (remark,) = [one for one in plan.diagnostics if one.type == "auto_runtime"]
    assert (remark.severity, remark.where) == ("info", "runtime")
    return remark.message


@pytest.mark.parametrize("pixels", [512, 1024])
def test_auto_takes_graphs_where_a_step_waits_for_python(pixels: int) -> None:
    plan, eager = (compile_plan([LARGE, *H100, *side(pixels), *more]) for more in ([], ["runtime=eager"]))
    assert (plan.runtime, eager.runtime) == ("graphs", "eager")
    assert "auto chose graphs: ~" in remark_of(plan)
    assert "ms launched from Python; graphs keep ~" in remark_of(plan)
    assert plan.estimates.seconds["denoise"] < 0.95 * eager.estimates.seconds["denoise"]
    assert plan.estimates.seconds["encode"] < 0.5 * eager.estimates.seconds["encode"], "two calls of 26 layers"
    for phase in ("prepare", "decode"):
        assert plan.estimates.seconds[phase] < 0.95 * eager.estimates.seconds[phase], (
            "the VAE's calls are in graphs too"
        )
    assert plan.graphed_calls == ["vae.encode", "vae.decode"]
    assert (plan.knobs, plan.device_map) == (eager.knobs, eager.device_map)
    slot, more = plan.slots[0], plan.slots[0].peak_bytes - eager.slots[0].peak_bytes
    assert slot.first_pool_bytes is not None
    assert 0 < more == slot.first_pool_bytes < slot.pool_bytes, "the VAE's activations are in the pool or beside it"
    assert plan.digest != eager.digest == compile_plan([LARGE, *H100, *side(pixels), "runtime=eager"]).digest


@pytest.mark.parametrize(
    "chosen", [[*H100, *side(2048)], ["machine=2xt4", *side(1024)], ["machine=1xrtx4090", *side(1024)]]
)
def test_auto_stays_eager_where_the_gpu_is_busy_anyway(chosen: list[str]) -> None:
    plan = compile_plan([LARGE, *chosen])
    assert (plan.runtime, {slot.pool_bytes for slot in plan.slots}) == ("eager", {0})
    assert "auto chose eager: the GPU is busy anyway in the ~" in remark_of(plan)


def test_auto_stays_eager_where_graphs_do_not_fit_and_says_what_is_missing() -> None:
    request = [LARGE, *H100, *side(512), "hardware=single_gpu"]
    (slot,) = compile_plan([*request, "runtime=eager"]).slots
    tight = [
        *request,
        f"machine.used={(slot.available_bytes - slot.peak_bytes) // MIB - 20}MiB",
        "hardware.allow=[encode_once]",
    ]
    plan = compile_plan(tight)
    assert plan.runtime == "eager"
    assert "auto chose eager: graphs do not fit: GPU 0 needs " in remark_of(plan)
    with pytest.raises(InfeasibleError, match=r"0 of 1 placements fit \(1 lacks memory on GPU 0\)") as caught:
        compile_plan([*tight, "runtime=graphs"])
    assert caught.value.hint.startswith("this fits: runtime=auto")
    assert caught.value.plan.runtime == "graphs"
    offloading = compile_plan([*tight, "hardware.allow=[encode_once,text_encoder_offload]"])
    assert offloading.runtime == "eager"
    assert "graphs would fit with encode_once, text_encoder_offload, eager takes encode_once" in remark_of(offloading)


def test_a_placement_that_is_forced_gets_no_graphs_on_top() -> None:
    places = "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}"
    forced = ["hardware=custom_map", "hardware.force=true", places, "machine.memory=6GiB"]
    plan = compile_plan([LARGE, *H100, *side(512), *forced])
    assert plan.runtime == "eager"
    assert remark_of(plan) == "auto chose eager: graphs do not fit on GPU 0"


def test_on_the_cpu_everything_is_eager(small: Callable[..., DeploySpec], machine: Callable[..., Machine]) -> None:
    plan = compile_spec(small(), machine())
    assert plan.runtime == "eager"
    assert not [one for one in plan.diagnostics if one.where.startswith("runtime")]
    asked = compile_spec(small("runtime=graphs"), machine())
    assert asked.runtime == "eager"
    assert [one.type for one in asked.diagnostics if one.severity == "warning"] == ["no_gpu", "no_graphs"]
    places = "hardware.device_map={text_encoder: 0, vae: 0, transformer: cpu, controlnet: 0}"
    for mode, types in (("auto", []), ("graphs", ["no_graphs"])):
        custom = compile_spec(small("hardware=custom_map", places, f"runtime={mode}"), machine(24))
        assert custom.runtime == "eager"
        assert [one.type for one in custom.diagnostics if one.where.startswith("runtime")] == types


def test_a_text_encoder_on_the_cpu_leaves_the_choice_to_the_step(small: Callable[..., DeploySpec]) -> None:
    places = "hardware.device_map={text_encoder: cpu, vae: 0, transformer: 0, controlnet: 0}"
    plan = compile_spec(small(LARGE, *H100, "hardware=custom_map", places))
    assert (plan.runtime, plan.estimates.seconds) == ("graphs", {})
    assert "ms a step" in remark_of(plan)


def test_the_digest_covers_what_was_decided_and_not_how_it_was_asked_for() -> None:
    request = [LARGE, *H100, *side(1024)]
    asked, chosen = (compile_plan([*request, f"runtime={mode}"]) for mode in ("graphs", "auto"))
    without = [one for one in chosen.diagnostics if one.type != "auto_runtime"]
    assert asked.digest == Plan.build(**{**fields(chosen), "diagnostics": without}).digest
    assert asked.digest == compile_plan([*request, "runtime=graphs", "runtime.most_graphs=3"]).digest


def fields(plan: Plan) -> dict[str, object]:
    left_out = {"schema_version", "tool_version", "digest", "basis", "libraries", "images_per_second"}
    return {name: getattr(plan, name) for name in Plan.model_fields if name not in left_out}


def test_a_saved_plan_keeps_its_runtime(tmp_path: Path) -> None:
    plan = compile_plan([LARGE, *H100, *side(512)])
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path) == plan
    with pytest.raises(UsageError, match=r"runtime=eager would change it"):
        saved_plan(compose_spec([f"plan_file={path}", "runtime=eager"]), ["runtime=eager"])
    _, spec = saved_plan(compose_spec([f"plan_file={path}"]), [])
    assert spec.runtime == plan.spec.runtime
    (decided,) = [one for one in compare(compile_plan([LARGE, *H100, *side(512), "runtime=eager"]), plan)
                  if one.where == "runtime"]  # fmt: skip
    assert (decided.kind, decided.was, decided.now) == ("decided", "eager", "graphs")


@pytest.mark.parametrize("name", ["1.0", "1.1", "1.2", "1.3", "1.4", "1.5"])
def test_plans_of_earlier_versions_are_eager(name: str) -> None:
    assert Plan.load(Path(__file__).parent / "plans" / f"{name}.json").runtime == "eager"


def test_a_runtime_that_is_not_known_is_named_with_those_that_are() -> None:
    with pytest.raises(InvalidSpecError, match="graph"):
        compose_spec(["runtime.mode=graph"])
    with pytest.raises(InvalidSpecError):
        compose_spec(["runtime.most_graphs=1"])
