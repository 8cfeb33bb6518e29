"""Prompts and paths on the command line: what a person writes is what is drawn."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sana_deploy import compile_plan
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.free_text import as_typed, command_texts, literal
from sana_deploy.errors import InputError, InvalidSpecError, UsageError
from sana_deploy.plan.saved_request import saved_plan

Run = Callable[..., subprocess.CompletedProcess[str]]
ORDINARY = [
    "a fox, red",
    "it's a fox (cinematic), 8k: best",
    "50% off; #1",
    "日本の灯台",
    "a = b [c] {d} \\ e",
    '"a fox" and "a hen"',
    "costs ${5} or ${oc.env:HOME}, not \\${x}",
    " 3 ",
    "true",
    "3",
    "12:30:45",
    "two\nlines",
    "???",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_a_prompt_is_what_stands_behind_the_equals_sign(text: str) -> None:
    assert compose_spec([f"workload.prompt={text}"]).workload.prompt == text
    assert compose_spec([f"++workload.negative_prompt={text}"]).workload.negative_prompt == text


@pytest.mark.parametrize(
    "key", ["workload.control_image", "model.cache_dir", "plan_file", "model.components.controlnet"]
)
def test_paths_may_hold_anything(key: str) -> None:
    path = "/my pictures/a=b, (1) [x] #2's ${y}.png"
    spec = json.loads(compose_spec([f"{key}={path}"]).model_dump_json())
    for part in key.split("."):
        spec = spec[part]
    assert spec == path


def test_a_source_may_hold_anything() -> None:
    spec = compose_spec(["model=checkpoint", "model.source=/my models/a=b, c"])
    assert spec.model.source == "/my models/a=b, c"  # type: ignore[union-attr]


SPECIAL = st.sampled_from(
    ["'", '"', "\\", "$", "${", "{", "}", "(", ")", "[", "]", ",", ":", "=", " ", "?", "#", "null"]
)
PRINTABLE = st.characters(exclude_categories=["C"])


@settings(max_examples=60, deadline=None)
@given(st.lists(SPECIAL | PRINTABLE, max_size=24).map("".join))
@example("???")
@example("\\")
@example('\\"\\${')
def test_any_printable_text_comes_through_the_command_line(text: str) -> None:
    override = f"workload.prompt={text}"
    quoted = literal(override)
    if quoted == override:  # read in Hydra's grammar: null, wholly in quotes, one ${...}
        assert text.strip().lower() == "null" or text.strip()[:1] + text.strip()[-1:] in ("''", '""', "$}")
        return
    workload = compose_spec([override, quoted.replace("prompt", "negative_prompt", 1)]).workload
    assert workload.prompt == text
    assert workload.negative_prompt == text, "what is quoted already is left"
    assert as_typed(quoted) in (override, quoted)


def test_hydra_s_grammar_is_kept_for_null_quotes_and_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHAT", "fox")
    assert compose_spec(["workload.control_image=null"]).workload.control_image is None
    assert compose_spec(['workload.prompt="a ${oc.env:WHAT}, red"']).workload.prompt == "a fox, red"
    assert compose_spec(["workload.prompt='it\\'s'"]).workload.prompt == "it's"
    assert compose_spec(["workload.prompt=${oc.env:WHAT}"]).workload.prompt == "fox"
    with pytest.raises(InvalidSpecError, match="valid string"):
        compose_spec(["workload.prompt=null"])


def test_other_keys_and_sweeps_are_left_alone() -> None:
    arguments = ["workload.seed=3", "hardware.use=[0,1]", "workload.steps=2", "~resolve.bind", "--help"]
    assert command_texts(arguments) == arguments
    for sweep in (["-m"], ["--multirun"], ["hydra.mode=MULTIRUN"]):
        assert command_texts([*sweep, "workload.prompt=a,b"]) == [*sweep, "workload.prompt=a,b"]


def test_the_command_takes_an_ordinary_prompt_and_writes_down_what_was_typed(
    cli: Run, tiny: Path, tmp_path: Path
) -> None:
    text = 'it\'s a "fox", ${red} (cinematic), 8k: best = 日本の灯台'
    done = cli(*SMALL, f"workload.prompt={text}", "until=compile", "hydra.run.dir=out dir")
    assert done.returncode == 0, done.stderr
    plan, outcome = (
        json.loads((tmp_path / "out dir" / name).read_text(encoding="utf-8")) for name in ("plan.json", "outcome.json")
    )
    assert plan["spec"]["workload"]["prompt"] == text
    assert f"workload.prompt={text}" in outcome["overrides"]


def test_a_sweep_that_cannot_read_a_prompt_gives_the_form_that_works(here: Run, tiny: Path, tmp_path: Path) -> None:
    failed = here("-m", "workload.prompt=it's (a fox)", "workload.seed=1,2", "until=compile")
    assert failed.returncode == 1
    assert "error: workload.prompt: Hydra cannot read this text" in failed.stderr
    hint = next(line for line in failed.stderr.splitlines() if line.startswith("hint: "))
    (override,) = shlex.split(hint.partition("quote the text: ")[2])
    done = here("-m", override, "workload.seed=1,2", "until=compile")
    assert done.returncode == 0, done.stderr
    plans = list(tmp_path.glob("outputs/multirun/*/*/*/plan.json"))
    assert [json.loads(path.read_text())["spec"]["workload"]["prompt"] for path in plans] == ["it's (a fox)"] * 2


def test_a_long_prompt_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a prompt, long.txt"
    path.write_text("\ufeffa fox, red\nin the snow\n", encoding="utf-8")
    assert compile_plan([f"workload.prompt_file={path}"]).spec.workload.prompt == "a fox, red\nin the snow"
    with pytest.raises(UsageError, match="a prompt is given, and the file"):
        compose_spec([f"workload.prompt_file={path}", "workload.prompt=a hen"])


def test_a_saved_plan_takes_a_prompt_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a fox, red", encoding="utf-8")
    overrides = [
        f"plan_file={Path(__file__).parent / 'plans' / '1.2.json'}",
        f"workload.prompt_file={tmp_path}/prompt.txt",
    ]
    assert saved_plan(compose_spec(overrides), overrides)[1].workload.prompt == "a fox, red"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"a f\xfcchs", "is not UTF-8: byte 3 is 0xfc"),
    ],
)
def test_a_prompt_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        compose_spec([f"workload.prompt_file={path}"])
    assert (caught.value.exit_code, caught.value.where) == (3, "workload.prompt_file")


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        compose_spec([f"workload.prompt_file={tmp_path}"])
