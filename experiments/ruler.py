"""RULER: needles, variables, common and frequent words in texts of any length, as trained tasks.

The tasks, and what differs from RULER's, stand in `memlm.data.tasks.ruler`. A small model cannot follow RULER's prompts
untrained, so it is trained on its generators, and asked about texts that another stream of random numbers drew. What
it says by greedy decoding is scored by RULER's rule: each reference that it contains counts. Controls: reads off,
memory wiped, another text's memory, and a question about a text that was not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from memlm.analysis.style import style
from memlm.config import ConfigError
from memlm.data.haystack import Haystack, Told
from memlm.data.tasks.ruler import GENERATORS, Encoded, check_tasks, found
from memlm.data.tasks.ruler import Ruler as Task
from memlm.evaluation.headline import recall_entries
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

_STREAM = 2  # of random numbers, which training does not use
_MORE = 4  # tokens that may be said beyond the longest right answer


@dataclass(frozen=True)
class Ruler:
    """Settings.

    Attributes:
        tasks: Which of RULER's tasks.
        lengths: Tokens of a text, at most, ascending.
        n_document: Texts of each task and length; at least 2, as one is the other's control.
        seed: Of the texts.
        n_row: Texts read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    tasks: list[str] = field(default_factory=lambda: list(GENERATORS))
    lengths: list[int] = field(default_factory=lambda: [1_000, 4_000])
    n_document: int = 20
    seed: int = 0
    n_row: int = 20

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "seed": 0, "n_row": 1})
        check_tasks(self.tasks, "ruler.tasks")
        if not self.lengths or min(self.lengths) < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise ConfigError(f"ruler.lengths must be lengths in tokens in ascending order, got {self.lengths}")


