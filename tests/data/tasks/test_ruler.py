"""RULER's generators, by what their texts must hold."""

import re
from collections import Counter

import numpy as np
import pytest

from memlm.config import ConfigError
from memlm.data.tasks.ruler import GENERATORS, NOISE, Encoded, Ruler, found
from memlm.data.tokenizer import Tokenizer, train_tokenizer
from memlm.data.tokens import TokenizedCorpus

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")
WORDS = [a + b + c for a in "bdfgklmnprst" for b in ("aro", "esu", "ita", "one", "uli", "abe") for c in "bdfgklmnprst"]


class Text:
    """A tokenizer of bytes and pairs, and a text of 864 words."""

    def __init__(self) -> None:
        text = " ".join(WORDS * 2) + " ".join(NOISE) * 50
        self.tokenizer: Tokenizer = train_tokenizer("bpe", [text], 600)
        ids = np.array(self.tokenizer.encode(text), dtype=np.int32)
        self.train = TokenizedCorpus(ids, np.array([0, len(ids)]))


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


@pytest.fixture(scope="module")
def task(text: Text) -> Ruler:
    return Ruler(text.tokenizer, text.train)


def drawn(task: Ruler, name: str, seed: int = 0, n_token: int = 2000) -> tuple[Encoded, str]:
    made = task.draw(np.random.default_rng(seed), name, n_token)
    return made, " ".join(made.puzzle.pieces[1:])


@pytest.mark.parametrize(
    ("name", "n_key", "n_value"),
    [("niah_single", 1, 1), ("niah_multivalue", 1, 4), ("niah_multiquery", 4, 1)],
)
def test_needles_stand_in_noise_and_nowhere_else(task: Ruler, name: str, n_key: int, n_value: int) -> None:
    places = []
    for seed in range(20):
        made, text = drawn(task, name, seed)
        told = NEEDLE.findall(text)
        assert len(told) == n_key * n_value
        assert len({key for key, _ in told}) == n_key
        assert set(made.puzzle.references) == {value for _, value in told}
        assert all(key in made.puzzle.cue for key, _ in told)
        assert not any(value in made.puzzle.cue for _, value in told)
        rest = NEEDLE.sub("", text).split()
        assert rest == (" ".join(NOISE).split() * 1000)[: len(rest)]
        places += [text.index(value) / len(text) for _, value in told]
    assert min(places) < 0.2
    assert max(places) > 0.5
    assert ("are" in made.puzzle.cue.split()) == (n_key * n_value > 1)


def test_a_needle_among_needles_has_a_key_of_its_own(task: Ruler) -> None:
    for seed in range(20):
        made, text = drawn(task, "niah_multikey", seed)
        told = NEEDLE.findall(text)
        assert NEEDLE.sub("", text).split() == []
        assert len(told) > 20
        (reference,) = made.puzzle.references
        assert [value for key, value in told if f" {key} " in made.puzzle.cue] == [reference]


def test_variables_get_their_value_one_from_the_other(task: Ruler) -> None:
    for seed in range(20):
        made, text = drawn(task, "vt", seed)
        value = re.search(r"assigned the value (\d{5})", made.puzzle.cue)[1]
        holds = set()
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", text):  # in the order of telling
            if source == value or source in holds:
                holds.add(name)
        assert holds == set(made.puzzle.references)
        assert len(holds) == 5
        assert f"text above, 5 variables are assgined the value {value}, they are:" in made.puzzle.cue


@pytest.mark.parametrize(("n_token", "often", "seldom"), [(1000, 6, 1), (5000, 30, 3)])
def test_ten_words_of_a_list_are_common(task: Ruler, n_token: int, often: int, seldom: int) -> None:
    made, text = drawn(task, "cwe", n_token=n_token)
    numbers, words = text.split()[::2], text.split()[1::2]
    assert numbers == [f"{i}." for i in range(1, len(words) + 1)]
    counts = Counter(words)
    assert {word for word, n in counts.items() if n == often} == set(made.puzzle.references)
    assert len(made.puzzle.references) == 10
    assert {n for word, n in counts.items() if word not in made.puzzle.references} == {seldom}
    assert words != sorted(words, key=lambda word: -counts[word])


def test_the_second_to_fourth_of_coded_words_are_asked(task: Ruler) -> None:
    made, text = drawn(task, "fwe")
    counts = Counter(text.split())
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == made.puzzle.references
    share = [counts[word] / counts["..."] for word in ranked[1:4]]
    assert share == pytest.approx([1 / 4, 1 / 9, 1 / 16], rel=0.1)
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])


@pytest.mark.parametrize("name", GENERATORS)
def test_texts_fill_the_length_and_depend_on_the_seed_alone(task: Ruler, text: Text, name: str) -> None:
    made, again, other = (drawn(task, name, seed, 3000)[0] for seed in (1, 1, 2))
    assert 0.8 * 3000 < len(made.text) <= 3000
    assert made.puzzle == again.puzzle != other.puzzle
    assert text.tokenizer.decode(made.text) == " " + " ".join(made.puzzle.pieces)
    assert found(text.tokenizer.decode(made.answer), made.puzzle.references) == [True] * len(made.puzzle.references)
    with pytest.raises(ConfigError, match=rf"{name}: .* tokens are too few"):
        drawn(task, name, n_token=20)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_training_document_asks_in_a_new_context(task: Ruler, text: Text, name: str) -> None:
    passage = np.full(12 * 128 + 1, text.train.tokens[0], dtype=np.int64)
    made = task.document(np.random.default_rng(3), passage, 128, [name])
    (begin,) = np.flatnonzero(made.breaks) * 128
    asked = text.tokenizer.decode(made.tokens[begin:])
    answers = text.tokenizer.decode(made.tokens[1:][made.answer])
    assert asked.startswith((" Question: ", " What "))
    assert answers.strip() in asked
    first = int(np.flatnonzero(made.answer)[0]) + 1
    assert text.tokenizer.decode(made.tokens[begin:first]).rstrip().endswith((":", "is", "are"))
    told = text.tokenizer.decode(made.tokens[:begin])
    assert all(found(told, [part])[0] for part in re.findall(r"[a-z]{6}|\d{7}|[A-Z]{5}", answers))


def test_the_rule_counts_what_an_answer_contains() -> None:
    assert found("They are ABCDE and fghij.", ["abcde", "FGHIJ", "klmno"]) == [True, True, False]


def test_too_few_words_and_unknown_tasks_are_told(text: Text, task: Ruler) -> None:
    few = np.array(text.tokenizer.encode(" bam ken"), dtype=np.int32)
    with pytest.raises(ConfigError, match="at least 50 different words"):
        Ruler(text.tokenizer, TokenizedCorpus(few, np.array([0, len(few)])))
    with pytest.raises(ConfigError, match=r"task\.tasks must be some of .* got 'niah_singel'. Did you mean"):
        task.document(np.random.default_rng(0), np.zeros(1025, dtype=np.int64), 128, ["niah_singel"])
