"""Implicit memory against the mechanism of its source, which is written anew here with its leak and its shared bank."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.imm import ImplicitMemory, ImplicitState
from tests.memory.segments import segment_of

D, T, N = 8, 5, 3


class Source(nn.Module):
    """LinformerMemory as published: one bank, overwritten, which a call writes with all its tokens before it reads."""

    def __init__(self, temperature: float, rate: float) -> None:
        super().__init__()
        self.memory = nn.Parameter(0.01 * torch.randn(N, D))
        self.context = nn.Linear(N, D)
        self.temperature, self.rate = temperature, rate

    def update(self, x: Tensor) -> None:
        """Write x (B, T, D)."""
        total = torch.zeros(N, D)
        for token in x.flatten(0, 1):  # the rows of a batch share the bank
            direction = token / token.norm()
            cosines = [float(direction @ slot / slot.norm()) for slot in self.memory]
            scores = [math.exp(cosine / (math.sqrt(D) * self.temperature)) for cosine in cosines]
            for j in range(N):
                total[j] += scores[j] / sum(scores) * direction
        for j in range(N):
            step = total[j] / total[j].norm()
            moved = self.memory[j] + self.rate / (1 + step.norm()) * step
            self.memory.data[j] = moved / moved.norm()

    def read(self, x: Tensor) -> Tensor:
        """What is added to x (B, T, D)."""
        unit = self.memory / self.memory.norm(dim=1, keepdim=True)
        return self.context(x / x.norm(dim=2, keepdim=True) @ unit.T)

    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return self.read(x)


def memory_of(**settings: Any) -> ImplicitMemory:
    torch.manual_seed(0)
    plain = {"n_slot": N, "norm": "none", "content_read": False, "shared_layers": False, "update_rate": 0.3}
    return ImplicitMemory(D, **(plain | settings))


def hidden_of(n_row: int, seed: int = 1, n_token: int = T) -> Tensor:
    return torch.randn(n_row, n_token, D, generator=torch.Generator().manual_seed(seed))


def pair(**settings: Any) -> tuple[ImplicitMemory, Source]:
    """Both with the same parameters."""
    memory = memory_of(**settings)
    source = Source(temperature=0.8, rate=0.3)
    with torch.no_grad():
        source.memory.copy_(memory.start)
        source.context.weight.copy_(memory.similarity_to_output.weight)
        source.context.bias.copy_(memory.similarity_to_output.bias.normal_())
    return memory, source


def ungated(memory: ImplicitMemory, x: Tensor, state: ImplicitState) -> Tensor:
    read = memory.read(x, memory.prepare(state))
    return read.value / read.gate[..., None]


@torch.no_grad()
def test_a_row_equals_the_source_step_for_step_once_it_reads_before_it_writes() -> None:
    memory, source = pair()
    state = memory.init_state(1)
    for s in range(6):
        x = hidden_of(1, seed=s)
        if s:
            torch.testing.assert_close(ungated(memory, x, state), source.read(x), atol=1e-6, rtol=1e-4)
        state, _ = memory.write(segment_of(x), state)
        source.update(x)
        torch.testing.assert_close(state.slot[0], source.memory, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_writing_before_reading_gives_what_the_source_gives() -> None:
    """With one row the leak is all that is left of the difference."""
    memory, source = pair()
    state = memory.init_state(1)
    for s in range(3):
        x = hidden_of(1, seed=s)
        state, _ = memory.write(segment_of(x), state)
        torch.testing.assert_close(ungated(memory, x, state), source(x), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_the_source_leaks_and_shares_and_ours_does_not() -> None:
    x, later, neighbour = hidden_of(2), hidden_of(2), hidden_of(2)
    later[0, -1] += 1
    neighbour[1] += 1
    outputs = []
    for changed in (x, later, neighbour):
        memory, source = pair()
        state, _ = memory.write(segment_of(hidden_of(2, seed=5)), memory.init_state(2))
        ours = memory.read(changed, memory.prepare(state)).value
        outputs.append((source(changed)[0, :-1], ours[0, :-1], memory.write(segment_of(changed), state)[0].slot[0]))
    (theirs, mine, bank), (theirs_later, mine_later, _), (theirs_neighbour, _, bank_neighbour) = outputs
    assert (theirs - theirs_later).abs().max() > 1e-4
    assert torch.equal(mine, mine_later)
    assert (theirs - theirs_neighbour).abs().max() > 1e-4
    assert torch.equal(bank, bank_neighbour)


@torch.no_grad()
def test_a_shared_bank_is_written_by_one_layer_after_the_other_from_the_middle_on() -> None:
    memory, source = pair(shared_layers=True)
    assert memory.around == "layers"
    layers = [hidden_of(1, seed=s) for s in range(4)]
    state, _ = memory.write(segment_of(torch.stack(layers, dim=2)), memory.init_state(1))
    for x in layers[2:]:
        source.update(x)
    torch.testing.assert_close(state.slot[0], source.memory, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_contents_are_read_by_similarity() -> None:
    memory = memory_of(content_read=True)
    state, _ = memory.write(segment_of(hidden_of(1)), memory.init_state(1))
    x = hidden_of(1, seed=2)
    read = memory.read(x, memory.prepare(state))
    for t in range(T):
        direction = x[0, t] / x[0, t].norm()
        cosine = torch.stack([direction @ slot / slot.norm() for slot in state.slot[0]])
        share = (cosine / (math.sqrt(D) * 0.8)).softmax(dim=0)
        held = sum(float(a) * slot * math.sqrt(D) for a, slot in zip(share, state.slot[0], strict=True))
        expected = memory.similarity_to_output(cosine) + memory.content_to_output(held)
        torch.testing.assert_close(read.value[0, t], read.gate[0, t] * expected, atol=1e-5, rtol=1e-4)
        loud = torch.stack([abs(cosine[j]) * memory.similarity_to_output.weight[:, j].norm() for j in range(N)])
        torch.testing.assert_close(read.weights[0, t], (loud / loud.sum() + share) / 2, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_importance_weighs_the_tokens_of_a_segment() -> None:
    """A segment whose other tokens do not count is written as the token that counts alone."""
    memory = memory_of(update="importance")
    memory.importance.weight.zero_()[0, 0] = 100.0
    memory.importance.bias.fill_(-50.0)
    x = hidden_of(1)
    x[..., 0] = 0.0
    x[0, 2, 0] = 1.0
    whole, _ = memory.write(segment_of(x), memory.init_state(1))
    alone, _ = memory.write(segment_of(x[:, 2:3]), memory.init_state(1))
    torch.testing.assert_close(whole.slot, alone.slot)
    soft, _ = memory_of().write(segment_of(x), memory.init_state(1))
    assert (soft.slot - alone.slot).abs().max() > 0.01


@torch.no_grad()
def test_the_bank_begins_anew_after_so_many_segments() -> None:
    memory, never = memory_of(reset_every=3), memory_of()
    state, kept = memory.init_state(1), never.init_state(1)
    counts = []
    for s in range(7):
        state, _ = memory.write(segment_of(hidden_of(1, seed=s)), state)
        kept, _ = never.write(segment_of(hidden_of(1, seed=s)), kept)
        counts.append(int(state.n_written))
        assert torch.equal(state.slot, kept.slot) == (s < 3)
        assert memory.filled(state).all()  # what is written is never empty again
    assert counts == [1, 2, 3, 1, 2, 3, 1]
    alone, _ = never.write(segment_of(hidden_of(1, seed=6)), never.init_state(1))
    assert torch.equal(state.slot, alone.slot)


@torch.no_grad()
def test_only_complete_segments_are_written_and_no_padding() -> None:
    memory = memory_of(norm="layer", content_read=True)
    state, _ = memory.write(segment_of(hidden_of(3)), memory.init_state(3))
    x = hidden_of(3, seed=2)
    new, trace = memory.write(segment_of(x, valid=[3, 5, 0], complete=[True, False, True]), state)
    assert torch.equal(new.slot[1:], state.slot[1:])
    assert new.n_written.tolist() == [2, 1, 1]
    short, _ = memory.write(segment_of(x[:1, :3]), ImplicitState(*(part[:1] for part in state)))
    torch.testing.assert_close(new.slot[:1], short.slot)
    assert float(trace["not_finite"]) == 0


@torch.no_grad()
def test_what_was_never_written_is_not_read() -> None:
    memory = memory_of(content_read=True)
    state, _ = memory.write(segment_of(hidden_of(2), complete=[True, False]), memory.init_state(2))
    read = memory.read(hidden_of(2), memory.prepare(state))
    assert read.value[0].abs().max() > 0
    for part in (read.value, read.weights, read.gate):
        assert part[1].abs().max() == 0


@torch.no_grad()
def test_a_low_temperature_deals_tokens_out_and_the_source_s_spreads_them_evenly() -> None:
    """The published even use of slots is what its scale gives to any text: here to noise."""
    used = {}
    for temperature in (0.8, 0.01):
        memory = memory_of(temperature=temperature)
        _, trace = memory.write(segment_of(hidden_of(1, n_token=1)), memory.init_state(1))
        used[temperature] = float(trace["slots_used"])
    assert used[0.8] > 0.98 * N
    assert used[0.01] < 0.7 * N


def test_numbers_that_are_not_finite_are_counted() -> None:
    memory = memory_of()
    x = hidden_of(1)
    x[0, 0, 0] = math.nan
    with torch.no_grad():
        _, trace = memory.write(segment_of(x), memory.init_state(1))
    assert float(trace["not_finite"]) == N * D


def test_every_parameter_gets_a_gradient_through_the_writes() -> None:
    memory = memory_of(update="importance", content_read=True, norm="layer")
    state, _ = memory.write(segment_of(hidden_of(2)), memory.init_state(2))
    state, _ = memory.write(segment_of(hidden_of(2, seed=2)), state)
    probe = torch.randn(2, T, D)
    (memory.read(hidden_of(2, seed=3), memory.prepare(state)).value * probe).sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert F.cosine_similarity(memory.start.grad, memory.start, dim=1).abs().max() < 1  # not merely a rescaling


def test_the_coldest_read_takes_the_nearest_slot_alone() -> None:
    memory = ImplicitMemory(D, n_slot=3, temperature=1e-6)
    torch.nn.init.zeros_(memory.similarity_to_output.weight)  # so that half of the weights are those of contents
    slot, x = F.normalize(torch.randn(1, 3, D), dim=-1), torch.randn(1, 5, D)
    state = memory.init_state(1)._replace(slot=slot, written=torch.tensor([[True, True, False]]))
    read = memory.read(x, state)
    nearest = F.cosine_similarity(memory.norm(x)[:, :, None], slot[:, None, :2], dim=-1).argmax(dim=-1)
    torch.testing.assert_close(2 * read.weights, F.one_hot(nearest, 3).float())
    assert read.value.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_slot": 0}, "n_slot must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be in 1e-6..1e6, got 0.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"update_rate": 0.0}, r"update_rate must be in \(0, 1\], got 0.0"),
        ({"update_rate": 1.5}, "update_rate"),
        ({"update": "hard"}, "update must be 'soft' or 'importance', got 'hard'"),
        ({"reset_every": 0}, "reset_every must be at least 1 or null, got 0"),
        ({"norm": "batch"}, "norm must be 'layer' or 'none', got 'batch'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitMemory(D, **settings)
