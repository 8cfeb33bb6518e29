"""Safetensors files seen from outside: which ones a component has, and what their headers say.

No tensor is read. Format: https://huggingface.co/docs/safetensors/index#format (8 bytes little-endian header
length, a JSON header with dtype, shape and data_offsets per tensor, then the data).
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .._units import human_bytes
from ..errors import CheckpointError

BASE_NAMES = ("diffusion_pytorch_model", "model")
"""File stems that diffusers and transformers give a component's weights."""

FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "U64": 8, "I32": 4,
              "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorFacts:
    """One stored tensor: its safetensors dtype word and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(folder: Path, variant: str | None, where: str, allow_pickle: bool = False) -> list[Path]:
    """Return the safetensors files of one component folder, the variant's if it has one; pickled ones if allowed.

    Raises:
        CheckpointError: there are none, a shard of the index is missing, or only pickled weights are there.
    """
    for suffix in ([f".{variant}"] if variant else []) + [""]:
        for base in BASE_NAMES:
            single = folder / f"{base}{suffix}.safetensors"
            if single.is_file():
                return [single]
            index = folder / f"{base}.safetensors.index{suffix}.json"
            if index.is_file():
                return _shards(index, where)
    pickled = sorted(folder.glob("*.bin"))
    if pickled and allow_pickle:
        return pickled
    looked_for = " or ".join(f"{base}.safetensors" for base in BASE_NAMES)
    if hint := variant_hint((path.name for path in folder.glob("*.safetensors")), where):
        raise CheckpointError(f"only variants of the weights are in {folder}, no {looked_for}", where=where, hint=hint)
    if pickled:
        raise CheckpointError(
            f"only pickled weights ({pickled[0].name}) are in {folder}; pickles can run code and are not loaded",
            where=where,
            hint="convert them with save_pretrained, or accept them with model.allow_pickle=true",
        )
    raise CheckpointError(
        f"no safetensors file in {folder} (looked for {looked_for})",
        where=where,
        hint="download the whole checkpoint; a Git LFS clone without `git lfs pull` has no weights",
    )


def variant_hint(names: Iterable[str], where: str) -> str:
    """What takes weights of which only variants are there; empty where there are none.

    A ControlNet published apart takes no `model.variant`, which is the pipeline's.
    """
    pattern = re.compile(rf"(?:{'|'.join(BASE_NAMES)})\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
    variants = sorted({found[1] for name in names if (found := pattern.fullmatch(name))})
    if not variants:
        return ""
    if where.startswith("model.source"):
        return " or ".join(f"model.variant={variant}" for variant in variants)
    return f"load it with from_pretrained(..., variant={variants[0]!r}) and save it anew with save_pretrained"


def _shards(index: Path, where: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise CheckpointError(f"the shard index {index} is damaged", where=where) from problem
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(shards)} shards are missing in {index.parent}: {absent[0]}", where=where
        )
    return shards


def read_header(path: Path, where: str) -> dict[str, TensorFacts]:
    """Read the tensors that one safetensors file declares and check that their data is all there.

    A pickled file (`.bin`) is read by torch's restricted unpickler, which makes tensors and runs no code.

    Raises:
        CheckpointError: the file is no safetensors file, or is shorter or longer than its header says.
    """
    if path.suffix == ".bin":
        return _read_pickle(path, where)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: its header would be {human_bytes(length)} long "
                    f"in a file of {human_bytes(size)}",
                    where=where,
                    hint="download this file again",
                )
            entries = json.loads(stream.read(length))
        tensors, end = parse_entries(entries)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}", where=where) from problem
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"the header of {path} is damaged", where=where) from problem
    expected = 8 + length + end
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise CheckpointError(
            f"{path} is {state}: {human_bytes(size)} ({size} bytes) on disk, {expected} by its header",
            where=where,
            hint="download this file again",
            expected_bytes=expected,
            actual_bytes=size,
        )
    return tensors


def data_ranges(stream: BinaryIO, size: int) -> tuple[int, list[tuple[int, int]]] | None:
    """Return where a safetensors file's data begin and each tensor's range of bytes from there on; None for others."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        return None
    try:
        entries = json.loads(stream.read(length))
        parse_entries(entries)
        return 8 + length, sorted(tuple(one["data_offsets"]) for key, one in entries.items() if key != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_pickle(path: Path, where: str) -> dict[str, TensorFacts]:
    import torch

    words = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
             "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        return {
            key: TensorFacts(words[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for key, t in state.items()
        }
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as problem:
        first = str(problem).splitlines()[0]
        raise CheckpointError(f"{path} holds more than tensors, or is damaged: {first}", where=where) from problem


def parse_entries(entries: Mapping[str, Any]) -> tuple[dict[str, TensorFacts], int]:
    """Turn a decoded header into tensor facts and the end of the last tensor's data, in bytes."""
    tensors: dict[str, TensorFacts] = {}
    end = 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        facts = TensorFacts(str(entry["dtype"]), tuple(int(side) for side in entry["shape"]))
        start, stop = (int(offset) for offset in entry["data_offsets"])
        if facts.numel * ITEM_BYTES[facts.dtype] != stop - start:
            raise ValueError(name)
        tensors[name] = facts
        end = max(end, stop)
    return tensors, end
