"""Graphs of components: what is captured, what is replayed, and when a call stays eager. A CPU has no CUDA graphs: here
a recording repeats the work itself, into the tensors that the first repetition made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from repeating import Repeating
from torch import nn

from sana_deploy.run.factor import Factor
from sana_deploy.run.graphed_forward import MOST_FORMS, GraphedForward
from sana_deploy.run.graphs import DeviceGraphs
from sana_deploy.run.recent import Recent


class Attention(nn.Module):
    """What a layer of attention is to whoever looks for changes: it has numbers, and a processor that has some."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.processor = 1.0, SimpleNamespace(gain=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = x * (self.scale * self.processor.gain)
        return scaled


class Net(nn.Module):
    """Two layers, called as a transformer is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.attention = nn.Linear(8, 8), nn.Linear(8, 8), Attention()

    def forward(self, x: torch.Tensor, *, timestep: torch.Tensor, scale: float = 1.0, extra: Any = None) -> Any:
        x = self.second(self.attention(torch.relu(self.first(x)))) * scale + timestep[:, None]
        return (x if extra is None else x + sum(extra),)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def recorder() -> Repeating:
    return Repeating()


@pytest.fixture
def graphs(recorder: Repeating) -> DeviceGraphs:
    return DeviceGraphs(recorder)


def graphed(
    net: nn.Module,
    graphs: DeviceGraphs,
    reasons: list[str] | None = None,
    lasting: bool = True,
    factors: tuple[str, ...] = (),
) -> Any:
    on_eager = (lambda reason: None) if reasons is None else reasons.append
    return GraphedForward("transformer", net, net.forward, graphs, on_eager, lasting, factors=factors)


def step(number: int, rows: int = 2) -> dict[str, Any]:
    """Arguments of one step; the timestep is one value that all rows share, as the pipeline gives it."""
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(number))
    return {"x": x, "timestep": torch.tensor(float(number)).expand(rows)}


def call(forward: Any, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        (result,) = forward(arguments.pop("x"), **arguments)
    assert isinstance(result, torch.Tensor)
    return result


def test_the_first_call_is_eager_the_second_captured_and_all_give_the_eager_bits(
    net: Net, graphs: DeviceGraphs, recorder: Repeating
) -> None:
    forward = graphed(net, graphs)
    results = [call(forward, **step(number)) for number in range(5)]
    assert (recorder.recorded, forward.replays) == (1, 4)
    for number, result in enumerate(results):
        assert torch.equal(result, call(net.forward, **step(number))), "kept results are not written over"


def test_each_form_has_its_graph_and_the_oldest_makes_room(net: Net, recorder: Repeating) -> None:
    graphs = DeviceGraphs(recorder, most=2)
    forward = graphed(net, graphs)
    for rows in (1, 1, 2, 2, 1, 3, 3):
        call(forward, **step(0, rows))
    assert [key[1][1][0] for key in graphs.graphs if isinstance(key, tuple)] == [(1, 8), (3, 8)], (
        "2 rows were used longest ago"
    )
    before = recorder.recorded
    assert torch.equal(call(forward, **step(9, 2)), call(net.forward, **step(9, 2)))
    assert recorder.recorded == before + 1


def test_a_constant_belongs_to_the_form(net: Net, graphs: DeviceGraphs) -> None:
    forward = graphed(net, graphs)
    for scale in (1.0, 1.0, 0.5, 0.5, 1.0):
        assert torch.equal(call(forward, **step(1), scale=scale), call(net.forward, **step(1), scale=scale))
    assert len(graphs.graphs) == 2


def test_a_graph_is_not_replayed_under_another_autocast(net: Net, graphs: DeviceGraphs) -> None:
    forward = graphed(net, graphs)
    for dtype in (None, torch.bfloat16):
        for number in range(3):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                assert torch.equal(call(forward, **step(number)), call(net.forward, **step(number)))
    assert len(graphs.graphs) == 2


def test_a_factor_is_read_from_memory_by_one_graph_for_all_numbers(
    net: Net, graphs: DeviceGraphs, recorder: Repeating
) -> None:
    forward = graphed(net, graphs, factors=("scale",))
    for number, scale in enumerate((1.0, 0.3, 0.7, 2, -0.0, float("inf"), 1.0)):
        exact = call(net.forward, **step(number), scale=scale)
        assert torch.equal(call(forward, **step(number), scale=scale), exact), scale
    assert (recorder.recorded, forward.replays, len(graphs.graphs)) == (1, 6, 1)
    for flag in (True, True):
        call(forward, **step(1), scale=flag)
    assert recorder.recorded == 2, "a flag is a constant"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_factor_gives_the_bits_of_its_number(dtype: torch.dtype) -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for number in (1.0, 0.3, 1 / 3, 1e-5, -0.0, 70000.0):
        factor = Factor(torch.empty(1, dtype=torch.float64), number)
        for product in (values * factor, factor * values):
            assert product.dtype == dtype
            assert torch.equal(product, values * number)
            assert torch.equal(torch.signbit(product), torch.signbit(values * number))


def test_a_factor_that_is_used_for_more_than_a_product_leaves_the_call_eager(graphs: DeviceGraphs) -> None:
    class Adding(Net):
        def forward(self, x: torch.Tensor, *, timestep: torch.Tensor, scale: float = 1.0, extra: Any = None) -> Any:
            return (self.first(x) + scale,)

    net, reasons = Adding().eval(), list[str]()
    forward = graphed(net, graphs, reasons, factors=("scale",))
    for number in range(3):
        assert torch.equal(call(forward, **step(number), scale=0.5), call(net.forward, **step(number), scale=0.5))
    assert len(reasons) == 2
    assert all(reason.startswith("its capture failed: unsupported operand") for reason in reasons)


def test_forms_that_were_seen_are_kept_for_a_while_only(net: Net, graphs: DeviceGraphs) -> None:
    forward = graphed(net, graphs)
    for number in range(2 * MOST_FORMS):
        call(forward, **step(1), scale=float(number))
    assert len(forward.seen) == MOST_FORMS
    assert not graphs.graphs
    recent: Recent[str, int] = Recent(2)
    for key, value in {"a": 1, "b": 2}.items():
        recent.put(key, value)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]


def test_the_result_of_one_graph_is_read_by_another_where_it_is(net: Net, graphs: DeviceGraphs) -> None:
    torch.manual_seed(1)
    other = Net().eval()
    residual, forward = graphed(other, graphs, lasting=False), graphed(net, graphs)
    for number in range(5):
        given = call(residual, **step(number))
        result = call(forward, **step(number), extra=(given,))
        exact = call(net.forward, **step(number), extra=(call(other.forward, **step(number)),))
        assert torch.equal(result, exact)
    graph = list(graphs.graphs.values())[-1]
    assert [own is None for own in graph.inputs] == [False, False, True]


def test_an_input_that_comes_again_is_copied_once_and_anew_when_it_was_written_to(
    net: Net, graphs: DeviceGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, same = graphed(net, graphs), torch.ones(2, 8)
    for number in range(3):
        call(forward, **step(number), extra=(same,))
    (graph,) = graphs.graphs.values()
    own = graph.inputs[-1]
    assert own is not None
    own.written.zero_()  # were it copied again, this would not show
    assert torch.equal(call(forward, **step(7), extra=(same,)), call(net.forward, **step(7), extra=(same * 0,)))
    same.add_(1)
    assert torch.equal(call(forward, **step(7), extra=(same,)), call(net.forward, **step(7), extra=(same,)))


CHANGES: dict[str, Callable[[Net], object]] = {
    "a layer": lambda net: setattr(net, "first", nn.Linear(8, 8)),
    "weights": lambda net: setattr(net.second, "weight", nn.Parameter(torch.ones(8, 8))),
    "memory": lambda net: setattr(net.second.weight, "data", torch.ones(8, 8)),
    "a hook": lambda net: net.first.register_forward_hook(lambda module, args, output: output * 2),
    "an adapter": lambda net: setattr(net.first, "scaling", {"style": 0.5}),
    "attention's scale": lambda net: setattr(net.attention, "scale", 2.0),
    "a number of its processor": lambda net: setattr(net.attention.processor, "gain", 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_changed_is_captured_anew(
    net: Net, graphs: DeviceGraphs, recorder: Repeating, change: str
) -> None:
    net.first.scaling = {"style": 1.0}  # type: ignore[assignment]
    forward = graphed(net, graphs)
    for number in range(3):
        call(forward, **step(number))
    CHANGES[change](net)
    for number in range(3):
        assert torch.equal(call(forward, **step(number)), call(net.forward, **step(number)))
    assert recorder.recorded == 2


def test_new_values_in_the_same_memory_need_no_new_graph(net: Net, graphs: DeviceGraphs, recorder: Repeating) -> None:
    forward = graphed(net, graphs)
    for number in range(3):
        call(forward, **step(number))
    with torch.no_grad():
        net.first.weight.mul_(2)
    assert torch.equal(call(forward, **step(4)), call(net.forward, **step(4)))
    assert recorder.recorded == 1


def test_a_capture_that_fails_leaves_the_call_eager_and_says_why_once_asked(
    net: Net, graphs: DeviceGraphs, recorder: Repeating
) -> None:
    reasons: list[str] = []
    forward, recorder.failing = graphed(net, graphs, reasons), True
    for number in range(4):
        assert torch.equal(call(forward, **step(number)), call(net.forward, **step(number)))
    assert set(reasons) == {"its capture failed: operation not permitted when stream is capturing"}
    assert (forward.replays, len(reasons)) == (0, 3)


def test_calls_that_no_graph_can_take_are_eager_with_the_reason(net: Net, graphs: DeviceGraphs) -> None:
    reasons: list[str] = []
    forward = graphed(net, graphs, reasons)
    arguments = step(0)
    forward(arguments["x"], timestep=arguments["timestep"])  # gradients
    call(forward, **step(0), extra=[object_tensor()])
    net.train()
    call(forward, **step(0))
    assert reasons == [
        "gradients are recorded", "an argument is a Lazy", "the module is in training mode",
    ]  # fmt: skip
    assert not graphs.graphs


class Lazy:
    """Not a tensor, and no constant."""

    def __radd__(self, other: Any) -> Any:
        return other


def object_tensor() -> Lazy:
    return Lazy()


def test_results_that_someone_has_not_used_yet_are_not_written_over_by_another_one(
    net: Net, graphs: DeviceGraphs, recorder: Repeating
) -> None:
    class Caller:
        """A request."""

    callers, reasons = [Caller(), Caller()], list[str]()
    now = callers[0]
    forward = GraphedForward("controlnet", net, net.forward, graphs, reasons.append, lasting=False, caller=lambda: now)
    reader = graphed(Net().eval(), graphs)
    for number in range(3):
        kept = call(forward, **step(number))
    now = callers[1]
    other = call(forward, **step(7))
    assert reasons == ["another request had not used its results yet"]
    assert torch.equal(other, call(net.forward, **step(7)))
    assert torch.equal(kept, call(net.forward, **step(2))), "the first one's result is as it was"
    call(reader, **step(2), extra=(kept,))
    call(forward, **step(8))
    assert len(reasons) == 1, "it was used, and the graph is free again"
    now = callers[0]
    callers.pop()
    call(forward, **step(9))
    assert len(reasons) == 1, "whoever had it is gone"
