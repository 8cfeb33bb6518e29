"""The pipelines that can be planned and run: one description for each class of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .base import PHASES as PHASES
from .base import Bands as Bands
from .base import BandWork as BandWork
from .base import Call as Call
from .base import ComponentDescription as ComponentDescription
from .base import Crossing as Crossing
from .base import Exchanges as Exchanges
from .base import ImageInput as ImageInput
from .base import LayeredResults as LayeredResults
from .base import Layers as Layers
from .base import Library as Library
from .base import Phase as Phase
from .base import PipelineDescription as PipelineDescription
from .base import Role as Role
from .base import SchedulerDescription as SchedulerDescription
from .base import SteadyChain as SteadyChain
from .layers import Deal as Deal
from .row_bands import STEP_EXCHANGES as STEP_EXCHANGES
from .sana import SANA as SANA
from .sana_controlnet import SANA_CONTROLNET as SANA_CONTROLNET
from .sana_pag import SANA_PAG as SANA_PAG
from .sana_sprint import SANA_SPRINT as SANA_SPRINT
from .sana_sprint_img2img import SANA_SPRINT_IMG2IMG as SANA_SPRINT_IMG2IMG

PIPELINES = {one.class_name: one for one in (SANA_CONTROLNET, SANA, SANA_PAG, SANA_SPRINT, SANA_SPRINT_IMG2IMG)}
"""Descriptions by the class's name in diffusers."""
DEFAULT = SANA_CONTROLNET
"""What a declaration speaks of that does not say otherwise."""
COMPONENTS: tuple[str, ...] = tuple(dict.fromkeys(name for one in PIPELINES.values() for name in one.names))
"""Every component of any pipeline."""
ALWAYS = tuple(name for name in COMPONENTS if all(name in one.names for one in PIPELINES.values()))
"""The components that every pipeline has."""

HALVES = {
    first: second for one in PIPELINES.values() for first, second in zip(one.looped, one.second_units, strict=False)
}
"""Components of the denoising loop -> their unit for the second half of guidance, of all pipelines that have some."""

UNITS: tuple[str, ...] = (*COMPONENTS, *HALVES.values())
"""What may be given a place by name: components, and the units that the second half of guidance has."""

if TYPE_CHECKING:
    Component = str
    UnitName = str
    PipelineName = str
else:
    Component = Literal[COMPONENTS]
    UnitName = Literal[UNITS]
    PipelineName = Literal[tuple(PIPELINES)]
"""The name of a component, of a unit, and of a pipeline's class."""
