"""The templates of the pages: every text is escaped, and what a template does not get is an error."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from .notes import figures, number


@cache
def template(name: str) -> Template:
    """A page's template; `figures` and `number` give numbers their tooltips in it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True,
    )  # fmt: skip
    environment.globals |= {"figures": figures, "number": number}
    return environment.get_template(f"{name}.html.j2")
