"""What a memory declares about eviction, checked against plain Python, and how to make a write important.

A memory that chooses what to keep has an entry here, by the name of its class. Memories without one need none: every
law that is no business of theirs skips them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.memory.adaptive import AdaptiveMemory, AdaptiveState
from memlm.memory.auto import AutoMemory, AutoState
from memlm.memory.contract import Segment, Trace
from memlm.memory.engrams import EMPTY, LONG_TERM, Engrams
from memlm.memory.ltm import LongTermMemory
from memlm.memory.memoria import MemoriaMemory
from memlm.models.segments import SegmentModel


class Oracle(NamedTuple):
    """What is known of a memory that chooses.

    Attributes:
        evicts_as_declared: A law: what the memory holds is what its rule says.
        promote: Makes everything written from now on more important than all that was.
    """

    evicts_as_declared: Callable[[laws.Make], None]
    promote: Callable[[SegmentModel], None]


def span_strength(log_gate: list[float], span: int) -> list[float]:
    """By token, the best mean of the windows of ``span`` tokens that cover it; half a window inside is enough."""
    n = len(log_gate)
    best = []
    for token in range(n):
        means = []
        for start in range(token - span + 1, token + 1):
            inside = [log_gate[i] for i in range(start, start + span) if 0 <= i < n]
            if 2 * len(inside) >= span:
                means.append(sum(inside) / len(inside))
        best.append(max(means) if means else log_gate[token])
    return best


def importance(log_gate: list[float], span: int, kind: str) -> list[float]:
    """By token, what it is worth: its span's strength, in which its own gate tells the tokens of a span apart."""
    if kind != "span":
        return list(log_gate)
    return [best + 1e-3 * own for best, own in zip(span_strength(log_gate, span), log_gate, strict=True)]


