"""A recurrent language model: an LSTM in place of attention.

Source: the SimpleLanguageModel of AutoMemoryModule's example (embedding, memory, LSTM, linear head), which predicts the
next word of a sentence.

How text is cut into segments: `memlm.models.segments`. The recurrence begins anew in every segment: it first runs over
the ``overlap`` last tokens of the segment before, as attention would see them. So all segments of a window run side by
side, and what is older reaches the model through memory only.

Shapes: B rows, S segments of the grid, T tokens per segment, Q columns computed, O overlap, D model width, H width of
the recurrent state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Context, Memory
from memlm.models.grid import Grid
from memlm.models.mixers import SegmentLayer
from memlm.models.segments import SegmentModel


class LSTMCache(NamedTuple):
    """What a layer carries between calls.

    Attributes:
        inputs: Normalised inputs of the open segment, (B, T, D); its end starts the segment after it.
        recurrent: Hidden and cell state before the next token, (B, 2, H).
    """

    inputs: Tensor
    recurrent: Tensor


class Kept(NamedTuple):
    """What `Layer.mix` leaves for `Layer.next_cache`.

    Attributes:
        inputs: Normalised inputs of the grid, (B, S, T, D).
        recurrent: State after the last token of each segment that does not end, (B, S, 2, H).
        all_complete: Whether some row has no open segment in the grid.
    """

    inputs: Tensor
    recurrent: Tensor
    all_complete: bool


class Layer(SegmentLayer):
    """Memory-augmented layer: LSTM, memories, feed-forward."""

    def __init__(self, d_model: int, d_hidden: int, d_ff: int, segment_len: int, overlap: int, dropout: float) -> None:
        super().__init__()
        self.d_hidden, self.segment_len, self.overlap = d_hidden, segment_len, overlap
        self.norm = nn.RMSNorm(d_model)
        self.lstm = nn.LSTM(d_model, d_hidden, batch_first=True)
        self.to_output = nn.Linear(d_hidden, d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(d_model),
            nn.Linear(d_model, d_ff, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(d_ff, d_model, bias=False),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def init_cache(self, n_row: int) -> LSTMCache:
        """No inputs, and the state zero."""
        weight = self.to_output.weight
        zeros = functools.partial(torch.zeros, dtype=weight.dtype, device=weight.device)
        return LSTMCache(zeros(n_row, self.segment_len, weight.shape[0]), zeros(n_row, 2, self.d_hidden))

    def mix(self, x: Tensor, cache: LSTMCache, grid: Grid, contexts: Sequence[Context] = ()) -> tuple[Tensor, Kept]:
        """The LSTM with its residual; see `SegmentLayer.mix`."""
        normed = self.norm(x)  # (B, S, Q, D)
        inputs = grid.fill(normed, cache.inputs)  # (B, S, T, D)
        after_end = self._after_end(inputs[:, :-1]) * grid.flags.continues[:, 1:, None, None]
        anew = grid.new[:, 0, 0] & ~grid.flags.continues[:, 0]  # a context that begins with the first segment
        first = torch.where(anew[:, None, None], 0.0, cache.recurrent)
        start = torch.cat([first[:, None], after_end], dim=1).flatten(0, 1)  # (B * S, 2, H)
        run = self._run if grid.fresh and not any(grid.open_len) else self._run_masked
        out, recurrent = run(normed.flatten(0, 1), start, grid.new[:, :, grid.columns].flatten(0, 1))
        all_complete = max(grid.n_complete) == inputs.shape[1]
        kept = Kept(inputs, recurrent.view(*inputs.shape[:2], 2, self.d_hidden), all_complete)
        return x + self.dropout(self.to_output(out)).view_as(x), kept

    def next_cache(self, kept: Kept, stays_open: Callable[[Tensor, Tensor], Tensor]) -> LSTMCache:
        """See `SegmentLayer.next_cache`."""
        beyond = kept.recurrent[:, 0]
        if kept.all_complete:
            beyond = self._after_end(kept.inputs[:, -1:])[:, 0]
        inputs = stays_open(kept.inputs, torch.zeros_like(kept.inputs[:, 0]))
        return LSTMCache(inputs, stays_open(kept.recurrent, beyond))

    def column(self, place: Tensor, continues: Tensor, most: int) -> Tensor:
        """See `SegmentLayer.column`: the cell of the next token in the inputs of all rows one after the other, (B,)."""
        return place + self.segment_len * torch.arange(len(place), device=place.device)

    def opened(self, cache: LSTMCache, place: Tensor, continues: Tensor) -> LSTMCache:
        """See `SegmentLayer.opened`."""
        anew = (place == 0) & ~continues
        return LSTMCache(cache.inputs.clone(), torch.where(anew[:, None, None], 0.0, cache.recurrent))

    def step(self, x: Tensor, opened: LSTMCache, column: Tensor, contexts: Sequence[Context] = ()) -> Tensor:
        """See `SegmentLayer.step`."""
        normed = self.norm(x)
        opened.inputs.flatten(0, 1).index_copy_(0, column, normed.to(opened.inputs.dtype))
        state = opened.recurrent.unbind(dim=1)
        hidden, cell = torch.lstm_cell(normed, state, *self.lstm.all_weights[0])
        opened.recurrent.copy_(torch.stack([hidden, cell], dim=1))
        return x + self.to_output(hidden)

    def closed(self, opened: LSTMCache) -> LSTMCache:
        """See `SegmentLayer.closed`."""
        return opened

    def _after_end(self, inputs: Tensor) -> Tensor:
        """State (B, S, 2, H) after the end of each segment of ``inputs`` (B, S, T, D), begun with zero there."""
        n_row, n_segment = inputs.shape[:2]
        if not (n_row * n_segment and self.overlap):
            return inputs.new_zeros(n_row, n_segment, 2, self.d_hidden)
        _, (hidden, cell) = self.lstm(inputs[:, :, self.segment_len - self.overlap :].flatten(0, 1))
        return torch.stack([hidden[0], cell[0]], dim=1).unflatten(0, (n_row, n_segment))

    def _run(self, inputs: Tensor, start: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """All of ``inputs`` (N, Q, D) from ``start`` (N, 2, H): outputs (N, Q, H), and ``start``, as all ends here."""
        hidden, cell = (part.contiguous() for part in start.transpose(0, 1)[:, None])  # (1, N, H) each
        return self.lstm(inputs, (hidden, cell))[0], start

    def _run_masked(self, inputs: Tensor, start: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Step by step, and only where cells are ``new`` (N, Q): outputs, and the state after the last of them."""
        weights = self.lstm.all_weights[0]
        hidden, cell = start.unbind(dim=1)  # (N, H)
        outputs = []
        for q in range(inputs.shape[1]):
            here = new[:, q, None]
            next_hidden, next_cell = torch.lstm_cell(inputs[:, q], (hidden, cell), *weights)
            hidden, cell = torch.where(here, next_hidden, hidden), torch.where(here, next_cell, cell)
            outputs.append(hidden)
        return torch.stack(outputs, dim=1), torch.stack([hidden, cell], dim=1)


