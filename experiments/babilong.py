"""BABILong: published bAbI questions about facts spread over book text of up to 10 million tokens.

The rules, and what differs, stand in `memlm.data.tasks.babilong`. A model is trained on one task's train split and
asked the published test questions at all lengths; what it says by greedy decoding is judged by BABILong's own rule.
Controls: reads off, memory wiped, another question's memory, and a question about a story that was not told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.config import ConfigError
from memlm.data.haystack import Haystack, Sentences, sentences
from memlm.data.tasks.babilong import BabiLong as Task
from memlm.data.tasks.babilong import Words, is_right, spread
from memlm.evaluation.headline import recall_entries, repetition_entries
from memlm.evaluation.recall.asking import Judge, answer, ask, say
from memlm.evaluation.recall.figures import Points, draw_curves
from memlm.evaluation.recall.haystack import Stories
from memlm.evaluation.recall.rates import CONDITIONS, LABELS, rates
from memlm.evaluation.recall.reading import part_of, visit
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData


@dataclass(frozen=True)
class Babilong:
    """Settings.

    Attributes:
        lengths: Tokens of story and book text, ascending; 0 for the story alone.
        n_question: Test questions, evenly from all over the published ones; None for all of them.
        text: A file to take the book text from, in place of ``split``: `.txt`, `.jsonl` or `.parquet`
            (`memlm.data.tokens.tokenize_file`).
        split: ``val``, or ``test`` for final numbers.
        seed: Of the places of facts, and of where in the books a text begins.
        n_row: Questions whose texts are read at once; the result does not depend on it. One at a time with a shared
            memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    lengths: list[int] = field(default_factory=lambda: [0, 1_000, 4_000, 16_000])
    n_question: int | None = 100
    text: str | None = None
    split: Literal["val", "test"] = "val"
    seed: int = 0
    n_row: int = 25

    def __post_init__(self) -> None:
        check_settings(self, {"n_question": 2, "seed": 0, "n_row": 1})
        if not self.lengths or min(self.lengths) < 0 or sorted(set(self.lengths)) != list(self.lengths):
            raise ConfigError(f"babilong.lengths must be lengths in tokens in ascending order, got {self.lengths}")


class Asked(NamedTuple):
    """A question, as `memlm.evaluation.recall.asking.ask` takes it.

    Attributes:
        words: The sample.
        said: Tokens of the last fact that tells the answer.
    """

    words: Words
    said: int

    @property
    def cue(self) -> tuple[int, ...]:
        """Token ids of the question."""
        return self.words.cue

    @property
    def answer(self) -> tuple[int, ...]:
        """Token ids of the answer and of the full stop."""
        return self.words.answer

    @property
    def tokens(self) -> tuple[int, ...]:
        """Question and answer."""
        return self.cue + self.answer

    @property
    def text(self) -> str:
        """Question and answer in words."""
        return f"{self.words.sample.question} {self.words.sample.answer}"


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Babilong,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure how many test questions are answered, at every length.

    Args:
        model: A language model that was trained on the task; it is left as it was.
        data: What gives the text and, as ``task``, the stories, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per length, condition and question (``document``): ``said`` is what the model says, ``n_fact`` how many
        facts the story has, ``candidates`` how many answers could be meant; for the rest see
        `memlm.evaluation.recall.asking.ask`, where the fact is the last one that the answer follows from. For metrics
        see `summarise`.

    Raises:
        ConfigError: If the model was not trained on BABILong, or the rule cannot tell the answers of its task apart.
    """
    task = data.task
    if not isinstance(task, Task):
        raise ConfigError(
            "experiment=babilong asks what this model was not trained on: expected a run whose curriculum has the task "
            "memlm.data.tasks.babilong.BabiLong; train one with recipe=babilong"
        )
    doubtful = [label for label in task.labels if sum(label in other for other in task.labels) > 1]
    if doubtful:
        raise ConfigError(
            f"BABILong's rule cannot judge bAbI task {task.task}, where the answer {doubtful[0]!r} is a part of "
            "another one: choose one of tasks 1 to 5"
        )
    tokens = data.tokens(cfg.split) if cfg.text is None else data.tokens_of_file(cfg.text)
    text = sentences(tokens.tokens, data.tokenizer)
    every = task.test()
    n = len(every) if cfg.n_question is None else min(cfg.n_question, len(every))
    asked = [every[i * len(every) // n] for i in range(n)]
    judge = _judge(data.tokenizer, task, max(len(words.answer) for words in asked))
    rows: list[Row] = []
    total, done = n * (sum(cfg.lengths) + 1), 0
    with evaluating(model):
        for length in cfg.lengths:
            documents = draw(asked, text, length, cfg.seed)
            longest = max(int(document.n_token or 0) for document in documents)
            unseen = [documents[(i + n // 2) % n].facts for i in range(n)]
            show = part_of(progress, done, n * length, total)
            for numbers, _, state in visit(model, documents, [longest], cfg.n_row, show, share):
                for row in ask(model, state, documents, unseen, numbers, longest, judge=judge):
                    words = asked[row["document"]]
                    if not words.sample.facts[-1].rstrip(".").endswith(words.sample.answer):
                        row["stored"] = None  # which slots lead to the answer is not known
                    rows.append({"length": length, **row, "n_fact": len(words.facts)})
            done += n * length
    rows = share.join(rows)
    rows.sort(key=lambda row: (row["length"], CONDITIONS.index(row["condition"]), row["document"]))
    repetition = max(cfg.lengths) / len(text.tokens)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": n,
        "task": task.task,
        "segment_len": model.segment_len,
        "haystack_repetition": repetition,  # above 1 a question's text repeats itself
        "memories": list(model.memory.keys()),
        "headline": _headline(cfg.lengths, task.task) + repetition_entries(repetition),
    }
    return Result("babilong", summarise(rows) | {"repetition": repetition}, tuple(rows), metadata)


def draw(asked: Sequence[Words], text: Sentences, length: int, seed: int) -> list[Stories]:
    """The text of each question, of ``length`` tokens, or of its story alone where that is longer."""
    documents = []
    for i, words in enumerate(asked):
        haystack = Haystack(text.tokens, [seed, length, i], text.starts)
        told = spread(np.random.default_rng([seed, length, i, 1]), words.facts, haystack, length)
        last = told[max(words.sample.support, default=len(told) - 1)]
        question: Any = Asked(words, len(last.tokens))
        documents.append(Stories([question], [last.place], told, haystack, (), max(length, words.n_fact)))
    return documents


def _judge(tokenizer: Any, task: Task, n_answer: int) -> Judge:
    """BABILong's rule, of what is said in as many tokens as the longest answer and its full stop have."""

    def judge(model: LanguageModel, state: Any, facts: Sequence[Any], read: bool) -> list[Row]:
        exact = answer(model, state, facts, read)
        said = [tokenizer.decode(ids) for ids in say(model, state, [fact.cue for fact in facts], n_answer, read)]
        return [
            {
                "correct": is_right(text, fact.words.sample, task.labels),
                "nll": nll,
                "said": text,
                "candidates": sum(label not in fact.words.sample.question.lower() for label in task.labels),
            }
            for fact, text, (_, nll) in zip(facts, said, exact, strict=True)
        ]

    return judge


