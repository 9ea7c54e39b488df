"""Networks that learn while they read, against autograd token by token, the delta rule and values by hand."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.memory.contract import Flags, Segment, Sizes
from memlm.memory.state import n_byte
from memlm.memory.titans import FastNetwork, TitansMemory, TitansState, bounded, orthogonal
from memlm.models.lstm import LSTM
from memlm.models.segments import SegmentModel
from tests.memory.plain_attention import attend
from tests.memory.segments import segment_of

pytestmark = pytest.mark.slow

D, H, E, T = 12, 3, 4, 8
SIZES = Sizes(D, 2, 2, T, 0, 40)
PLAIN: dict[str, Any] = {"momentum": False, "decay": False, "step_max": None}
TTT = PLAIN | {"residual": True, "rate_max": 0.3}
ATLAS: dict[str, Any] = {"window_len": 3, "step": "muon", "chunk_len": 4}
MAKE = laws.builder(laws.nodes_of("titans"))


def memory_of(dtype: torch.dtype = torch.float64, **settings: Any) -> TitansMemory:
    torch.manual_seed(0)
    memory = TitansMemory(D, SIZES, **({"n_head": H, "d_head": E, "d_hidden": 6, "conv": 1} | settings))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
            parameter.data = parameter.data.to(dtype)
    return memory


# --- the same, written out -------------------------------------------------------------------------------------------


def weights_of(memory: TitansMemory, weight: Tensor) -> list[Tensor]:
    """The matrices of one head, of all its weights (P,)."""
    found, begin = [], 0
    for a, b in zip(memory.widths, memory.widths[1:], strict=False):
        found.append(weight[begin : begin + a * b].reshape(a, b))
        begin += a * b
    return found


def weights_of_all(memory: TitansMemory, weight: Tensor) -> list[Tensor]:
    """The same of many networks, (n, P)."""
    parts = [weights_of(memory, part) for part in weight]
    return [torch.stack(matrices) for matrices in zip(*parts, strict=True)]


def run(memory: TitansMemory, h: int, matrices: list[Tensor], x: Tensor) -> Tensor:
    """What the network of head ``h`` gives for one input (E,)."""
    y = x @ matrices[0]
    for matrix in matrices[1:]:
        y = F.gelu(y) @ matrix
    if memory.scale is None:
        return y
    unit = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
    return x + unit * memory.scale[h] + memory.shift[h]


def head(linear: torch.nn.Linear, x: Tensor, h: int) -> Tensor:
    """What a map gives head ``h`` of one token."""
    return linear(x)[h * E : (h + 1) * E]


def key_of(linear: torch.nn.Linear, x: Tensor, h: int) -> Tensor:
    key = F.silu(head(linear, x, h))
    return key / key.norm()


def orthogonal_by_svd(matrix: Tensor) -> Tensor:
    """Five steps of Newton and Schulz on singular values alone."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def naive_write(
    memory: TitansMemory, hidden: Tensor, valid: Tensor, change: Tensor, momentum: Tensor | None, h: int
) -> tuple[Tensor, Tensor | None]:
    """Change and momentum (P,) of one row and head after a segment (C + T, D): autograd, token by token."""
    window, chunk = memory.window_len, memory.chunk_len
    for begin in range(window, len(hidden), chunk):
        own = [t for t in range(begin, min(begin + chunk, len(hidden))) if valid[t]]
        if not own:
            continue
        weight = memory.start[h] + change
        total = torch.zeros_like(weight)
        rates = []
        for t in range(begin - window, own[-1] + 1):
            if not valid[t]:
                continue
            x = memory.norm(hidden[t])
            matrices = weights_of(memory, weight)
            out = run(memory, h, matrices, key_of(memory.to_key, x, h))
            loss = F.mse_loss(out, head(memory.to_value, x, h))
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, matrices, create_graph=True)])
            rate = memory.rate_max * memory.to_rate(x)[h].sigmoid()
            total = total - rate * gradient
            if t in own:
                rates.append(rate)
        if memory.step_max is not None:
            total = total / (1 + (total.norm() / memory.step_max) ** 2).sqrt()
        mean = torch.stack([memory.norm(hidden[t]) for t in own]).mean(dim=0)
        if momentum is not None:
            momentum = total = memory.to_momentum(mean)[h].sigmoid() * momentum + total
        if memory.step == "muon":
            parts = [orthogonal_by_svd(part).flatten() for part in weights_of(memory, total)]
            total = torch.stack(rates).mean() * torch.cat(parts)
        left = 1 if memory.to_decay is None else 1 - memory.to_decay(mean)[h].sigmoid()
        change = left * change + total
    return change, momentum


