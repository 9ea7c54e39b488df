"""Automatic memory by hand-worked choices and against the selection of its source. Its rule over texts: the laws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memlm.memory.auto import AutoMemory, AutoState
from memlm.memory.contract import Flags, Segment, mean_trace

D, T, M = 8, 5, 5


class Source(nn.Module):
    """AutoMemoryModule as published: a network over the flattened embeddings of one sentence, or of the memory."""

    def __init__(self, embedding: nn.Embedding, sentence_len: int, memory_len: int, padding: int) -> None:
        super().__init__()
        self.embedding, self.memory_len, self.padding = embedding, memory_len, padding
        width = embedding.embedding_dim * sentence_len
        self.score_net = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, sentence_len), nn.Sigmoid())

    def scores(self, ids: list[int]) -> list[float]:
        return self.score_net(self.embedding(torch.tensor(ids)).flatten()).tolist()

    def forward(self, sentence: list[int], memory: list[int]) -> list[int]:
        """The new memory: each token once, the best first, padded."""
        score_of: dict[int, float] = {}
        for ids in (sentence, memory):
            scored = zip(ids, self.scores(ids), strict=True)
            score_of |= {token: score for token, score in scored if token != self.padding}
        best = sorted(score_of, key=lambda token: -score_of[token])[: self.memory_len]
        return best + [self.padding] * (self.memory_len - len(best))


def segment_of(hidden: Tensor, ids: Tensor, first: int = 0, **changes: Any) -> Segment:
    """One complete segment per row, whose tokens begin at place ``first`` of the document."""
    n_row = len(ids)
    yes, zero = torch.ones(n_row, 1, dtype=torch.bool), torch.zeros(n_row, 1, dtype=torch.long)
    segment = Segment(
        ids=ids,
        embeddings=torch.zeros_like(hidden),
        hidden=hidden,
        valid=torch.ones_like(ids, dtype=torch.bool),
        flags=Flags(yes, ~yes, ~yes, None, zero + first, zero),
        signals=None,
        lookback=0,
        columns=slice(0, ids.shape[1]),
    )
    of_flags = {name: changes.pop(name) for name in list(changes) if name in Flags._fields}
    return segment._replace(flags=segment.flags._replace(**of_flags), **changes)


class Scored(AutoMemory):
    """Its scores are given: the first number of a hidden state."""

    def scores(self, hidden: Tensor, kept: Tensor, filled: Tensor) -> Tensor:
        return hidden[..., 0]


def scored(**settings: Any) -> Scored:
    torch.manual_seed(0)
    return Scored(D, **({"n_slot": M, "threshold": 0.5} | settings))


def tell(memory: AutoMemory, state: AutoState, ids: list[int], scores: list[float], first: int = 0) -> AutoState:
    hidden = torch.zeros(1, len(ids), D)
    hidden[0, :, 0] = torch.tensor(scores)
    return memory.write(segment_of(hidden, torch.tensor([ids]), first), state)[0]


def memory_of(**settings: Any) -> AutoMemory:
    torch.manual_seed(0)
    memory = AutoMemory(D, **({"n_slot": M} | settings))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return memory


def hidden_of(n_row: int, seed: int = 1, n_token: int = T) -> Tensor:
    return torch.randn(n_row, n_token, D, generator=torch.Generator().manual_seed(seed))


def ids_of(n_row: int, seed: int = 1, n_token: int = T) -> Tensor:
    return torch.randint(20, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


# --- what is kept ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_above_the_threshold_stay_in_the_order_of_the_text() -> None:
    memory = scored()
    state = tell(memory, memory.init_state(1), [7, 8, 9, 10, 11], [0.9, 0.4, 0.6, 0.5, 0.49])
    assert state.ids.tolist() == [[7, 9, 10, -1, -1]]
    assert state.position.tolist() == [[0, 2, 3, -1, -1]]
    torch.testing.assert_close(state.score, torch.tensor([[0.9, 0.6, 0.5, 0.0, 0.0]]))
    assert memory.filled(state).tolist() == [[True] * 3 + [False] * 2]


@torch.no_grad()
def test_the_best_stay_where_there_are_too_many() -> None:
    memory = scored(n_slot=3)
    state = tell(memory, memory.init_state(1), [1, 2, 3], [0.6, 0.9, 0.7])
    state = tell(memory, state, [4, 5, 6], [0.65, 0.2, 0.95], first=3)
    assert state.ids.tolist() == [[2, 3, 6]]
    assert state.position.tolist() == [[1, 2, 5]]


@torch.no_grad()
def test_a_token_is_kept_once_where_it_scored_best_and_of_equal_scores_the_newer() -> None:
    memory = scored()
    state = tell(memory, memory.init_state(1), [1, 2, 1, 3, 3], [0.9, 0.6, 0.7, 0.8, 0.8])
    assert state.position.tolist() == [[0, 1, 4, -1, -1]]
    state = tell(memory, state, [2, 1, 9], [0.6, 0.7, 0.1], first=5)
    assert state.ids.tolist() == [[1, 3, 2, -1, -1]]
    assert state.position.tolist() == [[0, 4, 5, -1, -1]]


@torch.no_grad()
def test_what_was_kept_is_scored_again() -> None:
    memory = memory_of(threshold=0.0)
    state, _ = memory.write(segment_of(hidden_of(1), torch.arange(5)[None]), memory.init_state(1))
    new, _ = memory.write(segment_of(hidden_of(1, seed=2), 5 + torch.arange(5)[None], first=5), state)
    context = torch.stack([memory.norm(part) for part in state.hidden[0]]).mean(dim=0)
    for i in range(M):
        expected = memory.score_net(torch.cat([memory.norm(new.hidden[0, i]), context])).sigmoid()
        assert float(new.score[0, i]) == pytest.approx(float(expected), abs=1e-6)


@torch.no_grad()
def test_the_choice_is_the_source_s_where_that_is_defined() -> None:
    """Sentence and memory of one length, each token once: the same tokens, here in the order of the text."""
    torch.manual_seed(0)
    padding = 0
    source = Source(nn.Embedding(200, 4), sentence_len=M, memory_len=M, padding=padding)
    memory = scored(threshold=0.0)
    state, theirs = memory.init_state(1), [padding] * M
    ids = (1 + torch.randperm(199, generator=torch.Generator().manual_seed(1))).tolist()
    n_other = 0
    for s in range(12):
        sentence = ids[s * M : (s + 1) * M]
        by_place = dict(zip(theirs, source.scores(theirs), strict=True))
        hidden = state.hidden.clone()
        for slot, token in enumerate(state.ids[0].tolist()):
            hidden[0, slot, 0] = by_place.get(token, 0.0)
        state = tell(memory, state._replace(hidden=hidden), sentence, source.scores(sentence), first=s * M)
        theirs = source(sentence, theirs)
        assert set(state.ids[0].tolist()) == set(theirs)
        assert state.position[0].tolist() == sorted(state.position[0].tolist())
        n_other += set(theirs) != set(sentence)
    assert n_other > 5  # not simply the last sentence


@torch.no_grad()
def test_the_source_needs_equal_sizes_and_ours_scores_any_number() -> None:
    embedding = nn.Embedding(200, 4)
    source = Source(embedding, sentence_len=3, memory_len=M, padding=0)
    with pytest.raises(RuntimeError):
        source([1, 2, 3], [0] * M)
    memory, state = memory_of(), memory_of().init_state(1)
    for n_token in (1, 3, 17):
        state, _ = memory.write(segment_of(hidden_of(1, n_token=n_token), ids_of(1, n_token=n_token)), state)
    assert memory.filled(state).any()


@torch.no_grad()
def test_only_complete_segments_are_written_and_no_padding() -> None:
    memory = memory_of()
    state, _ = memory.write(segment_of(hidden_of(3), ids_of(3)), memory.init_state(3))
    valid = torch.arange(T) < torch.tensor([2, 5, 0])[:, None]
    complete = torch.tensor([[True], [False], [True]])
    x, ids = hidden_of(3, seed=2), ids_of(3, seed=2)
    new, _ = memory.write(segment_of(x, ids, 5, valid=valid, complete=complete), state)
    for part, old in zip(new, state, strict=True):
        assert torch.equal(part[1:], old[1:])
    short, _ = memory.write(segment_of(x[:1, :2], ids[:1, :2], 5), AutoState(*(part[:1] for part in state)))
    for part, other in zip(new, short, strict=True):
        torch.testing.assert_close(part[:1], other)


# --- what is read ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_read_equals_the_naive_reference() -> None:
    memory = memory_of(threshold=0.0)
    state, _ = memory.write(segment_of(hidden_of(1, n_token=3), torch.arange(3)[None]), memory.init_state(1))
    x = hidden_of(1, seed=2)
    read = memory.read(x, memory.prepare(state))
    for t in range(T):
        query = memory.to_query(memory.norm(x[0, t]))
        strength = [1.0]  # of nothing
        for i in range(3):
            score = float(query @ memory.to_key(memory.norm(state.hidden[0, i]))) / math.sqrt(D)
            strength.append(math.exp(score) * float(state.score[0, i]))
        share = [part / sum(strength) for part in strength[1:]]
        found = sum(a * memory.to_value(memory.norm(state.hidden[0, i])) for i, a in enumerate(share))
        expected = memory.read_gate(x[0, t]).sigmoid() * memory.to_output(found)
        torch.testing.assert_close(read.value[0, t], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(read.weights[0, t], torch.tensor([*share, 0.0, 0.0]), atol=1e-5, rtol=1e-4)
    assert read.slots[0, 0].tolist() == [0, 1, 2, -1, -1]


@torch.no_grad()
def test_a_row_that_keeps_nothing_reads_nothing() -> None:
    memory = memory_of()
    read = memory.read(hidden_of(2), memory.prepare(memory.init_state(2)))
    for part in (read.value, read.weights, read.gate):
        assert part.abs().max() == 0
    assert (read.slots == -1).all()


# --- what is learned -------------------------------------------------------------------------------------------------


def test_the_score_network_learns_from_what_is_read() -> None:
    memory = memory_of()
    state, _ = memory.write(segment_of(hidden_of(2), ids_of(2)), memory.init_state(2))
    (memory.read(hidden_of(2, seed=2), memory.prepare(state)).value * torch.randn(2, T, D)).sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_budget_pulls_the_share_that_passes_from_both_sides() -> None:
    for bias, share in ((5.0, 1.0), (-5.0, 0.0)):
        memory = memory_of(budget=0.25, budget_penalty=2.0)
        with torch.no_grad():
            memory.score_net[2].bias.fill_(bias)
        state, trace = memory.write(segment_of(hidden_of(2), ids_of(2)), memory.init_state(2))
        assert trace["passes"].item() == share
        assert float(trace["kept"]) == float(memory.filled(state).sum(dim=1).float().mean())
        (loss,) = memory.losses(trace, torch.zeros(())).values()
        assert loss.item() == pytest.approx(2.0 * (share - 0.25) ** 2)
        loss.backward()
        gradient = float(memory.score_net[2].bias.grad)
        assert gradient * bias > 0  # downhill is towards the threshold


def test_all_and_none_in_turn_keep_to_no_budget() -> None:
    memory = memory_of(budget=0.5, budget_penalty=1.0)
    traces = []
    for bias in (5.0, -5.0):  # as a network does that looks at how full the memory is
        with torch.no_grad():
            memory.score_net[2].bias.fill_(bias)
        traces.append(memory.write(segment_of(hidden_of(2), ids_of(2)), memory.init_state(2))[1])
    trace = mean_trace(traces)
    assert trace["passes"].item() == 0.5
    assert memory.losses(trace, torch.zeros(()))["budget"].item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_slot": 0}, "n_slot must be at least 1, got 0"),
        ({"threshold": -0.1}, r"threshold must be in 0..1, got -0.1"),
        ({"threshold": 1.1}, "threshold"),
        ({"d_score": 0}, "d_score must be at least 1, got 0"),
        ({"budget": 0.0}, r"budget must be in \(0, 1\], got 0.0"),
        ({"budget": 1.5}, "budget"),
        ({"budget_penalty": -1.0}, "budget_penalty must not be negative, got -1.0"),
        ({"budget_penalty": math.nan}, "budget_penalty"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoMemory(D, **settings)
