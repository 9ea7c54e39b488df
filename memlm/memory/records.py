"""What a memory has that keeps records: text can be stored in it, shown, edited and forgotten.

A record is what was stored together: the slots of one segment's write.

Shapes: B rows, n slots, R origins, N tokens, k slots each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlm import tensors
from memlm.memory.slots import Slots
from memlm.memory.state import State, map_tensors, named_tensors

MANY = -2
"""In place of an origin: more records were merged than are listed."""

MOST_RECORDS = 2**30
"""Records that were written to a memory which is read from a file, at most: a sum of two ids fits 32 bits."""

_FURTHEST = 2**32 - 1  # place in a document, or number of one, in what is read from a file


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

    Every complete segment makes one record more, and ``consolidate`` takes a ``threshold``, and whether the state is
    ``owned`` (see `memlm.store.operations`).
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

    def forget(self, state: State, slots: Tensor, owned: bool = False) -> State:
        """See `Slots.forget`. A state that is ``owned`` may be changed in place, only at these slots."""
        if not owned or torch.is_grad_enabled():
            return super().forget(state, slots)
        row, slot = slots.nonzero(as_tuple=True)

        def empty(tensor: Tensor, fresh: Tensor) -> Tensor:
            if tensor.shape[:2] != slots.shape:
                return tensor
            mine = tensors.owned(tensor, given=True)
            mine[row, slot] = fresh[row, slot]
            return mine

        return map_tensors(empty, state, self.init_state(len(slots)))

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

    def check(self, state: State) -> None:
        """See `Memory.check`.

        Also ids, numbers of documents, places, tokens and importances out of range, and anything in a slot that is
        empty.
        """
        super().check(state)
        records, filled = self.records(state), self.filled(state)
        places, tokens, n_record = self.places(state), self.tokens(state), records.n_record[:, None]
        origins, listed = records.origins, records.origins.clone()
        listed[..., -1] = listed[..., -1].where(listed[..., -1] != MANY, -1)
        wrong = {
            f"the number of records written is not in 0..{MOST_RECORDS}": (n_record < 0) | (n_record > MOST_RECORDS),
            "the id of a record is not below their number": (records.record < 0) | (records.record >= n_record),
            "an origin is no id of a record": ((listed < -1) | (origins >= n_record[..., None])).any(dim=2),
            "the number of a document is out of range": (records.document < 0) | (records.document > _FURTHEST),
            "the place of a token is out of range": (places < 0) | (places > _FURTHEST),
            "the id of a token is negative": (tokens < -1).any(dim=2) | (tokens[..., -1] < 0),
            "the importance of a slot is not in 0..1": (records.importance < 0) | (records.importance > 1),
        }
        for what, where in wrong.items():
            if bool((where if where.shape[1] == 1 else where & filled).any()):
                raise ValueError(what)
        fresh = named_tensors(self.init_state(len(filled)))
        for name, part in named_tensors(state).items():
            if part.shape[:2] == filled.shape:
                other = part != fresh[name]
                if bool((other.flatten(2).any(dim=2) if part.dim() > 2 else other)[~filled].any()):
                    raise ValueError(f"{name} holds something where no record is")
