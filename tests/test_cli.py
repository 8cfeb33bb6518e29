"""The command as a user runs it: exit codes, streams, files, sweeps."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL

import sana_deploy
from sana_deploy.plan.artifact import Plan
from sana_deploy.run.outcome import Outcome

Run = Callable[..., subprocess.CompletedProcess[str]]
FAST = (*SMALL, "workload.steps=1")


def run_folder(cwd: Path) -> Path:
    (folder,) = (cwd / "outputs").glob("*/*")
    return folder


def test_the_main_job_ends_with_an_image_on_disk(cli: Run, tiny: Path, tmp_path: Path) -> None:
    done = cli("hardware=multi_gpu_balanced", *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    folder = run_folder(tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {"plan.json", "outcome.json", "image-000.png", "report.html", "sana_deploy.log", ".hydra"}
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"], outcome["stage"]) == ("done", 0, "generate")
    assert outcome["images"] == ["image-000.png"]
    assert outcome["plan_digest"] == Plan.load(folder / "plan.json").digest
    assert "next: python -m sana_deploy plan_file=" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_printed_next_works(here: Run, tiny: Path, tmp_path: Path) -> None:
    first = here(*FAST, "until=compile")
    line = next(line for line in first.stderr.splitlines() if line.startswith("next: python -m sana_deploy "))
    again = here(*line.removeprefix("next: python -m sana_deploy ").split(), "workload.seed=4")
    assert again.returncode == 0, again.stderr
    assert len(list(tmp_path.glob("outputs/*/*/image-000.png"))) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["workload.heigth=64"], 1, "did you mean 'height'?"),
        (["hardware=custom_mapp"], 1, "did you mean 'custom_map'?"),
        (["workload.height=100"], 3, "workload.height: must be a multiple of 32 (got 100)"),
        (["hardware=custom_map", "hardware.device_map.vea=0"], 3, "did you mean 'vae'?"),
        (["model=checkpoint", "model.source=/no/folder"], 3, "there is no folder '/no/folder'"),
        (["workload.control_image=/no/photo.png"], 3, "there is no such file"),
        (["hydra.run.dir=/proc/nothing"], 3, "output folder cannot be written"),
        (["hardware=custom_map"], 4, "GPU 1 is not there"),
        (["hardware.on_shortfall=error"], 4, "refuses the CPU"),
        (["plan_file=/no/plan.json"], 5, "there is no plan file"),
        (["model=sana_1600m_controlnet", "until=apply"], 3, "no weights of sana_1600m_controlnet are published"),
    ],
)
def test_each_failure_has_its_exit_code_and_one_clear_message(
    here: Run, tiny: Path, arguments: list[str], code: int, says: str
) -> None:
    ended = here(*arguments, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert ended.stderr.count("error: ") == 1
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_saved_plan_takes_a_new_prompt_and_refuses_new_planning(here: Run, tiny: Path, tmp_path: Path) -> None:
    here(*FAST, "until=compile", "hydra.run.dir=first")
    planned = f"plan_file={tmp_path / 'first' / 'plan.json'}"
    refused = here(planned, "precision=fp16", "workload.height=96")
    assert refused.returncode == 2
    assert "precision=fp16, workload.height=96 would change it" in refused.stderr
    taken = here(planned, "workload.prompt=another", "until=resolve", "hydra.run.dir=second")
    assert taken.returncode == 0, taken.stderr
    assert (tmp_path / "first" / "plan.json").read_bytes() == (tmp_path / "second" / "plan.json").read_bytes()


def test_json_output_is_the_only_thing_on_stdout(cli: Run, tiny: Path) -> None:
    compiled = cli(*FAST, "until=compile", "output=json")
    documents = [json.loads(compiled.stdout)]
    assert Plan.from_values(documents[0]["plan"], "stdout").device_map["vae"] == "cpu"
    for chosen, code in (
        (["hardware=custom_map", "until=compile"], 4),
        (["machine=2xt4", "model=sana_1600m_controlnet", "precision=mixed_bf16", "until=compile"], 4),
        (["workload.steps=0"], 3),
        (["workload.stepz=1"], 1),
        (["plan_file=/no/plan.json"], 5),
    ):
        ended = cli(*chosen, "output=json", CUDA_VISIBLE_DEVICES="")
        assert ended.returncode == code, ended.stderr
        documents.append(json.loads(ended.stdout))
        assert Outcome.model_validate_json(ended.stdout).exit_code == code
    assert {frozenset(one) for one in documents} == {frozenset({*Outcome.model_fields, "plan"})}, "one shape for all"
    assert [one["plan"] and one["plan"]["feasible"] for one in documents] == [True, None, False, None, None, None]
    assert [one["status"] for one in documents] == ["done", "infeasible", "infeasible", "invalid", "invalid", "stale"]


@pytest.mark.usefixtures("short_prompts")
def test_six_jobs_are_compared_and_an_infeasible_one_is_a_row(here: Run, tiny: Path, tmp_path: Path) -> None:
    swept = here(
        "-m", "hardware=single_gpu,multi_gpu_balanced,custom_map", "precision=fp32,mixed_fp32", *FAST,
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    assert swept.stdout == ""
    (folder,) = (tmp_path / "outputs" / "multirun").glob("*/*")
    rows = json.loads((folder / "summary.json").read_text())
    assert [row["status"] for row in rows] == ["done"] * 4 + ["infeasible"] * 2
    assert [row["overrides"]["precision"] for row in rows] == ["fp32", "mixed_fp32"] * 3
    assert all(row["seconds"] > 0 for row in rows[:4])
    assert "GPU 1 is not there" in rows[4]["reason"]
    with (folder / "summary.csv").open() as table:
        assert [row["exit_code"] for row in csv.DictReader(table)] == ["0"] * 4 + ["4"] * 2
    markdown = (folder / "summary.md").read_text().splitlines()
    assert len(markdown) == 2 + 6
    assert "multi_gpu_balanced" in swept.stderr
    assert all((folder / str(job) / "image-000.png").is_file() for job in range(4))


@pytest.mark.usefixtures("short_prompts")
def test_a_sweep_over_precision_compares_dtypes_peaks_and_accuracy(here: Run, tiny: Path, tmp_path: Path) -> None:
    swept = here("-m", "precision=fp16,mixed_bf16,fp32", "precision.audit=true", *FAST)
    assert swept.returncode == 0, swept.stderr
    (path,) = (tmp_path / "outputs" / "multirun").glob("*/*/summary.json")
    rows = json.loads(path.read_text())
    assert [row["dtypes"]["vae"] for row in rows] == ["float16", "bfloat16", "float32"]
    assert rows[0]["psnr"] > rows[1]["psnr"] > 20
    assert rows[2]["psnr"] is None, "it is the reference itself"
    assert rows[2]["worst_error"] == 0 < rows[0]["worst_error"] < rows[1]["worst_error"] < 0.1
    assert "text_encoder bfloat16, vae bfloat16, transformer float16" in path.with_suffix(".md").read_text()
    assert "PSNR" in swept.stderr


def test_a_sweep_over_machines_has_figures_only_where_something_fits(here: Run, tmp_path: Path) -> None:
    swept = here("-m", "precision=auto,mixed_bf16", "machine=2xt4", "model=sana_1600m_controlnet", "until=compile")
    assert swept.returncode == 0, swept.stderr
    (path,) = (tmp_path / "outputs" / "multirun").glob("*/*/summary.json")
    fits, refused = json.loads(path.read_text())
    assert fits["dtypes"]["vae"] == "float32"
    assert fits["peak_bytes"] > 8 * 2**30
    assert fits["estimated_seconds_per_image"] > 1
    assert (refused["status"], refused["peak_bytes"], refused["worst_utilisation"]) == ("infeasible", None, None)
    assert "No knob" not in refused["reason"]


def test_the_version_is_ours_and_a_misspelled_command_is_named(cli: Run) -> None:
    assert cli("--version").stdout == f"sana_deploy {sana_deploy.__version__}\n"
    for word, hint in (
        ("summery", "did you mean 'summary'?"),
        ("dif", "did you mean 'diff'?"),
        ("x", "known: advise, diff,"),
    ):
        ended = cli(word)
        assert ended.returncode == 2
        assert f"there is no command '{word}'" in ended.stderr
        assert f"hint: {hint}" in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_log_that_cannot_be_written_is_one_line_and_no_failure(cli: Run, tmp_path: Path) -> None:
    full = "hydra.job_logging.handlers.file.filename=/dev/full"
    ended = cli("plan_file=/no/plan.json", full)
    assert ended.returncode == 5
    assert ended.stderr.count("warning: the log /dev/full cannot be written: No space left on device") == 1
    assert "Traceback" not in ended.stderr
    assert "Logging error" not in ended.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m sana_deploy --help | head -n 1"
    shown = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.stdout.startswith("sana_deploy:")
    assert shown.stderr == ""


def test_help_and_config_are_useful_and_clean(cli: Run) -> None:
    shown = cli("--help")
    assert shown.returncode == 0
    for word in ("multi_gpu_balanced", "mixed_bf16", "sana_1600m_controlnet", "Exit codes", "guidance_scale"):
        assert word in shown.stdout
    config = cli("--cfg", "job", "--resolve")
    assert config.returncode == 0
    assert "height: 512" in config.stdout
    assert "hydra" not in config.stdout
    assert cli("--info", "defaults").returncode == 0


def test_compiling_never_imports_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['sana_deploy', 'until=compile', 'model=sana_1600m_controlnet']\n"
        "from sana_deploy.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light() -> None:
    script = "import sys, sana_deploy; assert not {'torch', 'hydra', 'pydantic', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_console_script_is_the_same_command(cli: Run) -> None:
    script = Path(sys.executable).with_name("sana-deploy")
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "Exit codes" in shown.stdout


def test_plain_terminals_get_plain_text(cli: Run, tiny: Path) -> None:
    shown = cli(*FAST, "until=compile", NO_COLOR="1", TERM="dumb", PYTHONIOENCODING="ascii", COLUMNS="80")
    assert shown.returncode == 0, shown.stderr
    assert "\x1b" not in shown.stderr
    assert shown.stderr.isascii()
    assert max(len(line) for line in shown.stderr.splitlines() if not line.startswith(("saved", "next", " "))) <= 80
