"""Hierarchy by hand: which level is written when, from what, and what stays."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.laws import learning
from memlm.memory.hierarchy import HierarchyMemory, HierarchyState, Writer
from memlm.memory.state import n_byte
from tests.memory.segments import segment_of
from tests.memory.test_lm2 import found_by, rms

pytestmark = pytest.mark.slow

D, T, N, W, LEVELS, PERIOD = 8, 5, 3, 2, 3, 2


def memory_of(**settings: Any) -> HierarchyMemory:
    torch.manual_seed(0)
    small = {"n_level": LEVELS, "period": PERIOD, "n_slot": N, "n_write": W, "n_head": 2}
    memory = HierarchyMemory(D, **(small | settings))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return memory


def segments(n_row: int, n: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(n_row, T, D, generator=draw) for _ in range(n)]


def made(writer: Writer, x: list[Tensor]) -> list[Tensor]:
    """What a writer makes of a list, query by query."""
    keys, values = [writer.to_key(part) for part in x], [writer.to_value(part) for part in x]
    return [found_by(query, keys, values, writer.n_head) for query in writer.query]


def naive(memory: HierarchyMemory, texts: list[Tensor]) -> list[list[Tensor]]:
    """The slots of each level after one row's segments, the oldest first."""
    levels = [list(part) for part in memory.start.chunk(LEVELS)]
    for n, tokens in enumerate(texts, start=1):
        new = made(memory.of_tokens, [rms(token, memory.norm.weight) for token in tokens])
        for level in range(LEVELS):
            if n % PERIOD**level:
                break
            if level:
                new = made(memory.of_slots, [rms(slot, memory.slot_norm.weight) for slot in levels[level - 1]])
            levels[level] = (levels[level] + new)[-N:]
    return levels


@torch.no_grad()
def test_levels_equal_lists_kept_by_hand() -> None:
    memory, texts = memory_of(), segments(2, 9)
    state = memory.init_state(2)
    for n, hidden in enumerate(texts, start=1):
        valid = [T, 3 if n == 4 else T]  # a context of row 1 ends early
        state = memory.write(segment_of(hidden, valid=valid), state)[0]
        for b in range(2):
            told = [part[b, : 3 if (b, i) == (1, 3) else T] for i, part in enumerate(texts[:n])]
            expected = torch.stack([slot for level in naive(memory, told) for slot in level])
            torch.testing.assert_close(state.slot[b], expected, atol=1e-5, rtol=1e-4)
    assert state.n_written.tolist() == [9, 9]


@torch.no_grad()
def test_a_level_changes_at_its_period_alone_and_then_in_few_slots() -> None:
    memory = memory_of(n_slot=6)
    state, changes = memory.init_state(1), []
    for hidden in segments(1, 8):
        after = memory.write(segment_of(hidden), state)[0]
        before, now = (part.slot[0].unflatten(0, (LEVELS, 6)) for part in (state, after))
        changes.append([bool((a != b).any()) for a, b in zip(before, now, strict=True)])
        for changed, a, b in zip(changes[-1], before, now, strict=True):
            assert torch.equal(b[:-W], a[W:] if changed else a[:-W])  # the others stay
        state = after
    expected = [[True, n % 2 == 0, n % 4 == 0] for n in range(1, 9)]
    assert changes == expected
    assert state.written[0].unflatten(0, (LEVELS, 6)).sum(dim=1).tolist() == [6, 6, 4]


@torch.no_grad()
def test_each_row_counts_its_own_segments_and_a_document_begins_again() -> None:
    memory, (first, second, third) = memory_of(), segments(2, 3)
    state = memory.write(segment_of(first, complete=[True, False]), memory.init_state(2))[0]
    assert state.n_written.tolist() == [1, 0]
    state = memory.write(segment_of(second, valid=[T, T]), state)[0]
    upper = state.written[:, N : 2 * N].any(dim=1)
    assert upper.tolist() == [True, False]
    assert torch.equal(state.slot[1, N:], memory.start[N:])
    state = memory.start_documents(torch.tensor([[True], [False]]), state)
    state = memory.write(segment_of(third), state)[0]
    assert state.n_written.tolist() == [1, 2]
    assert state.written[:, N : 2 * N].any(dim=1).tolist() == [False, True]
    alone = memory.write(segment_of(third[:1]), memory.init_state(1))[0]
    torch.testing.assert_close(state.slot[:1], alone.slot)


