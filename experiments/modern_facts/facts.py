"""The facts of `modern_facts`, and their twins with a false value."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from memlm.data.haystack import Haystack
from memlm.data.tasks.makers import Fact
from memlm.data.tasks.words import decoded
from memlm.data.tokenizer import Tokenizer
from memlm.evaluation.recall.haystack import Document, tell

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

FACTS = Path(__file__).with_suffix(".csv")


"""One fact per row: cue, value, false value, and two other ways to ask."""


CUES = {"": "same words", "_paraphrase": "another statement", "_question": "a question"}


"""How a fact is asked for: suffix of the metrics, and how it is called."""


_NEAR = 200  # characters between a value and a word of its cue that make a fact known from the training text


COLUMNS = dict(zip(CUES, ("cue", "paraphrase", "question"), strict=True))


_WORDS = re.compile(r"\w{4,}")  # words of a cue that say what it is about


class Item(NamedTuple):
    """A fact as a row of `FACTS` has it, in tokens.

    Attributes:
        number: Row in the file, from 0.
        words: The row.
        true: By cue (see `CUES`), the fact with that cue and the true value.
        false: The same with the false value.
    """

    number: int
    words: dict[str, str]
    true: dict[str, Fact]
    false: dict[str, Fact]


def rows_of_file() -> list[dict[str, str]]:
    """The rows of `FACTS`."""
    with open(FACTS, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def load(tokenizer: Tokenizer) -> list[Item]:
    """The facts that a tokenizer can write, with both values and all cues."""
    items = []
    for number, words in enumerate(rows_of_file()):
        texts = [*(words[column] for column in COLUMNS.values()), words["value"], words["counterfactual"]]
        tokens = tokenizer.encode_batch([f" {text}" for text in texts])
        if any(tokenizer.decode(ids) != f" {text}" for ids, text in zip(tokens, texts, strict=True)):
            continue
        end = tokenizer.encode(".")
        both = []
        for name, value in (("value", tokens[-2]), ("counterfactual", tokens[-1])):
            told = f"{words['cue']} {words[name]}."
            both.append(
                {
                    kind: Fact((), (words[name],), tuple(cue), tuple(value + end), told)
                    for kind, cue in zip(CUES, tokens, strict=False)
                }
            )
        items.append(Item(number, words, *both))
    return items


def check(items: Sequence[Item], data: TextData) -> tuple[set[int], set[int]]:
    """Facts whose value the training text has, and those whose value it has near a word of their cue.

    Values count as whole words, cues by their words of four or more letters, within 200 characters on either side.

    Args:
        items: The facts.
        data: What gives ``tokens("train")`` and a ``tokenizer``.

    Returns:
        Numbers of both.
    """
    by_value: dict[str, list[Item]] = {}
    for item in items:
        by_value.setdefault(item.words["value"], []).append(item)
    longest_first = sorted(by_value, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    in_text, near = set(), set()
    for text in decoded(data.tokenizer, data.tokens("train")):
        for found in pattern.finditer(text):
            around = text[max(found.start() - _NEAR, 0) : found.start()] + " " + text[found.end() : found.end() + _NEAR]
            words = {word.lower() for word in _WORDS.findall(around)}
            for item in by_value[found.group()]:
                in_text.add(item.number)
                if words & {word.lower() for word in _WORDS.findall(item.words["cue"])}:
                    near.add(item.number)
    return in_text, near


class Twins(NamedTuple):
    """The same document with true facts, with false ones, and without facts."""

    true: Document
    false: Document
    none: Document


def lay_out(
    seed: Sequence[int], items: Sequence[Item], haystack: Haystack, segment_len: int, facts_per_segment: float
) -> Twins:
    """Documents that tell ``items`` in order, after the same random stretches of text.

    Args:
        seed: Of the stretches.
        items: What is told.
        haystack: Text around them.
        segment_len: Tokens per segment.
        facts_per_segment: How densely facts are told, on average.
    """
    gap = segment_len / facts_per_segment - sum(len(item.true[""].tokens) for item in items) / len(items)
    nothing = Fact((), (), (), ())
    values = [[item.true[""] for item in items], [item.false[""] for item in items], [nothing] * len(items)]
    return Twins(
        *(tell(np.random.default_rng(seed), facts, [], haystack, segment_len, gap, crossing=False) for facts in values)
    )
