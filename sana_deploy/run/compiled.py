"""What is compiled of a component: blocks that run as one fused piece each, and as they were where compiling fails.

Blocks of one kind are compiled once for all (`torch.compile` finds that the others differ in nothing but weights), at
the first call of a shape. What Inductor made lies in the cache folder, where the next process finds it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import _interrupts
from .._files import cache_root
from .not_copied import NotCopied

log = logging.getLogger(__name__)
VARIANTS_PER_GRAPH = 32
"""Variants of compiled code that PyTorch may keep, for each graph that a device keeps. All components of a process
share them: one for each block's kind, shape, device, and set of adapters."""


@dataclass
class Compiling:
    """What compiling did in one request.

    Attributes:
        seconds: wall time of calls in which something was compiled; their own work is in it.
        uncompiled: why components are not compiled.
        on_start: called with the component when the compiler begins with it.
    """

    seconds: float = 0.0
    uncompiled: dict[str, str] = field(default_factory=dict)
    on_start: Callable[[str], None] = lambda name: None

    def sentences(self) -> list[str]:
        """Which components ran uncompiled, and why."""
        return [f"the {name} ran uncompiled: {reason}" for name, reason in self.uncompiled.items()]


class CompiledForward(NotCopied):
    """A forward of which blocks are compiled; what it is may be exchanged (`forward`), and blocks stay compiled."""

    def __init__(self, calls: CompiledCalls, forward: Callable[..., Any]) -> None:
        self.calls, self.forward = calls, forward
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward."""
        return self.calls.run(lambda: self.forward(*args, **kwargs))


class CompiledCalls:
    """Calls of a component whose blocks are compiled.

    A compiler's failure fails no call: the component is left uncompiled, and the call's `Compiling` says why.

    Args:
        name: the component.
        module: the component's own.
        regions: attributes of it to compile: modules, or lists of them.
        backend: of `torch.compile`, by name.
        most_graphs: graphs that the component's device keeps, which bounds how many shapes are worth compiling for.
        compiling: where the call at work notes what was compiled.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        regions: Sequence[str],
        backend: str,
        most_graphs: int,
        compiling: Callable[[], Compiling],
    ) -> None:
        self.name, self.module, self.regions = name, module, regions
        self.backend, self.variants, self.compiling = backend, VARIANTS_PER_GRAPH * most_graphs, compiling
        self.blocks: list[nn.Module] = []
        self.failed = ""
        if backend == "inductor":
            # Inductor reads this where it compiles, and so do the processes that it starts.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))

    def around(self, forward: Callable[..., Any]) -> CompiledForward:
        """Return `forward` with the blocks that it calls compiled."""
        return CompiledForward(self, forward)

    def run(self, work: Callable[[], Any]) -> Any:
        """Do `work`, which calls the component; compile what is not yet compiled for such a call.

        Raises:
            RuntimeError: compiling failed while a graph was captured, which has to be begun anew.
        """
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit

        self.note()
        if self.failed:
            return work()
        compiling = self.compiling()
        self._compile()
        most = {"recompile_limit": self.variants, "accumulated_recompile_limit": self.variants}
        try:
            with self._noting(compiling), config.patch(most):
                return work()
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            if _interrupts.caused(problem):
                raise
            if _capturing():
                raise RuntimeError(f"compiling failed: {_first_line(problem)}") from problem
            if isinstance(problem, FailOnRecompileLimitHit):
                compiling.uncompiled[self.name] = f"{self.variants} variants of compiled code are kept already"
                with torch.compiler.set_stance("force_eager"):
                    return work()
            failure = problem.with_traceback(None)  # which would keep tensors alive
        self.undo()
        result = work()  # an error of the call's own comes again
        self._give_up(failure)
        return result

    def note(self) -> None:
        """Tell the call at work that the component is not compiled, where that failed."""
        if self.failed:
            self.compiling().uncompiled[self.name] = self.failed

    def undo(self) -> None:
        """Give the blocks back as they were."""
        for block in self.blocks:
            vars(block).pop("_compiled_call_impl", None)
        self.blocks.clear()

    def _compile(self) -> None:
        """Have blocks compiled at their next call; one that was exchanged since is among them."""
        for region in self.regions:
            found = getattr(self.module, region)
            for block in found if isinstance(found, nn.ModuleList) else [found]:
                if block._compiled_call_impl is None:
                    # Shapes are constants, as in graphs. A block that cannot be compiled whole is an error.
                    block.compile(backend=_backend(self.backend), fullgraph=True, dynamic=False)
                    self.blocks.append(block)

    def _give_up(self, problem: Exception) -> None:
        """Leave the component uncompiled from now on."""
        self.failed = f"compiling failed: {_first_line(problem)}"
        log.warning("%s stays uncompiled: %s", self.name, self.failed)
        self.note()

    @contextlib.contextmanager
    def _noting(self, compiling: Compiling) -> Iterator[None]:
        """Note how long the block took, if the compiler was called in it."""
        began: list[float] = []

        def begin() -> None:
            if not began:
                compiling.on_start(self.name)
            began.append(started)

        started, token = time.perf_counter(), _BEGIN.set(begin)
        try:
            yield
        finally:
            _BEGIN.reset(token)
            if began:
                compiling.seconds += time.perf_counter() - started


def _nothing() -> None:
    """Nobody asks."""


_BEGIN: ContextVar[Callable[[], None]] = ContextVar("begin", default=_nothing)
"""Called when the compiler begins with a piece, in this context."""


@functools.cache
def _backend(name: str) -> Callable[..., Any]:
    """A backend of `torch.compile` that says when it begins; one for all, since code is found again by its backend."""
    from torch._dynamo import lookup_backend

    compiler = lookup_backend(name)

    def compile_piece(graph: Any, inputs: Any) -> Any:
        _BEGIN.get()()
        with warnings.catch_warnings():  # of how weights are hashed, and of a faster, less precise float32
            warnings.filterwarnings("ignore", module=r"torch\._(inductor|functorch)")
            return compiler(graph, inputs)

    return compile_piece


def _capturing() -> bool:
    """Whether what this thread launches is captured and does not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _first_line(problem: BaseException) -> str:
    """What the compiler said, without who called it."""
    problem = getattr(problem, "inner_exception", problem)
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