def keep(
    log_gate: list[float], segment_len: int, span: int, budget: int | None, n_slot: int, kind: str
) -> list[tuple[float, int]]:
    """(importance, position) of what the bank of one document holds after all its segments.

    Args:
        log_gate: By token; the last token of the text has no successor and is not in it.
        segment_len: Tokens per segment; the text ends with a whole one, and is not closed.
        span: Tokens per span; a token waits until all its spans are complete.
        budget: Most tokens that one segment writes.
        n_slot: Size of the bank.
        kind: ``span``, ``token`` or ``fifo``.
    """
    worth = importance(log_gate, span, kind)
    bank: list[tuple[float, int]] = []
    for s in range((len(log_gate) + 1) // segment_len):
        written = range(max(0, s * segment_len - span), (s + 1) * segment_len - span)
        if kind == "fifo":
            newest_first = sorted(written, reverse=True)[:budget]
            bank += [(0.0, token) for token in reversed(newest_first)]
            bank = bank[-n_slot:]
        else:
            bank += sorted(((worth[token], token) for token in written), reverse=True)[:budget]
            bank = sorted(bank, reverse=True)[:n_slot]
    return bank


@torch.no_grad()
def long_term_evicts(make: laws.Make, kind: str = "span", of: str = "LongTermMemory") -> None:
    """The bank holds the best of every segment's best, and each slot what belongs to its token.

    Args:
        make: Builder.
        kind: The rule, the memory's ``importance``.
        of: Name of the memory's class.
    """
    settings: tuple[dict[str, Any], ...] = ({}, {"write_budget": None}, {"span": 5})
    for setting in settings:
        own = {f"{of}.{key}": value for key, value in {"importance": kind, **setting}.items()}
        everything = {"write_budget": None, "n_slot": 1000, "importance": "token"}
        all_slots = make(memory=own | {f"{of}.{key}": value for key, value in everything.items()})
        model = make(memory=own)
        n_segment = 9
        ids = laws.text(3, n_segment * laws.T, seed=9)
        state = laws.filled(model, n_segment=n_segment).memory
        gates = all_slots.new_context(laws.filled(all_slots, n_segment=n_segment)).memory  # closed: all tokens
        for name, modules in model.memory.items():
            if not isinstance(modules[0], LongTermMemory):
                continue
            span, budget, n_slot = modules[0].span, modules[0].write_budget, modules[0].n_slot
            bank, full = state[name][0], gates[name][0]
            for row in range(3):
                slot_of = {int(p): i for i, p in enumerate(full.position[row]) if p >= 0}
                assert len(slot_of) == ids.shape[1] - 1, "every token with a successor makes a slot"
                log_gate = [float(full.priority[row, slot_of[p]]) for p in range(ids.shape[1] - 1)]
                expected = keep(log_gate, laws.T, span, budget, n_slot, kind)
                assert len(expected) == n_slot, "the test evicts nothing"
                held = bank.position[row].tolist()
                assert len(set(held)) == n_slot
                assert min(held) >= 0
                if kind == "fifo":
                    assert sorted(held) == sorted(token for _, token in expected)
                    continue
                found = torch.tensor(sorted(bank.priority[row].tolist()))
                laws.close(found, torch.tensor(sorted(worth for worth, _ in expected)), f"{kind}: importance held")
                spans = span_strength(log_gate, span)
                worth = importance(log_gate, span, kind)
                for slot, position in enumerate(held):
                    assert abs(spans[position] - float(bank.log_gate[row, slot])) < 1e-4, "strength of another token"
                    assert abs(worth[position] - float(bank.priority[row, slot])) < 1e-4, "importance of another token"
                    laws.close(bank.key[row, slot], full.key[row, slot_of[position]], "key of another token")
                    laws.close(bank.value[row, slot], full.value[row, slot_of[position]], "value of another token")


@torch.no_grad()
def open_write_gate(model: SegmentModel) -> None:
    """Every gate of the long-term memories opens wide."""
    for modules in model.memory.values():
        for module in modules:
            if isinstance(module, LongTermMemory):
                module.write_gate[-1].bias += 10


@torch.no_grad()
def auto_keeps(make: laws.Make) -> None:
    """What is kept are the best tokens of those kept before and of the segment, each once, in the order of the text."""
    dropped = {"low": 0, "double": 0, "beyond": 0}
    for setting in ({}, {"threshold": 0.85}, {"n_slot": 3}):
        model = make(memory={f"AutoMemory.{key}": value for key, value in setting.items()})
        for modules in model.memory.values():
            if isinstance(modules[0], AutoMemory):
                _auto_keeps(model, modules[0], dropped)
    assert all(dropped.values()), f"the test drops nothing for one of these reasons: {dropped}"


def _auto_keeps(model: SegmentModel, module: AutoMemory, dropped: dict[str, int]) -> None:
    """The rule, segment by segment, in plain Python; counts in ``dropped`` why tokens went."""
    seen: list[tuple[AutoState, Segment, AutoState]] = []
    write = module.write

    def watch(segment: Segment, state: AutoState) -> tuple[AutoState, Trace]:
        new, trace = write(segment, state)
        seen.append((state, segment, new))
        return new, trace

    module.write = watch  # type: ignore[method-assign]
    model(laws.text(2, 8 * laws.T, seed=9), logits=False)
    del module.write  # type: ignore[method-assign]
    for before, segment, after in seen:
        fresh = segment.hidden[:, segment.lookback :]
        filled = before.ids >= 0
        score = module.scores(torch.cat([before.hidden, fresh], dim=1), before.hidden, filled)
        for row in range(2):
            best: dict[int, tuple[float, int]] = {}  # by id of the token: its score and place
            kept = [(int(before.ids[row, i]), int(before.position[row, i]), i) for i in range(int(filled[row].sum()))]
            told = segment.ids[row, segment.lookback :].tolist()
            first = int(segment.position[row, 0])
            kept += [(token, first + t, module.n_slot + t) for t, token in enumerate(told)]
            for token, place, i in kept:
                value = float(score[row, i])
                dropped["low"] += value < module.threshold
                if value >= module.threshold:
                    dropped["double"] += token in best
                    best[token] = max(best.get(token, (value, place)), (value, place))
            ranked = sorted(((*worth, token) for token, worth in best.items()), reverse=True)
            dropped["beyond"] += len(ranked) > module.n_slot
            expected = sorted((place, token, value) for value, place, token in ranked[: module.n_slot])
            n = len(expected)
            assert after.position[row].tolist() == [place for place, _, _ in expected] + [-1] * (module.n_slot - n)
            assert after.ids[row, :n].tolist() == [token for _, token, _ in expected]
            laws.close(
                after.score[row, :n], torch.tensor([value for _, _, value in expected]), "score of another token"
            )
            for slot, (place, _, _) in enumerate(expected):
                if place >= first:
                    laws.close(after.hidden[row, slot], fresh[row, place - first], "hidden state of another token")


@torch.no_grad()
def score_all_alike(model: SegmentModel) -> None:
    """All tokens get the same score, so that the newest stay."""
    for modules in model.memory.values():
        for module in modules:
            if isinstance(module, AutoMemory):
                module.score_net[2].weight.zero_()


@torch.no_grad()
def engrams_evict(make: laws.Make) -> None:
    """Engrams that go for want of room are long-term, have the least life left, and are the oldest of those."""
    model = make(memory={"extension": 1.0})  # so little that lives are short, and many are equal
    found: list[tuple[Engrams, Engrams]] = []
    for module in _engrams_of(model):
        add = module.graph.add

        def spy(engrams: Engrams, data: torch.Tensor, add: Callable[..., Engrams] = add) -> Engrams:
            found.append((engrams, add(engrams, data)))
            return found[-1][1]

        module.graph.add = spy  # type: ignore[method-assign]
    laws.filled(model, n_segment=20)
    n_evicted = 0
    for before, after in found:
        n_new = int(after.n_born[0] - before.n_born[0])
        for row in range(len(before.kind)):
            held = [slot for slot, kind in enumerate(before.kind[row].tolist()) if kind != EMPTY]
            long = [slot for slot in held if before.kind[row, slot] == LONG_TERM]
            long.sort(key=lambda slot: (float(before.lifespan[row, slot]), int(before.birth[row, slot])))
            n_gone = max(0, n_new - (before.kind.shape[1] - len(held)))
            gone = {int(before.birth[row, slot]) for slot in long[:n_gone]}
            stay = {int(before.birth[row, slot]) for slot in held} - gone
            new = set(range(int(before.n_born[row]), int(after.n_born[row])))
            assert set(after.birth[row][after.kind[row] != EMPTY].tolist()) == stay | new, (
                "others than the shortest-lived"
            )
            n_evicted += n_gone
    assert n_evicted > 20, "the test evicts nothing"


@torch.no_grad()
def give_long_lives(model: SegmentModel) -> None:
    """New engrams live longer than any before."""
    for module in _engrams_of(model):
        module.graph.lifespan += 1000


def _engrams_of(model: SegmentModel) -> list[MemoriaMemory]:
    return [module for modules in model.memory.values() for module in modules if isinstance(module, MemoriaMemory)]


@dataclass
class Item:
    """What an adaptive memory holds, or is offered."""

    key: Tensor
    value: Tensor
    strength: float
    position: int
    long: bool = False


def items_of(state: AdaptiveState, row: int, n_short: int) -> list[Item]:
    """What one row of a state, or of an offer, holds."""
    parts = zip(*(part[row] for part in state), strict=True)
    return [
        Item(key, value, float(strength), int(position), number >= n_short)
        for number, (key, value, strength, position) in enumerate(parts)
        if strength > 0
    ]


def adaptive_store(memory: AdaptiveMemory, held: list[Item], offered: list[Item]) -> list[Item]:
    """One write of one row, item by item: decay, reinforcement, promotion, and who stays."""

    def alike(a: Item, b: Item) -> float:
        return min(float(F.cosine_similarity(x, y, dim=0)) for x, y in ((a.key, b.key), (a.value, b.value)))

    groups = [
        (Item(each.key, each.value, each.strength * memory.decay, each.position, each.long), list[Item]())
        for each in held
    ]
    went: list[int] = []
    for i, item in enumerate(offered):
        best = max(range(len(held)), key=lambda j: alike(item, held[j]), default=None)
        earlier = [j for j in range(i) if alike(item, offered[j]) >= memory.match_threshold]
        if best is not None and alike(item, held[best]) >= memory.match_threshold:
            went.append(best)
        elif earlier:
            went.append(went[earlier[0]])
        else:
            groups.append((Item(0 * item.key, 0 * item.value, 0.0, -1), []))
            went.append(len(groups) - 1)
        groups[went[-1]][1].append(item)
    for slot, joined in groups:
        parts = [Item(slot.key, slot.value, slot.strength, slot.position), *joined]
        if joined:
            total = sum(part.strength for part in parts)
            slot.key = F.normalize(sum(part.strength * part.key for part in parts), dim=0)  # type: ignore[arg-type]
            slot.value = sum(part.strength * part.value for part in parts) / total  # type: ignore[assignment]
        for part in joined:
            slot.strength += part.strength * (1 - slot.strength)
            slot.position = max(slot.position, part.position)
        slot.long = slot.long or slot.strength >= memory.promote_at
    after = [slot for slot, _ in groups]
    newest = sorted((slot for slot in after if not slot.long), key=lambda slot: -slot.position)[: memory.n_short]
    strongest = sorted((slot for slot in after if slot.long), key=lambda slot: -slot.strength)[: memory.n_slot]
    return newest + strongest


def same_items(found: list[Item], expected: list[Item], what: str) -> None:
    """Equal up to rounding, in any order."""
    found, expected = (sorted(each, key=lambda item: (item.position, item.strength)) for each in (found, expected))
    assert [(each.position, each.long) for each in found] == [(each.position, each.long) for each in expected], what
    for a, b in zip(found, expected, strict=True):
        laws.close(torch.tensor(a.strength), torch.tensor(b.strength), f"{what}: strength")
        laws.close(a.key, b.key, f"{what}: key")
        laws.close(a.value, b.value, f"{what}: value")


@torch.no_grad()
def adaptive_evicts(make: laws.Make) -> None:
    """Long-term slots are the strongest of what was promoted, short-term ones the newest of the rest."""
    for setting in ({"promote_at": 0.72, "match_threshold": 0.95}, {"promote_at": 0.85, "match_threshold": 0.6}):
        model = make(memory=setting | {"n_slot": 6, "n_short": 5, "decay": 0.95})
        offers: dict[int, list[AdaptiveState]] = {}
        for modules in model.memory.values():
            for module in modules:
                if isinstance(module, AdaptiveMemory):
                    seen = offers.setdefault(id(module), [])

                    def record(*arguments: Any, items: Any = module.items, seen: Any = seen) -> Any:
                        seen.append(items(*arguments))
                        return seen[-1]

                    module.items = record  # type: ignore[method-assign]
        state = laws.filled(model, n_segment=9).memory
        for name, modules in model.memory.items():
            for module, bank in zip(modules, state[name], strict=True):
                for row in range(3 if isinstance(module, AdaptiveMemory) else 0):
                    held: list[Item] = []
                    n_offered = 0
                    for offer in offers[id(module)]:
                        offered = items_of(offer, row, 0)
                        n_offered += len(offered)
                        held = adaptive_store(module, held, offered)
                    same_items(items_of(bank, row, module.n_short), held, f"row {row}")
                    assert n_offered > module.n_slot + module.n_short, "the test evicts nothing"


def open_controller(model: SegmentModel) -> None:
    """Whatever is written from now on is as important as can be."""
    for modules in model.memory.values():
        for module in modules:
            if isinstance(module, AdaptiveMemory):
                with torch.no_grad():
                    module.to_importance[-1].bias += 10


ORACLES = {
    "LongTermMemory": Oracle(long_term_evicts, open_write_gate),
    "AutoMemory": Oracle(auto_keeps, score_all_alike),
    "MemoriaMemory": Oracle(engrams_evict, give_long_lives),
    "AdaptiveMemory": Oracle(adaptive_evicts, open_controller),
}
