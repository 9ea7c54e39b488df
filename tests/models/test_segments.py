"""Long calls without gradients go through in windows: the same outputs, reads and states, in bounded memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memlm.memory.imm import ImplicitMemory
from memlm.memory.ltm import LongTermMemory
from memlm.memory.state import named_tensors, tensors
from memlm.memory.stm import ShortTermMemory
from memlm.models import schedule
from memlm.models.grid import lay_out
from memlm.models.lmcode import LMCode
from memlm.models.lstm import LSTM
from memlm.models.schedule import segments_at_once
from memlm.models.segments import _starts
from memlm.models.state import Output

V, T = 30, 6
MEMORIES = {
    "stm": partial(ShortTermMemory, n_slot=3, n_head=2),
    "ltm": partial(LongTermMemory, n_slot=24, d_key=8, top_k=4, write_budget=4, span=2),
}


def model_of(kind: str = "lmcode", **memories: Any) -> Any:
    torch.manual_seed(0)
    memories = memories or MEMORIES
    if kind == "lstm":
        model: Any = LSTM(V, memories, n_layer=2, d_model=16, segment_len=T, overlap=3)
    else:
        model = LMCode(V, memories, n_layer=2, n_head=2, d_model=16, d_ff=24, segment_len=T, overlap=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def text(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


def by_slot(read: Any) -> Tensor:
    """Weights by number of the slot, whatever their order, (B, N, 200)."""
    slots = read.slots.masked_fill(read.weights == 0, 0)
    return torch.zeros(*slots.shape[:2], 200).scatter_add(2, slots, read.weights)


def calls() -> dict[str, dict[str, Any]]:
    """Calls of 8 segments in all the ways a call may be laid out."""
    length = torch.full((2, 8), T)
    length[0, 1], length[1, 1], length[0, 5] = 2, 5, 3
    contexts = (torch.arange(T) < length[..., None]).flatten(1)
    flags = torch.zeros(2, 8, dtype=torch.bool)
    breaks, reset = flags.clone(), flags.clone()
    breaks[:, 2] = reset[:, 6] = True
    ends_early = torch.arange(8 * T) < torch.tensor([[8 * T], [T + 2]])
    ragged = torch.rand(2, 8 * T, generator=torch.Generator().manual_seed(1)) < 0.6
    return {
        "plain": {"ids": text(2, 8 * T)},
        "a piece of a segment at the end": {"ids": text(2, 7 * T + 1)},
        "segments begun by an earlier call": {"ids": text(2, 7 * T + 2), "opened": 4},
        "a new document": {"ids": text(2, 8 * T), "opened": 4, "reset": torch.tensor([True, False])},
        "padding": {"ids": text(2, 8 * T), "opened": 1, "mask": ragged},
        "a row that ends early": {"ids": text(2, 8 * T), "mask": ends_early},
        "the same, by segment": {"ids": text(2, 8 * T), "mask": ends_early, "reset": flags},
        "documents and contexts": {"ids": text(2, 8 * T), "mask": contexts, "breaks": breaks, "reset": reset},
    }


@pytest.mark.parametrize("kind", ["lmcode", "lstm"])
@pytest.mark.parametrize("case", calls())
def test_windows_of_a_call_are_one_call(kind: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = model_of(kind), dict(calls()[case])
    ids, opened = settings.pop("ids"), settings.pop("opened", 0)
    with torch.no_grad():
        state = model(text(2, 3 * T + opened, seed=9)).state
    assert segments_at_once(model) is None  # with gradients a call is one window
    whole: Output = model(ids, state=state, **settings)
    run, n_run = schedule.at_once, []
    monkeypatch.setattr(
        schedule, "at_once", lambda of, grid, *rest: n_run.append(grid.n_segment) or run(of, grid, *rest)
    )
    monkeypatch.setattr(schedule, "WINDOW", 3 * T)
    with torch.no_grad():
        parts: Output = model(ids, state=state, **settings)
        stops = model(ids, state=state, keep_state=False, **settings)
    assert max(n_run) == 3, "windows are larger than wanted"
    assert len(n_run) >= 4, "the calls were not cut"
    assert stops.state is None
    mask = settings.get("mask", torch.ones_like(ids, dtype=torch.bool))
    for found, expected in ((parts.logits, whole.logits), (parts.hidden, whole.hidden), (stops.logits, whole.logits)):
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=1e-4)
    assert parts.reads.keys() == whole.reads.keys()
    rows, reset = _starts(settings.get("reset"), 2)
    cells = lay_out(ids, state.local, T, rows, reset, settings.get("mask"), settings.get("breaks"))
    new = cells.new.flatten(1)
    for name, read in whole.reads.items():
        found = parts.reads[name]
        assert found.slots.shape == read.slots.shape
        torch.testing.assert_close(found.value[new], read.value[new], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.gate[new], read.gate[new], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(by_slot(found)[new], by_slot(read)[new], atol=1e-4, rtol=1e-4)
    if "mask" not in settings:  # a trace may count padding
        torch.testing.assert_close(parts.trace, whole.trace, atol=1e-4, rtol=1e-4)
    assert parts.state.local.position.tolist() == whole.state.local.position.tolist()
    assert parts.state.local.document.tolist() == whole.state.local.document.tolist()
    assert parts.state.local.n_open.tensor.tolist() == whole.state.local.n_open.tensor.tolist()
    for name, memory in parts.state.memory.items():
        for mine, theirs in zip(memory, whole.state.memory[name], strict=True):
            expected, found = named_tensors(theirs), named_tensors(mine)
            for field in (field for field in found if field != "n_used"):  # which is a bound
                torch.testing.assert_close(found[field], expected[field], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        later = [model(text(2, T + 1, seed=5), state=out.state).logits for out in (parts, whole)]
        absorbed = model.absorb(ids, state, **settings) if "reset" not in settings else None
    torch.testing.assert_close(*later, atol=1e-4, rtol=1e-4)
    if absorbed is not None:
        torch.testing.assert_close(tensors(absorbed.memory), tensors(parts.state.memory), atol=1e-4, rtol=1e-4)


class _Largest(TorchDispatchMode):
    """The most numbers that a tensor had which an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor) and part.numel():
                self.n = max(self.n, part.untyped_storage().nbytes())
        return out


