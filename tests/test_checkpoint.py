"""Checkpoints read from outside: exact sizes, and damage found before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Gemma2Model

from sana_deploy import load_pipeline
from sana_deploy.api import compile_spec
from sana_deploy.declare.formats import Dtype, Format
from sana_deploy.declare.pipelines import SANA_CONTROLNET
from sana_deploy.declare.spec import CheckpointModel, DeploySpec, Overrides, TinyModel
from sana_deploy.errors import CheckpointError
from sana_deploy.facts import catalogue
from sana_deploy.facts.checkpoint import Checkpoint, open_checkpoint
from sana_deploy.facts.component import component_facts
from sana_deploy.facts.machine import Machine
from sana_deploy.facts.published import MODULES
from sana_deploy.facts.tiny import ensure_tiny

CLASSES = {
    "text_encoder": Gemma2Model,
    "vae": AutoencoderDC,
    "transformer": SanaTransformer2DModel,
    "controlnet": SanaControlNetModel,
}


def opened(folder: Path, **fields: object) -> Checkpoint:
    return open_checkpoint(CheckpointModel(kind="checkpoint", source=str(folder), **fields))  # type: ignore[arg-type]


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weight_bytes_equal_those_of_the_loaded_modules(tiny: Path, dtype: Dtype) -> None:
    facts = open_checkpoint(TinyModel(kind="tiny")).components
    for name, kind in CLASSES.items():
        module = kind.from_pretrained(tiny, subfolder=name, dtype=getattr(torch, dtype))
        loaded = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        assert facts[name].weights_bytes(Format(dtype)) == loaded, name


def test_weight_bytes_count_the_position_buffer_of_2k_models(tmp_path: Path) -> None:
    config = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_cross_attention_heads=2,
                  cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=8)  # fmt: skip
    SanaTransformer2DModel(**config, interpolation_scale=1.0).save_pretrained(tmp_path)
    facts = component_facts(SANA_CONTROLNET.by_name["transformer"], tmp_path, None, "test")
    module = SanaTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float16)
    loaded = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert facts.weights_bytes(Format("float16")) == loaded


@pytest.mark.pinned  # configs hold every default of the release that wrote them
@pytest.mark.parametrize("module", MODULES)
def test_the_shipped_catalogue_is_current(module: str) -> None:
    assert catalogue.shipped(module) == json.loads(json.dumps(catalogue.build(module)))


def test_tiny_is_made_once_and_its_parts_differ_in_size(tiny: Path) -> None:
    before = (tiny / "model_index.json").stat().st_mtime_ns
    assert ensure_tiny() == tiny
    assert (tiny / "model_index.json").stat().st_mtime_ns == before
    sizes = [facts.parameters for facts in open_checkpoint(TinyModel(kind="tiny")).components.values()]
    assert len(set(sizes)) == 4
    assert not list(tiny.parent.glob(".*"))


def test_tiny_has_the_same_weights_wherever_it_is_made(tiny: Path, tmp_path: Path) -> None:
    again = ensure_tiny(str(tmp_path))
    file = Path("transformer/diffusion_pytorch_model.safetensors")
    assert (again / file).read_bytes() == (tiny / file).read_bytes()


def test_the_fingerprint_is_of_the_architecture_not_of_the_place(tiny: Path, copy: Path) -> None:
    assert opened(copy).fingerprint == open_checkpoint(TinyModel(kind="tiny")).fingerprint
    config = copy / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.41407", "0.5"))
    assert opened(copy).fingerprint != open_checkpoint(TinyModel(kind="tiny")).fingerprint


def cut(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def stub(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def pickled(folder: Path) -> None:
    path = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def another_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def no_controlnet(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["controlnet"]
    (folder / "model_index.json").write_text(json.dumps(index))


def stripped(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    del config["num_layers"], config["mlp_ratio"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (stripped, "is incomplete: it lacks num_layers, mlp_ratio"),
        (cut, "is truncated"),
        (stub, "not a whole safetensors file"),
        (pickled, "only pickled weights"),
        (another_pipeline, "no SANA ControlNet pipeline"),
        (no_controlnet, "its controlnet is missing"),
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "JSON object"),
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "no safetensors file"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no tokenizer"),
    ],
)
def test_damage_is_found_before_loading(copy: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=says) as caught:
        opened(copy)
    assert caught.value.exit_code == 3
    assert caught.value.where.startswith("model.source")


def test_a_folder_that_is_not_there_is_said_so() -> None:
    with pytest.raises(CheckpointError, match="there is no folder '/no/such/folder'"):
        opened(Path("/no/such/folder"))


def test_sharded_weights_are_counted_and_a_missing_shard_is_named(copy: Path) -> None:
    whole = opened(copy).components["transformer"]
    folder = copy / "transformer"
    single = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard, {"format": "pt"})
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    single.unlink()
    assert opened(copy).components["transformer"].parameters == whole.parameters
    assert opened(copy).fingerprint == open_checkpoint(TinyModel(kind="tiny")).fingerprint
    (folder / next(iter(shards))).unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing"):
        opened(copy)


def test_a_variant_is_taken_where_it_is_there(copy: Path) -> None:
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    half = {key: tensor.half() for key, tensor in load_file(path).items()}
    save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    components = opened(copy, variant="fp16").components
    assert set(components["vae"].stored) == {"F16"}
    assert set(components["transformer"].stored) == {"F32"}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_with_a_variant_only_is_told_which_to_take(copy: Path, tmp_path: Path, sharded: bool) -> None:
    folder = copy / "vae"
    path = folder / "diffusion_pytorch_model.safetensors"
    if sharded:
        shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
        index = {"weight_map": dict.fromkeys(load_file(path), shard)}
        (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
        path.rename(folder / shard)
    else:
        path.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="only variants of the weights are in") as caught:
        opened(copy)
    assert caught.value.hint == "model.variant=fp16"
    assert opened(copy, variant="fp16").components["vae"].variant == "fp16", "the hint works"
    with pytest.raises(CheckpointError) as caught:
        opened(copy, variant="bf16")
    assert caught.value.hint == "model.variant=fp16"


def test_a_controlnet_apart_with_a_variant_only_gets_a_hint_that_works(copy: Path, tmp_path: Path) -> None:
    apart = Path(shutil.copytree(copy / "controlnet", tmp_path / "apart"))
    path = apart / "diffusion_pytorch_model.safetensors"
    path.rename(apart / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError) as caught:
        opened(copy, components=Overrides(controlnet=str(apart)))
    assert (
        caught.value.hint == "load it with from_pretrained(..., variant='fp16') and save it anew with save_pretrained"
    )
    SanaControlNetModel.from_pretrained(apart, variant="fp16").save_pretrained(tmp_path / "anew")
    opened(copy, components=Overrides(controlnet=str(tmp_path / "anew")))


def test_a_controlnet_published_apart_takes_the_place_of_the_checkpoint_s(copy: Path, tmp_path: Path) -> None:
    apart = Path(shutil.move(copy / "controlnet", tmp_path / "apart"))
    no_controlnet(copy)
    checkpoint = opened(copy, components=Overrides(controlnet=str(apart)))
    assert checkpoint.components["controlnet"].folder == apart


COMMIT, LATER = (f"{digit}123456789abcdef0123456789abcdef01234567" for digit in "01")


@pytest.fixture
def cached(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of someone/tiny-sana, without a network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--someone--tiny-sana"
    shutil.copytree(tiny, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(repository.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_a_controlnet_of_another_repository_stays_at_the_commit_that_was_planned(
    cached: Path, tiny: Path, small: Callable[..., DeploySpec], machine: Callable[..., Machine]
) -> None:
    apart = [f"model.source={tiny}", "model.components.controlnet=someone/tiny-sana"]
    plan = compile_spec(small("model=checkpoint", *apart), machine())
    pinned = f"someone/tiny-sana@{COMMIT}"
    assert plan.spec.model.components.controlnet == pinned
    newest = Path(shutil.copytree(cached / "snapshots" / COMMIT, cached / "snapshots" / LATER))
    (newest / "controlnet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged since")
    (cached / "refs" / "main").write_text(LATER)
    assert Path(load_pipeline(plan).controlnet.config["_name_or_path"]).parent.name == COMMIT
    again = compile_spec(small("model=checkpoint", apart[0], f"model.components.controlnet='{pinned}'"), machine())
    assert again.to_json() == plan.to_json()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        compile_spec(small("model=checkpoint", *apart), machine())


def test_the_folder_of_a_controlnet_is_no_part_of_the_digest(
    tiny: Path, tmp_path: Path, small: Callable[..., DeploySpec], machine: Callable[..., Machine]
) -> None:
    digests = set()
    for name in ("here", "there"):
        folder = shutil.copytree(tiny / "controlnet", tmp_path / name)
        declared = small(f"model.components.controlnet={folder}")
        digests.add(compile_spec(declared, machine()).digest)
    assert len(digests) == 1


def test_a_hub_repository_is_read_from_the_cache_when_offline(cached: Path) -> None:
    checkpoint = open_checkpoint(CheckpointModel(kind="checkpoint", source="someone/tiny-sana"))
    assert checkpoint.revision == COMMIT
    assert checkpoint.fingerprint == open_checkpoint(TinyModel(kind="tiny")).fingerprint
    with pytest.raises(CheckpointError, match="not in the local cache"):
        open_checkpoint(CheckpointModel(kind="checkpoint", source="someone/else"))
