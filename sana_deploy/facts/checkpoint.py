"""Where a pipeline's configs and weights come from, read without loading a weight or importing torch.

`open_checkpoint` turns the `model` group into a `Checkpoint`: each component's class, config, exact parameter
count and files. Sources are a local folder, a hub repository, the shipped catalogue, or the generated `tiny` one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..declare.spec import COMPONENTS, CatalogueModel, Component, Model, TinyModel
from ..errors import CheckpointError
from ..facts import catalogue, hub
from .component import CLASSES, ComponentFacts, component_facts, read_json
from .shapes import Linears, digest
from .tiny import ensure_tiny


@dataclass(frozen=True)
class Checkpoint:
    """All components of one pipeline and where the rest of it (tokenizer, scheduler) lies.

    `folder` is None when only the shapes are known (catalogue) and the weights are elsewhere (`source`).
    `controlnet_source` is where a ControlNet published apart is, a hub repository at its commit.
    """

    kind: str
    source: str
    revision: str | None
    components: Mapping[Component, ComponentFacts]
    folder: Path | None
    controlnet_source: str | None = None

    @property
    def fingerprint(self) -> str:
        """sha256 over classes, configs and tensor shapes; equal for equal architectures, wherever they lie."""
        parts = {name: facts.identity for name, facts in self.components.items()}
        return "sha256:" + digest(parts)


def open_checkpoint(model: Model, *, weights: bool = False) -> Checkpoint:
    """Read what the `model` group names.

    Args:
        model: the declared model.
        weights: also make sure that the weights are on this host (downloads them for a hub source).

    Raises:
        CheckpointError: it is missing, damaged, or not a SANA ControlNet pipeline.
    """
    if isinstance(model, TinyModel):
        return _from_folder("tiny", "tiny", ensure_tiny(model.cache_dir), None, None, model, weights)
    if isinstance(model, CatalogueModel) and not _is_local(model.source) and not weights:
        return _with_overrides(_from_catalogue(model), model, weights)
    if model.source is None:
        raise CheckpointError(
            f"no weights of {getattr(model, 'name', 'this model')} are published in diffusers' format",
            where="model.source",
            hint="convert the ControlNet with diffusers' scripts/convert_sana_controlnet_to_diffusers.py and pass "
            "model.source=FOLDER, or stop earlier with until=resolve",
        )
    folder, revision = hub.locate(
        model.source, model.revision, model.variant, "model.source", weights=weights, pickles=model.allow_pickle
    )
    return _from_folder("checkpoint", model.source, folder, revision, model.variant, model, weights)


def _is_local(source: str | None) -> bool:
    return source is not None and Path(source).expanduser().is_dir()


def _from_catalogue(model: CatalogueModel) -> Checkpoint:
    entry = catalogue.load(model.name)
    components = {
        name: ComponentFacts(
            name=name,
            class_name=part["class_name"],
            config=part["config"],
            parameters=part["parameters"],
            fixed_bytes=part["fixed_bytes"],
            shapes_digest=part["shapes_digest"],
            linears=Linears(**part["linears"]),
        )
        for name, part in ((name, entry[name]) for name in COMPONENTS)
    }
    return Checkpoint("catalogue", model.name, model.revision, components, None)


def _with_overrides(checkpoint: Checkpoint, model: Model, weights: bool) -> Checkpoint:
    if model.components.controlnet is None:
        return checkpoint
    facts, source = _override(model.components.controlnet, weights)
    components = {**checkpoint.components, "controlnet": facts}
    return replace(checkpoint, components=components, controlnet_source=source)


def _from_folder(
    kind: str, source: str, folder: Path, revision: str | None, variant: str | None, model: Model, weights: bool
) -> Checkpoint:
    components = _own_parts(source, folder, revision, variant, model, weights)
    return _with_overrides(Checkpoint(kind, source, revision, components, folder), model, weights)


def _own_parts(
    source: str, folder: Path, revision: str | None, variant: str | None, model: Model, weights: bool
) -> dict[Component, ComponentFacts]:
    """Read the components in `folder`, but for a ControlNet published apart."""
    index = read_json(folder / "model_index.json", "model.source")
    overridden = {"controlnet"} if model.components.controlnet else set()
    _check_index(index, folder, overridden)
    pickles = not isinstance(model, TinyModel) and model.allow_pickle
    components: dict[Component, ComponentFacts] = {}
    for name in COMPONENTS:
        if name not in overridden:
            where = f"model.source ({name})"
            remote = (
                None if weights or revision is None else partial(hub.remote_headers, source, revision, name, variant)
            )
            components[name] = component_facts(name, folder / name, variant, where, remote, pickles)
    return components


def folder_parts(model: Model, main: bool, apart: bool) -> tuple[Path | None, dict[Component, ComponentFacts]]:
    """Read the components that lie in folders, and no hub repository that happens to have such a name.

    Args:
        model: the declared model.
        main: `model.source` is a folder.
        apart: a ControlNet published apart is in a folder.

    Returns:
        The folder of `model.source`, None unless `main`, and the components.

    Raises:
        CheckpointError: a folder is missing or damaged.
    """
    folder, found = None, {}
    if main and not isinstance(model, TinyModel):
        folder = _existing(str(model.source), "model.source")
        found = _own_parts(str(model.source), folder, None, model.variant, model, weights=False)
    if apart:
        named = str(model.components.controlnet)
        _existing(named, "model.components.controlnet")
        found["controlnet"] = _override(named, weights=False)[0]
    return folder, found


def _existing(source: str, where: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"the folder {source} is not there", where=where)
    return folder


def _override(named: str, weights: bool) -> tuple[ComponentFacts, str]:
    """Return a ControlNet published apart and where it is: the folder, or the hub repository at its commit."""
    where = "model.components.controlnet"
    source, wanted = hub.split_revision(named)
    root, revision = hub.locate(source, wanted, None, where, weights=weights)
    nested = not (root / "config.json").is_file() and (root / "controlnet").is_dir()
    prefix = "controlnet" if nested else ""
    remote = None if weights or revision is None else partial(hub.remote_headers, source, revision, prefix, None)
    facts = component_facts("controlnet", root / prefix, None, where, remote)
    return facts, named if revision is None else hub.at_revision(source, revision)


def _check_index(index: Mapping[str, Any], folder: Path, overridden: set[str]) -> None:
    for name in COMPONENTS:
        if name in overridden:
            continue
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != CLASSES[name]:
            raise CheckpointError(
                f"{folder} is no SANA ControlNet pipeline: its {name} is {found or 'missing'}, "
                f"expected {CLASSES[name]} (its model_index.json names {index.get('_class_name')})",
                where="model.source",
                hint="a base SANA checkpoint takes model.components.controlnet=FOLDER_OR_REPO"
                if name == "controlnet"
                else "",
            )
    for helper in ("tokenizer", "scheduler"):
        if not isinstance(index.get(helper), list) or not (folder / helper).is_dir():
            raise CheckpointError(f"{folder} has no {helper}", where="model.source")
