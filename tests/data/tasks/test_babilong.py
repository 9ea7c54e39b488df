"""BABILong's documents, from a bAbI of four lines and a book of counted sentences."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from memlm.assemble import build_tokenizer
from memlm.config import ConfigError
from memlm.data.haystack import Haystack, sentences
from memlm.data.tasks.babilong import BabiLong, Sample, is_right, latest, load, parse, spread, told_by_one
from memlm.data.tokenizer import Tokenizer, train_tokenizer
from memlm.data.tokens import TokenizedCorpus

PLACES = ["kitchen", "garden", "office"]
TEST = """1 Mary moved to the kitchen.
2 John went to the office.
3 Where is Mary? \tkitchen\t1
4 Mary journeyed to the garden.
5 Where is Mary? \tgarden\t4
1 John moved to the garden.
2 Where is John? \tgarden\t1
"""
TRAIN = "".join(f"1 John moved to the {a}.\n2 Mary moved to the {b}.\n3 Where is John? \t{a}\t1\n" for a, b in
                zip(PLACES, PLACES[::-1], strict=True))  # fmt: skip
SEGMENT_LEN = 16


def book(n: int) -> str:
    """``n`` sentences of eleven tokens, each with a number of its own."""
    return "".join(f" this is sentence b{i} of a book with no end." for i in range(n))


def write_folder(folder: Path) -> Path:
    for split, text in {"train": TRAIN, "test": TEST}.items():
        (folder / f"qa1_single-supporting-fact_{split}.txt").write_text(text)
    return folder


def write_table(folder: Path) -> Path:
    rows = [{"task": 1, "split": split, "text": text} for split, text in {"train-10k": TRAIN, "test": TEST}.items()]
    path = folder / "babi.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class Text:
    """A tokenizer of words, and a book of 300 sentences."""

    def __init__(self) -> None:
        text = book(300)
        self.tokenizer: Tokenizer = train_tokenizer("word", [text, " " + TEST + TRAIN.replace("1 ", " ")], 5000)
        ids = np.array(self.tokenizer.encode(text), dtype=np.int32)
        self.train = TokenizedCorpus(ids, np.array([0, len(ids)]))


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


def test_every_question_is_a_sample_with_the_facts_before_it() -> None:
    mary, john, later = "Mary moved to the kitchen.", "John went to the office.", "Mary journeyed to the garden."
    assert parse(TEST, "test") == [
        Sample((mary, john), "Where is Mary?", "kitchen", (0,)),
        Sample((mary, john, later), "Where is Mary?", "garden", (2,)),
        Sample(("John moved to the garden.",), "Where is John?", "garden", (0,)),
    ]
    no_space = "1 The office is north of the kitchen.\n2 What is north of the kitchen?\toffice\t1\n"
    assert parse(no_space, "qa4")[0][1:] == ("What is north of the kitchen?", "office", (0,))


def test_the_same_is_read_from_a_folder_and_from_a_table(tmp_path: Path) -> None:
    assert load(write_folder(tmp_path), 1, "test") == load(write_table(tmp_path), 1, "test") == parse(TEST, "")
    assert load(tmp_path, 1, "train-10k") == load(tmp_path / "babi.jsonl", 1, "train-10k") == parse(TRAIN, "")


@pytest.mark.parametrize(
    ("path", "task", "split", "said"),
    [
        ("nothing", 1, "test", "there is no bAbI at"),
        (".", 2, "test", r"has no file qa2_\*_test.txt"),
        ("babi.jsonl", 1, "train-1k", "no split 'train-1k' of task 1; it has: train-10k of task 1, test of task 1"),
        ("other.jsonl", 1, "test", "no column 'split'; there are: text"),
        ("babi.csv", 1, "test", "its name must end in .jsonl, .parquet"),
    ],
)
def test_a_missing_bAbI_is_told(tmp_path: Path, path: str, task: int, split: str, said: str) -> None:
    write_folder(tmp_path), write_table(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "a"}')
    (tmp_path / "babi.csv").write_text("a")
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / path, task, split)


def test_what_is_no_babi_is_told_by_its_line() -> None:
    with pytest.raises(ConfigError, match="file, line 2: expected 'NUMBER sentence'"):
        parse("1 Mary moved.\nWhere is Mary?", "file")
    with pytest.raises(ConfigError, match="has no question"):
        parse("1 Mary moved.\n", "file")


@pytest.mark.parametrize("n_token", [0, 40, 400, 5000])
def test_facts_keep_their_order_between_whole_sentences(text: Text, n_token: int) -> None:
    facts = [np.array(text.tokenizer.encode(f" {fact}")) for fact in parse(TEST, "")[1].facts]
    found = sentences(text.train.tokens, text.tokenizer)
    haystack = Haystack(found.tokens, [7], found.starts)
    told = spread(np.random.default_rng(1), facts, haystack, n_token)
    assert [item.tokens.tolist() for item in told] == [fact.tolist() for fact in facts]
    n_text, begin = max(n_token - sum(map(len, facts)), 0), haystack.tokens(0, 1)
    assert text.tokenizer.decode(begin) == " this"
    for i, item in enumerate(told):
        assert item.place == item.taken + sum(map(len, facts[:i]))
        before = text.tokenizer.decode(haystack.tokens(max(item.taken - 1, 0), item.taken))
        assert item.taken == 0 or before == "." or item.taken == n_text  # the last sentence is cut
        assert item.taken <= n_text


def test_places_are_drawn_evenly_from_all_ends_of_sentences(text: Text) -> None:
    found = sentences(text.train.tokens, text.tokenizer)
    haystack, fact = Haystack(found.tokens, [7], found.starts), np.array([1, 2, 3])
    rng = np.random.default_rng(0)
    places = [spread(rng, [fact], haystack, 4 * 11 + 3)[0].taken for _ in range(5000)]
    values, counts = np.unique(places, return_counts=True)
    assert values.tolist() == [0, 11, 22, 33, 44]
    assert counts.min() > 900


def test_a_training_document_is_a_story_and_its_question_in_a_fresh_context(text: Text, tmp_path: Path) -> None:
    task = BabiLong(text.tokenizer, text.train, str(write_table(tmp_path)))
    stories = {sample.facts: sample for sample in parse(TRAIN, "")}
    asked = set()
    for seed in range(20):
        made = task.document(np.random.default_rng(seed), np.zeros(8 * SEGMENT_LEN + 1), SEGMENT_LEN)
        assert made.breaks.tolist() == [False] * 7 + [True]
        words = text.tokenizer.decode(made.tokens[: 7 * SEGMENT_LEN])
        facts = tuple(re.findall(r"\w+ moved to the \w+\.", words))
        sample = stories[facts]
        asked.add(sample)
        answers = made.tokens[1:][made.answer].tolist()
        assert text.tokenizer.decode(answers) == f" {sample.answer}."
        end = int(np.flatnonzero(made.answer)[0]) + 1
        assert text.tokenizer.decode(made.tokens[7 * SEGMENT_LEN : end]) == f" {sample.question}"
    assert len(asked) == 3
    assert task.labels == sorted(PLACES)
    with pytest.raises(ConfigError, match=r"the shortest story of bAbI task 1 has 12 tokens, .* leaves 0 before"):
        task.document(np.random.default_rng(0), np.zeros(SEGMENT_LEN + 1), SEGMENT_LEN)
    with pytest.raises(ConfigError, match=r"raise model\.segment_len"):
        task.document(np.random.default_rng(0), np.zeros(8 * 5 + 1), 5)


MOVES = (("Mary", "kitchen"), ("John", "office"), ("Mary", "garden"))
STORY = "".join(
    f"{3 * i + 1} {who} moved to the {where}.\n{3 * i + 2} Where is {who}? \t{where}\t{3 * i + 1}\n"
    for i, (who, where) in enumerate(MOVES)
)


def test_all_that_single_facts_tell_may_be_asked(text: Text, tmp_path: Path) -> None:
    path = write_table(tmp_path)
    path.write_text(path.read_text() + "\n" + json.dumps({"task": 1, "split": "all", "text": STORY}))
    task = BabiLong(text.tokenizer, text.train, str(path), split="all")
    seen = set()
    for seed in range(60):
        made = task.document(np.random.default_rng(seed), np.zeros(8 * SEGMENT_LEN + 1), SEGMENT_LEN, every=True)
        words = text.tokenizer.decode(made.tokens[: 7 * SEGMENT_LEN])
        now = dict(re.findall(r"(\w+) moved to the (\w+)\.", words))  # the last of each person
        first = bool(re.match(r"\s*\w+ moved to the ", words))  # then its first token is no target
        story = text.tokenizer.decode(made.tokens[np.append(first, made.told)])
        assert re.findall(r"(\w+) moved to the (\w+)\.", story) == re.findall(r"(\w+) moved to the (\w+)\.", words)
        assert re.sub(r"\w+ moved to the \w+\.", "", story).strip() == ""
        asked = text.tokenizer.decode(made.tokens[7 * SEGMENT_LEN : -1])
        found = re.findall(r"Where is (\w+)\? (\w+)\.", asked)
        assert dict(found) == now
        assert len(found) == len(now)  # each once
        assert asked.startswith(" Where")
        expected = "".join(f" {where}." for _, where in found)
        assert text.tokenizer.decode(made.tokens[1:][made.answer]) == expected
        seen.add((len(re.findall("moved", words)), *found))
    assert {n for n, *_ in seen} == {1, 2, 3}
    assert {who for n, (who, _), *_ in seen if n == 3} == {"Mary", "John"}  # in any order


def test_questions_that_do_not_fit_are_left_out(text: Text, tmp_path: Path) -> None:
    path = write_table(tmp_path)
    path.write_text(json.dumps({"task": 1, "split": "all", "text": STORY}))
    task = BabiLong(text.tokenizer, text.train, str(path), split="all")
    made = [task.document(np.random.default_rng(i), np.zeros(8 * 8 + 1), 8, every=True) for i in range(20)]
    assert {int(document.answer.sum()) for document in made} == {2}  # one answer and its full stop


def test_answers_may_be_all_that_is_learned(text: Text, tmp_path: Path) -> None:
    task = BabiLong(text.tokenizer, text.train, str(write_table(tmp_path)))
    made = [
        task.document(np.random.default_rng(3), np.zeros(8 * SEGMENT_LEN + 1), SEGMENT_LEN, text=text_too)
        for text_too in (True, False)
    ]
    assert made[0].weight is None
    assert made[1].weight is not None
    assert np.array_equal(made[1].weight > 0, made[0].answer)
    assert np.array_equal(made[0].tokens, made[1].tokens)


def test_what_facts_tell_is_learned_from_the_facts_that_answers_follow_from() -> None:
    told = told_by_one(parse(STORY, ""))
    assert told == {f"{who} moved to the {where}.": {f"Where is {who}?": where} for who, where in MOVES}
    facts = [f"{who} moved to the {where}." for who, where in MOVES]
    assert latest(told, facts) == {"Where is Mary?": "garden", "Where is John?": "office"}
    assert latest(told, facts[:2]) == {"Where is Mary?": "kitchen", "Where is John?": "office"}
    # A question whose answer is not always what the latest fact says, as a third sentence may change it.
    other = "1 Mary moved to the kitchen.\n2 All left.\n3 Where is Mary? \tnowhere\t1 2\n"
    other += "4 Where is John? \tnowhere\t2\n"
    assert told_by_one(parse(STORY + other, "")) == {
        "Mary moved to the kitchen.": {},
        "John moved to the office.": {"Where is John?": "office"},
        "Mary moved to the garden.": {},
        "All left.": {"Where is John?": "nowhere"},
    }


def two_facts(folder: Path, story: str) -> str:
    """A task whose answers all follow from two facts."""
    path = folder / "two.jsonl"
    text = story.replace("\t1\n", "\t1 4\n").replace("\t4\n", "\t1 4\n").replace("\t7\n", "\t1 7\n")
    path.write_text(json.dumps({"task": 1, "split": "train-10k", "text": text}))
    return str(path)


def asked_of(text: Text, path: str) -> list[set[str]]:
    """What twenty training documents ask."""
    task = BabiLong(text.tokenizer, text.train, path)
    found = []
    for seed in range(20):
        made = task.document(np.random.default_rng(seed), np.zeros(8 * SEGMENT_LEN + 1), SEGMENT_LEN, every=True)
        found.append(set(re.findall(r"Where is \w+ ?\? \w+", text.tokenizer.decode(made.tokens))))
    return found


def test_where_answers_follow_from_several_facts_the_question_of_the_sample_is_all(text: Text, tmp_path: Path) -> None:
    asked = asked_of(text, two_facts(tmp_path, STORY.replace("moved", "strolled")))  # of which no rule is known
    assert {len(questions) for questions in asked} == {1}


def test_where_the_rules_of_the_world_give_all_answers_all_they_tell_is_asked(text: Text, tmp_path: Path) -> None:
    asked = asked_of(text, two_facts(tmp_path, STORY))
    assert {len(questions) for questions in asked} == {1, 2}
    assert {"Where is Mary? garden", "Where is John? office"} in asked
    wrong = STORY.replace("Where is John? \toffice", "Where is John? \tkitchen")
    assert wrong != STORY
    assert {len(questions) for questions in asked_of(text, two_facts(tmp_path, wrong))} == {1}


def test_text_alike_has_only_sentences_with_a_word_of_the_stories(text: Text, tmp_path: Path) -> None:
    book = "".join(f" this is sentence b{i} of a book with no end." for i in range(300))
    alike = " this is no book of b7 with Mary of b8."
    ids = np.array(text.tokenizer.encode(book + alike + book + alike), dtype=np.int32)
    task = BabiLong(text.tokenizer, TokenizedCorpus(ids, np.array([0, len(ids)])), str(write_table(tmp_path)))

    def read(share: float) -> list[str]:
        made = [
            task.document(np.random.default_rng(seed), np.zeros(8 * SEGMENT_LEN + 1), SEGMENT_LEN, alike=share)
            for seed in range(20)
        ]
        return [text.tokenizer.decode(part.tokens) for part in made]

    assert all("b7 with Mary" in words and "sentence" not in words for words in read(1.0))
    assert 0 < sum("sentence" in words for words in read(0.5)) < 20
    assert sum("sentence" in words for words in read(0.0)) == 20
    with pytest.raises(ConfigError, match="alike is a share of documents"):
        read(1.5)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (" garden.", True),
        (" The Garden", True),
        (" in the garden, of course. Not in the office.", True),  # the first sentence counts
        (" garden or office.", False),  # two labels
        (" garden, not the kitchen.", True),  # the kitchen is in the question
        (" office.", False),
        (". garden", False),
        ("", False),
        (" gard en.", False),
    ],
)
def test_an_answer_is_right_if_it_is_the_only_label_named(output: str, right: bool) -> None:
    sample = Sample(("",), "What is north of the kitchen?", "garden", (0,))
    assert is_right(output, sample, PLACES) == right


@pytest.mark.parametrize("write", [write_folder, write_table])
def test_a_tokenizer_learns_from_the_stories_that_are_trained_on(write, tmp_path):
    settings = {"_target_": "memlm.data.tasks.babilong.BabiLong", "path": str(write(tmp_path)), "task": 1}
    text = BabiLong.own_text(settings)
    assert text == [f" John moved to the {place}. Where is John? {place}." for place in PLACES]
    (tmp_path / "book.txt").write_text(book(300))
    config = {
        "data": {
            "tokenizer": {"kind": "bpe", "vocab_size": 400, "path": None, "n_vocab": None},
            "corpus": {"_target_": "memlm.data.corpora.files.TextFiles", "path": str(tmp_path / "book.txt")},
        },
        "curriculum": {"task": settings},
        "model": {"_target_": "memlm.models.lmcode.LMCode"},
        "paths": {"cache_dir": str(tmp_path / "cache")},
    }
    assert [len(build_tokenizer(config).encode(f" {place}")) for place in PLACES] == [1, 1, 1]
