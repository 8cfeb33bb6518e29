"""The page at `/` as a person meets it, in a real browser where there is one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from serving import Running, running, two_small_gpus
from sleeping import Sleeping

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    with running(two_small_gpus(), Sleeping(0.05), most_steps=900) as service:
        yield service


def until(done: Callable[[], Any], seconds: float = 15) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


class Shown:
    """The page in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get_log("browser")
        driver.get_log("performance")
        driver.get(url)

    def at(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def fill(self, **values: str) -> None:
        for name, value in values.items():
            self.at(name).clear()
            self.at(name).send_keys(value)

    @property
    def said(self) -> str:
        return str(self.at("said").text)

    def loaded(self) -> set[str]:
        """Every URL that it asked for since it was opened."""
        logged = [json.loads(one["message"])["message"] for one in self.driver.get_log("performance")]
        sent = [one["params"]["request"]["url"] for one in logged if one["method"] == "Network.requestWillBeSent"]
        return {url for url in sent if not url.startswith(("data:", "blob:"))}


def test_a_prompt_and_a_dropped_image_become_a_picture(browser: Any, api: Running, tmp_path: Path) -> None:
    edges = tmp_path / "edges.png"
    Image.new("RGB", (96, 64), "red").save(edges)
    page = Shown(browser, api.url)
    until(lambda: page.at("model").text == "sana_1600m_controlnet, 1024x1024 px, 20 steps")
    page.fill(prompt="a red fox", size="96x64", steps="12", seed="7")
    page.at("file").send_keys(str(edges))
    page.at("draw").click()
    until(lambda: page.said.startswith("step "))
    until(lambda: page.said.startswith("96x64, seed 7, "))
    assert page.at("result").get_attribute("alt") == "a red fox"
    assert page.at("progress").get_attribute("value") == "12"
    size = browser.execute_script(
        "const i = document.getElementById('result'); return [i.naturalWidth, i.naturalHeight]"
    )
    assert size == [96, 64]
    assert api.engine.standing.working == 0
    paths = {url.removeprefix(api.url) for url in page.loaded()}
    assert paths == {"/", "/v1/models", "/v1/images/edits"}, "nothing from elsewhere"
    assert [one["message"] for one in browser.get_log("browser")] == []


def test_what_is_refused_is_said_and_a_drawing_can_be_stopped(browser: Any, api: Running) -> None:
    page = Shown(browser, api.url)
    page.fill(prompt="a red fox", size="2048x2048")
    page.at("draw").click()
    until(lambda: "2048x2048 needs 12.53 GiB on GPU 1" in page.said)
    assert page.at("said").get_attribute("class") == "bad"
    page.fill(size="96x64", steps="900")
    page.at("draw").click()
    until(lambda: page.said.startswith("step "))
    assert api.engine.standing.working == 1
    page.at("stop").click()
    until(lambda: page.said == "stopped")
    until(lambda: api.engine.standing.working == 0)
    assert page.at("draw").is_enabled()


def test_the_page_runs_nothing_but_its_own_script(browser: Any, api: Running) -> None:
    policy = httpx2.get(api.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    Shown(browser, api.url)
    script = "const s = document.createElement('script'); s.textContent = 'window.foreign = 1'; document.body.append(s)"
    browser.execute_script(script)
    assert browser.execute_script("return window.foreign") is None


def test_the_page_fits_a_narrow_screen(browser: Any, api: Running) -> None:
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        Shown(browser, api.url)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
