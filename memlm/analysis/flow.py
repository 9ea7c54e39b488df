"""What flows through a model's memories while it reads a text: read, how strongly, from where; written; evicted.

The text is read segment by segment, so that each slot is looked up as it was when it was read. A text may have several
contexts: between two of them the local context is dropped (`LanguageModel.new_context`), and only memory is left.

Shapes: N tokens of the text, k slots read by a token, M slots of a bank.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memlm.analysis.usage import banks, slot_changes, slot_reads
from memlm.config import ConfigError, whole
from memlm.memory.slots import Slots
from memlm.models.base import LanguageModel
from memlm.models.state import ModelState

Text = str | Sequence[int] | Tensor


"""A text, or its token ids, (N,) or (1, N)."""


FAINT = 0.01  # weight times gate up to which a read is not drawn


_AROUND = 4  # tokens of the text shown on either side of the place that a slot comes from


class Origin(NamedTuple):
    """Where a slot comes from.

    Attributes:
        slot: Its number in the bank.
        place: Place in the text of the token it was made from; None if it is of another text, or the memory does not
            tell.
        segment: Segment of the text that wrote it last; None if it was there before the text.
        text: The text it was made from, as far as it is known.
    """

    slot: int
    place: int | None
    segment: int | None
    text: str


@dataclass
class BankFlow:
    """What one bank, or one layer that reads it, did with each token.

    Attributes:
        slots: Slots read, the heaviest first, (N, k); -1 where none.
        weights: Weight of each, (N, k).
        gate: How far the read is let in, (N,).
        strength: Gate times the weight on slots, (N,): the share of a read that is of something remembered.
        norm: Length of what is added to the residual stream, (N,); NaN if a memory reads in another way.
        origins: Where what was read comes from: by segment of the reader, by slot.
    """

    slots: np.ndarray
    weights: np.ndarray
    gate: np.ndarray
    strength: np.ndarray
    norm: np.ndarray
    origins: list[dict[int, Origin]]


@dataclass
class Writes:
    """What was written to one bank.

    Attributes:
        written: Slots that each segment wrote, with their new origin.
        evicted: What each segment pushed out.
        n_filled: Slots that hold something after each segment.
        n_slot: Slots of the bank.
    """

    written: list[list[Origin]]
    evicted: list[list[Origin]]
    n_filled: list[int]
    n_slot: int


@dataclass(repr=False)
class Flow:
    """A text, token by token, and what memory did.

    Attributes:
        ids: Token ids, (N,).
        tokens: The same as text.
        segment: Segment of each token, (N,).
        context: Context of each token, (N,).
        nll: Loss in nats of the prediction made at each token, (N,); NaN at the end of a context.
        gain: By how much lower it is than with reads off, (N,): above 0 memory helps.
        reads: By ``name/layer``.
        writes: By bank (see `memlm.analysis.usage.banks`).
        begin: Place of the first token in its document.
        last_written: By bank, the segment that wrote each slot last, -1 where none of the text did, (M,).
        state: The model's state after the text.
    """

    ids: np.ndarray
    tokens: list[str]
    segment: np.ndarray
    context: np.ndarray
    nll: np.ndarray
    gain: np.ndarray
    reads: dict[str, BankFlow]
    writes: dict[str, Writes]
    begin: int
    last_written: dict[str, np.ndarray]
    state: Any

    @property
    def strength(self) -> np.ndarray:
        """How strongly memory was read at each token, the most of all layers, (N,)."""
        nothing = np.zeros(len(self.ids))  # where no memory tells what it reads
        return np.max([nothing, *(read.strength for read in self.reads.values())], axis=0)


def check_texts(name: str, texts: Any) -> None:
    """Refuse what is no list of texts.

    Raises:
        ConfigError: Also for a bare text, whose letters would be taken for texts.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ConfigError(f"{name} is a list of texts: give [text] for a single one, got {reprlib.repr(texts)}")


