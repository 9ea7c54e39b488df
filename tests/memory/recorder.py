"""Each memory that is shipped, run on small models; what came out, as numbers and as hashes.

`tests/memory/test_recorded.py` compares with what ``python -m tests.memory.recorder`` wrote to ``recorded.json``:
outputs, reads, states, gradients and generated text, so that a change of the code that should change none of them
changes none.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.memory.state import detach, tensors
from memlm.models.lmcode import LMCode
from memlm.models.lstm import LSTM
from memlm.models.segments import SegmentModel

FILE = Path(__file__).with_name("recorded.json")
T = laws.T

# Name of the case, the memory, its settings.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, name, {}) for name in ("none", "stm", "ltm", "dual", "imm", "auto", "memoria", "adaptive")),
    ("ltm shared", "ltm", {"scope": "shared"}),
    ("dual shared", "dual", {"scope": "shared"}),
    ("ltm inverted", "ltm", {"index": "inverted", "n_list": 5, "n_probe": 2, "n_slot": 40}),
    ("ltm inverted shared", "ltm", {"index": "inverted", "n_list": 5, "n_probe": 2, "n_slot": 40, "scope": "shared"}),
    ("ltm surprise", "ltm", {"importance": "surprise"}),
    ("ltm fifo recency", "ltm", {"importance": "fifo", "recency": 4.0}),
    ("ltm distractors", "ltm", {}),
    ("imm layerwise", "imm", {"shared_layers": False, "update": "importance", "reset_every": 3}),
    ("memoria 1.0.0", "memoria", {}),
    ("adaptive signals", "adaptive", {"controller": "straight_through", "signals": {"mood": 2}}),
]


def models() -> Iterator[tuple[str, str, dict[str, Any], type[SegmentModel]]]:
    """Every case on the transformer, and the plain ones on the LSTM."""
    for case, name, settings in CASES:
        yield f"{case}, lmcode", name, settings, LMCode
        if case == name:
            yield f"{case}, lstm", name, settings, LSTM


def record(case: str, name: str, settings: dict[str, Any], model_class: type[SegmentModel]) -> list[Any]:
    """What comes out, part by part: ``[what, hash of the bytes, sum of the magnitudes]``."""
    found: list[Any] = []

    def keep(what: str, *parts: Tensor) -> None:
        digest, total = hashlib.sha256(), 0.0
        for part in parts:
            part = part.detach().contiguous()
            digest.update(part.numpy().tobytes())
            plain = part.double()
            total += float(plain[plain.isfinite()].abs().sum())
        found.append([what, digest.hexdigest()[:16], total])

    nodes = dict(laws.nodes_of(name))
    if "1.0.0" in case:
        nodes[name] = {**nodes[name], "_target_": "memlm.compat.memoria.MemoriaOfSource"}
    make = laws.builder(nodes, model_class=model_class)
    for layers in ("middle", "all"):
        model = make(memory=settings, memory_layers=layers)
        signals = {"mood": torch.tensor([[0.5, -1.0], [0.0, 1.0], [2.0, 0.3]])} if "signals" in settings else None
        with torch.no_grad():
            state = laws.filled(model, n_open=5)
            out = model(laws.text(3, 4 * T + 2, seed=1), state=state, signals=signals)
            keep(f"{layers} logits", out.logits)
            keep(f"{layers} state", *tensors(out.state.memory))
            for read in out.reads.values():
                keep(f"{layers} read", *read)
            ragged = torch.rand(3, 2 * T, generator=torch.manual_seed(5)) < 0.7
            begins = torch.tensor([True, False, False])
            out = model(laws.text(3, 2 * T, seed=2), state=out.state, reset=begins, mask=ragged)
            keep(f"{layers} ragged", out.logits[ragged], *tensors(out.state.memory))
            keep(f"{layers} off", model(laws.text(3, T, seed=3), state=out.state, read=False, write=False).logits)
            closed = model.new_context(out.state)
            keep(f"{layers} closed", *tensors(closed.memory))
            keep(f"{layers} absorbed", *tensors(model.absorb(laws.text(3, 2 * T + 3, seed=8), state=closed).memory))
            keep(f"{layers} greedy", model.generate(laws.text(3, 4, seed=1), 2 * T, temperature=0, state=closed))
            torch.manual_seed(7)
            keep(f"{layers} sampled", model.generate(laws.text(3, 4, seed=1), T, state=closed))
        model.train()
        if "distractors" in case:
            for module in (module for modules in model.memory.values() for module in modules):
                module.distractors = True
        torch.manual_seed(11)
        ids, reset, mask = laws.windows_of_documents()
        first = model(ids, state=laws.filled(model), reset=reset, mask=mask, signals=signals)
        breaks, begins = torch.zeros(2, 3, 3, dtype=torch.bool)
        breaks[0, 1] = breaks[1, 2] = begins[2, 0] = True
        more, before = laws.text(3, 3 * T, seed=6), detach(first.state) if layers == "all" else first.state
        second = model(more, state=before, breaks=breaks, reset=begins)
        loss = torch.zeros(())
        for out, read, there in ((first, ids, mask), (second, more, torch.ones_like(more, dtype=torch.bool))):
            nll = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), read[:, 1:], reduction="none")
            by_row = nll.detach().mean(dim=1)
            own = [modules[0].losses(out.trace[n], by_row).values() for n, modules in model.memory.items()]
            loss = loss + nll[there[:, 1:] & there[:, :-1]].mean() + sum(value for values in own for value in values)
        loss.backward()
        keep(f"{layers} loss", loss)
        keep(f"{layers} trained state", *tensors(second.state.memory))
        grads = sorted((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        keep(f"{layers} gradients", *(grad for _, grad in grads))
    return found


def surroundings() -> dict[str, str]:
    """What the bits depend on; the libraries of linear algebra choose by the maker of the processor, too."""
    cores = Path("/proc/cpuinfo")
    makers = [line for line in cores.read_text().splitlines() if line.startswith("vendor_id")] if cores.exists() else []
    return {
        "torch": torch.__version__.partition("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "maker": makers[0].partition(":")[2].strip() if makers else platform.processor(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def record_all() -> dict[str, Any]:
    """All cases."""
    return {case: record(case, name, settings, model_class) for case, name, settings, model_class in models()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({"surroundings": surroundings(), "cases": record_all()}, indent=None) + "\n")
