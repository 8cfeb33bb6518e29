"""The border hook: tensors move at component borders only, and every byte that moves is counted.

The second device is torch's `meta`, the one other device type that a CPU build has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderDC
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sana_deploy.run.border import Border
from sana_deploy.run.hook import attach
from sana_deploy.run.traffic import Traffic, by_pair, move

CPU, META = torch.device("cpu"), torch.device("meta")


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


def test_nested_values_move_and_are_counted_once_each() -> None:
    traffic = Traffic()
    one = torch.zeros(4)
    value = {"a": [one, (torch.zeros(2, dtype=torch.float16), "text")], "b": Pair(torch.zeros(1), 3), "c": None}
    moved: Any = move(value, META, traffic, "value")
    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].first.device == META
    assert (moved["a"][1][1], moved["b"].second, moved["c"]) == ("text", 3, None)
    assert by_pair(traffic.moved) == {"cpu->meta": 16 + 4 + 4}


def test_what_is_already_there_is_the_same_object_and_costs_nothing() -> None:
    traffic, tensor = Traffic(), torch.zeros(4)
    assert move(tensor, CPU, traffic, "value") is tensor
    assert not traffic.moved


def test_model_outputs_keep_their_class() -> None:
    moved = move(BaseModelOutputWithPast(last_hidden_state=torch.zeros(2)), META, Traffic(), "value")
    assert isinstance(moved, BaseModelOutputWithPast)
    assert moved[0].device == META


def test_inputs_are_pulled_and_outputs_pushed_home_and_nothing_inside_is_hooked() -> None:
    border = Border(home=CPU)
    seen: list[tuple[str, str]] = []
    border.observers.append(lambda event, place: seen.append((event, place)))
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(META)
    attach(model, "transformer", META, border)
    with pytest.raises((NotImplementedError, RuntimeError)):
        model(torch.zeros(1, 3))  # the output has no data to bring home: proof that it was pushed
    assert border.state.traffic.moved["cpu", "meta", "input"] == 12
    assert border.state.traffic.moved["meta", "cpu", "noise_pred"] == 8
    assert seen == [("enter", "transformer.forward"), ("leave", "transformer.forward")]
    assert not any(hasattr(child, "_hf_hook") for child in model.children())


def test_detaching_gives_back_the_untouched_module() -> None:
    vae = AutoencoderDC(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), latent_channels=4,
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    before = dict(vae.__dict__)
    attach(vae, "vae", CPU, Border(home=CPU))
    assert "encode" in vae.__dict__
    assert "decode" in vae.__dict__
    remove_hook_from_module(vae, recurse=True)
    after = {key: value for key, value in vae.__dict__.items() if key != "forward"}
    assert after == before
    assert vae.forward.__func__ is AutoencoderDC.forward
