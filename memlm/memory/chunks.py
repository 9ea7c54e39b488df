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

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Chunks(NamedTuple):
    """What the tokens of chunks do to the matrix M before their chunk, whatever it is.

    Attributes:
        late: What is left of the keys at the chunk's end, (..., L, K).
        value: What tokens write where nothing is erased, (..., L, V).
        erase: Keys under which is erased, with what is left of M, (..., L, K); None if nothing is erased.
        inverse: Of the system that ties what tokens write to each other, (..., L, L); None if nothing is erased.
        left: Share of M that is left at the chunk's end, (..., A, 1); None for all of it.
        alike: What tells of any query what it meets, where channels fade alike; None elsewhere.
        query: Queries with what is left of M, (..., L, K); None unless there are queries.
        met: Products of them with what is left of the keys, (..., L, L); None unless there are queries.
    """

    late: Tensor
    value: Tensor
    erase: Tensor | None
    inverse: Tensor | None
    left: Tensor | None
    alike: Alike | None
    query: Tensor | None
    met: Tensor | None

    def each(self) -> list[Chunks]:
        """The chunks one by one, of chunks (C, ...); they have no queries."""
        passed = (self.late, self.value, self.erase, self.inverse, self.left, None, None, None)
        parts = zip(*([None] * len(self.late) if part is None else part.unbind() for part in passed), strict=True)
        return [Chunks(*part) for part in parts]

    def written(self, matrix: Tensor) -> Tensor:
        """What tokens write into ``matrix`` (..., K, V), (..., L, V)."""
        if self.inverse is None or self.erase is None:
            return self.value
        return self.inverse @ (self.value - self.erase @ matrix)

    def after(self, matrix: Tensor, written: Tensor) -> Tensor:
        """The matrix (..., K, V) after the chunk."""
        return (matrix if self.left is None else self.left * matrix) + self.late.mT @ written

    def asking(self, query: Tensor) -> Chunks:
        """The same with other queries (..., L, K), where channels fade alike."""
        assert self.alike is not None
        return self._replace(query=self.alike.faded(query), met=self.alike.met(query))

    def found(self, matrix: Tensor, written: Tensor) -> Tensor:
        """What each token finds under its query, once it has written: (..., L, V)."""
        assert self.query is not None
        assert self.met is not None
        return self.query @ matrix + self.met @ written


class Alike(NamedTuple):
    """What is left at tokens of a chunk where all channels fade alike.

    Attributes:
        k: Keys, (..., L, K).
        since: Share of the matrix before the chunk that is left at each token, (..., L, 1); None for all of it.
        between: Share of what token i (column) wrote that is left at token t (row), 0 for i > t, (..., L, L); None for
            all of it.
    """

    k: Tensor
    since: Tensor | None
    between: Tensor | None

    def faded(self, query: Tensor) -> Tensor:
        """Queries (..., L, K) with what is left of the matrix."""
        return query if self.since is None else query * self.since

    def met(self, query: Tensor) -> Tensor:
        """Products of query t (row) with what is left at t of key i (column), 0 for i > t, (..., L, L)."""
        found = query @ self.k.mT
        return found.tril() if self.between is None else found * self.between


def chunks_of(
    k: Tensor, value: Tensor, erase: Tensor | None, decay: Tensor | None, query: Tensor | None = None
) -> Chunks:
    """Solve the rule within each chunk.

    Args:
        k: Keys, (..., L, K).
        value: What tokens write where nothing is erased, (..., L, V).
        erase: Keys under which what stands there is erased, (..., L, K); None to erase nothing.
        decay: Logs of the share of the matrix that each token leaves, (..., L, A), at most 0; None for all of it.
        query: What is asked once a token has written, (..., L, K); None to ask for nothing.
    """
    asked = [part for part in (erase, query) if part is not None]
    alike = None
    if decay is not None and decay.shape[-1] > 1:
        late, left, faded, met = faded_apart(k, decay, *asked)
    else:
        late, left, alike = k, None, Alike(k, None, None)
        if decay is not None:
            since = decay.cumsum(dim=-2).exp()
            alike = Alike(k, since, decay_between(decay[..., 0]))
            late, left = k * sums_after(decay).exp(), since[..., -1, :, None]
        faded, met = [alike.faded(part) for part in asked], [alike.met(part) for part in asked]
    erase, inverse = (None, None) if erase is None else (faded[0], inverse_of(met[0]))
    query, of_query = (None, None) if query is None else (faded[-1], met[-1])
    return Chunks(late, value, erase, inverse, left, alike, query, of_query)


