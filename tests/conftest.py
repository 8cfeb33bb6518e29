"""Fixtures: one tiny checkpoint for the whole session, small workloads, machines that are only described."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; before torch is imported

from sana_deploy._units import GIB
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.pipelines import PIPELINES
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.facts.machine import Gpu, Machine
from sana_deploy.facts.tiny import ensure_tiny
from sana_deploy.serve.engines import prepare_ray

CHECKOUT = Path(__file__).parent.parent
SMALL = ("workload.height=64", "workload.width=96", "workload.steps=2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests on Ray to one of pytest's processes, so that one Ray is started."""
    for item in items:
        given = getattr(item, "callspec", None)
        named = any(isinstance(value, str) and value == "ray" for value in given.params.values()) if given else False
        if named or "ray_pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this test run's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SANA_DEPLOY_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def prepared_for_ray() -> None:
    """Set what Ray reads when it is imported, before any test imports it."""
    prepare_ray()


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Path:
    """The generated tiny checkpoint."""
    return ensure_tiny()


@pytest.fixture
def small() -> Callable[..., DeploySpec]:
    """Compose a declaration with a small workload and any further overrides."""
    return lambda *overrides: compose_spec([*SMALL, *overrides])


@pytest.fixture
def machine() -> Callable[..., Machine]:
    """Describe a machine by its GPUs' memory in GiB; compute capability 8.6 unless told."""

    def describe(*sizes: float, capability: tuple[int, int] = (8, 6), used: float = 0) -> Machine:
        gpus = [
            Gpu(i, f"Test {size} GiB", int(size * GIB), int((size - used) * GIB), capability, 30)
            for i, size in enumerate(sizes)
        ]
        return Machine("present", tuple(gpus), 64 * GIB)

    return describe


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m sana_deploy` in an empty folder."""

    def run(*arguments: str, cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sana_deploy", *arguments]
        environment = {**os.environ, "COLUMNS": "100", **env}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def here(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `cli`, but within this process: for tests that do not need one of its own."""
    from inprocess import run_here

    return lambda *arguments, cwd=tmp_path, **env: run_here(cwd, *arguments, **env)


@pytest.fixture
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts without diffusers' long instruction, whose encoding takes most of the time of a request on a CPU."""
    import diffusers

    for name in PIPELINES:
        cls = getattr(diffusers, name)
        monkeypatch.setattr(cls, "__call__", _shortly(cls.__call__))


def _shortly(call: Any) -> Any:
    short = {"complex_human_instruction": [], "max_sequence_length": 32}

    @functools.wraps(call)
    def shortly(self: Any, *arguments: Any, **options: Any) -> Any:
        return call(self, *arguments, **{**options, **short})

    return shortly


@pytest.fixture(scope="session")
def ray_pair(cache: Path) -> Iterator[Any]:
    """Two replicas that sleep on Ray Serve, started once for all tests."""
    from on_ray import Shared

    shared = Shared()
    yield shared
    shared.end()


@pytest.fixture(scope="module", params=["local", "ray"])
def asleep(request: pytest.FixtureRequest) -> Callable[[int], list[Any]]:
    """Makes replicas that sleep, for a service over each of both engines."""
    if request.param == "local":
        from sleeping import Sleeping

        return lambda count: [Sleeping() for _ in range(count)]
    pair = request.getfixturevalue("ray_pair")
    return lambda count: [pair.seen_as(count)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, driven by Selenium."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield driver
    driver.quit()
