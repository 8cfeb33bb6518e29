"""The digest of a plan: what was declared and decided, whatever host it was compiled on.

Equal decisions have equal digests, whatever minor version wrote them. From 1.4 on a digest covers no minor version's
number, and a key that a later version added only where it says something: it is left out where it is empty, and
`pipeline_class` where it names the one pipeline that earlier versions knew, `runtime` where it is eager, `split` where
it is none. What was declared of runtime, split and replicas is left out: these keys of the plan are what was decided.
So are `exactness`, which follows from them, images per second, which follow from seconds, `overlap`, which follows from
places, `faster`, which was not taken, and keys of a request that the pipeline does not read. Digests of 1.0 to 1.3
cover their number; 1.3 goes on to stand in its place.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..declare.pipelines import PIPELINES, SANA_CONTROLNET
from ..facts.shapes import digest

_OUTSIDE_DIGEST = ("digest", "tool_version", "libraries", "exactness", "faster", "images_per_second", "overlap")
_OUTSIDE_BASIS = re.compile(r"(replicas\.\*\.)?(faster|overlap)\.|images_per_second$")
_COVERED_BY_1_3 = {
    "schema_version", "spec", "checkpoint", "slots", "home", "device_map", "components", "knobs", "transfers",
    "estimates", "considered", "rejections", "diagnostics", "basis", "feasible", "knob_prices", "vae_tile",
}  # fmt: skip
_LATER = re.compile(r"1\.([4-9]|[1-9][0-9]+)")
_PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")
"""A hub repository at a commit, which the digest covers; any other ControlNet published apart is a folder of a host."""
_HOST_PATHS = (
    ("model", "cache_dir"),
    ("model", "pipeline"),
    ("workload", "control_image"),
    ("workload", "control_fit"),
    ("plan_file",),
    ("until",),
    ("output",),
    ("resolve",),
    ("runtime",),
    ("hardware", "split"),
    ("hardware", "replicas"),
)


def _drop_wholes(parts: dict[str, Any]) -> None:
    """Leave out digests of whole files: whether they were asked for is no decision, and samples name the content."""
    for part in parts.values():
        match part:
            case {"files": dict(files)}:
                for file in files.values():
                    if isinstance(file, dict):
                        file.pop("whole", None)


def _drop_folders(named: dict[str, Any]) -> None:
    """Leave out where components published apart are on this host; a hub repository at a commit is an input."""
    for name, source in list(named.items()):
        if isinstance(source, str) and not _PINNED.fullmatch(source):
            del named[name]


def _drop_unread(pipeline_class: object, workload: dict[str, Any]) -> None:
    """Leave out keys of a request that only other pipelines read."""
    own = PIPELINES.get(str(pipeline_class))
    for key in {key for one in PIPELINES.values() for key in one.reads} if own else ():
        if own and key not in own.reads:
            workload.pop(key, None)


def _drop_empty(key: str, records: list[Any]) -> None:
    """Leave out what a later version added to records, where it says nothing: bytes that graphs keep, further units."""
    for record in records:
        if isinstance(record, dict) and not record.get(key):
            record.pop(key, None)


def _drop_later_bytes(slots: list[Any]) -> None:
    for key in ("pool_bytes", "first_pool_bytes"):
        _drop_empty(key, slots)


def _drop_what_follows(content: dict[str, Any]) -> None:
    """Leave out of basis and replicas what is left out of the plan's own keys."""
    match content:
        case {"basis": dict(basis)}:
            content["basis"] = {key: how for key, how in basis.items() if not _OUTSIDE_BASIS.match(key)}
    match content:
        case {"replicas": list(replicas)}:
            for key in _OUTSIDE_DIGEST:
                _drop(key, replicas)
            _drop_empty("vae_band_count", replicas)
            for key in ("rows", "layers", "graphed_calls"):
                _drop_empty(key, replicas)
            _drop_later_bytes([slot for one in replicas if isinstance(one, dict) for slot in one.get("slots", [])])


def _drop(key: str, records: list[Any]) -> None:
    for record in records:
        if isinstance(record, dict):
            record.pop(key, None)


def _says(key: str, value: Any) -> bool:
    """Whether the digest covers a key: those of 1.3 always, later ones where a plan without them says otherwise."""
    if key == "pipeline_class":
        return bool(value != SANA_CONTROLNET.class_name)
    if key == "runtime":
        return bool(value != "eager")
    if key == "split":
        return bool(value != "none")
    return key in _COVERED_BY_1_3 or bool(value)


def digest_of(values: dict[str, Any]) -> str:
    """sha256 over the canonical JSON of inputs and decisions; the tool's version and this host's paths left out.

    What the files of a checkpoint hold is such an input, as the commit of a hub repository is: equal digests stand for
    equal pictures. Content goes by names inside the checkpoint, so that a copy elsewhere has the same digest.
    """
    covered = {key: value for key, value in values.items() if key not in _OUTSIDE_DIGEST and _says(key, value)}
    content = json.loads(json.dumps(covered))
    if _LATER.fullmatch(str(content.get("schema_version"))):
        content["schema_version"] = "1.3"
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
    match content:
        case {"slots": list(slots)}:
            _drop_later_bytes(slots)
    match content:
        case {"considered": {"runners_up": list(runners), **others}}:
            _drop_empty("units", [*runners, others.get("closest")])
    _drop_what_follows(content)
    match spec:
        case {"workload": dict(workload)}:
            _drop_unread(values.get("pipeline_class", SANA_CONTROLNET.class_name), workload)
    match spec:
        case {"model": {"components": dict(named)}}:
            _drop_folders(named)
    return "sha256:" + digest(content)
