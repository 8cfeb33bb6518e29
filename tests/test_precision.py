"""A dtype is a promise: chosen with a reason, checked at every border, and never cast out of range in silence."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_deploy._units import GIB
from sana_deploy.api import compile_plan, compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.pipelines import SANA_CONTROLNET
from sana_deploy.declare.policies import dtypes_of
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, RunError
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.plan.remedies import out_of_float16
from sana_deploy.run.generate import generate
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline

Small = Callable[..., DeploySpec]
Describe = Callable[..., Machine]
LARGE = ["model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "precision=auto"]


@pytest.mark.parametrize(
    ("sizes", "capability", "chosen", "reason"),
    [
        ((24,), (8, 9), "mixed_bf16", "native here and it fits"),
        ((15, 15), (7, 5), "mixed_fp32", "mixed_bf16: bfloat16 is not native on Test 15 GiB"),
        ((), (8, 6), "fp32", "what CPUs compute natively"),
    ],
)
@pytest.mark.parametrize("asked", [[], ["precision=auto"]], ids=["default", "asked"])
def test_auto_takes_the_best_legal_policy_and_says_why(
    small: Small, machine: Describe, sizes: tuple[int, ...], capability: tuple[int, int], chosen: str, reason: str,
    asked: list[str],
) -> None:  # fmt: skip
    plan = compile_spec(small(*LARGE[:3], *asked), machine(*sizes, capability=capability))
    assert plan.spec.precision.name == chosen
    assert {name: part.dtype for name, part in plan.components.items()} == dtypes_of(chosen, SANA_CONTROLNET)
    (remark,) = [one for one in plan.diagnostics if one.type == "auto_precision"]
    assert reason in remark.message


def test_auto_keeps_what_is_fixed_and_speaks_of_memory_where_nothing_fits(small: Small, machine: Describe) -> None:
    plan = compile_spec(small(*LARGE, "precision.components.vae=float32"), machine(24))
    assert plan.components["vae"].dtype == "float32"
    assert plan.components["text_encoder"].dtype == "bfloat16"
    with pytest.raises(InfeasibleError, match="too much"):
        compile_spec(small(*LARGE), machine(4, capability=(7, 5)))


def test_a_mixed_machine_gets_bfloat16_where_it_is_native(small: Small) -> None:
    new = Gpu(0, "NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB, (8, 9), 128)
    old = Gpu(1, "Tesla T4", 15 * GIB, 15 * GIB, (7, 5), 40)
    plan = compile_spec(small(*LARGE), Machine("present", (new, old), 64 * GIB))
    assert plan.spec.precision.name == "mixed_bf16"
    assert {name for name, part in plan.components.items() if part.slot == 1} <= {"transformer", "controlnet"}
    pinned = small(*LARGE, "precision=mixed_bf16", "hardware.pin.vae=1")
    with pytest.raises(InfeasibleError, match=r"bfloat16 \(vae\) is not native on GPU 1, Tesla T4"):
        compile_spec(pinned, Machine("present", (new, old), 64 * GIB))


@pytest.fixture
def overflowing(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint whose text encoder's last norm makes values that float16 cannot hold, of weights that it can."""
    folder = Path(shutil.copytree(tiny, tmp_path / "overflowing"))
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(path)
    weights["norm.weight"] = torch.full_like(weights["norm.weight"], 6e4)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.usefixtures("short_prompts")
def test_an_overflow_is_caught_at_the_border_and_named(
    here: Callable[..., subprocess.CompletedProcess[str]], overflowing: Path, tmp_path: Path
) -> None:
    chosen = ["model=checkpoint", f"model.source={overflowing}", "workload.height=64", "workload.width=64"]
    ended = here(*chosen, "precision=fp16", "workload.steps=3")
    assert ended.returncode == 6, ended.stderr
    said = "error: precision.components.text_encoder: the text_encoder gave NaN or infinity in float16 during encode"
    assert said in ended.stderr
    hint = "precision=mixed_fp32"
    assert f"hint: {hint} keeps text_encoder out of float16" in ended.stderr
    cured = here(*chosen, hint, "workload.steps=3", "hydra.run.dir=cured")
    assert "the text_encoder gave NaN" not in cured.stderr
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert not list(folder.glob("*.png"))
    facts = json.loads((folder / "outcome.json").read_text())["error"]["facts"]
    assert facts == {"component": "text_encoder", "dtype": "float16", "phase": "encode"}


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize(
    ("broken", "where"), [("vae", "vae gave NaN or infinity in float32 during prepare"),
                          ("transformer", "transformer gave NaN or infinity in float32 during denoise")]
)  # fmt: skip
def test_the_first_component_that_breaks_is_the_one_named(small: Small, broken: str, where: str) -> None:
    spec = small("precision=fp32", "workload.steps=4")
    pipeline = load_pipeline(compile_spec(spec))
    next(getattr(pipeline, broken).parameters()).data.fill_(float("nan"))
    steps: list[int] = []
    with pytest.raises(RunError, match=where) as caught:
        generate(pipeline, spec.workload.bounds, spec.workload.request, lambda done, of: steps.append(done))
    assert steps == [], "it ends with the first step"
    assert "the weights or the inputs are damaged" in caught.value.hint
    assert border_of(pipeline).on_outputs == []


