"""Laws of what may reach what: alive, causal, isolated, chunk-invariant, contexts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.laws.builders import (
    ALL,
    N_VOCAB,
    Make,
    T,
    close,
    filled,
    logits,
    same_memory,
    slow_scan,
    text,
    windows_of,
    windows_of_documents,
)
from memlm.memory.contract import Memory, Read
from memlm.models.schedule import segments_at_once, writes_within
from memlm.models.segments import SegmentModel
from memlm.models.state import Output


def alive(make: Make) -> None:
    """Tokens of an early segment, and reads, change later outputs; nothing but memory reaches that far."""
    model = make(overlap=0)
    state = filled(model, n_row=1)
    ids = text(1, 4 * T, seed=1).expand(T + 1, -1).clone()
    for i in range(T):
        ids[i + 1, i] = (ids[i + 1, i] + 1) % N_VOCAB
    state = model.select_rows(state, torch.zeros(T + 1, dtype=torch.long))
    with torch.no_grad():
        out = model(ids, state=state)
    late = out.logits[:, 2 * T :]
    effect = (late[1:] - late[:1]).abs().amax(dim=(1, 2))
    assert effect.max() > 1e-3, f"no token of a segment changes what comes two segments later: {effect.tolist()}"
    for name, read in out.reads.items():
        assert read.value is None or read.value[:, 2 * T :].abs().max() > 1e-3, f"{name} reads nothing"
    off = logits(model, ids, state, read=False)[:, 2 * T :]
    assert (off - late).abs().max() > 1e-3, "reads off changes nothing"
    assert torch.equal(off[1:].sub(off[:1]), torch.zeros_like(off[1:])), (
        "with reads off early tokens reach late outputs"
    )


def causal(make: Make, scope: str = "sequence") -> None:
    """Changing a token changes no output before it, bit for bit; where banks are shared, of no row."""
    for model, n_open in ((make(memory={"scope": scope}), 0), (make(memory={"scope": scope}, **ALL), 5)):
        state = filled(model, n_open=n_open)
        ids = text(3, 4 * T - n_open, seed=1)
        base = logits(model, ids, state)
        for t in (1, T - n_open - 1, T - n_open, T - n_open + 1, 2 * T - 2, 3 * T):
            changed_ids = ids.clone()
            changed_ids[1, t] = (ids[1, t] + 1) % N_VOCAB
            changed = logits(model, changed_ids, state)
            assert torch.equal(changed[1, :t], base[1, :t]), f"token {t} changes outputs before it"
            assert not torch.equal(changed[1, t:], base[1, t:]), "the changed token has no effect at all"
            end = (t + n_open) // T * T + T - n_open  # of its segment
            for row in (0, 2):
                assert torch.equal(changed[row, :end], base[row, :end]), f"token {t} of row 1 changes row {row} before"


def isolated(make: Make) -> None:
    """A row's outputs depend neither on its batch-mates nor on its place in the batch."""
    for model, n_open in ((make(), 0), (make(**ALL), 5)):
        state, ids = filled(model, n_row=4, n_open=n_open), text(4, 4 * T, seed=1)
        base = logits(model, ids, state)
        for order in ([2], [1, 3], [3, 0, 2, 1]):
            index = torch.tensor(order)
            close(logits(model, ids[index], model.select_rows(state, index)), base[index], f"rows {order}")
        # ... and from the first token on, not only from a state that was made together
        alone = torch.cat([logits(model, row[None], None) for row in ids])
        close(alone, logits(model, ids, None), "rows alone")


