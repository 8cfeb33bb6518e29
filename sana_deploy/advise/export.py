"""`sana-deploy advise --export`: the first machine's plan as a SkyPilot task, for Kubernetes, or for KubeRay."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from .._files import write_text
from .._units import GIB
from .._version import __version__
from ..declare.knobs import KNOBS
from ..declare.serving import Serving
from ..declare.spec import CatalogueModel, DeploySpec, Model
from ..errors import UsageError
from ..plan.artifact import Plan
from ..serve import command as serving
from ..serve.export import OPTION, Export, as_yaml, check_paths
from . import kubernetes, skypilot
from .ranking import Advice

KINDS: Mapping[str, str] = {
    "skypilot": "sky launch {file}, or sky serve up {file}",
    "kubernetes": "kubectl apply -f {file}",
    "kuberay": "kubectl apply -f {file}",
}
"""What can be written, and how it is used."""
_HEADER = """\
# Written by sana-deploy advise {option} {kind}: {machine}, {words}.
# {price:g} USD per hour, price of {day}, read in {source}
# {usage}
"""
_LIBRARIES_BYTES = 4 * GIB
"""Of this process before any weights: torch, diffusers, CUDA's contexts."""


def check_weights(model: Model) -> None:
    """Refuse to write what could not be served.

    Raises:
        UsageError: the model names no weights.
    """
    if isinstance(model, CatalogueModel) and model.source is None:
        hint = "model.source=FOLDER_OR_REPO"
        raise UsageError("the model has no weights that could be served", where="model.source", hint=hint)


def write(
    wanted: tuple[str, Path], first: Advice, spec: DeploySpec, options: Serving, gpus_by: str,
    given: Sequence[str], served: Sequence[str],
) -> Path:  # fmt: skip
    """Write the whole file, or none.

    Args:
        wanted: kind and file.
        first: the machine and its plan.
        options: of the group `serve`.
        gpus_by: how Kubernetes is asked for GPUs.
        given: overrides of the declaration.
        served: overrides of the group `serve`.

    Raises:
        UsageError: the plan names paths that the machine does not have.
        InputError: the file cannot be written.
    """
    kind, file = wanted
    plan, price = first.option.plan, first.price
    if kind == "kuberay":
        serving.check_installed("ray")
        return serving.export(Export(kind, file), plan, spec, options.model_copy(update={"engine": "ray"}))
    check_paths(plan, options, pods=kind == "kubernetes")
    if kind == "skypilot":
        command = ["sana-deploy", "serve", "serve.host=0.0.0.0", *served, *given, *first.option.overrides]
        documents = [skypilot.task(plan, price, host_bytes(plan), shlex.join(command), options, __version__)]
    else:
        documents = kubernetes.manifests(plan, options, host_bytes(plan), served, gpus_by)
    header = _HEADER.format(
        option=OPTION, kind=kind, machine=price.name, words=first.option.words, price=price.usd_per_hour,
        day=price.date, source=price.source, usage=KINDS[kind].format(file=file.name),
    )  # fmt: skip
    return write_text(file, header + "---\n".join(map(as_yaml, documents)), OPTION)


def host_bytes(plan: Plan) -> int:
    """Host memory of a service: libraries, a replica's weights while they are cast, what stays there of each."""
    loading = sum(part.weights_bytes for part in plan.wholes.values())
    return _LIBRARIES_BYTES + loading + sum(_waiting(one) for one in plan.each())


def _waiting(plan: Plan) -> int:
    """Bytes of weights that stay in host memory: what runs there, and what waits there between requests."""
    waits = {plan.pipeline.of(KNOBS[knob].role) for knob in plan.knobs if KNOBS[knob].needs_gpu}
    return sum(part.weights_bytes for name, part in plan.components.items() if part.slot == "cpu" or name in waits)
