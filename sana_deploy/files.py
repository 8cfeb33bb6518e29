"""Writing files so that no reader ever sees half of one: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import InputError


def write_text(path: Path, text: str) -> Path:
    """Write `text` under a temporary name in the same folder, then rename it.

    Raises:
        InputError: the folder cannot be written.
    """
    return write_bytes(path, text.encode("utf-8", "surrogatepass"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content` atomically; see `write_text`."""
    draft = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(draft).chmod(0o644)
        Path(draft).replace(path)
    except OSError as problem:
        if draft:
            Path(draft).unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written: {problem.strerror}", where="hydra.run.dir", hint="hydra.run.dir=FOLDER"
        ) from problem
    return path