class Asked(NamedTuple):
    """A question, as `memlm.evaluation.recall.asking.ask` takes it.

    Attributes:
        encoded: The puzzle.
        said: Tokens of its text.
    """

    encoded: Encoded
    said: int

    @property
    def cue(self) -> tuple[int, ...]:
        """Token ids of the question."""
        return self.encoded.cue

    @property
    def answer(self) -> tuple[int, ...]:
        """Token ids of the answer."""
        return self.encoded.answer

    @property
    def tokens(self) -> tuple[int, ...]:
        """Question and answer."""
        return self.cue + self.answer

    @property
    def text(self) -> str:
        """Question and answer in words."""
        return f"{self.encoded.puzzle.cue} {self.encoded.puzzle.answer}"


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Ruler,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure the share of references that answers contain, for every task and length.

    Args:
        model: A language model that was trained on the tasks; it is left as it was.
        data: What gives the words of texts as its ``task``, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per task, length, condition, text (``document``) and reference (``fact``): ``said`` is what the model
        says, ``correct`` whether that contains the reference. For metrics see `summarise`.

    Raises:
        ConfigError: If the model was not trained on the tasks, or a text is too short for one.
    """
    task = data.task
    if not isinstance(task, Task):
        raise ConfigError(
            "experiment=ruler asks what this model was not trained on: expected a run whose curriculum has the task "
            "memlm.data.tasks.ruler.Ruler; train one with recipe=ruler"
        )
    rows: list[Row] = []
    total, done = len(cfg.tasks) * sum(cfg.lengths), 0
    with evaluating(model):
        for name in cfg.tasks:
            for length in cfg.lengths:
                documents = draw(task, name, length, cfg)
                unseen = [document.facts for document in draw(task, name, length, cfg, unseen=True)]
                longest = max(int(document.n_token or 0) for document in documents)
                asked = [fact for facts in (*unseen, *(document.facts for document in documents)) for fact in facts]
                judge = _judge(data.tokenizer, max(len(fact.answer) for fact in asked) + _MORE)
                show = part_of(progress, done, length, total)
                for numbers, _, state in visit(model, documents, [longest], cfg.n_row, show, share):
                    for row in ask(model, state, documents, unseen, numbers, longest, judge=judge):
                        row |= dict.fromkeys(("since", "depth", "straddles", "stored"))  # of no single place
                        for i, hit in enumerate(row.pop("found")):
                            rows.append({"task": name, "length": length, **row, "fact": i, "correct": hit})
                done += length
    rows = share.join(rows)
    order = {name: i for i, name in enumerate(cfg.tasks)}
    rows.sort(
        key=lambda row: (
            order[row["task"]], row["length"], CONDITIONS.index(row["condition"]), row["document"], row["fact"]
        )
    )  # fmt: skip
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": cfg.n_document,
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": [
            entry
            for name in cfg.tasks
            for first, *controls in [
                recall_entries(f"{name}, {cfg.lengths[-1]:,} tokens", f"/{name}/{cfg.lengths[-1]}")
            ]
            for entry in (first, *(line | {"label": f"{name}, {line['label']}"} for line in controls))
        ],
    }
    return Result("ruler", summarise(rows), tuple(rows), metadata)


def draw(task: Task, name: str, length: int, cfg: Ruler, unseen: bool = False) -> list[Stories]:
    """The texts of a task and length, or as many that nobody reads."""
    documents = []
    for i in range(cfg.n_document):
        numbers = [cfg.seed, _STREAM, list(GENERATORS).index(name), length, i, int(unseen)]
        made = task.draw(np.random.default_rng(numbers), name, length)
        question: Any = Asked(made, len(made.text))
        text = Haystack(made.text, [0])  # nothing follows
        documents.append(Stories([question], [0], [Told(0, 0, made.text)], text, (), len(made.text)))
    return documents


def _judge(tokenizer: Any, n_new: int) -> Judge:
    """RULER's rule, of what is said in ``n_new`` tokens."""

    def judge(model: LanguageModel, state: Any, facts: Sequence[Any], read: bool) -> list[Row]:
        exact = answer(model, state, facts, read)
        said = [tokenizer.decode(ids) for ids in say(model, state, [fact.cue for fact in facts], n_new, read)]
        return [
            {"correct": None, "nll": nll, "said": text, "found": found(text, fact.encoded.puzzle.references)}
            for fact, text, (_, nll) in zip(facts, said, exact, strict=True)
        ]

    return judge


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each task and length those of `memlm.evaluation.recall.rates.rates`, ``.../<task>/<length>``, where
        ``exact_match`` is RULER's score, the share of references that were found; for each condition and length
        ``score/<condition>/<length>``, the mean over tasks. Without an ending: those of the first task at the longest.
    """
    metrics: dict[str, float] = {}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    for length in lengths:
        for name in tasks:
            part = rates([row for row in rows if (row["task"], row["length"]) == (name, length)])
            part.pop("chance", None)
            metrics |= {f"{key}/{name}/{length}": value for key, value in part.items()}
            if (name, length) == (tasks[0], lengths[-1]):
                metrics = part | metrics
        for condition in CONDITIONS:
            scores = [metrics.get(f"exact_match/{condition}/{name}/{length}") for name in tasks]
            if None not in scores:
                metrics[f"score/{condition}/{length}"] = fmean(score for score in scores if score is not None)
    return metrics


def plot(result: Result) -> dict[str, Figure]:
    """Score against length for each task, beside the controls."""
    tasks = list(dict.fromkeys(row["task"] for row in result.rows))
    lengths = sorted({row["length"] for row in result.rows})
    figures = {}
    for name in tasks:
        points: dict[str, Points] = {
            condition: [
                (i, *(result.metrics[f"{part}/{condition}/{name}/{n}"] for part in ("exact_match", "low", "high")))  # type: ignore[misc]
                for i, n in enumerate(lengths)
            ]
            for condition in CONDITIONS
        }
        with style():
            figure = Figure(figsize=(7.0, 4.8))
            axes = figure.subplots()
            draw_curves(axes, points, LABELS)
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axes.set(title=f"RULER, {name}", ylabel="references found", xlabel="tokens of text, at most")
            n = int(result.metrics[f"n/on/{name}/{lengths[0]}"])
            figure.legend(loc="outside lower center", ncols=2, title=f"bars: 95 % Wilson interval, n = {n:,} per point")
        figures[name] = figure
    return figures
