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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.base import PALETTE, Result, Row, check_settings, evaluating, mean_interval, style
from memlm.config import ConfigError

Task = Literal["prose", "facts", "symbols", "stories"]
Policy = Literal["none", "reservoir", "surprise", "retrieved"]

TASKS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "prose": (None, {}),
    "facts": ("memlm.data.facts.Facts", {"items": 4}),
    "symbols": ("memlm.data.mqar.MQAR", {"n_pair": 16}),
    "stories": ("memlm.data.babi.Babi", {"items": 6, "tasks": [1], "stories": 1}),
}
"""By name, what makes a task's documents (None for text as it is), and its settings."""

SCORES = {
    "final": "accuracy after all tasks",
    "learned": "accuracy right after its own training",
    "forgetting": "forgetting",
    "backward": "backward transfer",
    "forward": "forward transfer",
    "final_off": "accuracy after all tasks, reads off",
}
"""Metrics of a matrix, by what they are called."""

_N_SYMBOL = 64
_HELD_OUT = 1_000_003  # added to the seed of documents that are only asked
_COLORS = {"none": "green", "reservoir": "blue", "surprise": "orange", "retrieved": "vermillion"}


@dataclass(frozen=True)
class Continual:
    """Settings.

    Attributes:
        tasks: What is trained, in this order; at least 1. With one there is nothing to forget, only sample efficiency.
        replay: Policies of `memlm.training.replay.Replay`, and ``none``, with which they are compared.
        consolidate: Whether memories are consolidated every ``consolidate_every`` steps; both by default.
        seeds: One run of every condition for each.
        n_step: Steps per task.
        n_row: New rows of a step.
        n_segment: Segments of a row.
        lr: Learning rate, constant after the warm-up.
        ratio: Rows replayed per new row.
        capacity: Windows that the replay buffer keeps.
        consolidate_every: Steps from one consolidation to the next.
        n_check: Measurements of a task while it is trained, for sample efficiency.
        n_batch: Held-out batches that a measurement takes, of ``n_row`` rows each.
        n_word: Most words of the vocabulary, symbols included.

    Raises:
        ConfigError: If a setting cannot work.
    """

    tasks: Sequence[Task] = ("prose", "facts", "symbols", "stories")
    replay: Sequence[Policy] = ("none", "reservoir", "retrieved")
    consolidate: Sequence[bool] = (False, True)
    seeds: Sequence[int] = (0, 1, 2)
    n_step: int = 120
    n_row: int = 6
    n_segment: int = 4
    lr: float = 3e-3
    ratio: float = 0.25
    capacity: int = 512
    consolidate_every: int = 25
    n_check: int = 10
    n_batch: int = 4
    n_word: int = 2000

    def __post_init__(self) -> None:
        for name, choices in {"tasks": get_args(Task), "replay": get_args(Policy), "consolidate": (False, True),
                              "seeds": None}.items():  # fmt: skip
            given = list(getattr(self, name))
            object.__setattr__(self, name, tuple(given))
            wrong = [value for value in given if choices is not None and value not in choices]
            if not given or wrong or len(set(given)) < len(given):
                among = f" among {', '.join(map(str, choices))}" if choices is not None else ""
                raise ConfigError(f"continual.{name} must be a list of different ones{among}, got {given}")
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"continual.ratio must be in (0, 1], got {self.ratio}; for no replay use replay=[none]")
        if not self.lr > 0:
            raise ConfigError(f"continual.lr must be above 0, got {self.lr}")
        least = {"n_step": 1, "n_row": 1, "n_segment": 2, "capacity": 1, "consolidate_every": 1, "n_check": 1,
                 "n_batch": 1, "n_word": _N_SYMBOL + 2}  # fmt: skip
        check_settings(self, least)
        if min(self.seeds) < 0:
            raise ConfigError(f"continual.seeds must not be negative, got {list(self.seeds)}")
        if self.n_step < self.n_check:
            raise ConfigError(f"continual.n_check must be at most continual.n_step ({self.n_step}), got {self.n_check}")

    @property
    def conditions(self) -> dict[str, tuple[str, bool]]:
        """Policy and whether memories are consolidated, by name."""
        return {
            f"{policy}{'+consolidation' if merge else ''}": (policy, merge)
            for merge in self.consolidate
            for policy in self.replay
        }


