"""The law of forgetting: stored and forgotten is as never stored."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.laws.builders import ALL, Make, T, close, logits, named_tensors, text
from memlm.laws.described import OTHERS, SECRET
from memlm.memory import state as states
from memlm.memory.records import RecordKeeper
from memlm.models.segments import SegmentModel


class Letters:
    """A tokenizer of letters, for the operations."""

    letters = " abcdefghijklmnopqrstuvwxyz0123456789.,\n"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of letters."""
        return [[self.letters.index(letter) for letter in text] for text in texts]

    def fingerprint(self) -> str:
        """Always the same."""
        return "letters"


@torch.no_grad()
def forgets(make: Make, memory: Mapping[str, Any] | None = None) -> None:
    """A text that was stored and forgotten was never stored: in what is held, read, and written to files.

    Alone, twice, merged by consolidation, put in place of another text, and replaced by one. Up to the order of slots
    and the ids of records.
    """

    def told(*texts: str) -> SegmentModel:
        model = make(memory={"n_slot": 200} | dict(memory or {}), **ALL)
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
        left = sum(row.contiguous().view(torch.uint8).numpy().tobytes() in content for row in traces)
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
