"""A plan file is data: whatever is done to one, it is read, or refused with our error and code 5; nothing runs."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sana_deploy.api import compile_plan
from sana_deploy.errors import PlanError
from sana_deploy.plan.artifact import Plan
from sana_deploy.plan.digest import digest_of

RELEASED = sorted((Path(__file__).parent / "plans").glob("*.json"))
ODD: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, 10**30, 2**63, float("nan"), "", "cpu", "../../etc/passwd", "__import__('os')",
    "\ud800", "9" * 5000, "custom_map", "4xt4", "1e999GiB", [], [[]], {}, {"a": 1},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutated(values: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Set or delete one to four values anywhere; mostly the digest is made to match, to get past it."""
    changed = copy.deepcopy(values)
    for _ in range(chance.choice((1, 1, 2, 4))):
        *parents, last = chance.choice(list(places(changed)))
        node: Any = changed
        for key in parents:
            node = node[key]
        if chance.random() < 0.3:
            del node[last]
        else:
            node[last] = copy.deepcopy(chance.choice(ODD))
    if chance.random() < 0.8:
        with contextlib.suppress(AttributeError):  # of what is no plan at all, there is no digest
            changed["digest"] = digest_of(changed)
    return changed


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_mutations_end_with_our_error_or_none(seed: int) -> None:
    chance, read = random.Random(seed), 0
    released = [json.loads(path.read_text(encoding="utf-8")) for path in RELEASED]
    for _ in range(2500):
        values = json.loads(json.dumps(mutated(chance.choice(released), chance)))
        with contextlib.suppress(PlanError):  # code 5; anything else fails the test
            Plan.from_values(values, "a hostile file").resolve()
            read += 1
    assert read > 50, "some changes leave a plan that can be applied"


def test_mutations_of_a_plan_for_a_folder_end_with_our_error_or_none(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana_deploy.facts.hub._download", None)  # whatever it names, nothing is fetched
    folder, chance, read = shutil.copytree(tiny, tmp_path / "checkpoint"), random.Random(5), 0
    given = ["model=checkpoint", f"model.source={folder}", "machine=2xt4", "precision=fp32", "workload.height=64"]
    plan = json.loads(compile_plan(given).to_json())
    for number in range(300):
        values = mutated(plan, chance)
        if number % 2 and isinstance(values, dict):
            values = {**plan, "checkpoint": mutated(plan["checkpoint"], chance)}
        with contextlib.suppress(AttributeError):
            values["digest"] = digest_of(values)
        with contextlib.suppress(PlanError):
            Plan.from_values(json.loads(json.dumps(values)), "a hostile file").resolve()
            read += 1
    assert read > 5, "some changes leave a plan that can be applied"


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    chance, path = random.Random(0), tmp_path / "plan.json"
    content, whole = RELEASED[-1].read_bytes(), Plan.load(RELEASED[-1])
    for _ in range(300):
        start = chance.randrange(len(content))
        path.write_bytes(content[:start] + chance.randbytes(chance.choice((0, 1, 8))) + content[start + 3 :])
        with contextlib.suppress(PlanError):
            read = Plan.load(path)
            if read.libraries != whole.libraries:  # outside the digest: found when it is compared with what is here
                with pytest.raises(PlanError, match="was"):
                    read.resolve()
                read = read.model_copy(update={"libraries": whole.libraries})
            # What follows from the rest is outside the digest, and so is how it was come by.
            follows = {key: getattr(whole, key) for key in ("tool_version", "faster", "overlap", "images_per_second")}
            kept, known = (
                {key: how for key, how in one.basis.items() if not key.startswith(("faster.", "overlap."))}
                for one in (read, whole)
            )
            assert kept == known
            assert read.model_copy(update={**follows, "basis": whole.basis}) == whole, "only blanks were hit"


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_every_released_version_is_still_read(path: Path) -> None:
    plan = Plan.load(path)
    assert plan.schema_version == path.stem
    placed = plan.resolve(allow=["library_versions"])
    assert set(placed.device_map.values()) == {"vgpu:0", "vgpu:1"}


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000 + "}", '{"a":' * 50_000, "null", "1" * 10_000])
def test_deep_and_odd_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError):
        Plan.load(path)
