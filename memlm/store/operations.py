"""What a model has stored, as data: store, query, edit, forget, consolidate, save and load.

Each operation is a function of a model, and a method of that name of `memlm.models.segments.SegmentModel`. Operations
work on the persistent bank of each memory that keeps records; text that begins with ``state=None`` begins with a copy
of it. A record is a passage of whole sentences, no longer than a segment, and read in a context of its own with reads
off. So what is stored of it depends on its own text alone, and when it is forgotten nothing of it is left in other
records.

Shapes: B rows (1 here), n slots.
"""

from __future__ import annotations

import os
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memlm.config import ConfigError, whole
from memlm.memory.contract import Memory
from memlm.memory.records import MOST_RECORDS, RecordKeeper, Records
from memlm.memory.state import State
from memlm.models.base import LanguageModel
from memlm.store import memory_file
from memlm.store.kept import (
    at_rest,
    check_ids,
    commit,
    documents_of,
    erase,
    holds,
    ids_of,
    kept_of,
    may_be_merged,
    merged_from,
    n_filled,
    n_record_of,
    opened_of,
    plain,
    without,
    written,
)
from memlm.store.passages import absorbed, encode_text, passages_of, progress_bar
from memlm.store.remembered import READ, Found, Remembered, best_of, described, found_in


def store_experience(model: LanguageModel, text: str) -> list[int]:
    """Store a text in the persistent memory.

    Args:
        model: The model.
        text: Any text. It is cut into passages of whole sentences of up to a segment, one record each.

    Returns:
        Ids of its records, in order. A record none of whose slots was found worth keeping, or that a later one has
        replaced again, is not among them.

    Raises:
        ConfigError: If the text is empty or the model has no memory that keeps records.
    """
    kept = kept_of(model, "store_experience")
    passages = passages_of(model, text)
    with at_rest(model):
        first = int(n_record_of(kept))
        written(model, lambda state: absorbed(model, passages, state, first), first)
    return ids_of(kept, first)


def query_memory(model: LanguageModel, text: str, top_k: int = 5) -> list[Remembered]:
    """What the model reads from the persistent memory when it reads a text.

    Args:
        model: The model.
        text: What to look for.
        top_k: Most records to return.

    Returns:
        Records by read weight, greatest first, each once, by the slot that was read most. There are fewer if the
        model reads fewer.

    Raises:
        ConfigError: If the text is empty, ``top_k`` is no whole number of at least 1, or the model has no memory
            that keeps records.
    """
    kept_of(model, "query_memory")
    return recalled(model, encode_text(model, text), top_k=whole("top_k", top_k, least=1))


def recalled(
    model: LanguageModel, ids: Sequence[int], first: int = 0, top_k: int = 1, summed: bool = False
) -> list[Remembered]:
    """What is read from the persistent memory for tokens; see `query_memory`.

    Args:
        model: The model.
        ids: Token ids of a text. It is read in pieces shorter than a segment, each in a context of its own.
        first: The first token whose reads are of interest.
        top_k: Most records to return.
        summed: Whether records are ranked by the weights of all tokens together, and not by the greatest of one: what
            fits the text as a whole comes first, and not what has one of its words.
    """
    kept = kept_of(model, "recalled")
    piece = max(model.segment_len - 1, 1)  # a complete segment would be left behind, with what it reads with
    best: list[Found] = []
    totals: defaultdict[int, float] = defaultdict(float)
    with at_rest(model):
        banks = model.bank_state()
        opened = opened_of(kept, banks)
        for begin in progress_bar(range(0, len(ids), piece), "querying"):
            if begin + piece > first:
                found = found_in(model, ids[begin : begin + piece], max(first - begin, 0), banks, kept, opened)
                for part in found:
                    totals[part.record] += part.weight
                best = best_of([*best, *found], len(totals) if summed else top_k)
        if summed:
            best = sorted(best, key=lambda part: -totals[part.record])[:top_k]
        for part in best:
            if part.weight >= READ:
                opened[part.memory].module.bank.uses()[part.slot] += 1
        return described(model, best, opened)


