"""What the routes of the API share: the plan, orders, the engine, metrics, and how each failure is answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..declare.serving import Serving
from ..errors import RunError, SanaDeployError
from ..plan.artifact import Plan
from .engine import Drawn, Engine, NotServingError, OnProgress, Order, QueueFullError, TooLateError
from .metrics import Metrics
from .openai import ApiError
from .orders import Orders

log = logging.getLogger(__name__)
_MORE_UPLOADS = 8
"""Bodies that may arrive at a time beyond those that the queue has places for."""
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGoneError(Exception):
    """The client left before it was answered."""


@dataclass
class Service:
    """One plan that is served. `keys` are bearer keys; none are asked for where it is empty."""

    plan: Plan
    orders: Orders
    engine: Engine
    options: Serving
    metrics: Metrics
    keys: Sequence[str] = ()
    uploads: int = field(default=0, init=False)

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Read a body in this block: refused before it is read where no picture could be drawn now.

        Raises:
            ApiError: 429 or 503.
        """
        try:
            self.engine.admit(1)
            if self.uploads >= self.options.queue + _MORE_UPLOADS:
                raise QueueFullError(f"{self.uploads} requests are being received already", 1.0)
        except SanaDeployError as problem:
            raise answer_to(problem) from None
        self.uploads += 1
        try:
            yield
        finally:
            self.uploads -= 1

    async def draw(self, order: Order, receive: Receive, on_progress: OnProgress | None = None) -> Sequence[Drawn]:
        """Draw an order for as long as its client is there.

        Args:
            receive: the connection's, whose body was read.

        Raises:
            ApiError: it was not drawn, and why.
            ClientGoneError: the client has left; its pictures end within a step.
        """
        drawing = asyncio.ensure_future(self.engine.draw(order, on_progress))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise ClientGoneError
            return drawing.result()
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except Exception as problem:
            raise answer_to(problem, order.name) from problem
        finally:
            for task in (drawing, leaving):
                task.cancel()
            await asyncio.wait({drawing, leaving})
            if not drawing.cancelled():
                drawing.exception()  # it is answered above, or nobody is there to hear it


async def _left(receive: Receive) -> None:
    """Return once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def answer_to(problem: Exception, name: str = "") -> ApiError:
    """The answer to a failure: its sentence where it is the client's business, else where to find it."""
    match problem:
        case ApiError():
            return problem
        case QueueFullError():
            headers = {"Retry-After": str(max(1, math.ceil(problem.seconds)))}
            return ApiError(
                429, f"{problem.message}; come again in {headers['Retry-After']} s", "queue_full", None, headers
            )
        case NotServingError():
            return ApiError(503, problem.message, "not_serving", None, {"Retry-After": "5"})
        case TooLateError():
            return ApiError(504, problem.message, "timeout")
        case RunError(facts=facts) if facts.get("out_of_memory"):
            return ApiError(500, f"{problem.message}; ask for a smaller size", "out_of_memory")
        case RunError(facts=facts) if "component" in facts or "image" in facts:
            return ApiError(500, problem.message, "bad_picture")
        case _:
            log.error("request %s failed", name, exc_info=problem)
            return ApiError(500, f"drawing failed; the service's log has it under request {name}", "internal_error")


async def heard(draw: Callable[[OnProgress], Awaitable[Sequence[Drawn]]], every: float) -> AsyncIterator[Any]:
    """What happens while an order is drawn, as it happens: `Progress`, None where nothing did, at last the pictures.

    Args:
        draw: draws, and calls what it is given.
        every: seconds of silence after which None comes.

    Raises:
        ApiError, ClientGoneError: from `draw`.
    """
    told: asyncio.Queue[Any] = asyncio.Queue()
    drawing = asyncio.ensure_future(draw(told.put_nowait))
    drawing.add_done_callback(lambda _: told.put_nowait(drawing))
    try:
        while True:
            try:
                news = await asyncio.wait_for(told.get(), every)
            except TimeoutError:
                yield None
                continue
            if news is drawing:
                yield await drawing
                return
            yield news
    finally:
        drawing.cancel()
        await asyncio.wait({drawing})
        if not drawing.cancelled():
            drawing.exception()
