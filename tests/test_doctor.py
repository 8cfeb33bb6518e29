"""`sana-deploy doctor`, with a driver and NVML that answer, libraries that are broken, and folders that refuse."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CHECKOUT
from test_machine import Driver as CudaDriver

from sana_deploy._units import GIB
from sana_deploy.api import compile_plan
from sana_deploy.facts import caches, driver, libraries, machine, requirements
from sana_deploy.report import checkup
from sana_deploy.report.checkup import Checkup, examine
from sana_deploy.report.doctor import document, render

Run = Callable[..., subprocess.CompletedProcess[str]]
UUIDS = [f"00000000-0000-0000-0000-00000000000{index}" for index in range(2)]


class UnsupportedError(Exception):
    """What NVML raises where a GPU cannot answer."""


@dataclass
class Nvml:
    """Answers as `pynvml` does, for two GPUs of 24 GiB; `taken` are bytes that a process has on the first."""

    taken: int = 0
    peer: int | None = 0
    wired: int | None = 1
    cuda: int = 13000
    __spec__ = True
    NVML_P2P_CAPS_INDEX_READ, NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 0, 2, 0

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: f"Card {handle}".encode(),
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{UUIDS[handle]}",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(free=24 * GIB - self.taken * (handle == 0)),
            "nvmlDeviceGetComputeRunningProcesses": self.processes,
            "nvmlDeviceGetP2PStatus": lambda one, other, index: self.answer([self.peer, 1, self.wired][index]),
            "nvmlDeviceGetTopologyCommonAncestor": lambda one, other: 40,
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: self.cuda,
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]

    def processes(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=2**31 - 1, usedGpuMemory=self.taken)] if self.taken and handle == 0 else []

    def answer(self, value: int | None) -> int:
        if value is None:
            raise UnsupportedError
        return value


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this a machine with two GPUs; keywords are those of `Nvml`, `torch` the CUDA that torch was built for."""

    def make(torch: str = "13.0", **facts: Any) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: CudaDriver())
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(**facts))
        monkeypatch.setattr(checkup, "torch_cuda", lambda: torch)

    return make


def seen(*overrides: str) -> tuple[Checkup, str]:
    """A checkup, and what people read of it."""
    from rich.console import Console

    found = examine(overrides, compile_plan)
    out = Console(width=100, highlight=False, color_system=None)
    with out.capture() as shown:
        out.print(render(found), soft_wrap=True)
    return found, shown.get()


def test_a_healthy_machine_is_described_and_a_plan_can_run(two_gpus: Callable[..., None]) -> None:
    two_gpus()
    found, shown = seen()
    assert (found.exit_code, found.problems) == (0, ())
    for words in (
        "driver 580.1, takes CUDA 13.0; torch was built for CUDA 13.0",
        "GPU 0  Card 0, 24.00 GiB, 24.00 GiB free, compute capability 8.9",
        "GPU 0 - GPU 1: PCIe over the CPU, peer access",
        "model=sana_1600m: precision mixed_bf16, runtime",
        "auto chose mixed_bf16: native here and it fits",
        "a plan can run here",
    ):
        assert words in shown
    assert "To mend" not in shown


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"wired": 0}, "GPU 0 - GPU 1: NVLink, peer access"),
        ({"wired": 0, "peer": None}, "GPU 0 - GPU 1: NVLink, peer access"),
        ({"peer": 3}, "GPU 0 - GPU 1: PCIe over the CPU, no peer access: copies go over the CPU"),
        ({"peer": None, "wired": None}, "GPU 0 - GPU 1: PCIe over the CPU, peer access unknown"),
    ],
)
def test_links_are_what_the_driver_says(two_gpus: Callable[..., None], facts: dict[str, Any], words: str) -> None:
    two_gpus(**facts)
    assert words in seen()[1]


def test_who_uses_a_gpu_is_named_with_a_key_that_leaves_it_out(two_gpus: Callable[..., None]) -> None:
    two_gpus(taken=10 * GIB)
    found, shown = seen()
    (problem,) = found.problems
    assert not problem.needed
    assert problem.message == f"GPU 0 is in use: 10.00 GiB taken by process ({2**31 - 1})"
    assert problem.hint == "hardware.use=[1] leaves it out"
    assert f"used by process (pid {2**31 - 1}, 10.00 GiB)" in shown
    compile_plan([checkup.MODEL, "hardware.use=[1]"])


