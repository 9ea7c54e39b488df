"""Sentences told and asked in other words, of a model that says, by hand, what followed in a record it finds."""

from typing import Any

import pytest
import torch

from experiments import told
from experiments.told.experiment import CONDITIONS, Fact, Told, facts_of, says
from memlm.config import ConfigError
from memlm.data.tokenizer import train_tokenizer
from memlm.evaluation.headline import headline
from tests.store.test_conversation import reader
from tests.store.test_operations import build

FACTS = [
    [Fact("ba ce di fo.", "ba ce", "di"), Fact("gu who mo.", "gu", "who")],
    [Fact("la lo lu ra.", "la lo", "lu"), Fact("ro ru byte.", "ro", "ru")],
]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("experiments.told.experiment.facts_of", lambda cfg: FACTS)
    return reader(train_tokenizer("word", [" " + " ".join(fact.told for part in FACTS for fact in part)], 100))


def test_what_was_told_is_answered_and_nothing_else(model: Any) -> None:
    before = {name: part.clone() for name, part in model.state_dict().items()}
    result = told.run(model, None, Told(n_conversation=2, n_new=3, recall=1))  # type: ignore[arg-type]
    assert {name: result.metrics[f"answered/{name}"] for name in CONDITIONS} == {
        "on": 1, "off": 0, "wiped": 0, "swapped": 0, "unseen": 0, "given": 0
    }  # fmt: skip
    assert {name: result.metrics[f"found/{name}"] for name in CONDITIONS} == {
        "on": 1, "off": 0, "wiped": 0, "swapped": 0, "unseen": 0, "given": 1
    }  # fmt: skip
    assert [row["answer"].split()[0] for row in result.rows if row["condition"] == "on"] == ["di", "who", "lu", "ru"]
    assert [row["told"] for row in result.rows if row["condition"] == "swapped"] == [
        fact.told for part in FACTS for fact in part
    ]
    assert result.metrics["n/on"] == 4
    assert [number.control for number in headline(result)] == [False, True, True, True, True, False, False]
    assert set(told.plot(result)) == {"told"}
    assert model.state_dict().keys() == before.keys()  # no bank is left behind
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_questions_do_not_depend_on_those_beside_them(model: Any) -> None:
    alone, together = (
        told.run(model, None, Told(n_conversation=2, n_new=3, n_row=n)).rows  # type: ignore[arg-type]
        for n in (1, 2)
    )
    assert alone == together


def test_facts_are_dealt_out_evenly_and_no_answer_is_in_its_question() -> None:
    people, others = facts_of(Told()), facts_of(Told(facts="development"))
    for some in (people, others):
        assert [len(part) for part in some] == [20] * 5
        assert len({fact.value for part in some for fact in part}) == 100
    assert not {fact.told for part in people for fact in part} & {fact.told for part in others for fact in part}
    for part in (*people, *others, *facts_of(Told(facts="modern"))):
        for fact in part:
            assert says(fact.told, fact.value)
            assert not says(fact.question, fact.value)
    for part in people:
        names = [fact.question.rstrip("?").split() for fact in part]
        assert len({name for words in names for name in words if name[0].isupper()} - {"In", "On", "Since"}) >= 10
    assert [len(part) for part in facts_of(Told(n_conversation=3, n_fact=7))] == [2, 2, 2]


def test_an_answer_has_a_value_as_whole_words() -> None:
    assert says("It is in Peru.", "Peru")
    assert says("in PERU", "Peru")
    assert not says("Peruvian", "Peru")


def test_bad_input_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="recall=3 reads records again, and no memory of this model keeps any"):
        told.run(build(model.tokenizer, "stm"), None, Told())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"told\.facts must be people, development or modern, got 'all'"):
        Told(facts="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"told\.n_fact must be at least told\.n_conversation"):
        Told(n_fact=3)
    model.store_experience("gu is who.")
    with pytest.raises(ConfigError, match="this model has stored records"):
        told.run(model, None, Told())  # type: ignore[arg-type]
