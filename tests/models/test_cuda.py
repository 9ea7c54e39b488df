"""Every memory on a GPU: the same outputs and gradients as on the CPU. Skipped where there is no GPU."""

import copy

import pytest
import torch
from torch.nn import functional as F

from memlm import laws
from memlm.memory import state as states
from memlm.models.lmcode import LMCode
from memlm.models.lstm import LSTM
from memlm.models.segments import SegmentModel
from memlm.models.state import ModelState
from memlm.training.loss import linear_cross_entropy

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN computes LSTMs with less precision by default, and small differences change what is stored."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=laws.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[LMCode, LSTM])
def model(request: pytest.FixtureRequest, name: str) -> SegmentModel:
    return laws.builder(laws.nodes_of(name), model_class=request.param)()


def on_gpu(model: SegmentModel) -> SegmentModel:
    model = copy.deepcopy(model).cuda()
    for module in model.modules():
        if isinstance(module, torch.nn.LSTM):
            module.train()  # cuDNN has no other backward pass
    return model


def step(model: SegmentModel, ids: torch.Tensor, state: ModelState | None) -> tuple[torch.Tensor, ModelState, list]:
    out = model(ids, state=state)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return out.logits.detach(), out.state, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def test_outputs_and_gradients_are_those_of_the_cpu(model: SegmentModel) -> None:
    gpu = on_gpu(model)
    ids = laws.text(3, 4 * laws.T + 5, seed=1)
    state, moved = laws.filled(model), laws.filled(gpu)
    expected, state, gradients = step(model, ids, state)
    got, moved, moved_gradients = step(gpu, ids.cuda(), moved)
    laws.close(got.cpu(), expected, "logits", 10.0)
    laws.same_memory(states.move(moved, "cpu"), state, "memory")
    for (name, _), a, b in zip(model.named_parameters(), gradients, moved_gradients, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            laws.close(b.cpu(), a, f"gradient of {name}", 1e-3 * max(1.0, a.abs().max().item()))


def test_generation_is_that_of_the_cpu(model: SegmentModel) -> None:
    gpu = on_gpu(model)
    prompt = laws.text(2, 5, seed=3)
    expected = model.generate(prompt, max_new_tokens=3 * laws.T, temperature=0)
    assert torch.equal(gpu.generate(prompt.cuda(), max_new_tokens=3 * laws.T, temperature=0).cpu(), expected)


def test_autocast(model: SegmentModel) -> None:
    model = on_gpu(model)
    ids = laws.text(3, 4 * laws.T, seed=1).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logits, state, gradients = step(model, ids, laws.filled(model))
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    full, _, _ = step(model, ids, laws.filled(model))
    error = (logits.float() - full).norm() / full.norm()
    assert error < 0.1, f"bf16 logits differ by {error:.3f} of their norm"
    assert all(t.device.type == "cuda" for _, t in laws.named_tensors(state, host=False))


def test_the_loss_is_that_of_the_cpu() -> None:
    hidden, head = torch.randn(70, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets, weight = torch.randint(30, (70,)), torch.rand(70)
    expected = linear_cross_entropy(hidden, head, targets, weight)
    gradients = torch.autograd.grad(expected[0], (hidden, head))
    moved = [tensor.detach().cuda().requires_grad_() for tensor in (hidden, head)]
    for compiled in (False, True):
        found = linear_cross_entropy(*moved, targets.cuda(), weight.cuda(), compiled)
        torch.testing.assert_close([part.cpu() for part in found], list(expected), rtol=1e-4, atol=1e-5)
        found_gradients = [part.cpu() for part in torch.autograd.grad(found[0], moved)]
        torch.testing.assert_close(found_gradients, list(gradients), rtol=1e-4, atol=1e-5)


def test_a_training_step_does_not_wait_for_the_gpu(model: SegmentModel) -> None:
    model = on_gpu(model)
    ids = laws.text(3, 4 * laws.T, seed=1).cuda()
    state = laws.filled(model)
    step(model, ids, state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, ids, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
