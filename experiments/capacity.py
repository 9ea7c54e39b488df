"""Capacity: how many facts a memory holds at 95 % recall, in all and per KB of state.

Documents tell ever more facts. As soon as all of a document are told, some of them, drawn at random from all places,
are asked for: see `experiments.needle`, which this is with no further distance, and `memlm.evaluation.recall.asking`
for the controls. The capacity is the largest number of facts told of which at least 95 % are recalled, and more than by
any control (95 % Wilson intervals apart); 0 if there is none. Strictly, the lower end of the interval must reach 95 %
too. Where the largest number that was told is still held, the capacity is a lower bound.

What a memory costs are the bytes of its state for one row of text, full or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from experiments.needle import Needle
from experiments.needle import run as run_needle
from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.config import ConfigError
from memlm.evaluation.headline import recall_entries
from memlm.evaluation.recall.figures import draw_rates
from memlm.evaluation.recall.rates import CONDITIONS, above_controls, rates
from memlm.evaluation.recall.reading import is_shared, part_of
from memlm.evaluation.recall.settings import Telling
from memlm.evaluation.result import Result, Row, check_settings
from memlm.evaluation.share import ALONE, Share
from memlm.memory import state as states
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

THRESHOLD = 0.95
"""Recall at which a number of facts counts as held."""


@dataclass(frozen=True, kw_only=True)
class Capacity(Telling):
    """Settings, beside those of `Telling`.

    Attributes:
        n_fact: Numbers of facts told in a document, ascending; other documents for each.
        n_ask: Facts asked for per document, at most; if more are told, as many at random.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_fact: list[int] = field(default_factory=lambda: [16, 64, 256, 1024])
    n_ask: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"n_ask": 1})
        if not self.n_fact or min(self.n_fact) < 1 or sorted(set(self.n_fact)) != list(self.n_fact):
            raise ConfigError(f"capacity.n_fact must be numbers from 1 in ascending order, got {self.n_fact}")


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Capacity,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure recall against the number of facts told.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and the ``maker`` of facts, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per question, by number of facts told, condition, document and fact asked for: see
        `memlm.evaluation.recall.asking.ask`. For metrics see `summarise`.
    """
    rows: list[Row] = []
    repetition = 0.0
    for i, n_fact in enumerate(cfg.n_fact):
        n_ask = min(n_fact, cfg.n_ask)
        told = Needle(
            n_document=cfg.n_document, n_fact=n_ask, n_other=n_fact - n_ask, distance=0,
            facts_per_segment=cfg.facts_per_segment, split=cfg.split, seed=cfg.seed, n_row=cfg.n_row,
        )  # fmt: skip
        show = part_of(progress, sum(cfg.n_fact[:i]), n_fact, sum(cfg.n_fact))
        found = run_needle(model, data, told, show, share)
        rows += [{"n_fact": n_fact} | {key: row[key] for key in row if key not in _FIXED} for row in found.rows]
        repetition = max(repetition, found.metadata["haystack_repetition"])
    n_byte = states.n_byte(model.init_state(1).memory)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document * min(cfg.n_fact[-1], cfg.n_ask),  # questions about the most facts
        "state_bytes": n_byte,
        "segment_len": model.segment_len,
        "haystack_repetition": repetition,  # above 1 a document repeats its text
        "memories": list(model.memory.keys()),
        "shared": is_shared(model),
        "headline": _headline(cfg.n_fact[-1]),
    }
    return Result("capacity", summarise(rows, n_byte), tuple(rows), metadata)


_FIXED = ("kind", "n_other", "distance")  # columns of the needle that say nothing here


def summarise(rows: Sequence[Row], n_byte: int) -> dict[str, float]:
    """Metrics of the rows.

    Args:
        rows: The rows.
        n_byte: Bytes of the state of one row of text.

    Returns:
        For each number of facts told those of `memlm.evaluation.recall.rates.rates`, ``.../<n_fact>``, with ``chance``
        1 / ``n_fact``; without a number: those of the most facts. ``capacity/<condition>``, and of the memory ``on``
        its strict one, ``capacity_strict/on``; ``censored/on`` and ``censored_strict/on``, 1 where these are lower
        bounds, else 0; ``state_bytes``; and ``facts_per_kb/on``, capacity per 1,024 bytes, NaN without any bytes.
    """
    n_facts = sorted({row["n_fact"] for row in rows})
    metrics: dict[str, float] = {}
    if not rows:
        return {}
    for n_fact in n_facts:
        own = rates([row for row in rows if row["n_fact"] == n_fact]) | {"chance": 1 / n_fact}
        metrics |= {**own, **{f"{name}/{n_fact}": value for name, value in own.items()}}
    held = [n_fact for n_fact in n_facts if above_controls(metrics, f"/{n_fact}")]
    for condition in CONDITIONS:
        counted = held if condition == "on" else n_facts
        metrics[f"capacity/{condition}"] = _largest(metrics, f"exact_match/{condition}", counted)
    metrics["capacity_strict/on"] = _largest(metrics, "low/on", held)
    for kind in ("", "_strict"):
        metrics[f"censored{kind}/on"] = float(metrics[f"capacity{kind}/on"] == n_facts[-1])
    metrics["state_bytes"] = n_byte
    metrics["facts_per_kb/on"] = metrics["capacity/on"] / (n_byte / 1024) if n_byte else float("nan")
    return metrics


def _largest(metrics: Mapping[str, float], name: str, n_facts: Sequence[int]) -> int:
    """The largest number of facts whose ``name`` reaches the threshold; 0 if none does."""
    return max((n_fact for n_fact in n_facts if metrics.get(f"{name}/{n_fact}", 0.0) >= THRESHOLD), default=0)


def _headline(most: int) -> list[dict[str, Any]]:
    """What the terminal's table and comparisons of runs show."""

    def plain(label: str, metric: str, control: bool = False) -> dict[str, Any]:
        none = dict.fromkeys(("low", "high", "n"))
        return {"label": label, "metric": metric, "percent": False, "better": "higher", "control": control} | none

    held = f"facts held at {100 * THRESHOLD:.0f} % recall"
    return [
        plain(f"{held} ({most:,}: or more)", "capacity/on"),
        plain(f"{held}, by the lower end of its interval", "capacity_strict/on"),
        *(plain(f"the same, {label}", f"capacity/{name}", control=True) for name, label in CONTROLS.items()),
        plain("facts held per KB of state", "facts_per_kb/on"),
        *recall_entries(f"{most:,} facts told, memory on"),
    ]


