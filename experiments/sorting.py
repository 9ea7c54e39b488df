"""Sorting: does a memory hold how often each symbol of a long sequence occurred?

The documents are those of `memlm.data.tasks.sorting`, where the definition and its source are: a sequence of symbols
over many segments, then, in a fresh context, the question; the answer names all symbols, most frequent first. No single
token has to be recalled, but a statistic of all of them.

Three numbers say how well: `accuracy`, the share of places at which the likeliest symbol is the right one, given the
right ones before it (as in the literature); `exact`, the share of documents in which all places are right; and `tau`,
Kendall's rank correlation between the true order and the one that the model names by itself, the likeliest symbol that
it has not named yet coming next (1: the same, 0: unrelated).

Given the right ones before it, the last place can hold one symbol only: `chance` is the accuracy of one who guesses
among the symbols not named yet. Without any memory a model can know that tied symbols go by number, and so lie above
it in short sequences. `last_segment` is the accuracy of one who knows the counts of the last segment alone.
Each question is also asked with reads off, of a wiped memory and of the memory of another sequence. A sequence that was
never shown is that same control: nothing but the sequence tells its order.

Places of one answer depend on each other, so intervals are over documents: Student's t for means, Wilson for shares of
documents.

Shapes: B rows, K symbols to sort, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.associative_recall import LABELS as RECALL_LABELS
from memlm.analysis.style import PALETTE, style
from memlm.config import ConfigError
from memlm.data.tasks.sorting import Sequence as Symbols
from memlm.data.tasks.sorting import Sorting as Task
from memlm.evaluation.recall.figures import Points, draw_curves
from memlm.evaluation.recall.reading import device_of, n_row_of
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel
from memlm.statistics import interval, wilson

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

LABELS = {name: RECALL_LABELS[name] for name in ("on", "off", "wiped")} | {"swapped": "another sequence's memory"}
"""The memory as it is, then its controls, and what a figure calls them."""

_STREAM = 2**31  # keeps evaluation documents apart from training documents, whose second number is a phase
_WINDOW = 4  # segments read per call


@dataclass(frozen=True)
class Sorting:
    """Settings.

    Attributes:
        n_token: Symbols of a sequence, rounded up to whole segments. With a list, one measurement each; the longest is
            the headline.
        n_document: Sequences of each length; at least 2, as one is the other's control.
        seed: Of the sequences.
        n_row: Sequences read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_token: int | list[int] = 512
    n_document: int = 128
    seed: int = 0
    n_row: int = 32

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "seed": 0, "n_row": 1})
        if not self.n_tokens or self.n_tokens[0] < 1:
            raise ConfigError(f"sorting.n_token must be a number of symbols or a list of them, got {self.n_token}")

    @property
    def n_tokens(self) -> list[int]:
        """All lengths, ascending."""
        return [self.n_token] if isinstance(self.n_token, int) else sorted(set(self.n_token))


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Sorting,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure how well symbols are sorted, and all controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives the ``task``, which must be a `memlm.data.tasks.sorting.Sorting`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per length, condition, document and place of the answer: ``count`` is how often the right symbol
        occurred, ``tied`` whether another one occurred as often, ``correct`` whether it is the likeliest, ``nll`` its
        loss in nats, ``named`` the true place of the symbol that the model names there by itself, ``last_segment``
        whether the counts of the last segment give the right one. In a ``swapped`` row ``document`` is where the answer
        is from, while the memory is that of the next. For metrics see `summarise`.

    Raises:
        ConfigError: If the model was not built for the task.
    """
    task = getattr(data, "task", None)
    if not isinstance(task, Task):
        raise ConfigError(
            "sorting needs a model that knows the symbols to sort, and this one was trained on other data: "
            "train one with recipe=sorting"
        )
    if len(task.symbols) >= model.segment_len:
        raise ConfigError(
            f"an answer of {len(task.symbols)} symbols must fit into a segment with its question: model.segment_len is "
            f"{model.segment_len}"
        )
    lengths = {n_token: -(-n_token // model.segment_len) * model.segment_len for n_token in cfg.n_tokens}
    rows: list[Row] = []
    done = 0
    with evaluating(model):
        for n_token, length in lengths.items():
            documents = [
                task.draw(np.random.default_rng([cfg.seed, _STREAM, n_token, d]), length) for d in range(cfg.n_document)
            ]
            for numbers in share.groups(cfg.n_document, n_row_of(model, cfg.n_row)):
                state = _read(model, [documents[i].tokens for i in numbers])
                rows += [row | {"n_token": n_token} for row in _question(model, task, state, documents, numbers)]
                done += len(numbers) * length
                if progress is not None:
                    progress(done / (sum(lengths.values()) * cfg.n_document))
    rows = share.join(rows)
    rows.sort(key=lambda row: (row["n_token"], list(LABELS).index(row["condition"]), row["document"], row["place"]))
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n_tokens": cfg.n_tokens,
        "lengths": list(lengths.values()),
        "n_symbol": len(task.symbols),
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": _headline(cfg.n_tokens),
    }
    return Result("sorting", summarise(rows), tuple(rows), metadata)


def _read(model: LanguageModel, texts: Sequence[np.ndarray]) -> Any:
    """The memory of sequences that were read side by side, with no local context."""
    device = device_of(model)
    ids = torch.from_numpy(np.stack(texts)).to(device)
    state = None
    for part in ids.split(_WINDOW * model.segment_len, dim=1):
        state = model.absorb(part, state, donate=True)
    return model.new_context(state, donate=True)


def _question(model: LanguageModel, task: Task, state: Any, documents: Sequence[Symbols], numbers: range) -> list[Row]:
    """Ask for the order of the documents ``numbers``, whose memories are the rows of ``state``; nothing is written."""
    before = [(i - 1) % len(documents) for i in numbers]  # so that no other memory need be at hand
    wiped = model.wipe(state)
    questions = {
        "on": (state, True, numbers),
        "off": (state, False, numbers),
        "wiped": (wiped, True, numbers),
        "swapped": (state, True, before),
    }
    rows: list[Row] = []
    device = device_of(model)
    for condition, (memory, read, asked) in questions.items():
        order = torch.from_numpy(np.stack([documents[i].order for i in asked])).to(device)  # (B, K)
        ids = torch.cat([torch.full_like(order[:, :1], task.question), order[:, :-1]], dim=1)
        logits = model(ids, state=memory, read=read, write=False).logits.float()  # (B, K, V)
        correct = logits.argmax(dim=2) == order
        nll = -logits.log_softmax(dim=2).gather(2, order[..., None])[..., 0]
        named = _name_all(model, task, memory, read, len(asked))
        for i, document in enumerate(asked):
            true = documents[document]
            place_of = {int(symbol): place for place, symbol in enumerate(true.order)}
            known = _by_last_segment(task, true, model.segment_len)
            rows += [
                {
                    "condition": condition,
                    "document": document,
                    "place": k,
                    "count": int(true.counts[k]),
                    "tied": bool((true.counts == true.counts[k]).sum() > 1),
                    "correct": bool(correct[i, k]),
                    "nll": float(nll[i, k]),
                    "named": place_of[int(named[i, k])],
                    "last_segment": known[k],
                }
                for k in range(len(true.order))
            ]
    return rows


def _name_all(model: LanguageModel, task: Task, memory: Any, read: bool, n_row: int) -> torch.Tensor:
    """The order that a model gives by itself, each symbol once, (B, K)."""
    device = device_of(model)
    symbols = torch.from_numpy(task.symbols).to(device)
    ids = torch.full((n_row, 1), task.question, device=device)
    left = torch.ones(n_row, len(symbols), dtype=torch.bool, device=device)
    for _ in range(len(symbols)):
        logits = model(ids, state=memory, read=read, write=False).logits[:, -1, symbols].float()  # (B, K)
        best = logits.masked_fill(~left, -torch.inf).argmax(dim=1, keepdim=True)
        left = left.scatter(1, best, False)
        ids = torch.cat([ids, symbols[best]], dim=1)
    return ids[:, 1:]


def _by_last_segment(task: Task, document: Symbols, segment_len: int) -> list[bool]:
    """Whether each place is right for one who counts in the last segment, given the right ones before."""
    guess = task.sort(document.tokens[-segment_len:])[0].tolist()
    right = []
    for symbol in document.order.tolist():
        right.append(guess[0] == symbol)
        guess.remove(symbol)
    return right


def kendall(places: Sequence[int]) -> float:
    """Kendall's tau between 0, 1, 2, ... and ``places``, a permutation of them."""
    order = np.asarray(places)
    later = order[None, :] > order[:, None]
    above = np.triu(np.ones_like(later), 1)
    return float(2 * (later & above).sum() / above.sum() - 1)


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition ``accuracy/<condition>``, ``accuracy_untied/...`` (at places whose symbol occurred as often
        as no other), ``tau/...`` and ``exact/...``, each
        with its 95 % interval ``<name>_low/...`` and ``<name>_high/...`` over documents; ``nll/<condition>``; and
        ``n/<condition>``, documents. ``accuracy/last_segment`` and ``accuracy/chance`` are what their names say, see
        the head of this file. With several lengths these are for the longest, and ``.../<n_token>`` for each.
    """
    lengths = sorted({row["n_token"] for row in rows})
    metrics: dict[str, float] = {}
    for n_token in lengths:
        found: dict[str, float] = {}
        by_document: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            if row["n_token"] == n_token:
                by_document.setdefault((row["condition"], row["document"]), []).append(row)
        for condition in LABELS:
            parts = [part for (name, _), part in by_document.items() if name == condition]
            if not parts:
                continue
            accuracy = [fmean(row["correct"] for row in part) for part in parts]
            tau = [kendall([row["named"] for row in sorted(part, key=lambda row: row["place"])]) for part in parts]
            untied = [[row["correct"] for row in part if not row["tied"]] for part in parts]
            apart = [fmean(right) for right in untied if right]
            for name, values in {"accuracy": accuracy, "tau": tau, "accuracy_untied": apart}.items():
                found |= _spread(name, condition, values)
            k = sum(value == 1 for value in accuracy)
            low, high = wilson(k, len(parts))
            found |= {
                f"exact/{condition}": k / len(parts),
                f"exact_low/{condition}": low,
                f"exact_high/{condition}": high,
            }
            found |= {
                f"nll/{condition}": fmean(row["nll"] for part in parts for row in part),
                f"n/{condition}": len(parts),
            }
            if condition == "on":
                found |= _spread(
                    "accuracy", "last_segment", [fmean(row["last_segment"] for row in part) for part in parts]
                )
                found["accuracy/chance"] = fmean(1 / (i + 1) for i in range(len(parts[0])))
        if n_token == lengths[-1]:
            metrics = found | metrics
        if len(lengths) > 1:
            metrics |= {f"{name}/{n_token}": value for name, value in found.items()}
    return metrics


def _spread(name: str, condition: str, values: Sequence[float]) -> dict[str, float]:
    """Mean over documents and its interval, as far as the measure goes."""
    if not values:
        return {}
    mean, low, high = interval(values, -1.0 if name == "tau" else 0.0, 1.0)
    return {f"{name}/{condition}": mean, f"{name}_low/{condition}": low, f"{name}_high/{condition}": high}


def _headline(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Accuracy at the longest length with its controls, then Kendall's tau, then the other lengths."""
    last = lengths[-1]
    lines = [(f"accuracy, {label}", "accuracy", f"/{name}", True, name != "on") for name, label in LABELS.items()]
    lines.append(("accuracy of the last segment's counts", "accuracy", "/last_segment", True, True))
    lines.append(("accuracy of a guess among symbols not yet named", "accuracy", "/chance", True, True))
    lines += [(f"Kendall's tau, {label}", "tau", f"/{name}", False, name != "on") for name, label in LABELS.items()]
    lines += [
        (f"accuracy at {n:,} symbols, memory on", "accuracy", f"/on/{n}", True, False) for n in lengths if n != last
    ]
    entries = []
    for label, name, suffix, percent, control in lines:
        exact = suffix == "/chance"
        entries.append(
            {"label": label, "metric": name + suffix, "low": None if exact else f"{name}_low{suffix}",
             "high": None if exact else f"{name}_high{suffix}",
             "n": None if suffix in ("/chance", "/last_segment") else f"n{suffix}",
             "percent": percent, "better": "higher", "control": control}
        )  # fmt: skip
    return entries


