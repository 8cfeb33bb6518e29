"""Reads components' weights concurrently: each safetensors file once, straight to its device and dtype.

Modules are built from their configs with parameters on `meta`, one after the other (the libraries patch `torch.nn`
globally while they build), then all files are read in threads. On the CPU a tensor that is stored in the wanted dtype
is not copied at all: it stays in the file's memory map. Where a file's names are not the module's own (another
library's layout, old names, pickled weights), the library's `from_pretrained` reads that component. Either way no
tensor is left as it was initialised: one that the files lack, or hold in another shape, is an error that names it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from ..declare.formats import Format
from ..declare.pipelines import Component
from ..errors import CheckpointError, RunError
from ..facts.component import ComponentFacts
from ..facts.headers import read_header, weight_files
from ..facts.tensors import NAMED, Mismatch, Shape, compare
from .other_blocks import OtherBlocks
from .quantize import is_quantized, linears_of, quantize, quantize_linears, require

log = logging.getLogger(__name__)
Progress = Callable[[Component, int, int], None]
"""Called with a component, its bytes read so far, and its bytes in all; from several threads, one at a time."""


@dataclass(frozen=True)
class LoadRequest:
    """A component to load: what it is, the format that its tensors get, and the device that they go to, but for those
    of `others`, which are dealt to another one.

    Weights of linear layers are quantised, where the format says so, from its dtype and on the device.
    """

    facts: ComponentFacts
    format: Format
    device: str
    others: OtherBlocks | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """All that its tensors go to."""
        return (self.device, self.others.device) if self.others else (self.device,)

    def device_of(self, key: str) -> str:
        """Where the tensor of this name goes."""
        return self.others.device if self.others and self.others.hold(key) else self.device

    @property
    def dtype(self) -> torch.dtype:
        """What floating-point tensors are cast to."""
        return getattr(torch, self.format.dtype)  # type: ignore[no-any-return]


class _CancelledError(Exception):
    """Another component failed: this one stops reading."""


def load_components(
    requests: Mapping[Component, LoadRequest], on_progress: Progress | None = None, notes: list[str] | None = None
) -> dict[Component, nn.Module]:
    """Load all requested components, in evaluation mode.

    Args:
        requests: what to load.
        on_progress: called with the bytes read of each component.
        notes: gets a sentence for every component whose values do not fit float16.

    Raises:
        CheckpointError: the files lack a tensor of a component, or hold it in another shape.
        RunError: the first component that failed, with its file; the others have stopped and hold nothing.
        InvalidSpecError: the library that quantises is not installed.
    """
    for quantization in {one.format.quantization for one in requests.values() if one.format.quantization}:
        require(quantization)
    report = _one_at_a_time(on_progress)
    with quiet_libraries():
        skeletons = {name: _skeleton(one) for name, one in requests.items()}
        found = [(skeleton, requests[name]) for name, skeleton in skeletons.items() if skeleton is not None]
        _fill_all(found, report, notes if notes is not None else [])
        modules = {name: skeletons[name] or _by_library(one, report) for name, one in requests.items()}
    return {name: module.eval() for name, module in modules.items()}


def _one_at_a_time(on_progress: Progress | None) -> Progress:
    """A callback that threads may call together, for one that may not be called so."""
    lock = threading.Lock()

    def report(name: Component, done: int, of: int) -> None:
        if on_progress:
            with lock:
                on_progress(name, done, of)

    return report


def _fill_all(found: Sequence[tuple[nn.Module, LoadRequest]], on_progress: Progress, notes: list[str]) -> None:
    """Read the files of all these components in threads; raise what made the first of them fail."""
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, len(found)), thread_name_prefix="load") as pool:
        jobs = [pool.submit(_fill, module, request, stop, on_progress, notes) for module, request in found]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        except BaseException:  # interrupted
            stop.set()
            raise
    for job in jobs:
        problem = job.exception()
        if problem is not None and not isinstance(problem, _CancelledError):
            raise problem


def _skeleton(request: LoadRequest) -> nn.Module | None:
    """Build the module without parameters; None where its files do not hold exactly the module's own names."""
    facts = request.facts
    if facts.folder is None:
        raise RunError(f"the weights of {facts.name} are not on this host", where="model.source")
    files = weight_files(facts.folder, facts.variant, facts.name, facts.allow_pickle)
    if any(path.suffix != ".safetensors" for path in files):
        return None
    try:
        with init_empty_weights(include_buffers=False):
            module = _build(facts, request.dtype)
        stored = {key: one.shape for path in files for key, one in read_header(path, facts.name).items()}
    except (OSError, TypeError, ValueError, KeyError, AttributeError) as problem:
        log.info("%s goes to from_pretrained: %s", facts.name, problem)
        return None
    found = compare({key: tuple(value.shape) for key, value in module.state_dict().items()}, stored)
    odd = [*found.missing, *found.unexpected]
    if odd or getattr(module, "_keep_in_fp32_modules", None):
        log.info("%s goes to from_pretrained: %d names differ", facts.name, len(odd))
        return None
    if found:
        raise found.error(facts.name, str(facts.folder), facts.name)
    return module


