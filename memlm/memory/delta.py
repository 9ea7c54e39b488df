"""Matrix memory: linear attention, DeltaNet and Gated DeltaNet.

Sources: linear attention (Katharopoulos et al., 2006.16236); the delta rule and its form in chunks (DeltaNet,
2406.06484); with decay (Gated DeltaNet, 2412.06464). What differs: nothing is convolved before queries, keys and values
are made, as what stands before the memory (attention, an LSTM, the convolution of ``model=mixer``) mixes neighbours;
values pass no SiLU; linear attention has no denominator, the norm of the output takes its place; all decays begin at a
rate of 1, and their steps are spread evenly over the heads, so that some heads keep what is 1,000 tokens old.

Shapes: B rows, T tokens per segment, S segments, N = S * T cells, Q tokens that are read for, D model width, H heads, K
width of a key, V width of a value, c chunks of a segment, L tokens of a chunk.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Memory, Mixer, Read, Scanned, Segment, Trace
from memlm.memory.state import where_rows

CHUNK = 64
"""Most tokens of a chunk."""


class DeltaState(NamedTuple):
    """What is remembered.

    Attributes:
        matrix: Maps a key to a value, (B, H, K, V).
    """

    matrix: Tensor


class Chunks(NamedTuple):
    """What the tokens of chunks do to the matrix M before their chunk, whatever it is.

    Token t writes ``u_t = value_t - key_t M`` under its key k_t.

    Attributes:
        k: Keys, (..., L, K).
        value: (..., L, V).
        key: (..., L, K); None if nothing that is written depends on M.
        between: Share of what token i (column) wrote that is left at token t (row), 0 for i > t, (..., L, L).
        since: Share of M that is left at each token, (..., L); None for all of it.
    """

    k: Tensor
    value: Tensor
    key: Tensor | None
    between: Tensor
    since: Tensor | None

    def at(self, s: int, c: int) -> Chunks:
        """Chunk ``c`` of segment ``s``, of chunks (B, S, c, ...)."""
        return Chunks(*(None if part is None else part[:, s, c] for part in self))  # type: ignore[arg-type]

    def written(self, matrix: Tensor) -> Tensor:
        """What tokens write into ``matrix`` (..., K, V), (..., L, V)."""
        return self.value if self.key is None else self.value - self.key @ matrix

    def after(self, matrix: Tensor, written: Tensor) -> Tensor:
        """The matrix (..., K, V) after the chunk."""
        until = self.between[..., -1, :, None]
        kept = matrix if self.since is None else self.since[..., -1, None, None] * matrix
        return kept + (self.k * until).mT @ written

    def found(self, query: Tensor, matrix: Tensor, written: Tensor) -> Tensor:
        """What each token finds under its query (..., L, K), once it has written: (..., L, V)."""
        left = query if self.since is None else query * self.since[..., None]
        return left @ matrix + (query @ self.k.mT * self.between) @ written


def chunks_of(k: Tensor, v: Tensor, rate: Tensor | None, decay: Tensor | None) -> Chunks:
    """Solve the rule within each chunk.

    Args:
        k: Keys, (..., L, K).
        v: Values, (..., L, V).
        rate: How much of what its key holds each token replaces, (..., L); None if values are added.
        decay: Log of the share of the matrix that each token leaves, (..., L), at most 0; None for all of it.
    """
    n_token = k.shape[-2]
    if decay is None:
        between, since = k.new_ones(n_token, n_token).tril().expand(*k.shape[:-1], -1), None
    else:
        between, since = decay_between(decay), decay.cumsum(dim=-1).exp()
    if rate is None:
        return Chunks(k, v, None, between, since)
    # u_t = rate_t (v_t - what M and the tokens before t left under k_t): a triangular system, whose diagonal is 1.
    system = rate[..., None] * (k @ k.mT) * between
    left = k if since is None else k * since[..., None]
    known = rate[..., None] * torch.cat([v, left], dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    value, key = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    return Chunks(k, value, key, between, since)


def decay_between(decay: Tensor) -> Tensor:
    """Share of what column i wrote that is left at row t, of logs (..., L) of what each token leaves: (..., L, L).

    Logs are summed from i to t: no difference of large sums loses digits, and nothing overflows.
    """
    cells = torch.arange(decay.shape[-1], device=decay.device)
    row, column = cells[:, None], cells
    steps = torch.where(row > column, decay[..., None], 0.0)
    return steps.cumsum(dim=-2).masked_fill(row < column, -torch.inf).exp()


class DeltaMemory(Memory):
    """A matrix per head that tokens write key by key and read by a query.

    Write, token by token: the matrix decays, then ``rule: delta`` replaces what it holds under the token's key, as far
    as the token's rate says, by the token's value; ``rule: linear`` adds the value. Read: what the matrix holds under a
    query, normalised, gated and mapped. An open segment is run over again from its first token by every call, so that
    the matrix knows complete segments alone.

    Args:
        d_model: Width of the hidden states.
        n_head: Heads, each with a matrix of its own.
        d_key: Width of a head's keys and queries.
        d_value: Width of a head's values.
        rule: ``delta``, a value takes the place of what its key held; ``linear``, it is added.
        decay: Whether the matrix fades with each token, as the token and learned rates say.
        within: Whether a token reads what tokens up to itself wrote, or what earlier segments did.
        norm_keys: Whether keys and queries have the length 1, which the delta rule needs.
        rate_max: Greatest rate of the delta rule, in (0, 2]; above 1 what a key holds can be turned round.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int = 2,
        d_key: int = 64,
        d_value: int = 64,
        rule: Literal["linear", "delta"] = "delta",
        decay: bool = False,
        within: bool = False,
        norm_keys: bool = True,
        rate_max: float = 1.0,
    ) -> None:
        super().__init__()
        for name, size in {"n_head": n_head, "d_key": d_key, "d_value": d_value}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if rule not in ("linear", "delta"):
            raise ValueError(f"rule must be 'linear' or 'delta', got {rule!r}")
        if not 0 < rate_max <= 2:
            raise ValueError(f"rate_max must be in (0, 2], got {rate_max}")
        if rule == "delta" and not norm_keys:
            raise ValueError(
                "norm_keys must be true with rule 'delta', which grows without bound on long keys, got false"
            )
        self.n_head, self.d_key, self.d_value = n_head, d_key, d_value
        self.within, self.norm_keys, self.rate_max = within, norm_keys, rate_max
        self.norm = nn.RMSNorm(d_model)
        self.to_query = nn.Linear(d_model, n_head * d_key, bias=False)
        self.to_key = nn.Linear(d_model, n_head * d_key, bias=False)
        self.to_value = nn.Linear(d_model, n_head * d_value, bias=False)
        self.to_rate = nn.Linear(d_model, n_head) if rule == "delta" else None
        self.to_step = nn.Linear(d_model, n_head) if decay else None
        self.log_decay = nn.Parameter(torch.zeros(n_head)) if decay else None
        self.found_norm = nn.RMSNorm(d_value, eps=1e-5)
        self.to_gate = nn.Linear(d_model, n_head * d_value, bias=False)
        self.to_output = nn.Linear(n_head * d_value, d_model, bias=False)
        self.init_linears()
        if self.to_step is not None:
            with torch.no_grad():
                self.to_step.bias.copy_(torch.logspace(-3, -1, n_head).expm1().log())  # softplus gives .001 to .1

    def init_state(self, n_row: int) -> DeltaState:
        """Matrices of zeros, under which every query finds nothing."""
        weight = self.to_key.weight
        return DeltaState(weight.new_zeros(n_row, self.n_head, self.d_key, self.d_value))

    def read(self, y: Tensor, prepared: DeltaState) -> Read:
        """What earlier segments wrote under the queries of ``y``; see `Memory.read`."""
        x = self.norm(y)
        with _exact(y):
            found = self._keys(self.to_query, x).transpose(1, 2) @ prepared.matrix  # (B, H, Q, V)
        return self._read(found.transpose(1, 2), x)

    def write(self, segment: Segment, state: DeltaState) -> tuple[DeltaState, Trace]:
        """The matrix after all tokens of the segment; see `Memory.write`."""
        chunks, trace = self._chunks(segment)
        return self._passed(chunks, segment, state)[0], trace

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: DeltaState,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        """Solve all chunks at once, pass the matrix from one to the next, then read; see `Memory.scan`.

        Where tokens read ``within`` their segment they do so even if ``write`` is false: its end is then forgotten.
        """
        within = read and self.within
        chunks, trace = self._chunks(window) if write or within else (None, {})
        state, matrices, written = self._passed(chunks, window, state, write)
        if not read:
            return Scanned(None, None, state, trace)
        if chunks is None or not within:
            rows = x.reshape(len(x) * window.n_segment, -1, x.shape[2])
            found = self.read(rows, DeltaState(matrices[:, :, 0].flatten(0, 1))).value
            assert found is not None
            return Scanned(None, Read(found.reshape(x.shape)), state, trace)
        hidden = self.norm(window.hidden[:, window.lookback :])
        with _exact(x):
            query = self._cut(self._keys(self.to_query, hidden), window.n_segment)
            inside = chunks.found(query, matrices, written)  # (B, S, c, H, L, V)
        inside = inside.transpose(3, 4).flatten(2, 3)[:, :, : window.segment_len][:, :, window.columns].flatten(1, 2)
        hidden = hidden.unflatten(1, (window.n_segment, -1))[:, :, window.columns].flatten(1, 2)
        return Scanned(None, self._read(inside, hidden), state, trace)

    def flops_per_token(self) -> int:
        """Maps; the matrix, read and written; and products of tokens with those of their chunk, of 64 tokens."""
        inside = self.d_key + self.d_value if self.within else 0
        matrix = 2 * self.d_key * self.d_value
        if self.to_rate is not None:
            inside += self.d_key + (self.d_key + self.d_value) // 2
            matrix += self.d_key * self.d_value
        return super().flops_per_token() + 2 * self.n_head * (matrix + CHUNK * inside)

    def _passed(
        self, chunks: Chunks | None, window: Segment, state: DeltaState, write: bool = True
    ) -> tuple[DeltaState, Tensor, Tensor]:
        """Pass the matrix from chunk to chunk.

        Returns:
            The state after the window; the matrix before each chunk, (B, S, c, H, K, V), or before each segment (c is
            1) if there are no chunks; and what is written in each chunk, (B, S, c, H, L, V).
        """
        n_segment = window.n_segment
        matrices: list[Tensor] = []
        written: list[Tensor] = []
        for s in range(n_segment):
            flags = window.flags.of(s, s + 1)
            state = self.start_documents(flags.reset, state)
            matrix = state.matrix
            if chunks is None:
                matrices.append(matrix)
                continue
            with _exact(matrix):
                for c in range(chunks.k.shape[2]):
                    chunk = chunks.at(s, c)
                    matrices.append(matrix)
                    written.append(chunk.written(matrix))
                    matrix = chunk.after(matrix, written[-1])
            if write:
                state = where_rows(flags.complete[:, 0], DeltaState(matrix), state)
        before = torch.stack(matrices, dim=1).unflatten(1, (n_segment, -1))
        return state, before, torch.stack(written, dim=1).unflatten(1, (n_segment, -1)) if written else before

    def _chunks(self, window: Segment) -> tuple[Chunks, Trace]:
        """All chunks of a window, (B, S, c, ...), and the mean rate and the mean share that tokens leave."""
        x = self.norm(window.hidden[:, window.lookback :])  # (B, N, D)
        valid = window.valid[:, window.lookback :, None]  # (B, N, 1)
        k, v = self._keys(self.to_key, x) * valid[..., None], self._heads(self.to_value, x)
        rate = decay = None
        trace: Trace = {}
        n_valid = valid.sum().clamp(min=1) * self.n_head
        if self.to_rate is not None:
            rate = self.rate_max * self.to_rate(x).sigmoid().to(k) * valid  # (B, N, H)
            trace["rate"] = rate.sum() / n_valid
        if self.to_step is not None and self.log_decay is not None:
            decay = -self.log_decay.exp() * F.softplus(self.to_step(x).to(k)) * valid
            trace["left"] = (decay.exp() * valid).sum() / n_valid
        k, v = (self._cut(part, window.n_segment) for part in (k, v))
        rate, decay = (
            None if part is None else self._cut(part[..., None], window.n_segment)[..., 0] for part in (rate, decay)
        )
        with _exact(x):
            return chunks_of(k, v, rate, decay), trace

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, H, d), in the precision of the state."""
        return linear(x).unflatten(-1, (self.n_head, -1)).to(linear.weight)

    def _keys(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Keys or queries, (B, L, D) -> (B, L, H, K)."""
        keys = F.silu(self._heads(linear, x))
        return F.normalize(keys, dim=-1) if self.norm_keys else keys

    def _cut(self, part: Tensor, n_segment: int) -> Tensor:
        """Cells (B, N, H, d) -> chunks (B, S, c, H, L, d), the last of a segment filled up with zeros."""
        cells = part.unflatten(1, (n_segment, -1))
        n_chunk = -(-cells.shape[2] // CHUNK)
        cells = F.pad(cells, (0, 0, 0, 0, 0, -cells.shape[2] % n_chunk))
        return cells.unflatten(2, (n_chunk, -1)).transpose(3, 4)

    def _read(self, found: Tensor, x: Tensor) -> Read:
        """What heads found, (B, Q, H, V), normalised, gated by ``x`` (B, Q, D) and mapped."""
        return Read(self.to_output(self.found_norm(found).flatten(2) * F.silu(self.to_gate(x))))


def _exact(x: Tensor) -> torch.autocast:
    """The matrix is worked out in full precision."""
    return torch.autocast(x.device.type, enabled=False)
