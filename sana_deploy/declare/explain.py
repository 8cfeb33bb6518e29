"""What is wrong with a declaration, in one sentence: the first rule that it breaks, the key, and a form that works."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import InvalidSpecError, did_you_mean
from . import sizes
from .keys import nearest_key
from .knobs import KNOBS
from .pipelines import COMPONENTS, DEFAULT, UNITS

_TAGS = {
    "tiny", "catalogue", "checkpoint", "single_gpu", "multi_gpu_balanced", "custom_map", "[key]", "int",
    "constrained-int", "literal['cpu']", "present", "virtual", "str", "list[str]",
}  # fmt: skip


def first_error(problem: ValidationError) -> InvalidSpecError:
    """Turn the first of pydantic's complaints about a declaration into our error."""
    error = problem.errors(include_url=False)[0]
    path = [str(part) for part in error["loc"] if str(part) not in _TAGS]
    where, value = ".".join(path), error.get("input")
    context = error.get("ctx", {})
    if error["loc"] and error["loc"][-1] == "[key]":
        return no_component(where)
    if error["type"] == "extra_forbidden":
        return InvalidSpecError("this key is not known here", where=where, hint=nearest_key(where), value=value)
    if error["type"] == "literal_error":
        allowed = _words(context["expected"])
        return InvalidSpecError(
            f"{value!r} is not one of {', '.join(allowed)}",
            where=where,
            hint=did_you_mean(str(value), allowed),
            value=value,
        )
    if error["type"] == sizes.ERROR:
        return InvalidSpecError(context["message"], where=where, hint=context["hint"])
    message = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    shown = "" if isinstance(value, Mapping) else f" (got {value!r})"
    return InvalidSpecError(message + shown, where=where, hint=_form(where, value, context), value=value)


def no_component(where: str) -> InvalidSpecError:
    """Say that what follows the second dot of a key is no component, nor a unit of one where units have places."""
    group, _, word = where.split(".", 2)
    known = UNITS if group == "hardware" else COMPONENTS
    return InvalidSpecError(f"{word!r} is not a component", where=where, hint=did_you_mean(word, known), value=word)


def _words(expected: str) -> list[str]:
    """The words in pydantic's list of them: `'a', 'b' or 'c'`."""
    return [word.strip(" '") for word in expected.replace(" or ", ", ").split(",")]


_SIZES = ("hardware.keep_free", "machine.memory", "machine.used")
_DEVICE = re.compile(r"(?:cuda|gpu):?(\d+)", re.IGNORECASE)


def _form(where: str, value: Any, context: Mapping[str, Any]) -> str:
    """Say which form a key takes, with the given value where its meaning is clear."""
    group, _, name = where.partition(".")
    if where in _SIZES:
        number = value if isinstance(value, (int, float)) and value > 0 else 8
        many = f", or one size for each GPU: {where}=[{number}GiB,500MiB]" if where == "machine.used" else ""
        return f"a size has a unit: {where}={number}GiB or {where}=500MiB{many}"
    if where == "workload.seed":
        return "a whole number from 0, or random"
    if group == "hardware" and name.partition(".")[0] in ("device_map", "pin", "gpu", "use"):
        return _gpu_form(where, value)
    if where == "hardware.allow" or where == "hardware.knobs":
        example = next(name for name, knob in KNOBS.items() if not knob.always)
        return f"it is a list: {where}=[{value if isinstance(value, str) else example}]"
    if "multiple_of" in context and isinstance(value, int):
        step = int(context["multiple_of"])
        return f"{where}={max(step, round(value / step) * step)} is the nearest that works"
    return ""


def _gpu_form(where: str, value: Any) -> str:
    """A GPU is named by its index; a list of them is in brackets."""
    match = _DEVICE.fullmatch(str(value))
    number = match[1] if match else str(value) if isinstance(value, int) and value >= 0 else "0"
    if where.startswith("hardware.use"):
        return f"it is a list of GPU indices: hardware.use=[{number}]"
    other = "cpu" if where.startswith("hardware.device_map") else "null"
    if where in ("hardware.device_map", "hardware.pin"):
        return f"it has a GPU index for each component: {where}.{DEFAULT.of('vae')}=0"
    return f"it is a GPU index, or {other}: {where}={number}"
