"""bAbI stories, against a reader that knows nothing but the sentences."""

import re

import numpy as np
import pytest

from memlm.config import ConfigError
from memlm.data.tasks.babi import N_WORD, TASKS, Babi, Story
from memlm.data.tokenizer import train_tokenizer
from memlm.data.tokens import TokenizedCorpus

T = 128
PEOPLE, OBJECTS = ["mary", "john", "daniel", "sandra"], ["apple", "milk", "football"]
WORDS = [*PEOPLE, "kitchen", "garden", "office", "hallway", "bedroom", "bathroom", *OBJECTS]
TEMPLATES = (
    " went moved journeyed travelled to the took got grabbed picked up dropped left discarded put down is north south "
    "east west of where was before what who did give gave received. gave?"
)


def answer(sentences, question):
    """Answer by going through the sentences in their order; None if they do not say."""
    question = question.split("?")[0]
    place, holder, trail, relations, gifts = {}, {}, {}, [], []

    def visit(what, where):
        if where is not None and trail.setdefault(what, [None])[-1] != where:
            trail[what].append(where)

    for sentence in sentences:
        if match := re.fullmatch(r"(\w+) (?:went|moved|journeyed|travelled) to the (\w+)", sentence):
            who, where = match.groups()
            place[who] = where
            for what in holder:
                if holder[what] == who:
                    visit(what, where)
        elif match := re.fullmatch(r"(\w+) (?:took|got|grabbed|picked up) the (\w+)", sentence):
            who, what = match.groups()
            holder[what] = who
            visit(what, place.get(who))
        elif match := re.fullmatch(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)", sentence):
            who, what = match.groups()
            holder[what] = None
            visit(what, place.get(who))
        elif match := re.fullmatch(r"(\w+) gave the (\w+) to (\w+)", sentence):
            gifts.append(match.groups())
            holder[match[2]] = match[3]
        elif match := re.fullmatch(r"the (\w+) is (\w+) of the (\w+)", sentence):
            relations.append(match.groups())
        else:
            raise AssertionError(sentence)
    if match := re.fullmatch(r"where was the (\w+) before the (\w+)", question):
        known = trail[match[1]]
        return next((known[i - 1] for i in range(len(known) - 1, 0, -1) if known[i] == match[2]), None)
    if match := re.fullmatch(r"where is the (\w+)", question):
        return trail[match[1]][-1]
    if match := re.fullmatch(r"where is (\w+)", question):
        return place[match[1]]
    patterns = {
        r"what is (\w+) of the (\w+)": lambda d, b: [x for x, y, z in relations if (y, z) == (d, b)],
        r"what is the (\w+) (\w+) of": lambda a, d: [z for x, y, z in relations if (x, y) == (a, d)],
        r"who gave the (\w+) to (\w+)": lambda o, q: [x for x, y, z in gifts if (y, z) == (o, q)],
        r"who gave the (\w+)": lambda o: [x for x, y, z in gifts if y == o],
        r"who received the (\w+)": lambda o: [z for x, y, z in gifts if y == o],
        r"who did (\w+) give the (\w+) to": lambda p, o: [z for x, y, z in gifts if (x, y) == (p, o)],
        r"what did (\w+) give to (\w+)": lambda p, q: [y for x, y, z in gifts if (x, z) == (p, q)],
    }
    for pattern, find in patterns.items():
        if match := re.fullmatch(pattern, question):
            return find(*match.groups())[-1]
    raise AssertionError(question)


def stories(task, n=60, n_statement=20):
    for seed in range(n):
        rng = np.random.default_rng([task, seed])
        story, sentences = Story(task, rng.permutation(WORDS).tolist(), rng), []
        for _ in range(n_statement):
            sentence = story.tell()
            if sentence is not None:
                sentences.append(sentence)
            yield story, sentences


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_those_of_a_reader(task):
    n = 0
    for story, sentences in stories(task):
        assert story.n_statement == len(sentences)
        questions = story.questions()
        assert len({q.text for q in questions}) == len(questions)
        for q in questions:
            n += 1
            assert q.answer == answer(sentences, q.text), (sentences, q)
    assert n > 500


