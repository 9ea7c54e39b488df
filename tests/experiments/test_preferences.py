"""The simulation of users, with users by hand and baselines in plain Python."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.preferences import agent, experiment, outcome
from experiments.preferences.agent import Agent, listen
from experiments.preferences.experiment import run, settings_of, summarise
from experiments.preferences.figures import plot
from experiments.preferences.outcome import (
    Outcome,
    curves_of,
    everything,
    given_of,
    half_life,
    judge,
    recency,
    rows_of,
    simulate,
)
from experiments.preferences.settings import Preferences
from experiments.preferences.users import ASPECTS, Users, draw
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.evaluation.headline import headline
from memlm.evaluation.result import Result
from memlm.memory.adaptive import AdaptiveMemory
from memlm.memory.ltm import LongTermMemory

A = len(ASPECTS)
SMALL = Preferences(n_user=9, n_session=9, n_turn=4, n_step=3, n_row=4)


def model_of(*memories: Any) -> Any:
    return SimpleNamespace(memory={str(i): [memory] for i, memory in enumerate(memories)})


def adaptive(**settings: Any) -> AdaptiveMemory:
    return AdaptiveMemory(16, **({"n_slot": 12, "n_short": 6, "write_budget": 4, "decay": 0.8} | settings))


@pytest.fixture(scope="module")
def result() -> Result:
    return run(model_of(adaptive()), None, SMALL)


def by_hand(turns: list[tuple[int, int, bool]], wanted: dict[int, int]) -> Users:
    """One user of one session; each turn is (aspect, value, earnest)."""
    parts = [np.array([[list(part)]]) for part in zip(*turns, strict=True)]
    row = np.full((1, 1, A), -1)
    for a, v in wanted.items():
        row[0, 0, a] = v
    zero = np.zeros((1, 1, len(turns)), dtype=int)
    return Users([""], zero, *parts, {}, row, row, np.array([0]), np.array([1]), np.zeros((1, 1, A), int))


def test_the_first_memory_of_the_aspect_answers() -> None:
    users = by_hand([(0, 1, True), (0, 2, True), (3, 1, True), (0, 1, False), (-1, -1, False)], {0: 1, 3: 1, 4: 0})
    prompts = {
        (0, 1, 2): (True, False),
        (1, 0, 2): (False, True),  # an older value comes first
        (4, 2, 0): (True, False),  # small talk and other aspects do not concern it
        (3, 0, -1): (False, False),  # irony gives no preference, but is believed
        (4, 2, -1): (False, False),
        (-1, -1, -1): (False, False),
    }
    for prompt, expected in prompts.items():
        right, outdated = judge(users, np.broadcast_to(np.array(prompt), (1, 1, A, 3)))
        assert (bool(right[0, 0, 0]), bool(outdated[0, 0, 0])) == expected, prompt
        assert bool(right[0, 0, 3]) == (2 in prompt)
        assert not right[0, 0, [1, 2, 4]].any(), "nothing is right where nothing was told"
    given, earnest = given_of(users, np.broadcast_to(np.array((3, 0, 2)), (1, A, 3)))
    assert (given[0, 0], earnest[0, 0], given[0, 3], given[0, 1]) == (1, False, 1, -1)


def test_counts_by_hand() -> None:
    """What is stored, held, adapted and dropped, of one user over four sessions."""
    wanted, told = np.full((1, 6, A), -1), np.full((1, 6, A), -1)
    wanted[0, :3, 0], wanted[0, 3:, 0] = 1, 2  # changes when session 3 is over
    wanted[0, 1:, 1], wanted[0, :, 5] = 0, 3
    told[0, 1:, 1] = 1
    aspect = np.array([[0, 0, 1, 5, 2, 5]]).reshape(1, 6, 1)
    value = np.array([[1, 2, 0, 3, 1, 3]]).reshape(1, 6, 1)
    earnest = np.array([[1, 1, 1, 1, 0, 0]], dtype=bool).reshape(1, 6, 1)
    users = Users([""], 0 * aspect, aspect, value, earnest, {}, wanted, told, np.array([0]), np.array([1]), 0 * wanted)  # fmt: skip # noqa: E501
    right = np.zeros((1, 6, A), dtype=bool)
    right[0, 5, 0] = right[0, 1:4, 1] = True
    prompt = np.full((1, A, 3), -1)
    prompt[0, 2], prompt[0, 3], prompt[0, 0] = (2, 4, -1), (2, 4, -1), (0, 1, -1)
    outcome = Outcome(right, 0 * right, np.array([[0, 1, 4, 5, -1]]), prompt, np.ones((1, 5)))
    (row,) = rows_of(users, "on", outcome)
    expected = {"asked": 2, "right": 1, "outdated": 0, "stored": 4, "stored_right": 1, "stored_noise": 2, "held": 1}
    expected |= {"untold": 7, "false": 1}  # aspect 2 has a value named that was not meant; aspect 0 was told
    assert {key: row[key] for key in expected} == expected  # aspects 0 and 5 are in use, 1 is dropped
    assert (row["adapted"], row["dropped"]) == (2, 0)
    metrics = summarise([row])
    assert metrics["precision/on"] == 0.25
    assert metrics["recall/on"] == metrics["right/on"] == 0.5
    assert (metrics["adapted/on"], metrics["adapt_sessions/on"]) == (0.0, 2.0)
    curves = curves_of(users, outcome)
    assert curves["session"] == [[0, 2]] * 5 + [[1, 2]]
    assert curves["change"] == [[0, 1], [0, 1], [1, 1]]
    assert curves["age"] == [[1, 1], [1, 1], [1, 1], [0, 1], [0, 1]]
    assert half_life(curves["age"]) == 3


def test_half_life() -> None:
    assert half_life([[10, 10], [6, 10], [5, 10], [4, 10]]) == 3
    assert half_life([[10, 10], [9, 10]]) == math.inf
    assert math.isnan(half_life([[0, 10], [0, 10]]))  # what was never known cannot be forgotten


@torch.no_grad()
def test_baselines_equal_a_plain_search() -> None:
    torch.manual_seed(0)
    agent = Agent(settings_of(model_of(adaptive()), SMALL)).eval()
    talk = listen(agent, draw(np.random.default_rng(0), 3, 6, 4, "evaluation"))
    outcome = everything(agent, talk, SMALL)
    memory = agent.memory
    for u in range(3):
        for a in range(A):
            query = memory.to_key(memory.cue_norm(talk.x[talk.users.ask[u, -1, a]]))
            keys = [memory.to_key(memory.cue_norm(talk.x[i])) for i in talk.users.turn[u].ravel()]
            cosines = [float(torch.cosine_similarity(query, key, dim=0)) for key in keys]
            found = outcome.prompt[u, a].tolist()
            expected = sorted(cosines, reverse=True)[:3]
            assert [cosines[t] for t in found] == pytest.approx(expected, abs=1e-5)
    assert recency(talk, SMALL).prompt[0].tolist() == [[23, 22, 21]] * A


@torch.no_grad()
def test_users_do_not_share_memory_and_go_through_it_in_any_groups() -> None:
    torch.manual_seed(0)
    agent = Agent(settings_of(model_of(adaptive()), SMALL)).eval()
    talk = listen(agent, draw(np.random.default_rng(0), 7, 6, 4, "evaluation"))
    whole, state = simulate(agent, talk, Preferences(n_row=7, n_turn=4))
    for n_row in (1, 3):
        parts, other = simulate(agent, talk, Preferences(n_row=n_row, n_turn=4))
        assert np.array_equal(whole.prompt, parts.prompt)
        assert torch.equal(state.position, other.position)
    assert (whole.prompt >= 0).any()


@pytest.mark.slow
def test_a_result_has_its_controls_and_depends_on_the_seed_alone(result: Result) -> None:
    model = model_of(adaptive())
    torch.rand(1)  # the global generator may be anywhere, and stays there
    before = torch.random.get_rng_state()
    again = run(model, None, SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again == result
    assert result.metrics["right/wiped"] == result.metrics["right/never"] == result.metrics["false/never"] == 0
    assert result.metrics["dropped/recency"] == 0
    assert result.metrics["stored/everything"] == SMALL.n_session * SMALL.n_turn
    assert result.metrics["recall/everything"] == 1
    for number in headline(result):
        assert number.n is None or number.n > 0 or math.isnan(number.value)
    conditions = {row["condition"] for row in result.rows}
    assert {
        "on",
        "wiped",
        "swapped",
        "unsignalled",
        "everything",
        "recency",
        "straight_through",
        "always",
    } <= conditions
    assert run(model_of(adaptive()), None, Preferences(**(vars(SMALL) | {"seed": 1}))) != result


@pytest.mark.slow
def test_the_agent_without_signals_is_trained_and_asked_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[list[str], set[str], set[str]]] = []
    asked: list[tuple[list[str], list[str]]] = []
    train, ask = agent.train_controller, outcome.simulate

    def watch_training(agent: Agent, talks: Any, cfg: Preferences) -> list[float]:
        before = {name: part.clone() for name, part in agent.named_parameters()}
        earned = train(agent, talks, cfg)
        moved = {name for name, part in agent.named_parameters() if not torch.equal(part, before[name])}
        trained.append((list(agent.memory.signals), {name for talk in talks for name in talk.signals}, moved))
        return earned

    def watch_asking(agent: Agent, talk: Any, cfg: Preferences, **options: bool) -> Any:
        asked.append((list(agent.memory.signals), list(talk.signals)))
        return ask(agent, talk, cfg, **options)

    monkeypatch.setattr(experiment, "train_controller", watch_training)
    monkeypatch.setattr(experiment, "simulate", watch_asking)
    run(model_of(adaptive()), None, SMALL)
    (without,) = (moved for known, heard, moved in trained if not known and not heard)
    assert any(name.startswith("memory.to_importance") for name in without), "zeros put before what knew signals"
    assert sorted(asked) == sorted([([], []), *[(["hour", "tone"], ["hour", "tone"])] * 5])


@pytest.mark.slow
def test_a_controller_that_is_told_what_to_write_stores_no_noise(result: Result) -> None:
    told = [row for row in result.rows if row["condition"] == "perfect"]
    assert sum(row["stored"] for row in told) > 0
    assert sum(row["stored_noise"] for row in told) == 0
    assert result.metrics["right/perfect"] > result.metrics["right/on"]
    assert result.metrics["half_life/recency"] == 1  # a turn of the last session is gone with the next


@pytest.mark.slow
def test_figures_are_drawn_from_a_stored_result(result: Result) -> None:
    figures = plot(Result.from_dict(result.to_dict()))
    assert set(figures) == {"preferences", "over_time"}
    assert len(figures["preferences"].axes) == 2
    assert len(figures["over_time"].axes) == 3


def test_the_settings_are_those_of_the_models_memory() -> None:
    settings = settings_of(model_of(adaptive(decay=0.7, controller="always", promote_at=0.6)), SMALL)
    assert (settings["decay"], settings["controller"], settings["promote_at"]) == (0.7, "always", 0.6)
    assert settings["n_slot"] == 12
    with pytest.raises(ConfigError, match=r"needs a model with an adaptive memory.*recipe=preferences"):
        run(model_of(LongTermMemory(16)), None, SMALL)
    with pytest.raises(ConfigError, match=r"preferences.n_turn must be at most memory.adaptive.n_short \(6\), got 7"):
        settings_of(model_of(adaptive()), Preferences(n_turn=7))
    with pytest.raises(ConfigError, match=r"preferences.n_user must be at least 2, got 1"):
        Preferences(n_user=1)


@pytest.mark.slow
def test_the_learned_controller_beats_writing_everything() -> None:
    memory = to_dict(compose(["recipe=preferences"]))["memory"]["adaptive"]
    own = {key: value for key, value in memory.items() if key != "_target_"}
    metrics = run(model_of(AdaptiveMemory(16, **own)), None, Preferences(n_user=40)).metrics
    assert metrics["low_right/on"] > max(metrics[f"high_right/{name}"] for name in ("always", "everything", "swapped"))
    assert metrics["low_precision/on"] > metrics["high_precision/everything"]
