"""How components execute: the group `runtime`, and what is known of each way without a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from .._models import Declared
from .knobs import Exactness

Execution = Literal["eager", "graphs", "compiled"]
"""How components execute: those of the denoising loop, and what else can."""


@dataclass(frozen=True)
class RuntimeDescription:
    """One way to execute.

    Attributes:
        help: what it does, in a line.
        exactness: against diffusers in eager mode.
        graphs: whether the calls of a step are launched from CUDA graphs, which keep memory.
        compiles: whether what the pipeline description names of a component is compiled.
        capability: the least compute capability of GPUs that it works on.
    """

    help: str
    exactness: Exactness
    graphs: bool = False
    compiles: bool = False
    capability: tuple[int, int] = (0, 0)


RUNTIMES: dict[Execution, RuntimeDescription] = {
    "eager": RuntimeDescription("every kernel is launched from Python", "bitwise"),
    "graphs": RuntimeDescription(
        "the kernels of a call are captured once and launched at once", "bitwise", graphs=True
    ),
    "compiled": RuntimeDescription(
        "compiled blocks, in graphs", "rounding", graphs=True, compiles=True, capability=(7, 0)
    ),
}
"""By name, the plainest first."""


class Runtime(Declared):
    """How components execute, and what is kept from request to request.

    Attributes:
        mode: `eager`, `graphs` (CUDA graphs), `compiled` (by Inductor, and in graphs), or `auto`: graphs where they pay
            and their memory fits.
        most_graphs: graphs that each GPU keeps.
        prompt_cache: results of the text encoder that are kept on the CPU for prompts that come again; 0 keeps none.
    """

    mode: Literal["auto", "eager", "graphs", "compiled"] = "auto"
    most_graphs: Annotated[int, Field(ge=2, le=64)] = 12
    prompt_cache: Annotated[int, Field(ge=0, le=4096)] = 16

    @property
    def asked(self) -> Execution | None:
        """The way that was asked for; None where the planner chooses."""
        return None if self.mode == "auto" else self.mode
