"""The registry of knobs is the one place that names them: whatever reads it sees a knob that is added there."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

import sana_deploy
from sana_deploy.api import compile_spec
from sana_deploy.declare.compose import compose_spec, conf_dir
from sana_deploy.declare.knobs import KNOBS, Knob, KnobDescription, clash, completed
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import InfeasibleError, InvalidSpecError
from sana_deploy.facts.machine import Machine
from sana_deploy.plan.knobs import EFFECTS, Effect
from sana_deploy.plan.profile import PipelineProfile
from sana_deploy.report.html import plan_page
from sana_deploy.report.wording import knob_words
from sana_deploy.run.outcome import Outcome

Small = Callable[..., DeploySpec]
Describe = Callable[..., Machine]
PACKAGE = Path(sana_deploy.__file__).parent
LARGE = ("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "precision=mixed_bf16")
NAMING = ("declare/knobs.py", "plan/knobs.py")
"""Files that name knobs; in `run/` each one is applied."""


def texts_of(path: Path) -> list[str]:
    """The texts of a file that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docs]
    return [node.value for node in found if isinstance(node.value, str)]


def test_no_other_file_names_a_knob() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in NAMING and not name.startswith("run/"):
            assert not [text for text in texts_of(path) if any(knob in text for knob in KNOBS)], name


def test_every_knob_has_an_effect_and_is_a_word_of_the_declaration() -> None:
    assert list(KNOBS) == list(EFFECTS) == [one.name for one in KNOBS.values()]
    words: TypeAdapter[str] = TypeAdapter(Knob)
    assert [words.validate_python(knob) for knob in KNOBS] == list(KNOBS)
    with pytest.raises(ValidationError):
        words.validate_python("vae_slice")


def test_the_configuration_and_the_page_on_knobs_say_what_each_knob_does() -> None:
    for option in ("single_gpu", "multi_gpu_balanced", "custom_map"):
        text = (conf_dir() / "hardware" / f"{option}.yaml").read_text(encoding="utf-8")
        offered = [one for one in KNOBS.values() if one.in_maps or option != "custom_map"]
        at = [text.index(f"#   {one.name:<21} {one.help}") for one in offered]
        assert at == sorted(at), "cheapest first"
        assert text.count("#   ") >= len(offered)
    page = (PACKAGE.parent / "docs" / "knobs.md").read_text(encoding="utf-8")
    assert all(f"| `{knob}` |" in page for knob in KNOBS)


def test_pixels_change_only_where_it_was_asked_for() -> None:
    assert [knob for knob, one in KNOBS.items() if one.asked] == ["vae_tiling"]
    assert all(one.asked == (one.exactness == "changes") for one in KNOBS.values())
    assert KNOBS["vae_tiling"].words.endswith("can change pixels")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> str:
    """A knob that keeps an eighth of all weights."""
    knob = KnobDescription(
        name="few_weights", role="denoiser", help="one weight of eight is kept", exactness="changes", asked=True
    )

    def change(profile: PipelineProfile) -> PipelineProfile:
        parts = profile.components.items()
        return replace(
            profile,
            components={name: replace(part, weights_bytes=part.weights_bytes // 8) for name, part in parts},
        )

    monkeypatch.setitem(KNOBS, knob.name, knob)
    monkeypatch.setitem(EFFECTS, knob.name, Effect(change))
    return knob.name


def allowing(spec: DeploySpec, *knobs: str) -> DeploySpec:
    return spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"allow": list(knobs)})})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the type of the declaration was made before
def test_an_added_knob_is_planned_priced_offered_and_explained(made_up: str, small: Small, machine: Describe) -> None:
    spec, box = small(*LARGE, "hardware=single_gpu", "hardware.allow=[]"), machine(8.5)
    with pytest.raises(InfeasibleError) as caught:
        compile_spec(spec, box)
    assert f"hardware.allow=[{made_up}] (can change pixels)" in caught.value.hint
    plan = compile_spec(allowing(spec, made_up), box)
    assert plan.knobs == [made_up]
    assert plan.considered.settings == 2
    price = plan.knob_prices[made_up]
    assert price.bytes_saved == pytest.approx(
        7 * sum(part.weights_bytes for part in plan.components.values()), rel=1e-6
    )
    assert price.bytes_per_image == 0
    assert knob_words(made_up) == "one weight of eight is kept; can change pixels"
    page = plan_page(plan, Outcome(status="done", exit_code=0, stage="compile"), "")
    assert f"{made_up} saves" in page
    assert "one weight of eight is kept" in page
    assert compile_spec(allowing(spec, made_up), machine(24)).knobs == [], "it is not on without need"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_knobs_that_exclude_each_other_are_never_on_together(
    made_up: str, small: Small, machine: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, box = small(*LARGE, "hardware=single_gpu", "workload.batch=2"), machine(24)
    knobs = ("vae_slicing", "text_encoder_offload", made_up)
    assert compile_spec(allowing(spec, *knobs), box).considered.settings == 8
    monkeypatch.setitem(KNOBS, made_up, replace(KNOBS[made_up], excludes=("text_encoder_offload",)))
    assert clash(["vae_slicing", "text_encoder_offload", made_up]) == (made_up, "text_encoder_offload")
    assert compile_spec(allowing(spec, *knobs), box).considered.settings == 6


def test_a_map_cannot_name_knobs_that_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOBS, "vae_tiling", replace(KNOBS["vae_tiling"], excludes=("text_encoder_offload",)))
    with pytest.raises(InvalidSpecError, match="exclude each other") as caught:
        compose_spec(["hardware=custom_map", "hardware.knobs=[text_encoder_offload,vae_tiling]"])
    assert caught.value.where == "hardware"


def test_an_included_knob_is_on_with_the_one_that_includes_it() -> None:
    assert clash(["vae_bands", "vae_tiling"]) == ("vae_tiling", "vae_bands")
    assert completed(["vae_tiling", "encode_once"]) == ("encode_once", "vae_slicing", "vae_tiling")


@pytest.mark.parametrize("knobs", [("split_controlnet",), ("vae_slicing", "split_controlnet", "vae_tiling"), ()])
def test_what_may_be_on_is_what_the_declaration_allows(knobs: tuple[Any, ...], small: Small, machine: Describe) -> None:
    plan = compile_spec(small(*LARGE, f"hardware.allow=[{','.join(knobs)}]"), machine(10, 10))
    assert set(plan.knobs) <= set(knobs)
