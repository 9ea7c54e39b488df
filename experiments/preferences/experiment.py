"""Preferences: does an adaptive memory learn what users like, ignore the rest, forget what is unused and adapt?

Simulated users (`experiments.preferences.users`) talk over many sessions. A small agent remembers for each of them: its
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.preferences.agent import D_WORD, Agent, listen, train_controller, train_encoder
from experiments.preferences.outcome import (
    Outcome,
    controls_of,
    curves_of,
    everything,
    half_life,
    heard_by,
    in_use,
    recency,
    rows_of,
    simulate,
)
from experiments.preferences.settings import Preferences
from experiments.preferences.users import ASPECTS, SIGNALS, Users, draw
from memlm.config import ConfigError
from memlm.evaluation.result import Result, Row
from memlm.memory.adaptive import AdaptiveMemory
from memlm.models.base import LanguageModel
from memlm.statistics import wilson

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

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


_N_BATCH = 16  # batches of users that controllers are trained on


def settings_of(model: LanguageModel, cfg: Preferences) -> dict[str, Any]:
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
    widths = {
        "d_key": D_WORD,
        "d_value": D_WORD,
        "top_k": cfg.top_k,
        "write_budget": cfg.n_turn,
        "signals": dict(SIGNALS),
    }
    return settings | sizes | widths


def run(
    model: LanguageModel, data: TextData, cfg: Preferences, progress: Callable[[float], None] | None = None
) -> Result:
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
            heard = [heard_by(agents[name], talk) for talk in talks]
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
                outcomes[name], _ = simulate(agent, heard_by(agent, talk), cfg)
        outcomes["perfect"], _ = simulate(agents[main], talk, cfg, perfect=True)
        outcomes |= {"everything": everything(agents[main], talk, cfg), "recency": recency(talk, cfg)}
    step(1.0)
    rows = [row for name, outcome in outcomes.items() for row in rows_of(users, name, outcome)]
    rows += controls_of(talk, agents[main].memory, state)
    curves = {name: curves_of(users, outcome) for name, outcome in outcomes.items()}
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


def _fades_after(memory: AdaptiveMemory) -> float:
    """Sessions until a memory of full strength falls under the retrieval threshold; infinite if never."""
    if memory.decay == 1 or memory.retrieval_threshold == 0:
        return math.inf
    return math.log(memory.retrieval_threshold) / math.log(memory.decay)


def _example(users: Users, on: Outcome) -> list[str]:
    """What the first user told in earnest, and the prompt of a question about a preference in use."""
    said = users.turn[0].flatten()
    told = [users.texts[i] for i in said[users.earnest[0].flatten()]]
    asked = int((in_use(users) & on.right[:, -1])[0].argmax())
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
