"""One image in bands of rows: what whole modules compute, whatever the sizes, bands and shares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sana_deploy.run.rows.autoencoder import decode, encode
from sana_deploy.run.rows.exchange import Ask, Band, Gather, Group, Halo, Sum, Work
from sana_deploy.run.rows.layers import conv, glumb_conv, linear_attention

CPU = torch.device("cpu")


class Double(TorchFunctionMode):
    """What diffusers computes in float32 whatever comes in, in float64: else it hides errors below 1e-7."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        return function(*args, **{k: wide.get(v, v) if k == "dtype" else v for k, v in (kwargs or {}).items()})


@pytest.fixture(autouse=True)
def exactly() -> Iterator[None]:
    with torch.no_grad(), Double():
        yield


def group(count: int, shares: Sequence[float] = ()) -> Group:
    return Group([CPU] * count, shares)


def far(found: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def autoencoder(**changed: Any) -> Any:
    """A small AutoencoderDC with every kind of layer, of random weights in float64."""
    torch.manual_seed(0)
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    config: dict[str, Any] = dict(latent_channels=4, attention_head_dim=4)
    for side in ("encoder", "decoder"):
        config |= {f"{side}_block_out_channels": (4, 4, 8, 8, 16, 16), f"{side}_layers_per_block": (1,) * 6}
        config |= {f"{side}_block_types": blocks}
    return AutoencoderDC(**{**config, **changed}).double().eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "sana": {},
    "strides and interpolation": dict(upsample_block_type="interpolate", downsample_block_type="Conv"),
    "no layers at full size": dict(encoder_layers_per_block=(0, *(1,) * 5), decoder_layers_per_block=(0, *(1,) * 5)),
    "batch norm, no shortcuts": dict(
        decoder_norm_types="batch_norm", decoder_act_fns="relu", encoder_out_shortcut=False, decoder_in_shortcut=False
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_autoencoder_in_bands_gives_what_the_whole_gives(variant: str) -> None:
    vae = autoencoder(**VARIANTS[variant])
    for batch, height, width in ((1, 8, 3), (2, 5, 7), (1, 2, 1), (3, 1, 4), (1, 3, 2)):
        latents = torch.randn(batch, 4, height, width, dtype=torch.float64)
        image = vae.decode(latents).sample
        encoded = vae.encode(image).latent
        for count, shares in ((1, ()), (2, ()), (2, (1, 6)), (3, ()), (3, (5, 1, 1)), (8, ())):
            assert far(decode([vae] * count, group(count, shares), latents), image) < 1e-12, (height, width, count)
            assert far(encode([vae] * count, group(count, shares), image), encoded) < 1e-12, (height, width, count)


@contextmanager
def without(kind: type[Ask]) -> Iterator[None]:
    """Have a kind of exchange answer with what the band itself knows."""
    usual = kind.exchange

    def alone(group: Group, asked: Sequence[Any]) -> None:
        for ask in asked:
            usual(Group([CPU]), [ask])

    kind.exchange = staticmethod(alone)  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.exchange = staticmethod(usual)  # type: ignore[method-assign]


@pytest.mark.parametrize(("kind", "size"), [(Halo, (6, 3)), (Sum, (6, 3)), (Gather, (2, 1))])
def test_every_exchange_matters(kind: type[Ask], size: tuple[int, int]) -> None:
    vae = autoencoder()
    latents = torch.randn(1, 4, *size, dtype=torch.float64)
    image = vae.decode(latents).sample
    with without(kind):
        assert far(decode([vae] * 2, group(2), latents), image) > 1e-6
        assert far(encode([vae] * 2, group(2), image), vae.encode(image).latent) > 1e-6


def test_layers_of_the_denoiser_give_what_the_whole_gives() -> None:
    torch.manual_seed(0)
    gated = GLUMBConv(6, 6, 2.5, norm_type=None, residual_connection=False).double()
    attention = Attention(
        6, heads=2, dim_head=3, kv_heads=2, bias=True, processor=SanaLinearAttnProcessor2_0()
    ).double()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    tokens = x.flatten(2, 3).transpose(1, 2)
    for count in (2, 3, 7):
        found = over_bands(count, lambda part: glumb_conv(gated, part), x)
        assert far(found, gated(x)) < 1e-12
        bands = group(count).bands(7)
        parts = [tokens[:, band.first * 5 : (band.first + band.rows) * 5] for band in bands]
        found = torch.cat(group(count).run([linear_attention(attention, part) for part in parts]), dim=1)
        assert far(found, attention(tokens)) < 1e-12


def over_bands(count: int, work: Callable[[Tensor], Work], x: Tensor) -> Tensor:
    dealt = group(count)
    parts = [x[:, :, band.first : band.first + band.rows] for band in dealt.bands(x.shape[2])]
    return torch.cat(dealt.run([work(part) for part in parts]), dim=2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("watched", [False, True])
def test_adapters_and_hooks_on_a_convolution_work_in_bands(stride: int, watched: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    layer: Any = nn.Sequential(nn.Conv2d(4, 4, 5, stride, 2, groups=4))
    if watched:
        layer[0].register_forward_hook(lambda module, args, out: out * 3)
    else:
        layer = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), layer)
    layer = layer.double()[0]
    x = torch.randn(1, 4, 12, 5, dtype=torch.float64)
    for count in (2, 3, 6):
        dealt = Group([CPU] * count)
        parts = [x[:, :, 2 * b.first : 2 * (b.first + b.rows)] for b in dealt.bands(6)]
        found = torch.cat(dealt.run([conv(layer, part) for part in parts]), dim=2)
        assert far(found, layer(x)) < 1e-12


def test_a_convolution_that_bands_cannot_take_is_refused() -> None:
    x = torch.randn(1, 4, 8, 5, dtype=torch.float64)
    for layer in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(NotImplementedError, match="over bands of rows"):
            over_bands(2, lambda part, layer=layer: conv(layer.double(), part), x)  # type: ignore[misc]
    vae = autoencoder(upsample_block_type="interpolate")
    vae.decoder.up_blocks[0][0].interpolation_mode = "bilinear"
    with pytest.raises(NotImplementedError, match="bilinear"):
        decode([vae] * 2, group(2), torch.randn(1, 4, 4, 2, dtype=torch.float64))
    vae.decoder.up_blocks[0][0] = nn.Dropout()
    with pytest.raises(NotImplementedError, match="Dropout"):
        decode([vae] * 2, group(2), torch.randn(1, 4, 4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="100 px is not a multiple of 32"):
        encode([vae] * 2, group(2), torch.randn(1, 3, 100, 64, dtype=torch.float64))


def test_rows_are_dealt_by_shares_and_every_band_has_one() -> None:
    for rows in range(1, 40):
        for count in range(1, 9):
            for shares in ((), tuple(range(1, count + 1)), (100, *(1,) * (count - 1))):
                bands = group(count, shares).bands(rows)
                assert [band.first for band in bands] == [sum(b.rows for b in bands[:i]) for i in range(len(bands))]
                assert sum(band.rows for band in bands) == rows
                assert len(bands) == min(count, rows)
                assert all(band.rows >= 1 and band.whole == rows for band in bands)
    assert [band.rows for band in group(3, (2, 1, 1)).bands(8)] == [4, 2, 2]
    assert Band(0, 0, 3, 7).whole_height(96) == 224


def test_bytes_are_counted_where_bands_are_on_two_devices() -> None:
    apart = Group([torch.device("meta", i) for i in (0, 0, 1)])
    parts = [torch.empty(2, 4, rows, 5, device="meta") for rows in (3, 1, 2)]
    apart.exchange([Halo(part, 2) for part in parts])
    row = 2 * 4 * 5 * 4
    assert apart.sent == {(0, 2): row, (1, 2): row, (2, 1): 2 * row, (2, 0): row}
    apart.sent.clear()
    apart.exchange([Sum(torch.empty(3, device="meta")) for _ in parts])
    assert apart.sent == {(0, 2): 12, (1, 2): 12, (2, 0): 12}
    assert apart.exchanges == {"Halo": 1, "Sum": 1}


def test_answers_are_no_views_of_what_other_bands_hold() -> None:
    x = torch.arange(24.0).reshape(1, 1, 6, 4)
    halos = [Halo(x[:, :, :3], 2), Halo(x[:, :, 3:], 2)]
    group(2).exchange(halos)
    (zeros,), (below,) = halos[0].take()
    assert zeros == 2
    assert torch.equal(below, x[:, :, 3:5])
    assert below.untyped_storage().nbytes() == below.nbytes


def test_bands_out_of_step_are_noticed() -> None:
    def asks(kind: type[Ask], times: int) -> Work:
        for _ in range(times):
            yield kind(torch.zeros(1, 1, 1, 1))
        return None

    with pytest.raises(AssertionError, match="out of step"):
        group(2).run([asks(Sum, 1), asks(Sum, 2)])
    with pytest.raises(AssertionError, match="out of step"):
        group(2).run([asks(Sum, 1), asks(Gather, 1)])


def test_the_bands_of_one_device_share_one_module_and_leave_it_as_it_was() -> None:
    vae = autoencoder()
    before = copy.deepcopy(vae.state_dict())
    decode([vae] * 3, group(3), torch.randn(1, 4, 6, 2, dtype=torch.float64))
    assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())
