"""What files hold, in digests, which differ for other weights of the same shapes. Nothing is loaded.

A digest of samples covers a file's size, its header and blocks of every tensor, so that a model trained further, merged
or swapped is noticed while some MB of many GB are read. A digest of the whole file covers every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from .._files import cache_root, write_text
from .._units import MIB
from ..errors import CheckpointError, InputError
from ..facts.headers import data_ranges
from ..facts.shapes import digest
from .records import FileContent

SMALL = 4 * MIB
"""Files up to this many bytes are sampled whole."""
BLOCK = 4096
"""Bytes of a sample."""
TENSOR_STRIDE = 64 * MIB
"""A tensor gets one more sample for so many bytes."""
FILE_STRIDE = 4 * MIB
"""The same for a file whose tensors are not known (pickles)."""
SETTLED_NS = 1_000_000_000
"""A file changed more recently is not kept in the cache: its time stamps might not tell the next change."""
METHOD = "samples1"
"""Names how samples are taken; raised when that changes."""


def contents(paths: Iterable[Path], where: str, whole: bool = False) -> dict[str, FileContent]:
    """Return file name -> content; `whole` also reads every byte of the files that are larger than SMALL.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = sorted(paths)
    try:
        sizes = [path.stat().st_size for path in found]
        samples = [_sampled(path) for path in found]
        with ThreadPoolExecutor(4) as pool:
            wholes = list(pool.map(lambda path: _whole(path) if whole else None, found))
    except OSError as problem:
        raise CheckpointError(f"{problem.filename} cannot be read: {problem.strerror}", where=where) from problem
    return {
        path.name: FileContent(bytes=size, sampled=sample, whole=full)
        for path, size, sample, full in zip(found, sizes, samples, wholes, strict=True)
    }


def _whole(path: Path) -> str | None:
    """sha256 of a file; None for a small one, whose samples are all of it."""
    if path.stat().st_size <= SMALL:
        return None
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _sampled(path: Path) -> str:
    """Digest of samples, kept in the cache folder for large files under what changes whenever the file does."""
    before = path.stat()
    if before.st_size <= SMALL:
        return _sample(path)
    key = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, METHOD]
    resolved = str(path.resolve())
    kept = cache_root() / "content" / f"{digest(resolved)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if entry["key"] == key:
            return str(entry["sampled"])
    sampled = _sample(path)
    if time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS:
        with contextlib.suppress(InputError):  # without a cache folder it is sampled every time
            write_text(kept, json.dumps({"path": resolved, "key": key, "sampled": sampled}, indent=1) + "\n")
    return sampled


def _sample(path: Path) -> str:
    size = path.stat().st_size
    state = hashlib.sha256(f"{METHOD} {size}\n".encode())
    with path.open("rb", buffering=0) as stream:
        for start, stop in _blocks(stream, size):
            stream.seek(start)
            state.update(stream.read(stop - start))
    return f"{METHOD}:{state.hexdigest()}"


def _blocks(stream: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Byte ranges to read: a small file whole; the header and some of each tensor; or blocks at even distances."""
    if size <= SMALL:
        yield 0, size
    elif (ranges := data_ranges(stream, size)) is not None:
        data, tensors = ranges
        yield 0, data
        for start, stop in tensors:
            yield from _even(data + start, data + stop, TENSOR_STRIDE)
    else:
        yield from _even(0, size, FILE_STRIDE)
        yield size - BLOCK, size


def _even(start: int, stop: int, stride: int) -> Iterator[tuple[int, int]]:
    """Blocks at even distances, one more for each `stride` of bytes; a range shorter than a block is read whole."""
    count = 1 + (stop - start) // stride
    for number in range(count):
        middle = start + (stop - start) * (2 * number + 1) // (2 * count)
        first = max(start, middle - BLOCK // 2)
        yield first, min(stop, first + BLOCK)
