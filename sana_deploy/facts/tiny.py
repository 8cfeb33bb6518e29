"""The `tiny` checkpoints: each pipeline's architecture with small seeded random weights, made on first use.

Everything a published checkpoint holds is there (model_index, configs, safetensors, tokenizer, scheduler), so
the real loading code runs on it. Finding it imports nothing heavy; only making it needs torch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import cache_root
from ..declare.pipelines import DEFAULT, PipelineDescription, Role
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


def ensure_tiny(cache_dir: str | None = None, pipeline: PipelineDescription = DEFAULT) -> Path:
    """Return the folder of a pipeline's tiny checkpoint, making it first if it is not there.

    It is written under a temporary name and renamed, so that two processes can race and none sees half of it.

    Raises:
        InputError: the cache folder cannot be written.
    """
    own = "" if pipeline is DEFAULT else f"{pipeline.class_name}-"
    folder = cache_root(cache_dir) / f"tiny-{own}{RECIPE}"
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
        _write(pipeline, draft)
        draft.chmod(0o755)
        draft.rename(folder)
    except OSError:
        if not (folder / "model_index.json").is_file():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write(description: PipelineDescription, folder: Path) -> None:
    import diffusers
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        # A ControlNet comes first: the order decides which random numbers each gets.
        roles: list[Role] = ["controlnet", "text_encoder", "vae", "denoiser"]
        parts = {name: _MAKERS[role](description) for role in roles if (name := description.find(role))}
        pipeline = getattr(diffusers, description.class_name)(
            tokenizer=byte_tokenizer(), scheduler=description.scheduler.make(diffusers), **parts
        )
    pipeline.save_pretrained(folder, safe_serialization=True)


def _controlnet(_: PipelineDescription) -> Any:
    from diffusers import SanaControlNetModel

    controlnet = SanaControlNetModel(**_DENOISER, num_layers=2)
    _open_zero_layers(controlnet)
    return controlnet


def _text_encoder(_: PipelineDescription) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_TEXT_ENCODER))


def _vae(_: PipelineDescription) -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(**_VAE)


def _denoiser(description: PipelineDescription) -> Any:
    from diffusers import SanaTransformer2DModel

    own = dict(description.by_name[description.denoiser].demands)
    return SanaTransformer2DModel(**_DENOISER, num_layers=5, **own)


_MAKERS: dict[Role, Callable[[PipelineDescription], Any]] = {
    "controlnet": _controlnet,
    "text_encoder": _text_encoder,
    "vae": _vae,
    "denoiser": _denoiser,
}


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
