"""How much a plain configuration trains, told by its numbers alone: nothing is built, so that it may be anybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memlm.data.epochs import order_of, scaled


def n_step(config: Mapping[str, Any]) -> int:
    """Optimizer steps, as `memlm.training.settings.plan_steps` plans them.

    Raises:
        KeyError: If it has no such settings.
        TypeError: If one is of another kind.
    """
    trainer = config["trainer"]
    if trainer["max_steps"] not in (None, -1):
        return int(trainer["max_steps"])
    steps, _ = _phases(config)
    curriculum, n_epoch = config["curriculum"], 1
    if "n_epoch" in curriculum:
        steps, n_epoch = scaled(steps, curriculum["n_epoch"], curriculum["scale"])
    return -(-n_epoch * sum(steps) // trainer["accumulate_grad_batches"])


def n_token(config: Mapping[str, Any], step: int) -> int:
    """Tokens of the training batches of the first so many steps; for errors see `n_step`."""
    left = step * config["trainer"]["accumulate_grad_batches"]
    curriculum = config["curriculum"]
    steps, sizes = _phases(config)
    if "n_epoch" in curriculum:
        n_batch = tuple(scaled(steps, curriculum["n_epoch"], curriculum["scale"])[0])
        whole, part = divmod(left, sum(n_batch))
        mixed = np.bincount(order_of(n_batch, whole)[:part], minlength=len(sizes)) + whole * np.array(n_batch)
        return int(mixed @ np.array(sizes))
    total = 0
    for i, size in enumerate(sizes):
        n = left if i == len(sizes) - 1 else min(left, steps[i])
        total += n * size
        left -= n
    return total


def of_tokens(steps: Sequence[int], sizes: Sequence[int], n_token: int) -> list[int]:
    """The steps of phases, scaled so that all have ``n_token`` tokens, to half a batch each.

    Args:
        steps: Batches of each phase.
        sizes: Tokens of one of them.
        n_token: Tokens of all phases.
    """
    share = n_token / sum(n * size for n, size in zip(steps, sizes, strict=True))
    return [max(1, round(n * share)) for n in steps]


def _phases(config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Batches of each phase, and tokens of one of them."""
    phases = config["curriculum"]["phases"]
    steps = [phase["steps"] for phase in phases]
    sizes = [phase["n_row"] * phase["n_segment"] * config["model"]["segment_len"] for phase in phases]
    planned = config["trainer"].get("max_steps") not in (None, -1)  # then the phases are dealt out already
    if config.get("n_token") is not None and not planned:
        steps = of_tokens(steps, sizes, config["n_token"])
    return steps, sizes