def plot(result: Result) -> dict[str, Figure]:
    """Accuracy by place of the answer at the longest length; with several lengths also accuracy by length."""
    lengths = sorted({row["n_token"] for row in result.rows})
    if not lengths:
        return {}
    rows = [row for row in result.rows if row["n_token"] == lengths[-1]]
    n_place = 1 + max(row["place"] for row in rows)
    by_place: dict[str, Points] = {name: [] for name in LABELS}
    known: list[float] = []
    for place in range(n_place):
        for name, points in by_place.items():
            part = [row for row in rows if (row["condition"], row["place"]) == (name, place)]
            if part:
                k = sum(row["correct"] for row in part)
                points.append((place + 1, k / len(part), *wilson(k, len(part))))
        known.append(fmean(row["last_segment"] for row in rows if (row["condition"], row["place"]) == ("on", place)))
    figures = {}
    with style():
        figure = Figure(figsize=(7.0, 4.8))
        axes = figure.subplots()
        draw_curves(axes, by_place, LABELS)
        x = range(1, n_place + 1)
        axes.plot(x, known, color=PALETTE["sky"], linewidth=1.6, linestyle="-.", label="counts of the last segment")
        guess = [1 / (n_place - place) for place in range(n_place)]
        axes.plot(
            x, guess, color=PALETTE["black"], linewidth=1.2, linestyle=":", label="a guess among symbols not yet named"
        )
        axes.set(title=f"Sorting {lengths[-1]:,} symbols by frequency", ylabel="right, given the ones before")
        axes.set(xlabel="place in the answer (1: the most frequent symbol)", xticks=[1, *range(5, n_place + 1, 5)])
        n = int(result.metrics["n/on"])
        figure.legend(loc="outside lower center", ncols=2, title=f"bars: 95 % Wilson interval, n = {n:,} documents")
        figures["accuracy_by_place"] = figure
        if len(lengths) > 1:
            figures["accuracy_by_length"] = _by_length(result.metrics, lengths)
    return figures


