"""Virtual GPUs behave as CUDA's do: no mixed devices, bounded memory, every byte and crossing counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from sana_deploy.declare.spec import Fidelity
from sana_deploy.errors import RunError
from sana_deploy.rehearsal.host import VirtualHost
from sana_deploy.rehearsal.virtual import SMALL_ELEMENTS
from sana_deploy.rehearsal.virtual_tensor import VirtualTensor, register_device_type

MIB = 2**20


@pytest.fixture(params=["numbers", "shapes"])
def host(request: pytest.FixtureRequest) -> VirtualHost:
    return VirtualHost([64 * MIB] * 4, request.param)


def test_tensors_are_made_on_virtual_devices_in_every_way(host: VirtualHost) -> None:
    with host:
        for made in (
            torch.zeros(3, device="vgpu:2"),
            torch.arange(3, device="vgpu:2"),
            torch.tensor([1, 2, 3], device="vgpu:2"),
            torch.zeros(3).to("vgpu:2"),
            torch.ones_like(torch.zeros(3, device="vgpu:2")),
            torch.zeros(3, device="vgpu:2").new_zeros(3),
        ):
            assert made.device == torch.device("vgpu:2")
            assert isinstance(made, VirtualTensor)


def test_arithmetic_in_numbers_is_the_cpu_s_own() -> None:
    host = VirtualHost([64 * MIB], "numbers")
    x, layer = torch.randn(5, 7), nn.Linear(7, 3)
    expected = functional.gelu(layer(x)).softmax(-1)[:, [0, 2]]
    with host, torch.no_grad():
        host.place_module(layer, "layer", torch.device("vgpu:0"))
        result = functional.gelu(layer(x.to("vgpu:0"))).softmax(-1)[:, [0, 2]]
        assert torch.equal(result.cpu(), expected)


def test_placed_weights_in_numbers_stay_at_their_address_and_are_counted_each(tmp_path: Path) -> None:
    """A CPU's kernels round by the address: a copy would give other last places than the file's memory map."""
    save_file({"weight": torch.ones(3, 5), "bias": torch.ones(3)}, tmp_path / "layer.safetensors")
    layer = nn.Linear(5, 3, device="meta")
    layer.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    before = {name: value.data_ptr() for name, value in layer.named_parameters()}
    host = VirtualHost([64 * MIB], "numbers")
    placed = host.place_module(layer, "layer", torch.device("vgpu:0"))
    for name, value in placed.named_parameters():
        assert isinstance(value, VirtualTensor)
        assert value.held.data_ptr() == before[name], name
        assert torch.equal(value.held, torch.ones_like(value.held)), name
    assert host.ledger.weights == [2 * 512], "a block each, not the whole file for each"
    del layer, placed, value
    gc.collect()
    assert host.ledger.weights == [0]


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "add": lambda a, b: a + b,
    "matmul": lambda a, b: a @ b,
    "cat": lambda a, b: torch.cat([a, b]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "in place": lambda a, b: a.add_(b),
    "linear": functional.linear,
    "attention": lambda a, b: functional.scaled_dot_product_attention(a[None, None], b[None, None], b[None, None]),
}


@pytest.mark.parametrize("operation", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("other", ["vgpu:1", "cpu"])
def test_mixed_devices_are_refused_in_cuda_s_words(
    host: VirtualHost, operation: Callable[[torch.Tensor, torch.Tensor], object], other: str
) -> None:
    with host:
        a, b = torch.ones(4, 4, device="vgpu:0"), torch.ones(4, 4, device=other)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least"):
            operation(a, b)


def test_what_cuda_lets_mix_may_mix(host: VirtualHost) -> None:
    with host:
        a = torch.ones(4, 4, device="vgpu:0")
        assert (a * torch.tensor(2.0)).device == a.device
        assert a[torch.tensor([0, 2])].shape == (2, 4)
        b = torch.zeros(4, 4, device="vgpu:1")
        b.copy_(a)
        assert host.ledger.traffic["vgpu:0", "vgpu:1"] == 64


def test_live_bytes_follow_storages_and_return(host: VirtualHost) -> None:
    with host:
        a = torch.zeros(1000, 1000, device="vgpu:1")
        view = a[:10].t()
        assert host.ledger.live(1) == 4_000_256  # rounded up to 512
        b = a + 1
        assert host.ledger.live(1) == 2 * 4_000_256
        del a
        gc.collect()
        assert host.ledger.live(1) == 2 * 4_000_256, "the view keeps the storage"
        del view, b
        gc.collect()
        assert host.ledger.live(1) == 0
        assert host.ledger.peaks[1].total_bytes == 2 * 4_000_256


def test_in_place_work_takes_no_memory_and_keeps_identity(host: VirtualHost) -> None:
    with host:
        a = torch.zeros(1000, 1000, device="vgpu:0")
        assert a.add_(1) is a
        assert host.ledger.peaks[0].total_bytes == 4_000_256


def test_going_over_raises_where_it_happens_with_the_amounts(host: VirtualHost) -> None:
    with host:
        host.ledger.enter("denoise", "transformer")
        kept = torch.zeros(10 * MIB, device="vgpu:3")
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.cat([kept, kept])
    assert "vgpu:3 is out of memory: transformer tried to allocate 80.00 MiB in denoise" in str(caught.value)
    assert "of 64.00 MiB for tensors, 0 B are weights and 40.00 MiB activations" in str(caught.value)


def test_weights_are_counted_apart(host: VirtualHost) -> None:
    layer = nn.Linear(512, 512, bias=False)
    with host, torch.no_grad():
        host.place_module(layer, "transformer", torch.device("vgpu:0"))
        layer(torch.zeros(512, 512, device="vgpu:0"))
    assert host.ledger.weights[0] == 2**20
    peak = host.ledger.peaks[0]
    assert (peak.weights_bytes, peak.activation_bytes) == (2**20, 2 * 2**20)


def test_flops_are_pytorch_s_own_count(host: VirtualHost) -> None:
    with host:
        host.ledger.enter("denoise", "transformer")
        torch.zeros(3, 5, device="vgpu:0") @ torch.zeros(5, 7, device="vgpu:0")
        q = torch.zeros(1, 2, 8, 16, device="vgpu:0")
        functional.scaled_dot_product_attention(q, q, q)
    assert host.ledger.work["denoise", "transformer"].flops == 2 * 3 * 5 * 7 + 2 * (2 * 2 * 8 * 8 * 16)


def test_small_tensors_keep_data_in_shapes_and_large_ones_do_not() -> None:
    host = VirtualHost([64 * MIB], "shapes")
    with host:
        times = torch.arange(20).to("vgpu:0")
        assert (times == 7).nonzero().item() == 7
        large = torch.zeros(SMALL_ELEMENTS + 1, device="vgpu:0")
        mixed = times + large[:20]
        with pytest.raises((RuntimeError, NotImplementedError)):
            mixed.sum().item()


def test_shapes_agree_with_numbers_byte_for_byte() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1))
    peaks = []
    fidelities: tuple[Fidelity, ...] = ("numbers", "shapes")
    for fidelity in fidelities:
        host = VirtualHost([64 * MIB], fidelity)
        with host, torch.no_grad():
            import copy

            module = host.place_module(copy.deepcopy(layers), "vae", torch.device("vgpu:0"))
            module(torch.zeros(2, 3, 64, 64).to("vgpu:0"))
        peaks.append((host.ledger.peaks[0].total_bytes, host.ledger.work["load", "pipeline"]))
    assert peaks[0] == peaks[1]


def test_a_pytorch_without_the_interface_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "vgpu", raising=False)
    monkeypatch.delattr(torch._C, "_acc")
    with pytest.raises(RunError, match="lacks Python device backends"):
        register_device_type()


@pytest.mark.parametrize("fidelity", ["numbers", "shapes"])
def test_a_pool_of_graphs_is_whole_again_when_what_stood_in_its_place_is_gone(fidelity: Fidelity) -> None:
    host, device = VirtualHost([64 * MIB], fidelity, pools={0: 8 * MIB}), torch.device("vgpu:0")
    recorder = host.recorder(device)
    assert recorder is not None

    def work() -> torch.Tensor:
        return torch.empty(MIB, dtype=torch.uint8, device=device)

    with host:
        first = recorder.warm_up(work)
        assert host.ledger.activations == [8 * MIB], "it is in the place of the pool"
        del first
        gc.collect()
        assert host.ledger.activations == [8 * MIB]
        first = recorder.warm_up(work)
        replay, result = recorder.record(work)
        assert host.ledger.activations == [9 * MIB], "now the pool is there, with the result, and the first beside it"
        del first
        gc.collect()
        assert host.ledger.activations == [8 * MIB]
        del replay, result
        gc.collect()
        assert host.ledger.activations == [8 * MIB]
        assert host.ledger.peaks[0].total_bytes == 9 * MIB
