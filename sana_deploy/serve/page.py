"""The page at `/`: one file that loads nothing else, and the policy that a browser holds it to."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Page:
    """The text of a page and its Content-Security-Policy."""

    text: str
    policy: str


@cache
def page() -> Page:
    """Read the page. Only its own script and style are allowed to work, by their digests."""
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    digests = {
        name: " ".join(_digest(inner) for inner in re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL))
        for name in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {digests['script']}; style-src {digests['style']}; "
        "img-src 'self' data: blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return Page(text, policy)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
