"""The folders in which weights and what was measured are kept: where, how large, and how much room there is."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .._files import cache_root


@dataclass(frozen=True)
class Folder:
    """A folder that is written to, made or not yet; sizes in bytes, links are not followed."""

    holds: str
    path: str
    variable: str
    bytes: int
    free_bytes: int
    writable: bool


def folders() -> list[Folder]:
    """Our own cache and the hub's."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [
        _folder("sana_deploy: generated models, measurements, compiled code", cache_root(), "SANA_DEPLOY_CACHE"),
        _folder("Hugging Face hub: downloaded weights", Path(HF_HUB_CACHE), "HF_HOME"),
    ]


def _folder(holds: str, path: Path, variable: str) -> Folder:
    # Path.exists raises where a folder above may not be searched.
    there = next(one for one in (path.absolute(), *path.absolute().parents) if os.path.exists(one))  # noqa: PTH110
    return Folder(
        holds=holds,
        path=str(path),
        variable=variable,
        bytes=_size(path),
        free_bytes=shutil.disk_usage(there).free,
        writable=there.is_dir() and os.access(there, os.W_OK | os.X_OK),
    )


def _size(path: Path) -> int:
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            file = Path(root, name)
            try:
                total += 0 if file.is_symlink() else file.stat().st_size
            except OSError:  # removed while we looked
                continue
    return total
