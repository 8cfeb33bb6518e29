"""Words that are wrong: each is named with its place, and the hint is one that works."""

from __future__ import annotations

import pytest

from sana_deploy._units import MIB, parse_bytes
from sana_deploy.api import compile_plan
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.keys import known_keys
from sana_deploy.errors import ComposeError, InfeasibleError, InvalidSpecError, SanaDeployError

MAP = "hardware=custom_map"


def refused(*overrides: str) -> SanaDeployError:
    with pytest.raises((ComposeError, InvalidSpecError)) as caught:
        compose_spec(overrides)
    return caught.value


@pytest.mark.parametrize(
    "overrides",
    [
        (MAP, "hardware.device_map={text_encoder: 0, vea: 0, transformer: 0, controlnet: 0}"),
        (MAP, "hardware.device_map.vea=0"),
        (MAP, "+hardware.device_map.vea=0"),
        ("hardware.pin={vea: 0}",),
        ("precision.components.vea=float16",),
    ],
)
def test_a_misspelled_component_ends_with_3_however_it_is_written(overrides: tuple[str, ...]) -> None:
    problem = refused(*overrides)
    assert (problem.exit_code, problem.message) == (3, "'vea' is not a component")
    assert problem.where.endswith(".vea")
    assert problem.hint == "did you mean 'vae'?"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("+hardware.gpu=3", "gpu belongs to hardware=single_gpu"),
        ("hardware.gpu=3", "gpu belongs to hardware=single_gpu"),
        ("+hardware.knobs=[]", "knobs belongs to hardware=custom_map"),
        ("precison=fp16", "did you mean 'precision'?"),
        ("hardwere=single_gpu", "did you mean 'hardware'?"),
        ("seed=3", "did you mean 'workload.seed'?"),
        ("workloads.seed=3", "did you mean 'workload.seed'?"),
        ("precision.vae=float16", "did you mean 'precision.components.vae'?"),
        ("resolve.allw=[]", "did you mean 'allow'?"),
        ("+resolve.allw=[]", "did you mean 'allow'?"),
    ],
)
def test_a_key_that_is_not_there_gets_its_place_or_the_nearest_word(override: str, hint: str) -> None:
    assert refused(override).hint == hint


def test_groups_options_and_keys_are_read_from_the_configuration() -> None:
    keys = known_keys()
    assert keys["hardware.gpu"] == ("hardware=single_gpu",)
    assert set(keys["hardware.use"]) == {"hardware=single_gpu", "hardware=multi_gpu_balanced"}
    assert {"precision", "experiment", "until", "resolve.bind"} <= set(keys)
    assert not [key for key in keys if key.startswith(("hydra", "defaults"))]


VIRTUAL = ("machine=virtual", "machine.gpus=2x24GiB")


@pytest.mark.parametrize(
    ("before", "override", "works"),
    [
        ((), "hardware.keep_free=10", "hardware.keep_free=10GiB"),
        (VIRTUAL, "machine.used=1", "machine.used=1GiB"),
        (VIRTUAL, "machine.used=[1,2]", "machine.used=[8GiB,500MiB]"),
        (VIRTUAL, "machine.memory=8", "machine.memory=8GiB"),
        ((), "hardware.use=0", "hardware.use=[0]"),
        ((), "hardware.use=cuda:1", "hardware.use=[1]"),
        ((), "hardware.allow=vae_tiling", "hardware.allow=[vae_tiling]"),
        ((MAP,), "hardware.device_map.vae=cuda:1", "hardware.device_map.vae=1"),
        ((), "hardware.pin.vae=cuda:1", "hardware.pin.vae=1"),
        (("hardware=single_gpu",), "hardware.gpu=cuda:0", "hardware.gpu=0"),
    ],
)
def test_a_value_of_another_form_gets_the_form_that_works(before: tuple[str, ...], override: str, works: str) -> None:
    problem = refused(*before, override)
    assert problem.exit_code == 3
    assert works in problem.hint
    compose_spec([*before, works])


def test_no_gpu_is_offered_where_less_kept_free_would_do() -> None:
    small = ("machine=2xrtx4090", "model=sana_1600m_controlnet", "precision=mixed_bf16")
    with pytest.raises(InfeasibleError) as caught:
        compile_plan([*small, "hardware.keep_free=20GiB"])
    offers = caught.value.hint.removeprefix("this fits: ").split("; or ")
    assert offers[0].startswith("hardware.keep_free=")
    assert "machine" not in caught.value.hint
    compile_plan([*small, offers[0]])
    most = parse_bytes(offers[0].partition("=")[2], "hardware.keep_free") // MIB
    with pytest.raises(InfeasibleError):
        compile_plan([*small, f"hardware.keep_free={most + 256}MiB"])


def test_what_was_rejected_is_counted_in_sentences() -> None:
    with pytest.raises(InfeasibleError, match=r"\(2 have a dtype that GPU 0 only emulates\)"):
        compile_plan(["machine=1xt4", "model=sana_600m_controlnet", "precision=mixed_bf16"])
    with pytest.raises(InfeasibleError, match=r"\d+ lack memory on GPU 0"):
        compile_plan(["machine=virtual", "machine.gpus=2x2GiB", "model=sana_1600m_controlnet", "precision=fp32"])
