"""Overwrite: facts told again with new values, asked for the latest after a long stretch of more text.

A document tells facts in held-out text. Some are told once, some are updated: told again, each time with a new value,
between tellings of other facts. Then text follows until the last telling lies at least `distance` tokens back, the
local context is dropped, and each fact is asked for by its name in a fresh context, with nothing written. An answer
counts when greedy decoding gives the whole value that was told last. Where it does not, it is compared with every older
value of the fact: `stale` is the rate at which one of these is given whole.

The controls are those of the needle: reads off, memory wiped, another document's memory, facts never told. Chance
is 1 / (updates + 1), the rate of one who knows all values that a fact ever had and guesses which is the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.base import PALETTE, Result, Row, evaluating, style, wilson
from experiments.needle import CONDITIONS, answer
from experiments.questions import absorb, ask, chance_line, headline, is_shared, rates
from memlm.analysis.figures import CONTROLS
from memlm.config import ConfigError
from memlm.data.facts import Fact
from memlm.data.overwrite import retell


@dataclass(frozen=True)
class Overwrite:
    """Settings.

    Attributes:
        n_document: Documents, each with facts of its own; at least 2, as one is the other's control.
        n_fact: Facts per document and number of updates.
        updates: How often a fact is updated after it was told.
        distance: Fewest tokens between the last telling and the questions.
        facts_per_segment: How densely facts are told, on average.
        split: Where the text around the facts is from: ``val``, or ``test`` for final numbers.
        seed: Of facts, their order, gaps and passages.
        n_row: Documents read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_document: int = 8
    n_fact: int = 16
    updates: list[int] = field(default_factory=lambda: [0, 1, 2, 5, 10])
    distance: int = 1024
    facts_per_segment: float = 2.0
    split: Literal["val", "test"] = "val"
    seed: int = 0
    n_row: int = 8

    def __post_init__(self) -> None:
        for name, least in {"n_document": 2, "n_fact": 1, "distance": 0, "seed": 0, "n_row": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"overwrite.{name} must be at least {least}, got {getattr(self, name)}")
        if not self.updates or min(self.updates) < 0 or sorted(set(self.updates)) != list(self.updates):
            raise ConfigError(f"overwrite.updates must be numbers from 0 in ascending order, got {self.updates}")
        if not self.facts_per_segment > 0:
            raise ConfigError(f"overwrite.facts_per_segment must be positive, got {self.facts_per_segment}")
        if self.split not in ("val", "test"):
            raise ConfigError(f"overwrite.split must be 'val' or 'test', text the model never saw, got {self.split!r}")


class Document(NamedTuple):
    """Text with facts that change.

    Attributes:
        versions: For each fact everything it ever was, the latest last.
        ends: Place of the token after the last telling of each fact.
        tokens: Token ids up to the end of the last telling of all.
        passage: Token ids of the split that the text is taken from, round and round.
        taken: Place in ``passage`` where the text goes on.
    """

    versions: list[list[Fact]]
    ends: list[int]
    tokens: np.ndarray
    passage: np.ndarray
    taken: int


