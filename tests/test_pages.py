"""report.html and summary.html as a person meets them, in a real browser where there is one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browsing import opened, seen

from sana_deploy import rehearse
from sana_deploy._units import GIB, human_bytes
from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.report.html import plan_page, sweep_page
from sana_deploy.report.summary import NUMBERS, cells_of
from sana_deploy.run.outcome import Failure, Outcome

Small = Callable[..., DeploySpec]
Run = Callable[..., subprocess.CompletedProcess[str]]
SPLIT = ("model=sana_1600m_controlnet", "workload.height=1024", "workload.width=1024", "machine=2x8gb",
         "hardware.allow=[split_controlnet]")  # fmt: skip


class Outline(HTMLParser):
    """Tags and attributes of a page, and every address that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def split_page(small: Small) -> tuple[str, Any]:
    plan = compile_spec(small(*SPLIT))
    report = rehearse(plan, "shapes").report
    return plan_page(plan, Outcome(status="done", exit_code=0, stage="generate", rehearsal=report), "the command"), plan


def test_the_report_tells_the_plan_s_numbers_in_words_and_loads_nothing(small: Small) -> None:
    page, plan = split_page(small)
    outline = Outline(page)
    for tag, attributes in outline.tags:
        address = attributes.get("src") or attributes.get("href")
        assert not address or address.startswith(("data:", "#")), tag
        if tag == "svg" or attributes.get("role") == "img":
            assert attributes["aria-label"], "every drawing has its text"
    assert ("html", {"lang": "en"}) in outline.tags
    labels = [str(attributes["aria-label"]) for _, attributes in outline.tags if attributes.get("role") == "img"]
    for slot in plan.slots:
        (label,) = [one for one in labels if one.startswith(f"GPU {slot.index},")]
        assert f"~{slot.peak_bytes / GIB:.2f} of {human_bytes(slot.capacity_bytes)}" in label
        widths = [float(width) for width in re.findall(r"style=\"width: ([\d.]+)%", page)]
        assert sum(widths) == pytest.approx(100 * len(plan.slots), abs=0.1)
    assert any("GPU 0 to GPU 1 61.25 MiB per step" in label for label in labels)
    text = re.sub(r"<[^>]+>", "", page)
    for row in plan.rejections:
        assert row.closest.replace("'", "&#39;") in text


def test_every_text_of_the_user_is_escaped(small: Small) -> None:
    nasty = '<img src=x onerror="alert(1)">'
    plan = compile_spec(small("machine=2x8gb"))
    hostile = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"source": nasty})})
    failure = Failure(type="E", message=nasty, hint=nasty)
    outcome = Outcome(status="failed", exit_code=6, stage="apply", error=failure)
    page = plan_page(hostile, outcome, f"python -m sana_deploy workload.prompt='{nasty}'")
    assert "<img" not in page
    assert page.count("&lt;img src=x") >= 4
    empty: dict[str, Any] = {key: None for key in NUMBERS.values() if key not in ("job", "gpus")}
    row = {"job": 0, "overrides": {"workload.prompt": nasty}, "status": "failed", "front": False, "gpus": 0,
           "report": "", "reason": nasty, "device_map": {}, "dtypes": {}, "knobs": [nasty], "per_gpu": [],
           "exactness": "changes", "compared_seconds": None, "total_peak_bytes": None, **empty}  # fmt: skip
    assert "<img" not in sweep_page(nasty, [row], cells_of([row]), NUMBERS)


