"""`SanaControlNetPipeline` of diffusers: Gemma 2, DC-AE, SANA's transformer, and a ControlNet of its first blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import DTYPE_BYTES, Dtype
from ..workload import VAE_FACTOR, Request, Workload
from . import sana
from .base import (
    Call,
    ComponentDescription,
    Configs,
    Crossing,
    ImageInput,
    LayeredResults,
    PipelineDescription,
    SteadyChain,
)
from .parts import (
    CAPTION,
    DENOISER_KEYS,
    FLOW_SCHEDULER,
    MAX_TOKENS,
    STEADY,
    TEXT_ENCODER,
    TRANSFORMER,
    decode_crossing,
    encoding_vae,
    half_crossings,
    hidden_size,
    latents_bytes,
    prompt_crossings,
)
from .sana_rows import RowUnits


def crossings(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> tuple[Crossing, ...]:
    """Tensors between components, in bytes; the denoising loop lives with the transformer."""
    rows = workload.batch * (2 if workload.guided else 1)
    cells = workload.height * workload.width // VAE_FACTOR**2
    vae, net = (DTYPE_BYTES[dtypes[name]] for name in ("vae", "controlnet"))
    heads = configs["controlnet"]
    layers = int(heads["num_layers"])
    residual = hidden_size(heads) * layers
    # Residual i, counted from 0, is added after block i + 1 of the transformer.
    needed = min(1.0, (layers + 1) / int(configs["transformer"]["num_layers"]))
    control = latents_bytes(configs, workload, rows, dtypes["vae"])
    # The pipeline casts the prompt embeddings anew in each step, unless they can be cast before (`run/place.py`).
    recast = dtypes["controlnet"] not in (dtypes["text_encoder"], dtypes["transformer"])
    embeds = MAX_TOKENS * int(configs["text_encoder"]["hidden_size"]) * rows * net
    return (
        *prompt_crossings(configs, dtypes, workload.guided),
        Crossing("control_image", "transformer", "vae", 3 * workload.height * workload.width * rows * vae, False,
                 "prepare"),
        Crossing("control_latents", "vae", "transformer", control, False, "prepare"),
        Crossing("hidden_states", "transformer", "controlnet",
                 latents_bytes(configs, workload, rows, dtypes["controlnet"]), True),
        Crossing("encoder_hidden_states", "transformer", "controlnet", embeds, recast),
        Crossing("encoder_attention_mask", "transformer", "controlnet", MAX_TOKENS * rows * 8, False),
        Crossing("controlnet_cond", "transformer", "controlnet", control, False),
        Crossing("timestep", "transformer", "controlnet", rows * 8, True),
        Crossing("controlnet_block_samples", "controlnet", "transformer", residual * cells * rows * net, True,
                 pieces=layers, needed=needed),
        decode_crossing(configs, workload, dtypes),
    )  # fmt: skip


def second_half(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> tuple[Crossing, ...]:
    """Tensors between the transformer and its unit 1, in bytes: half of the rows of a guided step."""
    # As for the ControlNet: what the pipeline casts anew in each step is sent in each step.
    recast = dtypes["transformer"] not in (dtypes["text_encoder"], dtypes["controlnet"])
    return half_crossings(configs, workload, dtypes, 8, recast)


def arguments(request: Request, workload: Workload, control_image: Any) -> dict[str, Any]:
    """What a call of the pipeline gets; the control image is of the workload's size."""
    return {
        **sana.arguments(request, workload, None),
        "control_image": control_image,
        "controlnet_conditioning_scale": request.conditioning_scale,
    }


def together(requests: Sequence[Request], workload: Workload, control_images: Sequence[Any]) -> dict[str, Any]:
    """What one call of the pipeline gets for several requests with the same scales, a picture each."""
    return {
        **sana.together(requests, workload, control_images),
        "control_image": list(control_images),
        "controlnet_conditioning_scale": requests[0].conditioning_scale,
    }


def _image_numbers(config: Mapping[str, Any], workload: Workload) -> int:
    """Numbers of the embedded control image."""
    token = VAE_FACTOR * int(config["patch_size"])
    return workload.height * workload.width // token**2 * hidden_size(config)


CONTROLNET = ComponentDescription(
    name="controlnet",
    role="controlnet",
    library="diffusers",
    class_name="SanaControlNetModel",
    config_keys=DENOISER_KEYS,
    calls=(Call("forward", "denoise", output="controlnet_block_samples", factors=("conditioning_scale",)),),
    layered=LayeredResults("transformer_blocks", "controlnet_blocks", scale="conditioning_scale"),
    compiled=("transformer_blocks",),
    graphed=True,
    chains=(CAPTION, SteadyChain("controlnet_cond", "patch_embed", "input_block", _image_numbers)),
)
SANA_CONTROLNET = PipelineDescription(
    class_name="SanaControlNetPipeline",
    title="SANA ControlNet pipeline",
    components=(TEXT_ENCODER, encoding_vae("control_image", "control_latents"), TRANSFORMER, CONTROLNET),
    scheduler=FLOW_SCHEDULER,
    crossings=crossings,
    arguments=arguments,
    together=together,
    steady=(*STEADY, "controlnet_cond"),
    repeated=("control_image", "control_latents", "control_edge_rows", "control_attention_sums", "control_keys"),
    waiting=("controlnet_block_samples",),
    apart=("controlnet",),
    reads=("negative_prompt", "control_image", "control_fit", "conditioning_scale"),
    image=ImageInput("control image", optional=True, each_row=True),
    casts_prompt=True,
    second_half=second_half,
    bands=RowUnits(timestep_bytes=8, recast=True).bands,
)
