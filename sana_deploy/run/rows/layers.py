"""Layers that look beyond their band, as generators: convolutions with a halo, and sums over tokens.

Layers are called as modules, so that what wraps them (LoRA, quantised weights) works as on the whole image. What is not
here sees one pixel or token at a time: linear layers, 1x1 convolutions, norms over channels, attention to the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .exchange import Halo, Piece, Sum, Work

_HALF_LIMIT = 65504
"""What SANA's attention is clipped to in float16."""


def base_of(layer: nn.Module) -> nn.Module:
    """The layer itself, where adapters wrap it."""
    find = getattr(layer, "get_base_layer", None)
    return find() if callable(find) else layer


def with_halo(x: Tensor, size: int) -> Work:
    """`x` of (batch, channels, rows, width) with `size` rows of the image above and below, zeros outside of it."""
    ask = Halo(x, size)
    yield ask
    above, below = ask.take()
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (*x.shape[:2], x.shape[2] + 2 * size, x.shape[3])
    wider = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    start = 0
    for piece in (*above, x, *below):
        start = _fill(wider, start, piece)
    return wider


def _fill(x: Tensor, start: int, piece: Piece) -> int:
    """Write a piece into the rows of `x` from `start` on, and return where it ends."""
    end = start + (piece if isinstance(piece, int) else piece.shape[2])
    rows = x[:, :, start:end]
    if isinstance(piece, int):
        rows.zero_()
    else:
        rows.copy_(piece)
    return end


def conv(layer: nn.Module, x: Tensor) -> Work:
    """A convolution as on the whole image: its rows of padding come from the neighbours.

    A band must begin at a whole stride. A convolution that adapters wrap is given a wider halo, and the rows that its
    own padding touched are cut off.

    Raises:
        NotImplementedError: it pads with something else than zeros, or changes the size by its padding.
    """
    base = base_of(layer)
    assert isinstance(base, nn.Conv2d)
    size, stride = int(base.padding[0]), base.stride[0]
    reach = base.dilation[0] * (base.kernel_size[0] - 1)
    if base.padding_mode != "zeros" or reach != 2 * size:
        raise NotImplementedError(f"{base} over bands of rows")
    if not size:
        return layer(x)
    if layer is base and not _watched(layer):
        x = yield from with_halo(x, size)
        padding = (0, int(base.padding[1]))
        return functional.conv2d(x, base.weight, base.bias, base.stride, padding, base.dilation, base.groups)
    beyond = -(-size // stride)
    x = yield from with_halo(x, beyond * stride)
    return layer(x)[:, :, beyond:-beyond]


def _watched(layer: nn.Module) -> bool:
    """Whether something else than the class's forward works when the layer is called."""
    return "forward" in vars(layer) or bool(layer._forward_hooks or layer._forward_pre_hooks)


def channel_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over the channels of (batch, channels, rows, width)."""
    found: Tensor = norm(x.movedim(1, -1)).movedim(-1, 1)
    return found


def glumb_conv(layer: Any, x: Tensor) -> Work:
    """diffusers' `GLUMBConv`. Its depthwise convolution looks beyond the band.

    A halo of the layer's own input would be an eighth of the bytes. But the first 1x1 convolution has a bias, and
    outside the image its result must be zero.
    """
    h = yield from conv(layer.conv_depth, layer.nonlinearity(layer.conv_inverted(x)))  # no name here keeps it alive
    h, gate = torch.chunk(h, 2, dim=1)
    h = layer.conv_point(h * layer.nonlinearity(gate))
    del gate
    if layer.norm_type == "rms_norm":
        h = channel_norm(layer.norm, h)
    return h + x if layer.residual_connection else h


def linear_attention(attn: Any, x: Tensor) -> Work:
    """`SanaLinearAttnProcessor2_0` on (batch, tokens, channels); the float32 sum over tokens runs over all bands."""
    h = yield from _attended(attn, x)
    return _clipped(h)


def perturbed_attention(attn: Any, x: Tensor, parts: int) -> Work:
    """diffusers' perturbed attention: the last of `parts` equal parts of the batch has its values for a result.

    These processors leave the norms of queries and keys out.
    """
    kept = len(x) - len(x) // parts
    h = yield from _attended(attn, x[:kept], normed=False)
    perturbed = attn.to_out[1](attn.to_out[0](attn.to_v(x[kept:])))
    return _clipped(torch.cat([h, perturbed]))


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-_HALF_LIMIT, _HALF_LIMIT) if x.dtype == torch.float16 else x


def _attended(attn: Any, x: Tensor, normed: bool = True) -> Work:
    query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    query = attn.norm_q(query) if normed and attn.norm_q is not None else query
    key = attn.norm_k(key) if normed and attn.norm_k is not None else key
    query = functional.relu(query.transpose(1, 2).unflatten(1, (attn.heads, -1))).float()
    key = functional.relu(key.transpose(1, 2).unflatten(1, (attn.heads, -1)).transpose(2, 3)).float()
    value = functional.pad(value.transpose(1, 2).unflatten(1, (attn.heads, -1)).float(), (0, 0, 0, 1), value=1.0)
    ask = Sum(torch.matmul(value, key))
    del key, value
    yield ask
    h = torch.matmul(ask.take(), query)
    del query
    h = h[:, :, :-1] / (h[:, :, -1:] + 1e-15)
    h = h.flatten(1, 2).transpose(1, 2).to(x.dtype)
    return attn.to_out[1](attn.to_out[0](h))
