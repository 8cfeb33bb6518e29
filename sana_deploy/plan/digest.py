"""The digest of a plan: what was declared and decided, whatever host it was compiled on."""

from __future__ import annotations

import json
import re
from typing import Any

from ..facts.shapes import digest

_OUTSIDE_DIGEST = ("digest", "tool_version", "libraries")
_PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
"""A hub repository at a commit, which the digest covers; any other ControlNet published apart is a folder of a host."""
_HOST_PATHS = (
    ("model", "cache_dir"),
    ("workload", "control_image"),
    ("workload", "control_fit"),
    ("plan_file",),
    ("until",),
    ("output",),
    ("resolve",),
)


def _drop_wholes(parts: dict[str, Any]) -> None:
    """Leave out digests of whole files: whether they were asked for is no decision, and samples name the content."""
    for part in parts.values():
        match part:
            case {"files": dict(files)}:
                for file in files.values():
                    if isinstance(file, dict):
                        file.pop("whole", None)


def digest_of(values: dict[str, Any]) -> str:
    """sha256 over the canonical JSON of inputs and decisions; the tool's version and this host's paths left out.

    What the files of a checkpoint hold is such an input, as the commit of a hub repository is: equal digests stand for
    equal pictures. Content goes by names inside the checkpoint, so that a copy elsewhere has the same digest.
    """
    content = json.loads(json.dumps({k: v for k, v in values.items() if k not in _OUTSIDE_DIGEST}))
    spec = content.get("spec", {})
    for path in _HOST_PATHS:
        group = spec if len(path) == 1 else spec.get(path[0])
        if isinstance(group, dict):
            group.pop(path[-1], None)
    if spec.get("model", {}).get("kind") != "tiny" and content.get("checkpoint", {}).get("revision") is None:
        spec.get("model", {}).pop("source", None)
        content.get("checkpoint", {}).pop("source", None)
    match content:
        case {"checkpoint": {"content": dict(parts)}}:
            _drop_wholes(parts)
    match spec:
        case {"model": {"components": {"controlnet": str(apart)} as named}} if not _PINNED.fullmatch(apart):
            del named["controlnet"]
    return "sha256:" + digest(content)