def token_ids(model: LanguageModel, text: Text) -> list[int]:
    """Token ids of a text.

    Raises:
        ConfigError: If it is neither text nor ids, has no token, several rows, or an id that is not in the vocabulary.
    """
    if isinstance(text, str):
        ids = model.tokenizer.encode(text)
    else:
        try:
            tensor = torch.as_tensor(text)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"a text is a str or its token ids, got {reprlib.repr(text)}") from error
        if tensor.numel() and not torch.can_cast(tensor.dtype, torch.long):
            raise ConfigError(f"token ids are whole numbers, got {str(tensor.dtype).removeprefix('torch.')}")
        if tensor.dim() == 2 and len(tensor) == 1:
            tensor = tensor[0]
        if tensor.dim() != 1:
            raise ConfigError(f"of one text at a time: expected ids (N,) or (1, N), got {tuple(tensor.shape)}")
        ids = [int(i) for i in tensor]
    if not ids:
        raise ConfigError("the text has no token: give a longer one")
    n_vocab = len(model.head_weight)
    if not 0 <= min(ids) <= max(ids) < n_vocab:
        raise ConfigError(f"token ids must be in 0..{n_vocab - 1}, got {min(ids)}..{max(ids)}")
    return ids


@torch.no_grad()
def memory_flow(model: LanguageModel, contexts: Sequence[Text], state: Any = None, top: int = 8) -> Flow:
    """Read a text and tell what its memories did with each token.

    Args:
        model: A language model; it is left as it was, and so is its bank.
        contexts: The text, in one context or several.
        state: State of one row before the text; None for the beginning.
        top: Most slots told per token and layer, the heaviest.

    Raises:
        ConfigError: If there is no context, one has no token, or ``contexts`` is a bare text.
    """
    check_texts("contexts", None if isinstance(contexts, Tensor) else contexts)
    top = whole("top", top)
    parts = [token_ids(model, text) for text in contexts]
    if not parts:
        raise ConfigError("contexts has no text: give at least one")
    if state is not None and (not isinstance(state, ModelState) or set(state.memory) != set(model.memory)):
        raise ConfigError(f"state must be what a call of the model gave, or None, got {reprlib.repr(state)}")
    device, training = model.head_weight.device, model.training
    model.eval()
    try:
        walk = _Walk(model, [i for part in parts for i in part], model.init_state(1) if state is None else state, top)
        for part in parts:
            walk.context(torch.tensor([part], device=device))
    finally:
        model.train(training)
    return walk.flow()


