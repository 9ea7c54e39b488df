"""Context influence: how much memory changes the prediction of each token, and whether for the better.

Of every token of held-out text, and of every token of an answer about a fact that was told, the model predicts the
distribution with memory on and in three other ways: with reads off, with a wiped memory, and with another document's
memory. Two numbers compare on with each of them: by how many nats memory changes the loss of the token (below 0 it
helps), and the Kullback-Leibler divergence KL(on || other), which says how far the prediction moves at all. Means are
over tokens, intervals over documents, as tokens of a document share its memory.

Text is read segment by segment. Off and wiped are so for the whole of it; the swapped memory is, before each segment,
what another document has written so far. Questions are asked as in `experiments.needle`, in a fresh context each.
Nothing is read in the first segment of a document, where a bank of its own is empty. A model whose empty memory
contributes nothing agrees with itself off and wiped by construction; without any memory all numbers are exactly 0. An
untrained model of the same configuration says what moves without learning.

Shapes: B documents, T tokens per segment, N tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from experiments import streams
from experiments.base import PALETTE, Result, Row, check_settings, evaluating, style
from experiments.needle import Needle, draw
from experiments.perplexity import ratio_interval
from experiments.recall import Document, question
from memlm.analysis.figures import CONTROLS
from memlm.build import untrained
from memlm.config import ConfigError
from memlm.data.stream import TextStream, ValidationBatches

OTHERS = ("off", "wiped", "swapped")
"""What memory on is compared with; see `memlm.analysis.figures.CONTROLS`."""
MODELS = ("trained", "untrained")
EDGES = (-3.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Edges of the bins in which changes of the loss are counted, in nats."""

_WINDOW = 4  # segments of a document read per call before its questions
_LEAST = 4  # documents that a place in the figure needs: fewer say little about others
_CHUNK = 256  # tokens whose distributions exist at a time
_COLORS = dict(zip(OTHERS, ("vermillion", "purple", "orange"), strict=True))


@dataclass(frozen=True)
class ContextInfluence:
    """Settings.

    Attributes:
        split: Which text: ``val``, or ``test`` for final numbers.
        limit: Tokens of text, at least, unless it is shorter; None for all of it.
        n_row: Streams read side by side; at least 2, as one has the memory that is swapped for the other's.
        n_document: Documents with facts; at least 2.
        n_fact: Facts told and asked for per document; 0 for no questions.
        distance: Fewest tokens between the end of any fact and the questions.
        seed: Of facts, gaps and passages.

    Raises:
        ConfigError: If a setting cannot work.
    """

    split: Literal["val", "test"] = "val"
    limit: int | None = 12_000
    n_row: int = 8
    n_document: int = 8
    n_fact: int = 16
    distance: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, {"n_row": 2, "n_document": 2, "n_fact": 0, "distance": 0, "seed": 0})
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"context_influence.limit must be at least 1 or null, got {self.limit}")


def run(model: Any, data: Any, cfg: ContextInfluence, progress: Callable[[float], None] | None = None) -> Result:
    """Compare the predictions with memory on with those of its controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)``, a ``tokenizer`` and, for questions, the ``maker`` of facts, such as
            `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.

    Returns:
        Rows of three kinds, for each model and condition. ``text``: one per segment, with its document (by stream and
        number within it), ``position`` in the document, tokens, mean ``nll`` (memory on), ``delta_nll`` (on -
        condition) and ``kl``.
        ``answer``: one per fact, with its document and ``since`` (tokens since it was told). ``distribution``: number
        of tokens of text whose loss changes by ``low`` to ``high`` nats. For metrics see `summarise`.
    """
    batches = ValidationBatches(data.tokens(cfg.split), model.segment_len, data.tokenizer.pad_id, cfg.n_row)
    stream, n_row = batches.stream, max(batches.n_row, 2)
    if stream.n_segment < 2:
        raise ConfigError(f"the {cfg.split} text is one segment long, but one memory needs another to compare with: "
                          "use more text, or a smaller model.segment_len")  # fmt: skip
    facts = Needle(
        n_document=cfg.n_document, n_fact=max(cfg.n_fact, 1), distance=cfg.distance, split=cfg.split, seed=cfg.seed
    )
    documents, _, lengths = draw(data, facts, model.segment_len) if cfg.n_fact else ([], [], [0])
    rows: list[Row] = []
    for i, (name, measured) in enumerate(zip(MODELS, (model, untrained(model)), strict=True)):

        def share(done: float, i: int = i) -> None:
            if progress is not None:
                progress((i + done) / len(MODELS))

        with evaluating(measured):
            found = _text(measured, stream, n_row, cfg.limit, lambda done: share(0.8 * done))
            if documents:
                found += _answers(measured, documents, lengths[0])
            share(1.0)
        rows += [{"model": name, **row} for row in found]
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "off_equals_wiped": _changes(rows, "off") == _changes(rows, "wiped"),
    }
    metrics = summarise(rows)
    return Result("context_influence", metrics, tuple(rows), metadata | {"headline": _headline(metrics)})


