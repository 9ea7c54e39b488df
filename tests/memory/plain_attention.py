"""A layer of a transformer written out, with an explicit mask and a place for each cell, to compare memories with."""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.models.lmcode import Layer


def turned(x: Tensor, place: Tensor) -> Tensor:
    """Heads (H, L, E) turned by their places (L,): pairs of numbers as complex ones, times a complex rotation."""
    half = x.shape[2] // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = place[:, None].float() * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=2)


def heads_of(layer: Layer, cells: Tensor) -> list[Tensor]:
    """Queries, keys and values of cells (L, D), (H, L, E) each."""
    qkv = layer.attention_norm(cells) @ layer.attention.to_qkv.weight.T
    return [part.reshape(len(cells), layer.n_head, -1).transpose(0, 1) for part in qkv.chunk(3, dim=1)]


def scores(q: Tensor, k: Tensor, mask: Tensor, place: Tensor, places: Tensor) -> Tensor:
    """Scores (H, L, M) of keys (H, M, E) for queries (H, L, E); see `attend`."""
    somewhere = turned(q, place.nan_to_num()) @ turned(k, places.nan_to_num()).transpose(1, 2)
    score = torch.where(places.isnan(), q @ k.transpose(1, 2), somewhere) / q.shape[2] ** 0.5
    return score.masked_fill(~mask, -torch.inf)


def behind(layer: Layer, x: Tensor, found: Tensor) -> Tensor:
    """Cells ``x`` (L, D) behind a layer whose heads have found (H, L, E)."""
    x = x + found.transpose(0, 1).reshape(x.shape) @ layer.attention.to_output.weight.T
    return x + layer.feed_forward(x)


def attend(
    layer: Layer, x: Tensor, seen: Tensor, mask: Tensor, place: Tensor, places: Tensor, bias: Tensor | float = 0.0
) -> Tensor:
    """Cells ``x`` (L, D) behind the layer, of which each sees the cells of ``seen`` (M, D) that ``mask`` (L, M) names.

    ``place`` (L,) and ``places`` (M,) say where they stand; NaN for a cell without a place. ``bias`` (L, M) is added to
    the scores.
    """
    (q, _, _), (_, k, v) = heads_of(layer, x), heads_of(layer, seen)
    return behind(layer, x, (scores(q, k, mask, place, places) + bias).softmax(dim=2) @ v)
