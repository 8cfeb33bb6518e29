"""Models whose configs ship with the package, so that they can be planned with nothing downloaded.

`published.py` says which modules each has. `python -m sana_deploy.facts.catalogue` writes `architectures/*.json` anew,
a file for each module, from diffusers' and transformers' own classes on the meta device; a test checks that they are
current.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

from ..declare.pipelines import PIPELINES, Component, Phase
from .published import MODULES, PUBLISHED
from .shapes import buffers, linears, shapes_digest

FOLDER = Path(__file__).parent / "architectures"
NAMES = tuple(PUBLISHED)


@cache
def load(name: str) -> dict[Component, dict[str, Any]]:
    """Return the shipped facts of one model: component -> class, config, sizes."""
    of_class = {part.class_name: part.name for one in PIPELINES.values() for part in one.components}
    found = (shipped(module) for module in PUBLISHED[name].modules)
    return {of_class[facts["class_name"]]: facts for facts in found}


@cache
def pipelines(name: str) -> tuple[str, ...]:
    """The pipelines whose components a catalogued model has and is made for, its own first."""
    own, parts = PUBLISHED[name].pipeline, load(name)
    others = (
        one.class_name
        for one in PIPELINES.values()
        if set(one.names) == set(parts)
        and all(parts[part.name]["config"][key] == value for part in one.components for key, value in part.demands)
    )
    return (own, *(other for other in others if other != own))


@cache
def shipped(module: str) -> dict[str, Any]:
    """Return the facts of one of MODULES as its file has them."""
    return cast("dict[str, Any]", json.loads((FOLDER / f"{module}.json").read_text(encoding="utf-8")))


@cache
def calibrated() -> dict[str, dict[Phase, Any]]:
    """Return what shipped components need, by `Checkpoint.needs_key`: phase -> format -> guidance."""
    found: dict[str, dict[Phase, Any]] = {}
    for path in sorted(FOLDER.glob("*.needs.json")):
        for part in json.loads(path.read_text(encoding="utf-8")).values():
            found[part["key"]] = part["needs"]
    return found


def build(module: str) -> dict[str, Any]:
    """Work out the facts of one of MODULES from the libraries' own classes; imports torch."""
    import diffusers
    import torch
    import transformers

    class_name, given = MODULES[module]
    with torch.device("meta"):
        if hasattr(transformers, class_name):
            cls = getattr(transformers, class_name)
            made = cls(cls.config_class(**given))
            config = json.loads(made.config.to_json_string())
        else:
            made = getattr(diffusers, class_name)(**given)
            config = dict(made.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    cast, kept = buffers(class_name, config)
    shapes = {key: tuple(t.shape) for key, t in made.state_dict().items()}
    return {
        "class_name": class_name,
        "config": config,
        "parameters": sum(tensor.numel() for tensor in made.parameters()) + cast,
        "fixed_bytes": kept,
        "shapes_digest": shapes_digest(shapes),
        "linears": asdict(linears(shapes)),
    }


def main() -> None:
    """Write the file of every module anew."""
    FOLDER.mkdir(exist_ok=True)
    for module in MODULES:
        text = json.dumps(build(module), indent=1, sort_keys=True) + "\n"
        (FOLDER / f"{module}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
