"""The layers of a model, with what stands before and behind them.

Shapes: B rows, S segments of the grid, Q columns computed, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memlm.models.base import LanguageModel
from memlm.models.grid import Grid
from memlm.models.state import LocalState


class Stack(LanguageModel):
    """A language model of an embedding, layers and a norm; the head has the weights of the embedding.

    Attributes:
        n_vocab: Size of the vocabulary.
        n_layer: Number of layers.
        gradient_checkpointing: Whether activations are worked out again in the backward pass.
        n_together: Segments that layers run over together, at most; None for as many as fit. With 1, a call is run as
            the definition says.
        bare_when_empty: Whether a memory that holds nothing leaves the model as it is without one, whatever that memory
            does around a mixer.
        by_column: Whether its layers can take one token at a time: see `SegmentLayer.step`.
        n_again: Tokens before a segment that the model takes in again with it.
        embedding: Token embeddings.
        layers: `memlm.models.mixers.SegmentLayer` one above the other.
        norm: What stands behind the last one.
    """

    n_vocab: int
    d_model: int
    n_layer: int
    gradient_checkpointing: bool = False
    n_together: int | None = None
    bare_when_empty: bool = False
    by_column: bool = True
    n_again: int = 0
    embedding: nn.Embedding
    layers: Any  # nn.ModuleList of SegmentLayer, whose items torch types as bare modules
    norm: nn.Module

    def no_context(self, n_row: int) -> LocalState:
        """A local state before any text."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings of unit variance, (..., D)."""
        return self.embedding(ids) * self.d_model**0.5

    def ready(self, grid: Grid, ids: Tensor) -> Grid:
        """A grid with what the model has to know before its layers run.

        Args:
            grid: Where the tokens lie.
            ids: Those of the lookback, then those of the grid, (B, C + N).
        """
        return grid

    def enter(self, embeddings: Tensor, columns: slice | Tensor) -> Tensor:
        """What the first layer gets, (B, S, Q, D), of the embeddings of the ``columns`` of each segment.

        Or, (B, D), of those of one token of each row, which stands in one of the ``columns`` (B,).
        """
        return embeddings

    def entered(self, embeddings: Tensor, grid: Grid) -> Tensor:
        """What the first layer gets, (B, S, Q, D), of the embeddings of all cells of a grid, (B, S, T, D)."""
        return self.enter(embeddings[:, :, grid.columns], grid.columns)

    def let_in(self, name: str, place: int, value: Tensor, y: Tensor) -> Tensor:
        """What a read adds to the stream.

        Args:
            name: Name of the memory.
            place: Number of the layer among those with memory.
            value: What the memory gives, (B, S * Q, D).
            y: The stream behind the mixer, (B, S * Q, D).
        """
        return value

    @property
    def head_weight(self) -> Tensor:
        """Weights of the language-model head, (V, D)."""
        return self.embedding.weight
