"""What components need as functions of the request: shipped, kept from an earlier run, or measured now.

Shipped are the catalogued architectures and `tiny` (`architectures/*.needs.json`, which `rehearsal/calibrate.py`
writes). Any other checkpoint is measured on first use, which imports torch and takes some ten seconds. The result is
kept in the cache folder under a digest of its configs, shapes and the versions of the libraries that run it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .._files import cache_root, write_text
from ..declare.formats import Dtype, Format
from ..declare.pipelines import Component, Phase
from ..errors import InputError
from ..facts import catalogue
from ..facts.checkpoint import Checkpoint
from ..facts.libraries import library_versions
from ..facts.shapes import digest

log = logging.getLogger(__name__)
_SAME_BYTES: Mapping[Dtype, Dtype] = {"float16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}
"""float16 and bfloat16 take the same bytes, and the same operations but for clipping; a test checks it."""
_QUANTITIES = 2
"""Grows where more is measured than kept files of before have."""
OnProgress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""
Measured = Mapping[Component, Mapping[Phase, Mapping[str, Any]]]
"""What each component needs, by phase and quantity."""
Measure = Callable[[Checkpoint, Mapping[Component, Format], bool], Measured]
"""Measures what each component of a checkpoint needs in its format, with or without guidance."""


def measured_as(form: Format) -> Format:
    """The format whose measurements hold for `form`."""
    return Format(_SAME_BYTES[form.dtype], form.quantization)


def needs_of(checkpoint: Checkpoint, formats: Mapping[Component, Format], guided: bool, measure: Measure) -> Measured:
    """Return each component's needs by phase for its format, with or without guidance, where that makes a difference.

    `rehearsal/calibrate.py` says which quantities these are. `measure` is called where they are neither shipped nor
    kept.

    Raises:
        CheckpointError: a checkpoint that must be measured has an incomplete config.
        RunError: it must be measured, and this PyTorch has no virtual GPUs.
    """
    guided = guided and checkpoint.pipeline.counts_guidance
    shipped, key = catalogue.calibrated(), "guided" if guided else "unguided"
    found: dict[Component, Mapping[Phase, Mapping[str, Any]]] = {}
    for name in checkpoint.components:
        form = measured_as(formats[name])
        if (entries := shipped.get(checkpoint.needs_key(name))) is not None:
            found[name] = {phase: entry[str(form)][key] for phase, entry in entries.items()}
        else:
            found[name] = _kept_or_measured(checkpoint, form, guided, measure)[name]
    return found


def all_shipped(checkpoint: Checkpoint) -> bool:
    """Whether the needs of every component, in every format, come with the package: nothing must be measured."""
    shipped = catalogue.calibrated()
    return all(checkpoint.needs_key(name) in shipped for name in checkpoint.components)


def _kept_or_measured(checkpoint: Checkpoint, form: Format, guided: bool, measure: Measure) -> Measured:
    versions = library_versions([form])
    what = {"pipeline": checkpoint.pipeline.class_name, "checkpoint": checkpoint.fingerprint, "quantities": _QUANTITIES}
    name = digest({**what, "format": str(form), "guided": guided, "versions": versions})
    path = cache_root() / "profiles" / f"{name}.json"
    if (kept := _read(path)) is not None and set(kept) == set(checkpoint.components):
        return kept
    log.info("measuring what %s needs in %s", checkpoint.source, form)
    measured = measure(checkpoint, dict.fromkeys(checkpoint.components, form), guided)
    with contextlib.suppress(InputError):  # without a cache folder it is measured every time
        write_text(path, json.dumps(measured, indent=1, sort_keys=True) + "\n")
    _read.cache_clear()
    return measured


@lru_cache(maxsize=64)
def _read(path: Path) -> Measured | None:
    """Read a kept file; one that is damaged counts as absent and is made anew."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
