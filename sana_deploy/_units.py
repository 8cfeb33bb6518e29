"""Bytes for people: binary units, one spelling in every message and table, and sizes read from words."""

from __future__ import annotations

import math
import re

from .errors import InvalidSpecError

KIB, MIB, GIB = 1024, 1024**2, 1024**3
SIZE = re.compile(r"(-?\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|KB|MB|GB)", re.IGNORECASE)
"""A number with a unit of bytes."""
_UNITS = {"kib": KIB, "mib": MIB, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def human_bytes(count: int) -> str:
    """Format `count` bytes with a binary unit, e.g. `7.12 GiB`; exact below one KiB."""
    size = abs(count)
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            value = count / unit
            return f"{value:.2f} {name}" if abs(value) < 100 else f"{value:.0f} {name}"
    return f"{count} B"


def fullness(peak_bytes: int, free_bytes: int, total_bytes: int) -> float:
    """Share of a GPU's memory that is taken at a peak of ours: (what others use or are kept + our peak) / total.

    Args:
        free_bytes: what the GPU offers; the rest of `total_bytes` is used by others, or kept free for them.
    """
    return (total_bytes - free_bytes + peak_bytes) / max(total_bytes, 1)


def parse_bytes(text: str, where: str = "") -> int:
    """Read `8GiB` or `500 MB` as bytes; binary and decimal units mean what they say.

    Raises:
        InvalidSpecError: no number with a unit, or a negative one.
    """
    match = SIZE.fullmatch(text.strip())
    if not match or math.isinf(float(match.group(1))):
        raise InvalidSpecError(f"{text!r} is no size in bytes", where=where, hint="write it like 8GiB or 500MiB")
    size = int(float(match.group(1)) * _UNITS[match.group(2).lower()])
    if size < 0:
        raise InvalidSpecError(f"memory cannot be negative (got {text!r})", where=where)
    return size
