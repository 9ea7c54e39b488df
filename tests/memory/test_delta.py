"""Matrix memory against token loops, formulas and values by hand."""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.memory import matrix as matrices
from memlm.memory.chunks import chunks_of, decay_between, faded_apart, inverse_of
from memlm.memory.contract import Flags, Segment
from memlm.memory.delta import DeltaMemory
from memlm.memory.matrix import MatrixState, cut
from memlm.memory.state import n_byte
from memlm.models.mixers import Done
from tests.laws.test_laws import LAWS
from tests.memory.segments import segment_of

RULES: list[dict[str, Any]] = [
    {"rule": rule, "decay": decay, "within": within}
    for rule, decay, within in itertools.product(("delta", "linear"), ("none", "head", "channel"), (False, True))
]
GDN2 = {"rate": "channel", "decay": "channel"}
RWKV7 = {"rule": "rwkv7", "rate": "channel", "decay": "channel"}
# Beside the default, which tests/laws tests: each rule in both forms, with each kind of decay.
OTHERS: list[dict[str, Any]] = [
    {"decay": "head", "within": True},
    {"decay": "channel"},
    {"rule": "linear", "within": True},
    {"rule": "linear", "decay": "head"},
    GDN2 | {"within": True},
    RWKV7 | {"within": True},
]
D = 12


# --- the rule --------------------------------------------------------------------------------------------------------


