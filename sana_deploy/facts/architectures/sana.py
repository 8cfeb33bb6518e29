"""What diffusers' `SanaTransformer2DModel` and `SanaControlNetModel` store, from their configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .layers import Shapes, UnknownArchitectureError, conv, gated_conv, linear, scale, under

CONTROLNET_DEFAULTS: dict[str, Any] = {
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 7,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    "caption_channels": 2304, "mlp_ratio": 2.5, "dropout": 0.0, "attention_bias": False, "sample_size": 32,
    "patch_size": 1, "norm_elementwise_affine": False, "norm_eps": 1e-6, "interpolation_scale": None,
}  # fmt: skip
TRANSFORMER_DEFAULTS: dict[str, Any] = {
    **CONTROLNET_DEFAULTS, "num_layers": 20, "guidance_embeds": False, "guidance_embeds_scale": 0.1, "qk_norm": None,
    "timestep_scale": 1.0,
}  # fmt: skip

_TIME_CHANNELS = 256
"""Sines and cosines of the timestep."""


def transformer(config: Mapping[str, Any]) -> Shapes:
    """Tensors of `SanaTransformer2DModel`; `config` is complete."""
    width, patch = _width(config), config["patch_size"]
    return {
        **_trunk(config, config["qk_norm"], config["guidance_embeds"]),
        "scale_shift_table": (2, width),
        **linear("proj_out", width, patch * patch * (config["out_channels"] or config["in_channels"])),
    }


def controlnet(config: Mapping[str, Any]) -> Shapes:
    """Tensors of `SanaControlNetModel`; `config` is complete."""
    width, shapes = _width(config), _trunk(config, None, False)
    shapes |= linear("input_block", width, width)
    for index in range(config["num_layers"]):
        shapes |= linear(f"controlnet_blocks.{index}", width, width)
    return shapes


def _width(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _trunk(config: Mapping[str, Any], qk_norm: str | None, guidance: bool) -> Shapes:
    """What both have: patches, time, captions and blocks."""
    width = _width(config)
    shapes = conv("patch_embed.proj", config["in_channels"], width, config["patch_size"])
    for embedder in ["timestep_embedder", "guidance_embedder"] if guidance else ["emb.timestep_embedder"]:
        shapes |= linear(f"time_embed.{embedder}.linear_1", _TIME_CHANNELS, width)
        shapes |= linear(f"time_embed.{embedder}.linear_2", width, width)
    shapes |= linear("time_embed.linear", width, 6 * width)
    shapes |= linear("caption_projection.linear_1", config["caption_channels"], width)
    shapes |= linear("caption_projection.linear_2", width, width)
    shapes |= scale("caption_norm", width)
    block = _block(config, qk_norm)
    for index in range(config["num_layers"]):
        shapes |= dict(under(f"transformer_blocks.{index}", block))
    return shapes


def _block(config: Mapping[str, Any], qk_norm: str | None) -> Shapes:
    width, cross = _width(config), config["cross_attention_dim"]
    heads, side = config["num_attention_heads"], config["attention_head_dim"]
    shapes = _attention("attn1", width, width, heads, side, config["attention_bias"], qk_norm)
    if cross is not None:
        if config["norm_elementwise_affine"]:
            shapes |= scale("norm2", width, bias=True)
        heads, side = config["num_cross_attention_heads"], config["cross_attention_head_dim"]
        shapes |= _attention("attn2", width, cross, heads, side, True, qk_norm)
    shapes |= gated_conv("ff", width, config["mlp_ratio"], norm=False)
    return {**shapes, "scale_shift_table": (6, width)}


def _attention(name: str, width: int, keys: int, heads: int, side: int, bias: bool, qk_norm: str | None) -> Shapes:
    inner = heads * side
    return {
        **linear(f"{name}.to_q", width, inner, bias),
        **linear(f"{name}.to_k", keys, inner, bias),
        **linear(f"{name}.to_v", keys, inner, bias),
        **linear(f"{name}.to_out.0", inner, width),
        **_qk_norm(f"{name}.norm_q", qk_norm, side, inner),
        **_qk_norm(f"{name}.norm_k", qk_norm, side, inner),
    }


def _qk_norm(name: str, kind: str | None, side: int, inner: int) -> Shapes:
    match kind:
        case None | "fp32_layer_norm" | "l2":
            return {}
        case "rms_norm" | "layer_norm":
            return scale(name, side, bias=kind == "layer_norm")
        case "rms_norm_across_heads" | "layer_norm_across_heads":
            return scale(name, inner, bias=kind == "layer_norm_across_heads")
    raise UnknownArchitectureError(f"qk_norm={kind}")
