import pytest
import torch

from memlm.training import loss
from memlm.training.loss import linear_cross_entropy, naive_linear_cross_entropy


@pytest.mark.parametrize("passes", [loss._rows_in_place, loss._rows])
@pytest.mark.parametrize("n_token", [1, 511, 512, 1300])  # one chunk, its edges, several chunks
def test_equals_the_naive_loss_in_value_and_gradients(n_token, passes, monkeypatch):
    monkeypatch.setattr(loss, "_rows_in_place", passes)
    torch.manual_seed(0)
    results = []
    hidden, head = torch.randn(n_token, 8, dtype=torch.double), torch.randn(30, 8, dtype=torch.double)
    targets, weight = torch.randint(30, (n_token,)), torch.rand(n_token, dtype=torch.double)
    weight[0] = 0
    for function in (linear_cross_entropy, naive_linear_cross_entropy):
        h, e = hidden.float().requires_grad_(), head.float().requires_grad_()
        total, nll = function(h, e, targets, weight.float())
        (3 * total).backward()
        assert not nll.requires_grad
        results.append((total.detach(), nll, h.grad, e.grad))
    for fast, naive in zip(*results, strict=True):
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5)


def test_a_hand_worked_loss():
    # Two words, logits 0 and log 3: probabilities 1/4 and 3/4.
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    total, nll = linear_cross_entropy(hidden, head, torch.tensor([1]), torch.tensor([2.0]))
    assert nll.item() == pytest.approx(0.2876821, abs=1e-6)  # log(4 / 3)
    assert total.item() == pytest.approx(2 * 0.2876821, abs=1e-6)


def test_huge_logits_stay_finite():
    hidden, head = torch.tensor([[1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    total, _ = linear_cross_entropy(hidden, head, torch.tensor([1]), torch.tensor([1.0]))
    total.backward()
    assert total.item() == pytest.approx(2e4)
    assert torch.isfinite(hidden.grad).all()
