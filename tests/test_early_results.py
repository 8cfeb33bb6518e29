"""A ControlNet whose residuals are made right after their blocks: by itself, and with what a request computes once."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from taped import LateCourier, TapeRecorder
from test_compiled import Failing
from torch import nn

from sana_deploy.declare.pipelines import DEFAULT, LayeredResults
from sana_deploy.facts.tiny import ensure_tiny
from sana_deploy.run import compiled
from sana_deploy.run.compiled import CompiledCalls, Compiling
from sana_deploy.run.early_results import EarlyResults
from sana_deploy.run.graphed_forward import GraphedForward
from sana_deploy.run.graphs import DeviceGraphs
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.residual_stream import ResidualStream
from sana_deploy.run.step_invariants import StepInvariants


@pytest.fixture
def net(tiny: Path) -> Iterator[SanaControlNetModel]:
    net = SanaControlNetModel.from_pretrained(str(ensure_tiny() / "controlnet")).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in net.parameters():
            value.normal_(std=0.2)
        yield net


def arguments_of(net: SanaControlNetModel, seed: int = 1) -> dict[str, Any]:
    shape, made = (2, net.config.in_channels, 2, 3), torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(shape, generator=made),
        "controlnet_cond": torch.randn(shape, generator=made),
        "encoder_hidden_states": torch.randn(2, 7, net.config.caption_channels, generator=made),
        "timestep": torch.ones(2),
        "conditioning_scale": 0.7,
    }


def early_of(net: Any, made: Callable[[int], object], recorded: bool = False, **other: str) -> EarlyResults:
    layered = DEFAULT.by_name["controlnet"].layered
    assert layered is not None
    names = {"blocks": layered.blocks, "projections": layered.projections, "scale": layered.scale, **other}
    return EarlyResults(net, net.forward, LayeredResults(**names), lambda number: (made(number), recorded)[1])


@pytest.mark.parametrize("return_dict", [True, False])
def test_results_have_the_bits_and_the_form_of_the_forward_s(net: SanaControlNetModel, return_dict: bool) -> None:
    order: list[str] = []
    net.transformer_blocks[1].register_forward_pre_hook(lambda *_: order.append("second block"))
    early = early_of(net, lambda number: order.append(f"made {number}"))
    blocks, arguments = list(net.transformer_blocks), arguments_of(net)
    found = early(**arguments, return_dict=return_dict)
    assert order == ["made 0", "second block"]
    assert list(net.transformer_blocks) == blocks
    expected = net(**arguments, return_dict=return_dict)
    assert type(found) is type(expected)
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
    assert found[0][0].abs().max() > 0
    assert early.problem is None


@pytest.mark.parametrize("recorded", [True, False])
def test_only_results_of_recorded_work_say_when_they_are_made_again(net: SanaControlNetModel, recorded: bool) -> None:
    early = early_of(net, lambda number: None, recorded)
    results = early(**arguments_of(net), return_dict=False)[0]
    assert [early.says_when(one) for one in results] == [recorded] * len(results)
    assert not any(early.says_when(one.clone()) for one in results)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_blocks_are_compiled_where_they_belong(
    net: SanaControlNetModel, failing: int, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`failing` is the piece that the compiler gives up at, counted from 1."""
    monkeypatch.setattr(compiled, "_backend", functools.cache(lambda _: Failing(failing)))
    torch._dynamo.reset()
    said, made = Compiling(), list[int]()
    calls = CompiledCalls("controlnet", net, ("transformer_blocks",), "eager", 8, lambda: said)
    forward, graphs = calls.around(net.forward), DeviceGraphs(TapeRecorder())
    invariants = StepInvariants(net, DEFAULT.by_name["controlnet"].chains, forward) if once else None
    eager = invariants.eager if invariants else forward
    source = GraphedForward("controlnet", net, eager, graphs, invariants=invariants)
    stream = ResidualStream("residuals", torch.device("cpu"), source.graphs, LateCourier(), RequestState)
    plain, arguments = net.forward, arguments_of(net)
    layered = DEFAULT.by_name["controlnet"].layered
    assert layered is not None
    stream.make_early(source, layered)
    assert stream.early is not None

    def note(number: int) -> bool:
        made.append(number)
        return False

    monkeypatch.setattr(stream.early, "on_made", note)
    found, expected = (forward(**arguments, return_dict=False)[0] for forward in (source.forward, plain))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert made == [0], "said after each block but the last"
    assert stream.early.problem is None
    assert len(calls.blocks) == (0 if failing else len(net.transformer_blocks))
    assert len(said.sentences()) == failing
    stream.restore()
    assert source.forward(**arguments, return_dict=False)[0][0].equal(expected[0])
    assert made == [0]


