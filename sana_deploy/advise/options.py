"""What one machine can do: plans for it, the first of them that meets the goals, and what that takes and draws."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..declare.advising import Goal
from ..declare.hardware import SPLITS, MultiGpuBalanced, Planned
from ..declare.knobs import EXACTNESSES, KNOBS, Exactness, least_exact, ordered
from ..declare.spec import DeploySpec, VirtualMachine
from ..errors import InfeasibleError
from ..plan.artifact import Plan
from ..report.progress import Advance
from ..report.wording import groups_words

Compile = Callable[[DeploySpec], Plan]
HOUR = 3600
_FEW = 6
"""Machines that are planned in turn sooner than processes start."""
_OF_MACHINES = ("budget",)
"""Goals that no plan changes."""


@dataclass(frozen=True)
class Option:
    """A plan for a machine, and the overrides that plan it besides those that were given."""

    plan: Plan
    overrides: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Seconds of an image that is drawn alone, by the slowest replica; None where no estimate is known."""
        each = [one.estimates.seconds_per_image for one in self.plan.each()]
        known = [seconds for seconds in each if seconds is not None]
        return max(known) if len(known) == len(each) else None

    @property
    def exactness(self) -> Exactness:
        """What the plan does to pixels, by the least exact replica."""
        return least_exact(one.exactness or "changes" for one in self.plan.each())

    @property
    def images_per_hour(self) -> float | None:
        """Images of all replicas while requests never run out, stages overlapping where the plan has room for it."""
        rates = [_rate(one) for one in self.plan.each()]
        known = [rate for rate in rates if rate is not None]
        return sum(known) * HOUR if len(known) == len(rates) else None

    @property
    def measures(self) -> dict[str, float | None]:
        """What goals bind, by name."""
        return {"seconds": self.seconds, "images_per_hour": self.images_per_hour}

    def over(self, goals: Sequence[Goal]) -> float:
        """By how much the farthest goal is missed, as `Goal.over`; 0 where all are met."""
        return max(
            (goal.over(self.measures[goal.measure]) for goal in goals if goal.measure in self.measures), default=0.0
        )

    @property
    def words(self) -> str:
        """The plan in a few words: replicas or places, how the denoising loop executes, knobs that save memory."""
        plan, parts = self.plan, []
        used = len({slot.index for slot in plan.all_slots})
        if plan.replicas:
            parts.append(f"{len(plan.replicas) + 1} replicas on {used} GPUs")
        if plan.split != "none":
            parts.append(f"split {plan.split}{'' if plan.replicas else f' over {used} GPUs'}")
        elif used > 1 and not plan.replicas:
            parts.append(groups_words(plan.device_map))
        savers = [knob for knob in plan.knobs if not KNOBS[knob].always]
        return ", ".join([*parts, plan.runtime, *savers])


def _rate(plan: Plan) -> float | None:
    """Images per second of one replica."""
    return plan.overlap.images_per_second if plan.overlap else plan.estimates.images_per_second


