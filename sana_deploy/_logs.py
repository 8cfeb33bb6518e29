"""The log of a run folder. It is a help, not a result: a run goes on where it cannot be written."""

from __future__ import annotations

import logging
import sys


class LogFile(logging.FileHandler):
    """A file handler that says once, in a line, that the file cannot be written, and then keeps silent."""

    _said = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not self._said:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the base class's interface
        """Name the file and the reason; called in the handler of the exception."""
        self._said = True
        problem = sys.exc_info()[1]
        reason = getattr(problem, "strerror", None) or problem
        print(f"warning: the log {self.baseFilename} cannot be written: {reason}", file=sys.stderr)
