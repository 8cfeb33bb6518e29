"""CUDA graphs of components: a call is captured once, and replayed when it comes again in the same form.

A step of SANA launches some 1,500 kernels from Python; a graph launches them at once, with the same arguments to the
same kernels, so that its results are those of eager execution bit for bit. The first call of a form runs eagerly and
warms libraries up, the second one is captured, all later ones are replayed.

A form is the shapes, strides, dtypes and devices of the tensors in a call, and its other arguments. Each graph reads
its arguments from tensors of its own, into which they are copied, but for the results of another graph, which stay
where they are. Graphs of one device share a memory pool.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from .arriving_tensor import ArrivingTensor
from .factor import Factor
from .tensor_mark import TensorMark

log = logging.getLogger(__name__)
Forward = Callable[..., Any]
MOST_GRAPHS = 12
"""Graphs that one device keeps; the one that was used longest ago makes room."""


class Recorder(Protocol):
    """Records work of one device once and repeats it."""

    def warm_up(self, work: Callable[[], Any], beside: bool = False) -> Any:
        """Run `work` once before it is recorded, so that libraries have what they need.

        Args:
            beside: its activations are large, and are beside what smaller work keeps.
        """
        ...

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make a tensor of the same shape and strides, for recorded work to read its input from."""
        ...

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record `work`; return what repeats it, and the result that each repetition fills anew.

        Raises:
            RuntimeError: `work` cannot be recorded. Nothing of it has run.
        """
        ...

    def cut(self, between: Callable[[], object]) -> bool:
        """Part the work that this thread records now: each repetition calls `between` here, outside of what it repeats.

        Returns:
            False where nothing is recorded, or work is repeated as a whole: whoever asks does `between` himself.
        """
        ...


@dataclass
class Chain:
    """Work that is being captured: graphs, and what is called between them.

    Attributes:
        running: the capture under way; closing it ends it.
        pieces: what a replay calls, one after the other.
    """

    running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    pieces: list[Callable[[], object]] = field(default_factory=list)

    def replay(self) -> None:
        """Repeat the work."""
        for piece in self.pieces:
            piece()


class _Recording(threading.local):
    """What each thread captures now."""

    chain: Chain | None = None


class CudaRecorder:
    """Captures CUDA graphs on one device, all in one memory pool. Work that is cut becomes a chain of graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        # The stream is named: PyTorch would keep one that belongs to the device of the first capture.
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._recording = _Recording()

    def warm_up(self, work: Callable[[], Any], beside: bool = False) -> Any:
        """Run `work` eagerly; see `Recorder`."""
        return work()

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make an input; see `Recorder`."""
        return tensor.new_empty_strided(tensor.shape, tensor.stride())

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture `work`; see `Recorder`."""
        if not self.alive:  # PyTorch refuses a pool again that no graph is left of
            self.pool = torch.cuda.graph_pool_handle()
        chain = Chain()
        with torch.cuda.device(self.device), chain.running:
            self._recording.chain = chain
            try:
                self._begin(chain)
                result = work()
            finally:
                self._recording.chain = None
        self.alive.update(chain.graphs)
        return chain.replay, result

    def cut(self, between: Callable[[], object]) -> bool:
        """End the capture under way and begin the next one; see `Recorder`."""
        chain = self._recording.chain
        if chain is None:
            return False
        chain.running.close()
        chain.pieces.append(between)
        self._begin(chain)
        return True

    def _begin(self, chain: Chain) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: only this thread's calls are captured, and restricted.
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        chain.running.enter_context(capture)
        chain.graphs.append(graph)
        chain.pieces.append(graph.replay)


class Input:
    """A tensor that a graph reads in the place of one of a call's: of the same shape, strides and dtype."""

    def __init__(self, tensor: torch.Tensor, recorder: Recorder) -> None:
        # Where a dimension repeats one value (an expanded timestep), that value is kept once, and expanded again.
        self.where = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
        one = tensor[self.where]
        self.written = recorder.empty_like(one)
        self.shape = tensor.shape
        self._given: TensorMark | None = None
        self.take(tensor)

    @property
    def tensor(self) -> torch.Tensor:
        """What the graph is given for the call's tensor."""
        return self.written.expand(self.shape)

    def take(self, tensor: torch.Tensor) -> None:
        """Copy `tensor`, unless it is the one that came last and was not written to since."""
        if self._given is not None and self._given.holds(tensor):
            return
        self.written.copy_(tensor[self.where])
        # An inference tensor may be written to and say nothing of it.
        self._given = None if tensor.is_inference() else TensorMark.of(tensor)


