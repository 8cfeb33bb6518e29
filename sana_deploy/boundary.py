"""The one hook of a placed component: it moves tensors across devices at the component's border, and only there.

Inputs are pulled to the component's device, outputs are pushed to where they are needed next: `home`, the device
of the denoising loop. diffusers reads `execution_device` off the first component's hook, so that every hook
answers `home` and the pipeline's own tensors (latents, timesteps, embeddings) are made there.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

Movement = tuple[str, str, str]
"""Source device, destination device, tensor."""
Event = Literal["enter", "leave"]
Observer = Callable[[Event, str], None]
"""Called with the event and `component.method` at every border, on the calling thread."""


@dataclass
class Traffic:
    """Bytes moved between devices, counted where they move, by tensor."""

    moved: Counter[Movement] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, src: torch.device, dst: torch.device, tensor: str, count: int) -> None:
        """Count `count` bytes of `tensor` from `src` to `dst`."""
        with self._lock:
            self.moved[str(src), str(dst), tensor] += count


def by_pair(moved: Counter[Movement]) -> dict[str, int]:
    """Sum movements over tensors: "src->dst" -> bytes."""
    pairs: Counter[str] = Counter()
    for (src, dst, _), count in sorted(moved.items()):
        pairs[f"{src}->{dst}"] += count
    return dict(pairs)


class Visit:
    """Weights that wait on the CPU and are on `device` only while their component works: a knob of the plan.

    They are copied when the component is entered and dropped when another one is: parameters on the CPU stay the
    module's own objects. For CUDA they are kept in pinned memory, which copies at the link's full rate.
    """

    def __init__(self, module: nn.Module, name: str, device: torch.device) -> None:
        self.module, self.name, self.device = module, name, device
        self._kept: list[tuple[dict[str, Any], str, Any]] = []
        if device.type == "cuda":
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.pin_memory()

    def arrive(self, traffic: Traffic) -> None:
        """Copy the weights to the GPU; nothing happens where they are there already."""
        if self._kept:
            return
        for child in self.module.modules():
            for key, value in (*child._parameters.items(), *child._buffers.items()):
                if value is None:
                    continue
                own: dict[str, Any] = child._parameters if key in child._parameters else child._buffers
                moved = value.detach().to(self.device, non_blocking=True)
                traffic.add(value.device, self.device, f"{self.name} weights", value.nbytes)
                self._kept.append((own, key, value))
                own[key] = nn.Parameter(moved, requires_grad=False) if own is child._parameters else moved

    def leave(self) -> None:
        """Put the module's own parameters back, so that the copies are freed."""
        for own, key, value in self._kept:
            own[key] = value
        self._kept.clear()


@dataclass
class Border:
    """What all hooks of one pipeline share: the home device, the traffic counted, who listens.

    `failure` keeps a decoder's OutOfMemoryError, which diffusers' pipeline swallows. `visits` are the components whose
    weights wait on the CPU.
    """

    home: torch.device
    traffic: Traffic = field(default_factory=Traffic)
    observers: list[Observer] = field(default_factory=list)
    failure: torch.OutOfMemoryError | None = None
    visits: dict[str, Visit] = field(default_factory=dict)

    def enter(self, name: str, method: str) -> None:
        """A component begins: guests that are not needed leave, observers are told, its own weights arrive."""
        for guest, visit in self.visits.items():
            if guest != name:
                visit.leave()
        self.notify("enter", f"{name}.{method}")
        if name in self.visits:
            self.visits[name].arrive(self.traffic)

    def notify(self, event: Event, place: str) -> None:
        """Tell every observer."""
        for observer in self.observers:
            observer(event, place)


