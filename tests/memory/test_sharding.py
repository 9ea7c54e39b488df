"""A shared bank whose slots are dealt out to processes, against the bank of one process.

Shapes: B rows in all, R processes, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn

from memlm.memory.contract import Memory
from memlm.memory.ltm import LongTermMemory
from memlm.memory.state import detach, named_tensors
from memlm.models.lmcode import LMCode

D, T, B = 8, 12, 4
SETTINGS: dict[str, Any] = {"d_key": 8, "top_k": 4, "write_budget": 6, "span": 3, "scope": "shared", "shard": True}


def _process(rank: int, n_rank: int, folder: str, job: Callable[[int, int], Any]) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_rank)
    try:
        torch.save(job(rank, n_rank), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def in_processes(n_rank: int, folder: Path, job: Callable[[int, int], Any]) -> list[Any]:
    """What ``job(rank, n_rank)`` returns in each of ``n_rank`` processes."""
    folder.mkdir()
    multiprocessing.start_processes(_process, (n_rank, str(folder), job), n_rank, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n_rank)]


def model_of(**settings: Any) -> LMCode:
    torch.manual_seed(0)

    def make(d_model: int) -> Memory:
        memory = LongTermMemory(d_model, **(SETTINGS | settings))
        for parameter in memory.parameters():  # initial values hide much: gates are all alike
            nn.init.normal_(parameter, std=0.5) if parameter.dim() > 1 else None
        return memory

    return LMCode(500, {"ltm": make}, n_layer=2, n_head=2, d_model=D, segment_len=T, overlap=4, memory_layers="all")


def two_windows(model: LMCode, rows: slice, n_rank: int = 1) -> dict[str, Any]:
    """Outputs, reads and gradients of two windows of three segments, where documents begin and contexts end within."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(500, (B, 6 * T), generator=draw)[rows]
    weight = torch.randn(B, 6 * T, D, generator=draw)[rows]
    flags = torch.rand(2, B, 6, generator=draw)[:, rows] < 0.2
    state: Any = None
    found: dict[str, Any] = {"slots": [], "weights": [], "hidden": []}
    loss = torch.zeros(())
    for window in range(2):
        cells, segments = slice(window * 3 * T, (window + 1) * 3 * T), slice(3 * window, 3 * window + 3)
        reset, breaks = flags[..., segments]
        out = model(ids[:, cells], state=state, reset=reset, breaks=breaks)
        loss = loss + (out.hidden * weight[:, cells]).sum() / B * n_rank
        assert out.state is not None
        state = detach(out.state)
        found["hidden"].append(out.hidden.detach())
        for read in out.reads.values():  # in the order of weights: that of equal scores is anyone's
            order = read.weights.detach().sort(dim=-1, descending=True)
            found["weights"].append(order.values)
            found["slots"].append(read.slots.gather(-1, order.indices))
    loss.backward()
    found["grads"] = {name: p.grad for name, p in model.named_parameters()}
    found["bank"] = [named_tensors(part) for part in state.memory["ltm"]]
    return found


@pytest.mark.parametrize(
    ("n_rank", "settings"),
    [
        pytest.param(2, {"n_slot": 40, "importance": "token"}, marks=pytest.mark.slow),
        (2, {"n_slot": 41, "importance": "token", "recency": 3.0}),
        (2, {"n_slot": 41, "importance": "token", "bank_dtype": "bfloat16"}),
        pytest.param(4, {"n_slot": 30, "importance": "surprise"}, marks=pytest.mark.slow),
        pytest.param(4, {"n_slot": 5, "top_k": 8}, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_bank_is_that_of_one_process(n_rank: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """Same reads, outputs, gradients, and the same slots in the same places, evictions included.

    Worth by ``span`` differs little within a span: there rounding decides which of two places a slot takes.
    """
    whole = two_windows(model_of(**settings), slice(None))

    def job(rank: int, n: int) -> dict[str, Any]:
        model = model_of(**settings)
        for module in model.memory["ltm"]:
            module.over_ranks = True
            module.shard_bank(rank, n)
        found = two_windows(model, slice(rank * B // n, (rank + 1) * B // n), n)
        for grad in found["grads"].values():  # as DistributedDataParallel does
            distributed.all_reduce(grad)
            grad /= n
        return found

    parts = in_processes(n_rank, tmp_path / "p", job)
    # A number on the edge between two of 16 bits may be held as either.
    near = {"rtol": 1e-2, "atol": 2e-4} if "bank_dtype" in settings else {"rtol": 1e-3, "atol": 1e-5}
    for name in ("hidden", "weights", "slots"):
        for i, expected in enumerate(whole[name]):
            torch.testing.assert_close(torch.cat([part[name][i] for part in parts]), expected, rtol=1e-4, atol=1e-5)
    for name, grad in whole["grads"].items():
        assert grad.abs().max() > 0, name
        for part in parts:
            torch.testing.assert_close(part["grads"][name], grad, **near, msg=name)
    for layer, bank in enumerate(whole["bank"]):
        assert bank["n_record"].item() >= 2 * B  # of six slots each: more than the bank holds
        for name, expected in bank.items():
            shares = [part["bank"][layer][name] for part in parts]
            if expected.dim() == 1:
                assert all(torch.equal(share, expected) for share in shares), name
                continue
            n_own = [share.shape[1] for share in shares]
            assert max(n_own) - min(n_own) <= 1
            dealt = torch.empty_like(expected)
            for rank, share in enumerate(shares):
                dealt[:, rank::n_rank] = share
            torch.testing.assert_close(dealt, expected, rtol=1e-4, atol=1e-5, msg=name)
