"""Compiling from Python: a declaration, or the overrides of one, to a plan. Imports torch only to measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .declare.compose import compose_spec
from .declare.formats import Format
from .declare.pipelines import Component
from .declare.spec import DeploySpec
from .errors import UsageError
from .facts.checkpoint import Checkpoint
from .facts.machine import Machine
from .plan.artifact import Plan
from .plan.compiler import compile_declaration
from .plan.needs import Measured, OnProgress


def compile_plan(overrides: Sequence[str] = ()) -> Plan:
    """Compile the declaration that Hydra `overrides` give, e.g. `["hardware=single_gpu", "precision=fp32"]`.

    Raises:
        UsageError: `overrides` is no list of texts.
        ComposeError, InvalidSpecError, CheckpointError, InfeasibleError: see `sana_deploy.errors`.
    """
    example = "compile_plan(['hardware=single_gpu', 'precision=fp32'])"
    if isinstance(overrides, (str, bytes)) or not isinstance(overrides, Iterable):
        hint = f"compile_plan([{overrides!r}])" if isinstance(overrides, str) else example
        raise UsageError(f"a list of overrides is needed, {overrides!r} was given", where="overrides", hint=hint)
    for override in (overrides := list(overrides)):
        if not isinstance(override, str):
            raise UsageError(f"an override is text, {override!r} was given", where="overrides", hint=example)
    return compile_spec(compose_spec(overrides))


def compile_spec(
    spec: DeploySpec, machine: Machine | None = None, on_progress: OnProgress = lambda done, of: None
) -> Plan:
    """Compile a validated declaration.

    Args:
        spec: the declaration.
        machine: the one to plan for; the declared one unless given.
        on_progress: called with the points measured and the points in all, where a checkpoint must be measured first.

    Raises:
        CheckpointError, InfeasibleError: see `sana_deploy.errors`.
    """

    def measure(checkpoint: Checkpoint, formats: Mapping[Component, Format], guided: bool) -> Measured:
        from .rehearsal.calibrate import calibrate

        return calibrate(checkpoint, formats, guided, on_progress)

    return compile_declaration(spec, measure, machine)
