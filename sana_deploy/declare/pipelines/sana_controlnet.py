"""`SanaControlNetPipeline` of diffusers: Gemma 2, DC-AE, SANA's transformer, and a ControlNet of its first blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats import DTYPE_BYTES, Dtype
from ..workload import VAE_FACTOR, Request, Workload
from .base import (
    Call,
    ComponentDescription,
    Configs,
    Crossing,
    LayeredResults,
    PipelineDescription,
    SchedulerDescription,
    SteadyChain,
)

MAX_TOKENS = 300
"""SANA's prompt length in tokens, the pipeline's `max_sequence_length`."""
INSTRUCTION_TOKENS = 199
"""Estimate of the instruction that the pipeline puts before the prompt: its words and punctuation marks."""
INSTRUCTION_BYTES = 1058
"""The same for a byte-level vocabulary such as `tiny`'s."""
_DENOISER_KEYS = ("num_attention_heads", "attention_head_dim", "num_layers", "mlp_ratio", "sample_size", "patch_size")

_CAPTION = SteadyChain("encoder_hidden_states", "caption_projection", "caption_norm")


def _prompt_tokens(configs: Configs) -> int:
    """Length of the padded prompt with its instruction: the pipeline cuts both to the instruction + 300 - 2 tokens."""
    byte_level = int(configs["text_encoder"]["vocab_size"]) < 1000
    return (INSTRUCTION_BYTES if byte_level else INSTRUCTION_TOKENS) + MAX_TOKENS - 2


