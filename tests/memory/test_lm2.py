"""LM2 against a loop over slots and tokens; what its public form sees of the future."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.lm2 import GatedMemory, GatedState
from memlm.memory.state import n_byte
from tests.memory import leaks
from tests.memory.segments import segment_of

pytestmark = pytest.mark.slow

D, T = 8, 5


def memory_of(**settings: Any) -> GatedMemory:
    torch.manual_seed(0)
    memory = GatedMemory(D, **({"n_slot": 3, "n_head": 2} | settings))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return memory


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt() * weight


def found_by(query: Tensor, keys: list[Tensor], values: list[Tensor], n_head: int) -> Tensor:
    """What one query finds, head by head."""
    parts = []
    for q, *heads in zip(query.chunk(n_head), *(k.chunk(n_head) for k in keys), strict=True):
        weight = torch.stack([q @ k / math.sqrt(len(q)) for k in heads]).exp()
        parts.append(weight / weight.sum())
    return torch.cat(
        [
            sum(w * value.chunk(n_head)[h] for w, value in zip(weight, values, strict=True))
            for h, weight in enumerate(parts)
        ]
    )


def naive_write(memory: GatedMemory, slots: Tensor, tokens: Tensor) -> Tensor:
    """One row, slot by slot."""
    x = [rms(token, memory.norm.weight) for token in tokens]
    keys, values = [memory.write_key(t) for t in x], [memory.write_value(t) for t in x]
    told = sum(memory.gate_of_text(t).clamp(min=0) for t in x) / len(x)
    new = []
    for slot in slots:
        query = memory.write_query(rms(slot, memory.slot_norm.weight))
        enters, stays = (told + memory.gate_of_slot(slot.tanh())).sigmoid().chunk(2)
        new.append(enters * found_by(query, keys, values, memory.n_head).tanh() + stays * slot)
    return torch.stack(new)


@torch.no_grad()
def test_two_writes_equal_the_loop_and_rows_that_are_not_complete_keep_theirs() -> None:
    memory, draw = memory_of(), torch.Generator().manual_seed(1)
    first, second = (torch.randn(3, T, D, generator=draw) for _ in range(2))
    state = memory.write(segment_of(first, valid=[T, 2, T]), memory.init_state(3))[0]
    after = memory.write(segment_of(second, valid=[T, T, 0], complete=[True, False, True]), state)[0]
    start = torch.eye(D)[:3]
    once = [naive_write(memory, start, first[b, :n]) for b, n in enumerate([T, 2, T])]
    torch.testing.assert_close(state.slot, torch.stack(once))
    torch.testing.assert_close(after.slot[0], naive_write(memory, once[0], second[0]))
    assert torch.equal(after.slot[1:], state.slot[1:])
    assert not memory.init_state(1).written.any()
    assert state.written.all()


@torch.no_grad()
def test_a_read_equals_the_loop() -> None:
    memory, draw = memory_of(), torch.Generator().manual_seed(1)
    y, slot = torch.randn(2, T, D, generator=draw), torch.randn(2, 3, D, generator=draw)
    read = memory.read(y, memory.prepare(GatedState(slot, torch.ones(2, 3, dtype=torch.bool))))
    for b in range(2):
        content = [rms(s, memory.slot_norm.weight) for s in slot[b]]
        keys, values = [memory.read_key(c) for c in content], [memory.read_value(c) for c in content]
        for t in range(T):
            found = found_by(memory.read_query(rms(y[b, t], memory.norm.weight)), keys, values, 2)
            torch.testing.assert_close(read.value[b, t], memory.output_gate(found).sigmoid() * found)
    torch.testing.assert_close(read.weights.sum(dim=2), torch.ones(2, T))


@torch.no_grad()
def test_slots_keep_what_they_hold_at_first() -> None:
    memory = GatedMemory(D, n_slot=3, n_head=2)
    _, trace = memory.write(segment_of(torch.zeros(1, T, D)), GatedState(torch.zeros(1, 3, D), torch.ones(1, 3) > 0))
    assert trace["forget_gate"].item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert trace["input_gate"].item() == pytest.approx(0.5)


@torch.no_grad()
def test_the_bank_has_32_bits_under_autocast() -> None:
    memory, x = memory_of(), torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    exact, _ = memory.write(segment_of(x), memory.init_state(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state, _ = memory.write(segment_of(x), memory.init_state(2))
        assert memory.read(x, memory.prepare(state)).value.isfinite().all()
    assert state.slot.dtype == torch.float32
    torch.testing.assert_close(state.slot, exact.slot, atol=0.05, rtol=0.05)


def test_its_bytes_are_those_of_its_slots() -> None:
    assert n_byte(memory_of().init_state(2)) == 2 * 3 * (4 * D + 1)


def test_a_gate_that_averages_over_the_segment_it_lets_in_is_caught() -> None:
    with pytest.raises(AssertionError, match="changes outputs before it"):
        laws.causal(laws.builder_of({"lm2": (leaks.LeakyGates, {})}))


@torch.no_grad()
def test_only_the_public_form_has_another_loss_where_text_is_generated() -> None:
    with torch.enable_grad():
        lawful, leaky = (leaks.trained(cls, 2, n_slot=16) for cls in (GatedMemory, leaks.LeakyGates))
    torch.testing.assert_close(*leaks.losses(lawful, 2), atol=1e-4, rtol=0)
    at_once, one_by_one = leaks.losses(leaky, 2)
    assert (at_once - one_by_one).abs().min() > 1e-6


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "n_slot=0": r"n_slot must be in 1\.\.d_model \(128\), as slots begin as unit vectors, got 0",
        "n_slot=129": r"n_slot must be in 1\.\.d_model \(128\), as slots begin as unit vectors, got 129",
        "n_head=3": r"n_head must divide d_model \(128\), got 3",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.lm2\.{message}"):
            build("memory=lm2", f"memory.lm2.{setting}", "data.tokenizer.kind=byte")
