"""Measures what components need by rehearsing them: every component on a virtual GPU of its own, in shapes.

One pipeline is laid out from configs alone and run at a few points (image size, batch, the VAE's mode); the ledger
tells each component's activation peak and work per phase. What waits on the denoiser's GPU (prompt embeddings, the
control image, residuals) counts as the denoiser's, and so does the pipeline's own arithmetic between components.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import diffusers
import torch

from .._units import GIB
from ..declare.formats import Format
from ..declare.pipelines import PHASES, Component, Phase, PipelineDescription
from ..declare.workload import Request, Workload
from ..facts.checkpoint import Checkpoint
from ..facts.component import ComponentFacts
from ..plan.passing import VAE_TILE, VaeMode
from ..run.border import Border
from ..run.generate import run_request
from ..run.hook import attach
from ..run.request_state import Event
from ..run.rows.one_device import use_bands
from .host import VirtualHost
from .ledger import Ledger, Tally
from .meta_modules import stand_in
from .rehearse import SHAPE_STEPS, LedgerClock
from .virtual_tensor import DEVICE_TYPE

ENDLESS = 1 << 22
"""Memory of the virtual GPUs, in GiB."""


@dataclass(frozen=True)
class Point:
    """A request to measure: height in pixels (and width, unless it is square), images, and how the VAE works."""

    side: int
    batch: int
    mode: VaeMode = field(default_factory=VaeMode)
    width: int | None = None

    @property
    def pixels(self) -> int:
        """Height x width."""
        return self.side * (self.width or self.side)

    def workload(self, guided: bool) -> Workload:
        """The request's shape, with or without guidance."""
        size = {"height": self.side, "width": self.width or self.side}
        return Workload(**size, batch=self.batch, steps=SHAPE_STEPS, guided=guided)


@dataclass(frozen=True)
class Measurement:
    """One component in one phase: activation peak in bytes, and the work of one step of it."""

    activation_bytes: int
    work: Tally


_LAYER_KEYS = ("num_layers", "num_hidden_layers")
Measurements = dict[tuple[Component, Phase], Measurement]


class Profiler:
    """A pipeline of stand-ins, each component alone on a virtual GPU, ready to run at any point.

    Args:
        checkpoint: classes and configs.
        formats: dtype and quantisation of each component.
        layers: those of components that get but their first ones, which changes nothing for others and is faster.

    Raises:
        CheckpointError: a config is incomplete.
        RunError: this PyTorch has no virtual GPUs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[Component, Format],
        layers: Mapping[Component, int] = MappingProxyType({}),
    ) -> None:
        self.description = checkpoint.pipeline
        names = self.description.names
        self.host = VirtualHost([ENDLESS * GIB] * len(names), "shapes")
        devices = {name: torch.device(DEVICE_TYPE, index) for index, name in enumerate(names)}
        parts: dict[str, Any] = {}
        for name, device in devices.items():
            facts = checkpoint.components[name]
            module = stand_in(_shallow(facts, layers[name]) if name in layers else facts, formats[name])
            parts[name] = self.host.place_module(module, name, device)
        pipeline_class = getattr(diffusers, self.description.class_name)
        self.pipeline = pipeline_class(**parts, **self.host.load_helpers(checkpoint))
        border = Border(home=devices[self.description.denoiser], pipeline=self.description, host=self.host)
        for name, device in devices.items():
            attach(parts[name], name, device, border)
        self.pipeline.hf_device_map = {name: str(device) for name, device in devices.items()}
        border.observers.append(LedgerClock(self.host.ledger, border.pipeline))
        if not self.description.waiting:
            border.observers.append(self._note_decode)

    def run(self, point: Point, guided: bool) -> Measurements:
        """Run one request and return what every component needed, on a scheduler that remembers nothing."""
        self.pipeline.scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        ledger = self.host.ledger
        ledger.enter("load", "pipeline")
        ledger.phase_peaks.clear()
        ledger.work.clear()
        workload = point.workload(guided)
        request = Request(prompt="a small lighthouse", guidance_scale=4.5 if guided else 1.0)
        with self._mode(point.mode), self.host:
            run_request(self.pipeline, workload, request)
        return {key: value for key, value in _collect(ledger, self.description) if value.activation_bytes}

    def _note_decode(self, event: Event, call: str) -> None:
        """Note what is live on each GPU when decode begins: nothing is allocated beside the VAE then."""
        if event == "enter" and self.description.phase_of[call] == "decode":
            self.host.ledger.note_live()

    @contextmanager
    def _mode(self, mode: VaeMode) -> Iterator[None]:
        vae = getattr(self.pipeline, self.description.of("vae"))
        if mode.sliced:
            vae.enable_slicing()
        if mode.tiled:
            vae.enable_tiling(*VAE_TILE)
        use_bands(vae, mode.bands)
        try:
            yield
        finally:
            use_bands(vae, 1)
            vae.disable_slicing()
            vae.disable_tiling()


def layers_of(facts: ComponentFacts) -> int | None:
    """How many alike layers a component has; None for one that is made of stages, such as the VAE."""
    return next((int(facts.config[key]) for key in _LAYER_KEYS if key in facts.config), None)


def _shallow(facts: ComponentFacts, layers: int) -> ComponentFacts:
    """The component with its first so many layers, in each stage of a VAE: its results have the same shapes."""
    config = dict(facts.config)
    for key in _LAYER_KEYS:
        if key in config:
            config[key] = min(int(config[key]), layers)
    for key in ("encoder_layers_per_block", "decoder_layers_per_block"):
        if key in config:
            config[key] = [min(int(count), layers) for count in config[key]]
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    return replace(facts, config=config)


def _collect(ledger: Ledger, pipeline: PipelineDescription) -> Iterator[tuple[tuple[Component, Phase], Measurement]]:
    for (index, phase), peak in ledger.phase_peaks.items():
        if phase not in PHASES:
            continue
        name = pipeline.names[index]
        work = [ledger.work.get((phase, name), Tally())]
        if name == pipeline.denoiser:
            work.append(ledger.work.get((phase, "pipeline"), Tally()))
        steps = SHAPE_STEPS if phase == "denoise" else 1
        yield (name, phase), Measurement(peak.activation_bytes, _per_step(work, steps))


def _per_step(parts: list[Tally], steps: int) -> Tally:
    return Tally(
        operations=sum(work.operations for work in parts) // steps,
        flops=sum(work.flops for work in parts) // steps,
        product_bytes=sum(work.product_bytes for work in parts) // steps,
        other_bytes=sum(work.other_bytes for work in parts) // steps,
    )