class Stream(NamedTuple):
    """One task.

    Attributes:
        train: Batches by step.
        held_out: Batches that are only asked.
    """

    train: Any
    held_out: list[Any]


class Point(NamedTuple):
    """The task in training, measured on its way.

    Attributes:
        step: Steps on it so far.
        row: Rows trained on for it so far, replayed ones counted.
        nll: Nats per token it is about.
    """

    step: int
    row: int
    nll: float


class Trained(NamedTuple):
    """One run.

    Attributes:
        rows: One per task and number of tasks trained; see `run`.
        curves: By task, how it went while it was trained.
        merged: Slots that consolidation merged.
    """

    rows: list[Row]
    curves: dict[str, list[Point]]
    merged: int


# --- data ------------------------------------------------------------------------------------------------------------


def vocabulary(data: Any, cfg: Continual) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of words and symbols, and with it the text of ``data`` (``train``, ``val``) and ``symbols``."""
    from memlm.data.corpus import Symbols
    from memlm.data.tokenizer import train_tokenizer
    from memlm.data.tokens import tokenize

    symbols = Symbols(_N_SYMBOL)
    documents = [*data.corpus.documents("train"), *symbols.documents("train")]
    tokenizer = train_tokenizer("word", documents, cfg.n_word)
    texts = {split: tokenize(data.corpus, tokenizer, split, data.cache_dir) for split in ("train", "val")}
    return tokenizer, texts | {"symbols": tokenize(symbols, tokenizer, "train", data.cache_dir)}


def streams(tokenizer: Any, texts: Mapping[str, Any], cfg: Continual, segment_len: int, seed: int) -> dict[str, Stream]:
    """The tasks by name, as `vocabulary` tokenised them."""
    from memlm.config import instantiate
    from memlm.data.curriculum import Curriculum
    from memlm.data.stream import TrainingBatches, ValidationBatches

    found: dict[str, Stream] = {}
    for name in cfg.tasks:
        target, settings = TASKS[name]
        phase = {"steps": cfg.n_step, "n_row": cfg.n_row, "n_segment": cfg.n_segment}
        node = None if target is None else {"_target_": target}
        curriculum = Curriculum([phase if node is None else phase | {"task": settings}], node)
        own = texts["symbols" if name == "symbols" else "train"]
        task = None if node is None else instantiate(node, "continual.tasks", tokenizer=tokenizer, train=own)
        filler = texts["train" if node is None else "symbols"]

        def batches(seed: int, filler: Any = filler, curriculum: Any = curriculum, task: Any = task) -> TrainingBatches:
            return TrainingBatches(filler, segment_len, tokenizer.pad_id, curriculum, task, cfg.n_step, seed)

        if node is None:
            held = ValidationBatches(texts["val"], segment_len, tokenizer.pad_id, cfg.n_row, cfg.n_segment)
            asked = [held[i] for i in range(min(cfg.n_batch, len(held)))]
        else:
            other = batches(seed + _HELD_OUT)
            asked = [other[i] for i in range(min(cfg.n_batch, cfg.n_step))]
        found[name] = Stream(batches(seed), asked)
    return found


# --- training --------------------------------------------------------------------------------------------------------


def train(
    model: Any,
    tasks: Mapping[str, Stream],
    cfg: Continual,
    condition: str,
    seed: int,
    progress: Callable[[float], None],
) -> Trained:
    """Train a model on one task after the other, and measure all after each."""
    import lightning
    import torch
    from lightning.pytorch.loggers.logger import Logger
    from torch.utils.data import DataLoader, Dataset

    from memlm.training.fit import quiet
    from memlm.training.module import LanguageModeling
    from memlm.training.replay import Replay
    from memlm.training.settings import Training

    policy, merge = cfg.conditions[condition]
    names, total = list(tasks), cfg.n_step * len(tasks)
    rows: list[Row] = []
    curves: dict[str, list[Point]] = {name: [] for name in names}
    marks = {round(cfg.n_step * (i + 1) / cfg.n_check) for i in range(cfg.n_check)}
    merged = n_replayed = 0

    class Steps(Dataset[Any]):
        def __len__(self) -> int:
            return total

        def __getitem__(self, step: int) -> Any:
            index, within = divmod(step, cfg.n_step)
            return tasks[names[index]].train[within]._replace(step=step)

    class Counted(Replay):
        def draw(self, batch: Any, *arguments: Any) -> Any:
            nonlocal n_replayed
            drawn = super().draw(batch, *arguments)
            n_replayed += 0 if drawn is None else len(drawn[1])
            return drawn

    class Merged(Logger):
        """Keeps what consolidation reports."""

        name, version = "continual", 0

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            nonlocal merged
            merged += int(sum(value for name, value in metrics.items() if name.endswith("/merged")))

        def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
            """Nothing is kept of them."""

    def ask_all(after: int) -> None:
        for name, stream in tasks.items():
            (accuracy, nll, n), (off, nll_off, _) = (measure(model, stream.held_out, read) for read in (True, False))
            rows.append({"condition": condition, "seed": seed, "after": after, "task": name, "n": n,
                         "accuracy": accuracy, "nll": nll, "accuracy_off": off, "nll_off": nll_off})  # fmt: skip

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            nonlocal n_replayed
            index, within = divmod(trainer.global_step - 1, cfg.n_step)
            name, step = names[index], within + 1
            if step in marks:
                nll = measure(model, tasks[name].held_out)[1]
                curves[name].append(Point(step, step * cfg.n_row + n_replayed, nll))
                progress(trainer.global_step / total)
            if step == cfg.n_step:
                ask_all(index + 1)
                n_replayed = 0

    settings = Training(
        lr=cfg.lr, min_lr_ratio=1.0, warmup_steps=20, consolidate_every=cfg.consolidate_every if merge else None
    )
    replay = None if policy == "none" else Counted(policy, cfg.ratio, cfg.capacity, seed)  # type: ignore[arg-type]
    module = LanguageModeling(model, settings, seed=seed, replay=replay)
    ask_all(0)
    with quiet():
        trainer = lightning.Trainer(
            max_steps=total,
            accelerator="cuda" if model.head_weight.is_cuda else "cpu",
            devices=1,
            logger=Merged(),
            callbacks=[Watch()],
            gradient_clip_val=1.0,
            log_every_n_steps=total + 1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with torch.random.fork_rng(devices=[]):
            trainer.fit(module, DataLoader(Steps(), batch_size=None))
    return Trained(rows, curves, merged)


def measure(model: Any, batches: Sequence[Any], read: bool = True) -> tuple[float, float, int]:
    """Accuracy, nats per token and number of the tokens that ``batches`` are about: answers, or else all."""
    from torch.nn import functional as F

    right, nll, n, state = 0, 0.0, 0, None
    device = model.head_weight.device
    with evaluating(model):
        for batch in batches:
            flags = {
                name: None if flag is None else flag.to(device)
                for name, flag in (("reset", batch.reset), ("breaks", batch.breaks), ("mask", batch.mask))
            }
            state = None if batch.fresh else state
            out = model(batch.ids.to(device), state=state, read=read, logits=False, **flags)
            state = out.state
            asked = (batch.answer if bool(batch.answer.any()) else batch.weight > 0).to(device)
            logits, target = model.head(out.hidden[asked]), batch.targets.to(device)[asked]
            nll += float(F.cross_entropy(logits, target, reduction="sum"))
            right += int((logits.argmax(dim=-1) == target).sum())
            n += len(target)
    return right / max(n, 1), nll / max(n, 1), n


def run(model: Any, data: Any, cfg: Continual, progress: Callable[[float], None] | None = None) -> Result:
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
    from memlm.build import build_model

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
        metrics |= _over_seeds("merged", condition, counts)
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


# --- what it says ----------------------------------------------------------------------------------------------------


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
            metrics |= _over_seeds(name, condition, [float(found[name]) for found in every])
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
                    metrics |= _over_seeds(name, condition, values)
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


def _over_seeds(name: str, condition: str, values: Sequence[float]) -> dict[str, float]:
    mean, half = mean_interval(values)
    key = f"{name}/{condition}"
    return {key: mean, f"low_{key}": mean - half, f"high_{key}": mean + half, f"n_{key}": len(values)}


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


# --- figures ---------------------------------------------------------------------------------------------------------


def plot(result: Result) -> dict[str, Figure]:
    """Accuracy matrices; scores by condition; and the loss of the first task by steps and by rows."""
    settings = result.metadata["settings"]
    cfg = Continual(**settings)
    figures = {"efficiency": _efficiency_figure(result, cfg)}
    if len(cfg.tasks) > 1:
        figures = {"matrices": _matrices(result, cfg), "scores": _scores_figure(result, cfg)} | figures
    return figures


def _matrices(result: Result, cfg: Continual) -> Figure:
    """Heat map of R, the mean over seeds, for each condition."""
    n_column, n_line = len(cfg.replay), len(cfg.consolidate)
    with style():
        figure = Figure(figsize=(3.6 * n_column + 1, 3.4 * n_line + 0.6))
        panels = figure.subplots(n_line, n_column, squeeze=False, sharex=True, sharey=True)
        for panel, condition in zip(panels.flat, cfg.conditions, strict=True):
            r = np.mean([matrix(result.rows, condition, seed) for seed in cfg.seeds], axis=0)
            image = panel.imshow(r, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (i, j), value in np.ndenumerate(r):
                panel.text(
                    j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.6 else "black"
                )
            panel.set(title=condition)
            panel.set_xticks(range(len(cfg.tasks)), cfg.tasks)
            panel.set_yticks(range(len(cfg.tasks) + 1), ["before any", *(f"after {name}" for name in cfg.tasks)])
            panel.grid(False)
        bar = figure.colorbar(image, ax=panels.ravel().tolist(), label="accuracy, mean over seeds")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        panels[-1, n_column // 2].set_xlabel("task that is asked")
    return figure


def _scores_figure(result: Result, cfg: Continual) -> Figure:
    """Final accuracy, forgetting and backward transfer of each condition; lines: 95 % intervals over seeds."""
    names = list(cfg.conditions)
    with style():
        figure = Figure(figsize=(11, 0.42 * len(names) + 1.8))
        panels = figure.subplots(1, 3, sharey=True)
        for panel, name in zip(panels, ("final", "forgetting", "backward"), strict=True):
            value, low, high = (
                np.array([result.metrics[f"{end}{name}/{condition}"] for condition in names])
                for end in ("", "low_", "high_")
            )
            bars = panel.barh(
                range(len(names)), value, xerr=np.nan_to_num([value - low, high - value]), capsize=3,
                color=[PALETTE[_COLORS[policy]] for policy, _ in cfg.conditions.values()],
            )  # fmt: skip
            for bar, (_, merge) in zip(bars, cfg.conditions.values(), strict=True):
                bar.set_alpha(0.5 if merge else 1.0)
            panel.axvline(0, color=PALETTE["black"], linewidth=0.8)
            panel.set(title=SCORES[name], xlabel=f"mean over tasks, {len(cfg.seeds)} seeds")
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
    return figure


def _efficiency_figure(result: Result, cfg: Continual) -> Figure:
    """Loss of the first task, while it is trained, by steps and by rows, each seed a line."""
    with style():
        figure = Figure(figsize=(9, 3.8))
        panels = figure.subplots(1, 2, sharey=True)
        for policy, merge in cfg.conditions.values():
            if merge and False in cfg.consolidate:
                continue
            condition = next(name for name, of in cfg.conditions.items() if of == (policy, merge))
            for i, curves in enumerate(_curves_of(result, condition, cfg.tasks[0])):
                for axis, panel in enumerate(panels):
                    panel.plot(
                        [point[axis] for point in curves], [point[2] for point in curves], linewidth=1.2,
                        color=PALETTE[_COLORS[policy]], label=condition if i == 0 and axis == 0 else None,
                    )  # fmt: skip
        panels[0].set(ylabel=f"nats per token of held-out {cfg.tasks[0]}", xlabel="steps")
        panels[1].set(xlabel="rows trained on, replayed ones counted")
        figure.legend(loc="outside lower center", ncols=len(cfg.replay), title="each line: one seed")
    return figure


def _curves_of(result: Result, condition: str, task: str) -> Iterator[Sequence[Sequence[float]]]:
    return (curves[task] for curves in result.metadata["curves"][condition].values())
