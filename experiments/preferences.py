"""Preferences: does an adaptive memory learn what users like, ignore the rest, forget what is unused and adapt?

Simulated users (`memlm.data.preferences`) talk over many sessions. A small agent remembers for each of them: its
encoder turns utterances and implicit signals into vectors, and its memory is `memlm.memory.adaptive.AdaptiveMemory`
itself with the settings of the model's: the same controller, strengths, promotion, decay and retrieval. One session is
one segment. After every session each preference is asked for by a question that depends on it, and the best ``top_k``
slots go into the prompt.

The agent is trained here, within two minutes, on users and phrasings of its own: first the encoder, so that questions
are near to what is told about the same aspect and words are not lost, then the controller, by what its choices earn.
Prompts about aspects that were told by then count: of each, every right memory in it earns 1 and every other one loses
0.1, an utterance in all at most 1 either way; writing it costs ``write_price``, and less in the first half of training.

A question is answered rightly if the first memory in the prompt that concerns the asked aspect tells, in earnest, the
value that the user told last. It is asked of the memory as it is; of a wiped one, which cannot know; and of another
user's. Where the user never told anything about the aspect, a memory that names a value is a false recall. Baselines
have the same encoder: a store of everything searched by cosine, and the latest ``top_k`` utterances. How far the
controller could be better is seen beside one that is told what to write.

Shapes: U users, S sessions, T turns per session, A aspects, D width, M slots, k slots in the prompt, W words.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.base import PALETTE, Result, Row, check_settings, style, wilson
from memlm.config import ConfigError
from memlm.data.preferences import ASPECTS, SIGNALS, TELL, Users, draw, phrasings
from memlm.memory.adaptive import AdaptiveMemory, AdaptiveState, Decision, policy_gradient

CONTROLLERS = {
    "policy": "policy gradient",
    "straight_through": "straight-through",
    "always": "always",
    "never": "never (0 by construction)",
}
LABELS = {
    "on": "memory on",
    "wiped": "memory wiped (0 by construction)",
    "swapped": "another user's memory",
    "unsignalled": "trained without signals",
    "perfect": "a controller that is told what to write",
    "everything": "a store of everything",
    "recency": "the latest utterances",
}
"""The memory as it is; its controls; the baselines."""

_D = 64  # width of the agent
_BUCKETS = 4096  # of hashed words and pairs of words
_N_BATCH = 16  # batches of users that controllers are trained on
_WORD_DROPOUT = 0.3
_NUISANCE = 0.1  # what a memory in the prompt that is of no use takes off, against 1 for a right one
_COLORS = {"on": "blue", "perfect": "green", "everything": "orange", "recency": "vermillion"}


@dataclass(frozen=True)
class Preferences:
    """Settings.

    Attributes:
        n_user: Users of the evaluation; at least 2, as one is the other's control.
        n_session: Sessions of each.
        n_turn: Turns of a session; the model's memory must have as many short-term slots.
        top_k: Memories that go into a prompt.
        write_price: What a write costs in training, against 1 for a right answer; it rises from 0 in the first half.
        n_step: Steps of training a controller, 64 users each; the encoder gets twice as many.
        seed: Of users, initial values and choices.
        n_row: Users simulated at once; the result does not depend on it.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_user: int = 1000
    n_session: int = 30
    n_turn: int = 6
    top_k: int = 3
    write_price: float = 0.2
    n_step: int = 150
    seed: int = 0
    n_row: int = 250

    def __post_init__(self) -> None:
        least = {"n_user": 2, "n_session": 6, "n_turn": 1, "top_k": 1, "write_price": 0, "n_step": 1}
        check_settings(self, least | {"seed": 0, "n_row": 1})


