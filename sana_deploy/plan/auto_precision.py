"""`precision=auto`: the best policy that is native on the machine and fits it, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from .._models import Diagnostic
from ..declare.formats import Dtype
from ..declare.pipelines import Component
from ..declare.policies import dtypes_of
from ..declare.spec import DeploySpec
from ..facts.checkpoint import Checkpoint
from ..facts.machine import Gpu, Machine, is_native
from .remedies import Fits

ORDER = ("mixed_bf16", "mixed_fp32", "bf16", "fp32")
"""Policies that SANA survives, best first: the documented recipe, the same for GPUs without bfloat16, then the rest."""


def choose_precision(
    spec: DeploySpec, checkpoint: Checkpoint, machine: Machine, *fits: Fits
) -> tuple[DeploySpec, Diagnostic]:
    """Return `spec` with a policy for `precision=auto`, its own entries in `components` kept, and the reason.

    Without a GPU that may be taken it is float32, the one dtype that CPUs compute natively. Where none fits, the first
    one that some GPU computes natively is taken, so that the refusal speaks of memory.

    Args:
        fits: say whether a declaration fits; a later one is asked where no policy fits by those before.
    """
    gpus = machine.named(spec.hardware.gpu_indices)
    if not gpus:
        return _with(spec, "fp32"), _remark("fp32", "float32 is what CPUs compute natively")
    passed: list[str] = []
    for one in fits:
        passed = []
        for name, changed in _candidates(spec):
            if one(changed, checkpoint, machine):
                reason = f"native here and it fits{'; ' if passed else ''}{'; '.join(passed)}"
                return changed, _remark(name, reason)
            passed.append(f"{name}: {_why_not(changed.precision.components, gpus)}")
    name, changed = next(
        (tried for tried in _candidates(spec) if _native_somewhere(tried[1], gpus)), ("fp32", _with(spec, "fp32"))
    )
    return changed, _remark(name, f"none fits; {'; '.join(passed)}")


def _candidates(spec: DeploySpec) -> Iterator[tuple[str, DeploySpec]]:
    return ((name, _with(spec, name)) for name in ORDER)


def _with(spec: DeploySpec, name: str) -> DeploySpec:
    given = spec.precision
    components: dict[Component, Dtype] = {**dtypes_of(name, spec.pipeline), **given.components}
    return spec.model_copy(update={"precision": given.model_copy(update={"name": name, "components": components})})


def _why_not(dtypes: Mapping[Component, Dtype], gpus: Iterable[Gpu]) -> str:
    emulated = sorted({f"{dtype} is not native on {gpu.name}" for dtype in dtypes.values() for gpu in gpus
                       if not is_native(dtype, gpu)})  # fmt: skip
    return ", ".join(emulated) or "does not fit"


def _native_somewhere(spec: DeploySpec, gpus: Collection[Gpu]) -> bool:
    return all(any(is_native(dtype, gpu) for gpu in gpus) for dtype in spec.precision.components.values())


def _remark(name: str, reason: str) -> Diagnostic:
    return Diagnostic(type="auto_precision", severity="info", message=f"auto chose {name}: {reason}", where="precision")
