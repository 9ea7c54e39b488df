"""HMT against a loop that runs [recalled; segment; recalled, summary] through the layers; what its public form sees."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.hmt import RecallMemory
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory import leaks
from tests.memory.gradients import gradients, same_gradients
from tests.memory.plain_attention import attend

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("hmt"))


def recalling(n_slot: int = 3, **model: Any) -> SegmentModel:
    return MAKE(memory={"n_slot": n_slot, "d_key": 5}, **model)


def memory_of(model: SegmentModel) -> RecallMemory:
    memory: Any = model.memory["hmt"]
    return memory[0]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt() * weight


def naive(model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (L, V) of one row, the vectors (n, D) of its last segments, and the weights of the last recall.

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
    """
    memory = memory_of(model)
    held: list[Tensor] = []
    summary, weight, hidden, before = None, torch.ones(0), [], []
    for begin, end, fresh in segments:
        cell = memory.first[0]
        if held:
            query = memory.to_query(summary)
            weight = torch.stack([query @ memory.to_key(vector) / len(query) ** 0.5 for vector in held]).softmax(dim=0)
            cell = rms(sum(w * v for w, v in zip(weight, held, strict=True)), memory.cell_norm.weight)
        text = model.embedding(ids[begin:end]) * model.d_model**0.5
        n, overlap = end - begin, 0 if fresh else model.overlap
        places = [torch.full((1,), torch.nan), torch.arange(-overlap, n), T + torch.arange(2)]
        place = torch.cat([part.float() for part in places])
        kind = torch.cat([torch.full((len(part),), i) for i, part in enumerate(places)])  # before, text, behind
        mask = (kind[:, None] > 0) | (kind == 0)
        mask &= (kind[:, None] == 2) | ((kind < 2) & ~(place > place[:, None]))
        x, ends = torch.cat([cell[None], text, cell[None], memory.asks]), []
        own = torch.cat([torch.arange(1), torch.arange(1 + overlap, len(place))])
        for i, layer in enumerate(model.layers):
            seen = x if fresh else torch.cat([x[:1], before[i], x[1:]])
            ends.append(x[1 + n - model.overlap : 1 + n])
            x = attend(layer, x, seen, mask[own], place[own], place)
        before = ends
        hidden.append(x[1 : 1 + n])
        new, summary = (rms(part, memory.norm.weight) for part in x[1 + n :])
        held = [*held, new][-memory.n_slot :]
    return model.norm(torch.cat(hidden)) @ model.embedding.weight.T, torch.stack(held), weight


def test_outputs_vectors_and_gradients_equal_the_naive_loop() -> None:
    model, ids = recalling(), laws.text(2, 6 * T)
    segments = [(s * T, (s + 1) * T, s == 0) for s in range(6)]
    out = model(ids)
    logits, held, weight = (
        torch.stack(parts) for parts in zip(*(naive(model, row, segments) for row in ids), strict=True)
    )
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.state.memory["hmt"][0].held, held, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.reads["hmt"].weights[:, -1], weight, atol=1e-5, rtol=0)
    same_gradients(gradients(model, out.logits), gradients(model, logits))


@torch.no_grad()
def test_a_context_that_ends_early_is_held_like_a_segment() -> None:
    model, ids = recalling(), laws.text(1, 3 * T)
    expected, held, _ = naive(model, ids[0, : 2 * T + 5], [(0, T, True), (T, T + 5, False), (T + 5, 2 * T + 5, True)])
    told = model(ids[:, : T + 5])
    out = model(ids[:, T + 5 : 2 * T + 5], state=model.new_context(told.state))
    torch.testing.assert_close(torch.cat([told.logits, out.logits], dim=1)[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.state.memory["hmt"][0].held[0], held, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_oldest_segment_goes_first() -> None:
    model, ids = recalling(n_slot=4), laws.text(1, 6 * T)
    state, seen = None, []
    for s in range(6):
        state = model(ids[:, s * T : (s + 1) * T], state=state).state
        held = state.memory["hmt"][0]
        seen.append(held.held[0, -1])
        n = min(s + 1, 4)
        assert held.full[0].tolist() == [False] * (4 - n) + [True] * n
        assert torch.equal(held.held[0, 4 - n :], torch.stack(seen[-n:]))


def test_a_summary_of_the_first_half_that_recalls_for_the_segment_is_caught() -> None:
    with pytest.raises(AssertionError, match="changes outputs before it"):
        laws.causal(laws.builder_of({"hmt": (leaks.LeakyRecall, {})}))


@torch.no_grad()
def test_only_the_public_form_has_another_loss_where_text_is_generated() -> None:
    with torch.enable_grad():
        lawful, leaky = (leaks.trained(cls, 2, n_slot=16) for cls in (RecallMemory, leaks.LeakyRecall))
    torch.testing.assert_close(*leaks.losses(lawful, 2), atol=1e-4, rtol=0)
    at_once, one_by_one = leaks.losses(leaky, 2)
    assert (at_once - one_by_one).abs().min() > 1e-6


@torch.no_grad()
def test_reads_off_leaves_the_cell_out() -> None:
    model, none, ids = recalling(), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)


def test_its_bytes_are_those_of_its_vectors() -> None:
    model = recalling()
    assert n_byte(model.init_state(1).memory["hmt"]) == 3 * (4 * model.d_model + 1) + 4 * model.d_model


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting in ("n_slot", "d_key"):
        with pytest.raises(ConfigError, match=rf"memory\.hmt\.{setting} must be at least 1, got 0"):
            build("memory=hmt", f"memory.hmt.{setting}=0", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'hmt' needs context of attention.* choose model=lmcode"):
        build("model=lstm", "memory=hmt", "data.tokenizer.kind=byte")
