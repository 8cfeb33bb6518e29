"""Compares the tensors that files hold with those that an architecture declares, and words what differs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .architectures import expected_shapes
from .headers import TensorFacts

NAMED = 10
"""Tensors of one kind that a message names; more are counted."""
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|patch_embed\.pos_embed)$")
"""Buffers that the classes compute from their configs, whatever a file holds."""
_HEAD = "lm_head.weight"
"""Gemma's language head, which the pipeline does not load."""
_BODY = "model."
"""What precedes the body's names in a checkpoint of `Gemma2ForCausalLM`."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mismatch:
    """Tensors that are not those of the architecture; `reshaped` maps a name to (stored, expected) shapes."""

    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[Shape, Shape]]
    expected: int

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def describe(self) -> str:
        """Each kind with its count and its first names."""
        shapes = [f"{name} is {_sides(was)}, expected {_sides(now)}" for name, (was, now) in self.reshaped.items()]
        kinds = [
            (f"{len(self.missing)} of {self.expected} missing", self.missing),
            (f"{len(self.unexpected)} unexpected", self.unexpected),
            (f"{len(shapes)} of another shape", shapes),
        ]
        return "; ".join(f"{kind} ({_cut(names)})" for kind, names in kinds if names)

    def error(self, name: str, origin: str, where: str) -> CheckpointError:
        """Say so about the component `name` in `origin`."""
        facts: dict[str, Any] = {
            "missing": len(self.missing),
            "unexpected": len(self.unexpected),
            "reshaped": len(self.reshaped),
        }
        return CheckpointError(
            f"the tensors of the {name} in {origin} are not those that its config declares: {self.describe()}",
            where=where,
            hint="download its files again, or save it anew with save_pretrained, so that config and weights belong "
            "together",
            **facts,
        )


def compare(expected: Mapping[str, Shape], stored: Mapping[str, Shape]) -> Mismatch:
    """Compare names and shapes; names come in the order of the files and of the architecture."""
    return Mismatch(
        missing=[name for name in expected if name not in stored],
        unexpected=[name for name in stored if name not in expected],
        reshaped={
            name: (shape, expected[name])
            for name, shape in stored.items()
            if name in expected and expected[name] != shape
        },
        expected=len(expected),
    )


def taken(
    class_name: str,
    config: Mapping[str, Any],
    stored: Mapping[str, TensorFacts],
    component: str,
    origin: str,
    where: str,
) -> dict[str, TensorFacts]:
    """Return those of the `stored` tensors that the component loads, under their stored names.

    All of them where the config does not determine the architecture: then loading compares them.

    Raises:
        CheckpointError: one is missing, unexpected, or of another shape.
    """
    loaded = {name: facts for name, facts in stored.items() if not _ignored(name, class_name)}
    expected = expected_shapes(class_name, config)
    if expected is None:
        return dict(stored)
    inner = {bare(class_name, name): facts.shape for name, facts in loaded.items()}
    if mismatch := compare(expected, inner):
        raise mismatch.error(component, origin, where)
    return loaded


def bare(class_name: str, name: str) -> str:
    """Take Gemma's prefix off, as transformers does when it loads the body of a language model."""
    return name.removeprefix(_BODY) if class_name == "Gemma2Model" else name


def _ignored(name: str, class_name: str) -> bool:
    return _COMPUTED.search(name) is not None or (class_name == "Gemma2Model" and name == _HEAD)


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _cut(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f", and {more} more" if more > 0 else "")
