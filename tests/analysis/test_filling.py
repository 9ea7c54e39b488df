"""How slots fill, against a loop over the positions that a bank holds."""

from types import SimpleNamespace

import pytest
import torch

from memlm.analysis.filling import analyze_memory_capacity
from memlm.statistics import effective
from tests.experiments.tiny import T, tiny

TOKENIZER = SimpleNamespace(pad_id=0, vocab_size=30)
IDS = torch.randint(30, (2, 6 * T + 3), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_counts_are_those_of_a_loop():
    model = tiny(TOKENIZER, "ltm", n_slot=20).eval()
    found = analyze_memory_capacity(model, IDS)
    assert (found.n_text, found.n_token) == (2, 6 * T)
    bank = found.banks["ltm/1"]
    filled, written, evicted, read, mass = ([[0.0] * 6 for _ in range(2)] for _ in range(3)), None, None, [], []
    filled, written, evicted = filled
    for row in range(2):
        state, held, weights, on_slots = model.init_state(1), set(), torch.zeros(20), []
        for s in range(6):
            out = model(IDS[row : row + 1, s * T : (s + 1) * T], state=state)
            read_now = out.reads["ltm/1"]
            for slots, parts in zip(read_now.slots[0].tolist(), read_now.weights[0].tolist(), strict=True):
                for slot, weight in zip(slots, parts, strict=True):
                    if slot >= 0:
                        weights[slot] += weight
                on_slots.append(sum(parts))
            state = out.state
            places = state.memory["ltm"][0].position[0]
            now = set(places[places >= 0].tolist())
            filled[row][s], written[row][s], evicted[row][s] = len(now), len(now - held), len(held - now)
            held = now
        read.append(effective(weights.numpy()))
        mass.append(sum(on_slots) / len(on_slots))
    mean = [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in (filled, written, evicted)]
    assert [bank.n_filled, bank.written, bank.evicted] == mean
    assert sum(bank.evicted) > 0
    assert bank.full_after == T * (1 + mean[0].index(20))
    assert bank.filled_share == 1
    assert bank.kept_share == pytest.approx(20 / sum(mean[1]))
    assert bank.effective_reads == pytest.approx(sum(read) / 2, rel=1e-4)
    assert bank.read_weight == pytest.approx(sum(mass) / 2, rel=1e-4)
    assert bank.n_slot == 20


def test_a_bank_that_is_never_full_and_one_that_always_is():
    model = tiny(TOKENIZER, "ltm", "stm")
    model.train()
    found = analyze_memory_capacity(model, [IDS[0].tolist()]).banks
    assert found["ltm/1"].full_after is None
    assert found["ltm/1"].kept_share == 1
    assert found["stm/1"].full_after == T
    assert found["stm/1"].written == [5.0] * 6
    assert model.training
    with pytest.raises(ValueError, match=r"at least one segment \(16 tokens\), got lengths \[5\]"):
        analyze_memory_capacity(model, [[1] * 5])
    with pytest.raises(ValueError, match="at least one text"):
        analyze_memory_capacity(model, [])
    for texts in ("a text", None, 5):
        with pytest.raises(ValueError, match=r"texts is a list of texts: give \[text\] for a single one"):
            analyze_memory_capacity(model, texts)
