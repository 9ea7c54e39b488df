"""Perplexity of plain held-out text with the memory on, off, and as new before every segment.

Text streams through the model segment by segment; memory is read and written as it goes. With reads off the model has
its local context alone. Wiped before every segment, memory holds nothing that an earlier segment wrote; a model whose
empty memory contributes nothing then equals the one with reads off by construction.

Shapes: B streams, S segments of a window, T tokens per segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from memlm.analysis.style import PALETTE, style
from memlm.config import ConfigError
from memlm.data.stream import Batch, ValidationBatches
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel
from memlm.statistics import ratio_interval
from memlm.training.loss import token_nll

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

CONDITIONS = {"on": "memory on", "off": "reads off", "wiped": "memory wiped"}
"""What is measured, and how it is called."""


class _Window(NamedTuple):
    """Segments of every stream: (B, S, T), and ``reset`` (B, S)."""

    ids: Tensor
    targets: Tensor
    weight: Tensor
    mask: Tensor
    reset: Tensor


@dataclass(frozen=True)
class Perplexity:
    """Settings.

    Attributes:
        split: Which text: ``val``, or ``test`` for final numbers.
        limit: Tokens to predict, unless the text is shorter: reading stops after the first whole windows that hold as
            many. None for all of it, but for what is left when its segments are dealt out to the streams evenly.
        n_row: Streams read side by side, each through its own share of the documents, as validation during training
            does; see `memlm.data.stream.ValidationBatches`.

    Raises:
        ConfigError: If a setting cannot work.
    """

    split: Literal["val", "test"] = "val"
    limit: int | None = 20_000
    n_row: int = 8

    def __post_init__(self) -> None:
        check_settings(self, {"n_row": 1})
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"perplexity.limit must be at least 1 or null, got {self.limit}")


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Perplexity,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure perplexity under each condition on the same tokens.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and a ``tokenizer``, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per condition and document (by ``stream`` and number within it): ``n_token`` predicted and their mean
        ``nll`` in nats. A document may be cut short where a stream begins or stops. For metrics see `summarise`.
    """
    batches = ValidationBatches(data.tokens(cfg.split), model.segment_len, data.tokenizer.pad_id, cfg.n_row)
    windows, n_token = [], 0
    for i in range(len(batches)):
        windows.append(_window(batches[i], model.segment_len))
        n_token += int(windows[-1].weight.sum())
        if cfg.limit is not None and n_token >= cfg.limit:
            break
    if n_token == 0:
        raise ConfigError(f"no token can be predicted in the {cfg.split} text: every document has one token only")
    rows: list[Row] = []
    with evaluating(model):
        for i, condition in enumerate(CONDITIONS):
            for streams in share.groups(batches.n_row, batches.n_row):  # one group at most
                rows += _measure(model, windows, streams, condition, _scaled(progress, i, len(CONDITIONS)))
    rows = share.join(rows)
    rows.sort(key=lambda row: (list(CONDITIONS).index(row["condition"]), row["stream"], row["document"]))
    metadata = {
        "settings": asdict(cfg),
        "n_token": n_token,
        "n_document": len(rows) // len(CONDITIONS),
        "n_token_with_past": sum(int(part.weight[~part.reset].sum()) for part in windows),
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": [
            {"label": f"perplexity, {label}", "metric": f"perplexity/{name}", "n": "n_token", "control": name != "on"}
            | {"low": None, "high": None, "percent": False, "better": "lower"}
            for name, label in CONDITIONS.items()
        ]
        + [
            {"label": "change by memory, nats per token", "metric": "difference/on-off", "n": "n_document"}
            | {"low": "difference_low/on-off", "high": "difference_high/on-off"}
            | {"percent": False, "better": "lower", "control": False}
        ],
    }
    return Result("perplexity", summarise(rows), tuple(rows), metadata)


def _scaled(progress: Callable[[float], None] | None, i: int, n: int) -> Callable[[float], None]:
    """Report part ``i`` of ``n`` equal parts of the work."""
    return lambda done: None if progress is None else progress((i + done) / n)


def _window(batch: Batch, segment_len: int) -> _Window:
    """A batch by segments."""
    mask = torch.ones_like(batch.answer) if batch.mask is None else batch.mask
    parts = (part.unflatten(1, (-1, segment_len)) for part in (batch.ids, batch.targets, batch.weight, mask))
    ids, targets, weight, mask = parts
    reset = torch.zeros(ids.shape[:2], dtype=torch.bool) if batch.reset is None else batch.reset
    return _Window(ids, targets, weight, mask, reset)