def crossings(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> tuple[Crossing, ...]:
    """Tensors between components, in bytes; the denoising loop lives with the transformer."""
    item = {name: DTYPE_BYTES[dtype] for name, dtype in dtypes.items()}
    rows = workload.rows
    cells = workload.height * workload.width // VAE_FACTOR**2
    channels = int(configs["vae"]["latent_channels"])
    hidden = int(configs["text_encoder"]["hidden_size"])
    text, vae, net = item["text_encoder"], item["vae"], item["controlnet"]
    heads = configs["controlnet"]
    layers = int(heads["num_layers"])
    residual = int(heads["num_attention_heads"]) * int(heads["attention_head_dim"]) * layers
    # Residual i, counted from 0, is added after block i + 1 of the transformer.
    needed = min(1.0, (layers + 1) / int(configs["transformer"]["num_layers"]))
    pixels = 3 * workload.height * workload.width
    # The pipeline casts the prompt embeddings anew in each step, unless they can be cast before (`run/place.py`).
    recast = dtypes["controlnet"] not in (dtypes["text_encoder"], dtypes["transformer"])
    tokens = _prompt_tokens(configs) + (MAX_TOKENS if workload.guided else 0)
    return (
        Crossing("input_ids", "transformer", "text_encoder", 8 * tokens, False, "encode"),
        Crossing("attention_mask", "transformer", "text_encoder", 8 * tokens, False, "encode"),
        Crossing("prompt_embeds", "text_encoder", "transformer", hidden * text * tokens, False, "encode"),
        Crossing("control_image", "transformer", "vae", pixels * rows * vae, False, "prepare"),
        Crossing("control_latents", "vae", "transformer", channels * cells * rows * vae, False, "prepare"),
        Crossing("hidden_states", "transformer", "controlnet", channels * cells * rows * net, True),
        Crossing("encoder_hidden_states", "transformer", "controlnet", MAX_TOKENS * hidden * rows * net, recast),
        Crossing("encoder_attention_mask", "transformer", "controlnet", MAX_TOKENS * rows * 8, False),
        Crossing("controlnet_cond", "transformer", "controlnet", channels * cells * rows * vae, False),
        Crossing("timestep", "transformer", "controlnet", rows * 8, True),
        Crossing("controlnet_block_samples", "controlnet", "transformer", residual * cells * rows * net, True,
                 pieces=layers, needed=needed),
        Crossing("latents", "transformer", "vae", channels * cells * workload.batch * vae, False, "decode"),
    )  # fmt: skip


def second_half(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> tuple[Crossing, ...]:
    """Tensors between the transformer and its unit 1, in bytes: half of the rows of a guided step."""
    item = DTYPE_BYTES[dtypes["transformer"]]
    rows = workload.rows // 2
    latents = int(configs["vae"]["latent_channels"]) * workload.height * workload.width // VAE_FACTOR**2 * rows * item
    hidden = int(configs["text_encoder"]["hidden_size"])
    # As for the ControlNet: what the pipeline casts anew in each step is sent in each step.
    recast = dtypes["transformer"] not in (dtypes["text_encoder"], dtypes["controlnet"])
    return (
        Crossing("hidden_states", "transformer", "transformer.1", latents, True),
        Crossing("encoder_hidden_states", "transformer", "transformer.1", MAX_TOKENS * hidden * rows * item, recast),
        Crossing("encoder_attention_mask", "transformer", "transformer.1", MAX_TOKENS * rows * 8, False),
        Crossing("timestep", "transformer", "transformer.1", rows * 8, True),
        Crossing("noise_pred", "transformer.1", "transformer", latents, True),
    )


def arguments(request: Request, workload: Workload, control_image: Any) -> dict[str, Any]:
    """What a call of the pipeline gets; the control image is of the workload's size."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "control_image": control_image,
        "controlnet_conditioning_scale": request.conditioning_scale,
        "height": workload.height,
        "width": workload.width,
        "num_images_per_prompt": workload.batch,
        "num_inference_steps": workload.steps,
        "guidance_scale": request.guidance_scale,
        "use_resolution_binning": False,
    }


def together(requests: Sequence[Request], workload: Workload, control_images: Sequence[Any]) -> dict[str, Any]:
    """What one call of the pipeline gets for several requests with the same scales, a picture each."""
    return {
        **arguments(requests[0], workload, list(control_images)),
        "prompt": [one.prompt for one in requests],
        "negative_prompt": [one.negative_prompt for one in requests],
        "num_images_per_prompt": 1,
    }


SANA_CONTROLNET = PipelineDescription(
    class_name="SanaControlNetPipeline",
    title="SANA ControlNet pipeline",
    components=(
        ComponentDescription(
            name="text_encoder",
            role="text_encoder",
            library="transformers",
            class_name="Gemma2Model",
            # Gemma's own config names the class with the (tied, unstored) language head; the pipeline loads the body.
            aliases=("Gemma2ForCausalLM",),
            config_keys=("hidden_size", "intermediate_size", "head_dim", "vocab_size"),
            calls=(
                Call(
                    "forward",
                    "encode",
                    output="prompt_embeds",
                    input="input_ids",
                    besides=("attention_mask",),
                    reads=("last_hidden_state",),
                    spares=(("use_cache", False),),
                ),
            ),
            fragile="Gemma 2's activations exceed float16's range",
            graphed=True,
        ),
        ComponentDescription(
            name="vae",
            role="vae",
            library="diffusers",
            class_name="AutoencoderDC",
            config_keys=("encoder_block_out_channels", "decoder_block_out_channels", "latent_channels"),
            calls=(
                Call("forward", None, output="sample"),
                Call("encode", "prepare", output="control_latents", input="control_image"),
                Call("decode", "decode", output="image", input="latents", keeps=True),  # pixels go to the host next
            ),
            unquantized="the vae is convolutions, quantization is of linear layers",
            fragile="the decoder's activations exceed float16's range",
        ),
        ComponentDescription(
            name="transformer",
            role="denoiser",
            library="diffusers",
            class_name="SanaTransformer2DModel",
            config_keys=_DENOISER_KEYS,
            calls=(Call("forward", "denoise", output="noise_pred"),),
            compiled=("transformer_blocks",),
            graphed=True,
            chains=(_CAPTION,),
        ),
        ComponentDescription(
            name="controlnet",
            role="controlnet",
            library="diffusers",
            class_name="SanaControlNetModel",
            config_keys=_DENOISER_KEYS,
            calls=(Call("forward", "denoise", output="controlnet_block_samples", factors=("conditioning_scale",)),),
            layered=LayeredResults("transformer_blocks", "controlnet_blocks", scale="conditioning_scale"),
            compiled=("transformer_blocks",),
            graphed=True,
            chains=(_CAPTION, SteadyChain("controlnet_cond", "patch_embed", "input_block")),
        ),
    ),
    scheduler=SchedulerDescription(
        "DPMSolverMultistepScheduler",
        (("prediction_type", "flow_prediction"), ("use_flow_sigmas", True), ("flow_shift", 3.0)),
    ),
    crossings=crossings,
    arguments=arguments,
    together=together,
    steady=("encoder_hidden_states", "encoder_attention_mask", "controlnet_cond"),
    repeated=("control_image", "control_latents"),
    waiting=("controlnet_block_samples",),
    apart=("controlnet",),
    second_half=second_half,
)
