"""Consolidated associative memory: slots of keys and values that are means of tokens alike (CAMELoT).

Source: Z. He et al., "CAMELoT: Towards large language models with training-free consolidated associative memory"
(2024), arXiv 2402.13449. There is no code of its authors; what the paper leaves open is decided here:

- A slot holds the key and value of all heads of a layer, with one count and one age. Keys are taken before rotation.
- Similarity is the cosine of whole keys, all heads side by side.
- What is found has no place: scores are those of queries and keys before positions are encoded.
- A token sees the slots that tokens of its segment found up to itself, each once. That a token sees what later ones
  found, as one would read the paper's concatenation, tells it something of these.
- A token finds ``top_k`` slots. The paper has 1, with which nothing could be learned in a short training.
- A document empties the memory; the end of a context does not. A token that attention still sees (the overlap) may
  stand in a slot too.

Shapes: B rows, S segments, T tokens of a segment, Q of them mixed, n slots, H heads, E width of a head, M slots found,
G groups = n + T: what may stand in a slot during a segment is a slot as it was, or what token t founded (n + t).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.contract import Context, Mixer, Needs, Read, Scanned, Segment, Sizes, Trace, mean_trace
from memlm.memory.slots import Slots
from memlm.memory.state import where_rows
from memlm.tensors import take


class CamelotState(NamedTuple):
    """Slots of one layer.

    Attributes:
        key: Mean key of the tokens of each slot, before any position is encoded, (B, n, H, E).
        value: Mean value, (B, n, H, E).
        count: Tokens that are in the mean, (B, n); 0 if the slot is empty.
        last: Number of the token that joined last, (B, n); -1 if the slot is empty. Age is counted from there.
        n_token: Tokens written so far, (B,).
    """

    key: Tensor
    value: Tensor
    count: Tensor
    last: Tensor
    n_token: Tensor


class Groups(NamedTuple):
    """Where the tokens of a segment go.

    Attributes:
        group: The group of each token, (B, T).
        last: Number of the token that joined each group last, (B, G); negative for empty slots, in their order, and
            least for groups that nothing founded.
        victim: The group in whose place that of each token stands, if the token founds one, (B, T).
        n_round: Rounds that it took to know.
    """

    group: Tensor
    last: Tensor
    victim: Tensor
    n_round: int


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
        gradient: Whether gradients flow into what is kept, inside a window.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    needs = Needs(heads=True, context=True)
    within = True  # what a token sees depends on tokens before it in its segment

    def __init__(
        self,
        d_model: int,
        sizes: Sizes,
        n_mode: int = 512,
        threshold: float = 0.95,
        top_k: int = 8,
        gradient: bool = False,
    ) -> None:
        super().__init__()
        for name, number in {"n_mode": n_mode, "top_k": top_k}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not threshold >= -1:
            raise ValueError(f"threshold is a cosine, so at least -1, got {threshold}")
        self.n_mode, self.threshold, self.top_k, self.gradient = n_mode, threshold, top_k, gradient
        self.sizes = sizes
        self.register_buffer("empty", torch.zeros(sizes.n_head, d_model // sizes.n_head), persistent=False)

    def init_state(self, n_row: int) -> CamelotState:
        """Empty slots."""
        key = self.get_buffer("empty").new_zeros(n_row, self.n_mode, *self.get_buffer("empty").shape)
        count = torch.zeros(n_row, self.n_mode, dtype=torch.long, device=key.device)
        return CamelotState(key, key, count, count - 1, count[:, 0])

    def filled(self, state: CamelotState) -> Tensor:
        """Which slots hold something, (B, n)."""
        return state.count > 0

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
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        traces: list[Trace] = []
        for s in range(window.n_segment):
            segment = window.at(s)
            state = self.start_documents(segment.reset, state)
            if read:
                found.append(self.find(segment, state))
            if write:
                state, trace = self.write(segment, state)
                traces.append(trace)
        if not read:
            return Scanned(self.off(x, mixer), None, state, mean_trace(traces))
        key, value, seen = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*found, strict=True))
        context = Context(key.transpose(1, 2), value.transpose(1, 2), seen)
        return Scanned(mixer(x, context), None, state, mean_trace(traces))

    def find(self, segment: Segment, state: CamelotState) -> tuple[Tensor, Tensor, Tensor]:
        """What the tokens of a segment find.

        Returns:
            Keys and values of the slots that are found by any token, (B, M, H, E) each, and which of them each token
            that is mixed sees, (B, Q, M).
        """
        assert segment.heads is not None  # as they are among the `needs`
        n_token, device = segment.segment_len, state.key.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            like = unit(segment.heads.k.transpose(1, 2)) @ unit(state.key).mT  # (B, T, n)
            like = like.masked_fill(~self.filled(state)[:, None], -torch.inf)
            slots = like.topk(min(self.top_k, self.n_mode), dim=2).indices  # (B, T, k)
            cell = torch.arange(n_token, device=device)
            finder = torch.where(segment.valid, cell, n_token)[..., None].expand_as(slots)
            first = torch.full_like(state.count, n_token)  # token that finds each slot first; T if none does
            first = first.scatter_reduce(1, slots.flatten(1), finder.flatten(1), "amin")
            first = first.masked_fill(~self.filled(state), n_token)
            first, order = (part[:, : slots[0].numel()] for part in first.sort(dim=1, stable=True))  # (B, M)
            seen = first[:, None] <= cell[segment.columns][:, None]  # (B, Q, M)
        return take(state.key, order), take(state.value, order), seen

    def write(self, segment: Segment, state: CamelotState) -> tuple[CamelotState, Trace]:
        """Let the tokens of a segment join slots or take the place of some; see `Memory.write`."""
        assert segment.heads is not None  # as they are among the `needs`
        new = [part.transpose(1, 2) for part in segment.heads[1:]]  # keys and values, (B, T, H, E)
        if not self.gradient:
            new = [part.detach() for part in new]
        valid, n_slot = segment.valid, self.n_mode
        with torch.autocast(new[0].device.type, enabled=False):
            groups = self.groups_of(new[0].flatten(2), valid, state)
            group, owner = groups.group, owner_of(groups)  # (B, T), (B, n)
            joins = (group[:, None] == owner[..., None]) & valid[:, None]  # (B, n, T)
            kept = state.count.where(owner < n_slot, 0)
            count = kept + joins.sum(dim=2)
            each = count.clamp(min=1)[..., None, None]

            def mean(old: Tensor, part: Tensor) -> Tensor:
                total = (joins.to(part.dtype) @ part.flatten(2)).view_as(old)
                return old * (kept[..., None, None] / each) + total / each

            after = CamelotState(
                key=mean(state.key, new[0]),
                value=mean(state.value, new[1]),
                count=count,
                last=groups.last.gather(1, owner).clamp(min=-1),
                n_token=state.n_token + valid.sum(dim=1),
            )
        joined = (group != n_slot + torch.arange(valid.shape[1], device=group.device)) & valid
        trace = {
            "joined": joined.sum() / valid.sum().clamp(min=1),
            "rounds": torch.tensor(float(groups.n_round), device=group.device),
        }
        return where_rows(segment.complete[:, 0], after, state), trace

    @torch.no_grad()
    def groups_of(self, key: Tensor, valid: Tensor, state: CamelotState) -> Groups:
        """Where each token of a segment goes, by the rule that is told token by token.

        The group of a token depends on the groups of tokens before it alone. So if all groups are worked out at once
        from guesses, the first guess that was wrong is right in the next round; and where nothing changes any more,
        the groups are those of the loop over tokens. That takes at most T + 1 rounds, mostly a few.

        What stands in the slots before a token are the n groups that were joined last.

        Args:
            key: Keys of the tokens, (B, T, D).
            valid: Which of them are no padding, (B, T).
            state: State before the segment.
        """
        n_row, n_token = valid.shape
        n_slot = self.n_mode
        place = torch.arange(n_token, device=key.device)
        time = torch.where(valid, state.n_token[:, None] + place, -n_slot - 1)  # (B, T); after padding nothing comes
        empty = torch.arange(-n_slot, 0, device=key.device)
        before = F.pad(torch.where(self.filled(state), state.last, empty), (0, n_token), value=-n_slot - 1)  # (B, G)
        total = state.key.flatten(2) * state.count[..., None]  # (B, n, D)
        dots = F.pad(key @ total.mT, (0, n_token))  # of keys and what slots hold, (B, T, G)
        square = F.pad(total.square().sum(dim=2), (0, n_token))[:, None]  # (B, 1, G)
        among = (key @ key.mT).tril(-1)  # of keys and keys of tokens before, (B, T, T)
        length = key.square().sum(dim=2)[..., None]  # (B, T, 1)
        founded = (n_slot + place).expand(n_row, -1)
        group = founded
        groups = torch.arange(n_slot + n_token, device=key.device)
        n_round = 0
        while True:
            n_round += 1
            joins = (group[..., None] == groups) & valid[..., None]  # (B, T, G)
            product = dots + among @ joins.to(key.dtype)
            grown = square + before_each(((2 * product + length) * joins).cumsum(dim=1), 0.0)  # squared lengths of sums
            last = before_each(torch.where(joins, time[..., None], -n_slot - 1).cummax(dim=1).values, -n_slot - 1)
            last = torch.maximum(last, before[:, None])
            oldest, victim = last.kthvalue(n_token + 1, dim=2)  # n groups are joined at least as late
            like = (product / (length * grown).clamp(min=1e-24).sqrt()).clamp(max=1.0)
            stands = (last >= oldest[..., None]) & (last >= 0)
            best, nearest = like.masked_fill(~stands, -torch.inf).max(dim=2)
            found = torch.where((best > self.threshold) & valid, nearest, founded)
            if torch.equal(found, group):
                break
            group = found
        return Groups(group, before.scatter_reduce(1, group, time, "amax"), victim, n_round)

    def flops_per_token(self) -> int:
        """Keys and values once more, the search of read and write, attention to what is found, and one round."""
        d_model, n_token = self.sizes.d_model, self.sizes.segment_len
        attention = 4 * min(self.n_mode, n_token * self.top_k) * d_model
        means = 4 * self.n_mode * d_model
        return 6 * d_model**2 + 4 * self.n_mode * d_model + attention + means + 2 * n_token * (self.n_mode + n_token)


def unit(key: Tensor) -> Tensor:
    """Keys of all heads (B, L, H, E) side by side, of length 1: (B, L, D)."""
    return F.normalize(key.flatten(2), dim=2)


def before_each(running: Tensor, first: float) -> Tensor:
    """Of a running sum or maximum over tokens (B, T, G) what it is before each token; ``first`` before all of them."""
    return F.pad(running[:, :-1], (0, 0, 1, 0), value=first)


def owner_of(groups: Groups) -> Tensor:
    """The group that stands in each slot after a segment, (B, n)."""
    _, last, victim, _ = groups
    n_token = victim.shape[1]
    n_slot = last.shape[1] - n_token
    slot = torch.cat([torch.arange(n_slot, device=last.device).expand(len(last), -1), victim], dim=1)  # (B, G)
    for _ in range(n_token.bit_length()):  # in whose place a victim stood itself
        slot = slot.gather(1, slot)
    stays = last.topk(n_slot, dim=1).indices
    return torch.empty_like(stays).scatter(1, slot.gather(1, stays), stays)
