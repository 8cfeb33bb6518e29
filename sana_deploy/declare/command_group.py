"""Groups of the configuration that a command reads and no plan knows: `serve`, `advise`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError, create_model

from .._models import Declared
from .explain import first_error


class CommandGroup(Declared):
    """One such group; `group` is its name."""

    group: ClassVar[str]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validate the composed group.

        Raises:
            InvalidSpecError: naming the first offending key and the rule it breaks.
        """
        fields: dict[str, Any] = {cls.group: (cls, ...)}
        composed = create_model("Composed", __base__=Declared, **fields)  # so that errors name keys in full
        try:
            return cast("Self", getattr(composed.model_validate({cls.group: values}), cls.group))
        except ValidationError as problem:
            raise first_error(problem) from None

    @classmethod
    def from_config(cls, config: DictConfig) -> Self:
        """Validate the group of a composed configuration; see `from_mapping`."""
        return cls.from_mapping(cast("dict[str, Any]", OmegaConf.to_container(config[cls.group], resolve=True)))
