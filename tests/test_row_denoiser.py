"""The transformer and the ControlNet over bands of rows: what whole modules compute, whatever sizes and shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel, SanaTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import CPU, Double, far, without
from torch import Tensor

from sana_deploy.run.rows.denoiser import controlnet_band, transformer_band, whole_rows_only
from sana_deploy.run.rows.exchange import Ask, Group, Halo, Sum

SMALL: dict[str, Any] = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=3, sample_size=4,
    num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=6,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "sana": {},
    "positions": {"interpolation_scale": 2.0},
    "patches of two": {"patch_size": 2, "interpolation_scale": 1.5},
    "guidance embedded, queries and keys normed": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
}


@pytest.fixture(autouse=True)
def exactly() -> Iterator[None]:
    with torch.no_grad(), Double():
        yield


def randomly(model: Any) -> Any:
    """The model with random weights everywhere: diffusers leaves a ControlNet's projections at zero."""
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model.double().eval()


def modules(variant: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    own = {key: value for key, value in variant.items() if key not in ("guidance_embeds", "qk_norm")}
    return randomly(SanaTransformer2DModel(**{**SMALL, **variant})), randomly(
        SanaControlNetModel(**{**SMALL, **own, "num_layers": 2})
    )


def inputs(model: Any, rows: int, width: int, batch: int) -> dict[str, Any]:
    patch, tokens = model.config.patch_size, 5
    mask = torch.ones(batch, tokens, dtype=torch.float64)
    mask[-1, 2:] = 0
    found: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, rows * patch, width * patch, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(batch, tokens, 6, dtype=torch.float64),
        "timestep": torch.full((batch,), 500.0, dtype=torch.float64),
        "encoder_attention_mask": mask,
    }
    embeds = getattr(model.config, "guidance_embeds", False)
    return {**found, "guidance": torch.full((batch,), 4.5, dtype=torch.float64)} if embeds else found


def over_bands(work: Any, model: Any, group: Group, given: dict[str, Any], residuals: Sequence[Any] = ()) -> list[Any]:
    """What each band makes of its rows."""
    patch, positions = model.config.patch_size, model.patch_embed.pos_embed is not None
    bands = group.bands(given["hidden_states"].shape[2] // patch)

    def cut(value: Tensor, band: Any) -> Tensor:
        return value if positions else value[:, :, band.first * patch : (band.first + band.rows) * patch]

    works = []
    for band in bands:
        own = {key: cut(value, band) if value.dim() == 4 else value for key, value in given.items()}
        samples = [parts[band.index] for parts in residuals]
        works.append(work(model, band, {**own, "controlnet_block_samples": samples, "conditioning_scale": 0.7}))
    return group.run(works)


def check(transformer: Any, controlnet: Any, rows: int, width: int, batch: int, group: Group) -> tuple[float, float]:
    """How far the residuals and the prediction of bands are from those of the whole."""
    given = inputs(transformer, rows, width, batch)
    beside = {key: value for key, value in given.items() if key != "guidance"}
    beside["controlnet_cond"] = torch.randn_like(given["hidden_states"])
    whole = controlnet(**beside, conditioning_scale=0.7, return_dict=False)[0]
    found = over_bands(controlnet_band, controlnet, group, beside)
    residuals = [*zip(*found, strict=True)]
    error = max(far(torch.cat(parts, 1), sample) for parts, sample in zip(residuals, whole, strict=True))
    wanted = transformer(**given, controlnet_block_samples=tuple(whole), return_dict=False)[0]
    parts = over_bands(transformer_band, transformer, group, given, residuals)
    return error, far(torch.cat(parts, 2), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bands_give_what_the_whole_gives(variant: str) -> None:
    found = modules(VARIANTS[variant])
    for rows, width, batch in ((2, 1, 1), (5, 3, 2), (9, 4, 1)):
        for count, shares in ((2, ()), (2, (1, 6)), (3, ()), (8, ())):
            assert max(check(*found, rows, width, batch, Group([CPU] * count, shares))) < 1e-12, (rows, count, shares)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=2, max_size=8))
def test_so_they_do_for_any_size_batch_and_shares(rows: int, width: int, batch: int, shares: list[int]) -> None:
    with torch.no_grad(), Double():
        found = modules({"num_layers": 2})
        assert max(check(*found, rows, width, batch, Group([CPU] * len(shares), shares))) < 1e-11


@pytest.mark.parametrize("kind", [Halo, Sum])
def test_no_exchange_can_be_left_out(kind: type[Ask]) -> None:
    with without(kind):
        assert min(check(*modules({}), 6, 3, 1, Group([CPU] * 2))) > 1e-6


def test_a_step_exchanges_edges_and_sums_once_in_each_block() -> None:
    transformer, controlnet = modules({})
    group = Group([CPU] * 2)
    check(transformer, controlnet, 6, 3, 1, group)
    assert group.exchanges == {"Sum": 5, "Halo": 5}


def test_a_module_that_bands_cannot_take_says_why() -> None:
    transformer, controlnet = modules({})
    assert whole_rows_only(transformer) == whole_rows_only(controlnet) == ""
    assert whole_rows_only(torch.nn.Linear(1, 1)) == "it is a Linear"

    class Other(type(transformer.transformer_blocks[1].attn1.processor)):  # type: ignore[misc]
        pass

    transformer.transformer_blocks[1].attn1.set_processor(Other())
    assert whole_rows_only(transformer) == "transformer_blocks.1.attn1 has the attention processor Other"
