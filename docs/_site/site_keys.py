"""Every key of the declaration with its type, bounds, default and sentence, from the models and files of `conf/`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Docstring, DocstringSectionKind
from pydantic import BaseModel

from sana_deploy.declare import advising, hardware, serving, spec
from sana_deploy.declare.compose import compose_config, conf_dir
from sana_deploy.declare.runtime import Runtime
from sana_deploy.declare.workload import DeclaredWorkload

MODELS: dict[str, dict[str, type[BaseModel]]] = {
    "hardware": {
        "single_gpu": hardware.SingleGpu, "multi_gpu_balanced": hardware.MultiGpuBalanced,
        "custom_map": hardware.CustomMap,
    },
    "precision": {"auto": spec.Precision},
    "runtime": {"auto": Runtime},
    "model": {"tiny": spec.TinyModel, "sana_1600m_controlnet": spec.CatalogueModel, "checkpoint": spec.CheckpointModel},
    "machine": {"present": spec.PresentMachine, "virtual": spec.VirtualMachine},
    "workload": {"default": DeclaredWorkload},
    "resolve": {"": spec.Resolve},
    "serve": {"default": serving.Serving},
    "advise": {"default": advising.Advising},
}  # fmt: skip
"""Group -> an option of it -> the model of its keys, one option for each model."""
NAMED_BY_THE_OPTION = (
    "precision.name", "model.name", *(f"{group}.{key}" for group in MODELS for key in ("kind", "strategy")),
)  # fmt: skip
NOT_IN_A_GROUP = ("until", "plan_file", "output", "sweep.resume")


def model_of(group: str, option: str) -> type[BaseModel]:
    """The model that an option is checked with."""
    kinds = MODELS[group]
    if option in kinds or len(kinds) == 1:
        return kinds.get(option, next(iter(kinds.values())))
    tiny = option.startswith("tiny")
    return kinds[{"model": "tiny" if tiny else "sana_1600m_controlnet", "machine": "virtual"}[group]]


def options_of(group: str) -> dict[str, str]:
    """Option -> the first sentences of its file."""
    return {path.stem: purpose(path) for path in sorted((conf_dir() / group).glob("*.yaml"))}


def purpose(path: Path) -> str:
    """What a file of `conf/` says of itself before its first command."""
    lines = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    words = [line for line in lines if not line.startswith("@package")]
    end = next((at for at, line in enumerate(words) if line.startswith("  ")), len(words))
    return " ".join(words[:end])


class Key(BaseModel):
    """One key of the declaration, as the reference shows it."""

    name: str
    type: str
    default: str
    help: str


@cache
def keys_of(group: str, option: str) -> list[Key]:
    """Every key of the model behind an option, but for the one that names the model."""
    composed = compose_config([f"{group}={option}"] if option else [])
    model = MODELS[group][option]
    said: dict[str, str] = {}
    for other in (*MODELS[group], option):  # what other options say of a key of that name, then its own
        said |= comments(group, other)
    said |= sentences(model)
    return [*_keys(model, composed[group], group, said), *_read_by_hydra(model, composed[group], group, said)]


def _read_by_hydra(model: type[BaseModel], values: Any, group: str, help_: Mapping[str, str]) -> Iterator[Key]:
    """Keys of the configuration that are settled before the model is made, such as `workload.prompt_file`."""
    for name in values:
        if name not in model.model_fields and f"{group}.{name}" not in NAMED_BY_THE_OPTION:
            said = help_.get(name, "")
            yield Key(name=f"{group}.{name}", type="text or `null`", default=default(values, name), help=said)


def _keys(model: type[BaseModel], values: Any, prefix: str, help_: Mapping[str, str]) -> Iterator[Key]:
    schema = model.model_json_schema()
    for name, shape in schema["properties"].items():
        inner = model.model_fields[name].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, values[name], f"{prefix}.{name}", {**help_, **sentences(inner)})
        elif f"{prefix}.{name}" not in NAMED_BY_THE_OPTION:
            yield Key(
                name=f"{prefix}.{name}", type=words(shape), default=default(values, name), help=help_.get(name, "")
            )


def default(values: Any, name: str) -> str:
    """The composed value of a key as JSON, or as it refers to another key."""
    from omegaconf import OmegaConf

    value = OmegaConf.to_container(values, resolve=False)[name]  # type: ignore[index, call-overload]
    return "must be given" if value == "???" else f"`{json.dumps(value)}`"


def words(shape: Mapping[str, Any]) -> str:
    """A JSON Schema of one value, in words."""
    if "anyOf" in shape:
        return " or ".join(dict.fromkeys(map(words, shape["anyOf"])))
    if "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape["enum"])
    if "const" in shape:
        return f"`{shape['const']}`"
    kind = shape.get("type", "any")
    if kind == "array":
        return f"list of {words(shape['items'])}"
    if kind == "object":
        inner = shape.get("additionalProperties")
        names = (shape.get("propertyNames") or {}).get("enum", [])
        each = f" for {', '.join(f'`{name}`' for name in names)}" if names else ""
        return (words(inner) if isinstance(inner, Mapping) else "any") + each
    plain = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "`null`"}
    return plain.get(kind, str(kind)) + bounds(shape)


def bounds(shape: Mapping[str, Any]) -> str:
    """The bounds of a number, in words; empty where there are none."""
    found = [
        f"from {shape['minimum']}" if "minimum" in shape else "",
        f"above {shape['exclusiveMinimum']}" if "exclusiveMinimum" in shape else "",
        f"to {shape['maximum']}" if "maximum" in shape else "",
        f"and below {shape['exclusiveMaximum']}" if "exclusiveMaximum" in shape else "",
        f", a multiple of {shape['multipleOf']}" if "multipleOf" in shape else "",
    ]
    return " ".join(["", *filter(None, found)]).replace(" ,", ",").rstrip()


def sentences(model: type[BaseModel]) -> dict[str, str]:
    """Key -> what the docstrings of a model and of its bases say of it under `Attributes`."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        for section in Docstring(vars(kind).get("__doc__") or "", lineno=1).parse("google", warnings=False):
            if section.kind is DocstringSectionKind.attributes:
                found.update({one.name: sentence(one.description) for one in section.value})
    return found


def comments(group: str, option: str) -> dict[str, str]:
    """Key -> the comment right above it in the file of an option, or in `config.yaml` where the group has no files."""
    path = conf_dir() / (f"{group}/{option}.yaml" if option else "config.yaml")
    found: dict[str, str] = {}
    gathered: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if text := re.match(r"\s*# ?(.*)", line):
            gathered.append(text[1])
        elif key := re.match(r"\s*(\w+):", line):
            if gathered and not any(one.startswith("  ") for one in gathered):
                found[key[1]] = " ".join(gathered)
            gathered = []
        else:
            gathered = []
    return found


def sentence(text: str) -> str:
    """A description of a docstring for people who write YAML."""
    return capital(re.sub(r"\bNone\b", "`null`", " ".join(text.split())))


def capital(text: str) -> str:
    """A sentence begins with a capital, unless code does."""
    return text[:1].upper() + text[1:]
