"""The VAE over GPUs: what units that take some rows of an image each exchange, from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..declare.formats import DTYPE_BYTES, Dtype
from ..declare.pipelines import Call, ComponentDescription, Crossing
from ..declare.workload import VAE_FACTOR, Workload
from ..facts.architectures import expected_shapes

Side = Literal["encoder", "decoder"]
CALLS: Mapping[Side, str] = {"encoder": "encode", "decoder": "decode"}
"""The method that each side works in."""
_FLOAT32 = 4


@dataclass(frozen=True)
class Reach:
    """A convolution that looks beyond its rows.

    Attributes:
        level: how often an image is halved before it.
        channels: that it reads.
        rows: that it reads beyond those of its result, on each side.
    """

    level: int
    channels: int
    rows: int


@dataclass(frozen=True)
class Attention:
    """An attention over all pixels: `heads` at all scales together, each of `side` channels."""

    level: int
    heads: int
    side: int


def layers_of(config: Mapping[str, Any], side: Side) -> tuple[list[Reach], list[Attention]]:
    """What of an `AutoencoderDC`'s encoder or decoder looks beyond its rows."""
    shapes = expected_shapes("AutoencoderDC", config) or {}
    last = len(config[f"{side}_block_out_channels"]) - 1
    own = {name.removeprefix(f"{side}."): shape for name, shape in shapes.items() if name.startswith(f"{side}.")}
    reaches = []
    for name, shape in own.items():
        if name.endswith(".weight") and len(shape) == 4 and shape[2] > 1:
            channels = shape[0] if shape[1] == 1 else shape[1]
            reaches.append(Reach(_level(name, side, last, own), channels, shape[2] // 2))
    head = int(config.get("attention_head_dim", 32))
    attentions = []
    for name, shape in own.items():
        if name.endswith("attn.to_q.weight"):
            block = name.removesuffix("to_q.weight")
            scales = 1 + sum(key.startswith(block) and key.endswith(".proj_in.weight") for key in own)
            attentions.append(Attention(_level(name, side, last, own), shape[0] // head * scales, head))
    return reaches, attentions


def _level(name: str, side: Side, last: int, own: Mapping[str, Any]) -> int:
    """How often the image was halved where a layer works."""
    first, _, rest = name.partition(".")
    if first == "conv_in":
        return 0 if side == "encoder" else last
    if first == "conv_out":
        return last if side == "encoder" else int(rest.startswith("conv."))
    stage, _, inner = rest.partition(".")
    raised = side == "decoder" and inner.startswith("0.conv.")  # before it makes the image larger
    return int(stage) + int(raised)


def exchanged(
    units: Sequence[str],
    config: Mapping[str, Any],
    workload: Workload,
    dtype: Dtype,
    rows: Sequence[int],
    side: Side,
    call: Call,
    images: int,
) -> Iterator[Crossing]:
    """What units with so many rows of latents send each other in a call, while `images` pass them at once."""
    reaches, attentions = layers_of(config, side)
    assert call.phase is not None
    phase, names, item = call.phase, call.exchanges, DTYPE_BYTES[dtype]
    bottom = len(config[f"{side}_block_out_channels"]) - 1
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
    small = [one for one in attentions if _pixels(one.level, workload, bottom) <= one.side]
    linear = [one for one in attentions if one not in small]
    summed = sum(one.heads * one.side * (one.side + 1) for one in linear) * images * _FLOAT32
    for i, target in enumerate(units):
        for j, source in enumerate(units):
            if i == j:
                continue
            found = [(reach, _overlap(starts, i, j, reach, bottom)) for reach in reaches]
            size = sum(reach.channels * (workload.width >> reach.level) * count for reach, count in found)
            if size:
                copies = sum(count > 0 for _, count in found)
                yield Crossing(names.edges, source, target, size * images * item, False, phase, copies=copies)
            if linear:
                yield Crossing(names.sums, source, target, summed, False, phase, copies=len(linear))
            if small:
                pixels = rows[j] * workload.width // VAE_FACTOR
                size = sum(2 * one.heads * one.side * (pixels << 2 * (bottom - one.level)) for one in small)
                yield Crossing(names.keys, source, target, size * images * item, False, phase, copies=len(small))


def _pixels(level: int, workload: Workload, bottom: int) -> int:
    return (workload.height >> level) * (workload.width >> level)


def _overlap(starts: Sequence[int], target: int, source: int, reach: Reach, bottom: int) -> int:
    """Rows of `source` that a convolution of `target` reads, at its level."""
    scale = 1 << (bottom - reach.level)
    top, end = starts[target] * scale, starts[target + 1] * scale
    low, high = starts[source] * scale, starts[source + 1] * scale
    above = max(0, min(top, high) - max(top - reach.rows, low))
    below = max(0, min(end + reach.rows, high) - max(end, low))
    return above + below


def dealt_crossings(
    vae: ComponentDescription,
    units: Sequence[str],
    config: Mapping[str, Any],
    workload: Workload,
    dtype: Dtype,
    rows: Sequence[int],
    encoded: int,
) -> tuple[Crossing, ...]:
    """All tensors of a VAE's units in a request, in bytes; the first unit holds images and latents.

    Args:
        encoded: images that are encoded, copies included; 0 where a request has none.
    """
    item, pixel = DTYPE_BYTES[dtype], 3 * VAE_FACTOR * workload.width
    cell = int(config["latent_channels"]) * (workload.width // VAE_FACTOR)
    found: list[Crossing] = []
    given_and_made: tuple[tuple[Side, int, int, int], ...] = (
        ("encoder", encoded, pixel, cell),
        ("decoder", workload.batch, cell, pixel),
    )
    sides = [
        (side, vae.call(CALLS[side]), images, given, made) for side, images, given, made in given_and_made if images
    ]
    for unit, count in zip(units[1:], rows[1:], strict=True):
        for _, call, images, given, made in sides:
            assert call.phase is not None
            there, back = (math.prod((size, count, images, item)) for size in (given, made))
            found.append(Crossing(call.input, units[0], unit, there, False, call.phase))
            found.append(Crossing(call.output, unit, units[0], back, False, call.phase))
    for side, call, images, _, _ in sides:
        found += exchanged(units, config, workload, dtype, rows, side, call, images)
    return tuple(found)
