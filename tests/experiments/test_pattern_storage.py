"""Pattern storage, with hand-made models of known memory and recomputations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments.needle import Needle, draw
from experiments.pattern_storage import experiment
from experiments.pattern_storage.experiment import TIE, PatternStorage, rank, run, summarise
from experiments.pattern_storage.figures import plot
from experiments.pattern_storage.passages import Passages
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.evaluation.recall import asking, reading
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result
from tests.experiments.test_needle import Data
from tests.experiments.tiny import T, tiny

pytestmark = pytest.mark.slow

SMALL = PatternStorage(n_document=3, n_stored=[4, 8], n_probe=4, n_candidate=4)


@pytest.fixture(scope="module")
def data():
    return Data()


class Fake(nn.Module):
    """Its memory of a document is the list of all tokens written; it goes on as what it remembers went on.

    A memory that `binds` looks for the whole text since the context began, one that does not for the last token alone:
    it knows what follows within a rest, not which rest belongs to a cue.
    """

    segment_len = T

    def __init__(self, n_vocab, binds=True, reads=True):
        super().__init__()
        self.memory, self.binds, self.reads = {}, binds, reads
        self.head_weight = torch.eye(n_vocab)

    def init_state(self, n_row):
        return [[] for _ in range(n_row)]

    def forward(self, ids, state, read=True, write=True, logits=True):
        assert not torch.is_grad_enabled()
        assert not logits
        hidden = torch.zeros(*ids.shape, len(self.head_weight))
        for i, (text, memory) in enumerate(zip(ids.tolist(), state, strict=True)):
            for t in range(len(text) if read and self.reads and not write else 0):
                look = text[: t + 1] if self.binds else text[t : t + 1]
                for place in range(len(memory) - len(look)):
                    if memory[place : place + len(look)] == look:
                        hidden[i, t, memory[place + len(look)]] = 5.0
        state = [a + b for a, b in zip(state, ids.tolist(), strict=True)] if write else state
        return SimpleNamespace(hidden=hidden, state=state)

    def new_context(self, state, donate=False):
        return state

    def wipe(self, state):
        return [[] for _ in state]

    def select_rows(self, state, index):
        return [state[i] for i in index.tolist()]

    def with_memory(self, state, other):
        return other


@pytest.fixture
def untrained(monkeypatch):
    """An untrained model that reads nothing."""
    monkeypatch.setattr(experiment, "untrained", lambda model: Fake(len(model.head_weight), reads=False))


def test_a_perfect_memory_finds_everything_and_its_controls_are_at_chance(data, untrained):
    metrics = run(Fake(data.tokenizer.vocab_size), data, SMALL).metrics
    for number in (4, 8):
        assert metrics[f"top1/on/{number}"] == metrics[f"mrr/on/{number}"] == 1.0
        for condition in ("off", "wiped", "swapped", "unseen"):
            assert metrics[f"top1/{condition}/{number}"] == pytest.approx(1 / 4)
            assert metrics[f"mrr/{condition}/{number}"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
        assert metrics[f"n/on/{number}"] == 12
    assert metrics["chance/top1"] == 1 / 4
    assert metrics["chance/mrr"] == pytest.approx(25 / 48)
    assert metrics["top1/on/untrained"] == pytest.approx(1 / 4)
    assert metrics["likelihood_top1/on"] == 1.0
    assert metrics["low/top1/on"] < 1.0 == metrics["high/top1/on"]
    # four tokens of a rest: 5 at the right logit of V against 0
    n_vocab = data.tokenizer.vocab_size
    gain = np.log(n_vocab) - (np.log(np.exp(5) + n_vocab - 1) - 5)
    assert metrics["evidence/on"] == pytest.approx(4 * gain, rel=1e-4)


def test_a_memory_that_does_not_bind_rests_to_cues_finds_nothing(data, untrained):
    metrics = run(Fake(data.tokenizer.vocab_size, binds=False), data, SMALL).metrics
    assert metrics["evidence/on"] > 1  # it does know what it was told
    assert metrics["low/top1/on"] < 1 / 4 < metrics["high/top1/on"]
    assert metrics["top1/on"] < 0.6


def test_ranks_by_hand():
    assert rank(np.array([3.0, 1.0, 2.0])) == (1.0, 1.0)
    assert rank(np.array([1.0, 3.0, 2.0])) == (0.0, pytest.approx(1 / 3))
    assert rank(np.array([2.0, 2.0, 1.0])) == (1 / 2, pytest.approx((1 + 1 / 2) / 2))
    assert rank(np.array([2.0, 3.0, 2.0])) == (0.0, pytest.approx((1 / 2 + 1 / 3) / 2))
    assert rank(np.array([1.0, 1.0 + TIE / 2, 1.0 - TIE / 2])) == (1 / 3, pytest.approx((1 + 1 / 2 + 1 / 3) / 3))


@torch.no_grad()
def test_evidence_is_the_difference_of_losses_and_lag_the_tokens_since(data):
    model = tiny(data.tokenizer, "ltm").eval()
    result = run(model, data, SMALL)
    documents, unseen, _ = draw(data, Needle(n_document=3, n_fact=8, distance=0), T)
    stop = -(-max(document.end(7) for document in documents) // T) * T
    (state,) = reading.read(model, documents, [stop])
    other = model.select_rows(state, torch.tensor([1, 2, 0]))
    rows = [r for r in result.rows if (r["kind"], r["model"], r.get("n_stored")) == ("probe", "trained", 8)]
    assert [r["condition"] for r in rows[:15:3]] == list(CONDITIONS)
    memories = {"on": state, "off": state, "wiped": model.wipe(state), "swapped": other, "unseen": state}
    for row in rows:
        i, told = row["document"], documents if row["condition"] != "unseen" else None
        fact = (documents[i].facts if told else unseen[i])[row["pattern"]]
        facts = [fact] * 3  # the same question to every row; one counts
        losses = [asking.answer(model, memories[row["condition"]], facts, reads)[i][1] * len(fact.answer)
                  for reads in (False, row["condition"] != "off")]  # fmt: skip
        assert row["evidence"] == pytest.approx(losses[0] - losses[1], abs=1e-3)
        assert row["lag"] == (stop - documents[i].end(row["pattern"]) if told else None)
        assert row["told"] == 8
    assert max(abs(row["evidence"]) for row in rows if row["condition"] == "on") > 0.01
    assert len({(row["document"], row["pattern"]) for row in rows}) == 12  # patterns are not asked for twice


@torch.no_grad()
def test_similarity_is_the_cosine_of_slots_and_mean_hidden_state(data):
    model = tiny(data.tokenizer, "stm", "ltm").eval()
    result = run(model, data, SMALL)
    documents, _, _ = draw(data, Needle(n_document=3, n_fact=8, distance=0), T)
    states, rows = [model.init_state(1) for _ in documents], [r for r in result.rows if r["kind"] == "similarity"]
    for end in range(T, 4 * T, T):
        outputs = [
            model(torch.from_numpy(document.tokens(end - T, end)).long()[None], state=state)
            for document, state in zip(documents, states, strict=True)
        ]
        states = [out.state for out in outputs]
        for i, state in enumerate(states):
            for name in ("stm", "ltm"):
                module, part = model.memory[name][0], state.memory[name][0]
                slots = module.contents(part)[module.filled(part)]
                (row,) = [r for r in rows if r["model"] == "trained"
                          and (r["bank"], r["document"], r["token"]) == (f"{name}/1", i, end)]  # fmt: skip
                for other, of in (("", i), ("_other", (i + 1) % 3)):
                    cosine = F.cosine_similarity(slots, outputs[of].hidden[0].mean(dim=0)[None])
                    assert row[f"mean{other}"] == pytest.approx(float(cosine.mean()), abs=1e-5)
                    assert row[f"max{other}"] == pytest.approx(float(cosine.max()), abs=1e-5)
    trained = [row["mean"] for row in rows if row["model"] == "trained"]
    assert result.metrics["similarity_mean"] == pytest.approx(np.mean(trained))
    assert result.metrics["sd/similarity_mean"] == pytest.approx(np.std(trained))
    assert result.metrics["similarity_mean/untrained"] != result.metrics["similarity_mean"]


def test_contents_of_another_width_have_no_similarity(data):
    result = run(tiny(data.tokenizer, "ltm"), data, SMALL)
    assert any(row["kind"] == "similarity" for row in result.rows)
    model = tiny(data.tokenizer, "ltm")
    module = model.memory["ltm"][0]
    module.contents = lambda state: state.key  # eight wide, the model is 32
    result = run(model, data, SMALL)
    assert {row["model"] for row in result.rows if row["kind"] == "similarity"} == {"untrained"}
    assert "similarity_mean" not in result.metrics
    assert list(plot(result)) == ["pattern_storage", "pattern_similarity"]


def test_intervals_of_ranks_stay_within_their_range():
    probe = {"model": "trained", "kind": "probe", "condition": "on", "n_stored": 8, "n_candidate": 4, "evidence": 0.0}
    ranks = [1.0, 1.0, 0.25]  # of three documents: 0.75 ± 1.08 by Student's t
    rows = [probe | {"document": i, "top1": rank == 1, "reciprocal_rank": rank} for i, rank in enumerate(ranks)]
    metrics = summarise(rows)
    assert [metrics[f"{end}mrr/on"] for end in ("low/", "", "high/")] == [0.0, 0.75, 1.0]


def test_without_memory_everything_is_chance(data):
    result = run(tiny(data.tokenizer), data, SMALL)
    for condition in CONDITIONS:
        assert result.metrics[f"top1/{condition}"] == pytest.approx(result.metrics["chance/top1"])
        assert result.metrics[f"mrr/{condition}"] == pytest.approx(result.metrics["chance/mrr"])
    assert not [row for row in result.rows if row["kind"] == "similarity"]
    assert list(plot(result)) == ["pattern_storage"]


def test_one_bank_for_all_rows_gives_each_document_its_own_copy(data):
    apart, shared = (run(tiny(data.tokenizer, "ltm", scope=scope), data, SMALL) for scope in ("sequence", "shared"))
    for one, other in zip(apart.rows, shared.rows, strict=True):
        for name in ("evidence", "mean", "max_other"):
            assert one.get(name) == (pytest.approx(other[name], abs=1e-3) if name in other else None)


def test_passages_occur_once_and_do_not_overlap(data):
    text = data.splits["val"]
    passages = Passages(text, 6)
    found = passages.draw(np.random.default_rng(0), 20, "evaluation")
    assert found == passages.draw(np.random.default_rng(0), 20, "evaluation")
    tokens = text.tokens.tolist()
    spans = [tuple(tokens[i : i + 6]) for i in range(len(tokens) - 5)]
    places = []
    for passage in found:
        assert (len(passage.cue), len(passage.answer)) == (2, 4)
        assert spans.count(passage.tokens) == 1
        places.append(spans.index(passage.tokens))
    assert max(places) + 6 <= len(tokens) // 2
    assert min(np.diff(sorted(places))) >= 6
    assert len({passage.cue for passage in found}) == 20
    assert passages.tokens("val").tokens.tolist() == tokens[len(tokens) // 2 :]
    with pytest.raises(ConfigError, match="use fewer patterns"):
        passages.draw(np.random.default_rng(0), 500, "evaluation")


def test_passages_are_found_by_a_perfect_memory(data, untrained):
    cfg = PatternStorage(pattern="passage", passage_len=6, n_document=2, n_stored=[4], n_probe=4, n_candidate=4)
    metrics = run(Fake(data.tokenizer.vocab_size), data, cfg).metrics
    assert metrics["top1/on"] == 1.0
    assert metrics["top1/unseen"] < 1.0


def test_same_seed_same_numbers_and_the_model_is_left_as_it_was(data):
    model = tiny(data.tokenizer, "ltm").train()
    weights, before, shares = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state(), []
    result = run(model, data, SMALL, progress=shares.append)
    assert result == run(model, data, SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    for line in result.metadata["headline"]:
        assert {line[name] for name in ("metric", "low", "high", "n")} - {None} <= set(result.metrics)
    figures = plot(result)
    assert list(figures) == ["pattern_storage", "pattern_similarity"]
    on = next(line for line in figures["pattern_storage"].axes[0].get_lines() if line.get_label() == "memory on")
    assert list(on.get_xdata()) == [4, 8]
    assert list(on.get_ydata()) == [result.metrics[f"top1/on/{k}"] for k in (4, 8)]
    assert plot(Result("pattern_storage", {})) == {}
    assert summarise([]) == {}


def test_yaml_settings_and_refusals():
    node = dict(compose(["checkpoint=x", "experiment=pattern_storage"], "evaluate").pattern_storage)
    assert node.pop("_target_") == "experiments.pattern_storage.PatternStorage"
    assert PatternStorage(**node) == PatternStorage()
    wrong = {
        "pattern": "word", "passage_len": 2, "n_document": 1, "n_probe": 0, "n_candidate": 1, "n_stored": [4],
        "patterns_per_segment": 0, "split": "train", "seed": -1,
    }  # fmt: skip
    for name, value in (*wrong.items(), ("n_stored", []), ("n_stored", [64, 8])):
        with pytest.raises(ConfigError, match=f"pattern_storage.{name}"):
            PatternStorage(**{name: value})
