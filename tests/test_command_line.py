"""The command line as a newcomer meets it: the first screen, and the TAB key in bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sana_deploy.commands import COMMANDS, of_run, run_own
from sana_deploy.declare.completion import candidates

Run = Callable[..., subprocess.CompletedProcess[str]]
NAMES, CONFIGURED = [one.name for one in COMMANDS], [one.name for one in COMMANDS if one.configured]


def test_without_arguments_ten_lines_tell_what_can_be_done(cli: Run, tmp_path: Path) -> None:
    shown = cli()
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("sana_deploy ")
    for command in COMMANDS:
        assert f"{command.name:<8} {command.words}" in shown.stdout
    assert shown.stdout.count("  sana-deploy ") == 3, "three examples"
    for word in ("--help", "docs/", "-sc install=bash"):
        assert word in shown.stdout
    assert not list(tmp_path.iterdir()), "nothing was run"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_the_same_first_screen(cli: Run) -> None:
    import pty

    said = bytearray()

    def read(terminal: int) -> bytes:
        said.extend(part := os.read(terminal, 1024))
        return part

    status = pty.spawn([sys.executable, "-m", "sana_deploy"], read)
    assert os.waitstatus_to_exitcode(status) == 0
    assert said.decode().replace("\r\n", "\n") == cli().stdout


def test_run_is_the_command_of_a_deployment_and_needs_no_argument(here: Run) -> None:
    ended = here("run", "--cfg", "job")
    assert ended.returncode == 0, ended.stderr
    assert "hardware:" in ended.stdout
    assert run_own(["run"], lambda: None) is None, "Hydra takes it"
    assert of_run(["run"]) == []


@pytest.mark.parametrize(
    ("line", "asked", "own"),
    [
        ("sana-deploy ", "sana-deploy ", NAMES),
        ("sana-deploy su", "sana-deploy su", ["summary"]),
        ("sana-deploy serve hardware=", "sana-deploy hardware=", []),
        ("sana-deploy run hardware=", "sana-deploy hardware=", []),
        ("sana-deploy 'workload.prompt=a fox, 8k: best' model=sana_1600m precision=",
         "sana-deploy model=sana_1600m precision=", []),
        ("sana-deploy workload.prompt=red,fox hardware=", "sana-deploy hardware=", []),
        ("sana-deploy workload.prompt=\"a fox", None, []),
        ("sana-deploy diff one.js", None, []),
        ("", "sana-deploy ", NAMES),
    ],
)  # fmt: skip
def test_hydra_is_asked_what_it_can_read(line: str, asked: str | None, own: list[str]) -> None:
    assert candidates(line, NAMES, CONFIGURED) == (asked, own)


def test_keys_of_files_complete_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "plan.json").touch()
    assert candidates("sana-deploy plan_file=ou", NAMES, CONFIGURED) == (None, ["plan_file=outputs/"])
    assert candidates("sana-deploy plan_file=outputs/", NAMES, CONFIGURED)[1] == ["plan_file=outputs/plan.json"]


@pytest.fixture
def bash(tmp_path: Path) -> Callable[[str], list[str]]:
    """What bash offers at the end of a line, after the documented command has installed completion."""
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "sana-deploy"  # as pip writes it from [project.scripts]
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom sana_deploy.__main__ import command\nsys.exit(command())\n"
    )
    script.chmod(0o755)

    def offered(line: str) -> list[str]:
        typed = (
            'eval "$(sana-deploy -sc install=bash)"\n'
            "[[ $(complete -p sana-deploy) == *sana_deploy_completion* ]] || exit 9\n"
            'words_as_bash_counts() { eval "COMP_WORDS=($1)"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); }\n'
            'COMP_LINE="$1" COMP_POINT=${#1}\nwords_as_bash_counts "$1"\n'
            "sana_deploy_completion\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
        )
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "--norc", "-c", typed, "bash", line], cwd=tmp_path, env={**os.environ, "PATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return offered


def test_bash_completes_options_after_a_prompt_with_commas_and_after_a_command(
    bash: Callable[[str], list[str]],
) -> None:
    options = ["hardware=custom_map", "hardware=multi_gpu_balanced", "hardware=single_gpu"]
    assert bash("sana-deploy hardware=") == options
    assert bash("sana-deploy serve workload.prompt='a fox, 8k: best' hardware=m") == [options[1]]
    assert bash("sana-deploy hardware.obj") == ["hardware.objective="]


def test_a_completion_never_imports_torch_and_is_quick_enough_to_type() -> None:
    script = (
        "import os, sys; sys.argv = ['sana-deploy', '-sc', 'query=bash']\n"
        "os.environ['COMP_LINE'] = 'sana-deploy model='\n"
        "from sana_deploy.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'matplotlib', 'fastapi', 'ray'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model=sana_1600m " in done.stdout


def test_completion_is_taken_off_again(here: Run) -> None:
    assert "complete -r sana-deploy" in here("--shell-completion", "uninstall=bash").stdout
