"""The engine whose replicas are a deployment of Ray Serve: the queue and its promises are those of `LocalEngine`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from ..errors import RunError, SanaDeployError
from .engine import Content, Made, NotServingError, Observer, OnStep, Settings, Standing, StoppedError
from .local import LocalEngine
from .ray_cluster import Cluster
from .ray_replica import Told

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2
"""How often a drawing looks whether anybody waits for it still, while nothing comes from its replica."""
_WATCH_SECONDS = 1.0
"""How often Ray is asked which replicas live."""


class RayEngine(LocalEngine):
    """Draws orders on the replicas of a deployment, each in a process of its own; see `Engine`.

    A replica that is lost is started again by Ray. What it was drawing is drawn once more, of the same seeds.

    Args:
        cluster: where the deployment runs.
        startup: seconds that a replica may take until it can draw.
        given: see `LocalEngine`.
    """

    def __init__(self, cluster: Cluster, *, startup: float, observer: Observer | None = None, **given: Any) -> None:
        observer = observer or Observer()
        remote = [_Remote(cluster, observer) for _ in range(cluster.replicas)]
        super().__init__(remote, observer=observer, **given)
        self._cluster, self._startup = cluster, startup
        self._living = 0
        self._stopped = threading.Event()
        self._deploying: asyncio.Future[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def standing(self) -> Standing:
        """See `Engine`."""
        now = super().standing
        return replace(now, ready=min(now.ready, self._living))

    async def start(self) -> None:
        """See `Engine`."""
        self._started = True
        for step in (self._cluster.open, lambda: self._cluster.deploy(self._startup, self._stopped.is_set)):
            self._deploying = asyncio.ensure_future(asyncio.to_thread(step))
            await asyncio.shield(self._deploying)
            _take_back_signals()
        self._living = await asyncio.to_thread(self._cluster.living)
        await super().start()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """See `Engine`."""
        self._stopped.set()
        if self._watching:
            self._watching.cancel()
        if self._deploying:
            await asyncio.wait({self._deploying})
        await super().close()
        await asyncio.to_thread(self._cluster.remove)

    async def _watch(self) -> None:
        """Follow how many replicas live; without any for the seconds that a start may take, the engine is lost."""
        since = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            with contextlib.suppress(Exception):  # Ray answers again, or no replica is seen to live
                before, self._living = self._living, await asyncio.to_thread(self._cluster.living)
                if self._living != before:
                    log.warning("%d of %d replicas live", self._living, self._cluster.replicas)
                if self._living:
                    since = time.monotonic()
            if time.monotonic() - since > self._startup:
                why = await asyncio.to_thread(self._cluster.why)
                self._end(RunError(f"no replica has lived for {self._startup:g} s{why}", where="serve"))
                return


def _take_back_signals() -> None:
    """Have SIGTERM do again what this process set; Ray's own handler aborts it three seconds later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


class _Remote:
    """A place for one batch on the deployment: Ray chooses the replica that draws it; see `Replica`."""

    def __init__(self, cluster: Cluster, observer: Observer) -> None:
        self._cluster, self._observer = cluster, observer

    def load(self) -> None:
        """See `Replica`: the deployment has loaded."""

    def recover(self) -> bool:
        """See `Replica`: a replica recovers by itself, or is started again."""
        return True

    def draw(self, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> Made:
        """See `Replica`. One picture is drawn again by another replica if its own is lost; the engine retries batches.

        Raises:
            NotServingError: the deployment is gone.
        """
        draw = _Drawing(self._cluster.handle, settings, contents, on_step)
        try:
            return asyncio.run(draw.run())
        except RayActorError:
            log.warning("a replica was lost with %d pictures at work", len(contents))
            if len(contents) > 1:
                raise RunError("the replica that drew this was lost") from None
        self._observer.retried(1)
        try:
            return asyncio.run(draw.run())
        except RayActorError:
            raise RunError("two replicas were lost while they drew this") from None


class _Drawing:
    """One batch on its way through a replica."""

    def __init__(self, handle: Any, settings: Settings, contents: Sequence[Content], on_step: OnStep) -> None:
        self._draw = handle.options(method_name="draw", stream=True)
        self._settings, self._contents, self._on_step = settings, contents, on_step

    async def run(self) -> Made:
        """Draw it.

        Raises:
            RayActorError: the replica was lost.
            StoppedError: nobody waits for it.
            NotServingError, SanaDeployError: as `Replica.draw`.
        """
        answer = self._draw.remote(self._settings, self._contents, self._on_step.shown)
        try:
            while True:
                match await self._next(answer):
                    case Told(done, of, preview):
                        self._on_step(done, of, _of(preview))
                    case Made() as made:
                        return made
        except StoppedError:
            answer.cancel()
            raise
        except DeploymentUnavailableError as problem:
            raise NotServingError("no replica can be started any more") from problem
        except RayTaskError as problem:
            if isinstance(problem.cause, SanaDeployError):
                raise problem.cause from None
            raise

    async def _next(self, answer: Any) -> Any:
        """What comes next of a drawing; looks now and then whether anybody waits for it."""
        coming = asyncio.ensure_future(answer.__anext__())
        while not coming.done():
            await asyncio.wait({coming}, timeout=_LOOK_SECONDS)
            if not coming.done():
                self._on_step.check()
        return coming.result()


def _of(preview: Sequence[Any] | None) -> Callable[[], Sequence[Any] | None]:
    return lambda: preview
