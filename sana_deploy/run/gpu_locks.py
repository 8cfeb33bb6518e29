"""One job at a time on a GPU: the locks that the jobs of a parallel sweep hold while they work on real ones."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator

from filelock import FileLock, Timeout

from .._files import cache_root
from ..declare.spec import DeploySpec, PresentMachine
from ..facts.machine import probe

log = logging.getLogger(__name__)


@contextlib.contextmanager
def holding_gpus(spec: DeploySpec) -> Iterator[None]:
    """Hold the GPUs that a job may take from before it is planned until it has ended; waits for other jobs.

    Nothing is held where no real GPU is worked on: virtual machines, and runs that stop before they load. Locks are
    taken in one order everywhere, so that no two jobs wait for each other; the system drops them with their process.
    """
    works = isinstance(spec.machine, PresentMachine) and spec.until in ("apply", "generate")
    gpus = probe().named(spec.hardware.gpu_indices) if works else ()
    with contextlib.ExitStack() as held:
        for gpu in sorted(gpus, key=lambda one: one.uuid or str(one.index)):
            folder = cache_root() / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"gpu-{gpu.uuid or gpu.index}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.warning("waiting for GPU %d, %s: another job of a sweep works on it", gpu.index, gpu.name)
                lock.acquire()
            held.callback(lock.release)
        if gpus:
            held.callback(_give_memory_back)
        yield


def _give_memory_back() -> None:
    """Hand cached blocks back to the driver, for the next job may run in another process."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