def test_a_forward_that_is_unlike_its_description_runs_as_it_is(net: SanaControlNetModel) -> None:
    class Other(SanaControlNetModel):  # type: ignore[misc]
        def forward(self, *args: Any, conditioning_scale: float = 1.0, **kwargs: Any) -> Any:
            return super().forward(*args, conditioning_scale=2 * conditioning_scale, **kwargs)

    net.__class__ = Other
    early = early_of(net, lambda number: None)
    arguments = arguments_of(net)
    found, expected = (forward(**arguments, return_dict=False)[0] for forward in (early, net))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert early.problem == "the forward scales results by something else than its argument"


def test_a_call_that_fails_fails_as_ever_and_leaves_the_layers(net: SanaControlNetModel) -> None:
    blocks = list(net.transformer_blocks)
    early = early_of(net, lambda number: None)
    with pytest.raises(RuntimeError, match="to have 32 channels"):
        early(**{**arguments_of(net), "controlnet_cond": torch.ones(2, 1, 2, 3)})
    assert list(net.transformer_blocks) == blocks
    assert early.problem is None


class TestInGraphs:
    """Both components of a step in recorded work of their own, on the CPU, with values in every tensor."""

    CPU, STEPS = torch.device("cpu"), 4

    @pytest.fixture
    def transformer(self, tiny: Path) -> nn.Module:
        made: nn.Module = SanaTransformer2DModel.from_pretrained(str(ensure_tiny() / "transformer")).eval()
        return made

    @staticmethod
    def graphed(module: nn.Module, name: str, recorder: TapeRecorder, caller: Callable[[], object]) -> GraphedForward:
        part = DEFAULT.by_name[name]
        once, factors = StepInvariants(module, part.chains, module.forward), part.call("forward").factors
        graphs = DeviceGraphs(recorder)
        return GraphedForward(name, module, once.eager, graphs, factors=factors, invariants=once, caller=caller)

    def test_each_step_sends_its_own_residuals_and_what_a_request_computes_once_is_its_own(
        self, net: SanaControlNetModel, transformer: nn.Module
    ) -> None:
        state, courier = RequestState(), LateCourier()
        plain_net, plain_transformer = copy.deepcopy((net, transformer))
        counts: Counter[str] = Counter()
        for name, module in {"the ControlNet": net, "the transformer": transformer}.items():
            module.caption_projection.linear_1.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
        recorders = TapeRecorder(), TapeRecorder()
        source = self.graphed(net, "controlnet", recorders[0], lambda: state)
        reader = self.graphed(transformer, "transformer", recorders[1], lambda: state)
        stream = ResidualStream("residuals", self.CPU, reader.graphs, courier, lambda: state)
        layered = DEFAULT.by_name["controlnet"].layered
        assert layered is not None
        stream.make_early(source, layered)
        for number, scale in enumerate((0.7, 0.3)):
            told = arguments_of(net, seed=number)
            told["conditioning_scale"] = scale
            for step in range(self.STEPS):
                told["hidden_states"] = torch.randn(told["hidden_states"].shape)
                told["timestep"] = torch.full((2,), 900.0 - 100 * step)
                shared = {name: told[name] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
                residuals = stream.send(source(**told, return_dict=False))[0]
                found = reader(**shared, controlnet_block_samples=tuple(residuals), return_dict=False)[0]
                made = plain_net(**told, return_dict=False)[0]
                expected = plain_transformer(**shared, controlnet_block_samples=tuple(made), return_dict=False)[0]
                assert all(torch.equal(one.buffer, other) for one, other in zip(residuals, made, strict=True))
                assert torch.equal(found, expected)
        assert [len(one.tapes) for one in recorders] == [1, 1]
        count = len(net.controlnet_blocks)
        assert courier.events[-2 * count :] == [
            *[f"made {i}" for i in range(count - 1)], "sent early", *[f"wait {i}" for i in range(count)]
        ]  # fmt: skip
        # The first request computes it in its eager step and for the graph, the second one writes it where graphs read.
        assert counts == {"the ControlNet": 3, "the transformer": 3}
