"""A placed pipeline in a process of Ray's: the deployment whose replicas draw. Imports Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ray import get_gpu_ids, serve

from ..errors import PlanError
from ..plan.artifact import Plan, ResolvedPlan
from .engine import Content, Made, Preview, Replica, Settings, StoppedError
from .ray_options import REPLICA, Scaling, replica_options
from .warm_up import WarmUp

log = logging.getLogger(__name__)
_STARTS = 2
"""How often Ray tries to start replicas before it gives up with the reason."""
Make = Callable[[ResolvedPlan], Replica]


@dataclass(frozen=True)
class Told:
    """A step of a drawing: the steps done and in all, and previews after those steps that are to be shown."""

    done: int
    of: int
    preview: Sequence[Any] | None


class RayReplica:
    """Draws what `Replica` draws, in a process that has the GPUs of one replica and no others.

    Args:
        plan_text: plan.json of one replica. It is bound to the GPUs that this process sees.
        allow, verify: see `Plan.resolve`.
        make: makes the replica; `PipelineReplica` unless given.
        warm_up: is called with the replica once it is loaded.
    """

    def __init__(
        self,
        plan_text: str,
        allow: Sequence[str],
        verify: bool,
        make: Make | None = None,
        warm_up: WarmUp | None = None,
    ) -> None:
        from ..facts.machine import probe_torch
        from .replica import PipelineReplica

        plan = Plan.from_values(json.loads(plan_text), "the plan")
        self._resolved = plan.resolve(probe_torch(), allow=allow, bind={}, verify=verify)
        if plan.slots and not self._resolved.slot_devices:  # Ray counts GPUs: this would hold them and use none
            raise PlanError("Ray gave this replica no GPU, and its plan has slots", where="serve.engine")
        self._replica = (make or PipelineReplica)(self._resolved)
        self._replica.load()
        if warm_up:
            warm_up(self._replica)
        self._thread = ThreadPoolExecutor(1, "drawing")
        self._names = {f"cuda:{place}": f"cuda:{number}" for place, number in enumerate(get_gpu_ids())}

    def resolved(self) -> ResolvedPlan:
        """The plan on the devices that this process sees."""
        return self._resolved

    async def draw(
        self, settings: Settings, contents: Sequence[Content], shown: Collection[int]
    ) -> AsyncIterator[Told | Made]:
        """Draw a batch: yields its steps as they are done, and at last what was made.

        Cancelling the call ends the drawing after the step that it is in; the replica counts as busy until then.

        Args:
            shown: the steps after which previews are made.
        """
        steps = _Steps(asyncio.get_running_loop(), frozenset(shown))
        job = steps.loop.run_in_executor(self._thread, self._draw, settings, contents, steps)
        job.add_done_callback(lambda _: steps.told.put_nowait(None))
        try:
            while (news := await steps.told.get()) is not None:
                yield news
            made = job.result()
            peaks = {self._names.get(name, name): peak for name, peak in made.peak_bytes.items()}
            yield replace(made, peak_bytes=peaks)
        finally:
            steps.over.set()
            await asyncio.wait({job})
            if not job.cancelled():
                job.exception()  # it was raised above, or nobody is there to hear it

    def _draw(self, settings: Settings, contents: Sequence[Content], steps: _Steps) -> Made:
        """Draw in the thread; where the GPU does not compute any more the process ends, and Ray starts another one."""
        try:
            return self._replica.draw(settings, contents, steps)
        except StoppedError:
            raise
        except BaseException:
            if not self._recovers():
                log.exception("this replica ends: its GPU does not compute any more")
                os._exit(1)
            raise

    def _recovers(self) -> bool:
        try:
            return self._replica.recover()
        except Exception:
            log.exception("a replica does not answer after a failure")
            return False


class _Steps:
    """Hands steps from the thread that draws to the loop; see `OnStep`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, shown: frozenset[int]) -> None:
        self.loop, self.shown = loop, shown
        self.told = asyncio.Queue[Told | None]()
        self.over = threading.Event()

    def check(self) -> None:
        """See `OnStep`."""
        if self.over.is_set():
            raise StoppedError

    def __call__(self, done: int, of: int, preview: Preview) -> None:
        """See `OnStep`."""
        self.check()
        told = Told(done, of, preview() if done in self.shown else None)
        self.loop.call_soon_threadsafe(self.told.put_nowait, told)


def deployment(scaling: Scaling, gpus: int, drain: float) -> serve.Deployment:
    """The deployment of a plan: processes with `gpus` GPUs each, `drain` seconds to end what they draw."""
    options = replica_options(scaling, gpus, drain)
    return serve.deployment(RayReplica, name=REPLICA, max_constructor_retry_count=_STARTS, **options)
