"""Ctrl-C and kill: both raise KeyboardInterrupt and are remembered.

Remembered, because an interrupt may arrive as something else: OmegaConf 2.3 restores the flags of a node that is half
made and ends in an AttributeError, which Hydra calls an error of composition; one raised in a finaliser is dropped.
"""

from __future__ import annotations

import signal
from types import FrameType

_seen = False


def watch() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt in the main thread, from which this must be called."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def caused(problem: BaseException) -> bool:
    """Whether an exception is an interrupt or, once there was one, most likely its consequence."""
    return _seen or isinstance(problem, KeyboardInterrupt)


def check() -> None:
    """Raise KeyboardInterrupt if this process was interrupted, whatever became of the first one."""
    if _seen:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
