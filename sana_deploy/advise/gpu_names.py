"""GPUs by the names of price catalogues: `A100-80GB-SXM`, `RTX6000-Ada` -> the words of `machine.gpus`."""

from __future__ import annotations

import re

from ..facts.known_gpus import KNOWN_GPUS

_ALIASES = {"a4000": "rtxa4000", "a5000": "rtxa5000", "a6000": "rtxa6000"}
"""Other spellings of known names, without signs."""
_SOLD = re.compile(r"[-_ ]?(\d+)\s*gi?b", re.IGNORECASE)
_FORM = re.compile(r"[-_ ]?(sxm\d?|nvlink)$", re.IGNORECASE)
_NEAR = (0.88, 1.1)
"""A GPU shows a driver so much of the memory that it is sold with."""


def known_gpu(name: str, memory_gb: float | None = None) -> str | None:
    """The word of `machine.gpus` for a GPU of a catalogue; None where it is not among the known ones.

    A name that stands for GPUs of several sizes is settled by its memory; without one it is the smaller. `H100` and
    `A100` without a form are taken for SXM boards.

    Args:
        memory_gb: of one GPU as it is sold, in GB or GiB, which are not told apart; None where the catalogue is silent.
    """
    sold = _SOLD.search(name)
    memory = memory_gb or (float(sold[1]) if sold else None)
    plain = _plain(_FORM.sub("", _SOLD.sub("", name)))
    found = {word: row for word, row in KNOWN_GPUS.items() if _family(word) == _ALIASES.get(plain, plain)}
    for word, row in found.items():
        if memory is None or _NEAR[0] * memory < row.memory_mib / 1024 < _NEAR[1] * memory:
            return word
    return None


def _family(word: str) -> str:
    """A known name without the memory that it tells apart."""
    return _plain(re.sub(r"-\d+gb$", "", word))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce|tesla|ada generation", "", name.lower())
