"""What experiments on recall share, where no experiment alone shows it."""

import numpy as np
import pytest
import torch

from experiments.needle import Needle, run
from memlm.data.haystack import Haystack
from memlm.data.tasks.makers import Fact
from memlm.evaluation.recall.haystack import tell
from memlm.evaluation.recall.rates import above_controls
from memlm.evaluation.recall.reading import part_of, visit
from tests.experiments.test_needle import SEGMENT_LEN, Data, Oracle

TEXT = np.arange(1000)


def fact(number):
    return Fact((f"name{number}",), ("value",), (2000 + 10 * number, 2001 + 10 * number), (5, 6, 7))


@pytest.mark.parametrize("lead", [0, 64])
def test_others_are_told_among_the_facts_or_after_them(lead):
    def told(others, mixed):
        rng = np.random.default_rng(0)
        return tell(rng, [fact(i) for i in range(4)], others, Haystack(TEXT, [0]), 32, 20, mixed=mixed, lead=lead)

    others = [fact(i) for i in range(4, 12)]
    alone, after, among = told((), True), told(others, False), told(others, True)
    assert after.begins == alone.begins  # the same facts at the same places
    assert np.array_equal(after.tokens(0, len(alone.head)), alone.head)
    places = [int(np.flatnonzero(after.head == other.cue[0])[0]) for other in others]
    assert alone.end(3) <= min(places)
    assert places == sorted(places)
    assert np.flatnonzero(among.head == fact(3).cue[0])[0] == among.begins[3]
    assert among.begins != sorted(among.begins) or among.begins[-1] > min(
        int(np.flatnonzero(among.head == other.cue[0])[0]) for other in others
    )
    text = alone.head[(alone.head < 1000) & ~np.isin(alone.head, [5, 6, 7])]
    own = Haystack(TEXT, [0]).tokens(0, alone.taken)
    assert np.array_equal(text, own[~np.isin(own, [5, 6, 7])])  # none of it is lost or read twice
    assert alone.begins[0] >= lead


def test_every_document_is_visited_at_every_length():
    data, shares = Data(), []
    model = Oracle(data.tokenizer.vocab_size).eval()
    documents = [tell(np.random.default_rng(i), [fact(0)], (), Haystack(TEXT, [i]), 32, 5) for i in range(5)]
    with torch.no_grad():
        found = list(visit(model, documents, [64, 64, 640], 2, shares.append))
    assert [(list(numbers), i) for numbers, i, _ in found] == [
        (numbers, i) for numbers in ([0, 1], [2, 3], [4]) for i in range(3)
    ]
    for numbers, i, state in found:
        assert [list(row) for row in state] == [documents[n].tokens(0, (64, 64, 640)[i]).tolist() for n in numbers]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_distances_that_end_in_one_segment_are_told_apart():
    data = Data()
    documents = run(
        Oracle(data.tokenizer.vocab_size), data, Needle(n_document=2, n_fact=2, distance=[40, 41, 42 + SEGMENT_LEN])
    ).rows
    assert [sum(row["distance"] == d for row in documents) for d in (40, 41, 42 + SEGMENT_LEN)] == [2 * 2 * 5] * 3


def test_part_of_the_work_by_hand():
    told = []
    part_of(told.append, 1, 2, 4)(0.5)
    part_of(None, 1, 2, 4)(0.5)
    assert told == [0.5]


def test_recall_above_its_controls_means_intervals_apart():
    metrics = {"low/on/8": 0.4, "high/off/8": 0.3, "high/swapped/8": 0.39}
    assert above_controls(metrics, "/8")
    assert not above_controls(metrics | {"high/unseen/8": 0.4}, "/8")
