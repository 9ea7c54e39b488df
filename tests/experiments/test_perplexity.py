"""Perplexity, against models of known loss and a document-by-document recomputation."""

import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from experiments import perplexity
from experiments.perplexity import CONDITIONS, Perplexity, plot, run, summarise
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode
from memlm.statistics import mean_interval
from tests.experiments.shares import check_shares

T = 16
N_VOCAB = 50


def make_data(lengths, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    corpus = TokenizedCorpus(rng.integers(1, N_VOCAB, size=offsets[-1]).astype(np.int32), offsets)
    return SimpleNamespace(tokenizer=SimpleNamespace(pad_id=0), tokens=lambda split: {"val": corpus}[split])


class Known(nn.Module):
    """Gives a next token probability 1/2 if an earlier segment of its document was written and is read, else 1/8."""

    segment_len = T

    def __init__(self):
        super().__init__()
        self.memory = {}
        self.calls = []

    def init_state(self, n_row):
        return torch.zeros(n_row)

    def wipe(self, state):
        return torch.zeros_like(state)

    def forward(self, ids, state=None, reset=None, mask=None, read=True, write=True, logits=True, donate=False):
        assert not logits
        assert not torch.is_grad_enabled()
        assert not self.training
        state = self.init_state(len(ids)) if state is None else state
        self.calls.append(ids)
        hidden = []
        for s in range(ids.shape[1] // T):
            if reset is not None:
                state = torch.where(reset[:, s], 0.0, state)
            hidden.append((state * read)[:, None, None].expand(-1, T, 1))
            state = torch.ones_like(state)
        return SimpleNamespace(hidden=torch.cat(hidden, dim=1), state=state)

    def head(self, hidden):
        share = torch.where(hidden > 0, 0.5, 0.125)  # of every token: only its own logit counts below
        return share.logit() + torch.zeros(*hidden.shape[:-1], 2)


@pytest.fixture
def known(monkeypatch):
    """The known model, and a loss that reads the probability off its head."""

    def token_nll(model, hidden, targets):
        return -model.head(hidden)[..., 0].sigmoid().log()

    monkeypatch.setattr(perplexity, "token_nll", token_nll)
    return Known()


def test_known_losses_per_document_and_their_difference(known):
    # Streams: documents of 48, 16 and 40 tokens are 3 + 1 + 3 segments; one stream reads them in order.
    result = run(known, make_data([48, 16, 40]), Perplexity(limit=None, n_row=1))
    on = [row for row in result.rows if row["condition"] == "on"]
    assert [(row["stream"], row["document"], row["n_token"]) for row in on] == [(0, 0, 47), (0, 1, 15), (0, 2, 39)]
    # the first 16 tokens of a document have nothing to read
    expected = [(16 * math.log(8) + (n - 16) * math.log(2)) / n if n > 16 else math.log(8) for n in (47, 15, 39)]
    assert [row["nll"] for row in on] == pytest.approx(expected, rel=1e-5)
    for name in ("off", "wiped"):
        assert result.metrics[f"perplexity/{name}"] == pytest.approx(8, rel=1e-5)
    nll = (47 * expected[0] + 15 * expected[1] + 39 * expected[2]) / 101
    assert result.metrics["nll/on"] == pytest.approx(nll, rel=1e-5)
    assert result.metrics["perplexity/on"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.metrics["difference/on-off"] == pytest.approx(nll - math.log(8), rel=1e-5)
    assert result.metrics["n_token"] == 101
    assert result.metrics["n_document"] == 3


def test_difference_and_interval_by_hand():
    def rows(condition, nll, counts):
        return [
            {"condition": condition, "stream": i, "document": 0, "n_token": n, "nll": x}
            for i, (x, n) in enumerate(zip(nll, counts, strict=True))
        ]

    # equal weights: the plain interval of the differences -1, -2, -3
    metrics = summarise(rows("on", [1.0, 1.0, 1.0], [5] * 3) + rows("off", [2.0, 3.0, 4.0], [5] * 3))
    mean, half = mean_interval([-1.0, -2.0, -3.0])
    assert metrics["difference/on-off"] == pytest.approx(mean)
    assert metrics["difference_low/on-off"] == pytest.approx(mean - half)
    assert metrics["difference_high/on-off"] == pytest.approx(mean + half)
    assert "difference/on-wiped" not in metrics
    # unequal weights: the difference of the two weighted means
    metrics = summarise(rows("on", [1.0, 3.0], [30, 10]) + rows("off", [2.0, 2.0], [30, 10]))
    assert metrics["nll/on"] == 1.5
    assert metrics["difference/on-off"] == pytest.approx(metrics["nll/on"] - metrics["nll/off"]) == pytest.approx(-0.5)
    # ratio estimator: -0.5 + 2 * 30/40 * (-1 + 0.5) = -1.25 and -0.5 + 2 * 10/40 * (1 + 0.5) = 0.25; 12.706 * 0.75
    assert metrics["difference_high/on-off"] == pytest.approx(-0.5 + 9.5295)
    one = summarise(rows("on", [1.0], [3]) + rows("off", [1.5], [3]))
    assert one["difference/on-off"] == -0.5
    assert math.isnan(one["difference_low/on-off"])
    assert summarise(rows("on", [800.0], [3]))["perplexity/on"] == math.inf
    assert summarise([]) == {}


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        counts = rng.integers(5, 100, size=40)
        gain = rng.normal(-0.1, 0.3, size=40)
        rows = [
            {"condition": c, "stream": i, "document": 0, "n_token": int(counts[i]), "nll": 3.0 + (c == "on") * gain[i]}
            for c in ("on", "off")
            for i in range(40)
        ]
        metrics = summarise(rows)
        covered += metrics["difference_low/on-off"] <= -0.1 <= metrics["difference_high/on-off"]
    assert 0.90 <= covered / 300 <= 0.98


def test_limit_and_streams(known):
    data = make_data([200] * 10)  # 13 segments each, 130 in all
    result = run(known, data, Perplexity(limit=300, n_row=4))
    assert 300 <= result.metrics["n_token"] <= 300 + 4 * 4 * T
    assert len({row["stream"] for row in result.rows}) == 4
    texts = torch.cat(known.calls, dim=1)[0].view(3, -1)
    assert torch.equal(texts[0], texts[1])  # every condition the same text
    assert torch.equal(texts[0], texts[2])
    assert {ids.shape[1] for ids in known.calls[-4:]} == {T}  # wiped: segment by segment
    whole = run(known, data, Perplexity(limit=None, n_row=1))
    assert whole.metrics["n_token"] == 10 * 199
    assert run(known, data, Perplexity(limit=10**8, n_row=1)).metrics == whole.metrics
    # no more streams than documents: a text of one document is read from end to end, and nothing is read twice
    alone = run(known, make_data([200]), Perplexity(n_row=8))
    assert alone.metrics["n_token"] == 199
    assert alone.metadata["n_token_with_past"] == 199 - T
    assert {row["stream"] for row in alone.rows} == {0}
    assert run(known, make_data([16, 9]), Perplexity(n_row=8)).metadata["n_token_with_past"] == 0
    assert run(known, make_data([1, 9]), Perplexity(n_row=1)).metrics["n_document"] == 1
    with pytest.raises(ConfigError, match="one token only"):
        run(known, make_data([1, 1]), Perplexity())


@pytest.fixture(scope="module")
def real():
    torch.manual_seed(0)
    make = functools.partial(LongTermMemory, n_slot=64, d_key=8, top_k=4, write_budget=8, span=3, temperature=30.0)
    model = LMCode(N_VOCAB, {"ltm": make}, n_layer=2, n_head=2, d_model=32, segment_len=T, overlap=4, dropout=0.1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_streaming_equals_each_document_alone(real):
    lengths = [40, 33, 48, 35]  # three segments each, so that two streams of six begin and end with a document
    data = make_data(lengths)
    real.train()
    weights = {name: value.clone() for name, value in real.state_dict().items()}
    before, shares = torch.random.get_rng_state(), []
    result = run(real, data, Perplexity(limit=None, n_row=2), progress=shares.append)
    assert result == run(real, data, Perplexity(limit=None, n_row=2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert real.training
    assert all(torch.equal(weights[name], value) for name, value in real.state_dict().items())
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    real.eval()
    corpus = data.tokens("val")
    for condition in CONDITIONS:
        found = [row for row in result.rows if row["condition"] == condition]
        assert [row["n_token"] for row in found] == [n - 1 for n in lengths]
        for i, row in enumerate(found):
            ids = torch.from_numpy(corpus.document(i)).long()[None]
            state, logits = real.init_state(1), []
            with torch.no_grad():
                for part in ids.split(T, dim=1):
                    if condition == "wiped":
                        state = real.wipe(state)
                    out = real(part, state=state, read=condition != "off")
                    state, logits = out.state, [*logits, out.logits[0]]
            nll = nn.functional.cross_entropy(torch.cat(logits)[:-1], ids[0, 1:])
            assert row["nll"] == pytest.approx(float(nll), rel=1e-4)
    assert result.metrics["nll/on"] != pytest.approx(result.metrics["nll/off"], rel=1e-4)
    assert result.metrics["nll/wiped"] == pytest.approx(result.metrics["nll/off"], rel=1e-5)


def test_figure(known):
    (figure,) = plot(run(known, make_data([200] * 4), Perplexity(n_row=2))).values()
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(CONDITIONS.values())
    assert [bar.get_width() for bar in left.patches][1:] == pytest.approx([8, 8], rel=1e-5)
    assert len(right.get_yticklabels()) == 2
    plot(run(known, make_data([40]), Perplexity(n_row=1)))  # one document: no interval
    assert plot(Result("perplexity", {})) == {}


def test_yaml_and_settings_agree():
    node = dict(compose(["checkpoint=x", "experiment=perplexity"], "evaluate").perplexity)
    assert node.pop("_target_") == "experiments.perplexity.Perplexity"
    assert Perplexity(**node) == Perplexity()
    assert set(node) == set(Perplexity.__dataclass_fields__)
    for settings in ({"split": "train"}, {"limit": 0}, {"n_row": 0}):
        with pytest.raises(ConfigError, match=f"perplexity.{next(iter(settings))}"):
            Perplexity(**settings)


def test_several_processes_find_what_one_does(real):
    texts = make_data([200] * 10)

    def measure(share: Share = ALONE) -> Result:
        return run(copy.deepcopy(real), texts, Perplexity(limit=400, n_row=3), share=share)

    check_shares(measure, measure())
