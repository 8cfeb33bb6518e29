"""A service put together: metrics, admission, orders and an engine over one resolved plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..declare.serving import Serving
from ..declare.workload import DeclaredWorkload
from ..errors import InputError
from ..facts.checkpoint import open_checkpoint
from ..plan.admission import Admission
from ..plan.artifact import ResolvedPlan
from .engine import Engine, Observer
from .metrics import Metrics
from .orders import Orders
from .service import Service


def assemble(
    resolved: ResolvedPlan,
    defaults: DeclaredWorkload,
    options: Serving,
    keys: Sequence[str],
    engine_of: Callable[[Observer], Engine],
) -> Service:
    """Put a service together.

    Args:
        resolved: the plan on its devices.
        defaults: what a request has where it says nothing.
        keys: bearer keys; none are asked for where it is empty.
        engine_of: makes the engine, which tells what it is given what happens.
    """
    plan, metrics = resolved.plan, Metrics(resolved, options.overlaps)
    admission = Admission(resolved, open_checkpoint(plan.model), options.admit == "fitting", options.overlaps)
    engine = engine_of(metrics)
    metrics.watch(lambda: engine.standing)
    return Service(plan, Orders(plan, defaults, admission, options), engine, options, metrics, keys)


def bearer_keys(path: str | None) -> tuple[str, ...]:
    """The bearer keys of a file; none without a file.

    Raises:
        InputError: it cannot be read, or holds no key.
    """
    if path is None:
        return ()
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as problem:
        why = getattr(problem, "strerror", None) or "it is not UTF-8"
        raise InputError(
            f"{file} cannot be read: {why}", where="serve.keys", hint="a text file, one key a line"
        ) from None
    if not lines:
        raise InputError(f"{file} holds no key", where="serve.keys", hint="one key a line, or serve.keys=null")
    return tuple(lines)
