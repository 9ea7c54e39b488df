"""Tasks with a vocabulary of their own, held against their definitions by naive readings of the documents."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from memlm.assemble import build_corpus, build_data, build_tokenizer
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError, instantiate
from memlm.data.corpora.symbols import Symbols, symbols_of
from memlm.data.stream import TrainingBatches
from memlm.data.tasks.mqar import MQAR
from memlm.data.tasks.pairs import Pairs
from memlm.data.tasks.sorting import Sorting
from memlm.data.tokenizer import Tokenizer, get_tokenizer, train_tokenizer
from memlm.data.tokens import TokenizedCorpus, tokenize


def text(n_symbol: int, folder: Path) -> tuple[Tokenizer, TokenizedCorpus]:
    corpus = Symbols(n_symbol)
    tokenizer = get_tokenizer("word", 1_000_000, None, corpus, folder)
    return tokenizer, tokenize(corpus, tokenizer, "train", folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TokenizedCorpus]:
    return text(600, tmp_path_factory.mktemp("many"))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TokenizedCorpus]:
    return text(7, tmp_path_factory.mktemp("few"))


# --- the vocabulary


@pytest.mark.parametrize("n_symbol", [2, 21, 5000])
def test_every_symbol_is_one_token_in_every_split(n_symbol: int, tmp_path: Path) -> None:
    corpus = Symbols(n_symbol)
    tokenizer = get_tokenizer("word", 1_000_000, None, corpus, tmp_path)
    assert tokenizer.vocab_size == n_symbol + 2  # <pad> and <unk>
    names = [f" s{i}" for i in range(n_symbol)]
    for split in ("train", "val", "test"):
        tokens = tokenize(corpus, tokenizer, split, tmp_path)
        assert tokens.n_token >= 4096
        symbols = symbols_of(tokenizer, tokens)
        assert [tokenizer.decode([i]) for i in symbols] == names
        assert set(tokens.tokens.tolist()) == set(symbols.tolist())


def test_corpora_of_different_vocabularies_differ() -> None:
    assert Symbols(10).fingerprint() == Symbols(10).fingerprint() != Symbols(11).fingerprint()
    with pytest.raises(ConfigError, match=r"n_symbol must be in 2\.\.1000000, not 1"):
        Symbols(1)


def test_other_texts_and_cut_symbols_are_refused(tmp_path: Path) -> None:
    words = train_tokenizer("word", [" a b c a b"], 100)
    other = np.array(words.encode(" a b c a b"))
    with pytest.raises(ConfigError, match="use data=symbols"):
        MQAR(words, TokenizedCorpus(other, np.array([0, 5])))
    for kind, size in (("byte", 0), ("word", 10)):  # symbols of several tokens; symbols that are unknown
        corpus = Symbols(20)
        tokenizer = train_tokenizer(kind, corpus.documents("train"), size)
        with pytest.raises(ConfigError, match="use data=symbols"):
            Sorting(tokenizer, tokenize(corpus, tokenizer, "train", tmp_path))


# --- multi-query associative recall


def read_naively(tokens: list[int], n_pair: int) -> tuple[dict[int, int], dict[int, list[int]]]:
    """What is told, and where told keys stand later with their values, by looking at the tokens alone."""
    told = {tokens[2 * i]: tokens[2 * i + 1] for i in range(n_pair)}
    asked: dict[int, list[int]] = {key: [] for key in told}
    for place in range(2 * n_pair, len(tokens) - 1, 2):
        if tokens[place] in told and tokens[place + 1] == told[tokens[place]]:
            asked[tokens[place]].append(place)
    return told, asked


@pytest.mark.parametrize(("n_pair", "n_segment", "segment_len"), [(1, 1, 4), (5, 3, 16), (16, 2, 32), (40, 10, 16)])
def test_every_told_key_is_asked_once_and_only_answers_count(
    many: tuple[Tokenizer, TokenizedCorpus], n_pair: int, n_segment: int, segment_len: int
) -> None:
    task = MQAR(*many)
    number = {int(token): i for i, token in enumerate(symbols_of(*many))}
    n_token = n_segment * segment_len
    for seed in range(20):
        planted = task.document(np.random.default_rng(seed), np.zeros(n_token + 1), segment_len, n_pair)
        tokens = planted.tokens.tolist()
        assert len(tokens) == n_token + 1
        told, asked = read_naively(tokens, n_pair)
        assert len(told) == len(set(told.values())) == n_pair
        assert all(0 < number[key] < 300 <= number[value] < 600 for key, value in told.items())
        places = {place for found in asked.values() for place in found}
        answered = np.flatnonzero(planted.answer).tolist()
        assert len(answered) == n_pair
        assert set(answered) <= places  # target i is token i + 1: the value right after the question
        assert {tokens[place] for place in answered} == set(told)
        assert planted.weight is not None
        assert np.flatnonzero(planted.weight).tolist() == answered
        assert set(planted.weight.tolist()) <= {0.0, 1.0}
        assert planted.breaks.tolist() == [False] + [True] * (n_segment - 1)
        assert all(number[token] < 600 for token in tokens)


def test_places_of_questions_follow_the_power_law(many: tuple[Tokenizer, TokenizedCorpus]) -> None:
    task = MQAR(*many, power_a=0.3)
    n, n_place = 4000, 7
    counts = Counter(
        int(task.draw(np.random.default_rng(i), 16, 16, 1).place[0]) // 2 - 1 for i in range(n)
    )  # one pair: no question takes the place of another
    law = np.array([(i + 1) ** (0.3 - 1) for i in range(n_place)])
    expected = n * law / law.sum()
    chi2 = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(n_place))
    assert chi2 < 22.5  # the 99.9 % quantile for 6 degrees of freedom
    assert max(counts) == n_place - 1


def test_places_of_several_questions_are_drawn_one_after_the_other(many: tuple[Tokenizer, TokenizedCorpus]) -> None:
    # The same law by other means: exponential clocks ring in the order of drawing without replacement.
    task = MQAR(*many)
    n, n_pair, n_place = 3000, 4, 12
    clocks = np.random.default_rng(1).exponential(size=(n, n_place)) * np.arange(1, n_place + 1) ** 0.99
    expected = np.bincount(np.argsort(clocks, axis=1)[:, :n_pair].ravel(), minlength=n_place) / n
    drawn = [
        task.draw(np.random.default_rng(i), 2 * (n_pair + n_place), 16, n_pair).place // 2 - n_pair for i in range(n)
    ]
    found = np.bincount(np.concatenate(drawn), minlength=n_place) / n
    assert np.abs(found - expected).max() < 4 * (0.5 / n) ** 0.5
    assert found[0] > 2 * found[-1]


def test_what_stands_between_is_random_over_the_whole_vocabulary(many: tuple[Tokenizer, TokenizedCorpus]) -> None:
    task = MQAR(*many)
    between: list[int] = []
    for seed in range(40):
        drawn = task.draw(np.random.default_rng(seed), 400, 16, 10)
        others = np.setdiff1d(np.arange(20, 400), np.concatenate([drawn.place, drawn.place + 1]))
        between += drawn.tokens[others].tolist()
    counts = Counter(between)
    assert len(counts) == 600
    expected = len(between) / 600
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < 711  # the 99.9 % quantile for 599 degrees of freedom


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"n_pair": 9}, "36 tokens"),
        ({"n_pair": 0}, "at least 1 pair"),
        ({"n_pair": 3, "segment_len": 5}, "must be even"),
        ({"n_pair": 300, "n_token": 1600}, "as many keys"),
    ],
)
def test_impossible_documents_are_refused(
    many: tuple[Tokenizer, TokenizedCorpus], settings: dict[str, int], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        MQAR(*many).draw(np.random.default_rng(0), **{"n_token": 32, "segment_len": 16} | settings)
    with pytest.raises(ConfigError, match="power_a must be positive"):
        MQAR(*many, power_a=0.0)


# --- graded recall


@pytest.mark.parametrize(("n_pair", "n_segment"), [(1, 2), (3, 4), (8, 2), (13, 4)])
def test_pairs_are_told_first_and_asked_once_later_with_nothing_else_between(
    many: tuple[Tokenizer, TokenizedCorpus], n_pair: int, n_segment: int
) -> None:
    task, (blank, *symbols) = Pairs(*many), symbols_of(*many).tolist()
    n_told = 16 * -(-n_pair // 8)  # whole segments of 8 pairs
    seen = set()
    for seed in range(30):
        planted = task.document(np.random.default_rng(seed), np.zeros(n_segment * 16 + 1), 16, n_pair)
        tokens = planted.tokens[:-1].tolist()
        places = [i for i in range(0, len(tokens), 2) if tokens[i] != blank]
        assert all(tokens[i + 1] == blank for i in range(0, len(tokens), 2) if i not in places)
        told = {tokens[i]: tokens[i + 1] for i in places if i < n_told}
        later = [i for i in places if i >= n_told]
        assert {tokens[i]: tokens[i + 1] for i in later} == told
        assert len(told) == len(set(told.values())) == len(later) == n_pair
        assert set(told) <= set(symbols[:299])
        assert set(told.values()) <= set(symbols[299:])
        assert np.flatnonzero(planted.answer).tolist() == later
        assert planted.weight is not None
        assert (planted.weight == planted.answer).all()
        assert planted.breaks.tolist() == [False] + [True] * (n_segment - 1)
        seen |= set(later)
    assert {place // 16 for place in seen} == set(range(n_told // 16, n_segment))


def test_numbers_of_pairs_of_a_list_are_all_drawn(many: tuple[Tokenizer, TokenizedCorpus]) -> None:
    task = Pairs(*many)
    drawn = [task.document(np.random.default_rng(i), np.zeros(33), 16, [1, 2, 8]).answer.sum() for i in range(60)]
    assert set(drawn) == {1, 2, 8}
    assert min(Counter(drawn).values()) > 8


@pytest.mark.parametrize("again", [0.5, 1.0])
def test_pairs_come_again_in_place_of_blanks_and_count_where_their_key_stood_before(
    many: tuple[Tokenizer, TokenizedCorpus], again: float
) -> None:
    task, blank = Pairs(*many), int(symbols_of(*many)[0])
    n_blank = 0
    for seed in range(30):
        once = task.document(np.random.default_rng(seed), np.zeros(65), 16, 3)
        planted = task.document(np.random.default_rng(seed), np.zeros(65), 16, 3, again)
        kept = once.tokens != blank
        assert (planted.tokens[kept] == once.tokens[kept]).all()
        pairs = {(int(once.tokens[i]), int(once.tokens[i + 1])) for i in range(0, 16, 2) if once.tokens[i] != blank}
        seen: set[int] = set()
        for i in range(0, 64, 2):
            key, value = planted.tokens[i : i + 2].tolist()
            assert (key, value) in pairs or key == value == blank
            assert planted.answer[i] == (key in seen)
            assert not planted.answer[i + 1]
            seen |= {key} - {blank}
            n_blank += key == blank
        assert planted.weight is not None
        assert (planted.weight == planted.answer).all()
    assert n_blank == 0 if again == 1 else 0.4 < n_blank / (30 * (32 - 6)) < 0.6


def test_pairs_that_do_not_fit_are_refused(many: tuple[Tokenizer, TokenizedCorpus]) -> None:
    draw = Pairs(*many).draw
    for n_token, segment_len, n_pair, told in (
        (32, 16, 9, "told in 32 tokens of segments of 16, and asked for in further 18"),
        (16, 16, 4, "a document has 16"),
        (30, 15, 4, "must be even"),
        (32, 16, 0, "at least 1 pair"),
    ):
        with pytest.raises(ConfigError, match=told):
            draw(np.random.default_rng(0), n_token, segment_len, n_pair)


# --- sorting


def sort_naively(symbols: list[int], sequence: list[int]) -> list[int]:
    counts = dict.fromkeys(symbols, 0)
    for token in sequence:
        counts[token] += 1
    return sorted(symbols, key=lambda symbol: (-counts[symbol], symbols.index(symbol)))


@pytest.mark.parametrize(("n_segment", "segment_len"), [(2, 8), (3, 7), (9, 16)])
def test_the_answer_is_the_order_and_only_it_counts(
    few: tuple[Tokenizer, TokenizedCorpus], n_segment: int, segment_len: int
) -> None:
    task = Sorting(*few)
    *symbols, question = symbols_of(*few).tolist()
    seen = set()
    for seed in range(30):
        planted = task.document(np.random.default_rng(seed), np.zeros(n_segment * segment_len + 1), segment_len)
        tokens = planted.tokens.tolist()
        begin = (n_segment - 1) * segment_len
        assert question not in tokens[:begin]
        expected = sort_naively(symbols, tokens[:begin])
        rest = n_segment * segment_len + 1 - begin - 7
        assert tokens[begin:] == [question, *expected] + [question] * rest
        assert np.flatnonzero(planted.answer).tolist() == [begin + i for i in range(6)]
        assert [tokens[i + 1] for i in np.flatnonzero(planted.answer)] == expected
        assert planted.weight is not None
        assert (planted.weight == planted.answer).all()
        assert planted.breaks.tolist() == [False] * (n_segment - 1) + [True]
        seen.add(tuple(expected))
    assert len(seen) > 20


def test_ties_by_hand(few: tuple[Tokenizer, TokenizedCorpus]) -> None:
    task = Sorting(*few)
    s = task.symbols
    order, counts = task.sort(s[[5, 3, 3, 1, 5, 0]])
    assert order.tolist() == s[[3, 5, 0, 1, 2, 4]].tolist()
    assert counts.tolist() == [2, 2, 1, 1, 0, 0]


def test_the_distribution_drifts_from_one_to_the_other(few: tuple[Tokenizer, TokenizedCorpus]) -> None:
    task = Sorting(*few)
    inside, between, middle = [], [], []
    for seed in range(60):
        tokens = task.draw(np.random.default_rng(seed), 4000).tokens
        parts = [
            np.array([(tokens[a:b] == symbol).mean() for symbol in task.symbols])
            for a, b in ((0, 200), (200, 400), (1900, 2100), (3800, 4000))
        ]
        inside.append(np.abs(parts[0] - parts[1]).sum())
        between.append(np.abs(parts[0] - parts[3]).sum())
        middle.append(np.abs(parts[2] - (parts[0] + parts[3]) / 2).sum())
    assert np.mean(between) > 3 * np.mean(inside)
    assert np.mean(middle) < 2 * np.mean(inside)


def test_too_small_documents_and_vocabularies_are_refused(
    few: tuple[Tokenizer, TokenizedCorpus], tmp_path: Path
) -> None:
    for n_token, segment_len in ((16, 16), (12, 6)):
        with pytest.raises(ConfigError, match="segments of more than 6 tokens and at least 2"):
            Sorting(*few).document(np.random.default_rng(0), np.zeros(n_token + 1), segment_len)
    with pytest.raises(ConfigError, match="at least 3"):
        Sorting(*text(2, tmp_path))


# --- recipes


@pytest.mark.parametrize(("recipe", "kind"), [("mqar", MQAR), ("pairs", Pairs), ("sorting", Sorting)])
def test_every_phase_of_the_recipe_makes_batches(recipe: str, kind: type, tmp_path: Path) -> None:
    config = to_dict(compose([f"recipe={recipe}", f"paths.cache_dir={tmp_path}"]))
    config["data"]["corpus"]["n_symbol"] = min(config["data"]["corpus"]["n_symbol"], 400)  # quicker to tokenize
    corpus = build_corpus(config)
    data = build_data(config, build_tokenizer(config, corpus), corpus)
    data.setup()
    assert isinstance(data.task, kind)
    batches = TrainingBatches(data.tokens("train"), data.segment_len, 0, data.curriculum, data.task, 10**6, seed=0)
    step = 0
    for phase in data.curriculum.phases:
        batch = batches[step]
        assert batch.ids.shape == (phase.n_row, phase.n_segment * data.segment_len)
        assert batch.weight.sum() == batch.answer.sum() > 0
        assert batch.breaks is not None
        again = batches[step]
        assert (again.ids == batch.ids).all()
        assert not (batches[step + 1].ids == batch.ids).all()
        step += phase.steps
    assert set(config) >= {recipe if recipe == "sorting" else "associative_recall"}
    assert instantiate(config["curriculum"], "curriculum").has_task


def test_what_a_recipe_sets_for_a_memory_is_set_for_it_alone() -> None:
    known = {path.stem for path in (config_dir() / "memory").glob("*.yaml")}
    for path in (config_dir() / "recipe_memory").glob("*/*.yaml"):
        assert path.stem in known
        assert (config_dir() / "recipe" / f"{path.parent.name}.yaml").exists()
    assert compose(["recipe=pairs", "memory=ltm"]).memory.ltm.gate_penalty == 0
    assert compose(["memory=ltm"]).memory.ltm.gate_penalty > 0
    assert compose(["recipe=mqar", "memory=ltm"]).memory.ltm.gate_penalty > 0
    assert list(compose(["recipe=pairs", "memory=rmt"]).memory) == ["rmt"]


def test_what_a_memory_needs_without_a_recipe_is_set_and_gives_way_to_the_command_line(tmp_path: Path) -> None:
    gradient = "memory.cache.gradient"
    assert compose(["memory=cache"]).memory.cache.gradient is True
    assert compose(["memory=cache", f"{gradient}=false"]).memory.cache.gradient is False
    assert compose(["recipe=needle", "memory=cache"]).memory.cache.gradient is False
    (tmp_path / "recipe_memory/default").mkdir(parents=True)
    (tmp_path / "recipe_memory/default/stm.yaml").write_text(
        "# @package _global_\ncurriculum: {phases: [{steps: 7, n_row: 2, n_segment: 2}]}\n"
    )
    assert [p.steps for p in compose(["memory=stm"], searchpath=[tmp_path]).curriculum.phases] == [7]
    given = ["memory=stm", "curriculum.phases=[{steps: 3, n_row: 2, n_segment: 2}]"]
    assert [p.steps for p in compose(given, searchpath=[tmp_path]).curriculum.phases] == [3]


def test_a_recipe_may_have_settings_for_a_memory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "recipe_memory/pairs").mkdir(parents=True)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/mine.yaml").write_text(
        "mine: {_target_: memlm.memory.rmt.RecurrentMemory, n_cell: 8, map: none}"
    )
    own = "# @package _global_\nmemory: {mine: {n_cell: 3}}\ntraining: {lr: 0.5}\n"
    (tmp_path / "recipe_memory/pairs/mine.yaml").write_text(own)
    config = compose(["recipe=pairs", "memory=mine"], searchpath=[tmp_path])
    assert (config.memory.mine.n_cell, config.memory.mine.map, config.training.lr) == (3, "none", 0.5)
