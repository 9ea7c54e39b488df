"""The pool against a list, attention written out, and the law by which it forgets.

``pytest tests/memory/test_pool.py -k curve -s`` prints what is left of a write after each number of later ones.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.contract import Sizes
from memlm.memory.pool import PoolMemory, PoolState, scrambled
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.gradients import gradients, same_gradients
from tests.memory.plain_attention import attend
from tests.memory.plain_pool import PlainPool, mixed, same_cells, segment_for

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("pool"))
D = 4


def memory_of(n_token: int = 10, n_new: int = 3, d_model: int = D, seed: int = 0) -> PoolMemory:
    torch.manual_seed(seed)
    return PoolMemory(d_model, Sizes(d_model, 1, 1, 8, 0, 10), n_token, n_new)


def salt_of(memory: PoolMemory) -> int:
    return int(memory.get_buffer("salt"))


def told(n_row: int, n_token: int, seed: int, d_model: int = D) -> tuple[Tensor, Tensor]:
    """What comes out of a layer (B, T, D), and token ids (B, T)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n_row, n_token, d_model, generator=draw), torch.randint(50, (n_row, n_token), generator=draw)


def test_the_hash_is_the_published_one() -> None:
    numbers = torch.tensor([0, 1, 2**32 - 1, 12345, 2**31])
    assert scrambled(numbers).tolist() == [mixed(int(number)) for number in numbers]
    assert scrambled(numbers)[1:3].tolist() == [0x514E28B7, 0x81F16F39]  # MurmurHash3 of nothing with these seeds


def test_a_write_is_that_of_the_list() -> None:
    memory = memory_of()
    state = memory.init_state(3)
    pools = [PlainPool(10, 3, salt_of(memory)) for _ in range(3)]
    at = [0, 0, 0]
    for s, lengths in enumerate([[8, 8, 8], [8, 2, 0], [8, 8, 8], [1, 8, 8], [8, 8, 8], [8, 8, 8]]):
        output, ids = told(3, 8, s)
        complete = [True, True, s != 3]
        state, _ = memory.write(segment_for(output, ids, at, lengths, complete), state)
        for row, n in enumerate(lengths):
            if complete[row]:
                pools[row].write(ids[row, :n].tolist(), at[row], output[row])
                at[row] += n
            same_cells(state.hidden[row], state.position[row], pools[row].cells)


def test_what_goes_depends_on_text_layer_and_place_alone() -> None:
    memory, output, ids = memory_of(200, 8), *told(2, 8, 1)
    full = PoolState(torch.randn(1, 200, D).expand(2, -1, -1), torch.arange(200).expand(2, -1))

    def left(ids: Tensor, place: int = 500, memory: PoolMemory = memory) -> list[list[int]]:
        torch.manual_seed(int(torch.randint(1000, ())))
        state, _ = memory.write(segment_for(output, ids, place), full)
        return state.position[:, :-8].tolist()

    a, b = left(ids)
    assert a != b
    assert left(ids.flip(0)) == [b, a]
    assert left(ids) == [a, b]
    assert left(ids, place=508)[0] != a
    assert left(ids.flip(1))[0] != a  # the same tokens in another order
    assert left(ids, memory=memory_of(200, 8, seed=1))[0] != a


def shares_left(memory: PoolMemory, n_row: int, writes: list[int]) -> list[float]:
    """Which share of the vectors of the first write the pool holds after so many more."""
    d_model, n_new, state, shares = memory.sizes.d_model, memory.n_new, memory.init_state(n_row), []
    for t in range(writes[-1] + 1):
        output, ids = told(n_row, n_new, t, d_model)
        state, _ = memory.write(segment_for(output, ids, t * n_new), state)
        if t in writes:
            shares.append(float(memory.filled(state).logical_and(state.position < n_new).sum()) / (n_row * n_new))
    return shares


@pytest.mark.parametrize(("n_token", "n_new", "n_row"), [(7680, 256, 8), (512, 16, 100), (40, 10, 300)])
def test_the_curve_of_retention_is_the_closed_form(n_token: int, n_new: int, n_row: int) -> None:
    """First the sizes of the source: half of what a write brought is left after 20 more."""
    writes = [0, 1, 5, 10, 20, 40, 80]
    shares = shares_left(memory_of(n_token, n_new, d_model=1), n_row, writes)
    for t, share in zip(writes, shares, strict=True):
        expected = (1 - n_new / n_token) ** t
        error = (expected * (1 - expected) / (n_row * n_new)) ** 0.5
        print(f"N {n_token}, K {n_new}, {t} writes: {share:.4f} left, (1 - K / N)^t = {expected:.4f} +- {error:.4f}")
        assert abs(share - expected) <= 4 * error


