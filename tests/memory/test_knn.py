"""Nearest tokens against a loop over rows, heads and tokens that keeps a list, and values by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.contract import Heads, Sizes
from memlm.memory.knn import KnnMemory, KnnState
from memlm.memory.state import n_byte, tensors
from memlm.models.segments import SegmentModel
from tests.memory.gradients import gradients, same_gradients
from tests.memory.plain_attention import behind, heads_of, scores
from tests.memory.segments import segment_of

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("knn"))
SETTINGS: list[dict[str, Any]] = [
    {"n_token": 50, "top_k": 6},
    {"n_token": 15, "top_k": 40, "norm_keys": False},
    {"n_token": 1, "top_k": 1, "gradient": True},
    {"n_token": 20, "top_k": 4, "gradient": True},
    {"n_token": 20, "top_k": 8, "chunk": 4},
    {"n_token": 15, "top_k": 10, "chunk": 5, "norm_keys": False, "gradient": True},  # does not divide a segment
]


def nearest(settings: dict[str, Any], **model: Any) -> SegmentModel:
    return MAKE(memory=settings, **({"memory_layers": "all"} | model))


def found_by(memory: KnnMemory, h: int, query: Tensor, bank: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """What head ``h`` finds for a query (E,) in chunks of keys and values (H, E)."""

    def score(key: Tensor) -> Tensor:
        if memory.log_temperature is None:
            return query @ key / key.shape[0] ** 0.5
        return memory.log_temperature[h].exp() * (query / query.norm()) @ key

    def unit(key: Tensor) -> Tensor:
        return key if memory.log_temperature is None else key / key.norm()

    by_mean = [
        (score(torch.stack([unit(k[h]) for k, _ in chunk]).mean(dim=0)).item(), i) for i, chunk in enumerate(bank)
    ]
    best = [i for _, i in sorted(by_mean, reverse=True)[: memory.top_k // memory.chunk]]
    read = [(unit(k[h]), v[h]) for i in best for k, v in bank[i]]
    read.append((unit(memory.null_key[h]), memory.null_value[h]))
    weight = torch.stack([score(key) for key, _ in read]).softmax(dim=0)
    return sum(w * value for w, (_, value) in zip(weight, read, strict=True))  # type: ignore[return-value]


def naive(model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]]) -> Tensor:
    """Logits (L, V) of one row, layer by layer, segment by segment and token by token.

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
    """
    memories: Any = model.memory["knn"]
    x = model.embedding(ids) * model.d_model**0.5
    for layer, memory in zip(model.layers, memories, strict=True):
        q, k, v = heads_of(layer, x)  # (H, L, E)
        bank: list[list[tuple[Tensor, Tensor]]] = []
        found = []
        for begin, end, fresh in segments:
            first = begin if fresh else max(0, begin - model.overlap)
            place, seen = torch.arange(begin, end), torch.arange(first, end)
            here = scores(q[:, begin:end], k[:, first:end], seen <= place[:, None], place - begin, seen - begin)
            local = here.softmax(dim=2) @ v[:, first:end]
            known = torch.stack([
                torch.stack([found_by(memory, h, q[h, t], bank) for t in range(begin, end)])
                for h in range(layer.n_head)
            ])  # fmt: skip
            gate = memory.gate[:, None, None].sigmoid()
            found.append(gate * known + (1 - gate) * local)
            for start in range(begin, end, memory.chunk):
                chunk = range(start, min(start + memory.chunk, end))
                bank.append(
                    [(k[:, t], v[:, t]) if memory.gradient else (k[:, t].detach(), v[:, t].detach()) for t in chunk]
                )
            bank = bank[-(memory.n_token // memory.chunk) :]
        x = behind(layer, x, torch.cat(found, dim=1))
    return model.norm(x) @ model.embedding.weight.T


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_outputs_and_gradients_equal_the_naive_loop(settings: dict[str, Any]) -> None:
    model, ids = nearest(settings, n_layer=2), laws.text(2, 4 * T)
    got = model(ids).logits
    expected = torch.stack([naive(model, row, [(s * T, (s + 1) * T, s == 0) for s in range(4)]) for row in ids])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    same_gradients(gradients(model, got), gradients(model, expected))


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS[3:], ids=str)
def test_it_goes_on_over_the_end_of_a_context_but_not_of_a_document(settings: dict[str, Any]) -> None:
    model, ids = nearest(settings, n_layer=2), laws.text(1, 5 * T)
    edges = [0, T, 2 * T, 3 * T - 2, 4 * T - 2, 4 * T + 3]  # the third segment ends early
    expected = naive(model, ids[0, : edges[-1]], [(edges[s], edges[s + 1], s in (0, 3)) for s in range(5)])
    told = model(ids[:, : edges[3]])
    state, asked = model.new_context(told.state), ids[:, edges[3] : edges[-1]]
    got = model(asked, state=state).logits
    torch.testing.assert_close(torch.cat([told.logits, got], dim=1)[0], expected, atol=1e-4, rtol=0)
    fresh = model(asked, state=state, reset=torch.tensor([True])).logits
    torch.testing.assert_close(fresh, model(asked).logits)


@torch.no_grad()
def test_an_empty_bank_gives_the_value_of_the_null_key() -> None:
    model, ids = nearest({}, memory_layers=[1]), laws.text(2, T)
    memory: Any = model.memory["knn"]
    out, read = model(ids), model(ids).reads["knn/1"]
    assert (read.slots == -1).all()
    assert not read.weights.any()
    memory[0].null_value.add_(1.0)
    assert (model(ids).logits - out.logits).abs().amax(dim=2).min() > 1e-3  # of every token


def segment_with(n_row: int, n_token: int, first: int = 0, valid: list[int] | None = None) -> Any:
    """A segment whose tokens have the numbers from ``first`` on as values, and keys of the same direction."""
    v = torch.arange(first, first + n_token).float()[:, None].expand(n_row, 4, n_token, 8)
    return segment_of(torch.zeros(n_row, n_token, 32), valid)._replace(heads=Heads(v, v + 1, v))


def held(state: KnnState) -> list[list[float]]:
    """Numbers that each row holds."""
    return [part[full].tolist() for part, full in zip(state.value[:, 0, :, 0], state.full, strict=True)]


def memory_of(**settings: Any) -> KnnMemory:
    return KnnMemory(32, Sizes(32, 4, 3, T, 4, 40), **settings)


def test_the_oldest_give_way_place_by_place() -> None:
    memory = memory_of(n_token=5, top_k=1)
    state = memory.init_state(2)
    for first, valid in ((0, [3, 2]), (10, [3, 3]), (20, [1, 3])):
        state, _ = memory.write(segment_with(2, 3, first, valid), state)
    assert held(state) == [[12, 20, 2, 10, 11], [20, 21, 22, 11, 12]]
    memory = memory_of(n_token=6, top_k=2, chunk=2)  # chunks begin with a segment: the second of three tokens has one
    state = memory.init_state(2)
    for first, valid in ((0, [3, 2]), (10, [3, 3]), (20, [1, 0])):
        state, _ = memory.write(segment_with(2, 3, first, valid), state)
    assert held(state) == [[12, 20, 10, 11], [0, 1, 10, 11, 12]]
    assert state.n_chunk.tolist() == [5, 3]


@torch.no_grad()
def test_slots_that_were_read_are_those_of_the_bank() -> None:
    """Tokens of a window are told by the places that they take."""
    for settings in ({"n_token": 15, "top_k": 3}, {"n_token": 16, "top_k": 8, "chunk": 4}):
        model, ids = nearest(settings, memory_layers=[1]), laws.text(2, 5 * T)
        whole = model(ids).reads["knn/1"]
        with laws.slow_scan(model):
            loop = model(ids).reads["knn/1"]
        places = [torch.zeros(*read.slots.shape[:2], 16).scatter_add(2, read.slots.clamp(min=0), read.weights)
                  for read in (whole, loop)]  # fmt: skip
        torch.testing.assert_close(places[0], places[1])
        assert (places[0].sum(dim=2) < 1).all()  # the rest is the null key's
        torch.testing.assert_close(whole.gate, loop.gate)


@torch.no_grad()
def test_reads_off_is_attention_alone() -> None:
    model, none, ids = nearest(SETTINGS[0]), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)


def test_no_gradient_reaches_the_bank_without_the_setting() -> None:
    for gradient in (False, True):
        memory = memory_of(n_token=5, top_k=1, gradient=gradient)
        segment = segment_with(1, 3)
        heads = Heads(*(part.clone().requires_grad_() for part in segment.heads))
        state, _ = memory.write(segment._replace(heads=heads), memory.init_state(1))
        assert (state.key.requires_grad, state.value.requires_grad) == (gradient, gradient)


@torch.no_grad()
def test_the_bank_is_kept_in_full_precision_under_autocast() -> None:
    model, ids = nearest(SETTINGS[0]), laws.text(2, 3 * T)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids)
    assert out.state.memory["knn"][0].key.dtype == torch.float32
    assert (out.logits.float() - exact).abs().mean() < 0.1  # a query near a tie may read another token


def test_what_it_costs() -> None:
    model = nearest({"n_token": 50})
    assert [n_byte(part) for part in model.init_state(1).memory["knn"]] == [50 * (8 * model.d_model + 1) + 8] * 3
    # queries, keys and values of what is written; keys that are scored; values that are read; the null key in both
    assert memory_of(n_token=50, top_k=5).flops_per_token() == 2 * 32 * (3 * 32 + 51 + 6)
    assert memory_of(n_token=50, top_k=5, chunk=5).flops_per_token() == 2 * 32 * (3 * 32 + 10 + 6 + 6)


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "n_token=0": r"n_token must be a positive multiple of chunk \(1\), got 0",
        "top_k=0": r"top_k must be a positive multiple of chunk \(1\), got 0",
        "chunk=3": r"n_token must be a positive multiple of chunk \(3\), got 2048",
        "chunk=0": "chunk must be at least 1, got 0",
        "temperature=0": "temperature must be above 0",
        "gate=0": r"gate must be in \(0, 1\)",
        "gate=null": "gate can be null only with norm_keys=false",
        "reach=100": "reach must be null, or with gate=null a number of tokens above the overlap",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.knn\.{message}"):
            build("memory=knn", f"memory.knn.{setting}", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'knn' needs heads of attention.* choose model=lmcode"):
        build("model=lstm", "memory=knn", "data.tokenizer.kind=byte")


CHUNKS = {"n_token": 48, "top_k": 8, "chunk": 4}
RAW = {"n_token": 15, "norm_keys": False}
JOINED = {"n_token": 30, "top_k": 4, "norm_keys": False, "gate": None, "reach": 20}


@torch.no_grad()
@pytest.mark.parametrize("n_token", [T + 1, 4 * T])
def test_without_a_gate_all_that_is_kept_is_a_cache(n_token: int) -> None:
    """Keys and values of the last tokens, each at its place, give what attention gives over their hidden states."""
    all_of_it = {"n_token": n_token, "top_k": n_token, "norm_keys": False, "gate": None, "reach": 100}
    model, ids = nearest(all_of_it), laws.text(2, 5 * T + 3)
    cache = laws.builder(laws.nodes_of("cache"))(memory={"n_token": n_token}, memory_layers="all")
    cache.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).logits, cache(ids).logits, atol=1e-5, rtol=1e-4)
    states = [part.new_context(part(ids).state) for part in (model, cache)]
    after = [part(ids, state=state).logits for part, state in zip((model, cache), states, strict=True)]
    torch.testing.assert_close(after[0], after[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2])
def test_without_a_gate_queries_see_their_best(chunk: int) -> None:
    memory = memory_of(**JOINED | {"chunk": chunk})
    draw = torch.Generator().manual_seed(0)
    key, query = (torch.randn(2, 4, n, 8, generator=draw) for n in (30, 7))
    full = torch.arange(30) < torch.tensor([[30], [9]])
    bank = KnnState(key * full[:, None, :, None], key, full, torch.tensor([40, 9]) // chunk)
    seen = memory._context(query, bank).bias == 0
    score = query @ bank.key.unflatten(2, (-1, chunk)).sum(dim=3).mT  # half full chunks have a mean of one key
    score = score / bank.full.unflatten(1, (-1, chunk)).sum(dim=2).clamp(min=1)[:, None, None]
    score = score.masked_fill(~full[:, ::chunk][:, None, None], -torch.inf)
    best = score.topk(4 // chunk, dim=3).indices
    expected = torch.zeros_like(score, dtype=torch.bool).scatter(3, best, True).repeat_interleave(chunk, dim=3)
    assert torch.equal(seen, expected & full[:, None, None])


def test_without_a_gate_tokens_keep_their_places() -> None:
    memory = memory_of(n_token=4, top_k=4, norm_keys=False, gate=None, reach=100)
    state = memory.init_state(1)._replace(n_chunk=torch.tensor([6]))  # places of tokens 4, 5, 2, 3; the overlap is 4
    assert memory.offsets(state).tolist() == [[-6, -5, -8, -7]]


@torch.no_grad()
def test_without_a_gate_an_empty_bank_is_attention_alone() -> None:
    model, ids = nearest(JOINED), laws.text(2, 3 * T)
    out = model(ids)
    torch.testing.assert_close(out.logits[:, :T], model(ids[:, :T], read=False).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out.logits[:, T:], model(ids, read=False).logits[:, T:], atol=1e-3)


@pytest.mark.parametrize("settings", [CHUNKS, RAW, JOINED], ids=str)
@pytest.mark.parametrize(
    "law",
    [
        laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.schedules_agree, laws.contexts,
        laws.empty_segments, laws.resets, laws.every_parameter_learns, laws.round_trip, laws.inspectable,
        laws.bounded,
    ],
)  # fmt: skip
def test_laws_hold_for_its_settings(law: Callable[[laws.Make], None], settings: dict[str, Any]) -> None:
    law(lambda memory=None, **model: MAKE(memory=settings | (memory or {}), **model))


def test_chunks_are_useful() -> None:
    make = laws.builder(laws.nodes_of("knn"), shrink=False)
    laws.useful(lambda memory=None, *args, **model: make({"chunk": 4} | (memory or {}), *args, **model))


@torch.no_grad()
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[4]])
def test_a_bank_that_is_given_away_is_written_in_place(settings: dict[str, Any]) -> None:
    model, ids = nearest(settings), laws.text(2, 6 * T)
    state = model(ids[:, : 3 * T]).state
    kept = model(ids[:, 3 * T :], state=state).state
    places = [(part.key.data_ptr(), part.value.data_ptr()) for part in state.memory["knn"]]
    given = model(ids[:, 3 * T :], state=state, donate=True).state
    assert [(part.key.data_ptr(), part.value.data_ptr()) for part in given.memory["knn"]] == places
    for one, other in zip(tensors(kept.memory), tensors(given.memory), strict=True):
        assert torch.equal(one, other)
