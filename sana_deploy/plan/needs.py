"""What components need as functions of the request: shipped, kept from an earlier run, or measured now.

Shipped are the catalogued architectures and `tiny` (`architectures/*.needs.json`, written by `fit.py`). Any other
checkpoint is measured on first use, which imports torch and takes some ten seconds, and kept in the cache folder under
a digest of its configs, shapes and the versions of the libraries that run it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import cast

from .._files import cache_root, write_text
from ..declare.spec import COMPONENTS, Component, Dtype, Format
from ..errors import InputError
from ..facts import catalogue
from ..facts.catalogue import Fits
from ..facts.checkpoint import Checkpoint
from ..facts.libraries import library_versions
from ..facts.shapes import digest

log = logging.getLogger(__name__)
_SAME_BYTES: Mapping[Dtype, Dtype] = {"float16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}
"""float16 and bfloat16 take the same bytes, and the same operations but for clipping; a test holds that."""
Told = Callable[[int, int], None]
"""Called with the points measured and the points in all."""


def measured_as(form: Format) -> Format:
    """The format whose measurements hold for `form`."""
    return Format(_SAME_BYTES[form.dtype], form.quantization)


def needs_of(
    checkpoint: Checkpoint, formats: Mapping[Component, Format], guided: bool, told: Told | None = None
) -> Mapping[Component, Fits]:
    """Return each component's needs by phase for its format, with or without guidance; see `fit.py` for quantities.

    Raises:
        CheckpointError: a checkpoint that must be measured has an incomplete config.
        RunError: it must be measured, and this PyTorch has no virtual GPUs.
    """
    shipped, key = catalogue.fitted(), "guided" if guided else "unguided"
    found: dict[Component, Fits] = {}
    for name, facts in checkpoint.components.items():
        form = measured_as(formats[name])
        if facts.shapes_digest in shipped:
            found[name] = {phase: entry[str(form)][key] for phase, entry in shipped[facts.shapes_digest].items()}
        else:
            found[name] = _kept_or_measured(checkpoint, form, guided, told)[name]
    return found


def all_shipped(checkpoint: Checkpoint) -> bool:
    """Whether the needs of every component, in every format, come with the package: nothing must be measured."""
    shipped = catalogue.fitted()
    return all(facts.shapes_digest in shipped for facts in checkpoint.components.values())


def _kept_or_measured(
    checkpoint: Checkpoint, form: Format, guided: bool, told: Told | None
) -> Mapping[Component, Fits]:
    versions = library_versions([form])
    name = digest({"checkpoint": checkpoint.fingerprint, "format": str(form), "guided": guided, "versions": versions})
    path = cache_root() / "profiles" / f"{name}.json"
    if (kept := _read(path)) is not None:
        return kept
    log.info("measuring what %s needs in %s", checkpoint.source, form)
    from ..rehearsal.calibrate import fit

    measured = fit(checkpoint, dict.fromkeys(checkpoint.components, form), guided, told or (lambda done, of: None))
    with contextlib.suppress(InputError):  # without a cache folder it is measured every time
        write_text(path, json.dumps(measured, indent=1, sort_keys=True) + "\n")
    _read.cache_clear()
    return cast("Mapping[Component, Fits]", measured)


@lru_cache(maxsize=64)
def _read(path: Path) -> Mapping[Component, Fits] | None:
    """Read a kept file; one that is damaged counts as absent and is made anew."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and set(values) == set(COMPONENTS) else None
