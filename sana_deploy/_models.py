"""Models that stay as they were validated, the base of all others, and remarks on a run.

Lists and mappings of a model refuse changes too. They are still a `list` and a `dict`: they compare equal to plain ones
and are serialised as such, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict


class FrozenList(list[Any]):
    """A list that cannot be changed; `list(it)` gives one that can."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("this list is frozen: copy it with list(...), or compile another plan")

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenList, (list(self),)


class FrozenDict(dict[Any, Any]):
    """A mapping that cannot be changed; `dict(it)` gives one that can."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("this mapping is frozen: copy it with dict(...), or compile another plan")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def frozen(value: Any) -> Any:
    """Return `value` with every list and mapping in it replaced by one that refuses changes."""
    if isinstance(value, (FrozenList, FrozenDict)):
        return value
    if isinstance(value, list):
        return FrozenList(map(frozen, value))
    if isinstance(value, dict):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    return value


class FrozenModel(BaseModel):
    """Base of the models of declarations, plans and outcomes: neither fields nor what is in them can be changed."""

    model_config = ConfigDict(frozen=True)

    def model_post_init(self, context: Any, /) -> None:
        """Freeze the fields' lists and mappings."""
        self.__dict__.update({name: frozen(value) for name, value in self.__dict__.items()})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy, with other fields; what is given is frozen too."""
        changed = {name: frozen(value) for name, value in (update or {}).items()}
        return super().model_copy(update=changed, deep=deep)


class Record(FrozenModel):
    """Base of the artifact's models: frozen; unknown keys of a later minor version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class Diagnostic(Record):
    """One remark: a warning or a note, with the key that it is about and a hint."""

    type: str
    severity: Literal["info", "warning"]
    message: str
    where: str = ""
    hint: str = ""


class Declared(FrozenModel):
    """Base of every declared model: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
