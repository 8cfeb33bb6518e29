"""The package's layout: arrows one way, no circles, no torch below `run`, short files, components in one place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from conftest import CHECKOUT
from contract import BELOW_RUN, arrows_up, circles, component_names, heavy_imports, read, sizes

from sana_deploy.declare.pipelines import COMPONENTS, Role

SOURCES = read(CHECKOUT / "sana_deploy")


def test_imports_point_down_only() -> None:
    assert not (found := arrows_up(SOURCES)), "\n".join(found)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not (found := circles(SOURCES)), "\n".join(found)


def test_no_file_below_run_imports_torch_at_module_level() -> None:
    assert not (found := heavy_imports(SOURCES)), "\n".join(found)


def test_importing_everything_but_run_and_rehearsal_leaves_torch_out() -> None:
    light = [name for name, source in SOURCES.items() if source.package not in ("run", "rehearsal")]
    assert {source.package for source in SOURCES.values()} >= {*BELOW_RUN}
    script = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        "    if found := {'torch', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules):\n"
        "        sys.exit(f'importing {name} imports {sorted(found)}.')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_short_and_few_files_stand_beside_the_packages() -> None:
    assert not (found := sizes(SOURCES)), "\n".join(found)
    assert len(SOURCES["sana_deploy.__main__"].text.splitlines()) < 80, "the entry file only maps endings to exit codes"


def test_components_are_named_in_the_descriptions_of_pipelines() -> None:
    assert not (found := component_names(SOURCES, COMPONENTS, get_args(Role))), "\n".join(found)


def test_the_page_on_architecture_lists_every_file_under_its_package() -> None:
    page = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed, package = {}, ""
    for head, path in re.findall(r"^\| (\w*)\s*\|[^|]*\| `([\w/]+\.py)` \|", page, re.MULTILINE):
        package = head or package
        listed[path] = package
    wanted = {one.path: one.package for one in SOURCES.values()}
    packages = {path for path in wanted if path.endswith("/__init__.py")}
    assert listed == {path: package for path, package in wanted.items() if path not in packages}
    for name in set(re.findall(r"`([\w/]+\.py)`", page)) - set(listed):
        assert (CHECKOUT / name).is_file(), f"docs/architecture.md names {name}, which is not there"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of two modules of the package, which keeps the contract as it stands."""
    folder = tmp_path / "sana_deploy"
    for name in ("_units.py", "declare/formats.py"):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((CHECKOUT / "sana_deploy" / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "run").mkdir()
    (folder / "run" / "load.py").write_text("import torch\n")
    found = read(folder)
    assert not [*arrows_up(found), *circles(found), *heavy_imports(found), *sizes(found)]
    return folder


def _plant(folder: Path, name: str, line: str) -> int:
    """Add a line at the end of a file; its number."""
    path = folder / name
    path.write_text(f"{path.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    "line",
    ["from ..run.load import x", "from ..run import load", "import sana_deploy.run.load",
     "def late(): from sana_deploy.run.load import x", "if TYPE_CHECKING: from ..run.load import x"],
)  # fmt: skip
def test_an_import_upward_is_named_however_it_is_written(planted: Path, line: str) -> None:
    number = _plant(planted, "declare/formats.py", line)
    assert arrows_up(read(planted)) == [
        f"declare/formats.py:{number} imports run/load.py: declare must not import run, which stands above it."
    ]


def test_a_door_is_imported_by_doors_only(planted: Path) -> None:
    (planted / "api.py").write_text("from .declare import formats\n")
    (planted / "stages.py").write_text("from .api import formats\n")
    assert arrows_up(read(planted)) == []
    number = _plant(planted, "run/load.py", "from ..api import formats")
    assert arrows_up(read(planted)) == [
        f"run/load.py:{number} imports api.py: run must not import doors, which stands above it."
    ]


def test_a_circle_is_named_with_every_file_and_line(planted: Path) -> None:
    up = _plant(planted, "_units.py", "def late(): from .declare.formats import Dtype")
    down = _plant(planted, "declare/formats.py", "from .._units import GIB")
    steps = f"_units.py:{up} -> declare/formats.py:{down} -> _units.py"
    assert circles(read(planted)) == [f"{steps}: these files of ground and declare import each other."]


def test_torch_below_run_is_named_and_only_at_module_level(planted: Path) -> None:
    _plant(planted, "declare/formats.py", "def late(): import torch")
    assert heavy_imports(read(planted)) == []
    number = _plant(planted, "declare/formats.py", "from torch.nn import Module")
    assert heavy_imports(read(planted)) == [
        f"declare/formats.py:{number} imports torch.nn at module level: declare stands below run, "
        "where only the function that needs it may."
    ]


def test_long_files_functions_and_names_of_components_are_counted(planted: Path) -> None:
    text = "def long():\n" + "    pass\n" * 39 + "x = 'vae'\ny = pipeline.of('vae')\nz = pipeline.of('transformer')\n"
    (planted / "declare" / "other.py").write_text(text + "\n" * 288)
    found = read(planted)
    assert sizes(found) == [
        "declare/other.py has 331 lines, at most 330 are allowed.",
        "declare/other.py:1 long has 40 lines, at most 39 are allowed.",
    ]
    assert component_names(found, COMPONENTS, get_args(Role)) == [
        "declare/other.py:41 names the component 'vae'.",
        "declare/other.py:43 names the component 'transformer'.",
    ]
