"""Whether the checkpoint that is there is the one that a plan was made for: architecture, config and content.

A hub repository is named by its commit and the generated `tiny` by its recipe; what lies in folders is compared here,
before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._units import human_bytes
from ..declare.pipelines import Component
from ..declare.spec import Model
from ..errors import CheckpointError, PlanError
from ..facts.checkpoint import Checkpoint, folder_parts
from ..facts.component import ComponentFacts
from ..facts.headers import weight_files
from ..facts.hub import names_folder
from .file_digests import SMALL, contents
from .records import CheckpointRecord, FileContent, PartContent, PlacedComponent

CONTENT = "checkpoint_content"
"""The name that accepts other values in a checkpoint of the same architecture."""
_HELPERS = ("tokenizer", "scheduler")
_READ = {".json", ".txt", ".model", ".jinja"}
"""Suffixes of the files that tokenizers and schedulers are made from."""
PlannedComponents = Mapping[Component, PlacedComponent]


@dataclass(frozen=True)
class Drift:
    """Differences, a line each: `changed` are refused (or cannot be verified), `content` may be accepted by name."""

    changed: tuple[str, ...] = ()
    content: tuple[str, ...] = ()


def record_of(checkpoint: Checkpoint, whole: bool) -> CheckpointRecord:
    """Describe a checkpoint for a plan; `whole` reads every byte of what lies in folders.

    Raises:
        CheckpointError: a file cannot be read.
    """
    main = _main_in_folder(checkpoint)
    in_folder = dict.fromkeys(checkpoint.components, main)
    in_folder |= {name: names_folder(source) for name, source in checkpoint.apart.items()}
    mine = {name: facts for name, facts in checkpoint.components.items() if in_folder[name]}
    return CheckpointRecord(
        kind=checkpoint.kind,
        source=checkpoint.source,
        revision=checkpoint.revision,
        fingerprint=checkpoint.fingerprint,
        content=_content(mine, checkpoint.folder if main else None, whole),
    )


def drift_of(record: CheckpointRecord, model: Model, components: PlannedComponents, verify: bool) -> Drift:
    """Compare what lies in folders with what a plan recorded.

    Args:
        record: the checkpoint that the plan was made for.
        model: where the plan's declaration says that it is.
        components: the plan's.
        verify: read every byte; else headers and samples.
    """
    main, was = _main_in_folder(record), record.content
    named = model.components.given()
    apart = [name for name, source in named.items() if (name in was if was else names_folder(source))]
    if not main and not apart:
        return Drift()
    try:
        folder, facts = folder_parts(model, main, apart)
        changed = [*_sizes(components, facts), *_architectures(record, components, facts)]
        if verify and not changed:
            changed = [line for name, part in was.items() for line in _unverifiable(name, part)]
        if changed or not was:
            return Drift(tuple(changed))
        found = _content(facts, folder, verify)
    except CheckpointError as problem:
        return Drift((str(problem),))
    except (OSError, ValueError) as problem:  # a name that no file can have
        return Drift((f"checkpoint: it cannot be read: {getattr(problem, 'strerror', None) or problem}",))
    lines = [
        line
        for name, part in was.items()
        for line in _files(name, part.files, found[name].files if name in found else {})
    ]
    return Drift(content=tuple(lines))


def check_checkpoint(
    record: CheckpointRecord, model: Model, components: PlannedComponents, allowed: Sequence[str]
) -> None:
    """Refuse a checkpoint in a folder that is not the planned one; see `drift_of`.

    Raises:
        PlanError: each difference is on a line of its own.
    """
    drift = drift_of(record, model, components, verify=False)
    lines = [*drift.changed, *([] if CONTENT in allowed else drift.content)]
    if lines:
        raise PlanError("the plan is stale:\n  " + "\n  ".join(lines), where="model.source", hint=hint_for(drift))


def hint_for(drift: Drift) -> str:
    """What helps against a checkpoint that changed."""
    accept = f", or accept its content with resolve.allow=[{CONTENT}]" if drift.content and not drift.changed else ""
    return f"compile the plan for this checkpoint{accept}"


def _main_in_folder(checkpoint: Checkpoint | CheckpointRecord) -> bool:
    return checkpoint.kind == "checkpoint" and checkpoint.revision is None


def _content(facts: Mapping[Component, ComponentFacts], folder: Path | None, whole: bool) -> dict[str, PartContent]:
    found: dict[str, PartContent] = {}
    for name, one in facts.items():
        assert one.folder is not None
        paths = weight_files(one.folder, one.variant, name, one.allow_pickle)
        found[name] = PartContent(fingerprint=one.fingerprint, files=contents(paths, name, whole))
    for helper in _HELPERS if folder else ():
        assert folder is not None
        paths = [path for path in (folder / helper).iterdir() if path.suffix in _READ and path.is_file()]
        found[helper] = PartContent(files=contents(paths, helper, whole))
    return found


def _sizes(components: PlannedComponents, facts: Mapping[Component, ComponentFacts]) -> list[str]:
    lines = []
    for name, one in facts.items():
        planned, found = components[name].weights_bytes, one.weights_bytes(components[name].format)
        if planned != found:
            lines.append(f"{name}: was {human_bytes(planned)} of weights, is {human_bytes(found)}")
    return lines


def _architectures(
    record: CheckpointRecord, components: PlannedComponents, facts: Mapping[Component, ComponentFacts]
) -> list[str]:
    """Components whose class, config or shapes changed; a plan of an earlier version has one digest for all."""
    was = record.content
    if was:
        return [
            f"{name}: its config or the shapes of its tensors changed since the plan was compiled"
            for name, one in facts.items()
            if name not in was or was[name].fingerprint != one.fingerprint
        ]
    whole = Checkpoint("checkpoint", "", None, facts, None)
    if set(facts) == set(components) and whole.fingerprint != record.fingerprint:
        return ["checkpoint: it changed since the plan was compiled (another architecture or config)"]
    return []


def _unverifiable(part: str, was: PartContent) -> list[str]:
    """Files of which the plan knows samples alone."""
    return [
        f"{part}/{name}: the plan has no digest of the whole file, which resolve.verify=true keeps when it is compiled"
        for name, file in was.files.items()
        if file.bytes > SMALL and file.whole is None
    ]


def _files(part: str, was: Mapping[str, FileContent], now: Mapping[str, FileContent]) -> list[str]:
    lines = []
    for name in sorted({*was, *now}):
        before, after = was.get(name), now.get(name)
        if before is None or after is None:
            lines.append(f"{part}/{name}: {'was not there' if before is None else 'is not there'}")
        elif (before.bytes, before.sampled) != (after.bytes, after.sampled):
            lines.append(f"{part}/{name}: was {_shown(before, before.sampled)}, is {_shown(after, after.sampled)}")
        elif before.whole and after.whole and before.whole != after.whole:
            lines.append(f"{part}/{name}: was {_shown(before, before.whole)}, is {_shown(after, after.whole)}")
    return lines


def _shown(file: FileContent, digest: str) -> str:
    kind, _, digits = digest.partition(":")
    return f"{human_bytes(file.bytes)} {kind}:{digits[:12]}"
