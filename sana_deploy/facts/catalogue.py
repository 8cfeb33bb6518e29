"""Architectures whose configs ship with the package, so that they can be planned with nothing downloaded.

`python -m sana_deploy.facts.catalogue` writes `architectures/*.json` anew from diffusers' and transformers' own classes
on the meta device; a test checks that they are current. Dimensions: SANA (https://arxiv.org/abs/2410.10629), the
ControlNet's from diffusers' scripts/convert_sana_controlnet_to_diffusers.py, Gemma 2 2B's and DC-AE f32c32's from
their published configs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

from ..declare.pipelines import Phase
from .shapes import buffers, linears, shapes_digest

FOLDER = Path(__file__).parent / "architectures"

_GEMMA_2_2B: dict[str, Any] = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
_DC_AE_F32C32: dict[str, Any] = {
    "latent_channels": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
_WIDTHS: dict[str, dict[str, int]] = {
    "sana_600m_controlnet": {
        "num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32,
        "num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152,
    },
    "sana_1600m_controlnet": {
        "num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32,
        "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    },
}  # fmt: skip
CONTROLNET_LAYERS = 7
NAMES = tuple(_WIDTHS)


@cache
def load(name: str) -> dict[str, Any]:
    """Return the shipped facts of one architecture: component -> class, config, sizes."""
    return cast("dict[str, Any]", json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


@cache
def calibrated() -> dict[str, dict[Phase, Any]]:
    """Return what shipped components need, by `Checkpoint.needs_key`: phase -> format -> guidance."""
    found: dict[str, dict[Phase, Any]] = {}
    for path in sorted(FOLDER.glob("*.needs.json")):
        for part in json.loads(path.read_text(encoding="utf-8")).values():
            found[part["key"]] = part["needs"]
    return found


def build(name: str) -> dict[str, Any]:
    """Work out the facts of one architecture from the libraries' own classes; imports torch."""
    import torch
    from diffusers import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    with torch.device("meta"):
        modules = {
            "text_encoder": Gemma2Model(Gemma2Config(**_GEMMA_2_2B)),
            "vae": AutoencoderDC(**_DC_AE_F32C32),
            "transformer": SanaTransformer2DModel(**_WIDTHS[name]),
            "controlnet": SanaControlNetModel(**{**_WIDTHS[name], "num_layers": CONTROLNET_LAYERS}),
        }
    return {part: _facts(part, module) for part, module in modules.items()}


def _facts(name: str, module: Any) -> dict[str, Any]:
    config = json.loads(module.config.to_json_string()) if name == "text_encoder" else dict(module.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    cast, kept = buffers(type(module).__name__, config)
    shapes = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    return {
        "class_name": type(module).__name__,
        "config": config,
        "parameters": sum(tensor.numel() for tensor in module.parameters()) + cast,
        "fixed_bytes": kept,
        "shapes_digest": shapes_digest(shapes),
        "linears": asdict(linears(shapes)),
    }


def main() -> None:
    """Write every architecture file anew."""
    FOLDER.mkdir(exist_ok=True)
    for name in _WIDTHS:
        text = json.dumps(build(name), indent=1, sort_keys=True) + "\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
