"""The needle, with hand-made models of known recall and a recomputation of what they were told."""

import functools
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from experiments import needle
from experiments.needle import Needle, draw, plot, run, summarise
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.data.curriculum import Curriculum
from memlm.data.datamodule import TextData
from memlm.data.stream import TrainingBatches
from memlm.data.tasks.facts import Facts
from memlm.data.tasks.makers import Fact, FactMaker
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation.headline import headline
from memlm.evaluation.recall import reading
from memlm.evaluation.recall.asking import answer
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result
from memlm.evaluation.share import ALONE, Share
from memlm.memory.ltm import LongTermMemory
from memlm.models.lmcode import LMCode
from tests.data.tasks.test_sentences import corpus, tokenized
from tests.experiments.shares import check_shares

SEGMENT_LEN = 32
SMALL = Needle(n_document=4, n_fact=8, distance=100, n_row=3)


def words(rng, n, letters):
    found = set()
    while len(found) < n:
        found.add("".join(rng.choice(list(letters), size=6)))
    return sorted(found)


class Data:
    """Splits whose words do not overlap, so that a token says where it comes from."""

    def __init__(self):
        rng = np.random.default_rng(0)
        vocabulary = {
            "train": words(rng, 400, "abcdefgh"), "val": words(rng, 60, "ijklmnop"), "test": words(rng, 60, "qrstuvw")
        }  # fmt: skip
        sizes = {"train": 8000, "val": 700, "test": 500}
        texts = {
            split: " " + " ".join(rng.choice(vocabulary[split], size=sizes[split] // 2).repeat(2)) for split in sizes
        }
        self.tokenizer = train_tokenizer("word", [*texts.values(), " is"], 2000)
        self.splits = {}
        for split, text in texts.items():
            tokens = np.array(self.tokenizer.encode(text), dtype=np.int32)
            self.splits[split] = TokenizedCorpus(tokens, np.array([0, len(tokens)]))
        self.maker = FactMaker(self.tokenizer, self.splits["train"])
        self.asked = []

    def tokens(self, split):
        self.asked.append(split)
        return self.splits[split]


@pytest.fixture(scope="module")
def data():
    return Data()


class Closed(list):
    """The memory of a row without local context."""


class Fake(nn.Module):
    """A model whose memory of a row is the list of all tokens written in it; what it recalls is up to subclasses."""

    def __init__(self, n_vocab, scope="sequence"):
        super().__init__()
        self.n_vocab, self.segment_len = n_vocab, SEGMENT_LEN
        self.memory = {"fake": [SimpleNamespace(scope=scope)]}
        self.told = []  # (state before, ids) of each call that writes

    def forward(self, ids, state=None, read=True, write=True, logits=True, donate=False):
        state = [[] for _ in ids] if state is None else state
        assert len(state) == len(ids)
        assert not torch.is_grad_enabled()
        assert not self.training
        if write:
            assert not logits  # a million tokens of logits nobody needs
            assert not any(isinstance(memory, Closed) for memory in state)  # the text goes on where it stopped
            self.told.append((state, ids.clone()))
            return SimpleNamespace(logits=None, state=[a + b for a, b in zip(state, ids.tolist(), strict=True)])
        assert all(isinstance(memory, Closed) for memory in state)
        out = torch.zeros(*ids.shape, self.n_vocab)
        for i, (row, memory) in enumerate(zip(ids.tolist(), state, strict=True)):
            for t in range(1, len(row)):
                out[i, t, self.next_token(row[: t + 1], memory if read else [])] = 5.0
        return SimpleNamespace(logits=out, state=state)

    def next_token(self, text, memory):
        raise NotImplementedError

    def absorb(self, ids, state=None, donate=False):
        return self(ids, state=state, logits=False).state

    def places(self, state):
        return []

    def new_context(self, state, donate=False):
        return [Closed(memory) for memory in state]

    def wipe(self, state):
        return [type(memory)() for memory in state]


class Oracle(Fake):
    """Remembers everything."""

    def next_token(self, text, memory):
        for place in range(len(memory) - len(text)):
            if memory[place : place + 2] == text[:2]:
                return memory[place + len(text)]
        return 0


class Cheat(Fake):
    """Has seen the answers, and never looks into its memory."""

    def __init__(self, n_vocab, facts):
        super().__init__(n_vocab)
        self.known = {fact.cue: fact.tokens for fact in facts}

    def next_token(self, text, memory):
        tokens = self.known.get(tuple(text[:2]), ())
        return tokens[len(text)] if len(text) < len(tokens) else 0


class Forgets(Oracle):
    """Loses what lies across a segment boundary, and what is older than `reach` tokens."""

    reach = 10**9

    def next_token(self, text, memory):
        for place in range(max(0, len(memory) - self.reach), len(memory) - 6):
            if memory[place : place + 2] == text[:2] and place // SEGMENT_LEN == (place + 5) // SEGMENT_LEN:
                return memory[place + len(text)]
        return 0


def rate(result, condition, kind=""):
    return result.metrics[f"exact_match{kind}/{condition}"]


def test_perfect_memory_recalls_everything_and_its_controls_nothing(data):
    result = run(Oracle(data.tokenizer.vocab_size), data, SMALL)
    assert rate(result, "on") == 1.0
    assert rate(result, "on", "_straddling") == 1.0
    assert [rate(result, c) for c in ("off", "wiped", "swapped", "unseen")] == [0.0] * 4
    assert [result.metrics[f"n/{c}"] for c in CONDITIONS] == [32] * 5
    assert result.metrics["low/on"] < 1.0 == result.metrics["high/on"]
    assert result.metrics["chance"] == pytest.approx(1 / 8)
    assert Counter(row["condition"] for row in result.rows) == dict.fromkeys(CONDITIONS, 32)
    # logits 5 at the right one of V tokens
    nll = np.log(np.exp(5) + data.tokenizer.vocab_size - 1) - 5
    assert result.metrics["nll/on"] == pytest.approx(nll, rel=1e-5)
    assert result.metrics["nll/off"] == pytest.approx(nll + 5, rel=1e-5)


def test_controls_expose_a_model_that_ignores_its_memory(data):
    documents, unseen, _ = draw(data, SMALL, SEGMENT_LEN)
    facts = [fact for part in [*unseen, *(document.facts for document in documents)] for fact in part]
    result = run(Cheat(data.tokenizer.vocab_size, facts), data, SMALL)
    assert [rate(result, c) for c in CONDITIONS] == [1.0] * 5


def test_rates_intervals_and_chance_by_hand():
    def row(condition, fact, straddles, correct, distance=10):
        document = fact // 2
        return {
            "condition": condition, "distance": distance, "document": document, "fact": fact,
            "straddles": straddles, "correct": correct, "nll": float(fact), "kind": "random", "n_other": 0,
        }  # fmt: skip

    rows = [row("on", 0, True, False), row("on", 1, False, True), row("on", 2, False, True), row("on", 3, True, True)]
    rows += [row("unseen", 0, None, False)]
    metrics = summarise(rows)
    assert metrics["exact_match/on"] == 0.75
    assert metrics["nll/on"] == 1.5
    assert metrics["exact_match_straddling/on"] == 0.5
    assert metrics["exact_match_inside/on"] == 1.0
    assert metrics["n_inside/on"] == 2
    assert metrics["chance"] == 0.5
    assert (metrics["low/on"], metrics["high/on"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert "exact_match_inside/unseen" not in metrics
    assert metrics["exact_match/unseen"] == 0.0
    two = summarise([*rows, row("on", 0, True, False, distance=20)])
    assert two["exact_match/on"] == two["exact_match/on/20"] == 0.0  # without a suffix: the longest
    assert two["exact_match/on/10"] == 0.75
    assert summarise([]) == {}


@pytest.mark.parametrize("n_row", [1, 3, 8])
@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_told_recomputed_from_the_tokens_fed(data, n_row, split):
    settings = Needle(n_document=5, n_fact=7, distance=[40, 333], n_row=n_row, split=split, seed=3)
    model = Oracle(data.tokenizer.vocab_size)
    data.asked.clear()
    result = run(model, data, settings)
    assert set(data.asked) == {split}
    texts = []  # of each document, put together from the calls
    for state, ids in model.told:
        if not any(state):
            batch = [[] for _ in ids]
            texts += batch
        assert [*map(len, state)] == [*map(len, batch)]  # one pass: each call goes on where the last one stopped
        assert ids.shape[0] <= n_row
        assert ids.shape[1] <= 16 * SEGMENT_LEN
        for text, row in zip(batch, ids.tolist(), strict=True):
            text += row
    assert len(texts) == 5
    assert {len(text) for text in texts} == {result.metadata["lengths"][-1]}

    own = set(data.splits[split].tokens.tolist())
    pairs = set(zip(data.splits[split].tokens.tolist(), np.roll(data.splits[split].tokens, -1).tolist(), strict=True))
    found = {}
    for document, text in enumerate(texts):
        rows = [r for r in result.rows if (r["document"], r["condition"], r["distance"]) == (document, "on", 40)]
        spans = []
        for row in rows:
            fact = data.tokenizer.encode(" " + row["text"])
            places = [i for i in range(len(text)) if text[i : i + len(fact)] == fact]
            assert len(places) == 1
            spans.append((places[0], places[0] + len(fact)))
        found[document] = spans
        assert spans == sorted(spans)
        haystack = [token for i, token in enumerate(text) if not any(a <= i < b for a, b in spans)]
        assert set(haystack) <= own  # of the held-out split alone
        assert set(pairwise(haystack)) <= pairs  # and in its own order, going round at the end
    for row in result.rows:
        if row["condition"] == "unseen":
            assert (row["straddles"], row["since"], row["depth"]) == (None, None, None)
            continue
        begin, end = found[row["document"]][row["fact"]]
        length = result.metadata["lengths"][settings.distances.index(row["distance"])]
        assert row["since"] == length - end >= row["distance"]
        assert row["depth"] == begin / length
        assert row["straddles"] == (begin // SEGMENT_LEN != (end - 1) // SEGMENT_LEN)
    # no more text than the distance asks for, up to a segment
    assert min(row["since"] for row in result.rows if row["distance"] == 333 and row["since"]) < 333 + SEGMENT_LEN
    expected = (result.metadata["lengths"][-1] - 7 * 6) / data.splits[split].n_token
    assert result.metadata["haystack_repetition"] == pytest.approx(expected)


def test_the_haystack_is_the_users_own_text_and_its_repetition_is_put_forward(data, tmp_path):
    path = tmp_path / "own.txt"
    own = data.splits["test"].tokens.tolist()
    path.write_text(data.tokenizer.decode(own))
    data.cache_dir = tmp_path
    reads = functools.partial(TextData.tokens_of_file, data)
    data.tokens_of_file, data.segment_len = reads, SEGMENT_LEN
    for distance, times in ((300, None), (1000, 2)):
        model = Oracle(data.tokenizer.vocab_size)
        result = run(model, data, replace(SMALL, n_document=2, n_row=2, distance=distance, text=str(path)))
        text = torch.cat([ids for _, ids in model.told], dim=1).tolist()[0]
        read = [token for token in text if token in set(own)]
        start = next(i for i in range(len(own)) if (own[i:] + own[:i])[:50] == read[:50])
        once = (own[start:] + own[:start])[: len(read)]
        assert read[: len(once)] == once  # nothing twice as far as it goes
        shown = [number for number in headline(result) if number.metric == "repetition"]
        assert [round(number.value) for number in shown] == ([] if times is None else [times])
        assert result.metadata["settings"]["text"] == str(path)
    path.write_text(data.tokenizer.decode(own[:1]))
    with pytest.raises(ConfigError, match="has 1 tokens, no more than one segment of 32: give a longer one"):
        run(Oracle(data.tokenizer.vocab_size), data, replace(SMALL, text=str(path)))


def test_some_facts_straddle_a_boundary_and_most_do_not(data):
    for seed in range(20):
        documents, *_ = draw(data, Needle(n_document=2, n_fact=8, seed=seed), SEGMENT_LEN)
        straddles = [d.straddles(i, SEGMENT_LEN) for d in documents for i in range(8)]
        assert 1 <= sum(straddles) <= 10
        gaps = [b - a for d in documents for a, b in zip([0, *map(d.end, range(7))], d.begins, strict=True)]
        assert min(gaps) >= 0
        assert len(set(gaps)) > 5
    # gaps shrink to nothing rather than below
    dense, *_ = draw(data, Needle(n_document=2, n_fact=8, facts_per_segment=100.0), SEGMENT_LEN)
    assert len(dense[0].head) <= 8 * 6 + 2 * SEGMENT_LEN


def test_facts_lost_at_boundaries_and_with_distance_show(data):
    model = Forgets(data.tokenizer.vocab_size)
    result = run(model, data, SMALL)
    assert rate(result, "on", "_straddling") == 0.0
    assert rate(result, "on", "_inside") == 1.0
    assert 0 < rate(result, "on") < 1
    Forgets.reach = 420
    try:
        result = run(model, data, Needle(n_document=3, n_fact=6, distance=[400, 30, 200]))
    finally:
        Forgets.reach = 10**9
    assert result.metadata["distances"] == [30, 200, 400]
    near, middle, far = (result.metrics[f"exact_match/on/{d}"] for d in (30, 200, 400))
    assert near >= middle > far == result.metrics["exact_match/on"]


def test_every_kind_is_put_forward_with_its_controls(data, monkeypatch):
    monkeypatch.setitem(needle.KINDS, "native", needle.KINDS["random"])  # whatever this text has
    model = Oracle(data.tokenizer.vocab_size)
    settings = Needle(n_document=2, n_fact=3, distance=[60, 30], kind=["native", "random", "native"])
    result = run(model, data, settings)
    assert result.metrics["n/on"] == 6  # a kind that is named twice counts once
    numbers = headline(result)
    assert [number.metric for number in numbers if not number.control] == [
        "exact_match/on/native/60",
        "exact_match/on/random/60",
    ]
    assert [number.control for number in numbers] == [False, True, True, True, True] * 2
    more = Needle(n_document=2, n_fact=3, distance=30, n_other=[4, 0], kind=["random", "native"])
    assert headline(run(model, data, more))[5].metric == "exact_match/on/native/0"
    (one,) = [number for number in headline(run(model, data, SMALL)) if not number.control]
    assert (one.label, one.metric) == ("memory on", "exact_match/on")


def test_a_memory_that_goes_by_what_is_asked_is_found_out():
    class Careless(Fake):
        """Answers with what followed the words before the last one: whoever is asked for, in sentences of one form."""

        def next_token(self, text, memory):
            for n in range(3, 0, -1):
                for place in range(len(memory) - n):
                    if memory[place : place + n] == text[-n:]:
                        return memory[place + n]
            return 0

    tokenizer, train = tokenized("bpe", corpus())
    data = SimpleNamespace(tokenizer=tokenizer, tokens=lambda split: train, maker=None)
    result = run(Careless(tokenizer.vocab_size), data, Needle(n_document=2, n_fact=12, distance=100, kind="natural"))
    rows = {name: [row for row in result.rows if row["condition"] == name] for name in ("on", "stranger", "unseen")}
    assert [(row["document"], row["fact"]) for row in rows["stranger"]] == [(i, k) for i in range(2) for k in range(12)]
    # the told answer, given to a question about somebody of whom nothing was told; no other control sees it
    assert 0 < sum(row["correct"] for row in rows["stranger"]) <= sum(row["correct"] for row in rows["on"])
    assert result.metrics["exact_match/unseen"] == 0
    assert result.metrics["exact_match/stranger"] == sum(row["correct"] for row in rows["stranger"]) / 24
    assert [number.metric for number in headline(result)][-1] == "exact_match/stranger"
    # a guess among the told values of the relation that is asked for, and not among all 12
    relations = Counter()
    documents, _, _ = draw(data, Needle(n_document=2, n_fact=12, distance=100, kind="natural"), SEGMENT_LEN)
    for i, document in enumerate(documents):
        relations.update((i, fact.relation) for fact in document.facts)
    assert result.metrics["chance"] == pytest.approx(len(relations) / 24)


def test_stored_is_told_of_banks_of_one_document_alone(data):
    class Tells(Oracle):
        """Holds the places of all tokens but those of the last half of the facts."""

        def places(self, state):
            kept = [min(documents[i].begins[4], len(memory)) for i, memory in zip(self.rows(), state, strict=True)]
            return [torch.tensor([[t if t < n else -1 for t in range(600)] for n in kept])]

        def rows(self):
            return range(4)

    settings = Needle(n_document=4, n_fact=8, distance=100, n_row=4)
    documents, *_ = draw(data, settings, SEGMENT_LEN)
    assert run(Tells(data.tokenizer.vocab_size), data, settings).metrics["stored"] == 0.5
    Tells.rows = lambda self: [0]
    assert "stored" not in run(Tells(data.tokenizer.vocab_size, "shared"), data, settings).metrics


def test_names_differ_everywhere_and_swapped_asks_another_documents_memory(data):
    documents, unseen, _ = draw(data, SMALL, SEGMENT_LEN)
    names = [fact.name for part in [*unseen, *(d.facts for d in documents)] for fact in part]
    assert len(set(names)) == len(names) == 64
    assert len({tuple(document.begins) for document in documents}) == 4
    assert len({document.haystack.begin for document in documents}) == 4
    assert draw(data, SMALL, SEGMENT_LEN)[0][0].begins == documents[0].begins
    assert draw(data, Needle(n_document=4, n_fact=8, seed=1), SEGMENT_LEN)[0][0].begins != documents[0].begins

    class Spy(Oracle):
        def next_token(self, text, memory):
            asked.add((tuple(text[:2]), tuple(memory)))
            return 0

    for scope, n_row in [("sequence", 1), ("sequence", 3), ("sequence", 4), ("shared", 4)]:
        asked = set()
        model = Spy(data.tokenizer.vocab_size, scope)
        run(model, data, Needle(n_document=4, n_fact=8, distance=50, n_row=n_row))
        if scope == "shared":  # one document at a time, each from the beginning
            assert {len(ids) for _, ids in model.told} == {1}
            assert sum(not state[0] for state, _ in model.told) == 4
        for i, document in enumerate(documents):
            for fact in document.facts:
                memories = [memory for cue, memory in asked if cue == fact.cue]
                holds = [fact.tokens in zip(*(m[k:] for k in range(6)), strict=False) for m in memories if m]
                assert sorted(holds) == [False, True]  # swapped and on
                assert () in memories  # off and wiped
            assert len({m for cue, m in asked if cue == unseen[i][0].cue}) == 1


def test_evaluated_names_and_values_never_occur_in_training(data):
    phases = [{"steps": 60, "n_row": 4, "n_segment": 8, "task": {"items": 3, "hard": 0.5}}]
    task = Facts(data.tokenizer, data.splits["train"])
    curriculum = Curriculum(phases, {"_target_": "memlm.data.tasks.facts.Facts"})
    batches = TrainingBatches(data.splits["train"], SEGMENT_LEN, 0, curriculum, task, 60, 0)
    documents, unseen, _ = draw(data, Needle(n_document=8, n_fact=32, seed=5), SEGMENT_LEN)
    facts = [fact for part in [*unseen, *(document.facts for document in documents)] for fact in part]
    names, values = {fact.cue for fact in facts}, {fact.answer[1:] for fact in facts}
    assert len(facts[0].tokens) == 6
    seen_names, seen_values = set(), set()
    (between,) = data.tokenizer.encode(" is")
    for step in range(60):
        for row in batches[step].ids.tolist():
            for i, token in enumerate(row):
                if token == between:
                    seen_names.add(tuple(row[i - 2 : i]))
                    seen_values.add(tuple(row[i + 1 : i + 4]))
    assert len(seen_names) > 1500  # training did plant facts
    assert len(seen_values) > 1500
    assert not names & seen_names
    assert not values & seen_values


@pytest.fixture(scope="module")
def real(data):
    torch.manual_seed(0)
    model = LMCode(
        data.tokenizer.vocab_size,
        {"ltm": functools.partial(LongTermMemory, n_slot=64, d_key=8, top_k=4, write_budget=8, temperature=30.0)},
        n_layer=2, n_head=2, d_model=32, segment_len=SEGMENT_LEN, overlap=4, dropout=0.1,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_teacher_forced_answers_equal_greedy_decoding(data, real):
    real.eval()
    n = 24
    text = torch.from_numpy(np.stack([data.splits["val"].tokens[i * 8 : i * 8 + 96] for i in range(n)])).long()
    with torch.no_grad():
        state = real.new_context(real(text, logits=False).state)
        cues = [fact.cue for fact in data.maker.draw(np.random.default_rng(0), n, "evaluation")]
        greedy = real.generate(torch.tensor(cues), 4, temperature=0, state=state, write=False)[:, 2:].tolist()
        facts, expected = [], []
        for i, (cue, tokens) in enumerate(zip(cues, greedy, strict=True)):
            if i % 2:  # wrong at one place, all others as decoding would go on from there
                wrong = i // 2 % 4
                tokens = [*tokens[:wrong], (tokens[wrong] + 1) % real.n_vocab]
                one = real.select_rows(state, torch.tensor([i]))
                more = real.generate(torch.tensor([[*cue, *tokens]]), 3 - wrong, temperature=0, state=one, write=False)
                tokens = more[0, 2:].tolist()
            facts.append(Fact(("a", "b"), ("c", "d", "e"), cue, tuple(tokens[: 4 - i % 3 // 2])))  # lengths differ
            expected.append(list(facts[-1].answer) == greedy[i][: len(facts[-1].answer)])
        found = answer(real, state, facts)
    assert [correct for correct, _ in found] == expected
    assert 8 <= sum(expected) < n
    # the mean over the answer's tokens alone, one by one
    one = real.select_rows(state, torch.tensor([1]))
    with torch.no_grad():
        logits = real(torch.tensor([facts[1].tokens]), state=one, write=False).logits[0]
    nll = nn.functional.cross_entropy(logits[1:-1], torch.tensor(facts[1].answer))
    assert found[1][1] == pytest.approx(float(nll), rel=1e-4)


@pytest.mark.slow
def test_a_real_model_is_left_as_it_was_and_the_run_repeats(data, real):
    real.train()
    real.layers[0].eval()  # as a frozen layer would be
    weights = {name: value.clone() for name, value in real.state_dict().items()}
    modes = [module.training for module in real.modules()]
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    shares = []
    settings = Needle(n_document=3, n_fact=4, distance=[20, 150], n_row=2)
    first, second = run(real, data, settings, progress=shares.append), run(real, data, settings)
    assert first == second
    assert first == Result.from_dict(first.to_dict())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert modes == [module.training for module in real.modules()]
    assert all(torch.equal(weights[name], value) for name, value in real.state_dict().items())
    assert all(parameter.grad is None for parameter in real.parameters())
    # the memory matters to this model, and the controls are measured on different memories
    nll = {c: [row["nll"] for row in first.rows if row["condition"] == c] for c in CONDITIONS}
    assert nll["on"] != nll["off"]
    assert nll["on"] != nll["swapped"]
    assert nll["off"] == pytest.approx(nll["wiped"], rel=1e-5)  # nothing is read from an empty bank
    for a, b in zip(
        first.rows, run(real, data, Needle(n_document=3, n_fact=4, distance=[20, 150], n_row=1)).rows, strict=True
    ):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-3)


@pytest.mark.parametrize("memories", [{}, {"ltm": functools.partial(LongTermMemory, n_slot=32, scope="shared")}])
def test_without_memory_and_with_a_shared_one(data, memories, monkeypatch):
    monkeypatch.setattr(reading, "_WINDOW", 1)  # segment by segment, which every memory can do
    torch.manual_seed(0)
    model = LMCode(data.tokenizer.vocab_size, memories, n_layer=1, n_head=2, d_model=16, segment_len=SEGMENT_LEN)
    bank = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(model, data, Needle(n_document=2, n_fact=3, distance=64))
    assert {row["condition"] for row in result.rows} == set(CONDITIONS)
    assert all(torch.equal(bank[name], value) for name, value in model.state_dict().items())
    nll = {c: result.metrics[f"nll/{c}"] for c in CONDITIONS}
    assert (nll["on"] == nll["off"] == nll["wiped"] == nll["swapped"]) == (not memories)


def test_several_processes_find_what_one_does(data):
    def measure(share: Share = ALONE) -> Result:
        return run(Oracle(data.tokenizer.vocab_size), data, SMALL, share=share)

    check_shares(measure, measure())


def test_figures(data):
    model = Oracle(data.tokenizer.vocab_size)
    (bars,) = plot(run(model, data, SMALL)).values()
    (axes,) = bars.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "memory on"
    assert len(labels) == 6  # and four controls, and facts across a boundary
    assert [bar.get_width() for bar in axes.patches] == [1, 1, 0, 0, 0, 0]
    assert "32 of 32" in [text.get_text() for text in axes.texts]
    (lines,) = plot(run(model, data, Needle(n_document=2, n_fact=3, distance=[20, 200]))).values()
    drawn = {line.get_label(): list(line.get_ydata()) for line in lines.axes[0].get_lines()}
    assert drawn["memory on"] == [1, 1]
    assert drawn["another document's memory"] == [0, 0]
    assert plot(Result("needle", {})) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_document": 1}, "n_document must be at least 2"),
        ({"distance": []}, "distance"),
        ({"distance": [-1, 5]}, "distance"),
        ({"split": "train"}, "'val' or 'test'"),
        ({"facts_per_segment": 0.0}, "facts_per_segment must be positive"),
        ({"n_row": 0}, "n_row must be at least 1"),
    ],
)
def test_impossible_settings_are_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        Needle(**settings)


def test_yaml_and_settings_agree():
    node = dict(compose(["checkpoint=x", "experiment=needle"], "evaluate").needle)
    assert node.pop("_target_") == "experiments.needle.Needle"
    assert Needle(**node) == Needle()
    assert set(node) == set(Needle.__dataclass_fields__)


def test_memories_are_consolidated_while_documents_are_read(data, real):
    """Against a loop over single segments; after every second one similar slots are merged, early and late."""
    real.eval()
    settings = Needle(n_document=2, n_fact=3, distance=[40, 120], consolidate_every=2)
    result = run(real, data, settings)
    documents, _, lengths = draw(data, settings, SEGMENT_LEN)
    module = real.memory["ltm"][0]
    for number, document in enumerate(documents):
        state, merged, seen = None, 0, []
        for segment in range(lengths[-1] // SEGMENT_LEN):
            ids = document.tokens(segment * SEGMENT_LEN, (segment + 1) * SEGMENT_LEN)
            with torch.no_grad():
                state = real.absorb(torch.from_numpy(np.asarray(ids)).long()[None], state)
                if segment % 2 == 1:
                    bank, done = module.consolidate(state.memory["ltm"][0], turn=segment // 2)
                    state = state._replace(memory={"ltm": (bank,)})
                    merged += done["merged"]
            if (segment + 1) * SEGMENT_LEN in lengths:
                distance = settings.distances[lengths.index((segment + 1) * SEGMENT_LEN)]
                rows = [row for row in result.rows if row["condition"] == "on" and row["document"] == number
                        and row["distance"] == distance]  # fmt: skip
                with torch.no_grad():
                    found = [answer(real, real.new_context(state), [fact])[0][1] for fact in document.facts]
                assert [row["nll"] for row in rows] == pytest.approx(found, rel=1e-3)
                assert {row["merged"] for row in rows} == {merged}
                seen.append(merged)
        assert 0 < seen[0] < seen[1]
    last = {row["document"]: row["merged"] for row in result.rows if row["merged"] is not None}
    assert result.metrics["merged"] == sum(last.values()) / 2
    alone = run(real, data, Needle(n_document=2, n_fact=3, distance=[40, 120], consolidate_every=2, n_row=1))
    assert [row["merged"] for row in alone.rows] == [row["merged"] for row in result.rows]
    without = run(real, data, Needle(n_document=2, n_fact=3, distance=[40, 120]))
    assert [row["nll"] for row in without.rows] != [row["nll"] for row in result.rows]
    with pytest.raises(ConfigError, match=r"needle\.consolidate_every must be at least 1, got 0"):
        Needle(consolidate_every=0)


@pytest.mark.parametrize("memories", [{}, {"ltm": functools.partial(LongTermMemory, n_slot=32)}])
def test_where_nothing_is_consolidated_nothing_is_merged(data, memories):
    """Without a memory, or when a document ends before it is time: the numbers of a run without consolidation."""
    torch.manual_seed(0)
    model = LMCode(data.tokenizer.vocab_size, memories, n_layer=1, n_head=2, d_model=16, segment_len=SEGMENT_LEN)
    every = 1000 if memories else 2
    result = run(model, data, Needle(n_document=2, n_fact=2, distance=[20, 60], consolidate_every=every))
    assert result.metrics["merged"] == 0
    without = run(model, data, Needle(n_document=2, n_fact=2, distance=[20, 60]))
    assert [row["nll"] for row in result.rows] == pytest.approx([row["nll"] for row in without.rows], rel=1e-3)
