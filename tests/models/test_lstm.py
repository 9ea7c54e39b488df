"""The recurrent model against a naive reference, the laws, and errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.memory.ltm import LongTermMemory
from memlm.memory.stm import ShortTermMemory
from memlm.models.lmcode import LMCode
from memlm.models.lstm import LSTM, Layer
from tests.laws import test_laws

pytestmark = pytest.mark.slow

V, T = 30, 6
MODEL: dict[str, Any] = {"n_layer": 2, "d_model": 16, "d_hidden": 12, "d_ff": 24, "segment_len": T, "overlap": 3}
MEMORIES = {
    "stm": partial(ShortTermMemory, n_slot=3, n_head=2),
    "ltm": partial(LongTermMemory, n_slot=12, d_key=8, top_k=4, write_budget=4, span=2),
}


def model_of(memories: dict[str, Any] | None = None, **settings: Any) -> LSTM:
    torch.manual_seed(0)
    return LSTM(V, memories or {}, **(MODEL | settings)).eval()


def text(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


# --- the recurrence --------------------------------------------------------------------------------------------------


def step(layer: Layer, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of one text by the equations of the LSTM: x (D,), hidden and cell (H,)."""
    lstm = layer.lstm
    gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ hidden + lstm.bias_hh_l0
    write, forget, content, output = gates.chunk(4)
    cell = forget.sigmoid() * cell + write.sigmoid() * content.tanh()
    return output.sigmoid() * cell.tanh(), cell


def naive_forward(model: LSTM, ids: Tensor) -> Tensor:
    """Logits (L, V) of one text, without memory, token by token."""
    x = model.embedding(ids) * model.d_model**0.5
    for layer in model.layers:
        inputs, mixed = [layer.norm(token) for token in x], []
        for t in range(len(x)):
            start = t // model.segment_len * model.segment_len
            hidden = cell = torch.zeros(layer.d_hidden)
            for u in range(max(0, start - model.overlap), t + 1):
                hidden, cell = step(layer, inputs[u], hidden, cell)
            mixed.append(x[t] + layer.to_output(hidden))
        x = torch.stack(mixed)
        x = x + layer.feed_forward(x)
    return model.norm(x) @ model.embedding.weight.T


@pytest.mark.parametrize("overlap", [0, 1, 3, T])
@torch.no_grad()
def test_forward_equals_the_recurrence_by_hand(overlap: int) -> None:
    model = model_of(overlap=overlap)
    ids = text(2, 3 * T + 2)
    expected = torch.stack([naive_forward(model, row) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(ids[:, : 3 * T]).logits, expected[:, : 3 * T], atol=1e-5, rtol=1e-4)
    state, parts = None, []
    for part in ids.split([1, 1, 5, 4, 1, 8], dim=1):
        out = model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_nothing_older_than_the_overlap_is_seen() -> None:
    model = model_of(n_layer=1)
    ids = text(1, 2 * T)
    base = model(ids).logits[0, T:]
    for t in range(T):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % V
        changed = not torch.equal(model(other).logits[0, T:], base)
        assert changed == (t >= T - 3), f"token {t} of the segment before"


@torch.no_grad()
def test_a_new_context_drops_the_recurrent_state_and_keeps_memory() -> None:
    model = model_of(MEMORIES)
    state = model(text(2, 2 * T + 2)).state
    assert all(cache.recurrent.abs().max() > 0 for cache in state.local.cache)
    closed = model.new_context(state)
    assert all(cache.recurrent.abs().max() == 0 for cache in closed.local.cache)
    assert closed.memory["stm"][0].n_written.tolist() == [3, 3]
    bare = model_of()
    closed = bare.new_context(bare(text(2, 2 * T + 2)).state)
    assert torch.equal(bare(text(2, 9, seed=1), state=closed).logits, bare(text(2, 9, seed=1)).logits)


@torch.no_grad()
def test_an_open_segment_goes_on_from_its_recurrent_state_alone() -> None:
    """One more token costs one step: the tokens before it are not run over again."""
    model, ids = model_of(n_layer=1), text(1, 5)
    state = model(ids[:, :4]).state
    forgotten = state.local.cache[0]._replace(inputs=torch.zeros_like(state.local.cache[0].inputs))
    other = state._replace(local=state.local._replace(cache=(forgotten,)))
    expected = model(ids[:, 4:], state=state).logits
    assert torch.equal(model(ids[:, 4:], state=other).logits, expected)
    assert not torch.equal(model(ids[:, 4:]).logits, expected)


@torch.no_grad()
def test_the_state_of_another_model_is_refused() -> None:
    other = LMCode(V, {}, n_layer=2, n_head=2, d_model=16, segment_len=T, overlap=3)
    with pytest.raises(ValueError, match="the state is of another model"):
        model_of()(text(1, T), state=other.init_state(1))


# --- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [*test_laws.LAWS, laws.bounded, laws.admits])
@pytest.mark.parametrize("name", ["imm", "ltm"])
def test_laws_hold(name: str, law: Callable[[laws.Make], None]) -> None:
    law(laws.builder(laws.nodes_of(name), model_class=LSTM))


@pytest.mark.parametrize(
    "law", [law for law in test_laws.LAWS if law not in (laws.alive, laws.reach, laws.inspectable)]
)
def test_laws_hold_without_memory(law: Callable[[laws.Make], None]) -> None:
    law(laws.builder({}, model_class=LSTM))


@pytest.mark.parametrize("law", [laws.causal, laws.chunk_invariant, laws.pure, laws.round_trip])
def test_laws_hold_with_a_shared_bank(law: Callable[..., None]) -> None:
    law(laws.builder(laws.nodes_of("ltm"), model_class=LSTM), scope="shared")


def test_memory_is_useful() -> None:
    laws.useful(laws.builder(laws.nodes_of("ltm"), shrink=False, model_class=LSTM))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"d_hidden": 0}, "d_hidden must be at least 1 or null, got 0"),
        ({"overlap": 7}, r"overlap must be in 0..segment_len \(6\), got 7"),
        ({"dropout": 1.0}, "dropout"),
        ({"memory_layers": [2]}, "different layers of 0..1"),
        ({"segment_len": 3}, "segment_len to at least 4, got 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(MEMORIES, **settings)
