"""What a dtype policy promises, and what a GPU can really compute."""

from __future__ import annotations

from collections.abc import Mapping

from .machine import Gpu
from .spec import Component, Dtype

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


def is_native(dtype: Dtype, gpu: Gpu) -> bool:
    """Whether `gpu` computes in `dtype` without emulation."""
    return gpu.capability >= NATIVE_FROM[dtype]


def fragile_components(dtypes: Mapping[Component, Dtype]) -> list[Component]:
    """Return the components that `dtypes` puts in float16 although they are documented not to survive it."""
    return [name for name in FRAGILE if dtypes[name] == "float16"]