def test_layers_drop_by_themselves() -> None:
    """Of two layers both hold a vector by the square of the share that one does."""
    pools = []
    for seed in range(2):
        memory = memory_of(40, 10, d_model=1, seed=seed)
        state = memory.init_state(300)
        for t in range(4):
            output, ids = told(300, 10, t, 1)
            state, _ = memory.write(segment_for(output, ids, t * 10), state)
        pools.append(torch.stack([(state.position == i).any(dim=1) for i in range(10)]))
    both, expected = float((pools[0] & pools[1]).float().mean()), 0.75**6
    assert abs(both - expected) <= 4 * (expected * (1 - expected) / 3000) ** 0.5


# --- in a model ------------------------------------------------------------------------------------------------------


def model_of(n_token: int = 20, n_new: int = 5, **model: Any) -> SegmentModel:
    return MAKE(memory={"n_token": n_token, "n_new": n_new}, memory_layers="all", **model)


def naive(model: SegmentModel, ids: Tensor) -> tuple[Tensor, list[PlainPool]]:
    """Logits (L, V) of one row, segment by segment and layer by layer, and the pools after it."""
    modules: Any = model.memory["pool"]
    pools = [PlainPool(module.n_token, module.n_new, salt_of(module)) for module in modules]
    hidden, before = [], [torch.zeros(0, model.d_model) for _ in modules]
    for begin in range(0, len(ids), T):
        x = model.embedding(ids[begin : begin + T]) * model.d_model**0.5
        for i, layer in enumerate(model.layers):
            n_cell, n_before = len(pools[i].cells), len(before[i])
            held = torch.stack([torch.zeros(model.d_model) if cell is None else cell[1] for cell in pools[i].cells])
            full = torch.tensor([cell is not None for cell in pools[i].cells])
            places = torch.cat([torch.arange(-n_cell, 0) - model.overlap, torch.arange(-n_before, T)])
            mask = places <= torch.arange(T)[:, None]
            mask[:, :n_cell] = full
            seen = torch.cat([held, before[i], x])
            before[i] = x[T - model.overlap :]
            x = attend(layer, x, seen, mask, torch.arange(T), places)
            pools[i].write(ids[begin : begin + T].tolist(), begin, x)
        hidden.append(x)
    return model.norm(torch.cat(hidden)) @ model.embedding.weight.T, pools


@pytest.mark.parametrize("overlap", [0, 4])
def test_outputs_pools_and_gradients_equal_the_naive_model(overlap: int) -> None:
    model, ids = model_of(overlap=overlap), laws.text(2, 6 * T)
    out = model(ids)
    logits, pools = zip(*(naive(model, row) for row in ids), strict=True)
    expected = torch.stack(logits)
    torch.testing.assert_close(out.logits, expected, atol=2e-4, rtol=0)
    with torch.no_grad():
        for i, part in enumerate(out.state.memory["pool"]):
            assert (part.position >= 0).float().mean() > 0.7
            for row in range(2):
                same_cells(part.hidden[row], part.position[row], pools[row][i].cells)
    same_gradients(gradients(model, out.logits), gradients(model, expected), 2e-4)


@torch.no_grad()
def test_reads_off_leaves_the_pool_out() -> None:
    model, none, ids = model_of(), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)


def test_its_bytes_are_what_the_setting_says_and_it_has_no_parameters() -> None:
    model = model_of()
    assert [n_byte(part) for part in model.init_state(1).memory["pool"]] == [20 * (4 * model.d_model + 8)] * 3
    assert not list(model.memory.parameters())


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "n_new=0": "n_new must be at least 1, got 0",
        "n_token=15": r"n_token must be at least n_new \(16\), got 15",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.pool\.{message}"):
            build("memory=pool", f"memory.pool.{setting}", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'pool' needs context of attention.* choose model=lmcode"):
        build("model=lstm", "memory=pool", "data.tokenizer.kind=byte")
