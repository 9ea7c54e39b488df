"""Associative recall as zoology measures it: one context, several lengths, beside its controls.

The documents are those of `memlm.data.tasks.zoology`, where the definition and its source are, of another stream of
random numbers than those of training. Each is read as one context, and a question is answered when the likeliest of all
symbols is the value. The accuracy is a mean over documents, all sizes together, as published.

What may carry a pair from where it is told to where it is asked for is memory, attention or a convolution. So the
controls change the text as well: the pairs left out (their places hold what blanks hold), another document's pairs in
their place, and reads off, where there is a memory. A memory that is read behind its segment alone cannot answer there
(see ``memory.delta.within``).

Shapes: B rows, N tokens of a document, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from memlm.analysis.style import style
from memlm.config import ConfigError
from memlm.data.epochs import Epochs
from memlm.data.tasks.mqar import Recall
from memlm.data.tasks.zoology import ZoologyMQAR
from memlm.evaluation.recall.figures import Points, draw_curves
from memlm.evaluation.recall.reading import device_of, n_row_of
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.memory import state as states
from memlm.models.base import LanguageModel
from memlm.statistics import interval, wilson

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

LABELS = {
    "on": "as it is",
    "off": "reads off",
    "wiped": "pairs left out",
    "swapped": "another document's pairs",
}
"""What is measured, then its controls, and what a figure calls them."""

_STREAM = 2**31  # keeps documents apart from those of training, whose second number is a phase


@dataclass(frozen=True)
class MQARZoology:
    """Settings.

    Attributes:
        sizes: Tokens and pairs of the documents of each measurement, at least 4 tokens per pair.
        n_document: Documents of each size; at least 2, as one is the other's control.
        n_token: Tokens that are read at once, about; results do not depend on it.
        seed: Of the documents.

    Raises:
        ConfigError: If a setting cannot work.
    """

    sizes: list[list[int]] = field(default_factory=lambda: [[64, 4]])
    n_document: int = 1000
    n_token: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "n_token": 1, "seed": 0})
        right = bool(self.sizes) and all(len(s) == 2 and s[1] >= 1 and s[0] >= 4 * s[1] for s in self.sizes)
        if not right or len({tuple(size) for size in self.sizes}) < len(self.sizes):
            raise ConfigError(
                "mqar_zoology.sizes must be different pairs [tokens, pairs] with at least 4 tokens per pair, got "
                f"{self.sizes}"
            )


def run(
    model: LanguageModel,
    data: TextData,
    cfg: MQARZoology,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure recall and its controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives the ``task``, which must be a `ZoologyMQAR`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per size, condition and document: ``right`` is the number of its questions that were answered, ``nll``
        the mean of what their values cost, in nats. For metrics see `summarise`.

    Raises:
        ConfigError: If the model was not built for the task.
    """
    task = getattr(data, "task", None)
    if not isinstance(task, ZoologyMQAR):
        raise ConfigError(
            "mqar_zoology needs a model that was trained on associative recall in one context: train one with "
            "recipe=mqar_zoology or recipe=mqar_zoology_figure2"
        )
    total = sum(n_token for n_token, _ in cfg.sizes)
    rows: list[Row] = []
    done = 0
    with evaluating(model):
        for n_token, n_pair in cfg.sizes:
            documents = [
                task.draw(np.random.default_rng([cfg.seed, _STREAM, n_token, n_pair, d]), n_token, 2, n_pair)
                for d in range(cfg.n_document)
            ]
            for numbers in share.groups(cfg.n_document, n_row_of(model, max(cfg.n_token // n_token, 1))):
                found = _read(model, task, documents, numbers, cfg.seed)
                rows += [{"n_token": n_token, "n_pair": n_pair} | row for row in found]
                if progress is not None:
                    progress((done + n_token * (numbers[-1] + 1) / cfg.n_document) / total)
            done += n_token
    rows = share.join(rows)
    order = {tuple(size): i for i, size in enumerate(cfg.sizes)}
    names = list(LABELS)
    rows.sort(key=lambda r: (order[r["n_token"], r["n_pair"]], names.index(r["condition"]), r["document"]))
    curriculum = getattr(data, "curriculum", None)
    trained = curriculum.share if isinstance(curriculum, Epochs) else None
    n_byte = states.n_byte(model.init_state(1).memory)
    metrics = summarise(rows, n_byte, len(task.values))
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n_symbol": len(task.symbols),
        "power_a": task.power_a,
        "random_blanks": task.random_blanks,
        "trained": trained,
        "state_bytes": n_byte,
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": _headline(metrics, [(n_token, n_pair) for n_token, n_pair in cfg.sizes], trained),
    }
    return Result("mqar_zoology", metrics, tuple(rows), metadata)


def _read(model: LanguageModel, task: ZoologyMQAR, documents: Sequence[Recall], numbers: range, seed: int) -> list[Row]:
    """Read the documents ``numbers`` side by side under every condition."""
    own = np.stack([documents[i].tokens for i in numbers])
    place = torch.from_numpy(np.stack([documents[i].place for i in numbers]))  # (B, P)
    value = torch.from_numpy(np.stack([documents[i].value for i in numbers]))
    told = slice(0, 2 * place.shape[1])
    swapped, wiped = own.copy(), own.copy()
    swapped[:, told] = [documents[(i - 1) % len(documents)].tokens[told] for i in numbers]
    wiped[:, told] = task.symbols[0]
    if task.random_blanks:
        rngs = [np.random.default_rng([seed, _STREAM + 1, i]) for i in numbers]
        wiped[:, told] = [rng.choice(task.symbols, size=told.stop) for rng in rngs]
    texts = {"on": own, "off": own, "wiped": wiped, "swapped": swapped}
    device = device_of(model)
    rows: list[Row] = []
    for condition, tokens in texts.items():
        if condition == "off" and not len(model.memory):
            continue
        ids = torch.from_numpy(tokens).to(device)
        hidden = model(ids, read=condition != "off", logits=False, keep_state=False).hidden
        asked = hidden.gather(1, place.to(device)[..., None].expand(-1, -1, hidden.shape[2]))  # (B, P, D)
        logits = model.head(asked).float().cpu()
        right = (logits.argmax(dim=2) == value).sum(dim=1).tolist()
        nll = -logits.log_softmax(dim=2).gather(2, value[..., None])[..., 0].mean(dim=1)
        rows += [
            {"condition": condition, "document": i, "right": n, "nll": loss}
            for i, n, loss in zip(numbers, right, nll.tolist(), strict=True)
        ]
    return rows


def summarise(rows: Sequence[Row], n_byte: int, n_value: int) -> dict[str, float]:
    """Metrics of the rows.

    Args:
        rows: The rows.
        n_byte: Bytes of the state of one row of text.
        n_value: Values that there are.

    Returns:
        For each condition ``accuracy/<condition>``, the mean over documents of the share of questions answered, with
        ``low`` and ``high`` (95 % interval over documents) and ``n``; with several sizes the same of each,
        ``.../<tokens>_<pairs>``. Then ``chance``, that of a guess among all values, ``chance_told``, that of a guess
        among what the document told, a mean over documents too, and ``state_bytes``.
    """
    sizes = list(dict.fromkeys((row["n_token"], row["n_pair"]) for row in rows))
    metrics: dict[str, float] = {}
    for condition in LABELS:
        part = [row for row in rows if row["condition"] == condition]
        if not part:
            continue
        metrics |= _rate(part, condition)
        for size in sizes if len(sizes) > 1 else ():
            own = [row for row in part if (row["n_token"], row["n_pair"]) == size]
            metrics |= _rate(own, f"{condition}/{size[0]}_{size[1]}")
    on = [row for row in rows if row["condition"] == "on"]
    told = math.fsum(1 / row["n_pair"] for row in on) / max(len(on), 1)
    return metrics | {"chance": 1 / n_value, "chance_told": told, "state_bytes": float(n_byte)}


def _rate(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Mean accuracy of documents and its interval; that of Wilson if they are all alike."""
    rates = [row["right"] / row["n_pair"] for row in rows]
    mean, low, high = interval(rates, 0.0, 1.0)
    if low == high:
        low, high = wilson(mean * len(rates), len(rates))
    numbers = {"accuracy": mean, "low": low, "high": high, "n": len(rates)}
    return {f"{key}/{name}": float(number) for key, number in numbers.items()}


def _headline(
    metrics: Mapping[str, float], sizes: Sequence[tuple[int, int]], trained: str | None
) -> list[dict[str, Any]]:
    """The mean and its controls, then each size; beside them what of the published training was made."""
    made = f" ({trained})" if trained else ""
    lines = [
        (label + made * (name == "on"), name, name != "on")
        for name, label in LABELS.items()
        if f"accuracy/{name}" in metrics
    ]
    if len(sizes) > 1:
        lines += [(f"{n_token:,} tokens, {n} pairs{made}", f"on/{n_token}_{n}", False) for n_token, n in sizes]
    entries: list[dict[str, Any]] = [
        {"label": label, "metric": f"accuracy/{name}", "low": f"low/{name}", "high": f"high/{name}", "n": f"n/{name}",
         "percent": True, "better": "higher", "control": control}
        for label, name, control in lines
    ]  # fmt: skip
    for metric, label, percent in (
        ("chance_told", "a guess among the values told", True),
        ("state_bytes", "bytes of state", False),
    ):
        entries.append(
            {"label": label, "metric": metric, "low": None, "high": None, "n": None, "percent": percent,
             "better": "higher" if percent else "lower", "control": percent}
        )  # fmt: skip
    return entries


def plot(result: Result) -> dict[str, Figure]:
    """Accuracy by number of pairs."""
    sizes = list(dict.fromkeys((row["n_token"], row["n_pair"]) for row in result.rows))
    points: dict[str, Points] = {name: [] for name in LABELS}
    for name, found in points.items():
        for size in sizes:
            end = f"{name}/{size[0]}_{size[1]}" if len(sizes) > 1 else name
            if f"accuracy/{end}" in result.metrics:
                rate, low, high = (result.metrics[f"{key}/{end}"] for key in ("accuracy", "low", "high"))
                found.append((size[1], rate, low, high))
    if not sizes:
        return {}
    with style():
        figure = Figure(figsize=(7.0, 4.6))
        axes = figure.subplots()
        draw_curves(axes, points, LABELS)
        n_byte = result.metrics["state_bytes"]
        title = f"Associative recall in one context: {100 * result.metrics['accuracy/on']:.1f} %"
        axes.set(title=f"{title}, {n_byte / 1024:,.1f} KB of memory" if n_byte else title)
        axes.set(xlabel="pairs (and tokens) of a document", xscale="log", ylabel="answered right")
        axes.set_xticks([n for _, n in sizes], [f"{n}\n({n_token:,})" for n_token, n in sizes])
        axes.minorticks_off()
        n = int(result.metrics["n/on"]) // len(sizes)
        figure.legend(loc="outside lower center", ncols=2, title=f"bars: 95 % interval over {n:,} documents each")
    return {"accuracy_by_pairs": figure}
