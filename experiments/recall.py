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

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from torch import Tensor

from experiments.base import ALONE, PALETTE, Row, Share, wilson
from memlm.analysis.figures import CONTROLS
from memlm.analysis.usage import banks
from memlm.data.facts import Fact
from memlm.data.sentences import LEVELS

CONDITIONS = ("on", *CONTROLS)
"""The memory as it is, then its controls: see `memlm.analysis.figures.CONTROLS`."""

LABELS = {"on": "memory on", **CONTROLS, "stranger": "same question, subject never told"}
"""What each condition is called, and a control of sentences alone: the told answer to a question about another subject,
which a memory gives that goes by what is asked and not by whom."""

COLORS = dict(zip(LABELS, ("blue", "vermillion", "purple", "orange", "green", "sky"), strict=True))
"""What of `PALETTE` draws each condition."""

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
        others: What is told too, but not asked for.
    """

    facts: list[Fact]
    begins: list[int]
    head: np.ndarray
    haystack: Haystack
    taken: int
    others: Sequence[Fact] = ()

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
    mixed: bool = True,
    lead: int = 0,
) -> Document:
    """A document that tells facts after random gaps.

    Args:
        rng: Source of randomness.
        facts: What will be asked for.
        others: What is told too, but not asked for.
        haystack: Text around them.
        segment_len: Tokens per segment.
        gap: Tokens of text before each fact, on average.
        crossing: Whether one asked fact in 16 is placed across a segment boundary on purpose.
        mixed: Whether the others are told among the facts, in random order, and not after them.
        lead: Tokens of text before the first gap.
    """
    n = len(facts) + len(others)
    order = rng.permutation(n) if others and mixed else np.arange(n)
    across = set(rng.choice(len(facts), size=-(-len(facts) // _CROSSING), replace=False).tolist() if crossing else ())
    parts = [haystack.tokens(0, lead)]
    begins = [0] * len(facts)
    place = taken = lead
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
    return Document(list(facts), begins, np.concatenate(parts), haystack, taken, others)


class Consolidation:
    """Consolidates memories now and then while documents are read, and counts what that frees.

    Args:
        every: Segments from one time to the next.

    Attributes:
        every: See above.
        merged: Slots that were merged into another since the documents' beginning, (B,), or () if it was not time yet.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.merged = torch.tensor(0)

    def __call__(self, model: Any, state: Any, turn: int) -> Any:
        """The state with consolidated memories; ``turn`` is how often that was done before."""
        new = model.map_memory(lambda module, part: module.consolidate(part, turn=turn)[0], state)
        self.merged = self.merged + _n_filled(model, state) - _n_filled(model, new)
        return new


def _n_filled(model: Any, state: Any) -> Tensor:
    """Slots that hold something, of all memories, for each row, (B,); 0 without memory."""
    counts = (module.filled(part).sum(dim=1).cpu() for module, part in banks(model, state).values())
    return sum(counts, torch.tensor(0))


