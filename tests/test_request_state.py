"""Calls of one pipeline in several threads: each gathers its own bytes, remarks and failure, and nothing of others.

Threads take turns at the components of one border, so that every run interleaves them alike. The second device is
torch's `meta`, the one other device type that a CPU build has.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sana_deploy.declare.hardware import OnDecodeOom
from sana_deploy.declare.workload import Request, Workload
from sana_deploy.errors import RunError
from sana_deploy.run.border import Border
from sana_deploy.run.generate import run_request
from sana_deploy.run.hook import attach
from sana_deploy.run.request_state import MOST_REMARKS, OnInputs, RequestState

META = torch.device("meta")
LARGE, LITTLE = 2048, 64


class Turns:
    """Lets threads work one at a time, in the order of names that is given; `take` waits for the caller's next turn."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order, self.holder, self.changed = list(order), "", threading.Condition()

    def take(self) -> None:
        me = threading.current_thread().name
        with self.changed:
            self.end()
            assert self.changed.wait_for(lambda: not self.holder and self.order[:1] == [me], 30), self.order
            self.holder = self.order.pop(0)

    def end(self) -> None:
        with self.changed:
            if self.holder == threading.current_thread().name:
                self.holder = ""
                self.changed.notify_all()

    def run(self, work: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """What each thread's work returned, or raised."""
        ended: dict[str, Any] = {}

        def job(name: str) -> None:
            self.take()
            try:
                ended[name] = work[name]()
            except Exception as problem:
                ended[name] = problem
            finally:
                self.end()

        threads = [threading.Thread(target=job, args=(name,), name=name) for name in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not self.order, "every turn was taken"
        return ended


class Denoiser(nn.Module):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2


class Decoder(nn.Module):
    """Runs out of memory with large latents, unless it takes them in tiles."""

    use_slicing = use_tiling = False

    def enable_slicing(self) -> None:
        self.use_slicing = True

    def enable_tiling(self, *_: int) -> None:
        self.use_tiling = True

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        if latents.shape[-1] * 32 > 1024 and not self.use_tiling:
            raise torch.OutOfMemoryError("tried to allocate")
        return latents


class Pipeline:
    """Calls its components as diffusers' pipeline does, which swallows a decoder's OutOfMemoryError; has no scheduler.

    A thread waits for its turn before each component, and where memory ran out.
    """

    hf_device_map = {"transformer": "meta", "vae": "meta"}  # noqa: RUF012

    def __init__(self, turns: Turns, on_decode_oom: OnDecodeOom = "raise") -> None:
        self.turns, self.transformer, self.vae = turns, Denoiser(), Decoder()
        self.border = Border(home=META, on_decode_oom=on_decode_oom)
        self.border.observers.append(lambda event, place: turns.take() if event == "enter" else None)
        for name in self.hf_device_map:
            attach(getattr(self, name), name, META, self.border)

    def set_progress_bar_config(self, disable: bool) -> None:
        pass

    def __call__(
        self, height: int, num_inference_steps: int, callback_on_step_end: Callable[..., Any], **_: Any
    ) -> Any:
        embeds = torch.zeros(7)
        for step in range(num_inference_steps):
            self.transformer(torch.zeros(height), encoder_hidden_states=embeds)
            callback_on_step_end(self, step, None, {})
        try:
            image = self.vae.decode(torch.zeros(height // 32))
        except torch.OutOfMemoryError:
            self.turns.take()
        return SimpleNamespace(images=image)

    def work(self, height: int, state: RequestState) -> Callable[[], Any]:
        """A request of two steps."""
        workload = Workload(height=height, width=64, steps=2, guided=False)
        request = Request(prompt="a lighthouse", guidance_scale=1.0)
        return lambda: run_request(self, workload, request, state=state)


def test_two_threads_in_turns_count_the_bytes_of_their_own_steps() -> None:
    turns = Turns(["one", "two"] * 4)  # start, two steps and decode of each
    pipeline, states = Pipeline(turns), {"one": RequestState(), "two": RequestState()}
    ended = turns.run({"one": pipeline.work(64, states["one"]), "two": pipeline.work(96, states["two"])})
    for name, height in (("one", 64), ("two", 96)):
        _, per_step = ended[name]
        assert per_step == Counter({("cpu", "meta", "hidden_states"): 4 * height})
        assert states[name].traffic.moved == {
            ("cpu", "meta", "hidden_states"): 2 * 4 * height,
            ("cpu", "meta", "encoder_hidden_states"): 4 * 7,  # crosses once in each call, whoever comes between
            ("cpu", "meta", "latents"): 4 * height // 32,
        }


def test_a_failure_is_of_the_call_that_ran_out_of_memory() -> None:
    turns = Turns(["one"] * 4 + ["two"] * 4 + ["one"])  # the second call runs whole once memory ran out in the first
    pipeline, states = Pipeline(turns), {"one": RequestState(), "two": RequestState()}
    ended = turns.run({"one": pipeline.work(LARGE, states["one"]), "two": pipeline.work(LITTLE, states["two"])})
    assert isinstance(ended["one"], RunError)
    assert "out of memory on meta, in vae during decode (tried to allocate)" in str(ended["one"])
    assert not isinstance(ended["two"], Exception)
    assert (states["one"].failure, states["two"].failure) == ("tried to allocate", None)


def test_the_component_that_failed_is_that_of_the_call() -> None:
    turns = Turns(["one"] * 4 + ["two"] * 2 + ["one"] + ["two"] * 2)  # the second call denoises when the first fails
    pipeline = Pipeline(turns)
    ended = turns.run({"one": pipeline.work(LARGE, RequestState()), "two": pipeline.work(LITTLE, RequestState())})
    assert ended["one"].facts["component"] == "vae"
    assert not isinstance(ended["two"], Exception)


def test_a_remark_is_of_the_call_that_was_decoded_in_tiles() -> None:
    turns = Turns(["one", "two"] * 4)
    pipeline, states = Pipeline(turns, "tile"), {"one": RequestState(), "two": RequestState()}
    turns.run({"one": pipeline.work(LARGE, states["one"]), "two": pipeline.work(LITTLE, states["two"])})
    bands, tiles = states["one"].remarks
    assert "decoded again in 16 bands" in bands
    assert "decoded again in tiles of 1024 px" in tiles
    assert states["two"].remarks == []


def test_what_listens_to_one_call_hears_nothing_of_others() -> None:
    turns = Turns(["one", "two"] * 4)
    pipeline, states = Pipeline(turns), {"one": RequestState(), "two": RequestState()}
    heard: dict[str, list[Any]] = {"one": [], "two": []}

    def listener(name: str) -> OnInputs:
        return lambda component, method, args, kwargs: heard[name].append(args[0].numel())

    for name, state in states.items():
        state.on_inputs.append(listener(name))
    turns.run({"one": pipeline.work(64, states["one"]), "two": pipeline.work(96, states["two"])})
    assert heard == {"one": [64, 64, 2], "two": [96, 96, 3]}


def test_a_call_outside_of_a_request_has_its_threads_own_state_which_ends_with_the_thread() -> None:
    border, module = Border(home=META), Denoiser()
    attach(module, "transformer", META, border)

    def call(size: int) -> tuple[dict[Any, int], weakref.ref[RequestState]]:
        module(torch.zeros(size), encoder_hidden_states=torch.zeros(size))
        return dict(border.state.traffic.moved), weakref.ref(border.state)

    mine = call(3)[0]
    with ThreadPoolExecutor(1) as other:
        theirs, state = other.submit(call, 5).result()
        assert state() is not None
    assert theirs[("cpu", "meta", "hidden_states")] == 20
    assert mine == dict(border.state.traffic.moved)
    assert not border.state.kept, "the copy goes with the argument"
    gc.collect()
    assert state() is None


def test_a_request_leaves_a_threads_own_state_alone_and_keeps_no_tensors() -> None:
    border, module, state = Border(home=META), Denoiser(), RequestState()
    attach(module, "transformer", META, border)
    embeds = torch.zeros(3)
    with border.states.opened(state), border.states.opened(inner := RequestState()):
        module(torch.zeros(3), encoder_hidden_states=embeds)
        assert inner.kept
    assert not inner.kept
    assert inner.traffic.moved
    assert not state.traffic.moved
    assert not border.state.traffic.moved


def test_remarks_are_bounded() -> None:
    state = RequestState()
    for number in range(MOST_REMARKS + 5):
        state.remark(str(number))
    assert state.remarks[0] == "5"
    assert len(state.remarks) == MOST_REMARKS


@pytest.mark.parametrize("attribute", ["traffic", "remarks", "failure", "inside", "copies"])
def test_the_shared_border_holds_nothing_of_a_call(attribute: str) -> None:
    assert not hasattr(Border(home=META), attribute)
