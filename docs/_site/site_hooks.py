"""Hooks of MkDocs: generated pages are added, links that leave `docs/` are followed, new pages get a place in the nav.

Pages of `docs/` are read on the site and in the repository. There they link to files beside `docs/`, such as the
Dockerfile; the site publishes such a file under `source/` and the link goes there, so that a missing one is an error.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]  # the site tells of this checkout, whatever is installed
import site_reference  # noqa: E402 - MkDocs takes the folders off the path again once this file is loaded

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")
"""The path of a link or an image to another file of this repository."""
_OUTSIDE = "source/"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages of `docs/` that the nav does not name yet come last."""
    named = set(_leaves(config.nav))
    further = [path.name for path in sorted(DOCS.glob("*.md")) if path.name not in named]
    if further and config.nav is not None:
        config.nav = [*config.nav, {"More": further}]
    return config


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for value in nav.values():
            yield from _leaves(value)
    else:
        for entry in nav or ():
            yield from _leaves(entry)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated, and files beside `docs/` that pages link to."""
    for path, text in {**site_reference.pages(), **site_reference.files()}.items():
        files.append(File.generated(config, path, content=text))
    waiting = [(path, path.read_text(encoding="utf-8")) for path in sorted(DOCS.rglob("*.md"))]
    while waiting:
        origin, text = waiting.pop()
        for link in _LINK.findall(text):
            target = Path(posixpath.normpath(origin.parent / link))
            if target.is_relative_to(DOCS) or not target.is_file() or files.get_file_from_path(published(target)):
                continue
            files.append(File.generated(config, published(target), abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append((target, target.read_text(encoding="utf-8")))
    return files


def published(path: Path) -> str:
    """Where a file of the repository is on the site; names that begin with a dot would be left out."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if not path.is_relative_to(ROOT):
        return path.as_posix()
    return _OUTSIDE + "/".join(part.lstrip(".") for part in path.relative_to(ROOT).parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave `docs/`, and all links of files beside it, go to where these are on the site."""
    source = page.file.abs_src_path
    origin = Path(source) if source else DOCS / page.file.src_uri
    return follow(markdown, origin, page.file.src_uri)


def follow(markdown: str, origin: Path, uri: str) -> str:
    """Return `markdown`, which stands in the file `origin`, with the links it needs at `uri` on the site."""

    def link(found: re.Match[str]) -> str:
        target = Path(posixpath.normpath(origin.parent / found[1]))
        if origin.is_relative_to(DOCS) and target.is_relative_to(DOCS):
            return found[1]
        return posixpath.relpath(published(target), posixpath.dirname(uri) or ".")

    return _LINK.sub(link, markdown)
