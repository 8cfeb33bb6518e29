"""Tensors that a checkpoint must hold: known from its config without torch, and compared before anything is loaded."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sana_deploy.declare.pipelines import COMPONENTS, SANA_CONTROLNET, Component
from sana_deploy.declare.spec import CheckpointModel, Overrides
from sana_deploy.errors import CheckpointError
from sana_deploy.facts import catalogue
from sana_deploy.facts.architectures import dc_ae, expected_shapes, gemma2, sana
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.published import MODULES
from sana_deploy.facts.shapes import shapes_digest

Cli = Callable[..., Any]
TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


def shapes_of(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        if name == "Gemma2Model":
            module: Any = transformers.Gemma2Model(transformers.Gemma2Config(**config))
        else:
            module = getattr(diffusers, name).from_config(config)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_tensors_of_tiny_are_known(tiny: Path, component: Component) -> None:
    config = json.loads((tiny / component / "config.json").read_text())
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    name = SANA_CONTROLNET.by_name[component].class_name
    assert expected_shapes(name, config) == shapes_of(name, plain)


@pytest.mark.parametrize("module", MODULES)
def test_the_tensors_of_every_published_module_are_known(module: str) -> None:
    facts = catalogue.shipped(module)
    shapes = shapes_of(facts["class_name"], facts["config"])
    assert expected_shapes(facts["class_name"], facts["config"]) == shapes
    assert facts["shapes_digest"] == shapes_digest(shapes)


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("SanaTransformer2DModel", sana.TRANSFORMER_DEFAULTS),
        ("SanaControlNetModel", sana.CONTROLNET_DEFAULTS),
        ("AutoencoderDC", dc_ae.DEFAULTS),
    ],
)
def test_a_key_that_a_config_leaves_out_has_diffusers_own_default(name: str, defaults: dict[str, Any]) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert defaults == {key: one.default for key, one in parameters.items() if key != "self"}


def test_a_key_that_gemma_s_config_leaves_out_has_transformers_own_default() -> None:
    config = transformers.Gemma2Config()
    assert {key: getattr(config, key) for key in gemma2.DEFAULTS} == gemma2.DEFAULTS


SMALL = st.integers(1, 3)
DENOISER = {
    "in_channels": SMALL, "out_channels": st.none() | SMALL, "num_attention_heads": SMALL,
    "attention_head_dim": st.sampled_from([4, 8]), "num_layers": st.integers(0, 2), "num_cross_attention_heads": SMALL,
    "cross_attention_head_dim": st.sampled_from([4, 6]), "cross_attention_dim": st.none() | st.sampled_from([8, 12]),
    "caption_channels": SMALL, "mlp_ratio": st.sampled_from([1.3, 2.5, 4]), "attention_bias": st.booleans(),
    "sample_size": st.sampled_from([2, 4]), "patch_size": st.sampled_from([1, 2]),
    "norm_elementwise_affine": st.booleans(),
}  # fmt: skip
GEMMA = {
    "vocab_size": SMALL, "hidden_size": st.sampled_from([8, 16]), "intermediate_size": SMALL,
    "num_hidden_layers": st.integers(0, 2), "num_attention_heads": st.sampled_from([2, 4]),
    "num_key_value_heads": st.sampled_from([1, 2]), "head_dim": st.sampled_from([2, 6]),
    "attention_bias": st.booleans(), "pad_token_id": st.just(0),
}  # fmt: skip
QK_NORMS = [None, "layer_norm", "fp32_layer_norm", "layer_norm_across_heads", "rms_norm", "rms_norm_across_heads", "l2"]
TRANSFORMER_CONFIG = {**DENOISER, "guidance_embeds": st.booleans(), "qk_norm": st.sampled_from(QK_NORMS)}
KINDS, NORMS = ["ResBlock", "EfficientViTBlock"], ["rms_norm", "layer_norm", "batch_norm"]
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def autoencoders(draw: st.DrawFn) -> dict[str, Any]:
    stages = draw(st.integers(2, 4))

    def each(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.lists(values, min_size=stages, max_size=stages))

    return {
        "in_channels": draw(SMALL), "latent_channels": draw(st.sampled_from([4, 8])), "attention_head_dim": 4,
        **{f"{side}_block_types": draw(st.sampled_from(KINDS)) if draw(st.booleans()) else each(st.sampled_from(KINDS))
           for side in ("encoder", "decoder")},
        **{f"{side}_block_out_channels": each(st.sampled_from([8, 12, 16])) for side in ("encoder", "decoder")},
        **{f"{side}_layers_per_block": each(st.integers(0, 2)) for side in ("encoder", "decoder")},
        **{f"{side}_qkv_multiscales": each(st.sampled_from([[], [5], [3, 5]])) for side in ("encoder", "decoder")},
        "upsample_block_type": draw(st.sampled_from(["pixel_shuffle", "interpolate"])),
        "decoder_norm_types": draw(st.sampled_from(NORMS)) if draw(st.booleans()) else each(st.sampled_from(NORMS)),
        "downsample_block_type": draw(st.sampled_from(["pixel_unshuffle", "Conv"])),
    }  # fmt: skip


@quick
@given(st.fixed_dictionaries({}, optional=TRANSFORMER_CONFIG))
def test_the_transformer_s_tensors_follow_its_config(config: dict[str, Any]) -> None:
    config = {"num_layers": 1, **config}
    assert expected_shapes("SanaTransformer2DModel", config) == shapes_of("SanaTransformer2DModel", config)


@quick
@given(st.fixed_dictionaries({}, optional=DENOISER))
def test_the_controlnet_s_tensors_follow_its_config(config: dict[str, Any]) -> None:
    config = {"num_layers": 1, **config}
    assert expected_shapes("SanaControlNetModel", config) == shapes_of("SanaControlNetModel", config)


@quick
@given(autoencoders())
def test_the_vae_s_tensors_follow_its_config(config: dict[str, Any]) -> None:
    expected = expected_shapes("AutoencoderDC", config)
    assert expected is not None
    assert expected == shapes_of("AutoencoderDC", config)


@quick
@given(st.fixed_dictionaries(GEMMA))
def test_the_text_encoder_s_tensors_follow_its_config(config: dict[str, Any]) -> None:
    assert expected_shapes("Gemma2Model", config) == shapes_of("Gemma2Model", config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("SanaTransformer2DModel", {"a_key_of_tomorrow": True}),
        ("SanaTransformer2DModel", {"qk_norm": "a norm of tomorrow"}),
        ("SanaTransformer2DModel", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("SanaControlNetModel", {"num_layers": "seven"}),
        ("AutoencoderDC", {"encoder_block_types": "ABlockOfTomorrow"}),
        ("AutoencoderDC", {"decoder_norm_types": "a norm of tomorrow"}),
        ("Gemma2Model", {"quantization_config": {"quant_method": "gptq"}}),
    ],
)
def test_what_a_config_does_not_tell_is_not_guessed(name: str, config: dict[str, Any]) -> None:
    assert expected_shapes(name, config) is None


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def refused(folder: Path, **fields: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(CheckpointModel(kind="checkpoint", source=str(folder), **fields))
    assert caught.value.exit_code == 3
    return caught.value


def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_torch_is_imported(copy: Path, cli: Cli) -> None:
    rewrite(copy / TRANSFORMER, without("transformer_blocks.0.attn1.to_k.weight"))
    done = cli("until=compile", "model=checkpoint", f"model.source={copy}", PYTHONPROFILEIMPORTTIME="1")
    said = " ".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert done.returncode == 3, said
    assert "error: model.source (transformer): the tensors of the transformer in " in " ".join(said.split())
    assert "missing (transformer_blocks.0.attn1.to_k.weight)" in " ".join(said.split())
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "sana_deploy.facts.checkpoint" in imported
    assert "torch" not in imported


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_is_compared(copy: Path, component: Component) -> None:
    (path,) = (copy / component).glob("*.safetensors")
    first = next(iter(load_file(path)))
    rewrite(path, without(first))
    problem = refused(copy)
    assert problem.where == f"model.source ({component})"
    assert f"missing ({first})" in problem.message


def test_unexpected_and_reshaped_tensors_are_named_with_both_shapes(copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_out.weight"] = tensors["proj_out.weight"][:, :100]
        tensors["proj_out.weight_scale"] = torch.ones(())

    rewrite(copy / TRANSFORMER, change)
    problem = refused(copy)
    assert "1 unexpected (proj_out.weight_scale)" in problem.message
    assert "1 of another shape (proj_out.weight is 32x100, expected 32x192)" in problem.message
    assert problem.facts == {"missing": 0, "unexpected": 1, "reshaped": 1}


def test_a_long_list_is_cut_at_ten_and_counted(copy: Path) -> None:
    config = copy / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 5', '"num_layers": 6'))
    problem = refused(copy)
    named = problem.message.partition("missing (")[2].partition(", and ")
    assert named[0].count("transformer_blocks.5.") == 10
    assert named[2].startswith(f"{problem.facts['missing'] - 10} more)")
    assert problem.facts["missing"] == len([key for key in load_file(copy / TRANSFORMER) if "_blocks.0." in key])


def test_shards_variants_other_dtypes_and_controlnets_published_apart_are_compared(copy: Path, tmp_path: Path) -> None:
    whole = load_file(copy / TRANSFORMER)
    folder, half = copy / "transformer", sorted(whole)[::2]
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards = [{key: whole[key].bfloat16() for key in whole if (key in half) == first} for first in (True, False)]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (copy / TRANSFORMER).unlink()
    facts = open_checkpoint(CheckpointModel(kind="checkpoint", source=str(copy))).components["transformer"]
    assert set(facts.stored) == {"BF16"}
    save_file({key: value for key, value in shards[1].items() if "to_k" not in key}, folder / names[1])
    assert "to_k" in refused(copy).message
    save_file(shards[1], folder / names[1])

    apart = Path(shutil.copytree(copy / "controlnet", tmp_path / "apart"))
    rewrite(apart / "diffusion_pytorch_model.safetensors", without("input_block.bias"))
    problem = refused(copy, components=Overrides(controlnet=str(apart)))
    assert problem.where == "model.components.controlnet"
    assert "missing (input_block.bias)" in problem.message
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(vae, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    rewrite(vae.with_name("diffusion_pytorch_model.fp16.safetensors"), without("decoder.conv_in.bias"))
    assert "decoder.conv_in.bias" in refused(copy, variant="fp16").message
    open_checkpoint(CheckpointModel(kind="checkpoint", source=str(copy)))


def test_gemma_with_its_language_head_and_prefix_is_the_body(copy: Path, tiny: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    plain = open_checkpoint(CheckpointModel(kind="checkpoint", source=str(tiny))).components["text_encoder"]
    body = load_file(path)
    head = {f"model.{key}": value for key, value in body.items()}
    head["lm_head.weight"] = body["embed_tokens.weight"].clone()
    save_file(head, path, {"format": "pt"})
    facts = open_checkpoint(CheckpointModel(kind="checkpoint", source=str(copy))).components["text_encoder"]
    assert (facts.parameters, facts.linears) == (plain.parameters, plain.linears)
    del head["model.norm.weight"]
    save_file(head, path, {"format": "pt"})
    assert f"1 of {len(body)} missing (norm.weight)" in refused(copy).message
