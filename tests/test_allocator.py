"""What the CUDA allocator takes beyond tensors: the rules one by one, and whole models beside what an H100 took."""

from __future__ import annotations

import pytest

from sana_deploy.allocator import context_bytes, unsplit_bytes, workspace_bytes
from sana_deploy.units import KIB, MIB


@pytest.mark.parametrize(
    ("size", "extra"),
    [
        (0, 0),
        (1, 511),
        (MIB, 0),
        (3 * MIB, 0),  # six in a segment leave 2 MiB, which is split off
        (int(9.75 * MIB), MIB // 4),  # two leave half a MiB, which is not
        (int(11.5 * MIB), MIB // 2),  # alone in 12 MiB
        (int(10.5 * MIB), 0),  # alone in 12 MiB, of which 1.5 are split off
    ],
)
def test_blocks_follow_the_rules_of_the_allocator(size: int, extra: int) -> None:
    assert unsplit_bytes([size]) == extra


def test_workspaces_are_larger_from_hopper_on() -> None:
    assert workspace_bytes((9, 0)) == workspace_bytes((12, 0)) == 33 * MIB
    assert workspace_bytes((7, 5)) == workspace_bytes((8, 9)) == 9 * MIB + 128 * KIB


def test_the_context_is_known_where_it_was_measured() -> None:
    assert context_bytes((9, 0)) >= 719 * MIB
    assert context_bytes((8, 6)) == 450 * MIB