def _measure(
    model: LanguageModel, windows: Sequence[_Window], streams: range, condition: str, progress: Callable[[float], None]
) -> list[Row]:
    """Rows of some streams under one condition."""
    device = next(model.parameters(), torch.empty(0)).device
    n_row = len(streams)
    state: Any = None
    document = [-1] * n_row
    sums: dict[tuple[int, int], list[float]] = {}
    for done, window in enumerate(windows):
        whole = _Window(*(part[streams.start : streams.stop] for part in window))
        n_segment = whole.ids.shape[1]
        step = 1 if condition == "wiped" else n_segment  # segments per call
        for s in range(0, n_segment, step):
            ids, targets, weight, mask, reset = (part[:, s : s + step] for part in whole)
            if condition == "wiped":
                state = model.wipe(model.init_state(n_row) if state is None else state)
            plain = not reset.any() and mask.all()
            out = model(
                ids.flatten(1).to(device),
                state=state,
                reset=None if plain else reset.to(device),
                mask=None if plain else mask.flatten(1).to(device),
                read=condition != "off",
                write=condition != "off",
                logits=False,
                donate=True,
            )
            state = out.state
            nll = token_nll(model, out.hidden, targets.flatten(1).to(device)).double().view(targets.shape)
            total = (nll * weight.to(device)).sum(dim=2).tolist()  # (B, S)
            count = weight.sum(dim=2).tolist()
            for i in range(n_row):
                for k in range(step):
                    document[i] += int(reset[i, k])
                    found = sums.setdefault((i, document[i]), [0.0, 0.0])
                    found[0] += total[i][k]
                    found[1] += count[i][k]
        progress((done + 1) / len(windows))
    return [
        {"condition": condition, "stream": streams[i], "document": k, "n_token": int(n), "nll": total / n}
        for (i, k), (total, n) in sorted(sums.items())
        if n
    ]


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition ``nll/<condition>`` (nats per token over all tokens) and ``perplexity/<condition>``;
        ``n_token`` and ``n_document``; and ``difference/on-off`` and ``difference/on-wiped``, by how many nats per
        token the memory changes the loss (below 0 it helps), with ``difference_low/...`` and ``difference_high/...``,
        a 95 % interval over documents (NaN with one document).
    """
    metrics: dict[str, float] = {}
    parts = {
        name: {(row["stream"], row["document"]): row for row in rows if row["condition"] == name} for name in CONDITIONS
    }
    for name, part in parts.items():
        if part:
            n_token = sum(row["n_token"] for row in part.values())
            nll = math.fsum(row["nll"] * row["n_token"] for row in part.values()) / n_token
            metrics |= {f"nll/{name}": nll, f"perplexity/{name}": math.inf if nll >= 700 else math.exp(nll)}
            metrics |= {"n_token": n_token, "n_document": len(part)}
    for name in CONDITIONS:
        if name == "on" or not parts["on"] or not parts[name]:
            continue
        pairs = [(parts["on"][key], parts[name][key]) for key in parts["on"]]
        mean, half = ratio_interval([a["n_token"] for a, _ in pairs], [a["nll"] - b["nll"] for a, b in pairs])
        metrics |= {f"difference/on-{name}": mean, f"difference_low/on-{name}": mean - half}
        metrics |= {f"difference_high/on-{name}": mean + half}
    return metrics


def plot(result: Result) -> dict[str, Figure]:
    """Perplexity under each condition, and the change that memory makes with its interval."""
    metrics = result.metrics
    names = [name for name in CONDITIONS if f"perplexity/{name}" in metrics]
    if not names:
        return {}
    changes = [name for name in names if f"difference/on-{name}" in metrics]
    colors = {"on": PALETTE["blue"], "off": PALETTE["vermillion"], "wiped": PALETTE["purple"]}
    with style():
        figure = Figure(figsize=(8.5, 3.0))
        left, right = figure.subplots(1, 2)
        for y, name in enumerate(names):
            value = metrics[f"perplexity/{name}"]
            left.barh(y, value if math.isfinite(value) else 0.0, height=0.6, color=colors[name], alpha=0.85)
            left.annotate(
                f"{value:,.4g}", (0, y), xytext=(6, 0), textcoords="offset points", va="center", color="white",
                fontweight="bold",
            )  # fmt: skip
        left.set_yticks(range(len(names)), [CONDITIONS[name] for name in names])
        left.invert_yaxis()
        left.set(title="Perplexity", xlabel=f"perplexity of {int(metrics['n_token']):,} tokens")
        for y, name in enumerate(changes):
            mean, low = metrics[f"difference/on-{name}"], metrics[f"difference_low/on-{name}"]
            error = None if math.isnan(low) else mean - low
            right.errorbar(mean, y, xerr=error, color=colors[name], marker="o", markersize=8, capsize=5)
        right.axvline(0, color=PALETTE["black"], linewidth=1.2, linestyle=":")
        right.set_yticks(range(len(changes)), [f"on − {CONDITIONS[name]}" for name in changes])  # noqa: RUF001
        right.set_ylim(len(changes) - 0.5, -0.5)
        right.set(title="Change by memory", xlabel="nats per token (below 0: it helps)")
        right.margins(x=0.2)
        for axes in (left, right):
            axes.grid(axis="x")
            axes.grid(visible=False, axis="y")
    return {"perplexity": figure}
