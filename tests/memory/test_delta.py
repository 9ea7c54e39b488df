"""Matrix memory against token loops, formulas and values by hand."""

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.memory import delta
from memlm.memory.contract import Flags, Segment
from memlm.memory.delta import DeltaMemory, DeltaState, chunks_of, decay_between
from memlm.memory.state import n_byte
from memlm.models.mixers import Done
from tests.laws.test_laws import LAWS
from tests.memory.segments import segment_of

RULES = [
    {"rule": rule, "decay": decay, "within": within}
    for rule, decay, within in itertools.product(("delta", "linear"), (False, True), (False, True))
]
# Beside the default, which tests/laws tests: each rule in both forms, two of them with decay.
OTHERS: list[dict[str, Any]] = [
    {"decay": True, "within": True},
    {"rule": "linear", "within": True},
    {"rule": "linear", "decay": True},
]
D = 12


# --- the rule --------------------------------------------------------------------------------------------------------


def token_loop(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, decay: Tensor | None, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule for one head, token after token: what each finds once it has written, and the matrix at the end."""
    found = []
    for t in range(len(k)):
        if decay is not None:
            matrix = decay[t].exp() * matrix
        new = v[t] if rate is None else rate[t] * (v[t] - matrix.T @ k[t])
        matrix = matrix + torch.outer(k[t], new)
        found.append(matrix.T @ q[t])
    return torch.stack(found), matrix


def in_chunk(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, decay: Tensor | None, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as one chunk."""
    chunk = chunks_of(k, v, rate, decay)
    written = chunk.written(matrix)
    return chunk.found(q, matrix, written), chunk.after(matrix, written)


def inputs_of(n_token: int, dtype: torch.dtype, delta: bool, decay: str, seed: int = 0) -> list[Tensor | None]:
    """Queries, keys, values, rates, decays and a matrix; decays leave little, nearly all, or something in between."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    q, k, v = F.normalize(normal(n_token, 5), dim=1), F.normalize(normal(n_token, 5), dim=1), normal(n_token, 4)
    rate = torch.rand(n_token, generator=draw, dtype=torch.float64) * 2 if delta else None
    share = torch.rand(n_token, generator=draw, dtype=torch.float64)
    logs = {
        "none": None,
        "some": -share,
        "near 1": -1e-6 * share,
        "near 0": -1000 * share,
        "both": torch.where(share < 0.2, -1e5, -1e-4 * share),
    }[decay]
    parts = [q, k, v, rate, logs, normal(5, 4)]
    return [None if part is None else part.to(dtype).requires_grad_() for part in parts]


@pytest.mark.parametrize("decay", ["none", "some", "near 1", "near 0", "both"])
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("n_token", [1, 2, 17, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-12)])
def test_a_chunk_is_the_token_loop(n_token: int, delta: bool, decay: str, dtype: torch.dtype, tolerance: float) -> None:
    results = []
    for function in (token_loop, in_chunk):
        inputs = inputs_of(n_token, dtype, delta, decay)
        outputs = function(*inputs)
        probe = torch.Generator().manual_seed(1)
        loss = sum(
            (out * torch.randn(out.shape, generator=probe, dtype=torch.float64).to(dtype)).sum() for out in outputs
        )
        asked = [part for part in inputs if part is not None]
        results.append([*outputs, *torch.autograd.grad(loss, asked)])
    for loop, chunk in zip(*results, strict=True):
        scale = max(1.0, loop.abs().max().item())
        assert (chunk - loop).abs().max() <= tolerance * scale


def test_decays_are_summed_between_tokens_alone() -> None:
    """A token that leaves nothing takes no digits from what comes after it."""
    logs = torch.tensor([-0.5, -1e30, -0.25, -0.125])
    left = decay_between(logs)
    never = -torch.inf
    rows = [[0, never, never, never], [-1e30, 0, never, never], [-1e30, -0.25, 0, never], [-1e30, -0.375, -0.125, 0]]
    expected = torch.tensor(rows).exp()
    assert torch.equal(left, expected)


def test_linear_attention_is_the_causal_sum() -> None:
    q, k, v, _, _, matrix = inputs_of(20, torch.float64, False, "none")
    found, after = in_chunk(q, k, v, None, None, torch.zeros_like(matrix))
    for t in range(20):
        torch.testing.assert_close(found[t], sum((q[t] @ k[i]) * v[i] for i in range(t + 1)))
    torch.testing.assert_close(after, sum(torch.outer(k[i], v[i]) for i in range(20)))


def test_the_delta_rule_by_hand() -> None:
    """Keys (1, 0) and (0.6, 0.8), rates 1 and 1/2: the second token finds 0.6 * 2 under its key and wants 3."""
    k, v = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[2.0], [3.0]])
    found, after = in_chunk(k, k, v, torch.tensor([1.0, 0.5]), None, torch.zeros(2, 1))
    torch.testing.assert_close(found, torch.tensor([[2.0], [2.1]]))
    torch.testing.assert_close(after, torch.tensor([[2.54], [0.72]]))
    # With half of the matrix left before the second token it finds 0.6, and writes 1.2 under its key.
    _, after = in_chunk(k, k, v, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]).log(), torch.zeros(2, 1))
    torch.testing.assert_close(after, torch.tensor([[1.72], [0.96]]))


def test_a_key_that_is_written_again_holds_the_new_value() -> None:
    k, v = torch.eye(4)[[0, 1, 0]], torch.tensor([[1.0], [2.0], [5.0]])
    _, replaced = in_chunk(k, k, v, torch.ones(3), None, torch.zeros(4, 1))
    _, added = in_chunk(k, k, v, None, None, torch.zeros(4, 1))
    assert replaced[:, 0].tolist() == [5, 2, 0, 0]
    assert added[:, 0].tolist() == [6, 2, 0, 0]


@pytest.mark.parametrize("gated", [False, True])
def test_a_chunk_is_the_loop_of_flash_linear_attention(gated: bool) -> None:
    pytest.importorskip("einops")
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    name = "gated_delta_rule" if gated else "delta_rule"
    file = Path(found.submodule_search_locations[0]) / "ops" / name / "naive.py"  # without its kernels
    spec = importlib.util.spec_from_file_location(f"fla_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    q, k, v, rate, decay, _ = (part.detach()[None, :, None] for part in inputs_of(40, torch.float32, True, "some"))
    if gated:
        theirs = source.naive_recurrent_gated_delta_rule(q, k, v, rate, decay, scale=1.0)[0]
    else:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        theirs = source.delta_rule_recurrence(q * 5**0.5, k, v, rate.transpose(1, 2))[0].transpose(1, 2)
    inputs = inputs_of(40, torch.float32, True, "some" if gated else "none")
    inputs[3] = rate[0, :, 0]
    ours, _ = in_chunk(*inputs[:5], torch.zeros(5, 4))
    torch.testing.assert_close(ours, theirs[0, :, 0], atol=1e-5, rtol=1e-4)


# --- the memory ------------------------------------------------------------------------------------------------------


def memory_of(dtype: torch.dtype = torch.float32, **settings: Any) -> DeltaMemory:
    torch.manual_seed(0)
    memory = DeltaMemory(D, **({"n_head": 3, "d_key": 5, "d_value": 4} | settings))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            parameter.data = parameter.data.to(dtype)
    return memory


def naive_scan(memory: DeltaMemory, hidden: Tensor, window: Segment, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to every cell, and the matrices after the window: row by row, head by head, token by token."""
    n_segment, n_token = window.n_segment, window.segment_len
    outputs, finals = [], []
    for b in range(len(hidden)):
        held, found = list(matrix[b]), []
        for s in range(n_segment):
            if window.reset is not None and window.reset[b, s]:
                held = [torch.zeros_like(part) for part in held]
            begun = after = held
            for t in range(s * n_token, (s + 1) * n_token):
                x = memory.norm(hidden[b, t])
                q, k = (F.silu(to(x).view(memory.n_head, -1)) for to in (memory.to_query, memory.to_key))
                if memory.norm_keys:
                    q, k = (part / part.norm(dim=1, keepdim=True) for part in (q, k))
                v = memory.to_value(x).view(memory.n_head, -1)
                if window.valid[b, t]:
                    rate = None if memory.to_rate is None else memory.rate_max * memory.to_rate(x).sigmoid()
                    decay = None
                    if memory.to_step is not None:
                        decay = -memory.log_decay.exp() * F.softplus(memory.to_step(x))
                    after = [
                        token_loop(
                            q[h, None], k[h, None], v[h, None], None if rate is None else rate[h, None],
                            None if decay is None else decay[h, None], after[h],
                        )[1]
                        for h in range(memory.n_head)
                    ]  # fmt: skip
                read = torch.stack([part.T @ q[h] for h, part in enumerate(after if memory.within else begun)])
                read = memory.found_norm(read).flatten() * F.silu(memory.to_gate(x))
                found.append(memory.to_output(read))
            if window.complete[b, s]:
                held = after
        outputs.append(torch.stack(found))
        finals.append(torch.stack(held))
    return torch.stack(outputs), torch.stack(finals)


def window_of(n_token: int, dtype: torch.dtype) -> tuple[Segment, Tensor, Tensor]:
    """Three rows of three segments: all complete; a document that ends in padding, and a new one; one left open."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 3 * n_token, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    matrix = torch.randn(3, 3, 5, 4, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    length = torch.tensor([[n_token] * 3, [n_token, 2, n_token], [n_token, n_token, n_token - 3]])
    yes, no = torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
    reset, complete = no.clone(), yes.clone()
    reset[1, 2], complete[2, 2] = True, False
    window = segment_of(hidden)._replace(
        valid=(torch.arange(n_token) < length[..., None]).flatten(1),
        flags=Flags(complete, ~reset, no, reset, no.long(), no.long()),
        columns=slice(0, n_token),
    )
    return window, hidden, matrix


@pytest.mark.parametrize(
    "settings", [*RULES, {"rule": "linear", "norm_keys": False}, {"rate_max": 2.0, "within": True}]
)
@pytest.mark.parametrize(("n_token", "chunk"), [(9, 64), (9, 4), (8, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-11)])
def test_a_window_is_the_token_loop(
    settings: dict[str, Any], n_token: int, chunk: int, dtype: torch.dtype, tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(delta, "CHUNK", chunk)
    memory, results = memory_of(dtype, **settings), []
    for naive in (True, False):
        window, hidden, matrix = window_of(n_token, dtype)
        if naive:
            out, after = naive_scan(memory, hidden, window, matrix)
        else:
            scanned = memory.scan(hidden, window, DeltaState(matrix), Done())
            assert scanned.read is not None
            out, after = scanned.read.value, scanned.state.matrix
        out = out[window.valid]
        probe = torch.Generator().manual_seed(2)
        loss = sum(
            (part * torch.randn(part.shape, generator=probe, dtype=torch.float64).to(dtype)).sum()
            for part in (out, after)
        )
        grads = torch.autograd.grad(loss, [hidden, matrix, *memory.parameters()])
        results.append([out, after, *grads])
    names = ["outputs", "states", "hidden", "matrix", *(name for name, _ in memory.named_parameters())]
    for name, loop, fast in zip(names, *results, strict=True):
        scale = max(1.0, loop.abs().max().item())
        assert (fast - loop).abs().max() <= tolerance * scale, name
    if memory.within:
        return
    window, hidden, matrix = window_of(n_token, dtype)
    slow = super(DeltaMemory, memory).scan(hidden, window, DeltaState(matrix), Done())
    torch.testing.assert_close(slow.read.value[window.valid], results[1][0], atol=tolerance, rtol=tolerance)


def test_chunks_have_at_most_64_tokens() -> None:
    for n_token, expected in ((1, (1, 1)), (64, (1, 64)), (65, (2, 33)), (128, (2, 64)), (200, (4, 50))):
        cut = memory_of()._cut(torch.zeros(2, 3 * n_token, 3, 5), 3)
        assert cut.shape == (2, 3, expected[0], 3, expected[1], 5)


@torch.no_grad()
@pytest.mark.parametrize("within", [False, True])
def test_an_open_segment_is_written_once_it_is_complete(within: bool) -> None:
    make = laws.builder(laws.nodes_of("delta"))
    model = make(memory={"within": within})
    ids, state = laws.text(2, laws.T + 2), None
    for t in range(laws.T - 1):
        state = model(ids[:, t : t + 1], state=state).state
        assert not state.memory["delta"][0].matrix.any()
    held = model(ids[:, laws.T - 1 : laws.T], state=state).state.memory["delta"][0].matrix
    torch.testing.assert_close(held, model(ids).state.memory["delta"][0].matrix)
    closed = model.new_context(state).memory["delta"][0].matrix  # without its last token
    assert closed.any()
    assert not torch.equal(closed, held)


@torch.no_grad()
def test_tokens_read_their_own_segment_only_within() -> None:
    x = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))
    for within in (False, True):
        memory = memory_of(within=within)
        fresh = memory.init_state(2)
        assert memory.scan(x, segment_of(x), fresh, Done()).read.value.any() == within
        unwritten = memory.scan(x, segment_of(x), fresh, Done(), write=False)
        assert unwritten.read.value.any() == within  # what stands in the segment is its context
        assert not unwritten.state.matrix.any()
        assert memory.scan(x, segment_of(x), fresh, Done(), read=False).read is None


@torch.no_grad()
def test_the_matrix_is_worked_out_in_full_precision_under_autocast() -> None:
    memory = memory_of(decay=True, within=True)
    x = torch.randn(2, 70, D, generator=torch.Generator().manual_seed(0))
    exact = memory.scan(x, segment_of(x), memory.init_state(2), Done())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = memory.scan(x, segment_of(x), memory.init_state(2), Done())
        read = memory.read(x, mixed.state)
    assert mixed.state.matrix.dtype == torch.float32
    assert read.value.isfinite().all()
    torch.testing.assert_close(mixed.state.matrix, exact.state.matrix, atol=0.05, rtol=0.05)


def test_what_it_costs() -> None:
    memory = DeltaMemory(D, n_head=3, d_key=5, d_value=4)
    assert n_byte(memory.init_state(2)) == 2 * 3 * 5 * 4 * 4
    maps = 2 * sum(parameter.numel() for parameter in memory.parameters())
    # per head: read, read under the key and write of the matrix; keys with keys and half a triangle, 64 tokens each
    assert memory.flops_per_token() == maps + 2 * 3 * (3 * 5 * 4 + 64 * (5 + (5 + 4) // 2))
    linear = DeltaMemory(D, n_head=3, d_key=5, d_value=4, rule="linear", within=True)
    maps = 2 * sum(parameter.numel() for parameter in linear.parameters())
    assert linear.flops_per_token() == maps + 2 * 3 * (2 * 5 * 4 + 64 * (5 + 4))


@torch.no_grad()
def test_heads_forget_at_different_paces_at_first() -> None:
    memory = DeltaMemory(D, n_head=3, decay=True)
    left = -memory.log_decay.exp() * F.softplus(memory.to_step(torch.zeros(D)))
    torch.testing.assert_close(left, torch.tensor([-0.001, -0.01, -0.1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"d_key": 0}, "d_key must be at least 1, got 0"),
        ({"d_value": -1}, "d_value must be at least 1, got -1"),
        ({"rule": "hebb"}, "rule must be 'linear' or 'delta', got 'hebb'"),
        ({"rate_max": 0.0}, r"rate_max must be in \(0, 2\], got 0"),
        ({"rate_max": 2.1}, r"rate_max must be in \(0, 2\], got 2.1"),
        ({"norm_keys": False}, "norm_keys must be true with rule 'delta'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaMemory(D, **settings)


# --- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", OTHERS, ids=str)
@pytest.mark.parametrize("law", [law for law in [*LAWS, laws.closed_once, laws.admits] if law is not laws.inspectable])
def test_laws_hold_for_every_rule(
    law: Callable[[laws.Make], None], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "CHUNK", 5)  # segments of 12 tokens are three chunks
    make = laws.builder(laws.nodes_of("delta"))
    law(lambda memory=None, **model: make(memory=settings | (memory or {}), **model))


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_every_rule_is_useful_and_bounded(settings: dict[str, Any]) -> None:
    for law, shrink in ((laws.useful, False), (partial(laws.bounded, n_write=300), True)):
        make = laws.builder(laws.nodes_of("delta"), shrink=shrink)
        law(lambda memory=None, make=make, **model: make(memory=settings | (memory or {}), **model))
