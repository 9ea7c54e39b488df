"""Matrix memory: linear attention, DeltaNet, Gated DeltaNet and RWKV-7, with one decay for all channels or one each.

Sources: linear attention (Katharopoulos et al., 2006.16236); the delta rule and its form in chunks (DeltaNet,
2406.06484); with a decay per head (Gated DeltaNet, 2412.06464), per channel (KDA of Kimi Linear, 2510.26692), and with
rates per channel too, apart for what is erased and what is written (GDN-2, 2605.22791). What differs: keys and values
are convolved with the tokens before (``conv``), queries are not, as a read sees one token alone, and what stands before
the memory (attention, an LSTM, the convolution of ``model=mixer``) mixes neighbours; values pass no SiLU; linear
attention has no denominator, the norm of the output takes its place; all decays begin at a rate of 1, and their steps
are spread evenly over the heads and their channels, so that some keep what is 1,000 tokens old; decays per channel come
from one map, where KDA has two of low rank. Of GDN-2 the update was known to us, not its maps: both rates are sigmoids
of a linear map here. Of RWKV-7 (2503.14456) there is the update of the state, in which what is erased fades as all else
does, and no more.

Shapes: see `memlm.memory.matrix`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory import matrix
from memlm.memory.chunks import Chunks, chunks_of
from memlm.memory.contract import Trace
from memlm.memory.matrix import Decay, MatrixMemory, MatrixState, Rule, Tokens, cut


class Pairs(NamedTuple):
    """Chunks in which each token is two: one that erases, and one that fades what is there, writes and asks."""

    chunks: Chunks

    def each(self) -> list[Chunks]:
        """See `Rule`."""
        return self.chunks.each()

    def found(self, matrix: Tensor, written: Tensor) -> Tensor:
        """See `Rule`."""
        return self.chunks.found(matrix, written)[..., 1::2, :]


def pairs_of(
    k: Tensor, value: Tensor, erase: Tensor, erased: Tensor, decay: Tensor, query: Tensor | None, n_segment: int
) -> Pairs:
    """What is erased under another key than it is found under, ``M <- diag(a) (M - erased (M^T erase)^T) + k value^T``.

    Args:
        k: Keys, (B, N, H, K), as all else.
        value: What tokens write.
        erase: Keys by which what is erased is found.
        erased: Keys under which it is taken away.
        decay: Logs of the share that each token leaves.
        query: What is asked once a token has written; None to ask for nothing.
        n_segment: Segments of the window.
    """

    def both(first: Tensor | None, second: Tensor) -> Tensor:
        parts = [torch.zeros_like(second) if first is None else first, second]
        return cut(torch.stack(parts, dim=2).flatten(1, 2), n_segment)

    asked = None if query is None else both(None, query)
    return Pairs(
        chunks_of(both(erased, k), both(None, value), both(erase, torch.zeros_like(erase)), both(None, decay), asked)
    )


class DeltaMemory(MatrixMemory):
    """A matrix per head that tokens write key by key and read by a query.

    Write, token by token: the matrix decays, then ``rule: delta`` replaces what it holds under the token's key, as far
    as the token's rate says, by the token's value; ``rule: linear`` adds the value; ``rule: rwkv7`` takes away what the
    key holds, from each channel of the key as far as its rate says, then the matrix decays and the value is added.
    Read: what the matrix holds under a query, normalised, gated and mapped.

    Args:
        d_model: Width of the hidden states.
        n_head: Heads, each with a matrix of its own.
        d_key: Width of a head's keys and queries.
        d_value: Width of a head's values.
        rule: ``delta``, a value takes the place of what its key held; ``linear``, it is added; ``rwkv7``, it is added
            once what the key held was taken away channel by channel.
        rate: Rates of the delta rule: one for each ``head``; or for each ``channel`` of the key by which is erased, and
            of the value that is written.
        rate_max: Greatest rate, in (0, 2]; above 1 what a key holds can be turned round.
        decay: What fades apart, as tokens and learned rates say: each ``head``, each ``channel`` of a key, or nothing.
        within: Whether a token reads what tokens up to itself wrote, or what earlier segments did.
        norm_keys: Whether keys and queries have the length 1, which the delta rule needs.
        conv: Tokens, itself and those before it, of which a token's key and value are made; 1 for itself alone.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int = 2,
        d_key: int = 64,
        d_value: int = 64,
        rule: Literal["linear", "delta", "rwkv7"] = "delta",
        rate: Literal["head", "channel"] = "head",
        rate_max: float = 1.0,
        decay: Decay = "none",
        within: bool = False,
        norm_keys: bool = True,
        conv: int = 4,
    ) -> None:
        if rule not in ("linear", "delta", "rwkv7"):
            raise ValueError(f"rule must be 'linear', 'delta' or 'rwkv7', got {rule!r}")
        if rate not in ("head", "channel"):
            raise ValueError(f"rate must be 'head' or 'channel', got {rate!r}")
        if rate == "channel" and rule == "linear":
            raise ValueError("rate must be 'head' with rule 'linear', which has no rates, got 'channel'")
        if rate == "head" and rule == "rwkv7":
            raise ValueError("rate must be 'channel' with rule 'rwkv7', which has one for each, got 'head'")
        if decay not in ("none", "head", "channel"):
            raise ValueError(f"decay must be 'none', 'head' or 'channel', got {decay!r}")
        if rate == "channel" and decay == "none":
            raise ValueError(
                "decay must be 'head' or 'channel' with rate 'channel', which makes the matrix grow without bound on "
                "some texts where nothing fades, got 'none'"
            )
        if not 0 < rate_max <= 2:
            raise ValueError(f"rate_max must be in (0, 2], got {rate_max}")
        if rule != "linear" and not norm_keys:
            raise ValueError(
                f"norm_keys must be true with rule {rule!r}, which grows without bound on long keys, got false"
            )
        super().__init__(d_model, n_head, d_key, d_value, decay, within, norm_keys, conv)
        self.rate_max = rate_max
        by_channel = rate == "channel"
        self.to_rate = nn.Linear(d_model, n_head * (d_key if by_channel else 1)) if rule != "linear" else None
        self.to_write_rate = nn.Linear(d_model, n_head * d_value) if by_channel and rule == "delta" else None
        self.key_share = nn.Parameter(torch.ones(n_head, d_key)) if rule == "rwkv7" else None
        self.init_maps()

    def init_state(self, n_row: int) -> MatrixState:
        """Matrices of zeros, under which every query finds nothing."""
        weight = self.to_key.weight
        return MatrixState(weight.new_zeros(n_row, self.n_head, self.d_key, self.d_value))

    def rule(self, tokens: Tokens, n_segment: int) -> tuple[Rule, Trace]:
        """Values, erasing keys and decays, solved in chunks; see `MatrixMemory.rule`."""
        if self.key_share is not None:
            return self._pairs(tokens, n_segment)
        decay, query = (None if part is None else cut(part, n_segment) for part in (tokens.decay, tokens.query))
        k, value, erase = cut(tokens.k, n_segment), tokens.v, None
        trace: Trace = {}
        if self.to_rate is not None:
            rate = self.rates(self.to_rate, tokens.x, self.rate_max)
            erase = cut(rate, n_segment) * k
            trace["rate"] = self.mean(rate, tokens.valid)
            if self.to_write_rate is not None:
                rate = self.rates(self.to_write_rate, tokens.x, self.rate_max)
                trace["write_rate"] = self.mean(rate, tokens.valid)
            value = rate * value
        return chunks_of(k, cut(value, n_segment), erase, decay, query), trace

    def _pairs(self, tokens: Tokens, n_segment: int) -> tuple[Rule, Trace]:
        """The rule of RWKV-7."""
        assert self.to_rate is not None
        assert self.key_share is not None
        assert tokens.decay is not None
        rate = self.rates(self.to_rate, tokens.x, self.rate_max)
        erased = rate * tokens.k
        k = tokens.k.lerp(erased, self.key_share)
        pairs = pairs_of(k, tokens.v, tokens.k, erased, tokens.decay, tokens.query, n_segment)
        return pairs, {"rate": self.mean(rate, tokens.valid)}

    def flops_per_token(self) -> int:
        """Maps; the matrix, read and written; and products of tokens with those of their chunk, of `matrix.CHUNK`."""
        inside = self.d_key + self.d_value if self.within else 0
        through = 2 * self.d_key * self.d_value
        if self.to_rate is not None:
            inside += self.d_key + self.d_value + matrix.CHUNK // 3
            through += self.d_key * self.d_value
        if self.key_share is not None:  # each token is two
            inside, through = 2 * inside, 2 * through
        return super().flops_per_token() + 2 * self.n_head * (through + matrix.CHUNK * inside)
