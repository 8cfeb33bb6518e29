"""A saved plan is for the weights that it was made for: other ones are refused before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import draw
from safetensors.torch import load_file, save_file

from sana_deploy import load_pipeline
from sana_deploy.api import compile_spec
from sana_deploy.declare.pipelines import COMPONENTS
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import PlanError
from sana_deploy.facts.machine import Machine
from sana_deploy.plan import file_digests
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.diff import compare
from sana_deploy.plan.file_digests import contents
from sana_deploy.stages import deploy

Small = Callable[..., DeploySpec]
Cli = Callable[..., subprocess.CompletedProcess[str]]
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
RELEASED = sorted((Path(__file__).parent / "plans").glob("*.json"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.fixture
def compiled(copy: Path, small: Small, machine: Callable[..., Machine]) -> Callable[..., Plan]:
    return lambda *more, source=copy: compile_spec(
        small("model=checkpoint", f"model.source={source}", *more), machine()
    )


def swap(
    path: Path, change: Callable[[torch.Tensor], torch.Tensor] = lambda value: value + 0.01, name: str = ""
) -> None:
    tensors = load_file(path)
    name = name or next(reversed(tensors))
    tensors[name] = change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def edited_config(folder: Path) -> None:
    path = folder / "vae" / "config.json"
    path.write_text(path.read_text().replace("0.41407", "0.5"))


def edited_scheduler(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"flow_shift": 3.0', '"flow_shift": 2.0'))


def lacking(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.bias"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


CHANGES = [
    (edited_config, "vae: its config or the shapes of its tensors changed since the plan was compiled"),
    (shutil.rmtree, "is not there"),
    (lambda folder: swap(folder / WEIGHTS), f"{WEIGHTS.as_posix()}: was 12.71 MiB samples1:"),
    (lambda folder: swap(folder / "text_encoder" / "model.safetensors"), "text_encoder/model.safetensors: was"),
    (edited_scheduler, "scheduler/scheduler_config.json: was"),
    (lacking, "missing (proj_out.bias)"),
    (lambda folder: (folder / WEIGHTS).unlink(), "no safetensors file in"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_another_checkpoint_is_refused_at_resolve_and_at_load(
    copy: Path, compiled: Callable[..., Plan], change: Callable[[Path], object], says: str
) -> None:
    plan = compiled()
    resolved = plan.resolve()
    change(copy)
    for refuse in (plan.resolve, lambda: load_pipeline(plan), lambda: load_pipeline(resolved)):
        with pytest.raises(PlanError) as caught:
            refuse()
        assert caught.value.exit_code == 5
        assert says in caught.value.message


@pytest.mark.parametrize(("change", "says"), CHANGES[:3])
def test_the_command_ends_with_5_at_resolve(
    copy: Path, cli: Cli, tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    given = ["model=checkpoint", f"model.source={copy}", "machine=2xrtx3060", "workload.height=64", "workload.width=64"]
    made = cli(*given, "until=compile", "hydra.run.dir=made")
    assert made.returncode == 0, made.stderr
    again = ["plan_file=made/plan.json", "until=resolve"]
    assert cli(*again).returncode == 0
    change(copy)
    ended = cli(*again, PYTHONPROFILEIMPORTTIME="1")
    lines = ended.stderr.splitlines()
    assert ended.returncode == 5, ended.stderr
    assert says in " ".join(" ".join(line for line in lines if not line.startswith("import time:")).split())
    imported = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    assert "torch" not in imported


def test_new_content_is_accepted_by_name_and_a_new_config_is_not(
    copy: Path, compiled: Callable[..., Plan], small: Small
) -> None:
    plan = compiled("precision=fp32")
    before = draw(load_pipeline(plan), plan.spec)
    swap(copy / WEIGHTS, lambda value: value * 1.5, "proj_out.weight")
    with pytest.raises(PlanError) as caught:
        plan.resolve()
    assert caught.value.hint.endswith("or accept that with resolve.allow=[checkpoint_content]")
    resolved = plan.resolve(allow=["checkpoint_content"])
    assert f"{WEIGHTS.as_posix()}: was" in resolved.drift[0].message
    assert (draw(load_pipeline(resolved), plan.spec) != before).any()
    edited_config(copy)
    with pytest.raises(PlanError, match="vae: its config") as caught:
        plan.resolve(allow=["checkpoint_content"])
    assert "checkpoint_content" not in caught.value.hint


def test_a_controlnet_published_apart_is_compared_too(tiny: Path, tmp_path: Path, small: Small) -> None:
    apart = Path(shutil.copytree(tiny / "controlnet", tmp_path / "apart"))
    plan = compile_spec(small(f"model.components.controlnet={apart}"))
    assert set(plan.checkpoint.content) == {"controlnet"}, "tiny itself is generated"
    swap(apart / WEIGHTS.name)
    with pytest.raises(PlanError, match=f"controlnet/{WEIGHTS.name}: was"):
        plan.resolve()


def test_a_copy_elsewhere_has_the_same_digest_and_other_weights_another(
    copy: Path, compiled: Callable[..., Plan], tmp_path: Path
) -> None:
    plan, moved = compiled(), compiled(source=shutil.copytree(copy, tmp_path / "elsewhere"))
    assert moved.digest == plan.digest
    assert moved.checkpoint.content == plan.checkpoint.content
    assert set(plan.checkpoint.content) == {*COMPONENTS, "tokenizer", "scheduler"}
    swap(copy / WEIGHTS)
    other = compiled()
    assert other.digest != plan.digest
    assert [one.where for one in compare(plan, other)] == [f"checkpoint.content.{WEIGHTS.as_posix()}"]


def test_a_plan_whose_content_was_edited_is_found(compiled: Callable[..., Plan], tmp_path: Path) -> None:
    values = json.loads(compiled().to_json())
    values["checkpoint"]["content"]["vae"]["files"][WEIGHTS.name]["sampled"] = "samples1:0"
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match="changed after it was compiled"):
        Plan.load(tmp_path / "plan.json")


def one_byte(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        (value,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([value ^ 1]))


def test_verify_finds_a_byte_that_no_sample_covers(copy: Path, compiled: Callable[..., Plan]) -> None:
    sampled, whole = compiled(), compiled("resolve.verify=true")
    assert sampled.digest == whole.digest, "whether it was asked for is no decision"
    path = copy / "text_encoder" / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert whole.checkpoint.content["text_encoder"].files[path.name].whole == f"sha256:{digest}"
    whole.resolve(verify=True)
    with pytest.raises(PlanError, match=r"has no digest of the whole file, which resolve.verify=true keeps"):
        sampled.resolve(verify=True, allow=["checkpoint_content"])
    one_byte(path, 8 + int.from_bytes(path.read_bytes()[:8], "little"))  # the first of the largest tensor
    whole.resolve(verify=False)
    with pytest.raises(PlanError, match=r"text_encoder/model.safetensors: was 22.78 MiB sha256:"):
        whole.resolve()


def test_a_sample_of_every_tensor_is_read_and_little_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {f"layer.{i}": torch.full((300, 1024), float(i)) for i in range(8)}
    save_file(tensors, path)
    before = contents([path], "test")[path.name]
    for name in tensors:
        save_file({**tensors, name: tensors[name] + 1}, path)
        assert contents([path], "test")[path.name].sampled != before.sampled, name
    save_file(tensors, path)
    assert contents([path], "test")[path.name] == before
    with path.open("rb", buffering=0) as stream:
        size = path.stat().st_size
        assert sum(stop - start for start, stop in file_digests._blocks(stream, size)) < size / 100


def test_a_pickle_is_sampled_at_even_distances(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(3 * file_digests.FILE_STRIDE))
    before = contents([path], "test")[path.name]
    one_byte(path, path.stat().st_size - 1)
    assert contents([path], "test")[path.name] != before


def test_samples_are_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "SETTLED_NS", -1)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, file_digests.SMALL)}, path)
    first = contents([path], "test")
    read: list[Path] = []
    plain = file_digests._sample

    def sampled(one: Path) -> str:
        read.append(one)
        return plain(one)

    monkeypatch.setattr(file_digests, "_sample", sampled)
    assert contents([path], "test") == first
    assert read == [], "nothing is read again"
    stamps = path.stat()
    save_file({"a": torch.ones(2, file_digests.SMALL)}, path)
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert contents([path], "test") != first, "the same size and time of modification"
    (kept,) = (tmp_path / "cache" / "content").glob("*.json")
    kept.write_text("damaged")
    assert contents([path], "test") != first
    monkeypatch.setenv("SANA_DEPLOY_CACHE", str(path))
    contents([path], "test")


def test_a_file_that_has_just_been_written_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, file_digests.SMALL)}, path)
    contents([path], "test")
    assert not (tmp_path / "cache").exists(), "its time stamps might not tell the next change"


def test_a_plan_of_an_earlier_version_goes_on_without_content(copy: Path, compiled: Callable[..., Plan]) -> None:
    plan = compiled()
    record = plan.checkpoint.model_copy(update={"content": {}})
    old = plan.model_copy(update={"checkpoint": record, "schema_version": "1.2"})
    swap(copy / WEIGHTS)
    old.resolve()
    edited_config(copy)
    with pytest.raises(PlanError, match="changed since the plan was compiled"):
        old.resolve()


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_a_plan_of_an_earlier_version_can_be_saved_again(path: Path, tmp_path: Path) -> None:
    plan = Plan.load(path)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_a_run_leaves_a_plan_of_an_earlier_version_that_can_be_applied(tmp_path: Path, small: Small) -> None:
    spec = small(f"plan_file={RELEASED[0]}", "until=resolve")
    outcome, _ = deploy(spec, tmp_path, ["until=resolve"])
    assert outcome.exit_code == 0
    assert Plan.load(tmp_path / "plan.json").digest == Plan.load(RELEASED[0]).digest


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(
    copy: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    copy.rename(tmp_path / "models" / "mine")
    plan = compile_spec(small("model=checkpoint", "model.source=models/mine"))
    shutil.rmtree(tmp_path / "models")
    monkeypatch.setattr("sana_deploy.facts.hub._download", reached)
    with pytest.raises(PlanError, match="the folder models/mine is not there"):
        load_pipeline(plan)
