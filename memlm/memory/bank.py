"""The persistent bank of a memory: what outlives the text.

A bank of scope ``shared`` is always there; one of scope ``sequence`` once something was stored in it. It is kept in
buffers, so that it is saved and moved with the model.

Shapes: B rows, n slots.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from memlm.memory.state import State, map_tensors, named_tensors, with_tensors
from memlm.tensors import copied

Scope = Literal["sequence", "shared"]

_USES = "slot_uses"


class Owner(Protocol):
    """What a bank asks of the memory whose bank it is: see `memlm.memory.contract.Memory`."""

    scope: Scope

    def init_state(self, n_row: int) -> State:
        """A fresh state."""

    def restored(self, state: State, missing: set[str]) -> State:
        """A state with what the bank lacked."""

    def check(self, state: State) -> None:
        """Refuse a state that no text can have led to."""


class Bank(nn.Module):
    """One row of a memory's state, in buffers named by the paths of its fields.

    States that are handed out share the numbers of the buffers. A write in place sees that they are shared, and copies
    (see `memlm.tensors.is_alone`); `commit` puts others in their stead.

    Args:
        memory: Whose bank it is.
    """

    def __init__(self, memory: Owner) -> None:
        super().__init__()
        self._memory = (memory,)  # no submodule

    @property
    def memory(self) -> Owner:
        """Whose bank it is."""
        return self._memory[0]

    @property
    def exists(self) -> bool:
        """Whether there is something in it: always if it is shared, else once something was stored."""
        return any(name != _USES and part is not None for name, part in self._buffers.items())

    def create(self) -> None:
        """Hold a fresh state, unless something is held already."""
        if not self.exists:
            self.commit(self.memory.init_state(1))

    def state(self) -> State:
        """What is held, one row, to be read; a fresh state if there is nothing."""
        fresh = self.memory.init_state(1)
        if not self.exists:
            return fresh
        named = named_tensors(fresh)
        state = with_tensors(fresh, named | self.held())
        missing = set(named) - set(self.held())
        return self.memory.restored(state, missing) if missing else state

    def held(self) -> dict[str, Tensor]:
        """The numbers of the buffers by the paths of their fields."""
        return {name: part.detach() for name, part in self._buffers.items() if name != _USES and part is not None}

    def first(self, n_row: int) -> State:
        """State of ``n_row`` rows before any text: what is held, if anything is, else a fresh state."""
        if not self.exists:
            return self.memory.init_state(n_row)
        if self.memory.scope == "shared":
            return self.state()
        return map_tensors(lambda part: part.expand(n_row, *part.shape[1:]), self.state())

    def release(self) -> State:
        """What is held, one row, given away: nothing is held until `commit` is called. A fresh state if nothing was."""
        state = self.state()
        for name in self.held():
            self._buffers[name] = None
        return state

    def commit(self, state: State) -> None:
        """Hold ``state``, of one row, from now on. Fields that share numbers are copied: a file holds them apart."""
        storages: set[int] = set()
        for name, tensor in named_tensors(state).items():
            held = tensor.detach() if tensor.is_contiguous() else copied(tensor)
            storage = held.untyped_storage()
            if not held.is_meta and storage.data_ptr() in storages:
                held = held.clone()
            storages.add(storage.data_ptr())
            if name in self._buffers:
                setattr(self, name, held)
            else:
                self.register_buffer(name, held)

    def uses(self) -> Tensor:
        """How often each slot was shown to have been read, (n,), to be changed in place. For memories of `Slots`."""
        if _USES not in self._buffers:
            memory: Any = self.memory
            self.register_buffer(_USES, torch.zeros_like(memory.filled(memory.init_state(1))[0], dtype=torch.long))
        return self.get_buffer(_USES)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A checkpoint tells whether the model had stored something; it may be older than a field of the bank."""
        saved = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
        for name in list(self._buffers):  # new ones: states that were handed out stay as they are
            if name == _USES or self.memory.scope == "sequence":
                delattr(self, name)
        if self.memory.scope == "shared" or saved - {_USES}:
            self.commit(self.memory.init_state(1))
            for name, part in self.held().items():
                came = state_dict.setdefault(f"{prefix}{name}", part)
                fits = (came.shape, came.dtype, came.device) == (part.shape, part.dtype, part.device)
                # What came is held itself: no write in place changes what another has too.
                setattr(self, name, came.detach() if fits and came.is_contiguous() else part.clone())
        if _USES in saved:
            self.register_buffer(_USES, torch.zeros_like(state_dict[f"{prefix}{_USES}"]))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if saved - {_USES}:
            try:
                self.memory.check(self.state())
            except ValueError as error:
                errors: list[str] = rest[-1]
                errors.append(f"the bank {prefix.removesuffix('.')} holds what no text can have written: {error}")
