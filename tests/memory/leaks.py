"""What a look at later tokens is worth: memories as public code has them, beside the lawful ones.

    python -m tests.memory.leaks            # trains each for up to two minutes on one core, and prints its losses

A model is trained on English text, byte by byte, and asked for the loss of held-out text twice: all tokens of a segment
at once, as it was trained, and each from the tokens before it alone, as text is generated. A lawful memory gives the
same both times.
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.contract import Memory, Mixer, Read
from memlm.memory.hmt import Recalled, RecallMemory, RecallState
from memlm.memory.lm2 import GatedMemory
from memlm.models.lmcode import LMCode
from memlm.statistics import mean_interval

T, N_SEGMENT = 32, 8


class LeakyGates(GatedMemory):
    """Its input gate averages over all tokens that are there, and scales what is added at each (LM2)."""

    def read(self, y: Tensor, prepared: Any) -> Read:
        read = super().read(y, prepared)
        assert read.value is not None
        x = self.norm(y)
        enters = self.of_text(x, x[..., 0].isfinite()).chunk(2, dim=1)[0].sigmoid()
        return read._replace(value=enters[:, None] * read.value.tanh())


class LeakyRecall(RecallMemory):
    """A summary of the first half of a segment recalls for all of it (HMT)."""

    def prepare(self, state: RecallState) -> Any:
        return state

    def tail(self, prepared: Any) -> Tensor:
        return super().tail(super().prepare(prepared))

    def mix(self, x: Tensor, prepared: Any, mixer: Mixer) -> tuple[Tensor, Read | None]:
        half = min(x.shape[1], self.sizes.segment_len // 2)
        draft = mixer(torch.cat([self.first.expand(len(x), -1, -1), x], dim=1))
        recalled: Recalled = self.recall(self.norm(draft[:, half : half + 1]), prepared)
        return super().mix(x, recalled, mixer)


def text() -> tuple[Tensor, Tensor]:
    """Bytes of Python's help pages, to train and held out."""
    ids = torch.tensor([min(ord(letter), 127) for page in topics.values() for letter in page])
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def rows(ids: Tensor, n_row: int, draw: torch.Generator) -> Tensor:
    """Windows from anywhere in a text, with the token after each, (B, N + 1)."""
    n_token = T * N_SEGMENT + 1
    begin = torch.randint(len(ids) - n_token, (n_row, 1), generator=draw)
    return ids[begin + torch.arange(n_token)]


def trained(cls: type[Memory] | None, n_step: int, seed: int = 0, **settings: Any) -> LMCode:
    """A small model with a memory of this class."""
    torch.manual_seed(seed)
    memories = {} if cls is None else {"memory": lambda d_model, sizes: _make(cls, d_model, sizes, settings)}
    model = LMCode(128, memories, n_layer=2, d_model=64, segment_len=T, overlap=8).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw, (told, _) = torch.Generator().manual_seed(seed), text()
    for step in range(n_step):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 4 * (1 - step / n_step))
        ids = rows(told, 8, draw)
        loss = F.cross_entropy(model(ids[:, :-1], keep_state=False).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _make(cls: type[Any], d_model: int, sizes: Any, settings: dict[str, Any]) -> Memory:
    return cls(d_model, sizes, **settings) if issubclass(cls, RecallMemory) else cls(d_model, **settings)


@torch.no_grad()
def losses(model: LMCode, n_row: int = 32) -> tuple[Tensor, Tensor]:
    """Nats per byte of held-out texts, (B,): all tokens of a segment at once, and each from those before it alone."""
    ids = rows(text()[1], n_row, torch.Generator().manual_seed(99))
    at_once = _nats(model(ids[:, :-1]).logits, ids[:, 1:]).mean(dim=1)
    state, one_by_one = None, []
    for s in range(N_SEGMENT):
        segment, following = ids[:, s * T : (s + 1) * T], ids[:, s * T + 1 : (s + 1) * T + 1]
        for t in range(T):
            last = model(segment[:, : t + 1], state=state, keep_state=False).logits[:, -1:]
            one_by_one.append(_nats(last, following[:, t : t + 1])[:, 0])
        state = model(segment, state=state, logits=False).state
    return at_once, torch.stack(one_by_one).mean(dim=0)


def _nats(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), following, reduction="none")


KINDS: dict[str, tuple[type[Memory] | None, dict[str, Any]]] = {
    "none": (None, {}),
    "lm2": (GatedMemory, {"n_slot": 16}),
    "lm2, public": (LeakyGates, {"n_slot": 16}),
    "hmt": (RecallMemory, {"n_slot": 16, "d_key": 32}),
    "hmt, public": (LeakyRecall, {"n_slot": 16, "d_key": 32}),
}


if __name__ == "__main__":
    n_step = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    print("memory, nats per byte at once, one by one, and what is lost with its 95 % interval over texts")
    for name in sys.argv[2:] or KINDS:
        kind, asked = KINDS[name]
        told, alone = losses(trained(kind, n_step, **asked))
        lost, wide = mean_interval((alone - told).tolist())
        print(f"{name}: {told.mean():.4f} {alone.mean():.4f} {lost:.4f} +- {wide:.4f}", flush=True)
