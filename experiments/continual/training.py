"""The training of `continual`: one model through all tasks in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.continual.settings import Continual
from experiments.continual.tasks import Stream, measure
from memlm.evaluation.result import Row
from memlm.models.base import LanguageModel


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


def train(
    model: LanguageModel,
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

    from memlm.training.module import LanguageModeling
    from memlm.training.replay import Replay
    from memlm.training.settings import Training
    from memlm.training.told import quiet

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
