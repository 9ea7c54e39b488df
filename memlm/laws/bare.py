"""The law of pretrained models: memory that holds nothing, or was never trained, leaves the base as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.laws.builders import Make, T, close, filled, logits, text
from memlm.models import hf_base
from memlm.models.segments import SegmentModel


@torch.no_grad()
def bare(make: Make) -> None:
    """Logits are those of the bare base on the same context: while memory is empty; and until it learns to be read.

    A memory that only reads is let in by a gate that begins at zero. Any other may change the base once it holds
    something, trained or not.
    """
    model = make(perturb=False)
    ids = text(3, 3 * T, seed=1)
    expected = _by_base(model, ids)
    close(logits(model, ids[:, :T], None), expected[:, :T], "an empty memory", 0.1)
    state = model.new_context(filled(model))
    begins = torch.zeros(3, 3, dtype=torch.bool)
    begins[0, 0] = begins[1, 2] = True
    found = logits(model, ids, state, reset=begins)
    close(found[0, :T], expected[0, :T], "an empty memory beside full ones", 0.1)
    close(found[1, 2 * T :], _by_base(model, ids[1:2, 2 * T :])[0], "a memory that a new document emptied", 0.1)
    after = model(ids[:, :5], state=state, reset=begins[:, 0]).state
    close(logits(model, ids[:, 5:T], after)[0], expected[0, 5:T], "an empty memory, in two calls", 0.1)
    close(logits(model, ids, state, read=False), expected, "reads off", 0.1)
    if all(modules[0].reads_beside for modules in model.memory.values()):
        close(logits(model, ids, state), expected, "an untrained memory", 0.1)


def _by_base(model: SegmentModel, ids: Tensor) -> Tensor:
    """Logits of the base by transformers alone: each segment a text of its own, with the overlap before it."""
    assert model.base_folder is not None, "the law is of models that stand on a pretrained one"
    base = hf_base.load_base(model.base_folder, model.embedding.weight.dtype, trained=False).eval()
    begin = torch.tensor(getattr(model, "begin", []), dtype=torch.long).expand(len(ids), -1)
    found = []
    for start in range(0, ids.shape[1], T):
        first = max(start - model.overlap, 0)
        window = torch.cat([begin, ids[:, first : start + T]], dim=1)
        found.append(base(window).logits[:, begin.shape[1] + start - first :])
    return torch.cat(found, dim=1)
