"""The transformer against naive references, its caches, generation and errors. What memories must keep: the laws."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.ltm import LongTermMemory
from memlm.memory.state import tensors
from memlm.memory.stm import ShortTermMemory
from memlm.models import lmcode
from memlm.models.lmcode import Attention, LMCode
from memlm.models.sampling import Sampling

V, T = 30, 6
MODEL: dict[str, Any] = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 24, "segment_len": T, "overlap": 3}
MEMORIES = {
    "stm": partial(ShortTermMemory, n_slot=3, n_head=2),
    "ltm": partial(LongTermMemory, n_slot=12, d_key=8, top_k=4, write_budget=4, span=2),
}


def model_of(memories: dict[str, Any] | None = None, **settings: Any) -> LMCode:
    torch.manual_seed(0)
    return LMCode(V, memories or {}, **(MODEL | settings)).eval()


def text(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


# --- attention -------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, place: int) -> Tensor:
    """Rotary encoding of one head (E,): pairs (i, i + E / 2) turn by place / 10000^(2 i / E)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = place / 10_000 ** (2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[i] * math.sin(angle) + x[half + i] * math.cos(angle)
    return out


def naive_attention(attention: Attention, x: Tensor, segment_len: int, rope: bool) -> Tensor:
    """Token by token over one text (L, D): its segment, and the last ``overlap`` tokens of the one before."""
    width = x.shape[1] // attention.n_head
    query, key, value = attention.to_qkv(x).chunk(3, dim=1)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        start = t // segment_len * segment_len
        seen = range(max(0, start - attention.overlap), t + 1)
        for h in range(attention.n_head):
            part = slice(h * width, (h + 1) * width)
            scores = []
            for u in seen:
                q, k = query[t, part], key[u, part]
                q, k = (rotate(q, t), rotate(k, u)) if rope else (q, k)
                scores.append(float(q @ k) / math.sqrt(width))
            weight = torch.tensor(scores).softmax(dim=0)
            out[t, part] = sum(w * value[u, part] for w, u in zip(weight, seen, strict=True))
    return attention.to_output(out)


def naive_forward(model: LMCode, ids: Tensor) -> Tensor:
    """Logits (L, V) of one text, without memory, by naive attention."""
    x = model.embedding(ids) * model.d_model**0.5
    if model.position_embedding is not None:
        x = x + torch.stack([model.position_embedding.weight[t % model.segment_len] for t in range(len(ids))])
    for layer in model.layers:
        rope = layer.attention.rotation is not None
        x = x + naive_attention(layer.attention, layer.attention_norm(x), model.segment_len, rope)
        x = x + layer.feed_forward(x)
    return model.norm(x) @ model.embedding.weight.T


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("overlap", [0, 1, 3, T])
@torch.no_grad()
def test_forward_equals_naive_masked_attention(overlap: int, position: str) -> None:
    model = model_of(overlap=overlap, position=position)
    ids = text(2, 3 * T + 2)
    expected = torch.stack([naive_forward(model, row) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    state, parts = None, []
    for part in ids.split([1, 1, 5, 4, 1, 8], dim=1):
        out = model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


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
def test_rope_depends_on_distances_only() -> None:
    x = torch.randn(1, 1, 2, 8)
    angle = torch.arange(20)[:, None] / 10_000 ** (torch.arange(0, 8, 2) / 8)
    table = torch.stack([angle.cos(), angle.sin()])
    at = lmcode._rotate(x.expand(1, 20, 2, 8), table)[0]  # the same vector at 20 places
    score = torch.einsum("ihe,jhe->hij", at, at)
    for distance in (1, 5):
        same = score.diagonal(offset=distance, dim1=1, dim2=2)
        torch.testing.assert_close(same, same[:, :1].expand_as(same), atol=1e-4, rtol=1e-4)
    assert (score[:, 0, 1] - score[:, 0, 5]).abs().min() > 1e-3
    torch.testing.assert_close(at.norm(dim=2), x[0].norm(dim=2).expand(20, -1))


@torch.no_grad()
def test_rope_is_the_same_in_every_segment_and_learned_positions_within_one() -> None:
    """A repeated segment has the same outputs where nothing before is seen."""
    for position in ("rope", "learned"):
        model = model_of(overlap=0, position=position)
        out = model(text(1, T).repeat(1, 3)).logits[0].view(3, T, V)
        torch.testing.assert_close(out[1], out[0])
        torch.testing.assert_close(out[2], out[0])


@torch.no_grad()
def test_learned_positions_tell_places_apart() -> None:
    same = torch.full((1, T), 3)
    rope, learned = model_of(overlap=0), model_of(overlap=0, position="learned")
    torch.testing.assert_close(rope(same).logits[0, 1], rope(same).logits[0, 4])  # one value to attend to
    assert (learned(same).logits[0, 1] - learned(same).logits[0, 4]).abs().max() > 0.01
    assert rope.position_embedding is None


# --- contexts and state ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_new_context_sees_nothing_of_the_old_one_without_memory() -> None:
    model = model_of()
    state = model.new_context(model(text(2, 2 * T + 2)).state)
    assert state.local.position.tolist() == [2 * T + 2] * 2
    assert state.local.n_open.tensor.tolist() == [0, 0]
    assert torch.equal(model(text(2, 9, seed=1), state=state).logits, model(text(2, 9, seed=1)).logits)


@torch.no_grad()
def test_a_new_context_writes_the_open_segment_unless_told_otherwise() -> None:
    model = model_of(MEMORIES)
    state = model(text(2, T + 4)).state
    closed, dropped = model.new_context(state), model.new_context(state, write=False)
    assert closed.memory["stm"][0].n_written.tolist() == [2, 2]
    assert dropped.memory["stm"][0].n_written.tolist() == [1, 1]
    assert torch.equal(dropped.memory["ltm"][0].key, state.memory["ltm"][0].key)
    assert not torch.equal(closed.memory["ltm"][0].key, state.memory["ltm"][0].key)
    again = model.new_context(closed)  # nothing is open: nothing more is written
    assert torch.equal(again.memory["stm"][0].slot, closed.memory["stm"][0].slot)
    assert torch.equal(again.memory["ltm"][0].key, closed.memory["ltm"][0].key)


@torch.no_grad()
def test_reads_off_and_writes_off() -> None:
    model, ids = model_of(MEMORIES), text(2, 4 * T)
    on = model(ids)
    off = model(ids, read=False)
    assert off.reads == {}
    bare = model_of()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory.")})
    torch.testing.assert_close(off.logits, bare(ids).logits)
    assert torch.equal(off.state.memory["stm"][0].n_written, on.state.memory["stm"][0].n_written)
    silent = model(ids, write=False)
    assert silent.state.memory["stm"][0].n_written.tolist() == [0, 0]
    assert silent.trace == {"stm": {}, "ltm": {}}
    torch.testing.assert_close(silent.logits, off.logits)  # nothing was written, so nothing is read


@torch.no_grad()
def test_wiping_keeps_the_local_context() -> None:
    model = model_of(MEMORIES)
    state = model(text(2, 2 * T + 2)).state
    wiped = model.wipe(state)
    assert wiped.memory["stm"][0].n_written.tolist() == [0, 0]
    assert all(map(torch.equal, wiped.local.cache, state.local.cache))
    assert state.memory["stm"][0].n_written.tolist() == [2, 2]


@torch.no_grad()
def test_reset_counts_documents_and_positions() -> None:
    model = model_of(MEMORIES)
    state = model(text(3, T + 2)).state
    state = model(text(3, 3), state=state, reset=torch.tensor([True, False, True])).state
    assert state.local.document.tolist() == [1, 0, 1]
    assert state.local.position.tolist() == [3, T + 5, 3]
    reset = torch.tensor([[True, False, True], [True, False, False], [True, True, True]])
    state = model(text(3, 3 * T), state=state, reset=reset).state
    assert state.local.document.tolist() == [3, 1, 4]
    assert state.local.position.tolist() == [T, 3 * T, T]


@torch.no_grad()
def test_a_call_without_tokens_still_resets() -> None:
    """`reset` acts before the call's first token, whether or not there is one."""
    model, nothing = model_of(MEMORIES), torch.empty(2, 0, dtype=torch.long)
    state, after = model(text(2, 3 * T)).state, text(2, 2 * T, seed=1)
    same = model(nothing, state=state)
    assert same.logits.shape == (2, 0, V)
    assert torch.equal(model(after, state=same.state).logits, model(after, state=state).logits)
    reset = torch.tensor([True, False])
    expected = model(after, state=state, reset=reset).logits
    began = model(nothing, state=state, reset=reset).state
    torch.testing.assert_close(model(after, state=began).logits, expected)


@torch.no_grad()
def test_rows_may_be_masked_altogether() -> None:
    model = model_of(MEMORIES)
    state = model(text(2, 2 * T + 1)).state
    mask = torch.tensor([[False] * 9, [True] * 9])
    after = model(text(2, 9, seed=1), state=state, mask=mask).state
    probe = text(2, 5, seed=2)
    torch.testing.assert_close(model(probe, state=after).logits[0], model(probe, state=state).logits[0])


def test_state_does_not_need_logits() -> None:
    model, ids = model_of(MEMORIES), text(2, 2 * T + 1)
    out = model(ids, logits=False)
    assert out.logits is None
    assert torch.equal(model.head(out.hidden), model(ids).logits)


# --- memories in the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "layers"), [("middle", [2]), ("all", [0, 1, 2, 3]), ([3, 0], [0, 3]), ([1], [1])])
def test_memory_layers(choice: str | list[int], layers: list[int]) -> None:
    model = model_of(MEMORIES, n_layer=4, memory_layers=choice)
    assert model.memory_layers == layers
    assert [len(modules) for modules in model.memory.values()] == [len(layers)] * 2
    out = model(text(1, 3 * T))
    assert set(out.reads) == {f"{name}/{layer}" for name in MEMORIES for layer in layers}
    assert [len(states) for states in out.state.memory.values()] == [len(layers)] * 2
    assert set(out.trace) == set(MEMORIES)


@torch.no_grad()
def test_a_window_of_segments_from_fresh_banks_reads_as_many_slots_as_it_may() -> None:
    """Of memories that take the segments one by one as well; reads of few slots are filled up with -1."""
    for scope in ("sequence", "shared"):
        ltm = partial(LongTermMemory, n_slot=12, d_key=8, top_k=6, write_budget=4, span=2, scope=scope)
        out = model_of({"ltm": ltm})(text(2, 4 * T))
        read = out.reads["ltm/1"]
        assert read.slots.shape == read.weights.shape
        assert read.slots.shape[:2] == (2, 4 * T)
        assert (read.weights[:, :T] == 0).all()
        assert (read.slots[read.weights > 0] >= 0).all()


class Whole(ShortTermMemory):
    """Short-term memory with one state for all layers it is attached to; it writes the mean of what they saw."""

    around = "layers"

    def write(self, segment: Any, state: Any) -> Any:
        assert segment.hidden.shape[2] == 2
        return super().write(segment._replace(hidden=segment.hidden.mean(dim=2)), state)


@pytest.mark.parametrize("memories", [["ltm"], ["stm", "ltm"], []])
@pytest.mark.parametrize("memory_layers", ["middle", [0], "all"])
def test_absorbed_text_is_remembered_as_read_text_is(memories: list[str], memory_layers: Any) -> None:
    model = model_of({name: MEMORIES[name] for name in memories}, n_layer=3, memory_layers=memory_layers)
    ids, more, question = text(2, 4 * T + 2), text(2, 3 * T, seed=1), text(2, T, seed=2)
    read = model(more, state=model(ids, logits=False).state, logits=False).state
    absorbed = model.absorb(more, model.absorb(ids))
    states = [model.new_context(state) for state in (read, absorbed)]
    for a, b in zip(tensors(states[0]), tensors(states[1]), strict=True):
        torch.testing.assert_close(a, b)
    outputs = [model(question, state=state).logits for state in states]
    torch.testing.assert_close(outputs[0], outputs[1])
    if model.memory_layers[-1] < 2 and memories:  # what was left out cannot pass for a result
        with pytest.raises(ValueError, match="call new_context"):
            model(question, state=absorbed)


@torch.no_grad()
def test_a_memory_of_all_layers_runs_segment_by_segment() -> None:
    model = model_of({"whole": partial(Whole, n_slot=3, n_head=2)}, memory_layers="all")
    assert len(model.memory["whole"]) == 1
    ids = text(3, 4 * T + 2)
    out = model(ids)
    assert set(out.reads) == {"whole/0", "whole/1"}
    assert out.state.memory["whole"][0].n_written.tolist() == [4, 4, 4]
    state, parts = None, []
    for part in ids.split([2, 1, 14, 9], dim=1):
        piece = model(part, state=state)
        state = piece.state
        parts.append(piece.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), out.logits, atol=1e-4, rtol=1e-4)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % V
    assert not torch.equal(model(other).logits[0, 3 * T :], out.logits[0, 3 * T :])
    mask = torch.tensor([4 * T + 2, T + 1, 0])[:, None] > torch.arange(4 * T + 2)
    ragged = model(ids, mask=mask)
    torch.testing.assert_close(ragged.logits[mask], out.logits[mask], atol=1e-4, rtol=1e-4)
    assert ragged.state.memory["whole"][0].n_written.tolist() == [4, 1, 0]
    assert ragged.state.local.n_open.tensor.tolist() == [2, 1, 0]
    reset = torch.tensor([False, True, False])
    began = model(ids, state=ragged.state, reset=reset)
    torch.testing.assert_close(began.logits[1], out.logits[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(began.logits[2], out.logits[2], atol=1e-4, rtol=1e-4)


class Spy(LongTermMemory):
    """Keeps what it was given last."""

    segment: Any = None

    def write(self, segment: Any, state: Any) -> Any:
        Spy.segment = segment
        return super().write(segment, state)


@torch.no_grad()
def test_surprise_is_the_loss_of_the_head_at_the_memory() -> None:
    spy = partial(Spy, n_slot=12, d_key=8, top_k=4, write_budget=4, span=2, importance="surprise")
    model = model_of({"spy": spy}, memory_layers=[1])
    ids = text(2, T)
    model(ids)
    segment = Spy.segment
    hidden, first = segment.hidden[:, segment.lookback :], segment.lookback
    for row in range(2):
        for t in range(T - 1):
            chance = model.head(model.norm(hidden[row, t])).softmax(dim=-1)[ids[row, t + 1]]
            assert float(segment.surprise[row, first + t]) == pytest.approx(-math.log(float(chance)), rel=1e-4)
    model.memory["spy"][0].importance = "span"
    model(ids)
    assert Spy.segment.surprise is None


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(dropout: float) -> None:
    ids, gradients = text(2, 3 * T), []
    for on in (False, True):
        model = model_of(MEMORIES, dropout=dropout, gradient_checkpointing=on).train()
        torch.manual_seed(1)
        out = model(ids)
        F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_acts_in_training_only() -> None:
    model, ids = model_of(dropout=0.5), text(1, T)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_the_head_is_tied_to_the_embedding() -> None:
    model = model_of()
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    hidden = torch.randn(2, 3, 16)
    torch.testing.assert_close(model.head(hidden), hidden @ model.embedding.weight.T)


# --- generation ------------------------------------------------------------------------------------------------------


def test_generation_keeps_the_prompt_the_mode_and_the_state() -> None:
    model, prompt = model_of(MEMORIES).train(), text(2, 4)
    with torch.no_grad():
        state = model(text(2, T + 1, seed=1)).state
    before = state.local.position.clone()
    tokens = model.generate(prompt, max_new_tokens=9, state=state)
    assert tokens.shape == (2, 13)
    assert torch.equal(tokens[:, :4], prompt)
    assert model.training
    assert torch.equal(state.local.position, before)
    assert torch.equal(model.generate(prompt, max_new_tokens=0), prompt)


def test_greedy_generation_draws_nothing() -> None:
    model, prompt = model_of(MEMORIES), text(2, 4)
    torch.manual_seed(1)
    first = model.generate(prompt, max_new_tokens=8, temperature=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, temperature=0), first)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, temperature=1.0, top_k=1, top_p=None), first)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, temperature=1.0, top_k=None, top_p=1e-6), first)


