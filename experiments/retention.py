"""Retention: recall of facts against the number of unrelated writes since they were told.

A memory writes at the end of each segment. A document tells facts in held-out text; then segments follow that have
nothing to do with them, of text alone or of text that tells other facts, which a memory has reason to keep. After each
number of such segments the facts are asked for: see `memlm.evaluation.recall.asking`, also for the controls. All
documents of a measurement tell their last fact in the same segment, from whose end writes are counted; a fact told
before it is older by as many segments.

The half-life is the number of writes after which recall is half of what it was after none, read off the straight lines
between the measured points with log(1 + writes) as the axis. Where recall never falls so far it is infinite, which
means: more than the most writes. It is NaN where recall after no write does not lie above every control (95 % Wilson
intervals apart), as then there is nothing to forget. Its interval is a bootstrap over documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from memlm.analysis.style import PALETTE, style
from memlm.config import ConfigError
from memlm.data.haystack import Haystack
from memlm.data.tasks.makers import Fact
from memlm.evaluation.headline import recall_entries
from memlm.evaluation.recall.asking import ask
from memlm.evaluation.recall.figures import draw_rates
from memlm.evaluation.recall.haystack import Document, tell
from memlm.evaluation.recall.rates import CONDITIONS, above_controls, tabulate
from memlm.evaluation.recall.reading import is_shared, part_of, visit
from memlm.evaluation.recall.settings import Telling
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

FILLERS = {"text": "text", "facts": "text that tells other facts"}
"""What is written after the facts, and how it is called."""

_N_RESAMPLE = 1000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Retention(Telling):
    """Settings, beside those of `Telling`.

    Attributes:
        n_fact: Facts told and asked for per document, and as many that are told in none.
        n_write: Segments that follow the facts, ascending; the first is 0, as the half-life is counted from there.
        filler: What these segments are: ``text``, or ``facts``, in which other facts are told as densely; a list: the
            same documents go on with each.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_fact: int = 16
    n_write: list[int] = field(default_factory=lambda: [0, 8, 32, 128, 512])
    filler: str | list[str] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"n_fact": 1})
        n_write = list(self.n_write)
        if len(n_write) < 2 or n_write[0] != 0 or sorted(set(n_write)) != n_write:
            raise ConfigError(f"retention.n_write must be two or more numbers from 0 in ascending order, got {n_write}")
        if not self.fillers or any(filler not in FILLERS for filler in self.fillers):
            raise ConfigError(f"retention.filler must be one or several of {', '.join(FILLERS)}, got {self.filler}")

    @property
    def fillers(self) -> list[str]:
        """All fillers."""
        return [self.filler] if isinstance(self.filler, str) else list(self.filler)


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Retention,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure recall against the number of writes.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and the ``maker`` of facts, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per question, by filler, number of writes, condition, document and fact: ``n_write`` is the setting,
        ``writes`` are the segments that ended after the fact's own; for the rest see
        `memlm.evaluation.recall.asking.ask`. For metrics see `summarise`.
    """
    rows: list[Row] = []
    n_haystack = 0
    with evaluating(model):
        for k, filler in enumerate(cfg.fillers):
            documents, unseen, lengths = draw(data, cfg, model.segment_len, filler)
            show = part_of(progress, k, 1, len(cfg.fillers))
            for numbers, i, state in visit(model, documents, lengths, cfg.n_row, show, share):
                for row in ask(model, state, documents, unseen, numbers, lengths[i]):
                    since = {"writes": None if row["since"] is None else row["since"] // model.segment_len}
                    rows.append({"filler": filler, "n_write": cfg.n_write[i]} | row | since)
            told = min(document.n_head - document.taken for document in documents)
            n_haystack = max(n_haystack, lengths[-1] - told)
    rows = share.join(rows)
    rows.sort(key=lambda row: (cfg.fillers.index(row["filler"]), row["n_write"], CONDITIONS.index(row["condition"]),
                               row["document"], row["fact"]))  # fmt: skip
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document * cfg.n_fact,  # questions per filler and number of writes
        "segment_len": model.segment_len,
        "haystack_repetition": n_haystack / len(data.tokens(cfg.split).tokens),  # above 1 a document repeats its text
        "memories": list(model.memory.keys()),
        "shared": is_shared(model),
        "headline": _headline(cfg),
    }
    return Result("retention", summarise(rows), tuple(rows), metadata)


def draw(
    data: TextData, cfg: Retention, segment_len: int, filler: str
) -> tuple[list[Document], list[list[Fact]], list[int]]:
    """The documents, facts that are told in none, and the tokens of a document after each number of writes.

    All names differ. What is told first is the same with every filler.
    """
    n = cfg.n_document * cfg.n_fact
    n_other = math.ceil(cfg.n_write[-1] * cfg.facts_per_segment) if filler == "facts" else 0
    facts = data.maker.draw(np.random.default_rng([cfg.seed, 0]), 2 * n + cfg.n_document * n_other, "evaluation")
    shares = [facts[i : i + cfg.n_fact] for i in range(0, 2 * n, cfg.n_fact)]
    text = data.tokens(cfg.split).tokens
    gap = segment_len / cfg.facts_per_segment - sum(len(fact.tokens) for fact in facts) / len(facts)

    def document(i: int, lead: int = 0) -> Document:
        others = facts[2 * n + i * n_other : 2 * n + (i + 1) * n_other]
        rng, haystack = np.random.default_rng([cfg.seed, 1 + i]), Haystack(text, [cfg.seed, i])
        return tell(rng, shares[i], others, haystack, segment_len, gap, mixed=False, lead=lead)

    numbers = range(cfg.n_document)
    needed = [-(-document(i).end(cfg.n_fact - 1) // segment_len) for i in numbers]  # segments to tell the facts in
    most = max(needed)
    documents = [document(i, (most - needed[i]) * segment_len) for i in numbers]
    return documents, shares[cfg.n_document :], [(most + n_write) * segment_len for n_write in cfg.n_write]


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        Those of `memlm.evaluation.recall.rates.rates` for each number of writes, ``.../<n_write>``, without a number
        those of the most; ``half_life`` in writes with ``half_life_low`` and ``half_life_high``, a 95 % interval over
        documents; ``half_life_censored``, 1 where recall never falls to half, so that the half-life is more than
        ``most_writes``, else 0 (NaN where there is none); and ``n_document``. All of the first filler; with several,
        those of each too: ``.../<filler>``, before the number of writes.
    """
    metrics = tabulate(rows, {"filler": itemgetter(0), "n_write": max})
    fillers = list(dict.fromkeys(row["filler"] for row in rows))
    for filler in fillers:
        suffix = f"/{filler}" if len(fillers) > 1 else ""
        own = _half_life([row for row in rows if row["filler"] == filler])
        if filler == fillers[0]:
            metrics |= own
        metrics |= {f"{name}{suffix}": value for name, value in own.items()}
    return metrics


