"""Rules of retrieval, slot by slot."""

from torch import Tensor
from torch.nn import functional as F


def joins(key: Tensor, value: Tensor, priority: Tensor, used: Tensor, threshold: float) -> dict[int, list[int]]:
    """What joins what in one row, all pairs compared: survivors and those that join them."""
    worth, some = priority.tolist(), used.nonzero()[:, 0].tolist()
    target = {}
    for i in some:
        near = [
            j
            for j in some
            if (worth[j], -j) > (worth[i], -i)
            and float(key[i] @ key[j]) >= 1 - threshold
            and float(F.cosine_similarity(value[i], value[j], dim=0)) >= 1 - threshold
        ]
        target[i] = max(near, key=lambda j: (worth[j], -j)) if near else i
    groups: dict[int, list[int]] = {}
    for i, j in target.items():
        if i != j and target[j] == j:
            groups.setdefault(j, []).append(i)
    return groups
