"""What this package needs of other libraries: declared ranges, tested versions, what is here. None is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from .libraries import ABSENT, installed

PACKAGE = "sana-deploy"
ENABLES = {
    "int8": "precision=int8 and precision=int8_text_encoder: weights in 8 bits",
    "nf4": "precision=nf4: weights in 4 bits",
    "joblib": "hydra/launcher=joblib: jobs of a sweep in several processes",
    "submitit": "hydra/launcher=submitit_slurm: jobs of a sweep on a cluster",
    "ray": "hydra/launcher=ray: jobs of a sweep on Ray",
    "serve": "sana-deploy serve: an images API in one process",
    "serve-ray": "serve.engine=ray: replicas on Ray Serve",
}
"""What an extra is for; those that are not listed are for work on this package itself."""
_MODULES = {"hydra-core": "hydra", "nvidia-ml-py": "pynvml", "pillow": "PIL", "pyyaml": "yaml"}
"""Modules of distributions that have another name."""


@dataclass(frozen=True)
class Library:
    """A library that is needed: what is here, which versions are declared, and the one that tests ran with.

    `state` is `fine`, `missing`, `outside` the declared range, or `broken`: its metadata are here, its code is not.
    """

    name: str
    version: str
    wanted: str
    tested: str
    state: Literal["fine", "missing", "outside", "broken"]
    requirement: str


@dataclass(frozen=True)
class Extra:
    """An optional part of this package: what it enables, and which of its libraries are not as they must be."""

    name: str
    enables: str
    lacking: tuple[Library, ...]


def libraries(extra: str = "") -> list[Library]:
    """The libraries of an extra; those that are always needed for none. Empty where our own metadata is not here."""
    try:
        listed = [Requirement(one) for one in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return []
    return [_library(one) for one in listed if _is_of(one, extra)]


def extras() -> list[Extra]:
    """Every optional part, in the order of `ENABLES`."""
    return [Extra(name, words, tuple(one for one in libraries(name) if one.state != "fine"))
            for name, words in ENABLES.items()]  # fmt: skip


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read from its file; empty for a build without, None where unknown."""
    spec = find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*(?:'([^']*)'|None)", text, re.MULTILINE)
    return (found[1] or "") if found else None


def _is_of(one: Requirement, extra: str) -> bool:
    always = one.marker is None or one.marker.evaluate({"extra": ""})
    return always if not extra else not always and one.marker is not None and one.marker.evaluate({"extra": extra})


def _library(one: Requirement) -> Library:
    version, plain = installed(one.name), f"{one.name}{one.specifier}"
    state: Literal["fine", "missing", "outside", "broken"] = "fine"
    if version == ABSENT:
        state = "missing"
    elif not one.specifier.contains(version, prereleases=True):
        state = "outside"
    elif not _has_code(one.name):
        state = "broken"
    return Library(one.name, version, str(one.specifier), tested_versions().get(_key(one.name), ""), state, plain)


def _has_code(name: str) -> bool:
    module = _MODULES.get(name, name.replace("-", "_"))
    try:
        return find_spec(f"hydra_plugins.{module}" if module.endswith("_launcher") else module) is not None
    except (ImportError, ValueError):
        return False


@cache
def tested_versions() -> dict[str, str]:
    """Distribution -> the exact version that tests run with, from constraints.txt; empty where that is not here."""
    package = Path(__file__).resolve().parents[1]
    for file in (package / "constraints.txt", package.parent / "constraints.txt"):
        if file.is_file():
            return dict(_pins(file.read_text(encoding="utf-8")))
    return {}


def _pins(text: str) -> Iterator[tuple[str, str]]:
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE):
        yield _key(name), version


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
