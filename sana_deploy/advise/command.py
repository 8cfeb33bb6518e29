"""The command `advise`: from overrides to machines ranked by what they cost. Imports torch only to rehearse."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ..declare.advising import Advising, goals_of
from ..declare.compose import compose_config, spec_from_config
from ..declare.free_text import key_of
from ..declare.hardware import Planned
from ..declare.keys import conf_dir
from ..declare.serving import Serving
from ..declare.spec import DeploySpec, PresentMachine
from ..errors import InfeasibleError, RunError, UsageError
from ..facts.checkpoint import settled
from ..report import terminal as report
from ..report.progress import Advance, progress
from ..serve.export import OPTION, named
from .export import KINDS, check_weights, write
from .lines import show
from .options import Compile, Options
from .prices import read_prices
from .ranking import Advice, Ranking, document, rank

_QUICK = 1.0
"""Seconds for which nothing is said of progress."""
_OF_A_RUN = ("until", "plan_file", "resolve", "sweep", "hydra", "experiment")
_OF_A_MACHINE = ("machine", "hardware.pin", "hardware.use", "hardware.gpu", "hardware.device_map")
_CHOSEN = ("hardware.objective", "hardware.replicas")
_OWN = ("advise", "serve", "output")
"""Keys and groups that are not of the declaration."""
USAGE = f"""\
sana-deploy advise: rank the machines of a price table for a model, a workload and goals.

Usage: sana-deploy advise [GROUP=OPTION ...] [KEY=VALUE ...] ['advise.goal=GOAL, GOAL ...']
       sana-deploy advise {OPTION} {"|".join(KINDS)} FILE [KEY=VALUE ...]
  sana-deploy advise model=sana_1600m_controlnet 'advise.goal=seconds<=1'
  sana-deploy advise model=sana_1600m workload.height=2048 'advise.goal=images_per_hour>=5000, budget<=20' output=json
  sana-deploy advise model=sana_600m advise.prices=lambda/vms.csv advise.rehearse=1

Each machine gets the plan that meets the goals and draws most. Machines are ranked by what 1,000 images cost; those
that miss a goal follow with the reason. Prices are of the dates of the table, never of today. Exit code 4: no machine
meets the goals. {OPTION} writes the first one as a SkyPilot task (skypilot), a Deployment and a Service (kubernetes),
or a RayService (kuberay); serve.KEY=VALUE says how it is served. A file that is there already is not written over.

Values of the group advise, with what they are without being given:

"""


def main(arguments: Sequence[str], compile_spec: Compile) -> int:
    """Run the command.

    Args:
        arguments: what stands behind `advise`.
        compile_spec: makes a plan of a declaration.

    Returns:
        0, or 4 where no machine meets the goals.

    Raises:
        UsageError, SanaDeployError: what was asked for makes no sense, or a table cannot be read.
    """
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(USAGE + (conf_dir() / "advise" / "default.yaml").read_text(encoding="utf-8"))
        return 0
    wanted, arguments = named(arguments, list(KINDS), "advise")
    given = _checked(arguments)
    config = compose_config(arguments)
    asked, serving = Advising.from_config(config), Serving.from_config(config)
    spec, goals = _declared(spec_from_config(config, given)), goals_of(asked.goal)
    if wanted:
        check_weights(spec.model)
    table = read_prices(asked.prices, asked.spot)
    options = Options(spec, given, goals, asked.exactness, compile_spec)
    with _late_progress("planning") as advance:
        ranking = rank(table, options, goals, advance)
    ranking = _rehearsed(ranking, asked.rehearse)
    show(report.console(), ranking, table, spec, goals, given, asked.show)
    if wanted:
        served = [one for one in arguments if key_of(one).startswith("serve.") and ".kuberay." not in key_of(one)]
        file = write(wanted, _first(ranking), spec, serving, asked.gpus_by, given, served)
        print(f"written: {file}", file=sys.stderr, flush=True)
    if spec.output == "json":
        sys.stdout.write(json.dumps(document(ranking, table, spec, goals, given), indent=2, ensure_ascii=False) + "\n")
    return 0 if ranking.meeting else InfeasibleError.exit_code


def _checked(arguments: Sequence[str]) -> list[str]:
    """The overrides of the declaration, without those of the command.

    Raises:
        UsageError: one is no override, or says what the command is to find.
    """
    for one in arguments:
        key = key_of(one)
        if "=" not in one:
            raise UsageError(f"{one!r} is no override", where="advise", hint="values read KEY=VALUE; see advise --help")
        if key.partition(".")[0] in _OF_A_RUN:
            raise UsageError(f"{key} is of a single run, advise plans many", where=key, hint="leave it out")
        if any(key == part or key.startswith(f"{part}.") for part in _OF_A_MACHINE):
            hint = "leave it out; advise.prices=FILE says which machines there are"
            raise UsageError(f"{key} is of one machine, advise goes over those of its prices", where=key, hint=hint)
        if key in _CHOSEN:
            hint = "leave it out; advise.goal says what to look for"
            raise UsageError(f"{key} is what advise finds for each machine", where=key, hint=hint)
    return [one for one in arguments if key_of(one).partition(".")[0] not in _OWN]


def _declared(spec: DeploySpec) -> DeploySpec:
    """The declaration, its pipeline known.

    Raises:
        UsageError: it is for one machine.
    """
    if not isinstance(spec.machine, PresentMachine) or not isinstance(spec.hardware, Planned):
        hint = "hardware=multi_gpu_balanced or hardware=single_gpu"
        raise UsageError("a custom map is of one machine, advise goes over many", where="hardware", hint=hint)
    return settled(spec)


@contextmanager
def _late_progress(title: str) -> Iterator[Advance]:
    """Progress that is shown once the block has taken longer than a moment; nothing of it is there before."""
    start = time.monotonic()
    with ExitStack() as stack:
        shown: list[Advance] = []

        def advance(item: str, done: int, of: int) -> None:
            if time.monotonic() - start > _QUICK:
                if not shown:
                    shown.append(stack.enter_context(progress(title)))
                shown[0](item, done, of)

        yield advance


def _first(ranking: Ranking) -> Advice:
    if not ranking.meeting:
        raise InfeasibleError("no machine meets the goals, so that nothing is written", where=OPTION,
                              hint="a goal that the first of the others meets, see above")  # fmt: skip
    return ranking.meeting[0]


def _rehearsed(ranking: Ranking, count: int) -> Ranking:
    """The same, with the plans of the first `count` machines rehearsed on virtual GPUs."""
    if not count:
        return ranking
    from ..rehearsal.replicas import rehearse

    found: dict[str, dict[str, Any]] = {}
    with progress("rehearsing") as advance:
        for number, one in enumerate(ranking.meeting[:count]):
            plan = one.option.plan
            advance(one.price.gpus, number, count)
            if plan.digest not in found:
                try:
                    gpus = rehearse(plan).report.gpus
                except RunError as problem:
                    found[plan.digest] = {"words": f"it fails: {problem.message}", "planned_error": None}
                else:
                    worst = max((gpu.planned_error for gpu in gpus), key=abs, default=0.0)
                    fullest = max((gpu.fullness for gpu in gpus), default=0.0)
                    words = f"fullest {fullest:.0%}, planned {worst:+.2%} of its bytes"
                    found[plan.digest] = {"words": words, "planned_error": worst, "fullness": round(fullest, 4)}
    first = [replace(one, rehearsed=found[one.option.plan.digest]) for one in ranking.meeting[:count]]
    return replace(ranking, meeting=[*first, *ranking.meeting[count:]])
