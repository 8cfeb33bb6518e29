"""A ControlNet on another GPU than the transformer's, in plans: seconds of a step, and memory of both GPUs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_runtimes import profile_of

from sana_deploy.declare.formats import Format
from sana_deploy.declare.runtime import Execution
from sana_deploy.declare.spec import VirtualMachine
from sana_deploy.facts.machine import Gpu
from sana_deploy.facts.virtual_machine import describe_machine
from sana_deploy.plan.candidates import request_seconds
from sana_deploy.plan.cost import slot_use
from sana_deploy.plan.execution import executed
from sana_deploy.plan.profile import PipelineProfile
from sana_deploy.plan.seconds import link_between, phase_seconds, step_seconds
from sana_deploy.plan.setting import Setting, Tried
from sana_deploy.plan.streaming import streamed

MEASURED = {
    ("sana_1600m_controlnet", 512, 1): (11.86, 8.96),
    ("sana_1600m_controlnet", 1024, 1): (33.83, 25.37),
    ("sana_1600m_controlnet", 1024, 4): (125.88, 94.23),
    ("sana_600m_controlnet", 512, 1): (8.83, 7.24),
    ("sana_600m_controlnet", 1024, 1): (20.49, 16.50),
    ("sana_600m_controlnet", 1024, 4): (70.89, 56.82),
    ("sana_600m_controlnet", 2048, 1): (73.67, 59.02),
}
"""Milliseconds of a step in graphs on two H100: on one of them, and with the ControlNet on the other one."""
TOGETHER = {"text_encoder": 0, "vae": 0, "transformer": 0, "controlnet": 0}
APART = {**TOGETHER, "controlnet": 1}


def gpus(names: str) -> dict[int, Gpu]:
    return {gpu.index: gpu for gpu in describe_machine(VirtualMachine(kind="virtual", gpus=names)).gpus}


def step(profile: PipelineProfile, placement: dict[str, int], names: str = "2xh100") -> float:
    """Milliseconds of a step."""
    seconds = phase_seconds(profile, placement, gpus(names))
    assert seconds is not None
    return 1e3 * seconds["denoise"] / profile.steps


@pytest.mark.parametrize("key", MEASURED)
def test_a_step_takes_what_was_measured_on_two_gpus(key: tuple[str, int, int]) -> None:
    profile, (one, two) = executed(profile_of(*key), "graphs"), MEASURED[key]
    assert step(profile, APART) == pytest.approx(two, rel=0.15)
    assert step(profile, APART) / step(profile, TOGETHER) == pytest.approx(two / one, rel=0.05)


@pytest.mark.parametrize("execution", ["eager", "graphs"])
def test_only_graphs_work_at_once(execution: Execution) -> None:
    profile = executed(profile_of("sana_1600m_controlnet", 1024, 1), execution)
    apart, together = step(profile, APART), step(profile, TOGETHER)
    assert apart < 0.8 * together if execution == "graphs" else apart > together


def test_residuals_that_are_cast_come_after_all_of_the_controlnet_s_work() -> None:
    profile = executed(profile_of("sana_1600m_controlnet", 1024, 1), "graphs")
    net = replace(profile.components["controlnet"], format=Format("float32"))
    cast = replace(profile, components={**profile.components, "controlnet": net})
    assert streamed(profile)
    assert not streamed(cast)
    assert step(cast, APART) > step(cast, TOGETHER)
    residuals = next(one for one in cast.crossings if one.pieces).bytes_each
    home, other = ({"transformer": 0}, {"controlnet": 0})
    assert slot_use(cast, home, 0).activation_bytes - slot_use(profile, home, 0).activation_bytes > residuals / 2
    assert slot_use(cast, other, 0).phase == "denoise"


def test_a_slow_gpu_for_the_controlnet_is_waited_for() -> None:
    profile = executed(profile_of("sana_1600m_controlnet", 1024, 1), "graphs")
    box = gpus("h100,t4")
    rates = [box[i].rates for i in (0, 1)]
    home, net = (
        step_seconds(profile.parts[name], rate) for name, rate in zip(("transformer", "controlnet"), rates, strict=True)
    )
    (residuals,) = streamed(profile)
    last = residuals.bytes_each / residuals.pieces / link_between(*rates).bytes_per_second
    seconds = step(profile, APART, "h100,t4") / 1e3
    assert seconds == pytest.approx(net + last + (1 - residuals.needed) * home, rel=0.02)
    assert seconds > home


def test_buffers_for_residuals_are_there_in_every_phase_like_the_pool() -> None:
    profile = executed(profile_of("sana_1600m_controlnet", 1024, 1), "graphs")
    (residuals,) = streamed(profile)
    denoiser = profile.components["transformer"].activations
    home = slot_use(profile, {"transformer": 0}, 0)
    assert home.phase == "encode"
    assert home.activation_bytes == home.pool_bytes + denoiser["encode"] + residuals.bytes_each


def test_the_search_s_arrays_agree_with_the_arithmetic_of_one_placement() -> None:
    profile, box = executed(profile_of("sana_600m_controlnet", 512, 1), "graphs"), gpus("h100,t4,h100")
    rows = np.array(list(itertools.product(range(3), repeat=4)), np.int16)
    found = request_seconds(Setting.of(0, Tried((), profile), list(box.values())), rows)
    for row, seconds in zip(rows.tolist(), found.tolist(), strict=True):
        phases = phase_seconds(profile, dict(zip(TOGETHER, row, strict=True)), box)
        assert phases is not None
        assert seconds == pytest.approx(sum(phases.values()), abs=1e-6)
