"""Starting and ending a command: the collector comes back, nothing that was written is lost, codes stay."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sana_deploy import _startup as startup


def test_the_collector_waits_during_imports_and_works_again_afterwards() -> None:
    with startup.quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with startup.quick_imports():
            pass
        assert not gc.isenabled()  # whoever turned it off keeps it off
    finally:
        gc.enable()


@pytest.mark.parametrize("code", [0, 5])
def test_leaving_runs_handlers_flushes_and_keeps_the_code(code: int) -> None:
    script = (
        "import atexit, sys, torch\n"
        "from sana_deploy._startup import leave\n"
        "atexit.register(lambda: sys.stderr.write('handler ran'))\n"
        "sys.stdout.write('x' * 100_000)\n"
        f"leave({code})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, len(ended.stdout), ended.stderr) == (code, 100_000, "handler ran")


def test_leaving_waits_for_threads_that_python_waits_for(tmp_path: Path) -> None:
    script = (
        "import threading, time, torch\n"
        "from pathlib import Path\n"
        "from sana_deploy._startup import leave\n"
        f"threading.Thread(target=lambda: (time.sleep(0.5), Path({str(tmp_path / 'done')!r}).touch())).start()\n"
        "leave(0)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert (tmp_path / "done").exists()


def test_reading_ahead_takes_whole_files_and_none_that_memory_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    read: list[Path] = []
    monkeypatch.setattr(startup, "_read", read.extend)
    for available in (199, 200):
        monkeypatch.setattr(startup, "_available_memory", lambda available=available: available)
        startup.read_ahead([path, tmp_path / "missing"])
        for thread in threading.enumerate():
            if thread.name == "read ahead":
                thread.join()
    assert read == [path]
