"""Machines of a price table ranked by what 1,000 images cost, and the document that says so."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..declare.advising import Goal, shown
from ..declare.spec import DeploySpec
from ..report.progress import Advance
from .options import Option, Options
from .prices import Price, PriceTable

SCHEMA_VERSION = "1.0"
"""Of the document that `output=json` prints."""
_COMMAND = ("python", "-m", "sana_deploy")


@dataclass(frozen=True)
class Advice:
    """One machine with the plan for it.

    Attributes:
        misses: a sentence for each goal that it misses.
        over: by how much it misses the farthest one, as `Goal.over`.
        rehearsed: what a rehearsal of the plan found; empty without one.
    """

    price: Price
    option: Option
    misses: list[str] = field(default_factory=list)
    over: float = 0.0
    rehearsed: dict[str, Any] = field(default_factory=dict)

    @property
    def usd_per_1000_images(self) -> float | None:
        """What 1,000 images cost while requests never run out; None without an estimate."""
        rate = self.option.images_per_hour
        return None if not rate else 1000 * self.price.usd_per_hour / rate

    def command(self, given: Sequence[str]) -> str:
        """What draws on that machine."""
        return shlex.join([*_COMMAND, *given, *self.option.overrides])

    def rehearsal(self, given: Sequence[str]) -> str:
        """What rehearses that, on any machine."""
        virtual = ("machine=virtual", f"machine.gpus={self.price.gpus}")
        return shlex.join([*_COMMAND, *given, *self.option.overrides, *virtual])


@dataclass(frozen=True)
class Ranking:
    """All machines of a table: those that meet the goals, the cheapest images first; those that miss some, the nearest
    first; and why the others do not fit."""

    meeting: list[Advice]
    missing: list[Advice]
    unfit: list[tuple[Price, str]]


def rank(table: PriceTable, options: Options, goals: Sequence[Goal], advance: Advance) -> Ranking:
    """Plan for every machine of the table and rank them.

    Args:
        advance: told of every machine that is planned.
    """
    judged, unfit = [], []
    found = options.best_of({price.gpus: price.gpu_count for price in table.prices}, advance)
    for price in table.prices:
        best = found[price.gpus]
        if isinstance(best, str):
            unfit.append((price, best))
        else:
            judged.append(_judged(price, best, goals))
    meeting = sorted((one for one in judged if not one.misses), key=_by_cost)
    missing = sorted((one for one in judged if one.misses), key=lambda one: (one.over, *_by_cost(one)))
    return Ranking(meeting, missing, unfit)


def _judged(price: Price, option: Option, goals: Sequence[Goal]) -> Advice:
    values = {**option.measures, "budget": price.usd_per_hour}
    misses = [miss for goal in goals if (miss := goal.miss(values[goal.measure]))]
    return Advice(price, option, misses, max((goal.over(values[goal.measure]) for goal in goals), default=0.0))


def _by_cost(one: Advice) -> tuple[float, float, str]:
    cost = one.usd_per_1000_images
    return (float("inf") if cost is None else cost, one.price.usd_per_hour, one.price.name)


def document(
    ranking: Ranking, table: PriceTable, spec: DeploySpec, goals: Sequence[Goal], given: Sequence[str]
) -> dict[str, Any]:
    """The ranking for programs: one document.

    Args:
        given: the overrides of the declaration.
    """
    work = spec.workload
    return {
        "schema_version": SCHEMA_VERSION,
        "prices": {
            "of": table.dates,
            "file": str(table.file),
            "rows": table.rows,
            "unit": "USD per hour of the machine",
            "unknown_gpus": table.unknown,
        },
        "workload": {"height": work.height, "width": work.width, "batch": work.batch, "steps": work.steps},
        "overrides": list(given),
        "goals": [str(goal) for goal in goals],
        "meeting": [_row(one, given) for one in ranking.meeting],
        "missing": [{**_row(one, given), "misses": one.misses} for one in ranking.missing],
        "unfit": [{**_machine(price), "reason": reason} for price, reason in ranking.unfit],
    }


def _machine(price: Price) -> dict[str, Any]:
    return {
        "provider": price.provider,
        "instance": price.instance,
        "gpus": price.gpus,
        "region": price.region,
        "spot": price.spot,
        "usd_per_hour": price.usd_per_hour,
        "prices_of": str(price.date),
        "source": price.source,
    }


def _row(one: Advice, given: Sequence[str]) -> dict[str, Any]:
    plan, option = one.option.plan, one.option
    return {
        **_machine(one.price),
        "seconds_per_image": option.seconds,
        "images_per_hour": None if option.images_per_hour is None else round(option.images_per_hour, 1),
        "usd_per_1000_images": None if one.usd_per_1000_images is None else round(one.usd_per_1000_images, 4),
        "exactness": option.exactness,
        "fullness": None if plan.fullness is None else round(plan.fullness, 4),
        "replicas": len(plan.replicas) + 1,
        "gpus_used": len(plan.all_slots),
        "runtime": plan.runtime,
        "split": plan.split,
        "knobs": list(plan.knobs),
        "device_map": dict(plan.device_map),
        "plan_digest": plan.digest,
        "run": one.command(given),
        "rehearse": one.rehearsal(given),
        **({"rehearsal": one.rehearsed} if one.rehearsed else {}),
    }


def cost_words(value: float | None) -> str:
    """A number for a table; empty where it is not known."""
    return "" if value is None else shown(value)
