"""The law book: what every memory must keep, as plain functions.

A law takes a builder, ``make(memory=None, **model_settings)``, which returns the same small model each time it is
called with the same settings: perturbed parameters (so that no gate or projection sits at a special value) in eval
mode. Each law starts from `filled`, a state in which memory holds several segments and evictions have happened; law 0
proves that memory matters there, so that no other law holds vacuously.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from memlm.cli import compose, config_dir
from memlm.config import INJECTED, ConfigError
from memlm.memory import state as states
from memlm.memory.contract import Memory, Read
from memlm.memory.records import RecordKeeper
from memlm.memory.slots import Slots
from memlm.models.lmcode import LMCode
from memlm.models.segments import SegmentModel
from memlm.models.state import ModelState, Output
from memlm.tensors import Host

Make = Callable[..., SegmentModel]
Nodes = Mapping[str, Mapping[str, Any]]

N_VOCAB = 40
T = 12  # tokens per segment
# Of any model, those of these settings that it has.
MODEL: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 32, "d_ff": 48, "segment_len": T, "overlap": 4}
# Small enough that a handful of segments fills and overfills every memory.
SMALL: dict[str, Any] = {
    "n_slot": 20, "n_token": 50, "d_key": 16, "top_k": 6, "write_budget": 5, "span": 2,
    "n_working": 4, "n_stm": 8, "n_reminded_stm": 4, "n_reminded_ltm": 4, "search_depth": 2,
}  # fmt: skip


# --- builders --------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Every memory there is."""
    return sorted(path.stem for path in (config_dir() / "memory").glob("*.yaml"))


def nodes_of(name: str) -> Nodes:
    """The nodes of ``configs/memory/<name>.yaml``, its defaults included."""
    nodes = OmegaConf.to_container(compose([f"memory={name}"]).memory, resolve=True)
    assert isinstance(nodes, dict)
    return nodes  # type: ignore[return-value]


def class_of(node: Mapping[str, Any]) -> type[Memory]:
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def settings_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor gets."""
    return {key: value for key, value in node.items() if not key.startswith("_")}


def small(cls: type[Memory], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with every size made small: by name where known, else counts and widths of at most 16."""
    known = inspect.signature(cls).parameters
    shrunk = {key: SMALL[key] if key in SMALL else _at_most(key, value) for key, value in settings.items()}
    return shrunk | {key: value for key, value in SMALL.items() if key in known}


def _at_most(key: str, value: Any) -> Any:
    is_size = isinstance(value, int) and not isinstance(value, bool) and key.startswith(("n_", "d_"))
    return min(value, 16) if is_size else value


def builder(nodes: Nodes, shrink: bool = True, model_class: type[SegmentModel] = LMCode) -> Make:
    """``make`` for the memories that ``nodes`` describe."""
    memories = {name: (class_of(node), settings_of(node)) for name, node in nodes.items()}
    return builder_of(memories, shrink, model_class)


def builder_of(
    memories: Mapping[str, tuple[type[Memory], dict[str, Any]]],
    shrink: bool = True,
    model_class: type[SegmentModel] = LMCode,
) -> Make:
    """``make`` for memories by name, each a class and its settings."""
    accepted = inspect.signature(model_class).parameters

    # Settings in `memory` go to each memory that has them: `n_slot`; or to those of one class: `LongTermMemory.n_slot`.
    def make(
        memory: Mapping[str, Any] | None = None, perturb: bool = True, n_vocab: int = N_VOCAB, **model: Any
    ) -> SegmentModel:
        torch.manual_seed(0)
        constructors = {}
        for name, (cls, settings) in memories.items():
            known = inspect.signature(cls).parameters
            split = [(*key.rpartition("."), value) for key, value in (memory or {}).items()]
            own = {key: value for of, _, key, value in split if key in known and of in ("", cls.__name__)}
            constructors[name] = partial(cls, **((small(cls, settings) if shrink else settings) | own))
        sizes = {key: value for key, value in (MODEL | model).items() if key in accepted or key not in MODEL}
        built = model_class(n_vocab, constructors, **sizes)
        if perturb:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in built.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return built.eval()

    return make


def has_slots(name: str) -> bool:
    """Whether all memories of ``configs/memory/<name>.yaml`` can be looked into; false if there is none."""
    classes = [class_of(node) for node in nodes_of(name).values()]
    return bool(classes) and all(issubclass(cls, Slots) for cls in classes)


