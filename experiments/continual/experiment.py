"""Continual learning: what is left of a task when others were learned after it, with and without replay?

A small model is trained on four unlike tasks, one after the other, and asked all four after each. It is built and
trained here, with the settings of the model that is evaluated, whose weights play no part, by the same
`memlm.training.module.LanguageModeling` that trains every run: the same replay, the same consolidation.

The tasks share one vocabulary of words and symbols. ``prose``: the text of the data, next words. ``facts``: planted
facts of random words, told once and asked later. ``symbols``: multi-query associative recall (MQAR). ``stories``: bAbI
task 1. The last three stand in a filler of symbols, so that no text of ``prose`` comes back by itself.

Accuracies are those of the tokens that a task is about: all words of held-out prose; of the others the answers in
documents that were never trained. They make a matrix ``R[i][j]``, task j after i tasks. From it come, each a mean over
tasks: the final accuracy; forgetting, by how much a task once was better than it is at the end (Chaudhry et al. 2018);
backward transfer, what later tasks did to it, ``R[T][j] - R[j][j]``; forward transfer, what earlier tasks did for it,
``R[j-1][j] - R[0][j]`` (both Lopez-Paz and Ranzato 2017).

All conditions make equally many steps on equally many new rows; replay adds rows to each step. Sample efficiency is
what it takes on a task to reach the loss that a run with and one without replay both reach, the higher of their last
ones: in steps, and in rows trained on, replayed ones counted.

Sources: D. Lopez-Paz and M. Ranzato, "Gradient episodic memory for continual learning" (NeurIPS 2017);
A. Chaudhry et al., "Riemannian walk for incremental learning" (ECCV 2018); LMCODE's README claims that replay
"improves sample efficiency by ~20 %".

Shapes: T tasks, B rows, N tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.continual.settings import Continual
from experiments.continual.tasks import streams, vocabulary
from experiments.continual.training import train
from memlm.config import ConfigError
from memlm.evaluation.result import Result, Row
from memlm.models.base import LanguageModel
from memlm.statistics import interval

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

SCORES = {
    "final": "accuracy after all tasks",
    "learned": "accuracy right after its own training",
    "forgetting": "forgetting",
    "backward": "backward transfer",
    "forward": "forward transfer",
    "final_off": "accuracy after all tasks, reads off",
}


"""Metrics of a matrix, by what they are called."""
_RATES = ("final", "learned", "final_off")  # the others are differences of rates


def run(
    model: LanguageModel, data: TextData, cfg: Continual, progress: Callable[[float], None] | None = None
) -> Result:
    """Train one model per condition and seed on all tasks in turn; see above.

    Args:
        model: A language model with a memory that outlives documents (scope ``shared``); its settings are used.
        data: Its text is the task ``prose``.
        cfg: Settings.
        progress: Called now and then with the share that is done, in 0..1.

    Returns:
        One row per condition, seed, number of tasks trained (``after``) and task: accuracy, nats per token, both with
        reads off too, and the number of tokens. For metrics see `summarise` and `efficiency`.
        ``metadata["curves"]`` has steps, rows and nats per token of each task while it is trained.

    Raises:
        ConfigError: If the model has no shared memory, or ``retrieved`` none that keeps text.
    """
    from memlm.assemble import build_model

    shared = [name for name, modules in model.memory.items() if modules[0].scope == "shared"]
    if not shared:
        raise ConfigError(
            "continual needs a model with a memory that outlives documents, whose settings it trains: use "
            "recipe=continual, or scope=shared for a memory that has it"
        )
    tokenizer, texts = vocabulary(data, cfg)
    step = progress or (lambda _: None)
    config = model.config | {"data": {"tokenizer": {"n_vocab": None}}, "n_parameter": None}
    device, done, runs = model.head_weight.device, 0, {}
    n_run = len(cfg.seeds) * len(cfg.conditions)
    for seed in cfg.seeds:
        tasks = streams(tokenizer, texts, cfg, model.segment_len, seed)
        for condition in cfg.conditions:
            own = build_model(config | {"seed": seed}, tokenizer).to(device)
            own.train()

            def part(share: float, done: int = done) -> None:
                step((done + share) / n_run)

            runs[condition, seed] = train(own, tasks, cfg, condition, seed, part)
            done += 1
    rows = [row for trained in runs.values() for row in trained.rows]
    curves = {
        condition: {
            str(seed): {name: [list(point) for point in points] for name, points in trained.curves.items()}
            for (other, seed), trained in runs.items()
            if other == condition
        }
        for condition in cfg.conditions
    }
    metrics = summarise(rows) | efficiency(curves, cfg)
    for condition in cfg.conditions:
        counts = [float(trained.merged) for (other, _), trained in runs.items() if other == condition]
        metrics |= _over_seeds("merged", condition, counts, 0.0, math.inf)
    metadata = {
        "settings": asdict(cfg),
        "memory": {name: model.config["memory"][name] for name in model.config["memory"]},
        "shared": shared,
        "n_parameter": sum(parameter.numel() for parameter in own.parameters()),
        "n_vocab": tokenizer.vocab_size,
        "curves": curves,
        "headline": _headline(metrics, cfg),
    }
    return Result("continual", metrics, tuple(rows), metadata)


def matrix(rows: Sequence[Row], condition: str, seed: int, score: str = "accuracy") -> np.ndarray:
    """``R[i][j]``: ``score`` of task j after i tasks, (T + 1, T)."""
    part = [row for row in rows if row["condition"] == condition and row["seed"] == seed]
    names = list(dict.fromkeys(row["task"] for row in part))
    found = np.full((len(names) + 1, len(names)), np.nan)
    for row in part:
        found[row["after"], names.index(row["task"])] = row[score]
    return found


def scores(r: np.ndarray, off: np.ndarray) -> dict[str, float]:
    """`SCORES` of a matrix of accuracies (T + 1, T), and of the one with reads off; NaN where one task has none."""
    n = r.shape[1]
    own = r[np.arange(n) + 1, np.arange(n)]  # right after its own training
    found = {"final": r[n].mean(), "learned": own.mean(), "final_off": off[n].mean()}
    if n == 1:
        return found | dict.fromkeys(("forgetting", "backward", "forward"), math.nan)
    best = np.array([r[j + 1 : n, j].max() for j in range(n - 1)])
    return found | {
        "forgetting": (best - r[n, : n - 1]).mean(),
        "backward": (r[n, : n - 1] - own[: n - 1]).mean(),
        "forward": np.mean([r[j, j] - r[0, j] for j in range(1, n)]),
    }


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        ``<score>/<condition>``, the mean over seeds of `SCORES`, with ``low_``, ``high_`` (95 %, Student's t) and
        ``n_`` (seeds). ``accuracy/<condition>/<task>`` is that of the task after all of them.
    """
    metrics: dict[str, float] = {}
    for condition in dict.fromkeys(row["condition"] for row in rows):
        seeds = list(dict.fromkeys(row["seed"] for row in rows if row["condition"] == condition))
        every = [scores(matrix(rows, condition, s), matrix(rows, condition, s, "accuracy_off")) for s in seeds]
        for name in SCORES:
            least = 0.0 if name in _RATES else -1.0
            metrics |= _over_seeds(name, condition, [float(found[name]) for found in every], least, 1.0)
        last = max(row["after"] for row in rows)
        for task in dict.fromkeys(row["task"] for row in rows):
            values = [
                row["accuracy"]
                for row in rows
                if (row["condition"], row["task"], row["after"]) == (condition, task, last)
            ]
            metrics[f"accuracy/{condition}/{task}"] = float(np.mean(values))
    return metrics


