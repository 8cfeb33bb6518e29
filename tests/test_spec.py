"""The declaration: bounds, misspellings, immutability."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sana_deploy.declare.compose import compose_spec
from sana_deploy.errors import InvalidSpecError


@pytest.mark.parametrize(
    ("override", "where", "says"),
    [
        ("workload.height=1000", "workload.height", "multiple of 32 (got 1000)"),
        ("workload.width=0", "workload.width", "greater than or equal to 32"),
        ("workload.batch=0", "workload.batch", "greater than or equal to 1"),
        ("workload.steps=0", "workload.steps", "greater than or equal to 1"),
        ("workload.steps=2.5", "workload.steps", "valid integer"),
        ("workload.seed=-1", "workload.seed", "greater than or equal to 0"),
        ("workload.guidance_scale=nan", "workload.guidance_scale", "finite number"),
        ("workload.prompt=null", "workload.prompt", "valid string"),
        ("precision.components.vae=bf16", "precision.components.vae", "not one of float16, bfloat16, float32"),
        ("until=genrate", "until", "not one of compile, resolve, apply, generate"),
        ("output=yaml", "output", "not one of text, json"),
        ("+hardware.gpu=3", "hardware.gpu", "not known here"),
        ("+precision.components.unet=float16", "precision.components.unet", "'unet' is not a component"),
        ("precision=fp32 ~precision.components.vae", "precision", "no dtype for vae"),
    ],
)
def test_a_bad_value_is_named_with_its_place(override: str, where: str, says: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        compose_spec(override.split(" "))
    assert caught.value.where == where
    assert says in caught.value.message
    assert caught.value.exit_code == 3


def test_the_nearest_size_is_offered_and_works() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        compose_spec(["workload.height=1000"])
    override = caught.value.hint.split()[0]
    assert compose_spec([override]).workload.height == 992


def test_a_misspelled_value_gets_the_nearest_word() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        compose_spec(["precision.components.vae=bfloat"])
    assert caught.value.hint == "did you mean 'bfloat16'?"


def test_an_incomplete_custom_map_names_what_is_missing() -> None:
    with pytest.raises(InvalidSpecError, match="no entry for transformer"):
        compose_spec(["hardware=custom_map", "~hardware.device_map.transformer"])


def test_a_mandatory_value_left_out_is_named() -> None:
    with pytest.raises(InvalidSpecError) as caught:
        compose_spec(["model=checkpoint"])
    assert caught.value.where == "model.source"


def test_the_declaration_is_immutable() -> None:
    spec = compose_spec()
    with pytest.raises(ValidationError):
        spec.workload.steps = 3


def test_yaml_11_words_are_not_taken_for_other_types() -> None:
    assert compose_spec(["workload.prompt='12:30:45'"]).workload.prompt == "12:30:45"
    assert compose_spec(["workload.negative_prompt='on'"]).workload.negative_prompt == "on"
