"""`split=rows` and `guidance+rows`: the profile of a denoising loop whose units compute some rows each on their GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from ..declare.formats import Format
from ..declare.pipelines import Bands, Component, Crossing, Phase
from ..declare.workload import VAE_FACTOR, Workload
from ..facts.allocator import workspace_bytes
from ..facts.checkpoint import Checkpoint
from ..facts.machine import Gpu
from .cost import overhead
from .least import Outside, fastest, loop_seconds
from .needs import Measure, needs_of
from .passing import VaeMode, Work
from .profile import ComponentProfile, PipelineProfile, profile_component
from .row_shares import dealt, in_proportion
from .seconds import STEP_EFFICIENCY, component_phases, work_seconds
from .units import Unit
from .vae_rows import dealt_crossings

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class RowSplit:
    """Deals the rows of one request to GPUs.

    Args:
        profile: of the request, without any split.
        measure: measures a checkpoint whose needs are not known; see `needs.py`.
    """

    profile: PipelineProfile
    checkpoint: Checkpoint
    workload: Workload
    formats: Mapping[Component, Format]
    measure: Measure

    @cached_property
    def _kept(self) -> dict[Any, Any]:
        """What was worked out: many groups of GPUs are alike in part."""
        return {}

    def _once(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        if key not in self._kept:
            self._kept[key] = make()
        found: Kept = self._kept[key]
        return found

    @property
    def _bands(self) -> Bands:
        assert self.profile.pipeline.bands is not None
        return self.profile.pipeline.bands

    @cached_property
    def _configs(self) -> dict[str, Mapping[str, Any]]:
        return {name: one.config for name, one in self.checkpoint.components.items()}

    @cached_property
    def row_pixels(self) -> int:
        """The height in pixels of what is dealt."""
        return self._bands.row_pixels(self._configs)

    @cached_property
    def rows(self) -> int:
        """Rows of the image."""
        return self.workload.height // self.row_pixels

    def shares(self, gpus: Sequence[Gpu], teams: int = 1) -> tuple[int, ...]:
        """Rows for each GPU: as many as it computes while the others compute theirs, and has memory for.

        What a GPU has no memory for goes to the others; where none has, it stays, and the plan does not fit. Each team
        has all rows.
        """
        speeds = [1 / max(self.whole_seconds(gpu), 1e-9) for gpu in gpus]
        most = [self._most_rows(gpu, teams) for gpu in gpus]
        size, found = len(gpus) // teams, list[int]()
        for first in range(0, len(gpus), size):
            found += dealt(self.rows, speeds[first : first + size], most[first : first + size])
        return tuple(found)

    def dealt_to(self, gpus: Sequence[Gpu], teams: int = 1) -> PipelineProfile:
        """The profile whose units are on `gpus`, of one team after the other, the denoising loop on the first."""
        return self._once(("dealt", tuple(gpus), teams), lambda: self._dealt(gpus, teams))

    def _dealt(self, gpus: Sequence[Gpu], teams: int) -> PipelineProfile:
        fixed: dict[str, int] = {}
        for number, gpu in enumerate(gpus):
            fixed |= {Unit(name, number).name: gpu.index for name in self.profile.pipeline.looped}
        shares = self.shares(gpus, teams)
        return replace(self._once((shares, teams), lambda: self.with_rows(shares, teams)), fixed=fixed)

    def loop_seconds(self, gpus: Sequence[Gpu], teams: int = 1) -> float:
        """Seconds of the denoising loop of a request whose rows are dealt to `gpus`; see `dealt_to`."""
        split = self.dealt_to(gpus, teams)
        return self._once(("loop", tuple(gpus), teams), lambda: loop_seconds(split, split.fixed, gpus))

    def vae_seconds(self, gpus: Sequence[Gpu], teams: int = 1) -> float:
        """The least seconds of the VAE of a request where it has units on `gpus` as well; see `with_vae`."""
        return self._once(("coded", tuple(gpus), teams), lambda: self._vae_seconds(gpus, teams))

    def _vae_seconds(self, gpus: Sequence[Gpu], teams: int) -> float:
        rows, steps = in_proportion(self.rows, self.shares(gpus, teams)), self.profile.steps
        ways = (
            [component_phases(part, steps, gpu.rates) for part, gpu in zip(parts, gpus, strict=False)]
            for parts in self._vae_bands(rows).values()
        )
        return sum(fastest(ways).values())

    @cached_property
    def outside(self) -> Outside:
        """The least seconds of what is outside of the denoising loop."""
        return Outside(self.profile)

    def with_vae(self, split: PipelineProfile) -> PipelineProfile:
        """The profile `split`, of this request, whose VAE has a unit on each of its GPUs, in the same proportion."""
        vae, config = self._vae, self._configs[self._vae]
        form, rows = self.formats[vae], in_proportion(self.rows, split.rows)
        count = len(rows)
        units = [Unit(vae, number) for number in range(count)]
        under = self._vae_bands(rows)
        parts = under[VaeMode()]
        dtypes = self._bands.row_pixels(self._configs) // VAE_FACTOR
        latents = [dtypes * one for one in rows]
        encoded = self.profile.pipeline.image_rows(self.workload)
        between = dealt_crossings(
            self.profile.pipeline.by_name[vae], [one.name for one in units], config, self.workload, form.dtype, latents,
            encoded,
        )  # fmt: skip
        gpus = [split.fixed.get(Unit(split.pipeline.denoiser, number).name) for number in range(count)]
        places = {one.name: gpu for one, gpu in zip(units, gpus, strict=True) if gpu is not None}
        return replace(
            split,
            components={**split.components, vae: parts[0]},
            further={**split.further, **dict(zip(units[1:], parts[1:], strict=True))},
            crossings=(*split.crossings, *between),
            fixed={**split.fixed, **places},
            vae_under={mode: found[0] for mode, found in under.items()},
            further_vae_under={mode: dict(zip(units[1:], found[1:], strict=True)) for mode, found in under.items()},
        )

    def _vae_bands(self, rows: Sequence[int]) -> dict[VaeMode, list[ComponentProfile]]:
        """What the VAE's units need for so many rows each, in every mode that they can have."""
        return {
            mode: [replace(self._vae_band(mode, count), units=len(rows)) for count in rows]
            for mode in self.profile.vae_under
            if not mode.tiled and mode.bands == 1
        }

    def _vae_band(self, mode: VaeMode, rows: int) -> ComponentProfile:
        """What a unit of the VAE needs for its rows, of which it lets go sooner than the whole does."""
        return self._once((mode, rows), lambda: self._made_vae_band(mode, rows))

    def _made_vae_band(self, mode: VaeMode, rows: int) -> ComponentProfile:
        vae, needs = self._vae, self._needs[self._vae]
        shape = self.workload.model_copy(update={"height": rows * self.row_pixels})
        part = profile_component(
            self.profile.pipeline, self.checkpoint.components[vae], self.formats[vae], needs, shape, mode
        )
        held = {phase: round(size * _vae_share(needs[phase])) for phase, size in part.activations.items()}
        return replace(part, activations=held)

    @property
    def _vae(self) -> Component:
        return self.profile.pipeline.of("vae")

    def again(self, shares: Sequence[int], vae: bool = False, teams: int = 1) -> PipelineProfile:
        """The profile whose units compute rows in the proportion of `shares`, as placed ones deal them.

        An image of one row is not dealt; of one with fewer rows than a team has units, the last ones have none.

        Args:
            vae: the VAE has units as well.
        """
        if self.rows < 2:
            return self.with_rows((self.rows,))
        size, rows = len(shares) // teams, list[int]()
        for first in range(0, len(shares), size):
            found = in_proportion(self.rows, shares[first : first + size])
            rows += [*found, *(0 for _ in range(size - len(found)))]
        split = self.with_rows(rows, teams)
        return self.with_vae(split) if vae else split

    def with_rows(self, rows: Sequence[int], teams: int = 1) -> PipelineProfile:
        """The profile whose denoising loop has units that compute so many rows each, whatever GPUs they are on.

        Args:
            rows: of one team after the other; a unit with none does not take part.
        """
        pipeline, bands = self.profile.pipeline, self._bands
        dtypes = {name: form.dtype for name, form in self.formats.items()}
        between = bands.crossings(self._configs, self.workload, dtypes, rows, teams)
        first = {name: self._unit(name, 0, rows, between, teams) for name in pipeline.looped}
        further = {
            Unit(name, number): self._unit(name, number, rows, between, teams)
            for number in range(1, len(rows))
            for name in pipeline.looped
            if rows[number]
        }
        outside = [one for one in self.profile.crossings if not {one.src, one.dst} <= set(pipeline.looped)]
        return replace(
            self.profile,
            components={**self.profile.components, **first},
            further=further,
            crossings=(*outside, *between),
            rows=tuple(rows),
            teams=teams,
        )

    def _unit(
        self, name: Component, number: int, rows: Sequence[int], between: Sequence[Crossing], teams: int
    ) -> ComponentProfile:
        """What one unit needs: its rows of a step, and with the denoiser what waits on its GPU."""
        whole, part = self.profile.components[name], self._band(name, rows[number], teams)
        activations: dict[Phase, int] = {"denoise": part.activations["denoise"]}
        if not number:
            activations = {**whole.activations, **activations}
        if name == self.profile.pipeline.denoiser:
            here = Unit(name, number).name
            waiting = self.profile.pipeline.waiting
            residuals = sum(one.bytes_each for one in between if one.tensor in waiting and one.dst == here)
            every = sum(one.bytes_each for one in between if one.tensor in waiting)
            held = whole.activations["decode"] - every
            activations["decode"] = residuals + (held if not number else 0)
            if not number:  # what comes back of the others; what is exchanged is there for a moment
                results = (one.bytes_each for one in between if one.copies == 1 and one.dst == here)
                # Beside it what the pipeline holds for the other teams.
                activations["denoise"] += sum(results) - residuals + held * (teams - 1) // teams
        work = {**(whole.work if not number else {}), "denoise": part.work["denoise"]}
        return replace(part if number else whole, activations=activations, work=work, units=len(rows) - rows.count(0))

    def _band(self, name: Component, rows: int, teams: int) -> ComponentProfile:
        """One component's needs for so many rows of an image, with what it puts beside them."""
        return self._once((name, rows, teams), lambda: self._made_band(name, rows, teams))

    def _made_band(self, name: Component, rows: int, teams: int) -> ComponentProfile:
        form, needs = self.formats[name], self._needs[name]
        shape = self.workload.model_copy(update={"height": rows * self.row_pixels})
        part = profile_component(
            self.profile.pipeline, self.checkpoint.components[name], form, needs, shape, share=1 / teams
        )
        if rows == self.rows:
            return part
        more = self._bands.work(self._configs[name], self.workload, form.dtype, rows, teams)
        own = part.work["denoise"]
        work = replace(own, operations=own.operations + more.operations, other_bytes=own.other_bytes + more.moved_bytes)
        held = part.activations["denoise"] + more.held_bytes
        return replace(part, activations={**part.activations, "denoise": held}, work={**part.work, "denoise": work})

    @cached_property
    def _needs(self) -> Mapping[Component, Mapping[Phase, Mapping[str, Any]]]:
        return needs_of(self.checkpoint, self.formats, self.workload.guided, self.measure)

    def whole_seconds(self, gpu: Gpu) -> float:
        """Seconds that a GPU computes in a step of the whole image; launching is the same for all."""
        return self._once(("whole", gpu), lambda: self._worked_seconds(gpu))

    def _worked_seconds(self, gpu: Gpu) -> float:
        parts = [self.profile.components[name] for name in self.profile.pipeline.looped]
        works = [(part.work.get("denoise", Work()), part.format.dtype) for part in parts]
        return sum(work_seconds(work, dtype, gpu.rates, STEP_EFFICIENCY, 0) for work, dtype in works)

    def _most_rows(self, gpu: Gpu, teams: int) -> int:
        """Rows that a GPU has memory for beside the weights of its units."""
        return self._once(("most", gpu, teams), lambda: self._held_rows(gpu, teams))

    def _held_rows(self, gpu: Gpu, teams: int) -> int:
        looped = self.profile.pipeline.looped
        one, every = ([self._band(name, count, teams) for name in looped] for count in (1, self.rows))
        least, most = (max(part.activations["denoise"] for part in parts) for parts in (one, every))
        weights = sum(part.weights_bytes + part.unsplit_bytes for part in every)
        free = gpu.free_bytes - weights - overhead(gpu) - workspace_bytes(gpu.capability) - least
        if free < 0:
            return 0
        return 1 + int(free * (self.rows - 1) // max(most - least, 1))


def _vae_share(needs: Mapping[str, Any]) -> float:
    """Of a whole image's activations, what units take together: what bands hold, and what one of them works with."""
    if "banded" not in needs:
        return 1.0
    held, worked = needs["banded"]["activation_bytes"][:2]
    _, _, per_pixel, per_image_pixel = needs["activation_bytes"]
    return float((held + worked) / (per_pixel or per_image_pixel))  # the first where a batch shares one image
