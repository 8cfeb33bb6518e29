"""What the CUDA allocator takes beyond tensors: the rules one by one, and whole models beside what an H100 took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sana_deploy._units import KIB, MIB
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.formats import Dtype, Format
from sana_deploy.declare.pipelines import Component
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.facts.allocator import context_bytes, unsplit_bytes, workspace_bytes
from sana_deploy.facts.checkpoint import open_checkpoint

MEASURED: list[tuple[dict[Component, Dtype], float]] = [
    ({"text_encoder": "bfloat16"}, 1.0),
    ({"vae": "bfloat16"}, 3.1),
    ({"text_encoder": "bfloat16", "vae": "bfloat16"}, 5.8),
    ({"transformer": "float16", "controlnet": "float16"}, 104.6),
    ({"vae": "bfloat16", "transformer": "float16", "controlnet": "float16"}, 105.8),
    ({"text_encoder": "bfloat16", "vae": "bfloat16", "transformer": "float16", "controlnet": "float16"}, 88.5),
    ({"text_encoder": "float32", "vae": "float32", "transformer": "float32", "controlnet": "float32"}, 210.9),
]
"""What components of SANA 1.6B have beyond their tensors on an H100 once loaded, MiB, torch 2.11."""


@pytest.mark.parametrize(
    ("size", "extra"),
    [
        (0, 0),
        (1, 511),
        (MIB, 0),
        (3 * MIB, 0),  # six in a segment leave 2 MiB, which is split off
        (int(9.75 * MIB), MIB // 4),  # two leave half a MiB, which is not
        (int(11.5 * MIB), MIB // 2),  # alone in 12 MiB
        (int(10.5 * MIB), 0),  # alone in 12 MiB, of which 1.5 are split off
    ],
)
def test_blocks_follow_the_rules_of_the_allocator(size: int, extra: int) -> None:
    assert unsplit_bytes([size]) == extra


def test_workspaces_are_larger_from_hopper_on() -> None:
    assert workspace_bytes((9, 0)) == workspace_bytes((12, 0)) == 33 * MIB
    assert workspace_bytes((7, 5)) == workspace_bytes((8, 9)) == 9 * MIB + 128 * KIB


def test_the_context_is_known_where_it_was_measured() -> None:
    assert context_bytes((9, 0)) >= 723 * MIB
    assert context_bytes((8, 6)) == 450 * MIB


@pytest.mark.parametrize(("dtypes", "measured"), MEASURED)
def test_blocks_of_whole_components_are_those_of_an_h100(dtypes: dict[Component, Dtype], measured: float) -> None:
    facts = open_checkpoint(compose_spec(["model=sana_1600m_controlnet"]).model).components
    weights = sum(facts[name].weights_bytes(Format(dtype)) for name, dtype in dtypes.items())
    estimate = sum(facts[name].unsplit_bytes(Format(dtype)) for name, dtype in dtypes.items())
    # Components that load at once fill each other's gaps, and so do tensors that are cast while they load.
    slack = 5 * MIB
    assert -slack <= estimate - measured * MIB <= 0.005 * weights + slack


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_are_counted_by_their_parts(quantization: Any) -> None:
    facts = open_checkpoint(compose_spec(["model=sana_1600m_controlnet"]).model).components["transformer"]
    plain, quantised = (facts.unsplit_bytes(Format("float16", kept)) for kept in (None, quantization))
    assert 0 < quantised < plain


def test_a_plan_counts_them_and_its_peak_holds_them(small: Callable[..., DeploySpec]) -> None:
    plan = compile_spec(small("model=sana_1600m_controlnet", "machine=virtual", "machine.gpus=1xh100"))
    (slot,) = plan.slots
    assert slot.allocator_bytes > workspace_bytes((9, 0))
    assert slot.overhead_bytes == slot.allocator_bytes + context_bytes((9, 0)) + slot.capacity_bytes // 50
    assert slot.peak_bytes == slot.weights_bytes + slot.activation_bytes + slot.overhead_bytes


def test_a_float32_vae_takes_a_workspace_while_it_encodes(small: Callable[..., DeploySpec]) -> None:
    box = ("model=sana_1600m_controlnet", "machine=virtual", "machine.gpus=1xh100", "workload.height=1024",
           "workload.width=1024", "hardware=custom_map", "hardware.knobs=[encode_once]",
           "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}")  # fmt: skip
    (half,), (full,) = (compile_spec(small(*box, f"precision={name}")).slots for name in ("mixed_bf16", "mixed_fp32"))
    assert (half.peak_phase, full.peak_phase) == ("prepare", "prepare")
    assert full.allocator_bytes - half.allocator_bytes > 496 * 1024**2
    measured = 18.278 * 2**30  # of an H100 in mixed_fp32, one image encoded once
    planned = full.weights_bytes + full.activation_bytes + full.allocator_bytes
    assert -0.005 <= planned / measured - 1 <= 0.03
