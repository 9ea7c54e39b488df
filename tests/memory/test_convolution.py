"""The short convolution against a loop over tokens."""

from typing import Any

import pytest
import torch

from memlm.memory.contract import Flags
from memlm.memory.convolution import ShortConvolution
from memlm.memory.delta import DeltaMemory
from tests.memory.segments import segment_of

T, D = 5, 6


def window(n_segment: int, lookback: int, seed: int = 0) -> Any:
    """A window of two rows: segments that go on or begin anew, the last one not full."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, lookback + n_segment * T, D, generator=draw)
    continues = torch.rand(2, n_segment, generator=draw) < 0.5
    valid = torch.ones(2, lookback + n_segment * T, dtype=torch.bool)
    valid[0, -2:] = False
    valid[:, :lookback] = continues[:, :1]
    valid[1, 0] = False  # a text that has only just begun
    segment = segment_of(hidden)
    yes, zero = torch.ones_like(continues), torch.zeros(2, n_segment, dtype=torch.long)
    flags = Flags(yes, continues, ~yes, None, zero, zero)
    return segment._replace(valid=valid, flags=flags, lookback=lookback)


@pytest.mark.parametrize(("n_segment", "lookback", "width"), [(1, 3, 4), (3, 3, 4), (2, 4, 3), (2, 1, 2), (1, 5, 4)])
def test_a_token_sees_those_right_before_it_in_its_context(n_segment: int, lookback: int, width: int) -> None:
    part, conv = window(n_segment, lookback), ShortConvolution(width, D)
    found = conv(part.hidden, part)
    assert found.shape[1] == part.hidden.shape[1] - width + 1
    for row in range(2):
        for i in range(width - 1, part.hidden.shape[1]):
            if not part.valid[row, i]:
                continue
            expected = conv.weight[0] * part.hidden[row, i]
            place = i - lookback
            for back in range(1, width):
                begins = place >= 0 and place % T < back and not part.flags.continues[row, place // T]
                if begins or not part.valid[row, i - back]:
                    break
                expected = expected + conv.weight[back] * part.hidden[row, i - back]
            torch.testing.assert_close(found[row, i - width + 1], expected, msg=f"row {row}, cell {i}")


def test_by_it_a_value_is_written_under_the_token_before_it() -> None:
    """Keys of the token before, values of the token itself: what followed a token is found under it."""
    torch.manual_seed(0)
    memory = DeltaMemory(D, n_head=1, d_key=D, d_value=D, conv=2)
    with torch.no_grad():
        assert memory.key_conv is not None
        assert memory.value_conv is not None
        memory.key_conv.weight.copy_(torch.tensor([[0.0], [1.0]]).expand(2, D))
        memory.value_conv.weight.copy_(torch.tensor([[1.0], [0.0]]).expand(2, D))
        assert memory.to_rate is not None
        memory.to_rate.bias.fill_(20.0)
        memory.to_rate.weight.zero_()
        x = torch.randn(1, 1 + T, D)
        segment = segment_of(x)._replace(lookback=1)
        segment.valid[:, 0] = False
        state, _ = memory.write(segment, memory.init_state(1))
        normed = memory.norm(x)
        asked = memory._as_keys(memory._by_head(memory.to_key(normed)))[0, T - 1, 0]  # the last but one token
        torch.testing.assert_close(asked @ state.matrix[0, 0], memory.to_value(normed)[0, T], atol=1e-5, rtol=1e-5)
