"""The published schema is current, and plans hold to it by an independent validator."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from sana_deploy.plan.schema import PATH, plan_schema

VALIDATOR = Draft202012Validator(plan_schema())


def test_the_published_file_is_the_schema_of_the_code() -> None:
    assert json.loads(PATH.read_text(encoding="utf-8")) == plan_schema(), "run python -m sana_deploy.plan.schema"
    Draft202012Validator.check_schema(plan_schema())


@pytest.mark.parametrize(
    "chosen",
    [
        [],
        ["model=sana_1600m_controlnet", "machine=2x8gb"],
        ["model=sana_600m_controlnet", "machine=1xt4", "precision=auto", "hardware=single_gpu"],
        ["model=sana_600m_controlnet", "machine=2xrtx3060", "hardware=custom_map", "hardware.knobs=[vae_tiling]"],
    ],
)
def test_what_the_command_prints_is_valid(
    here: Callable[..., subprocess.CompletedProcess[str]], tiny: Path, chosen: list[str]
) -> None:
    done = here("until=compile", "output=json", *chosen)
    assert done.returncode == 0, done.stderr
    VALIDATOR.validate(json.loads(done.stdout)["plan"])


def test_what_is_no_plan_is_not_valid_and_what_is_newer_is() -> None:
    plan: dict[str, Any] = json.loads((Path(__file__).parent / "plans" / "1.1.json").read_text(encoding="utf-8"))
    VALIDATOR.validate({**plan, "added_by_a_later_minor": 1})
    for broken in ({"schema_version": "2.0"}, {"digest": "md5:0"}, {"slots": None}, {"home": 1.5}):
        with pytest.raises(ValidationError):
            VALIDATOR.validate({**copy.deepcopy(plan), **broken})
