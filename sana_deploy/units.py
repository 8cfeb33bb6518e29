"""Bytes for people: binary units, one spelling in every message and table."""

from __future__ import annotations

KIB, MIB, GIB = 1024, 1024**2, 1024**3


def human_bytes(count: int) -> str:
    """Format `count` bytes with a binary unit, e.g. `7.12 GiB`; exact below one KiB."""
    size = abs(count)
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            value = count / unit
            return f"{value:.2f} {name}" if abs(value) < 100 else f"{value:.0f} {name}"
    return f"{count} B"
