"""Needle: facts told once in held-out text and asked for after a long stretch of more text.

Of every document the model reads facts, each told once between passages of text that it was not trained on, and then
text until every fact lies at least `distance` tokens back. Then the local context is dropped, so that memory is all
that remains, and each fact is asked for in a fresh context of its own: the cue is its name, nothing is written. An
answer counts when the likeliest token is right at every place, given the right ones before it: exactly then greedy
decoding gives the whole answer.

A rate says something only beside its controls, so each question is also asked with reads off, of a wiped memory and
of the memory of another document, and facts that nobody was told are asked of the memory as it is. A model whose empty
memory contributes nothing has the same answers off and wiped by construction. Without any memory all conditions run
all the same.

Shapes: B rows, L tokens of a question, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from experiments.base import PALETTE, Result, Row, evaluating, style, wilson
from memlm.analysis.figures import CONTROLS
from memlm.config import ConfigError
from memlm.data.facts import Fact

CONDITIONS = ("on", *CONTROLS)
"""The memory as it is, then its controls: see `memlm.analysis.figures.CONTROLS`."""

_WINDOW = 4  # segments read per call
_CROSSING = 16  # one fact in so many is placed across a segment boundary on purpose; others get there by chance
_Asked = list[tuple[int, Sequence[Fact]]]  # by row of a state: number of a document, and facts to ask for
_COLORS = dict(zip(CONDITIONS, ("blue", "vermillion", "purple", "orange", "green"), strict=True))


@dataclass(frozen=True)
class Needle:
    """Settings.

    Attributes:
        n_document: Documents, each with facts of its own; at least 2, as one is the other's control.
        n_fact: Facts told per document, and as many that are told in none.
        distance: Fewest tokens between the end of any fact and the questions. With a list the same documents go on
            and questions are asked at each length.
        facts_per_segment: How densely facts are told, on average.
        split: Where the text around the facts is from: ``val``, or ``test`` for final numbers.
        seed: Of facts, gaps and passages.
        n_row: Documents read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_document: int = 8
    n_fact: int = 32
    distance: int | list[int] = 4096
    facts_per_segment: float = 2.0
    split: Literal["val", "test"] = "val"
    seed: int = 0
    n_row: int = 8

    def __post_init__(self) -> None:
        least = {"n_document": 2, "n_fact": 1, "seed": 0, "n_row": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ConfigError(f"needle.{name} must be at least {number}, got {getattr(self, name)}")
        if not self.distances or self.distances[0] < 0:
            raise ConfigError(f"needle.distance must be a number of tokens or a list of them, got {self.distance}")
        if not self.facts_per_segment > 0:
            raise ConfigError(f"needle.facts_per_segment must be positive, got {self.facts_per_segment}")
        if self.split not in ("val", "test"):
            raise ConfigError(f"needle.split must be 'val' or 'test', text the model never saw, got {self.split!r}")

    @property
    def distances(self) -> list[int]:
        """All distances, ascending."""
        return [self.distance] if isinstance(self.distance, int) else sorted(set(self.distance))


class Document(NamedTuple):
    """Text with facts told near its beginning; it goes on without end.

    Attributes:
        facts: What is told.
        begins: Place of the first token of each fact.
        head: Token ids up to the end of the last fact.
        passage: Token ids of the split that the text is taken from, round and round.
        taken: Place in ``passage`` where the text goes on after the head.
    """

    facts: list[Fact]
    begins: list[int]
    head: np.ndarray
    passage: np.ndarray
    taken: int

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids of a part of the text, (end - begin,)."""
        rest = np.arange(max(begin, len(self.head)), max(end, len(self.head))) - len(self.head)
        return np.concatenate([self.head[begin:end], self.passage[(self.taken + rest) % len(self.passage)]])

    def end(self, fact: int) -> int:
        """Place of the token after a fact."""
        return self.begins[fact] + len(self.facts[fact].tokens)

    def straddles(self, fact: int, segment_len: int) -> bool:
        """Whether a fact begins in one segment and ends in another."""
        return self.begins[fact] // segment_len != (self.end(fact) - 1) // segment_len


def run(model: Any, data: Any, cfg: Needle, progress: Callable[[float], None] | None = None) -> Result:
    """Measure recall and its controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and the ``maker`` of facts, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.

    Returns:
        One row per question, by length, condition, document and fact: ``distance`` is the setting, ``since`` the
        tokens between the fact's end and the question, ``depth`` the place of the fact in the text (0 at its
        beginning, 1 right before the question), ``straddles`` whether it lies across a segment boundary, ``correct``
        the outcome, ``nll`` that of the answer in nats per token. In a ``swapped`` row ``document`` is where the fact
        was told, while the memory is that of the next document. For metrics see `summarise`.
    """
    segment_len = model.segment_len
    documents, unseen = draw(data, cfg, segment_len)
    shared = any(modules[0].scope == "shared" for modules in model.memory.values())
    n_row = 1 if shared else cfg.n_row
    longest = max(len(document.head) for document in documents)
    lengths = {distance: -(-(longest + distance) // segment_len) * segment_len for distance in cfg.distances}
    n_token = max(lengths.values())
    device = next(model.parameters(), torch.empty(0)).device
    rows: list[Row] = []
    with evaluating(model):
        for first in range(0, cfg.n_document, n_row):
            numbers = range(first, min(first + n_row, cfg.n_document))
            state, place = None, 0
            for distance, length in lengths.items():
                while place < length:
                    end = min(place + _WINDOW * segment_len, length)
                    ids = np.stack([documents[i].tokens(place, end) for i in numbers])
                    state = model(torch.from_numpy(ids).long().to(device), state=state, logits=False).state
                    place = end
                    if progress is not None:
                        progress((first * n_token + len(numbers) * place) / (cfg.n_document * n_token))
                rows += _question(model, model.new_context(state), documents, unseen, numbers, distance, length)
    rows.sort(key=lambda row: (row["distance"], CONDITIONS.index(row["condition"]), row["document"], row["fact"]))
    n_haystack = n_token - min(sum(len(fact.tokens) for fact in document.facts) for document in documents)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document * cfg.n_fact,
        "distances": cfg.distances,
        "lengths": list(lengths.values()),  # tokens of a document when its questions are asked
        "segment_len": segment_len,
        "haystack_repetition": n_haystack / len(documents[0].passage),  # above 1 a document repeats its own text
        "memories": list(model.memory.keys()),
        "shared": shared,
    }
    return Result("needle", summarise(rows), tuple(rows), metadata)


def draw(data: Any, cfg: Needle, segment_len: int) -> tuple[list[Document], list[Fact]]:
    """The documents, and facts that are told in none of them; all names differ."""
    n = cfg.n_document * cfg.n_fact
    rng = np.random.default_rng([cfg.seed, 0])
    facts = data.maker.draw(rng, 2 * n, "evaluation")
    crossing = set(rng.choice(n, size=-(-n // _CROSSING), replace=False).tolist())
    passage = data.tokens(cfg.split).tokens
    documents = []
    for i in range(cfg.n_document):
        numbers = range(i * cfg.n_fact, (i + 1) * cfg.n_fact)
        rng = np.random.default_rng([cfg.seed, 1 + i])
        told = [(facts[number], number in crossing) for number in numbers]
        documents.append(_tell(rng, told, passage, segment_len, cfg.facts_per_segment))
    return documents, facts[n:]


def _tell(
    rng: np.random.Generator,
    told: list[tuple[Fact, bool]],
    passage: np.ndarray,
    segment_len: int,
    facts_per_segment: float,
) -> Document:
    """A document that tells facts after random gaps, and across a segment boundary where asked to."""
    parts: list[np.ndarray] = []
    begins: list[int] = []
    place, taken = 0, int(rng.integers(len(passage)))
    for fact, crosses in told:
        length = len(fact.tokens)
        gap = int(rng.integers(2 * max(round(segment_len / facts_per_segment) - length, 0) + 1))
        if crosses and length > 1:
            before = int(rng.integers(1, length))  # tokens of the fact that lie before the boundary
            gap += -(place + gap + before) % segment_len
        parts += [passage[(taken + np.arange(gap)) % len(passage)], np.asarray(fact.tokens)]
        begins.append(place + gap)
        place, taken = place + gap + length, taken + gap
    return Document([fact for fact, _ in told], begins, np.concatenate(parts), passage, taken)


def _question(
    model: Any,
    state: Any,
    documents: Sequence[Document],
    unseen: Sequence[Fact],
    numbers: Sequence[int],
    distance: int,
    length: int,
) -> list[Row]:
    """Ask for every fact of the documents ``numbers``, whose memories are the rows of ``state``."""
    n_fact = len(documents[0].facts)
    wiped = model.wipe(state)
    own: _Asked = [(i, documents[i].facts) for i in numbers]
    # The memory of a document is asked for what the document before it told: no other memory need be at hand.
    others: _Asked = [((i - 1) % len(documents), documents[i - 1].facts) for i in numbers]
    never: _Asked = [(i, unseen[i * n_fact : (i + 1) * n_fact]) for i in numbers]
    questions: dict[str, tuple[Any, bool, _Asked]] = {
        "on": (state, True, own),
        "off": (state, False, own),
        "wiped": (wiped, True, own),
        "swapped": (state, True, others),
        "unseen": (state, True, never),
    }
    rows: list[Row] = []
    for condition, (memory, read, asked) in questions.items():
        for i in range(n_fact):  # one question per row at a time, so that no bank has to be copied
            answers = answer(model, memory, [facts[i] for _, facts in asked], read)
            for (number, facts), (correct, nll) in zip(asked, answers, strict=True):
                document = None if condition == "unseen" else documents[number]
                rows.append(
                    {
                        "condition": condition,
                        "distance": distance,
                        "document": number,
                        "fact": i,
                        "text": facts[i].text,
                        "since": None if document is None else length - document.end(i),
                        "depth": None if document is None else document.begins[i] / length,
                        "straddles": None if document is None else document.straddles(i, model.segment_len),
                        "correct": correct,
                        "nll": nll,
                    }
                )
    return rows


def answer(model: Any, state: Any, facts: Sequence[Fact], read: bool = True) -> list[tuple[bool, float]]:
    """Ask each row of ``state`` for a fact, given its cue; nothing is written.

    Args:
        model: A language model.
        state: Memories, with no local context.
        facts: One per row.
        read: Whether memories are read.

    Returns:
        For each fact whether greedy decoding gives the whole answer, and the answer's mean nats per token.
    """
    device = next(model.parameters(), torch.empty(0)).device
    longest = max(len(fact.tokens) for fact in facts)
    # What follows an answer cannot change it (models are causal), so short questions are filled up with anything.
    ids = torch.tensor([fact.tokens + (0,) * (longest - len(fact.tokens)) for fact in facts], device=device)  # (B, L)
    begin = torch.tensor([len(fact.cue) for fact in facts], device=device)[:, None]
    end = torch.tensor([len(fact.tokens) for fact in facts], device=device)[:, None]
    place = torch.arange(1, longest, device=device)
    asked = (place >= begin) & (place < end)  # (B, L - 1)
    logits = model(ids, state=state, read=read, write=False).logits[:, :-1].float()  # (B, L - 1, V)
    targets = ids[:, 1:]
    nll = -logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]  # (B, L - 1)
    mean = torch.where(asked, nll, 0.0).sum(dim=1) / asked.sum(dim=1)
    correct = ((logits.argmax(dim=-1) == targets) | ~asked).all(dim=1)
    return list(zip(correct.tolist(), mean.tolist(), strict=True))


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition ``exact_match/<condition>`` with ``low`` and ``high`` (95 % Wilson interval) and ``n``, and
        ``nll``; the same of facts across a segment boundary, ``exact_match_straddling/...``, and of the others,
        ``exact_match_inside/...``; and ``chance``, the rate of one who knows what the document told and guesses which
        fact is meant. With several distances these are for the longest, and ``.../<distance>`` for each.
    """
    distances = sorted({row["distance"] for row in rows})
    metrics: dict[str, float] = {}
    for distance in reversed(distances):
        part = _rates([row for row in rows if row["distance"] == distance])
        if distance == distances[-1]:
            metrics |= part
        if len(distances) > 1:
            metrics |= {f"{name}/{distance}": value for name, value in part.items()}
    return metrics


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of one distance."""
    metrics: dict[str, float] = {}
    kinds = {"": (True, False, None), "_straddling": (True,), "_inside": (False,)}
    for kind, wanted in kinds.items():
        for condition in CONDITIONS:
            part = [row for row in rows if row["condition"] == condition and row["straddles"] in wanted]
            if not part:
                continue
            k, n = sum(row["correct"] for row in part), len(part)
            low, high = wilson(k, n)
            numbers = {"exact_match": k / n, "low": low, "high": high, "n": n}
            numbers["nll"] = math.fsum(row["nll"] for row in part) / n
            metrics |= {f"{name}{kind}/{condition}": value for name, value in numbers.items()}
    told = [row["document"] for row in rows if row["condition"] == "on"]
    if told:
        metrics["chance"] = len(set(told)) / len(told)
    return metrics


def plot(result: Result) -> dict[str, Figure]:
    """Recall beside its controls: bars at one distance, lines over several."""
    distances = sorted({row["distance"] for row in result.rows})
    if not distances:
        return {}
    return {"recall": _bars(result.metrics, distances[0]) if len(distances) == 1 else _lines(result.metrics, distances)}


def _bars(metrics: Mapping[str, float], distance: int) -> Figure:
    names = {"on": "memory on", "_straddling/on": "memory on, facts across\na segment boundary", **CONTROLS}
    keys = {name: name if "/" in name else f"/{name}" for name in names}
    shown = [name for name in names if f"exact_match{keys[name]}" in metrics]
    with style():
        figure = Figure(figsize=(7.5, 1.6 + 0.5 * len(shown)))
        axes = figure.subplots()
        for y, name in enumerate(shown):
            rate, n = metrics[f"exact_match{keys[name]}"], int(metrics[f"n{keys[name]}"])
            low, high = metrics[f"low{keys[name]}"], metrics[f"high{keys[name]}"]
            color = PALETTE[_COLORS.get(name, "sky")]
            axes.barh(y, rate, height=0.6, color=color, alpha=0.85)
            bounds = [[max(rate - low, 0)], [max(high - rate, 0)]]
            axes.errorbar(rate, y, xerr=bounds, color=PALETTE["black"], capsize=4, linewidth=1.4, clip_on=False)
            axes.annotate(
                f"{round(rate * n)} of {n}", (1, y), xycoords=axes.get_yaxis_transform(), xytext=(10, 0),
                textcoords="offset points", va="center", fontsize=10,
            )  # fmt: skip
        if "chance" in metrics:
            label = f"guess among the document's facts, {100 * metrics['chance']:.2g} %"
            axes.axvline(metrics["chance"], color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
            figure.legend(loc="outside lower right")
        axes.set_yticks(range(len(shown)), [names[name] for name in shown])
        axes.invert_yaxis()
        axes.set(title=f"Recall of facts told {distance:,} or more tokens before", xlim=(0, 1))
        axes.set_xlabel("recalled exactly, with 95 % Wilson interval")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    return figure


def _lines(metrics: Mapping[str, float], distances: Sequence[int]) -> Figure:
    markers = dict(zip(CONDITIONS, ("o", "s", "o", "^", "x"), strict=True))
    sizes = dict(zip(CONDITIONS, (6, 10, 7, 5, 4), strict=True))  # nested, so that four controls at 0 % stay visible
    with style():
        figure = Figure(figsize=(7.0, 4.6))
        axes = figure.subplots()
        for condition in CONDITIONS:
            x = [d for d in distances if f"exact_match/{condition}/{d}" in metrics]
            if not x:
                continue
            rate, low, high, n = (
                [metrics[f"{name}/{condition}/{d}"] for d in x] for name in ("exact_match", "low", "high", "n")
            )
            color, on = PALETTE[_COLORS[condition]], condition == "on"
            axes.fill_between(x, low, high, color=color, alpha=0.18 if on else 0.08, linewidth=0)
            axes.plot(
                x, rate, color=color, linestyle="-" if on else "--", linewidth=2.5 if on else 1.2,
                marker=markers[condition], markersize=sizes[condition], markerfacecolor=color if on else "none",
                clip_on=False, zorder=5 if on else 3, label="memory on" if on else CONTROLS[condition],
            )  # fmt: skip
        if "chance" in metrics:
            label = f"guess among the document's facts, {100 * metrics['chance']:.2g} %"
            axes.axhline(metrics["chance"], color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
        axes.set(title="Recall by distance", ylabel="recalled exactly", ylim=(0, 1))
        axes.set_xlabel("tokens between fact and question, at least")
        if distances[0] > 0 and distances[-1] / distances[0] >= 8:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(distances)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        count = f"{int(max(n)):,}"
        figure.legend(loc="outside lower center", ncols=2, title=f"band: 95 % Wilson interval, n = {count}")
    return figure
