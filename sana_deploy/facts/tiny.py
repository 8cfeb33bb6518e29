"""The `tiny` checkpoint: SANA ControlNet's architecture with small seeded random weights, made on first use.

Everything a published checkpoint holds is there (model_index, configs, safetensors, tokenizer, scheduler), so
the real loading code runs on it. Finding it imports nothing heavy; only making it needs torch.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import cache_root
from ..declare.pipelines import SANA_CONTROLNET
from ..errors import InputError

if TYPE_CHECKING:
    from torch import nn

RECIPE = 1
"""Raised when the architecture or seeding below changes, so that an older cached folder is not taken."""

SEED = 20240

_TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 4096,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_DENOISER: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 48,
    "cross_attention_dim": 192,
    "caption_channels": 256,
    "mlp_ratio": 2.5,
    "sample_size": 16,
}
_VAE: dict[str, Any] = {
    "latent_channels": 32,
    "attention_head_dim": 16,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [8, 16, 16, 32, 64, 64],
    "decoder_block_out_channels": [8, 16, 16, 32, 64, 64],
    "encoder_layers_per_block": [1, 1, 1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


def ensure_tiny(cache_dir: str | None = None) -> Path:
    """Return the folder of the tiny checkpoint, making it first if it is not there.

    It is written under a temporary name and renamed, so that two processes can race and none sees half of it.

    Raises:
        InputError: the cache folder cannot be written.
    """
    folder = cache_root(cache_dir) / f"tiny-{RECIPE}"
    if (folder / "model_index.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as problem:
        raise InputError(
            f"the cache folder {folder.parent} cannot be written: {problem.strerror}",
            where="model.cache_dir",
            hint="name a folder you can write: model.cache_dir=FOLDER",
        ) from problem
    try:
        _write(draft)
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError:
        if not (folder / "model_index.json").is_file():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    import diffusers
    import torch
    from diffusers import AutoencoderDC, SanaControlNetModel, SanaControlNetPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        controlnet = SanaControlNetModel(**_DENOISER, num_layers=2)
        _open_zero_layers(controlnet)
        pipeline = SanaControlNetPipeline(
            tokenizer=byte_tokenizer(),
            text_encoder=Gemma2Model(Gemma2Config(**_TEXT_ENCODER)),
            vae=AutoencoderDC(**_VAE),
            transformer=SanaTransformer2DModel(**_DENOISER, num_layers=5),
            controlnet=controlnet,
            scheduler=SANA_CONTROLNET.scheduler.make(diffusers),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)


def _open_zero_layers(controlnet: nn.Module) -> None:
    """Give the zero-initialised projections weights, as training would: residuals of zero steer nothing."""
    from torch import nn

    for layer in (controlnet.input_block, *controlnet.controlnet_blocks):  # type: ignore[misc]
        nn.init.xavier_uniform_(layer.weight)


def byte_tokenizer() -> Any:
    """Build a tokenizer with one token per UTF-8 byte, behind Gemma's <pad>, <eos> and <bos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
