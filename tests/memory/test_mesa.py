"""The best linear memory against exact solutions, recursive least squares and values by hand."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.memory import matrix as matrices
from memlm.memory.chunks import chunks_of
from memlm.memory.contract import Flags, Segment, Sizes
from memlm.memory.matrix import MatrixState
from memlm.memory.mesa import Kalman, MesaMemory, Sums, conjugate_gradients, solve
from memlm.memory.state import n_byte
from memlm.models.mixers import Done
from tests.laws.test_laws import LAWS
from tests.memory.segments import segment_of
from tests.memory.test_delta import naive_of_fla

pytestmark = pytest.mark.slow

FORMS: list[dict[str, Any]] = [{"form": "mesa"}, {"form": "mesa", "decay": "none"}, {"form": "kalman", "decay": "none"}]
RULES = [form | {"within": within} for form, within in itertools.product(FORMS, (False, True))]
# Beside the default, which tests/laws tests.
OTHERS: list[dict[str, Any]] = [
    {"within": True},
    {"form": "kalman", "decay": "none"},
    {"form": "kalman", "decay": "none", "within": True},
]
D, K, V = 12, 5, 4
RIDGE = 0.25
SIZES = Sizes(d_model=D, n_head=2, n_layer=2, segment_len=8, overlap=0, n_vocab=9)


# --- the rule --------------------------------------------------------------------------------------------------------


def by_solving(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, decay: Tensor | None, matrix: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """One head, token by token: the sums [G, H], and what each token finds by an exact solution with them."""
    found = []
    for t in range(len(k)):
        if decay is not None:
            matrix = decay[t].exp() * matrix
        matrix = matrix + rate[t] * torch.outer(k[t], torch.cat([v[t], k[t]]))
        solution = torch.linalg.solve(matrix[:, -len(k[t]) :] + ridge * torch.eye(len(k[t])).to(k), q[t])
        found.append(matrix[:, : -len(k[t])].T @ solution)
    return torch.stack(found), matrix


def by_least_squares(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, decay: None, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """One head, token by token: recursive least squares of the solution and the covariance [M, U]."""
    solution, covariance = matrix[:, : v.shape[1]], matrix[:, v.shape[1] :]
    found = []
    for t in range(len(k)):
        gain = covariance @ k[t] / (k[t] @ covariance @ k[t] + 1 / rate[t])
        solution = solution + torch.outer(gain, v[t] - solution.T @ k[t])
        covariance = covariance - torch.outer(gain, covariance @ k[t])
        found.append(solution.T @ q[t])
    return torch.stack(found), torch.cat([solution, covariance], dim=1)


def sums_in_chunk(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, decay: Tensor | None, matrix: Tensor, n_step: int = 3 * K
) -> tuple[Tensor, Tensor]:
    """The sums of one chunk."""
    decay = None if decay is None else decay[:, None]
    chunks = chunks_of(k, rate[:, None] * torch.cat([v, k], dim=1), None, decay)
    written = chunks.written(matrix)
    return Sums(chunks, q, RIDGE, n_step).found(matrix, written), chunks.after(matrix, written)


def kalman_in_chunk(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, decay: None, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The Kalman form of one chunk."""
    root = rate.sqrt()[:, None]
    chunk = Kalman(root * k, torch.cat([root * v, torch.zeros_like(k)], dim=1), q)
    written = chunk.written(matrix)
    return chunk.found(matrix, written), chunk.after(matrix, written)


def inputs_of(n_token: int, dtype: torch.dtype, decay: bool, covariance: bool) -> list[Tensor | None]:
    """Queries, keys, values, rates, decays, and a matrix that earlier tokens left."""
    draw = torch.Generator().manual_seed(n_token)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    q, k, v = F.normalize(normal(n_token, K), dim=1), F.normalize(normal(n_token, K), dim=1), normal(n_token, V)
    rate, share = torch.rand(2, n_token, generator=draw, dtype=torch.float64)
    earlier = normal(K, 7)
    right = torch.linalg.inv(earlier @ earlier.T / 7 + RIDGE * torch.eye(K)) if covariance else earlier @ earlier.T / 7
    parts = [q, k, v, rate, -share if decay else None, torch.cat([normal(K, V), right], dim=1)]
    return [None if part is None else part.to(dtype).requires_grad_() for part in parts]


