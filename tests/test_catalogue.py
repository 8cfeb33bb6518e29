"""Published models ship as facts: which modules each has, and that planning needs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_args

import pytest

from sana_deploy import Plan, compile_plan, rehearse
from sana_deploy.declare.compose import compose_spec, conf_dir
from sana_deploy.declare.spec import CatalogueModel
from sana_deploy.errors import CheckpointError
from sana_deploy.facts import catalogue
from sana_deploy.facts.checkpoint import open_checkpoint
from sana_deploy.facts.published import MODULES, PUBLISHED

AFTER_THE_FIRST = ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale")
"""Keys that diffusers 0.32, which wrote the configs of the first models, had not yet."""


def config_of(name: str) -> dict[str, Any]:
    """The transformer's config, which is the first of what works in every step."""
    return catalogue.shipped(PUBLISHED[name].denoising[0])["config"]  # type: ignore[no-any-return]


def test_every_catalogued_model_can_be_named_and_has_its_file_in_conf() -> None:
    assert get_args(CatalogueModel.model_fields["name"].annotation) == catalogue.NAMES
    for name in catalogue.NAMES:
        model = compose_spec([f"model={name}"]).model
        assert isinstance(model, CatalogueModel)
        assert (model.name, model.pipeline) == (name, PUBLISHED[name].pipeline)
        side = config_of(name)["sample_size"] * 32
        assert model.resolution == (1024 if name.endswith("controlnet") else side)
    files = {path.stem for path in (conf_dir() / "model").glob("*.yaml") if not path.stem.startswith("tiny")}
    assert files == {*catalogue.NAMES, "checkpoint"}


def test_every_module_belongs_to_a_model_and_has_one_file() -> None:
    assert set(MODULES) == {module for one in PUBLISHED.values() for module in one.modules}
    files = {path.stem for path in catalogue.FOLDER.glob("*.json") if not path.stem.endswith(".needs")}
    assert files == set(MODULES)


@pytest.mark.parametrize(
    ("name", "layers", "width", "parameters"),
    [
        ("sana_600m", 28, 1152, 0.592e9),
        ("sana_1600m", 20, 2240, 1.604e9),
        ("sana_1600m_4k", 20, 2240, 1.604e9),
        ("sana15_1600m", 20, 2240, 1.605e9),
        ("sana15_4800m", 60, 2240, 4.722e9),
        ("sana_sprint_600m", 28, 1152, 0.594e9),
        ("sana_sprint_1600m", 20, 2240, 1.610e9),
    ],
)
def test_each_model_has_its_published_size(name: str, layers: int, width: int, parameters: float) -> None:
    config = config_of(name)
    assert config["num_layers"] == layers
    assert config["num_attention_heads"] * config["attention_head_dim"] == width == config["cross_attention_dim"]
    assert catalogue.shipped(PUBLISHED[name].denoising[0])["parameters"] == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize(("name", "size"), [("sana_1600m", 496), ("sana_1600m_512", 496), ("sana_1600m_2k", 526)])
def test_a_config_is_as_long_as_the_published_file(name: str, size: int) -> None:
    """Its keys and values are those of the hub's file, whose size in bytes the hub lists."""
    kept = {key: value for key, value in config_of(name).items() if value is not None and key not in AFTER_THE_FIRST}
    named = {**kept, "_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.32.0.dev0"}
    assert len(json.dumps(named, indent=2, sort_keys=True) + "\n") == size


def test_what_sets_the_generations_apart_is_in_their_configs() -> None:
    normed = {name for name in PUBLISHED if config_of(name)["qk_norm"] == "rms_norm_across_heads"}
    assert normed == {name for name in PUBLISHED if name.startswith(("sana15", "sana_sprint"))}
    assert {name for name in PUBLISHED if config_of(name)["guidance_embeds"]} == {
        "sana_sprint_600m",
        "sana_sprint_1600m",
    }
    positions = {name: config_of(name)["interpolation_scale"] for name in PUBLISHED}
    assert {name: scale for name, scale in positions.items() if scale} == {"sana_1600m_2k": 1.0, "sana_1600m_4k": 2.0}
    assert catalogue.shipped("sana_1600m_4k")["fixed_bytes"] == 4 * 128**2 * 2240, "positions stay float32"


def test_a_model_runs_under_every_pipeline_that_it_is_made_for_and_no_other() -> None:
    assert catalogue.pipelines("sana_1600m") == ("SanaPipeline", "SanaPAGPipeline")
    assert catalogue.pipelines("sana_sprint_600m") == ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")
    assert catalogue.pipelines("sana_600m_controlnet") == ("SanaControlNetPipeline",)
    for name in catalogue.NAMES:
        for pipeline in catalogue.pipelines(name):
            checkpoint = open_checkpoint(compose_spec([f"model={name}", f"model.pipeline={pipeline}"]).model)
            assert set(checkpoint.components) == set(catalogue.load(name))
        unsaid = CatalogueModel(kind="catalogue", name=name)  # type: ignore[arg-type]
        assert open_checkpoint(unsaid).pipeline.class_name == PUBLISHED[name].pipeline
    with pytest.raises(CheckpointError, match="guidance_embeds"):
        open_checkpoint(compose_spec(["model=sana_1600m", "model.pipeline=SanaSprintPipeline"]).model)


def planned(model: str, gpus: str, *overrides: str) -> Plan:
    return compile_plan([f"model={model}", "machine=virtual", f"machine.gpus={gpus}", *overrides])


def test_planning_a_published_model_imports_no_torch() -> None:
    plan = "compile_plan([f'model={name}', f'model.pipeline={pipeline}', 'machine=8xh100', 'runtime=eager'])"
    script = (
        "import sys\n"
        "from sana_deploy import compile_plan\n"
        "from sana_deploy.facts import catalogue\n"
        f"found = [{plan} for name in catalogue.NAMES for pipeline in catalogue.pipelines(name)]\n"
        "assert all(plan.feasible for plan in found)\n"
        "assert {plan.pipeline_class for plan in found} >= {'SanaPAGPipeline', 'SanaSprintImg2ImgPipeline'}\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["2x12GiB", "2x16GiB"])
def test_the_4800m_model_runs_on_two_small_gpus_in_16_bits(gpus: str) -> None:
    plan = planned("sana15_4800m", gpus, "precision=mixed_bf16")
    assert plan.parts["transformer"].weights_bytes == pytest.approx(4.722e9 * 2, rel=1e-3)
    assert len(plan.slots) == 2
    for gpu in rehearse(plan, "shapes").report.gpus:
        assert gpu.planned_error == pytest.approx(0, abs=0.005)
        assert gpu.peak_bytes < gpu.capacity_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "pipeline"),
    [
        ("sana_1600m_2k", "SanaPipeline"),
        ("sana_1600m_4k", "SanaPipeline"),
        ("sana15_1600m", "SanaPAGPipeline"),
        ("sana_sprint_600m", "SanaSprintPipeline"),
        ("sana_sprint_1600m", "SanaSprintImg2ImgPipeline"),
    ],
)
def test_a_plan_is_what_a_rehearsal_of_the_model_s_own_size_finds(model: str, pipeline: str) -> None:
    plan = planned(model, "2xh100", f"model.pipeline={pipeline}")
    for gpu in rehearse(plan, "shapes").report.gpus:
        assert gpu.planned_error == pytest.approx(0, abs=0.005), gpu.device
