"""Shapes that operations gave before are those that PyTorch gives, and what shares memory is never remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from sana_deploy.rehearsal import shape_memory
from sana_deploy.rehearsal.shape_memory import ShapeMemory

aten = torch.ops.aten
OPERATIONS: dict[str, tuple[Any, Callable[[str], tuple[Any, ...]]]] = {
    "an int plus an int": (aten.add.Tensor, lambda at: (torch.ones(3, dtype=torch.int64, device=at), 1)),
    "an int plus a float": (aten.add.Tensor, lambda at: (torch.ones(3, dtype=torch.int64, device=at), 1.0)),
    "an int plus a bool": (aten.add.Tensor, lambda at: (torch.ones(3, dtype=torch.int64, device=at), True)),
    "a permuted sum": (aten.mul.Tensor, lambda at: (torch.ones(2, 3, 4, device=at).permute(2, 0, 1), 2.0)),
    "mm": (aten.mm.default, lambda at: (torch.ones(2, 3, device=at), torch.ones(5, 3, device=at).t())),
    "cat": (aten.cat.default, lambda at: ([torch.ones(2, 3, device=at), torch.ones(1, 3, device=at)],)),
    "several results": (
        aten.native_layer_norm.default,
        lambda at: (torch.ones(2, 3, device=at), [3], None, None, 1e-5),
    ),
    "another dtype": (aten._to_copy.default, lambda at: (torch.ones(2, 3, device=at).t(),)),
}


@pytest.mark.parametrize(("func", "arguments"), OPERATIONS.values(), ids=OPERATIONS)
def test_the_second_time_the_shape_is_remembered_and_right(func: Any, arguments: Callable[[str], Any]) -> None:
    memory = ShapeMemory()
    for one, _ in OPERATIONS.values():  # others before it change nothing
        memory.run(one, next(make for other, make in OPERATIONS.values() if other is one)("meta"), {})
    right = func(*arguments("cpu"))
    for _ in range(2):
        made = memory.run(func, arguments("meta"), {})
        assert type(made) is type(right)
        pairs = zip(made, right, strict=True) if isinstance(made, tuple) else [(made, right)]
        for one, other in pairs:
            assert (one.size(), one.stride(), one.dtype) == (other.size(), other.stride(), other.dtype)
            assert one.is_meta


def test_each_result_has_memory_of_its_own() -> None:
    memory, given = ShapeMemory(), torch.ones(4, device="meta")
    stores = {memory.run(aten.add.Tensor, (given, 1), {}).untyped_storage() for _ in range(3)}
    assert len({store._cdata for store in stores}) == 3
    assert len(memory._known) == 1


@pytest.mark.parametrize(
    ("func", "rest"), [(aten.view.default, ([2, 2],)), (aten._unsafe_view.default, ([2, 2],)), (aten.add_.Tensor, (1,)),
                       (aten.alias.default, ())]
)  # fmt: skip
def test_what_shares_memory_with_an_argument_is_not_remembered(func: Any, rest: tuple[Any, ...]) -> None:
    memory = ShapeMemory()
    for _ in range(2):
        given = torch.ones(4, device="meta")
        made = memory.run(func, (given, *rest), {})
        assert made.untyped_storage()._cdata == given.untyped_storage()._cdata
    assert not memory._known


def test_it_forgets_before_it_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_memory, "MOST", 10)
    memory = ShapeMemory()
    for size in range(100):
        memory.run(aten.add.Tensor, (torch.ones(size, device="meta"), 1), {})
        assert len(memory._known) <= 10


def test_a_repeated_operation_runs_once() -> None:
    memory, ran = ShapeMemory(), []

    class Counted:
        is_view = False
        _schema = type("Schema", (), {"is_mutable": False})

        def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
            ran.append(tensor.shape)
            return functional.silu(tensor)

    func = Counted()
    for size in (3, 3, 4, 3):
        memory.run(func, (torch.ones(size, device="meta"),), {})
    assert ran == [(3,), (4,)]