def _text(
    model: Any, stream: TextStream, n_row: int, limit: int | None, progress: Callable[[float], None]
) -> list[Row]:
    """Rows of plain text, which streams through the model segment by segment in ``n_row`` streams."""
    states = {name: streams.start(model, n_row) for name in ("on", *OTHERS)}
    states["wiped"] = [model.wipe(state) for state in states["wiped"]]  # nothing is written to it later
    document, position = [-1] * n_row, [0] * n_row
    counts = {name: np.zeros(len(EDGES) + 1, dtype=int) for name in OTHERS}
    rows: list[Row] = []
    n_token, n_segment = 0, stream.n_segment // n_row
    for s in range(n_segment):
        parts = zip(*(stream.window(row, n_row, s, 1) for row in range(n_row)), strict=True)
        ids, targets, weight, mask, reset = (torch.from_numpy(np.stack(part)) for part in parts)  # (B, 1, T), (B, 1)
        counted = weight[:, 0] > 0
        states["swapped"] = streams.swap(model, states["swapped"], states["on"], n_row)
        plain = not reset.any() and mask.all()
        where = {} if plain else {"reset": reset, "mask": mask.flatten(1)}
        found = {}
        for name, state in states.items():
            out = streams.go_on(model, ids.flatten(1), state, read=name != "off", write=name == "on", **where)
            states[name], found[name] = [part.state for part in out], streams.hidden(out)
        nll, delta, kl = _influence(model, found, targets.flatten(1))
        for i in range(n_row):
            new = bool(reset[i, 0])
            document[i], position[i] = document[i] + new, 0 if new else position[i] + model.segment_len
        for name in OTHERS:
            counts[name] += np.bincount(np.digitize(delta[name][counted], EDGES), minlength=len(EDGES) + 1)
            rows += [
                {
                    "kind": "text", "condition": name, "stream": i, "document": document[i], "position": position[i],
                    **_means_of(nll[i], delta[name][i], kl[name][i], counted[i]),
                }
                for i in range(n_row)
                if counted[i].any()
            ]  # fmt: skip
        n_token += int(counted.sum())
        done = (s + 1) / n_segment if limit is None else max(n_token / limit, (s + 1) / n_segment)
        progress(min(done, 1.0))
        if limit is not None and n_token >= limit:
            break
    edges = [None, *EDGES, None]
    return rows + [
        {"kind": "distribution", "condition": name, "low": edges[k], "high": edges[k + 1], "n_token": int(count)}
        for name in OTHERS
        for k, count in enumerate(counts[name])
    ]


def _answers(model: Any, documents: Sequence[Document], length: int) -> list[Row]:
    """Rows of the answers to questions about every fact of the documents, after ``length`` tokens."""
    segment_len, n = model.segment_len, len(documents)
    states = streams.start(model, n)
    for begin in range(0, length, _WINDOW * segment_len):
        end = min(begin + _WINDOW * segment_len, length)
        ids = torch.from_numpy(np.stack([document.tokens(begin, end) for document in documents])).long()
        states = [out.state for out in streams.go_on(model, ids, states)]
    states = [model.new_context(state) for state in states]
    of = {"on": states, "off": states, "wiped": [model.wipe(state) for state in states]}
    of["swapped"] = streams.swap(model, states, states, n)
    rows = []
    for fact in range(len(documents[0].facts)):
        ids, asked = question([document.facts[fact] for document in documents])
        found = {
            name: streams.hidden(streams.go_on(model, ids, state, read=name != "off", write=False))[:, :-1]
            for name, state in of.items()
        }
        nll, delta, kl = _influence(model, found, ids[:, 1:])
        rows += [
            {
                "kind": "answer", "condition": name, "document": i, "fact": fact,
                "since": length - document.end(fact), **_means_of(nll[i], delta[name][i], kl[name][i], asked[i]),
            }
            for name in OTHERS
            for i, document in enumerate(documents)
        ]  # fmt: skip
    return rows


