"""Associative recurrent memory against a loop over segments, layers and cells with an explicit mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.armt import Association, AssociativeMemory, features
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.plain_attention import attend

pytestmark = pytest.mark.slow

T, M, D_MEM = laws.T, 3, 8
MAKE = laws.builder(laws.nodes_of("armt"))


def model_of(**model: Any) -> SegmentModel:
    return MAKE(memory={"n_cell": M, "d_mem": D_MEM}, **model)


def memory_of(model: SegmentModel) -> AssociativeMemory:
    memory: Any = model.memory["armt"]
    return memory[0]


def phi(x: Tensor) -> Tensor:
    """Features of one key, number by number."""
    parts = [number.clamp(min=0) for number in x] + [(-number).clamp(min=0) for number in x]
    n = len(parts)
    made = torch.stack([parts[i] * parts[(i - j) % n] for j in (1, 2, 3) for i in range(n)])
    return made / made.norm()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt() * weight


def naive(model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (L, V) of one row, and its matrices (layers, K, D) and sums (layers, K).

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
    """
    memory: Any = memory_of(model)
    n_layer = len(model.layers)
    matrix = [torch.zeros(6 * D_MEM, model.d_model) for _ in range(n_layer)]
    total = [torch.zeros(6 * D_MEM) for _ in range(n_layer)]
    hidden, before = [], []  # `before`: by layer, what entered it of the segment before, its end
    for begin, end, fresh in segments:
        n, overlap = end - begin, 0 if fresh else model.overlap
        place = torch.cat([torch.arange(-overlap, n), T + torch.arange(M)])
        is_cell = torch.arange(overlap + n + M) >= overlap + n
        mask = is_cell[:, None] | (~is_cell & (place <= place[:, None]))
        x, ends, cells = torch.cat([model.embedding(ids[begin:end]) * model.d_model**0.5, memory.cell]), [], []
        for i, layer in enumerate(model.layers):
            found = []
            for token in x:
                query = phi(memory.blocks[i].to_query(normed(token, memory.blocks[i].norm.weight)))
                found.append(query @ matrix[i] / (query @ total[i] + 1e-5))
            x = x + torch.stack(found)
            seen = x if fresh else torch.cat([before[i], x])
            ends.append(x[n - model.overlap : n])
            x = attend(layer, x, seen, mask[overlap:], place[overlap:], place)
            cells.append(x[n:])
        before = ends
        hidden.append(x[:n])
        for i, block in enumerate(memory.blocks):
            new_matrix, new_total = matrix[i], total[i]
            for cell in cells[i]:
                m = normed(cell, block.cell_norm.weight)
                key, rate = phi(block.to_key(m)), block.to_rate(m).sigmoid()
                held = key @ matrix[i] / (key @ total[i] + 1e-5)
                new_matrix = new_matrix + rate * torch.outer(key, block.to_value(m) - held)
                new = (1 - key @ total[i] / (key @ key)).clamp(0, 1).detach()
                new_total = new_total + new * key
            matrix[i], total[i] = new_matrix, new_total
    logits = model.norm(torch.cat(hidden)) @ model.embedding.weight.T
    return logits, torch.stack(matrix), torch.stack(total)


def same(got: Tensor, expected: Tensor, what: str, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance * expected.abs().max().item(), rtol=0, msg=what)


@pytest.mark.parametrize("overlap", [0, 4])
def test_outputs_matrices_and_gradients_equal_the_naive_loop(overlap: int) -> None:
    model, ids = model_of(overlap=overlap), laws.text(2, 4 * T)
    segments = [(s * T, (s + 1) * T, s == 0) for s in range(4)]
    out = model(ids)
    logits, matrix, total = (
        torch.stack(parts) for parts in zip(*(naive(model, row, segments) for row in ids), strict=True)
    )
    state = out.state.memory["armt"][0]
    same(out.logits, logits, "outputs")
    same(state.matrix, matrix, "matrices")
    same(state.total, total, "sums of keys")
    assert (out.logits - model(ids, read=False).logits)[:, T:].abs().max() > 1e-2
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    parameters = dict(model.named_parameters())
    got, expected = (
        torch.autograd.grad((part * probe).sum(), list(parameters.values())) for part in (out.logits, logits)
    )
    for name, a, b in zip(parameters, got, expected, strict=True):
        same(a, b, name, tolerance=1e-3)  # where a query meets hardly any key, it is divided by hardly anything


