"""Matrix memory: linear attention, DeltaNet and Gated DeltaNet, with one decay for all channels of a key or one each.

Sources: linear attention (Katharopoulos et al., 2006.16236); the delta rule and its form in chunks (DeltaNet,
2406.06484); with a decay per head (Gated DeltaNet, 2412.06464), per channel (KDA of Kimi Linear, 2510.26692), and with
rates per channel too, apart for what is erased and what is written (GDN-2, 2605.22791). What differs: nothing is
convolved before queries, keys and values are made, as what stands before the memory (attention, an LSTM, the
convolution of ``model=mixer``) mixes neighbours; values pass no SiLU; linear attention has no denominator, the norm of
the output takes its place; all decays begin at a rate of 1, and their steps are spread evenly over the heads and their
channels, so that some keep what is 1,000 tokens old; decays per channel come from one map, where KDA has two of low
rank. Of GDN-2 the update was known to us, not its maps: both rates are sigmoids of a linear map here.

Shapes: see `memlm.memory.matrix`.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from memlm.memory import matrix
from memlm.memory.chunks import Chunks, chunks_of
from memlm.memory.contract import Trace
from memlm.memory.matrix import Decay, MatrixMemory, MatrixState, Tokens, cut


class DeltaMemory(MatrixMemory):
    """A matrix per head that tokens write key by key and read by a query.

    Write, token by token: the matrix decays, then ``rule: delta`` replaces what it holds under the token's key, as far
    as the token's rate says, by the token's value; ``rule: linear`` adds the value. Read: what the matrix holds under a
    query, normalised, gated and mapped.

    Args:
        d_model: Width of the hidden states.
        n_head: Heads, each with a matrix of its own.
        d_key: Width of a head's keys and queries.
        d_value: Width of a head's values.
        rule: ``delta``, a value takes the place of what its key held; ``linear``, it is added.
        rate: Rates of the delta rule: one for each ``head``; or for each ``channel`` of the key by which is erased, and
            of the value that is written.
        rate_max: Greatest rate, in (0, 2]; above 1 what a key holds can be turned round.
        decay: What fades apart, as tokens and learned rates say: each ``head``, each ``channel`` of a key, or nothing.
        within: Whether a token reads what tokens up to itself wrote, or what earlier segments did.
        norm_keys: Whether keys and queries have the length 1, which the delta rule needs.

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
        rate: Literal["head", "channel"] = "head",
        rate_max: float = 1.0,
        decay: Decay = "none",
        within: bool = False,
        norm_keys: bool = True,
    ) -> None:
        if rule not in ("linear", "delta"):
            raise ValueError(f"rule must be 'linear' or 'delta', got {rule!r}")
        if rate not in ("head", "channel"):
            raise ValueError(f"rate must be 'head' or 'channel', got {rate!r}")
        if rate == "channel" and rule == "linear":
            raise ValueError("rate must be 'head' with rule 'linear', which has no rates, got 'channel'")
        if decay not in ("none", "head", "channel"):
            raise ValueError(f"decay must be 'none', 'head' or 'channel', got {decay!r}")
        if rate == "channel" and decay == "none":
            raise ValueError(
                "decay must be 'head' or 'channel' with rate 'channel', which makes the matrix grow without bound on "
                "some texts where nothing fades, got 'none'"
            )
        if not 0 < rate_max <= 2:
            raise ValueError(f"rate_max must be in (0, 2], got {rate_max}")
        if rule == "delta" and not norm_keys:
            raise ValueError(
                "norm_keys must be true with rule 'delta', which grows without bound on long keys, got false"
            )
        super().__init__(d_model, n_head, d_key, d_value, decay, within, norm_keys)
        self.rate_max = rate_max
        by_channel = rate == "channel"
        self.to_rate = nn.Linear(d_model, n_head * (d_key if by_channel else 1)) if rule == "delta" else None
        self.to_write_rate = nn.Linear(d_model, n_head * d_value) if by_channel else None
        self.init_maps()

    def init_state(self, n_row: int) -> MatrixState:
        """Matrices of zeros, under which every query finds nothing."""
        weight = self.to_key.weight
        return MatrixState(weight.new_zeros(n_row, self.n_head, self.d_key, self.d_value))

    def rule(self, tokens: Tokens, n_segment: int) -> tuple[Chunks, Trace]:
        """Values, erasing keys and decays, solved in chunks; see `MatrixMemory.rule`."""
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

    def flops_per_token(self) -> int:
        """Maps; the matrix, read and written; and products of tokens with those of their chunk, of `matrix.CHUNK`."""
        inside = self.d_key + self.d_value if self.within else 0
        through = 2 * self.d_key * self.d_value
        if self.to_rate is not None:
            inside += self.d_key + self.d_value + matrix.CHUNK // 3
            through += self.d_key * self.d_value
        return super().flops_per_token() + 2 * self.n_head * (through + matrix.CHUNK * inside)
