"""The process that serves: a socket, uvicorn, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..declare.serving import Serving
from ..errors import SanaDeployError, UsageError
from .engine import Engine
from .gate import Gate

log = logging.getLogger(__name__)
_HEAD_BYTES = 32 * 1024
"""Bytes of a request's head at most."""
_KEEP_ALIVE = 75
"""Seconds that an idle connection stays: longer than load balancers keep theirs, so that they end first."""
_BACKLOG = 2048
"""Connections that may wait to be taken; uvicorn's own number."""
_FLUSH_SECONDS = 60
"""Seconds that pictures have to be encoded and answers to be written once everything is drawn."""


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens on a host and port; port 0 takes a free one.

    Raises:
        UsageError: the port is taken, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_BACKLOG)  # whoever comes before the server takes connections waits for it
    except (OSError, UnicodeError) as problem:
        why = getattr(problem, "strerror", None) or problem
        hint = "serve.port=0 takes a free one" if port else "serve.host=127.0.0.1"
        raise UsageError(f"{host}:{port} cannot be listened on: {why}", where="serve", hint=hint) from None
    opened.setblocking(False)
    return opened


def url_of(opened: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(engine: Engine, gate: Gate, opened: socket.socket, options: Serving, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C: finish what was accepted, refuse what comes, and return.

    A second signal gives up what is left.

    Args:
        on_ready: called once requests are drawn.

    Raises:
        SanaDeployError: the engine could not be started, or its last replica was lost.
    """
    asyncio.run(_serve(engine, gate, opened, options, on_ready))


async def _serve(
    engine: Engine, gate: Gate, opened: socket.socket, options: Serving, on_ready: Callable[[], None]
) -> None:
    server = _Server(_config(gate, options))
    serving = asyncio.create_task(server.serve(sockets=[opened]))
    told, told_again = asyncio.create_task(server.told.wait()), asyncio.create_task(server.told_again.wait())
    try:
        loading = asyncio.create_task(engine.start())
        await asyncio.wait({loading, told, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        if not loading.done():
            loading.cancel()
            return
        loading.result()
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        on_ready()
        if problem := await _until_told(engine, told, told_again, options.drain):
            raise problem
    finally:
        await engine.close()
        for task in (told, told_again):
            task.cancel()
        server.should_exit = True
        await serving


async def _until_told(
    engine: Engine, told: asyncio.Task[Any], told_again: asyncio.Task[Any], seconds: float
) -> SanaDeployError | None:
    """Wait for a signal and drain, or for the loss of the last replica, which is returned."""
    lost = asyncio.create_task(engine.lost())
    try:
        await asyncio.wait({told, lost}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            return lost.result()
        log.info("stopping: %d pictures are finished first", engine.standing.waiting + engine.standing.working)
        draining = asyncio.create_task(engine.drain(seconds))
        await asyncio.wait({draining, told_again}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            draining.cancel()
            log.warning("stopping at once: what is left is given up")
        elif not draining.result():
            log.warning("not everything was finished within %g s", seconds)
        return None
    finally:
        lost.cancel()


def _config(gate: Gate, options: Serving) -> uvicorn.Config:
    class Timed(_Timed):
        limit = options.receive_timeout

    return uvicorn.Config(
        gate,
        http=Timed,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # the gate logs, with ids
        server_header=False,
        proxy_headers=False,  # what a client claims to be is not believed
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals tell us instead of ending it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.told, self.told_again = asyncio.Event(), asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; called between any two instructions of the main thread."""
        event = self.told_again if self.told.is_set() else self.told
        self.loop.call_soon_threadsafe(event.set)


class _Timed(H11Protocol):
    """Ends connections of clients that send no head or take no answer in time, for which uvicorn waits without end."""

    limit = 30.0
    _until: asyncio.TimerHandle | None = None
    _taken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait for a head that has begun, on a connection that is used again too."""
        if self._until is None and self.conn.their_state is h11.IDLE:
            self._wait()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._done()

    def pause_writing(self) -> None:
        """Wait for the client to take some of the answer."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """It has taken what was there."""
        self._done_writing()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._done()
        self._done_writing()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._until = self.loop.call_later(self.limit, self.transport.close)

    def _done(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None

    def _watch(self) -> None:
        self._taken = self.loop.call_later(self.limit, self._look, self.transport.get_write_buffer_size())

    def _look(self, before: int) -> None:
        """Go on where some of the answer was taken, however slowly; `close` would wait for the rest without end."""
        if self.transport.get_write_buffer_size() < before:
            self._watch()
        else:
            self.transport.abort()

    def _done_writing(self) -> None:
        if self._taken is not None:
            self._taken.cancel()
            self._taken = None


def log_to_stderr() -> None:
    """Log to stderr: ours in full, those of the HTTP server from warnings on, those of other libraries not at all."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    for name, level in (("sana_deploy", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger().addHandler(logging.NullHandler())  # else warnings of others go to stderr
