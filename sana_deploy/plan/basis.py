"""How each quantity of a plan was obtained."""

from __future__ import annotations

from typing import Literal

BASIS: dict[str, Literal["exact", "estimated", "measured"]] = {
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
"""The same for plans whose components execute as graphs."""
