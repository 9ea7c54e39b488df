"""Short-term memory by hand-worked examples and a naive reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm.memory.stm import ShortTermMemory, ShortTermState
from tests.memory.segments import segment_of

D, T = 8, 5


def memory_of(**settings: Any) -> ShortTermMemory:
    torch.manual_seed(0)
    memory = ShortTermMemory(D, **({"n_slot": 3, "n_head": 2, "update_rate": 0.3} | settings))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return memory


def hidden_of(n_row: int, seed: int = 1, n_token: int = T) -> Tensor:
    return torch.randn(n_row, n_token, D, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], n_head: int) -> tuple[Tensor, Tensor]:
    """One query over a list, head by head: what it finds (D,), its weights averaged over heads."""
    width, found, weights = D // n_head, [], []
    for h in range(n_head):
        part = slice(h * width, (h + 1) * width)
        scores = [float(query[part] @ key[part]) / math.sqrt(width) for key in keys]
        total = sum(math.exp(score) for score in scores)
        weight = [math.exp(score) / total for score in scores]
        found.append(sum(w * value[part] for w, value in zip(weight, values, strict=True)))
        weights.append(torch.tensor(weight))
    return torch.cat(found), torch.stack(weights).mean(dim=0)


def naive_write(memory: ShortTermMemory, slots: Tensor, tokens: list[Tensor]) -> Tensor:
    """One row, slot by slot."""
    x = [rms(token, memory.norm.weight, torch.finfo(torch.float32).eps) for token in tokens]
    new = []
    for slot, address in zip(slots, memory.address, strict=True):
        content = rms(slot, memory.slot_norm.weight, 1e-12)
        keys, values = [memory.write_key(t) for t in x], [memory.write_value(t) for t in x]
        found, _ = attend(memory.write_query(content + address), keys, values, memory.n_head)
        gate = memory.update_gate(torch.cat([content + address, found])).sigmoid()
        new.append(slot + memory.update_rate * gate * (found - slot))
    return torch.stack(new)


def naive_read(memory: ShortTermMemory, slots: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    content = [rms(slot, memory.slot_norm.weight, 1e-12) for slot in slots]
    keys = [memory.read_key(c + a) for c, a in zip(content, memory.address, strict=True)]
    query = memory.read_query(rms(token, memory.norm.weight, torch.finfo(torch.float32).eps))
    found, weights = attend(query, keys, [memory.read_value(c) for c in content], memory.n_head)
    return memory.read_gate(token).sigmoid() * memory.to_output(found), weights


@torch.no_grad()
def test_write_and_read_equal_the_naive_reference() -> None:
    memory = memory_of()
    state, naive = memory.init_state(2), [torch.zeros(3, D), torch.zeros(3, D)]
    lengths = [[5, 3], [2, 5], [5, 1]]
    for s, valid in enumerate(lengths):
        hidden = hidden_of(2, seed=s)
        state, _ = memory.write(segment_of(hidden, valid), state)
        naive = [naive_write(memory, naive[b], list(hidden[b, : valid[b]])) for b in range(2)]
        torch.testing.assert_close(state.slot, torch.stack(naive), atol=1e-6, rtol=1e-4)
    assert state.n_written.tolist() == [3, 3]
    x = hidden_of(2, seed=9)
    read = memory.read(x, memory.prepare(state))
    for b in range(2):
        for t in range(T):
            values, weights = naive_read(memory, naive[b], x[b, t])
            torch.testing.assert_close(read.value[b, t], values, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(read.weights[b, t], weights, atol=1e-5, rtol=1e-4)
    assert read.slots[0, 0].tolist() == [0, 1, 2]
    torch.testing.assert_close(read.gate, memory.read_gate(x).sigmoid()[..., 0])


@torch.no_grad()
def test_the_soft_update_by_hand() -> None:
    """With gates wide open a slot moves by ``update_rate`` of the way to what it found."""
    memory = memory_of(n_slot=1, update_rate=0.25)
    memory.update_gate.weight.zero_()
    memory.update_gate.bias.fill_(100.0)
    memory.write_value.weight.copy_(torch.eye(D))
    memory.norm.weight.fill_(1.0)
    token = torch.tensor([2.0, -2.0] * (D // 2))  # of RMS 2, so 1 when normalized
    state = ShortTermState(torch.full((1, 1, D), 3.0), torch.ones(1, dtype=torch.long))
    new, trace = memory.write(segment_of(token.expand(1, T, D)), state)
    torch.testing.assert_close(new.slot[0, 0], 3 + 0.25 * (token / 2 - 3))
    assert float(trace["write_gate"]) == pytest.approx(1.0)
    memory.update_gate.bias.fill_(-100.0)
    assert torch.equal(memory.write(segment_of(token.expand(1, T, D)), state)[0].slot, state.slot)


@torch.no_grad()
def test_a_closed_read_gate_reads_nothing() -> None:
    memory = memory_of()
    state, _ = memory.write(segment_of(hidden_of(1)), memory.init_state(1))
    memory.read_gate.weight.zero_()
    memory.read_gate.bias.fill_(-200.0)
    assert memory.read(hidden_of(1), memory.prepare(state)).value.abs().max() < 1e-12


@torch.no_grad()
def test_rows_that_hold_nothing_read_nothing() -> None:
    memory = memory_of()
    state, _ = memory.write(segment_of(hidden_of(2), complete=[True, False]), memory.init_state(2))
    read = memory.read(hidden_of(2), memory.prepare(state))
    assert read.value[0].abs().max() > 0
    assert read.value[1].abs().max() == 0
    assert read.weights[1].abs().max() == 0
    assert read.gate[1].abs().max() == 0
    assert memory.filled(state).tolist() == [[True] * 3, [False] * 3]


@torch.no_grad()
def test_only_complete_segments_with_tokens_are_written() -> None:
    memory = memory_of()
    state, _ = memory.write(segment_of(hidden_of(3)), memory.init_state(3))
    new, _ = memory.write(segment_of(hidden_of(3, seed=2), valid=[5, 5, 0], complete=[True, False, True]), state)
    assert new.n_written.tolist() == [2, 1, 1]
    assert not torch.equal(new.slot[0], state.slot[0])
    assert torch.equal(new.slot[1:], state.slot[1:])
    assert new.slot.isfinite().all()


@torch.no_grad()
def test_padding_is_not_written() -> None:
    memory = memory_of()
    hidden, other = hidden_of(1), hidden_of(1)
    other[:, 3:] = 1e6
    a, _ = memory.write(segment_of(hidden, valid=[3]), memory.init_state(1))
    b, _ = memory.write(segment_of(other, valid=[3]), memory.init_state(1))
    short, _ = memory.write(segment_of(hidden[:, :3]), memory.init_state(1))
    assert torch.equal(a.slot, b.slot)
    torch.testing.assert_close(a.slot, short.slot)


@torch.no_grad()
def test_the_update_rate_sets_how_fast_slots_forget_and_not_how_loud_they_are() -> None:
    forgotten, loud = [], []
    for rate in (0.01, 0.9):
        memory = memory_of(update_rate=rate)
        first, _ = memory.write(segment_of(hidden_of(1, seed=1)), memory.init_state(1))
        other, _ = memory.write(segment_of(hidden_of(1, seed=2)), memory.init_state(1))
        for seed in range(3, 12):
            first, _ = memory.write(segment_of(hidden_of(1, seed=seed)), first)
            other, _ = memory.write(segment_of(hidden_of(1, seed=seed)), other)
        x = hidden_of(1, seed=9)
        a, b = (memory.read(x, memory.prepare(state)).value for state in (first, other))
        loud.append(float(a.norm()))
        forgotten.append(float((a - b).norm() / a.norm()))
    assert forgotten[0] > forgotten[1]
    assert 0.3 < loud[0] / loud[1] < 3


def test_gradients_reach_every_parameter_after_two_writes() -> None:
    memory = memory_of(update_rate=0.01)
    state, _ = memory.write(segment_of(hidden_of(2)), memory.init_state(2))
    state, _ = memory.write(segment_of(hidden_of(2, seed=2)), state)
    memory.read(hidden_of(2, seed=3), memory.prepare(state)).value.square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_are_finite_where_a_row_writes_nothing() -> None:
    memory = memory_of()
    state, _ = memory.write(segment_of(hidden_of(2), valid=[5, 0]), memory.init_state(2))
    memory.read(hidden_of(2, seed=3), memory.prepare(state)).value.square().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in memory.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_slot": 0}, "n_slot must be at least 1, got 0"),
        ({"n_head": 3}, r"n_head must divide d_model \(8\), got 3"),
        ({"n_head": 0}, "n_head"),
        ({"update_rate": 0.0}, r"update_rate must be in \(0, 1\], got 0.0"),
        ({"update_rate": 1.5}, "update_rate"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShortTermMemory(D, **settings)
