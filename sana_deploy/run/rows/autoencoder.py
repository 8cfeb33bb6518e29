"""AutoencoderDC over bands of rows: the whole image at once, never in tiles.

A band is of whole rows of latents (32 rows of pixels), so that strides and pixel shuffles stay within it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d, EfficientViTBlock, ResBlock
from torch import Tensor, nn
from torch.nn import functional

from .exchange import Ask, Band, Gather, Group, Sum, Work
from .layers import base_of, channel_norm, conv, glumb_conv, with_halo


def encode(autoencoders: Sequence[Any], group: Group, images: Tensor) -> Tensor:
    """Latents of (batch, 3, height, width) on the device of the first band.

    Args:
        autoencoders: one per band, on its device; bands of one device share theirs.
        group: the bands.
        images: on the device of the first band.

    Raises:
        ValueError: the height is not a whole number of rows of latents.
        NotImplementedError: the autoencoder has a layer that is not known over bands.
    """
    unit = autoencoders[0].spatial_compression_ratio
    if images.shape[2] % unit:
        raise ValueError(f"a height of {images.shape[2]} px is not a multiple of {unit}")
    return _over_bands([one.encoder for one in autoencoders], _encoded, group, images, unit)


def decode(autoencoders: Sequence[Any], group: Group, latents: Tensor) -> Tensor:
    """Images of (batch, channels, rows, width) latents on the device of the first band; see `encode`."""
    return _over_bands([one.decoder for one in autoencoders], _decoded, group, latents, 1)


def _over_bands(modules: Sequence[Any], work: Any, group: Group, x: Tensor, unit: int) -> Tensor:
    """Deal rows of `unit` to the bands, and join what they make. A single band is the module itself."""
    bands = group.bands(x.shape[2] // unit)
    if len(bands) == 1:
        found: Tensor = modules[0](x)
        return found
    works = []
    for band in bands:
        part = x[:, :, band.first * unit : (band.first + band.rows) * unit]
        works.append(work(modules[band.index], group.copy(part, 0, band.index), band))
    del x, part
    return group.joined(group.run(works), 2)


def _encoded(encoder: Any, x: Tensor, band: Band) -> Work:
    for layer in _flat((encoder.conv_in, *encoder.down_blocks)):
        x = yield from _layer(layer, x, band)
    h = yield from conv(encoder.conv_out, x)
    return h + _averaged(x, encoder.out_shortcut_average_group_size) if encoder.out_shortcut else h


def _decoded(decoder: Any, x: Tensor, band: Band) -> Work:
    h = yield from conv(decoder.conv_in, x)
    x = h + _repeated(x, decoder.in_shortcut_repeats) if decoder.in_shortcut else h
    del h
    for layer in _flat(tuple(reversed(decoder.up_blocks))):
        x = yield from _layer(layer, x, band)
    x = decoder.conv_act(channel_norm(decoder.norm_out, x))
    return (yield from _layer(decoder.conv_out, x, band))


def _flat(layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Layers one after the other, so that no caller holds the input of a whole stage."""
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _flat(tuple(layer))
        else:
            yield layer


def _repeated(x: Tensor, repeats: int) -> Tensor:
    return x.repeat_interleave(repeats, dim=1, output_size=x.shape[1] * repeats)


def _averaged(x: Tensor, group: int) -> Tensor:
    """The mean of every `group` channels."""
    return torch.unflatten(x, 1, (-1, group)).mean(dim=2)


def _layer(layer: nn.Module, x: Tensor, band: Band) -> Work:
    """A block or a convolution of the encoder or decoder."""
    if isinstance(layer, ResBlock):
        return _residual(layer, x)
    if isinstance(layer, EfficientViTBlock):
        return _efficient_vit(layer, x, band)
    if isinstance(layer, DCDownBlock2d):
        return _down(layer, x)
    if isinstance(layer, DCUpBlock2d):
        return _up(layer, x)
    if isinstance(base_of(layer), nn.Conv2d):
        return conv(layer, x)
    raise NotImplementedError(f"{type(layer).__name__} over bands of rows")


