"""Consolidated associative memory: slots of keys and values that are means of tokens alike (CAMELoT).

Source: Z. He et al., "CAMELoT: Towards large language models with training-free consolidated associative memory"
(2024), arXiv 2402.13449. There is no code of its authors; decided here:

- A slot holds the key and value of all heads of a layer, with one count and one age. Keys are taken before rotation.
- Similarity is the cosine of whole keys, all heads side by side.
- What is found has no place: scores are those of queries and keys before positions are encoded. With ``reach`` a slot
  stands where the token stood that joined it last. A model that was trained with rotary places, and is not trained
  again, needs that.
- A token sees the slots that tokens of its segment up to itself found, each once. The paper puts all that a window
  finds before it; a token that saw what later tokens found would learn something of them.
- A token finds ``top_k`` slots. The paper has 1, with which nothing could be learned in a short training.
- A document empties the memory; the end of a context does not. A token that attention still sees (the overlap) may
  stand in a slot too.

A write has a loop over tokens, which only decides where each goes, on products that are worked out for the whole
segment before. All can be decided at once, from a guess that is corrected until it holds; but that takes tens of rounds
and is slower (measured: docs/memories/camelot.md).

Shapes: B rows, S segments, T tokens of a segment, Q of them mixed, n slots, H heads, E width of a head, M slots found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.contract import Context, Mixer, Needs, Read, Scanned, Segment, Sizes, Trace, mean_trace
from memlm.memory.slots import Slots
from memlm.tensors import owned, take


class CamelotState(NamedTuple):
    """Slots of one layer.

    Attributes:
        key: Mean key of the tokens of each slot, before any position is encoded, (B, n, H, E).
        value: Mean value, (B, n, H, E).
        n_part: Tokens that are in the mean, (B, n); 0 if the slot is empty.
        last: Number of the token that joined last, (B, n); -1 if the slot is empty. Age is counted from there.
        n_token: Tokens written so far, (B,).
    """

    key: Tensor
    value: Tensor
    n_part: Tensor
    last: Tensor
    n_token: Tensor


class Places(NamedTuple):
    """Where the tokens of a segment go.

    Attributes:
        slot: The slot of each token, (B, T); n for padding.
        joins: Tokens that became part of what was there, (B, T).
        begun: The token whose key and value a slot began with, (B, n); -1 if that was before the segment.
        last: As in the state, (B, n).
    """

    slot: Tensor
    joins: Tensor
    begun: Tensor
    last: Tensor


class CamelotMemory(Slots):
    """Means of tokens with like keys, to attend to.

    Read: each token finds the slots whose keys are most like its own key; they join the softmax of attention, for this
    token and those after it in its segment. Write, token by token: a token whose nearest slot is more like it than
    ``threshold`` becomes part of that slot's mean; any other takes the place of the slot that was joined longest ago.
    There are no parameters.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_mode: Slots of a row and layer.
        threshold: Cosine above which a token joins its nearest slot, at least -1; from 1 on the memory is a FIFO.
        top_k: Slots that a token finds.
        reach: Tokens before a segment where the oldest slots stand, at least 1; None for no place.
        gradient: Whether gradients flow into what is kept, inside a window.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    needs = Needs(heads=True, context=True)
    sized = ("n_mode",)
    within = True  # what a token sees depends on tokens before it in its segment

    def __init__(
        self,
        d_model: int,
        sizes: Sizes,
        n_mode: int = 512,
        threshold: float = 0.95,
        top_k: int = 8,
        reach: int | None = None,
        gradient: bool = False,
    ) -> None:
        super().__init__()
        for name, number in {"n_mode": n_mode, "top_k": top_k}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not threshold >= -1:
            raise ValueError(f"threshold is a cosine, so at least -1, got {threshold}")
        if reach is not None and reach < 1:
            raise ValueError(f"reach must be at least 1, or null for slots without a place, got {reach}")
        self.reach = reach
        self.n_mode, self.threshold, self.top_k, self.gradient = n_mode, threshold, top_k, gradient
        self.sizes = sizes
        self.register_buffer("empty", torch.zeros(sizes.n_head, d_model // sizes.n_head), persistent=False)

    def init_state(self, n_row: int) -> CamelotState:
        """Empty slots."""
        key = self.get_buffer("empty").new_zeros(n_row, self.n_mode, *self.get_buffer("empty").shape)
        count = torch.zeros(n_row, self.n_mode, dtype=torch.long, device=key.device)
        return CamelotState(key, key.clone(), count, count - 1, count[:, 0])

    def filled(self, state: CamelotState) -> Tensor:
        """Which slots hold something, (B, n)."""
        return state.n_part > 0

    def mix(self, x: Tensor, prepared: CamelotState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        """Not used: what a token sees depends on the whole segment up to it, which `scan` knows."""
        raise NotImplementedError("what tokens find is read in scan")

    def scan(
        self,
        x: Tensor,
        window: Segment,
        state: CamelotState,
        mixer: Mixer,
        read: bool = True,
        write: bool = True,
        keep_state: bool = True,
    ) -> Scanned:
        """Find and write segment by segment, then mix all of them in one call; see `Memory.scan`."""
        found: list[tuple[Tensor, ...]] = []
        traces: list[Trace] = []
        for s in range(window.n_segment):
            segment = window.at(s)
            state = self.start_documents(segment.reset, state, segment.owned)
            if read:
                found.append(self.find(segment, state))
            if write:
                state, trace = self.write(segment, state)
                window = window._replace(owned=not torch.is_grad_enabled())
                traces.append(trace)
        if not read:
            return Scanned(self.off(x, mixer), None, state, mean_trace(traces))
        key, value, seen, place = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*found, strict=True))
        context = Context(key.transpose(1, 2), value.transpose(1, 2), seen)
        if self.reach is not None:
            context = context._replace(place=place)
        return Scanned(mixer(x, context), None, state, mean_trace(traces))

    def find(self, segment: Segment, state: CamelotState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the tokens of a segment find.

        Returns:
            Keys and values of the slots that are found by any token, (B, M, H, E) each; which of them each token that
            is mixed sees, (B, Q, M); and where they stand before the segment, (B, M).
        """
        assert segment.heads is not None  # as they are among the `needs`
        n_token, device = segment.segment_len, state.key.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            like = unit(segment.heads.k.transpose(1, 2)) @ unit(state.key).mT  # (B, T, n)
            like = like.masked_fill(~self.filled(state)[:, None], -torch.inf)
            slots = like.topk(min(self.top_k, self.n_mode), dim=2).indices  # (B, T, k)
            cell = torch.arange(n_token, device=device)
            finder = torch.where(segment.valid, cell, n_token)[..., None].expand_as(slots)
            first = torch.full_like(state.n_part, n_token)  # token that finds each slot first; T if none does
            first = first.scatter_reduce(1, slots.flatten(1), finder.flatten(1), "amin")
            first = first.masked_fill(~self.filled(state), n_token)
            first, order = (part[:, : slots[0].numel()] for part in first.sort(dim=1, stable=True))  # (B, M)
            seen = first[:, None] <= cell[segment.columns][:, None]  # (B, Q, M)
        place = (state.last - state.n_token[:, None]).gather(1, order).clamp(min=-(self.reach or 0))
        return take(state.key, order), take(state.value, order), seen, place

    def write(self, segment: Segment, state: CamelotState) -> tuple[CamelotState, Trace]:
        """Let the tokens of a segment join slots or take the place of some; see `Memory.write`."""
        assert segment.heads is not None  # as they are among the `needs`
        new = [part.transpose(1, 2) for part in segment.heads[1:]]  # keys and values, (B, T, H, E)
        if not self.gradient:
            new = [part.detach() for part in new]
        valid = segment.valid
        with torch.autocast(new[0].device.type, enabled=False):
            places = self.places_of(new[0].flatten(2), valid, state)
            after = self._put(state, places, new, valid, segment)
        return after, {"joined": places.joins.sum() / valid.sum().clamp(min=1)}

    def _put(
        self, state: CamelotState, places: Places, new: list[Tensor], valid: Tensor, segment: Segment
    ) -> CamelotState:
        """The slots with keys and values ``new`` (B, T, H, E) where they go; only slots that tokens go to are written.

        In rows whose segment is not complete nothing goes anywhere. Without gradients a state that is given away is
        changed in place.
        """
        rows = segment.complete[:, 0]
        here = valid & rows[:, None]
        cell = torch.arange(valid.shape[1], device=valid.device)
        slot = places.slot.clamp(max=self.n_mode - 1)  # of padding any
        begun = places.begun.gather(1, slot)  # (B, T)
        # Tokens that a slot holds in the end, told where its last token is.
        parts = (slot[..., None] == slot[:, None]) & (cell >= begun[..., None]) & valid[:, None]  # (B, T, T)
        ends = here & (places.last.gather(1, slot) == state.n_token[:, None] + cell)
        row, token = ends.nonzero(as_tuple=True)
        slot = slot[row, token]
        kept = state.n_part[row, slot].where(begun[row, token] < 0, 0)  # (n,)
        count = kept + parts[row, token].sum(dim=1)

        def mean(old: Tensor, part: Tensor) -> Tensor:
            total = (parts.to(part.dtype) @ part.flatten(2)).view_as(part)[row, token]
            each = count[:, None, None]
            told = old[row, slot] * (kept[:, None, None] / each) + total / each
            if torch.is_grad_enabled():
                return old.index_put((row, slot), told)
            return owned(old, segment.owned).index_put_((row, slot), told)

        return CamelotState(
            key=mean(state.key, new[0]),
            value=mean(state.value, new[1]),
            n_part=state.n_part.index_put((row, slot), count),
            last=torch.where(rows[:, None], places.last, state.last),
            n_token=state.n_token + (valid.sum(dim=1) * rows),
        )

    @torch.no_grad()
    def places_of(self, key: Tensor, valid: Tensor, state: CamelotState) -> Places:
        """Where each token of a segment goes, token by token, as each depends on those before it.

        Args:
            key: Keys of the tokens, (B, T, D).
            valid: Which of them are no padding, (B, T).
            state: State before the segment.
        """
        n_row, n_token = valid.shape
        n_slot, row = self.n_mode, torch.arange(n_row, device=key.device)
        total = state.key.flatten(2) * state.n_part[..., None]  # (B, n, D): a sum is as like a key as the mean is
        among = key @ key.mT  # (B, T, T)
        square = among.diagonal(dim1=1, dim2=2)  # (B, T)
        limit = square.sqrt() * (self.threshold if self.threshold < 1 else torch.inf)
        # Products of all keys with the sum of each slot, and its length; the slot behind the last takes padding.
        empty = ~F.pad(self.filled(state), (0, 1))[:, None]
        product = F.pad(key @ total.mT, (0, 1)).masked_fill_(empty, -torch.inf)  # (B, T, n + 1)
        length = F.pad(total.square().sum(dim=2).clamp(min=1e-24).sqrt(), (0, 1), value=1.0)
        last = F.pad(state.last, (0, 1), value=2**62)
        oldest = self._oldest(state.last, n_token)  # (B, m): no other slot is the oldest before the segment ends
        begun = torch.full_like(last, -1)
        slots, joined = [], []
        for t in range(n_token):
            best, nearest = (product[:, t] / length).max(dim=1)
            joins = best > limit[:, t]
            free = oldest.gather(1, last.gather(1, oldest).argmin(dim=1, keepdim=True))[:, 0]
            slot = torch.where(joins, nearest, free).where(valid[:, t], n_slot)
            held = product[row, :, slot].where(joins[:, None], 0.0)  # (B, T)
            grown = (length[row, slot].square() + 2 * held[:, t]).where(joins, 0.0) + square[:, t]
            product[row, :, slot] = held + among[:, t]
            length[row, slot] = grown.clamp(min=1e-24).sqrt()
            begun[row, slot] = begun[row, slot].where(joins, t)
            last[row, slot] = state.n_token + t
            slots.append(slot)
            joined.append(joins)
        joins = torch.stack(joined, dim=1) & valid
        return Places(torch.stack(slots, dim=1), joins, begun[:, :n_slot], last[:, :n_slot])

    def _oldest(self, last: Tensor, n: int) -> Tensor:
        """The ``n`` slots, or all, that were joined longest ago by ``last`` (B, n_mode), in order."""
        place = torch.arange(self.n_mode, device=last.device)
        return (last * self.n_mode + place).topk(min(n, self.n_mode), dim=1, largest=False).indices

    def flops_per_token(self) -> int:
        """Keys and values once more, the search of read and write, attention to what is found, and the means."""
        d_model, n_token = self.sizes.d_model, self.sizes.segment_len
        attention = 4 * min(self.n_mode, n_token * self.top_k) * d_model
        return 6 * d_model**2 + 8 * self.n_mode * d_model + attention + 2 * n_token * d_model


def unit(key: Tensor) -> Tensor:
    """Keys of all heads (B, L, H, E) side by side, of length 1: (B, L, D)."""
    return F.normalize(key.flatten(2), dim=2)
