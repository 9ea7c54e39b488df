"""RULER, with a hand-made model that looks its answers up in the text it was told."""

import functools
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.ruler import Ruler, plot, run
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.data.tasks.ruler import GENERATORS
from memlm.data.tasks.ruler import Ruler as Task
from memlm.evaluation.headline import headline
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode
from tests.data.tasks.test_ruler import NEEDLE, Text
from tests.experiments.shares import check_shares
from tests.experiments.test_babilong import Reader

SMALL = Ruler(lengths=[600], n_document=2, n_row=2)


class Data(Text):
    """Texts of the task."""

    def __init__(self):
        super().__init__()
        self.task = Task(self.tokenizer, self.train)


@pytest.fixture(scope="module")
def data():
    return Data()


class Solver(Reader):
    """Says what the text in its memory answers; it misses the last reference of every answer with several."""

    def next_token(self, text, memory):
        asked = self.tokenizer.decode(text)
        cue = re.match(r".*(?:provided text (?:is|are)|they are:|list are:|words are:)", asked, re.DOTALL)
        if cue is None:
            return 0
        ids, n_cue = self.reply(cue[0], tuple(memory))
        return ids[min(len(text) - n_cue, len(ids) - 1)]

    @functools.lru_cache(maxsize=1000)  # noqa: B019
    def reply(self, cue, memory):
        found = self.solve(cue, self.tokenizer.decode(memory))
        found = found[:-1] if len(found) > 1 else found
        ids = self.tokenizer.encode("".join(f" {word}" for word in found) + ".")
        return ids, len(self.tokenizer.encode(cue))

    def solve(self, cue, told):
        if "magic" in cue:
            return [value for key, value in NEEDLE.findall(told) if f" {key} " in cue.replace(",", " ")]
        if "VAR" in told:
            value = re.search(r"value (\d+)", cue)[1]
            chain = [value]
            for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w{5})", told):
                chain += [name] if source in chain else []
            return chain[1:]
        words = Counter(told.split()[told.split().index("often.") + 1 :] if "often." in told else told.split()[19:])
        if "common" in cue:
            return [word for word, _ in words.most_common() if word.isalpha()][:10]
        return [word for word, _ in words.most_common(4)][1:]


@pytest.mark.slow
def test_references_that_an_answer_contains_count(data):
    result = run(Solver(data.tokenizer), data, SMALL)
    expected = {"niah_single": 1, "niah_multikey": 1, "niah_multivalue": 3 / 4, "niah_multiquery": 3 / 4, "vt": 4 / 5,
                "cwe": 9 / 10, "fwe": 2 / 3}  # fmt: skip
    for name, score in expected.items():
        assert result.metrics[f"exact_match/on/{name}/600"] == pytest.approx(score), name
        for condition in ("off", "wiped"):
            assert result.metrics[f"exact_match/{condition}/{name}/600"] == 0.0
        for condition in ("swapped", "unseen"):  # words of a list are few, so some are common to two
            assert result.metrics[f"exact_match/{condition}/{name}/600"] <= (0.2 if name == "cwe" else 0.0)
    assert result.metrics["score/on/600"] == pytest.approx(sum(expected.values()) / 7)
    assert result.metrics["n/on/vt/600"] == 2 * 5
    numbers = headline(result)
    assert [number.value for number in numbers if not number.control] == pytest.approx(list(expected.values()))
    assert len(numbers) == 7 * len(CONDITIONS)
    assert set(plot(result)) == set(GENERATORS)


@pytest.mark.slow
def test_result_depends_on_nothing_but_seed_and_settings(data):
    settings = replace(SMALL, tasks=["niah_single", "fwe"])
    result, before = run(Solver(data.tokenizer), data, settings), torch.get_rng_state()
    assert run(Solver(data.tokenizer), data, replace(settings, n_row=1)).rows == result.rows
    assert run(Solver(data.tokenizer), data, replace(settings, seed=1)).rows != result.rows
    assert torch.equal(before, torch.get_rng_state())
    check_shares(lambda share: run(Solver(data.tokenizer), data, settings, share=share), result)


@pytest.mark.slow
def test_a_real_model_is_asked_and_left_as_it_was(data):
    model = LMCode(
        data.tokenizer.vocab_size, {"ltm": lambda d: LongTermMemory(d, 50, 8, 8)}, n_layer=2, d_model=16, segment_len=32
    ).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = replace(SMALL, tasks=["niah_single", "vt"], n_document=2)
    result = run(model, data, settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert {row["since"] for row in result.rows} == {None}
    assert len(result.rows) == len(CONDITIONS) * 2 * (1 + 5)


def test_other_models_and_wrong_settings_are_refused(data):
    with pytest.raises(ConfigError, match="train one with recipe=ruler"):
        run(Solver(data.tokenizer), SimpleNamespace(task=None), SMALL)
    with pytest.raises(ConfigError, match=r"ruler\.tasks must be some of .*, each once"):
        replace(SMALL, tasks=["vt", "vt"])
    with pytest.raises(ConfigError, match="lengths in tokens in ascending order"):
        replace(SMALL, lengths=[0])
    with pytest.raises(ConfigError, match="cwe: 100 tokens are too few"):
        run(Solver(data.tokenizer), data, replace(SMALL, tasks=["cwe"], lengths=[100]))


def test_the_recipe_has_room_for_every_task_that_it_trains():
    config = to_dict(compose(["recipe=ruler"]))
    phases = config["curriculum"]["phases"]
    assert {name for phase in phases for name in phase["task"]["tasks"]} == set(GENERATORS)
    assert all((phase["n_segment"] - 1) * config["model"]["segment_len"] >= 350 for phase in phases)
