"""What is released and checked: the source distribution, pinned tools, workflows."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHECKOUT

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8")
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.MULTILINE))
READ_BY_TESTS = (
    "sana_deploy", "conf", "tests", "benchmarks", "docs", ".ci", ".github", ".pre-commit-config.yaml", "README.md",
    "examples", "mkdocs.yml", "CHANGELOG.md", "LICENSE", "constraints.txt", "pyproject.toml", "Dockerfile",
    ".dockerignore",
)  # fmt: skip


def workflow(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((CHECKOUT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return loaded


def files_of(path: Path) -> set[str]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(CHECKOUT).as_posix() for file in files if "__pycache__" not in file.parts}


def test_the_sdist_holds_what_its_tests_read_and_nothing_that_was_made(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=CHECKOUT, capture_output=True, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = set().union(*(files_of(CHECKOUT / name) for name in READ_BY_TESTS))
    assert names == {*wanted, ".gitignore", "PKG-INFO"}
    for name in ("tests/plans/1.0.json", "tests/service/lighthouse_service/__init__.py", "benchmarks/placement.py",
                 ".ci/run", "conf/config.yaml", "docs/measured.md"):  # fmt: skip
        assert name in names


def test_hooks_run_the_pinned_tools() -> None:
    hooks = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    tools = [one for hook in hooks for one in hook["additional_dependencies"]]
    assert {tool.partition("==")[0] for tool in tools} == {"ruff", "codespell"}
    for tool in tools:
        name, _, version = tool.partition("==")
        assert PINNED[name] == version


def test_every_python_that_is_promised_is_tested_with_pinned_versions() -> None:
    jobs = workflow("ci.yml")["jobs"]
    lowest, above = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    promised = [f"3.{minor}" for minor in range(int(lowest), int(above))]
    assert jobs["pinned"]["strategy"]["matrix"]["python"] == promised
    assert [step["run"] for step in jobs["pinned"]["steps"] if "run" in step] == [".ci/run"]
    assert jobs["lowest"]["steps"][1]["with"]["python-version"] == promised[0]


def test_only_a_tag_publishes_and_without_a_secret() -> None:
    publish = workflow("publish.yml")
    assert publish[True] == {"push": {"tags": ["v*"]}}, "YAML 1.1 reads `on` as true"
    assert publish["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert publish["jobs"]["publish"]["needs"] == "build"
    assert "secrets." not in (CHECKOUT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")


def test_the_site_is_built_strictly_and_published_without_a_secret() -> None:
    docs = workflow("docs.yml")
    assert docs[True]["push"] == {"branches": ["main"]}
    assert "mkdocs build --strict" in [step.get("run") for step in docs["jobs"]["build"]["steps"]]
    assert docs["jobs"]["publish"]["permissions"] == {"pages": "write", "id-token": "write"}
    assert docs["jobs"]["publish"]["needs"] == "build"
    assert docs["permissions"] == {"contents": "read"}
    assert "mkdocs build --strict" in (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("named", [*PROJECT["dependencies"], *EXTRAS["docs"], *EXTRAS["test"]])
def test_every_dependency_is_pinned_within_its_bounds(named: str) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    requirement = Requirement(named)
    pinned = {canonicalize_name(name): version for name, version in PINNED.items()}
    assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
