"""What a model keeps: records and the slots made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memlm.memory.records import MANY, RecordKeeper, Records
from memlm.memory.state import State


class Kept(NamedTuple):
    """A memory module that keeps records."""

    name: str
    memory: str
    number: int  # among the modules of the memory
    reads: list[str]
    module: RecordKeeper


class Opened(NamedTuple):
    """Its persistent bank, to be looked into."""

    module: RecordKeeper
    bank: State
    records: Records


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as those of Python."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def opened_of(kept: list[Kept], banks: Any) -> dict[str, Opened]:
    """The banks of a state by name."""
    parts = ((part, banks.memory[part.memory][part.number]) for part in kept)
    return {part.name: Opened(part.module, bank, part.module.records(bank)) for part, bank in parts}


def merged_from(records: Records, numbers: Sequence[int]) -> Tensor:
    """Which slots were merged of any of the records ``numbers``, (B, n): also those of more origins than they list."""
    return (among(records.origins, numbers) | (records.origins == MANY)).any(dim=2)


def holds(records: Records, numbers: Sequence[int]) -> Tensor:
    """Which slots come from any of the records ``numbers``, (B, n)."""
    return among(records.record, numbers) | merged_from(records, numbers)


def among(ids: Tensor, numbers: Sequence[int]) -> Tensor:
    """Which of ``ids`` are among the ``numbers``."""
    if isinstance(numbers, range):  # of any length
        return (ids >= numbers.start) & (ids < numbers.stop)
    return torch.isin(ids, torch.tensor(list(numbers), device=ids.device, dtype=ids.dtype))


def n_record_of(kept: list[Kept]) -> Tensor:
    """Records written so far."""
    return torch.stack([part.module.records(part.module.bank.state()).n_record[0] for part in kept]).max()


def n_filled(kept: list[Kept]) -> int:
    """How many slots of all banks hold something."""
    return sum(int(part.module.filled(part.module.bank.state()).sum()) for part in kept)


def documents_of(module: RecordKeeper) -> list[int]:
    """Numbers of the documents that the bank holds something of."""
    return module.records(module.bank.state()).document.unique().tolist()