def run(model: Any, data: Any, cfg: Overwrite, progress: Callable[[float], None] | None = None) -> Result:
    """Measure how often the latest value is recalled, against the number of updates.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and the ``maker`` of facts, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.

    Returns:
        One row per condition, document and fact: ``n_update``, ``since`` the tokens between the last telling and the
        question, ``correct`` and ``nll`` of the latest value, and with the memory on ``stale``, how many updates ago
        the value was told that was given instead (None if none of the fact's). For metrics see `summarise`.
    """
    documents, unseen = draw(data, cfg, model.segment_len)
    length = max(len(document.tokens) for document in documents) + cfg.distance
    length += -length % model.segment_len
    latest = [[versions[-1] for versions in document.versions] for document in documents]
    n_row = 1 if is_shared(model) else cfg.n_row
    rows: list[Row] = []
    with evaluating(model):
        for first in range(0, cfg.n_document, n_row):
            numbers = range(first, min(first + n_row, cfg.n_document))

            def read(n_token: int, first: int = first) -> None:
                if progress is not None:
                    progress((first * length + n_token) / (cfg.n_document * length))

            state = absorb(model, np.stack([_until(documents[i], length) for i in numbers]), read)
            found = ask(model, state, numbers, latest, unseen)
            stale = _stale(model, state, numbers, documents, found)
            for row in found:
                i, k = row["document"], row.pop("question")
                fact = (unseen if row["condition"] == "unseen" else latest)[i][k]
                row |= {"fact": k, "n_update": cfg.updates[k // cfg.n_fact], "text": fact.text}
                row["since"] = None if row["condition"] == "unseen" else length - documents[i].ends[k]
                row["stale"] = stale.get((i, k)) if row["condition"] == "on" else None
                rows.append(row)
    rows.sort(key=lambda row: (CONDITIONS.index(row["condition"]), row["document"], row["fact"]))
    metrics = summarise(rows)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document * cfg.n_fact,  # questions per number of updates
        "updates": cfg.updates,
        "length": length,  # tokens of a document when its questions are asked
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": _headline(cfg.updates[-1]),
    }
    return Result("overwrite", metrics, tuple(rows), metadata)


def draw(data: Any, cfg: Overwrite, segment_len: int) -> tuple[list[Document], list[list[Fact]]]:
    """The documents, and for each as many facts that are told in none; all names differ."""
    n = cfg.n_fact * len(cfg.updates)  # facts of a document
    facts = data.maker.draw(np.random.default_rng([cfg.seed, 0]), 2 * n * cfg.n_document, "evaluation")
    shares = [facts[i : i + n] for i in range(0, len(facts), n)]
    passage = data.tokens(cfg.split).tokens
    gap = max(segment_len / cfg.facts_per_segment - len(facts[0].tokens), 0)
    documents = []
    for i, own in enumerate(shares[: cfg.n_document]):
        rng = np.random.default_rng([cfg.seed, 1 + i])
        versions = []
        for k, fact in enumerate(own):
            versions.append([fact])
            for _ in range(cfg.updates[k // cfg.n_fact]):
                versions[-1].append(_new(rng, data.maker, versions[-1]))
        documents.append(_tell(rng, versions, passage, gap))
    return documents, shares[cfg.n_document :]


def _new(rng: np.random.Generator, maker: Any, versions: Sequence[Fact]) -> Fact:
    """The fact with a value that it never had."""
    while True:
        fact = retell(rng, maker, versions[-1], "evaluation")
        if all(fact.value != old.value for old in versions):
            return fact


def _tell(rng: np.random.Generator, versions: list[list[Fact]], passage: np.ndarray, gap: float) -> Document:
    """A document that tells all versions of all facts: those of each in their order, facts in any."""
    order = rng.permutation([k for k, own in enumerate(versions) for _ in own])
    left = [iter(own) for own in versions]
    parts: list[np.ndarray] = []
    ends = [0] * len(versions)
    place, taken = 0, int(rng.integers(len(passage)))
    for k in order.tolist():
        space = int(rng.integers(2 * round(gap) + 1))
        fact = next(left[k])
        parts += [passage[(taken + np.arange(space)) % len(passage)], np.asarray(fact.tokens)]
        place, taken = place + space + len(fact.tokens), taken + space
        ends[k] = place
    return Document(versions, ends, np.concatenate(parts), passage, taken)


def _until(document: Document, length: int) -> np.ndarray:
    """The text of a document up to a length."""
    rest = document.taken + np.arange(length - len(document.tokens))
    return np.concatenate([document.tokens, document.passage[rest % len(document.passage)]])


def _stale(
    model: Any, state: Any, numbers: Sequence[int], documents: Sequence[Document], rows: Sequence[Row]
) -> dict[tuple[int, int], int]:
    """By document and fact, how many updates ago the value was told that a memory gave instead of the latest."""
    wrong = {(row["document"], row["question"]) for row in rows if row["condition"] == "on" and not row["correct"]}
    found: dict[tuple[int, int], int] = {}
    for k in sorted({k for _, k in wrong}):
        versions = [documents[i].versions[k] for i in numbers]
        for ago in range(1, len(versions[0])):
            answers = answer(model, state, [own[-1 - ago] for own in versions])
            found |= {(i, k): ago for i, (given, _) in zip(numbers, answers, strict=True) if given}
    return {key: ago for key, ago in found.items() if key in wrong}


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition and number of updates ``exact_match/<condition>/<updates>`` of the latest value with ``low``
        and ``high`` (95 % Wilson interval), ``n`` and ``nll``; ``stale/on/<updates>`` with ``stale_low`` and
        ``stale_high``, the rate of an older value; ``chance/<updates>``. Without a number: those of the most updates.
    """
    updates = sorted({row["n_update"] for row in rows})
    metrics: dict[str, float] = {}
    for n_update in reversed(updates):
        part = [row for row in rows if row["n_update"] == n_update]
        own = rates(part)
        on = [row for row in part if row["condition"] == "on"]
        if on:
            k = sum(row["stale"] is not None for row in on)
            low, high = wilson(k, len(on))
            own |= {"stale/on": k / len(on), "stale_low/on": low, "stale_high/on": high}
        own["chance"] = 1 / (n_update + 1)
        if n_update == updates[-1]:
            metrics |= own
        metrics |= {f"{name}/{n_update}": value for name, value in own.items()}
    return metrics


def _headline(most: int) -> list[dict[str, Any]]:
    """What the terminal's table and comparisons of runs show."""
    stale = headline(f"an older value after {most} updates, memory on", "on")
    stale |= {"metric": "stale/on", "low": "stale_low/on", "high": "stale_high/on", "better": "lower"}
    lines = [headline(f"latest value after {most} updates, memory on", "on"), stale]
    lines += [headline(label, condition, control=True) for condition, label in CONTROLS.items()]
    return [*lines, chance_line("guess among the values of the fact")]


def plot(result: Result) -> dict[str, Figure]:
    """Rates of the latest and of an older value against the number of updates, beside the controls."""
    updates = [int(n) for n in result.metadata["updates"] if f"exact_match/on/{n}" in result.metrics]
    if not updates:
        return {}
    lines: dict[str, tuple[str, str, str]] = {
        "on": ("latest value, memory on", PALETTE["blue"], "o"),
        "stale": ("an older value, memory on", PALETTE["orange"], "D"),
        "off": (CONTROLS["off"], PALETTE["vermillion"], "s"),
        "wiped": (CONTROLS["wiped"], PALETTE["purple"], "o"),
        "swapped": (CONTROLS["swapped"], PALETTE["sky"], "^"),
        "unseen": (CONTROLS["unseen"], PALETTE["green"], "x"),
    }
    sizes = {"off": 10, "wiped": 7, "swapped": 5, "unseen": 4}  # nested, so that controls at one height stay visible
    metrics = result.metrics
    with style():
        figure = Figure(figsize=(7.0, 4.6))
        axes = figure.subplots()
        x = range(len(updates))
        for name, (label, color, marker) in lines.items():
            keys = ("stale/on", "stale_low/on", "stale_high/on") if name == "stale" else _keys(name)
            rate, low, high = ([metrics[f"{key}/{n}"] for n in updates] for key in keys)
            measured = name in ("on", "stale")
            axes.fill_between(x, low, high, color=color, alpha=0.18 if measured else 0.06, linewidth=0)
            axes.plot(
                x, rate, color=color, marker=marker, markersize=sizes.get(name, 6), clip_on=False, label=label,
                linestyle="-" if measured else "--", linewidth=2.5 if measured else 1.2,
                markerfacecolor=color if measured else "none", zorder=5 if measured else 3,
            )  # fmt: skip
        chance = [metrics[f"chance/{n}"] for n in updates]
        axes.plot(
            x, chance, color=PALETTE["black"], linestyle=":", linewidth=1.2, label="guess among the fact's values"
        )
        axes.set_xticks(x, [str(n) for n in updates])
        axes.set(title="Facts whose value changes", ylim=(0, 1), ylabel="given exactly")
        axes.set_xlabel("updates after the fact was first told")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        n = int(metrics[f"n/on/{updates[0]}"])
        figure.legend(loc="outside lower center", ncols=2, title=f"band: 95 % Wilson interval, n = {n:,} per point")
    return {"overwrite": figure}


def _keys(condition: str) -> tuple[str, str, str]:
    return (f"exact_match/{condition}", f"low/{condition}", f"high/{condition}")
