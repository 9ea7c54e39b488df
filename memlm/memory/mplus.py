"""Pool with a store: what a pool drops is kept, and found again by a learned search (M+).

Source: Y. Wang et al., "M+: extending MemoryLLM with scalable long-term memory" (ICML 2025), arXiv 2502.00592. As
there, vectors that the pool drops go to a store of each layer; two networks of two linear maps without bias, one for
queries and one for keys, say by sigmoid(q k) what is worth to be read; the best stand before the pool, oldest first.
Other than there, beside what `memlm.memory.pool` names:

- Each token searches for itself. The source takes the mean score over the tokens of a query, which would tell a token
  of later ones here.
- The networks learn from the next-token loss: the log of its score is added to the attention to a vector. The source
  trains them to tell vectors of the same document from others, -log s(pos) - log(1 - s(neg)); here the store holds one
  document.
- What is found stands where it stands in the store, not right before the pool.
- The store is full at ``n_long`` vectors; then those go that are oldest in the text. The source counts recalls.
- Keys are made of the vectors when they are searched, so they cost no bytes and never are of older weights.
- One set of weights writes and reads.

Shapes: B rows, Q tokens that are mixed, D model width, M vectors of the store, N of the pool, K that a write drops.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Mixer, Read, Segment, Sizes, Trace
from memlm.memory.pool import PoolMemory, PoolState
from memlm.memory.state import where_rows
from memlm.tensors import take


class PlusMemory(PoolMemory):
    """A pool, and before it a store of what it dropped, of which each token reads the best ``top_k``.

    The state has M + N cells: those of the store, by place in the text, then those of the pool.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_token: Vectors of the pool (N).
        n_new: Vectors that a segment brings (K).
        n_long: Vectors of the store (M).
        top_k: Vectors of the store that a token reads.
        d_key: Width of queries and keys of the search.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_token", "n_new", "n_long")

    def __init__(
        self,
        d_model: int,
        sizes: Sizes,
        n_token: int = 128,
        n_new: int = 16,
        n_long: int = 512,
        top_k: int = 32,
        d_key: int = 64,
    ) -> None:
        super().__init__(d_model, sizes, n_token, n_new)
        for name, number in {"n_long": n_long, "top_k": top_k, "d_key": d_key}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.n_long, self.top_k, self.d_key = n_long, top_k, d_key
        self.norm = nn.RMSNorm(d_model)
        self.to_query, self.to_key = (
            nn.Sequential(nn.Linear(d_model, d_model, bias=False), nn.SiLU(), nn.Linear(d_model, d_key, bias=False))
            for _ in range(2)
        )
        self.init_linears()

    def init_state(self, n_row: int) -> PoolState:
        """Empty cells."""
        return self._empty(n_row, self.n_long + self.n_token)

    def mix(self, x: Tensor, prepared: PoolState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The layer with what is found, and the pool, before the text; see `Memory.mix`."""
        filled, store = self.filled(prepared), self._parts(prepared)[0]
        key = self.to_key(self.norm(store.hidden))  # (B, M, d_key)
        with torch.autocast(x.device.type, enabled=False):
            score = self.to_query(self.norm(x)).float() @ key.float().mT * key.shape[2] ** -0.5  # (B, Q, M)
        ranked = score.masked_fill(~filled[:, None, : self.n_long], -torch.inf)
        best = ranked.topk(min(self.top_k, self.n_long), dim=2).indices
        found = torch.zeros_like(ranked, dtype=torch.bool).scatter(2, best, True) & ranked.isfinite()
        seen = torch.cat([found, filled[:, None, self.n_long :].expand(-1, x.shape[1], -1)], dim=2)  # (B, Q, M + N)
        bias = F.pad(F.logsigmoid(score), (0, self.n_token))[:, None]  # (B, 1, Q, M + N)
        return mixer(x, self._context(prepared, seen, mixer)._replace(bias=bias)), None

    def write(self, segment: Segment, state: PoolState) -> tuple[PoolState, Trace]:
        """Let the pool drop vectors into the store; see `Memory.write`."""
        store, pool = self._parts(state)
        dropped, pool = self.replaced(segment, pool)
        hidden, position = (
            torch.cat([store.hidden, dropped.hidden], 1),
            torch.cat([store.position, dropped.position], 1),
        )
        order = position.argsort(dim=1, stable=True)[:, self.n_new :]  # empty cells go first, then the oldest
        after = PoolState(
            torch.cat([take(hidden, order), pool.hidden], dim=1), torch.cat([take(position, order), pool.position], 1)
        )
        return where_rows(segment.complete[:, 0], after, state), {}

    def flops_per_token(self) -> int:
        """Attention to pool and store, their keys and values, and the search, whose keys are made for each segment."""
        d_model = self.sizes.d_model
        network = 2 * d_model * (d_model + self.d_key)
        search = network + 2 * self.n_long * self.d_key
        return self._flops(self.n_token + self.n_long) + search + network * self.n_long // self.sizes.segment_len

    def _parts(self, state: PoolState) -> tuple[PoolState, PoolState]:
        """The store and the pool."""
        store, pool = zip(*(part.split([self.n_long, self.n_token], dim=1) for part in state), strict=True)
        return PoolState(*store), PoolState(*pool)