def test_sampling_follows_the_seed() -> None:
    model, prompt = model_of(MEMORIES), text(2, 4)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, max_new_tokens=12, temperature=2.0, top_k=None, top_p=None))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (None, None, {0, 1, 2, 3}),
        (2, None, {0, 1}),
        (100, None, {0, 1, 2, 3}),
        (None, 0.5, {0}),  # 0.5 alone reaches p
        (None, 0.6, {0, 1}),
        (None, 0.81, {0, 1, 2}),
        (None, 1.0, {0, 1, 2, 3}),
        (3, 0.6, {0, 1}),
        (1, 1.0, {0}),
    ],
)
def test_what_may_be_sampled(top_k: int | None, top_p: float | None, expected: set[int]) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(500, -1)
    drawn = Sampling(temperature=1.0, top_k=top_k, top_p=top_p).choose(logits)
    assert drawn.shape == (500,)
    assert set(drawn.flatten().tolist()) == expected


def test_temperature_sharpens() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.6, 0.4]).log().expand(4000, -1)
    drawn = {t: Sampling(temperature=t, top_k=None, top_p=None).choose(logits) for t in (0.25, 1.0, 4.0, 0)}
    share = {t: float((tokens == 0).float().mean()) for t, tokens in drawn.items()}
    assert share[0.25] == pytest.approx(0.6**4 / (0.6**4 + 0.4**4), abs=0.03)
    assert share[1.0] == pytest.approx(0.6, abs=0.03)
    assert share[4.0] == pytest.approx(0.6**0.25 / (0.6**0.25 + 0.4**0.25), abs=0.03)
    assert share[0] == 1


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"d_model": 0}, r"model\.d_model must be at least 1, got 0"),
        ({"segment_len": 0, "overlap": 0}, r"model\.segment_len must be at least 1, got 0"),
        ({"n_head": 3}, r"n_head must divide model.d_model \(16\), got 3"),
        ({"n_head": 0}, "n_head"),
        ({"n_head": 16}, "even head width"),
        ({"overlap": 7}, r"overlap must be in 0..segment_len \(6\), got 7"),
        ({"overlap": -1}, "overlap"),
        ({"dropout": 1.0}, "dropout"),
        ({"memory_layers": "last"}, "'middle', 'all' or a list"),
        ({"memory_layers": [2]}, "different layers of 0..1"),
        ({"memory_layers": []}, "memory_layers"),
        ({"memory_layers": [0, 0]}, "memory_layers"),
        ({"segment_len": 3}, "segment_len to at least 4, got 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(MEMORIES, **settings)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model, ids = model_of(), text(2, 2 * T)
    state = model(ids[:, :3]).state
    with pytest.raises(ValueError, match="ids must be"):
        model(ids[0])
    with pytest.raises(ValueError, match="at least one row"):
        model(ids[:0])
    with pytest.raises(ValueError, match=r"reset must be bool, got torch\.int64"):
        model(ids, reset=torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="2 rows, but the state has 3"):
        model(ids, state=model.init_state(3))
    with pytest.raises(ValueError, match="mask must have the shape of ids"):
        model(ids, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reset must be"):
        model(ids, reset=torch.ones(3, dtype=torch.bool))
    for wrong in (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="reset"):  # two segments
            model(ids, reset=wrong)
    for wrong in (torch.zeros(5, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"breaks must be \(2, segments\)"):
            model(ids, breaks=wrong)
    with pytest.raises(ValueError, match="reset by segment need"):
        model(ids, state=state, reset=torch.zeros(2, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": 0}, "top_k.* must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number of at least 0, got None"),
        ({"temperature": "x"}, "temperature must be 0 .* got 'x'"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"temperature": 1e-300}, "temperature .* got 1e-300"),
        ({"top_k": 1.5}, "top_k.* got 1.5"),
        ({"top_p": "x"}, "top_p must be a number in"),
        ({"state": "x"}, "state must be what a call of this model gave, or None, got str"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"ids": torch.empty(1, 0, dtype=torch.long)}, "at least one token"),
    ],
)
def test_generation_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of().generate(**({"ids": text(1, 2)} | settings))
