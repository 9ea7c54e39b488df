"""bAbI: stories in order inside long noise text, with questions asked in fresh contexts.

A document tells the sentences of several stories in their order, after random gaps in held-out text of a given length.
At its end each story is asked about. People, places and objects of a story are its own within a document. In the
`closed` vocabulary they are words that played such parts in training, in the `open` one words that never did.

For how questions are asked, and the controls, see `memlm.evaluation.recall.asking`. Chance is the rate of one who knows
which words are answers of this kind in the story (its six places, say) and guesses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.config import ConfigError
from memlm.data.haystack import Haystack
from memlm.data.tasks.babi import N_WORD, TASKS, Question, Story
from memlm.data.tasks.babi import Babi as Task
from memlm.evaluation.headline import recall_entries, repetition_entries
from memlm.evaluation.recall.asking import ask
from memlm.evaluation.recall.figures import draw_interval
from memlm.evaluation.recall.haystack import Stories, tell
from memlm.evaluation.recall.rates import CONDITIONS, rates
from memlm.evaluation.recall.reading import part_of, visit
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

VOCABULARIES: dict[str, Literal["train", "evaluation"]] = {"open": "evaluation", "closed": "train"}
"""Vocabularies of stories, and which words they have."""

_KEYS = ("vocabulary", "noise", "task", "condition")


@dataclass(frozen=True)
class Babi:
    """Settings.

    Attributes:
        tasks: Which tasks, of 1 to 5.
        noise: Tokens of text around the stories, one length after the other.
        vocabularies: ``open`` and ``closed``, or one of them.
        n_document: Documents per length and vocabulary; at least 2, as one is the other's control.
        n_story: Stories of each task in a document.
        n_question: Questions about each story.
        n_statement: Sentences of a story, at least (task 4: 5).
        split: Where the noise is from: ``val``, or ``test`` for final numbers.
        seed: Of stories and places in the text.
        n_row: Documents read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    tasks: list[int] = field(default_factory=lambda: list(TASKS))
    noise: list[int] = field(default_factory=lambda: [1_000, 10_000, 100_000])
    vocabularies: list[str] = field(default_factory=lambda: list(VOCABULARIES))
    n_document: int = 8
    n_story: int = 3
    n_question: int = 3
    n_statement: int = 10
    split: Literal["val", "test"] = "val"
    seed: int = 0
    n_row: int = 8

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "n_story": 1, "n_question": 1, "n_statement": 1, "seed": 0, "n_row": 1})
        if self.n_question > 3:
            raise ConfigError(f"babi.n_question must be at most 3, as a story has three objects, got {self.n_question}")
        for name, known in (("tasks", list(TASKS)), ("vocabularies", list(VOCABULARIES))):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given) or not set(given) <= set(known):
                raise ConfigError(f"babi.{name} must be some of {', '.join(map(str, known))}, each once, got {given}")
        if not self.noise or min(self.noise) < 1 or sorted(set(self.noise)) != list(self.noise):
            raise ConfigError(f"babi.noise must be lengths in tokens in ascending order, got {self.noise}")