class LSTM(SegmentModel):
    """Recurrent language model with memory.

    Args:
        n_vocab: Size of the vocabulary.
        memories: By name, a constructor of one memory module, called with ``d_model``.
        n_layer: Number of layers.
        d_model: Width.
        d_hidden: Width of the recurrent state; None for ``d_model``.
        d_ff: Width of the feed-forward; None for four times ``d_model``.
        segment_len: Tokens per segment.
        overlap: Tokens of the segment before that the LSTM runs over first.
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
        n_layer: int = 2,
        d_model: int = 128,
        d_hidden: int | None = None,
        d_ff: int | None = None,
        segment_len: int = 128,
        overlap: int = 16,
        dropout: float = 0.0,
        memory_layers: Literal["middle", "all"] | list[int] = "middle",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(n_vocab, n_layer, d_model, segment_len, overlap, memory_layers, gradient_checkpointing)
        if d_hidden is not None and d_hidden < 1:
            raise ValueError(f"model.d_hidden must be at least 1 or null, got {d_hidden}")
        if d_ff is not None and d_ff < 1:
            raise ValueError(f"model.d_ff must be at least 1 or null, got {d_ff}")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout must be in [0, 1), got {dropout}")
        self.embedding = nn.Embedding(n_vocab, d_model)
        self.layers = nn.ModuleList(
            Layer(d_model, d_hidden or d_model, d_ff or 4 * d_model, segment_len, overlap, dropout)
            for _ in range(n_layer)
        )
        self.norm = nn.RMSNorm(d_model)
        self.attach(memories)
        self._initialise()

    def _initialise(self) -> None:
        """All initial values of the network; memories have their own.

        As in `LMCode`: embeddings dominate the stream at first. Forget gates begin open.
        """
        nn.init.normal_(self.embedding.weight, std=self.d_model**-0.5)
        for layer in self.layers:
            for weight in (layer.lstm.weight_ih_l0, layer.lstm.weight_hh_l0, layer.feed_forward[1].weight):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            nn.init.zeros_(layer.lstm.bias_hh_l0)
            nn.init.zeros_(layer.lstm.bias_ih_l0)
            nn.init.ones_(layer.lstm.bias_ih_l0[layer.d_hidden : 2 * layer.d_hidden])  # input, forget, cell, output
            for linear in (layer.to_output, layer.feed_forward[3]):
                nn.init.normal_(linear.weight, std=(2 * self.n_layer * linear.in_features) ** -0.5)
