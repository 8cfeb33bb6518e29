"""`sana-deploy advise`: machines ranked as brute force ranks them, goals, and commands that plan what was ranked."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT

from sana_deploy.advise.options import Options
from sana_deploy.advise.prices import read_prices
from sana_deploy.advise.ranking import rank
from sana_deploy.api import compile_spec
from sana_deploy.declare.advising import Goal, goals_of
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError
from sana_deploy.plan.artifact import Plan

sys.path.insert(0, str(CHECKOUT / "benchmarks"))

from advise import HEADING, QUESTIONS
from advise import main as ask

Run = Callable[..., subprocess.CompletedProcess[str]]
MODEL = ("model=sana_1600m_controlnet",)
TILED = ("hardware.allow=[vae_tiling]", "workload.height=4096", "workload.width=4096")
TITLES = "provider,instance,gpu,gpu_count,gpu_memory_gb,usd_per_hour,region,spot,date,source"
ROWS = (
    "cloud,small,T4,1,16,0.5,,no,2026-01-19,there",
    "cloud,one,L4,1,24,0.8,,no,2026-01-19,there",
    "cloud,two,L40S,2,48,3.5,,no,2026-03-01,there",
    "other,four,H100,4,80,15,,no,2026-02-01,there",
    "other,four dear,H100,4,80,25,,no,2026-02-01,there",
    "other,taken away,H100,4,80,5,,yes,2026-02-01,there",
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prices of five machines, and of one at a spot price."""
    file = tmp_path_factory.mktemp("prices") / "prices.csv"
    file.write_text("\n".join((TITLES, *ROWS)) + "\n", encoding="utf-8")
    return file


_KEPT: dict[str, Plan | InfeasibleError] = {}


def compiled(spec: DeploySpec) -> Plan:
    """A plan; what was asked for before is not planned again."""
    key = spec.model_dump_json()
    if key not in _KEPT:
        try:
            _KEPT[key] = compile_spec(spec)
        except InfeasibleError as problem:
            _KEPT[key] = problem
    found = _KEPT[key]
    if isinstance(found, InfeasibleError):
        raise found
    return found


@cache
def every_plan(gpus: str) -> list[Plan]:
    """All that objectives and numbers of replicas plan for a machine."""
    ways = [("throughput", "auto"), *(("latency", replicas) for replicas in range(1, int(gpus[0]) + 1))]
    plans = []
    for objective, replicas in ways:
        given = (f"hardware.objective={objective}", f"hardware.replicas={replicas}")
        with contextlib.suppress(InfeasibleError):
            plans.append(compiled(compose_spec([*MODEL, *given, "machine=virtual", f"machine.gpus={gpus}"])))
    return plans


def drawn(plan: Plan) -> dict[str, float]:
    """Seconds of the slowest replica, and images of an hour with stages that overlap."""
    each = plan.each()
    rates = [one.overlap.images_per_second if one.overlap else one.images_per_second for one in each]
    seconds = [one.estimates.seconds_per_image for one in each]
    return {"seconds": max(filter(None, seconds)), "images_per_hour": 3600 * sum(filter(None, rates))}


def by_brute_force(table: Path, goals: list[Goal]) -> list[tuple[str, float]]:
    """Instances that meet the goals with what 1,000 images cost, the cheapest first."""
    found = []
    for price in read_prices(str(table)).prices:
        costs = []
        for plan in every_plan(price.gpus):
            values = {**drawn(plan), "budget": price.usd_per_hour}
            if all((values[one.measure] <= one.bound) == (one.sign == "<=") or values[one.measure] == one.bound
                   for one in goals):  # fmt: skip
                costs.append(1000 * price.usd_per_hour / values["images_per_hour"])
        if costs:
            found.append((price.instance, round(min(costs), 3)))
    return sorted(found, key=lambda one: one[1])


