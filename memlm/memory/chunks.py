"""What tokens do to a matrix, a chunk of them at once: linear attention and the delta rule, with and without decay.

Token by token, a matrix M first fades, M <- diag(a_t) M; then token t writes under its key, M <- M + k_t u_t^T, with
``u_t = x_t - M^T e_t``: its value, less what stands under the key by which it erases. What all tokens of a chunk write
solves one triangular system (WY form: DeltaNet, 2406.06484; per channel: Kimi Linear, 2510.26692).

No logarithm of a share is ever the difference of two sums: each is summed over the very tokens that it stands for. So
nothing overflows, and a token that leaves nothing costs no digits of what comes after it.

Shapes: ... any leading dimensions, L tokens of a chunk (a power of two), K width of a key, V of a value, A channels
that fade apart: K, or 1 if all fade alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Chunks(NamedTuple):
    """What the tokens of chunks do to the matrix M before their chunk, whatever it is.

    Attributes:
        k: Keys, (..., L, K).
        late: What is left of the keys at the chunk's end, (..., L, K).
        value: x, (..., L, V).
        erase: e, for M as it was before the chunk, (..., L, K); None if nothing is erased.
        inverse: Of the system that ties what tokens write to each other, (..., L, L); None if nothing is erased.
        since: Share of M that is left at each token, (..., L, A); None for all of it.
        between: Share of what token i (column) wrote that is left at token t (row), 0 for i > t, (..., L, L); None if
            nothing fades, or channels fade apart.
        decay: Logs of what each token leaves, (..., L, K), where channels fade apart; None elsewhere.
    """

    k: Tensor
    late: Tensor
    value: Tensor
    erase: Tensor | None
    inverse: Tensor | None
    since: Tensor | None
    between: Tensor | None
    decay: Tensor | None

    def each(self) -> list[Chunks]:
        """The chunks one by one, of chunks (C, ...)."""
        parts = zip(*([None] * len(self.k) if part is None else part.unbind() for part in self), strict=True)
        return [Chunks(*part) for part in parts]

    def written(self, matrix: Tensor) -> Tensor:
        """What tokens write into ``matrix`` (..., K, V), (..., L, V)."""
        if self.inverse is None or self.erase is None:
            return self.value
        return self.inverse @ (self.value - self.erase @ matrix)

    def after(self, matrix: Tensor, written: Tensor) -> Tensor:
        """The matrix (..., K, V) after the chunk."""
        kept = matrix if self.since is None else self.since[..., -1, :, None] * matrix
        return kept + self.late.mT @ written

    def found(self, query: Tensor, matrix: Tensor, written: Tensor) -> Tensor:
        """What each token finds under its query (..., L, K), once it has written: (..., L, V)."""
        left = query if self.since is None else query * self.since
        return left @ matrix + products(query, self.k, self.between, self.decay) @ written


def chunks_of(k: Tensor, value: Tensor, erase: Tensor | None, decay: Tensor | None) -> Chunks:
    """Solve the rule within each chunk.

    Args:
        k: Keys, (..., L, K).
        value: What tokens write where nothing is erased, (..., L, V).
        erase: Keys under which what stands there is erased, (..., L, K); None to erase nothing.
        decay: Logs of the share of the matrix that each token leaves, (..., L, A), at most 0; None for all of it.
    """
    since = between = inverse = None
    late = k
    if decay is not None:
        since = decay.cumsum(dim=-2).exp()
        late = k * sums_after(decay).exp()
        if decay.shape[-1] == 1 < k.shape[-1]:
            between, decay = decay_between(decay[..., 0]), None
    if erase is not None:
        inverse = inverse_of(products(erase, k, between, decay))
        erase = erase if since is None else erase * since
    return Chunks(k, late, value, erase, inverse, since, between, decay)


def products(query: Tensor, k: Tensor, between: Tensor | None, decay: Tensor | None) -> Tensor:
    """Of query t (row) with what is left at t of key i (column), 0 for i > t, (..., L, L); see `Chunks`."""
    if decay is not None:
        return faded_products(query, k, decay)
    return (query @ k.mT).tril() if between is None else (query @ k.mT) * between


def faded_products(query: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """The same where each channel fades at its own pace: ``sum_c query_tc k_ic exp(decay_(i+1)c + ... + decay_tc)``."""
    return _FadedProducts.apply(query, k, decay)  # type: ignore[no-any-return, no-untyped-call]


def sums_after(steps: Tensor) -> Tensor:
    """Of all that comes after each token, (..., L, A)."""
    return F.pad(steps[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(dim=-2).flip(-2)


def decay_between(decay: Tensor) -> Tensor:
    """Share of what column i wrote that is left at row t, of logs (..., L) of what each token leaves: (..., L, L)."""
    cells = torch.arange(decay.shape[-1], device=decay.device)
    row, column = cells[:, None], cells
    steps = torch.where(row > column, decay[..., None], 0.0)
    return steps.cumsum(dim=-2).masked_fill(row < column, -torch.inf).exp()


def inverse_of(lower: Tensor) -> Tensor:
    """Inverse of I + what of ``lower`` (..., L, L) lies below the diagonal."""
    return _Inverse.apply(lower)  # type: ignore[no-any-return, no-untyped-call]


class _FadedProducts(torch.autograd.Function):
    """By blocks of the diagonal, which are joined in twos until one is left.

    Of two blocks, the tokens of the second meet those of the first at the border between them. The shares up to there
    and from there on are at most 1, so that a product of matrices does, without a share for each channel of each pair.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, k: Tensor, decay: Tensor) -> Tensor:
        share = decay.exp()
        ctx.save_for_backward(query, k, share)
        found = query.new_zeros(*query.shape[:-1], query.shape[-2])
        found.diagonal(dim1=-2, dim2=-1).copy_((query * k).sum(dim=-1))
        for n, late, early in _shares(share):
            first, second = _halves(k, n)[0] * early, _halves(query, n)[1] * late
            _diagonal_blocks(found, 2 * n)[..., n:, :n] = second @ first.mT
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, k, share = ctx.saved_tensors
        on_diagonal = grad.diagonal(dim1=-2, dim2=-1)[..., None]
        of_query, of_k = on_diagonal * k, on_diagonal * query
        for n, late, early in _shares(share):
            first, second = _halves(k, n)[0] * early, _halves(query, n)[1] * late
            block = _diagonal_blocks(grad, 2 * n)[..., n:, :n].contiguous()
            _halves(of_query, n)[1].addcmul_(late, _times(block, first))
            _halves(of_k, n)[0].addcmul_(early, _times(block.mT, second))
        # A step fades what goes from keys before it to queries from it on: what goes to them, less what begins there.
        steps = query * of_query - k * of_k
        return of_query, of_k, steps.flip(-2).cumsum(dim=-2).flip(-2)


