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

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from experiments.needle import Needle, draw
from experiments.perplexity import ratio_interval
from memlm.analysis.style import CONTROLS
from memlm.assemble import untrained
from memlm.config import ConfigError
from memlm.data.stream import TextStream, ValidationBatches
from memlm.evaluation.recall import streams
from memlm.evaluation.recall.asking import question
from memlm.evaluation.recall.haystack import Document
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

OTHERS = ("off", "wiped", "swapped")


"""What memory on is compared with; see `memlm.analysis.style.CONTROLS`."""


MODELS = ("trained", "untrained")


EDGES = (-3.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


"""Edges of the bins in which changes of the loss are counted, in nats."""


_WINDOW = 4  # segments of a document read per call before its questions


LEAST = 4  # documents that a place in the figure needs: fewer say little about others


_CHUNK = 256  # tokens whose distributions exist at a time


COLORS = dict(zip(OTHERS, ("vermillion", "purple", "orange"), strict=True))


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


def run(
    model: LanguageModel, data: TextData, cfg: ContextInfluence, progress: Callable[[float], None] | None = None
) -> Result:
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
    model: LanguageModel, stream: TextStream, n_row: int, limit: int | None, progress: Callable[[float], None]
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


def _answers(model: LanguageModel, documents: Sequence[Document], length: int) -> list[Row]:
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
    model: LanguageModel, hidden: dict[str, Tensor], targets: Tensor
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
                    mean, half, n_document = over_documents(part, name)
                    metrics |= {key: mean, f"low/{key}": mean - half, f"high/{key}": mean + half}
                key = f"nll/{kind}" + ("" if model == "trained" else f"/{model}")
                metrics[key] = over_documents(part, "nll")[0]
                metrics[f"n_document/{kind}"] = n_document
                metrics[f"n_token/{kind}"] = sum(row["n_token"] for row in part)
    return metrics


def _changes(rows: Sequence[Row], condition: str) -> list[float]:
    return [row["delta_nll"] for row in rows if row["condition"] == condition and row["kind"] != "distribution"]


def over_documents(rows: Sequence[Row], name: str) -> tuple[float, float, int]:
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
