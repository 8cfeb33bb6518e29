"""How components execute: the group `runtime`, and what is known of each way without a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from .._models import Declared
from .knobs import Exactness

Execution = Literal["eager", "graphs"]
"""How the components of the denoising loop execute."""


@dataclass(frozen=True)
class RuntimeDescription:
    """One way to execute: what it does in a line, and its exactness against diffusers in eager mode."""

    help: str
    exactness: Exactness


RUNTIMES: dict[Execution, RuntimeDescription] = {
    "eager": RuntimeDescription("every kernel is launched from Python", "bitwise"),
    "graphs": RuntimeDescription("the kernels of a step are captured once and launched at once", "bitwise"),
}
"""By name, the plainest first."""


class Runtime(Declared):
    """How transformer and ControlNet execute.

    Attributes:
        mode: `eager`, `graphs` (CUDA graphs), or `auto`: graphs where they pay and their memory fits.
        most_graphs: graphs that each GPU keeps.
    """

    mode: Literal["auto", "eager", "graphs"] = "auto"
    most_graphs: Annotated[int, Field(ge=2, le=64)] = 8