def _nobody() -> None:
    """Nobody holds a result; nothing has to be written anew."""


@dataclass
class Graph:
    """One captured call.

    Attributes:
        replay: repeats it.
        inputs: what it reads, in the order of the call's tensors; None for one that it reads where it is.
        result: what it returns; each replay writes it anew.
        reads: results of other graphs, and what arrives, that it reads where they are; kept, so that no other tensor
            takes their identity.
        factors: numbers that it reads, in the order of the call's.
        refresh: writes what else it reads anew, where its inputs changed.
        holder: whoever has the result and has not used it yet.
        large: whether it keeps as much memory as an eager call needs, which then has to be given back first.
    """

    replay: Callable[[], None]
    inputs: Sequence[Input | None]
    result: Any
    reads: Sequence[torch.Tensor] = ()
    factors: Sequence[Factor] = ()
    refresh: Callable[[], object] = _nobody
    holder: Callable[[], object] = _nobody
    large: bool = False

    def run(self, tensors: Sequence[torch.Tensor], numbers: Sequence[float] = ()) -> Any:
        """Replay the call with other tensors of the same form, and other numbers as factors."""
        for own, tensor in zip(self.inputs, tensors, strict=True):
            if own is not None:
                own.take(tensor)
        for factor, number in zip(self.factors, numbers, strict=True):
            factor.take(number)
        self.refresh()
        self.replay()
        return self.result


@dataclass
class DeviceGraphs:
    """The graphs of one device, least recently used first; several components of a pipeline share them."""

    recorder: Recorder
    most: int = MOST_GRAPHS
    graphs: OrderedDict[Hashable, Graph] = field(default_factory=OrderedDict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    made: dict[int, tuple[torch.Tensor, Graph]] = field(default_factory=dict)
    """Results by id, and the graphs that write them: another graph reads them where they are."""

    def find(self, key: Hashable) -> Graph | None:
        """The graph of a form, which is now the most recently used."""
        graph = self.graphs.get(key)
        if graph is not None:
            self.graphs.move_to_end(key)
        return graph

    def add(self, key: Hashable, graph: Graph) -> None:
        """Keep a graph; the oldest one makes room."""
        self.graphs[key] = graph
        while len(self.graphs) > self.most:
            self.graphs.popitem(last=False)
        self._list_results()

    def drop(self, owner: object) -> None:
        """Forget the graphs of one component."""
        for key in [key for key in self.graphs if isinstance(key, tuple) and key[0] is owner]:
            del self.graphs[key]
        self._list_results()

    def make_room(self) -> None:
        """Forget all graphs if one of them is large: memory of a pool is free again when no graph of it is left."""
        if any(graph.large for graph in self.graphs.values()):
            self.graphs.clear()
            self._list_results()

    def is_result(self, tensor: torch.Tensor) -> bool:
        """Whether a graph writes this tensor."""
        return id(tensor) in self.made and self.made[id(tensor)][0] is tensor

    def place_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a graph may read in the place of `tensor` without a copy, always the same one; None where it must copy.

        Raises:
            RunError: `tensor` arrived from another device, and another one took its place since.
        """
        if isinstance(tensor, ArrivingTensor):
            return tensor.place_for(self)
        return tensor if self.is_result(tensor) else None

    def drop_readers(self, places: Iterable[torch.Tensor]) -> None:
        """Forget the graphs that read any of `places` where it is."""
        gone = {id(place) for place in places}
        for key in [key for key, graph in self.graphs.items() if any(id(one) in gone for one in graph.reads)]:
            del self.graphs[key]
        self._list_results()

    def release(self, tensors: Sequence[torch.Tensor]) -> None:
        """Results among `tensors` were used: what made or sent them may write them anew, whoever asks."""
        for tensor in tensors:
            if isinstance(tensor, ArrivingTensor):
                tensor.arrival.taken()
            elif self.is_result(tensor):
                self.made[id(tensor)][1].holder = _nobody

    def _list_results(self) -> None:
        results = ((leaf, graph) for graph in self.graphs.values() for leaf in pytree.tree_leaves(graph.result))
        self.made = {id(leaf): (leaf, graph) for leaf, graph in results if isinstance(leaf, torch.Tensor)}
