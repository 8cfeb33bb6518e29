"""`split=guidance`: the profile of a denoising loop whose components have two units, one for each half of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..declare.formats import Format
from ..declare.pipelines import Component, Crossing, Phase
from ..declare.workload import Workload
from ..facts.checkpoint import Checkpoint
from .needs import Measure, needs_of
from .profile import ComponentProfile, PipelineProfile, profile_component
from .units import Unit


def split_guidance(
    profile: PipelineProfile,
    checkpoint: Checkpoint,
    workload: Workload,
    formats: Mapping[Component, Format],
    measure: Measure,
) -> PipelineProfile:
    """Return `profile`, of a guided workload, with the halves of guidance in units of their own.

    Every quantity is linear in the rows that pass, so that the needs of half as many rows are those of a half. What
    the pipeline holds of the whole batch stays with the denoiser's first unit.

    Args:
        measure: measures a checkpoint whose needs are not known; see `needs.py`.
    """
    pipeline = profile.pipeline
    needs = needs_of(checkpoint, formats, workload.guided, measure)
    halves = {
        name: profile_component(pipeline, checkpoint.components[name], formats[name], needs[name], workload, share=0.5)
        for name in pipeline.looped
    }
    configs = {name: one.config for name, one in checkpoint.components.items()}
    assert pipeline.second_half is not None
    between = pipeline.second_half(configs, workload, {name: form.dtype for name, form in formats.items()})
    first = {name: _first_unit(profile, halves[name], between) for name in pipeline.looped}
    return replace(
        profile,
        components={**profile.components, **first},
        further={Unit(name, 1): _second_unit(profile, half) for name, half in halves.items()},
        crossings=(*_halved(profile), *between),
    )


def _first_unit(profile: PipelineProfile, half: ComponentProfile, between: tuple[Crossing, ...]) -> ComponentProfile:
    """What the first unit needs: half of the rows of a step, and with the denoiser what the pipeline holds."""
    whole = profile.components[half.name]
    activations: dict[Phase, int] = {**whole.activations, "denoise": half.activations["denoise"]}
    if half.name == profile.pipeline.denoiser:
        waiting, residuals = whole.activations["decode"], _residuals(profile)
        # Beside the rows that pass: the embeddings of the others, their latents, and what comes back of them.
        activations["denoise"] += (waiting - residuals) // 2 + sum(one.bytes_each for one in between if one.per_step)
        activations["decode"] = waiting - residuals // 2
    return replace(
        whole,
        activations=activations,
        work={**whole.work, "denoise": half.work["denoise"]},
        units=2,
        steady_bytes=half.steady_bytes,
    )


def _second_unit(profile: PipelineProfile, half: ComponentProfile) -> ComponentProfile:
    """What the second unit needs: half of the rows of a step, and in decode what it still holds of the last one."""
    activations: dict[Phase, int] = {"denoise": half.activations["denoise"]}
    if half.name == profile.pipeline.denoiser:
        activations["decode"] = _residuals(profile) // 2
    return replace(half, activations=activations, work={"denoise": half.work["denoise"]}, units=2)


def _residuals(profile: PipelineProfile) -> int:
    """Bytes of what the pipeline still holds of the last step in decode, for all rows."""
    return sum(one.bytes_each for one in profile.crossings if one.tensor in profile.pipeline.waiting)


def _halved(profile: PipelineProfile) -> Iterator[Crossing]:
    """The crossings of a request: those inside a step once for each half, from where the pipeline keeps them."""
    home, looped = profile.pipeline.denoiser, profile.pipeline.looped
    for one in profile.crossings:
        if one.phase != "denoise" or not {one.src, one.dst} <= set(looped):
            yield one
            continue
        half = replace(one, bytes_each=one.bytes_each // 2)
        yield half
        source = one.src if one.src == home else Unit(one.src, 1).name
        yield replace(half, src=source, dst=Unit(one.dst, 1).name)
