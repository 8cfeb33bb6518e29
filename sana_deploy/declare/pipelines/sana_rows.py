"""Rows of one image dealt to units of SANA's transformer and ControlNet: what these are given, give and exchange.

A block of either sees beyond its rows twice: its linear attention sums over all tokens, and its 3x3 convolution needs
one row of each neighbour. A residual stays where it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

from ..formats import DTYPE_BYTES, Dtype
from ..workload import VAE_FACTOR, Workload
from .base import Bands, BandWork, Configs, Crossing
from .parts import MAX_TOKENS, hidden_size
from .row_bands import STEP_EXCHANGES

_SUM_BYTES = 4
"""Sums are added in float32, whatever the model computes in."""
_OPERATIONS = 6
"""Kernels of a block that a unit launches beside those of a whole one: to copy rows, and to add sums."""


def row_pixels(configs: Configs) -> int:
    """The height in pixels that is dealt: a row of tokens."""
    return VAE_FACTOR * int(configs["transformer"]["patch_size"])


def _named(component: str, number: int) -> str:
    return f"{component}.{number}" if number else component


@dataclass(frozen=True)
class RowUnits:
    """What of a pipeline's step decides the tensors of its units, in bytes.

    Attributes:
        rows_each: rows of a step for each image, without and with guidance; `PipelineDescription.rows_each`.
        timestep_bytes: of a row's timestep: a pipeline that scales it makes it float32, else it is an integer.
        recast: the pipeline casts the prompt embeddings anew in each step where no component of the loop has the dtype
            that they come in; else they are the same tensor in every step.
        guidance: the transformer is given the scale of guidance.
        perturbed: blocks whose attention leaves the last image of each out: what it exchanges is of the others.
    """

    rows_each: tuple[int, int] = (1, 2)
    timestep_bytes: int = 4
    recast: bool = False
    guidance: bool = False
    perturbed: int = 0

    def images(self, workload: Workload, teams: int) -> int:
        """Images that pass a unit in a step."""
        return workload.batch * self.rows_each[workload.guided] // teams

    def edge_elements(self, config: Mapping[str, Any], workload: Workload, teams: int) -> int:
        """Elements of one row of tokens where the depthwise convolution reads it."""
        width = workload.width // (VAE_FACTOR * int(config["patch_size"]))
        return self.images(workload, teams) * 2 * int(config["mlp_ratio"] * hidden_size(config)) * width

    def crossings(
        self, configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype], rows: Sequence[int], teams: int = 1
    ) -> tuple[Crossing, ...]:
        """Tensors of the units of a denoising loop, in bytes; `rows` of tokens are dealt to each; see `Bands`."""
        looped = [name for name in ("transformer", "controlnet") if name in configs]
        images, item = self.images(workload, teams), {name: DTYPE_BYTES[dtypes[name]] for name in (*looped, "vae")}
        row = int(configs["vae"]["latent_channels"]) * images * workload.width // VAE_FACTOR
        row = row * row_pixels(configs) // VAE_FACTOR
        found: list[Crossing] = []
        for number, count in enumerate(rows):
            if not count:
                continue
            denoiser, beside = _named("transformer", number), _named("controlnet", number)
            for name in looped if number else ():
                found += self._given(_named(name, number), name, configs, workload, dtypes, row * count, images)
            if "controlnet" in configs:
                size = _residuals(configs, workload, images, item["controlnet"]) * count
                found.append(Crossing("controlnet_block_samples", beside, denoiser, size, True))
                if number:
                    found.append(Crossing("controlnet_cond", "transformer", beside, row * count * item["vae"], False))
            if number:
                found.append(Crossing("noise_pred", denoiser, "transformer", row * count * item["transformer"], True))
        size = len(rows) // teams
        for name in looped:
            for first in range(0, len(rows), size):
                units = [_named(name, number) for number in range(first, first + size) if rows[number]]
                found += self._exchanged(units, configs[name], workload, item[name], teams)
        return tuple(found)

    def _exchanged(
        self, units: Sequence[str], config: Mapping[str, Any], workload: Workload, item: int, teams: int
    ) -> Iterator[Crossing]:
        """What the units of a team send each other in a step, in every block."""
        layers, images = int(config["num_layers"]), self.images(workload, teams)
        # Of the rows that are perturbed, which come last, nothing is summed.
        kept = images - images // self.rows_each[workload.guided] if self.perturbed else images
        summed = images * (layers - self.perturbed) + kept * self.perturbed
        sums = summed * hidden_size(config) * (int(config["attention_head_dim"]) + 1) * _SUM_BYTES
        edges = layers * self.edge_elements(config, workload, teams) * item
        for src, dst in permutations(units, 2):
            yield Crossing(STEP_EXCHANGES.sums, src, dst, sums, True, copies=layers)
        for one, other in pairwise(units):
            yield Crossing(STEP_EXCHANGES.edges, one, other, edges, True, copies=layers)
            yield Crossing(STEP_EXCHANGES.edges, other, one, edges, True, copies=layers)

    def _given(
        self,
        unit: str,
        name: str,
        configs: Configs,
        workload: Workload,
        dtypes: Mapping[str, Dtype],
        latents: int,
        images: int,
    ) -> Iterator[Crossing]:
        """What a unit gets from where the denoising loop lives, but for the control image; `latents` are elements."""
        item, tokens = DTYPE_BYTES[dtypes[name]], MAX_TOKENS * images
        others = [dtype for other, dtype in dtypes.items() if other not in ("vae", name)]
        hidden = int(configs["text_encoder"]["hidden_size"])
        recast = self.recast and dtypes[name] not in others
        yield Crossing("hidden_states", "transformer", unit, latents * item, True)
        yield Crossing("encoder_hidden_states", "transformer", unit, tokens * hidden * item, recast)
        yield Crossing("encoder_attention_mask", "transformer", unit, tokens * 8, False)
        yield Crossing("timestep", "transformer", unit, images * self.timestep_bytes, True)
        if self.guidance:
            yield Crossing("guidance", "transformer", unit, images * DTYPE_BYTES[dtypes["text_encoder"]], False)

    def work(self, config: Mapping[str, Any], workload: Workload, dtype: Dtype, rows: int, teams: int = 1) -> BandWork:
        """Copies of a unit's rows beside those of its neighbours, read and written once in each block.

        A unit is fullest where the neighbours' rows, one of each, are put beside its own. There a whole block has the
        result of its cross-attention still, and a unit's has not.
        """
        layers, item, images = int(config["num_layers"]), DTYPE_BYTES[dtype], self.images(workload, teams)
        edge = self.edge_elements(config, workload, teams) * item
        attention = images * hidden_size(config) * workload.width // (VAE_FACTOR * int(config["patch_size"])) * item
        return BandWork(layers * _OPERATIONS, layers * edge * (2 * rows + 2), 4 * edge - rows * attention)

    @property
    def bands(self) -> Bands:
        """What the pipeline's description says of them."""
        return Bands(row_pixels, self.crossings, self.work)


def _residuals(configs: Configs, workload: Workload, images: int, item: int) -> int:
    """Bytes of a ControlNet's results for one row of tokens."""
    config = configs["controlnet"]
    return int(config["num_layers"]) * hidden_size(config) * images * (workload.width // row_pixels(configs)) * item
