"""bAbI: stories in order inside long noise text, with questions asked in fresh contexts.

A document tells the sentences of several stories in their order, at random places of held-out text of a given length.
Then the local context is dropped and each story is asked about, in a fresh context per question, with nothing written.
An answer counts when greedy decoding gives it whole. People, places and objects of a story are its own within a
document. In the `closed` vocabulary they are words that played such parts in training, in the `open` one words that
never did.

The controls: reads off, memory wiped, another document's memory, and stories that were told to nobody. Chance
is the rate of one who knows which words are answers of this kind in the story (its six places, say) and guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from experiments.base import PALETTE, Result, Row, evaluating, style
from experiments.needle import CONDITIONS
from experiments.questions import absorb, ask, chance_line, headline, is_shared, rates
from memlm.analysis.figures import CONTROLS
from memlm.config import ConfigError
from memlm.data.babi import N_WORD, TASKS, Asked, Question, Story
from memlm.data.babi import Babi as Task

VOCABULARIES = {"open": "evaluation", "closed": "train"}
"""Vocabularies of stories, and which words they have."""


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
        least = {"n_document": 2, "n_story": 1, "n_question": 1, "n_statement": 1, "seed": 0, "n_row": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ConfigError(f"babi.{name} must be at least {number}, got {getattr(self, name)}")
        if self.n_question > 3:
            raise ConfigError(f"babi.n_question must be at most 3, as a story has three objects, got {self.n_question}")
        for name, known in (("tasks", list(TASKS)), ("vocabularies", list(VOCABULARIES))):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given) or not set(given) <= set(known):
                raise ConfigError(f"babi.{name} must be some of {', '.join(map(str, known))}, each once, got {given}")
        if not self.noise or min(self.noise) < 1 or sorted(set(self.noise)) != list(self.noise):
            raise ConfigError(f"babi.noise must be lengths in tokens in ascending order, got {self.noise}")
        if self.split not in ("val", "test"):
            raise ConfigError(f"babi.split must be 'val' or 'test', text the model never saw, got {self.split!r}")


class Document(NamedTuple):
    """Stories inside text.

    Attributes:
        tokens: Token ids.
        taken: Place in the text of the noise where it would go on.
        questions: Questions about the stories, by task and story.
        asked: The same in tokens.
        tasks: Task of each question.
        ends: Place of the token after the last statement that each question's answer follows from.
    """

    tokens: np.ndarray
    taken: int
    questions: list[Question]
    asked: list[Asked]
    tasks: list[int]
    ends: list[int]


def run(model: Any, data: Any, cfg: Babi, progress: Callable[[float], None] | None = None) -> Result:
    """Measure how well questions about stories are answered, against the length of the text around them.

    Args:
        model: A language model that was trained on such stories; it is left as it was.
        data: What gives ``tokens(split)`` and, as ``task``, the stories, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.

    Returns:
        One row per vocabulary, noise length, condition, document and question: ``task``, ``text``, ``answer``,
        ``n_support`` statements that it follows from, ``since`` the tokens from the last of them to the question,
        ``candidates``, ``correct``, and ``nll`` of the answer. For metrics see `summarise`.

    Raises:
        ConfigError: If the model was not trained on stories.
    """
    task = data.task
    if not isinstance(task, Task):
        raise ConfigError(
            "experiment=babi asks about stories, which this model was not trained on: expected a run whose curriculum "
            "has the task memlm.data.babi.Babi; train one with recipe=babi"
        )
    n_row = 1 if is_shared(model) else cfg.n_row
    rows: list[Row] = []
    total, done = cfg.n_document * len(cfg.vocabularies) * sum(cfg.noise), 0.0
    with evaluating(model):
        for vocabulary in cfg.vocabularies:
            for noise in cfg.noise:
                documents, never = draw(task, data.tokens(cfg.split).tokens, cfg, vocabulary, noise)
                told = [document.asked for document in documents]
                for first in range(0, cfg.n_document, n_row):
                    numbers = range(first, min(first + n_row, cfg.n_document))
                    texts = np.stack([documents[i].tokens for i in numbers])

                    def read(n_token: int, done: float = done, share: float = noise / texts.shape[1]) -> None:
                        if progress is not None:
                            progress(min((done + share * n_token) / total, 1.0))

                    state = absorb(model, texts, read)
                    done += len(numbers) * noise
                    found = ask(model, state, numbers, told, [document.asked for document in never])
                    for row in found:
                        source = never if row["condition"] == "unseen" else documents
                        rows.append(_describe(row, source[row["document"]], vocabulary, noise))
    rows.sort(
        key=lambda row: (
            cfg.vocabularies.index(row["vocabulary"]), row["noise"], row["task"], CONDITIONS.index(row["condition"]),
            row["document"], row["question"],
        )
    )  # fmt: skip
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document * cfg.n_story * cfg.n_question,  # questions per task, length and vocabulary
        "segment_len": model.segment_len,
        "noise_repetition": max(cfg.noise) / data.tokens(cfg.split).n_token,  # above 1 a document repeats its own text
        "memories": list(model.memory.keys()),
        "headline": _headline(cfg),
    }
    return Result("babi", summarise(rows), tuple(rows), metadata)


def draw(
    task: Task, passage: np.ndarray, cfg: Babi, vocabulary: str, noise: int
) -> tuple[list[Document], list[Document]]:
    """The documents, equally long; and for each one that nobody is told, of other people, places and objects."""
    split = VOCABULARIES[vocabulary]
    documents, never = [], []
    n = len(cfg.tasks) * cfg.n_story  # stories of a document
    for i in range(cfg.n_document):
        rng = np.random.default_rng([cfg.seed, list(VOCABULARIES).index(vocabulary), noise, i])
        words = task.words(rng, 2 * n * N_WORD, split)  # type: ignore[arg-type]
        documents.append(_document(rng, task, words[: n * N_WORD], passage, cfg, noise))
        never.append(_document(rng, task, words[n * N_WORD :], passage, cfg, 1))
    length = max(len(document.tokens) for document in documents)
    longer = []
    for document in documents:  # noise at the end, until all are of one length
        rest = (document.taken + np.arange(length - len(document.tokens))) % len(passage)
        longer.append(document._replace(tokens=np.concatenate([document.tokens, passage[rest]])))
    return longer, never


def _document(
    rng: np.random.Generator, task: Task, words: Sequence[str], passage: np.ndarray, cfg: Babi, noise: int
) -> Document:
    """Stories told side by side, each in its order, at random places of the text."""
    kinds = [kind for kind in cfg.tasks for _ in range(cfg.n_story)]
    told: list[list[str]] = []
    questions: list[list[Question]] = []
    for i, kind in enumerate(kinds):
        sentences, story = _tell(rng, kind, words[i * N_WORD : (i + 1) * N_WORD], cfg)
        told.append(sentences)
        known = story.questions()
        questions.append([known[k] for k in rng.permutation(len(known))[: cfg.n_question]])
    order = rng.permutation([i for i, sentences in enumerate(told) for _ in sentences])
    cuts = np.sort(rng.integers(noise + 1, size=len(order)))  # tokens of noise before each sentence
    start = int(rng.integers(len(passage)))
    text = passage[(start + np.arange(noise)) % len(passage)]
    parts: list[np.ndarray] = []
    ends: list[list[int]] = [[] for _ in told]  # place after each sentence
    place = taken = 0
    for i, cut in zip(order.tolist(), cuts.tolist(), strict=True):
        sentence = task.statement(told[i][len(ends[i])]).tokens
        parts += [text[taken:cut], np.asarray(sentence)]
        place, taken = place + cut - taken + len(sentence), cut
        ends[i].append(place)
    flat = [(i, question) for i, own in enumerate(questions) for question in own]
    return Document(
        np.concatenate([*parts, text[taken:]]),
        start + noise,
        [question for _, question in flat],
        [task.question(question) for _, question in flat],
        [kinds[i] for i, _ in flat],
        [max(ends[i][s] for s in question.support) for i, question in flat],
    )


def _tell(rng: np.random.Generator, kind: int, words: Sequence[str], cfg: Babi) -> tuple[list[str], Story]:
    """A story that is long enough to be asked about."""
    story = Story(kind, words, rng)
    sentences: list[str] = []
    while len(sentences) < cfg.n_statement or len(story.questions()) < cfg.n_question:
        sentence = story.tell()
        if sentence is None:
            break
        sentences.append(sentence)
    return sentences, story


def _describe(row: Row, document: Document, vocabulary: str, noise: int) -> Row:
    """``row`` with what it is about."""
    k, unseen = row["question"], row["condition"] == "unseen"
    question = document.questions[k]
    return {
        "vocabulary": vocabulary,
        "noise": noise,
        "task": document.tasks[k],
        **row,
        "text": f"{question.text}?",
        "answer": question.answer,
        "n_support": len(question.support),
        "since": None if unseen else len(document.tokens) - document.ends[k],
        "candidates": question.candidates,
    }


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by vocabulary, task and length of the noise, with the ending of their metrics."""
    for key in sorted({(row["vocabulary"], row["task"], row["noise"]) for row in rows}):
        vocabulary, task, noise = key
        part = [row for row in rows if (row["vocabulary"], row["task"], row["noise"]) == key]
        yield f"/qa{task}/{vocabulary}/{noise}", part


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition, task, vocabulary and noise length ``exact_match/<condition>/qa<task>/<vocabulary>/<noise>``
        with ``low`` and ``high`` (95 % Wilson interval), ``n`` and ``nll``, and ``chance/qa<task>/...``. Without an
        ending: those of the first task at the longest noise, in the open vocabulary if it was asked.
    """
    metrics: dict[str, float] = {}
    for suffix, part in _parts(rows):
        metrics |= rates(part, suffix)
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
    """What the terminal's table and comparisons of runs show: the first task, its controls, the other tasks."""
    main = "open" if "open" in cfg.vocabularies else "closed"
    longest, first = cfg.noise[-1], min(cfg.tasks)
    at = f"{longest:,} tokens of noise"
    lines = [headline(f"qa{first}, {main} vocabulary, {at}", "on")]
    lines += [headline(f"qa{first}, {label}", name, control=True) for name, label in CONTROLS.items()]
    lines.append(chance_line(f"qa{first}, guess among the story's words"))
    for vocabulary in cfg.vocabularies:
        lines += [
            headline(f"qa{task}, {vocabulary} vocabulary, {at}", "on", f"/qa{task}/{vocabulary}/{longest}")
            for task in sorted(cfg.tasks)
            if (task, vocabulary) != (first, main)
        ]
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
        title = f"band: 95 % Wilson interval, n = {count:,} per point"
        figure.legend(handles, labels, loc="outside lower center", ncols=4, title=title)
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
        lines.append((name, own, CONTROLS[name], color, marker, "--", size, 1.2))
    for name, vocabulary, label, color, marker, dash, size, width in lines:
        keys = [f"/{name}/qa{task}/{vocabulary}/{n}" for n in noise]
        rate, low, high = ([metrics[part + key] for key in keys] for part in ("exact_match", "low", "high"))
        tint, on = PALETTE[color], name == "on"
        axes.fill_between(noise, low, high, color=tint, alpha=0.18 if on else 0.05, linewidth=0)
        axes.plot(
            noise, rate, color=tint, marker=marker, linestyle=dash, markersize=size, linewidth=width, label=label,
            markerfacecolor=tint if on else "none", clip_on=False, zorder=5 if on else 3,
        )  # fmt: skip
    chance = [metrics[f"chance/qa{task}/{own}/{n}"] for n in noise]
    axes.plot(
        noise, chance, color=PALETTE["black"], linestyle=":", linewidth=1.2, label="guess among the story's words"
    )
    axes.set(title=f"qa{task}: {TASKS[task].replace(' ', chr(10), 1)}", ylim=(0, 1))
    if len(noise) > 1:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(noise)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
