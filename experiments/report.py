"""What a run is worth, in a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.base import Result, table
from experiments.needle import CONDITIONS, Needle, run
from memlm.analysis.figures import CONTROLS

_PERPLEXITY = {"on": "memory on", "off": "reads off", "wiped": "memory wiped before every segment"}
_KINDS = {"": "memory on", "_straddling": "memory on, facts across a segment boundary"}


def summary(results: Iterable[Result]) -> str:
    """The tables printed at the end of training and of an evaluation.

    Perplexity on, off and wiped; recall of planted facts beside every control, with n and 95 % intervals. Other
    experiments speak through their own files.

    Args:
        results: What was found, in any order.

    Returns:
        The tables, without a final line break; empty if there is nothing to say.

    Raises:
        ValueError: If a result claims recall without its controls.
    """
    results = list(results)
    blocks = [_perplexity(result) for result in results if "perplexity/on" in result.metrics]
    blocks += [_recall(result) for result in results if _claims_recall(result.metrics)]
    return "\n\n".join(blocks)


def watch(node: Mapping[str, Any] | None, data: Any) -> Callable[[Any], dict[str, float]] | None:
    """What to measure during training: recall and its controls, by the names under which they are logged.

    Args:
        node: Settings of the needle experiment as plain values; None for nothing.
        data: The data of the run; without planted facts nothing is measured.
    """
    if node is None or not data.curriculum.has_task:
        return None
    settings = Needle(**{name: value for name, value in node.items() if name != "_target_"})

    def measure(model: Any) -> dict[str, float]:
        metrics = run(model, data, settings).metrics
        rates = {f"recall/{name}": metrics[f"exact_match/{name}"] for name in CONDITIONS}
        return rates | {"recall/n": metrics["n/on"], "recall/chance": metrics["chance"]}

    return measure


def _claims_recall(metrics: Mapping[str, float]) -> bool:
    return any(name.startswith(("exact_match/on", "exact_match_straddling/on")) for name in metrics)


def _perplexity(result: Result) -> str:
    metrics = result.metrics
    lines = [
        (label, metrics[f"perplexity/{name}"], metrics[f"nll/{name}"])
        for name, label in _PERPLEXITY.items()
        if f"perplexity/{name}" in metrics
    ]
    n_token, n_document = int(metrics["n_token"]), int(metrics["n_document"])
    title = f"Perplexity of held-out text ({n_token:,} tokens, {n_document:,} documents)"
    text = table(("condition", "perplexity", "nats per token"), lines, title)
    if result.metadata.get("memories") == []:
        return text + "\nThe model has no memory: all conditions are the same."
    if "difference/on-off" in metrics:
        mean, low, high = (metrics[f"difference{part}/on-off"] for part in ("", "_low", "_high"))
        interval = "no interval, one document" if math.isnan(low) else f"95 % interval {low:+.4f} to {high:+.4f}"
        text += f"\nMemory changes the loss by {mean:+.4f} nats per token ({interval})."
    if "nll/wiped" in metrics and metrics["nll/wiped"] == metrics.get("nll/off"):
        text += "\nOff and wiped agree: a read of this memory while empty changes nothing."
    return text


def _recall(result: Result) -> str:
    metrics = result.metrics
    distances: list[int] = list(result.metadata.get("distances", ()))
    suffixes = {f"/{d}": d for d in distances} if len(distances) > 1 else {"": distances[0] if distances else None}
    lines: list[dict[str, Any]] = []
    for suffix, distance in suffixes.items():
        names = {f"{kind}/on{suffix}": label for kind, label in _KINDS.items()}
        names |= {f"/{control}{suffix}": label for control, label in CONTROLS.items()}
        _require_controls(result, suffix)
        lines += [
            {
                "distance": distance,
                "condition": label,
                "recalled %": _percent(metrics[f"exact_match{name}"]),
                "95 % from": _percent(metrics[f"low{name}"]),
                "to": _percent(metrics[f"high{name}"]),
                "n": int(metrics[f"n{name}"]),
                "nats per token": metrics.get(f"nll{name}"),
            }
            for name, label in names.items()
            if f"exact_match{name}" in metrics
        ]
    columns = ["condition", "recalled %", "95 % from", "to", "n", "nats per token"]
    title = f"Recall of facts told once ({result.name}"
    if len(suffixes) > 1:
        columns = ["distance", *columns]
        title += ", distance in tokens"
    elif distances:
        title += f", {distances[0]:,} or more tokens before"
    text = table(columns, [{column: line[column] for column in columns} for line in lines], f"{title})")
    if "chance" in metrics:
        text += f"\nA guess among the facts of the document would be right in {100 * metrics['chance']:.2g} %."
    return text


def _require_controls(result: Result, suffix: str) -> None:
    """Refuse a recall rate that lacks a control.

    Facts that were never told lie across no boundary, so what straddles is compared with the other three.
    """
    missing = [name for name in ("on", *CONTROLS) if not result.metrics.get(f"n/{name}{suffix}")]
    if f"exact_match_straddling/on{suffix}" in result.metrics:
        missing += [f"{c} (straddling)" for c in CONTROLS if c != "unseen"
                    if not result.metrics.get(f"n_straddling/{c}{suffix}")]  # fmt: skip
    if missing:
        at = f" at {suffix[1:]} tokens" if suffix else ""
        raise ValueError(
            f"{result.name!r} claims recall{at} without {', '.join(missing)}: a rate counts only beside all of its "
            f"controls ({', '.join(CONTROLS)}), so nothing is reported; run the experiment with every condition"
        )


def _percent(rate: float) -> float:
    """A rate in percent with one decimal, never rounded up to 100 or down to 0."""
    percent = round(100 * rate, 1)
    if percent == 100 and rate < 1:
        return 99.9
    return 0.1 if percent == 0 and rate > 0 else percent
