"""Tensors: who shares their numbers, and which of these are least."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memlm.tensors import copied, is_alone, least

SHARED: dict[str, Callable[[Tensor], object]] = {
    "a view": lambda x: x[:, 1:],
    "a row": lambda x: x[0],
    "detached": lambda x: x.detach(),
    "a view of a view": lambda x: x.view(-1)[2:],
}


@pytest.mark.parametrize("what", SHARED)
def test_a_tensor_is_alone_while_no_other_has_its_numbers(what: str) -> None:
    x = torch.zeros(2, 3)
    assert is_alone(x)
    other = SHARED[what](x)
    assert not is_alone(x)
    del other
    assert is_alone(x)


def test_what_cannot_be_changed_in_place_is_not_alone() -> None:
    assert not is_alone(torch.zeros(()).expand(2, 3))
    assert not is_alone(torch.zeros(2, 3, requires_grad=True))
    with torch.inference_mode():
        inside = torch.zeros(2, 3)
        assert is_alone(inside)
    assert not is_alone(inside), "outside of inference it may not be changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("n", [5, 400_000])
def test_a_copy_of_one_number_for_all_is_alone_and_may_be_written(dtype: torch.dtype, value: int, n: int) -> None:
    one = torch.full((), value, dtype=dtype).expand(1, n)
    copy = copied(one)
    assert torch.equal(copy, one)
    assert is_alone(copy)
    copy[0, 3] = 7
    assert (copy[0, 2], copy[0, 3], one[0, 3]) == (value, 7, value)


@pytest.mark.parametrize(("n", "of"), [(1, 1), (5, 7), (7, 7), (3, 2000), (40, 2000), (2000, 2000), (6, 64 * 24 + 5)])
def test_the_least_are_those_of_a_sorted_list_ties_included(n: int, of: int) -> None:
    g = torch.Generator().manual_seed(n)
    for spread in (3, 50, 10**6):  # many equal ones, some, hardly any
        number = torch.randint(-spread, spread, (3, of), generator=g) / 7 - 2.0**23 * (
            torch.rand(3, of, generator=g) < 0.1
        )
        number[0, ::5] = -torch.inf
        expected = [sorted(range(of), key=lambda i: (row[i], i))[:n] for row in number.tolist()]
        assert least(number, n).tolist() == expected
