"""A segment as a memory gets it from a model, made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.memory.contract import Flags, Segment


def segment_of(hidden: Tensor, valid: list[int] | None = None, complete: list[bool] | None = None) -> Segment:
    """One segment per row of (B, T, D) or (B, T, L, D); ``valid`` tokens of each are no padding."""
    n_row, n_token = hidden.shape[:2]
    yes, zero = torch.ones(n_row, 1, dtype=torch.bool), torch.zeros(n_row, 1, dtype=torch.long)
    return Segment(
        ids=torch.zeros(n_row, n_token, dtype=torch.long),
        embeddings=torch.zeros(n_row, n_token, hidden.shape[-1]),
        hidden=hidden,
        valid=torch.arange(n_token) < torch.tensor(valid or [n_token] * n_row)[:, None],
        flags=Flags(yes if complete is None else torch.tensor(complete)[:, None], ~yes, ~yes, None, zero, zero),
        signals=None,
        lookback=0,
        columns=slice(0, n_token),
    )
