"""LMCODE: a causal transformer whose layers read and write memories.

Source: LMCODE (Language Model with Memory CODE): token and position embeddings, memory-augmented layers (causal
self-attention, memories with gates, feed-forward), a language-model head, autoregressive generation.

How text is cut into segments: `memlm.models.segments`.

Shapes: B rows, S segments of the grid, T tokens per segment, Q columns computed, O overlap, D model width, H heads,
E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.base import Memory
from memlm.models.segments import Grid, SegmentLayer, SegmentModel


class Attention(nn.Module):
    """Causal self-attention over a segment and the end of the one before."""

    causal: Tensor
    own: Tensor
    rotation: Tensor | None

    def __init__(self, d_model: int, n_head: int, segment_len: int, overlap: int, rope: bool, dropout: float) -> None:
        super().__init__()
        self.n_head, self.overlap, self.dropout = n_head, overlap, dropout
        self.to_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        place = torch.arange(overlap + segment_len)
        # Query in column c sees the cells up to its own: (T, O + T).
        self.register_buffer("causal", place <= place[overlap:, None], persistent=False)
        self.register_buffer("own", place >= overlap, persistent=False)  # cells of the segment itself, (O + T,)
        angle = place[:, None] / 10_000 ** (torch.arange(0, d_model // n_head, 2) / (d_model // n_head))
        table = torch.stack([angle.cos(), angle.sin()]) if rope else None
        self.register_buffer("rotation", table, persistent=False)  # (2, O + T, E / 2)

    def forward(self, x: Tensor, cache: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            x: Normalised hidden states, (B, S, Q, D).
            cache: Keys and values of the segment before and of the open one, (B, O + T, 2, H, E).
            grid: Where the tokens lie.

        Returns:
            Output (B, S, Q, D); keys and values of the grid (B, S, T, 2, H, E); and of the ends of the segments before
            each segment (B, S, O, 2, H, E).
        """
        n_row, n_segment, n_query, _ = x.shape
        qkv = self.to_qkv(x).unflatten(-1, (3, self.n_head, -1))  # (B, S, Q, 3, H, E)
        query, kv = qkv[..., 0, :, :], qkv[..., 1:, :, :]
        tail, opened = cache[:, : self.overlap], cache[:, self.overlap :]
        kv = grid.fill(kv, opened)  # (B, S, T, 2, H, E)
        before = torch.cat([tail[:, None], kv[:, :-1, kv.shape[2] - self.overlap :]], dim=1)  # (B, S, O, 2, H, E)
        key, value = torch.cat([before, kv], dim=2).flatten(0, 1).unbind(2)  # (B * S, O + T, H, E)
        query = query.flatten(0, 1)  # (B * S, Q, H, E)
        if self.rotation is not None:
            query = _rotate(query, self.rotation[:, self.overlap :][:, grid.columns])
            key = _rotate(key, self.rotation)
        mask = self.causal[grid.columns] & (grid.continues[..., None, None] | self.own)  # (B, S, Q, O + T)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask.flatten(0, 1)[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = out.transpose(1, 2).reshape(n_row, n_segment, n_query, -1)
        return self.to_output(out), kv, before


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position encoding of ``x`` (N, L, H, E) by ``rotation`` (2, L, E / 2)."""
    cos, sin = rotation[:, :, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Layer(SegmentLayer):
    """Memory-augmented layer: self-attention, memories, feed-forward."""

    def __init__(
        self, d_model: int, n_head: int, d_ff: int, segment_len: int, overlap: int, rope: bool, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = Attention(d_model, n_head, segment_len, overlap, rope, dropout)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(d_model),
            nn.Linear(d_model, d_ff, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(d_ff, d_model, bias=False),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def init_cache(self, n_row: int) -> Tensor:
        """Keys and values before position encoding of the end of the segment before and of the open segment.

        Shape (B, O + T, 2, H, E).
        """
        attention, weight = self.attention, self.attention.to_qkv.weight
        n_cell, width = len(attention.own), weight.shape[1] // attention.n_head
        shape = (n_row, n_cell, 2, attention.n_head, width)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # no part of a weight that is dealt out

    def mix(self, x: Tensor, cache: Tensor, grid: Grid) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Self-attention with its residual; see `Attention`."""
        out, kv, before = self.attention(self.attention_norm(x), cache, grid)
        return x + self.dropout(out), (kv, before)

    def carry(self, kept: tuple[Tensor, Tensor], stays_open: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """See `SegmentLayer.carry`."""
        kv, before = kept
        tail = stays_open(before, kv[:, -1, kv.shape[2] - self.attention.overlap :])
        return torch.cat([tail, stays_open(kv, torch.zeros_like(kv[:, 0]))], dim=1)


class LMCode(SegmentModel):
    """Transformer language model with memory.

    Args:
        n_vocab: Size of the vocabulary.
        memories: By name, a constructor of one memory module, called with ``d_model``.
        n_layer: Number of layers.
        n_head: Attention heads per layer.
        d_model: Width.
        d_ff: Width of the feed-forward; None for four times ``d_model``.
        segment_len: Tokens per segment.
        overlap: Tokens of the segment before that attention still sees.
        position: ``rope`` (rotary) or ``learned`` (an embedding of the place within the segment).
        dropout: Dropout probability.
        memory_layers: Layers with memory: ``middle``, ``all``, or a list of indices from 0.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        n_vocab: int,
        memories: Mapping[str, Callable[..., Memory]],
        n_layer: int = 4,
        n_head: int = 4,
        d_model: int = 128,
        d_ff: int | None = None,
        segment_len: int = 128,
        overlap: int = 16,
        position: Literal["rope", "learned"] = "rope",
        dropout: float = 0.0,
        memory_layers: Literal["middle", "all"] | list[int] = "middle",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(n_vocab, n_layer, d_model, segment_len, overlap, memory_layers, gradient_checkpointing)
        if n_head < 1 or d_model % n_head:
            raise ValueError(f"model.n_head must divide model.d_model ({d_model}), got {n_head}")
        if position == "rope" and (d_model // n_head) % 2:
            raise ValueError(
                f"rotary positions need an even head width, got {d_model} / {n_head} = {d_model // n_head}"
            )
        if d_ff is not None and d_ff < 1:
            raise ValueError(f"model.d_ff must be at least 1 or null, got {d_ff}")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {dropout}")
        self.n_head = n_head

        self.embedding = nn.Embedding(n_vocab, d_model)
        self.position_embedding = nn.Embedding(segment_len, d_model) if position == "learned" else None
        self.layers = nn.ModuleList(
            Layer(d_model, n_head, d_ff or 4 * d_model, segment_len, overlap, position == "rope", dropout)
            for _ in range(n_layer)
        )
        self.norm = nn.RMSNorm(d_model)
        self.attach(memories)
        self._initialise()

    def _initialise(self) -> None:
        """All initial values of the transformer; memories have their own.

        Embeddings enter with unit variance (`_embed` scales them) and so dominate the stream at first; weights have
        variance 1 / fan-in, residual outputs less.
        """
        nn.init.normal_(self.embedding.weight, std=self.d_model**-0.5)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=0.1)
        for layer in self.layers:
            for linear in (layer.attention.to_qkv, layer.feed_forward[1]):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (layer.attention.to_output, layer.feed_forward[3]):
                nn.init.normal_(linear.weight, std=(2 * self.n_layer * linear.in_features) ** -0.5)

    def _enter(self, embeddings: Tensor, columns: slice) -> Tensor:
        """Embeddings, with learned positions if there are any."""
        return embeddings if self.position_embedding is None else embeddings + self.position_embedding.weight[columns]