@torch.no_grad()
def test_a_segment_without_a_token_is_no_time() -> None:
    memory, (first, second) = memory_of(), segments(1, 2)
    state = memory.write(segment_of(first), memory.init_state(1))[0]
    after = memory.write(segment_of(second, valid=[0]), state)[0]
    for a, b in zip(state, after, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_read_is_one_attention_to_all_levels() -> None:
    memory, y = memory_of(), segments(2, 1)[0]
    slot = torch.randn(2, LEVELS * N, D, generator=torch.Generator().manual_seed(2))
    written = torch.arange(LEVELS * N) % 2 == 0
    state = HierarchyState(slot, written.expand(2, -1), torch.ones(2, dtype=torch.long))
    read = memory.read(y, memory.prepare(state))
    for b in range(2):
        content = [rms(part, memory.slot_norm.weight) for part in slot[b]]
        keys = [memory.to_key(part + address) for part, address in zip(content, memory.address, strict=True)]
        values = [memory.to_value(part) for part in content]
        for t in range(T):
            found = found_by(memory.to_query(rms(y[b, t], memory.norm.weight)), keys, values, 2)
            expected = memory.read_gate(y[b, t]).sigmoid() * memory.to_output(found)
            torch.testing.assert_close(read.value[b, t], expected, atol=1e-5, rtol=1e-4)
    assert read.slots[0, 0].tolist() == [n if n % 2 == 0 else -1 for n in range(LEVELS * N)]
    assert torch.equal(read.weights[0, 0] > 0, written)


def test_what_was_told_long_ago_is_told_by_a_high_level_alone() -> None:
    memory = memory_of(n_slot=4)
    texts = [part.requires_grad_() for part in segments(1, 8)]
    state = memory.init_state(1)
    for hidden in texts:
        state = memory.write(segment_of(hidden), state)[0]
    for level, last in enumerate((2, 4, 8)):  # each holds two writes of two slots
        (slots,) = torch.autograd.grad(state.slot.chunk(LEVELS, dim=1)[level].sum(), texts[8 - last], retain_graph=True)
        assert slots.any()
        if last < 8:
            grads = torch.autograd.grad(
                state.slot.chunk(LEVELS, dim=1)[level].sum(), texts[7 - last], retain_graph=True, allow_unused=True
            )
            assert grads[0] is None or not grads[0].any()


def test_what_the_lowest_level_has_forgotten_is_recalled_from_the_next() -> None:
    make = laws.builder(laws.nodes_of("hierarchy"), shrink=False)
    model, _ = learning.learn_recall(make, n_segment=5, n_level=2, n_slot=4, n_write=2, period=2)
    scores = learning.recall_scores(model, n_segment=5)  # told 4 segments before, of which the lowest level holds 2
    assert scores["memory"][1] > 0.9
    assert max(scores["swapped"][1], scores["wiped"][1]) < 0.3


def test_its_bytes_are_those_of_its_slots() -> None:
    assert n_byte(memory_of().init_state(2)) == 2 * (LEVELS * N * (4 * D + 1) + 8)


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "n_level=0": r"n_level must be in 1\.\.16, got 0",
        "period=1": r"period must be in 2\.\.32768 with 4 levels, got 1",
        "period=40000": r"period must be in 2\.\.32768 with 4 levels, got 40000",
        "n_write=17": r"n_write must be in 1\.\.n_slot \(16\), got 17",
        "n_head=3": r"n_head must divide d_model \(128\), got 3",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.hierarchy\.{message}"):
            build("memory=hierarchy", f"memory.hierarchy.{setting}", "data.tokenizer.kind=byte")


def test_it_trains_where_high_levels_are_never_written_in_a_window() -> None:
    model = laws.builder(laws.nodes_of("hierarchy"))(memory={"period": 3})
    model(laws.text(2, 4 * laws.T)).logits.square().sum().backward()
    memory: Any = model.memory["hierarchy"]
    for name, parameter in memory[0].named_parameters():
        assert parameter.grad.any(), name