class BorderHook(ModelHook):  # type: ignore[misc]
    """accelerate hook of one whole component.

    Args:
        name: the component.
        device: where its weights are.
        border: shared by the pipeline's hooks.
        methods: methods besides `forward` that take tensors (the VAE's `encode`).
        keep: methods whose result stays on `device` (the VAE's `decode`: pixels go to the host next).
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        border: Border,
        methods: tuple[str, ...] = (),
        keep: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.device = device
        self.border = border
        self.methods = methods
        self.keep = keep
        self.execution_device = border.home

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Pull the inputs; diffusers' `apply_forward_hook` calls this without any before `encode` and `decode`."""
        if not args and not kwargs:
            return args, kwargs
        self.border.enter(self.name, "forward")
        names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
        return self._pull(args, names), self._pull(kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Push the outputs home."""
        self.border.notify("leave", f"{self.name}.forward")
        return self._push(output, _OUTPUTS[self.name, "forward"])

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Wrap the methods that are no `forward`."""
        for method in (*self.methods, *self.keep):
            setattr(module, method, self._wrapped(getattr(module, method), method))
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Give the methods back as the class defines them, and the weights back to the module."""
        if visit := self.border.visits.pop(self.name, None):
            visit.leave()
        for method in (*self.methods, *self.keep):
            module.__dict__.pop(method, None)
        return module

    def _wrapped(self, inner: Callable[..., Any], method: str) -> Callable[..., Any]:
        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            self.border.enter(self.name, method)
            names = [_INPUTS[self.name, method]]
            try:
                output = inner(*self._pull(args, names), **self._pull(kwargs))
            except torch.OutOfMemoryError as problem:
                self.border.failure = problem
                raise
            self.border.notify("leave", f"{self.name}.{method}")
            return output if method in self.keep else self._push(output, _OUTPUTS[self.name, method])

        return outer

    def _pull(self, value: Any, names: Sequence[str] = ()) -> Any:
        if isinstance(value, tuple):
            padded = [*names, *[f"argument {i}" for i in range(len(names), len(value))]]
            pairs = zip(value, padded, strict=False)
            return tuple(move(item, self.device, self.border.traffic, name) for item, name in pairs)
        return {key: move(item, self.device, self.border.traffic, key) for key, item in value.items()}

    def _push(self, value: Any, name: str) -> Any:
        return move(value, self.border.home, self.border.traffic, name)


_INPUTS = {("vae", "encode"): "control_image", ("vae", "decode"): "latents"}
_OUTPUTS = {
    ("text_encoder", "forward"): "prompt_embeds",
    ("vae", "forward"): "sample",
    ("vae", "encode"): "control_latents",
    ("transformer", "forward"): "noise_pred",
    ("controlnet", "forward"): "controlnet_block_samples",
}
"""What reports call the tensors at a border; other inputs keep their argument's name."""


def move(value: Any, device: torch.device, traffic: Traffic, name: str) -> Any:
    """Return `value` with every tensor in it (dict, list, tuple, model output) on `device`, counting bytes."""
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        traffic.add(value.device, device, name, value.nbytes)
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device, traffic, name) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device, traffic, name) for item in value)
    if isinstance(value, dict):
        moved = {key: move(item, device, traffic, name) for key, item in value.items()}
        return moved if type(value) is dict else type(value)(**moved)
    return value


def attach(module: nn.Module, name: str, device: torch.device, border: Border, visits: bool = False) -> None:
    """Put the border hook on one component; accelerate's `remove_hook_from_module` takes it off again.

    With `visits` its weights stay on the CPU and are on `device` only while it works.
    """
    if visits:
        border.visits[name] = Visit(module, name, device)
    codec = name == "vae"
    hook = BorderHook(name, device, border, ("encode",) if codec else (), ("decode",) if codec else ())
    add_hook_to_module(module, hook)


def border_of(pipeline: Any) -> Border | None:
    """Return the border that a placed pipeline's hooks share, or None for an unplaced one."""
    hook = getattr(getattr(pipeline, "transformer", None), "_hf_hook", None)
    return hook.border if isinstance(hook, BorderHook) else None
