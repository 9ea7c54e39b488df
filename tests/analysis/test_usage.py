"""Which slots are read, against a loop in plain Python."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from memlm.analysis.usage import banks, memory_numbers, read_weights, slot_changes, slot_fields
from memlm.memory.contract import Read
from memlm.memory.slots import Slots
from tests.experiments.tiny import tiny

TOKENIZER = SimpleNamespace(pad_id=0, vocab_size=30)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_read_weights_add_up_by_slot(scope):
    model = tiny(TOKENIZER, "ltm", "stm", **({} if scope == "sequence" else {"scope": scope})) if scope == "sequence" \
        else tiny(TOKENIZER, "ltm", scope=scope)  # fmt: skip
    model.eval()
    ids = torch.randint(30, (3, 64), generator=torch.Generator().manual_seed(0))
    state = model(ids).state
    mask = torch.rand(3, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    out = model(ids, state=state, write=False)
    found = read_weights(model, out.reads, state, mask)
    assert set(found) == {f"{name}/1" for name in model.memory}
    for label, total in found.items():
        read, n_bank = out.reads[label], len(total)
        expected = torch.zeros_like(total)
        for row in range(3):
            for token in range(64):
                for slot, weight in zip(read.slots[row, token], read.weights[row, token], strict=True):
                    if slot >= 0 and mask[row, token]:
                        expected[row % n_bank, slot] += weight
        assert torch.allclose(total, expected, atol=1e-5)
        assert total.sum() > 1
        assert n_bank == (1 if scope == "shared" else 3)


def test_banks_by_layer_or_by_name():
    class One(Slots):
        around = "layers"

        def filled(self, state):
            return state[..., 0] > 0

    one, layered = One(), [Slots(), Slots()]
    model = SimpleNamespace(memory={"a": layered, "b": [one]}, memory_layers=[1, 3])
    state = SimpleNamespace(memory={"a": ("x", "y"), "b": (torch.ones(2, 4, 1),)})
    found = banks(model, state)
    assert list(found) == ["a/1", "a/3", "b"]
    assert found["a/3"] == (layered[1], "y")
    # reads of all its layers count for the one bank
    read = Read(
        torch.zeros(2, 1, 1), torch.tensor([[[0, -1]], [[2, 2]]]), torch.full((2, 1, 2), 0.25), torch.ones(2, 1)
    )
    model.memory, state.memory = {"b": [one]}, {"b": state.memory["b"]}
    total = read_weights(model, {"b/1": read, "b/3": read}, state)["b"]
    assert total.tolist() == [[0.5, 0, 0, 0], [0, 0, 1.0, 0]]


def test_numbers_of_a_call_by_hand():
    read = Read(
        torch.zeros(1, 2, 1),
        torch.tensor([[[0, 1], [0, -1]]]),
        torch.tensor([[[0.25, 0.25], [0.5, 0.0]]]),
        torch.tensor([[0.2, 0.6]]),
    )
    out = SimpleNamespace(reads={"a/3": read}, trace={"a": {"write_gate": torch.tensor([0.2, 0.4])}})
    found = {name: round(float(value), 5) for name, value in memory_numbers(out).items()}
    assert found == {
        "memory/a/write_gate": 0.3,
        "memory/a/3/read_gate": 0.4,
        "memory/a/3/read_mass": 0.5,
        "memory/a/3/read_entropy": 0.34657,  # ln 2 of one token, 0 of the other
    }


class _Bank(NamedTuple):
    place: torch.Tensor
    value: torch.Tensor
    note: torch.Tensor


class _Placed(Slots):
    tells = True

    def filled(self, state):
        return state.note > 0

    def places(self, state):
        return state.place if self.tells else None


def _bank(place, value, note):
    return _Bank(torch.tensor([place]), torch.tensor([value])[..., None], torch.tensor([note]))


def test_changes_of_slots_by_hand():
    before = _bank([4, 9, 7, 0], [1.0, 2.0, 3.0, 0.0], [1, 1, 1, 0])
    # 9 moved to slot 0, 4 is gone, 12 is new, 7 is where it was though its value has changed; slot 1 is empty
    after = _bank([9, 4, 7, 12], [2.0, 1.0, 8.0, 5.0], [1, 0, 1, 1])
    module = _Placed()
    written, evicted = slot_changes(module, before, after)
    assert written.tolist() == [[False, False, False, True]]
    assert evicted.tolist() == [[True, False, False, False]]
    module.scope = "shared"  # places of several documents: slot by slot
    written, evicted = slot_changes(module, before, after)
    assert written.tolist() == [[True, False, False, True]]
    assert evicted.tolist() == [[True, True, False, False]]
    module.tells = False  # contents alone tell
    written, evicted = slot_changes(module, before, after)
    assert written.tolist() == [[True, False, True, True]]
    assert evicted.tolist() == [[False, True, False, False]]


def test_fields_of_slots_are_found_by_name_also_in_a_nested_state():
    class Outer(NamedTuple):
        bank: _Bank
        count: torch.Tensor

    class Nested(_Placed):
        def filled(self, state):
            return state.bank.note > 0

    bank = _bank([4, 9], [1.0, 2.0], [1, 0])
    fields = slot_fields(Nested(), Outer(bank, torch.tensor([3])))
    assert {name: part.tolist() for name, part in fields.items()} == {"place": [[4, 9]], "note": [[1, 0]]}
