import io
from operator import attrgetter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.memory import state as states
from memlm.models.state import ModelState
from memlm.tensors import Host


class Leaf(NamedTuple):
    value: Tensor
    count: Host


class Tree(NamedTuple):
    leaves: dict[str, tuple[Leaf, ...]]
    extra: Tensor | None
    parts: list[Tensor]


def leaf(n_row: int, start: float = 0.0) -> Leaf:
    value = torch.arange(n_row * 2 * 3, dtype=torch.float32).view(n_row, 2, 3) + start
    return Leaf(value, Host(torch.arange(n_row)))


def tree(n_row: int = 3, start: float = 0.0) -> Tree:
    return Tree({"a": (leaf(n_row, start), leaf(n_row, start + 100)), "b": ()}, None, [torch.ones(n_row, 1) * start])


def equal(a: Tree, b: Tree) -> bool:
    return all(torch.equal(x, y) for x, y in zip(states.tensors(a), states.tensors(b), strict=True))


def test_map_tensors_keeps_the_structure() -> None:
    doubled = states.map_tensors(lambda t: 2 * t, tree(start=1.0))
    assert isinstance(doubled, Tree)
    assert isinstance(doubled.leaves["a"], tuple)
    assert isinstance(doubled.leaves["a"][0], Leaf)
    assert isinstance(doubled.parts, list)
    assert doubled.leaves["b"] == ()
    assert doubled.extra is None
    assert torch.equal(doubled.leaves["a"][1].value, 2 * leaf(3, 101.0).value)


def test_map_tensors_over_several_states() -> None:
    summed = states.map_tensors(lambda a, b: a + b, tree(), tree(start=5.0))
    assert torch.equal(summed.leaves["a"][0].value, leaf(3).value + leaf(3, 5.0).value)


def test_map_tensors_may_leave_the_host_alone() -> None:
    state = tree()
    mapped = states.map_tensors(lambda t: t + 1, state, host=False)
    assert mapped.leaves["a"][0].count is state.leaves["a"][0].count
    assert torch.equal(mapped.leaves["a"][0].value, state.leaves["a"][0].value + 1)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(TypeError, match="int"):
        states.map_tensors(lambda t: t, {"a": 3})
    with pytest.raises(ValueError, match="argument"):
        states.map_tensors(lambda a, b: a, (torch.zeros(1),), (torch.zeros(1), torch.zeros(1)))


def test_tensors_are_in_a_fixed_order() -> None:
    state = tree()
    a, b = state.leaves["a"]
    expected = [a.value, a.count.tensor, b.value, b.count.tensor, state.parts[0]]
    assert all(x is y for x, y in zip(states.tensors(state), expected, strict=True))


def test_detach_cuts_the_graph_and_keeps_the_values() -> None:
    weight = torch.ones(3, 1, requires_grad=True)
    state = states.detach({"a": 2 * weight})
    assert not state["a"].requires_grad
    assert torch.equal(state["a"], torch.full((3, 1), 2.0))


def test_move_leaves_the_host_on_the_cpu() -> None:
    moved = states.move(tree(), "meta")
    assert moved.leaves["a"][0].value.device.type == "meta"
    assert moved.leaves["a"][0].count.tensor.device.type == "cpu"


def test_where_rows() -> None:
    a, b = tree(), tree(start=50.0)
    mixed = states.where_rows(torch.tensor([True, False, True]), a, b)
    for mixed_part, a_part, b_part in zip(*map(states.tensors, (mixed, a, b)), strict=True):
        assert torch.equal(mixed_part[[0, 2]], a_part[[0, 2]])
        assert torch.equal(mixed_part[1], b_part[1])


