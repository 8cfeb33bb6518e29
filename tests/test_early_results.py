"""A ControlNet whose residuals are made right after their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaControlNetModel

from sana_deploy.declare.pipelines import DEFAULT, LayeredResults
from sana_deploy.facts.tiny import ensure_tiny
from sana_deploy.run.early_results import EarlyResults


@pytest.fixture
def net(tiny: Path) -> Iterator[SanaControlNetModel]:
    net = SanaControlNetModel.from_pretrained(str(ensure_tiny() / "controlnet")).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in net.parameters():
            value.normal_(std=0.2)
        yield net


def arguments_of(net: SanaControlNetModel) -> dict[str, Any]:
    shape, made = (2, net.config.in_channels, 2, 3), torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(shape, generator=made),
        "controlnet_cond": torch.randn(shape, generator=made),
        "encoder_hidden_states": torch.randn(2, 7, net.config.caption_channels, generator=made),
        "timestep": torch.ones(2),
        "conditioning_scale": 0.7,
    }


def early_of(net: Any, made: Callable[[int], object], **other: str) -> EarlyResults:
    layered = DEFAULT.by_name["controlnet"].layered
    assert layered is not None
    names = {"blocks": layered.blocks, "projections": layered.projections, "scale": layered.scale, **other}
    return EarlyResults(net, net.forward, LayeredResults(**names), made)


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
