"""Results of the text encoder for the last prompts, so that a prompt which comes again is not encoded again.

The negative prompt is nearly always the same, and sweeps over seeds or control images repeat the prompt. What is kept
is found by the content of the ids and the mask that the text encoder would get, and given up when the text encoder is
not what it was. It is kept on the CPU, so that GPUs hold what their plan says, and comes back bit for bit.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..declare.pipelines import Call, ComponentDescription
from .border import Border
from .mirror import Digest, stored
from .module_state import ModuleState, PlacedForward, autocast_dtype
from .offload import OffloadedWeights
from .recent import Recent
from .traffic import move

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Kept:
    """A result: its class, the fields that the pipeline reads, on the CPU, and the digest of the weights it is of."""

    kind: Callable[..., Any]
    fields: Mapping[str, torch.Tensor]
    weights: bytes | None

    def made_anew(self) -> Any:
        """A result on the CPU that nobody else has."""
        return self.kind(**{name: tensor.clone() for name, tensor in self.fields.items()})


class PromptCache:
    """The last results of one text encoder.

    Args:
        module: the text encoder.
        call: how the pipeline calls it.
        most: results that are kept.
        digest: what to recognise weights by: writing through `tensor.data` leaves no trace on a tensor.
        weights: what moves its weights, where they wait on the CPU between its turns. Their digest is not taken, since
            the CPU would read them for longer than a GPU encodes a prompt.
    """

    def __init__(
        self, module: nn.Module, call: Call, most: int, digest: Digest, weights: OffloadedWeights | None = None
    ) -> None:
        self.module, self.call, self.weights, self._digest = module, call, weights, digest
        self.kept: Recent[Hashable, Kept] = Recent(most)
        self._lock = threading.Lock()
        self._resting: ModuleState | None = None
        self._arrived: ModuleState | None = None

    def key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
        """What the result of a call depends on besides the text encoder; None for one whose result is not kept.

        Only calls in the pipeline's own form are kept, of tensors that have values, without gradients and dropout.
        """
        if not self.call.is_pipelines_own(args, kwargs) or self.module.training or torch.is_grad_enabled():
            return None
        named = {self.call.input: args[0], **kwargs}
        if any(type(value) is not torch.Tensor for value in named.values()):
            return None
        content = [(name, value.dtype, tuple(value.shape), _bytes(value)) for name, value in sorted(named.items())]
        return (*content, *_settings(next(self.module.parameters()).device.type))

    def find(self, key: Hashable) -> Any | None:
        """The result that was kept for `key`, on the CPU; None where there is none, or the text encoder changed."""
        with self._lock:
            self._follow_changes()
            kept = self.kept.get(key)
            if kept is not None and kept.weights != self._weights():
                self.kept.clear()
                kept = None
        return kept.made_anew() if kept else None

    def keep(self, key: Hashable, result: Any) -> None:
        """Keep what the text encoder gave."""
        fields = {name: result[name].detach().to("cpu", copy=True) for name in self.call.reads}
        with self._lock:
            if self._there and self._arrived is None:
                self._arrived = ModuleState(self.module, values=True)
            self.kept.put(key, Kept(type(result), fields, self._weights()))

    def _weights(self) -> bytes | None:
        """The digest of the weights; None where it is not taken."""
        found = self._digest(stored(self.module)) if self.weights is None else None
        return None if found is None else _bytes(found)

    @property
    def _there(self) -> bool:
        """Whether weights that wait on the CPU are on the GPU now."""
        return self.weights is not None and self.weights.there

    def _follow_changes(self) -> None:
        """Forget results of a text encoder that is not what it was; weights that arrived are compared as they came."""
        there = self._there
        if not there:
            self._arrived = None
        state = self._arrived if there else self._resting
        if state is not None and state.holds():
            return
        self.kept.clear()
        state = ModuleState(self.module, values=True)
        self._arrived, self._resting = (state, self._resting) if there else (None, state)


def remember_prompts(module: nn.Module, part: ComponentDescription, border: Border, most: int) -> None:
    """Have a placed text encoder answer for the last `most` prompts without work; taking its hook off ends it.

    Observers hear of such a call as of any other. Offloaded weights stay where they are.
    """
    call, through = part.call("forward"), module.forward
    cache = PromptCache(module, call, most, border.host.digest, border.offloaded.get(part.name))

    @functools.wraps(through)
    def forward(*args: Any, **kwargs: Any) -> Any:
        key = cache.key(args, kwargs)
        if key is None:
            return through(*args, **kwargs)
        found = cache.find(key)
        if found is None:
            result = through(*args, **kwargs)
            cache.keep(key, result)
            return result
        border.enter(part.name, "forward", works=False)
        border.ready(part.name, "forward", args, kwargs)
        border.leave(part.name, "forward", found)
        border.state.prompt_cache_hits += 1
        return move(found, border.home, border.state.traffic, call.output)

    module.forward = functools.update_wrapper(PlacedForward(forward), through)


def reading(forward: Forward, call: Call) -> Forward:
    """Return `forward` with results that hold what the pipeline reads of them, and nothing else, in its own calls.

    The keys and values that a text encoder would go on from are not read, and larger than what is. A graph could not
    take the call that keeps them: their cache copies a number from the CPU.
    """

    @functools.wraps(forward)
    def reduced(*args: Any, **kwargs: Any) -> Any:
        if not call.is_pipelines_own(args, kwargs):
            return forward(*args, **kwargs)
        result = forward(*args, **kwargs, **dict(call.spares))
        return type(result)(**{name: result[name] for name in call.reads})

    return functools.update_wrapper(PlacedForward(reduced), forward)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _settings(device: str) -> tuple[Hashable, ...]:
    """Settings of PyTorch that choose how numbers are computed."""
    autocast = autocast_dtype(device)
    matmul = torch.backends.cuda.matmul
    return (
        autocast,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