class _Walk:
    """Where the reading of a text stands."""

    def __init__(self, model: LanguageModel, ids: list[int], state: Any, top: int) -> None:
        self.model, self.ids, self.state, self.top = model, ids, state, top
        self.off = state  # the same without reads
        self.begin = int(state.local.position[0])  # place of the text in its document
        self.place = self.n_segment = self.n_context = 0
        self.segment: list[int] = []
        self.n_token: list[int] = []  # of each context
        self.nll: list[Tensor] = []
        self.gain: list[Tensor] = []
        self.reads: dict[str, list[tuple[Tensor, ...]]] = {}
        self.origins: dict[str, list[dict[int, Origin]]] = {}
        held = banks(model, state)
        self.last = {label: torch.full(module.filled(part).shape[1:], -1) for label, (module, part) in held.items()}
        self.writes = {
            label: Writes([], [], [], module.filled(part).shape[1]) for label, (module, part) in held.items()
        }

    def context(self, ids: Tensor) -> None:
        """Read a context, (1, L), and drop it."""
        start, opened = 0, int(self.state.local.n_open.tensor[0])
        hidden, without = [], []
        while start < ids.shape[1]:
            part = ids[:, start : start + self.model.segment_len - opened]
            out = self.model(part, state=self.state, logits=False)
            off = self.model(part, state=self.off, read=False, logits=False)
            self._keep_reads(out.reads, part.shape[1])
            hidden.append(out.hidden)
            without.append(off.hidden)
            self.segment += [self.n_segment] * part.shape[1]
            start, opened = start + part.shape[1], 0
            self.place += part.shape[1]
            after, self.off = out.state, off.state
            if start == ids.shape[1]:  # what waits for more text is written too
                after, self.off = self.model.new_context(after), self.model.new_context(self.off)
            self._keep_writes(after)
            self.state = after
            self.n_segment += 1
        on, off_nll = self._nll(torch.cat(hidden, dim=1), ids), self._nll(torch.cat(without, dim=1), ids)
        self.nll.append(on)
        self.gain.append(off_nll - on)
        self.n_token.append(ids.shape[1])

    def _nll(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Loss of the token after each of a context, (L,); NaN at its end."""
        parts = zip(hidden[0, :-1].split(256), ids[0, 1:].split(256), strict=True)
        nll = [torch.nn.functional.cross_entropy(self.model.head(h).float(), t, reduction="none") for h, t in parts]
        return torch.cat([*nll, torch.full((1,), torch.nan, device=ids.device)]).cpu()

    def _keep_reads(self, reads: dict[str, Any], n: int) -> None:
        held = banks(self.model, self.state)
        for key in slot_reads(reads):
            read = reads[key]
            weights, order = read.weights[0].float().masked_fill(read.slots[0] < 0, 0).sort(dim=1, descending=True)
            slots = read.slots[0].gather(1, order).masked_fill(weights == 0, -1)
            mass = weights.sum(dim=1)
            gate = torch.ones_like(mass) if read.gate is None else read.gate[0].float()
            norm = torch.full_like(mass, torch.nan) if read.value is None else read.value[0].float().norm(dim=1)
            told = slots[:, : self.top].cpu()
            parts = (told, weights[:, : self.top], gate, gate * mass, norm)
            self.reads.setdefault(key, []).append(tuple(part.cpu() for part in parts))
            label = key if key in held else key.partition("/")[0]
            slots_read = told[told >= 0].unique()
            found = {origin.slot: origin for origin in self._origins(label, *held[label], slots_read)}
            self.origins.setdefault(key, []).append(found)

    def _keep_writes(self, after: Any) -> None:
        before, now = banks(self.model, self.state), banks(self.model, after)
        for label, (module, part) in now.items():
            written, evicted = (mask[0].cpu() for mask in slot_changes(module, before[label][1], part))
            self.writes[label].evicted.append(self._origins(label, *before[label], evicted.nonzero()[:, 0]))
            self.last[label][written] = self.n_segment
            self.writes[label].written.append(self._origins(label, module, part, written.nonzero()[:, 0]))
            self.writes[label].n_filled.append(int(module.filled(part)[0].sum()))

    def _origins(self, label: str, module: Slots, part: Any, slots: Tensor) -> list[Origin]:
        return origins(self.model, self.ids, self.begin, module, part, slots, self.last[label])

    def flow(self) -> Flow:
        """All that was found."""
        reads = {}
        for key, parts in self.reads.items():
            slots, weights, gate, strength, norm = (_stack(column) for column in zip(*parts, strict=True))
            reads[key] = BankFlow(slots, weights, gate, strength, norm, self.origins[key])
        return Flow(
            ids=np.array(self.ids),
            tokens=self.model.tokenizer.decode_each(self.ids),
            segment=np.array(self.segment),
            context=np.repeat(np.arange(len(self.n_token)), self.n_token),
            nll=torch.cat(self.nll).numpy(),
            gain=torch.cat(self.gain).numpy(),
            reads=reads,
            writes=self.writes,
            begin=self.begin,
            last_written={label: last.numpy() for label, last in self.last.items()},
            state=self.state,
        )


def origins(
    model: LanguageModel, ids: Sequence[int], begin: int, module: Slots, part: Any, slots: Tensor, last: Tensor
) -> list[Origin]:
    """Where slots of a bank come from.

    Args:
        model: The model.
        ids: The text, (N,).
        begin: Place of its first token in the document.
        module: The memory.
        part: Its state, of one row.
        slots: Which slots, (n,).
        last: Segment of the text that wrote each slot last, -1 where none did, (M,).
    """
    places, kept = module.places(part), module.tokens(part)
    where = [None] * len(slots) if places is None else places[0].cpu()[slots].tolist()
    tokens = [None] * len(slots) if kept is None else kept[0].cpu()[slots].tolist()
    found = []
    for slot, place, own, segment in zip(slots.tolist(), where, tokens, last[slots].tolist(), strict=True):
        here = None if place is None or segment < 0 or not 0 <= place - begin < len(ids) else place - begin
        if own is not None:
            shown = [i for i in own if i >= 0]
        else:
            shown = [] if here is None else list(ids[max(here - _AROUND, 0) : here + _AROUND + 1])
        found.append(Origin(slot, here, None if segment < 0 else segment, model.tokenizer.decode(shown)))
    return found


def _stack(parts: Sequence[Tensor]) -> np.ndarray:
    """Parts (n, ...) one after the other; those of fewer slots are filled up."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts)).numpy()
    k = max(part.shape[1] for part in parts)
    fill = 0 if parts[0].is_floating_point() else -1
    return torch.cat([torch.nn.functional.pad(part, (0, k - part.shape[1]), value=fill) for part in parts]).numpy()
