"""What a dtype policy promises, and what a GPU can really compute."""

from __future__ import annotations

from collections.abc import Mapping

from ..facts.machine import Gpu
from .spec import Component, Dtype, Format, Quantization

NATIVE_FROM: Mapping[Dtype, tuple[int, int]] = {"float32": (0, 0), "float16": (5, 3), "bfloat16": (8, 0)}
"""First compute capability with native arithmetic per dtype. bfloat16: CUDA C++ programming guide, arithmetic
instructions; cuDNN has bfloat16 convolutions from 8.0 on."""

FRAGILE: Mapping[Component, str] = {
    "text_encoder": "Gemma 2's activations exceed float16's range",
    "vae": "the decoder's activations exceed float16's range",
}
"""Components that diffusers' SANA documentation keeps out of float16, and why."""


def _policy(codec: Dtype, denoiser: Dtype) -> dict[Component, Dtype]:
    return {"text_encoder": codec, "vae": codec, "transformer": denoiser, "controlnet": denoiser}


POLICIES: Mapping[str, Mapping[Component, Dtype]] = {
    "mixed_bf16": _policy("bfloat16", "float16"),
    "mixed_fp32": _policy("float32", "float16"),
    "bf16": _policy("bfloat16", "bfloat16"),
    "fp32": _policy("float32", "float32"),
    "fp16": _policy("float16", "float16"),
}
"""The policies of `conf/precision/`, for hints; a test keeps both alike."""

QUANTIZERS: Mapping[Quantization, tuple[str, ...]] = {"int8": ("torchao",), "nf4": ("torchao", "bitsandbytes")}
"""Distributions that a quantisation needs, each an extra of the same name."""

_DENOISER_AND_TEXT: tuple[Component, ...] = ("text_encoder", "transformer", "controlnet")
QUANTIZED: Mapping[str, Mapping[Component, Quantization]] = {
    "int8_text_encoder": {"text_encoder": "int8"},
    "int8": dict.fromkeys(_DENOISER_AND_TEXT, "int8"),
    "nf4": dict.fromkeys(_DENOISER_AND_TEXT, "nf4"),
}
"""Policies of `conf/precision/` with quantised weights, least changing first; the same test keeps both alike."""
QUANTIZED_DTYPES: Mapping[str, str] = {"int8_text_encoder": "mixed_bf16", "int8": "bf16", "nf4": "bf16"}
"""The policy whose dtypes they compute in."""


def is_native(dtype: Dtype, gpu: Gpu) -> bool:
    """Whether `gpu` computes in `dtype` without emulation."""
    return gpu.capability >= NATIVE_FROM[dtype]


def fragile_components(dtypes: Mapping[Component, Dtype]) -> list[Component]:
    """Return the components that `dtypes` puts in float16 although they are documented not to survive it."""
    return [name for name in FRAGILE if dtypes[name] == "float16"]


def overflowing_components(formats: Mapping[Component, Format]) -> list[Component]:
    """Return the components whose int8 products are summed in float16 before they are scaled: up to 127 x larger."""
    return [name for name, form in formats.items() if form == Format("float16", "int8")]
