"""One component seen from outside: its class, config, tensors and sizes, read without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..declare.formats import DTYPE_BYTES, Format
from ..declare.pipelines import Component, ComponentDescription, Library
from ..errors import CheckpointError
from .allocator import unsplit_bytes
from .architectures import expected_shapes
from .headers import FLOATING, ITEM_BYTES, TensorFacts, read_header, weight_files
from .shapes import Linears, buffers, digest, linears, shapes_digest, tensor_bytes
from .tensors import taken

_VOLATILE = ("_name_or_path", "_diffusers_version", "transformers_version", "_class_name", "torch_dtype", "dtype")


@dataclass(frozen=True)
class ComponentFacts:
    """What one component is: class, config, and the size of what it stores.

    Attributes:
        parameters: floating-point elements (buffers too) that are cast to the policy's dtype at load.
        fixed_bytes: bytes whatever the dtype: integer tensors, and buffers that stay float32.
        library: where its class is from.
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
    library: Library
    stored: Mapping[str, int] = field(default_factory=dict)
    folder: Path | None = None
    variant: str | None = None
    allow_pickle: bool = False
    _unsplit: dict[Format, int] = field(default_factory=dict, compare=False, repr=False)

    def weights_bytes(self, form: Format) -> int:
        """Bytes of all parameters and buffers once loaded in `form`; exact."""
        size = self.parameters * DTYPE_BYTES[form.dtype] + self.fixed_bytes
        if form.quantization is None:
            return size
        return size - self.linears.elements * DTYPE_BYTES[form.dtype] + self.linears.quantized_bytes(form.quantization)

    def unsplit_bytes(self, form: Format) -> int:
        """Bytes that blocks of a GPU's memory have beyond the weights in `form`; see `allocator.py`.

        A hundredth of the weights where the config does not determine their shapes.
        """
        if form not in self._unsplit:
            shapes = expected_shapes(self.class_name, self.config)
            sizes = (size for key, shape in (shapes or {}).items() for size in tensor_bytes(key, shape, form))
            self._unsplit[form] = self.weights_bytes(form) // 100 if shapes is None else unsplit_bytes(sizes)
        return self._unsplit[form]

    def block_tensors(self, blocks: str, count: int, form: Format) -> list[list[int]] | None:
        """Bytes of the tensors of each of `count` blocks in `form`; None where the config does not determine them.

        Args:
            blocks: the attribute that lists them.
        """
        shapes = expected_shapes(self.class_name, self.config)
        if shapes is None:
            return None
        found: list[list[int]] = [[] for _ in range(count)]
        for key, shape in shapes.items():
            attribute, _, rest = key.partition(".")
            if attribute == blocks:
                found[int(rest.partition(".")[0])] += tensor_bytes(key, shape, form)
        return found

    @property
    def identity(self) -> list[Any]:
        """Class, config without bookkeeping, and tensor shapes."""
        return [self.class_name, _stable(self.config), self.shapes_digest]

    @property
    def fingerprint(self) -> str:
        """sha256 of `identity`."""
        return "sha256:" + digest(self.identity)


Remote = Callable[[str], Mapping[str, TensorFacts]]
"""Reads the headers of files that are not on this host; takes the key that messages name."""


def component_facts(
    part: ComponentDescription,
    folder: Path,
    variant: str | None,
    where: str,
    remote: Remote | None = None,
    allow_pickle: bool = False,
    title: str = "pipeline",
) -> ComponentFacts:
    """Read one component's config and the headers of its files; `remote` reads those that are not on this host.

    Args:
        part: what the component must be.
        title: what messages call the pipeline.

    Raises:
        CheckpointError: a file is missing, damaged or of another class, or the tensors are not those of the config.
    """
    config = read_json(folder / "config.json", where)
    class_name = _class_of(config, part, folder, title, where)
    headers = _headers(folder, variant, where, remote, allow_pickle)
    _check_complete(config, part, folder, title, where)
    tensors = taken(class_name, config, headers, part.name, str(folder), where)
    stored = _stored(tensors)
    cast, kept = buffers(class_name, config)
    return ComponentFacts(
        name=part.name,
        library=part.library,
        class_name=class_name,
        config=config,
        parameters=sum(facts.numel for facts in tensors.values() if facts.dtype in FLOATING) + cast,
        fixed_bytes=sum(size for dtype, size in stored.items() if dtype not in FLOATING) + kept,
        shapes_digest=shapes_digest({key: facts.shape for key, facts in headers.items()}),
        linears=linears({key: facts.shape for key, facts in tensors.items()}),
        stored=stored,
        folder=folder,
        variant=variant,
        allow_pickle=allow_pickle,
    )


def _class_of(config: Mapping[str, Any], part: ComponentDescription, folder: Path, title: str, where: str) -> str:
    """The class that a config names, which must be the component's."""
    named = str(config.get("_class_name") or (config.get("architectures") or ["?"])[0])
    if named != part.class_name and named not in part.aliases:
        raise CheckpointError(
            f"{folder} holds a {named}, but the {part.name} of a {title} is a {part.class_name}", where=where
        )
    return part.class_name


def _check_complete(
    config: Mapping[str, Any], part: ComponentDescription, folder: Path, title: str, where: str
) -> None:
    """Refuse a config without a key that planning reads, or that the pipeline cannot work with."""
    missing = [key for key in part.config_keys if config.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{folder / 'config.json'} is incomplete: it lacks {', '.join(missing)}",
            where=where,
            hint="save the component anew with save_pretrained, which writes every key",
        )
    check_demands(config, part, str(folder), title, where)


def check_demands(config: Mapping[str, Any], part: ComponentDescription, origin: str, title: str, where: str) -> None:
    """Refuse a config that the pipeline cannot work with.

    Args:
        origin: what has the config.
        title: what messages call the pipeline.

    Raises:
        CheckpointError: naming the key, its value, and the one that is needed.
    """
    for key, wanted in part.demands:
        if (found := config.get(key, False)) != wanted:
            message = f"the {part.name} of {origin} has {key}={found}, a {title} needs {key}={wanted}"
            hint = "model.pipeline names another class, for which it was made"
            raise CheckpointError(message, where=where, hint=hint)


def _stored(tensors: Mapping[str, TensorFacts]) -> dict[str, int]:
    """Bytes of the files by safetensors dtype word, in alphabetical order."""
    stored: dict[str, int] = {}
    for facts in tensors.values():
        stored[facts.dtype] = stored.get(facts.dtype, 0) + facts.numel * ITEM_BYTES[facts.dtype]
    return dict(sorted(stored.items()))


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


def read_json(path: Path, where: str) -> dict[str, Any]:
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
