"""Compressed tokens against the plain cache, a loop with lists and explicit masks, and values by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.compressive import CompressiveMemory, CompressiveState
from memlm.memory.contract import Heads, Segment, Sizes
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.plain_attention import attend, heads_of
from tests.memory.segments import segment_of

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("compressive"))
FEW: dict[str, Any] = {"n_token": 7, "n_compressed": 3, "ratio": 4}
SETTINGS: list[dict[str, Any]] = [
    FEW,
    FEW | {"gradient": True},
    FEW | {"compressor": "mean", "gradient": True},
    FEW | {"compressor": "max"},
    {"n_token": 1, "n_compressed": 30, "ratio": 3},
]


def compressive(settings: dict[str, Any], **model: Any) -> SegmentModel:
    return MAKE(memory=settings, **({"memory_layers": "all"} | model))


def same_gradients(model: SegmentModel, got: Tensor, expected: Tensor, of: SegmentModel | None = None) -> None:
    """Of all parameters, those of the model ``of`` for what is expected."""
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    parameters, others = dict(model.named_parameters()), dict((of or model).named_parameters())
    grads = [
        torch.autograd.grad((part * probe).sum(), list(named.values()), materialize_grads=True, allow_unused=True)
        for part, named in ((got, parameters), (expected, others))
    ]
    for name, a, b in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("compressor", ["mean", "max"])
@pytest.mark.parametrize("gradient", [False, True])
def test_one_token_to_a_cell_is_a_longer_cache(compressor: str, gradient: bool) -> None:
    """All that leaves is kept as it is, and stands right before the cache."""
    settings = {"n_token": 9, "n_compressed": 14, "ratio": 1, "compressor": compressor, "gradient": gradient}
    model, ids = compressive(settings), laws.text(2, 5 * T)
    cache = laws.builder(laws.nodes_of("cache"))(memory={"n_token": 23, "gradient": gradient}, memory_layers="all")
    got, expected = model(ids).logits, cache(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    same_gradients(model, got, expected, cache)


def naive(
    model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]], settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Logits (L, V) of one row, layer by layer and segment by segment; and the error of reconstruction.

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
        settings: Of the memory.
    """
    memories: Any = model.memory["compressive"]
    n_token, n_compressed, ratio = settings["n_token"], settings["n_compressed"], settings["ratio"]
    keep = (lambda cell: cell) if settings.get("gradient") else torch.Tensor.detach
    errors = []
    x = model.embedding(ids) * model.d_model**0.5
    for layer, memory in zip(model.layers, memories, strict=True):

        def cell_of(group: Tensor, memory: CompressiveMemory = memory) -> Tensor:
            if memory.conv is None:
                return group.mean(dim=0) if memory.compressor == "mean" else group.max(dim=0).values
            taps = [memory.conv.weight[..., i] @ token for i, token in enumerate(group)]
            return sum(taps) + memory.conv.bias  # type: ignore[return-value, operator]

        after: list[Tensor] = []
        cells: list[Tensor] = []
        begun = compressed = 0  # the first token of the cache, and how many have left it
        for s, (begin, end, fresh) in enumerate(segments):
            edge = begin if fresh else max(0, begin - model.overlap)
            before = [*cells, *(keep(token) for token in x[begun:edge])]
            seen = torch.stack([*before, *x[edge:end]])
            place, n_before = torch.arange(begin, end), len(before)
            places = torch.cat([
                -model.overlap - (n_token + ratio - 1) - torch.arange(len(cells), 0, -1),
                torch.arange(begun, edge) - edge - model.overlap,
                torch.arange(edge, end) - begin,
            ])  # fmt: skip
            mask = torch.cat([torch.ones(end - begin, n_before, dtype=torch.bool),
                              torch.arange(edge, end) <= place[:, None]], dim=1)  # fmt: skip
            after.append(attend(layer, x[begin:end], seen, mask, place - begin, places))
            # The segment is written: what the next one sees no more is in the cache.
            closes = s + 1 < len(segments) and segments[s + 1][2]
            written = end if closes else end - model.overlap
            left = []
            while written - begun >= n_token + ratio:
                left.append(x[begun : begun + ratio])
                begun += ratio
            cells = [*cells, *(keep(cell_of(keep(group))) for group in left)][-n_compressed:]
            compressed += len(left)
            error = x.new_zeros(())
            if left and memory.conv is not None:
                q, _, _ = (part.detach() for part in heads_of(layer, x[begin:end]))
                found = []
                made = torch.stack([cell_of(group.detach()) for group in left])
                for hidden in (torch.cat(left).detach(), made):
                    _, k, v = heads_of(layer, hidden)
                    found.append((q @ k.mT / q.shape[2] ** 0.5).softmax(dim=2) @ v)
                error = (found[0].detach() - found[1]).square().mean()
            errors.append(error)
        x = torch.cat(after)
    return model.norm(x) @ model.embedding.weight.T, torch.stack(errors).mean()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_outputs_gradients_and_errors_equal_the_naive_loop(settings: dict[str, Any]) -> None:
    model, ids = compressive(settings, n_layer=2), laws.text(2, 5 * T)
    segments = [(s * T, (s + 1) * T, s == 0) for s in range(5)]
    out = model(ids)
    logits, errors = (torch.stack(p) for p in zip(*(naive(model, row, segments, settings) for row in ids), strict=True))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=0)
    same_gradients(model, out.logits, logits)
    memories: Any = model.memory["compressive"]
    losses = memories[0].losses(out.trace["compressive"], torch.zeros(2))
    assert set(losses) == ({"reconstruction"} if memories[0].conv is not None else set())
    if losses:
        torch.testing.assert_close(losses["reconstruction"], errors.mean())
        maps = [p for memory in memories for p in memory.parameters()]
        grads = [torch.autograd.grad(part, maps) for part in (losses["reconstruction"], errors.mean())]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]], ids=str)