class Options:
    """Plans machines for one declaration.

    Args:
        spec: the declaration, whose machine is left open.
        given: the overrides that it was composed from.
        goals: what a plan should meet.
        exactness: the least exact that a plan may be.
        compile_spec: makes a plan of a declaration.
    """

    def __init__(
        self, spec: DeploySpec, given: Sequence[str], goals: Sequence[Goal], exactness: Exactness, compile_spec: Compile
    ) -> None:
        self._spec, self._compile = spec, compile_spec
        self._goals = [goal for goal in goals if goal.measure not in _OF_MACHINES]
        self._exactness = exactness
        self._kept = _within(spec, given, exactness)

    def best_of(self, machines: Mapping[str, int], advance: Advance) -> dict[str, Option | str]:
        """For each machine the plan that meets the goals and draws most, else the one that comes nearest to them.

        Several are planned at once, in processes of their own, where there are cores for it. The first one is planned
        here: a checkpoint of unknown shapes is measured for it, which imports torch, and a process with it cannot fork.

        Args:
            machines: in the words of `machine.gpus`, with the number of GPUs of each.
            advance: told of every machine that is planned.

        Returns:
            The option, or why nothing fits, by machine.
        """
        found: dict[str, Option | str] = {}
        (first, *others), of = machines.items(), len(machines)
        advance(first[0], 0, of)
        found[first[0]] = self.best(*first)
        with _several(len(others)) as each:
            for number, ((gpus, _), option) in enumerate(zip(others, each(self.best, others), strict=True), 1):
                advance(gpus, number, of)
                found[gpus] = option
        return found

    def best(self, gpus: str, count: int) -> Option | str:
        """The plan of one machine that draws most, where it meets the goals; see `best_of`.

        Else fewer and fewer replicas, since one with more GPUs draws sooner. The soonest plan, and the one that draws
        most, say at once whether any between them can meet the goals.
        """
        tried = _Tried(self._goals)
        bound = {goal.measure: goal for goal in self._goals}
        if "seconds" in bound and count > 1:
            soonest = tried.add(self._planned(gpus, {"objective": "latency"}))
            if soonest is None:
                return tried.refused
            if bound["seconds"].over(soonest.seconds) > 0:
                return soonest
        most = tried.add(self._planned(gpus, {"objective": "throughput"}))
        hopeless = most is None or (
            "images_per_hour" in bound and bound["images_per_hour"].over(most.images_per_hour) > 0
        )
        replicas = 1 if hopeless or "seconds" not in bound else count // 2
        while replicas > 1 and not tried.met:
            tried.add(self._planned(gpus, {"objective": "latency", "replicas": replicas}))
            replicas //= 2
        return tried.nearest()

    def _planned(self, gpus: str, changes: Mapping[str, Any]) -> Option | str:
        """A plan with `changes` of the group `hardware`, or why there is none."""
        found = self._planned_within(gpus, {**self._kept, **changes})
        if isinstance(found, InfeasibleError) and "split" in self._kept:
            last = [split for split, one in SPLITS.items() if one.last]
            tried = (self._planned_within(gpus, {**self._kept, **changes, "split": split}) for split in last)
            found = next((one for one in tried if not isinstance(one, InfeasibleError)), found)
        if isinstance(found, InfeasibleError):
            nearest = found.plan.considered.closest if found.plan else None
            return nearest.message if nearest else found.message
        return found

    def _planned_within(self, gpus: str, changed: Mapping[str, Any]) -> Option | str | InfeasibleError:
        """A plan with so much changed of the group `hardware`, why it is not exact enough, or that there is none."""
        hardware = self._spec.hardware.model_copy(update=changed)
        machine = VirtualMachine(kind="virtual", gpus=gpus)
        try:
            plan = self._compile(self._spec.model_copy(update={"hardware": hardware, "machine": machine}))
        except InfeasibleError as problem:
            return problem
        option = Option(plan, tuple(f"hardware.{key}={_value(value)}" for key, value in changed.items()))
        if EXACTNESSES.index(option.exactness) > EXACTNESSES.index(self._exactness):
            return f"its plan is {option.exactness}, and advise.exactness={self._exactness}"
        return option


@dataclass
class _Tried:
    """Plans of one machine, in the order in which they were tried."""

    goals: Sequence[Goal]
    found: list[Option] = field(default_factory=list)
    refused: str = ""

    def add(self, planned: Option | str) -> Option | None:
        """Remember a plan, or the first reason why there is none."""
        if isinstance(planned, str):
            self.refused = self.refused or planned
            return None
        self.found.append(planned)
        return planned

    @property
    def met(self) -> bool:
        """Whether a plan that was tried after the soonest meets the goals."""
        return bool(self.found) and self.found[-1].over(self.goals) <= 0

    def nearest(self) -> Option | str:
        """The plan that meets the goals and draws most, else the one that comes nearest to them."""
        meeting = [one for one in self.found if one.over(self.goals) <= 0]
        if meeting:
            return max(meeting, key=lambda one: one.images_per_hour or 0)
        return min(self.found, key=lambda one: one.over(self.goals), default=self.refused)


Each = Callable[[Callable[..., "Option | str"], Sequence[tuple[str, int]]], Iterable["Option | str"]]


@contextmanager
def _several(count: int) -> Iterator[Each]:
    """What maps over arguments: in as many processes as there are cores, in turn where a process cannot fork."""
    workers = min(count, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    alone = threading.active_count() == 1 and not {"torch", "ray"} & set(sys.modules)
    if workers < 2 or not alone or count < _FEW:
        yield lambda work, arguments: (work(*one) for one in arguments)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers, get_context("fork"), _leave_interrupts_to_the_parent) as pool:
        yield lambda work, arguments: pool.map(work, *zip(*arguments, strict=True))


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _within(spec: DeploySpec, given: Sequence[str], exactness: Exactness) -> dict[str, Any]:
    """What of `hardware` has to change so that no plan is less exact; where pixels may change, so may every knob."""
    hardware, worst = spec.hardware, EXACTNESSES.index(exactness)
    assert isinstance(hardware, Planned)
    named = any(one.startswith("hardware.allow=") for one in given)
    wanted = list(hardware.allow) if named or exactness != "changes" else list(KNOBS)
    allow = [knob for knob in ordered(wanted) if EXACTNESSES.index(KNOBS[knob].exactness) <= worst]
    changes: dict[str, Any] = {} if set(allow) == set(hardware.allow) else {"allow": allow}
    if isinstance(hardware, MultiGpuBalanced) and hardware.split == "auto":
        # What is chosen last is tried where nothing else fits.
        splits = [split for split, one in SPLITS.items() if EXACTNESSES.index(one.exactness) <= worst and not one.last]
        if len(splits) == 1:
            changes["split"] = splits[0]
    return changes


def _value(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