class Agent(nn.Module):
    """Encoder of utterances and the memory that is tested.

    Args:
        settings: Of the memory.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(_BUCKETS, _D, mode="mean", padding_idx=0)
        self.mix = nn.Sequential(nn.Linear(_D, 2 * _D), nn.GELU(), nn.Linear(2 * _D, _D))
        self.memory = AdaptiveMemory(_D, **settings)
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


def settings_of(model: Any, cfg: Preferences) -> dict[str, Any]:
    """Settings of the agent's memory: those of the model's, and sizes for utterances.

    Raises:
        ConfigError: If the model has no adaptive memory, or one too small for a session.
    """
    found = [modules[0] for modules in model.memory.values() if isinstance(modules[0], AdaptiveMemory)]
    if not found:
        raise ConfigError(
            "preferences needs a model with an adaptive memory, whose settings it simulates: train one with "
            "recipe=preferences, or memory=adaptive"
        )
    names = [name for name in inspect.signature(AdaptiveMemory).parameters if name != "d_model"]
    settings = {name: getattr(found[0], name) for name in names if name != "temperature"}
    if settings["n_short"] < cfg.n_turn:
        raise ConfigError(
            f"preferences.n_turn must be at most memory.adaptive.n_short ({settings['n_short']}), got {cfg.n_turn}"
        )
    n_said = cfg.n_session * cfg.n_turn  # more slots can never be used
    sizes = {"n_slot": min(settings["n_slot"], n_said), "n_short": min(settings["n_short"], n_said)}
    widths = {"d_key": _D, "d_value": _D, "top_k": cfg.top_k, "write_budget": cfg.n_turn, "signals": dict(SIGNALS)}
    return settings | sizes | widths


# --- training --------------------------------------------------------------------------------------------------------


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
    words_of = nn.Linear(_D, _BUCKETS)
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
        prompt = _turns(state.position, slots)  # (U, A, k)
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


# --- evaluation ------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a memory of some users did, by user.

    Attributes:
        right: Questions after each session answered rightly, (U, S, A).
        outdated: Questions answered with an older value, (U, S, A).
        stored: Turns that memory holds at the end, as numbers in 0..S*T, (U, M); -1 for none.
        prompt: Turns in the prompt at the end, (U, A, k); -1 for none.
        strength: Of what is stored, (U, M).
    """

    right: np.ndarray
    outdated: np.ndarray
    stored: np.ndarray
    prompt: np.ndarray
    strength: np.ndarray


@torch.no_grad()
def simulate(agent: Agent, talk: Talk, cfg: Preferences, perfect: bool = False) -> tuple[Outcome, AdaptiveState]:
    """All users through all sessions with the agent's memory: what it did, and its state at the end; see `hear`."""
    memory, users = agent.memory, talk.users
    n_session, parts, states = users.turn.shape[1], [], []
    for first in range(0, len(users.turn), cfg.n_row):
        rows = range(first, min(first + cfg.n_row, len(users.turn)))
        state, prompts = memory.init_state(len(rows)), []
        for s in range(n_session):
            state, _, _ = hear(memory, talk, state, s, rows, perfect)
            _, slots = memory.retrieve(talk.x[torch.from_numpy(users.ask[list(rows), s])], state)  # (U, A, k)
            prompts.append(_turns(state.position, slots))
        readable = memory.filled(state) & (state.strength >= memory.retrieval_threshold)
        parts.append((torch.stack(prompts, dim=1), state.position.masked_fill(~readable, -1), state.strength))
        states.append(state)
    prompt, stored, strength = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    outcome = Outcome(*judge(users, prompt), stored, prompt[:, -1], strength)
    return outcome, AdaptiveState(*(torch.cat(part) for part in zip(*states, strict=True)))


def _turns(position: Tensor, slots: Tensor) -> Tensor:
    """Turns that slots (U, A, k) of a memory with ``position`` (U, M) hold; -1 for none."""
    found = position.gather(1, slots.clamp(min=0).flatten(1)).view_as(slots)
    return torch.where(slots >= 0, found, -1)