def read(
    model: Any,
    documents: Sequence[Document],
    lengths: Sequence[int],
    progress: Callable[[int], None] | None = None,
    consolidation: Consolidation | None = None,
) -> Iterator[Any]:
    """Read documents side by side.

    Args:
        model: A language model.
        documents: One per row.
        lengths: Tokens after which to stop and look, ascending, multiples of the segment.
        progress: Called with the tokens read so far of a document.
        consolidation: What is done to memories in between; None for nothing.

    Yields:
        At each length the memories, without local context.
    """
    device = device_of(model)
    state, place = None, 0
    step = lengths[-1]
    if consolidation:
        step, consolidation.merged = consolidation.every * model.segment_len, torch.tensor(0)
    for length in lengths:
        while place < length:
            end = min(place + _WINDOW * model.segment_len, length, (place // step + 1) * step)
            ids = np.stack([document.tokens(place, end) for document in documents])
            state = model.absorb(torch.from_numpy(ids).long().to(device), state)
            place = end
            if consolidation and place % step == 0:
                state = consolidation(model, state, place // step - 1)
            if progress is not None:
                progress(place)
        yield model.new_context(state)


def visit(
    model: Any,
    documents: Sequence[Document],
    lengths: Sequence[int],
    n_row: int,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
    consolidation: Consolidation | None = None,
) -> Iterator[tuple[range, int, Any]]:
    """Read documents, some side by side.

    Args:
        model: A language model.
        documents: The documents.
        lengths: See `read`.
        n_row: Documents to read at once, where rows do not share a memory.
        progress: Called with the share of the text that is read, in 0..1.
        share: Which of the documents.
        consolidation: See `read`.

    Yields:
        Numbers of the documents that were read side by side, which of the lengths was reached, and their memories
        there, without local context.
    """
    groups = share.groups(len(documents), n_row_of(model, n_row))
    n_token = sum(map(len, groups)) * lengths[-1]
    for numbers in groups:

        def show(place: int, before: int = numbers[0] - groups[0][0], n: int = len(numbers)) -> None:
            if progress is not None:
                progress((before * lengths[-1] + n * place) / n_token)

        states = read(model, [documents[i] for i in numbers], lengths, show, consolidation)
        yield from ((numbers, i, state) for i, state in enumerate(states))


def part_of(
    progress: Callable[[float], None] | None, done: float, more: float, total: float
) -> Callable[[float], None]:
    """What reports the share of a part as a share of the whole: the part adds ``more`` to what is ``done``."""

    def report(share: float) -> None:
        if progress is not None:
            progress((done + share * more) / total)

    return report


def ask(
    model: Any,
    state: Any,
    documents: Sequence[Document],
    unseen: Sequence[Sequence[Fact]],
    numbers: Sequence[int],
    length: int,
    paraphrase: bool = False,
    strangers: Sequence[Sequence[Fact]] | None = None,
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
        strangers: For each document its facts as if they were of subjects that nobody was told of.

    Returns:
        One row per condition, document and fact: ``text``, ``since`` (tokens between the fact's end and the question),
        ``depth`` (place of the fact in the text, 0 at its beginning, 1 right before the question), ``straddles``
        (whether it lies across a segment boundary), ``alike`` (facts told there that answer such a question: of the
        same relation, itself included), ``stored`` (whether a memory holds every token of its answer; None where
        memories do not tell what they hold, or share a bank with other text), ``correct``, ``nll`` (of the answer, nats
        per token). In a ``stranger`` row the fact is what was told, the question is about somebody else, and
        ``correct`` says that the fact is given all the same. In a ``swapped`` row ``document`` is where the fact was
        told, while the memory is that of the next document.
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
    if strangers is not None:
        questions["stranger"] = (state, True, [(i, strangers[i]) for i in numbers])
    alike = {i: Counter(map(_relation, (*documents[i].facts, *documents[i].others))) for i, _ in (*own, *others)}
    # A shared bank also holds what was written in training, whose places say nothing about these documents.
    held = [] if is_shared(model) else _held(model.places(state), len(numbers))
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
                        "alike": None if document is None else alike[number][_relation(facts[i])],
                        "stored": _stored(documents[number], i, held[row]) if held and condition == "on" else None,
                        "correct": correct,
                        "nll": nll,
                    }
                )
    return rows


def _relation(fact: Any) -> str:
    """What a fact says of its subject; facts of words, and those of tasks with their own, are all alike."""
    return getattr(fact, "relation", "")


def _held(places: Sequence[Tensor], n_row: int) -> list[list[set[int]]]:
    """For each row the places in its text that each memory holds; empty if memories do not tell."""
    return [[set(part[row].tolist()) for part in places] for row in range(n_row if places else 0)]


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
        guesses which of the facts that could be an answer is meant.
    """
    metrics: dict[str, float] = {}
    kinds: dict[str, Callable[[Row], bool]] = {
        "": lambda row: True,
        "_straddling": lambda row: row["straddles"] is True,
        "_inside": lambda row: row["straddles"] is False,
    }
    kinds |= {f"_{level}": lambda row, level=level: row.get("level") == level for level in LEVELS}  # type: ignore[misc]
    for kind, belongs in kinds.items():
        for condition in LABELS:
            part = [row for row in rows if row["condition"] == condition and belongs(row)]
            if not part:
                continue
            metrics |= rate(f"{kind}/{condition}", part)
    told = [row for row in rows if row["condition"] == "on"]
    stored = [row["stored"] for row in told if row.get("stored") is not None]
    if stored:
        metrics["stored"] = sum(stored) / len(stored)
    if told:
        of_document = Counter(row["document"] for row in told)
        metrics["chance"] = math.fsum(1 / row.get("alike", of_document[row["document"]]) for row in told) / len(told)
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


def tabulate(rows: Sequence[Row], axes: Mapping[str, Callable[[list[Any]], Any]]) -> dict[str, float]:
    """Metrics of rows that differ in some columns.

    Args:
        rows: The rows.
        axes: By column what picks one of its values, from a list of them.

    Returns:
        Those of `rates` for the picked values. For what has several values, those of each combination too:
        ``.../<value>``, in the order of ``axes``.
    """
    values = {axis: list(dict.fromkeys(row[axis] for row in rows)) for axis in axes}
    varying = [axis for axis in axes if len(values[axis]) > 1]
    metrics: dict[str, float] = {}
    for combination in itertools.product(*values.values()):
        given = dict(zip(axes, combination, strict=True))
        part = rates([row for row in rows if all(row[axis] == value for axis, value in given.items())])
        if all(value == axes[axis](values[axis]) for axis, value in given.items()):
            metrics = part | metrics
        if varying:
            suffix = "".join(f"/{given[axis]}" for axis in varying)
            metrics |= {f"{name}{suffix}": value for name, value in part.items()}
    return metrics


def above_controls(metrics: Mapping[str, float], suffix: str = "") -> bool:
    """Whether recall with the memory on lies above all of its controls, with 95 % intervals that are apart.

    Args:
        metrics: What `tabulate` returns.
        suffix: End of the names of the metrics.
    """
    return metrics[f"low/on{suffix}"] > max(metrics.get(f"high/{control}{suffix}", 0.0) for control in CONTROLS)


def draw_rates(axes: Axes, metrics: Mapping[str, float], values: Sequence[int]) -> str:
    """Draw recall and its controls against what was varied, on axes whose scale is set.

    Args:
        axes: Where to draw.
        metrics: What `tabulate` returns.
        values: What was varied, ascending: ends of the names of the metrics.

    Returns:
        What the legend says of the intervals.
    """
    markers = dict(zip(LABELS, ("o", "s", "o", "^", "x", "D"), strict=True))
    sizes = dict(zip(LABELS, (6, 10, 7, 5, 4, 6), strict=True))  # nested, so that controls at 0 % stay visible
    counts = set()
    for condition in LABELS:
        x = [value for value in values if f"exact_match/{condition}/{value}" in metrics]
        if not x:
            continue
        rate, low, high, n = (
            [metrics[f"{name}/{condition}/{value}"] for value in x] for name in ("exact_match", "low", "high", "n")
        )
        counts |= set(map(int, n))
        color, on = PALETTE[COLORS[condition]], condition == "on"
        draw_interval(axes, x, low, high, color, band=on)
        axes.plot(
            x, rate, color=color, linestyle="-" if on else "--", linewidth=2.5 if on else 1.2,
            marker=markers[condition], markersize=sizes[condition], markerfacecolor=color if on else "none",
            clip_on=False, zorder=5 if on else 3, label=LABELS[condition],
        )  # fmt: skip
    chance = [metrics[f"chance/{value}"] for value in values if f"chance/{value}" in metrics]
    if len(chance) == len(values):
        share = f", {100 * chance[0]:.2g} %" if len(set(chance)) == 1 else ""
        label = f"guess among told facts of the kind{share}"
        if len(values) == 1:
            axes.axhline(chance[0], color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
        else:
            axes.plot(values, chance, color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
    axes.set(ylabel="recalled exactly", ylim=(0, 1))
    axes.set_xticks(values)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    n_each = " to ".join(f"{n:,}" for n in sorted({min(counts), max(counts)}))
    return f"band, bars: 95 % Wilson intervals, n = {n_each}"


def draw_interval(
    axes: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, band: bool
) -> None:
    """Draw the intervals of a curve: a band, or thin bars where bands of many curves would blend, or at a single x."""
    if band and len(x) > 1:
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    else:
        axes.vlines(x, low, high, color=color, alpha=0.6, linewidth=1.2)


def n_row_of(model: Any, wanted: int) -> int:
    """Documents to read at once: one where all rows share a memory."""
    return 1 if is_shared(model) else wanted


SHARED = (
    "scope=shared: all rows write and read one memory, so what one user told may be told to any other; "
    "give each user a memory file of their own, or build the model with scope=sequence"
)
"""What to know of a memory that all rows share, before it is used."""


def is_shared(model: Any) -> bool:
    """Whether a memory of the model has one bank for all rows."""
    return any(modules[0].scope == "shared" for modules in model.memory.values())


def device_of(model: Any) -> torch.device:
    """Where the model is."""
    return next(model.parameters(), torch.empty(0)).device
