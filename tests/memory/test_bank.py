"""The persistent bank: what a state begins with, what commits change, and what a checkpoint brings."""

import copy
from typing import Any

import torch

from memlm.memory.ltm import LongTermMemory
from memlm.memory.state import named_tensors
from memlm.tensors import Host, is_alone


def memory_of(**settings: object) -> LongTermMemory:
    torch.manual_seed(0)
    return LongTermMemory(8, n_slot=6, d_key=4, d_value=4, span=2, **settings)  # type: ignore[arg-type]


def some(memory: LongTermMemory, value: float) -> Any:
    """A full bank whose slots all hold ``value``."""
    fresh, number = memory.init_state(1), torch.arange(6)[None]
    return fresh._replace(
        key=torch.full((1, 6, 4), 0.5), value=torch.full((1, 6, 4), value), priority=-number.float(), record=number,
        document=number, position=number, tokens=torch.zeros_like(fresh.tokens), n_record=torch.tensor([6]),
        n_used=Host(torch.tensor([6])),
    )  # fmt: skip


def test_a_bank_of_a_document_exists_once_something_was_stored() -> None:
    memory = memory_of()
    assert not memory.bank.exists
    assert not memory.state_dict().keys() & {"bank.key"}
    assert not memory.filled(memory.bank.state()).any()
    memory.bank.commit(some(memory, 1.0))
    assert memory.bank.exists
    assert "bank.key" in memory.state_dict()
    started = memory.bank.first(3)
    assert started.value.shape == (3, 6, 4)
    assert (started.value == 1).all()


def test_states_begin_with_the_bank_itself_and_outlive_what_becomes_of_it() -> None:
    memory = memory_of(scope="shared")
    memory.bank.create()
    memory.bank.commit(some(memory, 1.0))
    state = memory.bank.first(4)
    assert state.value.data_ptr() == memory.bank.value.data_ptr(), "nothing is copied"
    new = some(memory, 2.0)
    memory.bank.commit(new)
    assert memory.bank.value.data_ptr() == new.value.data_ptr()
    assert (state.value == 1).all()
    other = memory_of(scope="shared")
    other.bank.create()
    other.bank.commit(some(other, 3.0))
    state = memory.bank.first(1)
    memory.load_state_dict(other.state_dict())
    assert (memory.bank.value == 3).all()
    assert (state.value == 2).all(), "a state that was handed out has changed"


def test_a_bank_that_is_released_is_alone_unless_a_state_was_handed_out() -> None:
    memory = memory_of()
    memory.bank.commit(some(memory, 1.0))
    at = memory.bank.value.data_ptr()
    state = memory.bank.release()
    assert not memory.bank.exists
    assert state.value.data_ptr() == at
    assert is_alone(state.value)
    memory.bank.commit(state)
    del state
    handed_out = memory.bank.first(1)
    state = memory.bank.release()
    assert not is_alone(state.value)
    del handed_out
    assert is_alone(state.value)


def test_loading_brings_a_bank_or_takes_it_away() -> None:
    full, empty = memory_of(), memory_of()
    full.bank.commit(some(full, 1.0))
    full.bank.uses()[2] = 5
    nothing = empty.state_dict()
    empty.load_state_dict(full.state_dict())
    stored = named_tensors(full.bank.state())
    assert all(torch.equal(part, stored[name]) for name, part in named_tensors(empty.bank.state()).items())
    assert empty.bank.uses().tolist() == [0, 0, 5, 0, 0, 0]
    empty.load_state_dict(nothing)
    assert not empty.bank.exists
    assert empty.bank.uses().tolist() == [0] * 6


def test_a_copy_of_a_memory_has_a_bank_of_its_own() -> None:
    memory = memory_of()
    memory.bank.commit(some(memory, 1.0))
    other = copy.deepcopy(memory)
    assert other.bank.memory is other
    other.bank.commit(some(other, 2.0))
    assert (memory.bank.state().value == 1).all()


def test_fields_that_share_numbers_are_held_apart() -> None:
    memory = memory_of()
    state = some(memory, 0.5)
    memory.bank.commit(state._replace(value=state.key))
    assert memory.bank.key.data_ptr() != memory.bank.value.data_ptr()
    assert torch.equal(memory.bank.key, memory.bank.value)
