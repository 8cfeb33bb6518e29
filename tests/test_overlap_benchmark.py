"""The benchmark of overlapping stages runs on the CPU with the tiny checkpoint, and compares pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import overlap

pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.mark.parametrize("where", [[], ["--vae-with-denoiser"]])
def test_the_benchmark_measures_both_ways_beside_the_plan(
    tiny: Path, where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overlap.main(["--tiny", "--requests", "4", "--turns", "1", *where])
    row = json.loads(capsys.readouterr().out)
    assert row["same_bits"]
    assert row["different_pictures"] == 4
    assert row["in_flight"] == (2 if where else 3)
    assert row["planned_gain"] > 1
    assert row["one_by_one"] > 0
    assert row["overlapped"] > 0
    assert row["phases_overlapped"].keys() == row["phases_one_by_one"].keys()


def test_requests_of_the_benchmark_differ_in_all_that_a_call_keeps() -> None:
    options = type("Options", (), {"tiny": True, "vae_with_denoiser": False})()
    cases = overlap.cases_of(overlap.planned(options, 64), 6)
    assert len({request.seed for _, request in cases}) == 6
    assert len({shape.steps for shape, _ in cases}) == 2
    assert len({request.guidance_scale for _, request in cases}) == 4
