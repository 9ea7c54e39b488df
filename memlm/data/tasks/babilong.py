"""BABILong: the published bAbI stories, their facts spread in order over book text, and the question at the end.

Source: Y. Kuratov, A. Bulatov et al., "BABILong: Testing the limits of LLMs with long context reasoning-in-a-haystack"
(NeurIPS 2024, 2406.10149), project booydar/babilong; bAbI: J. Weston et al., "Towards AI-complete question answering"
(2015). By its rules: each question of a story is a sample of its own, with the facts before it and without earlier
questions; between facts stand whole sentences of at least ten tokens, in the order of the book; each fact goes to a
place drawn evenly from all ends of sentences, and facts keep their order; the last sentence is cut so that story and
sentences have the length asked for. A story longer than that stands alone.

Two things differ. The question begins a new context, so that its answer can only come from memory; BABILong leaves that
to the model. Lengths are in tokens of the model's own tokenizer, not of GPT-2's.

Shapes: N tokens of a document, T tokens per segment.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memlm.config import ConfigError
from memlm.data.corpora.base import shown_path
from memlm.data.corpora.streamed import pieces, rows
from memlm.data.haystack import Haystack, Sentences, Told, sentences, weave
from memlm.data.tasks import babi_world
from memlm.data.tasks.base import Planted
from memlm.data.tokenizer import Tokenizer
from memlm.data.tokens import TokenizedCorpus
from memlm.files import from_home

_TELLING = 100  # times as frequent in stories as in the text: what a word of theirs is

_LINE = re.compile(r"(\d+) ([^\t]+?) *(?:\t *([^\t]+?) *(?:\t([\d ]*))?)?")


class Sample(NamedTuple):
    """A question and the story before it.

    Attributes:
        facts: Sentences, in order.
        question: The question.
        answer: Its answer; where it is a list, with commas.
        support: Numbers of the facts that it follows from.
    """

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


def parse(text: str, where: str) -> list[Sample]:
    """The samples of a bAbI file, in its order.

    Args:
        text: Lines ``NUMBER sentence``, or ``NUMBER question<tab>answer<tab>numbers of the lines that tell it``; number
            1 begins a story.
        where: What the file is called.

    Raises:
        ConfigError: If a line is something else, or none is a question.
    """
    samples: list[Sample] = []
    facts: list[str] = []
    place: dict[int, int] = {}  # of a line among the facts
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.rstrip())
        if found is None:
            raise ConfigError(
                f"{where}, line {number}: expected 'NUMBER sentence' or 'NUMBER question<tab>answer<tab>numbers', as "
                f"the files of bAbI have it, got {line[:60]!r}"
            )
        n, sentence, answer, support = int(found[1]), found[2], found[3], found[4]
        if n == 1:
            facts, place = [], {}
        if answer is None:
            place[n] = len(facts)
            facts.append(sentence)
        else:
            known = tuple(place[int(i)] for i in (support or "").split() if int(i) in place)
            samples.append(Sample(tuple(facts), sentence, answer, known))
    if not samples:
        raise ConfigError(
            f"{where} has no question: expected a file of bAbI, such as qa1_single-supporting-fact_test.txt"
        )
    return samples


def load(path: str | Path, task: int, split: str) -> list[Sample]:
    """The samples of a task of bAbI.

    Args:
        path: A folder of the published files (`qa1_single-supporting-fact_train.txt`, ...); or a `.parquet` or `.jsonl`
            file whose rows hold such a file each, with columns ``task`` (a number), ``split`` and ``text``.
        task: 1 to 20.
        split: ``train`` or ``test``, or as the column names it, such as ``train-10k``.

    Raises:
        ConfigError: If there is no such file or split.
    """
    folder = from_home(path)
    if folder.is_dir():
        name = f"qa{task}_*_{split.partition('-')[0]}.txt"
        files = sorted(folder.glob(name))
        if not files:
            raise ConfigError(
                f"the folder {shown_path(folder)} has no file {name}: give one such as tasks_1-20_v1-2/en-10k"
            )
        return parse("".join(pieces(files[0])), shown_path(files[0]))
    if not folder.exists():
        raise ConfigError(
            f"there is no bAbI at {shown_path(path)}: give the folder of its files, such as tasks_1-20_v1-2/en-10k, or "
            "a .parquet file of them"
        )
    there = []
    for row in rows(folder, ["split", "text"], ["task"]):
        there.append(f"{row['split']} of task {row['task']}")
        if str(row["task"]) == str(task) and row["split"] == split:
            return parse(row["text"] or "", f"{shown_path(folder)}, {there[-1]}")
    own = [name for name in there if name.endswith(f" of task {task}")]
    raise ConfigError(
        f"{shown_path(folder)} has no split {split!r} of task {task}; it has: {', '.join(own or there) or 'nothing'}"
    )


def told_by_one(samples: Sequence[Sample]) -> dict[str, dict[str, str]]:
    """What single facts tell: by fact, answers by question, as learned from the facts that answers follow from.

    A question that some sample answers otherwise than the latest fact about it is left out.
    """
    found: dict[str, dict[str, str]] = {}
    for sample in samples:
        if len(sample.support) == 1:
            found.setdefault(sample.facts[sample.support[0]], {})[sample.question] = sample.answer
    wrong = {
        sample.question
        for sample in samples
        if latest(found, sample.facts).get(sample.question, sample.answer) != sample.answer
    }
    return {fact: {q: answer for q, answer in told.items() if q not in wrong} for fact, told in found.items()}


def latest(told: Mapping[str, Mapping[str, str]], facts: Iterable[str]) -> dict[str, str]:
    """Answers by question after ``facts``, each of which tells what ``told`` says."""
    return {question: answer for fact in facts for question, answer in told.get(fact, {}).items()}


class Words(NamedTuple):
    """A sample in tokens.

    Attributes:
        sample: In words.
        facts: Token ids of each fact.
        cue: Token ids of the question.
        answer: Token ids of the answer, and of the full stop behind it.
    """

    sample: Sample
    facts: list[np.ndarray]
    cue: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def n_fact(self) -> int:
        """Tokens of all facts."""
        return sum(map(len, self.facts))


class BabiLong:
    """The task of BABILong; see `memlm.data.tasks.base.Task`.

    Args:
        tokenizer: Tokenizer of the model.
        train: Book text to train in.
        path: The published bAbI; see `load`.
        task: 1 to 20; one model is trained for each, as published.
        split: What is trained on.
        test: What is asked.

    Attributes:
        task: See above.
        labels: All answers that the task has, in lower case.

    Raises:
        ConfigError: If there is no bAbI there, or the text has no sentences.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        train: TokenizedCorpus,
        path: str,
        task: int = 1,
        split: str = "train-10k",
        test: str = "test",
    ) -> None:
        if not 1 <= task <= 20:
            raise ConfigError(f"curriculum.task.task must be a task of bAbI, 1 to 20, got {task}")
        self.task, self._path, self._test = task, path, test
        self._tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}
        self._samples = samples = load(path, task, split)
        self.labels = sorted({sample.answer.lower() for sample in samples})
        words = [self.words(sample) for sample in samples]
        order = np.argsort([part.n_fact for part in words], kind="stable")
        self._train = [words[i] for i in order]  # shortest first
        self._lengths = np.array([part.n_fact for part in self._train])
        self._text = sentences(train.tokens, tokenizer)

    @classmethod
    def own_text(cls, settings: Mapping[str, Any]) -> list[str]:
        """See `memlm.data.tasks.base.Task`: facts, questions and answers of the training split."""
        defaults = inspect.signature(cls).parameters
        path, task, split = (settings.get(name, defaults[name].default) for name in ("path", "task", "split"))
        return [
            "".join(f" {sample.facts[i]}" for i in sample.support) + f" {sample.question} {sample.answer}."
            for sample in load(path, task, split)
        ]

    def test(self) -> list[Words]:
        """The published test questions, in their order."""
        return [self.words(sample) for sample in load(self._path, self.task, self._test)]

    def words(self, sample: Sample) -> Words:
        """A sample in tokens."""
        facts = [self._encode(f" {fact}") for fact in sample.facts]
        return Words(sample, facts, *self._asked(sample.question, sample.answer))

    @cached_property
    def _told_by_one(self) -> dict[str, dict[str, str]]:
        return told_by_one(self._samples)

    @cached_property
    def _is_world(self) -> bool:
        """Whether the rules of `babi_world` give all published answers of the training split."""
        return all(babi_world.answers(part.facts).get(part.question) == part.answer for part in self._samples)

    @cached_property
    def _alike(self) -> Sentences:
        """Sentences of the text with a token that is frequent in stories and rare in the text: a name, or a place."""
        facts = np.concatenate([fact for words in self._train for fact in words.facts])
        told, read = (np.bincount(part, minlength=self._tokenizer.vocab_size) for part in (facts, self._text.tokens))
        telling = told / len(facts) > _TELLING * read / len(self._text.tokens)
        keep = np.add.reduceat(telling[self._text.tokens], self._text.starts) > 0
        if not keep.any():
            raise ConfigError("no sentence of the text has a word of the stories: set alike=0 in the phases")
        length = np.diff(self._text.starts, append=len(self._text.tokens))
        return Sentences(self._text.tokens[np.repeat(keep, length)], np.append(0, length[keep].cumsum()[:-1]))

    def _asked(self, question: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A question and its answer in tokens."""
        cue, said = self._encode(f" {question}"), self._encode(f" {answer}.")
        return tuple(cue.tolist()), tuple(said.tolist())

    def _encode(self, text: str) -> np.ndarray:
        if text not in self._known:  # there are few different ones
            self._known[text] = np.array(self._tokenizer.encode(text), dtype=np.int64)
        return self._known[text]

    def document(
        self,
        rng: np.random.Generator,
        passage: np.ndarray,
        segment_len: int,
        every: bool = False,
        text: bool = True,
        alike: float = 0.0,
    ) -> Planted:
        """A training document: one story, and in the last segment questions, answers, and more of the book.

        Args:
            rng: Source of randomness.
            passage: Only its length counts, (N + 1,).
            segment_len: Tokens per segment.
            every: Whether to ask, in any order and as far as the segment goes, all whose answer is known: the question
                of the sample, what single facts of the story tell, and in tasks 1 to 3 where everybody and everything
                is and was; or the question of the sample alone.
            text: Whether all tokens are learned; or answers alone.
            alike: Share of documents whose text has only sentences with a word of the stories, such as a name.

        Raises:
            ConfigError: If no story or no question fits, or a setting cannot work.
        """
        if not 0 <= alike <= 1:
            raise ConfigError(f"alike is a share of documents, so in 0..1, got {alike}")
        n_token = len(passage) - 1
        begin = n_token - segment_len
        n_fit = int(np.searchsorted(self._lengths, begin, side="right"))
        if n_fit == 0:
            raise ConfigError(
                f"the shortest story of bAbI task {self.task} has {self._lengths[0]} tokens, and a document of "
                f"{n_token // segment_len} segments of {segment_len} leaves {max(begin, 0)} before the question: raise "
                "n_segment of the phase"
            )
        words = self._train[int(rng.integers(n_fit))]
        book = self._alike if alike and rng.random() < alike else self._text
        haystack = Haystack(book.tokens, [int(rng.integers(2**31))], book.starts)
        told = spread(rng, words.facts, haystack, begin)
        is_told = np.zeros(n_token + 1, dtype=bool)
        for item in told:
            is_told[item.place : item.end] = True
        tokens, is_answer = self._questions(rng, words, segment_len, every)
        told.append(Told(begin, begin - words.n_fact, np.array(tokens)))
        answer = np.zeros(n_token + 1, dtype=bool)
        answer[begin : begin + len(tokens)] = is_answer
        breaks = np.arange(n_token // segment_len) == n_token // segment_len - 1
        weight = None if text else answer[1:].astype(np.float32)
        return Planted(weave(haystack, told, 0, n_token + 1), answer[1:], breaks, weight, told=is_told[1:])

    def _questions(
        self, rng: np.random.Generator, words: Words, n_most: int, every: bool
    ) -> tuple[list[int], list[bool]]:
        """Tokens of questions about a story with their answers, ``n_most`` at most, and which are of answers."""
        asked = {words.sample.question: words.sample.answer}
        if every:
            asked |= latest(self._told_by_one, words.sample.facts)
            asked |= babi_world.answers(words.sample.facts) if self._is_world else {}
        questions = sorted(asked)
        tokens: list[int] = []
        is_answer: list[bool] = []
        n_asked = 0
        for i in rng.permutation(len(questions)).tolist() if every else [0]:
            cue, answer = self._asked(questions[i], asked[questions[i]])
            n_asked = len(cue) + len(answer)
            if len(tokens) + n_asked <= n_most:
                tokens += cue + answer
                is_answer += [False] * len(cue) + [True] * len(answer)
        if not tokens:
            raise ConfigError(f"a question and its answer have {n_asked} tokens: raise model.segment_len ({n_most})")
        return tokens, is_answer


def spread(rng: np.random.Generator, facts: Sequence[np.ndarray], haystack: Haystack, n_token: int) -> list[Told]:
    """Facts in their order between sentences of a text, ``n_token`` tokens in all; or the facts alone, if longer."""
    n_text = max(n_token - sum(map(len, facts)), 0)
    cuts = np.append(haystack.cuts(n_text), n_text)
    told: list[Told] = []
    place = 0
    for fact, taken in zip(facts, np.sort(rng.choice(cuts, size=len(facts))).tolist(), strict=True):
        told.append(Told(place + taken, taken, fact))
        place += len(fact)
    return told


def is_right(output: str, sample: Sample, labels: Sequence[str]) -> bool:
    """BABILong's rule of an exact match: the answer is the only label that the first sentence of an output names.

    Labels that the question names do not count. Case does not matter.

    Args:
        output: What a model said.
        sample: What it was asked.
        labels: All answers that the task has, in lower case.
    """
    said, question = output.lower().split(".")[0], sample.question.lower()
    return {label for label in labels if label in said and label not in question} == {sample.answer.lower()}
