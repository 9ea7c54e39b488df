"""Reading documents and asking questions, with hand-made models that remember every token."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from experiments.needle import CONDITIONS
from experiments.questions import absorb, ask, rates

SEGMENT_LEN = 16


class Closed(list):
    """The memory of a row without local context."""


class Fake(nn.Module):
    """The memory of a row is the list of all tokens told to it; what it says next is up to subclasses."""

    def __init__(self, n_vocab, scope="sequence"):
        super().__init__()
        self.n_vocab, self.segment_len = n_vocab, SEGMENT_LEN
        self.memory = {"fake": [SimpleNamespace(scope=scope)]}
        self.told = []

    def absorb(self, ids, state=None):
        assert not any(isinstance(memory, Closed) for memory in state or [])
        self.told.append(ids.clone())
        return [memory + row for memory, row in zip(state or [[]] * len(ids), ids.tolist(), strict=True)]

    def forward(self, ids, state, read=True, write=True):
        assert not write
        assert all(isinstance(memory, Closed) for memory in state)
        out = torch.zeros(*ids.shape, self.n_vocab)
        for i, (row, memory) in enumerate(zip(ids.tolist(), state, strict=True)):
            for t in range(len(row)):
                out[i, t, self.next_token(row[: t + 1], memory if read else [])] = 5.0
        return SimpleNamespace(logits=out, state=state)

    def next_token(self, text, memory):
        raise NotImplementedError

    def new_context(self, state):
        return [Closed(memory) for memory in state]

    def wipe(self, state):
        return [type(memory)() for memory in state]


class Latest(Fake):
    """Goes on as the text did when it was last met."""

    def places(self, text, memory):
        return range(len(memory) - len(text) - 1, -1, -1)

    def next_token(self, text, memory):
        return next((memory[p + len(text)] for p in self.places(text, memory) if memory[p : p + len(text)] == text), 0)


class First(Latest):
    """Goes on as the text did when it was first met."""

    def places(self, text, memory):
        return range(len(memory) - len(text))


class Item(NamedTuple):
    cue: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self):
        return self.cue + self.answer


def test_documents_are_read_whole_and_in_order():
    texts = np.random.default_rng(0).integers(1, 50, size=(3, 150))
    model, done = Latest(50), []
    state = absorb(model, texts, done.append)
    assert state == texts.tolist()
    assert all(isinstance(memory, Closed) for memory in state)
    assert max(ids.shape[1] for ids in model.told) <= 4 * SEGMENT_LEN
    assert done == sorted(done)
    assert done[-1] == texts.size


def test_every_question_is_asked_under_every_condition():
    told = [[Item((10 * d + q,), (40 + d, 30 + q)) for q in range(3)] for d in range(4)]
    never = [[Item((60 + q,), (41, 31)) for q in range(2)] for _ in range(4)]
    model = Latest(70)
    texts = np.array([[token for item in items for token in item.tokens] for items in told])
    numbers = [1, 2]
    rows = ask(model, absorb(model, texts[numbers], lambda n: None), numbers, told, never)
    on = [row for row in rows if row["condition"] == "on"]
    assert sorted((row["document"], row["question"]) for row in on) == [(d, q) for d in numbers for q in range(3)]
    assert all(row["correct"] for row in on)
    assert not any(row["correct"] for row in rows if row["condition"] != "on")
    swapped = {row["document"] for row in rows if row["condition"] == "swapped"}
    assert swapped == {0, 1}  # what the document before was told
    assert sum(row["condition"] == "unseen" for row in rows) == 4
    assert [c for c in CONDITIONS if any(row["condition"] == c for row in rows)] == list(CONDITIONS)


def test_rates_by_hand():
    rows = [{"condition": "on", "correct": i > 0, "nll": float(i)} for i in range(4)]
    metrics = rates(rows, "/x")
    assert metrics["exact_match/on/x"] == 0.75
    assert metrics["nll/on/x"] == 1.5
    assert metrics["n/on/x"] == 4
    assert (metrics["low/on/x"], metrics["high/on/x"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert "exact_match/off/x" not in metrics
