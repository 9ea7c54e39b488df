"""Associative recall: key-value pairs told once at the beginning of a document, and asked for later (MQAR).

The documents are those of `memlm.data.tasks.mqar`, where the definition and its source are, or of
`memlm.data.tasks.pairs`, where there is nothing but pairs and questions. The text is read segment by segment, each in a
context of its own, so a question whose pair was told in an earlier segment can be answered from memory alone: the
accuracy of those is the headline. Questions in the same segment as their pair, which attention can answer, are counted
apart (`inside`). A question is answered when the likeliest next token is the value.

A number of pairs is held if at least 90 % of such questions are answered, and more than with reads off, a wiped memory
or another document's (95 % Wilson intervals apart). What a memory costs are the bytes of its state for one row of text.

Each segment is also read under every control: with reads off, with a wiped memory, with the memory of another document
at the same place, and with every key exchanged for one that was never told (`unseen`; the right answer stays that of
the key it replaces, so whoever guesses among what was told is right as often as `chance_told`). Controls write nothing.

Documents come from another stream of random numbers than those of training. Pairings are drawn anew in every document
(with 8,192 symbols there are 16 million pairs), so that having seen a pair in training does not help; what could be
known without the document shows in the controls.

Shapes: B rows, T tokens per segment, N tokens of a document, P pairs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.config import ConfigError
from memlm.data.tasks.mqar import MQAR, Recall
from memlm.evaluation.recall.figures import Points, draw_curves
from memlm.evaluation.recall.reading import device_of, n_row_of
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.memory import state as states
from memlm.models.base import LanguageModel
from memlm.statistics import wilson

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

LABELS = {"on": "memory on", **CONTROLS, "unseen": "key never told"}
"""The memory as it is, then its controls, and what a figure calls them."""

THRESHOLD = 0.9
"""Share of answers at which a number of pairs counts as held."""

_STREAM = 2**31  # keeps evaluation documents apart from training documents, whose second number is a phase
_N_BIN = 8  # bins of gaps in the figure


@dataclass(frozen=True)
class AssociativeRecall:
    """Settings.

    Attributes:
        n_pair: Pairs told in a document. With a list, one measurement each; the largest is the headline.
        n_token: Tokens of a document, rounded up to whole segments; at least 4 per pair.
        n_document: Documents of each number of pairs; at least 2, as one is the other's control.
        seed: Of the documents.
        n_row: Documents read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_pair: int | list[int] = field(default_factory=lambda: [16, 32, 64])
    n_token: int = 512
    n_document: int = 32
    seed: int = 0
    n_row: int = 16

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "seed": 0, "n_row": 1})
        if not self.n_pairs or self.n_pairs[0] < 1:
            raise ConfigError(
                f"associative_recall.n_pair must be a number of pairs or a list of them, not {self.n_pair}"
            )
        if self.n_token < 4 * self.n_pairs[-1]:
            raise ConfigError(
                f"associative_recall.n_token must be at least 4 times n_pair ({self.n_pairs[-1]}), got {self.n_token}"
            )

    @property
    def n_pairs(self) -> list[int]:
        """All numbers of pairs, ascending."""
        return [self.n_pair] if isinstance(self.n_pair, int) else sorted(set(self.n_pair))


