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
from .guidance_split import further_units
from .mirror import Mirror
from .not_copied import NotCopied
from .row_group import CountedGroup, UndealtError, tell, units_of
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
from .rows.exchange import Band
from .split_tensor import SplitTensor, as_whole
from .traffic import move


class RowForward(NotCopied):
    """A module's forward, over units that take some rows of the image each.

    Args:
        name: the component.
        module: its own module, hooked.
        mirrors: the copies that take the other rows, in order.
        devices: of the module, then of the copies.
        shares: rows that each takes of the planned image; of another one, as many in proportion.
        border: of the pipeline.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        mirrors: Sequence[Mirror],
        devices: Sequence[torch.device],
        shares: Sequence[int],
        border: Border,
    ) -> None:
        self.name, self.module, self.mirrors, self.border = name, module, mirrors, border
        self.devices, self.shares, self.config = devices, shares, cast(Any, module).config
        self.forward: Callable[..., Any] = module.forward
        self.signature = inspect.signature(type(module).forward)
        self.output = border.pipeline.by_name[name].call("forward").output
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward with the arguments and the result of the whole."""
        try:
            given = dict(self.signature.bind(self.module, *args, **kwargs).arguments)
            group, bands = self._dealt(given)
            modules = self._modules(len(bands))
        except (UndealtError, TypeError) as problem:
            if isinstance(problem, UndealtError):
                tell(self.border, self.name, str(problem))
            args, kwargs = as_whole((args, kwargs))
            return self.forward(*args, **kwargs)
        self.border.enter(self.name, "forward")
        self.border.ready(self.name, "forward", args, kwargs)
        parts = self._computed(group, bands, modules, given)
        output = self._output(group, parts, given.get("return_dict", True))
        self.border.leave(self.name, "forward", output)
        return output

    def _computed(
        self, group: CountedGroup, bands: Sequence[Band], modules: Sequence[Any], given: Mapping[str, Any]
    ) -> list[Any]:
        """What each unit makes of its rows."""
        work = WORKS[type(self.module)]
        scale = (given.get("attention_kwargs") or {}).get("scale", 1.0)
        with lora_scaled(modules, scale):
            # Nothing here holds what a unit was given: it is gone when the unit no longer needs it.
            works = [
                work(model, band, self._given(given, band, model)) for model, band in zip(modules, bands, strict=True)
            ]
            return group.run(works)

    def _dealt(self, given: Mapping[str, Any]) -> tuple[CountedGroup, list[Band]]:
        """The bands of a call.

        Raises:
            UndealtError: there is but one, or their rows cannot be told apart.
        """
        latents = given.get(LATENTS[0])
        patch = int(self.config.patch_size)
        if not isinstance(latents, Tensor) or latents.dim() != 4 or latents.shape[2] % patch:
            raise UndealtError("the latents are no image of whole rows")
        group = CountedGroup(self.devices, self.shares, traffic=self.border.state.traffic, result=self.output)
        bands = group.bands(latents.shape[2] // patch)
        if len(bands) < 2:
            raise UndealtError("the image has one row of tokens")
        return group, bands

    def _modules(self, count: int) -> list[Any]:
        """The module and its copies, as they are now.

        Raises:
            UndealtError: a copy cannot stand for the module in this call.
            torch.OutOfMemoryError: the module changed, and a new copy does not fit.
        """
        if why := whole_rows_only(self.module):
            raise UndealtError(why)
        return units_of(self.module, self.mirrors[: count - 1], self.border)

    def _given(self, given: Mapping[str, Any], band: Band, model: Any) -> dict[str, Any]:
        """The arguments of a call for one band, on its device."""
        everything = sees_all_rows(model)
        found = {
            name: self._cut(name, value, band, everything) for name, value in given.items() if name not in _NOT_GIVEN
        }
        return {**found, ATTENTION_KINDS: attentions_of(self.module)}

    def _cut(self, name: str, value: Any, band: Band, everything: bool) -> Any:
        if name in TOKENS and value is not None:
            return [self._residual(sample, band) for sample in value]
        if not isinstance(value, Tensor):
            return value

        def part(whole: Tensor) -> Tensor:
            return _rows_of(whole, band, 2) if name in LATENTS and not everything else whole

        device, state = self.devices[band.index], self.border.state
        if name in self.border.pipeline.steady and value.device != device and not value.is_inference():
            return state.steady(self._unit(band), name, value, device, part)
        return move(part(value), device, state.traffic, name)

    def _unit(self, band: Band) -> str:
        return self.mirrors[band.index - 1].unit if band.index else self.name

    def _residual(self, value: Tensor, band: Band) -> Tensor:
        """The band's tokens of a residual; where bands left them, nothing moves."""
        own = _own_part(value, band)
        found: Tensor = _rows_of(as_whole(value), band, 1) if own is None else own
        moved: Tensor = move(found, self.devices[band.index], self.border.state.traffic, TOKENS[0])
        return moved

    def _output(self, group: CountedGroup, parts: list[Any], as_dict: bool) -> Any:
        """What all units made, as one call would have made it."""
        if self.name == self.border.pipeline.denoiser:
            made: Any = group.joined(parts, 2)
        else:
            home, traffic = self.devices[0], self.border.state.traffic
            fetch = functools.partial(move, device=home, traffic=traffic, name=self.output)
            made = [SplitTensor(samples, fetch, 1) for samples in zip(*parts, strict=True)]
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
    pipeline: DiffusionPipeline, border: Border, mirrors: Mapping[str, Mirror], shares: Sequence[int]
) -> None:
    """Have hooked components compute the rows of an image over themselves and their `mirrors`; see `row_units`."""
    for name in border.pipeline.looped:
        units = [unit for unit in mirrors if component_of(unit) == name]
        module = getattr(pipeline, name)
        devices = [next(module.parameters()).device, *(border.units[unit] for unit in units)]
        module.forward = RowForward(name, module, [mirrors[unit] for unit in units], devices, shares, border)
    vae = border.pipeline.of("vae")
    if units := [unit for unit in mirrors if component_of(unit) == vae]:
        deal_vae(getattr(pipeline, vae), [mirrors[unit] for unit in units], shares, border)
    _look_anew(pipeline, border)


def _look_anew(pipeline: DiffusionPipeline, border: Border) -> None:
    """Have each call of the pipeline look at the weights once, from `encode_prompt` on."""
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        border.state.seen = set()
        return encode(*args, **kwargs)

    pipeline.encode_prompt = encode_prompt
    border.restore.append(lambda: pipeline.__dict__.pop("encode_prompt", None))
