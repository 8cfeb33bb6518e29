"""Versions of the libraries that decide what a component's code does; none of them is imported."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from functools import cache
from importlib import metadata

from ..declare.formats import Format
from ..declare.policies import QUANTIZERS

LIBRARIES = ("diffusers", "torch", "transformers")
"""Distributions whose versions decide what a component's code does."""

ABSENT = "not installed"


@cache
def installed(name: str) -> str:
    """The version of a distribution without the build's local part; `ABSENT` where it is not here."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:  # a plan can be read where it cannot be applied
        return ABSENT


def install_hint(extra: str, otherwise: Iterable[str]) -> str:
    """The command that installs what an extra of this package names, however the package itself was installed.

    Its requirements are named, since pip finds an extra by name only where the package is in a registry.

    Args:
        otherwise: distributions to name where this package's own metadata is not here.
    """
    try:
        listed = metadata.requires("sana-deploy") or []
    except metadata.PackageNotFoundError:
        listed = []
    mark = re.compile(rf"""\s*;\s*extra\s*==\s*['"]{re.escape(extra)}['"]\s*$""")
    wanted = [mark.sub("", one) for one in listed if mark.search(one)] or list(otherwise)
    return f"pip install {' '.join(shlex.quote(one) for one in wanted)}"


def library_versions(formats: Iterable[Format] = ()) -> dict[str, str]:
    """Versions of LIBRARIES, and of those that quantise in `formats` if they are here, without the build's local part.

    None of them is imported.
    """
    names = {name for form in formats if form.quantization for name in QUANTIZERS[form.quantization]}
    quantizers = {name: installed(name) for name in sorted(names)}
    return {name: installed(name) for name in LIBRARIES} | {
        name: version for name, version in quantizers.items() if version != ABSENT
    }
