import numpy as np
import pytest
import torch

from memlm.config import ConfigError
from memlm.data.curriculum import Curriculum
from memlm.data.stream import TextStream, TrainingBatches, ValidationBatches
from memlm.data.tasks.facts import Facts, plant
from memlm.data.tasks.makers import FactMaker
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus

T = 8
TASK = {"_target_": "memlm.data.tasks.facts.Facts"}
LETTERS = "abcdefghij"
WORDS = [a + b + c for a in LETTERS for b in LETTERS[:5] for c in LETTERS[:4]]


def documents_of(lengths):
    tokens = np.concatenate([np.arange(n) + 100 * (i + 1) for i, n in enumerate(lengths)]).astype(np.int32)
    return TokenizedCorpus(tokens, np.cumsum([0, *lengths]))


@pytest.fixture(scope="module")
def words():
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(WORDS, size=6000)) + " is"
    tokenizer = train_tokenizer("word", [text], 1000)
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    corpus = TokenizedCorpus(tokens, np.array([0, len(tokens)]))
    return tokenizer, corpus, Facts(tokenizer, corpus)


def test_documents_are_cut_into_segments_with_targets_and_resets():
    stream = TextStream(documents_of([11, 5]), T, pad_id=0, seed=None)
    ids, targets, weight, mask, reset = stream.window(row=0, n_row=1, first=0, n_segment=3)
    assert ids[0].tolist() == list(range(100, 108))
    assert targets[0].tolist() == list(range(101, 109))
    assert ids[1].tolist() == [108, 109, 110, 0, 0, 0, 0, 0]
    assert targets[1, :2].tolist() == [109, 110]
    assert weight[1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]  # the last token of a document has no target
    assert mask[1].tolist() == [True] * 3 + [False] * 5
    assert ids[2, :5].tolist() == list(range(200, 205))
    assert reset.tolist() == [True, False, True]


def test_one_pass_deals_every_segment_out_once():
    lengths = [11, 5, 30, 8, 17, 9]
    corpus = documents_of(lengths)
    stream = TextStream(corpus, T, 0, seed=3)
    n_row = 3
    share = stream.n_segment // n_row
    seen = []
    for row in range(n_row):
        ids, _, _, mask, _ = stream.window(row, n_row, 0, share)
        seen += ids[mask].tolist()
    assert len(seen) == len(set(seen))
    assert len(seen) >= len(corpus.tokens) - 2 * T  # what does not divide among the rows waits for the next pass
    again, *_ = TextStream(corpus, T, 0, seed=3).window(1, n_row, share, share)
    other, *_ = TextStream(corpus, T, 0, seed=4).window(1, n_row, share, share)
    assert (again == stream.window(1, n_row, share, share)[0]).all()
    assert (again != other).any()


@pytest.mark.parametrize("phase", [{"task": {"items": 2}, "n_window": 2}, {}])
def test_batches_depend_on_seed_step_and_row_alone(words, phase):
    tokenizer, corpus, task = words
    curriculum = Curriculum(
        [{"steps": 3, "n_row": 2, "n_segment": 3}, {"steps": 9, "n_row": 4, "n_segment": 2} | phase], TASK
    )

    def batches(rank=0, n_rank=1, seed=0):
        return TrainingBatches(corpus, 32, tokenizer.pad_id, curriculum, task, 12, seed, rank, n_rank)

    a, b = batches(), batches()
    for step in (7, 3, 11):  # in any order
        assert torch.equal(a[step].ids, b[step].ids)
        halves = [batches(rank, 2)[step] for rank in (0, 1)]
        assert torch.equal(torch.cat([half.ids for half in halves]), a[step].ids)
        assert torch.equal(torch.cat([half.answer for half in halves]), a[step].answer)
    assert not torch.equal(a[7].ids, batches(seed=1)[7].ids)
    assert not torch.equal(a[7].ids, a[8].ids)


def test_a_document_goes_on_over_windows(words):
    tokenizer, corpus, task = words
    curriculum = Curriculum([{"steps": 9, "n_row": 2, "n_segment": 2, "task": {"items": 2}, "n_window": 3}], TASK)
    data = TrainingBatches(corpus, 32, 0, curriculum, task, 9, seed=0)
    for i in range(9):  # what is worth to be remembered stands behind a name, in whichever window that is
        batch = data[i]
        told, rest = (tokenizer.decode(batch.targets[part].tolist()).split() for part in (batch.told, ~batch.told))
        assert told.count("is") > 1
        assert len(told) >= 4 * (told.count("is") - 1)
        assert "is" not in rest
    assert [data[i].fresh for i in range(6)] == [True, False, False] * 2
    assert [data[i].ends for i in range(6)] == [False, False, True] * 2
    for i in (0, 1, 3, 4):
        assert torch.equal(data[i].targets[:, -1], data[i + 1].ids[:, 0])


