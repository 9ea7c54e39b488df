"""Generic functions over memory states.

A state is a value: a (possibly nested) NamedTuple, tuple or dict of fixed-shape tensors whose leading dimension is
rows. A `memlm.tensors.Host` among them holds bookkeeping that the program must know without waiting for an accelerator;
it stays on the CPU when a state moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memlm.tensors import Host, owned

State = Any


def map_tensors(function: Callable[..., Tensor], state: State, *others: State, host: bool = True) -> State:
    """Apply ``function`` to every tensor of ``state`` (and the matching tensors of ``others``).

    Args:
        function: Called with one tensor of each state.
        state: The state that gives the structure.
        others: States of the same structure.
        host: Whether each `Host` is mapped too; if not, it is passed through unchanged.
    """
    if isinstance(state, Tensor):
        return function(state, *others)
    if state is None or (isinstance(state, Host) and not host):
        return state
    if isinstance(state, dict):
        return {k: map_tensors(function, part, *(o[k] for o in others), host=host) for k, part in state.items()}
    if hasattr(state, "_fields"):
        fields = map_tensors(function, state._asdict(), *(o._asdict() for o in others), host=host)
        return type(state)(**fields)
    if isinstance(state, tuple | list):
        return type(state)(map_tensors(function, *parts, host=host) for parts in zip(state, *others, strict=True))
    raise TypeError(f"a state holds tensors, NamedTuples, tuples and dicts; got {type(state).__name__}")


def tensors(state: State) -> list[Tensor]:
    """All tensors of ``state`` in a fixed order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, state)
    return found


def detach(state: State) -> State:
    """The same values, cut from the graph."""
    return map_tensors(Tensor.detach, state)


def move(state: State, device: torch.device | str) -> State:
    """``state`` on ``device``; each `Host` stays on the CPU."""
    return map_tensors(lambda tensor: tensor.to(device), state, host=False)


def own(state: State, given: bool) -> State:
    """``state``, to be changed in place: a copy, or itself if it was ``given`` away and nothing shares its numbers."""
    return map_tensors(lambda tensor: owned(tensor, given), state)


def shared(state: State, *others: State) -> State:
    """``state`` with other tensors of the same numbers for those that ``others`` have too; for all if there are none.

    A state that is given away is written in place where no other tensor has its numbers. So no two states that are
    handed out have a tensor in common.
    """

    def share(tensor: Tensor, *theirs: Tensor) -> Tensor:
        mine = tensor.requires_grad or (bool(theirs) and all(tensor is not other for other in theirs))
        return tensor if mine else tensor.detach()

    return map_tensors(share, state, *others)


def where_rows(mask: Tensor, chosen: State, other: State) -> State:
    """Rows of ``chosen`` where ``mask`` (B,) is true, rows of ``other`` elsewhere."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.to(a.device).view(-1, *[1] * (a.dim() - 1)), a, b)

    return map_tensors(pick, chosen, other)


def renewed(state: State, fresh: State, rows: Tensor) -> State:
    """``state``, which is given away, with ``rows`` (B,) of ``fresh`` written in place; itself if there are none."""
    if not bool(rows.any()):
        return state
    index, host = rows.nonzero()[:, 0], rows.cpu()

    def renew(old: Tensor, new: Tensor) -> Tensor:
        if old.device != index.device:  # a `Host`
            return torch.where(host, new, old)
        return owned(old, given=True).index_copy_(0, index, new[index])

    return map_tensors(renew, state, fresh)


def select_rows(state: State, index: Tensor) -> State:
    """Rows ``index`` (N,) of ``state``: permutes, repeats or drops rows."""
    return map_tensors(lambda tensor: tensor.index_select(0, index.to(tensor.device)), state)


def n_byte(state: State) -> int:
    """Bytes held by all tensors of ``state``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))


def named_tensors(state: State, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a state of NamedTuples by its path, the names of fields joined by ``_``."""
    found: dict[str, Tensor] = {}
    for name, part in state._asdict().items():
        if isinstance(part, Tensor | Host):
            found[prefix + name] = part.tensor if isinstance(part, Host) else part
        elif part is not None:
            found |= named_tensors(part, f"{prefix}{name}_")
    return found


def with_tensors(state: State, named: dict[str, Tensor], prefix: str = "") -> State:
    """``state`` with the tensors of ``named`` in place of its own; see `named_tensors`. Each `Host` is on the CPU."""

    def of(name: str, part: Any) -> Any:
        if isinstance(part, Host):
            tensor = named[prefix + name]
            return Host(tensor if tensor.is_meta else tensor.cpu())  # a model without its numbers has none to bring
        if isinstance(part, Tensor):
            return named[prefix + name]
        return None if part is None else with_tensors(part, named, f"{prefix}{name}_")

    return type(state)(**{name: of(name, part) for name, part in state._asdict().items()})


def to_dict(state: State) -> Any:
    """``state`` as plain dicts and lists of tensors, loadable with ``weights_only=True``."""
    if isinstance(state, Tensor) or state is None:
        return state
    if isinstance(state, Host):
        return state.tensor
    if hasattr(state, "_fields"):
        return {key: to_dict(value) for key, value in state._asdict().items()}
    if isinstance(state, dict):
        return {key: to_dict(value) for key, value in state.items()}
    return [to_dict(value) for value in state]


def from_dict(plain: Any, like: State) -> State:
    """Inverse of `to_dict`: ``plain`` with the types of ``like``.

    Raises:
        ValueError: If the structure or a shape beyond the leading (row) dimension differs.
    """
    if isinstance(like, Tensor):
        if not isinstance(plain, Tensor) or plain.shape[1:] != like.shape[1:]:
            found = tuple(plain.shape) if isinstance(plain, Tensor) else type(plain).__name__
            raise ValueError(
                f"saved state does not fit this memory: expected rows of {tuple(like.shape[1:])}, got {found}"
            )
        return plain
    if like is None:
        return None
    if isinstance(like, Host):
        return Host(from_dict(plain, like.tensor))
    if hasattr(like, "_fields") or isinstance(like, dict):
        fields = like._asdict() if hasattr(like, "_fields") else like
        absent = {key for key, value in fields.items() if value is None}  # what a state lacks need not be saved
        if not isinstance(plain, dict) or set(plain) | absent != set(fields):
            raise ValueError(f"saved state does not fit this memory: expected the fields {sorted(fields)}")
        restored = {key: from_dict(plain.get(key), value) for key, value in fields.items()}
        return type(like)(**restored) if hasattr(like, "_fields") else restored
    if len(plain) != len(like):
        raise ValueError(f"saved state does not fit this memory: expected {len(like)} parts, got {len(plain)}")
    return type(like)(from_dict(part, shape) for part, shape in zip(plain, like, strict=True))
