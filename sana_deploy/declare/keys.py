"""The keys of the configuration, read from its own files, and the nearest one to a key that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

from ..errors import did_you_mean


def conf_dir() -> Path:
    """Return the folder of the config groups: inside the package, else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


@cache
def known_keys() -> dict[str, tuple[str, ...]]:
    """Return every key with the options of its group whose file has it: `hardware.gpu` -> `hardware=single_gpu`.

    An option inherits further keys from the one that its file derives from, which is an option of the same group, so
    that no key is missing here. Groups are keys as well; what is not in a group has no option.
    """
    found: dict[str, list[str]] = {}
    for file in sorted([conf_dir() / "config.yaml", *conf_dir().glob("*/*.yaml")]):
        group = "" if file.parent == conf_dir() else file.parent.name
        if group in ("hydra", "experiment"):
            continue
        for path in _paths(_content(file), group):
            found.setdefault(path, []).extend([f"{group}={file.stem}"] if group else [])
    for group in (folder.name for folder in conf_dir().iterdir() if folder.is_dir() and folder.name != "hydra"):
        found.setdefault(group, [])
    return {path: tuple(owners) for path, owners in found.items()}


def _content(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    values = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(file)))
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


def _paths(values: dict[str, Any], parent: str) -> Iterator[str]:
    for key, value in values.items():
        path = f"{parent}.{key}" if parent else str(key)
        yield path
        if isinstance(value, dict):
            yield from _paths(value, path)


def nearest_key(path: str) -> str:
    """Return a hint for a key that is not known in its group: the group it belongs to, or the nearest key."""
    known = known_keys()
    parent, _, word = path.rpartition(".")
    if owners := known.get(path):
        return f"{word} belongs to {' and '.join(owners)}"
    siblings = {one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == parent}
    if difflib.get_close_matches(word, siblings, n=1, cutoff=0.7):
        return did_you_mean(word, siblings)
    if elsewhere := [one for one in known if one.rpartition(".")[2] == word]:
        same = [one for one in elsewhere if parent and one.startswith(f"{parent}.")]
        return f"did you mean {' or '.join(repr(one) for one in same or elsewhere)}?"
    if not siblings and (close := difflib.get_close_matches(path, known, n=1, cutoff=0.7)):
        return f"did you mean {close[0]!r}?"
    return did_you_mean(word, siblings or {one for one in known if "." not in one})
