"""A ControlNet that works beside the transformer on another GPU: the bits of eager, whatever happens to residuals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from taped import LateCourier, TapedHost, TapeRecorder

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.errors import RunError
from sana_deploy.run.arriving_tensor import ArrivingTensor
from sana_deploy.run.generate import run_request
from sana_deploy.run.graphs import DeviceGraphs
from sana_deploy.run.hook import border_of
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import unplace
from sana_deploy.run.request_state import RequestState
from sana_deploy.run.residual_stream import ResidualStream

Small = Callable[..., DeploySpec]
SPREAD = ["machine=virtual", "machine.gpus=2xrtx4090", "hardware=custom_map", "precision=fp32", "workload.steps=5",
          "hardware.device_map={text_encoder: 0, vae: 0, transformer: 0, controlnet: 1}"]  # fmt: skip
CPU = torch.device("cpu")


@dataclass
class Placed:
    """A pipeline on two virtual GPUs."""

    pipeline: DiffusionPipeline
    host: TapedHost
    spec: DeploySpec

    def draw(self, state: RequestState | None = None, **request: Any) -> bytes:
        workload = self.spec.workload
        changed = workload.request.model_copy(update=request)
        with self.host:
            pixels, _ = run_request(self.pipeline, workload.bounds, changed, state=state)
        assert isinstance(pixels, torch.Tensor)
        return pixels.cpu().float().numpy().tobytes()


@pytest.fixture
def placed(small: Small, short_prompts: None) -> Callable[..., Placed]:
    def make(*more: str) -> Placed:
        spec, host = small(*SPREAD, *more), TapedHost(2)
        return Placed(load_pipeline(compile_spec(spec).resolve(), host=host), host, spec)

    return make


@pytest.fixture
def eager(placed: Callable[..., Placed]) -> Placed:
    return placed("runtime=eager")


@pytest.fixture
def streaming(placed: Callable[..., Placed]) -> Placed:
    return placed("runtime=graphs")


def test_the_transformer_s_graph_waits_for_each_residual_where_it_reads_it(streaming: Placed, eager: Placed) -> None:
    state = RequestState()
    assert streaming.draw(state) == eager.draw()
    assert state.eager_sentences() == []
    net, home = (streaming.host.recorders[torch.device("vgpu", i)].tapes for i in (1, 0))
    count = len(streaming.pipeline.controlnet.controlnet_blocks)
    # The text encoder's graph is the first at home, and whole.
    assert [[len(tape.segments) for tape in tapes] for tapes in (net, home)] == [[count], [1, count + 1]]
    assert all(size for tape in (*net, *home) for size in tape.segments), "no graph is empty"
    replayed = streaming.host.late.events[-(2 * count) :]
    made, waits = ([f"{event} {i}" for i in range(count)] for event in ("made", "wait"))
    assert replayed == [*made[:-1], "sent early", *waits]
    assert streaming.draw(prompt="another") == eager.draw(prompt="another"), "which finds the graphs"
    assert [len(tapes) for tapes in (net, home)] == [1, 4], "and captures the VAE's calls"


def test_residuals_are_counted_as_those_that_are_copied(streaming: Placed, eager: Placed) -> None:
    moved = []
    for one in (streaming, eager):
        one.draw(state := RequestState())
        moved.append(state.traffic.moved)
    assert moved[0] == moved[1]
    assert any(name == "controlnet_block_samples" for *_, name in moved[0])


def test_residuals_come_to_the_same_memory_in_every_step(streaming: Placed) -> None:
    seen: list[list[ArrivingTensor]] = []
    forward = streaming.pipeline.transformer.forward

    def watched(*args: Any, controlnet_block_samples: Any, **kwargs: Any) -> Any:
        seen.append(list(controlnet_block_samples))
        return forward(*args, controlnet_block_samples=controlnet_block_samples, **kwargs)

    streaming.pipeline.transformer.forward = watched
    streaming.draw()
    assert all(isinstance(one, ArrivingTensor) for one in seen[-1])
    assert {id(one.buffer) for one in seen[0]} == {id(one.buffer) for one in seen[-1]}
    with pytest.raises(RunError, match="asked for after the next call had overwritten them"):
        seen[0][0].arrived()


@pytest.mark.parametrize("change", [lambda one: one * 2, lambda one: one.mul_(2), lambda one: one.to(torch.float64)])
def test_residuals_that_the_caller_changes_are_those_that_count(
    streaming: Placed, eager: Placed, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for one in (streaming, eager):
        forward = one.pipeline.transformer.forward

        def changed(*args: Any, _inner: Any = forward, controlnet_block_samples: Any, **kwargs: Any) -> Any:
            samples = tuple(change(sample).to(torch.float32) for sample in controlnet_block_samples)
            return _inner(*args, controlnet_block_samples=samples, **kwargs)

        one.pipeline.transformer.forward = changed
    assert streaming.draw() == eager.draw()


def test_a_request_that_is_given_up_between_both_calls_leaves_the_next_one_right(
    streaming: Placed, eager: Placed
) -> None:
    streaming.draw()
    forward = streaming.pipeline.transformer.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("given up")

    streaming.pipeline.transformer.forward = failing
    with pytest.raises(KeyError):
        streaming.draw(prompt="other")
    streaming.pipeline.transformer.forward = forward
    assert streaming.draw() == eager.draw()


def test_lora_on_the_controlnet_is_in_its_residuals(streaming: Placed, eager: Placed) -> None:
    peft = pytest.importorskip("peft")
    plain = streaming.draw()
    for one in (streaming, eager):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=2, lora_alpha=2, target_modules=r".*(to_q|controlnet_blocks\.\d)", init_lora_weights=False
        )
        with one.host:
            one.pipeline.controlnet.add_adapter(config, "style")
    assert streaming.draw() == eager.draw() != plain
    assert streaming.host.late.events[-3:].count("sent early") == 1


def test_taking_the_placement_off_gives_memory_and_methods_back(streaming: Placed) -> None:
    streaming.draw()
    graphs = [one for one in border_of(streaming.pipeline).graphs.values() if one]
    with streaming.host:
        unplace(streaming.pipeline)
    assert not any(one.graphs for one in graphs)
    for name in ("transformer", "controlnet"):
        module = getattr(streaming.pipeline, name)
        assert module.forward.__func__ is type(module).forward


def test_components_of_two_dtypes_send_residuals_as_ever(placed: Callable[..., Placed]) -> None:
    mixed = [f"precision.components.{name}=float32" for name in ("text_encoder", "vae", "transformer")]
    one, plain = (
        placed(*mixed, "precision.components.controlnet=bfloat16", f"runtime={mode}") for mode in ("graphs", "eager")
    )
    assert one.draw() == plain.draw()
    assert one.host.late.events == []


class TestStream:
    """A stream by itself, on the CPU."""

    @pytest.fixture
    def state(self) -> RequestState:
        return RequestState()

    @pytest.fixture
    def stream(self, state: RequestState) -> ResidualStream:
        graphs = DeviceGraphs(TapeRecorder())
        return ResidualStream("residuals", CPU, graphs, LateCourier(), lambda: self.asking or state)

    asking: RequestState | None = None

    @staticmethod
    def made(rows: int = 2) -> tuple[list[torch.Tensor]]:
        return ([torch.full((rows, 3), float(i)) for i in range(3)],)

    def test_what_reads_waits_and_what_changes_or_looks_at_a_part_copies(self, stream: ResidualStream) -> None:
        ((first, second, third),) = stream.send(self.made())
        assert isinstance(stream.courier, LateCourier)
        assert stream.courier.events == ["sent whole"]
        assert torch.equal(second + 1, torch.full((2, 3), 2.0))
        assert stream.courier.events == ["sent whole", "wait 1"]
        row = third[0]
        assert first.add_(5) is first
        stream.send(self.made())
        assert torch.equal(row, torch.full((3,), 2.0)), "a part that was kept is not written over"
        assert torch.equal(first + 0, torch.full((2, 3), 5.0))
        with pytest.raises(RunError, match="overwritten") as caught:
            second + 1
        assert "clone them before the next call" in str(caught.value.hint)

    def test_no_one_else_is_sent_to_the_memory_until_residuals_were_taken(self, stream: ResidualStream) -> None:
        (mine,) = stream.send(self.made())
        self.asking = RequestState()
        (theirs,) = stream.send(self.made())
        assert not any(isinstance(one, ArrivingTensor) for one in theirs)
        assert torch.equal(mine[2] + 0, torch.full((2, 3), 2.0))
        stream.graphs.release(mine)
        (later,) = stream.send(self.made())
        assert all(isinstance(one, ArrivingTensor) for one in later)

    def test_all_forms_share_the_memory_of_the_largest(self, stream: ResidualStream) -> None:
        kept: list[torch.Tensor] = []

        def memory(rows: int) -> set[int]:
            (sent,) = stream.send(self.made(rows))
            kept.extend(one.buffer for one in sent)
            return {one.buffer.untyped_storage().data_ptr() for one in sent}

        small, large = memory(2), memory(4)
        assert small != large
        assert memory(2) == large == memory(4), "the larger one serves both"

    @pytest.mark.parametrize("odd", ["gradients", "strides", "nothing"])
    def test_what_cannot_be_sent_so_is_moved_as_ever(self, stream: ResidualStream, odd: str) -> None:
        tensors: list[torch.Tensor | None] = {
            "gradients": [torch.ones(2, requires_grad=True) * 2],
            "strides": [torch.ones(2, 3).T],
            "nothing": [None],
        }[odd]  # type: ignore[assignment]
        (sent,) = stream.send((tensors,))
        assert all(one is other for one, other in zip(sent, tensors, strict=True))
