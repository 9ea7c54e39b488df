"""What experiments on recall share: documents that tell facts, questions beside every control, and rates.

A document is text in which facts are told. When it is read, its local context is dropped, so that memory is all that
remains, and each fact is asked for in a fresh context of its own, with nothing written. An answer counts when the
likeliest token is right at every place, given the right ones before it: exactly then greedy decoding gives the whole
answer.

A rate says something only beside its controls, so each question is also asked with reads off, of a wiped memory and
of the memory of another document, and facts that nobody was told are asked of the memory as it is. A model whose empty
memory contributes nothing has the same answers off and wiped by construction. Without any memory all conditions run
all the same.

Shapes: B rows, L tokens of a question, V vocabulary, M slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.base import Row, wilson
from memlm.analysis.figures import CONTROLS
from memlm.data.facts import Fact
from memlm.data.sentences import LEVELS

CONDITIONS = ("on", *CONTROLS)
"""The memory as it is, then its controls: see `memlm.analysis.figures.CONTROLS`."""

_WINDOW = 16  # segments read per call
_CROSSING = 16  # one fact in so many is placed across a segment boundary on purpose; others get there by chance
_PASSAGE = 256  # tokens of the passages in which a text is repeated
_Asked = list[tuple[int, Sequence[Fact]]]  # by row of a state: number of a document, and facts to ask for


class Haystack:
    """Endless held-out text: once round from some place, then round after round in passages of another order.

    Args:
        text: Token ids of a split.
        seed: Of the place and of the orders.
    """

    def __init__(self, text: np.ndarray, seed: Sequence[int]) -> None:
        self.text, self.seed = text, list(seed)
        self.begin = int(np.random.default_rng([*self.seed, 0]).integers(len(text)))
        self._round: tuple[int, np.ndarray] | None = None

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of a part, (end - begin,)."""
        n = len(self.text)
        parts = [self._turn(i)[max(begin - i * n, 0) : end - i * n] for i in range(begin // n, -(-end // n))]
        return np.concatenate([self.text[:0], *parts])

    def _turn(self, number: int) -> np.ndarray:
        """The whole text as it is read the ``number``-th time."""
        if self._round is None or self._round[0] != number:
            text = np.roll(self.text, -self.begin)
            if number:
                passages = [text[i : i + _PASSAGE] for i in range(0, len(text), _PASSAGE)]
                order = np.random.default_rng([*self.seed, number]).permutation(len(passages))
                text = np.concatenate([passages[i] for i in order])
            self._round = (number, text)
        return self._round[1]


class Document(NamedTuple):
    """Text with facts; it goes on without end.

    Attributes:
        facts: What is told and will be asked for.
        begins: Place of the first token of each of them.
        head: Token ids up to the end of the last fact.
        haystack: The text around facts.
        taken: Tokens of it within the head.
    """

    facts: list[Fact]
    begins: list[int]
    head: np.ndarray
    haystack: Haystack
    taken: int

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of a part of the document, (end - begin,)."""
        head = self.head[begin:end]
        rest = max(begin, len(self.head)) - len(self.head) + self.taken
        return np.concatenate([head, self.haystack.tokens(rest, rest + end - begin - len(head))])

    def end(self, fact: int) -> int:
        """Place of the token after a fact."""
        return self.begins[fact] + len(self.facts[fact].tokens)

    def straddles(self, fact: int, segment_len: int) -> bool:
        """Whether a fact begins in one segment and ends in another."""
        return self.begins[fact] // segment_len != (self.end(fact) - 1) // segment_len


def tell(
    rng: np.random.Generator,
    facts: Sequence[Fact],
    others: Sequence[Fact],
    haystack: Haystack,
    segment_len: int,
    gap: float,
    crossing: bool = True,
) -> Document:
    """A document that tells facts in random order after random gaps.

    Args:
        rng: Source of randomness.
        facts: What will be asked for.
        others: What is told too, but not asked for.
        haystack: Text around them.
        segment_len: Tokens per segment.
        gap: Tokens of text before each fact, on average.
        crossing: Whether one asked fact in 16 is placed across a segment boundary on purpose.
    """
    n = len(facts) + len(others)
    order = np.arange(n) if not others else rng.permutation(n)
    across = set(rng.choice(len(facts), size=-(-len(facts) // _CROSSING), replace=False).tolist() if crossing else ())
    parts: list[np.ndarray] = []
    begins = [0] * len(facts)
    place = taken = 0
    for number in order.tolist():
        told = (facts[number] if number < len(facts) else others[number - len(facts)]).tokens
        space = int(rng.integers(2 * max(round(gap), 0) + 1))
        if number in across and len(told) > 1:
            before = int(rng.integers(1, len(told)))  # tokens of the fact that lie before the boundary
            space += -(place + space + before) % segment_len
        parts += [haystack.tokens(taken, taken + space), np.asarray(told)]
        if number < len(facts):
            begins[number] = place + space
        place, taken = place + space + len(told), taken + space
    return Document(list(facts), begins, np.concatenate(parts), haystack, taken)


def read(
    model: Any,
    documents: Sequence[Document],
    lengths: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> Iterator[Any]:
    """Read documents side by side.

    Args:
        model: A language model.
        documents: One per row.
        lengths: Tokens after which to stop and look, ascending, multiples of the segment.
        progress: Called with the tokens read so far of a document.

    Yields:
        At each length the memories, without local context.
    """
    device = device_of(model)
    state, place = None, 0
    for length in lengths:
        while place < length:
            end = min(place + _WINDOW * model.segment_len, length)
            ids = np.stack([document.tokens(place, end) for document in documents])
            state = model.absorb(torch.from_numpy(ids).long().to(device), state)
            place = end
            if progress is not None:
                progress(place)
        yield model.new_context(state)


def ask(
    model: Any,
    state: Any,
    documents: Sequence[Document],
    unseen: Sequence[Sequence[Fact]],
    numbers: Sequence[int],
    length: int,
    paraphrase: bool = False,
) -> list[Row]:
    """Ask for every fact of the documents ``numbers``, under every condition.

    Args:
        model: A language model.
        state: The memories of these documents, one row each.
        documents: All documents, also those that are not in ``state``.
        unseen: For each document as many facts that nobody was told.
        numbers: Which document each row is.
        length: Tokens that were read.
        paraphrase: Whether to ask in other words than the fact was told in: fact i with its i-th paraphrase, in turn.

    Returns:
        One row per condition, document and fact: ``text``, ``since`` (tokens between the fact's end and the question),
        ``depth`` (place of the fact in the text, 0 at its beginning, 1 right before the question), ``straddles``
        (whether it lies across a segment boundary), ``stored`` (whether a memory holds every token of its answer; None
        where memories do not tell what they hold), ``correct``, ``nll`` (of the answer, nats per token). In a
        ``swapped`` row ``document`` is where the fact was told, while the memory is that of the next document.
    """
    n_fact = len(documents[0].facts)
    wiped = model.wipe(state)
    own: _Asked = [(i, documents[i].facts) for i in numbers]
    # The memory of a document is asked for what the document before it told: no other memory need be at hand.
    others: _Asked = [((i - 1) % len(documents), documents[i - 1].facts) for i in numbers]
    never: _Asked = [(i, unseen[i]) for i in numbers]
    questions: dict[str, tuple[Any, bool, _Asked]] = {
        "on": (state, True, own),
        "off": (state, False, own),
        "wiped": (wiped, True, own),
        "swapped": (state, True, others),
        "unseen": (state, True, never),
    }
    held = _held(model.places(state), len(numbers))
    rows: list[Row] = []
    for condition, (memory, reads, asked) in questions.items():
        for i in range(n_fact):  # one question per row at a time, so that no bank has to be copied
            other = [facts[i].paraphrases[i % len(facts[i].paraphrases)] if paraphrase else None for _, facts in asked]
            words = [facts[i] if p is None else facts[i].asked(p) for (_, facts), p in zip(asked, other, strict=True)]
            answers = answer(model, memory, words, reads)
            for row, ((number, facts), (correct, nll)) in enumerate(zip(asked, answers, strict=True)):
                document = None if condition == "unseen" else documents[number]
                rows.append(
                    {
                        "condition": condition,
                        "document": number,
                        "fact": i,
                        "text": facts[i].text,
                        "since": None if document is None else length - document.end(i),
                        "depth": None if document is None else document.begins[i] / length,
                        "straddles": None if document is None else document.straddles(i, model.segment_len),
                        "level": None if (said := other[row]) is None else said.level,
                        "stored": _stored(documents[number], i, held[row]) if held and condition == "on" else None,
                        "correct": correct,
                        "nll": nll,
                    }
                )
    return rows


def _held(places: Sequence[Tensor], n_row: int) -> list[list[set[int]]]:
    """For each row the places in its text that each memory holds; empty if memories do not tell."""
    return [
        [set(part[row if len(part) > 1 else 0].tolist()) for part in places] for row in range(n_row if places else 0)
    ]


def _stored(document: Document, fact: int, held: Sequence[set[int]]) -> bool:
    """Whether one memory holds the slots that lead to every token of an answer: those of the tokens before them."""
    end = document.end(fact)
    needed = set(range(end - len(document.facts[fact].answer) - 1, end - 1))
    return any(needed <= places for places in held)


def question(facts: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Facts, or anything else with a ``cue`` and all ``tokens``, as rows of tokens.

    Returns:
        Token ids, (B, L), and which of the last L - 1 belong to the answer, (B, L - 1). What follows an answer cannot
        change it (models are causal), so short questions are filled up with anything.
    """
    longest = max(len(fact.tokens) for fact in facts)
    ids = torch.tensor([fact.tokens + (0,) * (longest - len(fact.tokens)) for fact in facts])
    begin = torch.tensor([len(fact.cue) for fact in facts])[:, None]
    end = torch.tensor([len(fact.tokens) for fact in facts])[:, None]
    place = torch.arange(1, longest)
    return ids, (place >= begin) & (place < end)


def answer(
    model: Any,
    state: Any,
    facts: Sequence[Fact],
    read: bool = True,
) -> list[tuple[bool, float]]:
    """Ask each row of ``state`` for a fact, given its cue; nothing is written.

    Args:
        model: A language model.
        state: Memories, with no local context.
        facts: One per row.
        read: Whether memories are read.

    Returns:
        For each fact whether greedy decoding gives the whole answer, and the answer's mean nats per token.
    """
    ids, asked = (part.to(device_of(model)) for part in question(facts))
    logits = model(ids, state=state, read=read, write=False).logits[:, :-1].float()  # (B, L - 1, V)
    targets = ids[:, 1:]
    nll = -logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]  # (B, L - 1)
    mean = torch.where(asked, nll, 0.0).sum(dim=1) / asked.sum(dim=1)
    correct = ((logits.argmax(dim=-1) == targets) | ~asked).all(dim=1)
    return list(zip(correct.tolist(), mean.tolist(), strict=True))


def rates(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of rows that belong together.

    Returns:
        For each condition ``exact_match/<condition>`` with ``low`` and ``high`` (95 % Wilson interval) and ``n``, and
        ``nll``; the same of facts across a segment boundary, ``exact_match_straddling/...``, of the others,
        ``exact_match_inside/...``, and of paraphrases by level, ``exact_match_<level>/...``; ``stored``, the share of
        facts whose answers memory still holds; and ``chance``, the rate of one who knows what the document told and
        guesses which fact is meant.
    """
    metrics: dict[str, float] = {}
    kinds: dict[str, Callable[[Row], bool]] = {
        "": lambda row: True,
        "_straddling": lambda row: row["straddles"] is True,
        "_inside": lambda row: row["straddles"] is False,
    }
    kinds |= {f"_{level}": lambda row, level=level: row.get("level") == level for level in LEVELS}  # type: ignore[misc]
    for kind, belongs in kinds.items():
        for condition in CONDITIONS:
            part = [row for row in rows if row["condition"] == condition and belongs(row)]
            if not part:
                continue
            metrics |= rate(f"{kind}/{condition}", part)
    told = [row for row in rows if row["condition"] == "on"]
    stored = [row["stored"] for row in told if row.get("stored") is not None]
    if stored:
        metrics["stored"] = sum(stored) / len(stored)
    if told:
        metrics["chance"] = len({row["document"] for row in told}) / len(told)
    return metrics


def rate(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of at least one answer under one condition.

    Returns:
        ``exact_match<name>`` with ``low`` and ``high`` (95 % Wilson interval), ``n`` and ``nll``.
    """
    k, n = sum(row["correct"] for row in rows), len(rows)
    low, high = wilson(k, n)
    nll = math.fsum(row["nll"] for row in rows) / n
    return {f"exact_match{name}": k / n, f"low{name}": low, f"high{name}": high, f"n{name}": n, f"nll{name}": nll}


def n_row_of(model: Any, wanted: int) -> int:
    """Documents to read at once: one where all rows share a memory."""
    return 1 if is_shared(model) else wanted


def is_shared(model: Any) -> bool:
    """Whether a memory of the model has one bank for all rows."""
    return any(modules[0].scope == "shared" for modules in model.memory.values())


def device_of(model: Any) -> torch.device:
    """Where the model is."""
    return next(model.parameters(), torch.empty(0)).device