class Asked(NamedTuple):
    """A question, as `memlm.evaluation.recall.asking.ask` takes it.

    Attributes:
        task: Number of the task.
        question: The question in words.
        cue: Token ids up to the answer.
        answer: Token ids of the answer.
        said: Tokens of the statement that says the answer, up to the end of that word.
    """

    task: int
    question: Question
    cue: tuple[int, ...]
    answer: tuple[int, ...]
    said: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Question and answer."""
        return self.cue + self.answer

    @property
    def text(self) -> str:
        """Question and answer in words."""
        return f"{self.question.text} {self.question.answer}"


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Babi,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure how well questions about stories are answered, against the length of the text around them.

    Args:
        model: A language model that was trained on such stories; it is left as it was.
        data: What gives ``tokens(split)`` and, as ``task``, the stories, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per vocabulary, noise length, condition, document and question: ``task``, ``n_support`` statements that
        the answer follows from, ``candidates`` (words of the story that are answers of this kind); for the rest see
        `memlm.evaluation.recall.asking.ask`, where the fact is the statement that says the answer. For metrics see
        `summarise`.

    Raises:
        ConfigError: If the model was not trained on stories.
    """
    task = data.task
    if not isinstance(task, Task):
        raise ConfigError(
            "experiment=babi asks about stories, which this model was not trained on: expected a run whose curriculum "
            "has the task memlm.data.tasks.babi.Babi; train one with recipe=babi"
        )
    text = data.tokens(cfg.split).tokens
    rows: list[Row] = []
    total, done = cfg.n_document * len(cfg.vocabularies) * sum(cfg.noise), 0
    with evaluating(model):
        for vocabulary, noise in itertools.product(cfg.vocabularies, cfg.noise):
            documents, unseen, length = draw(task, text, cfg, vocabulary, noise, model.segment_len)
            show = part_of(progress, done, cfg.n_document * noise, total)
            for numbers, _, state in visit(model, documents, [length], cfg.n_row, show, share):
                for row in ask(model, state, documents, unseen, numbers, length):
                    i, k = row["document"], row["fact"]
                    asked: Any = unseen[i][k] if row["condition"] == "unseen" else documents[i].facts[k]
                    about = {"vocabulary": vocabulary, "noise": noise, "task": asked.task}
                    known = {"n_support": len(asked.question.support), "candidates": asked.question.candidates}
                    rows.append(about | row | known)
            done += cfg.n_document * noise
    rows = share.join(rows)
    order: list[Callable[[Any], int]] = [
        cfg.vocabularies.index, cfg.noise.index, cfg.tasks.index, CONDITIONS.index
    ]  # fmt: skip
    rows.sort(
        key=lambda row: (
            *(place(row[key]) for place, key in zip(order, _KEYS, strict=True)), row["document"], row["fact"]
        )
    )  # fmt: skip
    repetition = max(cfg.noise) / len(text)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document * cfg.n_story * cfg.n_question,  # questions per task, length and vocabulary
        "segment_len": model.segment_len,
        "haystack_repetition": repetition,  # above 1 a document repeats its own text
        "memories": list(model.memory.keys()),
        "headline": _headline(cfg) + repetition_entries(repetition),
    }
    return Result("babi", summarise(rows) | {"repetition": repetition}, tuple(rows), metadata)


