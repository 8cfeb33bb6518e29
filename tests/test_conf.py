"""Every YAML composes, says what it is for, and shows how to run it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sana_deploy.declare.compose import compose_spec, conf_dir
from sana_deploy.declare.keys import known_keys
from sana_deploy.declare.pipelines import SANA_CONTROLNET
from sana_deploy.declare.policies import POLICIES, QUANTIZED, dtypes_of, quantization_of
from sana_deploy.errors import ComposeError

GROUPS = ("model", "hardware", "precision", "machine", "workload")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]
FILES = sorted(conf_dir().rglob("*.yaml"))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    needed = {"checkpoint": ["model.source=folder"], "virtual": ["machine.gpus=2xt4"]}
    assert compose_spec([f"{group}={option}", *needed.get(option, [])])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(conf_dir()).as_posix())
def test_every_file_begins_with_its_purpose_and_a_command(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#") and not line.startswith("# @package")][:6]
    assert len(head[0]) > 20
    assert any("python -m sana_deploy" in line for line in head)


@pytest.mark.parametrize("option", sorted({*POLICIES, *QUANTIZED}))
def test_a_policy_derives_from_auto_and_says_only_what_differs(option: str) -> None:
    base, own = (OmegaConf.load(conf_dir() / "precision" / f"{name}.yaml") for name in ("auto", option))
    assert own.defaults == ["auto", "_self_"]
    assert list(own) == ["defaults", "name", "components", *(["quantization"] if option in QUANTIZED else [])]
    assert all(value is not None for key in list(own)[2:] for value in own[key].values())
    composed = compose_spec([f"precision={option}", "precision.audit=true"]).precision
    assert composed.audit
    assert set(composed.model_dump()) == set(base) <= {key.rpartition(".")[2] for key in known_keys()}


def test_hardware_and_precision_combine_freely() -> None:
    hardware = [option for group, option in OPTIONS if group == "hardware"]
    precision = [option for group, option in OPTIONS if group == "precision"]
    for one, other in product(hardware, precision):
        spec = compose_spec([f"hardware={one}", f"precision={other}"])
        assert (spec.hardware.strategy, spec.precision.name) == (one, other)


def test_the_workload_follows_the_model_s_resolution() -> None:
    assert compose_spec(["model=tiny"]).workload.height == 512
    assert compose_spec(["model=sana_1600m_controlnet"]).workload.height == 1024


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model=tinny", "did you mean 'tiny'?"),
        ("hardware=multi_gpu", "did you mean 'multi_gpu_balanced'?"),
        ("workload.heigth=64", "did you mean 'height'?"),
        ("untill=compile", "did you mean 'until'?"),
    ],
)
def test_what_hydra_refuses_gets_the_nearest_word(override: str, hint: str) -> None:
    with pytest.raises(ComposeError) as caught:
        compose_spec([override])
    assert caught.value.hint == hint


def test_composing_inside_another_hydra_app_leaves_it_as_it_was(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "other.yaml").write_text("value: 3\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        compose_spec()
        assert compose("other").value == 3


def test_the_policies_that_hints_offer_are_those_of_the_config_group() -> None:
    options = {option for group, option in OPTIONS if group == "precision"}
    assert {*POLICIES, *QUANTIZED, "auto"} == options
    for name in POLICIES:
        assert compose_spec([f"precision={name}"]).precision.components == dtypes_of(name, SANA_CONTROLNET)
    for name, policy in QUANTIZED.items():
        precision = compose_spec([f"precision={name}"]).precision
        assert precision.components == dtypes_of(policy.dtypes, SANA_CONTROLNET)
        kept = {key: word for key, word in precision.quantization.items() if word}
        assert kept == quantization_of(name, SANA_CONTROLNET)
