"""Where a pipeline's configs and weights come from, read without loading a weight or importing torch.

`open_checkpoint` turns the `model` group into a `Checkpoint`: each component's class, config, exact parameter
count and files. Sources are a local folder, a hub repository, the shipped catalogue, or the generated `tiny` one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from . import catalogue, hub
from .errors import CheckpointError
from .headers import FLOATING, ITEM_BYTES, TensorFacts, read_header, weight_files
from .shapes import Linears, buffers, digest, linears, shapes_digest
from .spec import COMPONENTS, DTYPE_BYTES, CatalogueModel, Component, Format, Model, TinyModel
from .tensors import taken
from .tiny import ensure_tiny

CLASSES: dict[Component, str] = {
    "text_encoder": "Gemma2Model",
    "vae": "AutoencoderDC",
    "transformer": "SanaTransformer2DModel",
    "controlnet": "SanaControlNetModel",
}
_DENOISER_KEYS = ("num_attention_heads", "attention_head_dim", "num_layers", "mlp_ratio", "sample_size", "patch_size")
NEEDED: dict[Component, tuple[str, ...]] = {
    "text_encoder": ("hidden_size", "intermediate_size", "head_dim", "vocab_size"),
    "vae": ("encoder_block_out_channels", "decoder_block_out_channels", "latent_channels"),
    "transformer": _DENOISER_KEYS,
    "controlnet": _DENOISER_KEYS,
}
"""Config keys that planning reads."""
_ALIASES = {"Gemma2ForCausalLM": "Gemma2Model"}
"""Gemma's own config names the class with the (tied, unstored) language head; the pipeline loads the body."""
_VOLATILE = ("_name_or_path", "_diffusers_version", "transformers_version", "_class_name", "torch_dtype", "dtype")


@dataclass(frozen=True)
class ComponentFacts:
    """What one component is: class, config, and the size of what it stores.

    Attributes:
        parameters: floating-point elements (buffers too) that are cast to the policy's dtype at load.
        fixed_bytes: bytes whatever the dtype: integer tensors, and buffers that stay float32.
        linears: the part of `parameters` that can be quantised.
        stored: safetensors dtype word -> bytes in the files; empty when the weights are not here.
    """

    name: Component
    class_name: str
    config: Mapping[str, Any]
    parameters: int
    fixed_bytes: int
    shapes_digest: str
    linears: Linears
    stored: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = None
    variant: str | None = None
    allow_pickle: bool = False

    def weights_bytes(self, form: Format) -> int:
        """Bytes of all parameters and buffers once loaded in `form`; exact."""
        size = self.parameters * DTYPE_BYTES[form.dtype] + self.fixed_bytes
        if form.quantization is None:
            return size
        return size - self.linears.elements * DTYPE_BYTES[form.dtype] + self.linears.quantized_bytes(form.quantization)

    @property
    def identity(self) -> list[Any]:
        """Class, config without bookkeeping, and tensor shapes."""
        return [self.class_name, _stable(self.config), self.shapes_digest]

    @property
    def fingerprint(self) -> str:
        """sha256 of `identity`."""
        return "sha256:" + digest(self.identity)


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
    index = _read_json(folder / "model_index.json", "model.source")
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


Remote = Callable[[str], Mapping[str, TensorFacts]]
"""Reads the headers of files that are not on this host; takes the place for messages."""


def component_facts(
    name: Component,
    folder: Path,
    variant: str | None,
    where: str,
    remote: Remote | None = None,
    allow_pickle: bool = False,
) -> ComponentFacts:
    """Read one component's config and the headers of its files, which `remote` tells where they are not here.

    Raises:
        CheckpointError: the folder, its config or a weight file is missing, damaged or of another class, or the files
            do not hold exactly the tensors that the config declares.
    """
    config = _read_json(folder / "config.json", where)
    class_name = str(config.get("_class_name") or (config.get("architectures") or ["?"])[0])
    class_name = _ALIASES.get(class_name, class_name)
    if class_name != CLASSES[name]:
        raise CheckpointError(
            f"{folder} holds a {class_name}, but the {name} of a SANA ControlNet pipeline is a {CLASSES[name]}",
            where=where,
        )
    headers = _headers(folder, variant, where, remote, allow_pickle)
    missing = [key for key in NEEDED[name] if config.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{folder / 'config.json'} is incomplete: it lacks {', '.join(missing)}",
            where=where,
            hint="save the component anew with save_pretrained, which writes every key",
        )
    tensors = taken(class_name, config, headers, name, str(folder), where)
    stored: dict[str, int] = {}
    for facts in tensors.values():
        stored[facts.dtype] = stored.get(facts.dtype, 0) + facts.numel * ITEM_BYTES[facts.dtype]
    parameters = sum(facts.numel for facts in tensors.values() if facts.dtype in FLOATING)
    cast, kept = buffers(name, config)
    integers = sum(size for dtype, size in stored.items() if dtype not in FLOATING)
    return ComponentFacts(
        name=name,
        class_name=class_name,
        config=config,
        parameters=parameters + cast,
        fixed_bytes=integers + kept,
        shapes_digest=shapes_digest({key: facts.shape for key, facts in headers.items()}),
        linears=linears({key: facts.shape for key, facts in tensors.items()}),
        stored=dict(sorted(stored.items())),
        folder=folder,
        variant=variant,
        allow_pickle=allow_pickle,
    )


def _headers(
    folder: Path, variant: str | None, where: str, remote: Remote | None, allow_pickle: bool
) -> dict[str, TensorFacts]:
    try:
        files = weight_files(folder, variant, where, allow_pickle)
    except CheckpointError:
        if remote is None:
            raise
        return dict(remote(where))
    tensors: dict[str, TensorFacts] = {}
    for path in files:
        tensors |= read_header(path, where)
    return tensors


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing", where=where, hint="name a folder in diffusers' layout, with a model_index.json"
        ) from None
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} is not readable JSON: {problem}", where=where) from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", where=where)
    return cast("dict[str, Any]", value)


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