def draw(
    task: Task, text: np.ndarray, cfg: Babi, vocabulary: str, noise: int, segment_len: int
) -> tuple[list[Stories], list[list[Any]], int]:
    """The documents; questions about as many stories that nobody is told; tokens of a document, whole segments.

    People, places and objects of all stories that a document is asked about differ.
    """
    documents, unseen = [], []
    n_word = len(cfg.tasks) * cfg.n_story * N_WORD
    for i in range(cfg.n_document):
        seed = [cfg.seed, list(VOCABULARIES).index(vocabulary), noise, i]
        rng = np.random.default_rng(seed)
        words = task.words(rng, 2 * n_word, VOCABULARIES[vocabulary])
        told, never = _stories(rng, task, words[:n_word], cfg), _stories(rng, task, words[n_word:], cfg)
        documents.append(_document(rng, task, told, Haystack(text, seed), segment_len, noise))
        unseen.append([asked for _, asked in _questions(task, never)])
    longest = max(max(document.n_head, noise + document.n_head - document.taken) for document in documents)
    return documents, unseen, -(-longest // segment_len) * segment_len


class _Told(NamedTuple):
    """A story: its task, its sentences, and what is asked at its end."""

    task: int
    sentences: list[str]
    questions: list[Question]


def _stories(rng: np.random.Generator, task: Task, words: Sequence[str], cfg: Babi) -> list[_Told]:
    """Stories of all tasks, each long enough to be asked about."""
    stories = []
    for i, kind in enumerate(kind for kind in cfg.tasks for _ in range(cfg.n_story)):
        story = Story(kind, words[i * N_WORD : (i + 1) * N_WORD], rng)
        sentences: list[str] = []
        while len(sentences) < cfg.n_statement or len(story.questions()) < cfg.n_question:
            sentence = story.tell()
            if sentence is None:
                break
            sentences.append(sentence)
        known = story.questions()
        chosen = [known[k] for k in rng.permutation(len(known))[: cfg.n_question]]
        stories.append(_Told(kind, sentences, chosen))
    return stories


def _questions(task: Task, stories: Sequence[_Told]) -> list[tuple[tuple[int, int], Any]]:
    """For each question: story and sentence that say the answer, and the question in tokens."""
    found = []
    for i, story in enumerate(stories):
        for question in story.questions:
            answers = [s for s in question.support if question.answer in story.sentences[s].split()]
            words = story.sentences[answers[-1]].split()
            upto = words[: len(words) - words[::-1].index(question.answer)]
            cue, answer = task.question(question)
            said = len(task.statement(" ".join(upto)).tokens) - 1  # without the full stop
            found.append(((i, answers[-1]), Asked(story.task, question, cue, answer, said)))
    return found


def _document(
    rng: np.random.Generator, task: Task, stories: Sequence[_Told], haystack: Haystack, segment_len: int, noise: int
) -> Stories:
    """Stories told side by side, each in its order, after random gaps in the text."""
    order = rng.permutation([i for i, story in enumerate(stories) for _ in story.sentences]).tolist()
    left = [iter(enumerate(story.sentences)) for story in stories]
    place: dict[tuple[int, int], int] = {}  # of the sentence of a story, among all
    statements: list[Any] = []
    for i in order:
        s, sentence = next(left[i])
        place[i, s] = len(statements)
        statements.append(task.statement(sentence))
    told = tell(rng, statements, (), haystack, segment_len, noise / len(statements), crossing=False)
    questions = _questions(task, stories)
    begins = [told.begins[place[key]] for key, _ in questions]
    return Stories([asked for _, asked in questions], begins, told.told, haystack)


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by vocabulary, task and length of the noise, with the ending of their metrics."""
    for key in sorted({(row["vocabulary"], row["task"], row["noise"]) for row in rows}):
        vocabulary, task, noise = key
        part = [row for row in rows if (row["vocabulary"], row["task"], row["noise"]) == key]
        yield f"/qa{task}/{vocabulary}/{noise}", part


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each task, vocabulary and noise length those of `memlm.evaluation.recall.rates.rates`,
        ``.../qa<task>/<vocabulary>/<noise>``, with ``chance`` as this experiment has it. Without an ending: those of
        the first task at the longest noise, in the open vocabulary if it was asked.
    """
    metrics: dict[str, float] = {}
    for suffix, part in _parts(rows):
        metrics |= {f"{name}{suffix}": value for name, value in rates(part).items()}
        metrics[f"chance{suffix}"] = _chance(part)
    if rows:
        vocabulary = "open" if any(row["vocabulary"] == "open" for row in rows) else "closed"
        first, longest = min(row["task"] for row in rows), max(row["noise"] for row in rows)
        suffix = f"/qa{first}/{vocabulary}/{longest}"
        metrics = {key.removesuffix(suffix): value for key, value in metrics.items() if key.endswith(suffix)} | metrics
    return metrics


def _chance(rows: Sequence[Row]) -> float:
    """Expected rate of guesses among the candidates of each question."""
    on = [row for row in rows if row["condition"] == "on"]
    return math.fsum(1 / row["candidates"] for row in on) / len(on) if on else math.nan


def _headline(cfg: Babi) -> list[dict[str, Any]]:
    """What the terminal's table and comparisons of runs show: every task and vocabulary beside its own controls."""
    main = "open" if "open" in cfg.vocabularies else "closed"
    longest, first = cfg.noise[-1], min(cfg.tasks)
    pairs = list(itertools.product(cfg.vocabularies, sorted(cfg.tasks)))
    pairs.sort(key=lambda pair: pair != (main, first))
    lines = []
    for vocabulary, task in pairs:
        about = f"qa{task}, {vocabulary} vocabulary"
        entries = recall_entries(f"{about}, {longest:,} tokens of noise", f"/qa{task}/{vocabulary}/{longest}")
        chance = entries[-1] | {"label": "guess among the story's words", "low": None, "high": None, "n": None}
        chance["metric"] = f"chance/qa{task}/{vocabulary}/{longest}"
        controls = [line | {"label": f"{about}, {line['label']}"} for line in (*entries[1:], chance)]
        lines += [entries[0], *controls]
    return lines


def plot(result: Result) -> dict[str, Figure]:
    """Accuracy against the length of the noise, one panel per task, beside the controls."""
    suffixes = [key.removeprefix("exact_match/on/").split("/") for key in result.metrics if key.count("/") == 4]
    suffixes = [parts for parts in suffixes if len(parts) == 3]
    if not suffixes:
        return {}
    tasks = sorted({int(parts[0].removeprefix("qa")) for parts in suffixes})
    vocabularies = [v for v in VOCABULARIES if v in {parts[1] for parts in suffixes}]
    noise = sorted({int(parts[2]) for parts in suffixes})
    with style():
        figure = Figure(figsize=(2.6 * len(tasks) + 1.2, 4.4))
        panels = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True)).tolist()
        for axes, task in zip(panels, tasks, strict=True):
            _panel(axes, result.metrics, task, vocabularies, noise)
        panels[0].set_ylabel("answered exactly")
        panels[0].yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        handles, labels = panels[0].get_legend_handles_labels()
        count = int(result.metrics[f"n/on/{'/'.join(suffixes[0])}"])
        title = f"bands, bars: 95 % Wilson interval, n = {count:,} per point"
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(tasks)), title=title)
        panels[len(panels) // 2].set_xlabel("tokens of noise")
    return {"babi": figure}


def _panel(axes: Any, metrics: Mapping[str, float], task: int, vocabularies: list[str], noise: list[int]) -> None:
    """One task."""
    looks = {"open": ("blue", "o", "-"), "closed": ("sky", "D", "-")}
    lines = [("on", v, f"memory on, {v} vocabulary", *looks[v], 6, 2.5) for v in vocabularies]
    controls = {"off": ("vermillion", "s", 10), "wiped": ("purple", "o", 7), "swapped": ("orange", "^", 5)}
    controls |= {"unseen": ("green", "x", 4)}  # nested, so that controls at one height stay visible
    own = vocabularies[0]
    for name, (color, marker, size) in controls.items():
        lines += [(name, v, CONTROLS[name] if v == own else "", color, marker, "--", size, 1.2) for v in vocabularies]
    for name, vocabulary, label, color, marker, dash, size, width in lines:
        keys = [f"/{name}/qa{task}/{vocabulary}/{n}" for n in noise]
        rate, low, high = ([metrics[part + key] for key in keys] for part in ("exact_match", "low", "high"))
        tint, on = PALETTE[color], name == "on"
        draw_interval(axes, noise, low, high, tint, band=on)
        axes.plot(
            noise, rate, color=tint, marker=marker, linestyle=dash, markersize=size, linewidth=width, label=label,
            markerfacecolor=tint if on else "none", clip_on=False, zorder=5 if on else 3,
        )  # fmt: skip
    chance = [metrics[f"chance/qa{task}/{own}/{n}"] for n in noise]
    level = {"color": PALETTE["black"], "linestyle": ":", "linewidth": 1.2, "label": "guess among the story's words"}
    if len(noise) > 1:
        axes.plot(noise, chance, **level)
    else:
        axes.axhline(chance[0], **level)
    axes.set(title=f"qa{task}: {TASKS[task].replace(' ', chr(10), 1)}", ylim=(0, 1))
    if len(noise) > 1:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(noise)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