@pytest.mark.parametrize(
    "goal",
    [None, "seconds<=3", "seconds<=0.6", "seconds<=0.6,images_per_hour>=10000", "images_per_hour>=2000,budget<=20",
     "seconds<=0.6,images_per_hour>=14000", "seconds<=0.1", "budget<=1"],
)  # fmt: skip
def test_machines_are_ranked_as_brute_force_over_all_their_plans_ranks_them(table: Path, goal: str | None) -> None:
    goals = goals_of(goal)
    spec = compose_spec(MODEL)
    options = Options(spec, MODEL, goals, "rounding", compiled)
    ranking = rank(read_prices(str(table)), options, goals, lambda item, done, of: None)
    ranked = [(one.price.instance, round(one.usd_per_1000_images or 0, 3)) for one in ranking.meeting]
    assert ranked == by_brute_force(table, goals)
    assert [price.instance for price, _ in ranking.unfit] == ["small"]
    assert "14.58 GiB are free" in ranking.unfit[0][1]
    assert len(ranking.meeting) + len(ranking.missing) == 4
    assert [one.over for one in ranking.missing] == sorted(one.over for one in ranking.missing)
    assert all(one.over > 0 and one.misses for one in ranking.missing)


def test_one_document_says_everything_and_its_commands_plan_what_was_ranked(here: Run, table: Path) -> None:
    ended = here("advise", *MODEL, f"advise.prices={table}", "advise.goal=seconds<=0.6, budget<=20", "output=json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["prices"]["of"] == "2026-01-19 to 2026-03-01", "dates of what was ranked; nothing is called current"
    assert (told["goals"], told["prices"]["rows"]) == (["seconds<=0.6", "budget<=20"], 6)
    (best,) = told["meeting"]
    assert (best["instance"], best["gpus"], best["replicas"], best["split"]) == ("four", "4xh100", 2, "guidance")
    assert best["usd_per_1000_images"] == pytest.approx(1000 * 15 / best["images_per_hour"], rel=1e-3)
    assert (best["prices_of"], best["source"], best["exactness"]) == ("2026-02-01", "there", "rounding")
    command = shlex.split(best["rehearse"])
    assert command[:3] == ["python", "-m", "sana_deploy"]
    assert compile_spec(compose_spec(command[3:])).digest == best["plan_digest"]
    assert command[3:-2] == shlex.split(best["run"])[3:]
    assert [one["instance"] for one in told["missing"]] == ["four dear", "two", "one"]
    assert told["missing"][0]["misses"] == ["costs 25.00 USD an hour, 5.00 more than 20.00"]
    (slow,) = told["missing"][1]["misses"]
    assert re.fullmatch(r"takes 1\.\d\d s an image, 1\.\d\d more than 0\.60", slow)
    for words in ("prices of 2026-01-19 to 2026-03-01", "read on 2026-02-01: there", best["run"],
                  "2 replicas on 4 GPUs", f"cloud two (2xl40s) {slow}"):  # fmt: skip
        assert words in ended.stderr


def test_no_machine_that_meets_the_goals_ends_with_code_4_and_how_far_each_is(
    here: Run, table: Path, tmp_path: Path
) -> None:
    ended = here("advise", *MODEL, f"advise.prices={table}", "advise.goal=[images_per_hour>=90000]", "advise.show=1")
    assert ended.returncode == 4
    assert "no machine meets the goals" in ended.stderr
    assert "images an hour, " in ended.stderr
    assert "fewer than 90000" in ended.stderr
    assert "3 more: advise.show=NUMBER" in ended.stderr
    small_gpus = tmp_path / "small.csv"
    small_gpus.write_text(f"{TITLES}\n{ROWS[0]}\n", encoding="utf-8")
    lacking = here("advise", "model=sana_1600m_4k", "hardware.allow=[]", f"advise.prices={small_gpus}")
    assert (lacking.returncode, "nothing fits on any of these machines" in lacking.stderr) == (4, True)
    written = here("advise", "--export", "skypilot", "out.yaml", *MODEL, f"advise.prices={table}",
                   "model.source=owner/name", "advise.goal=budget<=0.1")  # fmt: skip
    assert (written.returncode, "nothing is written" in written.stderr) == (4, True)


def test_spot_prices_count_only_where_they_are_asked_for(here: Run, table: Path) -> None:
    given = ("advise", *MODEL, f"advise.prices={table}", "advise.goal=images_per_hour>=10000", "output=json")
    without, counted = (json.loads(here(*given, f"advise.spot={spot}").stdout)["meeting"] for spot in ("false", "true"))
    assert [one["instance"] for one in without] == ["four", "four dear"]
    assert [one["instance"] for one in counted] == ["taken away", "four", "four dear"]
    assert (counted[0]["spot"], without[0]["spot"]) == (True, False)


def test_no_plan_is_less_exact_than_asked_and_knobs_that_change_pixels_may_be_on_where_asked(
    here: Run, table: Path
) -> None:
    def best(exactness: str, *further: str) -> dict[str, Any]:
        given = ("advise", *further, f"advise.prices={table}", f"advise.exactness={exactness}", "output=json")
        told = json.loads(here(*given).stdout)
        return {one["instance"]: one for one in (*told["meeting"], *told["unfit"])}

    exact = best("bitwise", *MODEL)
    assert {one["exactness"] for one in exact.values() if "exactness" in one} == {"bitwise"}
    assert not {split for one in exact.values() if (split := one.get("split", "none")) != "none"}
    again = compile_spec(compose_spec(shlex.split(exact["four"]["rehearse"])[3:]))
    assert (again.digest, again.exactness) == (exact["four"]["plan_digest"], "bitwise")
    refused = best("bitwise", *MODEL, "runtime=compiled")
    assert "compiled" not in json.dumps([one for one in refused.values() if "exactness" in one])
    assert refused["one"]["reason"] == "its plan is rounding, and advise.exactness=bitwise"
    kept, changed, tiled = best("rounding", *MODEL), best("changes", *MODEL), best("changes", *MODEL, *TILED)
    assert ("vae_tiling" in kept["one"]["run"], "vae_tiling" in changed["one"]["run"]) == (False, True)
    assert changed["one"]["knobs"] == kept["one"]["knobs"], "a knob that changes pixels is not turned on without need"
    assert (tiled["one"]["knobs"], tiled["one"]["exactness"]) == (["vae_slicing", "vae_tiling"], "changes")


def test_a_bitwise_plan_is_found_where_a_split_that_rounds_is_sooner(here: Run, tmp_path: Path) -> None:
    file = tmp_path / "two.csv"
    file.write_text(f"{TITLES}\ncloud,two,H100,2,80,7,,no,2026-02-01,there\n", encoding="utf-8")
    ended = here("advise", *MODEL, "workload.height=2048", "workload.width=2048", f"advise.prices={file}",
                 "advise.goal=seconds<=20", "advise.exactness=bitwise", "hardware.allow=[]", "output=json")  # fmt: skip
    (best,) = json.loads(ended.stdout)["meeting"]
    assert best["exactness"] == "bitwise"


def test_a_model_that_only_layers_fit_is_advised_bit_for_bit(here: Run, tmp_path: Path) -> None:
    file = tmp_path / "small.csv"
    file.write_text(f"{TITLES}\ncloud,two,RTX 3070,2,8,0.2,,no,2026-02-01,there\n", encoding="utf-8")
    ended = here("advise", "model=sana15_4800m", f"advise.prices={file}", "advise.exactness=bitwise",
                 "precision=mixed_bf16", "precision.quantization.text_encoder=nf4", "output=json")  # fmt: skip
    (best,) = json.loads(ended.stdout)["meeting"]
    assert (best["exactness"], best["split"]) == ("bitwise", "layers")


@pytest.mark.parametrize(
    ("goal", "sentence", "hint"),
    [
        ("images_per_hour", "images_per_hour has no bound", "a shell takes < and > for itself"),
        ("second<=1", "'second' is no goal", "did you mean 'seconds'?"),
        ("seconds>=1", "seconds is bound by <= (at most), got 'seconds>=1'", "advise.goal='seconds<=1'"),
        ("seconds=1", "got 'seconds=1'", "advise.goal='seconds<=1'"),
        ("images_per_hour<5", "bound by >= (at least)", "advise.goal='images_per_hour>=5'"),
        (
            "budget<=1.5$",
            "the bound of budget is a number above 0 in USD per hour of the machine, got '1.5$'",
            "seconds<",
        ),
        ("seconds<=0", "got '0'", "seconds<"),
        ("seconds<=1,", "'' is no goal", "seconds<"),
        ("seconds<=1, seconds<=2", "seconds is bound twice", "give each goal once"),
    ],
)
def test_a_goal_that_is_none_gets_one_sentence_and_the_form_that_works(goal: str, sentence: str, hint: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        goals_of(goal)
    assert sentence in str(caught.value)
    assert hint in caught.value.hint
    assert str(caught.value).startswith("advise.goal: ")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("machine=8xh100", "machine is of one machine, advise goes over those of its prices"),
        ("hardware.pin.vae=0", "hardware.pin.vae is of one machine"),
        ("hardware.objective=latency", "hardware.objective is what advise finds for each machine"),
        ("hardware=custom_map", "a custom map is of one machine"),
        ("until=compile", "until is of a single run, advise plans many"),
        ("seconds<", "'seconds<' is no override"),
        ("advise.goals=1", "there is no such key"),
        ("advise.show=0", "must be greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_for_many_machines_is_refused(here: Run, override: str, sentence: str) -> None:
    ended = here("advise", override)
    assert ended.returncode in (1, 2, 3)
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_group_is_of_the_command_alone(here: Run) -> None:
    ended = here("advise.show=3", "until=compile")
    assert (ended.returncode, "advise.show=3 is of the command advise" in ended.stderr) == (2, True)
    told = here("advise", "--help").stdout
    assert "advise.goal=GOAL, GOAL" in told
    assert "images_per_hour>=X" in told


def test_machines_are_planned_in_several_processes_without_torch_and_as_in_one(here: Run, table: Path) -> None:
    given = ["advise", "model=sana_600m", f"advise.prices={table}", "output=json"]
    script = (
        "import os, sys\nfrom sana_deploy import commands\nfrom sana_deploy.advise import options\n"
        "options._FEW = 1\nos.sched_getaffinity = lambda process: {0, 1}\n"
        f"code = commands.run_own({given!r}, lambda: None)\n"
        "pools = 'concurrent.futures.process' in sys.modules\n"
        "sys.exit(code or ('torch imported' if 'torch' in sys.modules else 0 if pools else 'one process'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    in_one = here(*given)
    assert json.loads(done.stdout) == json.loads(in_one.stdout), "one document on stdout and nothing else"
    assert json.loads(done.stdout)["meeting"]


def test_the_page_has_ten_questions_with_answers_that_were_rehearsed() -> None:
    page = (CHECKOUT / "docs" / "advise.md").read_text(encoding="utf-8").partition(HEADING)[2]
    assert len(QUESTIONS) == 10
    for number, (question, arguments) in enumerate(QUESTIONS, 1):
        part = page.partition(f"### {number}. {question}\n")[2].partition("\n### ")[0]
        assert f"sana-deploy advise {arguments}\n" in part
        (deviation,) = re.findall(r"Rehearsed: fullest \d+%, planned ([+-]\d\.\d\d)% of its bytes", part)
        assert abs(float(deviation)) < 1


def test_a_question_is_asked_rehearsed_and_written_down_as_the_page_has_it(
    here: Run, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = []

    def asked(arguments: str, *further: str) -> tuple[Any, float]:
        ended = here("advise", *shlex.split(arguments), *further, "output=json")
        answers.append(json.loads(ended.stdout))
        rehearsed = answers[-1]["meeting"][0].get("rehearsal", {"words": ""})
        assert f"rehearsed: {rehearsed['words']}" in ended.stderr or not further
        return answers[-1], 1.0

    monkeypatch.setattr("advise.asked", asked)  # within this process, where libraries are imported already
    question = ("Which is cheap?", f"model=sana_600m_512 advise.prices={table} 'advise.goal=budget<=1'")
    monkeypatch.setattr("advise.QUESTIONS", (question,))
    page = tmp_path / "page.md"
    page.write_text(f"# By hand\n\n{HEADING}\nold\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["advise.py", "--out", str(page)])
    ask()
    written = page.read_text(encoding="utf-8")
    assert written.startswith(f"# By hand\n\n{HEADING}")
    assert "old" not in written.splitlines()
    assert "| cloud one | 1xl4 |" in written
    assert re.search(r"2 machines meet the goals, 3 miss one, 0 do not fit\. .* Rehearsed: fullest", written)
    assert "Which is cheap?" in capsys.readouterr().out
    first, second = answers[1]["meeting"]
    assert abs(first["rehearsal"]["planned_error"]) < 0.02
    assert first["rehearsal"]["fullness"] == pytest.approx(first["fullness"], abs=0.05)
    assert "rehearsal" not in second
    assert "rehearsal" not in answers[0]["meeting"][0], "without being asked nothing is"
