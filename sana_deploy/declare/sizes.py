"""Sizes in a declaration: text such as `8GiB`, checked once when the declaration is; it stays as it was written."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from .._units import parse_bytes
from ..errors import InvalidSpecError

ERROR = "size"
"""The type of pydantic's error for a text that is no size; its context has a hint."""


def _checked(value: str | list[str]) -> str | list[str]:
    for text in [value] if isinstance(value, str) else value:
        try:
            parse_bytes(text)
        except InvalidSpecError as problem:
            context = {"message": problem.message, "hint": problem.hint}
            raise PydanticCustomError(ERROR, "{message}", context) from None
    return value


Size = Annotated[str, AfterValidator(_checked)]
Sizes = Annotated[str | list[str], AfterValidator(_checked)]
"""One size for all, or a list of sizes."""
