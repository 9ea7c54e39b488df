"""A memory of your own, outside of the checkout: the running mean of what segments said, read through a gate.

PYTHONPATH=examples/own_memory memlm check --config-dir=examples/own_memory memory=running_mean
PYTHONPATH=examples/own_memory memlm train --config-dir=examples/own_memory memory=running_mean

Shapes: B rows, T tokens per segment, D model width.
"""

import torch
from torch import Tensor, nn

from memlm.memory.contract import Memory, Read, Segment, Trace
from memlm.memory.state import where_rows


class RunningMean(Memory):
    """One vector for each row: old text fades, the newest segment counts ``rate``.

    Args:
        d_model: Width of the hidden states.
        rate: Share of the newest segment, in (0, 1].

    Raises:
        ValueError: If a setting cannot work.
    """

    def __init__(self, d_model: int, rate: float = 0.5) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        self.rate = rate
        self.to_value = nn.Linear(d_model, d_model, bias=False)
        self.to_weight = nn.Linear(d_model, 1)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        self.gate = nn.Linear(d_model, 1)

    def init_state(self, n_row: int) -> Tensor:
        """Nothing was said: zeros (B, D)."""
        return self.to_value.weight.new_zeros(n_row, self.to_value.in_features)

    def write(self, segment: Segment, state: Tensor) -> tuple[Tensor, Trace]:
        """Move towards a weighted mean of the segment's tokens, where it is complete."""
        score = self.to_weight(segment.hidden).masked_fill(~segment.valid[..., None], -1e9)
        mean = (score.softmax(dim=1) * self.to_value(segment.hidden)).sum(dim=1)  # (B, D)
        written = segment.complete[:, 0] & segment.valid.any(dim=1)
        return where_rows(written, torch.lerp(state, mean, self.rate), state), {}

    def read(self, y: Tensor, prepared: Tensor) -> Read:
        """The vector, to each token as much as its gate lets in; nothing where nothing was said."""
        gate = self.gate(y).sigmoid()  # (B, T, 1)
        return Read(gate * self.to_output(prepared)[:, None])