def test_it_goes_on_over_the_end_of_a_context_but_not_of_a_document(settings: dict[str, Any]) -> None:
    model, ids = compressive(settings, n_layer=2), laws.text(1, 5 * T)
    edges = [0, T, 2 * T, 3 * T - 2, 4 * T - 2, 4 * T + 3]  # the third segment ends early
    segments = [(edges[s], edges[s + 1], s in (0, 3)) for s in range(5)]
    expected, _ = naive(model, ids[0, : edges[-1]], segments, settings)
    told = model(ids[:, : edges[3]])
    state, asked = model.new_context(told.state), ids[:, edges[3] : edges[-1]]
    got = model(asked, state=state).logits
    torch.testing.assert_close(torch.cat([told.logits, got], dim=1)[0], expected, atol=1e-4, rtol=0)
    fresh = model(asked, state=state, reset=torch.tensor([True])).logits
    torch.testing.assert_close(fresh, model(asked).logits)


def memory_of(n_token: int, n_compressed: int, ratio: int, compressor: str) -> CompressiveMemory:
    return CompressiveMemory(1, Sizes(1, 1, 1, 3, 0, 10), n_token, n_compressed, ratio, compressor)  # type: ignore[arg-type]


def held(state: CompressiveState) -> list[list[float]]:
    return [part.hidden[0, part.full[0], 0].tolist() for part in (state.compressed, state.cache)]


def test_whole_groups_leave_however_many_tokens_a_segment_brings() -> None:
    for compressor, cells in {"mean": [2.5, 4.5, 6.5], "max": [3, 5, 7]}.items():
        memory = memory_of(2, 3, 2, compressor)
        state, seen = memory.init_state(1), []
        for tokens, n_valid in (([0, 1, 2], 3), ([3, 9, 9], 1), ([4, 5, 6], 3), ([7, 8, 9], 3)):
            hidden = torch.tensor(tokens).float()[None, :, None]
            state, _ = memory.write(segment_of(hidden, [n_valid]), state)
            seen.append(held(state))
        first = [0.5] if compressor == "mean" else [1]
        assert seen[0] == [[], [0, 1, 2]]  # one of three is too much, but no group
        assert seen[1] == [first, [2, 3]]
        assert seen[2] == [[*first, cells[0]], [4, 5, 6]]
        assert seen[3] == [cells, [8, 9]]  # the oldest cell is gone


@pytest.mark.parametrize("padding", [0.0, 9.0])
def test_the_error_by_hand_of_tokens_alone(padding: float) -> None:
    """The tokens 1 and 5 leave for their mean, 3. The token 3 finds 5 among them; what is padding asks for nothing."""
    memory = memory_of(2, 3, 2, "conv")
    state, trace = memory.init_state(1), {}

    def maps(hidden: Tensor) -> Heads:
        return Heads(*[hidden[:, None]] * 3)

    for tokens, n_valid in (([1, 5, 2], 3), ([3, padding, padding], 1)):
        hidden = torch.tensor(tokens).float()[None, :, None]
        state, trace = memory.write(segment_of(hidden, [n_valid])._replace(heads=maps(hidden), maps=maps), state)
    torch.testing.assert_close(trace["reconstruction"], torch.tensor([4.0]), atol=1e-3, rtol=0)


def test_a_convolution_begins_as_the_mean() -> None:
    memory = CompressiveMemory(6, Sizes(6, 2, 1, 3, 0, 10), ratio=3)
    groups = torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(memory.compress(groups), groups.mean(dim=2))


