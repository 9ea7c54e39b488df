"""English sentences that tell a fact and questions that ask for it.

A relation has phrasings, each of which ends right before the value: some tell (with the value they are a sentence),
all ask. One phrasing of every relation, and some pairs of told and asked phrasings, never occur in training, so that
three kinds of paraphrase can be told apart; see `level`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

Form = Literal["person", "place", "title", "thing", "plain", "number"]


Level = Literal["trained", "new_pair", "new_phrasing"]


LEVELS: dict[Level, str] = {
    "trained": "pair of phrasings seen in training",
    "new_pair": "both phrasings seen, not as a pair",
    "new_phrasing": "phrasing never seen in training",
}


"""How far a paraphrased question is from what training asks, nearest first."""


class Relation(NamedTuple):
    """What is said of a subject, in different words.

    Attributes:
        name: A word for it.
        subject: How the subject is written.
        value: How the value is written.
        tell: Phrasings that tell and ask; ``{}`` is the subject, and the value comes next.
        ask: Phrasings that only ask.
        unseen: The phrasing that never occurs in training.
        end: What ends the sentence after the value.
    """

    name: str
    subject: Form
    value: Form
    tell: tuple[str, ...]
    ask: tuple[str, ...]
    unseen: str
    end: str = "."

    @property
    def phrasings(self) -> tuple[str, ...]:
        """All of them; those that tell come first, the unseen one last."""
        return (*self.tell, *self.ask, self.unseen)

    def level(self, told: int, asked: int) -> Level:
        """How new it is to be asked in phrasing ``asked`` for what phrasing ``told`` told."""
        if asked == len(self.phrasings) - 1:
            return "new_phrasing"
        return "new_pair" if (told + asked) % 3 == 0 and told != asked else "trained"


def write(words: tuple[str, ...], form: Form) -> str:
    """A name made of ``words``, or a number, in a form."""
    if form == "person":
        return " ".join(word.title() for word in words)
    if form == "place":
        return "".join(words).title()
    if form == "title":
        return "The " + " ".join(word.title() for word in words)
    return ("the " if form == "thing" else "") + " ".join(words)


def _made(verb: str, agent: str) -> Relation:
    """Who did something to a work; the verb is its own past."""
    return Relation(
        agent, "title", "person",
        (f"{{}} was {verb} by", f"The {agent} of {{}} is"),
        (f"Who {verb} {{}}?", f"Who is the {agent} of {{}}?"),
        f"The one who {verb} {{}} is",
    )  # fmt: skip


def _dated(verb: str, noun: str, subject: Form) -> Relation:
    """When something was done."""
    return Relation(
        f"year {verb}", subject, "number",
        (f"{{}} was {verb} in", f"The year of the {noun} of {{}} is"),
        (f"When was {{}} {verb}?", f"In which year was {{}} {verb}?"),
        f"The year in which {{}} was {verb} is",
    )  # fmt: skip


def _happened(verb: str, past: str, subject: Form) -> Relation:
    """When something happened by itself."""
    return Relation(
        f"year {past}", subject, "number",
        (f"{{}} {past} in", f"The year that saw {{}} {verb} was"),
        (f"When did {{}} {verb}?", f"In which year did {{}} {verb}?"),
        f"The year in which {{}} {past} is",
    )  # fmt: skip


def _has(noun: str, subject: Form, value: Form) -> Relation:
    """What something has."""
    return Relation(
        noun, subject, value,
        (f"The {noun} of {{}} is", f"{{}} has the {noun}"),
        (f"What is the {noun} of {{}}?", f"Which {noun} does {{}} have?"),
        f"The {noun} that {{}} has is",
    )  # fmt: skip


RELATIONS = (
    Relation(
        "home", "person", "place",
        ("{} lives in", "The home of {} is in", "{} has a house in"),
        ("Where does {} live?", "In which town does {} live?"),
        "The town where {} lives is",
    ),
    Relation(
        "birthplace", "person", "place",
        ("{} was born in", "The birthplace of {} is", "{} comes from"),
        ("Where was {} born?", "Which town does {} come from?"),
        "The town where {} was born is",
    ),
    Relation(
        "work", "person", "plain",
        ("{} works as", "The job of {} is", "For a living {} does"),
        ("What is the job of {}?", "What does {} do for a living?"),
        "What does {} work as?",
    ),
    Relation(
        "capital", "place", "place",
        ("The capital of {} is", "{} has the capital", "The capital city of {} is called"),
        ("What is the capital of {}?", "Which city is the capital of {}?"),
        "What is the capital city of {} called?",
    ),
    Relation(
        "founder", "place", "person",
        ("{} was founded by", "The founder of {} is", "The company {} was started by"),
        ("Who founded {}?", "Who is the founder of {}?"),
        "Who started the company {}?",
    ),
    Relation(
        "colour", "person", "plain",
        ("The favourite colour of {} is", "The colour that {} likes best is", "{} likes the colour"),
        ("What is the favourite colour of {}?", "Which colour does {} like best?"),
        "The best colour for {} is",
    ),
    Relation(
        "price", "thing", "number",
        ("The price of {} is", "For {} one pays", "The cost of {} is"),
        ("What is the price of {}?", "How much is {}?"),
        "What does one pay for {}?",
        " dollars.",
    ),
    Relation(
        "opening", "thing", "number",
        ("The opening of {} was in", "They opened {} in", "The year that saw {} open was"),
        ("When did {} open?", "In which year was the opening of {}?"),
        "The year in which {} was opened is",
    ),
    Relation(
        "release", "title", "number",
        ("{} was released in", "The release of {} was in", "{} came out in"),
        ("When was {} released?", "In which year did {} come out?"),
        "The year of the release of {} is",
    ),
    Relation(
        "author", "title", "person",
        ("{} was written by", "The author of {} is", "The book {} is by"),
        ("Who wrote {}?", "Who is the author of {}?"),
        "The writer of {} is",
    ),
    Relation(
        "book", "person", "title",
        ("{} wrote", "{} is the author of", "The best book by {} is"),
        ("What did {} write?", "Which book is by {}?"),
        "The book that {} wrote is",
    ),
    Relation(
        "language", "place", "place",
        ("The language of {} is", "The people of {} speak", "In {} one speaks"),
        ("What is the language of {}?", "Which language do the people of {} speak?"),
        "Which language does one speak in {}?",
    ),
    Relation(
        "creator", "place", "person",
        ("{} was created by", "The creator of {} is", "{} was made by"),
        ("Who created {}?", "Who is the creator of {}?"),
        "The one who created {} is",
    ),
    Relation(
        "discovery", "thing", "person",
        ("The discovery of {} was made by", "The discoverer of {} is", "The first to find {} was"),
        ("Who discovered {}?", "Who was the first to find {}?"),
        "Who made the discovery of {}?",
    ),
    Relation(
        "place", "title", "place",
        ("{} is in", "{} can be found in", "The place of {} is"),
        ("Where is {}?", "Where can {} be found?"),
        "One finds {} in",
    ),
    Relation(
        "partner", "person", "person",
        ("{} is married to", "The partner of {} is", "{} lives with"),
        ("Who is {} married to?", "Who is the partner of {}?"),
        "Who does {} live with?",
    ),
    Relation(
        "leader", "place", "person",
        ("{} is led by", "The leader of {} is", "The head of {} is"),
        ("Who leads {}?", "Who is the head of {}?"),
        "Who is the leader of {}?",
    ),
    Relation(
        "money", "place", "plain",
        ("The currency of {} is", "In {} one pays with", "The money of {} is"),
        ("What is the currency of {}?", "What does one pay with in {}?"),
        "The people of {} pay with",
    ),
    _made("designed", "designer"),
    _made("invented", "inventor"),
    _made("edited", "editor"),
    _made("published", "publisher"),
    _made("produced", "producer"),
    _made("planned", "planner"),
    _made("owned", "owner"),
    _made("restored", "restorer"),
    _dated("founded", "founding", "place"),
    _dated("completed", "completion", "thing"),
    _dated("closed", "closing", "place"),
    _dated("renamed", "renaming", "place"),
    _dated("discovered", "discovery", "thing"),
    _happened("begin", "began", "title"),
    _happened("end", "ended", "title"),
    _happened("leave", "left", "person"),
    _has("nickname", "place", "plain"),
    _has("national flower", "place", "plain"),
    _has("highest mountain", "place", "place"),
    _has("longest river", "place", "place"),
    _has("oldest town", "place", "place"),
    _has("code name", "title", "plain"),
    _has("emblem", "person", "plain"),
    _has("mascot", "place", "place"),
)  # fmt: skip


"""What natural facts are about."""


_ONSETS = (
    "",
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "z",
)


_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ie", "ou")


_CODAS = ("", "", "", "l", "ll", "m", "n", "nd", "r", "rk", "s", "ss", "t", "x")


def invent(rng: np.random.Generator) -> str:
    """A word of one or two random syllables."""
    parts = []
    for _ in range(int(rng.integers(1, 3))):
        parts += [sounds[int(rng.integers(len(sounds)))] for sounds in (_ONSETS, _VOWELS, _CODAS)]
    return "".join(parts)
