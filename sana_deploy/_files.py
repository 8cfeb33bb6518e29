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


_OUTPUTS = "hydra.run.dir"
"""The key of the folder of a run."""


def write_text(path: Path, text: str, where: str = _OUTPUTS) -> Path:
    """Write `text` under a temporary name in the same folder, then rename it.

    Args:
        where: the key or option that names the file or its folder.

    Raises:
        InputError: the folder cannot be written.
    """
    return write_bytes(path, text.encode("utf-8", "surrogatepass"), where)


def write_bytes(path: Path, content: bytes, where: str = _OUTPUTS) -> Path:
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
        hint = f"{where}=FOLDER" if where == _OUTPUTS else "a file in a folder that can be written"
        raise InputError(f"{path} cannot be written: {problem.strerror}", where=where, hint=hint) from problem
    return path
