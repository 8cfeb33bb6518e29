"""`benchmarks/rows.py` runs on the CPU, in seconds, and writes what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.mark.usefixtures("short_prompts")
def test_the_benchmark_of_rows_measures_every_way_and_prints_a_table(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rows import main

    out = tmp_path / "rows.json"
    main(["tiny", str(out), "--devices", "cpu", "cpu", "--sides", "64", "--turns", "1", "--steps", "1"])
    found = json.loads(out.read_text(encoding="utf-8"))
    cases = {(row["what"], row["way"]): row for row in found["rows"]}
    assert {what for what, _ in cases} == {"step", "encode", "decode", "image"}
    for (what, way), row in cases.items():
        assert row["seconds"] > 0, (what, way)
        if way in ("rows", "rows, float32", "8 bands on one device"):
            assert row["relative"] < 1e-5, (what, way)
    assert cases["step", "rows"]["dealt"] == [1, 1]
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 1 + len(found["rows"])
    with pytest.raises(SystemExit):
        main(["tiny", str(out), "--devices", "cpu"])
