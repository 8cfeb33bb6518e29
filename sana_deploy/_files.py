"""The cache folder, and writing so that no reader ever sees half a file: a temporary name, then a rename."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import InputError


def cache_root(cache_dir: str | None = None) -> Path:
    """Return the cache folder: `cache_dir`, else $SANA_DEPLOY_CACHE, else $XDG_CACHE_HOME/sana_deploy."""
    chosen = cache_dir or os.environ.get("SANA_DEPLOY_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sana_deploy"


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
