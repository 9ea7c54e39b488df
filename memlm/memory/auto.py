"""Automatic memory: the tokens that a network finds important are kept, and later text attends to them.

Source: AutoMemoryModule (a score network over sentence and memory context; tokens above a threshold are kept, up to a
size). What differs: any number of tokens is scored, in batches; scores weigh in the read, so that they are learned;
what was kept is handed on.

Shapes: B rows, T tokens per segment, D model width, M slots, K = M + T candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory.contract import Read, Segment, Trace
from memlm.memory.slots import Slots
from memlm.memory.state import where_rows
from memlm.tensors import take


class AutoState(NamedTuple):
    """The kept tokens, in the order of the text; then empty slots.

    Attributes:
        hidden: Hidden state of each token, (B, M, D).
        score: Its score when the last segment was written, (B, M), in 0..1.
        ids: Its id, (B, M); -1 for empty slots.
        position: Its place in the document, (B, M); -1 for empty slots.
    """

    hidden: Tensor
    score: Tensor
    ids: Tensor
    position: Tensor


class AutoMemory(Slots):
    """Kept tokens that the tokens of later segments attend to.

    After each segment a network scores its tokens and those kept so far, given what is kept. A token stays if its score
    reaches ``threshold``; of equal tokens the one of the best score; at most ``n_slot``, those of the best scores. Of
    equal scores the newer wins.

    Args:
        d_model: Width of the hidden states.
        n_slot: Most tokens that are kept (the source's ``max_memory_size``).
        threshold: Least score of a token that is kept, in 0..1.
        d_score: Hidden width of the score network.
        budget: Share of a segment's tokens that should reach the threshold, in (0, 1].
        budget_penalty: Price in the loss of the squared distance to ``budget``.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_slot",)

    def __init__(
        self,
        d_model: int,
        n_slot: int = 64,
        threshold: float = 0.1,
        d_score: int = 64,
        budget: float = 0.5,
        budget_penalty: float = 1.0,
    ) -> None:
        super().__init__()
        if n_slot < 1:
            raise ValueError(f"n_slot must be at least 1, got {n_slot}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in 0..1, got {threshold}")
        if d_score < 1:
            raise ValueError(f"d_score must be at least 1, got {d_score}")
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be in (0, 1], got {budget}")
        if not 0 <= budget_penalty < math.inf:
            raise ValueError(f"budget_penalty must not be negative, got {budget_penalty}")
        self.n_slot, self.threshold = n_slot, threshold
        self.budget, self.budget_penalty = budget, budget_penalty
        self.norm = nn.RMSNorm(d_model)
        self.score_net = nn.Sequential(nn.Linear(2 * d_model, d_score), nn.ReLU(), nn.Linear(d_score, 1))
        self.to_query = nn.Linear(d_model, d_model, bias=False)
        self.to_key = nn.Linear(d_model, d_model, bias=False)
        self.to_value = nn.Linear(d_model, d_model, bias=False)
        self.to_output = nn.Linear(d_model, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1)
        self.init_linears()
        # Everything is kept at first: what is not kept is not read, and nothing would tell that it is missed.
        nn.init.constant_(self.score_net[2].bias, 2.0)  # type: ignore[arg-type]
        nn.init.normal_(self.score_net[2].weight, std=0.1 * d_score**-0.5)  # type: ignore[arg-type]

    def init_state(self, n_row: int) -> AutoState:
        """Nothing is kept."""
        weight = self.to_key.weight
        nowhere = torch.full((n_row, self.n_slot), -1, dtype=torch.long, device=weight.device)
        score = torch.zeros(n_row, self.n_slot, device=weight.device)
        hidden = torch.zeros(n_row, self.n_slot, weight.shape[1], device=weight.device)
        return AutoState(hidden, score, nowhere, nowhere.clone())

    def prepare(self, state: AutoState) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the kept tokens, (B, M, D) each, and what is added to their read scores, (B, M)."""
        normed = self.norm(state.hidden)
        bias = state.score.clamp(min=1e-6).log().masked_fill(~self.filled(state), -torch.inf)
        return self.to_key(normed), self.to_value(normed), bias

    def read(self, y: Tensor, prepared: tuple[Tensor, Tensor, Tensor]) -> Read:
        """Attention over the kept tokens, weighted by their scores, or over nothing; see `Memory.read`."""
        key, value, bias = prepared
        score = self.to_query(self.norm(y)) @ key.transpose(1, 2) / key.shape[-1] ** 0.5 + bias[:, None]  # (B, T, M)
        weights = F.pad(score, (1, 0)).softmax(dim=-1)[..., 1:]  # beside a slot of score 0 that holds nothing
        gate = self.read_gate(y).sigmoid() * bias.isfinite().any(dim=1)[:, None, None]  # (B, T, 1)
        slots = torch.arange(self.n_slot, device=y.device).expand_as(weights)
        slots = slots.masked_fill(bias.isinf()[:, None], -1)
        return Read(gate * self.to_output(weights @ value), slots, weights, gate[..., 0])

    def scores(self, hidden: Tensor, kept: Tensor, filled: Tensor) -> Tensor:
        """Importance of tokens, (B, K), in 0..1.

        Args:
            hidden: Their hidden states, (B, K, D).
            kept: Hidden states of the kept tokens, (B, M, D).
            filled: Which of these there are, (B, M).
        """
        weight = filled[..., None].to(kept.dtype)
        context = (self.norm(kept) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)  # (B, D)
        context = context[:, None].expand(-1, hidden.shape[1], -1)
        return self.score_net(torch.cat([self.norm(hidden), context], dim=-1))[..., 0].sigmoid()

    def write(self, segment: Segment, state: AutoState) -> tuple[AutoState, Trace]:
        """Keep the best of the kept tokens and the segment's; see `Memory.write`."""
        valid = segment.valid[:, segment.lookback :]  # (B, T)
        fresh, ids = segment.hidden[:, segment.lookback :], segment.ids[:, segment.lookback :]
        filled, wrote = self.filled(state), segment.complete[:, 0] & valid.any(dim=1)
        place = segment.position + torch.arange(ids.shape[1], device=ids.device)  # (B, T)
        hidden = torch.cat([state.hidden, fresh.to(state.hidden.dtype)], dim=1)  # (B, K, D)
        score = self.scores(hidden, state.hidden, filled).float()  # (B, K)
        ids, position = torch.cat([state.ids, ids], dim=1), torch.cat([state.position, place], dim=1)
        chosen = self._choose(score.detach(), ids, torch.cat([filled, valid], dim=1))  # (B, M), K where none

        there = chosen < ids.shape[1]
        index = chosen.where(there, 0)

        def pick(part: Tensor, empty: float) -> Tensor:
            shape = (*there.shape, *[1] * (part.dim() - 2))
            return take(part, index).masked_fill(~there.view(shape), empty)

        new = where_rows(
            wrote, AutoState(pick(hidden, 0.0), pick(score, 0.0), pick(ids, -1), pick(position, -1)), state
        )
        weight = (valid & wrote[:, None]).float()
        mine = score[:, self.n_slot :]
        # Straight through: the step in what reaches the threshold, the gradient of the score.
        passes = (mine >= self.threshold).float() + mine - mine.detach()
        share = (passes * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)  # (B,)
        n_wrote = wrote.sum().clamp(min=1)
        # Of each segment by itself: a network that lets all pass and none in turn keeps to a budget on average.
        off = ((share - self.budget).square() * wrote).sum() / n_wrote
        kept = self.filled(new).sum(dim=1).float().mean()
        return new, {"passes": (share * wrote).sum() / n_wrote, "off_budget": off, "kept": kept}

    def _choose(self, score: Tensor, ids: Tensor, there: Tensor) -> Tensor:
        """Candidates that stay, (B, M), in the order of the text; ``K`` where a slot stays empty.

        Args:
            score: (B, K).
            ids: Token ids, (B, K).
            there: Candidates that hold a token, (B, K); they stand in the order of the text.
        """
        n_candidate = score.shape[1]
        worth = score.masked_fill(~(there & (score >= self.threshold)), -1.0)
        # By id, of equal ids by worth, of equal ones by place: all but the last of an id are doubles.
        order = worth.argsort(dim=1, stable=True)
        order = order.gather(1, ids.gather(1, order).argsort(dim=1, stable=True))
        ordered = ids.gather(1, order)
        double = F.pad(ordered[:, :-1] == ordered[:, 1:], (0, 1))
        worth = worth.masked_fill(torch.zeros_like(double).scatter(1, order, double), -1.0)
        # Newest first, so that a stable order prefers the newer of equal ones.
        best = worth.flip(1).sort(dim=1, descending=True, stable=True)
        chosen = n_candidate - 1 - best.indices[:, : self.n_slot]
        return chosen.masked_fill(best.values[:, : self.n_slot] < 0, n_candidate).sort(dim=1).values

    def losses(self, trace: dict[str, Tensor], nll: Tensor) -> dict[str, Tensor]:
        """The price of a share other than the budget: of too many tokens, and of none, which are not missed."""
        return {"budget": self.budget_penalty * trace["off_budget"]} if "off_budget" in trace else {}

    def filled(self, state: AutoState) -> Tensor:
        """Which slots hold a token, (B, M)."""
        return state.ids >= 0

    def places(self, state: AutoState) -> Tensor:
        """Place in its document of each kept token, (B, M)."""
        return state.position

    def contents(self, state: AutoState) -> Tensor:
        """Hidden states of the kept tokens, (B, M, D)."""
        return state.hidden

    def flops_per_token(self) -> int:
        """Projections, and attention over the slots; the score network runs over the kept tokens too."""
        score = sum(m.weight.numel() for m in self.score_net if isinstance(m, nn.Linear))
        return super().flops_per_token() + 4 * self.n_slot * self.to_key.weight.shape[1] + 2 * score
