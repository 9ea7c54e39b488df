"""What agents and their controls answer in `preferences`, judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from experiments.preferences.agent import Agent, Talk, hear, turns
from experiments.preferences.settings import Preferences
from experiments.preferences.users import ASPECTS, Users
from memlm.evaluation.result import Row
from memlm.memory.adaptive import AdaptiveMemory, AdaptiveState


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
            prompts.append(turns(state.position, slots))
        readable = memory.filled(state) & (state.strength >= memory.retrieval_threshold)
        parts.append((torch.stack(prompts, dim=1), state.position.masked_fill(~readable, -1), state.strength))
        states.append(state)
    prompt, stored, strength = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    outcome = Outcome(*judge(users, prompt), stored, prompt[:, -1], strength)
    return outcome, AdaptiveState(*(torch.cat(part) for part in zip(*states, strict=True)))


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


def heard_by(agent: Agent, talk: Talk) -> Talk:
    """Only the signals that the agent's memory knows."""
    return talk._replace(signals={name: talk.signals[name] for name in agent.memory.signals})


def in_use(users: Users) -> np.ndarray:
    """Preferences that were told and not dropped, after the last session, (U, A)."""
    return (users.wanted[:, -1] >= 0) & (np.arange(len(ASPECTS)) != users.dropped[:, None])


def rows_of(users: Users, condition: str, outcome: Outcome) -> list[Row]:
    """One row per user.

    ``asked``, ``right``, ``outdated``: questions about preferences in use, those answered rightly, and with an older
    value. ``stored``, ``stored_right``, ``stored_noise``: what memory holds, what of it tells a preference as it is
    now, and what tells none. ``held``: preferences in use that memory holds. ``adapted``: sessions from the first
    telling of the changed value to the first right answer; None if it never came; -1 if nothing changed in time.
    ``dropped``: 1 if the preference that is not told any more is still answered, 0 if not, -1 if it was never told.
    ``untold``, ``false``: questions about aspects that were never told, and those whose prompt names a value.
    """
    use = in_use(users)
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


def controls_of(talk: Talk, memory: AdaptiveMemory, state: AdaptiveState) -> list[Row]:
    """Rows of the memory wiped and of another user's."""
    users, n_user = talk.users, len(talk.users.turn)
    question = talk.x[torch.from_numpy(users.ask[:, -1])]  # (U, A, D)

    def prompt(held: AdaptiveState) -> np.ndarray:
        with torch.no_grad():
            return turns(held.position, memory.retrieve(question, held)[1]).numpy()

    use, wanted = in_use(users), users.wanted[:, -1]
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


def curves_of(users: Users, outcome: Outcome) -> dict[str, list[list[int]]]:
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
