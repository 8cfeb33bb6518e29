"""Where a pipeline's configs and weights come from, read without loading a weight or importing torch.

`open_checkpoint` turns the `model` group into a `Checkpoint`: each component's class, config, exact parameter
count and files. Sources are a local folder, a hub repository, the shipped catalogue, or the generated `tiny` one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..declare.pipelines import DEFAULT, PIPELINES, Component, ComponentDescription, PipelineDescription
from ..declare.spec import CatalogueModel, CheckpointModel, DeploySpec, Model, TinyModel
from ..errors import CheckpointError
from . import catalogue, hub
from .component import ComponentFacts, check_demands, component_facts, read_json
from .published import PUBLISHED
from .shapes import Linears, digest
from .tiny import ensure_tiny


@dataclass(frozen=True)
class Checkpoint:
    """All components of one pipeline and where the rest of it (tokenizer, scheduler) lies.

    `folder` is None when only the shapes are known (catalogue) and the weights are elsewhere (`source`).
    `apart` names where components published apart are: a folder, or a hub repository at its commit.
    """

    kind: str
    source: str
    revision: str | None
    components: Mapping[Component, ComponentFacts]
    folder: Path | None
    apart: Mapping[Component, str] = field(default_factory=dict)
    pipeline: PipelineDescription = DEFAULT

    @property
    def fingerprint(self) -> str:
        """sha256 over classes, configs and tensor shapes; equal for equal architectures, wherever they lie."""
        parts = {name: facts.identity for name, facts in self.components.items()}
        return "sha256:" + digest(parts)

    def needs_key(self, name: Component) -> str:
        """What a component's needs go by: the pipeline and the component's tensor shapes.

        The denoiser's go by the shapes of all components: what the pipeline makes of their results waits beside it.
        """
        parts = self.pipeline.names if name == self.pipeline.denoiser else (name,)
        return digest([self.pipeline.class_name, *(self.components[part].shapes_digest for part in parts)])


def open_checkpoint(model: Model, *, weights: bool = False) -> Checkpoint:
    """Read what the `model` group names.

    Args:
        model: the declared model.
        weights: also make sure that the weights are on this host (downloads them for a hub source).

    Raises:
        CheckpointError: it is missing, damaged, or not a pipeline that is known.
    """
    pipeline = pipeline_of(model)
    if isinstance(model, TinyModel):
        folder = ensure_tiny(model.cache_dir, pipeline)
        return _from_folder("tiny", "tiny", folder, None, None, model, pipeline, weights)
    if isinstance(model, CatalogueModel) and not _is_local(model.source) and not weights:
        return _with_overrides(_from_catalogue(model, pipeline), model, weights)
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
    return _from_folder("checkpoint", model.source, folder, revision, model.variant, model, pipeline, weights)


def settled(spec: DeploySpec) -> DeploySpec:
    """Return a declaration for the pipeline of its model, which a checkpoint's own index may name.

    Raises:
        CheckpointError: see `pipeline_of`.
        InvalidSpecError: see `DeploySpec.of`.
    """
    return spec.of(pipeline_of(spec.model))


def pipeline_of(model: Model) -> PipelineDescription:
    """Which pipeline the `model` group names: by `model.pipeline`, else what the model was published for.

    A component published apart turns a pipeline without it into the one with it.

    Raises:
        CheckpointError: the checkpoint is missing, or of a pipeline that is not known; or no pipeline of its kind has
            the component published apart.
    """
    pipeline = DEFAULT if model.pipeline is None else PIPELINES[model.pipeline]
    if model.pipeline is None and isinstance(model, CatalogueModel):
        pipeline = PIPELINES[PUBLISHED[model.name].pipeline]
    if model.pipeline is None and isinstance(model, CheckpointModel):
        folder, _ = hub.locate(model.source, model.revision, model.variant, "model.source", weights=False)
        named = str(read_json(folder / "model_index.json", "model.source").get("_class_name"))
        if named not in PIPELINES:
            message = f"{folder} holds a {named}, which is not supported: {', '.join(PIPELINES)} are"
            hint = "model.pipeline=CLASS reads its components as those of another class"
            raise CheckpointError(message, where="model.source", hint=hint)
        pipeline = PIPELINES[named]
    for name in model.components.given():
        if name not in pipeline.names:
            wider = dict(pipeline.extended).get(name)
            if wider is None:
                message = f"a {pipeline.title} has no {name}"
                raise CheckpointError(message, where=f"model.components.{name}", hint="leave it out")
            pipeline = PIPELINES[wider]
    return pipeline


def _is_local(source: str | None) -> bool:
    return source is not None and Path(source).expanduser().is_dir()


def _from_catalogue(model: CatalogueModel, pipeline: PipelineDescription) -> Checkpoint:
    entry = catalogue.load(model.name)
    own = [part for part in pipeline.components if part.name not in model.components.given()]
    _check_entry(pipeline, model.name, own, entry)
    components = {
        name: ComponentFacts(
            name=name,
            class_name=part["class_name"],
            config=part["config"],
            parameters=part["parameters"],
            fixed_bytes=part["fixed_bytes"],
            shapes_digest=part["shapes_digest"],
            linears=Linears(**part["linears"]),
            library=pipeline.by_name[name].library,
        )
        for name, part in ((one.name, entry[one.name]) for one in own)
    }
    return Checkpoint("catalogue", model.name, model.revision, components, None, pipeline=pipeline)


def _check_entry(
    pipeline: PipelineDescription, model: str, own: Iterable[ComponentDescription], entry: Mapping[str, Any]
) -> None:
    """Refuse a catalogued model that lacks what the pipeline needs."""
    for part in own:
        where = f"model.source ({part.name})"
        if part.name not in entry:
            hint = f"model.components.{part.name}=FOLDER_OR_REPO" if part.name in pipeline.apart else ""
            raise CheckpointError(f"{model} has no {part.name}, a {pipeline.title} needs one", where=where, hint=hint)
        check_demands(entry[part.name]["config"], part, model, pipeline.title, where)


def _with_overrides(checkpoint: Checkpoint, model: Model, weights: bool) -> Checkpoint:
    components, apart = dict(checkpoint.components), {}
    for name, named in model.components.given().items():
        components[name], apart[name] = _override(checkpoint.pipeline, name, named, weights)
    # In the order of the description, wherever each comes from.
    ordered = {name: components[name] for name in checkpoint.pipeline.names}
    return replace(checkpoint, components=ordered, apart=apart) if apart else checkpoint


def _from_folder(
    kind: str,
    source: str,
    folder: Path,
    revision: str | None,
    variant: str | None,
    model: Model,
    pipeline: PipelineDescription,
    weights: bool,
) -> Checkpoint:
    components = _own_parts(pipeline, source, folder, revision, variant, model, weights)
    return _with_overrides(Checkpoint(kind, source, revision, components, folder, pipeline=pipeline), model, weights)


def _own_parts(
    pipeline: PipelineDescription,
    source: str,
    folder: Path,
    revision: str | None,
    variant: str | None,
    model: Model,
    weights: bool,
) -> dict[Component, ComponentFacts]:
    """Read the components in `folder`, but for those published apart."""
    index = read_json(folder / "model_index.json", "model.source")
    own = [part for part in pipeline.components if part.name not in model.components.given()]
    _check_index(pipeline, index, folder, own)
    pickles = not isinstance(model, TinyModel) and model.allow_pickle
    components: dict[Component, ComponentFacts] = {}
    for part in own:
        where = f"model.source ({part.name})"
        remote = (
            None if weights or revision is None else partial(hub.remote_headers, source, revision, part.name, variant)
        )
        components[part.name] = component_facts(
            part, folder / part.name, variant, where, remote, pickles, pipeline.title
        )
    return components


def folder_parts(
    model: Model, main: bool, apart: Collection[Component]
) -> tuple[Path | None, dict[Component, ComponentFacts]]:
    """Read the components that lie in folders, and no hub repository that happens to have such a name.

    Args:
        model: the declared model.
        main: `model.source` is a folder.
        apart: components published apart that are in a folder.

    Returns:
        The folder of `model.source`, None unless `main`, and the components.

    Raises:
        CheckpointError: a folder is missing or damaged.
    """
    folder, found, pipeline = None, {}, pipeline_of(model)
    if main and not isinstance(model, TinyModel):
        folder = _existing(str(model.source), "model.source")
        found = _own_parts(pipeline, str(model.source), folder, None, model.variant, model, weights=False)
    for name in apart:
        named = model.components.given()[name]
        _existing(named, f"model.components.{name}")
        found[name] = _override(pipeline, name, named, weights=False)[0]
    return folder, found


def _existing(source: str, where: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"the folder {source} is not there", where=where)
    return folder


def _override(pipeline: PipelineDescription, name: Component, named: str, weights: bool) -> tuple[ComponentFacts, str]:
    """Return a component published apart and where it is: the folder, or the hub repository at its commit."""
    where = f"model.components.{name}"
    source, wanted = hub.split_revision(named)
    root, revision = hub.locate(source, wanted, None, where, weights=weights)
    nested = not (root / "config.json").is_file() and (root / name).is_dir()
    prefix = name if nested else ""
    remote = None if weights or revision is None else partial(hub.remote_headers, source, revision, prefix, None)
    facts = component_facts(pipeline.by_name[name], root / prefix, None, where, remote, title=pipeline.title)
    return facts, named if revision is None else hub.at_revision(source, revision)


def _check_index(
    pipeline: PipelineDescription, index: Mapping[str, Any], folder: Path, own: Iterable[ComponentDescription]
) -> None:
    for part in own:
        entry = index.get(part.name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != part.class_name:
            apart = f"a plain SANA checkpoint takes model.components.{part.name}=FOLDER_OR_REPO"
            raise CheckpointError(
                f"{folder} is no {pipeline.title}: its {part.name} is {found or 'missing'}, "
                f"expected {part.class_name} (its model_index.json names {index.get('_class_name')})",
                where="model.source",
                hint=apart if part.name in pipeline.apart else "",
            )
    for helper in ("tokenizer", "scheduler"):
        if not isinstance(index.get(helper), list) or not (folder / helper).is_dir():
            raise CheckpointError(f"{folder} has no {helper}", where="model.source")
    scheduler = index["scheduler"][-1]
    if pipeline.scheduler.only and scheduler != pipeline.scheduler.class_name:
        wanted = pipeline.scheduler.class_name
        message = f"the scheduler of {folder} is {scheduler}, a {pipeline.title} works with {wanted}"
        raise CheckpointError(message, where="model.source")
