"""Gradients of a model's parameters, compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a random sum of ``logits``, by parameter."""
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    parts = torch.autograd.grad((logits * probe).sum(), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), parts, strict=True))


def same_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Each differs by at most ``tolerance`` of its greatest magnitude in ``b``."""
    assert a.keys() == b.keys()
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], atol=tolerance * float(b[name].abs().max()), rtol=0, msg=name)
