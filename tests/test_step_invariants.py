"""What is the same in every step is computed once a request: the bits of computing it in each, whatever changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from repeating import RepeatingHost
from torch import nn

from sana_deploy.api import compile_spec
from sana_deploy.declare.spec import DeploySpec
from sana_deploy.run.generate import run_request
from sana_deploy.run.hook import BorderHook
from sana_deploy.run.host import PresentHost
from sana_deploy.run.load import load_pipeline
from sana_deploy.run.place import unplace

Small = Callable[..., DeploySpec]
pytestmark = pytest.mark.usefixtures("short_prompts")
STEPS = 4
LAYERS: dict[str, Callable[[Any], nn.Module]] = {
    "caption of the transformer": lambda pipeline: pipeline.transformer.caption_projection.linear_1,
    "caption of the controlnet": lambda pipeline: pipeline.controlnet.caption_projection.act_1,
    "image": lambda pipeline: pipeline.controlnet.patch_embed.proj,
}


def loaded(spec: DeploySpec, runtime: str, once: bool = True) -> DiffusionPipeline:
    """A pipeline on the CPU, which is given graphs; `once` turned off, everything is computed in each step."""
    resolved = compile_spec(spec).resolve()
    resolved = replace(resolved, plan=resolved.plan.model_copy(update={"runtime": runtime}))
    with pytest.MonkeyPatch.context() as patch:
        if not once:
            patch.setattr(BorderHook, "compute_once", lambda hook, module: None)
        return load_pipeline(resolved, host=RepeatingHost() if runtime == "graphs" else PresentHost())


@pytest.fixture(params=["mixed_bf16", "fp32"])
def spec(request: Any, tiny: Path, small: Small) -> DeploySpec:
    return small(f"precision={request.param}", f"workload.steps={STEPS}")


def drawn(pipeline: DiffusionPipeline, spec: DeploySpec, **said: Any) -> torch.Tensor:
    pixels, _ = run_request(pipeline, spec.workload.bounds, spec.workload.request.model_copy(update=said))
    return pixels


def counted(pipeline: DiffusionPipeline) -> Counter[str]:
    """Counts the calls of layers inside chains."""
    counts: Counter[str] = Counter()
    for name, layer in LAYERS.items():
        layer(pipeline).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    return counts


def test_a_request_computes_it_once_and_draws_the_same_bits(spec: DeploySpec) -> None:
    plain, pipeline = loaded(spec, "eager", once=False), loaded(spec, "eager")
    before, now = counted(plain), counted(pipeline)
    for prompt in ("a barn", "a mill"):
        assert torch.equal(drawn(pipeline, spec, prompt=prompt), drawn(plain, spec, prompt=prompt))
    captions = ("caption of the transformer", "caption of the controlnet")
    assert before == {**dict.fromkeys(captions, 2 * STEPS), "image": 2 * 2 * STEPS}
    assert now == {**dict.fromkeys(captions, 2), "image": 2 * STEPS + 2}, "latents are embedded in each step"


def test_graphs_read_it_where_each_request_writes_it_once(spec: DeploySpec) -> None:
    plain, pipeline = loaded(spec, "eager", once=False), loaded(spec, "graphs")
    counts = counted(pipeline)
    found = []
    for prompt in ("a barn", "a mill", "a barn"):
        found.append(drawn(pipeline, spec, prompt=prompt))
        assert torch.equal(found[-1], drawn(plain, spec, prompt=prompt))
        found_counts = counts["caption of the transformer"], counts["caption of the controlnet"]
        # The first request computes it in its eager step, and again for the graph.
        assert found_counts == (len(found) + 1, len(found) + 1)
    assert not torch.equal(found[0], found[1])


def test_nothing_is_kept_when_the_request_is_over(spec: DeploySpec) -> None:
    pipeline = loaded(spec, "eager")
    drawn(pipeline, spec)
    for name in ("transformer", "controlnet"):
        invariants = getattr(pipeline, name)._hf_hook.invariants
        assert [chain.kept for chain in invariants.chains] == [None] * len(invariants.chains)
        assert not invariants._casts


class Doubled(nn.Module):
    """A layer that an adapter put in the place of another."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = 2 * self.base(x)
        return result


