"""bAbI tasks 1 to 5 by rule: stories of a small world, told in sentences, and questions about what is the case now.

Source: Weston et al., "Towards AI-complete question answering: a set of prerequisite toy tasks" (2015). The stories are
made here, not taken from its files.

    1  single supporting fact        mary went to the kitchen. | where is mary? the kitchen
    2  two supporting facts          mary took the apple. mary went to the kitchen. | where is the apple? the kitchen
    3  three supporting facts        ... | where was the apple before the kitchen? the garden
    4  two argument relations        the kitchen is north of the garden. | what is north of the garden? the kitchen
    5  three argument relations      mary gave the apple to john. | who gave the apple to john? mary

An answer is one word; an article before it belongs to the question.

People, places and objects are frequent words of the training text. A hash of the word decides whether it may play a
part in training or is kept for evaluation: with those the vocabulary is open, as no story of training had them.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.tasks.base import Planted, Teller, contexts, mix
from memlm.data.tasks.words import frequent_words
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus

TASKS = {
    1: "single supporting fact",
    2: "two supporting facts",
    3: "three supporting facts",
    4: "two argument relations",
    5: "three argument relations",
}


"""Numbers and names of the tasks."""


N_PERSON, N_PLACE, N_OBJECT = 4, 6, 3  # of a story


N_WORD = N_PERSON + N_PLACE + N_OBJECT


_EVALUATION_SHARE = 3  # one in so many words is kept for evaluation


_MOVES = ("went to", "moved to", "journeyed to", "travelled to")


_TAKES = ("took", "got", "grabbed", "picked up")


_DROPS = ("dropped", "left", "discarded", "put down")


_DIRECTIONS = ("north", "south", "east", "west")


class Question(NamedTuple):
    """A question that the story so far answers.

    Attributes:
        text: The question, with the article of the answer.
        answer: One word.
        support: Numbers of the statements that the answer follows from.
        candidates: How many words of the story are answers of this kind.
    """

    text: str
    answer: str
    support: tuple[int, ...]
    candidates: int


class Story:
    """A world that a task's statements tell of.

    Args:
        task: 1 to 5.
        words: People, places and objects of the story, `N_WORD` different words.
        rng: Source of randomness.
    """

    def __init__(self, task: int, words: Sequence[str], rng: np.random.Generator) -> None:
        self.task, self.rng = task, rng
        self.people, self.places = words[:N_PERSON], words[N_PERSON : N_PERSON + N_PLACE]
        self.objects = words[N_PERSON + N_PLACE : N_WORD]
        self.n_statement = 0
        self._place: dict[str, tuple[str, int]] = {}  # where a person is, and the statement that says so
        self._holder: dict[str, tuple[str, int]] = {}  # who has an object, and since which statement
        self._trail: dict[str, list[tuple[str, tuple[int, ...]]]] = {}  # places of an object, what each follows from
        self._gifts: list[tuple[str, str, str, int]] = []  # giver, object, receiver, statement
        self._relations: list[tuple[str, str, str, int]] = []  # a place, its direction from another, statement

    def _any(self, choices: Sequence[str]) -> str:
        return choices[int(self.rng.integers(len(choices)))]

    def tell(self) -> str | None:
        """Something happens: the sentence that tells it; None if there is nothing left to tell."""
        text = {1: self._move, 2: self._act, 3: self._act, 4: self._relate, 5: self._give}[self.task]()
        self.n_statement += text is not None
        return text

    def _move(self) -> str:
        """A person goes somewhere, with all objects held."""
        who = self._any(self.people)
        where = self._any([place for place in self.places if place != self._place.get(who, ("",))[0]])
        self._place[who] = (where, self.n_statement)
        for what, (holder, since) in self._holder.items():
            if holder == who:
                self._trail[what].append((where, (since, self.n_statement)))
        return f"{who} {self._any(_MOVES)} the {where}"

    def _act(self) -> str:
        """A person moves, takes an object that lies there (or that nobody has seen before), or drops one."""
        taking = [
            (who, what)
            for who in self._place
            for what in self.objects
            if what not in self._holder and (what not in self._trail or self._trail[what][-1][0] == self._place[who][0])
        ]
        dropping = [(who, what) for what, (who, _) in self._holder.items()]
        draw = self.rng.random()
        if taking and draw < 0.3:
            who, what = taking[int(self.rng.integers(len(taking)))]
            where, moved = self._place[who]
            self._holder[what] = (who, self.n_statement)
            known = self._trail.setdefault(what, [])
            if known:  # it stays where it lay
                known[-1] = (where, (moved, self.n_statement))
            else:
                known.append((where, (moved, self.n_statement)))
            return f"{who} {self._any(_TAKES)} the {what}"
        if dropping and draw > 0.85:
            who, what = dropping[int(self.rng.integers(len(dropping)))]
            del self._holder[what]
            where, moved = self._place[who]
            self._trail[what][-1] = (where, (moved, self.n_statement))
            return f"{who} {self._any(_DROPS)} the {what}"
        return self._move()

    def _relate(self) -> str | None:
        """The next place of a chain lies in some direction from the one after it."""
        i = self.n_statement
        if i >= len(self.places) - 1:
            return None
        direction = self._any(_DIRECTIONS)
        self._relations.append((self.places[i], direction, self.places[i + 1], i))
        return f"the {self.places[i]} is {direction} of the {self.places[i + 1]}"

    def _give(self) -> str:
        """A person takes an object that nobody has, or gives one away, or moves."""
        free = [what for what in self.objects if what not in self._holder]
        draw = self.rng.random()
        if self._holder and draw < 0.6:
            what = self._any(list(self._holder))
            giver = self._holder[what][0]
            receiver = self._any([who for who in self.people if who != giver])
            self._holder[what] = (receiver, self.n_statement)
            self._gifts.append((giver, what, receiver, self.n_statement))
            return f"{giver} gave the {what} to {receiver}"
        if free and draw < 0.85:
            who, what = self._any(self.people), self._any(free)
            self._holder[what] = (who, self.n_statement)
            self._trail.setdefault(what, [])
            return f"{who} {self._any(_TAKES)} the {what}"
        return self._move()

    def questions(self) -> list[Question]:
        """Every question that the story so far answers, each about the latest that was told."""
        places, found = len(self.places), []
        if self.task == 1:
            found = [Question(f"where is {who}? the", at, (s,), places) for who, (at, s) in self._place.items()]
        elif self.task == 2:
            for what, trail in self._trail.items():
                found.append(Question(f"where is the {what}? the", *trail[-1], places))
        elif self.task == 3:
            for what, trail in self._trail.items():
                asked: set[str] = set()
                for before, here in list(itertools.pairwise(trail))[:-3:-1]:  # the last two moves
                    if here[0] not in asked:  # "before the kitchen" is before the latest time there
                        support = tuple(sorted({*before[1], *here[1]}))
                        text = f"where was the {what} before the {here[0]}? the"
                        found.append(Question(text, before[0], support, places))
                    asked.add(here[0])
        elif self.task == 4:
            for near, direction, far, s in self._relations:
                found.append(Question(f"what is {direction} of the {far}? the", near, (s,), places))
                found.append(Question(f"what is the {near} {direction} of? the", far, (s,), places))
        else:
            latest: dict[str, Question] = {}
            people, objects = len(self.people), len(self.objects)
            for giver, what, receiver, s in self._gifts:
                for text, answer, n in (
                    (f"who gave the {what} to {receiver}?", giver, people),
                    (f"who gave the {what}?", giver, people),
                    (f"who did {giver} give the {what} to?", receiver, people),
                    (f"who received the {what}?", receiver, people),
                    (f"what did {giver} give to {receiver}? the", what, objects),
                ):
                    latest[text] = Question(text, answer, (s,), n)
            found = list(latest.values())
        return found


class Asked(NamedTuple):
    """A question or statement in tokens.

    Attributes:
        cue: Token ids up to the answer.
        answer: Token ids of the answer; none of a statement.
    """

    cue: tuple[int, ...]
    answer: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids."""
        return self.cue + self.answer


