"""`split=layers`: the profile of a component whose blocks two GPUs hold, the first ones and the others, in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..declare.formats import Format
from ..declare.pipelines import Component, Crossing, Deal, Layers, Phase
from ..declare.workload import Workload
from ..facts.allocator import unsplit_bytes
from ..facts.checkpoint import Checkpoint
from .passing import Work
from .profile import ComponentProfile, PipelineProfile
from .units import Unit

Cuts = Mapping[Component, int]
"""Component -> blocks of its first unit."""


@dataclass(frozen=True)
class Blocks:
    """What the blocks of one component take, in order: bytes of weights, and what memory blocks have beyond them."""

    weights: tuple[int, ...]
    unsplit: tuple[int, ...]

    @property
    def cuts(self) -> range:
        """How many blocks the first unit may have."""
        return range(1, len(self.weights))


@dataclass(frozen=True)
class LayerSplit:
    """Deals components of one request by layers.

    Args:
        profile: of the request, without any split.
    """

    profile: PipelineProfile
    checkpoint: Checkpoint
    workload: Workload
    formats: Mapping[Component, Format]

    @cached_property
    def blocks(self) -> dict[Component, Blocks]:
        """The components that can be dealt, those that cross once a request before those that cross in each step."""
        pipeline = self.profile.pipeline
        found = {}
        for part in sorted(pipeline.components, key=lambda part: part.name in pipeline.looped):
            facts = self.checkpoint.components[part.name]
            count = int(facts.config.get(part.layers.count) or 0) if part.layers else 0
            if part.layers is None or count < 2:
                continue
            tensors = facts.block_tensors(part.layers.blocks, count, self.formats[part.name])
            if tensors is not None:
                found[part.name] = Blocks(tuple(map(sum, tensors)), tuple(map(unsplit_bytes, tensors)))
        return found

    def dealt(self, cuts: Cuts) -> PipelineProfile:
        """The profile with components dealt."""
        return self.at_least({name: range(cut, cut + 1) for name, cut in cuts.items()})

    def at_least(self, boxes: Mapping[Component, range]) -> PipelineProfile:
        """A profile that needs no more memory anywhere than one of any of these cuts does: what it does not fit, no
        cut fits. It is that of the cut where each range has one."""
        profile = self.profile
        for name, cuts in boxes.items():
            profile = self._deal(profile, name, cuts[0], cuts[-1])
        return profile

    def _deal(self, profile: PipelineProfile, name: Component, low: int, high: int) -> PipelineProfile:
        """Deal one component: the first unit has the weights of `low` blocks, the second one all but `high`."""
        blocks, whole = self.blocks[name], profile.components[name]
        between = self._crossings(name, high)
        share, phase = low / len(blocks.weights), profile.pipeline.phase_of[f"{name}.forward"]
        first = replace(
            whole,
            weights_bytes=whole.weights_bytes - sum(blocks.weights[low:]),
            unsplit_bytes=whole.unsplit_bytes - sum(blocks.unsplit[low:]),
            work={**whole.work, phase: _scaled(whole.work[phase], share)},
        )
        second = replace(
            whole,
            weights_bytes=sum(blocks.weights[high:]),
            unsplit_bytes=sum(blocks.unsplit[high:]),
            activations={phase: self._second_activations(whole, phase, between)},
            work={phase: _scaled(whole.work[phase], 1 - share)},
        )
        return replace(
            profile,
            components={**profile.components, name: first},
            further={**profile.further, Unit(name, 1): second},
            crossings=(*profile.crossings, *between),
            dealt={**profile.dealt, name: low},
        )

    def _crossings(self, name: Component, first: int) -> tuple[Crossing, ...]:
        pipeline, workload = self.profile.pipeline, self.workload
        configs: dict[str, Mapping[str, Any]] = {key: one.config for key, one in self.checkpoint.components.items()}
        negative = workload.guided and pipeline.counts_guidance
        dtypes = {key: form.dtype for key, form in self.formats.items()}
        return self._layers(name).crossings(configs, workload, dtypes, Deal(first, pipeline.rows(workload), negative))

    def _layers(self, name: Component) -> Layers:
        layers = self.profile.pipeline.by_name[name].layers
        assert layers is not None
        return layers

    def _second_activations(self, whole: ComponentProfile, phase: Phase, between: tuple[Crossing, ...]) -> int:
        """What the second unit takes: as much as the whole, but for what the pipeline holds with the denoiser."""
        if whole.name != self.profile.pipeline.denoiser:
            return whole.activations[phase]
        residuals = sum(one.bytes_each for one in between if one.tensor in self.profile.pipeline.waiting)
        return whole.activations[phase] - whole.activations.get("decode", 0) + residuals


def _scaled(work: Work, share: float) -> Work:
    """So much of the work."""
    return Work(
        operations=round(work.operations * share),
        flops=round(work.flops * share),
        product_bytes=round(work.product_bytes * share),
        other_bytes=round(work.other_bytes * share),
        calls=work.calls,
    )
