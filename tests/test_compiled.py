"""Compiled calls of one module: what is compiled, how often, and what happens where compiling fails.

`eager` is a backend of `torch.compile` that traces as Inductor does and runs PyTorch's own kernels: bits are equal.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sana_deploy.run import compiled
from sana_deploy.run.compiled import CompiledCalls, Compiling


class Block(nn.Module):
    """Of a class that is not PyTorch's own: those are not compiled by themselves."""

    def __init__(self, outputs: int = 4, bent: Any = nn.functional.gelu) -> None:
        super().__init__()
        self.linear, self.bent = nn.Linear(4, outputs), bent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.bent(self.linear(x))
        return y


class Component(nn.Module):
    """Three blocks that are alike, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = Block(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


class Failing:
    """A backend that gives up at one of the graphs that it gets, counted from 1."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise NotImplementedError("no kernel for this\nand more")
        return graph.forward


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def component() -> Component:
    return Component()


def calls_of(component: Component, most_graphs: int = 8, backend: str = "eager") -> CompiledCalls:
    return CompiledCalls("component", component, ("blocks", "head"), backend, most_graphs, Compiling)


def called(calls: CompiledCalls, rows: int) -> tuple[torch.Tensor, Compiling]:
    """The component's result for so many rows, and what was compiled for it."""
    compiling = Compiling()
    calls.compiling = lambda: compiling
    return calls.around(calls.module.forward)(given(rows)), compiling


def given(rows: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * rows).reshape(rows, 4)


def test_blocks_that_are_alike_are_compiled_once_and_the_first_call_is_timed(component: Component) -> None:
    pieces: list[Any] = []
    calls, expected = calls_of(component), component(given(2))
    compiling = Compiling(on_start=pieces.append)
    calls.compiling = lambda: compiling
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    assert torch.equal(calls.around(component.forward)(given(2)), expected)
    assert pieces == ["component"], "said once a call"
    assert graphs["unique_graphs"] - before == 2, "a block, and the head"
    assert 0 < compiling.seconds < 60
    again, later = called(calls, 2)
    assert torch.equal(again, expected)
    assert (later.seconds, later.sentences()) == (0, [])


def test_more_shapes_are_compiled_than_pytorch_would(component: Component) -> None:
    limit, calls, plain = torch._dynamo.config.recompile_limit, calls_of(component), Component()
    assert limit < 12
    for rows in range(1, 13):
        result, compiling = called(calls, rows)
        assert torch.equal(result, plain(given(rows)))
        assert compiling.seconds > 0, rows
        assert not compiling.sentences()
    assert torch._dynamo.config.recompile_limit == limit, "as it was for everybody else"


def test_beyond_its_own_limit_new_shapes_run_uncompiled_and_known_ones_do_not(
    component: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "VARIANTS_PER_GRAPH", 2)
    calls, plain = calls_of(component, most_graphs=2), Component()
    said = {}
    for turn, rows in enumerate((1, 2, 3, 4, 5, 1, 5)):
        result, compiling = called(calls, rows)
        assert torch.equal(result, plain(given(rows)))
        said[turn] = compiling.sentences()
    full = ["the component ran uncompiled: 4 variants of compiled code are kept already"]
    assert (said[0], said[4], said[5], said[6]) == ([], full, [], full)
    assert not calls.failed


def test_where_compiling_fails_all_of_the_component_is_as_it_was(
    component: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_backend", functools.cache(lambda _: Failing(2)))  # at the head
    calls, expected = calls_of(component), component(given(2))
    for rows in (2, 2, 3):
        result, compiling = called(calls, rows)
        assert compiling.sentences() == ["the component ran uncompiled: compiling failed: no kernel for this"]
        assert rows == 3 or torch.equal(result, expected)
    assert not any("_compiled_call_impl" in vars(layer) for layer in component.modules())


def test_a_block_that_cannot_be_traced_whole_is_no_silent_break(component: Component) -> None:
    component.blocks[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    expected = component(given(2))
    result, compiling = called(calls_of(component), 2)
    assert torch.equal(result, expected)
    (sentence,) = compiling.sentences()
    assert sentence.startswith("the component ran uncompiled: compiling failed: ")


def test_blocks_that_pytorch_does_not_compile_are_no_failure_of_the_request(component: Component) -> None:
    component.blocks[0] = nn.Sequential(nn.Linear(4, 4))
    expected = component(given(2))
    result, compiling = called(calls_of(component), 2)
    assert torch.equal(result, expected)
    (sentence,) = compiling.sentences()
    assert sentence.startswith("the component ran uncompiled: compiling failed: ")


def test_a_compiler_that_fails_in_a_capture_refuses_the_graph(
    component: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_backend", functools.cache(lambda _: Failing(1)))
    monkeypatch.setattr(compiled, "_capturing", lambda: True)
    calls = calls_of(component)
    with pytest.raises(RuntimeError, match=r"^compiling failed: no kernel for this$"):
        called(calls, 2)
    assert not calls.failed, "it is tried again outside of it"


def test_an_error_of_the_call_itself_is_not_the_compiler_s(component: Component) -> None:
    calls = calls_of(component)

    for kind in (torch.OutOfMemoryError, ValueError):
        turns: list[int] = []

        def failing(kind: type[Exception] = kind, turns: list[int] = turns) -> None:
            turns.append(1)
            raise kind("full")

        with pytest.raises(kind, match="full"):
            calls.run(failing)
        assert not calls.failed
        assert len(turns) == (1 if kind is torch.OutOfMemoryError else 2), "again, without the compiler"


def test_what_was_compiled_before_stays_and_what_is_exchanged_is_compiled_too(component: Component) -> None:
    component.head.compile(backend="eager")
    own, calls = component.head._compiled_call_impl, calls_of(component)
    called(calls, 2)
    assert calls.blocks == list(component.blocks)
    component.blocks[1] = Block(bent=torch.tanh)
    result, compiling = called(calls, 2)
    assert compiling.seconds > 0
    assert len(calls.blocks) == 4
    calls.undo()
    assert vars(component.head).pop("_compiled_call_impl") is own
    assert torch.equal(result, component(given(2)))
    assert not any("_compiled_call_impl" in vars(layer) for layer in component.blocks.modules())


def test_threads_note_their_own_compiling(component: Component) -> None:
    calls, local = calls_of(component), threading.local()
    found: dict[int, Compiling] = {}
    calls.compiling = lambda: local.compiling

    def call(rows: int) -> None:
        local.compiling = found[rows] = Compiling()
        with torch.no_grad():
            calls.around(component.forward)(given(rows))

    call(1)
    threads = [threading.Thread(target=call, args=(rows,)) for rows in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1].seconds == 0
    assert found[2].seconds > 0
    assert found[3].seconds > 0


def test_inductor_s_cache_is_in_the_cache_folder_unless_the_user_chose_one(
    component: Component, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    calls_of(component, backend="inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    calls_of(component, backend="inductor")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "inductor")
