"""Documents of the overwrite task, read back from their tokens."""

from collections import Counter

import numpy as np
import pytest

from memlm.data.tasks.overwrite import Overwrite, retell
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus

T = 64


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=5)) for _ in range(300)]
    text = " " + " ".join(rng.choice(words, size=6000)) + " is ."
    tokenizer = train_tokenizer("word", [text], 1000)
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    return Overwrite(tokenizer, TokenizedCorpus(tokens, np.array([0, len(tokens)])))


def items(task, document, filler):
    """Name, value, place of the last token, and whether it is a question, of everything that is not filler."""
    place, found = 0, []
    while place < len(document.tokens):
        if document.tokens[place] == filler:
            place += 1
            continue
        words = document.tokens[place : place + 6].tolist()
        asked = document.answer[place + 1 : place + 5]  # targets: the four tokens after the name
        assert asked.all() or not asked.any()
        found.append((tuple(words[:2]), tuple(words[3:]), place + 5, bool(asked.all())))
        place += 6
    assert sum(asked for *_, asked in found) * 4 == document.answer.sum()
    return found


@pytest.mark.parametrize("settings", [{"items": 6, "update": 0.7}, {"items": 4, "update": 0.5, "hard": 1.0}])
def test_questions_ask_for_the_latest_value_told_in_an_earlier_segment(task, settings):
    filler = 0
    updates, n_question = Counter(), 0
    for seed in range(10):
        passage = np.full(8 * T + 1, filler)
        document = task.document(np.random.default_rng(seed), passage, T, **settings)
        latest = {}
        for name, value, end, asked in items(task, document, filler):
            if asked:
                n_question += 1
                assert latest[name][0] == value
                assert latest[name][1] // T < (end - 5) // T
            else:
                updates["update" if name in latest else "new"] += 1
                assert value != latest.get(name, (None,))[0]
                latest[name] = (value, end)
        for s in np.flatnonzero(document.breaks):  # a new context begins with a question
            cells = document.answer[s * T - 1 : s * T + 12]
            assert cells.any()
    assert n_question > 100
    share = updates["update"] / updates.total()
    assert share == pytest.approx(settings["update"], abs=0.12)


def test_nothing_of_evaluation_is_told_and_nothing_is_never_updated(task):
    passage = np.zeros(8 * T + 1, dtype=int)
    document = task.document(np.random.default_rng(0), passage, T, items=6, update=0.0)
    told = [name for name, _, _, asked in items(task, document, 0) if not asked]
    assert len(told) == len(set(told)) > 10
    kept = task.maker.draw(np.random.default_rng(1), 200, "evaluation")
    names, values = {fact.cue for fact in kept}, {fact.answer[1:] for fact in kept}
    for name, value, *_ in items(task, document, 0):
        assert name not in names
        assert value not in values


def test_retold_facts_keep_their_name(task):
    rng = np.random.default_rng(0)
    fact = task.maker.draw(rng, 1, "evaluation")[0]
    again = retell(rng, task.maker, fact, "evaluation")
    assert (again.name, again.cue) == (fact.name, fact.cue)
    assert again.value != fact.value
    assert again.answer[0] == fact.answer[0]  # "is"
    assert len(again.answer) == 4


def test_same_generator_same_document(task):
    passage = np.zeros(4 * T + 1, dtype=int)
    first, second = (task.document(np.random.default_rng(5), passage, T, items=6) for _ in range(2))
    assert (first.tokens == second.tokens).all()
    assert (first.breaks == second.breaks).all()