def test_every_question_was_told_in_an_earlier_segment_and_its_answer_is_right(words):
    tokenizer, _, task = words
    n_question = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        passage = np.array(tokenizer.encode(" ".join(rng.choice(WORDS, size=400))))[:257]
        planted = plant(rng, task.maker, passage, 32, items=2, hard=seed % 2 == 0)
        text = planted.tokens.tolist()
        begins = np.flatnonzero(np.diff(planted.answer.astype(int), prepend=0) == 1) + 1  # first answer token
        for begin in begins:
            question = text[begin - 2 : begin + 4]  # two words, "is", three words
            told = next(i for i in range(len(text)) if text[i : i + 6] == question)
            assert (told + 5) // 32 < (begin - 2) // 32
            assert tokenizer.decode(question).split()[2] == "is"
            n_question += 1
        statements = [i for i in range(2, len(text) - 3) if tokenizer.decode(text[i : i + 1]).strip() == "is"]
        values = {t for i in statements for t in range(i - 1, i + 3)}  # targets: "is" and three words
        assert set(np.flatnonzero(planted.told)) == values
        for s in np.flatnonzero(planted.breaks):  # a new context begins with a question, if there is something to ask
            asked = [b - 2 for b in begins if s * 32 <= b - 2 <= s * 32 + 3]
            assert asked or not any(b < s * 32 for b in begins)
    assert n_question > 50


def test_names_and_values_of_evaluation_never_occur_in_training(words):
    tokenizer, corpus, task = words
    maker = task.maker
    evaluation = maker.draw(np.random.default_rng(0), 100, "evaluation")
    names, values = {fact.name for fact in evaluation}, {fact.value for fact in evaluation}
    text = tokenizer.decode(corpus.tokens.tolist())
    for seed in range(20):
        for fact in maker.draw(np.random.default_rng(seed), 100, "train", n_word=40 if seed % 2 else None):
            assert fact.name not in names
            assert fact.value not in values
    for fact in evaluation:
        assert " ".join(fact.name) not in text
        assert " ".join(fact.value) not in text
    assert len(names) == 100


def test_the_same_or_something_else_is_said_of_another_name(words):
    tokenizer, _, task = words
    rng = np.random.default_rng(0)
    fact, *rest = task.maker.draw(rng, 5, "train")
    taken = {known.name for known in rest}
    for new_value in (False, True):
        others = [task.maker.of_another(rng, fact, "train", taken, new_value) for _ in range(30)]
        assert not {fact.name, *taken} & {other.name for other in others}
        assert {other.value == fact.value for other in others} == {not new_value}
        for other in others:
            assert tokenizer.decode(list(other.tokens)).split() == [*other.name, "is", *other.value]


def test_neighbours_before_a_comma_are_neighbours():
    rng = np.random.default_rng(0)
    names = WORDS[:70]
    text = " " + " ".join(f"{a} {b}," for a, b in rng.choice(names, size=(3000, 2)))
    tokenizer = train_tokenizer("word", [text, f" {' '.join(names)} is"], 200)
    tokens = np.array(tokenizer.encode(f"{text} {' '.join(names * 2)}"), dtype=np.int32)
    maker = FactMaker(tokenizer, TokenizedCorpus(tokens, np.array([0, len(tokens)])))
    facts = [*maker.draw(rng, 40, "evaluation"), *maker.draw(rng, 200, "train")]
    assert text.count(",") == 3000
    assert not [fact.name for fact in facts if f" {' '.join(fact.name)}," in text]
    assert not [fact.value for fact in facts for i in (0, 1) if f" {' '.join(fact.value[i : i + 2])}," in text]


def test_too_many_facts_are_refused(words):
    with pytest.raises(ConfigError, match="use fewer facts"):
        words[2].maker.draw(np.random.default_rng(0), 10**6, "evaluation")


