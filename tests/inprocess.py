"""The command within the test's own process, for tests that do not need a process of its own: imports are paid once."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_deploy import __main__ as command


@contextlib.contextmanager
def _left_as_found() -> Iterator[None]:
    """Put back what a command sets for its whole process: handlers of signals and logs, levels of loggers."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: one.level for name, one in root.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    root_level = root.level
    try:
        yield
    finally:
        for number, before in signals.items():
            signal.signal(number, before)
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(root_level)
        for name, one in root.manager.loggerDict.items():
            if isinstance(one, logging.Logger):
                one.setLevel(levels.get(name, logging.NOTSET))


def run_here(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`; what a process of its own would end with."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, _left_as_found():
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sana_deploy", *arguments])
        patch.setattr(command, "_codes", [])
        for key, value in {"COLUMNS": "100", **env}.items():
            patch.setenv(key, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
