"""How sure the numbers of a page are: for each kind its basis and how exact it is, which tooltips and a list tell.

Bases are those of `plan/basis.py`, and `rehearsed`, `measured` and `declared` for what is not the plan's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from markupsafe import Markup, escape

from ..declare.spec import VirtualMachine
from ..plan.artifact import Plan
from ..run.outcome import Outcome


class Note(NamedTuple):
    """What kind of number it is about, how that was obtained, and how far it may be off."""

    of: str
    basis: str
    words: str


_PLANNED: Mapping[str, Note] = {
    "weights": Note("weights", "exact", "read from configs and file headers, tested against loaded modules"),
    "activations": Note("activations", "estimated", "a function calibrated on rehearsals, within 2 % of them"),
    "overhead": Note("context and headroom", "estimated", "what CUDA and the allocator take, and 2 % kept free"),
    "peak": Note("peak and percent of a GPU", "estimated",
                 "weights, activations, context and headroom at the fullest moment; 0.1 % to 0.3 % above the peaks of "
                 "an H100, other cards' workspaces are less sure"),
    "seconds": Note("seconds and images per second", "estimated",
                    "a roofline with constants of one H100 and one H200: good for comparing plans, within a third for "
                    "large images and a factor of two for small ones"),
    "moved": Note("bytes that move", "estimated", "from the shapes of tensors; rehearsals move the same bytes"),
    "knobs": Note("prices of knobs", "estimated", "the plan with and without the knob, each estimated as above"),
    "considered": Note("other placements", "estimated", "as the chosen placement: memory, bytes and seconds"),
    "counts": Note("counts, indices, sizes in pixels, steps", "exact", "declared by the request, or counted"),
}  # fmt: skip
_REHEARSED = Note("live bytes of a rehearsal", "rehearsed",
                  "every tensor of the real pipeline counted on virtual GPUs; peaks were within 0.4 % of a real H100's "
                  "in 58 of 60 phases")  # fmt: skip
_MEASURED = Note("what this run measured", "measured", "by clocks and the allocator, in this run on this machine")


def notes_of(plan: Plan, outcome: Outcome | None = None) -> dict[str, Note]:
    """The notes that a page of this plan refers to, in the order of its list."""
    virtual = isinstance(plan.spec.machine, VirtualMachine)
    notes = {
        **_PLANNED,
        "capacity": Note("memory of a GPU, and what others use of it", "declared" if virtual else "measured",
                         "by machine.gpus and machine.used" if virtual else "asked of the driver when it was planned"),
    }  # fmt: skip
    if outcome and outcome.rehearsal:
        notes["rehearsed"] = _REHEARSED
    if outcome and (outcome.measured.seconds or outcome.measured.peak_bytes or outcome.audit):
        notes["measured"] = _MEASURED
    return notes


SWEEP_NOTES: Mapping[str, Note] = {
    **{key: _PLANNED[key] for key in ("weights", "peak", "seconds", "moved", "counts")},
    "measured": _MEASURED,
}
"""The notes of a sweep's page."""
COLUMN_NOTES: Mapping[str, str] = {
    **dict.fromkeys(("job", "GPUs", "replicas"), "counts"),
    **dict.fromkeys(("fullest", "peak"), "peak"),
    **dict.fromkeys(("~s/image", "~images/s"), "seconds"),
    **dict.fromkeys(("images/s", "seconds", "measured peak", "worst error", "PSNR"), "measured"),
    **dict.fromkeys(("weights", "weights per GPU"), "weights"),
    "peak per GPU": "peak",
    "per step": "moved",
}
"""Title of a sweep's column -> the note of its numbers."""

_FIGURE = re.compile(
    r"~?[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?(?: \+ [\d.]+ for others)?(?: of \d+(?:\.\d+)?)?"
    r"(?: (?:[KMGT]iB|GB/s|B|ms|s per image|s|images/s|dB)\b|%|x faster\b)(?: \(\d+%\))?"
)
"""A number with its unit, e.g. `~6.87 of 8.00 GiB (86%)`; names of GPUs (`GPU 8GiB`) are none."""


def figures(text: str, key: str) -> Markup:
    """`text` as HTML in which every figure with a unit has the tooltip of note `key`; the first one is a tab stop."""
    parts, at = Markup(""), 0
    for found in _FIGURE.finditer(text):
        parts += escape(text[at : found.start()]) + number(found[0], key, focusable=at == 0)
        at = found.end()
    return parts + escape(text[at:])


def number(text: str, key: str, focusable: bool = True) -> Markup:
    """One figure with its tooltip; see `figures`."""
    if focusable:
        button = '<button type="button" class="num" data-note="{}" aria-describedby="note-{}">{}</button>'
        return Markup(button).format(key, key, text)
    return Markup('<span class="num" data-note="{}">{}</span>').format(key, text)