def _half_life(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics about the half-life from rows of one filler."""
    told = [row for row in rows if row["condition"] == "on"]
    writes, documents = (sorted({row[key] for row in told}) for key in ("n_write", "document"))
    if not told or not above_controls(tabulate([row for row in rows if row["n_write"] == writes[0]], {})):
        value = low = high = math.nan
    else:
        recalled, n = np.zeros((2, len(documents), len(writes)))
        for row in told:
            place = documents.index(row["document"]), writes.index(row["n_write"])
            recalled[place] += row["correct"]
            n[place] += 1
        value = half_life(writes, recalled.sum(0) / n.sum(0))
        rng = np.random.default_rng(0)
        chosen = rng.integers(len(documents), size=(_N_RESAMPLE, len(documents)))
        found = [half_life(writes, recalled[index].sum(0) / n[index].sum(0)) for index in chosen]
        known = [each for each in found if not math.isnan(each)]
        # No interpolation: between a number and infinity there is none.
        low, high = np.quantile(known, [0.025, 0.975], method="inverted_cdf")
    return {
        "half_life": value,
        "half_life_low": low,
        "half_life_high": high,
        "half_life_censored": math.nan if math.isnan(value) else float(math.isinf(value)),
        "most_writes": max(writes, default=0),
        "n_document": len(documents),
    }


def half_life(writes: Sequence[int], recall: Sequence[float]) -> float:
    """Writes after which recall first is half of what it was after the first number of them.

    Args:
        writes: Numbers of writes, ascending.
        recall: Recall after each.

    Returns:
        The half-life, by straight lines over log(1 + writes); infinity if recall never falls to half; NaN if nothing
        was recalled at first.
    """
    half = recall[0] / 2
    if not half > 0:
        return math.nan
    for i in range(1, len(writes)):
        if recall[i] <= half:
            before, after = math.log1p(writes[i - 1]), math.log1p(writes[i])
            share = (recall[i - 1] - half) / (recall[i - 1] - recall[i])
            return math.expm1(before + share * (after - before))
    return math.inf


def _headline(cfg: Retention) -> list[dict[str, Any]]:
    """What the terminal's table and comparisons of runs show."""
    last, lines = cfg.n_write[-1], []
    for filler in cfg.fillers:
        suffix = f"/{filler}" if len(cfg.fillers) > 1 else ""
        lines += [
            {
                "label": f"half-life in writes of {FILLERS[filler]} (inf: over {last})",
                "metric": f"half_life{suffix}",
                "low": f"half_life_low{suffix}",
                "high": f"half_life_high{suffix}",
                "n": f"n_document{suffix}",
                "percent": False,
                "better": "higher",
                "control": False,
            },
            recall_entries("after no write, memory on", f"{suffix}/0")[0],
            *recall_entries(f"after {last} writes, memory on", f"{suffix}/{last}"),
        ]
    return lines


def plot(result: Result) -> dict[str, Figure]:
    """For each filler recall and what is stored against the number of writes, beside the controls."""
    figures = {}
    fillers = list(dict.fromkeys(row["filler"] for row in result.rows))
    for filler in fillers:
        end = f"_{filler}" if len(fillers) > 1 else ""
        figures[f"retention{end}"] = _curve([row for row in result.rows if row["filler"] == filler], filler)
    return figures


def _curve(rows: Sequence[Row], filler: str) -> Figure:
    metrics = summarise(rows)
    writes = sorted({row["n_write"] for row in rows})
    value, low, high = (metrics[name] for name in ("half_life", "half_life_low", "half_life_high"))
    with style():
        figure = Figure(figsize=(7.0, 4.8))
        axes = figure.subplots()
        axes.set_xscale("function", functions=(np.log1p, np.expm1))  # the axis of the half-life, with a place for 0
        band = draw_rates(axes, metrics, writes)
        stored = [metrics.get(f"stored/{n}", math.nan) for n in writes]
        if not all(map(math.isnan, stored)):
            axes.plot(writes, stored, color=PALETTE["sky"], marker="D", markersize=8, markerfacecolor="none",
                      linewidth=1.4, clip_on=False, zorder=4, label="facts whose slots are still held")  # fmt: skip
        life = "nothing recalled at first" if math.isnan(value) else f"half-life {_in_words(value, writes[-1])} writes"
        if math.isfinite(value):
            half, end = metrics["exact_match/on/0"] / 2, min(high, writes[-1])
            label = f"half-life {value:,.0f} (95 %: {low:,.0f} to {_in_words(high, writes[-1])})"
            black: dict[str, Any] = {"color": PALETTE["black"], "zorder": 6}
            axes.plot([low, end], [half, half], linewidth=5, alpha=0.35, **black)
            axes.plot([value, value], [0, half], linewidth=1.4, linestyle="--", **black)
            axes.plot(value, half, marker="*", markersize=14, linestyle="none", label=label, **black)
        axes.set(
            title=f"Recall after {FILLERS[filler]}: {life}", xlabel="writes (segments) since the last fact was told"
        )
        figure.legend(loc="outside lower center", ncols=2, title=band)
    return figure


def _in_words(value: float, most: int) -> str:
    """A half-life in words."""
    return f"over {most:,}" if math.isinf(value) else f"{value:,.0f}"
