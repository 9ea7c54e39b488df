"""The agent of `preferences`: an encoder of words and a memory with a controller, and their training."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.preferences.settings import Preferences
from experiments.preferences.users import ASPECTS, TELL, Users, draw, phrasings
from memlm.memory.adaptive import AdaptiveMemory, AdaptiveState, Decision, policy_gradient

D_WORD = 64  # width of the agent


_BUCKETS = 4096  # of hashed words and pairs of words


_WORD_DROPOUT = 0.3


_NUISANCE = 0.1  # what a memory in the prompt that is of no use takes off, against 1 for a right one


class Agent(nn.Module):
    """Encoder of utterances and the memory that is tested.

    Args:
        settings: Of the memory.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(_BUCKETS, D_WORD, mode="mean", padding_idx=0)
        self.mix = nn.Sequential(nn.Linear(D_WORD, 2 * D_WORD), nn.GELU(), nn.Linear(2 * D_WORD, D_WORD))
        self.memory = AdaptiveMemory(D_WORD, **settings)
        nn.init.normal_(self.words.weight, std=0.01)  # words that are never met say next to nothing

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Vectors of utterances, (N, D); while training, of a part of their words."""
        ids = _bags(texts)
        if self.training:
            ids = ids * (torch.rand(ids.shape) > _WORD_DROPOUT)
        x = self.words(ids)
        return x + self.mix(x)


def _hashed(text: str) -> list[int]:
    """Numbers of the words of an utterance and of its pairs of neighbours, from 1."""
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    pairs = [f"{a} {b}" for a, b in zip(["", *words], [*words, ""], strict=True)]
    return [1 + zlib.crc32(part.encode()) % (_BUCKETS - 1) for part in words + pairs]


def _bags(texts: Sequence[str]) -> Tensor:
    """The numbers of all utterances, (N, L), filled up with 0."""
    bags = [_hashed(text) for text in texts]
    longest = max(map(len, bags))
    return torch.tensor([bag + [0] * (longest - len(bag)) for bag in bags])


class Talk(NamedTuple):
    """Some users, ready for an agent.

    Attributes:
        users: Who they are.
        x: Vectors of all texts, (N, D).
        signals: By name, (U, S, T, n).
    """

    users: Users
    x: Tensor
    signals: dict[str, Tensor]


def listen(agent: Agent, users: Users) -> Talk:
    """Encode all that users say, without gradients."""
    with torch.no_grad():
        return Talk(users, agent(users.texts), {name: torch.from_numpy(part) for name, part in users.signals.items()})


def train_encoder(agent: Agent, cfg: Preferences) -> None:
    """Questions get keys near to what is told about the same aspect; what tells the same value gets one value.

    Contrastive, on phrasings of training; noise is no part of it. Beside it the words of all that users of training
    say, whatever it is, are to be told from its vector, so that a controller can see more than aspects and values.
    """
    rng, memory = np.random.default_rng([cfg.seed, 1]), agent.memory
    told = [(a, v, text.format(value)) for a, aspect in enumerate(ASPECTS) for v, value in enumerate(aspect.values)
            for text in phrasings(TELL, "train")]  # fmt: skip
    asked = [(a, -1, text.format(about)) for a, aspect in enumerate(ASPECTS) for text in phrasings(aspect.ask, "train")
             for about in ("it", "this", "Mr Smith", "the old house")]  # fmt: skip
    said = draw(np.random.default_rng([cfg.seed, 4]), 64, 12, cfg.n_turn, "train")
    words_of = nn.Linear(D_WORD, _BUCKETS)
    parts = [agent.words, agent.mix, memory.cue_norm, memory.content_norm, memory.to_key, memory.to_value, words_of]
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=3e-3)
    for _ in range(2 * cfg.n_step):
        batch = [told[i] for i in rng.integers(len(told), size=96)] + [
            asked[i] for i in rng.integers(len(asked), size=96)
        ]
        x = agent([text for _, _, text in batch])
        key, value, _ = memory.encode(x[None], x[None], None)
        aspect = torch.tensor([a for a, _, _ in batch])
        meaning = torch.tensor([10 * a + v for a, v, _ in batch[:96]])
        loss = _contrast(key[0], aspect) + _contrast(F.normalize(value[0, :96], dim=-1), meaning)
        texts = [said.texts[i] for i in rng.choice(said.turn.flatten(), size=192)]
        bags = _bags(texts)
        share = words_of(memory.cue_norm(agent(texts))).log_softmax(dim=1).gather(1, bags)
        loss = loss - share[bags > 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _contrast(unit: Tensor, label: Tensor) -> Tensor:
    """Supervised contrastive loss of unit vectors (N, D) at temperature 0.1."""
    itself = torch.eye(len(unit), dtype=torch.bool)
    log_share = (unit @ unit.T / 0.1).masked_fill(itself, -torch.inf).log_softmax(dim=1)
    same = (label == label[:, None]) & ~itself
    return -(log_share.masked_fill(~same, 0.0).sum(dim=1) / same.sum(dim=1).clamp(min=1)).mean()


def train_controller(agent: Agent, talks: Sequence[Talk], cfg: Preferences) -> list[float]:
    """Train what decides: by reward under ``policy``, else through the strengths that are read.

    Args:
        agent: Its encoder stays as it is.
        talks: Batches of users, gone through again and again.
        cfg: Settings.

    Returns:
        Reward per user and session of every batch, before the price of writing; empty if there is nothing to train.
    """
    memory = agent.memory
    if memory.to_importance is None:
        return []
    agent.requires_grad_(False)
    parts = [part for part in (memory.to_importance, memory.to_signal, memory.to_baseline) if part is not None]
    optimizer = torch.optim.AdamW([p for part in parts for p in part.requires_grad_(True).parameters()], lr=1e-2)
    earned = []
    memory.train()
    for step in range(cfg.n_step):
        # Free at first: what writes are good for must be seen before their price can be weighed.
        price = cfg.write_price * min(2 * step / cfg.n_step, 1.0)
        reward, decision, baseline, nll = _live(memory, talks[step % len(talks)])
        earned.append(float(reward.sum(dim=2).mean()))
        if memory.controller == "policy":
            reward = reward - price * decision.chosen
            loss = sum(policy_gradient(reward, decision.log_prob, baseline).values())
            loss = loss - memory.exploration * (1 - step / cfg.n_step) * decision.entropy.mean()
        else:
            loss = nll + price * decision.importance.mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    memory.eval()
    return earned


def _live(memory: AdaptiveMemory, talk: Talk) -> tuple[Tensor, Decision, Tensor, Tensor]:
    """Users talk while the controller learns.

    Returns:
        By turn, (U, S, T): reward without the price of writing, choice, expected reward. And the mean loss of choosing
        a right memory, a scalar.
    """
    users, (n_user, n_session, n_turn) = talk.users, talk.users.turn.shape
    credit = torch.zeros(n_user, n_session * n_turn)
    state, made, losses = memory.init_state(n_user), [], []
    for s in range(n_session):
        state, decision, baseline = hear(memory, talk, state, s, range(n_user))
        made.append((*decision, baseline))
        wanted = torch.from_numpy(users.wanted[:, s])  # (U, A)
        score, slots = memory.retrieve(talk.x[torch.from_numpy(users.ask[:, s])], state)  # (U, A, M), (U, A, k)
        asked = wanted >= 0
        prompt = turns(state.position, slots)  # (U, A, k)
        right = _is_right(users, prompt, wanted)
        worth = torch.where(right, 1.0, -_NUISANCE) * (asked[..., None] & (prompt >= 0))
        credit = credit.scatter_add(1, prompt.clamp(min=0).flatten(1), worth.flatten(1))
        if memory.controller == "straight_through":
            good = _is_right(users, state.position[:, None].expand_as(score), wanted) & (score > -torch.inf)
            every = F.pad(12.0 * score.masked_fill(score == -torch.inf, -1e4 / 12), (1, 0), value=12.0 * 0.1)
            log_share = every.log_softmax(dim=2)
            nll = -torch.where(good, log_share[..., 1:], -1e4).logsumexp(dim=2)
            usable = good.any(dim=2) & asked
            losses.append((nll * usable).sum() / usable.sum().clamp(min=1))
    *decided, baseline = (torch.stack(part, dim=1) for part in zip(*made, strict=True))
    decision = Decision(*decided)
    reward = decision.chosen * credit.view(n_user, n_session, n_turn).clamp(-1, 1)
    return reward, decision, baseline, torch.stack(losses).mean() if losses else torch.zeros(())


def hear(
    memory: AdaptiveMemory, talk: Talk, state: AdaptiveState, s: int, rows: Sequence[int], perfect: bool = False
) -> tuple[AdaptiveState, Decision, Tensor]:
    """The state after session ``s`` of some users, what was chosen, and the reward that was expected, (U, T).

    ``perfect``: not the controller chooses, but what tells a preference is written.
    """
    number = torch.tensor(list(rows))
    x = talk.x[torch.from_numpy(talk.users.turn[:, s])[number]]  # (U, T, D)
    key, value, logit = memory.encode(x, x, {name: part[number, s] for name, part in talk.signals.items()})
    decision = memory.decide(logit, torch.ones_like(logit, dtype=torch.bool))
    if perfect:
        tells = torch.from_numpy(talk.users.earnest[:, s])[number]
        decision = decision._replace(importance=tells.to(logit.dtype), chosen=tells)
    n_turn = x.shape[1]
    position = (s * n_turn + torch.arange(n_turn)).expand(len(x), -1)
    state = memory.store(state, memory.items(key, value, decision, position), torch.ones(len(x), dtype=torch.bool))
    baseline = torch.zeros_like(logit)
    if memory.to_baseline is not None:
        baseline = memory.to_baseline(memory.cue_norm(x).detach())[..., 0]
    return state, decision, baseline


def _is_right(users: Users, turns: Tensor, wanted: Tensor) -> Tensor:
    """Which ``turns`` (U, A, N) tell, in earnest, what is ``wanted`` (U, A) of the aspect; -1 is no turn."""
    aspect, value, earnest = (torch.from_numpy(part).flatten(1) for part in (users.aspect, users.value, users.earnest))
    place = turns.clamp(min=0).flatten(1)
    aspect, value, earnest = (part.gather(1, place).view_as(turns) for part in (aspect, value, earnest))
    return (turns >= 0) & earnest & (aspect == torch.arange(len(ASPECTS))[:, None]) & (value == wanted[..., None])


def turns(position: Tensor, slots: Tensor) -> Tensor:
    """Turns that slots (U, A, k) of a memory with ``position`` (U, M) hold; -1 for none."""
    found = position.gather(1, slots.clamp(min=0).flatten(1)).view_as(slots)
    return torch.where(slots >= 0, found, -1)