def test_where_rows_passes_gradients_of_the_chosen_rows_only() -> None:
    a, b = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    states.where_rows(torch.tensor([True, False, True]), (a,), (b,))[0].sum().backward()
    assert torch.equal(a.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(b.grad, 1 - a.grad)


def test_select_rows_permutes_repeats_and_drops() -> None:
    picked = states.select_rows(tree(), torch.tensor([2, 2, 0]))
    assert picked.leaves["a"][0].count.tensor.tolist() == [2, 2, 0]
    assert torch.equal(picked.leaves["a"][0].value, leaf(3).value[[2, 2, 0]])
    assert states.tensors(states.select_rows(tree(), torch.tensor([], dtype=torch.long)))[0].shape == (0, 2, 3)


def test_n_byte() -> None:
    assert states.n_byte(tree(n_row=1)) == 2 * (6 * 4 + 8) + 4
    assert states.n_byte(tree(n_row=3)) == 3 * states.n_byte(tree(n_row=1))
    assert states.n_byte(torch.zeros(3, dtype=torch.bfloat16)) == 6
    assert states.n_byte({}) == 0


def test_to_dict_and_from_dict_survive_a_safe_load() -> None:
    state = tree(start=7.0)
    plain = states.to_dict(state)
    assert type(plain) is dict
    assert type(plain["leaves"]["a"]) is list
    assert type(plain["leaves"]["a"][0]) is dict
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    restored = states.from_dict(torch.load(file, weights_only=True), like=tree())
    assert isinstance(restored, Tree)
    assert isinstance(restored.leaves["a"][1], Leaf)
    assert equal(restored, state)


def test_from_dict_takes_another_number_of_rows() -> None:
    assert equal(states.from_dict(states.to_dict(tree(n_row=5)), like=tree(n_row=1)), tree(n_row=5))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"value": torch.zeros(1, 2, 4), "count": torch.zeros(1)}, r"expected rows of \(2, 3\), got \(1, 2, 4\)"),
        ({"value": [1.0], "count": torch.zeros(1)}, "got list"),
        ({"value": torch.zeros(1, 2, 3)}, "expected the fields"),
        ({"value": torch.zeros(1, 2, 3), "count": torch.zeros(1), "more": torch.zeros(1)}, "expected the fields"),
        ([torch.zeros(1, 2, 3)], "expected the fields"),
    ],
)
def test_from_dict_refuses_another_memory(plain: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        states.from_dict(plain, like=leaf(1))


def test_from_dict_refuses_another_number_of_parts() -> None:
    with pytest.raises(ValueError, match="expected 2 parts, got 1"):
        states.from_dict([torch.zeros(1)], like=(torch.zeros(1), torch.zeros(1)))


def test_renewed_rows_are_written_in_place() -> None:
    state, fresh = tree(), tree(start=50.0)
    before, places = states.map_tensors(torch.clone, state), [part.data_ptr() for part in states.tensors(state)]
    assert states.renewed(state, fresh, torch.tensor([False] * 3)) is state
    expected = states.where_rows(torch.tensor([True, False, True]), fresh, before)
    view = state.leaves["a"][1].value[:]  # somebody else's
    new = states.renewed(state, fresh, torch.tensor([True, False, True]))
    assert equal(new, expected)
    same = [part.data_ptr() == place for part, place in zip(states.tensors(new), places, strict=True)]
    assert same == [True, True, False, True, True]  # but for what others have a view of
    assert torch.equal(view, before.leaves["a"][1].value)


# Memories whose writes change little of what they hold, and the part that is written in place.
IN_PLACE = {
    "ltm": ("key", "value"), "knn": ("key", "value"), "adaptive": ("key", "value"), "camelot": ("key", "value"),
    "memoria": ("engrams.cofire",),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_large_stays_where_it_is_if_the_state_is_given_away(name: str) -> None:
    make, ids = laws.builder(laws.nodes_of(name)), laws.text(2, 8 * laws.T)
    model = make(memory_layers="all")
    state = model(ids[:, : 4 * laws.T]).state
    large = attrgetter(*IN_PLACE[name], "__class__")

    def places(state: ModelState) -> list[int]:
        return [part.data_ptr() for held in state.memory[name] for part in large(held)[:-1]]

    begins = torch.tensor([[False, True, False, False], [False] * 4])
    before, first = places(state), states.map_tensors(torch.clone, state)
    kept = model(ids[:, 4 * laws.T :], state=state, reset=begins).state
    assert not set(places(kept)) & set(before)
    assert all(torch.equal(*pair) for pair in zip(states.tensors(state), states.tensors(first), strict=True))
    given = model(ids[:, 4 * laws.T :], state=state, reset=begins, donate=True).state
    assert places(given) == before
    for one, other in zip(states.tensors(kept.memory), states.tensors(given.memory), strict=True):
        assert torch.equal(one, other)
