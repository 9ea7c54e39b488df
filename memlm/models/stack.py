"""The layers of a model, with what stands before and behind them.

Shapes: B rows, S segments of the grid, Q columns computed, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from memlm.memory.state import State
from memlm.models.base import LanguageModel
from memlm.models.grid import Grid
from memlm.models.mixers import SegmentLayer
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
        below: Layers of another stack, without memory, that `ready` runs before these; none in most models.
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
    below: Any  # as layers
    norm: nn.Module

    def no_context(self, n_row: int) -> LocalState:
        """A local state before any text."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings of unit variance, (..., D)."""
        return self.embedding(ids) * self.d_model**0.5

    def ready(self, grid: Grid, ids: Tensor, below: Sequence[State]) -> Grid:
        """A grid with what the model has to know before its layers run.

        Args:
            grid: Where the tokens lie.
            ids: Those of the lookback, then those of the grid, (B, C + N).
            below: The caches of the layers ``below``.
        """
        return grid

    def below_after(self, grid: Grid, stays_open: Callable[[Tensor, Tensor], Tensor]) -> tuple[State, ...]:
        """The caches of the layers ``below`` after a grid; see `SegmentLayer.next_cache`."""
        return ()

    def left(self, i: int, entered: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """What enters the next layer, (B, S, Q, D).

        Args:
            i: Number of the layer.
            entered: What entered it, (B, S, Q, D).
            x: What comes out of it, memories and feed-forward included.
            grid: Where the tokens lie.
        """
        return x

    def written(self, stream: str, i: int, x: Tensor, grid: Grid) -> Tensor:
        """What memories at layer ``i`` are written from, (B, S, Q, D).

        Args:
            stream: Which one; see `LocalState`.
            i: Number of the layer.
            x: The stream itself, (B, S, Q, D).
            grid: Where the tokens lie.
        """
        return x

    def writer(self, i: int) -> SegmentLayer:
        """The layer of which keys and values of what is written are made, for memories at layer ``i``."""
        return self.layers[i]

    def enter(self, embeddings: Tensor, columns: slice | Tensor) -> Tensor:
        """What the first layer gets, (B, S, Q, D), of the embeddings of the ``columns`` of each segment.

        Or, (B, D), of those of one token of each row, which stands in one of the ``columns`` (B,).
        """
        return embeddings

    def entered(self, embeddings: Tensor, grid: Grid) -> Tensor:
        """What the first layer gets, (B, S, Q, D), of the embeddings of all cells of a grid, (B, S, T, D)."""
        return self.enter(embeddings[:, :, grid.columns], grid.columns)

    def begin_step(self, ids: Tensor, place: Tensor, continues: Tensor, most: int) -> tuple[Tensor, Any]:
        """What the first layer gets of one more token of each row, (B, D), and what `SegmentLayer.step` is told of it.

        Args:
            ids: The tokens, (B,).
            place: Their places in the open segment, (B,).
            continues: Whether that segment continues its context, (B,).
            most: A place that is known to be beyond all of ``place``.
        """
        return self.enter(self.embed(ids), place), self.layers[0].column(place, continues, most)

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
