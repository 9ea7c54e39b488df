"""Laws of learning: gradients reach, every parameter learns, memory is useful."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.laws.builders import ALL, N_VOCAB, Make, T, logits, text
from memlm.laws.causality import loss_of
from memlm.memory import state as states
from memlm.models.segments import SegmentModel
from memlm.models.state import Output


def reach(make: Make) -> None:
    """Gradients flow through writes inside the window and are exactly cut at its edge."""
    half = N_VOCAB // 2  # early text uses the lower half of the vocabulary, late text the upper: no other link
    model = make(memory={"gradient": True}, overlap=0)  # that which stops gradients by a setting is judged without
    early, late = text(2, T, seed=1, high=half), text(2, 3 * T, seed=2, low=half)

    def gradient(out: Output) -> float:
        model.zero_grad()
        probe = torch.randn(out.hidden[:, -T:].shape, generator=torch.Generator().manual_seed(3))
        (out.hidden[:, -T:] * probe).sum().backward()  # no logits: the head is tied to the embedding
        gradients = model.embedding.weight.grad
        assert gradients is not None
        return gradients[:half].abs().max().item()

    inside = gradient(model(torch.cat([early, late], dim=1), logits=False))
    assert inside > 1e-6, "a late loss has no gradient with respect to the first segment of the window"
    carried = model(early, logits=False).state
    assert gradient(model(late, state=carried, logits=False)) > 1e-6, "no gradient through a state that is not detached"
    before = model(torch.cat([early, late[:, :T]], dim=1), logits=False).state
    outside = gradient(model(late[:, T:], state=states.detach(before), logits=False))
    assert outside == 0.0, f"gradient {outside} across the edge of the window"
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def every_parameter_learns(make: Make) -> None:
    """The full training loss over two windows gives every parameter a gradient."""
    variants: list[dict[str, Any]] = [ALL]
    if "position" in inspect.signature(type(make())).parameters:
        variants.append({"position": "learned"})
    for settings in variants:
        model = make(**settings).train()
        ids, mask = text(3, 4 * T, seed=1), torch.ones(3, 4 * T, dtype=torch.bool)
        out = model(ids)
        loss_of(model, ids, out, mask).backward()
        out = model(ids, state=states.detach(out.state))
        loss_of(model, ids, out, mask).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
            assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


def recall_batch(n_row: int, draw: torch.Generator, n_segment: int = 3, n_filler: int = 7) -> tuple[Tensor, Tensor]:
    """A key with its value in segment 1, filler, the key again as the last token of the last segment: ids, values.

    Ids: 0 the key; 1..8 values; the rest filler.
    """
    ids = torch.randint(9, 9 + n_filler, (n_row, n_segment * 8), generator=draw)
    value = torch.randint(1, 9, (n_row,), generator=draw)
    place = torch.randint(0, 5, (n_row,), generator=draw)
    rows = torch.arange(n_row)
    ids[rows, place], ids[rows, place + 1], ids[:, -1] = 0, value, 0
    return ids, value


def learn_recall(
    make: Make, n_step: int = 250, n_segment: int = 3, n_filler: int = 7, **memory: Any
) -> tuple[SegmentModel, int]:
    """A small model trained on `recall_batch` until it knows the task, and the steps that took, at most ``n_step``."""
    memory = {"n_slot": 16, "d_key": 32, "span": 2, "write_budget": 8, "n_working": 4, "n_stm": 8} | memory
    model = make(memory, perturb=False, n_vocab=9 + n_filler, n_layer=2, segment_len=8, overlap=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(0)
    n_done, known = 0, False
    while n_done < n_step and not known:
        ids, value = recall_batch(32, draw, n_segment, n_filler)
        out = model(ids, logits=False)
        by_row = F.cross_entropy(model.head(out.hidden[:, -1]), value, reduction="none")
        own = [modules[0].losses(out.trace[name], by_row.detach()).values() for name, modules in model.memory.items()]
        nll = by_row.mean()
        optimizer.zero_grad()
        (nll + sum(loss for losses in own for loss in losses)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        n_done, known = n_done + 1, nll.item() < 0.3
    return model.eval(), n_done


@torch.no_grad()
def recall_scores(model: SegmentModel, n_segment: int = 3, n_filler: int = 7) -> dict[str, tuple[float, float]]:
    """NLL and accuracy on 256 questions of `recall_batch`: with memory, with another row's, and wiped."""
    ids, value = recall_batch(256, torch.Generator().manual_seed(1), n_segment, n_filler)
    state = model(ids[:, :-8], logits=False).state
    another = model.with_memory(state, model.select_rows(state, torch.arange(len(ids)).roll(1)))
    scores = {}
    for name, start in (("memory", state), ("swapped", another), ("wiped", model.wipe(state))):
        guess = logits(model, ids[:, -8:], start)[:, -1]
        scores[name] = (F.cross_entropy(guess, value).item(), (guess.argmax(1) == value).float().mean().item())
    return scores


def useful(make: Make, n_step: int = 250) -> None:
    """After a short training, what was told is known with memory, and not without or with another row's."""
    model, n_done = learn_recall(make, n_step)
    scores = recall_scores(model)
    (nll, accuracy), (nll_wiped, accuracy_wiped) = scores["memory"], scores["wiped"]
    accuracy_swapped = scores["swapped"][1]
    assert accuracy > 0.6, f"recalls {accuracy:.0%} after {n_done} steps, {accuracy_wiped:.0%} with memory wiped"
    assert accuracy_wiped < 0.3, f"{accuracy_wiped:.0%} without memory: the task leaks"
    assert accuracy_swapped < 0.3, f"{accuracy_swapped:.0%} with another row's memory: it is not what is read"
    assert nll < nll_wiped - 0.5, f"NLL {nll:.2f} with memory, {nll_wiped:.2f} wiped"
