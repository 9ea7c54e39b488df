"""The best linear memory: a matrix per head that fits all keys to their values by least squares.

Sources: J. von Oswald et al., MesaNet (2506.05233) and "Uncovering mesa-optimization algorithms in transformers"
(2309.05858); P. Das et al., Larimar (2403.11901), whose sequential write is a Kalman filter. With G = sum of k v^T and
H = sum of k k^T over all tokens, weighted by rates and decays, a query q finds G^T (H + ridge I)^-1 q.

- ``form: mesa`` keeps G and H, which fade alike, and solves with them: once for a segment, by Cholesky, where tokens
  read what earlier segments wrote; by conjugate gradients for each token where they read ``within`` their segment.
- ``form: kalman`` keeps the solution itself, and the covariance (H + ridge I)^-1, which each write makes anew
  (recursive least squares). It gives what the other form gives without decay; no read has anything left to solve.

What differs: as in `memlm.memory.delta` queries are not convolved and values pass no SiLU. MesaNet learns a ridge for
each channel, here it is a setting; its iteration starts from q over the diagonal of H + ridge, here from 0. Gradients
are those of the exact solution, solved for in the same way. Larimar's keys are addresses in a memory that is
learned, here they are keys of the token; its prior mean is learned, here it is 0; and nothing is sampled.

Shapes: see `memlm.memory.matrix`; the matrix has W = V + K columns: G and H, or the solution and the covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory import matrix
from memlm.memory.chunks import Chunks, chunks_of
from memlm.memory.contract import Sizes, Trace
from memlm.memory.matrix import MatrixMemory, MatrixState, Rule, Tokens, cut, exact

Apply = Callable[[Tensor], Tensor]


class Sums(NamedTuple):
    """G and H, [G, H] = sum of k [v, k]^T: linear attention to values and keys.

    Attributes:
        chunks: What tokens add.
        query: Queries, (..., L, K); None if nothing is found.
        ridge: Added to the diagonal of H.
        n_step: Steps of conjugate gradients.
    """

    chunks: Chunks
    query: Tensor | None
    ridge: float
    n_step: int

    def each(self) -> list[Chunks]:
        """See `Rule`."""
        return self.chunks.each()

    def found(self, matrix: Tensor, written: Tensor) -> Tensor:
        """See `Rule`: each token solves with H as it is after its own write, which no step needs to form."""
        assert self.query is not None
        d_value = matrix.shape[-1] - self.query.shape[-1]
        of_keys, of_values = (
            (matrix[..., part].contiguous(), written[..., part].contiguous())
            for part in (slice(d_value, None), slice(d_value))
        )
        solution = solve(lambda x: self.chunks.asking(x).found(*of_keys) + self.ridge * x, self.query, self.n_step)
        return self.chunks.asking(solution).found(*of_values)


class Kalman(NamedTuple):
    """[M, U], the solution and the covariance: each token corrects M by its gain U k / (k U k + 1).

    All tokens of a chunk are one measurement of L numbers. Its errors are told apart by a Cholesky factor, in the order
    of the tokens, so that the first rows of what is written are what the first tokens alone would write.

    Attributes:
        k: Keys times the root of their rates, which is to divide the noise by the rate, (..., L, K).
        target: Values times the same, and zeros, (..., L, V + K).
        query: Queries, (..., L, K); None if nothing is found.
    """

    k: Tensor
    target: Tensor
    query: Tensor | None

    def each(self) -> list[Kalman]:
        """See `Rule`."""
        return [Kalman(*part, None) for part in zip(self.k.unbind(), self.target.unbind(), strict=True)]

    def written(self, matrix: Tensor) -> Tensor:
        """Errors of M and, instead of those of U, the gains less their sign, of unit noise each, (..., L, V + K)."""
        known = self.k @ matrix
        noise = torch.eye(self.k.shape[-2], dtype=known.dtype, device=known.device)
        factor = torch.linalg.cholesky_ex(known[..., -self.k.shape[-1] :] @ self.k.mT + noise).L
        return torch.linalg.solve_triangular(factor, self.target - known, upper=False)

    def after(self, matrix: Tensor, written: Tensor) -> Tensor:
        """See `Pass`."""
        return matrix - written[..., -self.k.shape[-1] :].mT @ written

    def found(self, matrix: Tensor, written: Tensor) -> Tensor:
        """See `Rule`."""
        assert self.query is not None
        d_value = matrix.shape[-1] - self.query.shape[-1]
        gains = (self.query @ written[..., d_value:].mT).tril()
        return self.query @ matrix[..., :d_value] - gains @ written[..., :d_value]


def conjugate_gradients(apply: Apply, b: Tensor, n_step: int) -> Tensor:
    """The x with ``apply(x) = b``, for each row (..., K) alone.

    Args:
        apply: A product with a symmetric positive definite matrix for each row.
        b: Right sides, (..., K).
        n_step: Steps; as many as K give the solution up to rounding.
    """
    least = torch.finfo(b.dtype).tiny  # nothing is left once it is solved
    x, rest, direction = torch.zeros_like(b), b, b
    size = (b * b).sum(dim=-1, keepdim=True)
    for _ in range(n_step):
        image = apply(direction)
        step = size / (direction * image).sum(dim=-1, keepdim=True).clamp(min=least)
        x, rest = x + step * direction, rest - step * image
        before, size = size, (rest * rest).sum(dim=-1, keepdim=True)
        direction = rest + size / before.clamp(min=least) * direction
    return x


def solve(apply: Apply, b: Tensor, n_step: int) -> Tensor:
    """The same with the gradients of the solution, whatever the steps were: another solution, with the same matrix."""
    with torch.no_grad():
        x = conjugate_gradients(apply, b, n_step)
    if not torch.is_grad_enabled():
        return x
    rest = b - apply(x)  # of x as a number: its gradient is that of the solution, once the matrix is divided out
    if rest.requires_grad:
        rest.register_hook(torch.no_grad()(lambda grad: conjugate_gradients(apply, grad, n_step)))
    return x + (rest - rest.detach())


class MesaMemory(MatrixMemory):
    """A matrix per head that is, at any time, the least-squares fit of all values to their keys.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_head: Heads, each with a matrix of its own.
        d_key: Width of a head's keys and queries.
        d_value: Width of a head's values.
        form: ``mesa``, sums are kept and solved with for each query; ``kalman``, the solution and its covariance are.
        decay: Whether what a ``head`` has seen fades as tokens and learned rates say, or ``none`` of it does.
        ridge: How much the fit is drawn to zero, above 0; below 0.1 the sums of a long text are hard to solve with.
        n_step: Steps of conjugate gradients, of ``form: mesa`` where tokens read ``within`` their segment.
        within: Whether a token reads what tokens up to itself wrote, or what earlier segments did.
        conv: Tokens, itself and those before it, of which a token's key and value are made; 1 for itself alone.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        sizes: Sizes,
        n_head: int = 2,
        d_key: int = 64,
        d_value: int = 64,
        form: Literal["mesa", "kalman"] = "mesa",
        decay: Literal["none", "head"] = "head",
        ridge: float = 1.0,
        n_step: int = 30,
        within: bool = False,
        conv: int = 4,
    ) -> None:
        if form not in ("mesa", "kalman"):
            raise ValueError(f"form must be 'mesa' or 'kalman', got {form!r}")
        if decay not in ("none", "head"):
            raise ValueError(f"decay must be 'none' or 'head', got {decay!r}")
        if form == "kalman" and decay != "none":
            raise ValueError(f"decay must be 'none' with form 'kalman', whose covariance would grow, got {decay!r}")
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, got {ridge}")
        if n_step < 1:
            raise ValueError(f"n_step must be at least 1, got {n_step}")
        super().__init__(d_model, n_head, d_key, d_value, decay, within, conv=conv)
        self.form, self.ridge, self.n_step, self.segment_len = form, ridge, n_step, sizes.segment_len
        self.to_rate = nn.Linear(d_model, n_head)
        self.init_maps()

    def init_state(self, n_row: int) -> MatrixState:
        """Sums of zero; or a solution of zero, known as well as the ridge says."""
        start = self.to_key.weight.new_zeros(n_row, self.n_head, self.d_key, self.d_value + self.d_key)
        if self.form == "kalman":
            start[..., self.d_value :].diagonal(dim1=-2, dim2=-1).fill_(1 / self.ridge)
        return MatrixState(start)

    def rule(self, tokens: Tokens, n_segment: int) -> tuple[Rule, Trace]:
        """What tokens add to the sums, or measure; see `MatrixMemory.rule`."""
        rate = self.rates(self.to_rate, tokens.x) * tokens.valid
        trace = {"rate": self.mean(rate, tokens.valid)}
        decay, query = (None if part is None else cut(part, n_segment) for part in (tokens.decay, tokens.query))
        if self.form == "kalman":
            root = self.rates(self.to_rate, tokens.x).sqrt()
            k, v = root * tokens.k, root * tokens.v
            target = torch.cat([v, torch.zeros_like(k)], dim=-1)
            return Kalman(cut(k, n_segment), cut(target, n_segment), query), trace
        added = cut(rate * torch.cat([tokens.v, tokens.k], dim=-1), n_segment)
        return Sums(chunks_of(cut(tokens.k, n_segment), added, None, decay), query, self.ridge, self.n_step), trace

    def prepare(self, state: MatrixState) -> MatrixState:
        """The solution (B, H, K, V); see `Memory.prepare`."""
        left, right = state.matrix.split([self.d_value, self.d_key], dim=-1)
        if self.form == "kalman":
            return MatrixState(left)
        with exact(left):
            ridge = self.ridge * torch.eye(self.d_key, dtype=right.dtype, device=right.device)
            return MatrixState(torch.cholesky_solve(left, torch.linalg.cholesky_ex(right + ridge).L))

    def flops_per_token(self) -> int:
        """Maps; both matrices, written and solved or stepped with; what is found; products with tokens of the chunk."""
        k, v, chunk = self.d_key, self.d_value, matrix.CHUNK
        inside = k + v if self.within else 0
        if self.form == "kalman":
            each = 2 * k * (v + k) + chunk * (k + (v + k) // 2 + chunk // 6)
        elif self.within:
            each = k * (v + k) + self.n_step * (k * k + 2 * chunk * k)
        else:
            each = k * (v + k) + (k**3 // 6 + k * k * v) // self.segment_len
        return super().flops_per_token() + 2 * self.n_head * (each + k * v + chunk * inside)
