"""The one hook of a placed component: it moves tensors across devices at the component's border, and only there.

Inputs are pulled to the component's device, outputs are pushed to where they are needed next: `home`, the device
of the denoising loop. diffusers reads `execution_device` off the first component's hook, so that every hook
answers `home` and the pipeline's own tensors (latents, timesteps, embeddings) are made there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from ..declare.pipelines import DEFAULT, PIPELINES, ComponentDescription, PipelineDescription
from ..declare.spec import OnDecodeOom
from ..declare.workload import VAE_FACTOR
from ..errors import RunError
from ..plan.profile import VAE_TILE
from .copies import Copies
from .host import Host, PresentHost
from .offload import OffloadedWeights
from .traffic import Traffic, move

log = logging.getLogger(__name__)
Event = Literal["enter", "leave"]
Observer = Callable[[Event, str], None]
"""Called with the event and `component.method` at every border, on the calling thread."""
OnInputs = Callable[[Any, str, Any, Any], None]
"""Called with the component, its method, and the positional and named inputs."""
OnOutputs = Callable[[Any, str, Any], None]
"""Called with the component, its method and the result."""


@dataclass
class Border:
    """What all hooks of one pipeline share.

    Attributes:
        home: the device of the denoising loop.
        pipeline: which pipeline it is.
        host: whose devices its components are on.
        traffic: bytes moved.
        observers: called at every border.
        on_inputs: called with every input where it is taken, after it moved.
        on_outputs: called with every result where it was made, before it moves.
        notes: what loading found that the user should know.
        on_decode_oom: `tile` decodes once more in tiles when the VAE runs out of memory.
        inside: the component and method at work, or the last one.
        failure: a decoder's OutOfMemoryError, which diffusers' pipeline swallows.
        offloaded: components whose weights wait on the CPU.
        remarks: what was done that the user should know.
        origins: where components were before they were placed.
        copies: which rows of the control images are copies, where each image is encoded once.
        expected: device -> bytes that the plan expects at its fullest, and that it found free.
        restore: undoes what placing changed on the pipeline besides hooks; run when the first hook is taken off.
    """

    home: torch.device
    pipeline: PipelineDescription = DEFAULT
    host: Host = field(default_factory=PresentHost)
    traffic: Traffic = field(default_factory=Traffic)
    observers: list[Observer] = field(default_factory=list)
    on_inputs: list[OnInputs] = field(default_factory=list)
    on_outputs: list[OnOutputs] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    on_decode_oom: OnDecodeOom = "raise"
    inside: tuple[str, str] = ("pipeline", "")
    failure: torch.OutOfMemoryError | None = None
    offloaded: dict[str, OffloadedWeights] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    origins: dict[str, torch.device] = field(default_factory=dict)
    copies: Copies | None = None
    expected: dict[str, tuple[int, int]] = field(default_factory=dict)
    restore: list[Callable[[], object]] = field(default_factory=list)

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse `copy.deepcopy` and pickle: a copied module's methods would go on working on the original.

        Raises:
            RunError: always.
        """
        raise RunError(
            "a placed pipeline cannot be copied or pickled, nor can its components: their borders belong to it",
            where="pipeline",
            hint="unplace(pipeline), copy it, then place(pipeline, resolved) the original and the copy",
        )

    def enter(self, name: str, method: str) -> None:
        """A component begins: offloaded weights of others leave, observers are called, its own weights arrive."""
        self.inside = (name, method)
        for other, weights in self.offloaded.items():
            if other != name:
                weights.leave()
        self.notify("enter", f"{name}.{method}")
        if name in self.offloaded:
            self.offloaded[name].arrive(self.traffic)

    def ready(self, name: str, method: str, args: Any, kwargs: Any) -> None:
        """A component has its inputs."""
        for called in self.on_inputs:
            called(name, method, args, kwargs)

    def leave(self, name: str, method: str, output: Any) -> None:
        """A component ends with `output`."""
        for called in self.on_outputs:
            called(name, method, output)
        self.notify("leave", f"{name}.{method}")

    def notify(self, event: Event, place: str) -> None:
        """Call every observer."""
        for observer in self.observers:
            observer(event, place)


