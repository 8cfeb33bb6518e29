"""Names and shapes of the tensors that torch's layers store, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""


class UnknownArchitectureError(Exception):
    """A config has a value whose tensors are not described here."""


def linear(name: str, wide: int, out: int, bias: bool = True) -> Shapes:
    """`nn.Linear` from `wide` features to `out`."""
    return {f"{name}.weight": (out, wide)} | ({f"{name}.bias": (out,)} if bias else {})


def conv(name: str, into: int, out: int, side: int, bias: bool = True, groups: int = 1) -> Shapes:
    """`nn.Conv2d` with a square kernel of `side` pixels."""
    return {f"{name}.weight": (out, into // groups, side, side)} | ({f"{name}.bias": (out,)} if bias else {})


def scale(name: str, wide: int, bias: bool = False) -> Shapes:
    """A norm's own weight, and its bias."""
    weight: Shapes = {f"{name}.weight": (wide,)}
    return weight | ({f"{name}.bias": (wide,)} if bias else {})


def gated_conv(name: str, wide: int, ratio: float, norm: bool) -> Shapes:
    """diffusers' `GLUMBConv`: widened by `ratio`, a depthwise convolution, a gate, and back."""
    hidden = int(ratio * wide)
    return {
        **conv(f"{name}.conv_inverted", wide, 2 * hidden, 1),
        **conv(f"{name}.conv_depth", 2 * hidden, 2 * hidden, 3, groups=2 * hidden),
        **conv(f"{name}.conv_point", hidden, wide, 1, bias=False),
        **(scale(f"{name}.norm", wide, bias=True) if norm else {}),
    }


def under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The same shapes inside a module called `prefix`."""
    return ((f"{prefix}.{name}", shape) for name, shape in shapes.items())