def _means_of(nll: Tensor, delta: Tensor, kl: Tensor, counted: Tensor) -> Row:
    """Columns of a row: the number of tokens that count, (N,), and their means."""
    means = {"nll": nll, "delta_nll": delta, "kl": kl}
    return {"n_token": int(counted.sum()), **{name: float(part[counted].mean()) for name, part in means.items()}}


def _influence(
    model: Any, hidden: dict[str, Tensor], targets: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss of each token, its change and the divergence of its prediction.

    Args:
        model: A language model.
        hidden: Last hidden states by condition, ``on`` and others, (B, N, D).
        targets: The token after each, (B, N).

    Returns:
        In nats, (B, N), on the CPU: ``nll(on)``; by other condition, ``nll(on) - nll(other)`` and ``KL(on || other)``.
    """
    others = [name for name in hidden if name != "on"]
    delta: dict[str, list[Tensor]] = {name: [] for name in others}
    kl: dict[str, list[Tensor]] = {name: [] for name in others}
    nll = []
    flat = {name: part.flatten(0, 1) for name, part in hidden.items()}
    for start in range(0, targets.numel(), _CHUNK):
        cells = slice(start, start + _CHUNK)
        target = targets.flatten()[cells, None].to(flat["on"].device)
        on = model.head(flat["on"][cells]).float().log_softmax(dim=-1)  # (N, V)
        nll.append(-on.gather(1, target)[:, 0])
        for name in others:
            gain = on - model.head(flat[name][cells]).float().log_softmax(dim=-1)
            delta[name].append(-gain.gather(1, target)[:, 0])
            kl[name].append((on.exp() * gain).sum(dim=-1))

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).view(targets.shape).cpu()

    return (
        join(nll),
        {name: join(part) for name, part in delta.items()},
        {name: join(part) for name, part in kl.items()},
    )


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        ``delta_nll/<kind>/<condition>`` and ``kl/<kind>/<condition>``, means over tokens in nats, for the kinds
        ``text`` and ``answer``; ``low/...`` and ``high/...`` of each, a 95 % interval over documents (NaN with one
        document); ``nll/<kind>``, that with memory on. Those of the untrained model end with ``/untrained``. And
        ``n_token/<kind>`` and ``n_document/<kind>``.
    """
    metrics: dict[str, float] = {}
    for model in MODELS:
        for kind in ("text", "answer"):
            for condition in OTHERS:
                part = [r for r in rows if (r["model"], r["kind"], r["condition"]) == (model, kind, condition)]
                if not part:
                    continue
                for name in ("delta_nll", "kl"):
                    key = f"{name}/{kind}/{condition}" + ("" if model == "trained" else f"/{model}")
                    mean, half, n_document = _over_documents(part, name)
                    metrics |= {key: mean, f"low/{key}": mean - half, f"high/{key}": mean + half}
                key = f"nll/{kind}" + ("" if model == "trained" else f"/{model}")
                metrics[key] = _over_documents(part, "nll")[0]
                metrics[f"n_document/{kind}"] = n_document
                metrics[f"n_token/{kind}"] = sum(row["n_token"] for row in part)
    return metrics


def _changes(rows: Sequence[Row], condition: str) -> list[float]:
    return [row["delta_nll"] for row in rows if row["condition"] == condition and row["kind"] != "distribution"]


def _over_documents(rows: Sequence[Row], name: str) -> tuple[float, float, int]:
    """Mean over tokens, half the width of its 95 % interval over documents, and their number."""
    sums: dict[tuple[Any, Any], tuple[int, float]] = {}
    for row in rows:
        key = (row.get("stream"), row["document"])
        n, total = sums.get(key, (0, 0.0))
        sums[key] = (n + row["n_token"], total + row["n_token"] * row[name])
    counts = [n for n, _ in sums.values()]
    return *ratio_interval(counts, [total / n for n, total in sums.values()]), len(counts)


def _headline(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """What the terminal and a comparison show first."""
    kinds = {"answer": "answers", "text": "text"}
    lines = {
        f"{label}, on - {CONTROLS[condition]}{', untrained' if suffix else ''}": (kind, f"{condition}{suffix}")
        for suffix in ("", "/untrained")
        for kind, label in kinds.items()
        for condition in ("off", "swapped")
    }
    return [
        {
            "label": label, "metric": metric, "low": f"low/{metric}", "high": f"high/{metric}",
            "n": f"n_document/{kind}", "percent": False, "better": "lower", "control": metric.endswith("untrained"),
        }
        for label, (kind, condition) in lines.items()
        if (metric := f"delta_nll/{kind}/{condition}") in metrics
    ]  # fmt: skip


def plot(result: Result) -> dict[str, Figure]:
    """Influence over the place in the document, its distribution over tokens, and its means."""
    if not any(row["kind"] == "text" for row in result.rows):
        return {}
    with style():
        figure = Figure(figsize=(11.5, 8.2))
        (left, right), (spread, means) = figure.subplots(2, 2)
        for axes, name, title in (
            (left, "delta_nll", "Change of the loss by memory"),
            (right, "kl", "How far the prediction moves"),
        ):
            _over_positions(axes, result.rows, name)
            axes.set(title=title, xlabel="tokens since the document began")
            if name == "kl":
                axes.set_ylim(bottom=0)
            texts = {"delta_nll": "NLL(on) − NLL(other), nats\n(below 0: memory helps)", "kl": "KL(on || other), nats"}  # noqa: RUF001
            axes.set_ylabel(texts[name])
        _distribution(spread, result.rows)
        _means(means, result.metrics)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, title="memory on, compared with")
    return {"context_influence": figure}


def _over_positions(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """One line per condition over the place in the document, with its band, as far as several documents go."""
    text = [row for row in rows if row["kind"] == "text"]
    for model, condition in [("trained", name) for name in OTHERS] + [("untrained", "off")]:
        mine = [row for row in text if row["model"] == model and row["condition"] == condition]
        x, mean, half = [], [], []
        for position in sorted({row["position"] for row in mine}):
            part = [row for row in mine if row["position"] == position]
            if len(part) >= _LEAST:
                middle, width, _ = _over_documents(part, name)
                x.append(position)
                mean.append(middle)
                half.append(width)
        y, h = np.array(mean), np.array(half)
        trained = model == "trained"
        color = PALETTE[_COLORS[condition]] if trained else "#777777"
        axes.fill_between(x, y - h, y + h, color=color, alpha=0.12, linewidth=0)
        axes.plot(
            x, y, color=color, linestyle="-" if trained else "--", linewidth=3.2 if condition == "off" else 1.8,
            marker="o", markersize=3, label=CONTROLS[condition] + ("" if trained else ", untrained model"),
        )  # fmt: skip
    axes.axhline(0, color=PALETTE["black"], linewidth=1, linestyle=":")


def _distribution(axes: Axes, rows: Sequence[Row]) -> None:
    """Share of the tokens of text by the change of their loss."""
    between = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(EDGES)]
    labels = [f"< {EDGES[0]:g}", *between, f"> {EDGES[-1]:g}"]
    mine = [row for row in rows if row["kind"] == "distribution" and row["model"] == "trained"]
    for i, condition in enumerate(("off", "swapped")):
        counts = np.array([row["n_token"] for row in mine if row["condition"] == condition])
        axes.barh(
            np.arange(len(labels)) + 0.4 * i - 0.2, counts / counts.sum(), height=0.38,
            color=PALETTE[_COLORS[condition]], alpha=0.85,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set(title="Tokens of text by change of the loss", ylabel="NLL(on) − NLL(other), nats")  # noqa: RUF001
    axes.set_xlabel("share of tokens")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def _means(axes: Axes, metrics: Mapping[str, float]) -> None:
    """Mean change of the loss with its interval, of answers and of text."""
    ticks: list[str] = []
    for kind, label in (("answer", "answers"), ("text", "text")):
        for condition in OTHERS:
            key = f"delta_nll/{kind}/{condition}"
            if key not in metrics:
                continue
            for suffix, shift in (("", -0.14), ("/untrained", 0.14)):
                mean, low = metrics[key + suffix], metrics[f"low/{key}{suffix}"]
                axes.errorbar(
                    mean, len(ticks) + shift, xerr=None if math.isnan(low) else mean - low, capsize=4,
                    marker="s" if suffix else "o", color="#777777" if suffix else PALETTE[_COLORS[condition]],
                )  # fmt: skip
            n = int(metrics[f"n_document/{kind}"])
            ticks.append(f"{label} ({n} documents)\n{CONTROLS[condition]}")
    axes.set_yticks(range(len(ticks)), ticks, fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color=PALETTE["black"], linewidth=1, linestyle=":")
    axes.set_title("Means (squares: untrained model)")
    axes.set_xlabel("NLL(on) − NLL(other), nats (95 % interval)")  # noqa: RUF001
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
