"""What a question finds in memory, and what is known of it.

Shapes: n slots, N tokens, k slots read per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.models.base import LanguageModel
from memlm.store.kept import Kept, Opened

READ = 0.1
"""Read weight from which a slot counts as read."""


class Remembered(NamedTuple):
    """A record of the persistent memory, by the slot of it that was found.

    Attributes:
        id: Id of the record, for ``edit_memory`` and ``forget``. It never changes, and is never given again.
        memory: Name and layer of the memory that holds the slot, as ``ltm/2``.
        slot: Number of the slot.
        similarity: Cosine of what was asked and the slot; None if nothing was asked.
        weight: Greatest share of a token's read that came from the slot, in 0..1; None if nothing was asked.
        importance: What the memory gives on the slot, in 0..1.
        age: Passages read to be stored since, those included of which nothing was kept.
        uses: How often the record was among what ``query_memory`` or a conversation showed, with a weight
            of at least `READ`. Training and generation alone do not count.
        document: Number of the text it was stored with: the id of that text's first record.
        position: Place of the slot's token in that text, in tokens.
        snippet: Text of the slot.
        text: All that is kept of the record's text, with … where tokens were not kept.
        origins: Ids of other records that consolidation merged into the slot.
    """

    id: int
    memory: str
    slot: int
    similarity: float | None
    weight: float | None
    importance: float
    age: int
    uses: int
    document: int
    position: int
    snippet: str
    text: str
    origins: tuple[int, ...]


class Found(NamedTuple):
    """A slot that was read."""

    weight: float
    similarity: float
    memory: str
    slot: int
    record: int


def best_of(found: list[Found], n: int) -> list[Found]:
    """The ``n`` records with the greatest weights, each by its best slot."""
    best: dict[int, Found] = {}
    for part in sorted(found, reverse=True):
        if len(best) < n or part.record in best:
            best.setdefault(part.record, part)
    return list(best.values())


def found_in(
    model: LanguageModel, ids: Sequence[int], first: int, banks: Any, kept: list[Kept], opened: dict[str, Opened]
) -> list[Found]:
    """Slots that the tokens ``ids`` from ``first`` on read."""
    found = []
    device = banks.local.ids.device
    out = model(torch.tensor([list(ids)], device=device), state=banks, write=False, logits=False)
    read_at = [(one.name, place) for one in kept for place in one.reads if place in out.reads]
    for name, place in read_at:
        module, bank, records = opened[name]
        read = out.reads[place]
        slots, weights = read.slots[:, first:], read.weights[:, first:]  # (1, N, k)
        layer = model.memory_layers.index(int(place.rpartition("/")[2]))
        hidden = out.state.local.streams["mixed"][:, layer, model.lookback :][:, first : len(ids)]
        similarity = module.similarity(hidden, bank, slots.clamp(min=0))
        there = (slots >= 0) & (weights > 0)
        columns = weights[there], similarity[there], slots[there], records.record[0, slots[there]]
        for weight, cosine, slot, number in zip(*(column.tolist() for column in columns), strict=True):
            found.append(Found(weight, cosine, name, slot, number))
    return found


def described(model: LanguageModel, found: list[Found], opened: dict[str, Opened]) -> list[Remembered]:
    """What is known of records, each by a slot of it."""
    if not found:
        return []
    slots: dict[str, Tensor] = {}  # of all of these records
    uses: Counter[int] = Counter()
    for name, part in opened.items():
        record = part.records.record[0]
        numbers = torch.tensor([one.record for one in found], device=record.device)
        slots[name] = torch.isin(record, numbers).nonzero()[:, 0]
        of_slot = part.module.bank.uses()[slots[name]]
        for number, n in zip(record[slots[name]].tolist(), of_slot.tolist(), strict=True):
            uses[number] += n
    return [_describe(model, one, opened[one.memory], slots[one.memory], uses[one.record]) for one in found]


def _describe(model: LanguageModel, found: Found, opened: Opened, slots: Tensor, uses: int) -> Remembered:
    """What is known of a record by a slot of it; ``slots`` are among others those of the record."""
    (module, bank, records), slot = opened, found.slot
    places, tokens = module.places(bank), module.tokens(bank)
    assert places is not None
    assert tokens is not None
    mine = slots[records.record[0, slots] == found.record]
    kept: dict[int, int] = {}
    for place, snippet in zip(places[0, mine].tolist(), tokens[0, mine].tolist(), strict=True):
        begin = place + 2 - len(snippet)
        kept |= {begin + i: token for i, token in enumerate(snippet) if token >= 0}
    return Remembered(
        id=found.record,
        memory=found.memory,
        slot=slot,
        similarity=found.similarity,
        weight=found.weight,
        importance=float(records.importance[0, slot]),
        age=int(records.n_record[0]) - 1 - found.record,
        uses=uses,
        document=int(records.document[0, slot]),
        position=int(places[0, slot]),
        snippet=model.tokenizer.decode(token for token in tokens[0, slot].tolist() if token >= 0).strip(),
        text=_stitched(model, kept),
        origins=tuple(number for number in records.origins[0, slot].tolist() if number >= 0),
    )


def _stitched(model: LanguageModel, kept: dict[int, int]) -> str:
    """Text of tokens by their places."""
    runs: list[list[int]] = []
    for place in sorted(kept):
        if place - 1 not in kept:
            runs.append([])
        runs[-1].append(kept[place])
    return " … ".join(model.tokenizer.decode(run).strip() for run in runs)