def _build(facts: ComponentFacts, dtype: torch.dtype) -> nn.Module:
    assert facts.folder is not None
    if facts.library == "transformers":
        config = transformers.AutoConfig.from_pretrained(facts.folder, local_files_only=True)
        return getattr(transformers, facts.class_name)._from_config(config, dtype=dtype)  # type: ignore[no-any-return]
    cls: Any = getattr(diffusers, facts.class_name)
    module: nn.Module = cls.from_config(cls.load_config(facts.folder, local_files_only=True))
    module.register_to_config(_name_or_path=str(facts.folder))  # type: ignore[operator]
    return module


def _fill(
    module: nn.Module, request: LoadRequest, stop: threading.Event, on_progress: Progress, notes: list[str]
) -> None:
    """Read every tensor of a component's files into `module`."""
    facts = request.facts
    assert facts.folder is not None
    total, done, lost = sum(facts.stored.values()), 0, 0
    quantized = dict.fromkeys(linears_of(module), request.format.quantization) if request.format.quantization else {}
    files = weight_files(facts.folder, facts.variant, facts.name, facts.allow_pickle)
    for path, device in itertools.product(files, request.devices):
        try:
            with safe_open(path, "pt", device=device) as file:
                for key in file.keys():  # noqa: SIM118
                    if stop.is_set():
                        raise _CancelledError
                    if request.device_of(key) != device:
                        continue
                    value = file.get_tensor(key)
                    size = value.nbytes
                    cast = value.to(request.dtype) if value.is_floating_point() else value
                    lost += _overflowed(value, cast)
                    _assign(module, key, quantize(cast, quantized[key]) if key in quantized else cast)
                    done += size
                    on_progress(facts.name, done, total)
        except torch.OutOfMemoryError as problem:
            stop.set()
            raise _no_memory(facts.name, device, problem) from problem
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as problem:
            stop.set()
            raise _unreadable(facts.name, path, problem) from problem
    if empty := _empty(module):
        stop.set()
        raise _incomplete(module, facts, empty, {})
    _move_buffers(module, request)
    if lost:
        notes.append(f"{lost} values of the {facts.name} do not fit float16 and became infinite")
    log.info("loaded %s to %s in %s", facts.name, " and ".join(request.devices), request.dtype)


def _move_buffers(module: nn.Module, request: LoadRequest) -> None:
    """Move what the config gave, and no file holds, to its device."""
    for path, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[key] = buffer.to(request.device_of(f"{path}.{key}"))


