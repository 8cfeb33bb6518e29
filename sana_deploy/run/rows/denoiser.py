"""SANA's transformer and its ControlNet over bands of rows: what a step computes of one band, as a generator.

A band gets the arguments of the module's forward on its device: latents with its own rows of tokens, and of a residual
its own tokens. What it makes is of its rows, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from diffusers import SanaControlNetModel, SanaTransformer2DModel
from diffusers.models.attention_processor import (
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
)
from torch import Tensor

from .exchange import Band, Work
from .layers import glumb_conv, linear_attention, perturbed_attention

Given = Mapping[str, Any]
"""The arguments of a forward by name."""
Attention = Callable[[Any, Tensor], Work]
"""An attention over all rows, of one band's tokens: (batch, tokens, channels)."""
ATTENTION_KINDS = "attention_kinds"
"""An argument beside those of a forward: `attentions_of` the module that a band's is a copy of, as it is now."""
LATENTS = ("hidden_states", "controlnet_cond")
"""Arguments of (batch, channels, rows, width)."""
TOKENS = ("controlnet_block_samples",)
"""Arguments that are lists of (batch, rows * width, channels)."""


def transformer_band(model: Any, band: Band, given: Given) -> Work:
    """`SanaTransformer2DModel`: the prediction for the band's rows, (batch, channels, rows, width)."""
    x, width = _embedded(model, given["hidden_states"], band)
    text, mask, temb, embedded = _conditions(model, x, given)
    samples = given.get("controlnet_block_samples") or ()
    for index, block in enumerate(model.transformer_blocks):
        x = yield from _block(block, x, text, mask, temb, width, _attention(block, index, given))
        if 0 < index <= len(samples):
            x = x + samples[index - 1]
    x = model.proj_out(model.norm_out(x, embedded, model.scale_shift_table))
    patch = model.config.patch_size
    x = x.reshape(len(x), -1, width, patch, patch, x.shape[-1] // patch**2).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), x.shape[1], -1, width * patch)


def controlnet_band(model: Any, band: Band, given: Given) -> Work:
    """`SanaControlNetModel`: its residuals for the band's tokens, a list of (batch, tokens, channels)."""
    x, width = _embedded(model, given["hidden_states"], band)
    condition, _ = _embedded(model, given["controlnet_cond"].to(x.dtype), band)
    x = x + model.input_block(condition)
    del condition
    text, mask, temb, _ = _conditions(model, x, given)
    samples = []
    for index, block in enumerate(model.transformer_blocks):
        x = yield from _block(block, x, text, mask, temb, width, _attention(block, index, given))
        samples.append(x)
    del x
    scale = given.get("conditioning_scale", 1.0)
    return [out(samples.pop(0)) * scale for out in model.controlnet_blocks]


WORKS: Mapping[type, Callable[[Any, Band, Given], Work]] = {
    SanaTransformer2DModel: transformer_band,
    SanaControlNetModel: controlnet_band,
}
"""What a module's forward does for one band, by its class."""


ATTENTIONS: Mapping[type, Attention] = {
    SanaLinearAttnProcessor2_0: linear_attention,
    PAGCFGSanaLinearAttnProcessor2_0: partial(perturbed_attention, parts=3),
    PAGIdentitySanaLinearAttnProcessor2_0: partial(perturbed_attention, parts=2),
}
"""What an attention over all rows does for one band, by the class of its processor; these keep nothing themselves."""


def attentions_of(model: Any) -> list[type]:
    """The classes of the processors of a module's attention over all rows, block by block."""
    return [type(block.attn1.processor) for block in model.transformer_blocks]


def _attention(block: Any, index: int, given: Given) -> Attention:
    """The attention of a block: by the processor it has, or by the classes that a call names for all."""
    kinds = given.get(ATTENTION_KINDS)
    return ATTENTIONS[type(block.attn1.processor) if kinds is None else kinds[index]]


def sees_all_rows(model: Any) -> bool:
    """Whether a band needs the latents of all rows: the embedding adds positions in the whole image."""
    return model.patch_embed.pos_embed is not None


def whole_rows_only(model: Any) -> str:
    """Why no band of a module may be computed by itself; empty where one may."""
    if type(model) not in WORKS:
        return f"it is a {type(model).__name__}"
    for number, kind in enumerate(attentions_of(model)):
        if kind not in ATTENTIONS:
            return f"transformer_blocks.{number}.attn1 has the attention processor {kind.__name__}"
    return ""


def _embedded(model: Any, latents: Tensor, band: Band) -> tuple[Tensor, int]:
    """Tokens of the band's rows, and how many a row has; of all latents where their positions are added."""
    x, width = model.patch_embed(latents), latents.shape[3] // model.config.patch_size
    if x.shape[1] == band.rows * width:
        return x, width
    return x[:, band.first * width : (band.first + band.rows) * width].clone(), width


def _conditions(model: Any, x: Tensor, given: Given) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The text, its mask as a bias, and the time for the blocks and for the last norm."""
    guidance = given.get("guidance")
    extra = {"batch_size": len(x)} if guidance is None else {"guidance": guidance}
    temb, embedded = model.time_embed(given["timestep"], hidden_dtype=x.dtype, **extra)
    text = model.caption_projection(given["encoder_hidden_states"]).view(len(x), -1, x.shape[-1])
    mask = given.get("encoder_attention_mask")
    if mask is not None and mask.ndim == 2:
        mask = ((1 - mask.to(given["hidden_states"].dtype)) * -10000.0).unsqueeze(1)
    return model.caption_norm(text), mask, temb, embedded


def _block(
    block: Any, x: Tensor, text: Tensor, mask: Tensor | None, temb: Tensor, width: int, attention: Attention
) -> Work:
    """`SanaTransformerBlock` on (batch, rows * width, channels)."""
    shifts: Sequence[Tensor] = (block.scale_shift_table[None] + temb.reshape(len(x), 6, -1)).chunk(6, dim=1)
    shift_attention, scale_attention, gate_attention, shift_forward, scale_forward, gate_forward = shifts
    h = (block.norm1(x) * (1 + scale_attention) + shift_attention).to(x.dtype)
    h = yield from attention(block.attn1, h)
    x = x + gate_attention * h
    del h
    if block.attn2 is not None:
        x = block.attn2(x, encoder_hidden_states=text, attention_mask=mask) + x
    h = block.norm2(x) * (1 + scale_forward) + shift_forward
    h = yield from glumb_conv(block.ff, h.unflatten(1, (-1, width)).permute(0, 3, 1, 2))
    return x + gate_forward * h.flatten(2, 3).permute(0, 2, 1)
