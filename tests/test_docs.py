"""What people read: the README is short and its links lead somewhere, commands compose, the reference is complete."""

from __future__ import annotations

import csv
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT

from sana_deploy import errors
from sana_deploy.declare.compose import compose_spec
from sana_deploy.declare.keys import conf_dir, known_keys
from sana_deploy.declare.knobs import KNOBS
from sana_deploy.facts.known_gpus import KNOWN_GPUS

sys.path[:0] = [str(CHECKOUT / "docs" / "_site"), str(CHECKOUT / "benchmarks")]

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]


def test_the_readme_has_at_most_700_words() -> None:
    assert len(README.split()) <= 700


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_every_link_of_a_page_beside_the_site_leads_to_a_file(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (CHECKOUT / name).read_text(encoding="utf-8"))
    assert len(links) > 3
    assert not [link for link in links if not (CHECKOUT / link).exists()]


def blocks_of(page: Path, kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The overrides of every `python -m sana_deploy` in a page's blocks of bash, but for sweeps and saved plans."""
    lines = [line for block in blocks_of(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m sana_deploy ")]
    later = ("summary", "diff", "serve", "advise", "-m")
    return [words[3:] for words in found if words[3] not in later and not any("plan_file=" in word for word in words)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.stem)
def test_every_command_of_a_page_composes(page: Path) -> None:
    for overrides in commands_of(page):
        assert compose_spec([one for one in overrides if not one.startswith("experiment=")])


def test_the_reference_has_every_key_with_a_sentence_and_its_default() -> None:
    import site_keys
    import site_reference

    keys = {key.name: key for group, kinds in site_keys.MODELS.items() for option in kinds
            for key in site_keys.keys_of(group, option)}  # fmt: skip
    assert not [name for name, key in keys.items() if not key.help or not key.type or not key.default]
    page = site_reference.groups_page()
    settled = (*keys, *site_keys.NAMED_BY_THE_OPTION, *site_keys.NOT_IN_A_GROUP, "experiment")
    assert all(f"| `{name}` |" in page for name in (*keys, *site_keys.NOT_IN_A_GROUP))
    for name in known_keys():
        within = any(name.startswith(f"{one}.") for one in settled)
        assert name in settled or within or any(one.startswith(f"{name}.") for one in settled), name
    assert keys["workload.height"].type == "integer from 32 to 65536, a multiple of 32"
    assert keys["workload.height"].default == '`"${model.resolution}"`'
    assert keys["serve.port"].default == "`8000`"
    assert keys["model.source"].default == "must be given"


def test_the_reference_has_every_knob_gpu_and_public_name() -> None:
    import site_reference

    import sana_deploy

    pages = site_reference.pages()
    assert all(f"| `{knob}` |" in pages["reference/knobs.md"] for knob in KNOBS)
    assert all(f"| `{word}` |" in pages["reference/gpus.md"] for word in KNOWN_GPUS)
    names = set(sana_deploy.__all__) - {"__version__"}
    assert all(
        re.search(rf"^::: sana_deploy\.[\w.]+\.{name}$", pages["reference/api.md"], re.MULTILINE) for name in names
    )
    assert set(site_reference.files()) == {"reference/plan.schema.json", "reference/outcome.schema.json"}


def test_reference_and_help_and_classes_agree_on_exit_codes() -> None:
    import site_reference

    shown = (conf_dir() / "hydra" / "help" / "sana_deploy.yaml").read_text(encoding="utf-8")
    page = site_reference.exit_codes_page()
    classes = site_reference.error_classes()
    assert errors.InfeasibleError in classes
    for code in {0, *(kind.exit_code for kind in classes)}:
        (row,) = re.findall(rf"^\| {code} \|.*$", page, re.MULTILINE)
        assert all(kind.__name__ in row for kind in classes if kind.exit_code == code)
        assert re.search(rf"^    {code}  ", shown, re.MULTILINE), f"--help lacks exit code {code}"


def test_links_that_leave_docs_go_to_the_published_file() -> None:
    import site_hooks

    docs = CHECKOUT / "docs"
    text = "[a](../Dockerfile), [b](plans.md#x), ![c](report.png), [d](https://x.example/y)"
    moved = "[a](source/Dockerfile), [b](plans.md#x), ![c](report.png), [d](https://x.example/y)"
    assert site_hooks.follow(text, docs / "serve.md", "serve.md") == moved
    back = site_hooks.follow("[a](../docs/plans.md)", CHECKOUT / ".github" / "X.md", "source/github/X.md")
    assert back == "[a](../../plans.md)"


@pytest.mark.parametrize("name", ["placement", "models"])
def test_the_data_beside_a_page_is_its_table(name: str, tmp_path: Path) -> None:
    from placement import write_page

    write_page(tmp_path / f"{name}.md", (CHECKOUT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    kept = (CHECKOUT / "docs" / "data" / f"{name}.csv").read_text(encoding="utf-8")
    assert (tmp_path / "data" / f"{name}.csv").read_text(encoding="utf-8") == kept
    with (CHECKOUT / "docs" / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert len(rows) > 40
    assert len(set(head)) == len(head)
    assert all(len(row) == len(head) for row in rows)


@pytest.mark.pinned
@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md", "docs/how/kaggle.md", "docs/how/nothing_fits.md"])
def test_the_first_output_of_a_page_is_that_of_its_command(name: str, here: Any) -> None:
    overrides, shown = commands_of(CHECKOUT / name)[0], blocks_of(CHECKOUT / name, "text")[0]
    done = here(*(one for one in overrides if one != "until=compile"), "until=compile", COLUMNS="500")
    said = [" ".join(line.split()) for line in done.stderr.splitlines()]
    rehearsed = re.compile(r"\.\.\.|plan [0-9a-f]{12}|rehearsed in|  vgpu:")
    planned = [" ".join(line.split()) for line in shown.splitlines() if not rehearsed.match(line)]
    assert len(planned) > 1
    assert not [line for line in planned if line not in said], done.stderr


def test_a_new_page_comes_last_in_the_nav_and_no_page_twice() -> None:
    import site_hooks
    from mkdocs.config.defaults import MkDocsConfig

    config = MkDocsConfig()
    config.nav = [{"Home": "index.md"}, {"How to": [{"Serve": "how/serve.md"}, "serve.md"]}]
    nav = site_hooks.on_config(config).nav
    assert isinstance(nav, list)
    assert nav[:2] == [{"Home": "index.md"}, {"How to": [{"Serve": "how/serve.md"}, "serve.md"]}]
    assert {"tutorial.md", "rows.md"} <= set(nav[2]["More"])
    assert not {"index.md", "serve.md"} & set(nav[2]["More"])
