"""Recurrent memory against a loop that runs [read; segment; write] through the layers with an explicit mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.rmt import RecurrentMemory
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.gradients import gradients, same_gradients
from tests.memory.plain_attention import attend

T, M = laws.T, 3
MAKE = laws.builder(laws.nodes_of("rmt"))


def recurrent(map: str = "linear", **model: Any) -> SegmentModel:
    return MAKE(memory={"n_cell": M, "map": map}, **model)


def memory_of(model: SegmentModel) -> RecurrentMemory:
    memory: Any = model.memory["rmt"]
    return memory[0]


def naive(model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]]) -> tuple[Tensor, Tensor]:
    """Logits (L, V) of one row, and the cells (m, D) after it.

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
    """
    memory = memory_of(model)
    cells, hidden, before = memory.first, [], []  # `before`: by layer, the end of the segment before
    for begin, end, fresh in segments:
        text = model.embedding(ids[begin:end]) * model.d_model**0.5
        n, overlap = end - begin, 0 if fresh else model.overlap
        places = [torch.full((M,), torch.nan), torch.arange(-overlap, n), T + torch.arange(M)]
        place = torch.cat([part.float() for part in places])
        kind = torch.cat([torch.full((len(part),), i) for i, part in enumerate(places)])  # read, text, write
        # Each row sees: a read cell the read cells; a token those and the past; a write cell all.
        mask = (kind[:, None] > 0) | (kind == 0)
        mask &= (kind[:, None] == 2) | ((kind < 2) & ~(place > place[:, None]))
        x, ends = torch.cat([cells, text, cells]), []
        own = torch.cat([torch.arange(M), torch.arange(M + overlap, len(place))])  # all but the overlap
        for i, layer in enumerate(model.layers):
            seen = x if fresh else torch.cat([x[:M], before[i], x[M:]])
            ends.append(x[M + n - model.overlap : M + n])
            x = attend(layer, x, seen, mask[own], place[own], place)
        before = ends
        hidden.append(x[M : M + n])
        normed = x[M + n :] / (x[M + n :].square().mean(dim=1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        cells = memory.to_cell(normed * memory.norm.weight)
    return model.norm(torch.cat(hidden)) @ model.embedding.weight.T, cells


@pytest.mark.parametrize("map", ["linear", "none"])
@pytest.mark.parametrize("overlap", [0, 4, T])
def test_outputs_cells_and_gradients_equal_the_naive_loop(map: str, overlap: int) -> None:
    model, ids = recurrent(map, overlap=overlap), laws.text(2, 4 * T)
    segments = [(s * T, (s + 1) * T, s == 0) for s in range(4)]
    out = model(ids)
    logits, cells = (torch.stack(parts) for parts in zip(*(naive(model, row, segments) for row in ids), strict=True))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.state.memory["rmt"][0].cell, cells, atol=1e-4, rtol=0)
    same_gradients(gradients(model, out.logits), gradients(model, logits))


@torch.no_grad()
def test_a_context_that_ends_early_is_written_with_the_write_cells_where_they_always_are() -> None:
    model, ids = recurrent(), laws.text(1, 3 * T)
    expected, cells = naive(model, ids[0, : 2 * T + 5], [(0, T, True), (T, T + 5, False), (T + 5, 2 * T + 5, True)])
    told = model(ids[:, : T + 5])
    out = model(ids[:, T + 5 : 2 * T + 5], state=model.new_context(told.state))
    torch.testing.assert_close(torch.cat([told.logits, out.logits], dim=1)[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.state.memory["rmt"][0].cell[0], cells, atol=1e-4, rtol=0)


@torch.no_grad()
def test_reads_off_leaves_the_cells_out() -> None:
    model, none, ids = recurrent(), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)


def test_its_bytes_are_those_of_its_cells() -> None:
    model = recurrent()
    assert n_byte(model.init_state(1).memory["rmt"]) == M * 4 * model.d_model + 1


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {"n_cell=0": "n_cell must be at least 1, got 0", "map=no": "map must be"}.items():
        with pytest.raises(ConfigError, match=rf"memory\.rmt\.{message}"):
            build("memory=rmt", f"memory.rmt.{setting}", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'rmt' needs context of attention.* choose model=lmcode"):
        build("model=lstm", "memory=rmt", "data.tokenizer.kind=byte")


@pytest.mark.parametrize(
    "law", [laws.alive, laws.chunk_invariant, laws.contexts, laws.reach, laws.every_parameter_learns, laws.round_trip]
)
def test_laws_hold_without_a_map(law: Callable[[laws.Make], None]) -> None:
    law(lambda memory=None, **model: MAKE(memory={"map": "none"} | (memory or {}), **model))