def token_loop(
    q: Tensor, k: Tensor, value: Tensor, erase: Tensor | None, decay: Tensor | None, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule for one head, token after token: what each finds once it has written, and the matrix at the end."""
    found = []
    for t in range(len(k)):
        if decay is not None:
            matrix = decay[t, :, None].exp() * matrix
        new = value[t] if erase is None else value[t] - matrix.T @ erase[t]
        matrix = matrix + torch.outer(k[t], new)
        found.append(matrix.T @ q[t])
    return torch.stack(found), matrix


def rwkv7_step(k: Tensor, v: Tensor, a: Tensor, share: Tensor, decay: Tensor, matrix: Tensor) -> Tensor:
    """A token of RWKV-7, by its matrix of transition; what it erases fades too."""
    left = decay.exp() * torch.ones_like(k)
    transition = torch.diag(left) @ (torch.eye(len(k), dtype=k.dtype) - torch.outer(a * k, k))
    return transition @ matrix + torch.outer(k * (1 + (a - 1) * share), v)


def in_chunk(
    q: Tensor, k: Tensor, value: Tensor, erase: Tensor | None, decay: Tensor | None, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as one chunk, filled up with zeros to a power of two."""
    n_token = len(k)
    n_more = (1 << (n_token - 1).bit_length()) - n_token
    q, k, value, erase, decay = (
        None if part is None else F.pad(part, (0, 0, 0, n_more)) for part in (q, k, value, erase, decay)
    )
    chunk = chunks_of(k, value, erase, decay, q)
    written = chunk.written(matrix)
    return chunk.found(matrix, written)[:n_token], chunk.after(matrix, written)


RATES = ["none", "head", "channel"]


def inputs_of(
    n_token: int, dtype: torch.dtype, rate: str, decay: str, by_channel: bool = False, seed: int = 0
) -> list[Tensor | None]:
    """Queries, keys, values, erasing keys, decays and a matrix; decays leave little, nearly all, or in between."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, dtype=torch.float64)

    q, k, v = F.normalize(normal(n_token, 5), dim=1), F.normalize(normal(n_token, 5), dim=1), normal(n_token, 4)
    rates = {"none": None, "head": 2 * uniform(n_token, 1), "channel": uniform(n_token, 5)}[rate]
    erase = None if rates is None else rates * k
    share = uniform(n_token, 5 if by_channel else 1)
    logs = {
        "none": None,
        "some": -share,
        "near 1": -1e-6 * share,
        "near 0": -1000 * share,
        "both": torch.where(share < 0.2, -1e5, -1e-4 * share),
    }[decay]
    parts = [q, k, v, erase, logs, normal(5, 4)]
    return [None if part is None else part.to(dtype).requires_grad_() for part in parts]


@pytest.mark.parametrize(
    ("decay", "by_channel"),
    [("none", False), *itertools.product(["some", "near 1", "near 0", "both"], [False, True])],
)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("n_token", [1, 17, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-12)])
def test_a_chunk_is_the_token_loop(
    n_token: int, rate: str, decay: str, by_channel: bool, dtype: torch.dtype, tolerance: float
) -> None:
    results = []
    for function in (token_loop, in_chunk):
        inputs = inputs_of(n_token, dtype, rate, decay, by_channel)
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


def test_an_inverse_stays_exact_where_one_key_comes_again_and_again() -> None:
    """Powers of such a system grow as binomials do: to 1e17 within 64 tokens."""
    lower = torch.ones(64, 64).tril(-1)
    expected = torch.eye(64) - torch.eye(64).roll(-1, dims=1).tril(-1)  # each token undoes the one before it
    assert torch.equal(inverse_of(lower), expected)
    assert torch.equal(inverse_of(lower + torch.ones(64, 64).triu()), expected)  # only what lies below the diagonal


def test_channels_that_fade_alike_fade_as_one() -> None:
    q, k, v, erase, decay, matrix = inputs_of(32, torch.float64, "head", "some")
    each = in_chunk(q, k, v, erase, decay.expand(-1, 5), matrix)
    torch.testing.assert_close(each, in_chunk(q, k, v, erase, decay, matrix), atol=1e-12, rtol=1e-12)


def test_a_channel_that_leaves_nothing_takes_no_digits_from_others() -> None:
    decay = torch.zeros(4, 2)
    decay[2, 0], decay[3] = -1e30, torch.tensor([-0.125, -0.25])
    _, _, _, (found,) = faded_apart(torch.ones(4, 2), decay, torch.ones(4, 2))
    one = torch.tensor([-0.125, -0.25]).exp()
    expected = torch.tensor([[2, 0, 0, 0], [2, 2, 0, 0], [1, 1, 2, 0], [one[1], one[1], one.sum(), 2]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rate_max", [1.0, 2.0])
def test_a_rate_above_one_turns_round_what_a_key_holds(rate_max: float) -> None:
    """With the rate 2 and nothing to write a token is a reflection: parity, which rates up to 1 cannot count."""
    memory = memory_of(rate_max=rate_max, within=True)
    with torch.no_grad():
        memory.to_rate.weight.zero_()
        memory.to_rate.bias.fill_(50.0)
        memory.to_value.weight.zero_()
    held = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(1)).repeat(1, 4, 1)
    key = memory._keys(memory.to_key, memory.norm(x[:, :1]))[0, 0, :, None]  # (H, 1, K)
    first = (key @ held[0]).detach()
    for n in range(1, 5):
        after = memory.scan(x[:, :n], segment_of(x[:, :n]), MatrixState(held), Done()).state.matrix
        torch.testing.assert_close(key @ after[0], first * (1 - rate_max) ** n, atol=1e-5, rtol=1e-5)


def test_decays_are_summed_between_tokens_alone() -> None:
    """A token that leaves nothing takes no digits from what comes after it."""
    logs = torch.tensor([-0.5, -1e30, -0.25, -0.125])
    left = decay_between(logs)
    never = -torch.inf
    rows = [[0, never, never, never], [-1e30, 0, never, never], [-1e30, -0.25, 0, never], [-1e30, -0.375, -0.125, 0]]
    expected = torch.tensor(rows).exp()
    assert torch.equal(left, expected)


def test_linear_attention_is_the_causal_sum() -> None:
    q, k, v, _, _, matrix = inputs_of(20, torch.float64, "none", "none")
    found, after = in_chunk(q, k, v, None, None, torch.zeros_like(matrix))
    for t in range(20):
        torch.testing.assert_close(found[t], sum((q[t] @ k[i]) * v[i] for i in range(t + 1)))
    torch.testing.assert_close(after, sum(torch.outer(k[i], v[i]) for i in range(20)))


def test_the_delta_rule_by_hand() -> None:
    """Keys (1, 0) and (0.6, 0.8), rates 1 and 1/2: the second token finds 0.6 * 2 under its key and wants 3."""
    k, v = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[2.0], [3.0]])
    rate = torch.tensor([[1.0], [0.5]])
    found, after = in_chunk(k, k, rate * v, rate * k, None, torch.zeros(2, 1))
    torch.testing.assert_close(found, torch.tensor([[2.0], [2.1]]))
    torch.testing.assert_close(after, torch.tensor([[2.54], [0.72]]))
    # With half of the matrix left before the second token it finds 0.6, and writes 1.2 under its key.
    _, after = in_chunk(k, k, rate * v, rate * k, torch.tensor([[0.0], [0.5]]).log(), torch.zeros(2, 1))
    torch.testing.assert_close(after, torch.tensor([[1.72], [0.96]]))


def test_a_key_that_is_written_again_holds_the_new_value() -> None:
    k, v = torch.eye(4)[[0, 1, 0]], torch.tensor([[1.0], [2.0], [5.0]])
    _, replaced = in_chunk(k, k, v, k, None, torch.zeros(4, 1))
    _, added = in_chunk(k, k, v, None, None, torch.zeros(4, 1))
    assert replaced[:, 0].tolist() == [5, 2, 0, 0]
    assert added[:, 0].tolist() == [6, 2, 0, 0]


def naive_of_fla(name: str) -> Any:
    """The loops of fla-core for an operation, without its kernels."""
    pytest.importorskip("einops")
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    file = Path(found.submodule_search_locations[0]) / "ops" / name / "naive.py"
    if not file.exists():
        pytest.skip(f"this fla-core has no {name}")
    spec = importlib.util.spec_from_file_location(f"fla_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    return source


@pytest.mark.parametrize(
    ("name", "function", "rate", "by_channel"),
    [
        ("gla", "naive_recurrent_gla", "none", True),
        ("delta_rule", "delta_rule_recurrence", "head", None),
        ("gated_delta_rule", "naive_recurrent_gated_delta_rule", "head", False),
        ("kda", "naive_recurrent_kda", "head", True),
        ("gdn2", "naive_recurrent_gdn2", "channel", True),
    ],
)
def test_a_chunk_is_the_loop_of_flash_linear_attention(
    name: str, function: str, rate: str, by_channel: bool | None
) -> None:
    naive = getattr(naive_of_fla(name), function)
    draw = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(1, 40, 1, 5, generator=draw), dim=-1) for _ in range(2))
    v, b, w = torch.randn(1, 40, 1, 4, generator=draw), *(torch.rand(1, 40, 1, n, generator=draw) for n in (5, 4))
    if rate == "head":
        b = w = b[..., :1]
    decay = None if by_channel is None else -torch.rand(1, 40, 1, 5 if by_channel else 1, generator=draw)
    long = q * 5**0.5  # as they divide it by the root of its width
    if name == "delta_rule":
        theirs = naive(*(part.transpose(1, 2) for part in (long, k, v, b[..., 0])))[0].transpose(1, 2)
    elif name == "gated_delta_rule":
        theirs = naive(long, k, v, b[..., 0], decay[..., 0])[0]
    else:
        theirs = naive(long, k, v, decay, *{"none": (), "head": (b[..., 0],), "channel": (b, w)}[rate])[0]
    q, k, v, b, w = (part[0, :, 0] for part in (q, k, v, b, w))
    value, erase = (v, None) if rate == "none" else (w * v, b * k)
    ours, _ = in_chunk(q, k, value, erase, None if decay is None else decay[0, :, 0], torch.zeros(5, 4))
    torch.testing.assert_close(ours, theirs[0, :, 0], atol=1e-5, rtol=1e-4)


# --- the memory ------------------------------------------------------------------------------------------------------


def memory_of(dtype: torch.dtype = torch.float32, **settings: Any) -> DeltaMemory:
    torch.manual_seed(0)
    memory = DeltaMemory(D, **({"n_head": 3, "d_key": 5, "d_value": 4, "conv": 1} | settings))
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
                    value, erase, decay = v, None, None
                    if memory.to_rate is not None:
                        rate = memory.rate_max * memory.to_rate(x).sigmoid().view(memory.n_head, -1)
                        erase = rate * k
                        if memory.to_write_rate is not None:
                            rate = memory.rate_max * memory.to_write_rate(x).sigmoid().view_as(v)
                        value = v if memory.key_share is not None else rate * v
                    if memory.to_step is not None:
                        decay = -memory.log_decay.exp()[:, None] * F.softplus(memory.to_step(x)).view(memory.n_head, -1)
                    if memory.key_share is not None:
                        after = [
                            rwkv7_step(k[h], v[h], rate[h], memory.key_share[h], decay[h], after[h])
                            for h in range(memory.n_head)
                        ]
                    else:
                        after = [
                            token_loop(
                                q[h, None], k[h, None], value[h, None], None if erase is None else erase[h, None],
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
    "settings",
    [
        *RULES,
        {"rule": "linear", "norm_keys": False},
        {"rate_max": 2.0, "within": True},
        GDN2,
        GDN2 | {"within": True},
        RWKV7,
        RWKV7 | {"within": True},
        RWKV7 | {"decay": "head", "rate_max": 2.0},
    ],
)
@pytest.mark.parametrize(("n_token", "chunk"), [(9, 64), (9, 4), (8, 4)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(torch.float32, 2e-4, marks=pytest.mark.slow), (torch.float64, 1e-11)]
)
def test_a_window_is_the_token_loop(
    settings: dict[str, Any], n_token: int, chunk: int, dtype: torch.dtype, tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(matrices, "CHUNK", chunk)
    memory, results = memory_of(dtype, **settings), []
    for naive in (True, False):
        window, hidden, matrix = window_of(n_token, dtype)
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
        grads = torch.autograd.grad(loss, [hidden, matrix, *memory.parameters()])
        results.append([out, after, *grads])
    names = ["outputs", "states", "hidden", "matrix", *(name for name, _ in memory.named_parameters())]
    for name, loop, fast in zip(names, *results, strict=True):
        scale = max(1.0, loop.abs().max().item())
        assert (fast - loop).abs().max() <= tolerance * scale, name
    if memory.within:
        return
    window, hidden, matrix = window_of(n_token, dtype)
    slow = super(DeltaMemory, memory).scan(hidden, window, MatrixState(matrix), Done())
    torch.testing.assert_close(slow.read.value[window.valid], results[1][0], atol=tolerance, rtol=tolerance)


def test_chunks_have_at_most_32_tokens() -> None:
    for n_token, (n_chunk, size) in {1: (1, 1), 5: (1, 8), 32: (1, 32), 33: (2, 32), 128: (4, 32)}.items():
        cells = torch.arange(1.0, 2 * 3 * n_token + 1).view(2, 3 * n_token, 1, 1).expand(-1, -1, 3, 5)
        parts = cut(cells, 3)
        assert parts.shape == (3 * n_chunk, 2, 3, size, 5)
        assert parts.is_contiguous()
        whole = parts[..., 0, :, 0].view(3, n_chunk, 2, size).transpose(1, 2).flatten(2)  # (S, B, c L)
        assert torch.equal(whole[..., :n_token], cells[..., 0, 0].unflatten(1, (3, -1)).transpose(0, 1))
        assert not whole[..., n_token:].any()


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
    memory = memory_of(decay="head", within=True)
    x = torch.randn(2, 70, D, generator=torch.Generator().manual_seed(0))
    exact = memory.scan(x, segment_of(x), memory.init_state(2), Done())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = memory.scan(x, segment_of(x), memory.init_state(2), Done())
        read = memory.read(x, mixed.state)
    assert mixed.state.matrix.dtype == torch.float32
    assert read.value.isfinite().all()
    torch.testing.assert_close(mixed.state.matrix, exact.state.matrix, atol=0.05, rtol=0.05)


def test_what_it_costs() -> None:
    memory = DeltaMemory(D, n_head=3, d_key=5, d_value=4, conv=1)
    assert n_byte(memory.init_state(2)) == 2 * 3 * 5 * 4 * 4
    maps = 2 * sum(parameter.numel() for parameter in memory.parameters())
    # per head: read, read under the key and write of the matrix; keys with keys, an inverse, and its use
    assert memory.flops_per_token() == maps + 2 * 3 * (3 * 5 * 4 + 32 * (5 + 4 + 32 // 3))
    linear = DeltaMemory(D, n_head=3, d_key=5, d_value=4, conv=1, rule="linear", within=True)
    maps = 2 * sum(parameter.numel() for parameter in linear.parameters())
    assert linear.flops_per_token() == maps + 2 * 3 * (2 * 5 * 4 + 32 * (5 + 4))
    rwkv7 = DeltaMemory(D, n_head=3, d_key=5, d_value=4, conv=1, **RWKV7)
    maps = 2 * sum(parameter.numel() for parameter in rwkv7.parameters())
    assert rwkv7.flops_per_token() == maps + 2 * 3 * 2 * (3 * 5 * 4 + 32 * (5 + 4 + 32 // 3))  # each token is two


@torch.no_grad()
def test_heads_and_channels_forget_at_different_paces_at_first() -> None:
    for settings in ({"n_head": 3, "decay": "head"}, {"n_head": 1, "d_key": 3, "decay": "channel"}):
        memory = DeltaMemory(D, **settings)
        assert not memory.log_decay.any()  # a rate of 1
        torch.testing.assert_close(F.softplus(memory.to_step(torch.zeros(D))), torch.tensor([0.001, 0.01, 0.1]))


@torch.no_grad()
def test_rates_per_channel_can_make_the_matrix_grow() -> None:
    """What is erased by another key than it was written under is not a projection: two tokens in turn, nothing told."""
    k, b = torch.tensor([[0.6, 0.8], [0.96, 0.28]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    k, b = k.repeat(32, 1), b.repeat(32, 1)
    _, by_channel = in_chunk(k, k, torch.zeros(64, 1), b * k, None, torch.eye(2))
    _, by_head = in_chunk(k, k, torch.zeros(64, 1), b.mean(dim=1, keepdim=True) * k, None, torch.eye(2))
    assert by_head.abs().max() <= 1
    assert by_channel.abs().max() > 100  # 1.2 to the power of 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"d_key": 0}, "d_key must be at least 1, got 0"),
        ({"d_value": -1}, "d_value must be at least 1, got -1"),
        ({"rate": "token"}, "rate must be 'head' or 'channel', got 'token'"),
        ({"rate": "channel", "rule": "linear"}, "rate must be 'head' with rule 'linear'"),
        ({"rate": "channel"}, "decay must be 'head' or 'channel' with rate 'channel'"),
        ({"decay": True}, "decay must be 'none', 'head' or 'channel', got True"),
        ({"rule": "hebb"}, "rule must be 'linear', 'delta' or 'rwkv7', got 'hebb'"),
        ({"rate_max": 0.0}, r"rate_max must be in \(0, 2\], got 0"),
        ({"rate_max": 2.1}, r"rate_max must be in \(0, 2\], got 2.1"),
        ({"norm_keys": False}, "norm_keys must be true with rule 'delta'"),
        ({"rule": "rwkv7"}, "rate must be 'channel' with rule 'rwkv7'"),
        ({"rule": "rwkv7", "rate": "channel"}, "decay must be 'head' or 'channel' with rate 'channel'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaMemory(D, **settings)


# --- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", OTHERS, ids=str)
@pytest.mark.parametrize("law", [law for law in [*LAWS, laws.closed_once, laws.admits] if law is not laws.inspectable])
def test_laws_hold_for_every_rule(
    law: Callable[[laws.Make], None], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "CHUNK", 4)  # segments of 12 tokens are three chunks
    make = laws.builder(laws.nodes_of("delta"))
    law(lambda memory=None, **model: make(memory=settings | (memory or {}), **model))


@pytest.mark.slow
@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_every_rule_is_useful_and_bounded(settings: dict[str, Any]) -> None:
    for law, shrink in ((laws.useful, False), (laws.bounded, True)):
        make = laws.builder(laws.nodes_of("delta"), shrink=shrink)
        law(lambda memory=None, make=make, **model: make(memory=settings | (memory or {}), **model))
