"""Next-token loss without the logits of a whole batch in memory.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ON_CPU, _ON_GPU = 256, 4096  # tokens whose logits exist at a time: what a cache holds, what keeps a GPU busy
_LINE, _SHIFT = 64, 16  # rows of logits begin on cache lines, but not a power of two apart: those share cache sets


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of a linear head, chunk by chunk; gradients are made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        n_token, n_vocab = hidden.shape[0], head.shape[0]
        nll = torch.empty(n_token, dtype=torch.float32, device=hidden.device)
        size, n_column = min(_ON_CPU, n_token), -(-n_vocab // _LINE) * _LINE
        if hidden.is_cuda:  # its fast matrix products want sizes that are a multiple of some power of two
            size, head = min(_ON_GPU, n_token), F.pad(head, (0, 0, 0, n_column - n_vocab))
        else:
            n_column += _SHIFT
        buffer = hidden.new_empty(size, n_column)[:, : len(head)]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head) if needs_head else None
        rows = _compiled() if compiled else _rows_in_place
        for start in range(0, n_token, size):
            part = slice(start, start + size)
            logits = torch.mm(hidden[part], head.T, out=buffer[: len(targets[part])])  # (chunk, V)
            logits[:, n_vocab:] = -torch.inf
            nll[part], grad = rows(logits, targets[part, None], weight[part, None], needs_hidden or needs_head)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
            if grad_head is not None:
                grad_head.addmm_(grad.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_head if grad_head is None else grad_head[:n_vocab])
        ctx.mark_non_differentiable(nll)
        return (nll * weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_nll: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = [None if grad is None else grad * grad_loss for grad in (grad_hidden, grad_head)]
        return scaled[0], scaled[1], None, None, None


def _rows_in_place(logits: Tensor, target: Tensor, weight: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Losses (N,) of logits (N, V), and the gradient of their weighted sum, (N, V).

    In place and pass by pass: faster on a CPU than a fused softmax that needs memory of its own.
    """
    grad = logits.float()
    grad -= grad.amax(dim=1, keepdim=True)
    right = grad.gather(1, target)
    total = grad.exp_().sum(dim=1, keepdim=True)
    if needs_grad:
        grad = grad.mul_(weight / total).scatter_add_(1, target, -weight).to(logits.dtype)
    return (total.log() - right)[:, 0], grad


def _rows(logits: Tensor, target: Tensor, weight: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """The same in a form that a compiler makes a single pass of."""
    shifted = logits.float()
    shifted = shifted - shifted.amax(dim=1, keepdim=True)
    likely = shifted.exp()
    total = likely.sum(dim=1, keepdim=True)
    right = torch.arange(logits.shape[1], device=logits.device) == target
    grad = (likely / total - right.float()) * weight
    return (total.log() - shifted.gather(1, target))[:, 0], grad.to(logits.dtype)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_rows)


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses of a linear head; see `naive_linear_cross_entropy`, which it equals.

    Args:
        hidden: (..., D).
        head: (V, D).
        targets: (...), token ids.
        weight: (...), float.
        compiled: Whether the passes over logits go through torch.compile.

    Returns:
        ``sum(weight * nll)``, a scalar in nats with gradients for ``hidden`` and ``head``; and ``nll`` (...), without.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    loss, nll = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), head, targets.flatten(), weight.flatten().float(), compiled
    )
    return loss, nll.view_as(targets)


def token_nll(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each target (B, N), without gradients, from last hidden states (B, N, D)."""
    with torch.no_grad():
        weight = torch.ones_like(targets, dtype=torch.float32)
        return linear_cross_entropy(hidden, model.head_weight, targets, weight)[1]


def linear_divergence(hidden: Tensor, teacher: Tensor, head: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the Kullback-Leibler divergence, in nats, from what a teacher predicts to what a model does.

    Args:
        hidden: Last hidden states of the model, (N, D), with gradients.
        teacher: Those of the teacher, (N, D), under the same head.
        head: (V, D).
        weight: (N,).
    """
    own, wanted = (F.linear(part, head).float().log_softmax(dim=-1) for part in (hidden, teacher.detach()))
    return (F.kl_div(own, wanted.detach(), reduction="none", log_target=True).sum(dim=-1) * weight).sum()


def naive_linear_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `linear_cross_entropy`."""
    logits = F.linear(hidden, head).float().flatten(0, -2)
    nll = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
    return (nll * weight).sum(), nll.detach()
