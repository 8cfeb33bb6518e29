"""Rows of one image dealt to units of SANA's transformer and ControlNet: what these are given, give and exchange.

A block of either sees beyond its rows twice: its linear attention sums over all tokens, and its 3x3 convolution needs
one row of each neighbour. A residual stays where it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise, permutations
from typing import Any

from ..formats import DTYPE_BYTES, Dtype
from ..workload import VAE_FACTOR, Workload
from .base import Bands, BandWork, Configs, Crossing

SUMS, EDGES = "attention_sums", "edge_rows"
"""What units exchange, as plans and outcomes call it."""
_SUM_BYTES = 4
"""Sums are added in float32, whatever the model computes in."""
_OPERATIONS = 6
"""Kernels of a block that a unit launches beside those of a whole one: to copy rows, and to add sums."""


def row_pixels(configs: Configs) -> int:
    """The height in pixels that is dealt: a row of tokens."""
    return VAE_FACTOR * int(configs["transformer"]["patch_size"])


def _inner(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def _images(workload: Workload) -> int:
    """Images that pass the denoiser in a step."""
    return workload.batch * (2 if workload.guided else 1)


def _edge_elements(config: Mapping[str, Any], workload: Workload) -> int:
    """Elements of one row of tokens where the depthwise convolution reads it."""
    width = workload.width // (VAE_FACTOR * int(config["patch_size"]))
    return _images(workload) * 2 * int(config["mlp_ratio"] * _inner(config)) * width


def _sum_bytes(config: Mapping[str, Any], workload: Workload) -> int:
    side = int(config["attention_head_dim"])
    return _images(workload) * _inner(config) * (side + 1) * _SUM_BYTES


def _named(component: str, number: int) -> str:
    return f"{component}.{number}" if number else component


def _exchanged(
    component: str, config: Mapping[str, Any], workload: Workload, item: int, bands: int
) -> Iterator[Crossing]:
    """What units of a component send each other in a step, in every block."""
    layers, units = int(config["num_layers"]), [_named(component, number) for number in range(bands)]
    sums, edges = layers * _sum_bytes(config, workload), layers * _edge_elements(config, workload) * item
    for src, dst in permutations(units, 2):
        yield Crossing(SUMS, src, dst, sums, True, copies=layers)
    for one, other in pairwise(units):
        yield Crossing(EDGES, one, other, edges, True, copies=layers)
        yield Crossing(EDGES, other, one, edges, True, copies=layers)


def crossings(
    configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype], rows: Sequence[int], most_tokens: int
) -> tuple[Crossing, ...]:
    """Tensors of the units of a denoising loop, in bytes; `rows` of tokens are dealt to each, the first one's first.

    Args:
        most_tokens: of a prompt.
    """
    looped = [name for name in ("transformer", "controlnet") if name in configs]
    item = {name: DTYPE_BYTES[dtypes[name]] for name in (*looped, "vae")}
    row = int(configs["vae"]["latent_channels"]) * _images(workload) * workload.width // VAE_FACTOR
    row = row * row_pixels(configs) // VAE_FACTOR
    found: list[Crossing] = []
    for number, count in enumerate(rows):
        denoiser = _named("transformer", number)
        for name in looped if number else ():
            found += _given(_named(name, number), name, configs, workload, dtypes, row * count, most_tokens)
        if "controlnet" in configs:
            beside = _named("controlnet", number)
            found.append(
                Crossing(
                    "controlnet_block_samples",
                    beside,
                    denoiser,
                    _residuals(configs, workload, item["controlnet"]) * count,
                    True,
                )
            )
            if number:
                found.append(Crossing("controlnet_cond", "transformer", beside, row * count * item["vae"], False))
        if number:
            found.append(Crossing("noise_pred", denoiser, "transformer", row * count * item["transformer"], True))
    for name in looped:
        found += _exchanged(name, configs[name], workload, item[name], len(rows))
    return tuple(found)


def _residuals(configs: Configs, workload: Workload, item: int) -> int:
    """Bytes of a ControlNet's results for one row of tokens."""
    config = configs["controlnet"]
    return (
        int(config["num_layers"]) * _inner(config) * _images(workload) * (workload.width // row_pixels(configs)) * item
    )


def _given(
    unit: str,
    name: str,
    configs: Configs,
    workload: Workload,
    dtypes: Mapping[str, Dtype],
    latents: int,
    most_tokens: int,
) -> Iterator[Crossing]:
    """What a unit gets from where the denoising loop lives, but for the control image; `latents` are elements."""
    item, tokens = DTYPE_BYTES[dtypes[name]], most_tokens * _images(workload)
    others = {
        dtype
        for other, dtype in dtypes.items()
        if other in ("text_encoder", "transformer", "controlnet") and other != name
    }
    yield Crossing("hidden_states", "transformer", unit, latents * item, True)
    # As for halves of guidance: what the pipeline casts anew in each step is sent in each step.
    recast = dtypes[name] not in others
    hidden = int(configs["text_encoder"]["hidden_size"])
    yield Crossing("encoder_hidden_states", "transformer", unit, tokens * hidden * item, recast)
    yield Crossing("encoder_attention_mask", "transformer", unit, tokens * 8, False)
    yield Crossing("timestep", "transformer", unit, _images(workload) * 8, True)


def work(config: Mapping[str, Any], workload: Workload, dtype: Dtype, rows: int) -> BandWork:
    """Copies of a unit's rows beside those of its neighbours, read and written once in each block.

    A unit is fullest where the neighbours' rows, one of each, are put beside its own. There a whole block has the
    result of its cross-attention still, and a unit's has not.
    """
    layers, item = int(config["num_layers"]), DTYPE_BYTES[dtype]
    edge = _edge_elements(config, workload) * item
    attention = _images(workload) * _inner(config) * workload.width // (VAE_FACTOR * int(config["patch_size"])) * item
    return BandWork(layers * _OPERATIONS, layers * edge * (2 * rows + 2), 4 * edge - rows * attention)


def bands(most_tokens: int) -> Bands:
    """Those of a pipeline with SANA's transformer, and a ControlNet of its blocks or none.

    Args:
        most_tokens: of a prompt.
    """
    return Bands(row_pixels, partial(crossings, most_tokens=most_tokens), work)
