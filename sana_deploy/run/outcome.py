"""What became of one deployment: the model of outcome.json. Imports no torch."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ConfigDict

from .._models import Diagnostic, FrozenModel
from .._units import fullness
from ..errors import SanaDeployError
from ..plan.artifact import Plan

INTERRUPTED = 130
"""The exit code of an interrupt (Ctrl-C, or kill), as shells give it."""
Status = Literal["done", "infeasible", "invalid", "stale", "failed"]


class Frozen(FrozenModel):
    """Base of the outcome's models."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Measured(Frozen):
    """What was measured while running; every number here is a measurement.

    Attributes:
        peak_bytes: device -> most bytes allocated during the request; absent where the device cannot tell.
        seconds: phase -> wall seconds: import (of libraries), start (of CUDA, beyond the imports), load, encode,
            prepare, denoise, decode, generate; within these, compile: calls in which blocks were compiled.
        loaded_bytes: weights that `load` put in their places; 0 in a rehearsal.
        images_per_second: of several replicas that drew at once; None for one.
        bytes_moved: "src->dst" -> bytes of the whole request.
        bytes_per_step: the same for one denoising step.
        prompt_cache_hits: calls of the text encoder whose result was there already.
        host_peak_bytes: largest resident size of this process so far.
    """

    peak_bytes: dict[str, int] = {}
    seconds: dict[str, float] = {}
    bytes_moved: dict[str, int] = {}
    bytes_per_step: dict[str, int] = {}
    host_peak_bytes: int = 0
    loaded_bytes: int = 0
    images_per_second: float | None = None
    prompt_cache_hits: int = 0


class RehearsedGpu(Frozen):
    """The fullest moment of one virtual GPU, in bytes, beside the plan's estimate of weights and activations.

    `peak_bytes` holds the context and what the plan says that PyTorch's allocator adds to tensors, `allocator_bytes`.
    `planned_error` is planned over rehearsed, less one, both of tensors alone. `phase_peaks` are weights and
    activations together. `others_bytes` is what others use of the GPU, or the plan keeps free for them.
    """

    device: str
    gpu: str
    capacity_bytes: int
    context_bytes: int
    allocator_bytes: int = 0
    peak_bytes: int
    weights_bytes: int
    activation_bytes: int
    phase: str
    component: str
    planned_bytes: int
    planned_error: float
    phase_peaks: dict[str, int] = {}
    phase_activations: dict[str, int] = {}
    others_bytes: int = 0

    @property
    def fullness(self) -> float:
        """Share of the GPU that is taken at the peak, by others too; see `_units.fullness`."""
        return fullness(self.peak_bytes, self.capacity_bytes - self.others_bytes, self.capacity_bytes)


class RehearsedTransfer(Frozen):
    """A tensor that crossed a component's border between two GPUs; bytes of one step and of one image."""

    src: str
    dst: str
    tensor: str
    bytes_per_step: int
    bytes_per_image: int


class RehearsedMoment(Frozen):
    """Most live bytes per GPU while `component` worked in `phase`; moments follow each other in time."""

    phase: str
    component: str
    live_bytes: dict[str, int]


class RehearsedWork(Frozen):
    """Operations and floating point operations (2 per multiply-add) of one component, over the steps rehearsed."""

    operations: int
    flops: int


class Rehearsal(Frozen):
    """What a run on virtual GPUs found. In shapes only some steps are run: the later ones repeat the last.

    Of several replicas those that are alike are rehearsed once: `gpus` has the GPUs of all, and the rest is that of the
    first one.
    """

    fidelity: str
    replicas: int = 1
    replicas_rehearsed: int = 1
    steps: int
    steps_rehearsed: int
    gpus: list[RehearsedGpu]
    transfers: list[RehearsedTransfer]
    timeline: list[RehearsedMoment]
    work: dict[str, RehearsedWork]


class AuditedBorder(Frozen):
    """A component's first result in one phase, beside its own in float32 for the same inputs."""

    component: str
    phase: str
    dtype: str
    relative_error: float


class Audit(Frozen):
    """A dtype policy against float32: errors per border, and the image's PSNR in dB (None where it is identical)."""

    borders: list[AuditedBorder]
    psnr: float | None
    identical: bool


class Failure(Frozen):
    """An error as data."""

    type: str
    message: str
    where: str = ""
    facts: dict[str, Any] = {}
    hint: str = ""


class Outcome(Frozen):
    """The result of one run; `images` are paths relative to the run folder, `overrides` those of the command line.

    `seed` is the request's, also where it was drawn (`workload.seed=random`). `device_map` is that of the first
    replica, `other_device_maps` are those of the others.
    """

    status: Status
    exit_code: int
    stage: str
    plan_digest: str | None = None
    device_map: dict[str, str] = {}
    other_device_maps: list[dict[str, str]] = []
    measured: Measured = Measured()
    rehearsal: Rehearsal | None = None
    audit: Audit | None = None
    images: list[str] = []
    seed: int | None = None
    error: Failure | None = None
    diagnostics: list[Diagnostic] = []
    overrides: list[str] = []

    def to_json(self) -> str:
        """The text of outcome.json."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def document(outcome: Outcome, plan: Plan | None) -> str:
    """The one JSON document of `output=json`, whatever the stage and however it ended: the outcome, with the plan.

    Outcome first, as it is what every run has: keys of outcome.json, and `plan`, which holds plan.json as it was
    written (the closest miss where nothing fits) or null. A reader looks at `status` and then at what it needs.
    """
    values = {**outcome.model_dump(mode="json"), "plan": json.loads(plan.to_json()) if plan else None}
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def failure_of(problem: BaseException) -> tuple[Status, int, Failure]:
    """Describe an exception: its status, exit code, and the error as data."""
    if isinstance(problem, SanaDeployError):
        facts = {key: value for key, value in problem.facts.items() if _is_plain(value)}
        failure = Failure(
            type=type(problem).__name__, message=problem.message, where=problem.where, facts=facts, hint=problem.hint
        )
        return problem.status, problem.exit_code, failure  # type: ignore[return-value]
    if isinstance(problem, KeyboardInterrupt):
        return "failed", INTERRUPTED, Failure(type="KeyboardInterrupt", message="interrupted")
    message = f"{type(problem).__name__}: {problem}"
    hint = "this is a defect; the log file in the run folder has the traceback"
    return "failed", 1, Failure(type=type(problem).__name__, message=message, hint=hint)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))
