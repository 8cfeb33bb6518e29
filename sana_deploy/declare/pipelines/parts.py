"""What the pipelines of the SANA family have in common: components, tensors between them, arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..formats import DTYPE_BYTES, Dtype
from ..workload import VAE_FACTOR, Request, Workload
from .base import Call, ComponentDescription, Configs, Crossing, Layers, SchedulerDescription, SteadyChain
from .layers import Deal

MAX_TOKENS = 300
"""SANA's prompt length in tokens, the pipelines' `max_sequence_length`."""
INSTRUCTION_TOKENS = 199
"""Estimate of the instruction that the pipelines put before the prompt: its words and punctuation marks."""
INSTRUCTION_BYTES = 1058
"""The same for a byte-level vocabulary such as `tiny`'s."""
MODULATION = 6
"""Vectors as wide as the transformer that a timestep becomes, for each row."""

DENOISER_KEYS = ("num_attention_heads", "attention_head_dim", "num_layers", "mlp_ratio", "sample_size", "patch_size")


def hidden_size(config: Mapping[str, Any]) -> int:
    """Numbers of a token in a transformer or ControlNet."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


CAPTION = SteadyChain(
    "encoder_hidden_states", "caption_projection", "caption_norm", lambda config, _: MAX_TOKENS * hidden_size(config)
)
STEADY = ("encoder_hidden_states", "encoder_attention_mask")


def prompt_tokens(configs: Configs) -> int:
    """Length of the padded prompt with its instruction: the pipeline cuts both to the instruction + 300 - 2 tokens."""
    byte_level = int(configs["text_encoder"]["vocab_size"]) < 1000
    return (INSTRUCTION_BYTES if byte_level else INSTRUCTION_TOKENS) + MAX_TOKENS - 2


def text_encoder_layers(
    configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype], deal: Deal
) -> tuple[Crossing, ...]:
    """What the second unit of the text encoder gets and returns, in bytes: for each prompt by itself.

    Layers with and without a sliding window have a mask each, and take turns.
    """
    config, size = configs["text_encoder"], DTYPE_BYTES[dtypes["text_encoder"]]
    lengths = [prompt_tokens(configs)] + [MAX_TOKENS] * deal.negative
    tokens, masks = sum(lengths), min(2, int(config["num_hidden_layers"]) - deal.first)
    hidden = int(config["hidden_size"]) * tokens * size
    angles = 2 * int(config["head_dim"]) * tokens * size
    first, second, calls = "text_encoder", "text_encoder.1", len(lengths)
    return (
        Crossing("hidden_states", first, second, hidden, False, "encode", copies=calls),
        Crossing("attention_mask", first, second, masks * size * sum(n**2 for n in lengths), False, "encode",
                 copies=masks * calls),
        Crossing("position_embeddings", first, second, angles, False, "encode", copies=2 * calls),
        Crossing("position_ids", first, second, 8 * tokens, False, "encode", copies=calls),
        Crossing("hidden_states", second, first, hidden, False, "encode", copies=calls),
    )  # fmt: skip


def transformer_layers(
    configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype], deal: Deal
) -> tuple[Crossing, ...]:
    """What the second unit of the transformer gets and returns in a step, in bytes; also residuals of a ControlNet."""
    config, size = configs["transformer"], DTYPE_BYTES[dtypes["transformer"]]
    width = hidden_size(config)
    cells = workload.height * workload.width // (VAE_FACTOR * int(config["patch_size"])) ** 2
    hidden, row = width * cells * deal.rows * size, deal.rows * size
    first, second = "transformer", "transformer.1"
    # Residual i, counted from 0, is added after block i + 1; the result of the last block is at home again.
    count = int(configs["controlnet"]["num_layers"]) if "controlnet" in configs else 0
    late = max(0, min(count, int(config["num_layers"]) - 2) - max(0, deal.first - 1))
    residuals = Crossing("controlnet_block_samples", first, second, late * hidden, True, copies=late)
    return (
        Crossing("hidden_states", first, second, hidden, True),
        Crossing("encoder_hidden_states", first, second, MAX_TOKENS * width * row, True),
        Crossing("encoder_attention_mask", first, second, MAX_TOKENS * row, True),
        Crossing("timestep", first, second, MODULATION * width * row, True),
        *([residuals] if late else []),
        Crossing("hidden_states", second, first, hidden, True),
    )


TEXT_ENCODER = ComponentDescription(
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
    layers=Layers("layers", "num_hidden_layers", text_encoder_layers),
)

# Pixels go to the host next.
_DECODE = Call("decode", "decode", output="image", input="latents", keeps=True, graphed=True)
VAE = ComponentDescription(
    name="vae",
    role="vae",
    library="diffusers",
    class_name="AutoencoderDC",
    config_keys=("encoder_block_out_channels", "decoder_block_out_channels", "latent_channels"),
    calls=(Call("forward", None, output="sample"), Call("encode", None, output="latents", input="image"), _DECODE),
    unquantized="the vae is convolutions, quantization is of linear layers",
    fragile="the decoder's activations exceed float16's range",
)
"""The VAE of a pipeline that encodes nothing."""

TRANSFORMER = ComponentDescription(
    name="transformer",
    role="denoiser",
    library="diffusers",
    class_name="SanaTransformer2DModel",
    config_keys=DENOISER_KEYS,
    calls=(Call("forward", "denoise", output="noise_pred"),),
    compiled=("transformer_blocks",),
    graphed=True,
    chains=(CAPTION,),
    demands=(("guidance_embeds", False),),
    layers=Layers("transformer_blocks", "num_layers", transformer_layers, added="controlnet_block_samples"),
)
SPRINT_TRANSFORMER = replace(TRANSFORMER, demands=(("guidance_embeds", True),))

FLOW_SCHEDULER = SchedulerDescription(
    "DPMSolverMultistepScheduler",
    (("prediction_type", "flow_prediction"), ("use_flow_sigmas", True), ("flow_shift", 3.0)),
)
SPRINT_SCHEDULER = SchedulerDescription("SCMScheduler", (("prediction_type", "trigflow"), ("sigma_data", 0.5)), True)


def encoding_vae(image: str, latents: str) -> ComponentDescription:
    """The VAE of a pipeline that encodes an image; both names are what reports call the tensors."""
    encode = Call("encode", "prepare", output=latents, input=image, graphed=True)
    return replace(VAE, calls=(VAE.calls[0], encode, _DECODE))


def latents_bytes(configs: Configs, workload: Workload, rows: int, dtype: Dtype) -> int:
    """Bytes of so many rows of latents."""
    cells = workload.height * workload.width // VAE_FACTOR**2
    return int(configs["vae"]["latent_channels"]) * cells * rows * DTYPE_BYTES[dtype]


def prompt_crossings(configs: Configs, dtypes: Mapping[str, Dtype], negative: bool) -> tuple[Crossing, ...]:
    """What enters and leaves the text encoder, for a prompt and, if there is one, a negative prompt."""
    tokens = prompt_tokens(configs) + (MAX_TOKENS if negative else 0)
    embeds = int(configs["text_encoder"]["hidden_size"]) * DTYPE_BYTES[dtypes["text_encoder"]] * tokens
    return (
        Crossing("input_ids", "transformer", "text_encoder", 8 * tokens, False, "encode"),
        Crossing("attention_mask", "transformer", "text_encoder", 8 * tokens, False, "encode"),
        Crossing("prompt_embeds", "text_encoder", "transformer", embeds, False, "encode"),
    )


def decode_crossing(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> Crossing:
    """The latents that the VAE decodes; pixels go to the host from where it is."""
    size = latents_bytes(configs, workload, workload.batch, dtypes["vae"])
    return Crossing("latents", "transformer", "vae", size, False, "decode")


def plain_crossings(configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype]) -> tuple[Crossing, ...]:
    """Tensors between components of a pipeline whose transformer works alone, with classifier-free guidance."""
    return (*prompt_crossings(configs, dtypes, workload.guided), decode_crossing(configs, workload, dtypes))


def half_crossings(
    configs: Configs, workload: Workload, dtypes: Mapping[str, Dtype], timestep: int = 4, recast: bool = False
) -> tuple[Crossing, ...]:
    """Tensors between the transformer and its unit 1, in bytes: half of the rows of a guided step.

    Args:
        timestep: bytes of a row's timestep: a pipeline that scales it makes it float32, else it is an integer.
        recast: the pipeline casts the prompt embeddings anew in each step, so that they are sent in each step.
    """
    rows, dtype = workload.batch, dtypes["transformer"]
    latents = latents_bytes(configs, workload, rows, dtype)
    embeds = MAX_TOKENS * int(configs["text_encoder"]["hidden_size"]) * rows * DTYPE_BYTES[dtype]
    return (
        Crossing("hidden_states", "transformer", "transformer.1", latents, True),
        Crossing("encoder_hidden_states", "transformer", "transformer.1", embeds, recast),
        Crossing("encoder_attention_mask", "transformer", "transformer.1", MAX_TOKENS * rows * 8, False),
        Crossing("timestep", "transformer", "transformer.1", rows * timestep, True),
        Crossing("noise_pred", "transformer.1", "transformer", latents, True),
    )


def common_arguments(request: Request, workload: Workload) -> dict[str, Any]:
    """What a call of any of these pipelines gets."""
    return {
        "prompt": request.prompt,
        "height": workload.height,
        "width": workload.width,
        "num_images_per_prompt": workload.batch,
        "num_inference_steps": workload.steps,
        "guidance_scale": request.guidance_scale,
        "use_resolution_binning": False,
    }
