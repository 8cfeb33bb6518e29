"""Quantised weights: counted exactly, placed and rehearsed like any other, and the libraries' own numbers."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaControlNetPipeline
from drawing import draw
from torch import nn

from sana_deploy import load_pipeline, place, rehearse
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.formats import Format, Quantization
from sana_deploy.declare.pipelines import SANA_CONTROLNET
from sana_deploy.declare.policies import QUANTIZED, QUANTIZERS, quantization_of
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError, PlanError
from sana_deploy.facts.catalogue import NAMES
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.artifact import Plan
from sana_deploy.rehearsal.meta_modules import stand_in
from sana_deploy.rehearsal.rehearse import open_host
from sana_deploy.run import quantize
from sana_deploy.run.quantize import linears_of, parts_of, stored_bytes

Small = Callable[..., DeploySpec]
Describe = Callable[..., Machine]
NF4_TEXT = "precision.quantization.text_encoder=nf4"
KINDS: tuple[Quantization, ...] = ("int8", "nf4")


@pytest.mark.parametrize("model", ["tiny", *NAMES])
@pytest.mark.parametrize("quantization", [None, *KINDS])
def test_planned_bytes_are_those_of_the_tensors(tiny: Path, model: str, quantization: Quantization | None) -> None:
    for name, facts in open_checkpoint(compose_spec([f"model={model}"]).model).components.items():
        form = Format("bfloat16", None if name == "vae" else quantization)
        module = stand_in(facts, form)
        linears = linears_of(module)
        assert facts.linears.elements == sum(one.weight.numel() for one in linears.values())
        assert facts.linears.rows == sum(one.weight.shape[0] for one in linears.values())
        tensors = [*module.parameters(), *module.buffers()]
        assert facts.weights_bytes(form) == sum(part.nbytes for tensor in tensors for part in parts_of(tensor))


def libraries_own(tiny: Path, spec: DeploySpec) -> SanaControlNetPipeline:
    """The same pipeline as diffusers loads it, quantised by torchao or in bitsandbytes' own layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    dtypes = {name: getattr(torch, dtype) for name, dtype in spec.precision.components.items()}
    pipeline = SanaControlNetPipeline.from_pretrained(tiny, dtype=dtypes)
    for name, kept in spec.precision.quantization.items():
        module = getattr(pipeline, name)
        if kept == "int8":
            quantize_(module, Int8WeightOnlyConfig())
        for key, linear in linears_of(module).items() if kept == "nf4" else ():
            owner, _, leaf = key.removesuffix(".weight").rpartition(".")
            made = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None,
                              compute_dtype=dtypes[name], compress_statistics=False, quant_type="nf4")  # fmt: skip
            made.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4",
                                     compress_statistics=False)  # fmt: skip
            made.bias = linear.bias
            setattr(module.get_submodule(owner), leaf, made.to("cpu"))
    return pipeline


@pytest.mark.parametrize("policy", QUANTIZED)
def test_the_image_is_the_libraries_own_bit_for_bit(tiny: Path, small: Small, policy: str) -> None:
    spec = small(f"precision={policy}")
    pipeline = load_pipeline(compile_spec(spec))
    wanted = quantization_of(policy, SANA_CONTROLNET)
    assert set(wanted) <= {"text_encoder", "transformer", "controlnet"}, "the VAE is convolutions"
    for name, kept in wanted.items():
        module = getattr(pipeline, name)
        assert all(quantize.is_quantized(one.weight) for one in linears_of(module).values())
        assert sum(stored_bytes(one) for one in module.parameters()) < sum(one.nbytes for one in module.parameters())
        assert kept == spec.precision.quantization[name]
    assert np.array_equal(draw(pipeline, spec), draw(libraries_own(tiny, spec), spec))


