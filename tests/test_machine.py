"""Probing GPUs: with a driver that is not there, and with one that answers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from sana_deploy._units import GIB
from sana_deploy.facts import machine


class Driver:
    """Answers the CUDA driver calls that probing makes, for two GPUs."""

    def cuInit(self, _: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = 2
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, out: Any, _: int, device: Any) -> int:  # noqa: N802
        out.value = f"Card {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, _: Any) -> int:  # noqa: N802
        out._obj.value = 24 * GIB
        return 0

    def cuDeviceGetUuid(self, out: Any, device: Any) -> int:  # noqa: N802
        out._obj[15] = device.value
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, _: Any) -> int:  # noqa: N802
        out._obj.value = {75: 8, 76: 9, 16: 128}[attribute]
        return 0


def test_gpus_are_described_by_the_driver_and_free_memory_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    second = "00000000-0000-0000-0000-000000000001"
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    monkeypatch.setattr(machine, "_free_by_uuid", lambda: {second: 3 * GIB + 5})
    gpus = machine._driver_gpus()
    assert [gpu.name for gpu in gpus] == ["Card 0", "Card 1"]
    assert [gpu.free_bytes for gpu in gpus] == [24 * GIB, 3 * GIB]
    assert gpus[1].capability == (8, 9)
    assert gpus[1].uuid == second


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine._driver_gpus() == ()


def test_an_empty_inventory_names_the_variable_that_may_hide_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in machine.Machine("present", (), 1).inventory()


def test_gpus_that_torch_cannot_use_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    monkeypatch.setattr(machine, "_free_by_uuid", dict)
    assert len(machine.probe().gpus) == 2
    for usable in (0, 1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda usable=usable: usable)
        assert len(machine.probe_torch().gpus) == usable


def test_probing_makes_no_cuda_context(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def made(*_: object) -> None:
        raise AssertionError("a CUDA context was made")

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    monkeypatch.setattr(machine, "_free_by_uuid", dict)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("mem_get_info", "get_device_properties", "init"):
        monkeypatch.setattr(torch.cuda, name, made)
    assert [gpu.free_bytes for gpu in machine.probe_torch().gpus] == [24 * GIB] * 2