def test_values_that_float16_cannot_hold_are_counted_at_load(
    tiny: Path, small: Small, tmp_path: Path, here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "wide"))
    (path,) = (folder / "controlnet").glob("*.safetensors")
    weights = {key: value.to(torch.bfloat16) for key, value in load_file(path).items()}
    key = next(iter(weights))
    weights[key].view(-1)[:3] = 1e6
    save_file(weights, path, metadata={"format": "pt"})
    chosen = ["model=checkpoint", f"model.source={folder}", "precision=mixed_bf16"]
    plan = compile_spec(small(*chosen))
    (remark,) = [one for one in plan.diagnostics if one.type == "lossy_dtype"]
    assert remark.message.startswith("controlnet is stored in bfloat16 and loaded in float16")
    ended = here(*chosen, "workload.height=64", "workload.width=64", "until=apply")
    assert "hint: precision=fp32 keeps controlnet out of float16" in ended.stderr
    assert "3 values of the controlnet do not fit float16 and became infinite" in ended.stderr
    assert not [one for one in compile_spec(small(*chosen, "precision=bf16")).diagnostics if one.type == "lossy_dtype"]


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize(
    ("precision", "hint"),
    [("fp16", "precision=mixed_fp32 keeps text_encoder and vae out of float16"),
     ("mixed_bf16", "precision=fp32 keeps transformer and controlnet out of float16"), ("bf16", ""), ("fp32", "")],
)  # fmt: skip
def test_what_cures_a_flat_image_is_checked_against_the_plan(
    small: Small, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, hint: str
) -> None:
    from sana_deploy.run import generate as module
    from sana_deploy.stages import deploy

    request = module.run_request
    monkeypatch.setattr(module, "run_request", lambda *given: (torch.zeros(1, 3, 64, 96), request(*given)[1]))
    outcome, plan = deploy(small(f"precision={precision}", "workload.steps=1"), tmp_path)
    assert plan is not None
    assert outcome.error is not None
    assert "is one flat colour" in outcome.error.message
    assert outcome.error.hint == hint
    pipeline = load_pipeline(plan)
    with pytest.raises(RunError) as caught:
        generate(pipeline, plan.spec.workload.bounds, plan.spec.workload.request)
    words = {"fp16": "precision=mixed_bf16, or", "mixed_bf16": "precision=bf16, or"}.get(precision, "")
    assert caught.value.hint.startswith(words)
    assert bool(caught.value.hint) == bool(words)


def test_a_policy_is_offered_only_where_it_fits(small: Small, machine: Describe) -> None:
    old = machine(16, capability=(7, 5))
    plan = compile_spec(small(*LARGE, "precision=fp16"), old)
    (remark,) = [one for one in plan.diagnostics if one.type == "fragile_dtype"]
    assert remark.hint == "precision=mixed_fp32 keeps them out of float16"
    compiled = functools.partial(compile_spec, machine=old)
    with pytest.raises(InfeasibleError):
        compiled(plan.spec.model_copy(update={"precision": compose_spec(["precision=bf16"]).precision}))
    assert "bf16" not in out_of_float16(plan, ["vae", "transformer"], compiled)


AUDITED = ["workload.height=64", "workload.width=64", "workload.steps=2", "precision.audit=true"]


@pytest.mark.usefixtures("short_prompts")
@pytest.mark.parametrize("precision", ["fp16", "mixed_bf16", "fp32"])
def test_an_audit_tells_the_error_of_every_border_and_of_the_image(
    here: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, tmp_path: Path, precision: str
) -> None:
    ended = here(*AUDITED, f"precision={precision}")
    assert ended.returncode == 0, ended.stderr
    assert "audited against float32" in ended.stderr
    (path,) = (tmp_path / "outputs").glob("*/*/outcome.json")
    found = json.loads(path.read_text())["audit"]
    errors = {(row["component"], row["phase"]): (row["dtype"], row["relative_error"]) for row in found["borders"]}
    assert set(errors) == {
        ("text_encoder", "encode"), ("vae", "prepare"), ("controlnet", "denoise"), ("transformer", "denoise"),
        ("vae", "decode"),
    }  # fmt: skip
    bounds = {"float32": (0.0, 0.0), "float16": (1e-5, 1e-2), "bfloat16": (1e-4, 1e-1)}
    for dtype, error in errors.values():
        lowest, highest = bounds[dtype]
        assert lowest <= error <= highest
    assert found["identical"] == (precision == "fp32")
    assert found["psnr"] is None if precision == "fp32" else found["psnr"] > 30


def test_an_audit_that_does_not_fit_says_so(small: Small, machine: Describe) -> None:
    from sana_deploy.run.audit import in_float32

    spec = small("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "precision.audit=true")
    with pytest.raises(InfeasibleError, match="an audit runs the request in float32 too, and that does not fit"):
        in_float32(spec, lambda changed: compile_spec(changed, machine(8, 8)))


def test_hints_speak_of_the_gpu_that_is_named() -> None:
    box = ["machine=virtual", "machine.gpus=[t4,rtx4090]", "hardware=single_gpu", "precision=fp16"]
    for gpu, policy in (("0", "mixed_fp32"), ("1", "mixed_bf16")):
        (remark, *_) = compile_plan([*box, f"hardware.gpu={gpu}"]).diagnostics
        assert remark.hint == f"precision={policy} keeps them out of float16"
