"""The halves of classifier-free guidance on two GPUs: each component of the denoising loop has a unit for each half.

With guidance the rows of a step are those of the negative prompts, then those of the prompts. A component's own module
takes the first half, a copy of it on another device the second. The pipeline calls the module as ever and gets what it
would have got: the denoiser's predictions joined, and the ControlNet's residuals as tensors of which each half stays
where the denoiser's unit needs it. Rows do not see each other in these models: any cut by rows computes the same.

The other device is given its half first, and works on it while this one is given its own. A call whose rows cannot be
dealt out runs whole on the component's own module, and the request's remarks say why.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils import _pytree as pytree

from ..plan.units import component_of
from .border import Border
from .halves import Halves, UncutError
from .mirror import Hook, Mirror
from .not_copied import NotCopied
from .split_tensor import SplitTensor, as_whole
from .traffic import move

PutHook = Callable[..., Hook]
"""Puts a hook on a module, given `unit` and `device` by name."""
_GUIDED = "do_classifier_free_guidance"
"""The argument of a pipeline's `encode_prompt` that says whether the call is with guidance."""


class SplitForward(NotCopied):
    """A module's forward, by halves where the pipeline's call is with guidance.

    Args:
        name: the component.
        module: its own module, hooked.
        mirror: the copy that takes the second half.
        border: of the pipeline.
    """

    def __init__(self, name: str, module: nn.Module, mirror: Mirror, border: Border) -> None:
        self.name, self.mirror, self.border = name, mirror, border
        self.forward: Callable[..., Any] = module.forward
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.output = border.pipeline.by_name[name].call("forward").output
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward with the arguments and the result of the whole."""
        halves = self.border.state.halves
        if halves is None:
            return self._by_itself(args, kwargs)
        try:
            first, second = halves.cut(self.name, self.names, self.border.pipeline.steady, args, kwargs)
            copy = self._copy(halves)
        except UncutError as problem:
            self._tell(halves, str(problem))
            return self._by_itself(args, kwargs)
        theirs = copy.forward(*second[0], **second[1])
        return pytree.tree_map(self._joined, self.forward(*first[0], **first[1]), theirs)

    def _by_itself(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = as_whole((args, kwargs))
        return self.forward(*args, **kwargs)

    def _copy(self, halves: Halves) -> nn.Module:
        """The copy that takes the second half.

        Raises:
            UncutError: there is none for this call.
        """
        if torch.is_grad_enabled():
            raise UncutError("gradients are recorded")
        copy = self.mirror.current(halves.seen)
        if copy is None:
            raise UncutError(self.mirror.refusal)
        if self.mirror.module.training:
            raise UncutError("the module is in training mode")
        return copy

    def _joined(self, first: Any, second: Any) -> Any:
        """What both halves made, as one call would have made it."""
        if not isinstance(first, torch.Tensor):
            return first
        home, traffic = first.device, self.border.state.traffic
        if self.name == self.border.pipeline.denoiser:
            return torch.cat([first, move(second, home, traffic, self.output)])
        return SplitTensor([first, second], lambda half: move(half, home, traffic, self.output))

    def _tell(self, halves: Halves, reason: str) -> None:
        remark = f"the {self.name} computed both halves of guidance on one device: {reason}"
        if remark not in halves.told:
            halves.told.add(remark)
            self.border.state.remark(remark)


def further_units(
    pipeline: DiffusionPipeline, border: Border, hook: PutHook, processors: Collection[type] = ()
) -> dict[str, Mirror]:
    """Copy components onto the devices of their further units.

    Args:
        pipeline: with all components where they belong.
        border: of the pipeline; `units` says where.
        hook: puts a unit's hook on a copy.
        processors: see `Mirror`.

    Raises:
        torch.OutOfMemoryError: a copy does not fit.
    """
    mirrors: dict[str, Mirror] = {}
    for unit, device in border.units.items():
        host = border.host
        copy_module = functools.partial(host.copy_module, unit=unit, device=device)
        hooked = functools.partial(hook, unit=unit, device=device)
        module = getattr(pipeline, component_of(unit))
        mirrors[unit] = Mirror(unit, module, copy_module, host.digest, hooked, processors)
        border.restore.append(mirrors[unit].free)
    return mirrors


def split_guidance(pipeline: DiffusionPipeline, border: Border, mirrors: dict[str, Mirror]) -> None:
    """Have hooked components compute the second half of guidance on their `mirrors`; undone with the border."""
    for unit, mirror in mirrors.items():
        mirror.module.forward = SplitForward(component_of(unit), mirror.module, mirror, border)
    if mirrors:
        watch_guidance(pipeline, border)


def watch_guidance(pipeline: DiffusionPipeline, border: Border) -> None:
    """Have the pipeline's calls say whether they are with guidance, from `encode_prompt` to their end."""
    encode, end = pipeline.encode_prompt, pipeline.maybe_free_model_hooks
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        border.state.halves = Halves() if given.arguments[_GUIDED] else None
        return encode(*args, **kwargs)

    @functools.wraps(end)
    def maybe_free_model_hooks() -> None:
        border.state.halves = None
        end()

    for method in (encode_prompt, maybe_free_model_hooks):
        setattr(pipeline, method.__name__, method)
        border.restore.append(functools.partial(pipeline.__dict__.pop, method.__name__, None))