@pytest.mark.parametrize(
    ("torch", "cuda", "says"),
    [
        ("", 13000, "torch was built without CUDA"),
        ("13.0", 12040, "torch was built for CUDA 13.0, the driver 580.1 takes CUDA 12.4 at most"),
    ],
)
def test_a_torch_that_cannot_use_the_gpus_must_be_mended(
    two_gpus: Callable[..., None], torch: str, cuda: int, says: str
) -> None:
    two_gpus(torch=torch, cuda=cuda)
    found, shown = seen()
    assert found.exit_code == 1
    assert says in shown
    assert "1 thing to mend before a plan can run" in shown


def test_hidden_gpus_are_told(two_gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    two_gpus()
    monkeypatch.setattr(machine, "_driver_gpus", tuple)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (problem,) = seen()[0].problems
    assert (problem.needed, problem.hint) == (False, "unset CUDA_VISIBLE_DEVICES")
    assert "the driver lists 2 GPUs, CUDA gives none: CUDA_VISIBLE_DEVICES='' hides them" in problem.message


def test_a_driver_that_does_not_answer_is_a_fact_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert driver.ask_driver().silent.startswith("ModuleNotFoundError")
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=lambda: None))
    assert driver.ask_driver().silent.startswith("AttributeError")


def test_a_driver_that_is_there_and_does_not_answer_is_said_and_one_that_is_not_there_is_none() -> None:
    def problems(silent: str) -> list[str]:
        found = checkup._of_gpus(machine.Machine("present", (), 8 * GIB), driver.Driver(silent=silent), None)
        return [one.message for one in found]

    broken = "NVMLError_LibRmVersionMismatch: RM has detected an NVML/RM version mismatch."
    assert problems(broken) == [f"the NVIDIA driver does not answer: {broken}"]
    assert problems("NVMLError_LibraryNotFound: NVML Shared Library Not Found") == []


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set versions of distributions, None for one that is not here, and modules whose code is gone."""

    def describe(versions: dict[str, str | None], gone: tuple[str, ...] = ()) -> None:
        real, found = metadata.version, importlib.util.find_spec

        def version(name: str) -> str:
            if name in versions and versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(
            "sana_deploy.facts.requirements.find_spec", lambda name: None if name in gone else found(name)
        )
        libraries.installed.cache_clear()

    return describe


@pytest.fixture(autouse=True)
def versions_are_read_anew() -> Any:
    yield
    libraries.installed.cache_clear()


def test_libraries_that_are_missing_broken_or_of_another_version_have_a_command_each(
    described: Callable[..., None],
) -> None:
    described({"diffusers": "0.30.0", "safetensors": None, "rich": "14.4"}, gone=("PIL",))
    found, shown = seen()
    needed = {one.message: one.hint for one in found.problems if one.needed}
    assert needed == {
        "diffusers 0.30.0 is outside <0.43,>=0.42": "pip install 'diffusers<0.43,>=0.42'",
        "safetensors is not installed": "pip install 'safetensors>=0.5'",
        "pillow is listed as installed, but its code is not there":
            "pip install --force-reinstall --no-deps 'pillow>=11'",
    }  # fmt: skip
    assert found.exit_code == 1
    assert "other than tested: rich 14.4 (15.0.0)" in shown
    assert "3 things to mend before a plan can run" in shown


def test_extras_that_are_missing_say_what_they_enable(described: Callable[..., None]) -> None:
    described({"bitsandbytes": None})
    found, shown = seen()
    assert found.exit_code == 0, "no plan needs them unless it asks for them"
    assert "nf4 is not here; it enables precision=nf4: weights in 4 bits" in shown
    (nf4,) = [one for one in found.extras if one.name == "nf4"]
    assert [one.requirement for one in nf4.lacking] == ["bitsandbytes>=0.48"]


def test_every_extra_that_a_user_may_want_is_described() -> None:
    own = {"test", "docs"}
    provided = set(metadata.metadata(requirements.PACKAGE).get_all("Provides-Extra") or [])
    assert provided - own == set(requirements.ENABLES)


def test_tested_versions_travel_with_the_package() -> None:
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["constraints.txt"] == "sana_deploy/constraints.txt"
    pinned = requirements.tested_versions()
    assert f"huggingface_hub=={pinned['huggingface-hub']}" in (CHECKOUT / "constraints.txt").read_text("utf-8")
    assert requirements.torch_cuda() is not None


def test_folders_are_measured_and_one_that_refuses_must_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANA_DEPLOY_CACHE", str(tmp_path / "cache" / "not made yet"))
    (tmp_path / "cache" / "not made yet" / "a").mkdir(parents=True)
    (tmp_path / "cache" / "not made yet" / "a" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "cache" / "not made yet" / "link").symlink_to(tmp_path / "cache" / "not made yet" / "a" / "file")
    ours, hub = caches.folders()
    assert (ours.bytes, ours.writable) == (1000, True)
    assert "hub" in hub.path
    blocked = [replace(ours, writable=False), replace(hub, free_bytes=GIB)]
    monkeypatch.setattr(checkup, "folders", lambda: blocked)
    found, _ = seen()
    assert [(one.needed, one.hint) for one in found.problems] == [
        (True, "export SANA_DEPLOY_CACHE=FOLDER"),
        (False, "export HF_HOME=FOLDER on a larger disk"),
    ]


def test_what_does_not_fit_here_is_needed_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    small = machine.Machine("present", (machine.Gpu(0, "Small", 4 * GIB, 4 * GIB, (8, 6), 30),), 8 * GIB)
    monkeypatch.setattr("sana_deploy.plan.compiler.machines.probe", lambda: small)
    monkeypatch.setattr(checkup, "MODEL", "model=sana15_4800m")
    found, shown = seen()
    assert [one.needed for one in found.problems] == [False]
    assert "model=sana15_4800m cannot be planned here" in shown
    asked, _ = seen("model=sana15_4800m")
    assert asked.exit_code == 1
    assert document(asked)["plan"]["precision"] is None


def test_the_command_speaks_to_programs_and_refuses_what_is_no_override(here: Run) -> None:
    said = here("doctor", "machine=2x8gb", "output=json")
    found = json.loads(said.stdout)
    assert (said.returncode, said.stderr, found["exit_code"]) == (0, "", 0)
    assert found["plan"]["overrides"] == ["model=sana_1600m", "machine=2x8gb"]
    assert found["plan"]["precision"] == "mixed_bf16"
    assert {one["name"] for one in found["libraries"]} >= {"torch", "diffusers", "pydantic"}
    assert here("doctor", "quickly").returncode == 2
    assert here("doctor", "model=nothing").returncode == 1


def test_a_checkup_never_imports_torch() -> None:
    script = (
        "import sys; from sana_deploy.report.doctor import main; from sana_deploy.api import compile_plan\n"
        "assert main(['model=sana_600m'], compile_plan) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_terminals_get_plain_text(cli: Run) -> None:
    shown = cli("doctor", NO_COLOR="1", TERM="dumb", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.isascii()
    assert "\x1b" not in shown.stdout


def fake_libraries(folder: Path, torch: str) -> str:
    """A folder whose torch is `torch`, beside empty transformers and diffusers."""
    for name, text in (("torch", torch), ("transformers", ""), ("diffusers", "")):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return str(folder)


def test_imports_find_what_is_installed_but_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", fake_libraries(tmp_path, "raise ImportError('libcudart.so.13: cannot open')"))
    found = examine([], compile_plan, imports=True)
    (problem,) = found.problems
    assert problem.message.endswith("cannot be imported: ImportError: libcudart.so.13: cannot open")
    assert (problem.needed, found.exit_code) == (True, 1)


@pytest.mark.parametrize(
    ("count", "known", "says"),
    [
        (2, ["sm_80", "sm_90a"], None),
        (2, ["sm_70", "compute_75"], None),
        (2, ["compute_90"], "torch has no kernels for GPU 0, compute capability 8.9 (compute_90)"),
        (1, ["sm_80"], "CUDA gives 2 GPUs, torch sees 1 of them"),
        (2, ["sm_90", "sm_120"], "torch has no kernels for GPU 0, compute capability 8.9 (sm_90, sm_120)"),
    ],
)
def test_imports_compare_torch_with_the_gpus(
    two_gpus: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, known: list[str],
    says: str | None,
) -> None:  # fmt: skip
    two_gpus()
    text = (
        "class cuda:\n    is_available = staticmethod(lambda: True)\n"
        f"    device_count = staticmethod(lambda: {count})\n    get_arch_list = staticmethod(lambda: {known})\n"
    )
    monkeypatch.setenv("PYTHONPATH", fake_libraries(tmp_path, text))
    found = examine([], compile_plan, imports=True)
    assert [one.message for one in found.problems[:1]] == ([says] if says else [])
    assert found.exit_code == int(says is not None)
