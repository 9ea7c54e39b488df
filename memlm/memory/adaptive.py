"""Adaptive memory: a learned controller decides what is stored; what repeats is reinforced, what is unused fades.

Source: Adaptive Neural Memory (sigmoid write gate of a controller trained by reinforcement learning, short-term and
long-term memory, promotion of what repeats, reinforcement instead of duplicates, decay S <- S * lambda, a retrieval
threshold, the best k by cosine x strength).

An item is a cue and its content. In a language model the cue is the hidden state of a token and the content the
embedding of the token that follows; in the simulation of users (`experiments.preferences`) both are an utterance.

Shapes: B rows, T tokens per segment, D model width, K items offered by one segment, M = n_short + n_slot slots, the
short-term ones first, k slots read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.memory import strengths
from memlm.memory.contract import Needs, Read, Segment, Trace
from memlm.memory.slots import Slots
from memlm.memory.strengths import AdaptiveState, Settled, like

_WRITTEN = 0.5  # importance above which an item is written, when nothing is left to chance

Controller = Literal["policy", "straight_through", "always", "never"]


class Decision(NamedTuple):
    """What the controller makes of items.

    Attributes:
        importance: Write gate, (B, K).
        chosen: Items to be written, (B, K), bool.
        log_prob: Log-probability of that choice, (B, K).
        entropy: Entropy of it, in nats, (B, K).
    """

    importance: Tensor
    chosen: Tensor
    log_prob: Tensor
    entropy: Tensor


class AdaptiveMemory(Slots):
    """Short-term and long-term slots with strengths, filled by a learned controller.

    Args:
        d_model: Width of the hidden states.
        n_slot: Long-term slots.
        n_short: Short-term slots, at least ``write_budget``.
        d_key: Width of keys and queries.
        d_value: Width of values, and of the hidden layer of the controller.
        top_k: Slots that a token reads.
        write_budget: Most items that one segment may write, the most important ones.
        controller: Who decides what is written: ``policy`` (a network trained by policy gradient), ``straight_through``
            (the same network, whose gradient flows through the strength of what it wrote), ``always`` or ``never``.
        decay: Factor of every strength per segment, in (0, 1].
        match_threshold: Cosine, of keys and of values, from which an item repeats what a slot holds, in 0..1.
        promote_at: Strength from which an item belongs into long-term memory, in 0..1.
        retrieval_threshold: Strength under which a slot is not read, in 0..1.
        temperature: Initial inverse temperature of the read; learned.
        gate_penalty: Price of an open write gate in the loss.
        exploration: Reward, in nats of next-token loss, for each nat of entropy of a choice; under ``policy`` alone. It
            keeps the controller from giving up before it has seen what a write may earn.
        signals: Implicit signals of the text by name, and how many numbers each has; null for none.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    sized = ("n_slot",)

    def __init__(
        self,
        d_model: int,
        n_slot: int = 1024,
        n_short: int = 64,
        d_key: int = 128,
        d_value: int = 128,
        top_k: int = 32,
        write_budget: int = 32,
        controller: Controller = "policy",
        decay: float = 0.99,
        match_threshold: float = 0.9,
        promote_at: float = 0.8,
        retrieval_threshold: float = 0.1,
        temperature: float = 12.0,
        gate_penalty: float = 0.01,
        exploration: float = 0.01,
        signals: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"n_slot": n_slot, "n_short": n_short, "d_key": d_key, "d_value": d_value, "top_k": top_k}
        for name, number in (sizes | {"write_budget": write_budget}).items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if n_short < write_budget:
            raise ValueError(
                f"n_short must hold what one segment writes, at least write_budget ({write_budget}), got {n_short}"
            )
        if controller not in get_args(Controller):
            raise ValueError(f"controller must be one of {', '.join(get_args(Controller))}, got {controller!r}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        thresholds = {
            "match_threshold": match_threshold,
            "promote_at": promote_at,
            "retrieval_threshold": retrieval_threshold,
        }
        for name, threshold in thresholds.items():
            if not 0 <= threshold <= 1:
                raise ValueError(f"{name} must be in 0..1, got {threshold}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {temperature}")
        for name, weight in {"gate_penalty": gate_penalty, "exploration": exploration}.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must not be negative, got {weight}")
        for name, width in (signals or {}).items():
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"signals.{name} must be how many numbers it has, at least 1, got {width!r}")
        self.n_slot, self.n_short, self.d_key, self.d_value = n_slot, n_short, d_key, d_value
        self.top_k, self.write_budget, self.controller, self.decay = top_k, write_budget, controller, decay
        self.match_threshold, self.promote_at = match_threshold, promote_at
        self.retrieval_threshold, self.gate_penalty, self.exploration = retrieval_threshold, gate_penalty, exploration
        self.signals = dict(signals or {})
        self.needs = Needs(lookback=1, signals=self.signals)

        self.cue_norm = nn.RMSNorm(d_model)
        self.content_norm = nn.RMSNorm(d_model)
        self.to_key = nn.Linear(d_model, d_key, bias=False)
        self.to_value = nn.Linear(d_model, d_value, bias=False)
        self.to_output = nn.Linear(d_value, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1)
        learned = controller in ("policy", "straight_through")
        gate = (nn.Linear(2 * d_model, d_value), nn.GELU(), nn.Linear(d_value, 1))
        self.to_importance = nn.Sequential(*gate) if learned else None
        self.to_baseline = nn.Linear(d_model, 1) if controller == "policy" else None
        self.to_signal = nn.Linear(sum(self.signals.values()), d_model, bias=False) if self.signals else None
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())
        self.null_score = nn.Parameter(torch.tensor(0.3))
        self._initialise()

    def _initialise(self) -> None:
        """Initial values: a read begins as the content itself, let in by half; most is written."""
        nn.init.normal_(self.to_key.weight, std=self.to_key.in_features**-0.5)
        if self.to_value.in_features == self.d_value:
            nn.init.eye_(self.to_value.weight)
        else:
            nn.init.orthogonal_(self.to_value.weight)
        self.to_output.weight.data.copy_(self.to_value.weight.T)
        for linear in filter(None, (self.read_gate, self.to_baseline, self.to_signal)):
            nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for part in self.to_importance or ():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
                nn.init.ones_(part.bias)  # of the last: importance begins around 0.73, spread by the seed

    # --- the bank ------------------------------------------------------------------------------------------------

    def init_state(self, n_row: int) -> AdaptiveState:
        """Empty slots."""
        device, n = self.to_key.weight.device, self.n_short + self.n_slot
        return AdaptiveState(
            key=torch.zeros(n_row, n, self.d_key, device=device),
            value=torch.zeros(n_row, n, self.d_value, device=device),
            strength=torch.zeros(n_row, n, device=device),
            position=torch.full((n_row, n), -1, dtype=torch.long, device=device),
        )

    def store(self, state: AdaptiveState, items: AdaptiveState, rows: Tensor) -> AdaptiveState:
        """The state after one segment: decay, reinforcement, promotion.

        All strengths decay. An item repeats the most similar slot, if keys and values both match, else the first item
        of the segment that it matches; it goes where that went. Whatever an item repeats is reinforced,
        ``S <- S + g - S g``, and its key and value become means, by strength. What reaches ``promote_at`` is long-term
        memory, which keeps the strongest; of the rest the short-term memory keeps what was met last.

        Args:
            state: The state before; never changed in place.
            items: What the segment offers: K items, of strength 0 where not written.
            rows: Rows whose segment is complete, (B,); others keep their state.
        """
        return strengths.placed(state, strengths.settle(self, state, items), rows)

    def retrieve(self, x: Tensor, state: AdaptiveState) -> tuple[Tensor, Tensor]:
        """Scores of all slots for queries.

        Args:
            x: What is asked with, as wide as a cue, (B, N, D).
            state: The state.

        Returns:
            Cosine x strength, (B, N, M), -inf but for the ``top_k`` best that are not under the retrieval threshold;
            and the numbers of these, best first, (B, N, k), -1 where there are fewer.
        """
        query = F.normalize(self.to_key(self.cue_norm(x)), dim=-1)
        score = (query @ state.key.transpose(1, 2)) * state.strength[:, None]  # (B, N, M)
        readable = (state.strength >= self.retrieval_threshold) & (state.strength > 0)
        score = score.masked_fill(~readable[:, None], -torch.inf)
        best = score.detach().topk(min(self.top_k, score.shape[2]), dim=2)
        score = score.masked_fill(score < best.values[..., -1:], -torch.inf)
        return score, best.indices.masked_fill(best.values == -torch.inf, -1)

    # --- the controller --------------------------------------------------------------------------------------------

    def encode(
        self, cue: Tensor, content: Tensor, signals: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Items of cues and contents.

        Args:
            cue: (B, K, D).
            content: (B, K, D).
            signals: By name, of the text they come from, (B, n), or of each item, (B, K, n). What is not given is 0.

        Returns:
            Unit keys (B, K, d_key), values (B, K, d_value), logits of the importance (B, K).

        Raises:
            ValueError: If a signal is unknown or of another width.
        """
        cue, content = self.cue_norm(cue), self.content_norm(content)
        if (signal := self._signal(signals, cue)) is not None:
            content = content + signal
        logit = cue.new_zeros(cue.shape[:2])
        if self.to_importance is not None:
            logit = self.to_importance(torch.cat([cue, content], dim=-1))[..., 0]
        return F.normalize(self.to_key(cue), dim=-1), self.to_value(content), logit

    def _signal(self, signals: Mapping[str, Tensor] | None, cue: Tensor) -> Tensor | None:
        """What the signals add to the content, (B, 1, D) or (B, K, D); None if the memory knows none."""
        for name, given in (signals or {}).items():
            if name not in self.signals:
                known = ", ".join(self.signals) or "none"
                raise ValueError(
                    f"signals: {name!r} is unknown to this memory, which knows {known}: "
                    f"set memory.adaptive.signals={{{name}: {given.shape[-1]}}}, or leave it out"
                )
            if given.shape[-1] != self.signals[name]:
                raise ValueError(f"signals.{name} must have {self.signals[name]} numbers, got {given.shape[-1]}")
        if self.to_signal is None:
            return None
        every = {name: part if part.dim() == 3 else part[:, None] for name, part in (signals or {}).items()}
        n_item = max((part.shape[1] for part in every.values()), default=1)
        parts = [
            every[name].to(cue.dtype).expand(-1, n_item, -1)
            if name in every
            else cue.new_zeros(len(cue), n_item, width)
            for name, width in self.signals.items()
        ]
        return self.to_signal(torch.cat(parts, dim=-1))

    def decide(self, logit: Tensor, valid: Tensor) -> Decision:
        """Choose what is written: a draw while training, the likelier choice else.

        Args:
            logit: Of the importance, (B, K).
            valid: Items that there are, (B, K).
        """
        if self.controller in ("always", "never"):
            importance = torch.full_like(logit, float(self.controller == "always"))
            zero = torch.zeros_like(logit)
            return Decision(importance, (importance > 0) & valid, zero, zero)
        importance = logit.sigmoid()
        chosen = torch.rand_like(importance) < importance if self.training else importance > _WRITTEN
        log_prob = F.logsigmoid(torch.where(chosen, logit, -logit)) * valid
        entropy = (F.softplus(logit) - logit * importance) * valid
        return Decision(importance, chosen & valid, log_prob, entropy)

    def items(self, key: Tensor, value: Tensor, decision: Decision, position: Tensor) -> AdaptiveState:
        """What a segment offers: the ``write_budget`` most important of the chosen items, in the order of the text.

        Their strength is their importance. Under ``policy`` it has no gradient, as reward teaches the controller, and
        what is tried against the odds is as strong as what evaluation would just write: else it could earn nothing.
        """
        strength = decision.importance
        if self.controller == "policy":
            strength = strength.detach().clamp(min=_WRITTEN)
        strength = strength * decision.chosen
        order = strength.detach().sort(dim=1, descending=True, stable=True).indices
        best = order[:, : self.write_budget].sort(dim=1).values
        return AdaptiveState(*(part.gather(1, like(best, part)) for part in (key, value, strength, position)))

    # --- in a language model -----------------------------------------------------------------------------------------

    def read(self, y: Tensor, prepared: AdaptiveState) -> Read:
        """Soft attention over the best slots and a null slot that holds nothing; see `Memory.read`."""
        gate = self.read_gate(y).sigmoid()  # (B, T, 1)
        with torch.autocast(y.device.type, enabled=False):
            score, slots = self.retrieve(y.float(), prepared)
            temperature = self.log_temperature.exp()
            null = self.null_score.expand(*score.shape[:2], 1)
            every = torch.cat([null, score], dim=2)
            hidden = every == -torch.inf
            scaled = (temperature * every.masked_fill(hidden, 0.0)).masked_fill(hidden, -torch.inf)  # no inf x gradient
            weight = scaled.softmax(dim=2)[..., 1:]  # (B, T, M)
            found = weight @ prepared.value
        weights = weight.gather(2, slots.clamp(min=0)) * (slots >= 0)
        return Read(gate * self.to_output(found.to(y.dtype)), slots, weights, gate[..., 0])

    def write(self, segment: Segment, state: AdaptiveState) -> tuple[AdaptiveState, Trace]:
        """Store what the controller chooses of the segment's tokens with a successor; see `Memory.write`.

        The trace has, by row, the mean log-probability of the choices and the reward that was expected.
        """
        valid = segment.valid[:, :-1] & segment.valid[:, 1:] & segment.complete  # (B, T)
        position = segment.position - 1 + torch.arange(valid.shape[1], device=valid.device)
        with torch.autocast(valid.device.type, enabled=False):
            cue, content = segment.hidden[:, :-1].float(), segment.embeddings[:, 1:].float()
            key, value, logit = self.encode(cue, content, segment.signals)
            decision = self.decide(logit, valid)
            written = segment.complete[:, 0] & segment.valid[:, segment.lookback :].any(
                dim=1
            )  # an empty segment is none
            settled = strengths.settle(self, state, self.items(key, value, decision, position))
            moved = self._moved(state, settled, written)
            new = strengths.placed(state, settled, written, segment.owned)
            n_valid = valid.sum(dim=1).clamp(min=1)  # (B,)
            trace: Trace = {
                "write_gate": (decision.importance * valid).sum() / n_valid.sum(),
                "written": decision.chosen.sum() / n_valid.sum(),
                "long_term": self.filled(new)[:, self.n_short :].sum(dim=1).float().mean(),
            } | moved
            if self.to_baseline is not None:
                pooled = (self.cue_norm(cue).detach() * valid[..., None]).sum(dim=1) / n_valid[:, None]
                trace["log_prob"] = decision.log_prob.sum(dim=1) / n_valid
                trace["entropy"] = decision.entropy.sum(dim=1) / n_valid
                trace["baseline"] = self.to_baseline(pooled)[:, 0]
        return new, trace

    @torch.no_grad()
    def _moved(self, state: AdaptiveState, settled: Settled, written: Tensor) -> dict[str, Tensor]:
        """Items of a row that moved from short-term to long-term memory, faded, or went, mean over rows."""
        n = state.strength.shape[1]
        long = settled.source[:, self.n_short :]
        readable = state.strength >= self.retrieval_threshold
        found = {
            "promoted": ((long >= 0) & (long < self.n_short)).sum(dim=1),
            "decayed": (readable & (settled.strength[:, :n] < self.retrieval_threshold)).sum(dim=1),
            "evicted": (settled.strength > 0).sum(dim=1) - (settled.source >= 0).sum(dim=1),
        }
        return {name: (count * written).float().mean() for name, count in found.items()}

    def losses(self, trace: Trace, nll: Tensor) -> dict[str, Tensor]:
        """The price of writing, and under ``policy`` the policy gradient and the error of its baseline.

        The reward of a row's choices is how well its text is predicted.
        """
        losses = {}
        if "write_gate" in trace and self.to_importance is not None:
            losses["gate_penalty"] = self.gate_penalty * trace["write_gate"]
        if "log_prob" in trace:
            losses |= policy_gradient(-nll, trace["log_prob"], trace["baseline"])
            losses["exploration"] = -self.exploration * trace["entropy"].mean()
        return losses

    def filled(self, state: AdaptiveState) -> Tensor:
        """Which slots hold something, (B, M), also if they have faded."""
        return state.strength > 0

    def places(self, state: AdaptiveState) -> Tensor:
        """See `Memory.places`."""
        return state.position

    def contents(self, state: AdaptiveState) -> Tensor:
        """What each slot adds to the residual stream if it alone is read through an open gate, (B, M, D)."""
        return self.to_output(state.value)

    def flops_per_token(self) -> int:
        """Projections, and the search of a full bank; comparing what a segment writes with the bank is left out."""
        n = self.n_short + self.n_slot
        return super().flops_per_token() + 2 * n * (self.d_key + self.d_value)


def policy_gradient(reward: Tensor, log_prob: Tensor, baseline: Tensor) -> dict[str, Tensor]:
    """REINFORCE with a learned baseline.

    Args:
        reward: What was reached by each choice, or group of choices, (...); without gradients.
        log_prob: Log-probability of the choice, (...).
        baseline: The reward that was expected, (...).

    Returns:
        ``policy``, whose gradient makes choices likelier that earned more than expected; and ``baseline``.
    """
    reward = reward.detach()
    advantage = reward - baseline.detach()
    return {"policy": -(advantage * log_prob).mean(), "baseline": (baseline - reward).square().mean()}
