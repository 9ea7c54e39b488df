"""The next-token loss where few targets count."""

from types import SimpleNamespace

import pytest
import torch

from memlm.data.stream import Batch
from memlm.training import objective
from memlm.training.loss import naive_linear_cross_entropy
from memlm.training.objective import Objective


def losses_of(share, monkeypatch):
    """Loss, losses of tokens and rows, gradients; the same by definition; and how many targets the head met."""
    torch.manual_seed(0)
    n_row, n_token = 5, 40
    hidden = torch.randn(n_row, n_token, 8, requires_grad=True)
    head = torch.randn(30, 8, requires_grad=True)
    answer = torch.rand(n_row, n_token) < share
    targets = torch.randint(30, (n_row, n_token))
    batch = Batch(targets, targets, answer.float(), answer, None, None, None, True, True, 0)
    met = []

    def counting(hidden, head, targets, *rest, **more):
        met.append(targets.numel())
        return counted(hidden, head, targets, *rest, **more)

    counted = objective.linear_cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(objective, "linear_cross_entropy", counting)
        model = SimpleNamespace(head_weight=head, memory={}, distill=0.0)
        total = answer.sum() * 5.0 if share else torch.tensor(1.0)
        losses, nll, by_row = Objective(model, 5.0).losses(batch, SimpleNamespace(hidden=hidden, trace={}), total)
    loss = losses["next-token loss"]
    found = (loss.detach(), nll, by_row, *torch.autograd.grad(loss, [hidden, head]))
    weight = answer * 5.0
    loss, nll = naive_linear_cross_entropy(hidden, head, targets, weight / total)
    by_row = (nll * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    expected = (loss.detach(), nll, by_row, *torch.autograd.grad(loss, [hidden, head]))
    return found, expected, answer, met[0]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.8, 1.0])
def test_the_loss_is_that_of_all_targets_and_the_head_meets_few_of_them(share, monkeypatch):
    found, expected, answer, met = losses_of(share, monkeypatch)
    assert met == (int(answer.sum()) if share in (0.03, 0.3) else answer.numel())
    (loss, nll, *rest), (loss_expected, nll_expected, *rest_expected) = found, expected
    torch.testing.assert_close(loss, loss_expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nll * answer, nll_expected * answer, rtol=1e-5, atol=1e-6)
    for part, other in zip(rest, rest_expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-6)
    assert not nll.requires_grad
