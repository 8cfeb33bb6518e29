"""Residuals that leave when they are made: what a ControlNet on another GPU than the denoiser's takes, and saves.

Two graphed units on two GPUs work at once in a step (`run/residual_stream.py`). The profile says whether they can;
places say whether they are apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..declare.pipelines import Crossing
from .profile import PipelineProfile

_EARLY_SHARE = 0.6
"""What residuals that are made early add to the activations of a step at its fullest, as a share of them: they are
there while later blocks work. Rehearsals of both SANA models found 0.5 to 0.8."""


def streamed(profile: PipelineProfile) -> tuple[Crossing, ...]:
    """The crossings that are sent piece by piece where their two ends are on different GPUs.

    A cast would wait for all pieces, so that both ends compute in one dtype. Halves of guidance send theirs whole.
    """
    if profile.further:
        return ()
    ends = {one: (profile.parts[one.src], profile.parts[one.dst]) for one in profile.crossings if one.pieces}
    return tuple(
        one for one, (src, dst) in ends.items() if src.graphed and dst.graphed and src.format.dtype == dst.format.dtype
    )


def early_bytes(profile: PipelineProfile, name: str, here: Collection[str]) -> int:
    """Bytes that a unit's graphs take beyond the activations of a step, since its results are made early.

    Args:
        here: the units on its device.
    """
    made = sum(one.bytes_each for one in streamed(profile) if one.src == name and one.dst not in here)
    return round(_EARLY_SHARE * made)


def saved_seconds(
    profile: PipelineProfile, work: Mapping[str, Any], crossing: Mapping[Crossing, Any], places: Mapping[str, Any]
) -> Any:
    """Seconds of a request that working at once saves of working one after the other, in numbers or in arrays.

    Both ends begin together. `dst` ends when its own work is done, and not before `src` has got its inputs, worked and
    sent the last piece, and `dst` has done what it needs that for.

    Args:
        work: seconds of each unit in denoise.
        crossing: seconds of each crossing, 0 where it stays on a device.
        places: where each unit is.
    """
    total: Any = 0.0
    for one in streamed(profile):
        if one.src not in work or one.dst not in work:  # no GPU is there whose speed is known
            continue
        back = [other for other in profile.crossings if (other.src, other.dst) == (one.dst, one.src)]
        in_turn = sum(crossing[other] for other in back if other.per_step) + work[one.src] + crossing[one]
        hidden = work[one.dst] * one.needed + crossing[one] * (1 - 1 / one.pieces)
        shorter = (in_turn + hidden - abs(in_turn - hidden)) / 2  # the smaller of the two
        total = total + shorter * (places[one.src] != places[one.dst])
    return total