@pytest.mark.parametrize("policy", ["int8", "nf4"])
@pytest.mark.parametrize("hardware", ["multi_gpu_balanced", "custom_map"])
def test_on_virtual_gpus_it_is_the_same_image(small: Small, policy: str, hardware: str) -> None:
    each_alone = "hardware.device_map={text_encoder: 0, vae: 1, transformer: 0, controlnet: 1}"
    place_it = ["hardware=custom_map", each_alone, "hardware.knobs=[text_encoder_offload]"]
    chosen = place_it if hardware == "custom_map" else ["hardware=multi_gpu_balanced"]
    spec = small(f"precision={policy}", "machine=2xrtx4090", *chosen)
    plan = compile_spec(spec)
    here = load_pipeline(compile_spec(small(f"precision={policy}")))
    resolved = plan.resolve()
    host = open_host(resolved, "numbers")
    pipeline = load_pipeline(resolved, host=host)
    with host:
        drawn = draw(pipeline, spec)
    assert np.array_equal(drawn, draw(here, spec))


def test_a_pipeline_in_memory_is_quantised_when_placed(tiny: Path, small: Small) -> None:
    spec = small("precision=int8")
    plan = compile_spec(spec)
    pipeline = SanaControlNetPipeline.from_pretrained(tiny, dtype=torch.bfloat16)
    place(pipeline, plan.resolve())
    assert np.array_equal(draw(pipeline, spec), draw(load_pipeline(plan), spec))


@pytest.mark.parametrize("policy", ["int8", "nf4"])
def test_lora_loads_and_unloads_on_quantised_weights(tiny: Path, small: Small, policy: str) -> None:
    spec = small(f"precision={policy}")
    pipeline = load_pipeline(compile_spec(spec))
    layer = pipeline.transformer.transformer_blocks[0].attn1.to_q
    weights = {
        f"transformer.transformer_blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2)))
    }
    before = draw(pipeline, spec)
    pipeline.load_lora_weights(weights)
    assert not np.array_equal(draw(pipeline, spec), before)
    pipeline.unload_lora_weights()
    assert np.array_equal(draw(pipeline, spec), before)


@pytest.mark.slow
@pytest.mark.parametrize("policy", QUANTIZED)
@pytest.mark.parametrize("gpus", ["1xrtx4090", "2xrtx3060"])
def test_plans_of_the_full_model_agree_with_rehearsals(policy: str, gpus: str) -> None:
    plan = compile_spec(compose_spec([
        "model=sana_1600m_controlnet", f"precision={policy}", "machine=virtual", f"machine.gpus={gpus}",
        "workload.steps=2",
    ]))  # fmt: skip
    for gpu in rehearse(plan, "shapes").report.gpus:
        assert abs(gpu.planned_error) < 0.02
    kept = {name: part.quantization for name, part in plan.components.items() if part.quantization}
    assert kept == quantization_of(policy, SANA_CONTROLNET)


@pytest.mark.parametrize("quantization", KINDS)
def test_without_the_library_planning_goes_on_and_loading_names_the_extra(
    tiny: Path, small: Small, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str, package: str | None = None, real: Any = importlib.util.find_spec) -> Any:
        return None if name in QUANTIZERS[quantization] else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    plan = compile_spec(small(f"precision={quantization}"))
    assert plan.components["transformer"].quantization == quantization
    with pytest.raises(InvalidSpecError, match="not installed") as caught:
        load_pipeline(plan)
    packages = {"int8": "'torchao>=0.18'", "nf4": "'bitsandbytes>=0.48' 'torchao>=0.18'"}[quantization]
    assert caught.value.hint == f"pip install {packages}", "works from a checkout, a wheel and a registry alike"


def test_the_vae_is_refused_and_int8_in_float16_is_warned_of(small: Small) -> None:
    with pytest.raises(InvalidSpecError, match="the vae is convolutions"):
        small("+precision.quantization.vae=int8")
    plan = compile_spec(small("precision=mixed_bf16", "precision.quantization.transformer=int8"))
    (warning,) = [one for one in plan.diagnostics if one.type == "fragile_dtype"]
    assert warning.where == "precision.components.transformer"
    assert "up to 127 times larger" in warning.message
    assert not [one for one in compile_spec(small("precision=int8")).diagnostics if one.type == "fragile_dtype"]


