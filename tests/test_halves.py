"""Arguments cut into the halves of guidance, tensors that are on two devices, copies that follow a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sana_deploy.run.halves import Halves, UncutError, cut
from sana_deploy.run.mirror import copied_to, digest
from sana_deploy.run.module_state import ModuleState
from sana_deploy.run.split_tensor import SplitTensor, as_whole

NAMES = ["rows", "scale", "mask"]


def split(*shape: int) -> tuple[SplitTensor, list[int]]:
    """A tensor in two halves, and how often its second half was fetched."""
    fetched: list[int] = []

    def fetch(half: torch.Tensor) -> torch.Tensor:
        fetched.append(1)
        return half

    first, second = torch.randn(*shape), torch.randn(*shape)
    return SplitTensor([first, second], fetch), fetched


def test_positional_and_named_arguments_are_cut_where_they_have_rows() -> None:
    rows, one, number = torch.arange(8.0).reshape(4, 2), torch.ones(1, 3), torch.tensor(2.0)
    (args, kwargs), (other_args, other_kwargs) = Halves().cut(
        "net", NAMES, (), [rows, [0.5, 1.0]], {"mask": one, "more": (rows, None), "number": number, "flag": True}
    )
    assert torch.equal(args[0], rows[:2])
    assert torch.equal(other_args[0], rows[2:])
    assert args[1] == other_args[1] == [0.5, 1.0], "numbers go to both"
    assert kwargs["mask"] is other_kwargs["mask"] is one, "one row is everybody's"
    assert kwargs["number"] is other_kwargs["number"] is number
    assert torch.equal(other_kwargs["more"][0], rows[2:])
    assert kwargs["more"][1] is None
    assert kwargs["flag"] is other_kwargs["flag"] is True


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"rows": torch.ones(3, 1)}, "the call has 3 rows"),
        ({"rows": torch.ones(1, 1)}, "the call has 1 rows"),
        ({}, "the call has 1 rows"),
        ({"rows": torch.ones(4, 1), "mask": torch.ones(2, 1)}, "mask has 2 rows, the call has 4"),
        ({"rows": torch.ones(4, 1), "extra": {"ip": torch.ones(4)}}, "extra is a dict with tensors"),
    ],
)
def test_what_is_not_clear_is_not_cut(kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(UncutError, match=why):
        Halves().cut("net", NAMES, (), (), kwargs)


def test_a_steady_argument_gives_the_same_halves_until_it_changes() -> None:
    halves, rows, mask = Halves(), torch.ones(2, 1), torch.arange(4.0).reshape(2, 2)

    def second() -> torch.Tensor:
        made: torch.Tensor = halves.cut("net", NAMES, ("mask",), (rows,), {"mask": mask})[1][1]["mask"]
        return made

    kept = second()
    assert second() is kept
    mask.mul_(2)
    assert second() is not kept
    kept, mask = second(), mask.clone()
    assert second() is not kept, "another tensor with the same values"


def test_inference_tensors_hide_writing_and_are_cut_each_time() -> None:
    with torch.inference_mode():
        halves, rows, mask = Halves(), torch.ones(2, 1), torch.ones(2, 2)
        made = [halves.cut("net", NAMES, ("mask",), (rows,), {"mask": mask})[0][1]["mask"] for _ in range(2)]
    assert made[0] is not made[1]


@pytest.mark.parametrize("inference", [False, True])
def test_halves_are_handed_on_and_cast_without_the_whole(inference: bool) -> None:
    with torch.inference_mode(inference):
        whole, fetched = split(1, 3)
        assert (whole.shape, whole.dtype, whole.device.type) == ((2, 3), torch.float32, "cpu")
        assert whole.to(dtype=torch.float32) is whole, "as the pipeline does where dtypes agree"
        first, second = cut((whole,), 2, "residuals")
        assert whole.parts is not None
        assert first[0] is whole.parts[0]
        assert second[0] is whole.parts[1]
        half = whole.to(dtype=torch.float16)
        assert isinstance(half, SplitTensor)
        assert half.parts is not None
        assert [one.dtype for one in half.parts] == [torch.float16] * 2
        assert fetched == []


@pytest.mark.parametrize("inference", [False, True])
def test_anything_else_works_on_the_whole_and_what_is_written_stays(inference: bool) -> None:
    with torch.inference_mode(inference):
        whole, fetched = split(1, 3)
        assert whole.parts is not None
        expected = torch.cat(whole.parts)
        assert torch.equal(whole * 2, expected * 2)
        assert whole.add_(1) is whole
        whole[0].zero_()
        expected += 1
        expected[0] = 0
        assert not vars(whole)["parts"], "they would be out of date"
        assert torch.equal(cut(whole, 2, "residual")[1], expected[1:])
        assert torch.equal(as_whole([whole])[0], expected)
        assert type(as_whole([whole])[0]) is torch.Tensor
        assert fetched == [1]


class Tied(nn.Module):
    """Two layers with one weight, a buffer, and an attribute that knows the module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.arange(3))
        self.owner = [self]


def test_a_copy_shares_what_layers_share_and_nothing_with_the_module() -> None:
    module: Any = Tied().requires_grad_(False)
    module.register_forward_hook(lambda *_: None)
    module.forward = print  # as placing does
    made: Any = copied_to(module, torch.device("cpu"))
    assert made.one.weight is made.two.weight is not module.one.weight
    assert made.owner == [made]
    assert not made.one.weight.requires_grad
    assert not made._forward_hooks
    assert "forward" not in vars(made)
    module.one.weight.add_(1)
    module.table.add_(1)
    assert not torch.equal(made.one.weight, module.one.weight)
    assert not torch.equal(made.table, module.table)


def test_a_digest_changes_with_values_and_knows_nan_again() -> None:
    floats, whole = torch.randn(50, dtype=torch.float16), torch.arange(50, dtype=torch.int8)
    before = digest([floats, whole])
    assert before is not None
    for tensor in (floats, whole):
        kept = tensor.clone()
        tensor.data[7] += 1
        found = digest([floats, whole])
        assert found is not None
        assert not torch.equal(found, before)
        tensor.data.copy_(kept)
        assert torch.equal(digest([floats, whole]), before)  # type: ignore[arg-type]
    floats[0] = float("nan")
    assert torch.equal(digest([floats]), digest([floats]))  # type: ignore[arg-type]
    assert digest([]) is None


def test_a_state_with_values_sees_writing_and_one_without_does_not() -> None:
    module: Any = Tied().requires_grad_(False)
    with_values, without = ModuleState(module, values=True), ModuleState(module)
    assert with_values.holds()
    module.two.bias.add_(1)
    assert not with_values.holds()
    assert without.holds(), "a graph reads the new values"
    module.two.forward = print
    assert not without.holds(), "but not another forward"
