"""The store of what a pool drops, and its search, against lists and attention written out.

``pytest tests/memory/test_mplus.py -k retention -s`` prints what is left of a write in the pool, and in pool and store.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.contract import Sizes
from memlm.memory.mplus import PlusMemory
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.plain_attention import attend
from tests.memory.plain_pool import Cell, PlainPool, same_cells, segment_for
from tests.memory.test_pool import salt_of, told

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("mplus"))


def memory_of(n_token: int, n_new: int, n_long: int, d_model: int = 4) -> PlusMemory:
    torch.manual_seed(0)
    sizes = Sizes(d_model, 1, 1, 8, 0, 10)
    return PlusMemory(d_model, sizes, n_token, n_new, n_long, top_k=2, d_key=4)


class PlainStore:
    """The newest of what was dropped."""

    def __init__(self, n: int) -> None:
        self.cells: list[Cell] = [None] * n

    def add(self, dropped: list[Cell]) -> None:
        """Take in what a pool dropped."""
        held = sorted((cell for cell in self.cells + dropped if cell is not None), key=lambda cell: cell[0])
        n = len(self.cells)
        self.cells = [*[None] * max(0, n - len(held)), *held[-n:]]


@torch.no_grad()
def test_writes_are_those_of_the_lists() -> None:
    memory = memory_of(10, 3, 7)
    state = memory.init_state(2)
    pools, stores, at = [PlainPool(10, 3, salt_of(memory)) for _ in range(2)], [PlainStore(7) for _ in range(2)], [0, 0]
    n_dropped = 0
    for s, lengths in enumerate([[8, 8], [8, 2], [8, 0], [1, 8], *[[8, 8]] * 4]):
        output, ids = told(2, 8, s)
        state, _ = memory.write(segment_for(output, ids, at, lengths), state)
        for row, n in enumerate(lengths):
            dropped = pools[row].write(ids[row, :n].tolist(), at[row], output[row])
            n_dropped += sum(cell is not None for cell in dropped)
            stores[row].add(dropped)
            at[row] += n
            same_cells(state.hidden[row], state.position[row], stores[row].cells + pools[row].cells)
    assert n_dropped > 2 * 7, "the store is not full"


@torch.no_grad()
def test_retention_is_whole_until_the_store_is_full_and_then_that_of_the_pool() -> None:
    """Pool of 40 with 4 new ones a write, store of 120; 200 rows, no training."""
    n_row, n_new, pool, n_long = 200, 4, 40, 120
    memory = memory_of(pool, n_new, n_long, d_model=1)
    state = memory.init_state(n_row)
    for t in range(61):
        output, ids = told(n_row, n_new, t, 1)
        state, _ = memory.write(segment_for(output, ids, t * n_new), state)
        first = memory.filled(state) & (state.position < n_new)
        within, either = (float(part.sum()) / (n_row * n_new) for part in (first[:, n_long:], first))
        expected = (1 - n_new / pool) ** t
        if t % 10 == 0:
            print(f"{t} writes: pool {within:.3f}, pool and store {either:.3f}, (1 - K / N)^t = {expected:.3f}")
        assert abs(within - expected) <= 4 * (expected * (1 - expected) / (n_row * n_new)) ** 0.5
        if (t + 1) * n_new <= n_long:  # not even all that was written would fill the store
            assert either == 1
    assert either == within


# --- in a model ------------------------------------------------------------------------------------------------------


def model_of(**settings: Any) -> SegmentModel:
    memory = {"n_token": 20, "n_new": 6, "n_long": 11, "top_k": 3, "d_key": 8}
    return MAKE(memory=memory | settings, memory_layers="all")


def naive(model: SegmentModel, ids: Tensor) -> tuple[Tensor, list[list[Cell]]]:
    """Logits (L, V) of one row, segment by segment and layer by layer, and the cells of each layer after it."""
    modules: Any = model.memory["mplus"]
    pools = [PlainPool(module.n_token, module.n_new, salt_of(module)) for module in modules]
    stores = [PlainStore(module.n_long) for module in modules]
    hidden, before = [], [torch.zeros(0, model.d_model) for _ in modules]
    for begin in range(0, len(ids), T):
        x = model.embedding(ids[begin : begin + T]) * model.d_model**0.5
        for i, (layer, memory) in enumerate(zip(model.layers, modules, strict=True)):
            cells = stores[i].cells + pools[i].cells
            held = torch.stack([torch.zeros(model.d_model) if cell is None else cell[1] for cell in cells])
            full = torch.tensor([cell is not None for cell in cells])
            places = torch.cat([torch.arange(-len(cells), 0) - model.overlap, torch.arange(-len(before[i]), T)])
            mask = places <= torch.arange(T)[:, None]
            bias = torch.zeros(mask.shape)
            for t in range(T):
                query = memory.to_query(memory.norm(x[t]))
                score = [query @ memory.to_key(memory.norm(cell)) / 8**0.5 for cell in held[: memory.n_long]]
                there = [j for j in range(memory.n_long) if full[j]]
                best = sorted(there, key=lambda j: -float(score[j].detach()))[: memory.top_k]
                mask[t, : len(cells)] = full
                mask[t, : memory.n_long] = torch.tensor([j in best for j in range(memory.n_long)])
                bias[t] = torch.cat([F.logsigmoid(torch.stack(score)), bias[t, memory.n_long :]])
            seen = torch.cat([held, before[i], x])
            before[i] = x[T - model.overlap :]
            x = attend(layer, x, seen, mask, torch.arange(T), places, bias)
            stores[i].add(pools[i].write(ids[begin : begin + T].tolist(), begin, x))
        hidden.append(x)
    cells = [store.cells + pool.cells for store, pool in zip(stores, pools, strict=True)]
    return model.norm(torch.cat(hidden)) @ model.embedding.weight.T, cells


def test_outputs_cells_and_gradients_equal_the_naive_model() -> None:
    model, ids = model_of(), laws.text(1, 7 * T)
    out = model(ids)
    expected, cells = naive(model, ids[0])
    torch.testing.assert_close(out.logits[0], expected, atol=2e-4, rtol=0)
    with torch.no_grad():
        for i, part in enumerate(out.state.memory["mplus"]):
            assert (part.position[:, :11] >= 0).all(), "the store is not full"
            same_cells(part.hidden[0], part.position[0], cells[i])
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    parameters = dict(model.named_parameters())
    got, wanted = (
        torch.autograd.grad((part * probe).sum(), list(parameters.values())) for part in (out.logits[0], expected)
    )
    for name, a, b in zip(parameters, got, wanted, strict=True):
        assert float(b.abs().max()) > 0, name
        torch.testing.assert_close(a, b, atol=2e-4 * float(b.abs().max()), rtol=0, msg=name)


def test_its_bytes_are_what_the_settings_say() -> None:
    model = model_of()
    assert [n_byte(part) for part in model.init_state(1).memory["mplus"]] == [31 * (4 * model.d_model + 8)] * 3


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for name in ("n_long", "top_k", "d_key"):
        with pytest.raises(ConfigError, match=rf"memory\.mplus\.{name} must be at least 1, got 0"):
            build("memory=mplus", f"memory.mplus.{name}=0", "data.tokenizer.kind=byte")
