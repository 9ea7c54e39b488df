"""Overwrite: facts told again with new values, asked for the latest after a long stretch of more text.

A document tells facts in held-out text. Some are told once, some are updated: told again, each time with a new value,
between tellings of other facts. Then text follows until the last telling lies at least `distance` tokens back, the
local context is dropped, and each fact is asked for by its name in a fresh context, with nothing written. An answer
counts when greedy decoding gives the whole value that was told last. Where it does not, it is compared with every older
value of the fact: `stale` is the rate at which one of these is given whole.

For how facts are asked for, and the controls, see `memlm.evaluation.recall.asking`. Chance is 1 / (updates + 1), the
rate of one who knows all values that a fact ever had and guesses which is the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.config import ConfigError
from memlm.data.haystack import Haystack
from memlm.data.tasks.makers import Fact
from memlm.data.tasks.overwrite import Overwrite as Task
from memlm.data.tasks.overwrite import retell
from memlm.evaluation.headline import recall_entries
from memlm.evaluation.recall.asking import answer, ask
from memlm.evaluation.recall.figures import draw_interval
from memlm.evaluation.recall.haystack import Document, tell
from memlm.evaluation.recall.rates import CONDITIONS, rates
from memlm.evaluation.recall.reading import visit
from memlm.evaluation.recall.settings import Telling
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel
from memlm.statistics import wilson

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData


@dataclass(frozen=True, kw_only=True)
class Overwrite(Telling):
    """Settings, beside those of `Telling`.

    Attributes:
        n_fact: Facts per document and number of updates.
        updates: How often a fact is updated after it was told.
        distance: Fewest tokens between the last telling and the questions.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_fact: int = 16
    updates: list[int] = field(default_factory=lambda: [0, 1, 2, 5, 10])
    distance: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"n_fact": 1, "distance": 0})
        if not self.updates or min(self.updates) < 0 or sorted(set(self.updates)) != list(self.updates):
            raise ConfigError(f"overwrite.updates must be numbers from 0 in ascending order, got {self.updates}")


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Overwrite,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure how often the latest value is recalled, against the number of updates.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and the ``maker`` of facts, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per condition, document and fact: ``n_update``; ``stale``, with the memory on, how many updates ago the
        value was told that was given instead of the latest (None if none of the fact's); for the rest see
        `memlm.evaluation.recall.asking.ask`, where a fact is its latest telling. For metrics see `summarise`.

    Raises:
        ConfigError: If the model was not trained on facts that change.
    """
    if not isinstance(getattr(data, "task", None), Task):
        raise ConfigError(
            "experiment=overwrite asks for the latest of several values, which this model was not trained for: use "
            "a run whose curriculum has the task memlm.data.tasks.overwrite.Overwrite; train one with recipe=overwrite"
        )
    documents, older, unseen = draw(data, cfg, model.segment_len)
    length = max(document.n_head for document in documents) + cfg.distance
    length += -length % model.segment_len
    rows: list[Row] = []
    with evaluating(model):
        for numbers, _, state in visit(model, documents, [length], cfg.n_row, progress, share):
            asked = ask(model, state, documents, unseen, numbers, length)
            stale = _stale(model, state, numbers, older, asked)
            for row in asked:
                key = (row["document"], row["fact"])
                known = {"stale": stale.get(key) if row["condition"] == "on" else None}
                rows.append({"n_update": cfg.updates[row["fact"] // cfg.n_fact]} | row | known)
    rows = share.join(rows)
    rows.sort(key=lambda row: (CONDITIONS.index(row["condition"]), row["document"], row["fact"]))
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
    return Result("overwrite", summarise(rows), tuple(rows), metadata)


def draw(
    data: TextData, cfg: Overwrite, segment_len: int
) -> tuple[list[Document], list[list[list[Fact]]], list[list[Fact]]]:
    """The documents, whose facts are the latest; for each fact what it was before; and facts that are told in none.

    All names differ. Versions of a fact are told in their order, between those of others.
    """
    n = cfg.n_fact * len(cfg.updates)  # facts of a document
    facts = data.maker.draw(np.random.default_rng([cfg.seed, 0]), 2 * n * cfg.n_document, "evaluation")
    shares = [facts[i : i + n] for i in range(0, len(facts), n)]
    text = data.tokens(cfg.split).tokens
    gap = max(segment_len / cfg.facts_per_segment - len(facts[0].tokens), 0)
    documents, older = [], []
    for i, own in enumerate(shares[: cfg.n_document]):
        rng = np.random.default_rng([cfg.seed, 1 + i])
        versions = [_versions(rng, data.maker, fact, cfg.updates[k // cfg.n_fact]) for k, fact in enumerate(own)]
        order = rng.permutation([k for k, each in enumerate(versions) for _ in each]).tolist()
        left = [iter(each) for each in versions]
        document = tell(rng, [next(left[k]) for k in order], (), Haystack(text, [cfg.seed, i]), segment_len, gap)
        last = [len(order) - 1 - order[::-1].index(k) for k in range(n)]  # telling of the latest
        begins = [document.begins[number] for number in last]
        documents.append(document._replace(facts=[each[-1] for each in versions], begins=begins))
        older.append([each[:-1] for each in versions])
    return documents, older, shares[cfg.n_document :]


def _versions(rng: np.random.Generator, maker: Any, fact: Fact, n_update: int) -> list[Fact]:
    """A fact and its updates; all values differ."""
    versions = {fact.value: fact}
    while len(versions) <= n_update:
        update = retell(rng, maker, fact, "evaluation")
        versions.setdefault(update.value, update)
    return list(versions.values())


def _stale(
    model: LanguageModel,
    state: Any,
    numbers: Sequence[int],
    older: Sequence[Sequence[Sequence[Fact]]],
    rows: Sequence[Row],
) -> dict[tuple[int, int], int]:
    """By document and fact, how many updates ago the value was told that a memory gave instead of the latest."""
    wrong = {(row["document"], row["fact"]) for row in rows if row["condition"] == "on" and not row["correct"]}
    found: dict[tuple[int, int], int] = {}
    for k in sorted({k for _, k in wrong}):
        for ago in range(1, len(older[0][k]) + 1):
            answers = answer(model, state, [older[i][k][-ago] for i in numbers])
            found |= {(i, k): ago for i, (given, _) in zip(numbers, answers, strict=True) if given}
    return {key: ago for key, ago in found.items() if key in wrong}


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each number of updates those of `memlm.evaluation.recall.rates.rates` for the latest value,
        ``.../<updates>``; ``stale/on/<updates>`` with ``stale_low`` and ``stale_high``, the rate of an older value; and
        ``chance/<updates>``. Without a number: those of the most updates.
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
    lines = recall_entries(f"latest value after {most} updates, memory on")
    stale = {"label": f"an older value after {most} updates, memory on", "metric": "stale/on", "better": "lower"}
    chance = {"label": "guess among the values of the fact", "metric": "chance", "low": None, "high": None, "n": None}
    lines.insert(1, lines[0] | stale | {"low": "stale_low/on", "high": "stale_high/on"})
    return [*lines, lines[-1] | chance]


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
            draw_interval(axes, x, low, high, color, band=measured)
            axes.plot(
                x, rate, color=color, marker=marker, markersize=sizes.get(name, 6), clip_on=False, label=label,
                linestyle="-" if measured else "--", linewidth=2.5 if measured else 1.2,
                markerfacecolor=color if measured else "none", zorder=5 if measured else 3,
            )  # fmt: skip
        chance = [metrics[f"chance/{n}"] for n in updates]
        level: dict[str, Any] = {"color": PALETTE["black"], "linestyle": ":", "linewidth": 1.2}
        level["label"] = "guess among the fact's values"
        if len(updates) > 1:
            axes.plot(x, chance, **level)
        else:
            axes.axhline(chance[0], **level)
        axes.set_xticks(x, [str(n) for n in updates])
        axes.set(title="Facts whose value changes", ylim=(0, 1), ylabel="given exactly")
        axes.set_xlabel("updates after the fact was first told")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        n = int(metrics[f"n/on/{updates[0]}"])
        figure.legend(
            loc="outside lower center", ncols=2, title=f"bands, bars: 95 % Wilson intervals, n = {n:,} per point"
        )
    return {"overwrite": figure}


def _keys(condition: str) -> tuple[str, str, str]:
    return (f"exact_match/{condition}", f"low/{condition}", f"high/{condition}")
