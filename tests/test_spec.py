"""The declaration: bounds, misspellings, immutability."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sana_deploy._units import GIB
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.spec import VirtualMachine
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


VIRTUAL = ("machine=virtual", "machine.gpus=2xt4")
FORM = "write it like 8GiB or 500MiB"


@pytest.mark.parametrize(
    ("overrides", "where", "message", "hint"),
    [
        (["hardware.keep_free=much"], "hardware.keep_free", "'much' is no size in bytes", FORM),
        (["hardware.keep_free='8'"], "hardware.keep_free", "'8' is no size in bytes", FORM),
        (["hardware.keep_free=-1GiB"], "hardware.keep_free", "memory cannot be negative (got '-1GiB')", ""),
        ([*VIRTUAL, "machine.memory='{a}'"], "machine.memory", "'{a}' is no size in bytes", FORM),
        ([*VIRTUAL, "machine.used=much"], "machine.used", "'much' is no size in bytes", FORM),
        ([*VIRTUAL, "machine.used=[1GiB,much]"], "machine.used", "'much' is no size in bytes", FORM),
        ([*VIRTUAL, f"machine.used={'9' * 400}GiB"], "machine.used", f"'{'9' * 400}GiB' is no size in bytes", FORM),
    ],
)
def test_a_size_is_checked_with_the_declaration(overrides: list[str], where: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        compose_spec(overrides)
    assert caught.value.where == where
    assert caught.value.message.startswith(message)
    assert caught.value.hint.startswith(hint)
    assert type(caught.value) is InvalidSpecError


def test_a_size_stays_as_it_was_written_and_a_copy_has_its_own_bytes() -> None:
    spec = compose_spec(["hardware.keep_free=0.5 GiB", *VIRTUAL, "machine.used=[1GiB,500MB]", "machine.memory=8GiB"])
    assert spec.hardware.keep_free_bytes == GIB // 2
    assert spec.hardware.model_copy(update={"keep_free": "2GiB"}).keep_free_bytes == 2 * GIB
    assert isinstance(spec.machine, VirtualMachine)
    assert (spec.machine.memory_bytes, spec.machine.used_bytes) == (8 * GIB, [GIB, 500_000_000])
    values = spec.model_dump(mode="json")
    assert (values["hardware"]["keep_free"], values["machine"]["used"]) == ("0.5 GiB", ["1GiB", "500MB"])
    assert compose_spec(["hardware=custom_map"]).hardware.keep_free_bytes == 0
