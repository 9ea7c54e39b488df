"""What a memory has that keeps records: text can be stored in it, shown, edited and forgotten.

A record is what was stored together: the slots of one segment's write.

Shapes: B rows, n slots, R origins, N tokens, k slots each.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memlm.memory.slots import Slots
from memlm.memory.state import State

MANY = -2
"""In place of an origin: more records were merged than are listed."""


class Records(NamedTuple):
    """Where the slots of a memory come from.

    Attributes:
        record: Id of the record of each slot, (B, n); -1 if empty.
        document: Number of the document it came from, (B, n); -1 if empty.
        origins: Other records that were merged into it, (B, n, R); -1 for none. The last is `MANY` where there
            are more than fit.
        importance: What the memory gives on it, (B, n), in 0..1.
        n_record: Records written so far, (B,): ids are below, and none is given twice.
    """

    record: Tensor
    document: Tensor
    origins: Tensor
    importance: Tensor
    n_record: Tensor


class RecordKeeper(Slots):
    """A memory of slots that knows of each which record it belongs to.

    Every complete segment makes one record more, and ``consolidate`` takes a ``threshold`` (see
    `memlm.models.experience`).
    """

    def places(self, state: State) -> Tensor:
        """See `Slots.places`. Default: the field ``position``."""
        return state.position

    def tokens(self, state: State) -> Tensor:
        """See `Slots.tokens`. Default: the field ``tokens``."""
        return state.tokens

    def records(self, state: State) -> Records:
        """Where each slot comes from."""
        raise NotImplementedError

    def relabel(self, state: State, record: Tensor, document: Tensor) -> State:
        """The state with other ids of records and numbers of documents, (B, n) each.

        Default: the fields of these names are replaced.
        """
        return state._replace(record=record, document=document)

    def admit(self, state: State, other: State) -> State:
        """The state with the slots of another bank admitted by the rule of replacement.

        Their records and documents are numbered on from ``n_record`` of ``state``.
        """
        raise NotImplementedError

    def similarity(self, x: Tensor, state: State, slots: Tensor) -> Tensor:
        """How similar slots are to what is read with, (B, N, k), in -1..1.

        Args:
            x: Hidden states that read, (B, N, D).
            state: Any state.
            slots: Numbers of slots, (B, N, k), none below 0.
        """
        raise NotImplementedError