def _by_length(metrics: Mapping[str, float], lengths: Sequence[int]) -> Figure:
    points: dict[str, Points] = {
        name: [
            (
                n,
                metrics[f"accuracy/{name}/{n}"],
                metrics[f"accuracy_low/{name}/{n}"],
                metrics[f"accuracy_high/{name}/{n}"],
            )
            for n in lengths
            if f"accuracy/{name}/{n}" in metrics
        ]
        for name in LABELS
    }
    figure = Figure(figsize=(7.0, 4.8))
    axes = figure.subplots()
    draw_curves(axes, points, LABELS)
    axes.plot(
        lengths, [metrics[f"accuracy/last_segment/{n}"] for n in lengths], color=PALETTE["sky"], linewidth=1.6,
        linestyle="-.", label="counts of the last segment",
    )  # fmt: skip
    axes.axhline(
        metrics["accuracy/chance"], color=PALETTE["black"], linewidth=1.2, linestyle=":",
        label="a guess among symbols not yet named",
    )  # fmt: skip
    axes.set(
        title="Sorting symbols by frequency", ylabel="right, given the ones before", xlabel="symbols of a sequence"
    )
    if lengths[0] * 8 <= lengths[-1]:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    figure.legend(loc="outside lower center", ncols=2, title="bars: 95 % interval over documents")
    return figure