@torch.no_grad()
def test_a_context_that_ends_early_is_written_with_the_cells_where_they_always_are() -> None:
    model, ids = model_of(), laws.text(1, 3 * T)
    expected, matrix, total = naive(
        model, ids[0, : 2 * T + 5], [(0, T, True), (T, T + 5, False), (T + 5, 2 * T + 5, True)]
    )
    told = model(ids[:, : T + 5])
    out = model(ids[:, T + 5 : 2 * T + 5], state=model.new_context(told.state))
    same(torch.cat([told.logits, out.logits], dim=1)[0], expected, "outputs")
    same(out.state.memory["armt"][0].matrix[0], matrix, "matrices")
    same(out.state.memory["armt"][0].total[0], total, "sums of keys")


def test_features_are_products_of_neighbours() -> None:
    x = torch.tensor([2.0, -1.0])  # [2, 0, 0, 1] with its neighbours at distance 1 (2 * 1), 2 (none) and 3 (1 * 2)
    expected = torch.tensor([2.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2.0])
    torch.testing.assert_close(features(x), expected / 8**0.5)
    assert not features(torch.zeros(2)).any()


@torch.no_grad()
def test_a_key_that_is_written_again_is_corrected_and_counted_once() -> None:
    torch.manual_seed(0)
    block = Association(8, 4)
    cell, nothing = torch.randn(1, 1, 8), (torch.zeros(1, 24, 8), torch.zeros(1, 24))
    matrix, total, new = block.written(cell, *nothing)
    assert new.item() == 1
    x = block.cell_norm(cell)
    rate, value, key = block.to_rate(x).sigmoid(), block.to_value(x), features(block.to_key(x))
    torch.testing.assert_close(key @ matrix, rate * value)
    torch.testing.assert_close(total, key[:, 0])
    matrix, total, new = block.written(cell, matrix, total)
    assert new.abs().item() < 1e-6
    torch.testing.assert_close(total, key[:, 0])
    torch.testing.assert_close(key @ matrix, rate * value * (2 - rate), atol=1e-4, rtol=1e-4)
    two, _, new = block.written(cell.expand(1, 2, -1), *nothing)  # cells of one segment do not see each other
    assert new.tolist() == [[1, 1]]
    torch.testing.assert_close(key @ two, 2 * rate * value)


@torch.no_grad()
def test_an_untrained_memory_changes_nothing() -> None:
    model, ids = MAKE(perturb=False), laws.text(2, 4 * T)
    out = model(ids)
    assert torch.equal(out.logits, model(ids, read=False).logits)
    assert out.state.memory["armt"][0].total.any()


@torch.no_grad()
def test_reads_off_is_the_model_without_memory() -> None:
    model, none, ids = model_of(), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)


def test_its_bytes_are_those_of_a_matrix_per_layer() -> None:
    model = model_of()
    assert n_byte(model.init_state(1).memory["armt"]) == len(model.layers) * 24 * D_MEM * (model.d_model + 1)


@torch.no_grad()
def test_matrices_have_32_bits_under_autocast() -> None:
    model, ids = model_of(), laws.text(2, 3 * T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model(ids).state.memory["armt"][0]
    assert state.matrix.dtype == state.total.dtype == torch.float32
    assert state.matrix.isfinite().all()


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "n_cell=0": "n_cell must be at least 1, got 0",
        "d_mem=1": "d_mem must be at least 2",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.armt\.{message}"):
            build("memory=armt", f"memory.armt.{setting}", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'armt' needs tail of attention.* choose model=lmcode"):
        build("model=lstm", "memory=armt", "data.tokenizer.kind=byte")


@pytest.mark.parametrize("law", [laws.chunk_invariant, laws.contexts, laws.schedules_agree])
def test_laws_hold_beside_a_memory_within_layers(law: Callable[[laws.Make], None]) -> None:
    law(laws.builder({**laws.nodes_of("armt"), **laws.nodes_of("cache")}))
