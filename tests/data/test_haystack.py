"""Text around facts, against the same made of whole arrays."""

import numpy as np
import pytest

from memlm.config import ConfigError
from memlm.data.haystack import Haystack, Told, sentences, weave
from memlm.data.tokenizer import train_tokenizer

TEXT = np.arange(1000, dtype=np.int32)


def whole(text: np.ndarray, seed: list[int], n_round: int) -> np.ndarray:
    """All rounds of a text: the first as it stands, the others in passages of 256 tokens of another order."""
    begin = int(np.random.default_rng([*seed, 0]).integers(len(text)))
    rounds = [np.concatenate([text[begin:], text[:begin]])]
    passages = [rounds[0][i : i + 256] for i in range(0, len(text), 256)]
    for i in range(1, n_round):
        order = np.random.default_rng([*seed, i]).permutation(len(passages))
        rounds.append(np.concatenate([passages[k] for k in order]))
    return np.concatenate(rounds)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 3999), (990, 1010), (1255, 1258), (2000, 3000), (1700, 1700)])
def test_a_part_is_that_of_all_rounds(begin: int, end: int) -> None:
    found = Haystack(TEXT, [3, 1]).tokens(begin, end)
    assert np.array_equal(found, whole(TEXT, [3, 1], 4)[begin:end])


def test_nothing_is_read_twice_as_far_as_the_text_goes() -> None:
    assert sorted(Haystack(TEXT, [5]).tokens(0, 1000)) == TEXT.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_passages_of_ones_own_stay_whole_in_every_round(seed: int) -> None:
    starts = np.array([0, 7, 10, 400, 999])
    haystack = Haystack(TEXT, [seed], starts)
    text = haystack.tokens(0, 3000)
    assert text[0] in starts
    for n_token in (0, 1, 3, 8, 500, 999, 1000, 1001, 2500, 3000):
        assert np.array_equal(haystack.cuts(n_token), np.flatnonzero(np.isin(text[:n_token], starts)))
    for turn in range(3):
        assert sorted(text[turn * 1000 : (turn + 1) * 1000]) == TEXT.tolist()


def test_what_is_told_stands_in_the_text_however_it_is_cut() -> None:
    haystack = Haystack(TEXT, [1])
    text, told, expected, place, taken = haystack.tokens(0, 300), [], [], 0, 0
    for space, n in [(0, 9), (20, 5), (0, 2), (100, 0), (7, 4)]:
        ids = np.full(n, -1 - len(told))
        told.append(Told(place + space, taken + space, ids))
        expected += [text[taken : taken + space], ids]
        place, taken = place + space + n, taken + space
    expected = np.concatenate([*expected, text[taken:]])
    rng = np.random.default_rng(0)
    for begin, end in [(0, 200), (0, 2), (1, 3), *(sorted(pair) for pair in rng.integers(200, size=(200, 2)).tolist())]:
        assert np.array_equal(weave(haystack, told, begin, end), expected[begin:end])
    assert np.array_equal(weave(haystack, [], 5, 9), text[5:9])


def test_sentences_are_whole_and_none_is_short() -> None:
    long = ["one two three four five six.", " she said why do you ask me that?", " he ran for a very long while!"]
    parts = [long[0], " no.", long[1], ' "oh!"', long[2], " 3.14 is pi and so on and on and on."]
    tokenizer = train_tokenizer("word", parts, 1000)
    found = sentences(np.array(tokenizer.encode("".join(parts)), dtype=np.int32), tokenizer, least=6)
    ends = [*found.starts[1:].tolist(), len(found.tokens)]
    told = [tokenizer.decode(found.tokens[a:b]) for a, b in zip(found.starts, ends, strict=True)]
    assert told == [*long, parts[-1]]
    with pytest.raises(ConfigError, match="no sentence of at least 60 tokens"):
        sentences(found.tokens, tokenizer, least=60)
