"""AdamW with a warm-up and a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from memlm.training.settings import Training


def make_optimizer(model: nn.Module, settings: Training, n_step: int) -> dict[str, Any]:
    """AdamW with decay groups; linear warm-up, then a cosine.

    Args:
        model: What is trained.
        settings: How.
        n_step: Length of the cosine.

    Returns:
        What ``configure_optimizers`` of a LightningModule returns.
    """
    optimizer = torch.optim.AdamW(decay_groups(model, settings.weight_decay), lr=settings.lr, betas=settings.betas)
    warmup, floor = min(settings.warmup_steps, n_step), settings.min_lr_ratio

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        part = min((step - warmup) / max(n_step - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight matrices are decayed, the rest (and embeddings) is not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def number_by_place(
    parameters: Iterable[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], contents: list[dict[str, Any]]
) -> None:
    """Number parameters by their place in the model, not in the optimizer: as layers that are dealt out expect.

    Args:
        parameters: Those of the model.
        optimizers: What trains them.
        contents: The state of each optimizer, which is changed.
    """
    place = {id(p): i for i, p in enumerate(parameters)}
    for optimizer, content in zip(optimizers, contents, strict=True):
        places = [[place[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        flat = [i for group in places for i in group]
        content["state"] = {flat[i]: entry for i, entry in content["state"].items()}
        content["param_groups"] = [
            group | {"params": numbers} for group, numbers in zip(content["param_groups"], places, strict=True)
        ]
