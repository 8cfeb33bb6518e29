"""What this machine has and lacks, gathered for `sana-deploy doctor`: facts first, then problems with what helps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .._units import GIB, human_bytes
from ..errors import SanaDeployError
from ..facts.caches import Folder, folders
from ..facts.driver import Driver, ask_driver
from ..facts.imports import Imported, import_all
from ..facts.libraries import install_hint
from ..facts.machine import Machine, probe
from ..facts.requirements import Extra, Library, extras, libraries, torch_cuda
from ..plan.artifact import Plan

Compile = Callable[[Sequence[str]], Plan]
"""Compiles a plan for the overrides given."""

MODEL = "model=sana_1600m"
"""What is planned where nothing is asked for: no download, no file is made."""
LITTLE_ROOM = 12 * GIB
"""Free disk below which a 1.6B pipeline (some 10 GiB of weights) may not be downloaded."""
BUSY = 0.25
"""Share of a GPU's memory from which on it counts as used by others."""


@dataclass(frozen=True)
class Problem:
    """One sentence, and a command or key that helps; `needed` where a plan cannot run because of it."""

    needed: bool
    message: str
    hint: str


@dataclass(frozen=True)
class Checkup:
    """Everything that was looked at. `plan` is None where none could be made."""

    python: str
    machine: Machine
    driver: Driver
    torch_cuda: str | None
    libraries: tuple[Library, ...]
    extras: tuple[Extra, ...]
    folders: tuple[Folder, ...]
    asked: tuple[str, ...]
    plan: Plan | None
    problems: tuple[Problem, ...]
    imported: Imported | None = None

    @property
    def exit_code(self) -> int:
        """1 where something that a plan needs is missing or broken."""
        return int(any(one.needed for one in self.problems))


def examine(overrides: Sequence[str], compile_plan: Compile, imports: bool = False) -> Checkup:
    """Look at this machine, and plan what `overrides` ask for; SANA 1.6B where they name no model.

    Args:
        imports: import torch, transformers and diffusers too, in another process.

    Raises:
        ComposeError, InvalidSpecError, UsageError: an override is wrong.
    """
    asked = tuple(overrides) if any(one.startswith("model=") for one in overrides) else (MODEL, *overrides)
    machine, driver, cuda = probe(), ask_driver(), torch_cuda()
    needed, rooms = tuple(libraries()), tuple(folders())
    found = [*_of_libraries(needed), *_of_gpus(machine, driver, cuda), *_of_folders(rooms)]
    imported = import_all() if imports else None
    found += list(_of_imports(imported, machine)) if imported else []
    plan, refused = _planned(asked, compile_plan, needed=bool(overrides))
    return Checkup(
        python=".".join(map(str, sys.version_info[:3])),
        machine=machine,
        driver=driver,
        torch_cuda=cuda,
        libraries=needed,
        extras=tuple(extras()),
        folders=rooms,
        asked=asked,
        plan=plan,
        problems=(*found, *refused),
        imported=imported,
    )


def _planned(asked: Sequence[str], compile_plan: Compile, needed: bool) -> tuple[Plan | None, list[Problem]]:
    try:
        return compile_plan(asked), []
    except SanaDeployError as problem:
        if problem.exit_code < 4 and needed:  # the words of the command are wrong, not the machine
            raise
        sentence = f"{' '.join(asked)} cannot be planned here: {problem}"
        return None, [Problem(needed, sentence, problem.hint or "sana-deploy model=tiny")]


def _of_libraries(needed: Sequence[Library]) -> Iterator[Problem]:
    if not needed:
        yield Problem(False, "sana_deploy is not installed as a package, so that ranges of versions are not known",
                      "pip install -c constraints.txt .")  # fmt: skip
    says = {
        "missing": "is not installed",
        "broken": "is listed as installed, but its code is not there",
    }
    for one in needed:
        if one.state != "fine":
            words = says.get(one.state, f"{one.version} is outside {one.wanted}")
            again = "--force-reinstall --no-deps " if one.state == "broken" else ""
            yield Problem(True, f"{one.name} {words}", f"pip install {again}'{one.requirement}'")


