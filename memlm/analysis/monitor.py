"""A record of what memories do, step by step: by hand, or as a callback of training."""

from __future__ import annotations

import math
import statistics
from os import PathLike
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from memlm.analysis.figures import memory_curves
from memlm.analysis.usage import banks, memory_numbers
from memlm.config import whole
from memlm.files import from_home
from memlm.models.base import LanguageModel


class MemoryMonitor(Callback):
    """Records numbers about memories: gates, read weights, entropies, and how full the banks are.

    By hand: ``monitor.record_step(step, model(ids))``. In training: one of a trainer's callbacks; it then keeps what
    `memlm.training.module.LanguageModeling` logs of its memories, whenever that logs.

    Args:
        model: The model whose outputs are recorded; not needed as a callback.

    Attributes:
        history: One row per recorded step, as `memlm.analysis.figures` draws them.
    """

    def __init__(self, model: LanguageModel | None = None) -> None:
        if model is not None and not isinstance(model, LanguageModel):
            raise ValueError(f"model is a {type(model).__name__}: give a language model, or nothing")
        self.model = model
        self.history: list[dict[str, Any]] = []

    def record_step(self, step: int, outputs: Any) -> dict[str, float]:
        """Record what the memories did in a call.

        Args:
            step: Number of the step.
            outputs: What the model returned.

        Returns:
            What was recorded: see `memlm.analysis.usage.memory_numbers`, and ``memory/<bank>/filled``, the share of
            slots that hold something (if the state was carried).

        Raises:
            ValueError: If the step was recorded before or is no whole number, or ``outputs`` is no output of the model.
        """
        if self.model is None:
            raise ValueError("record_step needs the model: make the monitor with MemoryMonitor(model)")
        if not hasattr(outputs, "reads") or not hasattr(outputs, "trace"):
            raise ValueError(f"outputs is a {type(outputs).__name__}: give what model(ids) returned")
        step = whole("step", step)
        numbers = {name: value.item() for name, value in memory_numbers(outputs).items()}
        if outputs.state is not None:
            for label, (module, part) in banks(self.model, outputs.state).items():
                numbers[f"memory/{label}/filled"] = module.filled(part).float().mean().item()
        self._add(step, numbers)
        return numbers

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record what the module has logged of its memories."""
        step = trainer.global_step
        if step % trainer.log_every_n_steps or (self.history and self.history[-1]["step"] == step):  # type: ignore[attr-defined]
            return
        numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("memory/")}
        if numbers:
            self._add(step, numbers)

    def get_statistics(self) -> dict[str, dict[str, float]]:
        """Of each number: ``mean``, ``min``, ``max``, ``last`` and ``n``, over the steps where it is a number."""
        found = {}
        for name in dict.fromkeys(name for row in self.history for name in row if name != "step"):
            values = [row[name] for row in self.history if not math.isnan(row.get(name, math.nan))]
            if values:
                found[name] = {
                    "mean": statistics.fmean(values), "min": min(values), "max": max(values), "last": values[-1],
                    "n": len(values),
                }  # fmt: skip
        return found

    def plot_history(self, path: str | PathLike[str] | None = None) -> Figure | None:
        """Draw all numbers over steps, one panel for each kind; None if nothing was recorded.

        Args:
            path: Where to write the figure too; the ending says the format.
        """
        figure = memory_curves(self.history)
        if figure is not None and path is not None:
            path = from_home(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        return figure

    def state_dict(self) -> dict[str, Any]:
        """The history, for a checkpoint."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a checkpoint."""
        self.history = list(state_dict["history"])

    def _add(self, step: int, numbers: dict[str, float]) -> None:
        if self.history and step <= self.history[-1]["step"]:
            raise ValueError(f"step {step} comes after step {self.history[-1]['step']} was recorded: steps must ascend")
        self.history.append({"step": step, **numbers})