Call = dict[str, torch.Tensor]
CHANGES: dict[str, Callable[[Any, Call], object]] = {
    "nothing": lambda net, call: None,
    "the caption": lambda net, call: call["encoder_hidden_states"].mul_(2),
    "the image": lambda net, call: call["controlnet_cond"].mul_(2),
    "another caption": lambda net, call: call.update(encoder_hidden_states=call["encoder_hidden_states"] * 2),
    "values": lambda net, call: net.caption_projection.linear_1.weight.mul_(2),
    "values of the image's layer": lambda net, call: net.input_block.weight.mul_(2),
    "weights": lambda net, call: setattr(net.caption_norm, "weight", nn.Parameter(net.caption_norm.weight * 2, False)),
    "the first layer": lambda net, call: setattr(net, "caption_projection", Doubled(net.caption_projection)),
    "the last layer": lambda net, call: setattr(net, "caption_norm", nn.Identity()),
    "an adapter": lambda net, call: setattr(net, "input_block", Doubled(net.input_block)),
    "an inner layer": lambda net, call: setattr(net.caption_projection, "act_1", nn.Identity()),
    "a forward": lambda net, call: setattr(net.caption_norm, "forward", nn.Identity()),
    "a hook": lambda net, call: net.caption_norm.register_forward_hook(lambda *found: found[-1] * 2),
}


@pytest.mark.parametrize("runtime", ["eager", "graphs"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_computed_anew(tiny: Path, small: Small, runtime: str, change: str) -> None:
    spec = small("precision=fp32")
    random = torch.Generator().manual_seed(5)
    results = []
    for once in (False, True):
        pipeline = loaded(spec, runtime if once else "eager", once)
        net, width = pipeline.controlnet, pipeline.text_encoder.config.hidden_size
        torch.manual_seed(6)
        for layer in (net.input_block, *net.controlnet_blocks):
            nn.init.normal_(layer.weight)  # diffusers begins with zeros, which would hide everything
        random.manual_seed(5)
        call = {
            "encoder_hidden_states": torch.randn(2, 8, width, generator=random),
            "controlnet_cond": torch.randn(2, net.config.in_channels, 4, 4, generator=random),
        }
        latents = torch.randn(6, 2, net.config.in_channels, 4, 4, generator=random)
        found = []
        with torch.no_grad():
            for number, latent in enumerate(latents):
                if number == 3:
                    CHANGES[change](net, call)
                residuals = net(latent, timestep=torch.full((2,), 7.0), return_dict=False, **call)[0]
                found.append(torch.stack(list(residuals)))
        results.append(found)
    for number, (plain, kept) in enumerate(zip(*results, strict=True)):
        assert torch.equal(plain, kept), number


def test_with_gradients_or_autocast_every_call_computes_everything(tiny: Path, small: Small) -> None:
    pipeline = loaded(small("precision=fp32"), "eager")
    counts, net = counted(pipeline), pipeline.transformer
    call = {"encoder_hidden_states": torch.ones(1, 8, pipeline.text_encoder.config.hidden_size)}
    latent = torch.ones(1, net.config.in_channels, 4, 4)
    for _ in range(2):
        net(latent, timestep=torch.ones(1), **call)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            net(latent, timestep=torch.ones(1), **call)
    assert counts["caption of the transformer"] == 4


def test_taking_the_placement_off_gives_the_layers_their_own_forward_back(tiny: Path, small: Small) -> None:
    pipeline = unplace(loaded(small("precision=fp32"), "graphs"))
    for net in (pipeline.transformer, pipeline.controlnet):
        assert not [name for name, layer in net.named_modules() if "forward" in vars(layer)]