class Babi:
    """The task of following stories, mixed into text; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Training text.

    Raises:
        ConfigError: If the training text has too few words.
    """

    def __init__(self, tokenizer: Tokenizer, train: TokenizedCorpus) -> None:
        own = " ".join(
            [*_MOVES, *_TAKES, *_DROPS, *_DIRECTIONS, "the to is of where was before what who did give gave"]
        )
        used = {*own.split(), "received"}
        words = [word for word in frequent_words(tokenizer, train, 3000) if word not in used]
        kept = [zlib.crc32(word.encode()) % _EVALUATION_SHARE == 0 for word in words]
        self._words = {
            "train": [word for word, held_out in zip(words, kept, strict=True) if not held_out],
            "evaluation": [word for word, held_out in zip(words, kept, strict=True) if held_out],
        }
        if min(map(len, self._words.values())) < N_WORD:
            raise ConfigError(
                f"stories need {N_WORD} words that are kept for evaluation, and as many for training, but the training "
                f"text has {len(words)} different words of 3 to 12 letters: use more text"
            )
        self._tokenizer = tokenizer
        self._tokens: dict[str, tuple[int, ...]] = {}

    def words(self, rng: np.random.Generator, n: int, split: Literal["train", "evaluation"]) -> list[str]:
        """``n`` different words that may play a part in ``split``, in random order.

        Raises:
            ConfigError: If there are not so many.
        """
        own = self._words[split]
        if n > len(own):
            raise ConfigError(
                f"{n} different words are asked for, but the training text has {len(own)} for {split}: use fewer "
                "stories per document (n_story), or more text"
            )
        return [own[i] for i in rng.permutation(len(own))[:n]]

    def statement(self, text: str) -> Asked:
        """A sentence in tokens."""
        return Asked(self._encode(f"{text}."))

    def question(self, question: Question) -> Asked:
        """A question in tokens."""
        return Asked(self._encode(question.text), self._encode(question.answer))

    def _encode(self, text: str) -> tuple[int, ...]:
        """Words in tokens, each with the space before it and signs after it."""
        for word in text.split():
            if word not in self._tokens:  # there are few different ones
                self._tokens[word] = tuple(self._tokenizer.encode(f" {word}"))
        return tuple(token for word in text.split() for token in self._tokens[word])

    def document(
        self,
        rng: np.random.Generator,
        passage: np.ndarray,
        segment_len: int,
        items: float = 4.0,
        tasks: Sequence[int] = (1, 2, 3, 4, 5),
        stories: int = 2,
    ) -> Planted:
        """A document with stories and questions.

        Args:
            rng: Source of randomness.
            passage: Text around them.
            segment_len: Tokens per segment.
            items: Statements and questions per segment, on average.
            tasks: Which tasks the stories are of.
            stories: Stories that are told at the same time, each of people, places and objects of its own.
        """
        breaks = contexts(rng, (len(passage) - 1) // segment_len)
        words = self.words(rng, stories * N_WORD, "train")
        made = [
            Story(tasks[int(rng.integers(len(tasks)))], words[i * N_WORD : (i + 1) * N_WORD], rng)
            for i in range(stories)
        ]
        return mix(rng, _Stories(self, made, rng), passage, segment_len, items, breaks)


class _Stories(Teller):
    """Tells stories side by side; see `memlm.data.tasks.base.Teller`.

    A world cannot take back what happened, so a statement that did not fit waits to be told. A question is asked once:
    were it asked again, the earlier question would be the better place to find the answer.
    """

    item_len = 8

    def __init__(self, task: Babi, stories: list[Story], rng: np.random.Generator) -> None:
        self.task, self.stories, self.rng = task, stories, rng
        self._told: list[list[int]] = [[] for _ in stories]  # segment in which each statement ended
        self._next: tuple[int, Asked] | None = None
        self._open: list[dict[Question, Asked]] = [{} for _ in stories]
        self._asked: list[set[Question]] = [set() for _ in stories]

    def statement(self) -> Asked | None:
        """The next sentence of any story."""
        order = self.rng.permutation(len(self.stories)).tolist() if self._next is None else []
        for i in order:
            text = self.stories[i].tell()
            if text is not None:
                self._next = (i, self.task.statement(text))
                self._open[i] = {}  # what they ask for may change with what happened
                break
        return None if self._next is None else self._next[1]

    def tell(self, statement: Asked, segment: int) -> None:
        """The sentence that waited was told: now its story may be asked about as it stands."""
        assert self._next is not None
        i, self._next = self._next[0], None
        self._told[i].append(segment)
        known = [question for question in self.stories[i].questions() if question not in self._asked[i]]
        self._open[i] = {question: self.task.question(question) for question in known}

    def questions(self, segment: int) -> list[Asked]:
        """Questions of all stories whose support was told before the segment."""
        return [
            asked
            for told, own in zip(self._told, self._open, strict=True)
            for question, asked in own.items()
            if all(told[s] < segment for s in question.support)
        ]

    def asked(self, question: Asked) -> None:
        """A question is not asked again before its answer follows from something new."""
        for own, done in zip(self._open, self._asked, strict=True):
            done.update(found for found, asked in own.items() if asked is question)
        self._open = [{found: asked for found, asked in own.items() if asked is not question} for own in self._open]
