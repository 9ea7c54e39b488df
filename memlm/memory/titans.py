"""Titans: a small network per head, written by steps of gradient descent and read by running it.

Sources: Titans (A. Behrouz, P. Zhong, V. Mirrokni, 2501.00663). Settings also give TTT-Linear and TTT-MLP (Y. Sun et
al., 2407.04620) and, with a window and Muon, the rule of ATLAS (A. Behrouz et al., 2505.23735). What differs:

- Reads use the weights before the segment, as a token may not see what later tokens of its segment write. So the
  output of ``mac`` is modulated by those too, where the paper takes the weights that the segment has just written.
- In ``mac`` each token sees the cell that it read itself, and the tokens of its segment; the paper lets it see the
  cells of later tokens. What is written is the stream that enters the layer, and not what comes out of its attention.
- Weights are those that are learned plus a change, and forgetting takes the change back. In the papers it takes weights
  to zero, where a network of two or more matrices has no gradient and never learns again.
- One step is made per chunk. Its momentum and decay are of the chunk, and a step per token is ``chunk_len: 1``.
- Steps are bounded (``step_max``). Queries and keys pass a SiLU and have the length 1, and what heads find is
  normalised and gated: as in `memlm.memory.delta`. Keys and values are convolved, queries are not, as a read sees one
  token alone. No biases, no persistent cells, no features of higher degree.

Shapes: B rows, T tokens per segment, C tokens of lookback, Q tokens that are read for, D model width, H heads, E width
of a head, L tokens that a step looks at, P weights of a head's network.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Context, Memory, Mixer, Needs, Read, Segment, Sizes, Trace, at_once
from memlm.memory.convolution import ShortConvolution
from memlm.memory.matrix import exact
from memlm.memory.state import where_rows


class TitansState(NamedTuple):
    """What was learned from text.

    Attributes:
        change: What all steps have added to the weights that are learned in training, (B, H, P).
        momentum: The running step, (B, H, P); None without momentum.
    """

    change: Tensor
    momentum: Tensor | None


class FastNetwork:
    """Networks with weights of their own for each row and head: matrices with a GELU between.

    Args:
        weight: All weights, (..., P).
        widths: Of input, hidden layers and output.
        norm: Scale and shift (H, E) with which the output is normalised and added to the input; None for the output
            as it is.
    """

    def __init__(self, weight: Tensor, widths: list[int], norm: tuple[Tensor, Tensor] | None) -> None:
        self.matrices = matrices_of(weight, widths)
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (..., L, E) of inputs (..., L, E)."""
        y = x
        for i, matrix in enumerate(self.matrices):
            y = (F.gelu(y) if i else y) @ matrix
        if self.norm is None:
            return y
        scale, shift = self.norm
        return x + F.layer_norm(y, y.shape[-1:]) * scale[:, None] + shift[:, None]

    def gradient(self, k: Tensor, v: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the sum over tokens of ``rate`` times the mean squared error.

        It is worked out by hand, so that it is the same with and without autograd, which may go through it.

        Args:
            k: Inputs, (..., L, E).
            v: Outputs that are wanted, (..., L, E).
            rate: Weight of each token, (..., L).

        Returns:
            The gradient (..., P), and the error of each token, (..., L).
        """
        entered: list[Tensor] = [k]
        summed: list[Tensor] = []
        for matrix in self.matrices:
            if summed:
                entered.append(F.gelu(summed[-1]))
            summed.append(entered[-1] @ matrix)
        y = summed.pop()
        if self.norm is None:
            error = y - v
            back = 2 / v.shape[-1] * error
        else:
            scale, shift = self.norm
            share = (y.var(dim=-1, keepdim=True, unbiased=False) + LAYER_NORM_EPS).rsqrt()
            unit = (y - y.mean(dim=-1, keepdim=True)) * share
            error = k + unit * scale[:, None] + shift[:, None] - v
            back = 2 / v.shape[-1] * error * scale[:, None]
            back = back - back.mean(dim=-1, keepdim=True) - unit * (back * unit).mean(dim=-1, keepdim=True)
            back = back * share
        back = back * rate[..., None]
        parts: list[Tensor] = []
        for matrix in reversed(self.matrices):
            x = entered.pop()
            parts.append((x.mT @ back).flatten(-2))
            if summed:
                back = (back @ matrix.mT) * gelu_slope(summed.pop())
        return torch.cat(parts[::-1], dim=-1), error.square().mean(dim=-1)


LAYER_NORM_EPS = 1e-5
"""That of `torch.nn.functional.layer_norm`."""


def matrices_of(weight: Tensor, widths: list[int]) -> list[Tensor]:
    """All weights (..., P) as matrices, from one width to the next."""
    shapes = list(pairwise(widths))
    parts = weight.split([a * b for a, b in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the GELU."""
    return (1 + torch.erf(x * 0.5**0.5)) / 2 + x * torch.exp(-(x**2) / 2) * (2 * math.pi) ** -0.5


def bounded(step: Tensor, most: float) -> Tensor:
    """Steps (..., P) of a length below ``most``; short ones are hardly changed."""
    return step * (1 + step.square().sum(dim=-1, keepdim=True) / most**2).rsqrt()


def orthogonal(matrix: Tensor, n_step: int = 5) -> Tensor:
    """The nearest orthogonal matrix to each (..., a, b), about, by Newton-Schulz steps (Muon; K. Jordan et al., 2024).

    Singular values come out between 0.7 and 1.2. Zero stays zero.
    """
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = wide * (wide.square().sum(dim=(-2, -1), keepdim=True) + 1e-14).rsqrt()
    for _ in range(n_step):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[-2] <= matrix.shape[-1] else x.mT


class TitansMemory(Memory):
    """A network per head that learns, from each chunk of text, to give the values of its keys.

    Write: one step of gradient descent on the squared error of all pairs of a chunk, with momentum and forgetting.
    How much a token counts, how much momentum goes on and how much is forgotten are worked out from the text. Read:
    the network is run on queries.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        variant: ``add``, what is read is added behind the mixer; ``mac``, memory as context: attention sees it, and
            its output is modulated by it; ``mag``, memory as gate of what the mixer adds; ``mal``, memory as a layer
            before the mixer.
        n_head: Heads, each with a network of its own.
        d_head: Width of a head's queries, keys and values.
        depth: Matrices of a network; 1 for a linear map.
        d_hidden: Width between the matrices.
        residual: Whether a network gives its input plus its normalised output.
        chunk_len: Tokens per step; None for a segment.
        window_len: Tokens before a chunk whose pairs its step looks at again.
        momentum: Whether steps go on.
        decay: Whether what was learned is forgotten.
        step: ``gradient``, or ``muon``, a step whose matrices are made orthogonal.
        rate_max: Greatest rate of a token.
        step_max: Bound of the length of a gradient step; None for none.
        conv: Tokens, itself and those before it, of which a token's key and value are made; 1 for itself alone.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("d_head", "d_hidden")
    scan = at_once

    def __init__(
        self,
        d_model: int,
        sizes: Sizes,
        variant: Literal["add", "mac", "mag", "mal"] = "add",
        n_head: int = 4,
        d_head: int = 32,
        depth: int = 2,
        d_hidden: int = 64,
        residual: bool = False,
        chunk_len: int | None = None,
        window_len: int = 0,
        momentum: bool = True,
        decay: bool = True,
        step: Literal["gradient", "muon"] = "gradient",
        rate_max: float = 0.1,
        step_max: float | None = 10.0,
        conv: int = 4,
    ) -> None:
        super().__init__()
        sizes_of = {"n_head": n_head, "d_head": d_head, "depth": depth, "d_hidden": d_hidden, "conv": conv}
        for name, size in sizes_of.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if variant not in ("add", "mac", "mag", "mal"):
            raise ValueError(f"variant must be add, mac, mag or mal, got {variant!r}")
        if step not in ("gradient", "muon"):
            raise ValueError(f"step must be gradient or muon, got {step!r}")
        if chunk_len is not None and chunk_len < 1:
            raise ValueError(f"chunk_len must be at least 1, or null for a segment, got {chunk_len}")
        most_len = sizes.segment_len + 1 - conv
        if not 0 <= window_len <= most_len:
            raise ValueError(f"window_len must be in 0..segment_len + 1 - conv ({most_len}), got {window_len}")
        for name, most in {"rate_max": rate_max, "step_max": step_max}.items():
            if most is not None and not 0 < most < math.inf:
                raise ValueError(f"{name} must be above 0, got {most}")
        self.variant, self.step, self.n_head = variant, step, n_head
        self.chunk_len, self.window_len = min(chunk_len or sizes.segment_len, sizes.segment_len), window_len
        self.rate_max, self.step_max = rate_max, step_max
        self.widths = [d_head, *[d_hidden] * (depth - 1), d_head]
        self.needs = Needs(lookback=window_len + conv - 1, context=variant == "mac")
        width = n_head * d_head
        self.key_conv = ShortConvolution(conv, width) if conv > 1 else None
        self.value_conv = ShortConvolution(conv, width) if conv > 1 else None
        self.norm = nn.RMSNorm(d_model)
        self.to_query = nn.Linear(d_model, width, bias=False)
        self.to_key = nn.Linear(d_model, width, bias=False)
        self.to_value = nn.Linear(d_model, width, bias=False)
        self.to_rate = nn.Linear(d_model, n_head)
        self.to_momentum = nn.Linear(d_model, n_head) if momentum else None
        self.to_decay = nn.Linear(d_model, n_head) if decay else None
        self.start = nn.Parameter(self._start(residual))
        self.scale = nn.Parameter(torch.ones(n_head, d_head)) if residual else None
        self.shift = nn.Parameter(torch.zeros(n_head, d_head)) if residual else None
        self.found_norm = nn.RMSNorm(d_head, eps=1e-5)
        self.to_gate = nn.Linear(d_model, width, bias=False)
        self.to_cell = nn.Linear(width, d_model, bias=False) if variant == "mac" else None
        self.to_output = nn.Linear(width, d_model, bias=False)
        self.init_linears()
        nn.init.constant_(self.to_rate.bias, -2.0)  # about an eighth of the greatest
        if self.to_decay is not None:
            nn.init.constant_(self.to_decay.bias, -5.0)  # about 0.007 of a chunk

    def _start(self, residual: bool) -> Tensor:
        """Weights before training, (H, P). Keys have the length 1, so what enters a GELU has the variance 1.

        The last matrix is zero: a fresh network gives nothing. Where outputs are normalised it may not be.
        """
        shapes = list(pairwise(self.widths))
        parts = []
        for i, (a, b) in enumerate(shapes):
            std = float(residual) if i == len(shapes) - 1 else 1.0
            parts.append(torch.randn(self.n_head, a * b) * std * (a**-0.5 if i else 1.0))
        return torch.cat(parts, dim=1)

    def init_state(self, n_row: int) -> TitansState:
        """Nothing learned from text."""
        change = self.start.new_zeros(n_row, *self.start.shape)
        return TitansState(change, None if self.to_momentum is None else change)

    def prepare(self, state: TitansState) -> FastNetwork:
        """The networks of all rows and heads."""
        return self._network(state.change)

    def read(self, y: Tensor, prepared: FastNetwork) -> Read:
        """What the networks give for the queries of ``y``; see `Memory.read`."""
        return Read(self.to_output(self._found(y, prepared)))

    @property
    def reads_beside(self) -> bool:
        """See `Memory.reads_beside`."""
        return self.variant == "add"

    def mix(self, x: Tensor, prepared: FastNetwork, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The variants of the paper; see `Memory.mix`. A read of zero leaves what the mixer adds as it is."""
        if self.variant == "add":
            return super().mix(x, prepared, mixer)
        if self.variant == "mal":
            return mixer(x + self.to_output(self._found(x, prepared))), None
        if self.to_cell is None:
            y, asked = mixer(x), x
        else:
            heads = mixer.heads(self.to_cell(self._found(x, prepared)))
            y = asked = mixer(x, Context(heads.k[:, :, :, None], heads.v[:, :, :, None]))  # (B, H, T, 1, E)
        return x + (y - x) * 2 * self.to_output(self._found(asked, prepared)).sigmoid(), None

    def write(self, segment: Segment, state: TitansState) -> tuple[TitansState, Trace]:
        """One step per chunk; see `Memory.write`."""
        x = self.norm(segment.hidden)
        k, v = self.to_key(x), self.to_value(x)
        if self.key_conv is not None and self.value_conv is not None:
            k, v = self.key_conv(k, segment), self.value_conv(v, segment)
        seen_from = segment.lookback - self.window_len  # what is before is convolved alone
        x, valid = x[:, seen_from:], segment.valid[:, None, seen_from:]
        k, v = self._as_keys(self._by_head(k)), self._by_head(v)  # (B, H, window_len + T, E)
        rate = self._gate(self.to_rate, x) * self.rate_max * valid  # (B, H, window_len + T)
        n_valid = valid[..., self.window_len :].sum().clamp(min=1) * self.n_head
        trace = {"rate": rate[..., self.window_len :].sum() / n_valid, "error": rate.new_zeros(())}
        with exact(x):
            for begin in range(0, segment.segment_len, self.chunk_len):
                end = min(begin + self.chunk_len, segment.segment_len)
                own, seen = slice(self.window_len + begin, self.window_len + end), slice(begin, self.window_len + end)
                here = valid[..., own]
                count = here.sum(dim=2, keepdim=True)  # (B, 1, 1)
                mean = (x[:, own] * here.mT).sum(dim=1, keepdim=True) / count.clamp(min=1)  # (B, 1, D)
                network = self._network(state.change)
                gradient, error = network.gradient(k[:, :, seen], v[:, :, seen], rate[..., seen])
                size = rate[..., own].sum(dim=2, keepdim=True) / count.clamp(min=1)
                state = where_rows(
                    segment.complete[:, 0] & (count > 0)[:, 0, 0], self._after(state, gradient, mean, size), state
                )
                trace["error"] = trace["error"] + (error[..., self.window_len :] * here).sum() / n_valid
        return state, trace

    def _after(self, state: TitansState, gradient: Tensor, mean: Tensor, size: Tensor) -> TitansState:
        """The state after a step.

        Args:
            state: The state before.
            gradient: Of the chunk, (B, H, P).
            mean: Of the chunk's normalised stream, (B, 1, D).
            size: Mean rate of the chunk, (B, H, 1).
        """
        step = -gradient if self.step_max is None else -bounded(gradient, self.step_max)
        if self.to_momentum is not None:
            assert state.momentum is not None
            step = self._gate(self.to_momentum, mean) * state.momentum + step
        momentum = None if self.to_momentum is None else step
        if self.step == "muon":
            step = size * torch.cat([orthogonal(part).flatten(-2) for part in matrices_of(step, self.widths)], dim=-1)
        left = state.change
        if self.to_decay is not None:
            left = (1 - self._gate(self.to_decay, mean)) * left
        return TitansState(left + step, momentum)

    def flops_per_token(self) -> int:
        """Maps; the networks, run for queries and, for what a step sees, forward, backward and for the gradient."""
        n_weight = self.start.shape[1]
        seen = 1 + self.window_len / self.chunk_len
        muon = 0.0
        if self.step == "muon":
            for a, b in pairwise(self.widths):
                muon += 5 * (4 * min(a, b) ** 2 * max(a, b) + 2 * min(a, b) ** 3) / self.chunk_len
        maps = super().flops_per_token() - 2 * self.start.numel()
        return maps + self.n_head * int(2 * n_weight + 6 * n_weight * seen + muon)

    def _network(self, change: Tensor) -> FastNetwork:
        norm = None if self.scale is None or self.shift is None else (self.scale, self.shift)
        return FastNetwork(self.start + change, self.widths, norm)

    def _heads(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, E), in the precision of the state."""
        return self._by_head(linear(x))

    def _by_head(self, part: Tensor) -> Tensor:
        """(B, L, H * E) -> (B, H, L, E), in the precision of the state."""
        return part.unflatten(-1, (self.n_head, -1)).transpose(1, 2).to(self.to_key.weight)

    def _keys(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Keys or queries, (B, L, D) -> (B, H, L, E)."""
        return self._as_keys(self._heads(linear, x))

    def _as_keys(self, part: Tensor) -> Tensor:
        """What maps give, as keys or queries."""
        return F.normalize(F.silu(part), dim=-1)

    def _gate(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """A share for each head, (B, L, D) -> (B, H, L)."""
        return linear(x).to(linear.weight).sigmoid().mT

    def _found(self, x: Tensor, network: FastNetwork) -> Tensor:
        """What networks give for the queries of ``x`` (B, Q, D), normalised and gated, (B, Q, H * E)."""
        x = self.norm(x)
        with exact(x):
            found = self.found_norm(network(self._keys(self.to_query, x))).transpose(1, 2)
        return found.flatten(2) * F.silu(self.to_gate(x))
