"""Jobs of a parallel sweep never work on the same GPU at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from sana_deploy.declare.spec import DeploySpec
from sana_deploy.facts.machine import Machine
from sana_deploy.run import gpu_locks as claims
from sana_deploy.run.gpu_locks import holding_gpus

Small = Callable[..., DeploySpec]
Describe = Callable[..., Machine]
MAP = "hardware.device_map={text_encoder: 0, vae: cpu, transformer: 2, controlnet: 2}"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], [0, 1, 2]),
        (["hardware.use=[1,2]"], [1, 2]),
        (["hardware=single_gpu"], [0, 1, 2]),
        (["hardware=single_gpu", "hardware.gpu=1"], [1]),
        (["hardware=custom_map", MAP], [0, 2]),
    ],
)
def test_it_wants_the_gpus_that_it_may_take(
    small: Small, machine: Describe, overrides: list[str], wanted: list[int]
) -> None:
    assert [gpu.index for gpu in machine(8, 8, 8).named(small(*overrides).hardware.gpu_indices)] == wanted


def holds_up(holder: DeploySpec, other: DeploySpec) -> bool:
    """Whether a job of `other` waits while one of `holder` works: it says so, or it works beside it."""
    settled, inside = threading.Event(), threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for GPU" in record.getMessage():
                settled.set()

    def job() -> None:
        with holding_gpus(other):
            inside.set()
            settled.set()

    listener, thread = Listener(), threading.Thread(target=job)
    claims.log.addHandler(listener)
    try:
        with holding_gpus(holder):
            thread.start()
            assert settled.wait(60), "the other job neither works nor says that it waits"
            waits = not inside.is_set()
        thread.join(60)
        assert inside.is_set(), "it goes on when the first has ended"
    finally:
        claims.log.removeHandler(listener)
    return waits


def test_jobs_on_one_gpu_take_turns_and_others_do_not_wait(
    small: Small, machine: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "probe", lambda: machine(8, 8))
    zero, one = (small("hardware=single_gpu", f"hardware.gpu={gpu}") for gpu in (0, 1))
    assert holds_up(zero, zero)
    assert not holds_up(zero, one)
    assert holds_up(small(), one), "the balanced one may take both"
    assert holds_up(one, small())
    planned, virtual = small("until=compile"), small("machine=2xt4")
    for free in (planned, virtual):
        assert not holds_up(free, free)
        assert not holds_up(zero, free)


def test_a_job_that_fails_gives_its_gpu_back(small: Small, machine: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "probe", lambda: machine(8))
    with pytest.raises(ValueError, match="failed"), holding_gpus(small()):
        raise ValueError("failed")
    assert not holds_up(small("until=compile"), small()), "another job gets it at once"
