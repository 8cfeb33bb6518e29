"""The pipelines that can be planned and run: one description for each class of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .base import PHASES as PHASES
from .base import Call as Call
from .base import ComponentDescription as ComponentDescription
from .base import Crossing as Crossing
from .base import LayeredResults as LayeredResults
from .base import Library as Library
from .base import Phase as Phase
from .base import PipelineDescription as PipelineDescription
from .base import Role as Role
from .base import SchedulerDescription as SchedulerDescription
from .base import SteadyChain as SteadyChain
from .sana_controlnet import SANA_CONTROLNET as SANA_CONTROLNET

PIPELINES = {one.class_name: one for one in (SANA_CONTROLNET,)}
"""Descriptions by the class's name in diffusers."""
DEFAULT = SANA_CONTROLNET
"""What a declaration speaks of that does not say otherwise."""
COMPONENTS: tuple[str, ...] = tuple(dict.fromkeys(name for one in PIPELINES.values() for name in one.names))
"""Every component of any pipeline."""

UNITS: tuple[str, ...] = (*COMPONENTS, *dict.fromkeys(name for one in PIPELINES.values() for name in one.second_units))
"""What may be given a place by name: components, and the units that the second half of guidance has."""

if TYPE_CHECKING:
    Component = str
    UnitName = str
else:
    Component = Literal[COMPONENTS]
    UnitName = Literal[UNITS]
"""The name of a component, and that of a unit."""
