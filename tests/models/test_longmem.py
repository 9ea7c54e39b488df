"""A frozen decoder with a side network: against the equations of its source by hand, the base, and the laws."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.memory import state as states
from memlm.memory.contract import Sizes
from memlm.memory.knn import KnnMemory
from memlm.memory.rmt import RecurrentMemory
from tests.models import bases

transformers = pytest.importorskip("transformers")

from memlm.models.longmem import LongMem  # noqa: E402
from memlm.models.pretrained import Pretrained  # noqa: E402

pytestmark = pytest.mark.slow

T, OVERLAP = 12, 4
CHUNKS = {"n_token": 16, "top_k": 8, "chunk": 4, "norm_keys": False}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a tiny base of a family is, of five layers."""
    make = functools.partial(bases.make_base, num_hidden_layers=5)
    return functools.cache(lambda family: make(family, tmp_path_factory.mktemp("bases")))


def make_of(path: Path, name: str, **settings: Any) -> laws.Make:
    settings = {"path": str(path), "gate": 1.0} | settings
    return laws.builder(laws.nodes_of(name), model_class=functools.partial(LongMem, **settings))  # type: ignore[arg-type]


def model_of(path: Path, **settings: Any) -> LongMem:
    torch.manual_seed(0)
    memories = {"knn": functools.partial(KnnMemory, **CHUNKS)}
    return LongMem(40, memories, path=str(path), **({"segment_len": T, "overlap": OVERLAP} | settings)).eval()


