"""Published SANA models: which modules each consists of, with the configs of these, and where they were read.

The weights are in repositories of https://huggingface.co/Efficient-Large-Model in diffusers' format. What their
`transformer/config.json` says was read in four places, which agree:

- [script] huggingface/diffusers, `scripts/convert_sana_to_diffusers.py` at 065628f, which made them (`model_kwargs`,
  `transformer_kwargs`, `interpolation_scale`); the ControlNet's is `scripts/convert_sana_controlnet_to_diffusers.py`.
- [training] NVlabs/Sana, `configs/`, what each was trained with: depth, `qk_norm`, `use_pe`, `cfg_embed`, the VAE.
- [sizes] the hub's listings of files: a config of these keys and values has the size of the published file to the byte
  (496 bytes at 512 and 1024 px, 526 at 2K), and the parameters counted here that of the published weights.
- [report] hlky/dinoml_v2, "Diffusers Sana Operator and Integration Report" at 6b8c0ac, which tabulates the published
  configs of the 1024 px and 4K models, of SANA-1.5 and of Sprint.

All have Gemma 2 2B (gemma-2-2b-it: `text_encoder_name` in [training], a width of 2304 in each config) and DC-AE f32c32.
The VAE's config is that of mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers; 1.1, which Sprint was trained with and [script]
now puts into all, has other weights of its decoder in the same architecture
(mit-han-lab/efficientvit, `applications/dc_ae/README.md`: "Improved decoder from dc-ae-f32c32-sana-1.0").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

_GEMMA_2_2B: Config = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
_DC_AE_F32C32: Config = {
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
_600M: Config = {
    "num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32,
    "num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152,
}  # fmt: skip
_1600M: Config = {
    "num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
}  # fmt: skip
_NORMED: Config = {"qk_norm": "rms_norm_across_heads"}
_SPRINT: Config = {**_NORMED, "guidance_embeds": True}

MODULES: dict[str, tuple[str, Config]] = {
    "gemma_2_2b": ("Gemma2Model", _GEMMA_2_2B),
    "dc_ae_f32c32": ("AutoencoderDC", _DC_AE_F32C32),
    "sana_600m": ("SanaTransformer2DModel", _600M),
    "sana_600m_512": ("SanaTransformer2DModel", {**_600M, "sample_size": 16}),
    "sana_1600m": ("SanaTransformer2DModel", _1600M),
    "sana_1600m_512": ("SanaTransformer2DModel", {**_1600M, "sample_size": 16}),
    # [training] use_pe: true, pe_interpolation: 1. in configs/sana_config/2048ms, 2. in 4096ms. Positions are added to
    # the latents: a step moves 0.4 % more bytes and no peak changes, so that the needs are those of the 1024 px model.
    "sana_1600m_2k": ("SanaTransformer2DModel", {**_1600M, "sample_size": 64, "interpolation_scale": 1.0}),
    "sana_1600m_4k": ("SanaTransformer2DModel", {**_1600M, "sample_size": 128, "interpolation_scale": 2.0}),
    "sana15_1600m": ("SanaTransformer2DModel", {**_1600M, **_NORMED}),
    "sana15_4800m": ("SanaTransformer2DModel", {**_1600M, **_NORMED, "num_layers": 60}),
    "sana_sprint_600m": ("SanaTransformer2DModel", {**_600M, **_SPRINT}),
    "sana_sprint_1600m": ("SanaTransformer2DModel", {**_1600M, **_SPRINT}),
    "sana_600m_controlnet": ("SanaControlNetModel", {**_600M, "num_layers": 7}),
    "sana_1600m_controlnet": ("SanaControlNetModel", {**_1600M, "num_layers": 7}),
}
"""Modules by the name of their file in `architectures/`: class and config, without what is the class's default."""


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        pipeline: the class in diffusers that its `model_index.json` names.
        denoising: what works in every step, of MODULES: its transformer, and a ControlNet.
        read: where the configs of these were read; the module's docstring says what the words mean.
    """

    pipeline: str
    denoising: tuple[str, ...]
    read: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules, of MODULES."""
        return ("gemma_2_2b", "dc_ae_f32c32", *self.denoising)


PUBLISHED: dict[str, Published] = {
    "sana_600m": Published("SanaPipeline", ("sana_600m",), ("script", "training")),
    "sana_600m_512": Published("SanaPipeline", ("sana_600m_512",), ("script", "training")),
    "sana_1600m": Published("SanaPipeline", ("sana_1600m",), ("script", "training", "sizes", "report")),
    "sana_1600m_512": Published("SanaPipeline", ("sana_1600m_512",), ("script", "training", "sizes")),
    "sana_1600m_2k": Published("SanaPipeline", ("sana_1600m_2k",), ("script", "training", "sizes")),
    "sana_1600m_4k": Published("SanaPipeline", ("sana_1600m_4k",), ("script", "training", "report")),
    "sana15_1600m": Published("SanaPipeline", ("sana15_1600m",), ("script", "training", "report")),
    "sana15_4800m": Published("SanaPipeline", ("sana15_4800m",), ("script", "training", "report")),
    "sana_sprint_600m": Published("SanaSprintPipeline", ("sana_sprint_600m",), ("script", "training", "report")),
    "sana_sprint_1600m": Published("SanaSprintPipeline", ("sana_sprint_1600m",), ("script", "training", "report")),
    "sana_600m_controlnet": Published("SanaControlNetPipeline", ("sana_600m", "sana_600m_controlnet"), ("script",)),
    "sana_1600m_controlnet": Published("SanaControlNetPipeline", ("sana_1600m", "sana_1600m_controlnet"), ("script",)),
}
"""Models by the name that `model.name` gives them; their repositories are in `conf/model/`."""
