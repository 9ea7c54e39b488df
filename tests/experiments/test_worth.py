"""Worth, against models of known loss, a reading of each document alone, and kinds told by hand."""

import copy
import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiments import worth
from experiments.worth import Worth, plot, run
from experiments.worth import experiment as module
from experiments.worth.kinds import common_words, kinds_of
from experiments.worth.settings import CONDITIONS, KINDS
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation.headline import headline
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from memlm.evaluation.summary import summary
from memlm.statistics import mean_interval
from tests.experiments.shares import check_shares
from tests.experiments.tiny import T, tiny

TEXT = "the cat and the dog said that Alice met Bob on Monday in Paris with a red hat and some old books of Carol "
TOKENIZER = train_tokenizer("word", [TEXT * 3], 1000)


def make_data(lengths: list[int], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    corpus = TokenizedCorpus(rng.integers(2, TOKENIZER.vocab_size, size=offsets[-1]).astype(np.int32), offsets)
    return SimpleNamespace(tokenizer=TOKENIZER, tokens=lambda split: corpus)


class Known(nn.Module):
    """Remembers the first token of its document.

    A next token has probability 1/2 if that is read, 1/4 if nothing is, 1/8 if it is that of another document."""

    segment_len = T

    def __init__(self) -> None:
        super().__init__()
        self.memory = {"known": [SimpleNamespace(scope="sequence")]}
        self.head_weight = torch.zeros(1)
        self.first: dict[int, int] = {}

    def init_state(self, n_row: int) -> Any:
        return torch.zeros(n_row, 2)  # memory, context

    def wipe(self, state: Any) -> Any:
        return state * torch.tensor([0.0, 1.0])

    def with_memory(self, state: Any, other: Any) -> Any:
        return torch.stack([other[:, 0], state[:, 1]], dim=1)

    def select_rows(self, state: Any, index: Any) -> Any:
        return state[index]

    def forward(self, ids: Any, state: Any, mask: Any = None, read: bool = True, write: bool = True, **_: Any) -> Any:
        assert ids.shape[1] == T
        assert not torch.is_grad_enabled()
        memory, own = state.unbind(dim=1)
        own = torch.where(own == 0, ids[:, 0].float(), own)
        level = torch.where(memory == own, 0.5, 0.125)
        level = torch.where(memory == 0, 0.25, level) if read else torch.full_like(level, 0.25)
        memory = torch.where(memory == 0, own, memory) if write else memory
        return SimpleNamespace(hidden=level[:, None, None].expand(-1, T, 1), state=torch.stack([memory, own], dim=1))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    monkeypatch.setattr(module, "token_nll", lambda model, hidden, targets: -hidden[..., 0].log())
    return Known()


def apart(lengths: list[int]) -> Any:
    """Documents whose first tokens differ."""
    data = make_data(lengths)
    corpus = data.tokens("test")
    for i in range(len(lengths)):
        corpus.tokens[corpus.offsets[i]] = 2 + i
    return data


def test_known_losses_under_every_condition(known: Known) -> None:
    lengths = [40, 300, 200, 3 * T + 1]
    result = run(known, apart(lengths), Worth(n_row=2))
    metrics = result.metrics
    n_target, n_first = sum(lengths) - 4, 4 * T  # what the first segment predicts cannot be read from anywhere
    assert metrics["n_token"] == n_target
    assert metrics["n_document"] == 4
    expected = {"off": 2.0, "wiped": 2.0}
    expected |= {"on": (2 * n_first + n_target - n_first) / n_target}
    expected |= {"swapped": (2 * n_first + 3 * (n_target - n_first)) / n_target}
    for name, bits in expected.items():
        assert metrics[f"nll/{name}"] == pytest.approx(bits * math.log(2))
        assert metrics[f"perplexity/{name}"] == pytest.approx(2**bits)
    assert metrics["worth/on"] == pytest.approx(1 - 2 ** (expected["on"] - 2))
    assert metrics["worth/swapped"] == pytest.approx(1 - 2 ** (expected["swapped"] - 2))
    assert metrics["worth/wiped"] == 0
    assert metrics["worth_low/on"] < metrics["worth/on"] < metrics["worth_high/on"]
    assert metrics["nll/on/from256"] == pytest.approx(math.log(2))
    assert metrics["n_token/from256"] == 300 - 256
    assert metrics["n_document/from128"] == 2
    assert sum(metrics[f"share/{kind}"] for kind in KINDS) == pytest.approx(1)
    assert sum(metrics[f"gain/{kind}"] for kind in KINDS) == pytest.approx(1)
    most = max(KINDS, key=lambda kind: metrics[f"worth/on/{kind}"])
    told = {"far": "names last seen more than 256 tokens ago", "new": "names new to the document", "rest": "all else"}
    assert f"of perplexity, most on {told[most]} (" in result.metadata["says"]
    assert result.metadata["says"] in summary([result])
    assert [number.value for number in headline(result)][:3] == [
        metrics[f"worth/{c}"] for c in ("on", "swapped", "wiped")
    ]


def test_intervals_are_over_documents(known: Known) -> None:
    result = run(known, apart([41, 73, 57]), Worth())
    values, weights = [], []
    for document, n in enumerate([40, 72, 56]):
        rows = [row for row in result.rows if row["document"] == document]
        nll = {c: sum(r["nll"] * r["n_token"] for r in rows if r["condition"] == c) / n for c in ("on", "off")}
        values.append(nll["on"] - nll["off"])
        weights.append(n)
    mean = np.average(values, weights=weights)
    half = mean_interval(mean + 3 * w * (v - mean) / 168 for w, v in zip(weights, values, strict=True))[1]
    assert result.metrics["difference/on-off"] == pytest.approx(mean)
    assert result.metrics["difference_high/on-off"] == pytest.approx(mean + half)
    assert result.metrics["worth_low/on"] == pytest.approx(1 - math.exp(mean + half))


def test_too_few_documents_have_no_interval() -> None:
    losses = {"on": (1.0, 3.0), "off": (3.0, 2.9), "wiped": (3.0, 2.9), "swapped": (3.1, 3.2)}
    rows = [
        {"condition": condition, "document": document, "place": 0, "kind": "rest", "n_token": 100, "nll": nll}
        for condition, both in losses.items()
        for document, nll in enumerate(both)
    ]
    metrics = module.summarise(rows)
    half = 12.706 * 2.1 / 2  # of differences of -2 and 0.1 nats: ends would be 100 % and -24 million % saved
    assert metrics["difference_high/on-off"] == pytest.approx(-0.95 + half)
    assert metrics["worth/on"] == pytest.approx(1 - math.exp(-0.95))
    for name in ("worth", "perplexity"):
        assert math.isnan(metrics[f"{name}_low/on"])
        assert math.isnan(metrics[f"{name}_high/on/rest"])
    assert metrics["worth_low/swapped"] < metrics["worth/swapped"] < metrics["worth_high/swapped"]  # 0.1 and 0.3 nats
    says = module.says(metrics, 256)
    assert says.startswith("What memory is worth cannot be told: 2 documents are too few for an interval (61.3 %")
    metadata = {"headline": module._headline(metrics, 256), "says": says, "n_token": 200, "n_document": 2}
    result = Result("worth", metrics, tuple(rows), metadata | {"settings": {"distance": 256}})
    (line,) = [line for line in summary([result]).splitlines() if line.startswith("worth ")]
    assert line.split()[-5:] == ["61.3", "%", "-", "-", "200"]
    assert "Where worth tells no interval (-), documents or seeds are too few for one." in summary([result])
    _, by_place, by_kind = plot(result)["worth"].axes
    assert by_place.get_ylim()[0] > -10
    assert by_kind.get_xlim()[0] > -10


@pytest.mark.parametrize("memories", [("ltm",), ("stm", "cache"), ("rmt",), ()])
@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_reading_side_by_side_equals_each_document_alone(memories: tuple[str, ...], scope: str) -> None:
    if scope == "shared" and memories != ("ltm",):
        pytest.skip("only ltm here has a shared bank")
    model = tiny(TOKENIZER, *memories, **({"scope": scope} if scope == "shared" else {}))
    lengths = [40, 33, 60]
    data = make_data(lengths)
    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.random.get_rng_state()
    result = run(model, data, Worth())
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    model.eval()
    order = sorted(range(3), key=lambda i: -lengths[i])
    partner = dict(zip(order, order[1:] + order[:1], strict=True))
    corpus = data.tokens("test")

    def segments(i: int) -> list[torch.Tensor]:
        return list(torch.from_numpy(corpus.document(i)).long()[None].split(T, dim=1))

    def states(i: int) -> list[Any]:
        """States before each segment, and behind the last."""
        found = [model.init_state(1)]
        for part in segments(i):
            found.append(model(part, state=found[-1]).state)
        return found

    for condition in ("on", "off", "wiped", "swapped"):
        for i in range(3):
            state, logits, theirs = model.init_state(1), [], states(partner[i])
            for s, part in enumerate(segments(i)):
                if condition == "wiped":
                    state = model.wipe(state)
                if condition == "swapped":
                    state = model.with_memory(state, theirs[min(s, len(theirs) - 1)])
                with torch.no_grad():
                    out = model(part, state=state, read=condition != "off", write=condition != "off")
                state, logits = out.state, [*logits, out.logits[0]]
            ids = torch.from_numpy(corpus.document(i)).long()
            nll = float(nn.functional.cross_entropy(torch.cat(logits)[:-1], ids[1:]))
            rows = [row for row in result.rows if (row["condition"], row["document"]) == (condition, i)]
            assert sum(row["n_token"] for row in rows) == lengths[i] - 1
            found = sum(row["nll"] * row["n_token"] for row in rows) / (lengths[i] - 1)
            assert found == pytest.approx(nll, rel=1e-4), (condition, i)
    if not memories:
        assert result.metrics["worth/on"] == 0
        assert "Memory is worth nothing" in result.metadata["says"]
    else:
        assert result.metrics["nll/on"] != pytest.approx(result.metrics["nll/off"], rel=1e-5)
        assert result.metrics["nll/swapped"] != pytest.approx(result.metrics["nll/on"], rel=1e-5)


def test_kinds_by_hand() -> None:
    documents = ["the cat saw Alice_1 and the dog. the dog saw Bob, the cat Alice_1.\n"]
    tokenizer = train_tokenizer("bpe", ["x"], 257)  # a token a byte
    ids = np.asarray(tokenizer.encode(documents[0]))
    kinds = kinds_of(ids, tokenizer, {"the", "saw", "and"}, distance=20)
    text = documents[0]

    def at(word: str, nth: int = 0) -> set[str]:
        place = [i for i in range(len(text)) if text.startswith(word, i)][nth]
        return {KINDS[kinds[i]] for i in range(place, place + len(word))}

    assert at("cat") == at("Alice_1") == at("dog") == at("Bob") == {"new"}
    assert at("cat", 1) == at("Alice_1", 1) == {"far"}
    assert at("dog", 1) == at("the") == at(" saw") == at(". ") == {"rest"}
    assert {KINDS[k] for k in kinds_of(ids, tokenizer, (), distance=100)} == {"new", "rest"}


def test_common_words_make_up_a_share() -> None:
    tokenizer = train_tokenizer("word", ["a a a a a b b b c d"], 100)
    ids = np.asarray(tokenizer.encode("a a a a a b b b c d"), dtype=np.int32)
    corpus = TokenizedCorpus(ids, np.array([0, len(ids)]))
    assert common_words(tokenizer, corpus, 0.0) == set()
    assert common_words(tokenizer, corpus, 0.5) == {"a"}
    assert common_words(tokenizer, corpus, 0.8) == {"a", "b"}


def test_what_is_read_can_be_limited(known: Known) -> None:
    data = apart([50] * 10 + [1])
    assert run(known, data, Worth(limit=None)).metrics["n_token"] == 10 * 49
    half = run(known, data, Worth(limit=260))
    assert {row["document"] for row in half.rows} == {0, 2, 4, 6, 8}
    assert run(known, data, Worth(length=20)).metrics["n_token"] == 10 * 19
    with pytest.raises(ConfigError, match="with the memory of another"):
        run(known, data, Worth(limit=50))
    assert len({row["document"] for row in run(known, apart([50] * 5), Worth(n_row=2)).rows}) == 5


def test_figure(known: Known) -> None:
    result = run(known, apart([400, 300, 600]), Worth())
    (figure,) = plot(result).values()
    loss, place, kind = figure.axes
    assert len(loss.lines) == 4
    assert list(loss.lines[0].get_ydata()) == pytest.approx(
        [result.metrics[f"nll/on/from{p}"] for p in (0, 128, 256, 512)]
    )
    assert len(place.containers) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(CONDITIONS.values())
    figure.savefig(io.BytesIO())  # laid out
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert len(kind.get_yticklabels()) == len([k for k in KINDS if result.metrics[f"n_token/{k}"]])
    assert plot(Result("worth", {})) == {}


def test_yaml_and_settings_agree() -> None:
    node = dict(compose(["checkpoint=x", "experiment=worth"], "evaluate").worth)
    assert node.pop("_target_") == "experiments.worth.Worth"
    assert Worth(**node) == Worth()
    assert set(node) == set(Worth.__dataclass_fields__)
    for settings in ({"split": "train"}, {"limit": 0}, {"n_row": 1}, {"common": 1.0}, {"distance": 0}):
        with pytest.raises(ConfigError, match=f"worth.{next(iter(settings))}"):
            worth.Worth(**settings)  # type: ignore[arg-type]


def test_several_processes_find_what_one_does() -> None:
    model, data = tiny(TOKENIZER, "stm"), make_data([30, 40, 20, 50, 35])

    def measure(share: Share = ALONE) -> Result:
        return run(copy.deepcopy(model), data, Worth(n_row=2), share=share)

    check_shares(measure, measure())