def list_memory(model: LanguageModel, n: int = 10) -> list[Remembered]:
    """The ``n`` latest records of the persistent memory, newest first, each by its most important slot.

    Raises:
        ConfigError: If ``n`` is no whole number of at least 0, or the model has no memory that keeps records.
    """
    kept = kept_of(model, "list_memory")
    n = whole("n", n)
    listed: list[Found] = []
    with at_rest(model):
        opened = opened_of(kept, model.bank_state())
        for number in sorted(ids_of(kept), reverse=True)[:n]:
            slots = []
            for name, part in opened.items():
                importance = part.records.importance[0].masked_fill(part.records.record[0] != number, -torch.inf)
                slots.append((float(importance.max()), name, int(importance.argmax())))
            _, name, slot = max(slots)
            listed.append(Found(0.0, 0.0, name, slot, number))
        found = described(model, listed, opened)
    return [record._replace(similarity=None, weight=None) for record in found]


def edit_memory(model: LanguageModel, number: int, text: str) -> int:
    """Replace the text of a record; it keeps its id and document, and grows older as before.

    Args:
        model: The model.
        number: Id of the record. Slots that other records were merged with go too.
        text: The new text, of any length.

    Returns:
        The id.

    Raises:
        ConfigError: If there is no such record, the text is empty, or nothing of it would be kept; the record then
            stays as it was.
    """
    kept = kept_of(model, "edit_memory")
    (number,) = check_ids([number], kept)
    passages = passages_of(model, text)
    with at_rest(model):
        first = int(n_record_of(kept))
        document = number
        for part in kept:
            records = part.module.records(part.module.bank.state())
            mine = records.record == number
            document = int(records.document[mine][0]) if bool(mine.any()) else document
        state = without(model, lambda records: holds(records, [number]))
        *_, state = absorbed(model, passages, state, document)

        def relabel(module: Memory, part: State) -> State:
            if not isinstance(module, RecordKeeper):
                return part
            records = module.records(part)
            new = records.record >= first
            return module.relabel(part, records.record.masked_fill(new, number), records.document)

        state = model.map_memory(relabel, state)
        if not any(bool((part.records.record == number).any()) for part in opened_of(kept, state).values()):
            raise ConfigError(
                f"nothing of the new text would be kept, so record {number} stays as it was: the memory finds none "
                f"of it worth a slot; give more words, or forget({number})"
            )
        commit(model, state)
    return number


def forget(
    model: LanguageModel,
    ids: int | Iterable[int] | None = None,
    *,
    document: int | None = None,
    older_than: int | None = None,
) -> list[int]:
    """Forget records: every slot that comes from one of them, alone or merged with others, is as if never written.

    Give exactly one of the three.

    Args:
        model: The model.
        ids: Id or ids.
        document: Number of a text, as `Remembered.document`. (Shared banks also hold what training wrote, whose
            documents are numbered by themselves.)
        older_than: Age, in records written since, above which records are forgotten.

    Returns:
        Ids of the records that are gone from the memory, those included that were merged with them.

    Raises:
        ConfigError: If an id is unknown, also because its record is gone already, or a number is none; nothing is
            forgotten then.
    """
    kept = kept_of(model, "forget")
    if sum(part is not None for part in (ids, document, older_than)) != 1:
        raise ConfigError("forget takes one of ids, document=... and older_than=...: say what to forget")
    before = ids_of(kept)
    if ids is not None:
        asked: Any = plain(ids)
        several = isinstance(asked, Iterable) and not isinstance(asked, str | Mapping)
        numbers: Sequence[int] = check_ids(asked if several else [asked], kept)
    elif document is not None:
        document = whole("document (the number of a text)", document)
        known = {int(found) for part in kept for found in documents_of(part.module)}
        end = min((found for found in known if found > document), default=int(n_record_of(kept)))
        there = document in known or (document not in before and may_be_merged(document, kept))
        numbers = range(document, end if there else document)
    else:
        older_than = whole("older_than (an age in records)", older_than)
        numbers = range(max(int(n_record_of(kept)) - 1 - older_than, 0))
    if not numbers:
        return []

    def gone(records: Records) -> Tensor:
        if document is None:
            return holds(records, numbers)
        return (records.document == document) | merged_from(records, numbers)

    with at_rest(model):
        erase(kept, gone)
    return sorted(set(before) - set(ids_of(kept)))


