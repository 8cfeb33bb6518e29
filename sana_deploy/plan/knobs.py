"""What each knob of `declare/knobs.py` does to a profile, when that is useful, and what a knob that is on is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ..declare.knobs import KNOBS, Knob, completed, ordered
from ..declare.pipelines import PipelineDescription, Role
from ..facts.machine import Gpu
from .cost import Placement, bytes_per_request, slot_use
from .profile import PipelineProfile
from .records import KnobPrice, Place
from .seconds import phase_seconds
from .units import component_of


def _same(profile: PipelineProfile) -> PipelineProfile:
    return profile


@dataclass(frozen=True)
class Effect:
    """What one knob does.

    Attributes:
        change: the profile with the knob on; one that belongs to placements changes none.
        useful: whether it has something to do in the request of a profile. A knob whose `change` leaves a profile as
            it is need not say so: the search tries equal profiles once.
    """

    change: Callable[[PipelineProfile], PipelineProfile] = _same
    useful: Callable[[PipelineProfile], bool] = lambda profile: True


def _encode_once(profile: PipelineProfile) -> PipelineProfile:
    """One control image passes the VAE, and crosses to it, in place of its copies."""
    crossings = tuple(
        replace(one, bytes_each=one.bytes_each // profile.image_rows)
        if one.tensor in profile.pipeline.repeated
        else one
        for one in profile.crossings
    )
    return replace(profile.with_vae(once=True), crossings=crossings)


def _offloaded(role: Role) -> Callable[[PipelineProfile], PipelineProfile]:
    """The weights of a role's component wait on the CPU: new memory in each request, which no graph can read.

    Those of one that is dealt by layers stay.
    """

    def change(profile: PipelineProfile) -> PipelineProfile:
        name = profile.pipeline.of(role)
        if name in profile.dealt:
            return profile
        # Graphs of large calls keep in every phase what they take: also beside weights that are there in one.
        others = {other: replace(part, graph_phases=()) for other, part in profile.components.items()}
        waiting = replace(profile.components[name], resident=False, execution="eager")
        return replace(profile, components={**others, name: waiting})

    return change


EFFECTS: dict[Knob, Effect] = {
    "encode_once": Effect(_encode_once, useful=lambda profile: profile.image_rows > 1),
    "vae_slicing": Effect(lambda profile: profile.with_vae(sliced=True)),
    "split_controlnet": Effect(),
    "text_encoder_offload": Effect(_offloaded(role="text_encoder")),
    "vae_bands": Effect(lambda profile: profile.with_vae(bands=profile.band_count)),
    "vae_tiling": Effect(lambda profile: profile.with_vae(tiled=True)),
}
"""By name; every knob of the registry has one."""


def under(profile: PipelineProfile, knobs: Iterable[Knob]) -> PipelineProfile:
    """Return `profile` with `knobs`, and those that they include, turned on."""
    for knob in completed(knobs):
        profile = EFFECTS[knob].change(profile)
    return profile


def useful(profile: PipelineProfile, knobs: Iterable[Knob]) -> tuple[Knob, ...]:
    """Those of `knobs` that have something to do in the request, cheapest first."""
    return tuple(knob for knob in ordered(knobs) if EFFECTS[knob].useful(profile))


def parted(pipeline: PipelineDescription, units: Iterable[str]) -> dict[Knob, list[tuple[str, str]]]:
    """Knobs of placements -> pairs of `units` of `pipeline`; the knob is on where two of a pair are apart.

    A unit belongs to the other component's unit of the same number, or to its first one.
    """
    names = list(units)
    found: dict[Knob, list[tuple[str, str]]] = {}
    for knob, description in KNOBS.items():
        if description.apart is not None:
            one, other = map(pipeline.find, description.apart)
            if one is not None and other is not None:
                pairs = [(name, other + name.removeprefix(one)) for name in names if component_of(name) == one]
                found[knob] = [(name, beside if beside in names else other) for name, beside in pairs]
    return found


def of_placement(pipeline: PipelineDescription, placement: Placement) -> list[Knob]:
    """The knobs that `placement` itself turns on."""
    pairs = parted(pipeline, placement).items()
    return [knob for knob, found in pairs if any(placement[one] != placement[other] for one, other in found)]


def price_of(
    knob: Knob,
    plain: PipelineProfile,
    knobs: Iterable[Knob],
    placement: Placement,
    gpus: Mapping[int, Gpu],
    batch: int,
) -> KnobPrice:
    """What a knob that is on saves and costs: a placement under `knobs` compared with itself less this one.

    Bytes are of the GPU, or the host, that it helps most; bytes and seconds may have either sign. A knob that includes
    this one is left out as well, and components that a knob of placements parts are compared with being together.

    Args:
        plain: the profile without any knob.
    """
    without = [on for on in knobs if on != knob and knob not in KNOBS[on].includes]
    together = dict(placement)
    for one, other in parted(plain.pipeline, placement).get(knob, ()):
        together[one] = placement[other]
    before, after = under(plain, without), under(plain, knobs)
    places: list[Place] = sorted({place for place in placement.values() if place != "cpu"})
    places += ["cpu"] if "cpu" in together.values() else []
    saved = [slot_use(before, together, i).peak_bytes - slot_use(after, placement, i).peak_bytes for i in places]
    moved = bytes_per_request(after, placement) - bytes_per_request(before, together)
    uploaded = _uploaded(after) - _uploaded(before)
    slower, faster = phase_seconds(after, placement, gpus), phase_seconds(before, together, gpus)
    seconds = round((sum(slower.values()) - sum(faster.values())) / batch, 4) if slower and faster else None
    return KnobPrice(
        bytes_saved=max(saved, default=0), bytes_per_image=(moved + uploaded) // batch, seconds_per_image=seconds
    )


def _uploaded(profile: PipelineProfile) -> int:
    """Bytes of weights that wait on the CPU and are copied once per request."""
    return sum(part.weights_bytes for part in profile.parts.values() if not part.resident)
