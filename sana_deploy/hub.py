"""Sources on disk or on the Hugging Face hub: everything that may touch the network."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ["*.json", "*.txt", "*.model"]


def locate(source: str, revision: str | None, variant: str | None, where: str) -> tuple[Path, str | None]:
    """Return the local folder of `source` and, for a hub repository, the commit it was resolved to.

    A hub repository is taken from the cache where it is there, as `huggingface_hub` does; HF_HUB_OFFLINE and
    HF_HOME are respected. Safetensors headers are needed for exact sizes, so the files are fetched whole.

    Raises:
        CheckpointError: there is no such folder, no such repository or revision, or it cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    if not _REPOSITORY.fullmatch(source) or source.startswith("."):
        raise CheckpointError(
            f"there is no folder {source!r}", where=where, hint="check the path; a hub repository reads OWNER/NAME"
        )
    return _download(source, revision, variant, where)


def _download(source: str, revision: str | None, variant: str | None, where: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [*_CONFIGS, f"*.{variant}*.safetensors" if variant else "*.safetensors"]
    others = None if variant else ["*.fp16*.safetensors", "*.bf16*.safetensors"]
    try:
        snapshot = Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=others))
    except RevisionNotFoundError as problem:
        raise CheckpointError(f"{source} has no revision {revision!r}", where="model.revision") from problem
    except RepositoryNotFoundError as problem:
        raise CheckpointError(
            f"there is no folder and no hub repository {source!r}", where=where, hint="gated ones need `hf auth login`"
        ) from problem
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        raise CheckpointError(
            f"{source} is not in the local cache and the hub cannot be reached", where=where,
            hint="download it where there is a network (`hf download`), then name the folder",
        ) from problem  # fmt: skip
    return snapshot, snapshot.name
