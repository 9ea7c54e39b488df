"""The cache against a model that sees all text, and against a loop with explicit masks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.gradients import gradients, same_gradients
from tests.memory.plain_attention import attend

T = laws.T
MAKE = laws.builder(laws.nodes_of("cache"))


def cached(n_token: int, gradient: bool = False, **model: Any) -> SegmentModel:
    return MAKE(memory={"n_token": n_token, "gradient": gradient}, **({"memory_layers": "all"} | model))


@pytest.mark.parametrize("overlap", [0, 4, T])
def test_a_cache_of_all_text_in_every_layer_is_attention_to_all_text(overlap: int) -> None:
    n = 5 * T
    model, whole = cached(n, gradient=True, overlap=overlap), laws.builder({})(segment_len=n, overlap=0)
    whole.load_state_dict(model.state_dict())
    ids = laws.text(2, n)
    expected, got = whole(ids).logits, model(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    same_gradients(gradients(model, got), gradients(whole, expected))
    off = model(ids, read=False).logits
    assert (off - expected)[:, T:].abs().max() > 1e-2
    none = laws.builder({})(overlap=overlap)
    none.load_state_dict(model.state_dict())
    torch.testing.assert_close(off, none(ids).logits)


def naive(model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]], n_token: int, cut: bool) -> Tensor:
    """Logits (L, V) of one row, layer by layer and segment by segment.

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
        n_token: Tokens of the cache.
        cut: Whether no gradient reaches its cells.
    """
    x = model.embedding(ids) * model.d_model**0.5
    for layer in model.layers:
        after = []
        for begin, end, fresh in segments:
            edge = begin if fresh else begin - model.overlap  # what lies before it is seen by the cache alone
            first = max(0, edge - n_token)
            past = x[first:edge].detach() if cut else x[first:edge]
            place = torch.arange(begin, end)
            seen = torch.cat([torch.arange(first, edge) - edge - model.overlap, torch.arange(edge, end) - begin])
            mask = torch.cat([torch.ones(end - begin, edge - first, dtype=torch.bool),
                              torch.arange(edge, end) <= place[:, None]], dim=1)  # fmt: skip
            after.append(attend(layer, x[begin:end], torch.cat([past, x[edge:end]]), mask, place - begin, seen))
        x = torch.cat(after)
    return model.norm(x) @ model.embedding.weight.T


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("n_token", [1, 7, 30])
def test_outputs_and_gradients_equal_the_naive_loop(n_token: int, gradient: bool) -> None:
    model, ids = cached(n_token, gradient), laws.text(2, 5 * T)
    segments = [(s * T, (s + 1) * T, s == 0) for s in range(5)]
    got = model(ids).logits
    expected = torch.stack([naive(model, row, segments, n_token, not gradient) for row in ids])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    same_gradients(gradients(model, got), gradients(model, expected))


@torch.no_grad()
def test_it_goes_on_over_the_end_of_a_context_but_not_of_a_document() -> None:
    model, ids = cached(30), laws.text(1, 5 * T)
    lengths, breaks = [T, T, T - 2, T, 5], {0, 3}  # the third segment ends early
    edges = [sum(lengths[:s]) for s in range(6)]
    segments = [(edges[s], edges[s + 1], s in breaks) for s in range(5)]
    expected = naive(model, ids[0, : edges[-1]], segments, 30, True)
    told = model(ids[:, : edges[3]])
    state = model.new_context(told.state)
    asked = ids[:, edges[3] : edges[-1]]
    got = model(asked, state=state).logits
    torch.testing.assert_close(torch.cat([told.logits, got], dim=1)[0], expected, atol=1e-4, rtol=0)
    fresh = model(asked, state=state, reset=torch.tensor([True])).logits
    torch.testing.assert_close(fresh, model(asked).logits)


def test_its_bytes_are_what_the_setting_says_and_it_has_no_parameters() -> None:
    model = cached(30)
    assert [n_byte(part) for part in model.init_state(1).memory["cache"]] == [30 * (4 * model.d_model + 1)] * 3
    assert not list(model.memory.parameters())


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"memory\.cache\.n_token must be at least 1, got 0"):
        build("memory=cache", "memory.cache.n_token=0", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'cache' needs context of attention.* choose model=lmcode"):
        build("model=lstm", "memory=cache", "data.tokenizer.kind=byte")


FEW = [laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.contexts, laws.resets, laws.round_trip]
WITH_GRADIENT = [laws.chunk_invariant, laws.schedules_agree, laws.every_parameter_learns]


@pytest.mark.parametrize(
    ("law", "settings"),
    [(law, {"n_token": 7}) for law in FEW] + [(law, {"gradient": True}) for law in WITH_GRADIENT],
)
def test_laws_hold_for_its_settings(law: Callable[[laws.Make], None], settings: dict[str, Any]) -> None:
    law(lambda memory=None, **model: MAKE(memory=settings | (memory or {}), **model))


@pytest.mark.slow
@pytest.mark.parametrize("law", [laws.chunk_invariant, laws.schedules_agree, laws.contexts])
def test_it_stands_beside_other_memories(law: Callable[[laws.Make], None]) -> None:
    law(laws.builder({**laws.nodes_of("cache"), **laws.nodes_of("rmt"), **laws.nodes_of("stm")}))
