"""Simulated users, read back from what they say."""

import re

import numpy as np
import pytest

from experiments.preferences.users import (
    ABOUT,
    ASPECTS,
    OTHERS,
    SIGNALS,
    TALK,
    TELL,
    TOPIC,
    Split,
    Users,
    draw,
    phrasings,
)


@pytest.fixture(scope="module")
def users() -> Users:
    return draw(np.random.default_rng(0), n_user=40, n_session=18, n_turn=6, split="evaluation")


def pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text).replace(r"\{\}", "(.+)") for text in texts), re.IGNORECASE)


def test_what_evaluation_says_is_never_said_in_training() -> None:
    for choices in (TELL, TALK, OTHERS, TOPIC, *(aspect.ask for aspect in ASPECTS)):
        train, held = phrasings(choices, "train"), phrasings(choices, "evaluation")
        assert set(train).isdisjoint(held)
        assert set(train) | set(held) == set(choices)
        assert len(choices) == len(set(choices))
        assert 0 < len(held) <= len(train) / 2
    train = draw(np.random.default_rng(1), 40, 12, 6, "train")
    evaluation = draw(np.random.default_rng(1), 40, 12, 6, "evaluation")
    assert set(train.texts).isdisjoint(evaluation.texts)


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_both_splits_say_every_kind_of_noise(split: Split) -> None:
    users = draw(np.random.default_rng(0), n_user=40, n_session=18, n_turn=6, split=split)
    asked = tuple(text for aspect in ASPECTS for text in aspect.ask)
    kinds = {"tell": TELL, "talk": TALK, "question": asked, "others": OTHERS, "topic": TOPIC}
    patterns = {kind: pattern(texts) for kind, texts in kinds.items()}
    counts = dict.fromkeys((*kinds, "irony"), 0)
    for place in np.ndindex(users.turn.shape):
        (kind,) = (kind for kind, each in patterns.items() if each.fullmatch(users.texts[users.turn[place]]))
        counts["irony" if kind == "tell" and not users.earnest[place] else kind] += 1
    noise = users.turn.size - counts.pop("tell")
    for kind, share in {"talk": 2 / 6, "question": 1 / 6, "others": 1 / 6, "topic": 1 / 6, "irony": 1 / 6}.items():
        assert counts[kind] / noise == pytest.approx(share, abs=0.03), kind  # 3 standard deviations are 0.025


def test_signals_tell_no_preference_without_the_words(users: Users) -> None:
    """In earnest or not: the same tone but for irony, and the same hours."""
    tone, hour = users.signals["tone"][..., 0], users.signals["hour"]
    irony = ~users.earnest & np.isin(
        users.turn, [i for i, text in enumerate(users.texts) if pattern(TELL).fullmatch(text)]
    )
    noise = ~users.earnest & ~irony
    assert tone[irony].mean() == pytest.approx(-0.6, abs=0.05)
    for signal in (tone, hour[..., 0], hour[..., 1]):
        told, other = signal[users.earnest], signal[noise]
        error = np.sqrt(told.var() / told.size + other.var() / other.size)
        assert abs(told.mean() - other.mean()) < 4 * error
        assert told.std() == pytest.approx(other.std(), rel=0.15)


def test_labels_are_those_of_the_sentences(users: Users) -> None:
    tell, mention = pattern(TELL), pattern(OTHERS + TOPIC)
    values = {value.lower(): (a, v) for a, aspect in enumerate(ASPECTS) for v, value in enumerate(aspect.values)}
    assert len(values) == sum(len(aspect.values) for aspect in ASPECTS), "a value of two aspects"
    kinds = set()
    for place in np.ndindex(users.turn.shape):
        text, tone = users.texts[users.turn[place]], users.signals["tone"][place][0]
        label = (users.aspect[place], users.value[place])
        if label == (-1, -1):
            assert not users.earnest[place]
            continue
        found = tell.fullmatch(text) or mention.fullmatch(text)
        assert found is not None, text
        assert values[next(part for part in found.groups() if part).lower()] == label
        told = tell.fullmatch(text) is not None
        kinds.add((told, bool(users.earnest[place]), bool(tone > 0)))
        assert told or not users.earnest[place], "a mention is no preference"
    assert {(True, True, True), (True, False, False), (False, False, True)} <= kinds  # irony has a tone of its own


def test_what_is_wanted_is_what_was_told_last(users: Users) -> None:
    for u in range(len(users.turn)):
        last: dict[int, tuple[int, int]] = {}
        for s in range(users.turn.shape[1]):
            for t in range(users.turn.shape[2]):
                if users.earnest[u, s, t]:
                    last[int(users.aspect[u, s, t])] = (int(users.value[u, s, t]), s)
            for a in range(len(ASPECTS)):
                assert (users.wanted[u, s, a], users.told[u, s, a]) == last.get(a, (-1, -1))
        assert len(last) <= 4


def test_one_preference_changes_and_another_is_dropped(users: Users) -> None:
    half, third = users.turn.shape[1] // 2, users.turn.shape[1] // 3
    said = [(u, int(a), s, int(v)) for u, s, t in zip(*np.nonzero(users.earnest), strict=True)
            for a, v in [(users.aspect[u, s, t], users.value[u, s, t])]]  # fmt: skip
    values: dict[tuple[int, int], set[int]] = {}
    for u, a, s, v in said:
        assert a != users.dropped[u] or s < third
        values.setdefault((u, a), set()).add(v)
        if a == users.changed[u]:
            values.setdefault((u, a, s >= half), set()).add(v)  # type: ignore[arg-type]
    for u, a in zip(range(len(users.turn)), users.changed.tolist(), strict=True):
        old, new = (values.get((u, a, after), set()) for after in (False, True))  # type: ignore[call-overload]
        assert len(old) <= 1 >= len(new)
        assert old.isdisjoint(new)
    assert sum(len(found) == 2 for key, found in values.items() if len(key) == 2) > 20
    assert all(len(found) == 1 for key, found in values.items() if len(key) == 2 and key[1] != users.changed[key[0]])


def test_questions_are_about_their_aspect(users: Users) -> None:
    for a, aspect in enumerate(ASPECTS):
        expected = {text.format(about) for text in phrasings(aspect.ask, "evaluation") for about in ABOUT}
        asked = {users.texts[i] for i in users.ask[..., a].ravel()}
        assert asked <= {text[0].upper() + text[1:] for text in expected}
        assert len(asked) > 5


def test_users_depend_on_the_generator_alone(users: Users) -> None:
    again = draw(np.random.default_rng(0), n_user=40, n_session=18, n_turn=6, split="evaluation")
    other = draw(np.random.default_rng(1), n_user=40, n_session=18, n_turn=6, split="evaluation")
    assert again.texts == users.texts
    assert np.array_equal(again.turn, users.turn)
    assert not np.array_equal(other.wanted, users.wanted)
    assert {name: part.shape[3] for name, part in users.signals.items()} == SIGNALS
    assert all(np.array_equal(again.signals[name], part) for name, part in users.signals.items())
