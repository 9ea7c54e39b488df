"""Needle: facts told once in held-out text and asked for after a long stretch of more text.

Facts are told between passages of text that the model was not trained on: by default near the beginning, followed by
text until every fact lies at least `distance` tokens back; with `spread` all over a haystack of that length. For how
they are asked for, and the controls, see `memlm.evaluation.recall.asking`.

Kinds of facts, by what could give a needle away without memory:

- ``random``: names and values of words drawn evenly from the frequent words of the training text.
- ``native``: names and values of words drawn from the haystack itself, as often as they occur there.
- ``natural``: English sentences; the cue is all before the value.
- ``paraphrased``: the same sentences, asked for in other words than they were told in.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from memlm.analysis.style import PALETTE, style
from memlm.config import ConfigError
from memlm.data.haystack import Haystack
from memlm.data.tasks.makers import Fact, FactMaker, SentenceMaker
from memlm.data.tokens import TokenizedCorpus
from memlm.evaluation.headline import recall_entries, repetition_entries
from memlm.evaluation.recall.asking import ask
from memlm.evaluation.recall.figures import COLORS, draw_rates
from memlm.evaluation.recall.haystack import Document, tell
from memlm.evaluation.recall.rates import CONDITIONS, LABELS, tabulate
from memlm.evaluation.recall.reading import Consolidation, is_shared, part_of, visit
from memlm.evaluation.recall.settings import Telling
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

_AXES: dict[str, Callable[[list[Any]], Any]] = {"kind": itemgetter(0), "n_other": min, "distance": max}
# What a list of settings varies, and whose rates are the main ones.
_ORDER = list(LABELS)  # of conditions


@dataclass(frozen=True, kw_only=True)
class Needle(Telling):
    """Settings, beside those of `Telling`.

    Attributes:
        n_fact: Facts asked for per document, and as many that are told in none.
        distance: Fewest tokens between the end of any fact and the questions. With a list the same documents go on
            and questions are asked at each length.
        spread: Facts are told all over the document, which is as long as ``distance``, or what the facts need; with a
            list there are other documents for each length.
        n_other: Further facts told per document, for which nobody asks; a list: other documents for each number.
        kind: ``random``, ``native``, ``natural`` or ``paraphrased``; a list: other documents for each.
        consolidate_every: Segments of a document after which similar slots of memories are merged
            (`memlm.memory.contract.Memory.consolidate`); None for never.
        text: A file to take the haystack from, in place of ``split``: `.txt`, `.jsonl` or `.parquet`
            (`memlm.data.tokens.tokenize_file`). A document reads it from a place of its own, and nothing twice
            as far as the text goes.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_fact: int = 32
    distance: int | list[int] = 4096
    spread: bool = False
    n_other: int | list[int] = 0
    kind: str | list[str] = "random"
    consolidate_every: int | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"n_fact": 1, "consolidate_every": 1})
        for name in ("distance", "n_other"):
            values = _several(getattr(self, name))
            if not values or min(values) < 0:
                raise ConfigError(f"needle.{name} must be one or several numbers from 0, got {getattr(self, name)}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ConfigError(f"needle.kind must be one or several of {', '.join(KINDS)}, got {self.kind}")

    @property
    def distances(self) -> list[int]:
        """All distances, ascending."""
        return sorted(set(_several(self.distance)))

    @property
    def n_others(self) -> list[int]:
        """All numbers of other facts, ascending."""
        return sorted(set(_several(self.n_other)))

    @property
    def kinds(self) -> list[str]:
        """All kinds, each once, in the order given."""
        return list(dict.fromkeys(_several(self.kind)))


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Needle,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure recall and its controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and the ``maker`` of facts, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per question, by kind, number of other facts, length, condition, document and fact: ``distance`` is the
        setting, ``merged`` (with ``consolidate_every``) how many slots of the document's memory were merged into
        others, for the rest see `memlm.evaluation.recall.asking.ask`. For metrics see `summarise`; ``merged`` is a
        mean.
    """
    plans = _plans(cfg)
    drawn = [draw(data, cfg, model.segment_len, plan) for plan in plans]
    n_token = cfg.n_document * sum(lengths[-1] for _, _, lengths in drawn)
    rows: list[Row] = []
    done = 0
    with evaluating(model):
        for plan, (documents, unseen, lengths) in zip(plans, drawn, strict=True):
            more = cfg.n_document * lengths[-1]
            show = part_of(progress, done, more, n_token)
            others = _strangers(data, cfg, plan, documents)
            consolidation = None if cfg.consolidate_every is None else Consolidation(cfg.consolidate_every)
            for numbers, i, state in visit(model, documents, lengths, cfg.n_row, show, share, consolidation):
                given = {"kind": plan.kind, "n_other": plan.n_other, "distance": plan.distances[i]}
                asked = ask(model, state, documents, unseen, numbers, lengths[i], plan.kind == "paraphrased", others)
                if consolidation:
                    merged = dict(zip(numbers, consolidation.merged.expand(len(numbers)).tolist(), strict=True))
                    for row in asked:
                        row["merged"] = merged[row["document"]] if row["condition"] == "on" else None
                rows += [given | row for row in asked]
            done += more
    rows = share.join(rows)
    rows.sort(key=lambda row: (cfg.kinds.index(row["kind"]), row["n_other"], row["distance"],
                               _ORDER.index(row["condition"]), row["document"], row["fact"]))  # fmt: skip
    n_haystack = max(
        lengths[-1] - min(document.n_head - document.taken for document in documents) for documents, _, lengths in drawn
    )
    repetition = n_haystack / haystack_of(data, cfg).n_token
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document * cfg.n_fact,
        "distances": cfg.distances,
        "lengths": [
            max(
                lengths[i]
                for plan, (*_, lengths) in zip(plans, drawn, strict=True)
                for i, d in enumerate(plan.distances)
                if d == distance
            )
            for distance in cfg.distances
        ],
        "segment_len": model.segment_len,
        "haystack_repetition": repetition,  # above 1 a document repeats its text
        "memories": list(model.memory.keys()),
        "shared": is_shared(model),
        "headline": _headline(cfg) + repetition_entries(repetition),
    }
    metrics = summarise(rows) | {"repetition": repetition}
    if cfg.consolidate_every is not None:
        on = [row for row in rows if row["condition"] == "on" and row["distance"] == cfg.distances[-1]]
        metrics["merged"] = float(np.mean([row["merged"] for row in on]))
    return Result("needle", metrics, tuple(rows), metadata)


def _headline(cfg: Needle) -> list[dict[str, Any]]:
    """Recall of every kind, at the longest distance and among the fewest other facts."""
    if len(cfg.kinds) == 1:
        return recall_entries("memory on", stranger=_is_told_in_sentences(cfg.kinds[0]))
    end = "".join(f"/{values[place]}" for values, place in ((cfg.n_others, 0), (cfg.distances, -1)) if len(values) > 1)
    return [
        entry
        for kind in cfg.kinds
        for entry in recall_entries(f"{kind} facts, memory on", f"/{kind}{end}", _is_told_in_sentences(kind))
    ]


class _Plan(NamedTuple):
    """Documents of one kind: questions are asked of them at one distance after the other."""

    kind: str
    n_other: int
    distances: list[int]


def _plans(cfg: Needle) -> list[_Plan]:
    """All documents that the settings ask for."""
    lengths = [[distance] for distance in cfg.distances] if cfg.spread else [cfg.distances]
    return [_Plan(*plan) for plan in itertools.product(cfg.kinds, cfg.n_others, lengths)]


def draw(
    data: TextData, cfg: Needle, segment_len: int, plan: _Plan | None = None
) -> tuple[list[Document], list[list[Fact]], list[int]]:
    """The documents of a plan (by default the first), facts that are told in none of them, and their lengths.

    Returns:
        The documents; for each document as many facts that nobody is told; for each distance the tokens of a document
        when its questions are asked, whole segments. All names differ.
    """
    plan = plan or _plans(cfg)[0]
    n, per_document = cfg.n_document * cfg.n_fact, cfg.n_fact + plan.n_other
    haystack = haystack_of(data, cfg)
    facts = KINDS[plan.kind](data, haystack).draw(
        np.random.default_rng([cfg.seed, 0]), cfg.n_document * per_document + n, "evaluation"
    )
    told, unseen = facts[:-n], facts[-n:]
    documents = []
    for i in range(cfg.n_document):
        own = told[i * per_document : (i + 1) * per_document]
        taken = sum(len(fact.tokens) for fact in own)
        if cfg.spread:
            gap = (plan.distances[0] - taken) / per_document
        else:
            gap = segment_len / cfg.facts_per_segment - taken / per_document
        documents.append(
            tell(np.random.default_rng([cfg.seed, 1 + i]), own[: cfg.n_fact], own[cfg.n_fact :],
                 Haystack(haystack.tokens, [cfg.seed, i]), segment_len, gap)
        )  # fmt: skip
    longest = max(document.n_head for document in documents)
    ends = [max(longest, d) if cfg.spread else longest + d for d in plan.distances]
    lengths = [-(-end // segment_len) * segment_len for end in ends]
    return documents, [unseen[i * cfg.n_fact : (i + 1) * cfg.n_fact] for i in range(cfg.n_document)], lengths


def _strangers(data: TextData, cfg: Needle, plan: _Plan, documents: Sequence[Document]) -> list[list[Fact]] | None:
    """The asked facts of each document as if of subjects that nobody was told of, where facts have subjects."""
    if not _is_told_in_sentences(plan.kind):
        return None
    maker = KINDS[plan.kind](data, haystack_of(data, cfg))
    assert isinstance(maker, SentenceMaker)
    rng = np.random.default_rng([cfg.seed, 1 + cfg.n_document])
    taken = {fact.name for document in documents for fact in (*document.facts, *document.others)}
    return [[maker.of_another(rng, fact, "evaluation", taken) for fact in document.facts] for document in documents]


def _is_told_in_sentences(kind: str) -> bool:
    return kind in ("natural", "paraphrased")


KINDS: dict[str, Callable[[TextData, TokenizedCorpus], FactMaker]] = {
    "random": lambda data, haystack: data.maker,
    "native": lambda data, haystack: FactMaker(data.tokenizer, data.tokens("train"), native=haystack),
    "natural": lambda data, haystack: SentenceMaker(data.tokenizer, data.tokens("train")),
    "paraphrased": lambda data, haystack: SentenceMaker(data.tokenizer, data.tokens("train")),
}
"""Where facts of each kind come from, given the data and the text of the haystack."""


def haystack_of(data: TextData, cfg: Needle) -> TokenizedCorpus:
    """The text around facts."""
    return data.tokens(cfg.split) if cfg.text is None else data.tokens_of_file(cfg.text)


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        Those of `memlm.evaluation.recall.rates.rates`, for the longest distance, the fewest other facts and the first
        kind. With several distances, numbers of other facts or kinds, those of each combination too: ``.../<kind>``,
        ``.../<n_other>``, ``.../<distance>``, in this order and only for what varies.
    """
    return tabulate(rows, _AXES)


def applies(data: TextData) -> bool:
    """Whether facts are planted in the text that a model is trained on."""
    return data.curriculum.has_task


def logged(result: Result) -> dict[str, float]:
    """The rates by the names under which they are logged while a model is trained: ``recall/<condition>``."""
    rates = {f"recall/{condition}": result.metrics[f"exact_match/{condition}"] for condition in CONDITIONS}
    return rates | {"recall/n": result.metrics["n/on"], "recall/chance": result.metrics["chance"]}


def plot(result: Result) -> dict[str, Figure]:
    """Figures of each kind of facts.

    Recall beside its controls, as bars at one distance and as lines over several; a heat map of length and depth where
    facts are spread; recall against the number of other facts where that varies.
    """
    figures: dict[str, Figure] = {}
    kinds = list(dict.fromkeys(row["kind"] for row in result.rows))
    lengths, spread = result.metadata.get("lengths", []), result.metadata.get("settings", {}).get("spread")
    for kind in kinds:
        rows = [row for row in result.rows if row["kind"] == kind]
        n_others, distances = ([*dict.fromkeys(row[axis] for row in rows)] for axis in ("n_other", "distance"))
        fewest = [row for row in rows if row["n_other"] == n_others[0]]
        metrics = summarise(fewest)
        end = f"_{kind}" if len(kinds) > 1 else ""
        about = f", {kind} facts" if len(kinds) > 1 else ""
        if len(distances) == 1:
            told = f"told all over {lengths[0]:,} tokens" if spread else f"told {distances[0]:,} or more tokens before"
            figures[f"recall{end}"] = _bars(metrics, f"Recall of facts {told}{about}")
        else:
            title, label = f"Recall by distance{about}", "tokens between fact and question, at least"
            if spread:
                title, label = f"Recall by length{about}", "tokens of the text, in which facts are told everywhere"
            figures[f"recall{end}"] = _lines(metrics, distances, title, label)
        if spread:
            figures[f"length_depth{end}"] = _heat_map(fewest, lengths, about)
        if len(n_others) > 1:
            longest = [row for row in rows if row["distance"] == distances[-1]]
            title, label = f"Recall by number of facts{about}", "other facts told in the document"
            figures[f"other_facts{end}"] = _lines(summarise(longest), n_others, title, label)
    return figures


_N_DEPTH = 5  # bands of depth in the heat map


def _heat_map(rows: Sequence[Row], lengths: Sequence[int], about: str) -> Figure:
    """Recall with memory on by length of the text, at most, and depth of the fact; rows are lengths."""
    distances = sorted({row["distance"] for row in rows})
    counts = np.zeros((2, len(distances), _N_DEPTH))
    for row in rows:
        if row["condition"] == "on":
            place = distances.index(row["distance"]), min(int(row["depth"] * _N_DEPTH), _N_DEPTH - 1)
            counts[(0, *place)] += row["correct"]
            counts[(1, *place)] += 1
    with np.errstate(invalid="ignore"):
        share = counts[0] / counts[1]
    with style():
        figure = Figure(figsize=(7.5, 1.9 + 0.55 * len(distances)))
        axes = figure.subplots()
        image = axes.imshow(share, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (y, x), value in np.ndenumerate(share):
            text = "none" if np.isnan(value) else f"{100 * value:.3g} %\nn = {int(counts[1, y, x])}"
            color = "white" if np.isnan(value) or value < 0.6 else "black"
            axes.annotate(text, (x, y), ha="center", va="center", fontsize=9, color=color)
        edges = [f"{100 * i // _N_DEPTH}-{100 * (i + 1) // _N_DEPTH} %" for i in range(_N_DEPTH)]
        axes.set_xticks(range(_N_DEPTH), edges)
        axes.set_yticks(range(len(distances)), [f"{length:,}" for length in lengths])
        axes.set(title=f"Recall by length and depth{about}", ylabel="tokens of text")
        axes.set_xlabel("depth: where the fact was told (0 %: at the beginning)")
        axes.grid(visible=False)
        figure.colorbar(image, label="recalled exactly", format=PercentFormatter(xmax=1, symbol=" %"))
    return figure


def _bars(metrics: Mapping[str, float], title: str) -> Figure:
    names = {"on": LABELS["on"], "_straddling/on": "memory on, facts across\na segment boundary"} | LABELS
    keys = {name: name if "/" in name else f"/{name}" for name in names}
    shown = [name for name in names if f"exact_match{keys[name]}" in metrics]
    with style():
        figure = Figure(figsize=(7.5, 1.6 + 0.5 * len(shown)))
        axes = figure.subplots()
        for y, name in enumerate(shown):
            rate, n = metrics[f"exact_match{keys[name]}"], int(metrics[f"n{keys[name]}"])
            low, high = metrics[f"low{keys[name]}"], metrics[f"high{keys[name]}"]
            color = PALETTE[COLORS.get(name, "blue")]
            axes.barh(y, rate, height=0.6, color=color, alpha=0.85)
            bounds = [[max(rate - low, 0)], [max(high - rate, 0)]]
            axes.errorbar(rate, y, xerr=bounds, color=PALETTE["black"], capsize=4, linewidth=1.4, clip_on=False)
            axes.annotate(
                f"{round(rate * n)} of {n}", (1, y), xycoords=axes.get_yaxis_transform(), xytext=(10, 0),
                textcoords="offset points", va="center", fontsize=10,
            )  # fmt: skip
        if "chance" in metrics:
            label = f"guess among told facts of the kind, {100 * metrics['chance']:.2g} %"
            axes.axvline(metrics["chance"], color=PALETTE["black"], linewidth=1.2, linestyle=":", label=label)
            figure.legend(loc="outside lower right")
        axes.set_yticks(range(len(shown)), [names[name].replace(", subject", ",\nsubject") for name in shown])
        axes.invert_yaxis()
        axes.set(title=textwrap.fill(title, 44), xlim=(0, 1))
        axes.set_xlabel("recalled exactly, with 95 % Wilson interval")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    return figure


def _lines(metrics: Mapping[str, float], distances: Sequence[int], title: str, label_x: str) -> Figure:
    with style():
        figure = Figure(figsize=(7.0, 4.6))
        axes = figure.subplots()
        if distances[0] == 0:
            axes.set_xscale("symlog", linthresh=distances[1])
        elif distances[-1] / distances[0] >= 8:
            axes.set_xscale("log")
        band = draw_rates(axes, metrics, distances)
        axes.set(title=title, xlabel=label_x)
        figure.legend(loc="outside lower center", ncols=2, title=band)
    return figure