def test_that_int8_products_leave_float16_s_range_is_true() -> None:
    weight = torch.full((8, 1024), 0.5, dtype=torch.float16)
    inputs = torch.full((1, 1024), 1.0, dtype=torch.float16)
    exact = inputs @ weight.T
    survival: dict[Quantization, bool] = {"int8": False, "nf4": True}
    for quantization, survives in survival.items():
        made = nn.functional.linear(inputs, quantize.quantize(weight, quantization))
        assert bool(torch.isfinite(made).all()) is survives
    assert torch.isfinite(exact).all()


def test_hints_offer_quantised_weights_where_nothing_else_helps(machine: Describe) -> None:
    overrides = ["model=sana_1600m_controlnet", "hardware=single_gpu"]
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(compose_spec(overrides), machine(8))
    assert "precision.quantization.text_encoder=nf4" in caught.value.hint
    plan = compile_spec(compose_spec([*overrides, "precision.quantization.text_encoder=nf4"]), machine(8))
    assert plan.feasible


def test_another_policy_is_offered_with_the_weights_that_its_command_gives(machine: Describe) -> None:
    base = ["model=sana_1600m_controlnet", "hardware=custom_map",
            "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 0}"]  # fmt: skip
    t4 = machine(15, capability=(7, 5))
    for sixteen_bit, kept in ((["precision=int8_text_encoder"], False), (["precision=mixed_bf16", NF4_TEXT], True)):
        with pytest.raises(InfeasibleError) as caught:
            compile_spec(compose_spec([*base, *sixteen_bit]), t4)
        offered = [word for word in caught.value.hint.split() if word.startswith("precision=")]
        override = [NF4_TEXT] if kept else []
        for word in offered:
            assert compile_spec(compose_spec([*base, word.rstrip(";"), *override]), t4).feasible
        assert ("precision=mixed_fp32" in offered) is kept, "it fits one T4 with nf4 text encoder only"


def test_a_plan_records_the_library_that_quantises(small: Small) -> None:
    plan = compile_spec(small("precision=nf4"))
    assert {"torchao", "bitsandbytes"} <= set(plan.libraries)
    assert not {"torchao", "bitsandbytes"} & set(compile_spec(small()).libraries)
    stale = plan.model_copy(update={"libraries": {**plan.libraries, "torchao": "0.1"}})
    with pytest.raises(PlanError, match=r"torchao: was 0\.1, is "):
        stale.resolve()
    assert Plan.model_validate_json(plan.to_json()).components["transformer"].quantization == "nf4"


def test_loading_says_nothing_of_kernels_for_other_hosts(capfd: pytest.CaptureFixture[str]) -> None:
    quantize._torchao.cache_clear()
    before = logging.root.manager.disable
    quantize.quantize(torch.ones(4, 4), "int8")
    assert logging.root.manager.disable == before
    assert "Failed to load" not in capfd.readouterr().err


AVX512_BF16 = """
import importlib.abc, importlib.machinery, pathlib, sys

sys.modules["kernels"] = None  # as where it is not installed


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.has_avx512bf16 = lambda: pathlib.Path(__file__).with_name("asked").touch() or True

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""
"""Makes bitsandbytes take any processor for one with AVX512_BF16, in a Python that finds it as `sitecustomize`."""


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["the command", "the quantiser"])
def test_on_a_processor_with_avx512_bf16_nothing_is_said_of_its_kernels(
    cli: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, tmp_path: Path, imported: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AVX512_BF16)
    elsewhere = {"PYTHONPATH": str(tmp_path)}
    if imported == "the quantiser":
        script = "from sana_deploy.run import quantize; quantize._nf4()"
        ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, **elsewhere}, capture_output=True,
                               text=True, check=False)  # fmt: skip
    else:
        ended = cli("until=apply", "precision=fp32", "machine=2xt4", **elsewhere)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "asked").exists(), "the processor is emulated"
    assert "Failed to load" not in ended.stderr
