"""Context influence, against segment-by-segment recomputations with one document at a time."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments import perplexity
from experiments.context_influence.experiment import EDGES, OTHERS, ContextInfluence, run, summarise
from experiments.context_influence.figures import plot
from experiments.needle import Needle, draw
from experiments.perplexity import Perplexity
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation.recall import asking, reading
from memlm.evaluation.result import Result
from tests.experiments.test_needle import Data
from tests.experiments.tiny import T, tiny

TEXT = ContextInfluence(limit=None, n_row=2, n_fact=0)
LENGTHS = [40, 33, 48, 35]  # three segments each, so that two streams of six begin and end with a document


def text_data(lengths=LENGTHS, n_vocab=50):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    corpus = TokenizedCorpus(np.random.default_rng(0).integers(1, n_vocab, offsets[-1]).astype(np.int32), offsets)
    return SimpleNamespace(
        tokenizer=SimpleNamespace(pad_id=0, vocab_size=n_vocab), tokens=lambda split: {"val": corpus}[split]
    )


@pytest.fixture(scope="module")
def facts():
    return Data()


def rows_of(result, model="trained", kind="text", condition="off"):
    return [row for row in result.rows if (row["model"], row["kind"], row["condition"]) == (model, kind, condition)]


def change(model, targets, on, other):
    """By hand, of one row of logits: mean change of the loss and mean divergence."""
    delta = F.cross_entropy(on, targets) - F.cross_entropy(other, targets)
    p, q = on.log_softmax(-1), other.log_softmax(-1)
    return float(delta), float(F.kl_div(q, p, reduction="batchmean", log_target=True))


@torch.no_grad()
def test_text_equals_documents_read_alone():
    data = text_data()
    model = tiny(data.tokenizer, "ltm", "stm").eval()
    result = run(model, data, TEXT)
    corpus = data.tokens("val")
    # streams hold documents 0, 1 and 2, 3; at a document's end the other's memory is that of the other stream
    streams = [[corpus.document(0), corpus.document(1)], [corpus.document(2), corpus.document(3)]]
    rows = {(r["condition"], r["stream"], r["document"], r["position"]): r for r in result.rows if r["kind"] == "text"
            and r["model"] == "trained"}  # fmt: skip
    assert len(rows) == 3 * 11  # the last segment of the document of 33 tokens has none to predict
    states = [{name: model.init_state(1) for name in ("on", "off", "wiped", "swapped")} for _ in streams]
    for document in range(2):
        for s in range(3):
            held = [state["on"] for state in states]
            for i, stream in enumerate(streams):
                ids = torch.from_numpy(stream[document][s * T : (s + 1) * T].copy()).long()[None]
                targets = torch.from_numpy(stream[document][s * T + 1 : (s + 1) * T + 1].copy()).long()
                begins = torch.tensor([s == 0])
                states[i]["swapped"] = states[i]["swapped"]._replace(memory=held[1 - i].memory)
                logits = {}
                for name, state in states[i].items():
                    state = model.wipe(state) if name == "wiped" else state
                    out = model(ids, state=state, reset=begins, read=name != "off")
                    logits[name], states[i][name] = out.logits[0, : len(targets)], out.state
                for name in OTHERS if len(targets) else ():
                    row = rows[name, i, document, s * T]
                    delta, kl = change(model, targets, logits["on"], logits[name])
                    assert row["n_token"] == len(targets)
                    assert row["nll"] == pytest.approx(float(F.cross_entropy(logits["on"], targets)), rel=1e-4)
                    assert row["delta_nll"] == pytest.approx(delta, abs=1e-5)
                    assert row["kl"] == pytest.approx(kl, abs=1e-5)
    assert max(abs(row["delta_nll"]) for row in rows_of(result, condition="swapped")) > 1e-3
    assert [row["delta_nll"] for row in rows_of(result) if row["position"] == 0] == pytest.approx([0.0] * 4, abs=1e-6)


def test_text_agrees_with_perplexity():
    data = text_data([200, 90, 130, 77])
    model = tiny(data.tokenizer, "ltm")
    metrics = run(model, data, TEXT).metrics
    expected = perplexity.run(model, data, Perplexity(limit=None, n_row=2)).metrics
    for condition in ("off", "wiped"):
        for ours, theirs in {"": "difference", "low/": "difference_low", "high/": "difference_high"}.items():
            value = expected[f"{theirs}/on-{condition}"]
            assert metrics[f"{ours}delta_nll/text/{condition}"] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert metrics["nll/text"] == pytest.approx(expected["nll/on"], rel=1e-5)
    assert metrics["n_token/text"] == expected["n_token"]
    assert metrics["n_document/text"] == expected["n_document"]
    assert metrics["kl/text/off"] > 0


def test_one_bank_for_all_rows_gives_each_document_its_own_copy():
    data = text_data([64, 64])
    apart, shared = (run(tiny(data.tokenizer, "ltm", scope=scope), data, TEXT) for scope in ("sequence", "shared"))
    for one, other in zip(apart.rows, shared.rows, strict=True):
        for name in one:
            assert one[name] == (pytest.approx(other[name], abs=1e-5) if isinstance(one[name], float) else other[name])


@torch.no_grad()
def test_answers_equal_those_of_recall(facts):
    model = tiny(facts.tokenizer, "ltm").eval()
    cfg = ContextInfluence(limit=100, n_document=3, n_fact=4, distance=50)
    result = run(model, facts, cfg)
    documents, _, lengths = draw(facts, Needle(n_document=3, n_fact=4, distance=50), T)
    (state,) = reading.read(model, documents, lengths)
    other = model.select_rows(state, torch.tensor([1, 2, 0]))
    for fact in range(4):
        asked = [document.facts[fact] for document in documents]
        on = [nll for _, nll in asking.answer(model, state, asked)]
        for name, memory, reads in (
            ("off", state, False),
            ("wiped", model.wipe(state), True),
            ("swapped", other, True),
        ):
            expected = [a - b for a, (_, b) in zip(on, asking.answer(model, memory, asked, reads), strict=True)]
            rows = [row for row in rows_of(result, kind="answer", condition=name) if row["fact"] == fact]
            assert [row["delta_nll"] for row in rows] == pytest.approx(expected, abs=1e-4)
            assert [row["nll"] for row in rows] == pytest.approx(on, abs=1e-4)
            assert [row["since"] for row in rows] == [lengths[0] - document.end(fact) for document in documents]
    assert abs(result.metrics["delta_nll/answer/off"]) > 1e-3
    assert result.metrics["n_document/answer"] == 3
    assert {line["metric"] for line in result.metadata["headline"]} <= set(result.metrics)


def test_without_memory_nothing_changes_at_all(facts):
    result = run(tiny(facts.tokenizer), facts, ContextInfluence(limit=300, n_document=2, n_fact=2, distance=20))
    assert {row[name] for row in result.rows if row["kind"] != "distribution" for name in ("delta_nll", "kl")} == {0.0}
    assert result.metadata["off_equals_wiped"]
    for name, value in result.metrics.items():
        if "delta_nll" in name or "kl" in name:
            assert value == 0.0


def test_same_seed_same_numbers_and_the_model_is_left_as_it_was():
    data = text_data()
    model = tiny(data.tokenizer, "ltm", "stm").train()
    weights, before = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    shares = []
    result = run(model, data, TEXT, progress=shares.append)
    assert result == run(model, data, TEXT)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert result.metadata["off_equals_wiped"]  # an empty long-term memory reads nothing, a short-term one too
    counts = [row for row in result.rows if row["kind"] == "distribution" and row["model"] == "trained"]
    for condition in OTHERS:
        part = [row for row in counts if row["condition"] == condition]
        assert len(part) == len(EDGES) + 1
        assert sum(row["n_token"] for row in part) == result.metrics["n_token/text"] == sum(LENGTHS) - 4


def test_means_by_hand():
    def row(document, n, delta, model="trained"):
        return {"model": model, "kind": "text", "condition": "off", "stream": 0, "document": document, "position": 0,
                "n_token": n, "nll": 1.0, "delta_nll": delta, "kl": 2.0}  # fmt: skip

    # document 0 has 30 tokens of mean -1 in two segments, document 1 has 10 of mean 1; the interval as of perplexity
    metrics = summarise([row(0, 10, -3.0), row(0, 20, 0.0), row(1, 10, 1.0), row(0, 5, 7.0, "untrained")])
    assert metrics["delta_nll/text/off"] == pytest.approx(-0.5)
    assert metrics["high/delta_nll/text/off"] == pytest.approx(-0.5 + 9.5295)
    assert metrics["delta_nll/text/off/untrained"] == 7.0
    assert math.isnan(metrics["low/delta_nll/text/off/untrained"])
    assert summarise([]) == {}


@pytest.mark.slow
def test_figures(facts):
    result = run(tiny(facts.tokenizer, "ltm"), facts, ContextInfluence(limit=2000, n_document=2, n_fact=2, distance=20))
    (figure,) = plot(result).values()
    assert list(plot(result)) == ["context_influence"]
    assert len(figure.axes) == 4
    _, _, spread, means = figure.axes
    assert sum(bar.get_width() for bar in spread.patches) == pytest.approx(2.0)  # shares of two conditions
    assert len(means.get_yticks()) == 6
    plot(run(tiny(facts.tokenizer), facts, ContextInfluence(limit=100, n_fact=0)))
    assert plot(Result("context_influence", {})) == {}


def test_yaml_settings_and_refusals():
    node = dict(compose(["checkpoint=x", "experiment=context_influence"], "evaluate").context_influence)
    assert node.pop("_target_") == "experiments.context_influence.ContextInfluence"
    assert ContextInfluence(**node) == ContextInfluence()
    for name, value in {"split": "train", "limit": 0, "n_row": 1, "n_document": 1, "n_fact": -1, "seed": -1}.items():
        with pytest.raises(ConfigError, match=f"context_influence.{name}"):
            ContextInfluence(**{name: value})
    data = text_data([T])
    with pytest.raises(ConfigError, match="one segment long"):
        run(tiny(data.tokenizer, "ltm"), data, TEXT)
