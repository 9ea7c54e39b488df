"""What the benchmark of retrieval searches: random keys, or those that a trained model writes of text.

Shapes: N queries, M keys.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.base import SHIFT, trained_with_ltm
from memlm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class Keys(NamedTuple):
    """What is searched, and for what.

    Attributes:
        key: Unit keys, (M, d_key).
        bias: What each slot adds to its score, (M,).
        query: Unit queries, (N, d_key), made from other text than the keys.
        temperature: Inverse temperature of the scores.
    """

    key: Tensor
    bias: Tensor
    query: Tensor
    temperature: float


def made_keys(n_key: int, n_query: int, d_key: int, clusters: bool, seed: int) -> Keys:
    """Random unit keys without bias; with ``clusters`` around as many random centres as half the root of ``n_key``."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return F.normalize(torch.randn(n, d_key, generator=generator), dim=1)

    parts = normal(n_key), normal(n_query)
    if clusters:
        centre = normal(max(1, math.isqrt(n_key) // 2))
        parts = tuple(  # type: ignore[assignment]
            F.normalize(centre[torch.randint(len(centre), (len(part),), generator=generator)] + 0.5 * part, dim=1)
            for part in parts
        )
    return Keys(parts[0], torch.zeros(n_key), parts[1], 12.0)


def trained_keys(checkpoint: str, trust: list[str], n_key: int, n_query: int, cache: str | None) -> Keys:
    """Keys and biases that a trained model writes of its training text, and queries that it makes of held-out text.

    All tokens are written, and nothing is read. Each further reading of the text begins `SHIFT` tokens later in its
    segment, so that no segment comes twice.

    Raises:
        ConfigError: If the model has no long-term memory, or the held-out text is too short for the queries.
    """
    import numpy as np
    import torch

    from memlm.checkpoint import read_plain
    from memlm.training.memory_settings import memory_settings

    if cache and Path(cache).exists():
        kept = Keys(**read_plain(Path(cache)))
        if len(kept.key) < n_key or len(kept.query) < n_query:
            raise ConfigError(
                f"{cache} has {len(kept.key):,} keys and {len(kept.query):,} queries, but {n_key:,} and {n_query:,} "
                "are needed: remove it, or name another cache"
            )
        return kept
    model, data = trained_with_ltm(checkpoint, trust)
    module, n_row, n_token = model.memory["ltm"][0], 8, 16 * model.segment_len

    def written(split: str, n: int) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(np.asarray(data.tokens(split).tokens, dtype=np.int64))
        found: list[tuple[Tensor, Tensor]] = []
        for reading in range(model.segment_len):
            rows = ids[reading * SHIFT % model.segment_len :]
            rows = rows[: len(rows) // n_row * n_row].view(n_row, -1)
            state = None
            for text in rows.split(n_token, dim=1):
                state = model(text, state=None if state is None else model.wipe(state), read=False, logits=False).state
                bank = state.memory["ltm"][0]
                used = module.filled(bank)
                found.append((bank.key[used], module.bias(bank.log_gate[used])))
                if sum(len(key) for key, _ in found) >= n:
                    return torch.cat([key for key, _ in found])[:n], torch.cat([bias for _, bias in found])[:n]
        raise ConfigError(
            f"the {split} text gives {sum(len(key) for key, _ in found):,} keys, but {n:,} are needed: give a "
            "checkpoint that was trained on more text, or lower sizes and n_query"
        )

    with torch.no_grad(), memory_settings(model, {"ltm.write_budget": None, "ltm.n_slot": n_token + model.segment_len}):
        key, bias = written("train", n_key)
        query, _ = written("val", n_query)
        temperature = float(module.log_temperature.exp() * module.temperature_scale)
    keys = Keys(key, bias, query, temperature)
    if cache:
        torch.save(keys._asdict(), cache)
    return keys