def length_name(length: int) -> str:
    """A length as BABILong writes it: 0k, 4k, 1M."""
    if length and length % 1_000_000 == 0:
        return f"{length // 1_000_000}M"
    return f"{length // 1000}k" if length % 1000 == 0 else f"{length:,} tokens"


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each length those of `memlm.evaluation.recall.rates.rates`, ``.../<length>``, with ``chance`` for a guess
        among the answers that the question does not name, and ``controls_at_most``. Without an ending: those of the
        longest.
    """
    metrics: dict[str, float] = {}
    for length in sorted({row["length"] for row in rows}):
        part = [row for row in rows if row["length"] == length]
        found = rates(part)
        on = [row for row in part if row["condition"] == "on"]
        found["controls_at_most"] = max(found.get(f"exact_match/{name}", math.nan) for name in CONTROLS)
        found["chance"] = math.fsum(1 / row["candidates"] for row in on) / len(on) if on else math.nan
        metrics |= {f"{name}/{length}": value for name, value in found.items()} | found
    return metrics


def _headline(lengths: Sequence[int], task: int) -> list[dict[str, Any]]:
    """Every length beside the greatest of its controls, which `summarise` has one by one."""
    lines = []
    for length in sorted(lengths):
        about = f"qa{task}, {length_name(length)}"
        first, control, *_ = recall_entries(about, f"/{length}")
        plain: dict[str, Any] = {"low": None, "high": None}
        controls = {"label": f"{about}, controls at most", "metric": f"controls_at_most/{length}", **plain}
        chance = {"label": f"{about}, guess among the answers", "metric": f"chance/{length}", **plain, "n": None}
        for entry, line in ((first, ""), (control | controls, ", controls at most"), (control | chance, ", a guess")):
            lines.append(entry | {"cell": [f"qa{task}{line}", length_name(length)]})
    return lines


def plot(result: Result) -> dict[str, Figure]:
    """Accuracy against length, beside the controls."""
    lengths = sorted({row["length"] for row in result.rows})
    if not lengths:
        return {}
    metrics = result.metrics
    points: dict[str, Points] = {
        name: [
            (i, *(metrics[f"{part}/{name}/{length}"] for part in ("exact_match", "low", "high")))  # type: ignore[misc]
            for i, length in enumerate(lengths)
        ]
        for name in CONDITIONS
    }
    with style():
        figure = Figure(figsize=(7.0, 4.8))
        axes = figure.subplots()
        draw_curves(axes, points, LABELS)
        chance = [metrics[f"chance/{length}"] for length in lengths]
        look: Mapping[str, Any] = {"color": PALETTE["black"], "linewidth": 1.2, "linestyle": ":"}
        axes.plot(range(len(lengths)), chance, label="guess among the answers", **look)
        axes.set_xticks(range(len(lengths)), [length_name(length) for length in lengths])
        axes.set(title=f"BABILong, qa{result.metadata['task']}", ylabel="answered exactly", xlabel="tokens of text")
        n = int(metrics["n/on"])
        figure.legend(loc="outside lower center", ncols=2, title=f"bars: 95 % Wilson interval, n = {n:,} per point")
    return {"babilong": figure}
