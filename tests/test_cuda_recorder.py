"""The recorder of CUDA graphs against PyTorch's rule of memory pools: PyTorch's calls are stood in for."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sana_deploy.run.graphs import CudaRecorder


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Nothing is repeated."""


class Pools:
    """Refuses a pool again once all its graphs are gone, as PyTorch's allocator does while a tensor of it is left."""

    def __init__(self) -> None:
        self.made = 0
        self.users: dict[int, list[weakref.ref[Graph]]] = {}

    def handle(self) -> int:
        self.made += 1
        return self.made

    @contextlib.contextmanager
    def capture(self, graph: Graph, pool: int, **_: Any) -> Iterator[None]:
        users = self.users.setdefault(pool, [])
        if users and not any(one() for one in users):
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        users.append(weakref.ref(graph))
        yield


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Pools:
    found = Pools()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", found.handle)
    monkeypatch.setattr(torch.cuda, "graph", found.capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


def test_captures_go_on_after_all_graphs_were_dropped(pools: Pools) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    kept = recorder.record(lambda: "first")
    del kept
    gc.collect()
    assert recorder.record(lambda: "second")[1] == "second"


def test_graphs_that_are_kept_share_one_pool(pools: Pools) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    kept = [recorder.record(lambda: None) for _ in range(3)]
    assert len(pools.users) == 1
    assert len(kept) == 3


def test_work_that_is_cut_is_a_chain_of_graphs_with_calls_between_them(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(Graph, "replay", lambda graph: events.append("graph"))
    recorder = CudaRecorder(torch.device("cuda", 0))

    def work() -> str:
        assert recorder.cut(lambda: events.append("first wait"))
        assert recorder.cut(lambda: events.append("second wait"))
        return "result"

    replay, result = recorder.record(work)
    assert (result, events, len(pools.users)) == ("result", [], 1), "a capture runs nothing, one pool has all of it"
    replay()
    replay()
    assert events == 2 * ["graph", "first wait", "graph", "second wait", "graph"]
    assert not recorder.cut(lambda: events.append("nothing is recorded"))


def test_work_that_fails_after_a_cut_leaves_nothing_recorded(pools: Pools) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))

    def work() -> None:
        recorder.cut(lambda: None)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        recorder.record(work)
    assert not recorder.cut(lambda: None)
    assert not recorder.alive
    assert recorder.record(lambda: "later")[1] == "later"