def _overflowed(value: torch.Tensor, cast: torch.Tensor) -> int:
    """How many finite values became infinite in float16, from a dtype of more range."""
    if cast.dtype != torch.float16 or value.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return 0
    if value.numel():
        least, most = torch.aminmax(value)  # one fast pass, where counting takes twelve times as long as the cast
        if torch.maximum(-least, most) <= torch.finfo(torch.float16).max:  # not so where one is NaN
            return 0
    return int(torch.isinf(cast).sum() - torch.isinf(value).sum())


def _assign(module: nn.Module, key: str, value: torch.Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        before = owner._parameters[leaf]
        if before is None or before.shape != value.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}")
        trains = before.requires_grad and not is_quantized(value)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=trains)
    else:
        owner._buffers[leaf] = value


def cast_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point tensors of `module` in place, but for the buffers that stay float32 when loaded."""
    kept = {name: buffer for name, buffer in module.named_buffers() if "rotary" in name or "pos_embed" in name}
    nn.Module.to(module, dtype=dtype)
    for name, buffer in kept.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = buffer


def _by_library(request: LoadRequest, on_progress: Progress) -> nn.Module:
    """Let diffusers or transformers load one component."""
    facts = request.facts
    assert facts.folder is not None
    library: Any = transformers if facts.library == "transformers" else diffusers
    options: dict[str, Any] = {"dtype": request.dtype, "local_files_only": True, "output_loading_info": True}
    files = weight_files(facts.folder, facts.variant, facts.name, facts.allow_pickle)
    options["use_safetensors"] = all(path.suffix == ".safetensors" for path in files)
    if request.device != "cpu" and request.others is None:
        options["device_map"] = {"": request.device}
    if facts.variant and any(facts.folder.glob(f"*.{facts.variant}*")):
        options["variant"] = facts.variant
    try:
        module, info = getattr(library, facts.class_name).from_pretrained(str(facts.folder), **options)
    except torch.OutOfMemoryError as problem:
        raise _no_memory(facts.name, request.device, problem) from problem
    except (OSError, RuntimeError, ValueError, KeyError) as problem:
        raise _unreadable(facts.name, facts.folder, problem) from problem
    _check_loaded(module, info, facts)
    if request.others:
        request.others.move(module, torch.device(request.device))
    if request.format.quantization:
        quantize_linears(module, request.format.quantization)
    total = sum(facts.stored.values())
    on_progress(facts.name, total, total)
    loaded: nn.Module = module
    return loaded


def _check_loaded(module: nn.Module, info: Mapping[str, Any], facts: ComponentFacts) -> None:
    """Refuse what a library initialised at random because the files lack it, or hold it in another shape."""
    missing = sorted({*info["missing_keys"], *_empty(module)})
    reshaped = {key: (tuple(stored), tuple(wanted)) for key, stored, wanted in info["mismatched_keys"]}
    if missing or reshaped:
        raise _incomplete(module, facts, missing, reshaped)
    if ignored := sorted(info["unexpected_keys"]):
        log.info("%s: from_pretrained left %d tensors out: %s", facts.name, len(ignored), ignored[:NAMED])


def _empty(module: nn.Module) -> list[str]:
    """Tensors that no file and no config gave a value."""
    return [key for key, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]


def _incomplete(
    module: nn.Module, facts: ComponentFacts, missing: list[str], reshaped: dict[str, tuple[Shape, Shape]]
) -> CheckpointError:
    return Mismatch(missing, [], reshaped, len(module.state_dict())).error(facts.name, str(facts.folder), facts.name)


def _no_memory(name: Component, device: str, problem: Exception) -> RunError:
    first = str(problem).splitlines()[0]
    return RunError(f"out of memory while loading {name} to {device}: {first}", where=name, out_of_memory=True)


def _unreadable(name: Component, path: Path, problem: Exception) -> RunError:
    return RunError(f"{name} could not be loaded from {path}: {problem}", where=name, file=str(path))


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own progress bars and notices out of our output while loading."""
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()