def naive_read(memory: TitansMemory, x: Tensor, change: Tensor) -> Tensor:
    """What is found for one token (D,), before the output map, with the changes (H, P) of its row."""
    x = memory.norm(x)
    parts = []
    for h in range(len(change)):
        found = run(memory, h, weights_of(memory, memory.start[h] + change[h]), key_of(memory.to_query, x, h))
        parts.append(found / (found.square().mean() + 1e-5).sqrt() * memory.found_norm.weight)
    return torch.cat(parts) * F.silu(memory.to_gate(x))


def segment(memory: TitansMemory) -> tuple[Segment, Tensor, TitansState]:
    """Four rows: whole; that ends in padding; without a token; not complete. The second has nothing before it."""
    draw = torch.Generator().manual_seed(1)
    n = memory.window_len + T
    hidden = torch.randn(4, n, D, generator=draw, dtype=torch.float64).requires_grad_()
    valid = torch.arange(T) < torch.tensor([T, 5, 0, T])[:, None]
    before = torch.tensor([True, False, True, True])[:, None].expand(-1, memory.window_len)
    complete, no = torch.tensor([[True], [True], [True], [False]]), torch.zeros(4, 1, dtype=torch.bool)
    made = segment_of(hidden)._replace(
        valid=torch.cat([before, valid], dim=1), lookback=memory.window_len, columns=slice(0, T),
        flags=Flags(complete, ~no, no, None, no.long(), no.long()),
    )  # fmt: skip
    n_weight = memory.start.shape[1]
    change, momentum = (0.3 * torch.randn(4, H, n_weight, generator=draw, dtype=torch.float64) for _ in range(2))
    state = TitansState(change.requires_grad_(), momentum.requires_grad_() if memory.to_momentum is not None else None)
    return made, hidden, state


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"depth": 1, "chunk_len": 3},
        {"depth": 3, "chunk_len": 4, "step_max": 0.5},
        {"residual": True, "chunk_len": 1},
        TTT | {"depth": 1, "chunk_len": 4},
        TTT | {"chunk_len": 4},
        ATLAS,
        ATLAS | {"depth": 1, "residual": True, "step": "gradient", "momentum": False},
        ATLAS | {"window_len": T, "chunk_len": None, "decay": False},
    ],
    ids=str,
)
def test_states_reads_and_gradients_equal_autograd_token_by_token(settings: dict[str, Any]) -> None:
    memory, results = memory_of(**settings), []
    for naive in (True, False):
        written, hidden, state = segment(memory)
        if naive:
            rows = []
            for b in range(4):
                heads = []
                for h in range(H):
                    before = state.change[b, h], None if state.momentum is None else state.momentum[b, h]
                    after = naive_write(memory, hidden[b], written.valid[b], *before, h)
                    heads.append(after if written.complete[b, 0] else before)
                rows.append(heads)
            change, momentum = (
                None if rows[0][0][i] is None else torch.stack([torch.stack([h[i] for h in r]) for r in rows])
                for i in (0, 1)
            )
            found = [torch.stack([naive_read(memory, x, change[b]) for x in hidden[b, -T:]]) for b in range(4)]
            read = torch.stack(found) @ memory.to_output.weight.T
        else:
            (change, momentum), trace = memory.write(written, state)
            assert set(trace) == {"rate", "error"}
            read = memory.read(hidden[:, -T:], memory.prepare(TitansState(change, momentum))).value
        outputs = [part for part in (read, change, momentum) if part is not None]
        probe = torch.Generator().manual_seed(2)
        loss = sum((out * torch.randn(out.shape, generator=probe, dtype=torch.float64)).sum() for out in outputs)
        asked = [hidden, *(part for part in state if part is not None), *memory.parameters()]
        results.append([*outputs, *torch.autograd.grad(loss, asked)])
    for loop, fast in zip(*results, strict=True):
        assert loop.abs().max() > 0
        assert (fast - loop).abs().max() <= 1e-9 * max(1.0, loop.abs().max().item())


