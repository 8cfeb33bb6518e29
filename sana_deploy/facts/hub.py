"""Sources on disk or on the Hugging Face hub: everything that may touch the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..errors import CheckpointError
from .headers import BASE_NAMES, TensorFacts, variant_hint

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ["*.json", "*.txt", "*.model"]
_VARIANTS = ("fp16", "bf16", "fp32", "non_ema")


def split_revision(named: str) -> tuple[str, str | None]:
    """Split OWNER/NAME@REVISION; a folder, or a repository without a revision, stays whole."""
    source, _, revision = named.partition("@")
    pinned = bool(revision) and _REPOSITORY.fullmatch(source) is not None and not Path(named).expanduser().is_dir()
    return (source, revision) if pinned else (named, None)


def names_folder(source: str) -> bool:
    """Whether a source is a folder: one that is there, or a name that no hub repository has."""
    pinned = split_revision(source)[1] is not None
    return not pinned and (Path(source).expanduser().is_dir() or _REPOSITORY.fullmatch(source) is None)


def at_revision(repository: str, revision: str) -> str:
    """OWNER/NAME@REVISION, which `split_revision` takes apart."""
    return f"{repository}@{revision}"


def locate(
    source: str, revision: str | None, variant: str | None, where: str, *, weights: bool, pickles: bool = False
) -> tuple[Path, str | None]:
    """Return the local folder of `source` and, for a hub repository, the commit it was resolved to.

    A hub repository is taken from the cache where it is there, as `huggingface_hub` does; HF_HUB_OFFLINE and
    HF_HOME are respected.

    Args:
        source: a folder, or OWNER/NAME on the hub.
        revision: branch, tag or commit.
        variant: the file variant whose weights are wanted.
        where: the key that named the source, for messages.
        weights: fetch them too; else configs, tokenizer and scheduler only, a few MB (`remote_headers` reads sizes).
        pickles: fetch pickled weights too.

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
    return _download(source, revision, variant, where, weights, pickles)


def _download(
    source: str, revision: str | None, variant: str | None, where: str, weights: bool, pickles: bool
) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted, others = list(_CONFIGS), None
    if weights:
        wanted += ["*.safetensors", *(["*.bin"] if pickles else [])]
        others = [f"*.{name}*.safetensors" for name in _VARIANTS if name != variant]
    try:
        snapshot = Path(snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=others))
    except RevisionNotFoundError as problem:
        raise CheckpointError(
            f"{source} has no revision {revision!r}", where=where.replace("model.source", "model.revision")
        ) from problem
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


@lru_cache(maxsize=64)
def remote_headers(
    repository: str, commit: str, folder: str, variant: str | None, where: str
) -> Mapping[str, TensorFacts]:
    """Read the safetensors headers in one folder of a hub repository: some KB by range requests, no weights.

    Raises:
        CheckpointError: there are none, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError

    api = HfApi()
    tensors: dict[str, TensorFacts] = {}
    try:
        present = [
            name for name in api.list_repo_files(repository, revision=commit) if name.rpartition("/")[0] == folder
        ]
        for name in _weight_names(present, variant):
            parsed = api.parse_safetensors_file_metadata(repository, name, revision=commit)
            tensors |= {key: TensorFacts(entry.dtype, tuple(entry.shape)) for key, entry in parsed.tensors.items()}
    except SafetensorsParsingError as problem:
        raise CheckpointError(
            f"a header of {folder or 'the model'} in {repository} is damaged: {problem}", where=where
        ) from problem
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as problem:
        raise CheckpointError(
            f"the weights of {folder or 'the model'} in {repository} are not in the local cache, "
            "and their headers cannot be read",
            where=where,
            hint="download it where there is a network (`hf download`), then name the folder",
        ) from problem
    if not tensors:
        hint = variant_hint((name.rpartition("/")[2] for name in present), where)
        raise CheckpointError(
            f"{repository} has no safetensors file in {folder or 'its root'}" + (" without a variant" if hint else ""),
            where=where,
            hint=hint or "convert it with save_pretrained, or name another repository",
        )
    return tensors


def _weight_names(present: list[str], variant: str | None) -> list[str]:
    """The files that `headers.weight_files` would take: the variant's if there are some, shards in order."""
    for suffix in ([f".{variant}"] if variant else []) + [""]:
        for base in BASE_NAMES:
            pattern = re.compile(rf"(.*/)?{base}{re.escape(suffix)}(-\d+-of-\d+)?\.safetensors")
            if names := sorted(name for name in present if pattern.fullmatch(name)):
                return names
    return []
