"""What happened during training, as a result with figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from memlm.analysis.efficiency import compute_memory_efficiency
from memlm.analysis.figures import gates, loss_curve, recall_curve, slot_use
from memlm.analysis.usage import slot_usage
from memlm.evaluation.result import Result
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData


def training_result(
    model: LanguageModel, data: TextData, history: Sequence[Mapping[str, Any]]
) -> tuple[Result, dict[str, Figure | None]]:
    """The history of a run, its cost, and its figures: loss, recall beside its controls, gates, and use of the slots.

    Args:
        model: The trained model.
        data: Its data; slots are shown as they are used on held-out text.
        history: All that was logged, one row per step and logger call.
    """
    figures = {
        "loss": loss_curve(history),
        "recall": recall_curve(history),
        "gates": gates(history),
        "slot_use": slot_use({name: dict(parts) for name, parts in slot_usage(model, data).items()}),
    }
    last: dict[str, Any] = {}
    for row in history:
        last |= {name: value for name, value in row.items() if value is not None}
    metrics = {k: v for k, v in last.items() if isinstance(v, float)}
    metrics["flops_per_token"] = float(compute_memory_efficiency(model).model.flops_per_token)
    return Result("training", metrics, tuple(map(dict, history))), figures
