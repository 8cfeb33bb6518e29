"""What makes a command start and end sooner; none of it changes a result.

Importing torch, transformers and diffusers makes some million objects. Python's collector walks over them again and
again while they come, and its end takes them apart one by one: together about half of the time that they cost.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)
_CHUNK = 1 << 24
"""Bytes that reading ahead takes at once."""


class Laps:
    """A clock that tells the seconds since it was last asked."""

    def __init__(self) -> None:
        self.since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since it was made."""
        before, self.since = self.since, time.perf_counter()
        return round(self.since - before, 6)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries in this block: the garbage collector waits, and leaves what they made alone afterwards.

    That is for what there is then, and a pipeline must not be among it: its memory would never come back. There is none
    as long as diffusers is not imported.
    """
    was_on, no_pipelines = gc.isenabled(), "diffusers" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if no_pipelines:
                gc.freeze()
            gc.enable()


def read_ahead(files: Iterable[Path]) -> None:
    """Read files into the page cache from a thread, while the libraries that will load them are still imported.

    Nothing is read where the files take more than half of the memory that is available.
    """
    paths = [path for path in files if path.is_file()]
    if sum(path.stat().st_size for path in paths) * 2 <= _available_memory():
        threading.Thread(target=_read, args=(paths,), name="read ahead", daemon=True).start()


def _read(paths: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.read(_CHUNK):
                    pass


def _available_memory() -> int:
    """Bytes that the system can give without swapping; 0 where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0


def start_gpus(devices: Iterable[str]) -> threading.Thread | None:
    """Start CUDA and cuDNN on `devices` from a thread, while further libraries are imported; torch is imported already.

    One small convolution on each does it. A GPU that cannot start says so when it is used.

    Returns:
        The thread, which has ended once all of them have started; None where no GPU is among `devices`.
    """
    names = sorted(device for device in devices if device.startswith("cuda"))
    if not names:
        return None
    thread = threading.Thread(target=_start, args=(names,), name="start GPUs", daemon=True)
    thread.start()
    return thread


def _start(devices: list[str]) -> None:
    import torch

    try:
        for device in devices:
            pixels = torch.zeros(1, 8, 8, 8, device=device, dtype=torch.float16)
            torch.nn.functional.conv2d(pixels, pixels)
    except RuntimeError as problem:
        log.info("GPUs did not start ahead of time: %s", problem)


def as_process(main: Callable[[], None]) -> None:
    """Call a program's `main`, and `leave` with the code that it exits with."""
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        leave(ended.code or 0)


def leave(code: int) -> None:
    """Exit with `code`: handlers run, streams are flushed; modules are not taken apart where torch is among them.

    Threads that Python would wait for get the ordinary exit.
    """
    waited_for = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    if "torch" not in sys.modules or waited_for:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
