"""What a dtype policy costs in accuracy: every component against itself in float32, and the image.

The request is run once as planned, with the first inputs and results of every border kept; then the same checkpoint is
loaded in float32 under a plan of its own, its components are given those same inputs, and the whole request is run
again with the same seed. The relative error of a border is |planned - float32| / |float32|, Euclidean norms over all
tensors of the result; PSNR is 10 log10(1 / mean squared error) of the pictures, values in 0..1, in dB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from ..declare.hardware import Planned
from ..declare.pipelines import Component
from ..declare.policies import dtypes_of
from ..declare.runtime import RUNTIMES
from ..declare.spec import DeploySpec
from ..declare.workload import DeclaredWorkload
from ..errors import InfeasibleError
from ..plan.artifact import Plan
from ..plan.units import component_call, component_of
from .generate import run_request, to_images
from .load import load_pipeline
from .outcome import Audit, AuditedBorder
from .request_state import RequestState
from .traffic import floating


@dataclass
class Recorder:
    """Listens at a border: the first inputs and the first result of every component and method, on the CPU."""

    inputs: dict[tuple[Component, str], tuple[Any, Any]] = field(default_factory=dict)
    results: dict[tuple[Component, str], Any] = field(default_factory=dict)

    def on_inputs(self, name: Component, method: str, args: Any, kwargs: Any) -> None:
        """Keep the inputs."""
        self.inputs.setdefault((name, method), (_moved(args, _to_host), _moved(kwargs, _to_host)))

    def on_outputs(self, name: Component, method: str, output: Any) -> None:
        """Keep the result."""
        if (name, method) not in self.results:
            self.results[name, method] = _moved(output, _to_host)

    def attach(self, state: RequestState) -> None:
        """Listen to one call."""
        state.on_inputs.append(self.on_inputs)
        state.on_outputs.append(self.on_outputs)


def in_float32(spec: DeploySpec, compiled: Callable[[DeploySpec], Plan]) -> Plan:
    """Compile one replica of the same declaration in float32, with the bits of eager execution where it had others.

    Raises:
        InfeasibleError: it does not fit the machine.
    """
    policy = {"name": "fp32", "components": dtypes_of("fp32", spec.pipeline), "quantization": {}}
    precision, hardware, runtime = spec.precision.model_copy(update=policy), spec.hardware, spec.runtime
    if isinstance(hardware, Planned):
        hardware = hardware.model_copy(update={"replicas": 1})
    if runtime.asked and RUNTIMES[runtime.asked].exactness != "bitwise":
        runtime = runtime.model_copy(update={"mode": "eager"})
    try:
        return compiled(spec.model_copy(update={"precision": precision, "hardware": hardware, "runtime": runtime}))
    except InfeasibleError as problem:
        raise InfeasibleError(
            f"an audit runs the request in float32 too, and that does not fit: {problem.message}",
            where="precision.audit",
            hint="audit a smaller image: errors per component hardly depend on its size",
        ) from problem


def audit(recorded: Recorder, images: list[Image], plan: Plan, reference: Plan, workload: DeclaredWorkload) -> Audit:
    """Compare a recorded run with float32.

    Args:
        recorded: inputs and results of the planned run.
        images: what it drew.
        plan: what was run.
        reference: the same in float32, see `in_float32`.
        workload: the request.

    Raises:
        RunError: the float32 pipeline cannot be loaded or run.
    """
    pipeline = load_pipeline(reference)
    rows = [
        AuditedBorder(
            component=name,
            phase=plan.pipeline.phase_of[component_call(f"{name}.{method}")],
            dtype=str(plan.components[component_of(name)].format),
            relative_error=round(_error(result, _again(pipeline, name, method, recorded)), 9),
        )
        for (name, method), result in recorded.results.items()
    ]
    pixels, _ = run_request(pipeline, workload.bounds, workload.request)
    drawn, exact = (
        np.stack([np.asarray(one, float) / 255 for one in side]) for side in (images, to_images(pipeline, pixels))
    )
    mean = float(((drawn - exact) ** 2).mean())
    psnr = None if mean == 0 or not math.isfinite(mean) else round(-10 * math.log10(mean), 2)
    return Audit(borders=rows, psnr=psnr, identical=mean == 0)


def _again(pipeline: DiffusionPipeline, name: Component, method: str, recorded: Recorder) -> Any:
    """The float32 component's result for the recorded inputs, on the CPU."""
    module = getattr(pipeline, component_of(name))
    args, kwargs = recorded.inputs[name, method]
    args, kwargs = _moved(args, _to_float), _moved(kwargs, _to_float)
    with torch.no_grad():
        return _moved(getattr(module, method)(*args, **kwargs), _to_host)


def _error(planned: Any, exact: Any) -> float:
    pairs = list(zip(floating(planned), floating(exact), strict=True))
    difference = sum(float(((a.double() - b.double()) ** 2).sum()) for a, b in pairs)
    size = sum(float((b.double() ** 2).sum()) for _, b in pairs)
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def _moved(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change every tensor in nested plain containers; model outputs become dicts."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _moved(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_moved(item, change) for item in value)
    return value


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()


def _to_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
