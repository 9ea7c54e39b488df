"""What a memory has whose state is a bank of slots: it can be looked into.

Shapes: B rows, n slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.memory.contract import Memory
from memlm.memory.state import State, map_tensors, tensors


class Slots(Memory):
    """A memory of slots. Subclasses define `filled`; the defaults fit states with fields of shape (B, n, ...)."""

    def filled(self, state: State) -> Tensor:
        """Which slots hold something, (B, n)."""
        raise NotImplementedError

    def holds(self, state: State) -> Tensor:
        """See `Memory.holds`."""
        return self.filled(state).any(dim=1)

    def places(self, state: State) -> Tensor | None:
        """Place in its document of the token that each slot was made from, (B, n), -1 for empty slots.

        None (the default) if slots are not made from single tokens.
        """
        return None

    def tokens(self, state: State) -> Tensor | None:
        """Ids of the consecutive tokens that each slot was made from, (B, n, L), -1 where there is none.

        None (the default) if the state does not keep them. If the memory keeps records, the last one stands right after
        the slot's place.
        """
        return None

    def contents(self, state: State) -> Tensor:
        """What each slot holds as a vector, for analysis, (B, n, d).

        Default: the real numbers that the state keeps for each slot, in fields of shape (B, n, ...), side by side.
        Contents as wide as the model are compared with hidden states; a mechanism that stores something else gives
        what a slot would add to the residual stream.
        """
        shape = self.filled(state).shape
        parts = [tensor for tensor in tensors(state) if tensor.is_floating_point() and tensor.dim() > 2]
        return torch.cat([tensor.flatten(2) for tensor in parts if tensor.shape[:2] == shape], dim=2)

    def forget(self, state: State, slots: Tensor) -> State:
        """The state without what some slots hold: they add nothing to a read, the others stay as they are.

        Default: fields of shape (B, n, ...) are as in a fresh state at these slots.

        Args:
            state: Any state; never changed in place.
            slots: Slots to forget, (B, n), bool.
        """

        def empty(tensor: Tensor, fresh: Tensor) -> Tensor:
            if tensor.shape[:2] != slots.shape:
                return tensor
            return torch.where(slots.view(*slots.shape, *[1] * (tensor.dim() - 2)), fresh, tensor)

        return map_tensors(empty, state, self.init_state(len(slots)))
