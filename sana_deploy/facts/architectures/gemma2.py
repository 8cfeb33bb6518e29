"""What transformers' `Gemma2Model` stores, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .layers import Shapes, linear, scale, under

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "attention_bias": False,
}  # fmt: skip
"""The config's keys that shapes depend on."""
OTHER_STORAGE = ("quantization_config", "compression_config")
"""Keys that say that tensors are stored packed, under names and in shapes of a library's own."""


def text_encoder(config: Mapping[str, Any]) -> Shapes:
    """Tensors of `Gemma2Model`; `config` is complete."""
    wide = config["hidden_size"]
    block = _block(config)
    shapes: Shapes = {"embed_tokens.weight": (config["vocab_size"], wide)}
    for index in range(config["num_hidden_layers"]):
        shapes |= dict(under(f"layers.{index}", block))
    return shapes | scale("norm", wide)


def _block(config: Mapping[str, Any]) -> Shapes:
    wide, hidden, bias = config["hidden_size"], config["intermediate_size"], config["attention_bias"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        **linear("self_attn.q_proj", wide, queries, bias),
        **linear("self_attn.k_proj", wide, keys, bias),
        **linear("self_attn.v_proj", wide, keys, bias),
        **linear("self_attn.o_proj", queries, wide, bias),
        **linear("mlp.gate_proj", wide, hidden, False),
        **linear("mlp.up_proj", wide, hidden, False),
        **linear("mlp.down_proj", hidden, wide, False),
    }
    for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes |= scale(f"{place}_layernorm", wide)
    return shapes