class BorderHook(ModelHook):  # type: ignore[misc]
    """accelerate hook of one whole component.

    Args:
        part: the component.
        device: where its weights are.
        border: shared by the pipeline's hooks.
    """

    def __init__(self, part: ComponentDescription, device: torch.device, border: Border) -> None:
        self.name = part.name
        self.calls = {call.method: call for call in part.calls}
        self.device = device
        self.border = border
        self.execution_device = border.home
        self._kept: dict[str, _Kept] = {}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Pull the inputs; diffusers' `apply_forward_hook` calls this without any before `encode` and `decode`."""
        if not args and not kwargs:
            return args, kwargs
        self.border.enter(self.name, "forward")
        self._check_place(module)
        names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
        args, kwargs = self._pull(args, names), self._pull(kwargs)
        self.border.ready(self.name, "forward", args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Push the outputs home."""
        self.border.leave(self.name, "forward", output)
        return self._push(output, self.calls["forward"].output)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Wrap the methods that are no `forward`."""
        for method in self._wrapped_methods():
            setattr(module, method, self._wrapped(module, getattr(module, method), method))
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Give the methods back as the class defines them, and the weights back to the module."""
        if weights := self.border.offloaded.pop(self.name, None):
            weights.leave()
        while self.border.restore:
            self.border.restore.pop()()
        for method in self._wrapped_methods():
            module.__dict__.pop(method, None)
        return module

    def _wrapped_methods(self) -> list[str]:
        """Methods besides `forward` that tensors enter."""
        return [method for method in self.calls if method != "forward"]

    def _wrapped(self, module: nn.Module, inner: Callable[..., Any], method: str) -> Callable[..., Any]:
        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            self.border.enter(self.name, method)
            self._check_place(module)
            names = [self.calls[method].input]
            copies = self._copies(method, args)
            if copies:
                args = (copies.distinct(args[0]), *args[1:])
            args, kwargs = self._pull(args, names), self._pull(kwargs)
            self.border.ready(self.name, method, args, kwargs)
            again = None
            try:
                with _one_at_a_time(module) if copies else contextlib.nullcontext():
                    output = inner(*args, **kwargs)
            except torch.OutOfMemoryError as problem:
                again = self._tiles_for(module, method, args)
                if again is None:
                    self.border.failure = problem
                    raise
            if again is not None:  # outside `except`, whose traceback keeps the activations alive
                output = self._in_tiles(module, again, lambda: inner(*args, **kwargs))
            self.border.leave(self.name, method, output)
            if not self.calls[method].keeps:
                output = self._push(output, self.calls[method].output)
            return copies.repeated(output) if copies else output

        return outer

    def _copies(self, method: str, args: Any) -> Copies | None:
        """How the images to encode were repeated, where they were."""
        copies = self.border.copies if method == "encode" and args else None
        return copies if copies and copies.hold(args[0]) else None

    def _check_place(self, module: nn.Module) -> None:
        """Refuse to work with weights that were moved since: inputs go to the device that the plan says.

        Raises:
            RunError: naming both devices.
        """
        found = next((value.device for value in module.parameters()), self.device)
        if found != self.device:
            raise RunError(
                f"{self.name} was moved to {found} after it was placed on {self.device}",
                where=self.name,
                hint=f"move it back, or unplace(pipeline) and place it by a plan that has {self.name} on {found}",
            )

    def _tiles_for(self, module: nn.Module, method: str, args: Any) -> tuple[int, int, int, int] | None:
        """Tiles to decode in after running out of memory; None where that is not wanted or would change nothing."""
        if method != "decode" or self.border.on_decode_oom != "tile" or module.use_tiling or not args:
            return None
        side = max(args[0].shape[-2:]) * VAE_FACTOR
        chosen = VAE_TILE if side > VAE_TILE[0] else SMALL_TILE
        return chosen if side > chosen[0] else None

    def _in_tiles(self, module: Any, tile: tuple[int, int, int, int], decode: Callable[[], Any]) -> Any:
        """Decode with slicing and tiling on, for this once, and say so."""
        risk = "; tiles this small may show in flat areas" if tile == SMALL_TILE else ""
        remark = f"the VAE ran out of memory in decode: decoded again in tiles of {tile[0]} px, stride {tile[2]}{risk}"
        log.warning(remark)
        self.border.remarks.append(remark)
        self.border.host.release_cached(self.device)
        settings = vae_settings(module)
        module.enable_slicing()
        module.enable_tiling(*tile)
        try:
            return decode()
        except torch.OutOfMemoryError as problem:
            self.border.failure = problem
            raise
        finally:
            module.__dict__.update(settings)

    def _pull(self, value: Any, names: Sequence[str] = ()) -> Any:
        if isinstance(value, tuple):
            padded = [*names, *[f"argument {i}" for i in range(len(names), len(value))]]
            return tuple(self._fetch(item, name) for item, name in zip(value, padded, strict=False))
        return {key: self._fetch(item, key) for key, item in value.items()}

    def _fetch(self, value: Any, name: str) -> Any:
        """Move one argument here; one that stays the same from step to step crosses once."""
        steady = name in self.border.pipeline.steady and isinstance(value, torch.Tensor) and value.device != self.device
        if not steady or value.is_inference():
            return move(value, self.device, self.border.traffic, name)
        kept = self._kept.get(name)
        if kept is None or not kept.holds(value):
            copy = move(value, self.device, self.border.traffic, name)
            source = weakref.ref(value, lambda ref: self._drop(name, ref))
            kept = self._kept[name] = _Kept(source, value._version, copy, copy._version)
        return kept.copy

    def _drop(self, name: str, source: weakref.ref[torch.Tensor]) -> None:
        if name in self._kept and self._kept[name].source is source:
            del self._kept[name]

    def _push(self, value: Any, name: str) -> Any:
        return move(value, self.border.home, self.border.traffic, name)


@dataclass(frozen=True)
class _Kept:
    """The copy of an argument, good for as long as the same tensor comes again and neither was written to."""

    source: weakref.ref[torch.Tensor]
    source_version: int
    copy: torch.Tensor
    copy_version: int

    def holds(self, value: torch.Tensor) -> bool:
        same = self.source() is value and value._version == self.source_version
        return same and self.copy._version == self.copy_version


def vae_settings(vae: Any) -> dict[str, Any]:
    """The VAE's slicing and tiling attributes, to be put back into its `__dict__`."""
    return {key: value for key, value in vae.__dict__.items() if key.startswith("tile_") or key in _VAE_SWITCHES}


@contextlib.contextmanager
def _one_at_a_time(vae: Any) -> Iterator[None]:
    settings = vae_settings(vae)
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.__dict__.update(settings)


_VAE_SWITCHES = ("use_slicing", "use_tiling")
SMALL_TILE = (512, 512, 384, 384)
"""Tiles for an image that one large tile covers, in pixels, with a wide overlap."""


def attach(module: nn.Module, name: str, device: torch.device, border: Border, offloaded: bool = False) -> None:
    """Put the border hook on one component; accelerate's `remove_hook_from_module` takes it off again.

    Where it is `offloaded`, its weights stay on the CPU and are on `device` only while it works.
    """
    if offloaded:
        border.offloaded[name] = OffloadedWeights(module, name, device)
    add_hook_to_module(module, BorderHook(border.pipeline.by_name[name], device, border))


def border_of(pipeline: Any) -> Border:
    """Return the border that a placed pipeline's hooks share.

    Raises:
        RunError: the pipeline is not placed.
    """
    border = find_border(pipeline)
    if border is None:
        raise RunError("the pipeline is not placed", hint="use load_pipeline(plan) or place(pipeline, resolved)")
    return border


def find_border(pipeline: Any) -> Border | None:
    """Return the border that a placed pipeline's hooks share, or None for an unplaced one."""
    description = PIPELINES.get(type(pipeline).__name__, DEFAULT)
    hook = getattr(getattr(pipeline, description.denoiser, None), "_hf_hook", None)
    return hook.border if isinstance(hook, BorderHook) else None
