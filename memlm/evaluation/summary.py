"""What a run is worth, in a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memlm.analysis.style import CONTROLS
from memlm.data.tasks.sentences import LEVELS
from memlm.evaluation.headline import Number, headline, in_percent, shown
from memlm.evaluation.recall.rates import LABELS
from memlm.evaluation.result import Result
from memlm.evaluation.table import table
from memlm.printed import printable

_PERPLEXITY = {
    "on": "memory on",
    "off": "reads off",
    "wiped": "memory wiped before every segment",
    "swapped": "another document's memory",
}


_KINDS = {"": "memory on", "_straddling": "memory on, facts across a segment boundary"}


_KINDS |= {f"_{level}": f"memory on, {said}" for level, said in LEVELS.items()}


def summary(results: Iterable[Result]) -> str:
    """The tables printed at the end of training and of an evaluation.

    Perplexity on, off and wiped; what the needle found beside every control, with n and 95 % intervals; and the
    headline of every experiment.

    Args:
        results: What was found, in any order.

    Returns:
        The tables, without a final line break; empty if there is nothing to say.

    Raises:
        ValueError: If a result claims recall, or any rate, without its controls.
    """
    results = list(results)
    blocks = [_perplexity(result) for result in results if "perplexity/on" in result.metrics]
    for result in filter(_claims_recall, results):
        if "distances" in result.metadata:
            blocks.append(_recall(result))
        else:
            _require_controls(result, "")
    headlines = [(result.name, numbers) for result in results if (numbers := headline(result))]
    if headlines:
        blocks.append(_headlines(headlines))
    return "\n\n".join(blocks)


def not_measured(skipped: Mapping[str, str]) -> str:
    """What to print of experiments that do not apply: name and reason, see `memlm.evaluation.runner.run_all`."""
    return printable("\n".join(["Not measured:", *(f"  {name}: {reason}" for name, reason in skipped.items())]))


def _headlines(headlines: Sequence[tuple[str, Sequence[Number]]]) -> str:
    lines = []
    for name, numbers in headlines:
        for i, number in enumerate(numbers):
            label = f"  {number.label}" if number.control else number.label
            interval = [shown(bound, number.percent) for bound in (number.low, number.high)]
            lines.append((name if i == 0 else "", label, shown(number.value, number.percent), *interval, number.n))
    columns = ("experiment", "number", "value", "95 % from", "to", "n")
    text = table(columns, lines, "Main numbers, and below them (indented) their controls")
    if few := [name for name, numbers in headlines if any(number.too_few for number in numbers)]:
        text += f"\nWhere {' and '.join(few)} tells no interval (-), documents or seeds are too few for one."
    return text


def _claims_recall(result: Result) -> bool:
    return any(name.startswith(("exact_match/on", "exact_match_straddling/on")) for name in result.metrics)


def _perplexity(result: Result) -> str:
    metrics = result.metrics
    lines = [
        (label, metrics[f"perplexity/{name}"], metrics[f"nll/{name}"])
        for name, label in _PERPLEXITY.items()
        if f"perplexity/{name}" in metrics
    ]
    n_token, n_document = int(metrics["n_token"]), int(metrics["n_document"])
    # As many decimals as leave the largest four significant digits.
    decimals = 3 - math.floor(math.log10(max((value for _, value, _ in lines if math.isfinite(value)), default=1)))
    lines = [(label, round(perplexity, decimals), nll) for label, perplexity, nll in lines]
    documents = f"{n_document:,} document{'s' if n_document > 1 else ''}"
    title = f"Perplexity of held-out text ({n_token:,} tokens, {documents})"
    text = table(("condition", "perplexity", "nats per token"), lines, title)
    if result.metadata.get("memories") == []:
        return text + "\nThe model has no memory: all conditions are the same."
    if result.metadata.get("n_token_with_past") == 0:
        text += "\nNo document goes on after its first segment: memory had nothing to tell."
    if "difference/on-off" in metrics:
        mean, low, high = (metrics[f"difference{part}/on-off"] for part in ("", "_low", "_high"))
        interval = "no interval, one document" if math.isnan(low) else f"95 % interval {low:+.4f} to {high:+.4f}"
        text += f"\nMemory changes the loss by {mean:+.4f} nats per token ({interval})."
    if "says" in result.metadata:
        text += f"\n{result.metadata['says']}"
    if "nll/wiped" in metrics and metrics["nll/wiped"] == metrics.get("nll/off"):
        text += "\nOff and wiped agree: a read of this memory while empty changes nothing."
    return text


def _recall(result: Result) -> str:
    metrics = result.metrics
    distances: list[int] = list(result.metadata.get("distances", ()))
    axes = _axes(result)
    given = [name.removeprefix("exact_match/on") for name in metrics if name.startswith("exact_match/on/")]
    lines: list[dict[str, Any]] = []
    for suffix in given if axes and given else [""]:
        values = [int(part) if part.isdigit() else part for part in suffix.split("/")[1:]]
        names = {f"{kind}/on{suffix}": label for kind, label in _KINDS.items()}
        names |= {f"/{control}{suffix}": label for control, label in LABELS.items() if control != "on"}
        _require_controls(result, suffix)
        lines += [
            dict(zip(axes, values, strict=False))
            | {
                "condition": label,
                "recalled %": in_percent(metrics[f"exact_match{name}"]),
                "95 % from": in_percent(metrics[f"low{name}"]),
                "to": in_percent(metrics[f"high{name}"]),
                "n": int(metrics[f"n{name}"]),
                "nats per token": metrics.get(f"nll{name}"),
            }
            for name, label in names.items()
            if f"exact_match{name}" in metrics
        ]
    title = f"Recall of facts told once ({result.name}"
    if "distance" in axes:
        title += ", distance in tokens"
    elif distances and result.metadata.get("settings", {}).get("spread"):
        title += f", all over a text of {distances[0]:,} tokens"
    elif distances:
        title += f", {distances[0]:,} or more tokens before"
    text = table(list(lines[0]), lines, f"{title})")
    if "chance" in metrics:
        chance = f"{100 * metrics['chance']:.2g} %"
        text += f"\nA guess among the told facts that answer such a question would be right in {chance}."
    if (repetition := result.metadata.get("haystack_repetition", 0)) > 1:
        text += f"\nThe text around the facts is repeated: a document goes {repetition:.1f} times through all there is."
    return text


def _axes(result: Result) -> list[str]:
    """What varies within a result, in the order of the names of its metrics, as `tabulate` has them."""
    settings = result.metadata.get("settings", {})
    varying = {name: settings.get(key) for name, key in (("facts", "kind"), ("others", "n_other"))}
    varying["distance"] = result.metadata.get("distances")
    return [name for name, values in varying.items() if isinstance(values, list) and len(set(values)) > 1]


def _require_controls(result: Result, suffix: str) -> None:
    """Refuse a recall rate that lacks a control.

    Facts that were never told lie across no boundary, so what straddles is compared with the other three.
    """
    missing = [name for name in ("on", *CONTROLS) if not result.metrics.get(f"n/{name}{suffix}")]
    if f"exact_match_straddling/on{suffix}" in result.metrics:
        missing += [f"{c} (straddling)" for c in CONTROLS if c != "unseen"
                    if not result.metrics.get(f"n_straddling/{c}{suffix}")]  # fmt: skip
    if missing:
        at = f" at {suffix[1:]} tokens" if suffix[1:].isdigit() else f" for {suffix[1:]}" if suffix else ""
        raise ValueError(
            f"{result.name!r} claims recall{at} without {', '.join(missing)}: a rate counts only beside all of its "
            f"controls ({', '.join(CONTROLS)}), so nothing is reported; run the experiment with every condition"
        )