def plot(result: Result) -> dict[str, Figure]:
    """Recall against the number of facts told beside its controls, with the threshold and the capacity."""
    metrics = result.metrics
    n_facts = sorted({row["n_fact"] for row in result.rows})
    if not n_facts:
        return {}
    capacity, strict, density = (
        metrics[name] for name in ("capacity/on", "capacity_strict/on", "facts_per_kb/on")
    )  # fmt: skip
    with style():
        figure = Figure(figsize=(7.0, 4.8))
        axes = figure.subplots()
        axes.set_xscale("log")
        band = draw_rates(axes, metrics, n_facts)
        label = f"{100 * THRESHOLD:.0f} % recall"
        axes.axhline(THRESHOLD, color=PALETTE["black"], linewidth=1.2, linestyle=(0, (6, 3)), label=label)
        lines = {"capacity": (capacity, 7.0, 0.4), "by the interval's lower end": (strict, 2.0, 1.0)}
        for name, (held, width, alpha) in lines.items():
            if held:
                label = f"{name}: {_bound(held, n_facts[-1])}"
                axes.axvline(held, color=PALETTE["sky"], linewidth=width, alpha=alpha, zorder=1, label=label)
        title = f"Capacity: {_bound(capacity, n_facts[-1])} facts at {100 * THRESHOLD:.0f} % recall"
        if metrics["state_bytes"]:
            title += f"\n{density:.2g} per KB of state ({metrics['state_bytes'] / 1024:,.0f} KB)"
        axes.set(title=title, xlabel="facts told in the document")
        figure.legend(loc="outside lower center", ncols=2, title=band)
    return {"capacity": figure}


def _bound(held: float, most: int) -> str:
    """A capacity in words."""
    return f"at least {held:,.0f}" if held == most else f"{held:,.0f}"
