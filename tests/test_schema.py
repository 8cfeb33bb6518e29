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

import sana_deploy.plan
from sana_deploy.errors import PlanError
from sana_deploy.plan import schema
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.digest import digest_of
from sana_deploy.plan.schema import PATH, plan_schema

VALIDATOR = Draft202012Validator(plan_schema())
RELEASED = sorted((Path(__file__).parent / "plans").glob("*.json"))


def test_the_schema_lies_in_the_package() -> None:
    assert PATH.parent == Path(sana_deploy.plan.__file__).parent


def test_the_module_writes_the_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "PATH", tmp_path / "plan.schema.json")
    schema.main()
    assert (tmp_path / "plan.schema.json").read_bytes() == PATH.read_bytes()


def test_the_package_offers_the_artifact_and_nothing_else() -> None:
    assert sana_deploy.plan.Plan is Plan
    with pytest.raises(AttributeError, match="has no attribute 'Sheet'"):
        _ = sana_deploy.plan.Sheet


@pytest.mark.parametrize("odd", [None, [], 1, "x", {"files": None}, {"files": {"a": None}}])
def test_a_damaged_plan_has_a_digest_too_so_that_it_is_refused_for_its_damage(odd: Any) -> None:
    values = json.loads(RELEASED[-1].read_text(encoding="utf-8"))
    values["checkpoint"]["content"] = {"vae": odd}
    values["spec"]["model"]["components"] = odd
    values["spec"]["workload"] = odd
    with pytest.raises(PlanError, match="is damaged at spec"):
        Plan.from_values({**values, "digest": digest_of(values)}, "plan.json")


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


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_plans_of_every_version_are_valid_and_are_saved_as_they_were(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    plan = Plan.load(path)
    assert plan.to_json() == text
    assert plan.digest == digest_of(json.loads(text))
    assert (plan.pipeline_class, plan.units) == ("SanaControlNetPipeline", {})
    VALIDATOR.validate(json.loads(text))


def test_equal_decisions_have_equal_digests_whatever_minor_version_wrote_them() -> None:
    third, fourth = (Plan.load(path) for path in RELEASED if path.stem in ("1.3", "1.4"))
    assert third.digest == fourth.digest
    values = json.loads(fourth.to_json())
    assert digest_of({**values, "schema_version": "1.12", "added_later": {}, "and_later": None}) == fourth.digest
    changes: list[dict[str, Any]] = [
        {"added_later": 1},
        {"pipeline_class": "SanaPipeline"},
        {"units": {"vae.1": {}}},
        {"slots": []},
    ]
    for change in changes:
        assert digest_of({**values, **change}) != fourth.digest, change


def test_a_plan_for_a_pipeline_that_is_not_known_is_refused() -> None:
    values = json.loads(RELEASED[-1].read_text(encoding="utf-8")) | {"pipeline_class": "FluxPipeline"}
    with pytest.raises(PlanError, match=r"is for a FluxPipeline, this sana_deploy .* knows SanaControlNetPipeline"):
        Plan.from_values({**values, "digest": digest_of(values)}, "plan.json")


def test_what_is_no_plan_is_not_valid_and_what_is_newer_is() -> None:
    plan: dict[str, Any] = json.loads((Path(__file__).parent / "plans" / "1.1.json").read_text(encoding="utf-8"))
    VALIDATOR.validate({**plan, "added_by_a_later_minor": 1})
    for broken in ({"schema_version": "2.0"}, {"digest": "md5:0"}, {"slots": None}, {"home": 1.5}):
        with pytest.raises(ValidationError):
            VALIDATOR.validate({**copy.deepcopy(plan), **broken})
