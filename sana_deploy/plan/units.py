"""Units: what a placement gives a slot or the host. A component is one unit, or several that share its work."""

from __future__ import annotations

from dataclasses import dataclass

from ..declare.pipelines import Component


@dataclass(frozen=True)
class Unit:
    """One of the units of a component, numbered from 0."""

    component: Component
    number: int = 0

    @property
    def name(self) -> str:
        """The component's name for its first unit; `transformer.1` for the next one of a `transformer`."""
        return f"{self.component}.{self.number}" if self.number else self.component


def component_of(unit: str) -> Component:
    """The component that a unit of this name belongs to."""
    return unit.partition(".")[0]


def component_call(call: str) -> str:
    """The call of the component, `transformer.forward`, where it is one of its unit: `transformer.1.forward`."""
    unit, _, method = call.rpartition(".")
    return f"{component_of(unit)}.{method}"
