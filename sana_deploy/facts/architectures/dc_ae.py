"""What diffusers' `AutoencoderDC` stores, from its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .layers import Shapes, UnknownArchitectureError, conv, gated_conv, linear, scale, under

_CHANNELS = (128, 256, 512, 512, 1024, 1024)
_MULTISCALES = ((), (), (), (5,), (5,), (5,))
DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32,
    "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": _CHANNELS, "decoder_block_out_channels": _CHANNELS,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": _MULTISCALES, "decoder_qkv_multiscales": _MULTISCALES,
    "upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "encoder_out_shortcut": True,
    "decoder_in_shortcut": True, "decoder_conv_act_fn": "relu", "scaling_factor": 1.0,
}  # fmt: skip

_EXPANSION = 4
"""How far an EfficientViT block's convolution widens."""


def autoencoder(config: Mapping[str, Any]) -> Shapes:
    """Tensors of `AutoencoderDC`; `config` is complete."""
    return {**dict(under("encoder", _encoder(config))), **dict(under("decoder", _decoder(config)))}


def _encoder(config: Mapping[str, Any]) -> Shapes:
    channels, layers = config["encoder_block_out_channels"], config["encoder_layers_per_block"]
    unshuffled = config["downsample_block_type"] == "pixel_unshuffle"
    if layers[0] > 0:
        shapes = conv("conv_in", config["in_channels"], channels[0], 3)
    else:
        shapes = _down("conv_in", config["in_channels"], channels[1], unshuffled)
    for index, (wide, count) in enumerate(zip(channels, layers, strict=False)):
        shapes |= _stage(f"down_blocks.{index}", config, "encoder", index, wide, "rms_norm", count, 0)
        if index < len(channels) - 1 and count > 0:
            shapes |= _down(f"down_blocks.{index}.{count}", wide, channels[index + 1], unshuffled)
    return shapes | conv("conv_out", channels[-1], config["latent_channels"], 3)


def _decoder(config: Mapping[str, Any]) -> Shapes:
    channels, layers = config["decoder_block_out_channels"], config["decoder_layers_per_block"]
    interpolated = config["upsample_block_type"] == "interpolate"
    norms = _each(config["decoder_norm_types"], len(channels))
    shapes = conv("conv_in", config["latent_channels"], channels[-1], 3)
    for index, (wide, count) in enumerate(zip(channels, layers, strict=False)):
        raised = index < len(channels) - 1 and count > 0
        if raised:
            shapes |= _up(f"up_blocks.{index}.0", channels[index + 1], wide, interpolated)
        shapes |= _stage(f"up_blocks.{index}", config, "decoder", index, wide, norms[index], count, int(raised))
    last = channels[0] if layers[0] > 0 else channels[1]
    shapes |= scale("norm_out", last, bias=True)
    if layers[0] > 0:
        return shapes | conv("conv_out", last, config["in_channels"], 3)
    return shapes | _up("conv_out", last, config["in_channels"], interpolated)


def _stage(
    name: str, config: Mapping[str, Any], side: str, index: int, wide: int, norm: str, count: int, first: int
) -> Shapes:
    """`count` equal blocks, the first of which has the number `first`."""
    kind = _each(config[f"{side}_block_types"], index + 1)[index]
    if kind == "ResBlock":
        block = {
            **conv("conv1", wide, wide, 3),
            **conv("conv2", wide, wide, 3, bias=False),
            **_norm("norm", norm, wide),
        }
    elif kind == "EfficientViTBlock":
        kernels = config[f"{side}_qkv_multiscales"][index]
        block = {
            **_attention("attn", wide, config["attention_head_dim"], kernels, norm),
            **gated_conv("conv_out", wide, _EXPANSION, norm=True),
        }
    else:
        raise UnknownArchitectureError(f"{side}_block_types={kind}")
    return {key: shape for number in range(count) for key, shape in under(f"{name}.{first + number}", block)}


def _each(value: str | Sequence[str], count: int) -> Sequence[str]:
    return [value] * count if isinstance(value, str) else value


def _down(name: str, into: int, out: int, unshuffled: bool) -> Shapes:
    if unshuffled and out % 4:
        raise UnknownArchitectureError(f"pixel_unshuffle to {out} channels")
    return conv(f"{name}.conv", into, out // 4 if unshuffled else out, 3)


def _up(name: str, into: int, out: int, interpolated: bool) -> Shapes:
    return conv(f"{name}.conv", into, out if interpolated else out * 4, 3)


def _attention(name: str, wide: int, side: int, kernels: Sequence[int], norm: str) -> Shapes:
    """`SanaMultiscaleLinearAttention`: queries, keys and values, seen at each kernel's scale as well."""
    heads = wide // side
    inner = heads * side
    shapes = {key: shape for part in "qkv" for key, shape in linear(f"{name}.to_{part}", wide, inner, False).items()}
    for number, kernel in enumerate(kernels):
        scaled = f"{name}.to_qkv_multiscale.{number}"
        shapes |= conv(f"{scaled}.proj_in", 3 * inner, 3 * inner, kernel, False, groups=3 * inner)
        shapes |= conv(f"{scaled}.proj_out", 3 * inner, 3 * inner, 1, False, groups=3 * heads)
    shapes |= linear(f"{name}.to_out", inner * (1 + len(kernels)), wide, False)
    return shapes | _norm(f"{name}.norm_out", norm, wide)


def _norm(name: str, kind: str, wide: int) -> Shapes:
    if kind in ("rms_norm", "layer_norm"):
        return scale(name, wide, bias=True)
    if kind == "batch_norm":
        running: Shapes = {f"{name}.running_mean": (wide,), f"{name}.running_var": (wide,)}
        return {**scale(name, wide, bias=True), **running, f"{name}.num_batches_tracked": ()}
    raise UnknownArchitectureError(f"decoder_norm_types={kind}")
