"""What a model has stored, as data: store, query, edit, forget, consolidate, save and load.

The operations work on the persistent bank of each memory that keeps records; text that begins with ``state=None``
begins with a copy of it. A record is a passage of whole sentences, no longer than a segment, and read in a context of
its own with reads off. So what is stored of it depends on its own text alone, and when it is forgotten nothing of it is
left in other records.

Shapes: B rows (1 here), n slots, R origins, T tokens per segment, S segments of a call, N tokens, k slots read per
token.
"""

from __future__ import annotations

import itertools
import logging
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.config import ConfigError, whole
from memlm.memory.contract import Memory
from memlm.memory.records import MANY, MOST_RECORDS, RecordKeeper, Records
from memlm.memory.state import State, n_byte
from memlm.models.base import LanguageModel, placed
from memlm.store import memory_file
from memlm.store.kept import Kept, Opened, documents_of, holds, merged_from, n_filled, n_record_of, opened_of, plain
from memlm.store.memory_file import fingerprint, flat, restored
from memlm.store.passages import BATCH, SENTENCE, WINDOW, progress_bar
from memlm.store.remembered import READ, Found, Remembered, best_of

log = logging.getLogger(__name__)


class ExperienceModel(LanguageModel):
    """A language model with operations on its persistent memory.

    Attributes:
        d_model: Width.
        lookback: Tokens before a segment that its state carries, as writes need them.
    """

    d_model: int
    lookback: int

    def bank_state(self) -> Any:
        """A state of one row without context whose memories are the persistent banks themselves: to be read only."""
        raise NotImplementedError

    def store_experience(self, text: str) -> list[int]:
        """Store a text in the persistent memory.

        Args:
            text: Any text. It is cut into passages of whole sentences of up to a segment, one record each.

        Returns:
            Ids of its records, in order. A record none of whose slots was found worth keeping, or that a later one has
            replaced again, is not among them.

        Raises:
            ConfigError: If the text is empty or the model has no memory that keeps records.
        """
        kept = self._kept("store_experience")
        passages = self._passages(text)
        with self._at_rest():
            first = int(n_record_of(kept))
            state = self._absorb(passages, self.init_state(1), first)
            self._commit(state)
        return [number for number in self._ids(kept) if number >= first]

    def query_memory(self, text: str, top_k: int = 5) -> list[Remembered]:
        """What the model reads from the persistent memory when it reads a text.

        Args:
            text: What to look for.
            top_k: Most records to return.

        Returns:
            Records by read weight, greatest first, each once, by the slot that was read most. There are fewer if the
            model reads fewer.

        Raises:
            ConfigError: If the text is empty, ``top_k`` is no whole number of at least 1, or the model has no memory
                that keeps records.
        """
        self._kept("query_memory")
        return self.recalled(self.encode_text(text), top_k=whole("top_k", top_k, least=1))

    def recalled(self, ids: Sequence[int], first: int = 0, top_k: int = 1) -> list[Remembered]:
        """What is read from the persistent memory for tokens; see `query_memory`.

        Args:
            ids: Token ids of a text. It is read in pieces shorter than a segment, each in a context of its own.
            first: The first token whose reads are of interest.
            top_k: Most records to return.
        """
        kept = self._kept("recalled")
        piece = max(self.segment_len - 1, 1)  # a complete segment would be left behind, with what it reads with
        best: list[Found] = []
        with self._at_rest():
            banks = self.bank_state()
            opened = opened_of(kept, banks)
            for begin in progress_bar(range(0, len(ids), piece), "querying"):
                if begin + piece > first:
                    found = self._found(ids[begin : begin + piece], max(first - begin, 0), banks, kept, opened)
                    best = best_of([*best, *found], top_k)
            for part in best:
                if part.weight >= READ:
                    opened[part.memory].module.bank.uses()[part.slot] += 1
            return self._described(best, opened)

    def list_memory(self, n: int = 10) -> list[Remembered]:
        """The ``n`` latest records of the persistent memory, newest first, each by its most important slot.

        Raises:
            ConfigError: If ``n`` is no whole number of at least 0, or the model has no memory that keeps records.
        """
        kept = self._kept("list_memory")
        n = whole("n", n)
        listed: list[Found] = []
        with self._at_rest():
            opened = opened_of(kept, self.bank_state())
            for number in sorted(self._ids(kept), reverse=True)[:n]:
                slots = []
                for name, part in opened.items():
                    importance = part.records.importance[0].masked_fill(part.records.record[0] != number, -torch.inf)
                    slots.append((float(importance.max()), name, int(importance.argmax())))
                _, name, slot = max(slots)
                listed.append(Found(0.0, 0.0, name, slot, number))
            described = self._described(listed, opened)
        return [record._replace(similarity=None, weight=None) for record in described]

    def edit_memory(self, number: int, text: str) -> int:
        """Replace the text of a record; it keeps its id and document, and grows older as before.

        Args:
            number: Id of the record. Slots that other records were merged with go too.
            text: The new text, of any length.

        Returns:
            The id.

        Raises:
            ConfigError: If there is no such record, the text is empty, or nothing of it would be kept; the record then
                stays as it was.
        """
        kept = self._kept("edit_memory")
        (number,) = self._check_ids([number], kept)
        passages = self._passages(text)
        with self._at_rest():
            first = int(n_record_of(kept))
            document = number
            for part in kept:
                records = part.module.records(part.module.bank.state())
                mine = records.record == number
                document = int(records.document[mine][0]) if bool(mine.any()) else document
            state = self._without(lambda records: holds(records, [number]))
            state = self._absorb(passages, state, document)

            def relabel(module: Memory, part: State) -> State:
                if not isinstance(module, RecordKeeper):
                    return part
                records = module.records(part)
                new = records.record >= first
                return module.relabel(part, records.record.masked_fill(new, number), records.document)

            state = self.map_memory(relabel, state)
            if not any(bool((part.records.record == number).any()) for part in opened_of(kept, state).values()):
                raise ConfigError(
                    f"nothing of the new text would be kept, so record {number} stays as it was: the memory finds none "
                    f"of it worth a slot; give more words, or forget({number})"
                )
            self._commit(state)
        return number

    def forget(
        self,
        ids: int | Iterable[int] | None = None,
        *,
        document: int | None = None,
        older_than: int | None = None,
    ) -> list[int]:
        """Forget records: every slot that comes from one of them, alone or merged with others, is as if never written.

        Give exactly one of the three.

        Args:
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
        kept = self._kept("forget")
        if sum(part is not None for part in (ids, document, older_than)) != 1:
            raise ConfigError("forget takes one of ids, document=... and older_than=...: say what to forget")
        before = self._ids(kept)
        if ids is not None:
            asked: Any = plain(ids)
            several = isinstance(asked, Iterable) and not isinstance(asked, str | Mapping)
            numbers: Sequence[int] = self._check_ids(asked if several else [asked], kept)
        elif document is not None:
            document = whole("document (the number of a text)", document)
            known = {int(found) for part in kept for found in documents_of(part.module)}
            end = min((found for found in known if found > document), default=int(n_record_of(kept)))
            there = document in known or (document not in before and self._may_be_merged(document, kept))
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

        with self._at_rest():
            self._commit(self._without(gone))
        return sorted(set(before) - set(self._ids(kept)))

    def consolidate(self, threshold: float = 0.1) -> dict[str, int]:
        """Merge similar slots of the persistent memory; merged slots list their origins.

        Args:
            threshold: Largest cosine distance of what is merged.

        Returns:
            Exact counts: ``slots_before``, those ``merged`` into another, ``slots_after``.

        Raises:
            ConfigError: If the threshold is out of range, or the model has no memory that keeps records.
        """
        kept = self._kept("consolidate")
        number = plain(threshold)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 2:
            raise ConfigError(f"threshold is a cosine distance, so a number in 0..2, got {reprlib.repr(threshold)}")
        counts = {"slots_before": n_filled(kept), "merged": 0}
        with self._at_rest():

            def consolidate(module: Any, part: State) -> State:
                for turn in range(module.n_turn if isinstance(module, RecordKeeper) else 0):
                    part, done = module.consolidate(part, number, turn=turn)
                    counts["merged"] += done["merged"]
                return part

            self._commit(self.map_memory(consolidate, self.init_state(1)))
        return counts | {"slots_after": n_filled(kept)}

    def save_memory(self, path: str | os.PathLike[str]) -> None:
        """Write the persistent memory to a file of its own.

        Args:
            path: The file, which is replaced if there is one. It appears whole or not at all.
        """
        from memlm.version import __version__

        kept = self._kept("save_memory")
        parts = {part.name: part.module.bank.state() for part in kept}
        tensors = {f"{name}/{field}": value for name, bank in parts.items() for field, value in flat(bank).items()}
        tensors |= {f"{part.name}/uses": part.module.bank.uses() for part in kept}
        memory_file.write(
            path,
            memory_file.MemoryFile(
                tensors, self._geometry(kept), self.tokenizer.fingerprint(), fingerprint(kept), __version__
            ),
        )

    def load_memory(self, path: str | os.PathLike[str]) -> None:
        """Replace the persistent memory by that of a file.

        Args:
            path: A file that `save_memory` has written, for the same kind of model and tokenizer.

        Raises:
            ConfigError: If it is another model's, cut short, damaged, or missing; the memory then stays as it is.
        """
        kept = self._kept("load_memory")
        content, banks = self._read_file(path, kept)
        for part in kept:
            part.module.bank.commit(banks[part.name])
            part.module.bank.uses().copy_(content.tensors[f"{part.name}/uses"])

    def merge_memory(self, path: str | os.PathLike[str]) -> list[int]:
        """Add the memory of a file to the persistent memory; where room is wanted, the most important slots stay.

        Args:
            path: See `load_memory`.

        Returns:
            New ids of the records that came. Those that were here keep theirs.

        Raises:
            ConfigError: See `load_memory`.
        """
        kept = self._kept("merge_memory")
        _, banks = self._read_file(path, kept)
        first = int(n_record_of(kept))
        n_record = int(kept[0].module.records(banks[kept[0].name]).n_record)
        if first + n_record > MOST_RECORDS:
            raise ConfigError(
                f"{path} cannot be merged: {n_record:,} records were written to it and {first:,} here, more than "
                f"{MOST_RECORDS:,} together; load it, or merge it into a model that has stored less"
            )
        with self._at_rest():
            came = {id(part.module): banks[part.name] for part in kept}
            state = self.map_memory(
                lambda module, part: module.admit(part, came[id(module)]) if id(module) in came else part,  # type: ignore[attr-defined]
                self.init_state(1),
            )
            self._commit(state)
        return [number for number in self._ids(kept) if number >= first]

    # --- the persistent banks --------------------------------------------------------------------------------------

    def _kept(self, what: str) -> list[Kept]:
        """The memory modules that keep records."""
        found = [
            Kept(label, name, number, reads, module)
            for label, name, number, reads, module in placed(self)
            if isinstance(module, RecordKeeper)
        ]
        if not found:
            has = ", ".join(self.memory) or "none"
            raise ConfigError(
                f"{what}: no memory of this model keeps records (memory: {has}); build one with memory=ltm or "
                "memory=dual, or load a checkpoint that has one"
            )
        return found

    def _ids(self, kept: list[Kept]) -> list[int]:
        """Ids of all records that hold a slot, in order."""
        found: set[int] = set()
        for part in kept:
            found |= set(part.module.records(part.module.bank.state()).record.unique().tolist())
        return sorted(found - {-1})

    def _may_be_merged(self, number: int, kept: list[Kept]) -> bool:
        """Whether a record that holds no slot of its own may be part of a merged one."""
        records = [part.module.records(part.module.bank.state()) for part in kept]
        return number < int(n_record_of(kept)) and any(bool(merged_from(found, [number]).any()) for found in records)

    def _check_ids(self, asked: Iterable[Any], kept: list[Kept]) -> list[int]:
        """The ids ``asked``; refuses those of which nothing is stored."""
        n_record, numbers, stored = int(n_record_of(kept)), [], set(self._ids(kept))
        for part in kept:
            stored |= set(part.module.records(part.module.bank.state()).origins.unique().tolist())
        for value in asked:
            number = plain(value)
            if type(number) is not int or not 0 <= number < n_record:
                shown = reprlib.repr(value)
                if n_record == 0:
                    raise ConfigError(f"there is no record {shown}: nothing is stored yet")
                raise ConfigError(
                    f"there is no record {shown}: ids are whole numbers below {n_record} here; list_memory and "
                    "query_memory tell them"
                )
            numbers.append(number)
            if number not in stored and MANY not in stored:
                raise ConfigError(
                    f"record {number} is no longer stored: it was forgotten, or replaced by more important ones; "
                    "list_memory and query_memory tell what is"
                )
        return numbers

    def _without(self, gone: Any) -> Any:
        """A state with what is stored but for the slots that ``gone`` names of their `Records`."""

        def forget(module: Memory, part: State) -> State:
            return module.forget(part, gone(module.records(part))) if isinstance(module, RecordKeeper) else part

        return self.map_memory(forget, self.init_state(1))

    def _commit(self, state: Any) -> None:
        """Make the memories of ``state`` that keep records persistent; slots that changed hands were never used."""
        for name, modules in self.memory.items():
            for module, part in zip(modules, state.memory[name], strict=True):
                if not isinstance(module, RecordKeeper):
                    continue
                bank = module.bank.state()
                same = module.records(bank).record == module.records(part).record
                same = same & (module.places(bank) == module.places(part))
                module.bank.commit(part)
                module.bank.uses().mul_(same[0])

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Without gradients and dropout."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)

    # --- text ------------------------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text as the operations read it: it begins with a space, like a sentence inside of text.

        What is no text (halves of surrogate pairs, left by invalid bytes) becomes U+FFFD.

        Raises:
            ConfigError: If it is empty.
        """
        return list(itertools.chain.from_iterable(self._passages(text)))

    def _passages(self, text: str) -> Iterator[list[int]]:
        """Token ids of passages of whole sentences of up to a segment; longer sentences are cut."""
        if not isinstance(text, str):
            raise ConfigError(f"a text must be a str, got {type(text).__name__}; decode bytes with errors='replace'")
        text = text if text[:1].isspace() else f" {text}"
        passages = self._packed(SENTENCE.split(text))
        first = next(passages, None) if text.strip() else None
        if first is None:
            raise ConfigError("the text is empty, or the tokenizer makes nothing of it: give some words")
        return itertools.chain([first], passages)

    def _packed(self, sentences: list[str]) -> Iterator[list[int]]:
        passage: list[int] = []
        for begin in range(0, len(sentences), BATCH):
            for sentence in self.tokenizer.encode_batch(sentences[begin : begin + BATCH]):
                if passage and len(passage) + len(sentence) > self.segment_len:
                    yield passage
                    passage = []
                passage, begins = passage + sentence, 0
                while len(passage) - begins > self.segment_len:
                    yield passage[begins : begins + self.segment_len]
                    begins += self.segment_len
                passage = passage[begins:]
        if passage:
            yield passage

    def _absorb(self, passages: Iterator[list[int]], state: Any, document: int) -> Any:
        """``state`` after passages, each in a context of its own and read without memory.

        A window ends with an empty segment, which closes the context of the last passage.
        """
        local = state.local
        state = state._replace(local=local._replace(document=torch.full_like(local.document, document)))
        n = max(1, WINDOW // self.segment_len)
        for window in progress_bar(iter(lambda: list(itertools.islice(passages, n)), []), "storing"):
            rows = [torch.tensor(passage) for passage in window]
            ids = torch.stack([F.pad(row, (0, self.segment_len - len(row))) for row in rows])
            valid = torch.stack([torch.arange(self.segment_len) < len(row) for row in rows])
            ids, mask = (F.pad(part, (0, 0, 0, 1)).flatten()[None].to(local.ids.device) for part in (ids, valid))
            breaks = torch.ones(1, len(rows) + 1, dtype=torch.bool, device=ids.device)
            breaks[:, 0] = False
            state = self.absorb(ids, state, read=False, mask=mask, breaks=breaks)
        return state

    def _found(
        self, ids: Sequence[int], first: int, banks: Any, kept: list[Kept], opened: dict[str, Opened]
    ) -> list[Found]:
        """Slots that the tokens ``ids`` from ``first`` on read."""
        found = []
        device = banks.local.ids.device
        out = self(torch.tensor([list(ids)], device=device), state=banks, write=False, logits=False)
        read_at = [(one.name, place) for one in kept for place in one.reads if place in out.reads]
        for name, place in read_at:
            module, bank, records = opened[name]
            read = out.reads[place]
            slots, weights = read.slots[:, first:], read.weights[:, first:]  # (1, N, k)
            layer = self.memory_layers.index(int(place.rpartition("/")[2]))
            hidden = out.state.local.streams["mixed"][:, layer, self.lookback :][:, first : len(ids)]
            similarity = module.similarity(hidden, bank, slots.clamp(min=0))
            there = (slots >= 0) & (weights > 0)
            columns = weights[there], similarity[there], slots[there], records.record[0, slots[there]]
            for weight, cosine, slot, number in zip(*(column.tolist() for column in columns), strict=True):
                found.append(Found(weight, cosine, name, slot, number))
        return found

    def _described(self, found: list[Found], opened: dict[str, Opened]) -> list[Remembered]:
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
        return [self._describe(one, opened[one.memory], slots[one.memory], uses[one.record]) for one in found]

    def _describe(self, found: Found, opened: Opened, slots: Tensor, uses: int) -> Remembered:
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
            snippet=self.tokenizer.decode(token for token in tokens[0, slot].tolist() if token >= 0).strip(),
            text=self._stitched(kept),
            origins=tuple(number for number in records.origins[0, slot].tolist() if number >= 0),
        )

    def _stitched(self, kept: dict[int, int]) -> str:
        """Text of tokens by their places."""
        runs: list[list[int]] = []
        for place in sorted(kept):
            if place - 1 not in kept:
                runs.append([])
            runs[-1].append(kept[place])
        return " … ".join(self.tokenizer.decode(run).strip() for run in runs)

    # --- files -----------------------------------------------------------------------------------------------------

    def _geometry(self, kept: list[Kept]) -> dict[str, str]:
        """Type and shape of all that a file of the memory holds, the model's width, and the scopes of the memories."""
        scopes = ", ".join(f"{part.name} {part.module.scope}" for part in kept)
        fields = {"d_model": str(self.d_model), "scope": scopes}
        for part in kept:
            fresh = part.module.init_state(1)
            holds = flat(fresh) | {"uses": part.module.filled(fresh)[0].long()}
            fields |= {f"{part.name}/{name}": memory_file.describe(tensor) for name, tensor in holds.items()}
        return fields

    def _read_file(
        self, path: str | os.PathLike[str], kept: list[Kept]
    ) -> tuple[memory_file.MemoryFile, dict[str, State]]:
        """A file for this model, and the banks in it by name; refuses what no text can have led to."""
        most = 2**30 + 4 * sum(n_byte(part.module.init_state(1)) for part in kept)  # far above, but there is an end
        content = memory_file.read(path, most)
        memory_file.check(content, path, self._geometry(kept), self.tokenizer.fingerprint())
        banks = {part.name: restored(content, part) for part in kept}
        for part in kept:
            try:
                self._check_bank(part.module, banks[part.name], content.tensors[f"{part.name}/uses"])
            except ValueError as error:
                raise ConfigError(
                    f"{path} cannot be read: {part.name} holds what no text can have written ({error}); "
                    "save the memory again"
                ) from error
        if len({int(part.module.records(banks[part.name]).n_record) for part in kept}) > 1:
            raise ConfigError(
                f"{path} cannot be read: other numbers of records were written in one layer than in another; save the "
                "memory again"
            )
        if content.weights != fingerprint(kept):
            log.warning(
                "%s was written by a model with other weights: what it holds may be read badly, or not at all", path
            )
        return content, banks

    def _check_bank(self, module: RecordKeeper, bank: State, uses: Tensor) -> None:
        """`Memory.check`, and what the memory does not know: the vocabulary, and how often slots were shown."""
        module.check(bank)
        tokens, filled = module.tokens(bank), module.filled(bank)[0].to(uses.device)
        if tokens is not None and bool((tokens >= len(self.head_weight)).any()):
            raise ValueError("the id of a token is not in the vocabulary")
        if bool(((uses < 0) | (uses > 2**32) | ((uses > 0) & ~filled)).any()):
            raise ValueError("uses are out of range, or of a slot that is empty")
