"""The command line apart from deployments: commands, the first screen, the version, and how a failure is reported."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from . import sweep
from ._version import __version__
from .api import compile_plan, compile_spec
from .declare import completion
from .declare.compose import command_error
from .errors import UsageError, did_you_mean
from .report import terminal as report
from .run.outcome import Outcome, document, failure_of

# A command is imported when it is called: a run, and a completion, start without the others.


def _serve(arguments: Sequence[str]) -> int:
    from .serve import command

    return command.main(arguments, compile_spec)


@dataclass(frozen=True)
class Command:
    """A word that comes first and is no override: what it does, and what runs it; `run` is what Hydra takes."""

    name: str
    words: str
    main: Callable[[Sequence[str]], int] | None
    configured: bool = False
    """Whether it takes Hydra's overrides."""


def _advise(arguments: Sequence[str]) -> int:
    from .advise import command

    return command.main(arguments, compile_spec)


def _diff(arguments: Sequence[str]) -> int:
    from .report import compare

    return compare.main(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from .report import doctor

    return doctor.main(arguments, compile_plan)


COMMANDS = (
    Command("run", "plan a deployment and draw", None, configured=True),
    Command("serve", "answer requests over HTTP", _serve, configured=True),
    Command("advise", "which machine to rent", _advise, configured=True),
    Command("diff", "compare two plans", _diff),
    Command("doctor", "what is here, what is missing", _doctor, configured=True),
    Command("summary", "sum up a sweep", sweep.main),
)
"""In the order of the first screen."""


def first_screen() -> str:
    """What is said to a person who gives no argument: ten lines of at most 80 columns."""
    entries = [f"{one.name:<8} {one.words}" for one in COMMANDS]
    beside = [f"  {left:<40} {right}".rstrip() for left, right in zip(entries[::2], [*entries[1::2], ""], strict=False)]
    return "\n".join([
        f"sana_deploy {__version__}: decide where and how a SANA pipeline runs, check it, run it.",
        "Usage: sana-deploy [COMMAND] [GROUP=OPTION ...] [KEY=VALUE ...]",
        *beside,
        "  sana-deploy hardware=multi_gpu_balanced      draw with a tiny model, anywhere",
        "  sana-deploy model=sana_1600m machine=2x8gb   rehearse on cards you do not have",
        "  sana-deploy serve hardware=single_gpu        an images API on one GPU",
        "All groups, values and exit codes: sana-deploy --help. Of one: COMMAND --help",
        "Docs: README.md and docs/. TAB completes: eval \"$(sana-deploy -sc install=bash)\"",
    ])  # fmt: skip


def of_run(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments of a deployment: `run` may stand before them."""
    return arguments[1:] if arguments[:1] == ["run"] else arguments


def run_own(arguments: Sequence[str], hydra: Callable[[], None]) -> int | None:
    """Run what is not a deployment and return its exit code; None where Hydra has to take the arguments.

    Nothing at all is answered with the first screen; `run` alone runs the default deployment. A shell that
    completes a line is answered by `hydra`, with what `declare/completion.py` adds.

    Raises:
        UsageError: the first word is neither a command nor KEY=VALUE.
    """
    if question := completion.asked(arguments):
        configured = [one.name for one in COMMANDS if one.configured]
        return completion.answer(question, [one.name for one in COMMANDS], configured, hydra)
    if "--version" in arguments:
        sys.stdout.write(f"sana_deploy {__version__}\n")
        return 0
    if not arguments:
        sys.stdout.write(f"{first_screen()}\n")
        return 0
    word, known = arguments[0], {one.name: one.main for one in COMMANDS}
    if word in known:
        command = known[word]
        return command(arguments[1:]) if command else None
    if re.fullmatch(r"[A-Za-z][\w.-]*", word):
        raise UsageError(f"there is no command {word!r}", hint=f"{did_you_mean(word, known)} Values read KEY=VALUE.")
    return None


def fail(problem: BaseException, arguments: Sequence[str]) -> NoReturn:
    """Exit with one clear sentence, and with the document of `output=json` if that was asked for."""
    if isinstance(problem, BrokenPipeError):  # whoever read our output has gone, e.g. `... --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    error = command_error(problem)
    report.show_error(error)
    if "output=json" in arguments:
        status, code, failure = failure_of(error)
        sys.stdout.write(document(Outcome(status=status, exit_code=code, stage="compile", error=failure), None))
    sys.exit(error.exit_code)
