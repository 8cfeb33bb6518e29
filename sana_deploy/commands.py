"""The command line apart from deployments: subcommands, the version, and how a failure is reported."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from . import sweep
from ._version import __version__
from .api import compile_spec
from .declare.compose import command_error
from .errors import UsageError, did_you_mean
from .plan import diff
from .report import terminal as report
from .run.outcome import Outcome, document, failure_of
from .serve import command as serving


def _serve(arguments: Sequence[str]) -> int:
    return serving.main(arguments, compile_spec)


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {"diff": diff.main, "serve": _serve, "summary": sweep.main}
"""Words that come first and are no override."""


def run_own(arguments: Sequence[str]) -> int | None:
    """Run what is not a deployment and return its exit code; None where Hydra has to take the arguments.

    Raises:
        UsageError: the first word is neither a command nor KEY=VALUE.
    """
    if "--version" in arguments:
        sys.stdout.write(f"sana_deploy {__version__}\n")
        return 0
    word = arguments[0] if arguments else ""
    if word in COMMANDS:
        return COMMANDS[word](arguments[1:])
    if re.fullmatch(r"[A-Za-z][\w.-]*", word):
        raise UsageError(f"there is no command {word!r}", hint=f"{did_you_mean(word, COMMANDS)} Values read KEY=VALUE.")
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