def efficiency(curves: Mapping[str, Any], cfg: Continual) -> dict[str, float]:
    """What replay saves on the way to a loss, against the run without it of the same seed.

    Returns:
        ``saved_steps/<condition>`` and ``saved_rows/<condition>``: the share of steps, and of rows trained on, that
        replay saves on the first task, which no other task disturbs; negative where it costs more. With intervals over
        seeds. ``saved_steps/<condition>/<task>`` and ``saved_rows/...`` are the means of every task.
    """
    metrics: dict[str, float] = {}
    for condition, (policy, merge) in cfg.conditions.items():
        plain = next((name for name, of in cfg.conditions.items() if of == ("none", merge)), None)
        if policy == "none" or plain is None:
            continue
        for task in cfg.tasks:
            saved = [saving(curves[plain][seed][task], curves[condition][seed][task]) for seed in curves[condition]]
            for i, name in enumerate(("saved_steps", "saved_rows")):
                values = [each[i] for each in saved]
                metrics[f"{name}/{condition}/{task}"] = float(np.mean(values))
                if task == cfg.tasks[0]:
                    metrics |= _over_seeds(name, condition, values, -math.inf, 1.0)
    return metrics


def saving(plain: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Share of steps and of rows that ``other`` saves to reach a loss, both curves of (step, row, nll).

    The loss is the higher of their last ones, so that both reach it. It is reached where the straight line between two
    measurements first meets it; before the first measurement a curve is unknown, and it counts as reached there.
    """
    target = max(plain[-1][2], other[-1][2])

    def reached(curve: Sequence[Sequence[float]]) -> tuple[float, float]:
        i = next(i for i, point in enumerate(curve) if point[2] <= target)
        if i == 0:
            return curve[0][0], curve[0][1]
        (step, row, nll), (to_step, to_row, to_nll) = curve[i - 1], curve[i]
        part = (nll - target) / (nll - to_nll)
        return step + part * (to_step - step), row + part * (to_row - row)

    (steps, rows), (own_steps, own_rows) = reached(plain), reached(other)
    return 1 - own_steps / steps, 1 - own_rows / rows


def _over_seeds(name: str, condition: str, values: Sequence[float], least: float, most: float) -> dict[str, float]:
    mean, low, high = interval(values, least, most)
    key = f"{name}/{condition}"
    return {key: mean, f"low_{key}": low, f"high_{key}": high, f"n_{key}": len(values)}


def _headline(metrics: Mapping[str, float], cfg: Continual) -> list[dict[str, Any]]:
    """Final accuracy and forgetting of every condition beside those without replay; then what replay saves."""

    def entry(name: str, condition: str, label: str, control: bool, better: str, percent: bool) -> dict[str, Any]:
        key = f"{name}/{condition}"
        return {
            "label": label, "metric": key, "low": f"low_{key}", "high": f"high_{key}", "n": f"n_{key}",
            "percent": percent, "better": better, "control": control,
        }  # fmt: skip

    entries = []
    plain = ("none", min(cfg.consolidate))  # what the others are compared with
    for name, better in {"final": "higher", "forgetting": "lower"}.items():
        for condition, of in cfg.conditions.items():
            entries.append(entry(name, condition, f"{SCORES[name]}, {condition}", of == plain, better, name == "final"))
    entries += [
        entry("final_off", condition, f"{SCORES['final_off']}, {condition}", True, "higher", True)
        for condition in cfg.conditions
    ]
    for condition, (policy, _) in cfg.conditions.items():
        if policy != "none" and f"saved_steps/{condition}" in metrics:
            entries += [
                entry(f"saved_{unit}", condition, f"share of {unit} saved on {cfg.tasks[0]}, {condition}",
                      False, "higher", False)
                for unit in ("steps", "rows")
            ]  # fmt: skip
    return [each for each in entries if not math.isnan(metrics[each["metric"]])]