@contextmanager
def largest() -> Iterator[_Largest]:
    with _Largest() as mode, torch.no_grad():
        yield mode


@pytest.mark.slow
@pytest.mark.parametrize("memories", [MEMORIES, {"imm": ImplicitMemory}], ids=["by layer", "by segment"])
def test_a_long_call_needs_memory_for_what_it_returns(
    memories: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(**memories)
    monkeypatch.setattr(schedule, "WINDOW", 8 * T)

    def needs(n_window: int, function: Any) -> int:
        ids = text(1, n_window * 8 * T)
        with largest() as mode:
            function(ids)
        return mode.n

    for function in (model, partial(model, logits=False)):
        assert needs(8, function) <= 4 * needs(2, function), "more than in proportion to the text"
    steady = (partial(model.generate, max_new_tokens=2), model.absorb) if "ltm" in memories else ()
    for function in steady:
        assert needs(6, function) <= needs(3, function), "of what was read nothing has to be kept"


def test_a_prompt_of_several_windows_is_gone_on_with_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = model_of(), text(2, 5 * T + 2)
    expected = model.generate(prompt, max_new_tokens=8, temperature=0.0)
    monkeypatch.setattr(schedule, "WINDOW", 2 * T)
    assert model.generate(prompt, max_new_tokens=8, temperature=0.0).tolist() == expected.tolist()
    assert model.generate(prompt, max_new_tokens=0).tolist() == prompt.tolist()