@pytest.mark.parametrize(
    ("loop", "chunk", "decay"),
    [
        (by_solving, sums_in_chunk, False),
        (by_solving, sums_in_chunk, True),
        (by_least_squares, kalman_in_chunk, False),
    ],
)
@pytest.mark.parametrize("n_token", [1, 2, 16, 32])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-12)])
def test_a_chunk_is_the_token_loop(
    loop: Callable[..., Any], chunk: Callable[..., Any], decay: bool, n_token: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs, states and gradients: those through the steps of a solution are those of the exact one."""
    results = []
    for function in (loop, chunk):
        inputs = inputs_of(n_token, dtype, decay, covariance=loop is by_least_squares)
        outputs = function(*inputs)
        probe = torch.Generator().manual_seed(1)
        loss = sum(
            (out * torch.randn(out.shape, generator=probe, dtype=torch.float64).to(dtype)).sum() for out in outputs
        )
        asked = [part for part in inputs if part is not None]
        grads = list(torch.autograd.grad(loss, asked))
        grads[-1] = torch.cat([grads[-1][:, :V], grads[-1][:, V:] + grads[-1][:, V:].T], dim=1)  # it is symmetric
        results.append([*outputs, *grads])
    for expected, ours in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def test_both_forms_are_the_ridge_regression_of_all_tokens() -> None:
    q, k, v, rate, _, _ = inputs_of(32, torch.float64, decay=False, covariance=False)
    zeros, eye = torch.zeros(K, V + K, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    expected = torch.linalg.solve(k.T @ (rate[:, None] * k) + RIDGE * eye, k.T @ (rate[:, None] * v))
    found, after = sums_in_chunk(q, k, v, rate, None, zeros)
    torch.testing.assert_close(found[-1], q[-1] @ expected)
    found_kalman, after_kalman = kalman_in_chunk(q, k, v, rate, None, torch.cat([zeros[:, :V], eye / RIDGE], dim=1))
    torch.testing.assert_close(after_kalman[:, :V], expected)
    torch.testing.assert_close(found_kalman, found)
    torch.testing.assert_close(after_kalman[:, V:], torch.linalg.inv(after[:, V:] + RIDGE * eye))


def test_by_hand() -> None:
    """Key 1, values 2 and 5, rates 1/2 and 1, ridge 1/4: (1/2 2 + 5) / (1/2 + 1 + 1/4)."""
    one = torch.ones(2, 1)
    v, rate = torch.tensor([[2.0], [5.0]]), torch.tensor([0.5, 1.0])
    expected = torch.tensor([[1 / 0.75], [6 / 1.75]])
    torch.testing.assert_close(sums_in_chunk(one, one, v, rate, None, torch.zeros(1, 2))[0], expected)
    found, after = kalman_in_chunk(one, one, v, rate, None, torch.tensor([[0.0, 4.0]]))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after, torch.tensor([[6 / 1.75, 1 / 1.75]]))


def test_the_covariance_stays_right_over_ten_thousand_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    k, v = F.normalize(torch.randn(10_016, 16, generator=draw), dim=1), torch.randn(10_016, V, generator=draw)
    matrix = torch.cat([torch.zeros(16, V), torch.eye(16) / RIDGE], dim=1)
    for keys, values in zip(k.split(32), v.split(32), strict=True):
        chunk = Kalman(keys, torch.cat([values, torch.zeros_like(keys)], dim=1), None)
        matrix = chunk.after(matrix, chunk.written(matrix))
    k, v = k.double(), v.double()
    covariance = torch.linalg.inv(k.T @ k + RIDGE * torch.eye(16))
    torch.testing.assert_close(matrix[:, V:].double(), covariance, atol=1e-5 * covariance.max().item(), rtol=1e-4)
    torch.testing.assert_close(matrix[:, :V].double(), covariance @ (k.T @ v), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_a_chunk_is_mesanet_of_flash_linear_attention(exact: bool) -> None:
    naive = naive_of_fla("mesa_net")
    draw = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(1, 32, 1, K, generator=draw), dim=-1) for _ in range(2))
    v, rate = torch.randn(1, 32, 1, K, generator=draw), torch.rand(1, 32, 1, generator=draw)
    decay, ridge = -torch.rand(1, 32, 1, generator=draw), torch.full((1, K), RIDGE)
    if exact:
        theirs = naive.naive_mesa_net_exact(q, k, v, decay, ridge, rate)[0][0, :, 0]
    else:
        theirs = naive.naive_mesa_net_CG(q, k, v, decay, ridge, rate, 16)[0][0, :, 0]
    parts = [part[0, :, 0] for part in (q, k, v, rate, decay)]
    ours, _ = sums_in_chunk(*parts, torch.zeros(K, 2 * K))
    tolerance = 1e-5 if exact else 2e-2  # they add 1e-5 to what they divide by, which tells near the solution
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_as_many_steps_as_channels_solve_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(3, 6, 6, generator=draw, dtype=torch.float64)
    matrix, b = left @ left.mT + torch.eye(6), torch.randn(3, 7, 6, generator=draw, dtype=torch.float64)
    b[0, 0] = 0
    exact = torch.linalg.solve(matrix, b.mT).mT
    errors = [(conjugate_gradients(lambda x: x @ matrix, b, n) - exact).abs().max().item() for n in (1, 3, 6, 60)]
    assert errors[0] > errors[1] > 1e-3
    assert max(errors[2:]) < 1e-12


def test_gradients_are_those_of_the_solution_where_steps_are_few() -> None:
    """One step from a matrix that one step solves with; the steps themselves would have other gradients."""
    scale = torch.tensor(2.0, requires_grad=True)
    b = torch.tensor([[1.0, 3.0]], requires_grad=True)
    x = solve(lambda x: scale * x, b, 1)
    torch.testing.assert_close(x, b / 2)
    of_scale, of_b = torch.autograd.grad(x.sum(), [scale, b])
    torch.testing.assert_close(of_scale, torch.tensor(-1.0))
    torch.testing.assert_close(of_b, torch.full((1, 2), 0.5))


# --- the memory ------------------------------------------------------------------------------------------------------


def memory_of(dtype: torch.dtype = torch.float32, **settings: Any) -> MesaMemory:
    torch.manual_seed(0)
    memory = MesaMemory(D, SIZES, **({"n_head": 3, "d_key": K, "d_value": V, "ridge": RIDGE, "conv": 1} | settings))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            parameter.data = parameter.data.to(dtype)
    return memory


def naive_scan(memory: MesaMemory, hidden: Tensor, window: Segment, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to every cell, and the matrices after the window: row by row, head by head, token by token."""
    loop = by_least_squares if memory.form == "kalman" else partial(by_solving, ridge=memory.ridge)
    outputs, finals = [], []
    for b in range(len(hidden)):
        held, found = list(matrix[b]), []
        for s in range(window.n_segment):
            if window.reset is not None and window.reset[b, s]:
                held = list(memory.init_state(1).matrix[0].to(hidden))
            begun = after = held
            for t in range(s * window.segment_len, (s + 1) * window.segment_len):
                x = memory.norm(hidden[b, t])
                q, k = (F.silu(to(x).view(memory.n_head, -1)) for to in (memory.to_query, memory.to_key))
                q, k = (part / part.norm(dim=1, keepdim=True) for part in (q, k))
                v, rate = memory.to_value(x).view(memory.n_head, -1), memory.to_rate(x).sigmoid()
                if window.valid[b, t]:
                    decay = None
                    if memory.to_step is not None:
                        decay = -memory.log_decay.exp() * F.softplus(memory.to_step(x))
                    after = [
                        loop(q[h, None], k[h, None], v[h, None], rate[h, None],
                             None if decay is None else decay[h, None], after[h])[1]
                        for h in range(memory.n_head)
                    ]  # fmt: skip
                now = after if memory.within else begun
                if memory.form == "kalman":
                    read = torch.stack([part[:, :V].T @ q[h] for h, part in enumerate(now)])
                else:
                    ridge = memory.ridge * torch.eye(K).to(q)
                    read = torch.stack(
                        [part[:, :V].T @ torch.linalg.solve(part[:, V:] + ridge, q[h]) for h, part in enumerate(now)]
                    )
                read = memory.found_norm(read).flatten() * F.silu(memory.to_gate(x))
                found.append(memory.to_output(read))
            if window.complete[b, s]:
                held = after
        outputs.append(torch.stack(found))
        finals.append(torch.stack(held))
    return torch.stack(outputs), torch.stack(finals)


def window_of(n_token: int, dtype: torch.dtype, covariance: bool) -> tuple[Segment, Tensor, Tensor]:
    """Three rows of three segments: all complete; a document that ends in padding, and a new one; one left open."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 3 * n_token, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    earlier = torch.randn(3, 3, K, 7, generator=draw, dtype=torch.float64)
    right = earlier @ earlier.mT / 7
    right = torch.linalg.inv(right + RIDGE * torch.eye(K)) if covariance else right
    left = torch.randn(3, 3, K, V, generator=draw, dtype=torch.float64)
    matrix = torch.cat([left, right], dim=-1).to(dtype).requires_grad_()
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


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize(("n_token", "chunk"), [(9, 32), (8, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_a_window_is_the_token_loop(
    settings: dict[str, Any], n_token: int, chunk: int, dtype: torch.dtype, tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(matrices, "CHUNK", chunk)
    memory, results = memory_of(dtype, **settings), []
    covariance = memory.form == "kalman"
    for naive in (True, False):
        window, hidden, matrix = window_of(n_token, dtype, covariance)
        if naive:
            out, after = naive_scan(memory, hidden, window, matrix)
        else:
            scanned = memory.scan(hidden, window, MatrixState(matrix), Done())
            assert scanned.read is not None
            out, after = scanned.read.value, scanned.state.matrix
        out = out[window.valid]
        probe = torch.Generator().manual_seed(2)
        loss = sum(
            (part * torch.randn(part.shape, generator=probe, dtype=torch.float64).to(dtype)).sum()
            for part in (out, after)
        )
        grads = list(torch.autograd.grad(loss, [hidden, matrix, *memory.parameters()]))
        grads[1] = torch.cat([grads[1][..., :V], grads[1][..., V:] + grads[1][..., V:].mT], dim=-1)  # it is symmetric
        results.append([out, after, *grads])
    names = ["outputs", "states", "hidden", "matrix", *(name for name, _ in memory.named_parameters())]
    for name, loop, fast in zip(names, *results, strict=True):
        scale = max(1.0, loop.abs().max().item())
        assert (fast - loop).abs().max() <= tolerance * scale, name
    if memory.within:
        return
    window, hidden, matrix = window_of(n_token, dtype, covariance)
    slow = super(MesaMemory, memory).scan(hidden, window, MatrixState(matrix), Done())
    torch.testing.assert_close(slow.read.value[window.valid], results[1][0], atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_an_empty_memory_says_nothing(settings: dict[str, Any]) -> None:
    memory = memory_of(**settings)
    x = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))
    fresh = memory.init_state(2)
    assert not memory.read(x, memory.prepare(fresh)).value.any()
    assert memory.scan(x, segment_of(x), fresh, Done()).read.value.any() == memory.within


@torch.no_grad()
def test_what_was_told_once_is_found_better_than_by_sums_or_by_the_delta_rule() -> None:
    """As many pairs as a key has channels, keys at random: sums blur them, the delta rule blurs the first ones."""
    draw = torch.Generator().manual_seed(0)
    k, v = F.normalize(torch.randn(32, 32, generator=draw), dim=1), torch.randn(32, 8, generator=draw)
    chunk = Kalman(k, torch.cat([v, torch.zeros_like(k)], dim=1), None)
    start = torch.cat([torch.zeros(32, 8), torch.eye(32) / 0.01], dim=1)
    best = k @ chunk.after(start, chunk.written(start))[:, :8]
    delta, sums = (chunks_of(k, v, erase, None) for erase in (k, None))
    others = [k @ rule.after(start[:, :8], rule.written(start[:, :8])) for rule in (delta, sums)]
    errors = [((found - v) ** 2).mean().item() for found in (best, *others)]
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]


@torch.no_grad()
@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_the_matrix_is_worked_out_in_full_precision_under_autocast(settings: dict[str, Any]) -> None:
    memory = memory_of(**settings)
    x = torch.randn(2, 70, D, generator=torch.Generator().manual_seed(0))
    exact = memory.scan(x, segment_of(x), memory.init_state(2), Done())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = memory.scan(x, segment_of(x), memory.init_state(2), Done())
        read = memory.read(x, memory.prepare(mixed.state))
    assert mixed.state.matrix.dtype == torch.float32
    assert read.value.isfinite().all()
    torch.testing.assert_close(mixed.state.matrix, exact.state.matrix, atol=0.1, rtol=0.05)


def test_what_it_costs() -> None:
    memory = MesaMemory(D, SIZES, n_head=3, d_key=5, d_value=4, conv=1)
    assert n_byte(memory.init_state(2)) == 2 * 3 * 5 * (4 + 5) * 4
    maps = 2 * sum(parameter.numel() for parameter in memory.parameters())
    # per head: both sums written; a factor and 4 solutions for 8 tokens; one read
    assert memory.flops_per_token() == maps + 2 * 3 * (5 * 9 + (5**3 // 6 + 5 * 5 * 4) // 8 + 5 * 4)
    within = MesaMemory(D, SIZES, n_head=3, d_key=5, d_value=4, conv=1, within=True)
    # 30 products with one of them and with keys of the chunk, there and back; one read of the chunk too
    assert within.flops_per_token() == maps + 2 * 3 * (5 * 9 + 30 * (25 + 2 * 32 * 5) + 5 * 4 + 32 * 9)
    kalman = MesaMemory(D, SIZES, n_head=3, d_key=5, d_value=4, conv=1, form="kalman", decay="none")
    maps = 2 * sum(parameter.numel() for parameter in kalman.parameters())
    # what is known, products of keys, a factor, half a triangle, what is written; one read
    assert kalman.flops_per_token() == maps + 2 * 3 * (2 * 5 * 9 + 32 * (5 + 9 // 2 + 32 // 6) + 5 * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"form": "ttt"}, "form must be 'mesa' or 'kalman', got 'ttt'"),
        ({"decay": "channel"}, "decay must be 'none' or 'head', got 'channel'"),
        ({"form": "kalman"}, "decay must be 'none' with form 'kalman'"),
        ({"ridge": 0.0}, "ridge must be above 0, got 0"),
        ({"ridge": float("nan")}, "ridge must be above 0, got nan"),
        ({"n_step": 0}, "n_step must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MesaMemory(D, SIZES, **settings)


# --- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", OTHERS, ids=str)
@pytest.mark.parametrize("law", [law for law in [*LAWS, laws.closed_once, laws.admits] if law is not laws.inspectable])
def test_laws_hold_for_every_form(
    law: Callable[[laws.Make], None], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "CHUNK", 4)  # segments of 12 tokens are three chunks
    make = laws.builder(laws.nodes_of("mesa"))
    law(lambda memory=None, **model: make(memory=settings | (memory or {}), **model))


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_every_form_is_useful_and_bounded(settings: dict[str, Any]) -> None:
    for law, shrink in ((laws.useful, False), (laws.bounded, True)):
        make = laws.builder(laws.nodes_of("mesa"), shrink=shrink)
        law(lambda memory=None, make=make, **model: make(memory=settings | (memory or {}), **model))
