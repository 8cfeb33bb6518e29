"""The dtype policies by name, what they promise, and which components do not survive float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .formats import Dtype, Format, Quantization
from .pipelines import Component, PipelineDescription, Role

POLICIES: Mapping[str, Mapping[Role, Dtype]] = {
    "mixed_bf16": {"text_encoder": "bfloat16", "vae": "bfloat16", "denoiser": "float16", "controlnet": "float16"},
    "mixed_fp32": {"text_encoder": "float32", "vae": "float32", "denoiser": "float16", "controlnet": "float16"},
    "bf16": {"text_encoder": "bfloat16", "vae": "bfloat16", "denoiser": "bfloat16", "controlnet": "bfloat16"},
    "fp32": {"text_encoder": "float32", "vae": "float32", "denoiser": "float32", "controlnet": "float32"},
    "fp16": {"text_encoder": "float16", "vae": "float16", "denoiser": "float16", "controlnet": "float16"},
}
"""The policies of `conf/precision/` by role, for hints; a test keeps both alike."""

QUANTIZERS: Mapping[Quantization, tuple[str, ...]] = {"int8": ("torchao",), "nf4": ("torchao", "bitsandbytes")}
"""Distributions that a quantisation needs, each an extra of the same name."""


class QuantizedPolicy(NamedTuple):
    """A policy of `conf/precision/` with quantised weights: the one whose dtypes it computes in, and which are kept."""

    dtypes: str
    kept: Mapping[Role, Quantization]


QUANTIZED: Mapping[str, QuantizedPolicy] = {
    "int8_text_encoder": QuantizedPolicy("mixed_bf16", {"text_encoder": "int8"}),
    "int8": QuantizedPolicy("bf16", {"text_encoder": "int8", "denoiser": "int8", "controlnet": "int8"}),
    "nf4": QuantizedPolicy("bf16", {"text_encoder": "nf4", "denoiser": "nf4", "controlnet": "nf4"}),
}
"""Policies with quantised weights, least changing first; the same test keeps both alike."""


def dtypes_of(policy: str, pipeline: PipelineDescription) -> dict[Component, Dtype]:
    """The dtype of each component of `pipeline` under a policy of POLICIES."""
    return {part.name: POLICIES[policy][part.role] for part in pipeline.components}


def quantization_of(policy: str, pipeline: PipelineDescription) -> dict[Component, Quantization]:
    """The components of `pipeline` that a policy keeps quantised; empty for one that quantises nothing."""
    kept = QUANTIZED[policy].kept if policy in QUANTIZED else {}
    return {part.name: kept[part.role] for part in pipeline.components if part.role in kept}


def fragile_components(dtypes: Mapping[Component, Dtype], pipeline: PipelineDescription) -> list[Component]:
    """Return the components that `dtypes` puts in float16 although they are documented not to survive it."""
    return [part.name for part in pipeline.components if part.fragile and dtypes[part.name] == "float16"]


def overflowing_components(formats: Mapping[Component, Format]) -> list[Component]:
    """Return the components whose int8 products are summed in float16 before they are scaled: up to 127 x larger."""
    return [name for name, form in formats.items() if form == Format("float16", "int8")]
