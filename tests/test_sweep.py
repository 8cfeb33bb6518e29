"""Sweeps: a table of every job, the Pareto front, and nothing lost where a sweep is interrupted."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import run_here
from PIL import Image

from sana_deploy import sweep
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import ComposeError
from sana_deploy.report.jobs import NO_OUTCOME, planned_jobs, read_jobs
from sana_deploy.report.summary import COLUMNS, cells_of, mark_front, read_rows
from sana_deploy.run.outcome import Outcome, failure_of

Run = Callable[..., subprocess.CompletedProcess[str]]
SIX = ("-m", "hardware=single_gpu,multi_gpu_balanced", "precision=fp16,mixed_bf16,mixed_fp32", "machine=2xt4",
       "model=sana_1600m_controlnet", "until=compile")  # fmt: skip


def folder_of(root: Path) -> Path:
    (folder,) = (root / "outputs" / "multirun").glob("*/*")
    return folder


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of six jobs, for tests that only read it."""
    root = tmp_path_factory.mktemp("six")
    swept = run_here(root, *SIX)
    assert swept.returncode == 0, swept.stderr
    return folder_of(root)


def test_every_format_has_every_job_best_first(six: Path) -> None:
    folder = six
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["status"] for row in rows] == ["done"] * 3 + ["infeasible"] * 3
    seconds = [row["estimated_seconds_per_image"] for row in rows[:3]]
    assert seconds == sorted(seconds)
    with (folder / "summary.csv").open() as table:
        lines = list(csv.DictReader(table))
    assert [int(line["job"]) for line in lines] == [row["job"] for row in rows]
    assert tuple(lines[0]) == COLUMNS
    (two,) = [row for row in rows if len(row["per_gpu"]) == 2 and row["overrides"]["precision"] == "mixed_fp32"]
    plan = json.loads((folder / str(two["job"]) / "plan.json").read_text())
    assert [slot["peak_bytes"] for slot in plan["slots"]] == [slot["peak_bytes"] for slot in two["per_gpu"]]
    assert two["images_per_second"] == pytest.approx(1 / two["estimated_seconds_per_image"], rel=1e-3)
    assert len((folder / "summary.md").read_text().splitlines()) == 2 + 6
    with Image.open(folder / "summary.png") as plot:
        assert plot.width > 800
    assert "seconds per image" in (folder / "summary.svg").read_text()
    assert (folder / "summary.html").stat().st_size > 5000
    for job in range(6):
        assert (folder / str(job) / "report.html").is_file()


def test_the_terminal_shows_a_line_per_job_within_80_plain_columns(cli: Run) -> None:
    swept = cli(*SIX, COLUMNS="80", NO_COLOR="1", PYTHONIOENCODING="ascii")
    lines = swept.stderr.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("job  ")]
    table = lines[head : head + 7]
    assert max(len(line) for line in table) <= 80
    assert swept.stderr.isascii()
    assert "\x1b" not in swept.stderr
    assert [line.split()[1] for line in table[4:]] == ["x"] * 3
    assert any("multi_gpu_balanced mixed_fp32" in line for line in table)


def row(
    job: int, seconds: float | None, memory: int | None, model: str = "one", status: str = "done"
) -> dict[str, Any]:
    return {
        "job": job, "status": status, "front": False, "seconds": None, "estimated_seconds_per_image": seconds,
        "total_peak_bytes": memory, "compared_seconds": None, "workload": {"model": model, "batch": 1}, "replicas": 1,
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from("ab")), max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[int, int, str]]) -> None:
    rows = [row(job, float(seconds), memory, model) for job, (seconds, memory, model) in enumerate(values)]
    mark_front(rows)
    for one, (seconds, memory, model) in zip(rows, values, strict=True):
        beaten = any(
            other == model and s <= seconds and m <= memory and (s, m) != (seconds, memory) for s, m, other in values
        )
        assert one["front"] is not beaten


def test_rows_without_seconds_or_memory_are_not_on_the_front_and_measured_seconds_win() -> None:
    rows = [row(0, None, 5), row(1, 2.0, None), row(2, 2.0, 5, status="infeasible"), row(3, 2.0, 5)]
    mark_front(rows)
    assert [one["front"] for one in rows] == [False, False, False, True]
    measured = [{**row(job, estimate, 5), "seconds": took} for job, (estimate, took) in enumerate([(1, 9.0), (2, 3.0)])]
    mark_front(measured)
    assert [(one["front"], one["compared_seconds"]) for one in measured] == [(False, 9.0), (True, 3.0)]