def takes(make: Make, setting: str) -> bool:
    """Whether a memory of the model has a constructor parameter of this name."""
    modules = (parts[0] for parts in make().memory.values())
    return any(setting in inspect.signature(type(module)).parameters for module in modules)


# --- text and states -------------------------------------------------------------------------------------------------


def text(n_row: int, n_token: int, seed: int = 0, low: int = 0, high: int = N_VOCAB) -> Tensor:
    """Random token ids, (n_row, n_token)."""
    return torch.randint(low, high, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled(model: SegmentModel, n_row: int = 3, n_open: int = 0, n_segment: int = 7) -> ModelState:
    """A state that holds ``n_segment`` segments, and ``n_open`` tokens of the next."""
    ids = text(n_row, n_segment * model.segment_len + n_open, seed=9)
    return model(ids.to(model.embedding.weight.device), logits=False).state


@torch.no_grad()
def logits(model: SegmentModel, ids: Tensor, state: ModelState | None, **options: Any) -> Tensor:
    """Logits of one call."""
    return model(ids, state=state, **options).logits


def close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Equal up to fp32 rounding."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if not a.numel():
        return
    error = (a - b).abs().max().item()
    assert error <= tolerance, f"{what}: differ by {error:.3g}"  # false for NaN as well


def named_tensors(state: Any, prefix: str = "", host: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with its path; without each `Host` if ``host`` is false."""
    if isinstance(state, Host):
        state = state.tensor if host else None
    if isinstance(state, Tensor):
        yield prefix, state
    elif state is not None:
        parts = state._asdict() if hasattr(state, "_asdict") else state
        for key, value in parts.items() if isinstance(parts, dict) else enumerate(parts):
            yield from named_tensors(value, f"{prefix}.{key}" if prefix else str(key), host)


def same_memory(a: ModelState, b: ModelState, what: str) -> None:
    """Equal memory states, up to fp32 rounding. A `Host` may be a bound, which depends on the calls made."""
    pairs = zip(named_tensors(a.memory, host=False), named_tensors(b.memory, host=False), strict=True)
    for (name, left), (_, right) in pairs:
        if left.is_floating_point():
            close(left, right, f"{what}: {name}")
        else:
            assert torch.equal(left, right), f"{what}: {name} differs"


# --- 0: alive --------------------------------------------------------------------------------------------------------


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


# --- 1: causal -------------------------------------------------------------------------------------------------------


def causal(make: Make, scope: str = "sequence") -> None:
    """Changing a token changes no output before it, bit for bit; where banks are shared, of no row."""
    for model, n_open in ((make(memory={"scope": scope}), 0), (make(memory={"scope": scope}, memory_layers="all"), 5)):
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


# --- 2: isolated -----------------------------------------------------------------------------------------------------


def isolated(make: Make) -> None:
    """A row's outputs depend neither on its batch-mates nor on its place in the batch."""
    for model, n_open in ((make(), 0), (make(memory_layers="all"), 5)):
        state, ids = filled(model, n_row=4, n_open=n_open), text(4, 4 * T, seed=1)
        base = logits(model, ids, state)
        for order in ([2], [1, 3], [3, 0, 2, 1]):
            index = torch.tensor(order)
            close(logits(model, ids[index], model.select_rows(state, index)), base[index], f"rows {order}")
        # ... and from the first token on, not only from a state that was made together
        alone = torch.cat([logits(model, row[None], None) for row in ids])
        close(alone, logits(model, ids, None), "rows alone")


# --- 3: chunk-invariant ----------------------------------------------------------------------------------------------


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
    for model, n_open in ((make(memory={"scope": scope}), 0), (make(memory={"scope": scope}, memory_layers="all"), 5)):
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
    for model, n_open in ((make(), 0), (make(memory_layers="all"), 5)):
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
    state, ids, mask = (
        filled(model),
        text(3, 2 * T, seed=1),
        torch.arange(2 * T) < torch.tensor([T + 3, T + 7, 5])[:, None],
    )
    no_reset = torch.zeros(3, 2, dtype=torch.bool)
    with torch.no_grad():
        closed = [
            model.new_context(model(padded, state=state, mask=mask, reset=reset).state)
            for padded in (ids, torch.where(mask, ids, (ids + 7) % N_VOCAB))
            for reset in (None, no_reset)
        ]
        row = model.select_rows(state, torch.tensor([1]))
        alone = model.new_context(model(ids[1:2, : T + 7], state=row).state)
    for other in closed[1:]:
        same_memory(closed[0], other, "a segment closed before it was full")
    same_memory(model.select_rows(closed[-1], torch.tensor([1])), alone, "a segment closed before it was full, alone")


def generates_as_parallel(make: Make) -> None:
    """Greedy generation with the cache has the logits of one parallel pass, and picks their argmax."""
    model = make()
    state, prompt = filled(model, n_row=2, n_open=5), text(2, 4, seed=1)
    head, seen = model.head, []

    def record(hidden: Tensor) -> Tensor:
        scores = head(hidden)
        if hidden.dim() == 2:  # the last token alone; what surprises a memory is asked for whole segments
            seen.append(scores)
        return scores

    model.head = record  # type: ignore[method-assign]
    tokens = model.generate(prompt, max_new_tokens=2 * T + 3, temperature=0, state=state)
    del model.head
    expected = logits(model, tokens, state)[:, prompt.shape[1] - 1 : -1]
    close(torch.stack(seen, dim=1), expected, "logits of generation")
    chosen = expected.gather(2, tokens[:, prompt.shape[1] :, None])[..., 0]
    close(chosen, expected.amax(dim=2), "chosen logits against the best")  # equal but for ties within rounding


@contextmanager
def windows_of(n_segment: int, model: SegmentModel) -> Iterator[None]:
    """Run so many segments after the other through all layers; one by one is the definition."""
    model.n_together = n_segment
    try:
        yield
    finally:
        model.n_together = None


@contextmanager
def slow_scan(model: SegmentModel) -> Iterator[None]:
    """Read and write segment by segment within each layer, by `Memory.scan`."""
    modules = [module for parts in model.memory.values() for module in parts if not module.within]
    for module in modules:
        module.scan = types.MethodType(Memory.scan, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.scan


def windows_of_documents(n_row: int = 3, n_segment: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, reset by segment and mask of a window with documents that begin and end (padded) in its middle."""
    ids = text(n_row, n_segment * T, seed=4)
    reset = torch.zeros(n_row, n_segment, dtype=torch.bool)
    mask = torch.ones(n_row, n_segment, T, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = reset[1, 2] = reset[1, 5] = True
    mask[0, 2, 5:] = mask[1, 1, 1:] = mask[1, 4, T - 1 :] = False  # the ends of documents
    mask[2, -1, 4:] = False  # a document that ends with the window
    return ids, reset, mask.flatten(1)


def _loss(model: SegmentModel, ids: Tensor, out: Output, mask: Tensor) -> Tensor:
    """The full training loss."""
    assert out.logits is not None
    nll = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    counts = mask[:, 1:] & mask[:, :-1]
    by_row = (nll * counts).sum(dim=1).detach() / counts.sum(dim=1).clamp(min=1)
    own = [modules[0].losses(out.trace[name], by_row).values() for name, modules in model.memory.items()]
    return nll[counts].mean() + sum(value for values in own for value in values)


def _by_slot(read: Read) -> Tensor:
    """Read weights by number of the slot, (B, N, 1000); slots of weight 0 may have any number."""
    slots = read.slots.masked_fill(read.weights == 0, 0)
    return torch.zeros(*slots.shape[:2], 1000).scatter_add(2, slots, read.weights.detach())


def schedules_agree(make: Make) -> None:
    """Fast paths and the definition give the same outputs, traces, gradients and states.

    With evictions, documents that begin and end in the window, padding, and a state carried in.
    """
    model = make(memory_layers="all")
    results = {}
    changes = {
        "segments outside": partial(windows_of, 1),
        "windows of two": partial(windows_of, 2),
        "windows of four": partial(windows_of, 4),
        "slow scan": slow_scan,
    }
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
            with change(model) if change else contextmanager(lambda: iter([None]))():
                first = model(ids, state=state, reset=reset, mask=mask)
                second_ids = text(len(ids), 3 * T, seed=6)  # a second window, in which the writes of the first are read
                new = torch.zeros(3, dtype=torch.bool)
                if case == "documents":
                    new[2] = True  # row 2 ended with the window, the others go on
                second = model(second_ids, state=first.state, reset=new)
                last = model(second_ids, state=first.state, reset=new, keep_state=False)
                assert last.state is None
                assert torch.equal(last.logits, second.logits), "outputs depend on whether the state is worked out"
            loss = _loss(model, ids, first, mask) + _loss(model, second_ids, second, torch.ones_like(second_ids) > 0)
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
                close(gradient, slow[3][name], f"{what}: gradient of {name}", tolerance=1e-4 * max(scale, 0.1))


def contexts(make: Make) -> None:
    """A context that ends within a call is closed as `new_context` closes it between calls."""
    model = make(memory_layers="all")
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
    model = make(memory_layers="all")
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
        model = make(memory_layers="all")
        state = model.new_context(filled(model, n_open=n_open))
        later = text(3, 2 * T, seed=1)
        close(logits(model, later, model.new_context(state)), logits(model, later, state), "a context closed twice")


# --- 4: reset --------------------------------------------------------------------------------------------------------


def resets(make: Make) -> None:
    """A reset row behaves as a fresh one, at the start of a call or in its middle; other rows are untouched."""
    for model, n_open in ((make(), 0), (make(memory_layers="all"), 5)):
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


# --- 5: pure ---------------------------------------------------------------------------------------------------------


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


# --- 6: gradient reach -----------------------------------------------------------------------------------------------


def reach(make: Make) -> None:
    """Gradients flow through writes inside the window and are exactly cut at its edge."""
    half = N_VOCAB // 2  # early text uses the lower half of the vocabulary, late text the upper: no other link
    model = make(memory={"gradient": True}, overlap=0)  # that which stops gradients by a setting is judged without
    early, late = text(2, T, seed=1, high=half), text(2, 3 * T, seed=2, low=half)

    def gradient(out: Output) -> float:
        model.zero_grad()
        probe = torch.randn(out.hidden[:, -T:].shape, generator=torch.Generator().manual_seed(3))
        (out.hidden[:, -T:] * probe).sum().backward()  # no logits: the head is tied to the embedding
        gradients = model.embedding.weight.grad
        return gradients[:half].abs().max().item()

    inside = gradient(model(torch.cat([early, late], dim=1), logits=False))
    assert inside > 1e-6, "a late loss has no gradient with respect to the first segment of the window"
    carried = model(early, logits=False).state
    assert gradient(model(late, state=carried, logits=False)) > 1e-6, "no gradient through a state that is not detached"
    before = model(torch.cat([early, late[:, :T]], dim=1), logits=False).state
    outside = gradient(model(late[:, T:], state=states.detach(before), logits=False))
    assert outside == 0.0, f"gradient {outside} across the edge of the window"
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def every_parameter_learns(make: Make) -> None:
    """The full training loss over two windows gives every parameter a gradient."""
    variants: list[dict[str, Any]] = [{"memory_layers": "all"}]
    if "position" in inspect.signature(type(make())).parameters:
        variants.append({"position": "learned"})
    for settings in variants:
        model = make(**settings).train()
        ids, mask = text(3, 4 * T, seed=1), torch.ones(3, 4 * T, dtype=torch.bool)
        out = model(ids)
        _loss(model, ids, out, mask).backward()
        out = model(ids, state=states.detach(out.state))
        _loss(model, ids, out, mask).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
            assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


# --- 7: bounded ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bounded(make: Make, n_write: int = 10_000) -> None:
    """After ``n_write`` writes the state has the size it began with and finite values."""
    memory = {"span": 1, "write_budget": 2}
    needed = max(make(memory=memory).lookback, 1)
    model = make(memory=memory, segment_len=needed, n_layer=1, overlap=0)
    state = model.init_state(1)
    size, shapes = states.n_byte(state), [tensor.shape for tensor in states.tensors(state)]
    window = 100
    for i in range(-(-n_write // window)):
        state = model(text(1, window * needed, seed=i), state=state, logits=False).state
        assert states.n_byte(state) == size, (
            f"{size} bytes became {states.n_byte(state)} within {(i + 1) * window} writes"
        )
    assert [tensor.shape for tensor in states.tensors(state)] == shapes
    for name, tensor in named_tensors(state):
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{name} is not finite"
    assert logits(model, text(1, needed), state).isfinite().all()


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


# --- 8: round trip ---------------------------------------------------------------------------------------------------


def round_trip(make: Make, scope: str = "sequence") -> None:
    """Saved, loaded into a newly built model and continued equals never stopped, bit for bit."""
    for n_open in (0, 5):
        model = make(memory={"scope": scope}, memory_layers="all")
        state, ids = filled(model, n_open=n_open), text(3, 3 * T, seed=1)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "state": states.to_dict(state)}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other = make(memory={"scope": scope}, memory_layers="all")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(loaded["model"])
        restored = states.from_dict(loaded["state"], like=other.init_state(3))
        for (name, now), (_, before) in zip(named_tensors(restored), named_tensors(state), strict=True):
            assert torch.equal(now, before), f"{name} did not survive"
        assert torch.equal(logits(other, ids, restored), logits(model, ids, state)), "continued otherwise"


# --- 9: useful -------------------------------------------------------------------------------------------------------


def recall_batch(n_row: int, draw: torch.Generator, n_segment: int = 3, n_filler: int = 7) -> tuple[Tensor, Tensor]:
    """A key with its value in segment 1, filler, the key again as the last token of the last segment: ids, values.

    Ids: 0 the key; 1..8 values; the rest filler.
    """
    ids = torch.randint(9, 9 + n_filler, (n_row, n_segment * 8), generator=draw)
    value = torch.randint(1, 9, (n_row,), generator=draw)
    place = torch.randint(0, 5, (n_row,), generator=draw)
    rows = torch.arange(n_row)
    ids[rows, place], ids[rows, place + 1], ids[:, -1] = 0, value, 0
    return ids, value


def learn_recall(
    make: Make, n_step: int = 250, n_segment: int = 3, n_filler: int = 7, **memory: Any
) -> tuple[SegmentModel, int]:
    """A small model trained on `recall_batch` until it knows the task, and the steps that took, at most ``n_step``."""
    memory = {"n_slot": 16, "d_key": 32, "span": 2, "write_budget": 8, "n_working": 4, "n_stm": 8} | memory
    model = make(memory, perturb=False, n_vocab=9 + n_filler, n_layer=2, segment_len=8, overlap=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(0)
    for step in range(n_step):
        ids, value = recall_batch(32, draw, n_segment, n_filler)
        out = model(ids, logits=False)
        by_row = F.cross_entropy(model.head(out.hidden[:, -1]), value, reduction="none")
        own = [modules[0].losses(out.trace[name], by_row.detach()).values() for name, modules in model.memory.items()]
        nll = by_row.mean()
        optimizer.zero_grad()
        (nll + sum(loss for losses in own for loss in losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 24 and nll < 0.05:
            break
    return model.eval(), step + 1


@torch.no_grad()
def recall_scores(model: SegmentModel, n_segment: int = 3, n_filler: int = 7) -> dict[str, tuple[float, float]]:
    """NLL and accuracy on 256 questions of `recall_batch`: with memory, with another row's, and wiped."""
    ids, value = recall_batch(256, torch.Generator().manual_seed(1), n_segment, n_filler)
    state = model(ids[:, :-8], logits=False).state
    another = model.with_memory(state, model.select_rows(state, torch.arange(len(ids)).roll(1)))
    scores = {}
    for name, start in (("memory", state), ("swapped", another), ("wiped", model.wipe(state))):
        guess = logits(model, ids[:, -8:], start)[:, -1]
        scores[name] = (F.cross_entropy(guess, value).item(), (guess.argmax(1) == value).float().mean().item())
    return scores


def useful(make: Make, n_step: int = 250, seconds: float = 30.0) -> None:
    """After a short training, what was told is known with memory, and not without or with another row's."""
    begin = time.process_time()
    model, n_done = learn_recall(make, n_step)
    spent = time.process_time() - begin
    scores = recall_scores(model)
    (nll, accuracy), (nll_wiped, accuracy_wiped) = scores["memory"], scores["wiped"]
    accuracy_swapped = scores["swapped"][1]
    assert accuracy > 0.6, f"recalls {accuracy:.0%} after {n_done} steps, {accuracy_wiped:.0%} with memory wiped"
    assert accuracy_wiped < 0.3, f"{accuracy_wiped:.0%} without memory: the task leaks"
    assert accuracy_swapped < 0.3, f"{accuracy_swapped:.0%} with another row's memory: it is not what is read"
    assert nll < nll_wiped - 0.5, f"NLL {nll:.2f} with memory, {nll_wiped:.2f} wiped"
    assert spent < seconds, f"took {spent:.0f} s"


# --- 10: described ---------------------------------------------------------------------------------------------------


def described(nodes: Nodes) -> None:
    """YAML keys are the constructor's parameters, with their defaults; sizes and costs are reported."""
    for name, node in nodes.items():
        cls = class_of(node)
        parameters = inspect.signature(cls).parameters
        expected = set(parameters) - INJECTED
        assert set(settings_of(node)) == expected, f"{name}: YAML and constructor of {cls.__name__} differ"
        for key, value in settings_of(node).items():
            default = parameters[key].default
            assert default is inspect.Parameter.empty or default == value, (
                f"{name}.{key}: {value} in YAML, {default} in code"
            )
        assert cls.__doc__, f"{cls.__name__} has no description"
        for key in expected:
            assert f"{key}:" in inspect.getdoc(cls), f"{cls.__name__} does not describe {key}"
    model = builder(nodes)()
    empty, full = model.init_state(2), filled(model, n_row=2)
    for name, modules in model.memory.items():
        for module, before, after in zip(modules, empty.memory[name], full.memory[name], strict=True):
            pairs = zip(states.tensors(before), states.tensors(after), strict=True)
            assert not all(torch.equal(a, b) for a, b in pairs), f"{name}: a memory that was written is as fresh"
            if not isinstance(module, Slots):
                continue
            assert not module.filled(before).any(), f"{name}: a fresh memory holds something"
            assert module.filled(after).any(dim=1).all(), f"{name}: a memory that was written holds nothing"
            assert module.filled(after).shape == module.filled(before).shape
    for name, parts in model.init_state(2).memory.items():
        one, two = (states.n_byte(model.init_state(n).memory[name]) for n in (1, 2))
        assert two > 0, f"{name} has no state"
        assert two in (one, 2 * one), f"{name}: {one} bytes for one row, {two} for two"
        assert len(parts) == len(model.memory[name])
        for module in model.memory[name]:
            assert isinstance(module.flops_per_token(), int)
            assert module.flops_per_token() > 0


# --- 11: inspectable -------------------------------------------------------------------------------------------------


@torch.no_grad()
def inspectable(make: Make, scope: str = "sequence") -> None:
    """Contents are one vector per slot; a slot that was forgotten adds nothing to a read, and no other slot changes."""
    model = make(memory={"scope": scope}, memory_layers="all")
    state, ids = filled(model, n_row=2), text(2, T, seed=1)
    passed = copy.deepcopy(state)

    def forget(part: Callable[[Tensor], Tensor]) -> ModelState:
        """``part`` says which of the slots' numbers (B, n_slot) are forgotten."""

        def of(module: Memory, held: Any) -> Any:
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


# --- 12: forgets -----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of letters, for the operations."""

    letters = " abcdefghijklmnopqrstuvwxyz0123456789.,\n"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[self.letters.index(letter) for letter in text] for text in texts]

    def fingerprint(self) -> str:
        return "letters"


SECRET, OTHERS = "zyx wvu.", ("abc def.", "ghi jkl mn.", "pqr st a.")


@torch.no_grad()
def forgets(make: Make, memory: Mapping[str, Any] | None = None) -> None:
    """A text that was stored and forgotten was never stored: in what is held, read, and written to files.

    Alone, twice, merged by consolidation, put in place of another text, and replaced by one. Up to the order of slots
    and the ids of records.
    """

    def told(*texts: str) -> SegmentModel:
        model = make(memory={"n_slot": 200} | dict(memory or {}), memory_layers="all")
        model.tokenizer = Letters()  # type: ignore[assignment]
        for part in texts:
            assert model.store_experience(part), f"nothing of {part!r} is kept"
        return model

    first, second, third = OTHERS
    model = told(first, SECRET, second)
    traces = _only_in(_rows(model), _rows(told(*OTHERS)))
    assert traces, "the secret has no slot of its own"
    model.forget(1)
    _never_told(model, told(first, second), traces, "one of three texts")

    model = told(SECRET)
    model.forget(0)
    _never_told(model, told(), traces, "the only text")

    model = told(first, SECRET, second, SECRET)
    model.forget([1, 3])
    _never_told(model, told(first, second), traces, "a text that was stored twice")

    for number in (1, 3):
        model, naive = told(first, SECRET, second, SECRET), told(first, second)
        assert model.consolidate(1e-3)["merged"] > naive.consolidate(1e-3)["merged"], "nothing was merged"
        try:
            model.forget(number)
        except ConfigError as error:
            raise AssertionError(f"a text that was merged with another: {error}") from error
        for module in _keepers(model):
            module.check(module.bank.state())
        _never_told(model, naive, traces, "a text that was merged with another")

    model = told(first, second)
    model.edit_memory(1, SECRET)
    model.forget(1)
    _never_told(model, told(first), traces, "a text put in place of another")

    model = told(first, SECRET, second)
    model.edit_memory(1, third)
    _never_told(model, told(first, third, second), traces, "a text that another took the place of")


def _keepers(model: SegmentModel) -> list[RecordKeeper]:
    """The modules that keep records."""
    return [module for modules in model.memory.values() for module in modules if isinstance(module, RecordKeeper)]


def _rows(model: SegmentModel) -> list[Tensor]:
    """What slots hold, vector by vector: real numbers and token ids."""
    found: list[Tensor] = []
    for module in _keepers(model):
        bank = module.bank.state()
        filled = module.filled(bank)
        vectors = [part for part in states.tensors(bank) if part.is_floating_point() and part.dim() == 3]
        tokens = module.tokens(bank)
        assert tokens is not None
        found += [row for part in (*vectors, tokens) if part.shape[:2] == filled.shape for row in part[filled]]
    return found


def _only_in(rows: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """Rows that are unlike all ``others``."""
    return [row for row in rows if not _like(row, others)]


def _like(row: Tensor, others: list[Tensor]) -> bool:
    """Whether a vector is among ``others``, or nearly."""
    same = [other for other in others if other.shape == row.shape and other.dtype == row.dtype]
    return bool(same) and bool(((torch.stack(same) - row).abs().sum(dim=1) <= 1e-2 * row.abs().sum()).any())


def _never_told(model: SegmentModel, naive: SegmentModel, traces: list[Tensor], what: str) -> None:
    """``model`` holds, reads and writes to files what ``naive`` does, and none of the ``traces``."""
    for module, other in zip(_keepers(model), _keepers(naive), strict=True):
        mine, theirs = _in_order(module), _in_order(other)
        assert mine.keys() == theirs.keys()
        for name, part in mine.items():
            close(part.double(), theirs[name].double(), f"{what}: {name}")
    ids = text(2, 2 * T, seed=3)
    close(logits(model, ids, None), logits(naive, ids, None), f"{what}: outputs")
    with tempfile.TemporaryDirectory() as folder:
        model.save_memory(f"{folder}/memory")
        file = Path(f"{folder}/memory").read_bytes()
    checkpoint = io.BytesIO()
    torch.save(model.state_dict(), checkpoint)
    for where, content in {"the memory file": file, "the checkpoint": checkpoint.getvalue()}.items():
        left = sum(row.contiguous().numpy().tobytes() in content for row in traces)
        assert not left, f"{what}: {left} vectors of what was forgotten are left in {where}"
    for name, buffer in model.named_buffers():
        left = len(traces) - len(_only_in(traces, list(buffer.flatten(0, -2)) if buffer.dim() > 1 else []))
        assert not left, f"{what}: {left} vectors of what was forgotten, or like them, are left in {name}"


def _in_order(module: RecordKeeper) -> dict[str, Tensor]:
    """What slots hold, by record and place; records and documents are numbered by their order."""
    bank = module.bank.state()
    filled, places, tokens, records = (
        module.filled(bank)[0],
        module.places(bank),
        module.tokens(bank),
        module.records(bank),
    )
    assert places is not None
    assert tokens is not None
    order = (records.record[0] * 2**32 + places[0])[filled].argsort()
    held = {"place": places, "tokens": tokens, "origins": records.origins, "importance": records.importance}
    held |= {
        name: part
        for name, part in named_tensors(bank)
        if part.is_floating_point() and part.shape[:2] == filled[None].shape
    }
    found = {name: part[0, filled][order] for name, part in held.items()}
    for name, part in {"record": records.record, "document": records.document}.items():
        found[name] = part[0, filled][order].unique(return_inverse=True)[1]
    return found
