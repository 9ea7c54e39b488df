"""Which slots are read, against a loop in plain Python."""

from types import SimpleNamespace

import pytest
import torch

from memlm.analysis.usage import banks, read_weights
from memlm.memory.base import Memory, Residual
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
    class One(Memory):
        layerwise = False

        def filled(self, state):
            return state[..., 0] > 0

    one, layered = One(), [Memory(), Memory()]
    model = SimpleNamespace(memory={"a": layered, "b": [one]}, memory_layers=[1, 3])
    state = SimpleNamespace(memory={"a": ("x", "y"), "b": (torch.ones(2, 4, 1),)})
    found = banks(model, state)
    assert list(found) == ["a/1", "a/3", "b"]
    assert found["a/3"] == (layered[1], "y")
    # reads of all its layers count for the one bank
    read = Residual(
        torch.zeros(2, 1, 1), torch.tensor([[[0, -1]], [[2, 2]]]), torch.full((2, 1, 2), 0.25), torch.ones(2, 1)
    )
    model.memory, state.memory = {"b": [one]}, {"b": state.memory["b"]}
    total = read_weights(model, {"b/1": read, "b/3": read}, state)["b"]
    assert total.tolist() == [[0.5, 0, 0, 0], [0, 0, 1.0, 0]]