def _normed(norm: nn.Module, kind: str, x: Tensor) -> Tensor:
    if kind == "rms_norm":
        return channel_norm(norm, x)
    found: Tensor = norm(x)  # a batch norm: local, since it is not trained here
    return found


def _residual(layer: Any, x: Tensor) -> Work:
    h = yield from conv(layer.conv1, x)
    h = layer.nonlinearity(h)  # under the same name: nothing else may hold what is yielded, or its source
    h = yield from conv(layer.conv2, h)
    return _normed(layer.norm, layer.norm_type, h) + x


def _efficient_vit(layer: Any, x: Tensor, band: Band) -> Work:
    x = yield from _multiscale_attention(layer.attn, x, band)
    return (yield from glumb_conv(layer.conv_out, x))


def _down(layer: Any, x: Tensor) -> Work:
    h = yield from conv(layer.conv, x)
    h = functional.pixel_unshuffle(h, layer.factor) if layer.downsample else h
    if not layer.shortcut:
        return h
    return h + _averaged(functional.pixel_unshuffle(x, layer.factor), layer.group_size)


def _up(layer: Any, x: Tensor) -> Work:
    if layer.interpolate:
        h = yield from _interpolated(layer, x)
    else:
        h = yield from conv(layer.conv, x)
        h = functional.pixel_shuffle(h, layer.factor)
    return h + functional.pixel_shuffle(_repeated(x, layer.repeats), layer.factor) if layer.shortcut else h


def _interpolated(layer: Any, x: Tensor) -> Work:
    """A convolution of the enlarged rows: one small row more at each edge is `factor` large ones, which are cut off."""
    if layer.interpolation_mode != "nearest":
        raise NotImplementedError(f"interpolation by {layer.interpolation_mode} over bands of rows")
    h = yield from with_halo(x, 1)
    h = layer.conv(functional.interpolate(h, scale_factor=layer.factor, mode="nearest"))
    return h[:, :, layer.factor : -layer.factor]


def _multiscale_attention(attn: Any, x: Tensor, band: Band) -> Work:
    """`SanaMultiscaleAttnProcessor2_0`. The pixels of the whole image decide whether it is linear."""
    height, width = x.shape[2:]
    linear = band.whole_height(height) * width > attn.attention_head_dim
    h = x.movedim(1, -1)
    h = torch.cat([attn.to_q(h), attn.to_k(h), attn.to_v(h)], dim=3).movedim(-1, 1)
    scales = [h]
    for block in attn.to_qkv_multiscale:
        scales.append(block.proj_out((yield from conv(block.proj_in, h))))
    h = torch.cat(scales, dim=1)
    del scales
    h = (h.to(dtype=torch.float32) if linear else h).reshape(len(x), -1, 3 * attn.attention_head_dim, height * width)
    query, ask = _asked(attn, h, linear)
    del h
    yield ask
    h = _answered(attn, query, ask, linear).to(x.dtype).reshape(len(x), -1, height, width)
    del query
    h = _normed(attn.norm_out, attn.norm_type, attn.to_out(h.movedim(1, -1)).movedim(-1, 1))
    return h + x if attn.residual_connection else h


def _asked(attn: Any, h: Tensor, linear: bool) -> tuple[Tensor, Ask]:
    """Queries, and what is asked of all bands: the sum over pixels, or all keys and values of a small image."""
    query, key, value = h.chunk(3, dim=2)
    query, key = attn.nonlinearity(query), attn.nonlinearity(key)
    if linear:
        return query, Sum(torch.matmul(functional.pad(value, (0, 0, 0, 1), value=1), key.transpose(-1, -2)))
    return query, Gather(torch.stack([key, value]))


def _answered(attn: Any, query: Tensor, ask: Ask, linear: bool) -> Tensor:
    if not linear:
        key, value = ask.take()
        small: Tensor = attn.apply_quadratic_attention(query, key, value)
        return small
    sums: Tensor = ask.take()
    h = torch.matmul(sums, query).to(dtype=torch.float32)
    large: Tensor = h[:, :, :-1] / (h[:, :, -1:] + attn.eps)
    return large