def consolidate(model: LanguageModel, threshold: float = 0.1) -> dict[str, int]:
    """Merge similar slots of the persistent memory; merged slots list their origins.

    Args:
        model: The model.
        threshold: Largest cosine distance of what is merged.

    Returns:
        Exact counts: ``slots_before``, those ``merged`` into another, ``slots_after``.

    Raises:
        ConfigError: If the threshold is out of range, or the model has no memory that keeps records.
    """
    kept = kept_of(model, "consolidate")
    number = plain(threshold)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 2:
        raise ConfigError(f"threshold is a cosine distance, so a number in 0..2, got {reprlib.repr(threshold)}")
    counts = {"slots_before": n_filled(kept), "merged": 0}
    with at_rest(model):

        def consolidate(module: Any, bank: State) -> State:
            part = bank  # which stays as it is, should this be cut short; what is made of it is changed in place
            for turn in range(module.n_turn if isinstance(module, RecordKeeper) else 0):
                part, done = module.consolidate(part, number, turn=turn, owned=part is not bank)
                counts["merged"] += done["merged"]
            return part

        commit(model, model.map_memory(consolidate, model.init_state(1)))
    return counts | {"slots_after": n_filled(kept)}


def save_memory(model: LanguageModel, path: str | os.PathLike[str]) -> None:
    """Write the persistent memory to a file of its own.

    Args:
        model: The model.
        path: The file, which is replaced if there is one. It appears whole or not at all.
    """
    from memlm.version import __version__

    kept = kept_of(model, "save_memory")
    parts = {part.name: part.module.bank.state() for part in kept}
    tensors = {
        f"{name}/{field}": value for name, bank in parts.items() for field, value in memory_file.flat(bank).items()
    }
    tensors |= {f"{part.name}/uses": part.module.bank.uses() for part in kept}
    memory_file.write(
        path,
        memory_file.MemoryFile(
            tensors,
            memory_file.geometry(model, kept),
            model.tokenizer.fingerprint(),
            memory_file.fingerprint(kept),
            __version__,
        ),
    )


def load_memory(model: LanguageModel, path: str | os.PathLike[str]) -> None:
    """Replace the persistent memory by that of a file.

    Args:
        model: The model.
        path: A file that `save_memory` has written, for the same kind of model and tokenizer.

    Raises:
        ConfigError: If it is another model's, cut short, damaged, or missing; the memory then stays as it is.
    """
    kept = kept_of(model, "load_memory")
    content, banks = memory_file.banks_of_file(model, path, kept)
    for part in kept:
        part.module.bank.commit(banks[part.name])
        part.module.bank.uses().copy_(content.tensors[f"{part.name}/uses"])


def merge_memory(model: LanguageModel, path: str | os.PathLike[str]) -> list[int]:
    """Add the memory of a file to the persistent memory; where room is wanted, the most important slots stay.

    Args:
        model: The model.
        path: See `load_memory`.

    Returns:
        New ids of the records that came. Those that were here keep theirs.

    Raises:
        ConfigError: See `load_memory`.
    """
    kept = kept_of(model, "merge_memory")
    _, banks = memory_file.banks_of_file(model, path, kept)
    first = int(n_record_of(kept))
    n_record = int(kept[0].module.records(banks[kept[0].name]).n_record)
    if first + n_record > MOST_RECORDS:
        raise ConfigError(
            f"{path} cannot be merged: {n_record:,} records were written to it and {first:,} here, more than "
            f"{MOST_RECORDS:,} together; load it, or merge it into a model that has stored less"
        )
    with at_rest(model):
        came = {id(part.module): banks[part.name] for part in kept}
        state = model.map_memory(
            lambda module, part: module.admit(part, came[id(module)]) if id(module) in came else part,  # type: ignore[attr-defined]
            model.init_state(1),
        )
        commit(model, state)
    return ids_of(kept, first)
