"""The registry of knobs: what may be turned on to save memory or seconds, with what can be said without a profile.

`plan/knobs.py` says what each one does to a profile, and `run/` applies it. Everything else reads these two registries
and lists no knobs: the types of the declaration, the planner, its remedies, sentences, tables and pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Literal, get_args

from .pipelines import Role

Exactness = Literal["bitwise", "rounding", "changes"]
"""Against diffusers in eager mode on that device: the same bits, the same arithmetic with other last places, or other
pixels."""
EXACTNESSES: tuple[Exactness, ...] = get_args(Exactness)
"""The most exact first."""
_CHANGES = "can change pixels"
BANDS = (2, 4, 8, 16)
"""How many bands of rows an image may be taken in."""


@dataclass(frozen=True)
class KnobDescription:
    """One knob.

    Attributes:
        name: as declarations, plans and reports write it.
        role: of the component that it acts on.
        help: what it does, in one line.
        exactness: what it does to the picture.
        note: what people should read of its exactness, where that is not `changes`.
        includes: knobs whose effect it has as well.
        excludes: knobs that cannot be on beside it.
        in_maps: whether a custom map may name it.
        always: whether it is on wherever it is allowed and has something to do, since it costs nothing.
        asked: whether it must be asked for: `hardware.allow` names it only where the user does.
        needs_gpu: whether it has something to do only where its component is on a GPU.
        apart: for a knob of placements, the roles that it puts on two devices: a placement is what turns it on.
        of_copies: whether it acts on copies of one control image, so that different ones gain nothing from it.
        counts: into how many parts it may cut, of which the planner chooses one. Empty where it cuts nothing.
    """

    name: str
    role: Role
    help: str
    exactness: Exactness
    note: str = ""
    includes: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    in_maps: bool = True
    always: bool = False
    asked: bool = False
    needs_gpu: bool = False
    apart: tuple[Role, Role] | None = None
    of_copies: bool = False
    counts: tuple[int, ...] = ()

    @property
    def changes_pixels(self) -> str:
        """The words for a knob that can change pixels; empty for others."""
        return _CHANGES if self.exactness == "changes" else ""

    @property
    def words(self) -> str:
        """What it does, and to what exactness, for people."""
        return "; ".join(filter(None, (self.help, self.note or self.changes_pixels)))


KNOBS: dict[str, KnobDescription] = {
    one.name: one
    for one in (
        KnobDescription(
            name="encode_once",
            role="vae",
            help="the VAE encodes the control image once",
            exactness="rounding",
            note="bits as with slicing, a batch of two may round otherwise",
            always=True,
            of_copies=True,
        ),
        KnobDescription(
            name="vae_slicing",
            role="vae",
            help="the VAE takes one image at a time",
            exactness="rounding",
        ),
        KnobDescription(
            name="split_controlnet",
            role="controlnet",
            help="ControlNet apart from the transformer",
            exactness="bitwise",
            in_maps=False,
            apart=("controlnet", "denoiser"),
        ),
        KnobDescription(
            name="text_encoder_offload",
            role="text_encoder",
            help="the text encoder is on its GPU only during encode",
            exactness="bitwise",
            needs_gpu=True,
        ),
        KnobDescription(
            name="vae_bands",
            role="vae",
            help="the VAE takes an image in bands of rows",
            exactness="rounding",
            counts=BANDS,
        ),
        KnobDescription(
            name="vae_tiling",
            role="vae",
            help="the VAE takes tiles of 1024 px",
            exactness="changes",
            includes=("vae_slicing",),
            excludes=("vae_bands",),
            asked=True,
        ),
    )
}
"""Knobs by name, cheapest first."""

if TYPE_CHECKING:
    Knob = str
    MapKnob = str
else:
    Knob = Literal[tuple(KNOBS)]
    MapKnob = Literal[tuple(name for name, one in KNOBS.items() if one.in_maps)]
"""The name of a knob; of one that a custom map may name."""


def least_exact(found: Iterable[Exactness]) -> Exactness:
    """The worst of what is done to one picture; `bitwise` where nothing is."""
    return max(found, key=EXACTNESSES.index, default="bitwise")


def ordered(knobs: Iterable[Knob]) -> tuple[Knob, ...]:
    """Return `knobs` without repetition, cheapest first."""
    chosen = set(knobs)
    return tuple(knob for knob in KNOBS if knob in chosen)


def completed(knobs: Iterable[Knob]) -> tuple[Knob, ...]:
    """Return `knobs` with those that they include, cheapest first."""
    chosen = set(knobs)
    while more := {one for knob in chosen for one in KNOBS[knob].includes} - chosen:
        chosen |= more
    return ordered(chosen)


def clash(knobs: Iterable[Knob]) -> tuple[Knob, Knob] | None:
    """The first two of `knobs` that exclude each other; None where all can be on together."""
    pairs = permutations(completed(knobs), 2)
    return next(((one, other) for one, other in pairs if other in KNOBS[one].excludes), None)
