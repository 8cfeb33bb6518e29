"""Models that stay as they were validated: their lists and mappings refuse changes too.

They are still a `list` and a `dict`: they compare equal to plain ones and are serialised as such, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Self

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
