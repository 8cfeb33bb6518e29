"""How each quantity of a plan was obtained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..declare.runtime import RUNTIMES

BASIS: dict[str, Literal["exact", "estimated", "measured"]] = {
    "images_per_second": "estimated",
    "checkpoint.content.*.files.*.bytes": "exact",
    "slots.*.capacity_bytes": "measured",
    "slots.*.available_bytes": "measured",
    "slots.*.weights_bytes": "exact",
    "slots.*.activation_bytes": "estimated",
    "slots.*.overhead_bytes": "estimated",
    "slots.*.allocator_bytes": "estimated",
    "slots.*.peak_bytes": "estimated",
    "components.*.weights_bytes": "exact",
    "components.*.activation_bytes": "estimated",
    "transfers.*.bytes_per_step": "estimated",
    "transfers.*.bytes_per_image": "estimated",
    "estimates.worst_utilisation": "estimated",
    "estimates.bytes_per_step": "estimated",
    "estimates.bytes_per_image": "estimated",
    "estimates.seconds.*": "estimated",
    "estimates.seconds_per_image": "estimated",
    "knob_prices.*.bytes_saved": "estimated",
    "knob_prices.*.bytes_per_image": "estimated",
    "knob_prices.*.seconds_per_image": "estimated",
    "considered.closest.shortfall_bytes": "estimated",
    "considered.runners_up.*.worst_utilisation": "estimated",
    "considered.runners_up.*.fullness": "estimated",
    "considered.runners_up.*.bytes_per_image": "estimated",
    "considered.runners_up.*.seconds_per_image": "estimated",
    "rejections.*.closest_shortfall_bytes": "estimated",
}
"""How each quantity was obtained; counts and indices are exact."""


UNITS_BASIS = {"units.*.weights_bytes": "exact", "units.*.activation_bytes": "estimated"}
"""The same for plans that have `units`."""


FASTER_BASIS = {"faster.*.seconds_per_image": "estimated", "faster.*.times_faster": "estimated"}
"""The same for plans that name faster ways."""


POOL_BASIS = {"slots.*.pool_bytes": "estimated"}
"""The same for plans whose components execute in graphs."""


FIRST_POOL_BASIS = {"slots.*.first_pool_bytes": "estimated"}
"""The same for plans with calls besides `forward` in graphs."""


OVERLAP_BASIS = {
    "overlap.stages.*.seconds": "estimated",
    "overlap.slots.*.waiting_bytes": "estimated",
    "overlap.slots.*.peak_bytes": "estimated",
    "overlap.seconds_per_image": "estimated",
    "overlap.images_per_second": "estimated",
}
"""The same for plans whose stages overlap."""


def basis_of(first: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How each quantity of a plan was obtained.

    Args:
        first: the parts of its first replica.
        others: those of the others.
    """
    beside = {key: basis for one in others for key, basis in _own(one).items() if key.partition(".")[0] in one}
    return {**BASIS, **_own(first), **{f"replicas.*.{key}": basis for key, basis in beside.items()}}


def _own(replica: Mapping[str, Any]) -> dict[str, str]:
    """The same for one replica, with what only some have."""
    return {
        **BASIS,
        **(UNITS_BASIS if replica.get("units") else {}),
        **(FASTER_BASIS if replica.get("faster") else {}),
        **(OVERLAP_BASIS if replica.get("overlap") else {}),
        **(POOL_BASIS if RUNTIMES[replica.get("runtime", "eager")].graphs else {}),
        **(FIRST_POOL_BASIS if replica.get("graphed_calls") else {}),
    }
