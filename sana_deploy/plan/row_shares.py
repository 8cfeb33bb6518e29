"""How many of an image's rows each unit computes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def dealt(rows: int, speeds: Sequence[float], most: Sequence[int]) -> tuple[int, ...]:
    """Deal rows by speed, at least one to each, no more than `most` where they can be had elsewhere."""
    count = len(speeds)
    capped = dict[int, int]()
    while True:
        free = [i for i in range(count) if i not in capped]
        left, speed = rows - sum(capped.values()), sum(speeds[i] for i in free)
        over = {i: max(1, most[i]) for i in free if left * speeds[i] / speed > max(1, most[i])}
        if not over:
            break
        if len(over) == len(free):  # there is not enough memory anywhere
            capped, free, left, speed = {}, list(range(count)), rows, sum(speeds)
            break
        capped |= over
    exact = {i: left * speeds[i] / speed for i in free}
    found = {**capped, **{i: max(1, int(share)) for i, share in exact.items()}}
    order = sorted(free, key=lambda i: (found[i] - exact[i], i))
    spare, turn = rows - sum(found.values()), 0
    while spare > 0:
        found[order[turn % len(order)]] += 1
        spare, turn = spare - 1, turn + 1
    while spare < 0:
        largest = max(found, key=lambda i: (found[i], i))
        found[largest], spare = found[largest] - 1, spare + 1
    return tuple(found[i] for i in range(count))


def in_proportion(rows: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Deal rows in the proportion of `shares`, at least one to each; to fewer where there are fewer rows."""
    count = min(len(shares), rows)
    total = sum(shares[:count])
    edges = [round(rows * sum(shares[:i]) / total) for i in range(count + 1)]
    for i in range(1, count):
        edges[i] = min(max(edges[i], edges[i - 1] + 1), rows - (count - i))
    return tuple(end - first for first, end in pairwise(edges))