@pytest.mark.parametrize("task", TASKS)
def test_the_support_suffices(task):
    counts = set()
    for story, sentences in stories(task, n=30):
        for q in story.questions():
            assert answer([sentences[s] for s in q.support], q.text) == q.answer, (sentences, q)
            counts.add(len(q.support))
    assert counts == {1: {1}, 2: {2}, 3: {3, 4}, 4: {1}, 5: {1}}[task] or (task == 3 and 3 in counts)


def test_statements_are_those_of_the_task():
    verbs = {1: {"went"}, 2: {"went", "took", "dropped"}, 3: {"went", "took", "dropped"}, 4: set(), 5: {"gave", "took"}}
    for task, expected in verbs.items():
        told = {word for _, sentences in stories(task, n=10) for sentence in sentences for word in sentence.split()}
        assert expected <= told
        assert not ({"gave", "is", "took", "dropped"} - expected - ({"is"} if task == 4 else set())) & told


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("jklmnpqx"), size=5)) for _ in range(400)]
    text = " " + " ".join(np.repeat(words, 3)) + 2 * TEMPLATES
    tokenizer = train_tokenizer("word", [text], 2000)
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    return Babi(tokenizer, TokenizedCorpus(tokens, np.array([0, len(tokens)]))), tokenizer


def sentences_of(tokenizer, tokens, answers):
    """Sentences, and questions with their answers, of a document with filler 0: (text, answer or None, place)."""
    found, words, begin = [], [], 0
    for place, token in enumerate(tokens.tolist()):
        if token == 0:
            continue
        word = tokenizer.decode([token]).strip()
        if not words:
            begin = place
        if place and answers[place - 1]:
            found.append((" ".join(words).replace(" ?", "?"), word, (begin, place)))
            words = []
        elif word == ".":
            found.append((" ".join(words), None, (begin, place)))
            words = []
        else:
            words.append(word)
    return found


@pytest.mark.parametrize("tasks", [[1], [2, 3], [4, 5], [1, 2, 3, 4, 5]])
def test_documents_ask_what_earlier_segments_answer(task, tasks):
    babi, tokenizer = task
    asked, begins = 0, []
    for seed in range(8):
        document = babi.document(np.random.default_rng(seed), np.zeros(8 * T + 1, dtype=int), T, 8, tasks, 3)
        told, since = [], set()  # sentence and segment where it ended; questions since the last sentence
        for text, given, (begin, end) in sentences_of(tokenizer, document.tokens, document.answer):
            if given is None:
                told.append((text, end // T))
                since.clear()
                continue
            asked += 1
            assert (text, given) not in since, "asked twice with nothing new"
            since.add((text, given))
            assert answer([sentence for sentence, _ in told], text) == given
            assert answer([sentence for sentence, s in told if s < begin // T], text) == given
        words = set(tokenizer.decode([t for t in document.tokens.tolist() if t]).split())
        assert not words & set(babi.words(np.random.default_rng(0), 100, "evaluation"))
        begins += [document.answer[s * T - 1 : s * T + 16].any() for s in np.flatnonzero(document.breaks)]
    assert asked > 100
    assert np.mean(begins) > 0.7  # contexts begin with a question, if there is one yet


def test_words_of_evaluation_are_kept_apart(task):
    babi, _ = task
    rng = np.random.default_rng(0)
    kept = {word for _ in range(20) for word in babi.words(rng, 2 * N_WORD, "evaluation")}
    used = {word for _ in range(20) for word in babi.words(rng, 2 * N_WORD, "train")}
    assert not kept & used
    assert not (kept | used) & {word.strip(".?") for word in TEMPLATES.split()}
    assert len(set(babi.words(rng, N_WORD, "train"))) == N_WORD
    with pytest.raises(ConfigError, match="use fewer stories"):
        babi.words(rng, 10_000, "evaluation")


def test_too_little_text_is_refused():
    tokenizer = train_tokenizer("word", [" some words" + TEMPLATES], 100)
    tokens = np.array(tokenizer.encode(" some words some words" + TEMPLATES), dtype=np.int32)
    with pytest.raises(ConfigError, match="use more text"):
        Babi(tokenizer, TokenizedCorpus(tokens, np.array([0, len(tokens)])))