@torch.no_grad()
def test_a_linear_map_written_token_by_token_is_the_delta_rule() -> None:
    """Its rate is twice that of the mean squared error, over the width of a head."""
    memory = memory_of(depth=1, chunk_len=1, rate_max=E / 2, **PLAIN)
    memory.start.zero_()
    written, hidden, _ = segment(memory)
    state, _ = memory.write(written, memory.init_state(4))
    for b, n in enumerate((T, 5, 0, 0)):
        for h in range(H):
            matrix = torch.zeros(E, E, dtype=torch.float64)
            for t in range(n):
                x = memory.norm(hidden[b, t])
                k, v = key_of(memory.to_key, x, h), head(memory.to_value, x, h)
                b_t = 2 / E * memory.rate_max * memory.to_rate(x)[h].sigmoid()
                matrix = matrix + b_t * torch.outer(k, v - matrix.T @ k)
            torch.testing.assert_close(state.change[b, h].view(E, E), matrix, atol=1e-14, rtol=1e-12)


class Unit(torch.nn.Module):
    """To length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chunks_are_those_of_titans_pytorch(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what it normalises. It forgets weights, so all of them are a change here."""
    for name in ("einops", "einx", "tensordict", "assoc_scan"):
        pytest.importorskip(name)
    found = importlib.util.find_spec("titans_pytorch")
    if found is None or not found.submodule_search_locations:
        pytest.skip("titans-pytorch is not installed")
    package = types.ModuleType("titans_pytorch")  # without its transformers
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "titans_pytorch", package)
    source = importlib.import_module("titans_pytorch.neural_memory")
    memory = memory_of(torch.float32, depth=depth, chunk_len=4, step_max=None)
    memory.start.zero_()
    network = source.MemoryMLP(E, depth, expansion_factor=1.5)
    theirs = source.NeuralMemory(
        D, 4, dim_head=E, heads=H, model=network, mem_model_norm_add_residual=False, momentum=True,
        default_step_transform_max_lr=memory.rate_max,
    )  # fmt: skip
    theirs.store_norm, theirs.k_norm = memory.norm, Unit()
    theirs.to_keys = torch.nn.Sequential(memory.to_key, torch.nn.SiLU())
    theirs.to_values, theirs.to_adaptive_step[0] = memory.to_value, memory.to_rate
    theirs.to_momentum[0], theirs.to_decay_factor[0] = memory.to_momentum, memory.to_decay
    hidden = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    n_weight = memory.start.shape[1]
    change, momentum = (
        0.3 * torch.randn(2, H, n_weight, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)
    )
    names = theirs.memory_model_parameter_names
    weights, steps = (
        dict(zip(names, weights_of_all(memory, part.flatten(0, 1)), strict=True)) for part in (change, momentum)
    )
    steps = {name: part[None] for name, part in steps.items()}
    for chunk in hidden.split(4, dim=1):
        _, after = theirs.store_memories(chunk, weights, (weights, steps), return_surprises=False)
        weights, steps = (dict(part.items()) for part in after.states)
    ours, _ = memory.write(segment_of(hidden), TitansState(change, momentum))
    for name, part in zip(names, weights_of_all(memory, ours.change.flatten(0, 1)), strict=True):
        torch.testing.assert_close(part, weights[name], atol=1e-6, rtol=1e-5)
    for name, part in zip(names, weights_of_all(memory, ours.momentum.flatten(0, 1)), strict=True):
        torch.testing.assert_close(part, steps[name][0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_what_is_forgotten_is_the_change() -> None:
    """A network whose change is forgotten is as it was trained to be, and learns again."""
    memory = memory_of(rate_max=1e-9, momentum=False)
    memory.to_decay.bias.fill_(50.0)
    written, hidden, state = segment(memory)
    after, _ = memory.write(written, state)
    assert after.change[:2].abs().max() < 1e-6
    fresh = memory.read(hidden, memory.prepare(memory.init_state(4))).value
    torch.testing.assert_close(memory.read(hidden, memory.prepare(after)).value[:2], fresh[:2], atol=1e-5, rtol=0)


def test_a_step_is_bounded_by_hand() -> None:
    torch.testing.assert_close(
        bounded(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 5.0), torch.tensor([[3.0, 4.0], [0.0, 0.0]]) / 2**0.5
    )
    assert bounded(torch.full((1, 4), 1e6), 5.0).norm() <= 5.0
    torch.testing.assert_close(bounded(torch.full((1, 4), 1e-4), 5.0), torch.full((1, 4), 1e-4))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_muon_makes_matrices_about_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonal(matrix)
    torch.testing.assert_close(found, torch.stack([orthogonal_by_svd(part) for part in matrix]), atol=1e-6, rtol=0)
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4
    zero = torch.zeros(2, *shape, requires_grad=True)
    orthogonal(zero).sum().backward()
    assert zero.grad.isfinite().all()
    assert not orthogonal(zero).any()


def test_gradients_of_no_error_and_of_no_weights_are_zero() -> None:
    widths, k = [E, 6, E], F.normalize(torch.randn(5, E, generator=torch.Generator().manual_seed(0)), dim=1)
    network = FastNetwork(torch.randn(2 * 6 * E, generator=torch.Generator().manual_seed(1)), widths, None)
    gradient, error = network.gradient(k, network(k), torch.ones(5))
    assert not gradient.any()
    assert not error.any()
    gradient, error = network.gradient(k, network(k) + 1, torch.zeros(5))
    assert not gradient.any()
    torch.testing.assert_close(error, torch.ones(5))


def test_writes_are_the_same_without_gradients_and_in_training() -> None:
    for settings in ({}, ATLAS, TTT):
        model, ids = MAKE(memory=settings), laws.text(2, 3 * laws.T)
        states = [model.train(mode)(ids).state.memory["titans"][0] for mode in (True, False)]
        with torch.no_grad():
            states += [model.train(mode)(ids).state.memory["titans"][0] for mode in (True, False)]
        with torch.inference_mode():
            states.append(model(ids).state.memory["titans"][0])
        assert states[0].change.any()
        assert all(torch.equal(states[0].change, state.change) for state in states)


# --- around attention ------------------------------------------------------------------------------------------------


def naive_model(model: SegmentModel, ids: Tensor, read: bool = True) -> Tensor:
    """Logits (L, V) of one row without overlap, segment after segment; feed-forwards are left out."""
    memory: Any = model.memory["titans"][0]
    n_weight, n = memory.start.shape[1], model.segment_len
    state = [(torch.zeros(n_weight), torch.zeros(n_weight)) for _ in range(memory.n_head)]
    mask, place, nowhere = torch.ones(n, n, dtype=torch.bool).tril(), torch.arange(n), torch.full((n,), torch.nan)
    outputs = []
    for part in ids.split(n):
        x = model.embedding(part) * model.d_model**0.5
        for i, layer in enumerate(model.layers):
            if i not in model.memory_layers:
                x = attend(layer, x, x, mask, place, place)
                continue
            change, begun = torch.stack([held[0] for held in state]), x

            def found(stream: Tensor, change: Tensor = change) -> Tensor:
                return torch.stack([naive_read(memory, token, change) for token in stream])

            def gated(y: Tensor, asked: Tensor, begun: Tensor = begun, found: Any = found) -> Tensor:
                return begun + (y - begun) * 2 * memory.to_output(found(asked)).sigmoid()

            if memory.variant == "mal":
                moved = x + memory.to_output(found(x))
                x = attend(layer, moved, moved, mask, place, place)
            elif memory.variant == "mag":
                x = gated(attend(layer, x, x, mask, place, place), x)
            else:
                seen = torch.cat([memory.to_cell(found(x)), x])
                own = torch.cat([torch.eye(n, dtype=torch.bool), mask], dim=1)  # of the cells, that of the token
                y = attend(layer, x, seen, own, place, torch.cat([nowhere, place]))
                x = gated(y, y)
            valid = torch.ones(n, dtype=torch.bool)
            state = [naive_write(memory, begun, valid, *held, h) for h, held in enumerate(state)]
        outputs.append(x)
    return model.norm(torch.cat(outputs)) @ model.embedding.weight.T


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_variants_equal_the_naive_model(variant: str) -> None:
    model = MAKE(
        memory={"variant": variant, "n_head": 2, "d_head": E, "d_hidden": 6, "rate_max": 1.0, "conv": 1}, overlap=0
    )
    with torch.no_grad():
        for layer in model.layers:
            layer.feed_forward[3].weight.zero_()
    ids = laws.text(2, 4 * laws.T)
    got, expected = model(ids).logits, torch.stack([naive_model(model, row) for row in ids])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    named = {name: p for name, p in model.named_parameters() if "feed_forward" not in name}
    parts = (torch.autograd.grad((logits * probe).sum(), list(named.values())) for logits in (got, expected))
    for name, a, b in zip(named, *parts, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4 * float(b.abs().max()), rtol=0, msg=name)
    assert (model(ids, read=False).logits - got).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["add", "mag", "mal"])
def test_a_fresh_network_leaves_attention_as_it_is(variant: str) -> None:
    model, ids = MAKE(memory={"variant": variant}, perturb=False), laws.text(2, 2 * laws.T)
    off = model(ids, read=False).logits
    got = model(ids).logits
    torch.testing.assert_close(got[:, : laws.T], off[:, : laws.T], atol=1e-5, rtol=0)
    assert (got - off)[:, laws.T :].abs().max() > 1e-3


@torch.no_grad()
def test_networks_learn_in_full_precision_under_autocast() -> None:
    memory = memory_of(torch.float32, **ATLAS)
    written, hidden, _ = segment(memory)
    written = written._replace(hidden=hidden.float())
    exact, _ = memory.write(written, memory.init_state(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = memory.write(written, memory.init_state(4))
        read = memory.read(written.hidden, memory.prepare(mixed)).value
    assert mixed.change.dtype == torch.float32
    assert read.isfinite().all()
    torch.testing.assert_close(mixed.change, exact.change, atol=0.1, rtol=0.1)


def test_what_it_costs() -> None:
    memory = memory_of()
    n_weight = 2 * E * 6
    assert n_byte(memory.init_state(2)) == 2 * 2 * H * n_weight * 4 * 2  # in double precision here
    assert n_byte(memory_of(momentum=False).init_state(2)) == 2 * H * n_weight * 8
    maps = 2 * sum(p.numel() for name, p in memory.named_parameters() if name != "start")
    assert memory.flops_per_token() == maps + H * 8 * n_weight
    assert memory_of(window_len=4, chunk_len=4).flops_per_token() == maps + H * 14 * n_weight
    muon = 5 * (4 * E**2 * 6 + 2 * E**3) * 2 // T
    assert memory_of(step="muon").flops_per_token() == maps + H * (8 * n_weight + muon)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"d_head": 0}, "d_head must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"d_hidden": 0}, "d_hidden must be at least 1, got 0"),
        ({"variant": "lmm"}, "variant must be add, mac, mag or mal, got 'lmm'"),
        ({"step": "adam"}, "step must be gradient or muon, got 'adam'"),
        ({"chunk_len": 0}, "chunk_len must be at least 1, or null for a segment, got 0"),
        ({"window_len": T + 1}, rf"window_len must be in 0..segment_len \+ 1 - conv \({T - 3}\), got {T + 1}"),
        ({"window_len": -1}, "window_len must be in"),
        ({"rate_max": 0.0}, "rate_max must be above 0, got 0"),
        ({"step_max": float("nan")}, "step_max must be above 0, got nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TitansMemory(D, SIZES, **settings)


def test_memory_as_context_needs_attention() -> None:
    make = laws.builder(laws.nodes_of("titans"), model_class=LSTM)
    for variant in ("add", "mag", "mal"):
        laws.alive(lambda variant=variant, **model: make(memory={"variant": variant}, **model))
    with pytest.raises(ValueError, match=r"'titans' needs context of attention.* choose model=lmcode"):
        make(memory={"variant": "mac"})


# --- the laws --------------------------------------------------------------------------------------------------------

OTHERS: list[dict[str, Any]] = [
    {"variant": "mac", "chunk_len": 5},
    {"variant": "mag"},
    {"variant": "mal", "residual": True},
    ATLAS,
]
LAWS = [
    laws.alive, laws.causal, laws.chunk_invariant, laws.schedules_agree, laws.contexts, laws.reach,
    laws.every_parameter_learns, laws.round_trip,
]  # fmt: skip


@pytest.mark.parametrize("settings", OTHERS, ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_laws_hold_for_other_settings(law: Callable[[laws.Make], None], settings: dict[str, Any]) -> None:
    law(lambda memory=None, **model: MAKE(memory=settings | (memory or {}), **model))


@pytest.mark.parametrize(
    "settings",
    [*({"variant": v} for v in ("mac", "mag", "mal")), TTT | {"depth": 1}, ATLAS | {"chunk_len": 8}],
    ids=str,
)
def test_other_settings_are_useful(settings: dict[str, Any]) -> None:
    make = laws.builder(laws.nodes_of("titans"), shrink=False)
    laws.useful(lambda memory=None, **model: make(memory=settings | (memory or {}), **model))
