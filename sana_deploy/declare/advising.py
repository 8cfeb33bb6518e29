"""The group `advise`: which machines are ranked, and by what. It belongs to the command, not to a deployment's plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..errors import InvalidSpecError, did_you_mean
from .command_group import CommandGroup
from .knobs import Exactness

WHERE = "advise.goal"
Count = Annotated[int, Field(ge=0, le=1000)]


@dataclass(frozen=True)
class Measure:
    """What a goal is about.

    Attributes:
        sign: `<=` where less is better, `>=` where more is.
        unit: of its number.
        words: what a machine does or costs, before and after the number.
    """

    sign: Literal["<=", ">="]
    unit: str
    words: tuple[str, str]


MEASURES: dict[str, Measure] = {
    "seconds": Measure("<=", "seconds for each image", ("takes ", " s an image")),
    "images_per_hour": Measure(">=", "images per hour", ("draws ", " images an hour")),
    "budget": Measure("<=", "USD per hour of the machine", ("costs ", " USD an hour")),
}
_EXAMPLE = "advise.goal='seconds<=1.5, budget<=10'"
_QUOTE = f"a shell takes < and > for itself, quote the goal: {_EXAMPLE}"
_PARTS = re.compile(r"\s*(\w*)\s*([<>=]*)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Goal:
    """One bound: at most, or at least, `bound` in the unit of its measure."""

    measure: str
    bound: float

    @property
    def sign(self) -> str:
        """`<=` or `>=`."""
        return MEASURES[self.measure].sign

    def __str__(self) -> str:
        return f"{self.measure}{self.sign}{self.bound:g}"

    def over(self, value: float | None) -> float:
        """By which factor `value` misses the bound, less one; 0 or less where it meets it, infinite where unknown."""
        if value is None:
            return float("inf")
        return value / self.bound - 1 if self.sign == "<=" else self.bound / max(value, 1e-12) - 1

    def miss(self, value: float | None) -> str:
        """How far `value` is from the bound, in a sentence's part; empty where it meets it."""
        if self.over(value) <= 0:
            return ""
        before, after = MEASURES[self.measure].words
        if value is None:
            return f"no estimate says what it {before.strip()}"
        apart = abs(value - self.bound)
        side = "more" if self.sign == "<=" else "fewer"
        return f"{before}{shown(value)}{after}, {shown(apart)} {side} than {shown(self.bound)}"


def shown(value: float) -> str:
    """A number as people read it: two decimals below a hundred, whole from there on; small ones to two places."""
    return f"{value:.2g}" if 0 < value < 0.1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def goals_of(text: str | None) -> list[Goal]:
    """Read goals with commas between them, e.g. `seconds<=1, images_per_hour>=5000`; brackets around them do no harm.

    Raises:
        InvalidSpecError: one of them is no goal, with the form that works.
    """
    if text is None:
        return []
    goals = [_goal(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    for number, goal in enumerate(goals):
        if goal.measure in [other.measure for other in goals[:number]]:
            raise InvalidSpecError(f"{goal.measure} is bound twice", where=WHERE, hint="give each goal once")
    return goals


def _goal(text: str) -> Goal:
    match = _PARTS.fullmatch(text)
    assert match is not None  # the last group takes anything
    name, sign, number = match.groups()
    if not name:
        raise InvalidSpecError(f"{text.strip()!r} is no goal", where=WHERE, hint=_EXAMPLE)
    if name not in MEASURES:
        hint = did_you_mean(name, MEASURES)
        raise InvalidSpecError(f"{name!r} is no goal, goals are {', '.join(MEASURES)}", where=WHERE, hint=hint)
    measure = MEASURES[name]
    if not sign and not number:
        raise InvalidSpecError(f"{name} has no bound", where=WHERE, hint=_QUOTE)
    if sign != measure.sign:
        better = "at most" if measure.sign == "<=" else "at least"
        example = f"{WHERE}='{name}{measure.sign}{number or 1}'"
        raise InvalidSpecError(f"{name} is bound by {measure.sign} ({better}), got {text.strip()!r}",
                               where=WHERE, hint=example)  # fmt: skip
    try:
        bound = float(number)
    except ValueError:
        bound = float("nan")
    if not 0 < bound < float("inf"):
        raise InvalidSpecError(f"the bound of {name} is a number above 0 in {measure.unit}, got {number!r}",
                               where=WHERE, hint=_EXAMPLE)  # fmt: skip
    return Goal(name, bound)


class Advising(CommandGroup):
    """How machines are ranked.

    Attributes:
        goal: what a machine must do; `goals_of` reads it. None asks for nothing.
        exactness: the least exact that a plan may be.
        prices: path of a price table; None takes the one that ships.
        spot: whether machines at spot prices count.
        rehearse: how many of the best are rehearsed.
        show: rows of each table that the terminal shows.
        gpus_by: how `--export kubernetes` asks for GPUs.
    """

    group: ClassVar[str] = "advise"
    goal: str | None = None
    exactness: Exactness = "rounding"
    prices: str | None = None
    spot: bool = False
    rehearse: Count = 0
    show: Annotated[int, Field(ge=1, le=1000)] = 10
    gpus_by: Literal["claim", "limits"] = "claim"