def _splits(n_token: int, seed: int) -> list[list[int]]:
    """Lengths of calls: random ones, single tokens for a stretch over a segment's edge, whole segments."""
    draw = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := n_token - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(1, 2 * T, (1,), generator=draw))))
    ones = [T - 3, *[1] * 6, T - 3]
    return [lengths, [*ones, n_token - sum(ones)], [T] * (n_token // T) + ([n_token % T] if n_token % T else [])]


def chunk_invariant(make: Make, scope: str = "sequence") -> None:
    """Any split of a text into calls gives the outputs and the memory of one call."""
    for model, n_open in ((make(memory={"scope": scope}), 0), (make(memory={"scope": scope}, **ALL), 5)):
        state, ids = filled(model, n_open=n_open), text(3, 6 * T + 3, seed=1)
        with torch.no_grad():
            whole = model(ids, state=state)
        for lengths in _splits(ids.shape[1], seed=2):
            now, parts = state, []
            for part in ids.split(lengths, dim=1):
                with torch.no_grad():
                    out = model(part, state=now)
                now = out.state
                parts.append(out.logits)
            close(torch.cat(parts, dim=1), whole.logits, f"calls of {lengths}")
            same_memory(now, whole.state, f"calls of {lengths}")
            assert torch.equal(now.local.position, whole.state.local.position)
            assert torch.equal(now.local.n_open.tensor, whole.state.local.n_open.tensor)


def ragged(make: Make) -> None:
    """Rows that get different numbers of tokens per call, padding anywhere, equal rows fed alone."""
    for model, n_open in ((make(), 0), (make(**ALL), 5)):
        draw = torch.Generator().manual_seed(3)
        state = filled(model, n_open=n_open)
        masks = [torch.rand(3, n, generator=draw) < 0.6 for n in (3, 2 * T, T, 1, 3 * T, 2)]
        masks[2][1] = False  # a row that gets nothing
        masks.append(torch.arange(2 * T) < torch.tensor([5, 2 * T, 0])[:, None])  # plain padding at the end
        ids = [text(3, mask.shape[1], seed=i) for i, mask in enumerate(masks)]
        now, outputs = state, []
        for part, mask in zip(ids, masks, strict=True):
            out = logits(model, part, now, mask=mask)
            other = torch.where(mask, part, (part + 7) % N_VOCAB)
            with torch.no_grad():
                result = model(other, state=now, mask=mask)
            assert torch.equal(result.logits[mask], out[mask]), "what stands in padding changes outputs"
            now = result.state
            outputs.append(out)
        for row in range(3):
            mine = torch.cat([part[row][mask[row]] for part, mask in zip(ids, masks, strict=True)])
            got = torch.cat([part[row][mask[row]] for part, mask in zip(outputs, masks, strict=True)])
            with torch.no_grad():
                alone = model(mine[None], state=model.select_rows(state, torch.tensor([row])))
            close(got, alone.logits[0], f"row {row}")
            same_memory(model.select_rows(now, torch.tensor([row])), alone.state, f"row {row}")
    # A document that ends in padding: closing it writes its tokens and nothing of the padding the model computed.
    model = make()
    start, padded = filled(model), text(3, 2 * T, seed=1)
    held = torch.arange(2 * T) < torch.tensor([T + 3, T + 7, 5])[:, None]
    no_reset = torch.zeros(3, 2, dtype=torch.bool)
    with torch.no_grad():
        closed = [
            model.new_context(model(part, state=start, mask=held, reset=reset).state)
            for part in (padded, torch.where(held, padded, (padded + 7) % N_VOCAB))
            for reset in (None, no_reset)
        ]
        one = model.select_rows(start, torch.tensor([1]))
        closed_alone = model.new_context(model(padded[1:2, : T + 7], state=one).state)
    what = "a segment closed before it was full"
    for after in closed[1:]:
        same_memory(closed[0], after, what)
    same_memory(model.select_rows(closed[-1], torch.tensor([1])), closed_alone, f"{what}, alone")


def generates_as_parallel(make: Make) -> None:
    """Greedy generation of rows of unlike length has the logits of a parallel pass of each, and picks their argmax."""
    model = make()
    state, prompt = filled(model, n_row=2, n_open=5), text(2, 4, seed=1)
    mask = torch.tensor([[True] * 4, [False, True, True, False]])
    head, seen = model.head, []

    def record(hidden: Tensor) -> Tensor:
        scores = head(hidden)
        if hidden.dim() == 2:  # the last token alone; what surprises a memory is asked for whole segments
            seen.append(scores)
        return scores

    model.head = record  # type: ignore[method-assign]
    n_new = 2 * T + 3
    tokens = model.generate(prompt, max_new_tokens=n_new, temperature=0, state=state, mask=mask)
    del model.head
    there = torch.cat([mask, torch.ones_like(tokens[:, prompt.shape[1] :], dtype=torch.bool)], dim=1)
    expected = torch.cat(
        [
            logits(model, tokens[row, there[row]][None], model.select_rows(state, torch.tensor([row])))[
                :, -n_new - 1 : -1
            ]
            for row in range(2)
        ]
    )
    close(torch.stack(seen, dim=1), expected, "logits of generation")
    chosen = expected.gather(2, tokens[:, prompt.shape[1] :, None])[..., 0]
    close(chosen, expected.amax(dim=2), "chosen logits against the best")  # equal but for ties within rounding


def loss_of(model: SegmentModel, ids: Tensor, out: Output, mask: Tensor) -> Tensor:
    """The full training loss."""
    assert out.logits is not None
    nll = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    counts = mask[:, 1:] & mask[:, :-1]
    by_row = (nll * counts).sum(dim=1).detach() / counts.sum(dim=1).clamp(min=1)
    own = [modules[0].losses(out.trace[name], by_row).values() for name, modules in model.memory.items()]
    return nll[counts].mean() + sum(value for values in own for value in values)


def _by_slot(read: Read) -> Tensor:
    """Read weights by number of the slot, (B, N, 1000); slots of weight 0 may have any number."""
    assert read.slots is not None
    assert read.weights is not None
    slots = read.slots.masked_fill(read.weights == 0, 0)
    return torch.zeros(*slots.shape[:2], 1000).scatter_add(2, slots, read.weights.detach())


def _other_ways(model: SegmentModel) -> dict[str, Callable[[SegmentModel], AbstractContextManager[None]]]:
    """The ways to run a model that are not the fast one; none that would be the same code again."""
    modules = [module for parts in model.memory.values() for module in parts if writes_within(module)]
    ways: dict[str, Callable[[SegmentModel], AbstractContextManager[None]]] = {}
    if segments_at_once(model) != 1:  # else segments are outside anyway
        ways |= {"segments outside": partial(windows_of, 1), "windows of two": partial(windows_of, 2)}
        ways["windows of four"] = partial(windows_of, 4)
    if any(type(module).scan is not Memory.scan and not module.within for module in modules):
        ways["slow scan"] = slow_scan
    return ways


def schedules_agree(make: Make) -> None:
    """Fast paths and the definition give the same outputs, traces, gradients and states.

    With evictions, documents that begin and end in the window, padding, and a state carried in.
    """
    model = make(**ALL)
    results = {}
    changes = _other_ways(model)
    for kind in ("fast", *changes):
        change = changes.get(kind)
        found = []
        for case in ("documents", "open"):
            ids, reset, mask = windows_of_documents()
            state = filled(model, n_open=0 if case == "documents" else 5)
            if case == "open":
                reset, mask = (
                    torch.tensor([True, False, False]),
                    torch.rand(ids.shape, generator=torch.manual_seed(5)) < 0.7,
                )
            model.zero_grad()
            with nullcontext() if change is None else change(model):
                first = model(ids, state=state, reset=reset, mask=mask)
                second_ids = text(len(ids), 3 * T, seed=6)  # a second window, in which the writes of the first are read
                new = torch.zeros(3, dtype=torch.bool)
                if case == "documents":
                    new[2] = True  # row 2 ended with the window, the others go on
                second = model(second_ids, state=first.state, reset=new)
                last = model(second_ids, state=first.state, reset=new, keep_state=False)
                assert last.state is None
                assert torch.equal(last.logits, second.logits), "outputs depend on whether the state is worked out"
            loss = loss_of(model, ids, first, mask) + loss_of(
                model, second_ids, second, torch.ones_like(second_ids) > 0
            )
            loss.backward()
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            found.append((case, first, second, mask, grads, loss.detach()))
        results[kind] = found
    for kind in changes:
        for (case, *fast), (_, *slow) in zip(results["fast"], results[kind], strict=True):
            what = f"{case}, {kind}"
            close(fast[0].logits[fast[2]], slow[0].logits[fast[2]], f"{what}: outputs")
            close(fast[1].logits, slow[1].logits, f"{what}: outputs of the next window")
            if case == "documents":  # else reads lie on a grid of segments, not where the tokens are
                for name, read in fast[0].reads.items():
                    if read.value is None or read.weights is None:
                        continue
                    weights = (_by_slot(read)[fast[2]], _by_slot(slow[0].reads[name])[fast[2]])
                    close(*weights, f"{what}: slots read by {name}")
                    close(read.value[fast[2]], slow[0].reads[name].value[fast[2]], f"{what}: values read by {name}")
            close(fast[4], slow[4], f"{what}: loss with the memory's own losses")
            same_memory(fast[0].state, slow[0].state, f"{what}: state")
            same_memory(fast[1].state, slow[1].state, f"{what}: next state")
            for name, gradient in fast[3].items():
                scale = slow[3][name].abs().max().item()
                close(gradient, slow[3][name], f"{what}: gradient of {name}", scale=max(scale, 0.1))


def contexts(make: Make) -> None:
    """A context that ends within a call is closed as `new_context` closes it between calls."""
    model = make(**ALL)
    ids = text(3, 5 * T, seed=1)
    length = torch.full((3, 5), T)
    length[:, 1], length[:, 3] = torch.tensor([5, T - 1, 1]), torch.tensor([3, 7, T - 2])  # tokens of each segment
    mask = (torch.arange(T) < length[..., None]).flatten(1)
    breaks = torch.zeros(3, 5, dtype=torch.bool)
    breaks[:, 2] = breaks[:, 4] = True
    for begins in (False, True):
        what = f"a context that begins with {'the call' if begins else 'a later segment'}"
        breaks[:, 0] = begins
        state = filled(model)
        with torch.no_grad():
            whole = model(ids, state=state, mask=mask, breaks=breaks)
            now, parts = (model.new_context(state) if begins else state), []
            for first, last in ((0, 2), (2, 4), (4, 5)):
                cells = slice(first * T, last * T)
                out = model(ids[:, cells], state=now, mask=mask[:, cells])
                now = model.new_context(out.state) if last < 5 else out.state
                parts.append(out.logits)
        close(whole.logits[mask], torch.cat(parts, dim=1)[mask], f"{what}: outputs")
        assert torch.equal(whole.state.local.position, now.local.position), f"{what}: position"
        same_memory(whole.state, now, f"{what}: state")


@torch.no_grad()
def empty_segments(make: Make) -> None:
    """A context or document that begins with a segment of padding is as fresh as one that began without it."""
    model = make(**ALL)
    ids, later = text(2, 2 * T, seed=1), text(2, T, seed=2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 5:] = False  # row 0 ends in the first segment, and nothing of the next is there yet
    begins = torch.tensor([[False, True], [False, False]])
    for name in ("breaks", "reset"):
        state = model(ids, mask=mask, **{name: begins}).state
        told = model(ids[:1, :5]).state
        expected = model.new_context(told) if name == "breaks" else None
        alone = logits(model, later[:1], expected)
        close(logits(model, later, state)[:1], alone, f"{name}, then a segment of padding")
        assert state.local.position[0] == (5 if name == "breaks" else 0), f"{name}: position"


@torch.no_grad()
def closed_once(make: Make) -> None:
    """Closing a context that is closed already changes nothing: no time passes without text."""
    for n_open in (0, 5):
        model = make(**ALL)
        state = model.new_context(filled(model, n_open=n_open))
        later = text(3, 2 * T, seed=1)
        close(logits(model, later, model.new_context(state)), logits(model, later, state), "a context closed twice")