def run(
    model: LanguageModel,
    data: TextData,
    cfg: AssociativeRecall,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure recall and its controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives the ``task``, which must be an `MQAR`, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per question, by number of pairs, condition, document and pair: ``gap`` is the number of tokens from the
        key to the question, ``across`` whether segments lie apart, ``correct`` the outcome, ``nll`` that of the value
        in nats, ``n_value`` the values that there are. In a ``swapped`` row ``document`` is where the pair was told,
        while the memory is that of the next document. For metrics see `summarise`.

    Raises:
        ConfigError: If the model was not built for the task.
    """
    task = getattr(data, "task", None)
    if not isinstance(task, MQAR):
        raise ConfigError(
            "associative_recall needs a model that knows the symbols of multi-query associative recall, and this one "
            "was trained on other data: train one with recipe=pairs or recipe=mqar"
        )
    n_token = -(-cfg.n_token // model.segment_len) * model.segment_len
    rows: list[Row] = []
    with evaluating(model):
        for i, n_pair in enumerate(cfg.n_pairs):
            documents = [
                task.draw(np.random.default_rng([cfg.seed, _STREAM, n_pair, d]), n_token, model.segment_len, n_pair)
                for d in range(cfg.n_document)
            ]
            never = [
                _exchange(task, document, [cfg.seed, _STREAM + 1, n_pair, d]) for d, document in enumerate(documents)
            ]
            for numbers in share.groups(cfg.n_document, n_row_of(model, cfg.n_row)):
                rows += [row | {"n_value": len(task.values)} for row in _read(model, documents, never, numbers)]
                if progress is not None:
                    progress((i + (numbers[-1] + 1) / cfg.n_document) / len(cfg.n_pairs))
    rows = share.join(rows)
    rows.sort(key=lambda row: (row["n_pair"], list(LABELS).index(row["condition"]), row["document"], row["pair"]))
    n_byte = states.n_byte(model.init_state(1).memory)
    metrics = summarise(rows, n_byte)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n_pairs": cfg.n_pairs,
        "n_token": n_token,
        "n_symbol": len(task.symbols),
        "task": type(task).__name__,
        "state_bytes": n_byte,
        "power_a": task.power_a,
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": entries(metrics, cfg.n_pairs),
    }
    return Result("associative_recall", metrics, tuple(rows), metadata)


def _exchange(task: MQAR, document: Recall, seed: Sequence[int]) -> np.ndarray:
    """Tokens of a document whose questions are about keys that it never told, (N,)."""
    others = np.setdiff1d(task.keys, document.key)
    if len(others) < len(document.key):
        raise ConfigError(
            f"{len(document.key)} pairs leave {len(others)} of {len(task.keys)} keys that are never told, too few for "
            "a control: use fewer pairs (associative_recall.n_pair), or a larger data.corpus.n_symbol"
        )
    tokens = document.tokens.copy()
    tokens[document.place] = np.random.default_rng(seed).choice(others, size=len(document.key), replace=False)
    return tokens


def _read(model: LanguageModel, documents: Sequence[Recall], never: Sequence[np.ndarray], numbers: range) -> list[Row]:
    """Read the documents ``numbers`` side by side, and answer their questions under every condition."""
    segment_len, device = model.segment_len, device_of(model)
    own = [documents[i].tokens for i in numbers]
    # The memory of a document is asked for what the document before it told: no other memory need be at hand.
    before = [(i - 1) % len(documents) for i in numbers]
    texts = {"off": own, "wiped": own, "swapped": [documents[i].tokens for i in before]}
    texts["unseen"] = [never[i] for i in numbers]
    state = model.init_state(len(numbers))
    rows: list[Row] = []
    for start in range(0, len(own[0]), segment_len):
        if start:
            state = model.new_context(state, donate=True)
        asked = any(((d.place >= start) & (d.place < start + segment_len)).any() for d in documents)
        for condition in texts if asked else ():
            memory = model.wipe(state) if condition == "wiped" else state
            shown = _ids(texts[condition], start, segment_len, device)
            out = model(shown, state=memory, read=condition != "off", write=False, keep_state=False)
            told = before if condition == "swapped" else numbers
            rows += _answers(condition, out.logits, [(i, documents[i]) for i in told], start, segment_len)
        out = model(_ids(own, start, segment_len, device), state=state, logits=asked, donate=True)
        state = out.state
        if asked:
            rows += _answers("on", out.logits, [(i, documents[i]) for i in numbers], start, segment_len)
    return rows


def _ids(texts: Sequence[np.ndarray], start: int, segment_len: int, device: torch.device) -> torch.Tensor:
    """A segment of each text, (B, T)."""
    return torch.from_numpy(np.stack([tokens[start : start + segment_len] for tokens in texts])).to(device)


def _answers(
    condition: str, logits: torch.Tensor, asked: Sequence[tuple[int, Recall]], start: int, segment_len: int
) -> list[Row]:
    """Rows of the questions in one segment; ``logits`` (B, T, V) begin at token ``start``."""
    rows: list[Row] = []
    for (number, document), row in zip(asked, logits, strict=True):
        pairs = np.flatnonzero((document.place >= start) & (document.place < start + segment_len))
        place = document.place[pairs]
        found = row[torch.from_numpy(place - start)].float()  # (questions, V)
        value = torch.from_numpy(document.value[pairs]).to(found.device)
        correct = (found.argmax(dim=1) == value).tolist()
        nll = -found.log_softmax(dim=1).gather(1, value[:, None])[:, 0]
        rows += [
            {
                "condition": condition,
                "n_pair": len(document.key),
                "document": number,
                "pair": int(pair),
                "gap": int(at - document.told[pair]),
                "across": bool(document.told[pair] // segment_len < at // segment_len),
                "correct": right,
                "nll": loss,
            }
            for pair, at, right, loss in zip(pairs, place, correct, nll.tolist(), strict=True)
        ]
    return rows


def summarise(rows: Sequence[Row], n_byte: int) -> dict[str, float]:
    """Metrics of the rows.

    Args:
        rows: The rows.
        n_byte: Bytes of the state of one row of text.

    Returns:
        For each condition ``accuracy/<condition>`` of questions whose pair lies in an earlier segment, with ``low`` and
        ``high`` (95 % Wilson interval), ``n`` and ``nll``; and the same of the others, ``accuracy_inside/...``. With
        several numbers of pairs these are for the largest, and ``.../<n_pair>`` for each. ``chance`` is the rate of a
        guess among all values, ``chance_told`` that of a guess among the values that a document told, for the largest.
        ``held/on`` is the largest number of pairs that is held, 0 if none is; ``held_strict/on`` the largest of which
        the interval begins at 90 % or above; ``censored/on`` 1 where the largest number told is held, else 0; then
        ``state_bytes``, and ``pairs_per_kb/on``, pairs held per 1,024 bytes, NaN without any bytes.
    """
    n_pairs = sorted({row["n_pair"] for row in rows})
    metrics: dict[str, float] = {}
    for n_pair in n_pairs:
        for kind, across in (("", True), ("_inside", False)):
            for condition in LABELS:
                part = [
                    row
                    for row in rows
                    if (row["n_pair"], row["across"], row["condition"]) == (n_pair, across, condition)
                ]
                if not part:
                    continue
                rate, low, high = _rate(part)
                numbers = {"accuracy": rate, "low": low, "high": high, "n": len(part)}
                numbers["nll"] = math.fsum(row["nll"] for row in part) / len(part)
                for name, value in numbers.items():
                    if n_pair == n_pairs[-1]:
                        metrics[f"{name}{kind}/{condition}"] = value
                    if len(n_pairs) > 1:
                        metrics[f"{name}{kind}/{condition}/{n_pair}"] = value
    if rows:
        metrics |= {"chance": 1 / rows[0]["n_value"], "chance_told": 1 / n_pairs[-1]}
        metrics |= held(metrics, n_pairs, n_byte)
    return metrics


def held(metrics: Mapping[str, float], n_pairs: Sequence[int], n_byte: int) -> dict[str, float]:
    """How many pairs are held, and what they cost: those of `summarise`.

    Answers need not lie above ``unseen``: who was told one pair is right to say its value, whatever is asked.
    """

    def largest(name: str) -> int:
        most = 0
        for n_pair in n_pairs:
            end = f"/{n_pair}" if len(n_pairs) > 1 else ""
            controls = [metrics.get(f"high/{control}{end}", 0.0) for control in ("off", "wiped", "swapped")]
            if metrics.get(f"{name}/on{end}", 0.0) >= THRESHOLD and metrics[f"low/on{end}"] > max(controls):
                most = n_pair
        return most

    most = largest("accuracy")
    return {
        "held/on": most,
        "held_strict/on": largest("low"),
        "censored/on": float(most == n_pairs[-1]),
        "state_bytes": n_byte,
        "pairs_per_kb/on": most / (n_byte / 1024) if n_byte else math.nan,
    }


def _rate(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Share of right answers and its interval."""
    k = sum(row["correct"] for row in rows)
    return (k / len(rows), *wilson(k, len(rows)))


def entries(metrics: Mapping[str, float], n_pairs: Sequence[int]) -> list[dict[str, Any]]:
    """The headline: how many pairs are held; the largest number of pairs with its controls, then the others.

    Args:
        metrics: What `summarise` returns.
        n_pairs: Numbers of pairs, ascending.
    """
    last = n_pairs[-1]
    lines = [(f"{last} pairs, {label}", f"/{name}", name != "on") for name, label in LABELS.items()]
    lines.insert(1, (f"{last} pairs, pair in the same segment", "_inside/on", False))
    lines += [(f"{n} pair{'s' * (n > 1)}, memory on", f"/on/{n}", False) for n in n_pairs[:-1]]
    none = dict.fromkeys(("low", "high", "n"))
    found: list[dict[str, Any]] = [
        {"label": label, "metric": metric, "percent": False, "better": better, "control": False} | none
        for label, metric, better in (
            (f"pairs held at {100 * THRESHOLD:.0f} % ({last:,}: or more)", "held/on", "higher"),
            ("the same, by the lower end of its interval", "held_strict/on", "higher"),
            ("bytes of state", "state_bytes", "lower"),
            ("pairs held per KB of state", "pairs_per_kb/on", "higher"),
        )
    ]
    found += [
        {"label": label, "metric": f"accuracy{name}", "low": f"low{name}", "high": f"high{name}", "n": f"n{name}",
         "percent": True, "better": "higher", "control": control}
        for label, name, control in lines
        if f"accuracy{name}" in metrics
    ]  # fmt: skip
    for name, label in {"chance": "a guess among all values", "chance_told": "a guess among the values told"}.items():
        found.append(
            {"label": label, "metric": name, "low": None, "high": None, "n": None, "percent": True, "better": "higher",
             "control": True}
        )  # fmt: skip
    return found


def plot(result: Result) -> dict[str, Figure]:
    """Accuracy by number of pairs, and by the gap between pair and question, across segments."""
    across = [row for row in result.rows if row["across"]]
    if not across:
        return {}
    n_pairs = sorted({row["n_pair"] for row in across})
    by_pairs = {
        name: [
            (n, *_rate(part))
            for n in n_pairs
            if (part := [r for r in across if (r["condition"], r["n_pair"]) == (name, n)])
        ]
        for name in LABELS
    }
    most = [row for row in across if row["n_pair"] == n_pairs[-1]]
    gaps = np.array([row["gap"] for row in most])
    edges = np.unique([*np.quantile(gaps, np.arange(_N_BIN) / _N_BIN).round(), gaps.max() + 1])  # as many in each
    by_gap: dict[str, Points] = {name: [] for name in LABELS}
    for low, high in pairwise(edges):
        for name, points in by_gap.items():
            part = [row for row in most if row["condition"] == name and low <= row["gap"] < high]
            if part:
                points.append((float((low * high) ** 0.5), *_rate(part)))
    chance, n = result.metrics["chance"], int(result.metrics["n/on"])
    line: dict[str, Any] = {"color": PALETTE["black"], "linewidth": 1.2}
    with style():
        pairs, gap = Figure(figsize=(7.0, 4.6)), Figure(figsize=(7.0, 4.6))
        axes = pairs.subplots()
        draw_curves(axes, by_pairs, LABELS)
        axes.axhline(chance, linestyle=":", label="a guess among all values", **line)
        axes.plot(n_pairs, [1 / n for n in n_pairs], linestyle="--", label="a guess among the values told", **line)
        axes.axhline(THRESHOLD, linestyle=(0, (6, 3)), label=f"{100 * THRESHOLD:.0f} %", **line)
        axes.set(title=_title(result.metrics, n_pairs[-1]))
        axes.set(xlabel="key-value pairs told in a document", xscale="log")
        axes.set_xticks(n_pairs, [f"{n:,}" for n in n_pairs])
        axes.minorticks_off()
        axes = gap.subplots()
        draw_curves(axes, by_gap, LABELS)
        axes.axhline(chance, linestyle=":", label="a guess among all values", **line)
        axes.set(title=f"Associative recall across segments by gap, {n_pairs[-1]} pairs")
        axes.set(xlabel="tokens from key to question", xscale="log")
        ticks = 2 ** np.arange(np.log2(gaps.min()) // 1, np.log2(gaps.max()) // 1 + 2)
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
        for figure in (pairs, gap):
            figure.axes[0].set_ylabel("answered right")
            title = "bars: 95 % Wilson interval" + (f", n = {n:,}" if figure is gap or len(n_pairs) == 1 else "")
            figure.legend(loc="outside lower center", ncols=2, title=title)
    return {"accuracy_by_pairs": pairs, "accuracy_by_gap": gap}


def _title(metrics: Mapping[str, float], most: int) -> str:
    """What the figure says in words."""
    held, n_byte = metrics["held/on"], metrics["state_bytes"]
    bound = "at least " if held == most else ""
    title = f"Across segments {bound}{held:,.0f} pair{'s' * (held != 1)} held at {100 * THRESHOLD:.0f} %"
    return f"{title}\n{n_byte / 1024:,.1f} KB of state" if n_byte else title
