"""Next-token loss without the logits of a whole batch in memory.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 256  # tokens whose logits exist at a time
_LINE, _SHIFT = 64, 16  # rows of logits begin on cache lines, but not a power of two apart: those share cache sets


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of a linear head, chunk by chunk; gradients are made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        n_token, n_vocab = hidden.shape[0], head.shape[0]
        nll = torch.empty(n_token, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head) if needs_head else None
        n_column = -(-n_vocab // _LINE) * _LINE + _SHIFT
        buffer = hidden.new_empty(min(_CHUNK, n_token), n_column)[:, :n_vocab]
        for start in range(0, n_token, _CHUNK):
            part = slice(start, start + _CHUNK)
            target, scale = targets[part, None], weight[part, None]
            logits = torch.mm(hidden[part], head.T, out=buffer[: len(target)])  # (chunk, V)
            # In place and pass by pass: faster on a CPU than a fused softmax that needs memory of its own.
            grad = logits.float()
            grad -= grad.amax(dim=1, keepdim=True)
            right = grad.gather(1, target)
            total = grad.exp_().sum(dim=1, keepdim=True)
            nll[part] = (total.log() - right)[:, 0]
            if needs_hidden or needs_head:
                grad = grad.mul_(scale / total).scatter_add_(1, target, -scale).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, head, out=grad_hidden[part])
                if grad_head is not None:
                    grad_head.addmm_(grad.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(nll)
        return (nll * weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = [None if grad is None else grad * grad_loss for grad in (grad_hidden, grad_head)]
        return scaled[0], scaled[1], None, None


def linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses of a linear head; see `naive_linear_cross_entropy`, which it equals.

    Args:
        hidden: (..., D).
        head: (V, D).
        targets: (...), token ids.
        weight: (...), float.

    Returns:
        ``sum(weight * nll)``, a scalar in nats with gradients for ``hidden`` and ``head``; and ``nll`` (...), without.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    loss, nll = _LinearCrossEntropy.apply(hidden.flatten(0, -2), head, targets.flatten(), weight.flatten().float())
    return loss, nll.view_as(targets)


def token_nll(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each target (B, N), without gradients, from last hidden states (B, N, D)."""
    with torch.no_grad():
        weight = torch.ones_like(targets, dtype=torch.float32)
        return linear_cross_entropy(hidden, model.head_weight, targets, weight)[1]


def naive_linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `linear_cross_entropy`."""
    logits = F.linear(hidden, head).float().flatten(0, -2)
    nll = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
    return (nll * weight).sum(), nll.detach()
