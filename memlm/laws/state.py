"""Laws of the state: reset, pure, bounded, admitting, round trip, inspectable."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memlm.laws.builders import ALL, Make, T, close, filled, logits, named_tensors, text
from memlm.memory import state as states
from memlm.models.segments import SegmentModel
from memlm.models.state import ModelState

_GROWTH = 1e3


def resets(make: Make) -> None:
    """A reset row behaves as a fresh one, at the start of a call or in its middle; other rows are untouched."""
    for model, n_open in ((make(), 0), (make(**ALL), 5)):
        state, ids = filled(model, n_open=n_open), text(3, 5 * T, seed=1)
        untouched, fresh = logits(model, ids, state), logits(model, ids, None)
        got = logits(model, ids, state, reset=torch.tensor([True, False, True]))
        close(got[[0, 2]], fresh[[0, 2]], "reset rows")
        close(got[1], untouched[1], "a row that was not reset")
        # followed by more text: nothing of the old document comes back
        with torch.no_grad():
            after = model(ids[:, :7], state=state, reset=torch.tensor([True, False, False])).state
        got = logits(model, ids[:, 7:], after)
        close(got[0], fresh[0, 7:], "a reset row, later")
        close(got[1:], untouched[1:, 7:], "rows that were not reset, later")
        if not n_open:
            by_segment = torch.zeros(3, 5, dtype=torch.bool)
            by_segment[0, 2] = by_segment[2, 0] = True
            got = logits(model, ids, state, reset=by_segment)
            close(got[0, : 2 * T], untouched[0, : 2 * T], "before a reset")
            close(got[0, 2 * T :], logits(model, ids[:1, 2 * T :], None)[0], "after a reset in the middle")
            close(got[1], untouched[1], "a row that was not reset, by segment")
            close(got[2], fresh[2], "a row reset at the first segment")


def pure(make: Make, scope: str = "sequence") -> None:
    """The same input and state give the same output; evaluation changes neither the model nor a state passed in."""
    model = make(memory={"scope": scope})
    state, ids = filled(model, n_open=5), text(3, 3 * T, seed=1)
    others = text(3, 2 * T, seed=2)
    parameters, passed = copy.deepcopy(model.state_dict()), copy.deepcopy(state)
    first = logits(model, ids, state)
    start = logits(model, others, None)
    assert torch.equal(logits(model, ids, state), first), "other text in between changes the outputs"
    with torch.no_grad():
        model(others, state=state, reset=torch.tensor([True, False, True]))
        model.generate(ids[:, :4], max_new_tokens=T, temperature=0, state=state)
        model.new_context(state)
        model.wipe(state)
        for name, modules in model.memory.items():
            for module, part in zip(modules, state.memory[name], strict=True):
                module.consolidate(part)
        model.select_rows(state, torch.tensor([2, 0]))
    assert torch.equal(logits(model, ids, state), first), "the same text from the same state gives other outputs"
    assert torch.equal(logits(model, others, None), start), "what was read before changes a fresh start"
    for name, value in model.state_dict().items():
        assert torch.equal(value, parameters[name]), f"evaluation changed {name} of the model"
    for (name, now), (_, before) in zip(named_tensors(state), named_tensors(passed), strict=True):
        assert torch.equal(now, before), f"{name} of the state passed in was changed"


@torch.no_grad()
def given_away(make: Make, scope: str = "sequence") -> None:
    """A state that is given away goes on as one that is kept, and no other state, nor the model, changes with it."""
    model = make(memory={"scope": scope}, memory_layers="all")
    state, ids, later = filled(model, n_open=5), text(3, 6 * T, seed=1), text(3, 4 * T, seed=2)
    parameters, passed, first = copy.deepcopy(model.state_dict()), copy.deepcopy(state), logits(model, later, state)
    begins = torch.zeros(3, 4, dtype=torch.bool)
    begins[0, 2] = begins[1, 0] = True

    def go_on(donate: bool) -> tuple[list[Tensor], list[ModelState]]:
        now = model(ids[:, :2], state=state).state  # no segment ends: the memories are those of the state before
        outputs, states = [], []
        for part in ids[:, 2:].split(2 * T + 3, dim=1):
            out = model(part, state=now, donate=donate)
            outputs.append(out.logits)
            now = out.state
        branch = model(ids[:, : T + 1], state=now).state  # which is kept
        states.append(copy.deepcopy(branch))
        now = model.new_context(model.select_rows(branch, torch.arange(3)), donate=donate)
        out = model(later, state=now, reset=begins, donate=donate)
        outputs.append(out.logits)
        now = model.new_context(model.with_memory(out.state, branch), donate=donate)
        states += [copy.deepcopy(model.absorb(later, now, donate=donate)), branch]
        return outputs, states

    (outputs, states), (others, given) = go_on(donate=False), go_on(donate=True)
    for output, other in zip(outputs, others, strict=True):
        assert torch.equal(output, other), "outputs depend on whether the state was given away"
    kept = {"a state that was kept": (given[0], given[2]), "the state passed in": (passed, state)}
    for what, (before, now) in kept.items():
        for (name, part), (_, old) in zip(named_tensors(now), named_tensors(before), strict=True):
            assert torch.equal(part, old), f"{name} of {what} was changed"
    for (name, part), (_, other) in zip(named_tensors(given[1]), named_tensors(states[1]), strict=True):
        assert torch.equal(part, other), f"{name} depends on whether the state was given away"
    assert torch.equal(logits(model, later, state), first), "an old state answers otherwise"
    model(later, state=model.init_state(3), donate=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, parameters[name]), f"{name} of the model was changed"


@torch.no_grad()
def bounded(make: Make, n_write: int = 300) -> None:
    """Over ``n_write`` writes the state keeps its size, its values are finite, and none grows without end."""
    memory = {"span": 1, "write_budget": 2}
    needed = max(make(memory=memory).lookback, 1)
    model = make(memory=memory, segment_len=needed, n_layer=1, overlap=0)
    state = model.init_state(1)
    size, shapes = states.n_byte(state), [tensor.shape for tensor in states.tensors(state)]
    window = 50
    n_window = -(-n_write // window)
    largest: dict[str, float] = {}  # halfway
    for i in range(n_window):
        state = model(text(1, window * needed, seed=i), state=state, logits=False).state
        assert states.n_byte(state) == size, (
            f"{size} bytes became {states.n_byte(state)} within {(i + 1) * window} writes"
        )
        if i + 1 == n_window // 2:
            largest = _largest(state)
    assert [tensor.shape for tensor in states.tensors(state)] == shapes
    for name, value in _largest(state).items():
        assert value < float("inf"), f"{name} is not finite"
        # Far beyond what a sum or a count gains meanwhile: what grows by a factor with each write.
        assert value <= _GROWTH * max(largest.get(name, value), 1.0), (
            f"{name} grows with each write: from {largest[name]:.3g} to {value:.3g} in the second half"
        )
    assert logits(model, text(1, needed), state).isfinite().all()


def _largest(state: ModelState) -> dict[str, float]:
    """The largest size of a real number in each tensor of a state; infinite if one is no number."""
    found = {name: tensor for name, tensor in named_tensors(state) if tensor.is_floating_point() and tensor.numel()}
    return {
        name: tensor.abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
        for name, tensor in found.items()
    }


@torch.no_grad()
def admits(make: Make, promote: Callable[[SegmentModel], None] | None = None) -> None:
    """A memory that filled up early still takes in what comes later.

    Args:
        make: Builder.
        promote: Makes what is written from now on more important than all before, for memories that choose.
    """
    model = make(overlap=0)
    state = filled(model, n_row=1, n_segment=40)
    if promote is not None:
        promote(model)
    state = model.select_rows(state, torch.zeros(8, dtype=torch.long))
    told = text(8, T, seed=1)
    after = model(told, state=state, logits=False).state
    after = model(text(1, T, seed=2).expand(8, -1), state=after, logits=False).state  # settles what waits at the end
    asked = told.roll(1, dims=1)[:1].expand(8, -1)
    outputs = logits(model, asked, model.new_context(after))
    effect = (outputs[1:] - outputs[:1]).abs().amax(dim=(1, 2))
    least = effect.min() if promote is not None else effect.max()
    assert least > 1e-4, f"a full memory admits nothing new: {effect.tolist()}"


def round_trip(make: Make, scope: str = "sequence") -> None:
    """Saved, loaded into a newly built model and continued equals never stopped, bit for bit."""
    for n_open in (0, 5):
        model = make(memory={"scope": scope}, **ALL)
        state, ids = filled(model, n_open=n_open), text(3, 3 * T, seed=1)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "state": states.to_dict(state)}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other = make(memory={"scope": scope}, **ALL)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(loaded["model"])
        restored = states.from_dict(loaded["state"], like=other.init_state(3))
        for (name, now), (_, before) in zip(named_tensors(restored), named_tensors(state), strict=True):
            assert torch.equal(now, before), f"{name} did not survive"
        assert torch.equal(logits(other, ids, restored), logits(model, ids, state)), "continued otherwise"


@torch.no_grad()
def inspectable(make: Make, scope: str = "sequence") -> None:
    """Contents are one vector per slot; a slot that was forgotten adds nothing to a read, and no other slot changes."""
    model = make(memory={"scope": scope}, **ALL)
    state, ids = filled(model, n_row=2), text(2, T, seed=1)
    passed = copy.deepcopy(state)

    def forget(part: Callable[[Tensor], Tensor]) -> ModelState:
        """``part`` says which of the slots' numbers (B, n_slot) are forgotten."""

        def of(module: Any, held: Any) -> Any:
            slots = module.filled(held)
            return module.forget(held, part(torch.arange(slots.shape[1]).expand_as(slots)))

        return model.map_memory(of, state)

    base = logits(model, ids, state)
    assert torch.equal(logits(model, ids, forget(lambda n: n < 0)), base), "forgetting nothing changes outputs"
    none = logits(model, ids, forget(lambda n: n >= 0))
    close(none, logits(model, ids, model.wipe(state)), "all slots forgotten against a wiped memory")
    half = forget(lambda n: n % 2 == 0)
    for other, what in ((base, "a forgotten slot is still read"), (none, "slots that were kept are read no more")):
        assert (logits(model, ids, half) - other).abs().max() > 1e-4, what
    for name, modules in model.memory.items():
        parts = zip(modules, state.memory[name], half.memory[name], model.init_state(2).memory[name], strict=True)
        for module, before, after, fresh in parts:
            assert states.n_byte(after) == states.n_byte(before), f"{name}: forgetting changed the size of the state"
            for part in (before, after, fresh):
                module.check(part)  # no state that a text led to is refused
            held, left, empty = (module.contents(part) for part in (before, after, fresh))
            assert held.shape[:2] == module.filled(before).shape, f"{name}: contents of {held.shape[:2]} slots"
            assert held.isfinite().all(), f"{name}: contents are not finite"
            assert torch.equal(left[:, 1::2], held[:, 1::2]), f"{name}: a slot that was kept changed"
            assert torch.equal(left[:, ::2], empty[:, ::2]), f"{name}: a forgotten slot holds something"
    for (name, now), (_, before) in zip(named_tensors(state), named_tensors(passed), strict=True):
        assert torch.equal(now, before), f"{name} of the state passed in was changed"