def _shares(share: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each size n of blocks what is left on both sides of the border between two, (..., L / 2n, n, K) each.

    Of what comes to it at tokens of the second block, and, until it, of what tokens of the first wrote.
    """
    since, until, n = share.clone(), torch.ones_like(share), 1
    while n < share.shape[-2]:
        (first, late), (early, _) = _halves(since, n), _halves(until, n)
        yield n, late, early
        early *= late[..., -1:, :]
        late *= first[..., -1:, :]
        n *= 2


def _times(block: Tensor, part: Tensor) -> Tensor:
    """``block`` (..., n, n) times ``part`` (..., n, K); PyTorch has no fast product for very small ones on the CPU."""
    return block @ part if block.shape[-1] > 2 else (block[..., None] * part[..., None, :, :]).sum(dim=-2)


def _halves(part: Tensor, n: int) -> tuple[Tensor, ...]:
    """First and second blocks of all pairs, (..., L / 2n, n, K) each, as views of (..., L, K)."""
    return part.unflatten(-2, (-1, 2, n)).unbind(dim=-3)


class _Inverse(torch.autograd.Function):
    """By blocks: the inverse of [[A, 0], [C, B]] is [[A', 0], [-B' C A', B']].

    Sums of powers of ``lower`` would take fewer steps, but their terms grow as binomials do where a key comes again and
    again, and cancel. The blocks are inverses themselves, whose entries stay small.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        n_token = lower.shape[-1]
        inverse = torch.eye(n_token, dtype=lower.dtype, device=lower.device).repeat(*lower.shape[:-2], 1, 1)
        n = 1
        while n < n_token:
            pairs, held = _diagonal_blocks(lower, 2 * n), _diagonal_blocks(inverse, 2 * n)
            first, second = held[..., :n, :n], held[..., n:, n:]
            held[..., n:, :n] = -(second @ pairs[..., n:, :n] @ first)
            n *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def _diagonal_blocks(part: Tensor, n: int) -> Tensor:
    """The blocks (..., L / n, n, n) on the diagonal of (..., L, L), as a view."""
    return part.unflatten(-1, (-1, n)).unflatten(-3, (-1, n)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
