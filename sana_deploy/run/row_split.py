"""Rows of one image on several GPUs: each component of the denoising loop has a unit on every one, for some rows.

A component's own module takes the first rows, copies of it on other devices the rows after them. The pipeline calls the
module as ever and gets what it would have got: the denoiser's predictions joined, and the ControlNet's residuals as
tensors of which each part stays where the denoiser's unit needs it. What the units exchange while they work is in
`rows/`; it is counted as traffic like any other tensor.

A call that cannot be dealt out runs whole on the component's own module, and the request's remarks say why.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from ..plan.units import component_of
from .border import Border
from .guidance_split import further_units, watch_guidance
from .halves import UncutError
from .mirror import Mirror
from .not_copied import NotCopied
from .row_group import CountedGroup, Dealt, Team, UndealtError, teams_of, tell, units_of
from .row_vae import deal_vae
from .rows.denoiser import (
    ATTENTION_KINDS,
    ATTENTIONS,
    LATENTS,
    TOKENS,
    WORKS,
    attentions_of,
    sees_all_rows,
    whole_rows_only,
)
from .rows.exchange import Band, together
from .split_tensor import Fetch, SplitTensor, as_whole
from .traffic import move


class RowForward(NotCopied):
    """A module's forward, over units that take some rows of the image each.

    With two teams, each computes one half of guidance; a call without guidance is the first team's.

    Args:
        name: the component.
        module: its own module, hooked.
        teams: the first one's first unit is the module itself.
        border: of the pipeline.
    """

    def __init__(self, name: str, module: nn.Module, teams: Sequence[Team], border: Border) -> None:
        self.name, self.module, self.teams, self.border = name, module, teams, border
        self.config = cast(Any, module).config
        self.forward: Callable[..., Any] = module.forward
        self.signature = inspect.signature(type(module).forward)
        self.output = border.pipeline.by_name[name].call("forward").output
        functools.update_wrapper(self, self.forward)

    @property
    def mirrors(self) -> list[Mirror]:
        """All copies of the module."""
        return [mirror for team in self.teams for mirror in team.mirrors]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward with the arguments and the result of the whole."""
        try:
            given = dict(self.signature.bind(self.module, *args, **kwargs).arguments)
            as_dict = given.get("return_dict", True)
            dealt = self._dealt(given)
        except (UndealtError, UncutError, TypeError) as problem:
            if not isinstance(problem, TypeError):
                tell(self.border, self.name, str(problem))
            args, kwargs = as_whole((args, kwargs))
            return self.forward(*args, **kwargs)
        self.border.enter(self.name, "forward")
        self.border.ready(self.name, "forward", args, kwargs)
        output = self._output(dealt, self._computed(dealt), as_dict)
        self.border.leave(self.name, "forward", output)
        return output

    def _computed(self, dealt: Sequence[Dealt]) -> list[list[Any]]:
        """What each unit of each team makes of its rows."""
        work = WORKS[type(self.module)]
        scale = (dealt[0].given.get("attention_kwargs") or {}).get("scale", 1.0)
        with lora_scaled([module for one in dealt for module in one.modules], scale):
            # Nothing here holds what a unit was given: it is gone when the unit no longer needs it.
            turns = [
                one.group.turns(
                    [
                        work(model, band, self._given(one, band, model))
                        for model, band in zip(one.modules, one.bands, strict=True)
                    ]
                )
                for one in dealt
            ]
            return together(turns)

    def _dealt(self, given: Mapping[str, Any]) -> list[Dealt]:
        """The bands of a call, and who computes them.

        Raises:
            UndealtError: there is but one, their rows cannot be told apart, or a copy cannot stand for the module.
            UncutError: the halves of guidance cannot be told apart.
            torch.OutOfMemoryError: the module changed, and a new copy does not fit.
        """
        if why := whole_rows_only(self.module):
            raise UndealtError(why)
        return [self._dealt_to(team, part) for team, part in self._parts(given)]

    def _parts(self, given: Mapping[str, Any]) -> list[tuple[Team, Mapping[str, Any]]]:
        """Which team computes what: with guidance, each of two its half."""
        halves = self.border.state.halves
        if halves is None or len(self.teams) == 1:
            return [(self.teams[0], given)]
        named = {name: value for name, value in given.items() if name != "self"}
        (_, first), (_, second) = halves.cut(self.name, LATENTS, self.border.pipeline.steady, (), named)
        return [*zip(self.teams, (first, second), strict=True)]

    def _dealt_to(self, team: Team, given: Mapping[str, Any]) -> Dealt:
        latents = given.get(LATENTS[0])
        patch = int(self.config.patch_size)
        if not isinstance(latents, Tensor) or latents.dim() != 4 or latents.shape[2] % patch:
            raise UndealtError("the latents are no image of whole rows")
        group = CountedGroup(team.devices, team.shares, traffic=self.border.state.traffic, result=self.output)
        bands = group.bands(latents.shape[2] // patch)
        if len(bands) < 2:
            raise UndealtError("the image has one row of tokens")
        copies = len(bands) - (team.module is not None)
        modules = units_of(self.module, team.mirrors[:copies], self.border)
        return Dealt(team, group, bands, modules if team.module is not None else modules[1:], given)

    def _given(self, dealt: Dealt, band: Band, model: Any) -> dict[str, Any]:
        """The arguments of a call for one band, on its device."""
        everything = sees_all_rows(model)
        found = {
            name: self._cut(dealt, name, value, band, everything)
            for name, value in dealt.given.items()
            if name not in _NOT_GIVEN
        }
        return {**found, ATTENTION_KINDS: attentions_of(self.module)}

    def _cut(self, dealt: Dealt, name: str, value: Any, band: Band, everything: bool) -> Any:
        device, state = dealt.team.devices[band.index], self.border.state
        if name in TOKENS and value is not None:
            return [self._residual(sample, band, device) for sample in value]
        if not isinstance(value, Tensor):
            return value

        def part(whole: Tensor) -> Tensor:
            return _rows_of(whole, band, 2) if name in LATENTS and not everything else whole

        if name in self.border.pipeline.steady and value.device != device and not value.is_inference():
            return state.steady(dealt.unit(band, self.name), name, value, device, part)
        return move(part(value), device, state.traffic, name)

    def _residual(self, value: Tensor, band: Band, device: torch.device) -> Tensor:
        """The band's tokens of a residual; where bands left them, nothing moves."""
        own = _own_part(value, band)
        found: Tensor = _rows_of(as_whole(value), band, 1) if own is None else own
        moved: Tensor = move(found, device, self.border.state.traffic, TOKENS[0])
        return moved

    def _output(self, dealt: Sequence[Dealt], parts: Sequence[list[Any]], as_dict: bool) -> Any:
        """What all units made, as one call would have made it."""
        home, traffic = self.teams[0].devices[0], self.border.state.traffic

        def to(device: torch.device) -> Fetch:
            return functools.partial(move, device=device, traffic=traffic, name=self.output)

        fetch = to(home)
        if self.name == self.border.pipeline.denoiser:
            joined = [torch.cat([fetch(part) for part in team], dim=2) for team in parts]
            made: Any = torch.cat(joined) if len(joined) > 1 else joined[0]
        else:
            teams = [
                [SplitTensor(samples, to(samples[0].device), 1) for samples in zip(*team, strict=True)]
                for team in parts
            ]
            made = [SplitTensor(pair, fetch) for pair in zip(*teams, strict=True)] if len(teams) > 1 else teams[0]
        return self._as_output(made) if as_dict else (made,)

    def _as_output(self, made: Any) -> Any:
        from diffusers.models.controlnets.controlnet_sana import SanaControlNetOutput
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        whole = self.name == self.border.pipeline.denoiser
        return Transformer2DModelOutput(sample=made) if whole else SanaControlNetOutput(controlnet_block_samples=made)


_NOT_GIVEN = ("self", "attention_mask", "attention_kwargs", "return_dict")
"""Arguments that a band does without: SANA's attention takes no mask."""


def _own_part(value: Tensor, band: Band) -> Tensor | None:
    """The part of a tensor that a ControlNet's band made for this one; None where they were dealt otherwise."""
    if not isinstance(value, SplitTensor) or value.parts is None or value.along != 1 or band.index >= len(value.parts):
        return None
    tokens = value.shape[1] // band.whole
    before = sum(part.shape[1] for part in value.parts[: band.index])
    own = value.parts[band.index]
    return own if (before, own.shape[1]) == (band.first * tokens, band.rows * tokens) else None


def _rows_of(value: Tensor, band: Band, dim: int) -> Tensor:
    """The part of a dimension that belongs to a band's rows."""
    unit = value.shape[dim] // band.whole
    return value.narrow(dim, band.first * unit, band.rows * unit)


@contextmanager
def lora_scaled(modules: Sequence[nn.Module], scale: float) -> Iterator[None]:
    """Scale the LoRA of modules, as their forward does for `attention_kwargs`."""
    with ExitStack() as stack:
        for module in modules:
            scale_lora_layers(module, scale)
            stack.callback(unscale_lora_layers, module, scale)
        yield


class _Unhooked:
    """Stands in the place of a copy's hook: its forward is never called as a whole."""

    def forget_graphs(self) -> None:
        """There are none."""


def row_units(pipeline: DiffusionPipeline, border: Border) -> dict[str, Mirror]:
    """Copy the components of the denoising loop onto the devices of their further units.

    Args:
        pipeline: with all components where they belong.
        border: of the pipeline; `units` says where.

    Raises:
        torch.OutOfMemoryError: a copy does not fit.
    """
    return further_units(pipeline, border, lambda module, unit, device: _Unhooked(), ATTENTIONS)


def split_rows(
    pipeline: DiffusionPipeline, border: Border, mirrors: Mapping[str, Mirror], shares: Sequence[int], teams: int = 1
) -> None:
    """Have hooked components compute the rows of an image over themselves and their `mirrors`; see `row_units`.

    Args:
        shares: rows of each unit; of each team one after the other.
        teams: how many teams compute all rows, of a half of guidance each where there are two.
    """
    for name in border.pipeline.looped:
        units = [unit for unit in mirrors if component_of(unit) == name]
        module = getattr(pipeline, name)
        copies = [mirrors[unit] for unit in units]
        devices = [next(module.parameters()).device, *(border.units[unit] for unit in units)]
        module.forward = RowForward(name, module, teams_of(module, copies, devices, shares, teams), border)
    vae = border.pipeline.of("vae")
    if units := [unit for unit in mirrors if component_of(unit) == vae]:
        deal_vae(getattr(pipeline, vae), [mirrors[unit] for unit in units], shares, border)
    _look_anew(pipeline, border)
    if teams > 1:
        watch_guidance(pipeline, border)


def _look_anew(pipeline: DiffusionPipeline, border: Border) -> None:
    """Have each call of the pipeline look at the weights once, from `encode_prompt` on."""
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        border.state.seen = set()
        return encode(*args, **kwargs)

    pipeline.encode_prompt = encode_prompt
    border.restore.append(lambda: pipeline.__dict__.pop("encode_prompt", None))