@pytest.mark.browser
def test_a_person_reads_the_report(browser: Any, small: Small, tmp_path: Path) -> None:
    page, _ = split_page(small)
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    for width, dark in ((1100, False), (1100, True), (390, False)):
        opened(browser, path, width, dark)
        assert seen(browser, "h1") == ["sana_1600m_controlnet, multi_gpu_balanced, mixed_bf16"]
        assert seen(browser, "pre") == ["the command"]
        assert len(seen(browser, ".bar")) == 2
        assert len(seen(browser, "svg")) == 3, "a timeline for each GPU, and what moves"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ink, paper = (
            browser.execute_script(f"return getComputedStyle(document.body).{name}")
            for name in ("color", "backgroundColor")
        )
        assert luminance(paper) < luminance(ink) if dark else luminance(ink) < luminance(paper)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def luminance(color: str) -> float:
    red, green, blue = (int(part) for part in re.findall(r"\d+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


VIEWS = [(width, dark) for width in (390, 768, 1200, 1600) for dark in (False, True)]


def outside(browser: Any, selector: str, width: int) -> list[str]:
    """Texts of what matches `selector`, is displayed and is not wholly within the window's width."""
    rectangles = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter(one => one.getClientRects().length)"
        ".map(one => { const range = document.createRange(); range.selectNodeContents(one);"
        " const box = range.getBoundingClientRect(); return [box.left, box.right, one.textContent]; })",
        selector,
    )
    assert rectangles, f"nothing matches {selector}"
    return [text for left, right, text in rectangles if left < 0 or right > width]


@pytest.mark.browser
def test_no_table_of_the_report_is_cut_on_a_phone(browser: Any, small: Small, tmp_path: Path) -> None:
    page, _ = split_page(small)
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    for width, dark in VIEWS:
        opened(browser, path, width, dark)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert outside(browser, "table tbody tr > *", width) == []
        assert outside(browser, "svg.timeline text", width) == []


@pytest.mark.browser
def test_seconds_and_reasons_of_a_summary_are_within_the_window(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "summary.html"
    path.write_text(wide_sweep(), encoding="utf-8")
    for width, dark in VIEWS:
        opened(browser, path, width, dark)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for title in ("~s/image", "seconds", "job", "front"):
            assert outside(browser, f"#rows td[data-label='{title}']", width) == []
        assert outside(browser, "#rows tr.why p", width) == []
        if width >= 900:
            heights = browser.execute_script("return [...document.querySelectorAll('#rows tbody')].map(one => "
                                             "one.getBoundingClientRect().height)")  # fmt: skip
            assert max(heights) < 150, "a job takes a few lines"
            assert seen(browser, "#rows tr.why p")[0] == WHY.strip()


WHY = "0 of 8 placements fit, each under 4 sets of knobs (32 dtype on GPU 0). Closest: " + "a long reason " * 10


def wide_sweep() -> str:
    """A sweep over six keys, with measured seconds, long values and a job that does not fit."""
    rows = []
    for job, status in enumerate(("done", "infeasible", "done")):
        ended = status == "done"
        empty: dict[str, Any] = {key: 1.0 if ended else None for key in NUMBERS.values() if key not in ("job", "gpus")}
        given = {f"workload.key{n}": f"value {n} of job {job} " * 3 for n in range(5)} | {"precision": f"p{job}"}
        rows.append({
            "job": job, "overrides": given, "status": status, "front": ended, "gpus": 2 * ended, "report": "",
            "reason": "" if ended else WHY, "device_map": {}, "per_gpu": [],
            "compared_seconds": 1.0 + job if ended else None,
            "exactness": "rounding" if ended else None,
            "knobs": ["vae_slicing", "split_controlnet", "text_encoder_offload"] * ended,
            "dtypes": dict.fromkeys(("text_encoder", "vae", "transformer", "controlnet"), "float16") if ended else {},
            "total_peak_bytes": 9 * GIB + job * GIB if ended else None, **empty,
        })  # fmt: skip
    return sweep_page("Sweep", rows, cells_of(rows), NUMBERS)


@pytest.mark.browser
def test_a_person_sorts_and_filters_the_summary_and_opens_a_report(browser: Any, here: Run, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    swept = here("-m", "hardware=single_gpu,multi_gpu_balanced", "precision=fp16,mixed_bf16", "machine=2xt4,2xrtx4090",
                "model=sana_1600m_controlnet", "until=compile")  # fmt: skip
    assert swept.returncode == 0, swept.stderr
    (path,) = (tmp_path / "outputs" / "multirun").glob("*/*/summary.html")
    opened(browser, path)
    jobs = "#rows tbody:not([hidden]) tr.job td:first-child"
    assert len(seen(browser, jobs)) == 8
    heads = browser.find_elements(By.CSS_SELECTOR, "#rows thead button")
    by_title = {one.text.strip(" ▲▼"): one for one in heads}
    column = [one.text for one in heads].index("peak") + 1

    def peaks() -> list[float]:
        cells = browser.find_elements(By.CSS_SELECTOR, f"#rows tbody:not([hidden]) tr.job td:nth-child({column})")
        return [float(cell.get_attribute("data-value")) for cell in cells if cell.get_attribute("data-value")]

    by_title["peak"].click()
    rising = peaks()
    assert rising == sorted(rising)
    by_title["peak"].send_keys("\n")
    assert peaks() == sorted(rising, reverse=True), "the keyboard sorts too"
    head = browser.find_element(By.CSS_SELECTOR, f"#rows thead th:nth-child({column})")
    assert head.get_attribute("aria-sort") == "descending"
    empty_last = seen(browser, f"#rows tbody tr.job td:nth-child({column})")[-2:]
    assert empty_last == ["", ""], "what does not fit stays below"

    filter_box = browser.find_element(By.ID, "filter")
    filter_box.send_keys("2xt4 single")
    assert len(seen(browser, jobs)) == 2
    assert seen(browser, "#shown") == ["2 of 8 shown"]
    filter_box.clear()
    filter_box.send_keys(" ")
    Select(browser.find_element(By.ID, "status")).select_by_visible_text("infeasible")
    assert len(seen(browser, jobs)) == 2
    Select(browser.find_element(By.ID, "status")).select_by_visible_text("all")
    browser.find_element(By.ID, "front").click()
    assert 1 <= len(seen(browser, jobs)) < 8
    browser.find_element(By.CSS_SELECTOR, "#rows tbody:not([hidden]) tr.job td a").click()
    assert browser.current_url.endswith("/report.html")
    assert seen(browser, "h2")[0] == "Command"
    loaded = [entry for entry in browser.get_log("performance") if '"Network.requestWillBeSent"' in entry["message"]]
    assert not [entry for entry in loaded if '"url":"http' in entry["message"]], "nothing comes from the network"
