"""Every error this package raises on purpose, and the exit code each one maps to.

    SanaDeployError            1   base; also what an unexpected failure is reported as
    ├── ComposeError           1   Hydra could not compose the configuration
    ├── UsageError             2   the command itself is wrong (options that exclude each other)
    ├── InvalidSpecError       3   a value of the configuration is out of bounds or misspelled
    ├── CheckpointError        3   a checkpoint is missing, damaged, or not a pipeline of the SANA family
    ├── InputError             3   an input or output file cannot be read or written
    ├── InfeasibleError        4   no placement fits, a GPU is not there, a dtype is not native
    ├── PlanError              5   a plan file is damaged, stale, or of another major version
    └── RunError               6   loading or running the pipeline failed

The message states the rule with its quantities; `where` names the key (`hardware.device_map.vae`), `hint`
one thing that helps, `facts` the same quantities for programs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


class SanaDeployError(Exception):
    """Base of all errors: carries the key, a hint and the quantities beside the sentence."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[str] = "failed"

    def __init__(self, message: str, *, where: str = "", hint: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.facts = facts

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.where, self.hint, self.facts), self.__dict__


class ComposeError(SanaDeployError):
    """Hydra could not compose the configuration from the overrides given."""

    status = "invalid"


class UsageError(SanaDeployError):
    """The options exclude each other or miss one another."""

    exit_code = 2
    status = "invalid"


class InvalidSpecError(SanaDeployError):
    """A value of the configuration breaks its bounds."""

    exit_code = 3
    status = "invalid"


class CheckpointError(InvalidSpecError):
    """A checkpoint folder or repository is missing, damaged, or of the wrong kind."""


class InputError(InvalidSpecError):
    """A file the request names cannot be read, or the output folder cannot be written."""


class InfeasibleError(SanaDeployError):
    """What was asked for does not fit the machine; `plan` is the closest miss, where there is one, to be read only."""

    plan: Any = None
    exit_code = 4
    status = "infeasible"


class PlanError(SanaDeployError):
    """A plan file is damaged, stale or incompatible."""

    exit_code = 5
    status = "stale"


class RunError(SanaDeployError):
    """Loading the components or running the request failed."""

    exit_code = 6


def _rebuild(
    kind: type[SanaDeployError], message: str, where: str, hint: str, facts: dict[str, Any]
) -> SanaDeployError:
    return kind(message, where=where, hint=hint, **facts)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelled `word`: the closest of `known`, else the list of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
