"""Virtual machines from words: `2xt4`, `[rtx4090, rtx3060]`, `2x8GiB` -> `Machine`."""

from __future__ import annotations

import re
from dataclasses import replace

from .._units import MIB, SIZE, human_bytes, parse_bytes
from ..declare.spec import VirtualMachine
from ..errors import InvalidSpecError, did_you_mean
from .known_gpus import KNOWN_GPUS, KnownGpu
from .machine import Gpu, Machine, host_memory

MOST_GPUS = 16
_COUNTED = re.compile(r"(?:(\d+)\s*x\s*)?([a-z0-9][\w .-]*)", re.IGNORECASE)
_PLAIN = KnownGpu("GPU", 0, (8, 6), 46, 40.0, 40.0, 20.0, 448, 16, 0, "a plain card of the given memory")


def describe_machine(spec: VirtualMachine) -> Machine:
    """Make the machine that `spec` describes.

    Raises:
        InvalidSpecError: an unknown GPU (with the nearest name), no GPU at all, or an impossible memory.
    """
    rows = [row for word in _words(spec.gpus) for row in _rows(word)]
    if not 1 <= len(rows) <= MOST_GPUS:
        raise InvalidSpecError(
            f"a virtual machine has 1 to {MOST_GPUS} GPUs (got {len(rows)})",
            where="machine.gpus",
            hint="machine.gpus=2xt4; machine=present plans for this host, GPUs or none",
        )
    used = _per_gpu(spec.used_bytes, len(rows))
    given = spec.memory_bytes
    if given is not None:
        _check_memory(given, str(spec.memory), "machine.memory")
    gpus = []
    for index, (row, taken) in enumerate(zip(rows, used, strict=True)):
        total = row.memory_mib * MIB if given is None else given
        if not 0 <= taken < total:
            raise InvalidSpecError(
                f"{human_bytes(taken)} are declared used on GPU {index}, which has {human_bytes(total)}",
                where="machine.used",
            )
        gpus.append(Gpu(index, row.name, total, total - taken, row.capability, row.multiprocessors))
    return Machine("virtual", tuple(gpus), host_memory())


def _words(gpus: str | list[str]) -> list[str]:
    words = gpus.split(",") if isinstance(gpus, str) else gpus
    return [word.strip() for word in words if word.strip()]


def _rows(word: str) -> list[KnownGpu]:
    match = _COUNTED.fullmatch(word)
    if not match:
        raise InvalidSpecError(f"{word!r} names no GPU", where="machine.gpus", hint="machine.gpus=2xt4 or 2x8GiB")
    count, name = int(match.group(1) or 1), match.group(2).strip()
    if count > MOST_GPUS:
        raise InvalidSpecError(f"a virtual machine has 1 to {MOST_GPUS} GPUs (got {count})", where="machine.gpus")
    if SIZE.fullmatch(name):
        size = parse_bytes(name, "machine.gpus")
        _check_memory(size, name, "machine.gpus")
        return [replace(_PLAIN, name=f"GPU {name}", memory_mib=size // MIB)] * count
    return [_row(name)] * count


def _row(name: str) -> KnownGpu:
    """The row of a GPU by its name, the driver's name, or its name and the memory it is sold with: `A100 80GB`."""
    key = _plain(name)
    names = {_plain(one): row for known, row in KNOWN_GPUS.items() for one in (known, row.name)}
    if key in names:
        return names[key]
    sold = re.fullmatch(r"(.+?)[\s_-]+(\d+)\s*gi?b", name, re.IGNORECASE)
    for known, row in KNOWN_GPUS.items():
        least, most = 0.9 * row.memory_mib / 1024, 1.1 * row.memory_mib / 1024
        if sold and _plain(re.sub(r"-\d+gb$", "", known)) == _plain(sold[1]) and least < int(sold[2]) < most:
            return row
    raise InvalidSpecError(
        f"{name!r} is not a known GPU",
        where="machine.gpus",
        hint=f"{did_you_mean(key, KNOWN_GPUS)} Its memory alone will do too, e.g. 2x8GiB",
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce|tesla", "", name.lower())


def _check_memory(size: int, text: str, where: str) -> None:
    if size < MIB:
        raise InvalidSpecError(f"a GPU has memory (got {text!r})", where=where, hint="write it like 8GiB or 500MiB")


def _per_gpu(sizes: int | list[int], count: int) -> list[int]:
    """One size for each of `count` GPUs."""
    if isinstance(sizes, int):
        return [sizes] * count
    if len(sizes) != count:
        raise InvalidSpecError(f"{len(sizes)} sizes for {count} GPUs", where="machine.used")
    return sizes