def test_the_compressor_learns_from_the_error_alone_and_the_error_teaches_it_alone() -> None:
    model, ids = compressive(FEW), laws.text(2, 5 * T)
    memory: Any = model.memory["compressive"]
    own = {f"memory.compressive.{name}" for name, _ in memory.named_parameters()}
    out = model(ids)
    error = memory[0].losses(out.trace["compressive"], torch.zeros(2))["reconstruction"]
    for loss, learns in ((error, own), (out.logits.square().sum(), {n for n, _ in model.named_parameters()} - own)):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == learns


def test_error_and_its_gradient_are_those_of_compressive_transformer_pytorch() -> None:
    theirs = pytest.importorskip("compressive_transformer_pytorch.compressive_transformer_pytorch")
    torch.manual_seed(0)
    other = theirs.SelfAttention(12, seq_len=8, mem_len=8, cmem_len=6, cmem_ratio=4, heads=3).train()
    memory = CompressiveMemory(12, Sizes(12, 3, 1, 8, 0, 10), n_token=8, n_compressed=6, ratio=4)
    memory.conv.load_state_dict(other.compress_mem_fn.conv.state_dict())  # type: ignore[union-attr]

    def maps(hidden: Tensor) -> Heads:
        parts = other.to_q(hidden), *other.to_kv(hidden).chunk(2, dim=-1)
        return Heads(*(part.unflatten(2, (3, 4)).transpose(1, 2) for part in parts))

    texts = torch.randn(4, 2, 8, 12)
    state, kept = memory.init_state(2), None
    for i, x in enumerate(texts):
        segment: Segment = segment_of(x)._replace(heads=maps(x), maps=maps)
        state, trace = memory.write(segment, state)
        _, kept, error = other(x, memories=kept)
        torch.testing.assert_close(state.cache.hidden[:, -8:], kept.mem)
        n_cell = kept.compressed_mem.shape[1]
        assert n_cell == min(6, 2 * i)
        torch.testing.assert_close(state.compressed.hidden[:, 6 - n_cell :], kept.compressed_mem.detach())
        if i:
            torch.testing.assert_close(trace["reconstruction"].mean(), error)
            ours = torch.autograd.grad(trace["reconstruction"].mean(), list(memory.parameters()))
            for a, b in zip(ours, torch.autograd.grad(error, list(other.compress_mem_fn.parameters())), strict=True):
                torch.testing.assert_close(a, b)


@torch.no_grad()
def test_reads_off_is_attention_alone() -> None:
    model, none, ids = compressive(FEW), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)


def test_what_it_costs() -> None:
    model = compressive(FEW)
    d_model, n_cell = model.d_model, 7 + 3 + 3
    assert [n_byte(part) for part in model.init_state(1).memory["compressive"]] == [n_cell * (4 * d_model + 1)] * 3
    memory: Any = model.memory["compressive"]
    assert memory[0].flops_per_token() == 4 * n_cell * d_model + 6 * n_cell * d_model**2 // T + 8 * d_model**2
    assert sum(p.numel() for p in memory[0].parameters()) == 4 * d_model**2 + d_model
    assert not list(compressive(FEW | {"compressor": "mean"}).memory.parameters())


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "n_token=0": "n_token must be at least 1, got 0",
        "n_compressed=0": "n_compressed must be at least 1, got 0",
        "ratio=0": "ratio must be at least 1, got 0",
        "compressor=sum": "compressor must be 'conv', 'mean' or 'max', got 'sum'",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.compressive\.{message}"):
            build("memory=compressive", f"memory.compressive.{setting}", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'compressive' needs .* of attention.* choose model=lmcode"):
        build("model=lstm", "memory=compressive", "data.tokenizer.kind=byte")


MANY = [laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.schedules_agree, laws.contexts,
        laws.empty_segments, laws.resets, laws.every_parameter_learns, laws.round_trip]  # fmt: skip


@pytest.mark.parametrize(
    ("law", "settings"),
    [(law, FEW) for law in MANY]
    + [
        (law, FEW | {"n_compressed": 9, "compressor": "max", "gradient": True})
        for law in (laws.schedules_agree, laws.reach)
    ],
)
def test_laws_hold_where_most_is_compressed(law: Callable[[laws.Make], None], settings: dict[str, Any]) -> None:
    law(lambda memory=None, **model: MAKE(memory=settings | (memory or {}), **model))


def test_what_is_compressed_is_of_use() -> None:
    """What is asked for left the cache of four tokens before."""
    make = laws.builder(laws.nodes_of("compressive"), shrink=False)
    few = {"n_token": 4, "n_compressed": 8, "ratio": 2}
    laws.useful(lambda memory=None, *args, **model: make(few | (memory or {}), *args, **model))
