"""Jobs of a parallel sweep never work on the same GPU at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from sana_deploy import claims
from sana_deploy.claims import claimed, gpus_wanted
from sana_deploy.machine import Machine
from sana_deploy.spec import DeploySpec

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
    assert [gpu.index for gpu in gpus_wanted(small(*overrides), machine(8, 8, 8))] == wanted


def longest_overlap(specs: list[DeploySpec]) -> int:
    """Hold what each spec wants in threads of their own; the most that held at once."""
    inside, most, lock = 0, 0, threading.Lock()

    def job(spec: DeploySpec) -> None:
        nonlocal inside, most
        with claimed(spec):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.3)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=job, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_jobs_on_one_gpu_take_turns_and_others_do_not_wait(
    small: Small, machine: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "probe", lambda: machine(8, 8))
    zero, one = (small("hardware=single_gpu", f"hardware.gpu={gpu}") for gpu in (0, 1))
    assert longest_overlap([zero, zero, zero]) == 1
    assert longest_overlap([zero, one]) == 2
    assert longest_overlap([small(), one]) == 1, "the balanced one may take both"
    planned = small("until=compile")
    assert longest_overlap([planned, planned]) == 2
    virtual = small("machine=2xt4")
    assert longest_overlap([virtual, virtual]) == 2


def test_a_job_that_fails_gives_its_gpu_back(small: Small, machine: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "probe", lambda: machine(8))
    with pytest.raises(ValueError, match="failed"), claimed(small()):
        raise ValueError("failed")
    assert longest_overlap([small()]) == 1
