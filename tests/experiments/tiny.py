"""A tiny model as `memlm.build` makes it, for experiments that build its untrained twin."""

from typing import Any

import torch

from memlm.assemble import build_model

T = 16
MEMORIES: dict[str, dict[str, Any]] = {
    "ltm": {
        "_target_": "memlm.memory.ltm.LongTermMemory", "n_slot": 200, "d_key": 8, "d_value": 32, "top_k": 4,
        "write_budget": 8, "span": 3, "temperature": 30.0,
    },
    "stm": {"_target_": "memlm.memory.stm.ShortTermMemory", "n_slot": 5, "n_head": 2, "update_rate": 0.5},
    "cache": {"_target_": "memlm.memory.cache.CacheMemory", "n_token": 20},
    "rmt": {"_target_": "memlm.memory.rmt.RecurrentMemory", "n_cell": 3},
}  # fmt: skip


def tiny(tokenizer: Any, *memories: str, perturb: bool = True, **settings: Any) -> Any:
    """A model with some `MEMORIES`; ``settings`` go to all of them."""
    config = {
        "model": {
            "_target_": "memlm.models.lmcode.LMCode", "n_layer": 2, "n_head": 2, "d_model": 32, "segment_len": T,
            "overlap": 4, "dropout": 0.1,
        },
        "memory": {name: MEMORIES[name] | settings for name in memories},
        "data": {"tokenizer": {"n_vocab": None}},
        "seed": 0,
    }  # fmt: skip
    model = build_model(config, tokenizer)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters() if perturb else ():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model
