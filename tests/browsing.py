"""Pages in Chromium: opened at a width and in a theme, and what a person sees of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def opened(browser: Any, path: Path, width: int = 1100, dark: bool = False) -> None:
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(path.as_uri())


def seen(browser: Any, selector: str) -> list[str]:
    from selenium.webdriver.common.by import By

    return [one.text for one in browser.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]
