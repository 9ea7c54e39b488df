"""The model without attention against a naive reference, the laws, and errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.memory.contract import Memory
from memlm.memory.delta import DeltaMemory
from memlm.models.mixer import MixerModel
from tests.laws import test_laws
from tests.memory import guests

pytestmark = pytest.mark.slow

V, T = 30, 6
MODEL: dict[str, Any] = {"n_layer": 2, "d_model": 16, "d_conv": 3, "segment_len": T}
DELTA = {"delta": partial(DeltaMemory, conv=1, n_head=2, d_key=6, d_value=5, within=True)}


def model_of(memories: dict[str, Any] | None = None, **settings: Any) -> MixerModel:
    torch.manual_seed(0)
    return MixerModel(V, memories or {}, **(MODEL | settings)).eval()


def text(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


# --- the model -------------------------------------------------------------------------------------------------------


def naive_forward(model: MixerModel, ids: Tensor) -> Tensor:
    """Logits (L, V) of one text, token by token."""
    x = list(model.embedding(ids) * model.d_model**0.5)
    for i, layer in enumerate(model.layers):
        inputs = [layer.norm(token) for token in x]
        for t in range(len(x)):
            seen = [layer.conv[-1 - back] * inputs[t - back] for back in range(min(t + 1, len(layer.conv)))]
            x[t] = x[t] + sum(seen) * layer.gate(inputs[t])
        for modules in model.memory.values():
            memory = modules[i]
            held = torch.zeros(memory.n_head, memory.d_key, memory.d_value)
            for t in range(len(x)):
                found = []
                h = memory.norm(x[t])
                q, k, v = (to(h).view(memory.n_head, -1) for to in (memory.to_query, memory.to_key, memory.to_value))
                for head in range(memory.n_head):
                    query, key = (part[head] * part[head].sigmoid() for part in (q, k))
                    query, key = query / query.norm(), key / key.norm()
                    new = memory.to_rate(h)[head].sigmoid() * (v[head] - held[head].T @ key)
                    held[head] += torch.outer(key, new)
                    found.append(held[head].T @ query)
                gate = memory.to_gate(h)
                read = memory.found_norm(torch.stack(found)).flatten() * gate * gate.sigmoid()
                x[t] = x[t] + memory.to_output(read)
        x = [token + layer.feed_forward(token) for token in x]
    return torch.stack([model.norm(token) for token in x]) @ model.embedding.weight.T


@pytest.mark.parametrize("settings", [{}, {"d_conv": 1}, {"d_conv": 4}, {"d_conv": T}, {"d_ff": 20}])
@pytest.mark.parametrize("memories", [{}, DELTA], ids=["none", "delta"])
@torch.no_grad()
def test_forward_is_the_model_by_hand(memories: dict[str, Any], settings: dict[str, Any]) -> None:
    """Segments make no difference to it: the convolution and the matrix go on across them."""
    model = model_of(memories, **settings)
    ids = text(2, 3 * T + 2)
    expected = torch.stack([naive_forward(model, row) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids[:, : 3 * T]).logits, expected[:, : 3 * T], atol=1e-4, rtol=1e-4)
    state, parts = None, []
    for part in ids.split([1, 1, 5, 4, 1, 8], dim=1):
        out = model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_only_memory_sees_further_than_the_convolutions() -> None:
    ids = text(1, 3 * T)
    for memories in ({}, DELTA):
        model = model_of(memories)
        base = model(ids).logits[0]
        for t in range(2 * T):
            other = ids.clone()
            other[0, t] = (ids[0, t] + 1) % V
            changed = (model(other).logits[0] != base).any(dim=1).nonzero()[:, 0].tolist()
            reach = range(t, 3 * T) if memories else range(t, t + 2 * 2 + 1)  # two layers, two tokens each
            assert changed == list(reach)


@torch.no_grad()
def test_a_new_context_drops_what_the_convolution_saw_and_keeps_memory() -> None:
    model = model_of(DELTA)
    state = model(text(2, 2 * T + 2)).state
    closed = model.new_context(state)
    assert all(cache.any() for cache in state.local.cache)
    assert not any(cache.any() for cache in closed.local.cache)
    assert not torch.equal(closed.memory["delta"][0].matrix, state.memory["delta"][0].matrix)
    bare = model_of()
    closed = bare.new_context(bare(text(2, 2 * T + 2)).state)
    assert torch.equal(bare(text(2, 9, seed=1), state=closed).logits, bare(text(2, 9, seed=1)).logits)


def test_embeddings_are_dropped_in_training_alone() -> None:
    model, ids = model_of(dropout=0.5), text(2, T)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    stream = model.enter(torch.ones(1, 1, 1000, 16), slice(0, 1000))
    assert set(stream.unique().tolist()) == {0.0, 2.0}


# --- the laws --------------------------------------------------------------------------------------------------------


def make_of(name: str, shrink: bool = True, **settings: Any) -> laws.Make:
    make = laws.builder(laws.nodes_of(name), shrink, model_class=MixerModel)
    return lambda memory=None, **model: make(settings | (memory or {}), **model)


REMEMBER = (laws.alive, laws.reach)
MORE = [law for law in [*test_laws.LAWS, laws.closed_once, laws.admits] if law is not laws.inspectable]


@pytest.mark.parametrize("law", MORE)
def test_laws_hold(law: Callable[[laws.Make], None]) -> None:
    law(make_of("delta", within=True, decay="head"))


@pytest.mark.parametrize("law", [law for law in MORE if law not in (*REMEMBER, laws.admits)])
def test_laws_hold_without_memory(law: Callable[[laws.Make], None]) -> None:
    law(laws.builder({}, model_class=MixerModel))


@pytest.mark.parametrize("law", [laws.causal, laws.chunk_invariant, laws.pure, laws.round_trip])
def test_laws_hold_with_a_shared_bank(law: Callable[..., None]) -> None:
    law(make_of("ltm"), scope="shared")


@pytest.mark.parametrize("name", ["delta", "imm", "memoria"])
def test_any_memory_that_needs_no_attention_stands_in_it(name: str) -> None:
    for law in (laws.alive, laws.chunk_invariant, laws.schedules_agree):
        law(make_of(name))


def test_the_state_is_bounded() -> None:
    make = make_of("delta", within=True)
    laws.bounded(lambda memory=None, **model: make(memory, d_conv=1, **model))  # segments of one token


@pytest.mark.parametrize("within", [False, True])
def test_memory_is_useful(within: bool) -> None:
    laws.useful(make_of("delta", shrink=False, within=within))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [guests.Cache, guests.Cells])
def test_memories_that_need_attention_are_refused(memory: type[Memory]) -> None:
    message = "memory 'guest' needs .* of attention, which MixerModel does not have: choose model=lmcode"
    with pytest.raises(ValueError, match=message):
        model_of({"guest": memory})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"segment_len": 0}, "segment_len must be at least 1, got 0"),
        ({"d_conv": 0}, r"d_conv must be in 1..segment_len \(6\), got 0"),
        ({"d_conv": 7}, r"d_conv must be in 1..segment_len \(6\), got 7"),
        ({"d_ff": 0}, "d_ff must be at least 1 or null, got 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"memory_layers": [2]}, "different layers of 0..1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(DELTA, **settings)
