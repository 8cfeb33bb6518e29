"""Peak of a process's own host memory while something runs, for the benchmarks.

Anonymous memory (the kernel's Documentation/filesystems/proc.rst, smaps_rollup): what was allocated or copied. Pages of
mapped files are not counted; they stay in the page cache and are given back under pressure.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")


class Peak:
    """`bytes`: the largest growth seen so far."""

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def anonymous_peak(every: float = 0.05) -> Iterator[Peak]:
    """Watch this process from another thread, every so many seconds; reading slows page faults down, so do not time."""
    before, peak, done = _anonymous(), Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            peak.bytes = max(peak.bytes, _anonymous() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _anonymous() -> int:
    fields = dict(line.split(":", 1) for line in _ROLLUP.read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024
