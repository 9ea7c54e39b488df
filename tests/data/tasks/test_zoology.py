"""Zoology's associative recall against a second writing of its rules, and by counting."""

from collections import Counter

import numpy as np
import pytest

from memlm.data.tasks.zoology import ZoologyMQAR
from tests.experiments.symbol_models import symbol_data

N_SYMBOL = 300


@pytest.fixture(scope="module")
def data():
    return symbol_data(N_SYMBOL, ZoologyMQAR)


def naive_document(rng, n_token, n_pair, power_a, random_blanks):
    """Numbers of symbols, and the label of each place, -1 for none: the rules, token by token."""
    keys = list(rng.permutation(np.arange(1, N_SYMBOL // 2))[:n_pair])
    values = list(rng.permutation(np.arange(N_SYMBOL // 2, N_SYMBOL))[:n_pair])
    tokens, labels = [-1] * n_token, [-1] * n_token
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        tokens[2 * i], tokens[2 * i + 1] = key, value
    left = list(range((n_token - 2 * n_pair) // 2))
    for key, value in zip(keys, values, strict=True):  # one after the other, among the places that are left
        law = np.array([power_a * (place + 1) ** (power_a - 1) for place in left])
        place = left.pop(int((rng.random() < np.cumsum(law / law.sum())).argmax()))
        at = 2 * n_pair + 2 * place
        tokens[at], labels[at] = key, value
    blanks = [rng.integers(N_SYMBOL) if random_blanks else 0 for _ in tokens]
    return [blank if token < 0 else token for token, blank in zip(tokens, blanks, strict=True)], labels


@pytest.mark.parametrize("random_blanks", [True, False])
@pytest.mark.parametrize(("n_token", "n_pair"), [(4, 1), (32, 3), (64, 16)])
def test_a_document_keeps_the_rules(data, n_token, n_pair, random_blanks):
    task = ZoologyMQAR(data.tokenizer, data.train, random_blanks=random_blanks)
    number = {int(token): i for i, token in enumerate(task.symbols)}
    told_behind = n_question = 0
    for seed in range(50):
        planted = task.document(np.random.default_rng(seed), np.zeros(n_token + 1), 2, n_pair)
        tokens = [number[int(token)] for token in planted.tokens]
        assert len(tokens) == n_token + 1
        assert planted.breaks.tolist() == [False] * (n_token // 2)
        told = dict(zip(tokens[0 : 2 * n_pair : 2], tokens[1 : 2 * n_pair : 2], strict=True))
        assert len(told) == len(set(told.values())) == n_pair
        assert all(0 < key < N_SYMBOL // 2 <= value for key, value in told.items())
        places = np.flatnonzero(planted.answer)
        assert (places >= 2 * n_pair).all()
        assert (places % 2 == 0).all()
        assert sorted(tokens[place] for place in places) == sorted(told)  # each key once
        assert [number[int(planted.targets[place])] for place in places] == [told[tokens[place]] for place in places]
        assert planted.weight.tolist() == planted.answer.tolist()
        rest = set(range(2 * n_pair, n_token)) - set(places.tolist())
        if not random_blanks:
            assert {tokens[place] for place in rest} <= {0}
        n_question += n_pair
        told_behind += sum(tokens[place + 1] == told[tokens[place]] for place in places)
    assert told_behind <= 0.05 * n_question  # by chance alone: 1 of 300


def test_places_and_blanks_are_distributed_as_in_a_second_writing_of_the_rules(data):
    n, n_token, n_pair, power_a = 1500, 24, 3, 0.2
    task = ZoologyMQAR(data.tokenizer, data.train, power_a=power_a)
    number = {int(token): i for i, token in enumerate(task.symbols)}
    found, expected = Counter(), Counter()
    blanks = []
    for seed in range(n):
        drawn = task.draw(np.random.default_rng(seed), n_token, 2, n_pair)
        _, labels = naive_document(np.random.default_rng([7, seed]), n_token, n_pair, power_a, True)
        found.update(drawn.place.tolist())
        expected.update(i for i, label in enumerate(labels) if label >= 0)
        odd = set(range(2 * n_pair, n_token)) - set(drawn.place.tolist())
        blanks += [number[int(drawn.tokens[place])] for place in odd]
    assert set(found) == set(expected) == set(range(6, 24, 2))
    chi2 = sum((found[at] - expected[at]) ** 2 / (found[at] + expected[at]) for at in found)
    assert chi2 < 26.2  # the 99.9 % quantile for 8 degrees of freedom
    share = np.bincount(blanks, minlength=N_SYMBOL) / len(blanks)
    assert share.min() > 0.5 / N_SYMBOL  # of all symbols, keys and values too
    assert share.max() < 1.6 / N_SYMBOL


def test_the_naive_rules_can_be_told_from_others(data):
    """The comparison above would notice another power law."""
    places = [Counter() for _ in range(2)]
    for count, power_a in zip(places, (0.2, 1.0), strict=True):
        for seed in range(1500):
            _, labels = naive_document(np.random.default_rng(seed), 24, 3, power_a, False)
            count.update(i for i, label in enumerate(labels) if label >= 0)
    first, second = places
    assert sum((first[at] - second[at]) ** 2 / (first[at] + second[at]) for at in first) > 100
