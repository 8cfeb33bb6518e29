"""`hardware.split=rows`: on which GPUs rows are, how many each has, what that takes, and when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_deploy._models import Diagnostic
from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.pipelines import SANA_CONTROLNET
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.admission import Admission
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.diff import compare
from sana_deploy.plan.digest import digest_of
from sana_deploy.plan.profile import profile_pipeline
from sana_deploy.plan.row_shares import dealt, in_proportion
from sana_deploy.plan.row_split import RowSplit
from sana_deploy.report.wording import runtime_words

Small = Callable[..., DeploySpec]
LARGE = ("model=sana_1600m_controlnet", "machine=virtual")
ROWS, LATENCY = "hardware.split=rows", "hardware.objective=latency"
TALL = ("workload.height=4096", "workload.width=4096")
LOOPED = SANA_CONTROLNET.looped


@cache
def planned(*overrides: str) -> Plan:
    return compile_plan([*LARGE, *overrides])


def remarks(plan: Plan, kind: str) -> list[Diagnostic]:
    return [one for one in plan.diagnostics if one.type == kind]


def profile_of(*overrides: str) -> RowSplit:
    spec = compose_spec([*LARGE, "machine.gpus=2xh100", "precision=mixed_bf16", *overrides])
    checkpoint, formats = open_checkpoint(spec.model), spec.precision.formats
    whole = profile_pipeline(checkpoint, spec.workload.bounds, formats, lambda *_: {})
    return RowSplit(whole, checkpoint, spec.workload.bounds, formats, lambda *_: {})


# dealing


@given(st.integers(2, 256), st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 300)), min_size=2, max_size=8))
def test_all_rows_are_dealt_and_each_gpu_has_one(rows: int, gpus: list[tuple[float, int]]) -> None:
    gpus = gpus[:rows]
    speeds, most = [speed for speed, _ in gpus], [limit for _, limit in gpus]
    found = dealt(rows, speeds, most)
    assert sum(found) == rows
    assert all(count >= 1 for count in found)
    if sum(max(1, limit) for limit in most) >= rows + len(gpus):
        assert all(count <= max(1, limit) for count, limit in zip(found, most, strict=True))
    assert sum(in_proportion(rows, found)) == rows
    assert in_proportion(rows, found) == found


def test_rows_are_dealt_by_speed_and_what_has_no_memory_goes_to_others() -> None:
    assert dealt(12, [2, 1, 1], [99] * 3) == (6, 3, 3)
    assert dealt(12, [2, 1, 1], [4, 99, 99]) == (4, 4, 4)
    assert dealt(12, [2, 1, 1], [1, 1, 1]) == (6, 3, 3), "where none has it, the plan does not fit"
    assert in_proportion(24, (6, 3, 3)) == (12, 6, 6)
    assert in_proportion(2, (6, 3, 3)) == (1, 1), "to fewer where there are fewer rows"


def test_unlike_gpus_get_rows_by_their_speed() -> None:
    plan = planned("machine.gpus=[a100,h100]", ROWS, *TALL)
    assert (plan.home, plan.rows, sum(plan.rows)) == (1, plan.rows, 128)
    fast, slow = plan.rows
    assert 1.5 < fast / slow < 3
    assert {unit.slot for unit in plan.units.values()} == {0}


def test_a_gpu_with_little_memory_gets_as_many_rows_as_it_holds() -> None:
    plain = planned("machine.gpus=[h100,a100]", ROWS, *TALL)
    tight = planned("machine.gpus=[h100,a100]", "machine.used=[0GiB,71.9GiB]", ROWS, *TALL)
    assert tight.rows[1] < plain.rows[1]
    (slot,) = [slot for slot in tight.slots if slot.index == 1]
    assert slot.peak_bytes <= slot.available_bytes


# what a unit takes


@pytest.mark.parametrize("rows", [(16, 16), (20, 7, 5), (4,) * 8])
def test_units_have_all_weights_and_their_share_of_the_rest(rows: tuple[int, ...]) -> None:
    split = profile_of()
    whole, parted = split.profile, split.with_rows(rows)
    assert parted.split == "rows"
    assert len(parted.further) == 2 * (len(rows) - 1)
    for name in LOOPED:
        for number, count in enumerate(rows):
            part, every = parted.parts[f"{name}.{number}" if number else name], whole.parts[name]
            assert part.weights_bytes == every.weights_bytes
            share = count / sum(rows)
            beyond = part.work["denoise"].flops / every.work["denoise"].flops - share
            assert 0 < beyond < 0.05, "each computes on the whole text"
            assert part.work["denoise"].other_bytes > every.work["denoise"].other_bytes * share, "edges are copied"
    assert parted.components["vae"] == whole.components["vae"]


def test_what_crosses_is_sums_and_edges_of_every_block_and_latents() -> None:
    parted = profile_of().with_rows((16, 16))
    sizes = {(one.tensor, one.src, one.dst): (one.bytes_each, one.copies) for one in parted.crossings}
    assert sizes["attention_sums", "transformer", "transformer.1"] == (20 * 2 * 70 * 32 * 33 * 4, 20)
    assert sizes["edge_rows", "controlnet.1", "controlnet"] == (7 * 2 * 11200 * 32 * 2, 7)
    assert sizes["noise_pred", "transformer.1", "transformer"] == (2 * 32 * 16 * 32 * 2, 1)
    three = profile_of().with_rows((16, 8, 8)).crossings
    edges = {(one.src, one.dst) for one in three if one.tensor == "edge_rows"}
    assert ("transformer", "transformer.2") not in edges, "neighbours alone exchange edges"
    assert ("transformer", "transformer.2") in {(o.src, o.dst) for o in three if o.tensor == "attention_sums"}


MEASURED = {4096: 265.0, 2048: 113.0}
"""Milliseconds of an eager step of SANA 1.6B over two H100s, in a prototype."""


@pytest.mark.parametrize("side", MEASURED)
def test_the_seconds_of_rows_are_those_measured_within_an_eighth(side: int) -> None:
    plan = planned("machine.gpus=2xh100", ROWS, "precision=fp16", f"workload.height={side}", f"workload.width={side}")
    step = 1e3 * plan.estimates.seconds["denoise"] / plan.spec.workload.steps
    assert step / MEASURED[side] == pytest.approx(1, abs=0.125)


# what is chosen


def test_latency_takes_rows_where_they_take_the_fewest_seconds_and_says_so() -> None:
    plan = planned("machine.gpus=4xh100", LATENCY, *TALL)
    assert (plan.split, plan.runtime) == ("rows", "eager")
    (remark,) = remarks(plan, "auto_split")
    assert f"{plan.rows[-2]} and {plan.rows[-1]} rows on GPU 0" in remark.message
    halves = planned("machine.gpus=4xh100", LATENCY, *TALL, "hardware.split=guidance")
    assert plan.estimates.seconds_per_image is not None
    assert halves.estimates.seconds_per_image is not None
    assert plan.estimates.seconds_per_image <= 0.95 * halves.estimates.seconds_per_image
    two = planned("machine.gpus=2xh100", LATENCY, *TALL)
    assert (two.split, "vae.1" in two.units) == ("rows", True), "encode and decode are dealt as well"
    alone = planned("machine.gpus=1xh100", LATENCY, *TALL).estimates.seconds_per_image
    assert (two.estimates.seconds_per_image or 0) < 0.55 * (alone or 0)
    unguided = planned("machine.gpus=2xh100", LATENCY, *TALL, "workload.guidance_scale=1")
    assert unguided.split == "rows"
    assert planned("machine.gpus=4xh100", LATENCY).split == "guidance", "a small image is bound by launches"


def test_as_many_gpus_share_the_rows_as_take_the_fewest_seconds() -> None:
    assert len(planned("machine.gpus=8xh100", ROWS).rows) == 2
    many = planned("machine.gpus=8xh100", ROWS, *TALL)
    assert 2 < len(many.rows) < 8
    slow, fast = (planned(f"machine.gpus=8x{name}", ROWS, "workload.height=3072", "workload.width=2048")
                  for name in ("l4", "h100"))  # fmt: skip
    assert len(slow.rows) > len(fast.rows)
    assert len({slow.home, *(unit.slot for unit in slow.units.values())}) == len(slow.rows)


def test_units_of_a_gpu_stay_together_and_pins_are_kept_to() -> None:
    plan = planned("machine.gpus=4xh100", ROWS, *TALL, "hardware.pin={transformer: 2, transformer.1: 0, vae: 3}")
    places = {**plan.device_map, **{name: unit.slot for name, unit in plan.units.items()}}
    assert (places["transformer"], places["transformer.1"], places["vae"]) == (2, 0, 3)
    for number in range(len(plan.rows)):
        unit = f".{number}" if number else ""
        assert places[f"transformer{unit}"] == places[f"controlnet{unit}"]
    assert len({places[f"transformer{f'.{i}' if i else ''}"] for i in range(len(plan.rows))}) == len(plan.rows)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["machine.gpus=1xh100"], "the rows of an image are split between two or more GPUs, one may be taken"),
        (
            ["machine.gpus=2xh100", "workload.height=32"],
            "an image of workload.height=32 has one row of tokens",
        ),
    ],
)
def test_where_rows_cannot_be_dealt_one_gpu_computes_them_and_a_remark_says_why(more: list[str], why: str) -> None:
    plan = planned(ROWS, *more)
    assert (plan.split, plan.rows, dict(plan.units)) == ("none", [], {})
    (remark,) = remarks(plan, "no_split")
    assert (remark.message, remark.where) == (f"{why}: one GPU computes whole steps", "hardware.split")


@pytest.mark.parametrize("mode", ["graphs", "compiled"])
def test_rows_with_a_runtime_that_records_whole_calls_are_refused(mode: str) -> None:
    with pytest.raises(InfeasibleError, match=f"and runtime.mode={mode} records whole calls") as refused:
        planned("machine.gpus=2xh100", ROWS, f"runtime={mode}")
    assert refused.value.hint == "runtime=eager, or hardware.split=guidance"
    assert planned("machine.gpus=2xh100", ROWS, "runtime=eager").split == "rows"
    assert planned("machine.gpus=2xh100", LATENCY, f"runtime={mode}", *TALL).split == "guidance"


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp32", "bf16"])
def test_every_precision_goes_with_rows(precision: str) -> None:
    plan = planned("machine.gpus=2xh100", ROWS, f"precision={precision}")
    assert plan.split == "rows"
    for unit in plan.units.values():
        assert unit.weights_bytes == plan.components[unit.component].weights_bytes


def test_a_plan_of_rows_is_saved_bound_and_compared(
    small: Small, machine: Callable[..., Machine], tmp_path: Path
) -> None:
    plan = compile_spec(small(ROWS, "workload.height=160", "runtime=eager"), machine(8, 8))
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert (loaded.digest, loaded.rows) == (plan.digest, plan.rows)
    other = plan.model_copy(update={"rows": plan.rows[::-1]}).model_dump(mode="json")
    assert (digest_of(other) == plan.digest) == (plan.rows == plan.rows[::-1])
    bound = plan.resolve(machine(8, 8))
    assert set(bound.unit_devices) == {"transformer.1", "controlnet.1"}
    assert plan.exactness == "rounding"
    assert runtime_words(plan).endswith(f"split rows {', '.join(map(str, plan.rows))} (rounding)")
    whole = compile_spec(small("hardware.split=none", "workload.height=160", "runtime=eager"), machine(8, 8))
    lines = {one.where: (one.was, one.now) for one in compare(whole, plan)}
    assert lines["split"] == ("none", "rows")
    assert lines["rows"][1] == ", ".join(map(str, plan.rows))


def test_requests_of_other_shapes_are_costed_with_rows_in_proportion(
    small: Small, machine: Callable[..., Machine]
) -> None:
    plan = compile_spec(small(ROWS, "workload.height=160", "runtime=eager"), machine(8, 8))
    admission = Admission(plan.resolve(machine(8, 8)), open_checkpoint(plan.spec.model))
    bounds = plan.spec.workload.bounds
    one_row = bounds.model_copy(update={"height": 32})
    twice = bounds.model_copy(update={"height": 320})
    for shape in (bounds, one_row, twice):
        admission.check(shape)
    seconds = [admission.seconds(shape) for shape in (bounds, twice)]
    assert seconds[0] == pytest.approx(sum(plan.estimates.seconds.values()), rel=1e-3)
    assert all(value is not None for value in seconds)
