"""`sana-deploy advise --export`: the first machine's plan as a SkyPilot task, for Kubernetes, or for KubeRay."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._units import GIB
from .._version import __version__
from ..declare.serving import Serving
from ..declare.spec import CatalogueModel, DeploySpec
from ..errors import UsageError
from ..plan.artifact import Plan
from ..serve import command as serving
from ..serve.export import OPTION, Export, as_yaml, check_paths, written
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


@dataclass(frozen=True)
class Served:
    """What is to be served, and how.

    Attributes:
        given: overrides of the declaration.
        options: overrides of the group `serve` that a service reads.
        host_bytes: memory of the host that it takes.
    """

    advice: Advice
    given: Sequence[str]
    options: Sequence[str]
    serving: Serving

    @property
    def plan(self) -> Plan:
        """The plan of the machine."""
        return self.advice.option.plan

    @property
    def host_bytes(self) -> int:
        """Host memory: libraries, the weights of one replica while they are cast, and what stays there of each one."""
        loading = sum(part.weights_bytes for part in self.plan.components.values())
        return _LIBRARIES_BYTES + loading + sum(_waiting(one) for one in self.plan.each())

    @property
    def command(self) -> list[str]:
        """What serves that plan on its machine, planned there anew."""
        overrides = [*self.given, *self.advice.option.overrides]
        return ["sana-deploy", "serve", "serve.host=0.0.0.0", *self.options, *overrides]


def _waiting(plan: Plan) -> int:
    """Bytes of weights that stay in host memory: what runs there, and what is offloaded."""
    offloaded = [plan.pipeline.of("text_encoder")] if "text_encoder_offload" in plan.knobs else []
    return sum(part.weights_bytes for name, part in plan.components.items() if part.slot == "cpu" or name in offloaded)


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
        UsageError: the plan names no weights, or paths that the machine does not have.
        InputError: the file cannot be written.
    """
    kind, file = wanted
    plan, price = first.option.plan, first.price
    if isinstance(plan.spec.model, CatalogueModel) and plan.spec.model.source is None:
        raise UsageError("the model has no weights that could be served", where="model.source",
                         hint="model.source=FOLDER_OR_REPO")  # fmt: skip
    if kind == "kuberay":
        serving.check_installed("ray")
        serving.export(Export(kind, file), plan, spec, options.model_copy(update={"engine": "ray"}))
        return file
    check_paths(plan, options, pods=kind == "kubernetes")
    one = Served(first, given, served, options)
    documents = (
        [skypilot.task(plan, price, one.host_bytes, shlex.join(one.command), options, __version__)]
        if kind == "skypilot"
        else kubernetes.manifests(plan, options, one.host_bytes, served, gpus_by)
    )
    header = _HEADER.format(
        option=OPTION, kind=kind, machine=price.name, words=first.option.words, price=price.usd_per_hour,
        day=price.date, source=price.source, usage=KINDS[kind].format(file=file.name),
    )  # fmt: skip
    return written(file, header + "---\n".join(map(as_yaml, documents)))
