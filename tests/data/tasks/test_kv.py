"""Pairs of characters, read back from the text by a pattern."""

import re

import numpy as np
import pytest

from memlm.config import ConfigError
from memlm.data.tasks.kv import LETTERS, KeyValues
from tests.experiments.symbol_models import symbol_data

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!:|?_"


@pytest.fixture(scope="module")
def data():
    return symbol_data(LETTERS + 5, KeyValues)


def written(task, tokens):
    number = {int(token): i for i, token in enumerate(task.symbols)}
    return "".join(CHARACTERS[number[int(token)]] for token in tokens)


@pytest.mark.parametrize(
    ("n_pair", "segment_len", "n_segment"), [(4, 29, 2), (1, 9, 2), (8, 32, 3), (8, 32, 5), ([2, 3], 29, 3)]
)
def test_pairs_are_told_once_and_asked_for_in_a_context_without_them(data, n_pair, segment_len, n_segment):
    task, numbers = data.task, set()
    for seed in range(30):
        passage = np.zeros(n_segment * segment_len + 1)
        planted = task.document(np.random.default_rng(seed), passage, segment_len, n_pair)
        text = written(task, planted.tokens)
        context, _, rest = text.partition("|")
        assert re.fullmatch(r"(!\w\w:\w\w!)+", context)
        pairs = re.findall(r"!(\w\w):(\w\w)!", context)
        numbers.add(len(pairs))
        told = dict(pairs)
        assert len(told) == len(pairs)
        assert len(context) + 1 == 7 * len(pairs) + 1
        n_told = -(-(len(context) + 1) // segment_len)
        assert planted.breaks.tolist() == [False] + [True] * (n_segment - 1)
        assert set(rest[: n_told * segment_len - len(context) - 1]) <= {"_"}
        expected, asked = np.zeros(len(text) - 1, dtype=bool), []
        for s in range(n_told, n_segment):
            segment = text[s * segment_len : (s + 1) * segment_len]
            found = re.fullmatch(r"\?!(\w\w):(\w\w)!\|_*", segment)
            assert found
            assert told[found[1]] == found[2]
            asked.append(found[1])
            expected[s * segment_len + 4 : s * segment_len + 8] = True  # what follows is v, v, ! and |
        assert len(set(asked)) == len(asked) == n_segment - n_told
        assert planted.answer.tolist() == (planted.weight > 0).tolist() == expected.tolist()
        assert planted.targets is None
    assert numbers == set(n_pair if isinstance(n_pair, list) else [n_pair])


def test_what_does_not_fit_is_refused(data):
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="4 pairs are told in 1 segments of 29 tokens"):
        data.task.document(rng, np.zeros(30), 29, 4)
    with pytest.raises(ConfigError, match="1 to 1 of them"):
        data.task.document(rng, np.zeros(4 * 29 + 1), 29, 1)
    with pytest.raises(ConfigError, match="need 9 tokens"):
        data.task.document(rng, np.zeros(17), 8, 1)
    with pytest.raises(ConfigError, match="n_pair=0"):
        data.task.document(rng, np.zeros(59), 29, 0)
    with pytest.raises(ConfigError, match="n_symbol=67"):
        symbol_data(60, KeyValues)
