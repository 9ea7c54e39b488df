"""What matrix memories share: heads that make queries, keys and values of a token, and a matrix for each head.

A subclass says what tokens do to the matrix (`MatrixMemory.rule`), and what maps queries to what they find if it is not
the matrix itself (`MatrixMemory.prepare`).

Shapes: B rows, T tokens per segment, S segments, N = S * T cells, Q tokens that are read for, D model width, H heads, K
width of a key, V of a value, W of a matrix, c chunks of a segment, C = S * c chunks of a window, L tokens of a chunk, A
channels that fade apart: K, or 1 if all fade alike.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Memory, Mixer, Needs, Read, Scanned, Segment, Trace
from memlm.memory.convolution import ShortConvolution
from memlm.memory.state import where_rows

CHUNK = 32
"""Most tokens of a chunk, a power of two."""

Decay = Literal["none", "head", "channel"]


class MatrixState(NamedTuple):
    """What is remembered.

    Attributes:
        matrix: One for each head, (B, H, K, W).
    """

    matrix: Tensor


class Pass(Protocol):
    """What the tokens of a chunk do to the matrix before it, (..., K, W)."""

    def written(self, matrix: Tensor) -> Tensor:
        """What they write into it, (..., L, W)."""

    def after(self, matrix: Tensor, written: Tensor) -> Tensor:
        """The matrix after the chunk."""


class Rule(Protocol):
    """What the tokens of all chunks do, solved as far as it is without the matrix before each."""

    def each(self) -> list[Any]:
        """The `Pass` of each chunk."""

    def found(self, matrix: Tensor, written: Tensor) -> Tensor:
        """What each token finds under its query once it has written, (C, B, H, L, V).

        Args:
            matrix: The matrix before each chunk, (C, B, H, K, W).
            written: What tokens write, (C, B, H, L, W).
        """


class Tokens(NamedTuple):
    """What is made of the cells of a window. All but ``v`` and ``query`` is zero where there is no token.

    Attributes:
        x: The stream, normalised, (B, N, D).
        valid: Cells that hold a token, (B, N, 1, 1).
        k: Keys, (B, N, H, K).
        v: Values, (B, N, H, V).
        decay: Logs of what each token leaves, (B, N, H, A); None for all of it.
        query: Queries, (B, N, H, K); None if nothing is found ``within`` the segment.
    """

    x: Tensor
    valid: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    query: Tensor | None


class MatrixMemory(Memory):
    """A matrix per head that tokens write key by key and read by a query.

    What a query finds is normalised, gated and mapped. An open segment is run over again from its first token by every
    call, so that the matrix knows complete segments alone.

    Args:
        d_model: Width of the hidden states.
        n_head: Heads, each with a matrix of its own.
        d_key: Width of a head's keys and queries.
        d_value: Width of a head's values.
        decay: What fades apart, as tokens and learned rates say: each ``head``, each ``channel`` of a key, or nothing.
        within: Whether a token reads what tokens up to itself wrote, or what earlier segments did.
        norm_keys: Whether keys and queries have the length 1.
        conv: Tokens, itself and those before it, of which a token's key and value are made.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("d_key", "d_value")

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_key: int,
        d_value: int,
        decay: Decay,
        within: bool,
        norm_keys: bool = True,
        conv: int = 1,
    ) -> None:
        super().__init__()
        for name, size in {"n_head": n_head, "d_key": d_key, "d_value": d_value, "conv": conv}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.n_head, self.d_key, self.d_value = n_head, d_key, d_value
        self.within, self.norm_keys = within, norm_keys
        self.norm = nn.RMSNorm(d_model)
        self.to_query = nn.Linear(d_model, n_head * d_key, bias=False)
        self.to_key = nn.Linear(d_model, n_head * d_key, bias=False)
        self.to_value = nn.Linear(d_model, n_head * d_value, bias=False)
        self.needs = Needs(lookback=conv - 1)
        self.key_conv = ShortConvolution(conv, n_head * d_key) if conv > 1 else None
        self.value_conv = ShortConvolution(conv, n_head * d_value) if conv > 1 else None
        n_pace = {"none": 0, "head": n_head, "channel": n_head * d_key}[decay]
        self.to_step = nn.Linear(d_model, n_pace) if n_pace else None
        self.log_decay = nn.Parameter(torch.zeros(n_head)) if n_pace else None
        self.found_norm = nn.RMSNorm(d_value, eps=1e-5)
        self.to_gate = nn.Linear(d_model, n_head * d_value, bias=False)
        self.to_output = nn.Linear(n_head * d_value, d_model, bias=False)

    def init_maps(self) -> None:
        """Initial values of all maps, those of a subclass too."""
        self.init_linears()
        if self.to_step is not None:
            with torch.no_grad():  # softplus gives .001 to .1
                self.to_step.bias.copy_(torch.logspace(-3, -1, len(self.to_step.bias)).expm1().log())

    def rule(self, tokens: Tokens, n_segment: int) -> tuple[Rule, Trace]:
        """What tokens do to the matrix, in chunks (`cut`), and numbers about it."""
        raise NotImplementedError

    def read(self, y: Tensor, prepared: MatrixState) -> Read:
        """What earlier segments wrote under the queries of ``y``; see `Memory.read`."""
        x = self.norm(y)
        with exact(y):
            found = self._keys(self.to_query, x).transpose(1, 2) @ prepared.matrix  # (B, H, Q, V)
        return self._read(found.transpose(1, 2), x)

    def write(self, segment: Segment, state: MatrixState) -> tuple[MatrixState, Trace]:
        """The matrix after all tokens of the segment; see `Memory.write`."""
        rule, trace = self._rule(segment, within=False)
        return self._passed(rule, segment, state).state, trace

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: MatrixState,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        """Solve all chunks at once, pass the matrix from one to the next, then read; see `Memory.scan`.

        Where tokens read ``within`` their segment they do so even if ``write`` is false: its end is then forgotten.
        """
        within = read and self.within
        rule, trace = self._rule(window, within) if write or within else (None, {})
        passed = self._passed(rule, window, state, write)
        if not read:
            return Scanned(None, None, passed.state, trace)
        if rule is None or not within:
            rows = x.reshape(len(x) * window.n_segment, -1, x.shape[2])
            begun = torch.stack(passed.begun, dim=1).flatten(0, 1)
            found = self.read(rows, self.prepare(MatrixState(begun))).value
            assert found is not None
            return Scanned(None, Read(found.reshape(x.shape)), passed.state, trace)
        with exact(x):
            inside = rule.found(torch.stack(passed.before), torch.stack(passed.written))
        inside = inside.unflatten(0, (window.n_segment, -1)).permute(2, 0, 1, 4, 3, 5).flatten(2, 3)  # (B, S, cL, H, V)
        inside = inside[:, :, : window.segment_len][:, :, window.columns].flatten(1, 2)
        hidden = (
            self.norm(window.hidden[:, window.lookback :])
            .unflatten(1, (window.n_segment, -1))[:, :, window.columns]
            .flatten(1, 2)
        )
        return Scanned(None, self._read(inside, hidden), passed.state, trace)

    def _passed(self, rule: Rule | None, window: Segment, state: MatrixState, write: bool = True) -> Passed:
        """Pass the matrix from chunk to chunk."""
        each = [] if rule is None else rule.each()
        n_chunk = len(each) // window.n_segment
        begun: list[Tensor] = []
        before: list[Tensor] = []
        written: list[Tensor] = []
        for s in range(window.n_segment):
            flags = window.flags.of(s, s + 1)
            state = self.start_documents(flags.reset, state)
            matrix = state.matrix
            begun.append(matrix)
            with exact(matrix):
                for chunk in each[s * n_chunk : (s + 1) * n_chunk]:
                    before.append(matrix)
                    written.append(chunk.written(matrix))
                    matrix = chunk.after(matrix, written[-1])
            if write:
                state = where_rows(flags.complete[:, 0], MatrixState(matrix), state)
        return Passed(state, begun, before, written)

    def _rule(self, window: Segment, within: bool) -> tuple[Rule, Trace]:
        """What tokens of a window do, and find ``within`` it, numbers about it, and the mean share that they leave."""
        whole = self.norm(window.hidden)
        x, valid = whole[:, window.lookback :], window.valid[:, window.lookback :, None, None]
        k, v = self.to_key(whole), self.to_value(whole)
        if self.key_conv is not None and self.value_conv is not None:
            k, v = self.key_conv(k, window), self.value_conv(v, window)
        k, v = self._as_keys(self._by_head(k)) * valid, self._by_head(v)
        decay = None
        if self.to_step is not None and self.log_decay is not None:
            decay = -self.log_decay.exp()[:, None] * F.softplus(self._heads(self.to_step, x)) * valid
        query = self._keys(self.to_query, x) if within else None
        with exact(x):
            rule, trace = self.rule(Tokens(x, valid, k, v, decay, query), window.n_segment)
        if decay is not None:
            trace["left"] = self.mean(decay.exp(), valid)
        return rule, trace

    def mean(self, part: Tensor, valid: Tensor) -> Tensor:
        """Of numbers (B, N, H, d) over the tokens there are."""
        return (part * valid).sum() / (valid.sum().clamp(min=1) * part[0, 0].numel())

    def rates(self, linear: nn.Linear, x: Tensor, most: float = 1.0) -> Tensor:
        """Rates of each head, or of each of its channels, between 0 and ``most``, (B, L, D) -> (B, L, H, d)."""
        return most * self._heads(linear, x).sigmoid()

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, H, d), in the precision of the state."""
        return self._by_head(linear(x))

    def _by_head(self, part: Tensor) -> Tensor:
        """(B, L, H * d) -> (B, L, H, d), in the precision of the state."""
        return part.unflatten(-1, (self.n_head, -1)).to(self.to_key.weight)

    def _keys(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Keys or queries, (B, L, D) -> (B, L, H, K)."""
        return self._as_keys(self._heads(linear, x))

    def _as_keys(self, part: Tensor) -> Tensor:
        """What maps give, (B, L, H, K), as keys or queries."""
        keys = F.silu(part)
        return F.normalize(keys, dim=-1) if self.norm_keys else keys

    def _read(self, found: Tensor, x: Tensor) -> Read:
        """What heads found, (B, Q, H, V), normalised, gated by ``x`` (B, Q, D) and mapped."""
        return Read(self.to_output(self.found_norm(found).flatten(2) * F.silu(self.to_gate(x))))


class Passed(NamedTuple):
    """What passing a matrix through a window gives.

    Attributes:
        state: The state after it.
        begun: The matrix before each segment, (B, H, K, W).
        before: Before each chunk, (B, H, K, W).
        written: What is written in each chunk, (B, H, L, W).
    """

    state: MatrixState
    begun: list[Tensor]
    before: list[Tensor]
    written: list[Tensor]


def cut(part: Tensor, n_segment: int) -> Tensor:
    """Cells (B, N, H, d) -> chunks (C, B, H, L, d), the last of a segment filled up with zeros.

    Chunks come first, so that each is one piece of memory.
    """
    cells = part.unflatten(1, (n_segment, -1))
    n_token = cells.shape[2]
    size = min(CHUNK, 1 << (n_token - 1).bit_length())
    if n_more := -n_token % size:  # else it would be a copy
        cells = F.pad(cells, (0, 0, 0, 0, 0, n_more))
    cells = cells.unflatten(2, (-1, size))
    return cells.permute(1, 2, 0, 4, 3, 5).flatten(0, 1).contiguous()


def exact(x: Tensor) -> torch.autocast:
    """Matrices are worked out in full precision."""
    return torch.autocast(x.device.type, enabled=False)
