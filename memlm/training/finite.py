"""Numbers that must stay finite: a run that has lost them ends with a sentence, and is not saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memlm.checkpoint import FOLDER
from memlm.models.base import LanguageModel


class NonFiniteLoss(ValueError):
    """The loss or the weights became infinite or NaN."""


def check_loss(total: Tensor, losses: Mapping[str, Tensor], model: LanguageModel, step: int, run: Path) -> None:
    """Raise if a loss is not finite.

    Args:
        total: The loss.
        losses: What it is the sum of.
        model: What is trained.
        step: Steps made.
        run: The run directory.

    Raises:
        NonFiniteLoss: Says which losses and weights are not finite, and what to do.
    """
    if torch.isfinite(total):
        return
    bad = [name for name, value in losses.items() if not torch.isfinite(value)]
    weights = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    where = f"; weights that are not finite: {', '.join(weights[:5])}" if weights else "; all weights are finite"
    raise NonFiniteLoss(f"the loss is not finite at step {step}: {', '.join(bad)}{where}. {_advice(run)}")


def check_saved(checkpoint: Mapping[str, Any], model: LanguageModel, step: int, run: Path) -> None:
    """Raise if what is to be saved can never be trained or read again.

    Args:
        checkpoint: What is to be saved.
        model: The model in it. If its layers are dealt out, every process has to ask.
        step: Steps made.
        run: The run directory.

    Raises:
        NonFiniteLoss: Says which weights are not finite, and what to do.
    """
    bad = [name for name, value in model.named_parameters() if not _finite(value)]
    bad += [name for name, value in model.named_buffers() if value.is_floating_point() and value.isnan().any()]
    for optimizer in checkpoint.get("optimizer_states", []):
        parts = [value for entry in optimizer.get("state", {}).values() for value in entry.values()]
        if not all(torch.isfinite(value).all() for value in parts if isinstance(value, Tensor)):
            bad.append("the state of the optimizer")
    if bad:
        raise NonFiniteLoss(
            f"the update of step {step} left numbers that are not finite: {', '.join(bad[:5])}. {_advice(run)}"
        )


def _advice(run: Path) -> str:
    """What to do about numbers that are not finite."""
    folder = run / FOLDER
    kept = "The last good checkpoint is kept. " if folder.is_dir() and any(folder.glob("*.ckpt")) else ""
    return f"{kept}Lower training.lr, or set trainer.gradient_clip_val or trainer.precision=32-true"


def _finite(weight: Tensor) -> bool:
    """Whether all numbers of a weight are finite. If it is dealt out, every process has to ask."""
    finite = torch.isfinite(weight).all()
    return bool(finite.full_tensor() if isinstance(finite, DTensor) else finite)