def test_validation_goes_once_through_the_text():
    corpus = documents_of([64, 40, 24])
    data = ValidationBatches(corpus, T, 0, n_row=2, n_segment=2)
    seen = [i for step in range(len(data)) for i in data[step].ids.flatten().tolist() if i]
    assert len(seen) == len(set(seen)) == 128
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.parametrize("lengths", [[64], [61], [5], [200, 3], [9] * 40, [300] * 3])
def test_validation_cuts_no_document_for_lack_of_others(lengths):
    corpus = documents_of(lengths)
    data = ValidationBatches(corpus, T, 0)
    n_segment = [-(-n // T) for n in lengths]
    assert data.n_row <= len(lengths)
    flags, seen = [], []
    for step in range(len(data)):
        batch = data[step]
        flags.append(torch.zeros(data.n_row, batch.ids.shape[1] // T).bool() if batch.reset is None else batch.reset)
        seen.append(batch.ids.view(data.n_row, -1, T))
    reset, ids = torch.cat(flags, dim=1), torch.cat(seen, dim=1)
    share = sum(n_segment) // data.n_row
    assert ids.shape[1] == share  # all of it, but for less than a segment of each row
    begins = np.cumsum([0, *n_segment])
    for row in range(data.n_row):
        expected = [k == 0 or row * share + k in begins for k in range(share)]
        assert reset[row].tolist() == expected
    assert share > 1 or max(n_segment) == 1


def test_curriculum_finds_the_phase_and_moves_settings():
    curriculum = Curriculum(
        [
            {"steps": 3, "n_row": 2, "n_segment": 3},
            {"steps": 5, "n_row": 4, "n_segment": 2, "memory": {"ltm.gate_penalty": [0.0, 1.0], "ltm.span": 3}},
        ]
    )
    assert [curriculum.at(step)[::2] for step in (0, 2, 3, 7, 20)] == [(0, 0), (0, 2), (1, 0), (1, 4), (1, 17)]
    assert curriculum.starts == [0, 3]
    assert curriculum.memory_settings(0) == {}
    assert curriculum.memory_settings(4) == {"ltm.gate_penalty": 0.25, "ltm.span": 3}
    assert curriculum.memory_settings(99)["ltm.gate_penalty"] == 1.0


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "empty"),
        ([{"steps": 1, "n_row": 1, "n_segmnt": 1}], "Did you mean 'n_segment'"),
        ([{"steps": 1, "n_row": 1}], "lacks n_segment"),
        ([{"steps": 1, "n_row": 0, "n_segment": 1}], "n_row must be at least 1"),
        ([{"steps": 1, "n_row": 1, "n_segment": 1, "task": {"item": 2}}], "Did you mean 'items'"),
        ([{"steps": 1, "n_row": 1, "n_segment": 1, "task": {"items": "many"}}], r"phases\[0\].task.items must be"),
    ],
)
def test_impossible_phases_are_refused(phases, message):
    with pytest.raises(ConfigError, match=message):
        Curriculum(phases, TASK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items": 0.0}, "items per segment must be above 0, got 0"),
        ({"kinds": {"random": 1.0, "naturl": 0.1}}, "no facts of kind 'naturl'.*Did you mean 'natural'"),
        ({"kinds": {"random": 0.0}}, "shares that are not negative, and one above 0"),
        ({"kinds": {"random": 1.0, "native": -1.0}}, "shares that are not negative"),
        ({"kinds": {}}, "and one above 0"),
    ],
)
def test_settings_of_a_task_that_cannot_work_are_refused_by_any_document(words, settings, message):
    for seed in range(4):
        with pytest.raises(ConfigError, match=message):
            words[2].document(np.random.default_rng(seed), words[1].tokens[:129].astype(np.int64), 32, **settings)


def test_a_phase_with_settings_of_a_task_needs_one():
    with pytest.raises(ConfigError, match="needs a curriculum"):
        Curriculum([{"steps": 1, "n_row": 1, "n_segment": 1, "task": {"items": 2}}])


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_facts_can_be_drawn_with_tokenizers_that_cut_words(kind):
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(WORDS, size=3000)) + " is"
    tokenizer = train_tokenizer(kind, [text], 280)
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    maker = FactMaker(tokenizer, TokenizedCorpus(tokens, np.array([0, len(tokens)])))
    for fact in maker.draw(np.random.default_rng(0), 20, "train"):
        assert tokenizer.decode(fact.tokens).split() == fact.text.split()
        assert " ".join(fact.name) not in text


def test_no_value_of_training_holds_a_name_of_evaluation(words):
    evaluation = {
        fact.name for seed in range(8) for fact in words[2].maker.draw(np.random.default_rng(seed), 300, "evaluation")
    }
    values = [
        fact.value for seed in range(4) for fact in words[2].maker.draw(np.random.default_rng(seed), 300, "train")
    ]
    assert len(evaluation) > 1000
    assert not [value for value in values if value[:2] in evaluation or value[1:] in evaluation]


def test_whole_settings_of_memories_stay_whole():
    curriculum = Curriculum([{"steps": 4, "n_row": 1, "n_segment": 1, "memory": {"ltm.write_budget": [8, 4]}}])
    assert [curriculum.memory_settings(step)["ltm.write_budget"] for step in range(4)] == [8, 7, 5, 4]
