"""What a model keeps: records and the slots made of them, in the persistent banks of its memories.

Shapes: B rows (1 here), n slots, R origins.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.memory.contract import Memory
from memlm.memory.records import MANY, RecordKeeper, Records
from memlm.memory.state import State
from memlm.models.base import LanguageModel, placed


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


def kept_of(model: LanguageModel, what: str) -> list[Kept]:
    """The memory modules that keep records."""
    found = [
        Kept(label, name, number, reads, module)
        for label, name, number, reads, module in placed(model)
        if isinstance(module, RecordKeeper)
    ]
    if not found:
        has = ", ".join(model.memory) or "none"
        raise ConfigError(
            f"{what}: no memory of this model keeps records (memory: {has}); build one whose memory "
            "does (such as memory=ltm), or load its checkpoint"
        )
    return found


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


def ids_of(kept: list[Kept], first: int = 0) -> list[int]:
    """Ids of all records from ``first`` on that hold a slot, in order."""
    found: set[int] = set()
    for part in kept:
        record = part.module.records(part.module.bank.state()).record
        found |= set(record[record >= first].unique().tolist())
    return sorted(found)


def may_be_merged(number: int, kept: list[Kept]) -> bool:
    """Whether a record that holds no slot of its own may be part of a merged one."""
    records = [part.module.records(part.module.bank.state()) for part in kept]
    return number < int(n_record_of(kept)) and any(bool(merged_from(found, [number]).any()) for found in records)


def check_ids(asked: Iterable[Any], kept: list[Kept]) -> list[int]:
    """The ids ``asked``; refuses those of which nothing is stored."""
    n_record, numbers, stored = int(n_record_of(kept)), [], set(ids_of(kept))
    for part in kept:
        stored |= set(part.module.records(part.module.bank.state()).origins.unique().tolist())
    for value in asked:
        number = plain(value)
        if type(number) is not int or not 0 <= number < n_record:
            shown = reprlib.repr(value)
            if n_record == 0:
                raise ConfigError(f"there is no record {shown}: nothing is stored yet")
            raise ConfigError(
                f"there is no record {shown}: ids are whole numbers below {n_record} here; list_memory, or /memory in "
                "a chat, tells them"
            )
        numbers.append(number)
        if number not in stored and MANY not in stored:
            raise ConfigError(
                f"record {number} is no longer stored: it was forgotten, or replaced by more important ones; "
                "list_memory, or /memory in a chat, tells what is"
            )
    return numbers


def without(model: LanguageModel, gone: Callable[[Records], Tensor]) -> Any:
    """A state with what is stored but for the slots that ``gone`` names of their `Records`."""

    def forget(module: Memory, part: State) -> State:
        return module.forget(part, gone(module.records(part))) if isinstance(module, RecordKeeper) else part

    return model.map_memory(forget, model.init_state(1))


def erase(kept: list[Kept], gone: Callable[[Records], Tensor]) -> None:
    """Forget, in place, what is in the slots that ``gone`` names of their `Records`; what is cut short is finished."""
    slots = [gone(part.module.records(part.module.bank.state())) for part in kept]

    def forget() -> None:
        for part, mine in zip(kept, slots, strict=True):
            bank = part.module.bank.release()
            try:
                bank = part.module.forget(bank, mine, owned=True)
            finally:
                part.module.bank.commit(bank)
            part.module.bank.uses().masked_fill_(mine[0], 0)

    try:
        forget()
    except BaseException:
        forget()
        raise


def commit(model: LanguageModel, state: Any) -> None:
    """Make the memories of ``state`` that keep records persistent; slots that changed hands were never used."""
    for name, modules in model.memory.items():
        for module, part in zip(modules, state.memory[name], strict=True):
            if not isinstance(module, RecordKeeper):
                continue
            bank = module.bank.state()
            same = module.records(bank).record == module.records(part).record
            same = same & (module.places(bank) == module.places(part))
            module.bank.commit(part)
            module.bank.uses().mul_(same[0])


def written(model: LanguageModel, after: Callable[[Any], Iterable[Any]], first: int) -> None:
    """Write the persistent banks in place; if that is cut short, nothing of what was written stays.

    Args:
        model: The model.
        after: Of a state that begins with the banks, which is given away, the states after some writes and more.
        first: Id of the first record that is written.
    """

    def release(module: Memory, part: State) -> State:
        return module.bank.release() if isinstance(module, RecordKeeper) else part

    def drop(module: Memory, part: State) -> State:
        return module.forget(part, module.records(part).record >= first) if isinstance(module, RecordKeeper) else part

    state = model.map_memory(release, model.init_state(1))
    try:
        for new in after(state):
            state = new
    except BaseException:
        state = model.map_memory(drop, state)
        raise
    finally:
        for name, modules in model.memory.items():
            for module, part in zip(modules, state.memory[name], strict=True):
                if isinstance(module, RecordKeeper):
                    module.bank.commit(part)
                    record = module.records(part).record[0]
                    module.bank.uses().masked_fill_((record < 0) | (record >= first), 0)


@contextmanager
def at_rest(model: LanguageModel) -> Iterator[None]:
    """Without gradients and dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