def faded_apart(k: Tensor, decay: Tensor, *query: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """What is left where each channel fades at its own pace.

    Args:
        k: Keys, (..., L, K).
        decay: Logs of the share that each token leaves, (..., L, K).
        *query: Queries, (..., L, K) each.

    Returns:
        Keys with what is left of them at the end; what is left of what was before, (..., K, 1); each query with what is
        left of that; and each query's products with what is left of the keys at its token, 0 with later ones,
        (..., L, L): ``sum_c query_tc k_ic exp(decay_(i+1)c + ... + decay_tc)``.
    """
    late, left, *found = _FadedApart.apply(k, decay, *query)  # type: ignore[no-untyped-call]
    return late, left.mT, found[: len(query)], found[len(query) :]


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


class _FadedApart(torch.autograd.Function):
    """By blocks of one token each, which are joined in twos until one is left.

    Keys are kept with what is left of them at the end of their block, queries with what is left of what was before it.
    Of two blocks, the queries of the second meet the keys of the first at the border between them, so that a product of
    matrices does, without a share for each channel of each pair. No share is ever more than 1.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, decay: Tensor, *query: Tensor) -> tuple[Tensor, ...]:
        left = decay.exp()  # of each block
        queries = torch.stack(query, dim=-2) if query else k[..., None, :][..., :0, :]  # (..., L, R, K)
        met = [part.new_zeros(*part.shape[:-1], part.shape[-2]) for part in query]
        for part, products in zip(query, met, strict=True):
            products.diagonal(dim1=-2, dim2=-1).copy_((part * k).sum(dim=-1))
        late, faded = k.clone(), queries * left[..., None, :]
        kept = [k, queries, left]
        n = 1
        while n < k.shape[-2]:
            first, second = _halves(late, n, -2)[0], _halves(faded, n, -3)[1]
            keys, asked = (part.clone(memory_format=torch.contiguous_format) for part in (first, second))
            blocks = (asked.flatten(-3, -2) @ keys.mT).unflatten(-2, (n, -1))  # (..., L / 2n, n, R, n)
            for i, products in enumerate(met):
                _diagonal_blocks(products, 2 * n)[..., n:, :n] = blocks[..., i, :]
            of_first, of_second = _halves(left, 1, -2)
            first *= of_second
            second *= of_first[..., None, :]
            kept += [keys, asked, of_first, of_second]
            left = (of_first * of_second).flatten(-3, -2)
            n *= 2
        ctx.save_for_backward(late, left, *kept)
        return late, left, *faded.unbind(dim=-2), *met

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_late: Tensor, of_left: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        late, left, k, queries, share, *kept = ctx.saved_tensors
        n_query = queries.shape[-2]
        to_end = (of_late * late).sum(dim=-2, keepdim=True) + of_left * left
        of_k = of_late.clone()
        of_query = torch.stack(grads[:n_query], dim=-2) if n_query else torch.zeros_like(queries)
        of_met = grads[n_query:]
        n = k.shape[-2] // 2
        while n:
            *kept, keys, asked, of_first, of_second = kept
            first, second = _halves(of_k, n, -2)[0], _halves(of_query, n, -3)[1]
            first *= of_second
            second *= of_first[..., None, :]
            if n_query:
                blocks = torch.stack([_diagonal_blocks(part, 2 * n)[..., n:, :n] for part in of_met], dim=-2)
                blocks = blocks.flatten(-3, -2)
                first += _times(blocks.mT, asked.flatten(-3, -2))
                second += _times(blocks, keys).view_as(second)
            n //= 2
        of_query *= share[..., None, :]
        # A step fades what goes from keys before it to queries from it on: what goes to them, less what begins there.
        steps = (queries * of_query).sum(dim=-2) - k * of_k
        of_decay = steps.flip(-2).cumsum(dim=-2).flip(-2) + to_end
        for i, part in enumerate(of_met):
            on_diagonal = part.diagonal(dim1=-2, dim2=-1)[..., None]
            of_k.addcmul_(on_diagonal, queries[..., i, :])
            of_query[..., i, :].addcmul_(on_diagonal, k)
        return of_k, of_decay, *of_query.unbind(dim=-2)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``; PyTorch has no fast product on the CPU where ``left`` is one row or one column."""
    return (left[..., None] * right[..., None, :, :]).sum(dim=-2) if 1 in left.shape[-2:] else left @ right


def _halves(part: Tensor, n: int, dim: int) -> tuple[Tensor, ...]:
    """First and second blocks of n of all pairs of blocks along a dimension, as views."""
    return part.unflatten(dim, (-1, 2, n)).unbind(dim=dim - 1)


class _Inverse(torch.autograd.Function):
    """By blocks: the inverse of [[A, 0], [C, B]] is [[A', 0], [-B' C A', B']].

    Sums of powers of ``lower`` would take fewer steps, but their terms grow as binomials do where a key comes again and
    again, and cancel. The blocks are inverses themselves, whose entries stay small.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        n_token = lower.shape[-1]
        inverse = torch.eye(n_token, dtype=lower.dtype, device=lower.device).repeat(*lower.shape[:-2], 1, 1)
        inverse.diagonal(-1, -2, -1)[..., ::2] = -lower.diagonal(-1, -2, -1)[..., ::2]  # blocks of two tokens
        n = 2
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