def test_a_job_that_left_nothing_or_half_a_file_costs_its_row_only(here: Run, six: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(six, tmp_path / "outputs" / "multirun" / "day" / "six"))
    (folder / "0" / "outcome.json").unlink()
    (folder / "3" / "outcome.json").write_text('{"status": "do')
    again = here("summary", str(folder))
    assert again.returncode == 1
    rows = {one["job"]: one for one in read_rows(folder)}
    assert (rows[0]["status"], rows[0]["reason"]) == ("failed", NO_OUTCOME)
    assert rows[3]["status"] == "failed"
    assert rows[3]["reason"].startswith("3/outcome.json is not readable JSON: ")
    assert rows[3]["overrides"]["precision"] == rows[0]["overrides"]["precision"], "from Hydra's own file"
    assert f"go on: python -m sana_deploy -m sweep.resume={folder}" in again.stderr
    assert rows[5]["status"] == "done"
    assert "no jobs" in here("summary", str(tmp_path)).stderr
    assert "there is no folder" in here("summary", str(tmp_path / "absent")).stderr


def damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return apply


@pytest.mark.parametrize(
    ("name", "damage", "says", "code"),
    [
        ("outcome.json", lambda text: text[:20], "0/outcome.json is not readable JSON: ", 1),
        ("outcome.json", lambda text: "[]", "0/outcome.json is damaged: ", 1),
        ("outcome.json", damaged(lambda v: v.pop("stage")), "0/outcome.json is damaged at stage: Field required", 1),
        ("plan.json", lambda text: "", "0/plan.json is not readable JSON: ", 5),
        ("plan.json", damaged(lambda v: v.pop("slots")), "0/plan.json is damaged at slots: Field required", 5),
        ("plan.json", damaged(lambda v: v["slots"].clear()), "0/plan.json was changed after it was compiled", 5),
        ("plan.json", damaged(lambda v: v.update(schema_version="2.0")), "0/plan.json has schema version 2.0", 5),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    small: Callable[..., DeploySpec], tmp_path: Path, name: str, damage: Callable[[str], str], says: str, code: int
) -> None:
    job = tmp_path / "0"
    plan = compile_spec(small("machine=2xt4", "precision=mixed_fp32"))
    plan.save(job / "plan.json")
    outcome = Outcome(status="done", exit_code=0, stage="compile", plan_digest=plan.digest)
    (job / "outcome.json").write_text(outcome.to_json())
    assert [row["status"] for row in read_rows(tmp_path)] == ["done"]
    (job / name).write_text(damage((job / name).read_text()))
    (row,) = read_rows(tmp_path)
    assert (row["status"], row["exit_code"]) == ("failed", code)
    assert row["reason"].startswith(says)
    assert sweep.summarise(tmp_path) == code


def test_an_interrupted_job_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, code, failure = failure_of(KeyboardInterrupt())
    (tmp_path / "0").mkdir()
    outcome = Outcome(status=status, exit_code=code, stage="generate", error=failure)
    (tmp_path / "0" / "outcome.json").write_text(outcome.to_json())
    (row,) = read_rows(tmp_path)
    assert (row["status"], row["reason"], row["exit_code"]) == ("interrupted", "interrupted", 130)
    assert sweep.summarise(tmp_path) == 130
    assert "KeyboardInterrupt" not in (tmp_path / "summary.md").read_text()
    assert f"sweep.resume={tmp_path}" in capsys.readouterr().err


def test_the_jobs_of_a_sweep_are_known_from_its_file(
    here: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swept = here("-m", "machine=2xt4,2x8gb", "precision=glob(*fp32)", "until=compile", "workload.seed=range(2)")
    assert swept.returncode == 0, swept.stderr
    folder = folder_of(tmp_path)
    jobs = read_jobs(folder)
    assert len(jobs) == 8
    assert planned_jobs(folder) == [job.overrides for job in jobs]
    for number in (2, 7):
        shutil.rmtree(folder / str(number))
    again = read_jobs(folder)
    assert [job.overrides for job in again] == [job.overrides for job in jobs]
    assert [job.number for job in again if job.status == "not started"] == [2, 7]
    (folder / "multirun.yaml").write_text("hydra: [")
    assert len(read_jobs(folder)) == 6
    assert "multirun.yaml is damaged, so that jobs which did not start are not known" in caplog.text


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "sana_deploy", *arguments], cwd=tmp_path, env={**os.environ},
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


LONG = ("-m", "model=sana_600m_controlnet", "until=compile", "machine=2xt4", "precision=fp16,mixed_bf16,fp32",
        "hardware=single_gpu,multi_gpu_balanced")  # fmt: skip
JOBS, BEFORE = 6, 3
STALLED = f"""
import sys, time
from pathlib import Path
from sana_deploy import __main__ as command, stages

plain, begun = stages.compile_spec, 0

def stalling(*arguments, **options):
    global begun
    begun += 1
    if begun > {BEFORE}:
        Path("stalled").touch()
        time.sleep(600)
    return plain(*arguments, **options)

stages.compile_spec = stalling
sys.argv[1:] = {LONG!r}
command.main()
"""
"""A sweep whose fourth job does not end, so that it can be stopped there however fast this machine is."""


def stalled(tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start that sweep and wait until it hangs; its process and its folder."""
    running = subprocess.Popen([sys.executable, "-c", STALLED], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "stalled").exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline, "the sweep did not come to its fourth job"
        time.sleep(0.02)
    return running, folder_of(tmp_path)


def test_a_killed_sweep_is_resumed_where_it_was(here: Run, tmp_path: Path) -> None:
    running, folder = stalled(tmp_path)
    running.kill()
    running.communicate()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/outcome.json")}
    assert len(kept) == BEFORE
    changed = here(f"sweep.resume={folder}", "precision=fp32")
    assert changed.returncode == 2
    assert "precision=fp32 would change it" in changed.stderr
    done = here("-m", f"sweep.resume={folder}")
    assert done.returncode == 0, done.stderr
    assert folder_of(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    rows = json.loads((folder / "summary.json").read_text())
    assert sorted(one["job"] for one in rows) == list(range(JOBS))
    assert all(one["status"] in ("done", "infeasible") for one in rows)
    swept = {key for one in rows for key in one["overrides"]}
    assert swept == {"model", "until", "machine", "precision", "hardware"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_is_summed_up(tmp_path: Path, how: signal.Signals) -> None:
    running, folder = stalled(tmp_path)
    running.send_signal(how)
    _, said = running.communicate()
    assert running.returncode == 130
    assert "interrupted" in said
    rows = json.loads((folder / "summary.json").read_text())
    assert sorted(one["job"] for one in rows) == list(range(JOBS)), "a job that did not start is a row too"
    waiting = [one for one in rows if one["status"] == "not started"]
    assert 1 <= len(waiting) <= JOBS - 2
    assert rows[-len(waiting) :] == waiting, "they come last"
    assert {key for one in waiting for key in one["overrides"]} == {one.partition("=")[0] for one in LONG[1:]}
    assert any(one["status"] == "done" for one in rows)
    assert "KeyboardInterrupt" not in said
    assert f"not started: {len(waiting)}" in said
    assert f"go on: python -m sana_deploy -m sweep.resume={folder}\n" in said


def test_two_sweeps_at_once_do_not_collide(tmp_path: Path) -> None:
    running = [started(tmp_path, *SIX) for _ in range(2)]
    assert [one.communicate() and one.returncode for one in running] == [0, 0]
    folders = list((tmp_path / "outputs" / "multirun").glob("*/*"))
    assert len(folders) == 2
    first, second = (cells_of(read_rows(folder)) for folder in folders)
    assert len(first) == 6
    assert first == second


def test_what_is_no_sweep_cannot_be_resumed(here: Run, tmp_path: Path) -> None:
    ended = here("-m", f"sweep.resume={tmp_path}")
    assert ended.returncode == 2
    assert "holds no sweep" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_give_the_same_table(cli: Run, six: Path, tmp_path: Path, launcher: str) -> None:
    swept = cli(*SIX, f"hydra/launcher={launcher}")
    assert swept.returncode == 0, swept.stderr
    assert "deprecated" not in swept.stderr
    assert cells_of(read_rows(folder_of(tmp_path))) == cells_of(read_rows(six))


def test_a_failed_job_of_another_launcher_gives_the_exit_code(cli: Run) -> None:
    swept = cli("-m", "hydra/launcher=joblib", "workload.height=64,65", "until=compile")
    assert swept.returncode == 3, swept.stderr


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_installed", lambda distribution: False)
    with pytest.raises(ComposeError, match="the plugin hydra-ray-launcher is not installed") as caught:
        sweep.command_line([*SIX, "hydra/launcher=ray"])
    assert caught.value.exit_code == 1
    assert caught.value.hint == "pip install 'hydra-ray-launcher<1.3,>=1.2'"


@pytest.mark.slow
@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize(("name", "jobs"), [("which_box", 16), ("two_t4", 12), ("accuracy", 8)])
def test_experiments_compose_and_the_planned_ones_run(here: Run, tmp_path: Path, name: str, jobs: int) -> None:
    assert compose_spec([f"experiment={name}"])
    if name == "accuracy":  # run in full it takes minutes; two of its jobs here
        assert here(f"experiment={name}", "precision=fp32,int8").returncode == 0
        rows = read_rows(folder_of(tmp_path))
        assert [one["psnr"] is None for one in sorted(rows, key=lambda one: one["job"])] == [True, False]
        return
    swept = here(f"experiment={name}")
    assert swept.returncode == 0, swept.stderr
    rows = read_rows(folder_of(tmp_path))
    assert len(rows) == jobs
    assert sum(one["status"] == "done" for one in rows) > jobs / 2
    for one in rows:
        height, width = (one["workload"].get(key) for key in ("height", "width"))
        assert height == width
