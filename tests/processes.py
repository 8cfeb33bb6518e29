"""Services in processes of their own, and the processes that they start."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


class Process:
    """A service in a process of its own; what it says on stderr is read as it comes."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.ray = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, since sockets are in it
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "100"}
        environment |= {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": self.ray}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def url(self, word: str = "ready:", seconds: float = 180) -> str:
        """Wait for a line that says a URL."""
        end = time.monotonic() + seconds
        while not (found := re.search(rf"^{word}.*?(http://\S+)", self.said, re.MULTILINE)):
            assert time.monotonic() < end, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.02)
        return found[1]

    def ended(self, seconds: float = 60) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[Process]:
    """A service that is killed at the latest when the block ends."""
    one = Process(command, folder)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        shutil.rmtree(one.ray, ignore_errors=True)


def descendants(pid: int) -> dict[int, str]:
    """The processes that a process has started, and theirs: by id, with their command lines."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])  # behind its name
        except OSError:  # it has ended
            continue
    found: dict[int, str] = {}
    for one in parents:
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and one != pid:
            with contextlib.suppress(OSError):
                found[one] = Path(f"/proc/{one}/cmdline").read_bytes().decode(errors="replace")
    return found


def replicas_of(pid: int) -> list[int]:
    """The replicas of Ray Serve below a process."""
    return sorted(one for one, command in descendants(pid).items() if command.startswith("ray::ServeReplica"))


def listening(pid: int) -> set[int]:
    """The TCP ports that a process listens on, on any address."""
    sockets = set()
    with contextlib.suppress(OSError):  # it has ended
        sockets = {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()}
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                ports.add(int(local.rpartition(":")[2], 16))
    return ports