def disturb(model: LongMem) -> None:
    """Side network and memory as if they were trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.side_gates.copy_(torch.linspace(0.6, 1.3, len(model.side_gates)))


def text(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(bases.N_VOCAB, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


# --- the base as it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", bases.FAMILIES)
@torch.no_grad()
def test_it_begins_as_the_base_bit_for_bit(family: str, folder: Callable[[str], Path]) -> None:
    """Whatever memory holds, and until a gate opens."""
    bare = Pretrained(40, {}, path=str(folder(family)), segment_len=T, overlap=OVERLAP).eval()
    model, ids, more = model_of(folder(family)), text(2, 3 * T + 5), text(2, 2 * T, seed=1)
    out, expected = model(ids), bare(ids)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(model(more, state=out.state).logits, bare(more, state=expected.state).logits)
    model.side_gates.fill_(0.5)
    assert not torch.allclose(model(more, state=out.state).logits, bare(more, state=expected.state).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_a_base_in_bfloat16_has_a_side_network_in_float32(family: str, folder: Callable[[str], Path]) -> None:
    path, ids = folder(family), text(2, 3 * T)
    bare = Pretrained(40, {}, path=str(path), segment_len=T, overlap=OVERLAP, dtype="bfloat16").eval()
    model = model_of(path, dtype="bfloat16")
    assert torch.equal(model(ids).logits, bare(ids).logits)
    assert {part.dtype for part in (*model.layers.parameters(), *model.memory.parameters())} == {torch.float32}
    assert {part.dtype for part in model.below.parameters()} == {torch.bfloat16}
    disturb(model)
    assert model(ids).logits.isfinite().all()


# --- by hand ---------------------------------------------------------------------------------------------------------


def by_hand(model: LongMem, base: Any, ids: Tensor) -> Tensor:
    """Logits (L, V) of a Llama with a side network, of one row (L,), segment by segment, without overlap.

    The loops are those of the paper's equations: layers of transformers, keys and values of the base in a list of
    chunks, two softmaxes for each head and token.
    """
    plain = base.model.layers
    side = [copy.deepcopy(plain[layer.number]) for layer in model.layers]  # which attend as transformers does
    for mine, layer in zip(side, model.layers, strict=True):
        mine.load_state_dict(layer.base.state_dict())
    memory: Any = model.memory["knn"][0]
    bank: list[list[tuple[Tensor, Tensor]]] = []
    found = []
    for begin in range(0, len(ids), T):
        states = [base.model.embed_tokens(ids[None, begin : begin + T])]
        turn = base.model.rotary_emb(states[0], torch.arange(states[0].shape[1])[None])
        for layer in plain:
            states.append(_run(layer, states[-1], turn))
        y = states[0]
        for i, layer in enumerate(side):
            with_memory = [i] == model.memory_layers
            after = _with_bank(layer, y, turn, memory, bank) if with_memory else _run(layer, y, turn)
            last = i + 1 == len(side)
            residual = states[-1 if last else 2 * i + 2] - states[2 * i]
            y = y + residual + model.side_gates[i] * (after - y)
        found.append(base.lm_head(base.model.norm(y))[0])
        copied = plain[2 * model.memory_layers[0] + 1]
        _, key, value = _heads(copied, states[2 * model.memory_layers[0] + 1])
        pairs = [(key[:, t], value[:, t]) for t in range(key.shape[1])]
        bank += [pairs[t : t + memory.chunk] for t in range(0, len(pairs), memory.chunk)]
        bank = bank[-memory.n_token // memory.chunk :]
    return torch.cat(found)


def _run(layer: Any, x: Tensor, turn: Any) -> Tensor:
    after = layer(x, position_embeddings=turn, attention_mask=None)
    return after[0] if isinstance(after, tuple) else after


def _heads(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of one row (1, L, D) before positions, (H, L, E)."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)[0]
    parts = [p(normed).unflatten(1, (-1, attention.head_dim)).transpose(0, 1) for p in
             (attention.q_proj, attention.k_proj, attention.v_proj)]  # fmt: skip
    each = len(parts[0]) // len(parts[1])
    return parts[0], parts[1].repeat_interleave(each, dim=0), parts[2].repeat_interleave(each, dim=0)


def _with_bank(layer: Any, x: Tensor, turn: Any, memory: Any, bank: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key, value = _heads(layer, x)
    turned, keys = (part[0] for part in apply_rotary_pos_emb(query[None], key[None], *turn))
    mixed = torch.empty_like(query)
    for h in range(len(query)):
        share = memory.gate[h].sigmoid() if bank else 0.0  # while it is empty the base is as it was
        for t in range(query.shape[1]):
            local = (keys[h, : t + 1] @ turned[h, t] / query.shape[2] ** 0.5).softmax(0) @ value[h, : t + 1]
            scores = torch.tensor(
                [float(query[h, t] @ torch.stack([k[h] for k, _ in chunk]).mean(0)) for chunk in bank]
            )
            best = scores.argsort(descending=True)[: memory.top_k // memory.chunk].tolist()
            read = [(k[h], v[h]) for i in best for k, v in bank[i]] + [(memory.null_key[h], memory.null_value[h])]
            weight = torch.stack([query[h, t] @ k / query.shape[2] ** 0.5 for k, _ in read]).softmax(0)
            retrieved = weight @ torch.stack([v for _, v in read])
            mixed[h, t] = share * retrieved + (1 - share) * local
    x = x + layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))[None]
    return x + layer.mlp(layer.post_attention_layernorm(x))


@torch.no_grad()
def test_logits_are_those_of_the_equations(folder: Callable[[str], Path]) -> None:
    model, base, ids = model_of(folder("llama"), overlap=0), bases.loaded(folder("llama")), text(2, 4 * T + 5)
    disturb(model)
    expected = torch.stack([by_hand(model, base, row) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    state, parts = None, []
    for part in ids.split([5, 1, 20, 3, 12, 12], dim=1):
        out = model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_kept_comes_from_the_base_alone(folder: Callable[[str], Path]) -> None:
    """Another side network keeps the same, bit for bit; another base would not."""
    model, ids = model_of(folder("llama"), memory_layers="all"), text(2, 4 * T)
    before = model(ids).state.memory
    disturb(model)
    for a, b in zip(states.tensors(before), states.tensors(model(ids).state.memory), strict=True):
        assert torch.equal(a, b)
    stored = model.new_context(model.absorb(ids[:, 7:], model.absorb(ids[:, :7])))
    for a, b in zip(states.tensors(before), states.tensors(stored.memory), strict=True):
        torch.testing.assert_close(a, b)


# --- the laws --------------------------------------------------------------------------------------------------------

LAWS = [
    laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.generates_as_parallel,
    laws.schedules_agree, laws.contexts, laws.closed_once, laws.empty_segments, laws.resets, laws.pure, laws.given_away,
    laws.bounded,
]  # fmt: skip


@pytest.mark.parametrize("name", ["knn", "ltm", "cache"])
@pytest.mark.parametrize("law", LAWS)
def test_laws_hold(law: Callable[[laws.Make], None], name: str, folder: Callable[[str], Path]) -> None:
    law(make_of(folder("llama"), name))


@pytest.mark.parametrize("law", [laws.alive, laws.causal, laws.chunk_invariant, laws.generates_as_parallel])
@pytest.mark.parametrize("family", [family for family in bases.FAMILIES if family != "llama"])
def test_laws_hold_in_other_families(
    law: Callable[[laws.Make], None], family: str, folder: Callable[[str], Path]
) -> None:
    make = make_of(folder(family), "knn", every=1)
    law(lambda memory=None, **model: make({"chunk": 2} | (memory or {}), **model))


# --- what is trained, and what is kept -------------------------------------------------------------------------------


def test_side_network_and_memory_are_trained_and_kept(folder: Callable[[str], Path]) -> None:
    model, ids = model_of(folder("llama")).train(), text(2, 3 * T)
    disturb(model)
    model(ids).logits.square().mean().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == trained == {n for n in model.state_dict() if not n.startswith(("base.", "below."))}
    assert {name.split(".")[0] for name in trained} == {"layers", "side_gates", "memory"}
    assert not [name for name in model.state_dict() if name.startswith(("base.", "below."))]
    other = model_of(folder("llama"))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        state = model.eval()(ids[:, :-7]).state
        again = states.from_dict(states.to_dict(state), like=other.init_state(2))
        assert torch.equal(model(ids[:, -7:], state=state).logits, other(ids[:, -7:], state=again).logits)


def test_checkpointing_recomputes_the_same(folder: Callable[[str], Path]) -> None:
    found = []
    for again in (False, True):
        model = model_of(folder("llama"), gradient_checkpointing=again).train()
        disturb(model)
        model(text(2, 3 * T)).logits.square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "model.every must be at least 1, got 0"),
        ({"every": 6}, "model.every must be at most 5, the layers of the base, got 6"),
        ({"memory_layers": [2]}, r"model.memory_layers must name different layers of 0..1, got \[2\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(folder("llama"), **settings)


def test_a_memory_around_the_stack_is_refused(folder: Callable[[str], Path]) -> None:
    def make(d_model: int, sizes: Sizes) -> RecurrentMemory:
        return RecurrentMemory(d_model, sizes, n_cell=2)

    with pytest.raises(ValueError, match=r"memory 'rmt' stands around a whole model, and here only a side network"):
        LongMem(40, {"rmt": make}, path=str(folder("llama")), segment_len=T, overlap=OVERLAP)