def judge(users: Users, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which prompts (U, S, A, k) answer rightly, and which with an older value, (U, S, A) each."""
    given, earnest = given_of(users, prompt)
    asked = users.wanted >= 0
    return asked & earnest & (given == users.wanted), asked & earnest & (given >= 0) & (given != users.wanted)


def given_of(users: Users, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that prompts (U, ..., A, k) give, -1 for none, and whether they were meant, (U, ..., A) each."""
    rows = np.arange(len(prompt)).reshape(-1, *[1] * (prompt.ndim - 1))
    said = (users.aspect, users.value, users.earnest)
    aspect, value, earnest = (part.reshape(len(part), -1)[rows, prompt] for part in said)
    concerns = (aspect == np.arange(len(ASPECTS))[:, None]) & (prompt >= 0)
    first = concerns.argmax(axis=-1)[..., None]
    found = concerns.any(axis=-1)
    given = np.where(found, np.take_along_axis(value, first, -1)[..., 0], -1)
    return given, found & np.take_along_axis(earnest, first, -1)[..., 0]


@torch.no_grad()
def everything(agent: Agent, talk: Talk, cfg: Preferences) -> Outcome:
    """The baseline that stores all turns and finds the nearest by cosine."""
    users, (n_user, n_session, n_turn) = talk.users, talk.users.turn.shape
    memory = agent.memory
    key = F.normalize(memory.to_key(memory.cue_norm(talk.x)), dim=-1)  # (N, d_key), of texts
    turn, ask = torch.from_numpy(users.turn).flatten(1), torch.from_numpy(users.ask)
    prompts = []
    for s in range(n_session):
        n = (s + 1) * n_turn
        near = (key @ key.T)[ask[:, s][..., None], turn[:, None, :n]]  # (U, A, n)
        prompts.append(F.pad(near.topk(min(cfg.top_k, n), dim=2).indices, (0, max(cfg.top_k - n, 0)), value=-1))
    prompt = torch.stack(prompts, dim=1).numpy()
    stored = np.broadcast_to(np.arange(n_session * n_turn), (n_user, n_session * n_turn))
    return Outcome(*judge(users, prompt), stored, prompt[:, -1], np.ones(stored.shape))


def recency(talk: Talk, cfg: Preferences) -> Outcome:
    """The baseline that puts the latest turns into every prompt."""
    users, (n_user, n_session, n_turn) = talk.users, talk.users.turn.shape
    last = (np.arange(n_session) + 1)[:, None] * n_turn - 1 - np.arange(cfg.top_k)  # (S, k)
    prompt = np.broadcast_to(last[:, None], (n_user, n_session, len(ASPECTS), cfg.top_k)).clip(min=-1)
    return Outcome(*judge(users, prompt), prompt[:, -1, 0], prompt[:, -1], np.ones((n_user, cfg.top_k)))


def run(model: Any, data: Any, cfg: Preferences, progress: Callable[[float], None] | None = None) -> Result:
    """Train the agent and measure what its memory holds and finds, beside controls and baselines.

    Args:
        model: A language model with an adaptive memory, whose settings are simulated; its weights play no part.
        data: Not used.
        cfg: Settings.
        progress: Called now and then with the share that is done, in 0..1.

    Returns:
        One row per condition and user, counted after the last session over the preferences in use, which are those that
        were told and not dropped: see `_rows`. For metrics see `summarise`; ``half_life/...`` are sessions until a
        preference that is not told any more is answered half as often. ``metadata["curves"]`` holds right answers and
        questions by session, by sessions since a change was told and by sessions since a preference was told last;
        ``metadata["example"]`` what one user told and the prompt of a question.

    Raises:
        ConfigError: If the model has no adaptive memory.
    """
    settings = settings_of(model, cfg)
    main = settings["controller"]
    step = progress or (lambda _: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        first = Agent(settings)
        train_encoder(first, cfg)
        rng = np.random.default_rng([cfg.seed, 2])
        n_batch = min(cfg.n_step, _N_BATCH)
        talks = [listen(first.eval(), draw(rng, 64, 12, cfg.n_turn, "train")) for _ in range(n_batch)]
        agents, earned = {}, {}
        variants = {name: {"controller": name} for name in (main, *CONTROLLERS)} | {"unsignalled": {"signals": None}}
        for i, (name, change) in enumerate(variants.items()):
            torch.manual_seed(cfg.seed + 1)
            agents[name] = Agent(settings | change)
            shared = {
                k: v for k, v in first.state_dict().items() if not k.startswith(("memory.to_importance", "memory.to_b"))
            }
            agents[name].load_state_dict(shared, strict=False)
            heard = [_heard_by(agents[name], talk) for talk in talks]
            earned[name] = train_controller(agents[name], heard, cfg)
            agents[name].eval()
            step(0.1 * (i + 1))
        users = draw(np.random.default_rng([cfg.seed, 3]), cfg.n_user, cfg.n_session, cfg.n_turn, "evaluation")
        talk = listen(agents[main], users)
        outcomes = {}
        outcomes["on"], state = simulate(agents[main], talk, cfg)
        step(0.6)
        for name, agent in agents.items():
            if name != main:
                outcomes[name], _ = simulate(agent, _heard_by(agent, talk), cfg)
        outcomes["perfect"], _ = simulate(agents[main], talk, cfg, perfect=True)
        outcomes |= {"everything": everything(agents[main], talk, cfg), "recency": recency(talk, cfg)}
    step(1.0)
    rows = [row for name, outcome in outcomes.items() for row in _rows(users, name, outcome)]
    rows += _controls(talk, agents[main].memory, state)
    curves = {name: _curves(users, outcome) for name, outcome in outcomes.items()}
    metrics = summarise(rows) | {"chance": float(np.mean([1 / len(aspect.values) for aspect in ASPECTS]))}
    metrics |= {f"half_life/{name}": half_life(curve["age"]) for name, curve in curves.items()}
    memory = agents[main].memory
    metadata = {
        "settings": asdict(cfg),
        "memory": {name: settings[name] for name in ("controller", "decay", "match_threshold", "promote_at",
                                                     "retrieval_threshold", "n_slot", "n_short")},
        "seed": cfg.seed,
        "n": cfg.n_user,
        "fades_after": _fades_after(memory),
        "reward": earned,
        "curves": curves,
        "example": _example(users, outcomes["on"]),
        "headline": _headline(metrics, main),
    }  # fmt: skip
    return Result("preferences", metrics, tuple(rows), metadata)


def _heard_by(agent: Agent, talk: Talk) -> Talk:
    """Only the signals that the agent's memory knows."""
    return talk._replace(signals={name: talk.signals[name] for name in agent.memory.signals})


def _fades_after(memory: AdaptiveMemory) -> float:
    """Sessions until a memory of full strength falls under the retrieval threshold; infinite if never."""
    if memory.decay == 1 or memory.retrieval_threshold == 0:
        return math.inf
    return math.log(memory.retrieval_threshold) / math.log(memory.decay)


def _in_use(users: Users) -> np.ndarray:
    """Preferences that were told and not dropped, after the last session, (U, A)."""
    return (users.wanted[:, -1] >= 0) & (np.arange(len(ASPECTS)) != users.dropped[:, None])


def _rows(users: Users, condition: str, outcome: Outcome) -> list[Row]:
    """One row per user.

    ``asked``, ``right``, ``outdated``: questions about preferences in use, those answered rightly, and with an older
    value. ``stored``, ``stored_right``, ``stored_noise``: what memory holds, what of it tells a preference as it is
    now, and what tells none. ``held``: preferences in use that memory holds. ``adapted``: sessions from the first
    telling of the changed value to the first right answer; None if it never came; -1 if nothing changed in time.
    ``dropped``: 1 if the preference that is not told any more is still answered, 0 if not, -1 if it was never told.
    ``untold``, ``false``: questions about aspects that were never told, and those whose prompt names a value.
    """
    use = _in_use(users)
    rows, flat = (
        np.arange(len(use))[:, None],
        [part.reshape(len(use), -1) for part in (users.aspect, users.value, users.earnest)],
    )
    aspect, value, earnest = (part[rows, outcome.stored] for part in flat)
    there = outcome.stored >= 0
    tells = there & earnest
    current = tells & (value == users.wanted[:, -1][rows, aspect])
    held = np.zeros(use.shape, dtype=bool)
    for a in range(len(ASPECTS)):
        held[:, a] = (current & (aspect == a)).any(axis=1)
    dropped = users.wanted[np.arange(len(use)), -1, users.dropped]
    still = outcome.right[np.arange(len(use)), -1, users.dropped]
    lag = _lags(users, outcome)
    untold = users.wanted[:, -1] < 0
    false = untold & (given_of(users, outcome.prompt)[0] >= 0)
    return [
        {
            "condition": condition,
            "user": u,
            "asked": int(use[u].sum()),
            "right": int((outcome.right[u, -1] & use[u]).sum()),
            "outdated": int((outcome.outdated[u, -1] & use[u]).sum()),
            "stored": int(there[u].sum()),
            "stored_right": int(current[u].sum()),
            "stored_noise": int((there[u] & ~tells[u]).sum()),
            "held": int((held[u] & use[u]).sum()),
            "adapted": lag[u],
            "dropped": int(still[u]) if dropped[u] >= 0 else -1,
            "untold": int(untold[u].sum()),
            "false": int(false[u].sum()),
        }
        for u in range(len(use))
    ]


def _changes(users: Users) -> tuple[np.ndarray, np.ndarray]:
    """Session in which the changed value was told first, (U,), and users to whom that applies, (U,)."""
    wanted = users.wanted[np.arange(len(users.changed)), :, users.changed]  # (U, S)
    half = wanted.shape[1] // 2
    new = (wanted != wanted[:, half - 1 : half]) & (np.arange(wanted.shape[1]) >= half)
    return new.argmax(axis=1), new.any(axis=1) & (wanted[:, half - 1] >= 0)


def _lags(users: Users, outcome: Outcome) -> list[int | None]:
    """See ``adapted`` of `_rows`."""
    begin, applies = _changes(users)
    right = outcome.right[np.arange(len(begin)), :, users.changed]  # (U, S)
    found: list[int | None] = []
    for u, s in enumerate(begin):
        after = right[u, s:]
        found.append(-1 if not applies[u] else int(after.argmax()) if after.any() else None)
    return found


def _controls(talk: Talk, memory: AdaptiveMemory, state: AdaptiveState) -> list[Row]:
    """Rows of the memory wiped and of another user's."""
    users, n_user = talk.users, len(talk.users.turn)
    question = talk.x[torch.from_numpy(users.ask[:, -1])]  # (U, A, D)

    def prompt(held: AdaptiveState) -> np.ndarray:
        with torch.no_grad():
            return _turns(held.position, memory.retrieve(question, held)[1]).numpy()

    use, wanted = _in_use(users), users.wanted[:, -1]
    others = {name: np.roll(getattr(users, name), -1, axis=0) for name in ("aspect", "value", "earnest")}
    of_next = AdaptiveState(*(part.roll(-1, dims=0) for part in state))
    cases = {
        "wiped": (users, prompt(memory.init_state(n_user))),
        "swapped": (users._replace(**others), prompt(of_next)),
    }
    rows: list[Row] = []
    for name, (labels, shown) in cases.items():
        given, earnest = given_of(labels, shown)
        right = use & earnest & (given == wanted)
        rows += [
            {"condition": name, "user": u, "asked": int(use[u].sum()), "right": int(right[u].sum())}
            for u in range(n_user)
        ]
    return rows


def _curves(users: Users, outcome: Outcome) -> dict[str, list[list[int]]]:
    """Right answers and questions, ``[right, asked]`` each.

    ``session``: of preferences in use, after each session. ``change``: of the changed one, by sessions since the new
    value was told first; ``outdated`` the same for the old value. ``age``: of the dropped one, by sessions since it was
    told last.
    """
    n_user, n_session, _ = outcome.right.shape
    number = np.arange(n_user)
    told = (users.wanted >= 0) & (np.arange(len(ASPECTS)) != users.dropped[:, None, None])
    by_session = [[int((outcome.right[:, s] & told[:, s]).sum()), int(told[:, s].sum())] for s in range(n_session)]
    begin, applies = _changes(users)
    last = users.told[number, -1, users.dropped]

    def since(start: np.ndarray, who: np.ndarray, hits: np.ndarray) -> list[list[int]]:
        """Hits (U, S) at each lag from ``start`` (U,) on, of the users who have so many sessions left."""
        found = []
        for lag in range(n_session):
            rows = number[who & (start + lag < n_session)]
            if len(rows):
                found.append([int(hits[rows, start[rows] + lag].sum()), len(rows)])
        return found

    return {
        "session": by_session,
        "change": since(begin, applies, outcome.right[number, :, users.changed]),
        "outdated": since(begin, applies, outcome.outdated[number, :, users.changed]),
        "age": since(last, last >= 0, outcome.right[number, :, users.dropped]),
    }


def half_life(curve: Sequence[Sequence[int]]) -> float:
    """Sessions after which fewer than half as many are right as at first; infinite if never, NaN if none was right."""
    rates = [right / asked if asked else math.nan for right, asked in curve]
    if not rates[0] > 0:
        return math.nan
    return float(next((lag for lag, rate in enumerate(rates) if rate < rates[0] / 2), math.inf))


def _example(users: Users, on: Outcome) -> list[str]:
    """What the first user told in earnest, and the prompt of a question about a preference in use."""
    said = users.turn[0].flatten()
    told = [users.texts[i] for i in said[users.earnest[0].flatten()]]
    asked = int((_in_use(users) & on.right[:, -1])[0].argmax())
    strength = dict(zip(on.stored[0].tolist(), on.strength[0].tolist(), strict=True))
    lines = [
        f"The user said: {users.texts[said[t]]} (strength {strength[t]:.2f})" for t in on.prompt[0, asked] if t >= 0
    ]
    return [f"told: {' '.join(told)}", "prompt:", *lines, f"Question: {users.texts[users.ask[0, -1, asked]]}"]


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        By condition ``right/...``, the rate of right answers, and where memory was looked into ``outdated/...``;
        ``precision/...``, the share of what is stored that tells a preference as it is now; ``noise/...``, the share
        that tells none; ``recall/...``, the share of preferences in use that is held; ``stored/...``, items held per
        user; ``adapted/...``, the share of changes that were answered rightly within one session after the new value
        was told first, and ``adapt_sessions/...``, the median of that time; ``dropped/...``, the rate at which a
        preference that is not told any more is still answered; ``false/...``, the share of questions about aspects
        that were never told whose prompt names a value. Rates have ``low_`` and ``high_``, their Wilson
        intervals, and ``n_``.
    """
    metrics: dict[str, float] = {}
    for condition in dict.fromkeys(row["condition"] for row in rows):
        part = [row for row in rows if row["condition"] == condition]

        def total(name: str, part: Sequence[Row] = part) -> int:
            return sum(row[name] for row in part)

        rates = {"right": (total("right"), total("asked"))}
        if "stored" in part[0]:
            changed = [math.inf if row["adapted"] is None else row["adapted"] for row in part if row["adapted"] != -1]
            dropped = [row["dropped"] for row in part if row["dropped"] >= 0]
            rates |= {
                "outdated": (total("outdated"), total("asked")),
                "precision": (total("stored_right"), total("stored")),
                "noise": (total("stored_noise"), total("stored")),
                "recall": (total("held"), total("asked")),
                "adapted": (sum(lag <= 1 for lag in changed), len(changed)),
                "dropped": (sum(dropped), len(dropped)),
                "false": (total("false"), total("untold")),
            }
            metrics[f"stored/{condition}"] = total("stored") / len(part)
            metrics[f"adapt_sessions/{condition}"] = sorted(changed)[len(changed) // 2] if changed else math.nan
        for name, (k, n) in rates.items():
            low, high = wilson(k, n) if n else (math.nan, math.nan)
            metrics |= {
                f"{name}/{condition}": k / n if n else math.nan,
                f"low_{name}/{condition}": low,
                f"high_{name}/{condition}": high,
                f"n_{name}/{condition}": n,
            }
    return metrics


def _headline(metrics: Mapping[str, float], main: str) -> list[dict[str, Any]]:
    """Right answers beside controls and baselines; then what is stored, followed, faded and falsely recalled."""

    def entry(name: str, condition: str, label: str, control: bool, better: str = "higher") -> dict[str, Any]:
        key = f"{name}/{condition}"
        return {
            "label": label, "metric": key, "low": f"low_{key}", "high": f"high_{key}", "n": f"n_{key}",
            "percent": True, "better": better, "control": control,
        }  # fmt: skip

    others = {name: f"controller: {label}" for name, label in CONTROLLERS.items() if name != main}
    compared = {
        "unsignalled": LABELS["unsignalled"],
        **others,
        **{name: LABELS[name] for name in ("perfect", "everything", "recency")},
    }
    entries = [entry("right", "on", f"right preference in the prompt, {CONTROLLERS[main]}", False)]
    entries += [entry("right", name, LABELS[name], True) for name in ("wiped", "swapped")]
    entries += [entry("right", name, label, True) for name, label in compared.items()]
    entries.append(
        entry("right", "on", "guess among the values", True)
        | {"metric": "chance", "low": None, "high": None, "n": None}
    )
    said = {
        "precision": ("stored items that tell a preference as it is", "higher"),
        "recall": ("preferences in use that are stored", "higher"),
        "adapted": ("changes followed within a session", "higher"),
        "dropped": ("dropped preferences still answered", "lower"),
        "false": ("values named where none was told", "lower"),
    }
    certain = {("recall", "everything"): " (100 % by construction)"}
    for name, (label, better) in said.items():
        entries.append(entry(name, "on", label, False, better))
        entries += [
            entry(name, other, LABELS[other] + certain.get((name, other), ""), True, better)
            for other in ("perfect", "everything", "recency")
        ]
    unused = {"low": None, "high": None, "n": None, "percent": False, "better": "lower"}
    entries.append(
        entry("half_life", "on", "sessions until an unused preference is answered half as often", False) | unused
    )
    entries += [
        entry("half_life", other, LABELS[other], True) | unused for other in ("perfect", "everything", "recency")
    ]
    return [each for each in entries if each["metric"] in metrics]


def plot(result: Result) -> dict[str, Figure]:
    """Right answers beside controls and baselines; and how they change by session, after a change, and unused."""
    metrics, curves = result.metrics, result.metadata["curves"]
    main = result.metadata["memory"]["controller"]
    labels = {
        "on": f"memory on, {CONTROLLERS[main]}",
        **{name: LABELS[name] for name in ("wiped", "swapped")},
        "unsignalled": LABELS["unsignalled"],
        **{name: f"controller: {label}" for name, label in CONTROLLERS.items() if name != main},
        **{name: LABELS[name] for name in ("perfect", "everything", "recency")},
    }
    shown = [name for name in labels if not math.isnan(metrics.get(f"right/{name}", math.nan))]
    if not shown:
        return {}
    percent = PercentFormatter(xmax=1, symbol=" %")
    with style():
        bars = Figure(figsize=(10.5, 5.0))
        panels = bars.subplots(1, 2, sharey=True)
        titles = {"right": ("prompts with the right preference", "of questions about preferences in use"),
                  "false": ("prompts with a preference never told", "of questions about other aspects")}  # fmt: skip
        for panel, (rate_of, (title, label)) in zip(panels, titles.items(), strict=True):
            part = [name for name in shown if f"{rate_of}/{name}" in metrics]
            places = [shown.index(name) for name in part]
            rate, low, high = (
                np.array([metrics[f"{end}{rate_of}/{name}"] for name in part]) for end in ("", "low_", "high_")
            )
            panel.barh(
                places, rate, xerr=[(rate - low).clip(min=0), (high - rate).clip(min=0)], capsize=3,
                color=[PALETTE[_COLORS.get(name, "sky")] for name in part],
            )  # fmt: skip
            panel.set(title=title, xlim=(0, 1), xlabel=f"{label}, n = {int(metrics[f'n_{rate_of}/on']):,}")
            panel.xaxis.set_major_formatter(percent)
        panels[0].axvline(
            metrics["chance"], color=PALETTE["black"], linestyle=":", linewidth=1.2, label="guess among the values"
        )
        panels[0].set_yticks(range(len(shown)), [labels[name] for name in shown])
        panels[0].invert_yaxis()
        bars.legend(loc="outside lower center", title="bars: 95 % Wilson interval")
        time = Figure(figsize=(10.5, 4.2))
        panels = time.subplots(1, 3, sharey=True)
        titles = {
            "session": ("preferences in use", "sessions so far"),
            "change": ("a preference that changes", "sessions since the new value was told"),
            "age": ("a preference not told any more", "sessions since it was told last"),
        }
        lines = {"on": "memory on"} | {name: LABELS[name] for name in ("perfect", "everything", "recency")}
        for panel, (key, (title, label)) in zip(panels, titles.items(), strict=True):
            for name, said in lines.items():
                _curve(
                    panel, curves[name][key], _COLORS[name], said if key == "session" else None, first=key == "session"
                )
            panel.set(title=title, xlabel=label, ylim=(0, 1))
            panel.yaxis.set_major_formatter(percent)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _curve(panels[1], curves["on"]["outdated"], "purple", "memory on: the old value", first=False)
        if math.isfinite(fades := result.metadata["fades_after"]):
            panels[2].axvline(
                fades, color=PALETTE["black"], linestyle=":", linewidth=1.2, label="full strength fades by decay"
            )
        panels[0].set_ylabel("right preference in the prompt")
        time.legend(loc="outside lower center", ncols=3, title="bands: 95 % Wilson interval")
    return {"preferences": bars, "over_time": time}


def _curve(axes: Axes, points: Sequence[Sequence[int]], color: str, label: str | None, first: bool) -> None:
    """Rates with their intervals, from 1 if ``first``, else from 0."""
    points = [(i + first, k, n) for i, (k, n) in enumerate(points) if n]
    if not points:
        return
    x, rate = [i for i, _, _ in points], [k / n for _, k, n in points]
    low, high = zip(*(wilson(k, n) for _, k, n in points), strict=True)
    axes.fill_between(x, low, high, color=PALETTE[color], alpha=0.15, linewidth=0)
    axes.plot(x, rate, color=PALETTE[color], marker="o", markersize=3, label=label)
