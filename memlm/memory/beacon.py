"""Beacons: a few cells behind each segment sum it up, and later text sees their keys and values in every layer.

Sources: P. Zhang et al., "Long context compression with activation beacon" (2024, 2401.03462), and H. Qian et al.,
"MemoRAG: moving towards next-gen RAG via memory-inspired knowledge discovery" (2024, 2409.05591), whose memory model it
is. One beacon stands for every ``ratio`` tokens of a window. Beacons go through all layers behind the window, where
they see it and the beacons of earlier windows. Of the window only their keys and values stay, which later windows see
before their own tokens, in order. All is learned by predicting text from what stays. Other than there:

- Queries, keys and values of beacons are made by the model's own maps, which LoRA may change. In the sources beacons
  have maps of their own; here what stays passes a map of each layer, which begins as the identity, before the layer
  makes keys and values of it.
- What stays are hidden vectors, half of what keys and values would take, or a quarter.
- The beacons are different learned vectors, and see all of the window. In the sources they are one vector, and each
  sees the window up to its place.
- A window is a segment of the grid, however text is cut into calls. The last ``n_beacon`` beacons are kept; in the
  sources all are, so a state grows with the text.

Shapes: B rows, T tokens per segment, D model width, L layers, m beacons of a segment, n beacons that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.cache import CacheState, last
from memlm.memory.contract import Context, Heads, Memory, Mixer, Needs, Read, Segment, Sizes, Trace
from memlm.memory.state import where_rows


class BeaconState(NamedTuple):
    """The last beacons, oldest first; empty cells stand before them.

    Attributes:
        hidden: What entered each layer, (B, n, L, D); the first gets the same for every text.
        full: Which cells hold a beacon, (B, n).
    """

    hidden: Tensor
    full: Tensor


class BeaconMemory(Memory):
    """Cells behind a segment, which all layers see before later segments.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        ratio: Tokens of a segment for which there is one beacon. What is left over at its end has one too.
        n_beacon: Beacons that are kept; the oldest give way.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    around = "stack"
    sized = ("n_beacon",)

    def __init__(self, d_model: int, sizes: Sizes, ratio: int = 8, n_beacon: int = 256) -> None:
        super().__init__()
        if ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {ratio}")
        if n_beacon < 1:
            raise ValueError(f"n_beacon must be at least 1, got {n_beacon}")
        self.sizes, self.ratio, self.n_beacon = sizes, ratio, n_beacon
        n_new = -(-sizes.segment_len // ratio)
        self.needs = Needs(tail=n_new, each_layer=True, context=True)
        self.cell = nn.Parameter(torch.randn(n_new, d_model))  # of the variance of embeddings
        self.maps = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(sizes.n_layer))
        for change in self.maps.parameters():
            nn.init.zeros_(change)

    def init_state(self, n_row: int) -> BeaconState:
        """No beacons."""
        hidden = self.cell.new_zeros(n_row, self.n_beacon, len(self.maps), self.cell.shape[1])
        return BeaconState(hidden, torch.zeros(n_row, self.n_beacon, dtype=torch.bool, device=hidden.device))

    def mix(self, x: Tensor, prepared: BeaconState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """The stack, each layer of which sees the beacons: see `beside`."""
        return mixer(x), None

    def beside(self, prepared: BeaconState, layer: int, maps: Callable[[Tensor], Heads]) -> Context | None:
        """The beacons as a layer's attention sees them; see `Memory.beside`."""
        hidden = prepared.hidden[:, :, layer]
        heads = maps(hidden + self.maps[layer](hidden))
        place = torch.arange(-self.n_beacon, 0, device=hidden.device) - self.sizes.overlap
        return Context(heads.k, heads.v, prepared.full, place=place)

    def tail(self, prepared: BeaconState) -> Tensor:
        """The beacons behind the segment, always the same; see `Memory.tail`."""
        return self.cell.expand(len(prepared.full), -1, -1)

    def write(self, segment: Segment, state: BeaconState) -> tuple[BeaconState, Trace]:
        """Append the beacons of the segment, and keep the last; see `Memory.write`."""
        assert segment.tail is not None  # as it `needs` them
        n_new = -(-segment.valid.sum(dim=1, keepdim=True) // self.ratio)  # (B, 1)
        there = torch.arange(segment.tail.shape[1], device=n_new.device) < n_new
        entered = torch.cat([self.cell.expand(len(there), -1, -1)[:, :, None], segment.tail[:, :, :-1]], dim=2)
        new = CacheState(entered.flatten(2), there)
        after = last(CacheState(state.hidden.flatten(2), state.full), new, self.n_beacon)
        kept = BeaconState(after.hidden.view_as(state.hidden), after.full)
        return where_rows(segment.complete[:, 0], kept, state), {}

    def flops_per_token(self) -> int:
        """Attention to the beacons, their keys and values, and the way of a segment's own through the layers."""
        (m, d_model), n = self.cell.shape, self.n_beacon
        seen = len(self.maps) * (4 * n * d_model + (8 * n * d_model**2) // self.sizes.segment_len)
        layer = m * (24 * d_model**2 + 4 * d_model * (self.sizes.segment_len + self.sizes.overlap + m + n))
        return seen + self.sizes.n_layer * layer // self.sizes.segment_len
