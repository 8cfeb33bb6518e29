"""The one hook of a placed component: it moves tensors across devices at the component's border, and only there.

Inputs are pulled to the component's device, outputs are pushed to where they are needed next: `home`, the device
of the denoising loop, or that of the denoiser's other unit (`guidance_split.py`). diffusers reads `execution_device`
off the first component's hook, so that every hook answers `home` and the pipeline's own tensors (latents, timesteps,
embeddings) are made there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from ..declare.pipelines import DEFAULT, PIPELINES, Call
from ..errors import RunError
from ..plan.units import component_of
from .border import Border
from .compiled import CompiledCalls
from .control_image_copies import Copies
from .decode_retry import Retry, attempt, one_at_a_time, parts_taken, retries_of
from .graphed_forward import GraphedForward
from .offload import OffloadedWeights
from .prompt_cache import reading, remember_prompts
from .step_invariants import StepInvariants
from .traffic import move

EAGER_ATTENTION, SDPA = "eager", "sdpa"
"""The attention of transformers that launches the same kernels whatever is masked: others take a shorter way where
nothing is, and another one again while they are captured."""


class BorderHook(ModelHook):  # type: ignore[misc]
    """accelerate hook of one whole component.

    Args:
        name: the component, or one of its further units.
        device: where its weights are.
        border: shared by the pipeline's hooks.

    Attributes:
        graphed: the forward that is replayed from graphs; None where there are none.
        inner: other methods, by name, as the module has them.
        methods: those of them that are replayed from graphs.
        sender: sends results otherwise than by a copy when all are made.
    """

    def __init__(self, name: str, device: torch.device, border: Border) -> None:
        self.name, self.part = name, border.pipeline.by_name[component_of(name)]
        self.calls = {call.method: call for call in self.part.calls}
        self.device = device
        self.border = border
        self.execution_device, self.target = border.home, border.target_of(name)
        self.graphed: GraphedForward | None = None
        self.inner: dict[str, Callable[..., Any]] = {}
        self.methods: dict[str, GraphedForward] = {}
        self.sender: Callable[[Any], Any] | None = None
        self.compiled: CompiledCalls | None = None
        self.plain: Callable[..., Any] | None = None
        self.invariants: StepInvariants | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Pull the inputs; diffusers' `apply_forward_hook` calls this without any before `encode` and `decode`."""
        if not args and not kwargs:
            return args, kwargs
        self.border.enter(self.name, "forward")
        if self.compiled is not None:
            self.compiled.note()  # here, since a graph that is replayed calls nothing
        self._check_device(module)
        names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
        args, kwargs = self._pull(args, names), self._pull(kwargs)
        self.border.ready(self.name, "forward", args, kwargs)
        return args, self.invariants.cast_once(args, kwargs) if self.invariants else kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Push the outputs to where they are needed."""
        self.border.leave(self.name, "forward", output)
        return self._push(output, self.calls["forward"])

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Wrap the methods that are no `forward`."""
        for method in self._wrapped_methods():
            self.inner[method] = getattr(module, method)
            setattr(module, method, self._wrapped(module, self.inner[method], method))
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Give the methods back as the class defines them, and the weights back to the module."""
        if weights := self.border.offloaded.pop(self.name, None):
            weights.leave()
        while self.border.restore:
            self.border.restore.pop()()
        for method in self._wrapped_methods():
            module.__dict__.pop(method, None)
        if self.plain is not None:
            vars(module)["_old_forward"] = self.plain
        if self.invariants is not None:
            self.invariants.take_off()
        self.forget_graphs()
        if self.compiled is not None:
            self.compiled.undo()
        return module

    def read_only(self, module: nn.Module) -> None:
        """Have the module's results hold what the pipeline reads of them, and nothing else."""
        self.replace_forward(module, reading(vars(module)["_old_forward"], self.calls["forward"]))

    def use_compiler(self, module: nn.Module, regions: Sequence[str]) -> None:
        """Compile what the module's calls run, on a device that has a compiler; before `use_graphs`."""
        backend, border = self.border.host.compiler(self.device), self.border
        if backend is None or not regions:
            return
        most, compiling = border.most_graphs, lambda: border.state.compiling
        self.compiled = CompiledCalls(self.name, module, regions, backend, most, compiling)
        self.replace_forward(module, self.compiled.around(vars(module)["_old_forward"]))

    def compute_once(self, module: nn.Module) -> None:
        """Compute once what is the same in every step."""
        self.invariants = StepInvariants(module, self.part.chains, vars(module)["_old_forward"])
        self.replace_forward(module, self.invariants.eager)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Have another forward work in the place of the module's own until the hook is taken off."""
        self.plain = self.plain or vars(module)["_old_forward"]
        vars(module)["_old_forward"] = forward

    def use_graphs(self, module: nn.Module) -> None:
        """Replay the module's forward from graphs, on a device that has them."""
        graphs, border = self.border.graphs_of(self.device), self.border
        if graphs is None:
            return
        # Residuals of a ControlNet beside its denoiser go from its graph to the denoiser's where they are.
        lasting = self.part.role != "controlnet" or self.device != self.target
        eager, factors = vars(module)["_old_forward"], self.calls["forward"].factors
        unfit, heard, kept = functools.partial(self._unfit, module), self._on_eager, self.invariants
        self.graphed = GraphedForward(
            self.name, module, eager, graphs, heard, lasting, lambda: border.state, factors, unfit, kept
        )
        self.replace_forward(module, self.graphed)

    def forget_graphs(self) -> None:
        """Give back the memory of graphs, if there are any."""
        for graphed in (self.graphed, *self.methods.values()):
            if graphed is not None:
                graphed.reset()

    def use_graphs_in(self, module: nn.Module, methods: Collection[str]) -> None:
        """Replay methods besides `forward` from graphs, on a device that has them; those of a VAE."""
        graphs = self.border.graphs_of(self.device) if methods else None
        if graphs is None:
            return
        for method in methods:
            inner, unfit = self.inner[method], lambda args, kwargs: parts_taken(module, args)
            made = GraphedForward(self.name, module, inner, graphs, self._on_eager, unfit=unfit, large=True)
            self.methods[method] = made

    def _unfit(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Why no graph may take a call: it gives more than the pipeline reads, or does what values tell it to."""
        call = self.calls["forward"]
        if call.reads and not call.is_pipelines_own(args, kwargs):
            return "the call is not one that the pipeline makes"
        attention = getattr(getattr(module, "config", None), "_attn_implementation", EAGER_ATTENTION)
        if attention == SDPA and any(bool(kwargs[name].all()) for name in call.besides):
            return "without padding, sdpa attention is given no mask, and a graph would give it one"
        if attention not in (EAGER_ATTENTION, SDPA):
            return f"{attention} attention goes by the values of the mask"
        return None

    def _on_eager(self, reason: str) -> None:
        self.border.state.eager_calls[self.name, reason] += 1

    def _wrapped_methods(self) -> list[str]:
        """Methods besides `forward` that tensors enter."""
        return [method for method in self.calls if method != "forward"]

    def _wrapped(self, module: nn.Module, inner: Callable[..., Any], method: str) -> Callable[..., Any]:
        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            self.border.enter(self.name, method)
            self._check_device(module)
            copies = self._copies(method, args)
            if copies:
                args = (copies.distinct(args[0]), *args[1:])
            args, kwargs = self._pull(args, [self.calls[method].input]), self._pull(kwargs)
            self.border.ready(self.name, method, args, kwargs)
            work = functools.partial(self.methods.get(method, inner), *args, **kwargs)
            if self.compiled is not None:
                work = functools.partial(self.compiled.run, work)
            with one_at_a_time(module) if copies else contextlib.nullcontext():
                output = attempt(work, module, self._retries(module, method, args), self.border.state, self._release)
            self.border.leave(self.name, method, output)
            if not self.calls[method].keeps:
                output = self._push(output, self.calls[method])
            return copies.repeated(output) if copies else output

        return outer

    def _copies(self, method: str, args: Any) -> Copies | None:
        """How the images to encode were repeated, where they were."""
        copies = self.border.state.copies if method == "encode" and args else None
        return copies if copies and copies.hold(args[0]) else None

    def _retries(self, module: nn.Module, method: str, args: Any) -> list[Retry]:
        """Ways to decode again after running out of memory."""
        return retries_of(module, args[0], self.border.on_decode_oom) if method == "decode" and args else []

    def _release(self) -> None:
        self.border.host.release_cached(self.device)

    def _check_device(self, module: nn.Module) -> None:
        """Refuse to work with weights that were moved since: inputs go to the device that the plan says.

        Raises:
            RunError: naming both devices.
        """
        found = next((value.device for value in module.parameters()), self.device)
        if found != self.device:
            raise RunError(
                f"{self.name} was moved to {found} after it was placed on {self.device}",
                where=self.name,
                hint=f"move it back, or unplace(pipeline) and place it by a plan that has {self.name} on {found}",
            )

    def _pull(self, value: Any, names: Sequence[str] = ()) -> Any:
        if isinstance(value, tuple):
            padded = [*names, *[f"argument {i}" for i in range(len(names), len(value))]]
            return tuple(self._fetch(item, name) for item, name in zip(value, padded, strict=False))
        return {key: self._fetch(item, key) for key, item in value.items()}

    def _fetch(self, value: Any, name: str) -> Any:
        """Move one argument here; one that stays the same from step to step crosses once."""
        state = self.border.state
        steady = name in self.border.pipeline.steady and isinstance(value, torch.Tensor) and value.device != self.device
        if steady and not value.is_inference():
            return state.steady(self.name, name, value, self.device)
        return move(value, self.device, state.traffic, name)

    def _push(self, value: Any, call: Call) -> Any:
        if self.sender is not None:
            return self.sender(value)
        state = self.border.state
        # A copy between GPUs has both wait for it, and another request may be at work on the other one.
        if state.overlaps and call.phase != "denoise" and self.device != self.target:
            self.border.host.synchronize(self.device)
        return move(value, self.target, state.traffic, call.output)


def attach(
    module: nn.Module,
    name: str,
    device: torch.device,
    border: Border,
    offloaded: bool = False,
    graphed: bool = False,
    compiled: bool = False,
    remembered: int = 0,
    methods: Collection[str] = (),
) -> BorderHook:
    """Put the border hook on a component, or on one of its units; accelerate's `remove_hook_from_module` takes it off.

    Where it is `offloaded`, its weights stay on the CPU and are on `device` only while it works. Where it is `graphed`,
    its forward is replayed from graphs, if `device` has them, and so are `methods`. Where it is `compiled`, what its
    description names is compiled, if `device` has a compiler. So many of a text encoder's results are `remembered`.
    What is the same in each step is computed once, where tensors have values.

    Raises:
        RunError: there is no memory for graphs.
    """
    if offloaded:
        border.offloaded[name] = OffloadedWeights(module, name, device)
    hook = BorderHook(name, device, border)
    part = hook.part
    add_hook_to_module(module, hook)
    if compiled:
        hook.use_compiler(module, part.compiled)
    if part.call("forward").reads:
        hook.read_only(module)
    if part.chains:
        hook.compute_once(module)
    if graphed:
        hook.use_graphs(module)
    hook.use_graphs_in(module, methods)
    if remembered:
        remember_prompts(module, part, border, remembered)
    return hook


def border_of(pipeline: Any) -> Border:
    """Return the border that a placed pipeline's hooks share.

    Raises:
        RunError: the pipeline is not placed.
    """
    border = find_border(pipeline)
    if border is None:
        raise RunError("the pipeline is not placed", hint="use load_pipeline(plan) or place(pipeline, resolved)")
    return border


def find_border(pipeline: Any) -> Border | None:
    """Return the border that a placed pipeline's hooks share, or None for an unplaced one."""
    description = PIPELINES.get(type(pipeline).__name__, DEFAULT)
    hook = getattr(getattr(pipeline, description.denoiser, None), "_hf_hook", None)
    return hook.border if isinstance(hook, BorderHook) else None


def forget_graphs(pipeline: Any) -> None:
    """Give the memory of all graphs of a placed pipeline back; they are made anew when their calls come again."""
    for shared in border_of(pipeline).graphs.values():
        owners = {key[0] for key in shared.graphs if isinstance(key, tuple)} if shared else set()
        for owner in owners:
            owner.reset()
