"""A short convolution over neighbouring tokens, each channel by itself, before keys and values are made of them.

Source: H3 (2212.14052) and what came after it: DeltaNet, Gated DeltaNet, KDA, MesaNet and Titans have one. By it a
token can be written under the token before it, without a layer below that has to learn to bring that there.

Shapes: B rows, S segments, T tokens per segment, C tokens of lookback, N = S * T cells, F channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memlm.memory.contract import Segment


class ShortConvolution(nn.Module):
    """Of each token and those right before it in its context.

    Args:
        width: Tokens that are seen.
        n_channel: Channels, ``F``.
    """

    def __init__(self, width: int, n_channel: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, n_channel).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, window: Segment) -> Tensor:
        """What stands at each cell, with what stands before it; (B, C + N + 1 - width, F) of ``x`` (B, C + N, F).

        The first ``width`` - 1 cells have nothing to be convolved with, so that none is given for them.
        """
        n_before, n_token = window.lookback, window.segment_len
        n_cell = x.shape[1] - self.width + 1
        cell = torch.arange(self.width - 1, x.shape[1], device=x.device) - n_before  # < 0: of the lookback
        goes_on = window.flags.continues.repeat_interleave(n_token, dim=1)  # (B, N): of the segment of each cell
        goes_on = goes_on[:, cell.clamp(min=0)]
        found = x[:, self.width - 1 :] * self.weight[0]
        for back in range(1, self.width):
            first = self.width - 1 - back
            seen = window.valid[:, first : first + n_cell] & (goes_on | (cell < 0) | (cell % n_token >= back))
            found = found + x[:, first : first + n_cell] * (seen[..., None] * self.weight[back])
        return found
