"""Pages that people look at: at four widths, light, dark and printed, with a keyboard and with a screen reader."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browsing import opened, seen
from test_pages import VIEWS, outside, split_page, wide_sweep

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.plan.artifact import Plan
from sana_deploy.report.compare import compare_page, main

Small = Callable[..., DeploySpec]
LARGE = ("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024")
PAPER = 717
"""Pixels between the margins of A4."""
FOCUSABLE = "a[href], button, input, select, summary, [tabindex='0']"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of page as a file, made once."""
    from conftest import SMALL

    from sana_deploy.declare.compose import compose_spec

    folder = tmp_path_factory.mktemp("pages")
    together = compile_spec(compose_spec([*SMALL, *LARGE, "machine=2x8gb"]))
    many = compile_spec(compose_spec([*SMALL, *LARGE, "machine=4x24gb", "hardware.objective=throughput"]))
    report, split = split_page(lambda *overrides: compose_spec([*SMALL, *overrides]))
    from sana_deploy.report.html import plan_page
    from sana_deploy.run.outcome import Measured, Outcome

    ran = Outcome(status="done", exit_code=0, stage="generate", measured=Measured(seconds={"generate": 1.5}))
    texts = {
        "report": report,
        "replicas": plan_page(many, ran, "the command"),
        "summary": wide_sweep(),
        "comparison": compare_page(together, split, ("before.json", "after.json")),
    }
    paths = {name: folder / f"{name}.html" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text, encoding="utf-8")
    return paths


KINDS = ("report", "summary", "comparison")


