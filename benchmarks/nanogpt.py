"""A small GPT as nanoGPT's public description has it, written anew: a peer that does nothing it need not.

Learned positions, LayerNorm before attention and feed-forward, queries, keys and values in one product, fused causal
attention, GELU, no biases (its training script's default), the head tied to the embedding, all logits at once.

Source: A. Karpathy, nanoGPT (2022), https://github.com/karpathy/nanoGPT.

Shapes: B rows, T tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    def __init__(self, d_model: int, n_head: int, d_ff: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.to_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(d_model, bias=False),
            nn.Linear(d_model, d_ff, bias=False),
            nn.GELU(),
            nn.Linear(d_ff, d_model, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D / H)
            for part in self.to_qkv(self.attention_norm(x)).chunk(3, dim=2)
        )
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.to_output(found.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class NanoGPT(nn.Module):
    """The model.

    Args:
        n_vocab: Size of the vocabulary.
        n_layer: Number of layers.
        n_head: Attention heads per layer.
        d_model: Width.
        d_ff: Width of the feed-forward.
        context: Most tokens of a row.
    """

    def __init__(self, n_vocab: int, n_layer: int, n_head: int, d_model: int, d_ff: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_vocab, d_model)
        self.position = nn.Embedding(context, d_model)
        self.blocks = nn.Sequential(*(_Block(d_model, n_head, d_ff) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(d_model, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        blocks: Any = self.blocks
        for block in blocks:
            for residual in (block.to_output, block.feed_forward[3]):
                nn.init.normal_(residual.weight, std=0.02 / (2 * n_layer) ** 0.5)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token loss of ``ids`` (B, T) and the tokens after each, ``targets`` (B, T)."""
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.embedding.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
