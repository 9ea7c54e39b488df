"""Beacons against a loop that runs [beacons of before; overlap; segment; beacons] through the layers with a mask."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.beacon import BeaconMemory
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.gradients import gradients, same_gradients
from tests.memory.plain_attention import attend

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("beacon"))
SETTINGS: list[dict[str, Any]] = [{"ratio": 4, "n_beacon": 5}, {"ratio": 5, "n_beacon": 50}, {"ratio": 20}]


def memory_of(model: SegmentModel) -> BeaconMemory:
    memory: Any = model.memory["beacon"]
    return memory[0]


def naive(model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]]) -> tuple[Tensor, list[Tensor]]:
    """Logits (L, V) of one row, and by beacon what entered the layers, (L, D).

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
    """
    memory, m = memory_of(model), -(-T // memory_of(model).ratio)
    kept: list[Tensor] = []
    hidden, before = [], []  # `before`: by layer, the end of the segment before
    for begin, end, fresh in segments:
        n, overlap = end - begin, 0 if fresh else model.overlap
        x = torch.cat([model.embedding(ids[begin:end]) * model.d_model**0.5, memory.cell])
        own = torch.cat([torch.arange(n), T + torch.arange(m)]).float()
        ends, into = [], []
        for i, layer in enumerate(model.layers):
            seen, place = x, own
            if not fresh:
                seen, place = torch.cat([before[i], seen]), torch.cat([torch.arange(-overlap, 0).float(), place])
            ends.append(x[n - model.overlap : n])
            into.append(x[n:])
            if kept:
                told = torch.stack([beacon[i] for beacon in kept])
                seen = torch.cat([told + told @ memory.maps[i].weight.T, seen])
                place = torch.cat([torch.arange(-len(kept), 0) - float(model.overlap), place])
            is_beacon = torch.arange(len(seen)) >= len(seen) - m
            mask = (place <= own[:, None]) & ~is_beacon
            mask[n:] = True
            x = attend(layer, x, seen, mask, own, place)
        before = ends
        hidden.append(x[:n])
        kept += [torch.stack([part[j] for part in into]) for j in range(-(-n // memory.ratio))]
        kept = kept[-memory.n_beacon :]
    return model.norm(torch.cat(hidden)) @ model.embedding.weight.T, kept


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("overlap", [0, 4])
def test_outputs_beacons_and_gradients_equal_the_naive_loop(settings: dict[str, Any], overlap: int) -> None:
    model, ids = MAKE(memory=settings, overlap=overlap), laws.text(2, 4 * T)
    segments = [(s * T, (s + 1) * T, s == 0) for s in range(4)]
    out = model(ids)
    expected = [naive(model, row, segments) for row in ids]
    torch.testing.assert_close(out.logits, torch.stack([logits for logits, _ in expected]), atol=1e-4, rtol=0)
    state = out.state.memory["beacon"][0]
    for row, (_, kept) in enumerate(expected):
        assert state.full[row].tolist() == [False] * (memory_of(model).n_beacon - len(kept)) + [True] * len(kept)
        torch.testing.assert_close(state.hidden[row, -len(kept) :], torch.stack(kept), atol=1e-4, rtol=0)
    same = torch.stack([logits for logits, _ in expected])
    same_gradients(gradients(model, out.logits), gradients(model, same))


@torch.no_grad()
def test_a_context_that_ends_early_has_a_beacon_for_each_ratio_of_its_tokens() -> None:
    model, ids = MAKE(memory={"ratio": 4, "n_beacon": 9}), laws.text(1, 3 * T)
    segments = [(0, T, True), (T, T + 5, False), (T + 5, 2 * T + 5, True)]
    expected, kept = naive(model, ids[0, : 2 * T + 5], segments)
    assert len(kept) == 3 + 2 + 3
    told = model(ids[:, : T + 5])
    out = model(ids[:, T + 5 : 2 * T + 5], state=model.new_context(told.state))
    torch.testing.assert_close(torch.cat([told.logits, out.logits], dim=1)[0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.state.memory["beacon"][0].hidden[0, -8:], torch.stack(kept), atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_beacons_the_model_is_as_it_was() -> None:
    model, none, ids = MAKE(), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)
    torch.testing.assert_close(model(ids[:, :T]).logits, none(ids[:, :T]).logits)


def test_its_bytes_are_those_of_its_beacons() -> None:
    model = MAKE(memory={"n_beacon": 7})
    assert n_byte(model.init_state(1).memory["beacon"]) == 7 * (4 * model.n_layer * model.d_model + 1)


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "ratio=0": "ratio must be at least 1, got 0",
        "n_beacon=0": "n_beacon must be at least 1, got 0",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.beacon\.{message}"):
            build("memory=beacon", f"memory.beacon.{setting}", "data.tokenizer.kind=byte")