@pytest.mark.browser
@pytest.mark.parametrize("kind", [*KINDS, "replicas"])
def test_nothing_is_wider_than_the_window_and_no_text_is_tiny(browser: Any, pages: dict[str, Path], kind: str) -> None:
    for width, dark in VIEWS:
        opened(browser, pages[kind], width, dark)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        smallest = browser.execute_script(
            "const sizes = [];"
            "for (const one of document.querySelectorAll('body *')) {"
            "  if (!one.getClientRects().length || ![...one.childNodes].some(n => n.nodeType === 3 && n.data.trim()) ||"
            "      one.closest('script, style')) continue;"
            "  const svg = one.ownerSVGElement,"
            "    scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;"
            "  sizes.push([parseFloat(getComputedStyle(one).fontSize) * scale, one.textContent]); }"
            "return sizes.sort((a, b) => a[0] - b[0])[0]"
        )
        assert smallest[0] >= 11.5, (width, smallest)


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_to_mend_in_either_theme(browser: Any, pages: dict[str, Path], kind: str) -> None:
    axe = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    for width, dark in ((1200, False), (390, True)):
        opened(browser, pages[kind], width, dark)
        browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
        browser.execute_script(axe)
        found = browser.execute_async_script("const done = arguments[0]; axe.run().then(done)")
        said = [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found["violations"]]
        assert said == [], (width, dark)
        assert "color-contrast" in {one["id"] for one in found["passes"]}, "contrast was computed"


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_headings_are_in_order_under_one_title_and_landmarks_are_there(
    browser: Any, pages: dict[str, Path], kind: str
) -> None:
    opened(browser, pages[kind])
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert browser.execute_script("return document.querySelectorAll('body > main, body > header').length") == 2
    assert browser.execute_script(
        "return [...document.querySelectorAll('th')].every(th => ['col', 'row'].includes(th.scope))"
    )


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_the_tab_key_reaches_everything_in_order_shows_where_it_is_and_is_not_caught(
    browser: Any, pages: dict[str, Path], kind: str
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    for width in (1200, 390):
        opened(browser, pages[kind], width)
        wanted = browser.execute_script(
            f'return [...document.querySelectorAll("{FOCUSABLE}")].filter(one => one.checkVisibility())'
            ".map((one, at) => { one.dataset.stop = at; return at; })"
        )
        browser.execute_script(
            "window.stops = []; document.addEventListener('focusin', event => { const one = event.target, style ="
            " getComputedStyle(one); stops.push([+one.dataset.stop, style.outlineStyle !== 'none' &&"
            " parseFloat(style.outlineWidth) >= 2, one.getBoundingClientRect().width > 1]); })"
        )
        ActionChains(browser).send_keys(Keys.TAB * (len(wanted) + 1)).perform()
        stops = browser.execute_script("return stops")
        assert [stop for stop, _, _ in stops][: len(wanted)] == wanted
        assert all(outlined and wide for _, outlined, wide in stops[: len(wanted)]), "the focus is visible"
        assert browser.execute_script("return document.activeElement === document.body || stops.length > 1")


@pytest.mark.browser
def test_the_skip_link_leads_to_the_content(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    opened(browser, pages["report"])
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.getBoundingClientRect().top >= 0")
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert browser.execute_script("return document.activeElement.id") == "main"


def told(browser: Any) -> list[str]:
    return seen(browser, "#tip")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
def test_a_number_tells_its_basis_to_the_keyboard_to_a_pointer_and_to_a_finger(
    browser: Any, pages: dict[str, Path], width: int
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, pages["report"], width)
    assert told(browser) == []
    ActionChains(browser).send_keys(Keys.TAB * 2).perform()
    assert browser.execute_script("return document.activeElement.textContent").startswith("~")
    (words,) = told(browser)
    assert words.startswith("estimated: a roofline")
    described = browser.execute_script("return document.activeElement.getAttribute('aria-describedby')")
    assert browser.find_element(By.ID, described).text == words, "a screen reader reads the same"
    box = browser.execute_script(
        "const r = document.getElementById('tip').getBoundingClientRect(); return [r.left, r.right]"
    )
    assert box[0] >= 0
    assert box[1] <= width
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert told(browser) == []
    for selector, says in (
        ("table[aria-label='Components'] td[data-note='weights']", "exact: read from configs"),
        (".bar span.activations", "activations 189 MiB. estimated:"),
        ("svg.timeline rect[data-note='rehearsed']:last-of-type", ". rehearsed: every tensor"),
    ):
        one = browser.find_element(By.CSS_SELECTOR, selector)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", one)
        ActionChains(browser).move_to_element(one).perform()
        assert says in told(browser)[0]


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_with_a_unit_or_in_a_column_of_numbers_has_a_note_that_is_there(
    browser: Any, pages: dict[str, Path], kind: str
) -> None:
    opened(browser, pages[kind])
    bare, dangling = browser.execute_script(
        "const unit = /\\d (?:[KMGT]iB|GB\\/s|s per image|images\\/s)\\b/, bare = [];"
        "for (const one of document.querySelectorAll('main *')) {"
        "  if (one.closest('[data-note], .notes, pre, svg, .soft, li:has(.info), li:has(.warning), .why')) continue;"
        "  const own = [...one.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('');"
        "  if (unit.test(own)) bare.push(own.trim()); }"
        "const dangling = [...document.querySelectorAll('[data-note]')].filter(one =>"
        " !document.getElementById('note-' + one.dataset.note)).map(one => one.outerHTML);"
        "return [bare, dangling]"
    )
    assert bare == []
    assert dangling == []


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_comes_from_elsewhere(browser: Any, pages: dict[str, Path], kind: str) -> None:
    browser.get_log("performance")
    opened(browser, pages[kind])
    asked = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    addresses = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert [one for one in addresses if not one.startswith(("file:", "data:"))] == []
    assert not [one for one in browser.get_log("browser") if one["level"] == "SEVERE"]


@pytest.mark.browser
@pytest.mark.parametrize("kind", [*KINDS, "replicas"])
def test_on_paper_it_is_light_unfolded_and_not_cut(browser: Any, pages: dict[str, Path], kind: str) -> None:
    opened(browser, pages[kind], PAPER, dark=True)
    paper = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert base64.b64decode(paper["data"]).startswith(b"%PDF")
    assert browser.execute_script("return [...document.querySelectorAll('details')].every(one => one.open)")
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": scheme})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PAPER
    if kind != "summary":  # a summary may have any number of columns; summary.csv has them all
        assert outside(browser, "table tbody tr > *", PAPER) == []
    assert seen(browser, ".skip, summary, .tools, #tip") == []


@pytest.mark.browser
def test_differences_are_told_by_more_than_colour_and_plans_stand_side_by_side_or_below_each_other(
    browser: Any, pages: dict[str, Path]
) -> None:
    for width, beside in ((1200, True), (390, False)):
        opened(browser, pages["comparison"], width)
        devices = seen(browser, "table[aria-label='Components'] td[data-label='device']")
        (moved,) = [one for one in devices if "was" in one]
        assert re.fullmatch(r"was GPU (\d) → , is GPU (?!\1)\d", " ".join(moved.split())), "said in words"
        left, right = browser.execute_script(
            "return [...document.querySelectorAll('.two > section')].map(one => one.getBoundingClientRect().top)"
        )
        assert (left == right) is beside
        assert (
            browser.execute_script("return getComputedStyle(document.querySelector('del')).textDecorationLine")
            == "line-through"
        )


def test_the_page_of_two_plans_has_the_numbers_of_both(small: Small, tmp_path: Path) -> None:
    together = compile_spec(small(*LARGE, "machine=2x8gb"))
    split = compile_spec(small(*LARGE, "machine=2x8gb", "hardware.allow=[split_controlnet]"))
    page = compare_page(together, split, ("a.json", "b.json"))
    for plan in (together, split):
        assert f"{plan.estimates.seconds_per_image:.3g} s" in page
        assert plan.digest[7:19] in page
    moved = split.device_map["controlnet"]
    assert f"<del>GPU {together.device_map['controlnet']}</del>" in page
    assert f"<ins>GPU {moved}</ins>" in page
    same = compare_page(together, together, ("a.json", "a.json"))
    assert "No difference" in same
    assert "Both plans are the same." in same
    assert "<del>" not in same


def test_the_command_writes_the_page_and_escapes_names(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = compile_spec(small(*LARGE, "machine=2x8gb"))
    saved = plan.save(tmp_path / "<img src=x>.json")
    assert main([str(saved), str(saved), "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert said.out == "no difference\n"
    assert "saved: " in said.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert page.count("&lt;img src=x&gt;") == 2
    assert main([str(saved), str(saved), "--html", "/proc/nothing/page.html"]) == 3


def test_plans_on_the_cpu_and_without_gpus_are_compared_too(small: Small) -> None:
    plan: Plan = compile_spec(small("hardware=single_gpu"))
    page = compare_page(plan, plan, ("a", "b"))
    if "cpu" in plan.device_map.values():
        assert page.count("every component is on the CPU") == 2
        assert "Seconds are not estimated" in page
