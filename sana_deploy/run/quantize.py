"""Quantised weights of linear layers: int8 through torchao, nf4 through bitsandbytes; both are optional extras.

A quantised weight is a tensor subclass that stays `nn.Linear`'s own parameter, so that a module keeps its class and
LoRA layers find what they expect. It reports the dtype that it computes in and holds its parts as ordinary tensors:

* int8: torchao's `Int8Tensor`, symmetric, one scale per row. A product is summed with the whole numbers and scaled
  afterwards.
* nf4: the 4-bit normal float of QLoRA (https://arxiv.org/abs/2305.14314) in blocks of 64, packed and unpacked by
  bitsandbytes; the weight is made anew in the dtype for each product.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..declare.formats import Quantization
from ..declare.policies import QUANTIZERS
from ..errors import InvalidSpecError
from ..facts.libraries import install_hint

_LOCK = threading.Lock()
"""Components are loaded in threads, and the libraries are imported by the first that needs them."""

Change = Callable[[torch.Tensor], torch.Tensor]


def require(quantization: Quantization) -> None:
    """Make sure that the libraries of a quantisation are here.

    Raises:
        InvalidSpecError: naming what to install.
    """
    missing = [name for name in QUANTIZERS[quantization] if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidSpecError(
            f"{quantization} weights need {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed",
            where="precision.quantization",
            hint=install_hint(quantization, QUANTIZERS[quantization]),
        )


def quantize(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """Quantise the weight (rows, columns) of a linear layer; the result computes in the dtype of `weight`.

    Raises:
        InvalidSpecError: the library is not installed.
    """
    require(quantization)
    if quantization == "int8":
        with _LOCK:
            torchao, granularity = _torchao()
        quantized: torch.Tensor = torchao.Int8Tensor.from_hp(weight, granularity)
        return quantized
    with _LOCK:
        kind = _nf4()
    made: torch.Tensor = kind.from_weight(weight)
    return made


def quantize_linears(module: nn.Module, quantization: Quantization) -> None:
    """Quantise every linear layer of `module` in place, one after the other; those that are already stay."""
    for linear in linears_of(module).values():
        if not is_quantized(linear.weight):
            linear.weight = nn.Parameter(quantize(linear.weight.detach(), quantization), requires_grad=False)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by the name of their weight."""
    return {f"{path}.weight": child for path, child in module.named_modules() if isinstance(child, nn.Linear)}


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is made of parts, as quantised weights are."""
    return hasattr(tensor, "__tensor_flatten__")


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The ordinary tensors that `tensor` holds, or itself: what takes memory."""
    if is_quantized(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield getattr(tensor, name)
    else:
        yield tensor


def map_parts(tensor: torch.Tensor, change: Change) -> torch.Tensor:
    """Apply `change` to every ordinary tensor in `tensor` and put the results together again."""
    if not is_quantized(tensor):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    changed = {name: change(getattr(tensor, name)) for name in names}
    made: torch.Tensor = type(tensor).__tensor_unflatten__(changed, context, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
    return made


def own_tensors(
    module: nn.Module, without: Iterable[nn.Module] = ()
) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every parameter and buffer of `module`: the dictionary that holds it, its key there, and the tensor.

    The holder's entry may be replaced while iterating.

    Args:
        without: parts of it whose tensors are left out.
    """
    left_out = {id(child) for part in without for child in part.modules()}
    for child in module.modules():
        if id(child) in left_out:
            continue
        for own in (child._parameters, child._buffers):
            for key, value in list(own.items()):
                if value is not None:
                    yield own, key, value


def like(original: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Make `made` a parameter where `original` is one, with its `requires_grad`."""
    is_parameter = isinstance(original, nn.Parameter)
    return nn.Parameter(made, requires_grad=original.requires_grad) if is_parameter else made


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that `tensor` takes; `nbytes` of a quantised one tells what it would take in its dtype."""
    return sum(part.nbytes for part in parts_of(tensor))


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep back what the libraries say, when they are imported, of kernels that are not for this host."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


@functools.cache
def _torchao() -> tuple[Any, Any]:
    with _hushed():
        from torchao import quantization
    return quantization, quantization.PerRow()


@functools.cache
def _nf4() -> Any:
    """The tensor subclass of nf4 weights, on torchao's base class."""
    _torchao()
    with _hushed():
        from .nf4 import Nf4Tensor
    return Nf4Tensor