def _of_imports(imported: Imported, machine: Machine) -> Iterator[Problem]:
    if imported.failed:
        yield Problem(True, f"torch, transformers and diffusers cannot be imported: {imported.failed}",
                      "pip install --force-reinstall -c constraints.txt torch transformers diffusers")  # fmt: skip
        return
    if imported.gpus < len(machine.gpus):
        yield Problem(True, f"CUDA gives {len(machine.gpus)} GPUs, torch sees {imported.gpus} of them",
                      "python -m torch.utils.collect_env")  # fmt: skip
    for gpu in machine.gpus:
        if not imported.has_kernels_for(gpu.capability):
            built = ", ".join(imported.architectures)
            number = ".".join(map(str, gpu.capability))
            yield Problem(True, f"torch has no kernels for GPU {gpu.index}, compute capability {number} ({built})",
                          f"hardware.use leaves it out, or install a build of torch for {number}")  # fmt: skip


_NO_DRIVER = ("ModuleNotFoundError", "NVMLError_LibraryNotFound")
"""How `Driver.silent` begins where there is none."""


def _of_gpus(machine: Machine, driver: Driver, cuda: str | None) -> Iterator[Problem]:
    if driver.cards and not machine.gpus:
        yield _hidden(driver)
    if not machine.gpus:
        if driver.silent and not driver.silent.startswith(_NO_DRIVER):
            yield Problem(False, f"the NVIDIA driver does not answer: {driver.silent}",
                          "nvidia-smi; restart the machine after an update of the driver")  # fmt: skip
        return
    if cuda == "":
        yield Problem(True, "torch was built without CUDA, it cannot use the GPUs",
                      "install a build of torch for CUDA: see https://pytorch.org/get-started/locally")  # fmt: skip
    if cuda and driver.cuda and int(cuda.partition(".")[0]) > driver.cuda[0]:
        takes = ".".join(map(str, driver.cuda))
        yield Problem(True, f"torch was built for CUDA {cuda}, the driver {driver.version} takes CUDA {takes} at most",
                      f"update the driver, or install a build of torch for CUDA {driver.cuda[0]}")  # fmt: skip
    if driver.silent:
        yield Problem(False, f"the driver does not tell who uses the GPUs ({driver.silent})", "nvidia-smi")
    cards = {card.uuid: card for card in driver.cards}
    for gpu in machine.gpus:
        taken = gpu.total_bytes - gpu.free_bytes
        if taken > BUSY * gpu.total_bytes:
            running = cards[gpu.uuid].processes if gpu.uuid in cards else ()
            who = ", ".join(f"{one.name} ({one.pid})" for one in running) or "others"
            free = [str(one.index) for one in machine.gpus if one is not gpu]
            hint = f"hardware.use=[{','.join(free)}] leaves it out" if free else "end what uses it, or wait"
            yield Problem(False, f"GPU {gpu.index} is in use: {human_bytes(taken)} taken by {who}", hint)


def _hidden(driver: Driver) -> Problem:
    count, visible = len(driver.cards), os.environ.get("CUDA_VISIBLE_DEVICES")
    message = f"the driver lists {count} GPU{'s' if count > 1 else ''}, CUDA gives none"
    if visible is None:
        return Problem(False, message, "nvidia-smi tells whether they work; a container needs --gpus all")
    return Problem(False, f"{message}: CUDA_VISIBLE_DEVICES={visible!r} hides them", "unset CUDA_VISIBLE_DEVICES")


def _of_folders(rooms: Sequence[Folder]) -> Iterator[Problem]:
    for one in rooms:
        if not one.writable:
            yield Problem(True, f"{one.path} cannot be written", f"export {one.variable}=FOLDER")
        elif one.free_bytes < LITTLE_ROOM:
            room = human_bytes(one.free_bytes)
            yield Problem(False, f"{room} are free for {one.path}, a 1.6B pipeline takes some 10 GiB",
                          f"export {one.variable}=FOLDER on a larger disk")  # fmt: skip
    if not os.access(".", os.W_OK):
        yield Problem(True, "this folder cannot be written, runs are saved in ./outputs", "hydra.run.dir=FOLDER")


def extra_hint(extra: Extra) -> str:
    """The command that installs an optional part."""
    return install_hint(extra.name, [one.requirement for one in extra.lacking])
