"""MemoRAG with hand-made models of known recall, and passages by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.memorag import Memorag, Passages, draw, plot, run, summarise
from memlm.config import ConfigError
from memlm.evaluation.headline import headline
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode
from tests.experiments.shares import check_shares
from tests.experiments.test_needle import SEGMENT_LEN, Closed, Data, Fake

SMALL = Memorag(n_document=4, n_question=6, distance=100, passage_len=28, n_row=3)


@pytest.fixture(scope="module")
def data():
    return Data()


class Oracle(Fake):
    """Remembers everything, and goes on with it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer.vocab_size)
        self.memory = {"fake": [SimpleNamespace(scope="sequence", around="stack")]}
        self.memory_layers, (self.links,) = [], tokenizer.encode(" is")

    def init_state(self, n_row):
        return [Closed() for _ in range(n_row)]

    def absorb(self, ids, state=None, mask=None, donate=False):
        state = [[] for _ in ids] if state is None else state
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        return [
            [*memory, *(token for token, there in zip(row.tolist(), kept.tolist(), strict=True) if there)]
            for memory, row, kept in zip(state, ids, keep, strict=True)
        ]

    def next_token(self, text, memory):
        n = len(text)
        follows = [memory[place + n] for place in range(len(memory) - n) if memory[place : place + n] == text]
        return self.links if self.links in follows else follows[0] if follows else 0


class Forgetful(Oracle):
    """Knows a text while it is short: single passages, but not the document."""

    def next_token(self, text, memory):
        return super().next_token(text, memory) if len(memory) < 200 else 0


def test_clues_of_a_perfect_memory_lead_where_the_question_does_not(data):
    metrics = run(Oracle(data.tokenizer), data, SMALL).metrics
    assert metrics["n"] == 24
    assert metrics["drafted/clues"] == metrics["answered/memory"] == 1
    assert metrics["found/clues"] == metrics["found/right"] > 0.9
    assert metrics["answered/clues"] == metrics["answered/right"] > 0.9
    for control in ("question", "off", "wiped", "swapped"):
        assert metrics[f"found/{control}"] < 0.3
        assert metrics[f"answered/{control}"] < 0.3
    assert metrics["drafted/off"] == metrics["drafted/wiped"] == metrics["drafted/swapped"] == 0


def test_who_forgot_the_document_drafts_nothing_and_answers_from_the_right_passages(data):
    metrics = run(Forgetful(data.tokenizer), data, SMALL).metrics
    assert metrics["drafted/clues"] == metrics["answered/memory"] == 0
    assert metrics["answered/clues"] == metrics["answered/question"] < 0.3
    assert metrics["answered/right"] > 0.9


def test_a_document_tells_both_facts_of_each_chain_once(data):
    documents, chains, length = draw(data, SMALL, SEGMENT_LEN)
    assert length % SEGMENT_LEN == 0
    names = set()
    for document, asked in zip(documents, chains, strict=True):
        text = document.tokens(0, length).tolist()
        for first, second, place in asked:
            assert text[place : place + len(second.tokens)] == list(second.tokens)
            assert second.name == first.value
            assert [text[i : i + len(first.tokens)] == list(first.tokens) for i in range(length)].count(True) == 1
            names |= {first.name, second.name}
        assert max(place for *_, place in asked) < length - SMALL.distance
    assert len(names) == 48


def test_passages_by_hand():
    words = np.arange(10)
    passages = Passages(words, 4, lambda ids: " ".join(f"w{i}" for i in ids))
    assert passages.begins.tolist() == [0, 2, 4, 6]
    assert passages.hold(2, 4) == {0, 1}
    assert passages.hold(1, 5) == set()
    assert passages.best(passages.by_words("w9"), 2) == [3]  # the others score nothing
    assert passages.best(passages.by_words("w5 w2 w3"), 2) == [1, 0]
    scores = passages.by_places(np.array([3, 8, -1]), np.array([0.25, 0.5, 1.0]))
    assert scores.tolist() == [0.25, 0.25, 0.0, 0.5]
    assert Passages(words, 20, str).begins.tolist() == [0]


def model_of(data):
    torch.manual_seed(0)
    memories = {"ltm": lambda d_model: LongTermMemory(d_model, n_slot=200, d_key=8)}
    return LMCode(data.tokenizer.vocab_size, memories, n_layer=1, n_head=2, d_model=16, segment_len=32, overlap=4)


def test_a_real_memory_ranks_passages_by_its_reads_and_shares_the_work(data):
    model = model_of(data)
    whole = run(model, data, SMALL)
    assert {row["condition"] for row in whole.rows} >= {"reads", "clues", "memory"}
    assert all(row["found"] is None for row in whole.rows if row["condition"] == "memory")
    models = [model_of(data), model_of(data)]
    check_shares(lambda share: run(models[share.rank], data, replace(SMALL, n_row=2), share=share), whole)
    assert headline(whole)
    assert list(plot(whole)) == ["memorag"]


def test_rates_by_hand():
    row = {"condition": "clues", "drafted": True, "found": False, "answered": True}
    metrics = summarise([row, row | {"found": True}, row | {"condition": "memory", "found": None}])
    assert (metrics["n"], metrics["found/clues"], metrics["answered/clues"]) == (1, 0.5, 1.0)
    assert "found/memory" not in metrics


def test_what_cannot_be_measured_is_refused(data):
    with pytest.raises(ConfigError, match=r"memorag\.passage_len must be at least 14, twice the longest fact"):
        run(Oracle(data.tokenizer), data, replace(SMALL, passage_len=13))
    model = Oracle(data.tokenizer)
    model.memory["fake"][0].scope = "shared"
    with pytest.raises(ConfigError, match="scope=sequence"):
        run(model, data, SMALL)
    with pytest.raises(ConfigError, match=r"memorag\.k must be at least 1"):
        Memorag(k=0)
