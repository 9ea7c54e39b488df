"""Centres of keys: spherical k-means, and groups of keys that are each parted in two.

Source: spherical k-means (Dhillon and Modha, 2001).

Shapes: n groups, C cells of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 4096
"""Keys that are compared with all centroids at a time."""

_ROUNDS = 4  # of k-means


def centroids(key: Tensor, n: int) -> Tensor:
    """Spherical k-means of unit keys.

    Args:
        key: Unit keys, (M, d_key), at least ``n``.
        n: Number of centroids.

    Returns:
        Unit centroids, (n, d_key). The same keys give the same centroids.
    """
    start = torch.arange(n, device=key.device) * len(key) // n
    centroid = key[start]
    for _ in range(_ROUNDS):
        nearest = torch.cat([(part @ centroid.T).argmax(dim=1) for part in key.split(CHUNK)])
        order, n_held = nearest.argsort(stable=True), nearest.bincount(minlength=n)
        mean = F.embedding_bag(order, key, n_held.cumsum(0) - n_held, mode="sum")  # the same sums on every device
        centroid = torch.where((n_held > 0)[:, None], F.normalize(mean, dim=1), centroid)
    return centroid


def halves(key: Tensor, there: Tensor) -> Tensor:
    """Spherical 2-means of each of n groups of unit keys.

    They begin with the key that is least like the mean of its group, and the one that is least like that key.

    Args:
        key: Unit keys, (n, C, d_key), zero where there is none.
        there: Cells that hold a key, (n, C), at least one of each group.

    Returns:
        Two unit centroids of each group, (n, 2, d_key).
    """

    def furthest(centre: Tensor) -> Tensor:
        like = (key @ centre[..., None])[..., 0].masked_fill(~there, torch.inf)
        return key[torch.arange(len(key), device=key.device), like.argmin(dim=1)]

    first = furthest(key.sum(dim=1))
    centre = torch.stack([first, furthest(first)], dim=1)  # (n, 2, d_key)
    for _ in range(_ROUNDS):
        one, other = (key @ centre.mT).unbind(dim=2)  # (n, C)
        side = torch.stack([one >= other, one < other], dim=1) & there[:, None]
        mean = F.normalize(side.to(key.dtype) @ key, dim=2)
        centre = torch.where(side.any(dim=2, keepdim=True), mean, centre)
    return centre
