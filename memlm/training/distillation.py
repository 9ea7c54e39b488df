"""Learning from the bare base: what a pretrained model predicts that sees the text before, without memory and adapters.

Shapes: B rows, S segments, T tokens per segment, D the width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.data.stream import Batch
from memlm.models.base import LanguageModel
from memlm.training.loss import linear_divergence


def distance_from_base(model: LanguageModel, batch: Batch, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the divergences from what the bare base predicts, in nats, and where they are counted (B, N).

    The base sees the text from the beginning of the context on, up to its own number of places. So what it tells is
    also what memory is to bring back (context distillation: Askell et al. 2021, arXiv 2112.00861). Longer contexts are
    cut into windows that overlap by half. Answers to questions are not counted, as the base cannot know them; nor is a
    segment whose context began before this batch, unless the base sees at least half a window before it.

    Args:
        model: The model, with `LanguageModel.bare`.
        batch: B rows of S segments.
        hidden: The model's last hidden states (B, N, D), with gradients.
        weight: Of the tokens, (B, N).
    """
    n_row, n_segment = len(batch.ids), batch.ids.shape[1] // model.segment_len
    most = max(min(model.bare_len // model.segment_len, n_segment), 1)
    begins = torch.zeros(n_row, n_segment, dtype=torch.bool, device=hidden.device)
    for part in (batch.reset, batch.breaks):
        if part is not None:
            begins |= part
    begins[:, 0] |= batch.fresh
    place = torch.arange(n_segment, device=hidden.device).expand(n_row, -1)
    first = torch.where(begins, place, 0).cummax(dim=1).values
    known = begins.cummax(dim=1).values | (place - first >= most // 2)

    step = max(most // 2, 1)
    start = first + ((place - first - most + step).clamp(min=0) // step) * step  # of the window of each segment
    counted = known.repeat_interleave(model.segment_len, dim=1) & ~batch.answer
    ids, own, each = (part.unflatten(1, (n_segment, -1)) for part in (batch.ids, hidden, weight * counted))
    away = hidden.new_zeros((), dtype=torch.float32)
    ends = torch.cat([start[:, 1:] != start[:, :-1], torch.ones_like(begins[:, :1])], dim=1)
    for n_before in range(most):
        picked = ends & (place - start == n_before)
        picked[0, n_before] = True  # all processes call the base as often
        row, last = (part[:, None] for part in picked.nonzero(as_tuple=True))
        before = last + torch.arange(-n_before, 1, device=last.device)
        teacher = model.bare(ids[row, before].flatten(1))
        right = (ends[row, last] & (start[row, before] == last - n_before))[..., None]
        own_part, each_part = own[row, before].flatten(0, 2), (each[row, before] * right).flatten()
        away = away + linear_divergence(own_part, teacher.flatten(0, 1), model.head_weight, each_part)
    return away, counted
