"""What a question finds in memory."""

from __future__ import annotations

from typing import NamedTuple

READ = 0.1


"""Read weight from which a slot counts as read."""


class Remembered(NamedTuple):
    """A record of the persistent memory, by the slot of it that was found.

    Attributes:
        id: Id of the record, for `ExperienceModel.edit_memory` and `ExperienceModel.forget`. It never changes, and is
            never given again.
        memory: Name and layer of the memory that holds the slot, as ``ltm/2``.
        slot: Number of the slot.
        similarity: Cosine of what was asked and the slot; None if nothing was asked.
        weight: Greatest share of a token's read that came from the slot, in 0..1; None if nothing was asked.
        importance: What the memory gives on the slot, in 0..1.
        age: Passages read to be stored since, those included of which nothing was kept.
        uses: How often the record was among what `ExperienceModel.query_memory` or a conversation showed, with a weight
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
