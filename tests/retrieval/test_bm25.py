"""BM25 against its formula, written out."""

import math

import pytest

from memlm.retrieval.bm25 import Bm25

TEXTS = ["The cat sat. The cat slept!", "A dog ran", "a cat"]


def test_scores_are_those_of_the_formula() -> None:
    mean = (6 + 3 + 2) / 3

    def weight(n: int, count: int, length: int) -> float:
        idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
        return idf * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / mean))

    found = Bm25(TEXTS).scores("Did the CAT run?")
    assert found == pytest.approx([weight(1, 2, 6) + weight(2, 2, 6), 0.0, weight(2, 1, 2)])


def test_no_text_and_no_words_score_nothing() -> None:
    assert Bm25([]).scores("cat") == []
    assert Bm25(["", "..."]).scores("cat") == [0.0, 0.0]
