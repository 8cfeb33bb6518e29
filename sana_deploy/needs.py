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

from . import catalogue
from .catalogue import Fits
from .checkpoint import Checkpoint
from .errors import InputError
from .files import cache_root, write_text
from .plan import library_versions
from .shapes import digest
from .spec import COMPONENTS, Component, Dtype

log = logging.getLogger(__name__)
MEASURED_AS: Mapping[Dtype, Dtype] = {"float16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}
"""float16 and bfloat16 take the same bytes, and the same operations but for clipping; a test holds that."""
Told = Callable[[int, int], None]
"""Called with the points measured and the points in all."""


def needs_of(
    checkpoint: Checkpoint, dtypes: Mapping[Component, Dtype], guided: bool, told: Told | None = None
) -> Mapping[Component, Fits]:
    """Return each component's needs by phase for its dtype, with or without guidance; see `fit.py` for quantities.

    Raises:
        CheckpointError: a checkpoint that must be measured has an incomplete config.
        RunError: it must be measured, and this PyTorch has no virtual GPUs.
    """
    shipped, key = catalogue.fitted(), "guided" if guided else "unguided"
    found: dict[Component, Fits] = {}
    for name, facts in checkpoint.components.items():
        dtype = MEASURED_AS[dtypes[name]]
        if facts.shapes_digest in shipped:
            found[name] = {phase: entry[dtype][key] for phase, entry in shipped[facts.shapes_digest].items()}
        else:
            found[name] = _kept_or_measured(checkpoint, dtype, guided, told)[name]
    return found


def _kept_or_measured(
    checkpoint: Checkpoint, dtype: Dtype, guided: bool, told: Told | None
) -> Mapping[Component, Fits]:
    versions = library_versions()
    name = digest({"checkpoint": checkpoint.fingerprint, "dtype": dtype, "guided": guided, "versions": versions})
    path = cache_root() / "profiles" / f"{name}.json"
    if (kept := _read(path)) is not None:
        return kept
    log.info("measuring what %s needs in %s", checkpoint.source, dtype)
    from .fit import fit

    measured = fit(checkpoint, dict.fromkeys(checkpoint.components, dtype), guided, told or (lambda done, of: None))
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
