"""Sentences told in one context, asked in other words in a fresh one, and answered from the records that memory finds.

Each conversation has a memory of its own, which is told its sentences one by one. Each question is then asked in a
fresh context, as `memlm chat` asks it: memory reads the question, the records that it reads most are read again, as
text, right before it, and the model answers in its own words. An answer counts if it has the value that was told as
whole words, in any case.

``facts=people`` are 100 sentences about ten people, the same ten in five conversations. Each conversation has two about
each of them, so that a name alone does not lead to the sentence. ``facts=development`` are 100 of other kinds about ten
others: settings are chosen on these. ``facts=modern`` are those of `experiments.modern_facts`, told with their false
values: a model that answers what it knows is wrong.

Controls: memory off, a memory that was wiped, that of another conversation, and one from which the sentence in
question was forgotten, so that it is as if it was never told (law 12). Beside them stands what the base answers if the
sentence alone is given to it, as if memory had found it and nothing else.

Shapes: B rows, L tokens of a question.
"""

from __future__ import annotations

import copy
import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.modern_facts.facts import rows_of_file
from memlm.analysis.style import CONTROLS, PALETTE, style
from memlm.config import ConfigError
from memlm.evaluation.recall.reading import device_of, is_shared
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.memory.contract import Memory
from memlm.memory.records import RecordKeeper
from memlm.models.segments import SegmentModel
from memlm.statistics import wilson
from memlm.store.conversation import check_recall, found_for, question_ids, said
from memlm.store.kept import holds

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

CONDITIONS = {"on": "memory on", **CONTROLS, "given": "the sentence alone, given"}
"""What is measured, and how it is called."""


@dataclass(frozen=True)
class Told:
    """Settings.

    Attributes:
        facts: ``people``, ``development``, or ``modern`` for the false values of `experiments.modern_facts`.
        n_conversation: Memories that the sentences are told to; at least 2, as one is the other's control. The first
            sentences of the file, as many as can be dealt out evenly.
        n_fact: Sentences that are told, at most.
        recall: Records that are found and read again.
        n_new: Most tokens of an answer.
        n_row: Questions answered at once; the result does not depend on it.

    Raises:
        ConfigError: If a setting cannot work.
    """

    facts: Literal["people", "development", "modern"] = "people"
    n_conversation: int = 5
    n_fact: int = 100
    recall: int = 3
    n_new: int = 24
    n_row: int = 10

    def __post_init__(self) -> None:
        check_settings(self, {"n_conversation": 2, "recall": 1, "n_new": 1, "n_row": 1})
        if self.facts not in ("people", "development", "modern"):
            raise ConfigError(f"told.facts must be people, development or modern, got {self.facts!r}")
        if self.n_fact < self.n_conversation:
            raise ConfigError(f"told.n_fact must be at least told.n_conversation, got {self.n_fact}")


class Fact(NamedTuple):
    """A sentence, a question that it answers, and the value that an answer must have."""

    told: str
    question: str
    value: str


def facts_of(cfg: Told) -> list[list[Fact]]:
    """The facts of each conversation."""
    if cfg.facts == "modern":
        facts = [
            Fact(f"{row['cue']} {row['counterfactual']}.", row["question"], row["counterfactual"])
            for row in rows_of_file()
        ]
    else:
        with open(Path(__file__).with_name(f"{cfg.facts}.csv"), encoding="utf-8", newline="") as file:
            facts = [Fact(row["told"], row["question"], row["value"]) for row in csv.DictReader(file)]
    n_each = min(cfg.n_fact, len(facts)) // cfg.n_conversation
    return [facts[i * n_each : (i + 1) * n_each] for i in range(cfg.n_conversation)]


class _Question(NamedTuple):
    """A question under a condition: where its fact was told, records that are forgotten, and what was found."""

    condition: str
    conversation: int
    fact: Fact
    gone: list[int]
    found: list[str]


def run(
    model: SegmentModel,
    data: TextData,
    cfg: Told,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure how many questions are answered from memory.

    Args:
        model: A model with a memory that keeps records; it is left as it was.
        data: Not looked at; the text is that of the files.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per condition and fact: ``conversation`` (where it was told), ``told``, ``question``, ``value``,
        ``found`` (whether the sentence is among the records read again), ``answer``, ``correct``. For metrics see
        `summarise`.

    Raises:
        ConfigError: If no memory keeps records, rows share one, or a memory holds records already.
    """
    check_recall(model, cfg.recall)
    if is_shared(model):
        raise ConfigError("told gives each conversation a memory of its own: use scope=sequence")
    if model.list_memory(1):
        raise ConfigError("told asks an empty memory, and this model has stored records: take one without")
    facts = facts_of(cfg)
    rows: list[Row] = []
    with evaluating(model):
        for numbers in share.groups(cfg.n_conversation, 1):
            for i in numbers:
                rows += _measure(model, facts, i, cfg)
                if progress is not None:
                    progress((i + 1) / cfg.n_conversation)
    rows = share.join(rows)
    rows.sort(key=lambda row: (list(CONDITIONS).index(row["condition"]), row["conversation"]))
    metadata = {
        "settings": asdict(cfg),
        "n_told": len(facts[0]),  # of a conversation
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": [_line(name, label) for name, label in CONDITIONS.items()]
        + [{"label": "the sentence is among what is found", "metric": "found/on", "low": "found_low/on"}
           | {"high": "found_high/on", "n": "n/on", "percent": True, "better": "higher", "control": False}],
    }  # fmt: skip
    return Result("told", summarise(rows), tuple(rows), metadata)


def _line(name: str, label: str) -> dict[str, Any]:
    claim = name not in CONTROLS
    return {
        "label": "answered in other words" if name == "on" else label,
        "metric": f"answered/{name}",
        "low": f"answered_low/{name}",
        "high": f"answered_high/{name}",
        "n": f"n/{name}",
        "percent": True,
        "better": "higher" if claim else "lower",
        "control": not claim,
    }


def _alike(model: SegmentModel) -> SegmentModel:
    """A model with the same weights and memories of its own."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _measure(model: SegmentModel, facts: Sequence[Sequence[Fact]], number: int, cfg: Told) -> list[Row]:
    """Rows of what a conversation's memory is asked, and of the conversation before it, asked of this memory."""
    told = _alike(model)
    records = [told.store_experience(fact.told) for fact in facts[number]]
    every = [record for part in records for record in part]
    before = (number - 1) % len(facts)
    emptied, asked = _without(told, every), list[_Question]()
    for fact, mine in zip(facts[number], records, strict=True):
        asked.append(_Question("on", number, fact, [], _texts(told, fact, cfg)))
        asked.append(_Question("unseen", number, fact, mine, _texts(_without(told, mine), fact, cfg)))
        asked.append(_Question("wiped", number, fact, every, _texts(emptied, fact, cfg)))
        asked.append(_Question("off", number, fact, every, []))
        asked.append(_Question("given", number, fact, every, [fact.told]))
    asked += [_Question("swapped", before, fact, [], _texts(told, fact, cfg)) for fact in facts[before]]
    rows = []
    for condition in CONDITIONS:
        part = [one for one in asked if one.condition == condition]
        for begin in range(0, len(part), cfg.n_row):
            some = part[begin : begin + cfg.n_row]
            for one, answer in zip(some, _answers(told, some, cfg, condition not in ("off", "given")), strict=True):
                about = {"condition": condition, "conversation": one.conversation, **one.fact._asdict()}
                about |= {"found": one.fact.told in one.found, "answer": answer}
                rows.append(about | {"correct": says(answer, one.fact.value)})
    return rows


def _without(model: SegmentModel, records: list[int]) -> SegmentModel:
    """A model with the same weights, whose memory has forgotten some records."""
    model = _alike(model)
    if records:
        model.forget(records)
    return model


def _texts(model: SegmentModel, fact: Fact, cfg: Told) -> list[str]:
    """What a question finds."""
    return [record.text for record in found_for(model, fact.question, cfg.recall)]


def _answers(model: SegmentModel, asked: Sequence[_Question], cfg: Told, read: bool) -> list[str]:
    """What a model answers to some questions, greedily."""
    prompts = [question_ids(model, one.fact.question, one.found) for one in asked]
    device, longest = device_of(model), max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts], device=device)

    def forget(module: Memory, part: Any) -> Any:
        if not isinstance(module, RecordKeeper):
            return part
        gone = [holds(module.records(part), one.gone)[row] for row, one in enumerate(asked)]
        return module.forget(part, torch.stack(gone))

    rows = model.select_rows(model.bank_state(), torch.zeros(len(asked), dtype=torch.long, device=device))
    state = model.map_memory(forget, rows)
    out = model.generate(
        ids, cfg.n_new, do_sample=False, state=state, read=read, write=False, mask=mask, eos_token_id=model.ends or None
    )
    return [said(model, tokens) for tokens in out[:, longest:].tolist()]


def says(answer: str, value: str) -> bool:
    """Whether an answer has a value as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) is not None


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition ``answered/<condition>`` and ``found/<condition>``, shares of questions, with their 95 %
        Wilson intervals ``<name>_low/...`` and ``<name>_high/...``, and ``n/<condition>``.
    """
    metrics: dict[str, float] = {}
    for condition in CONDITIONS:
        part = [row for row in rows if row["condition"] == condition]
        if not part:
            continue
        metrics[f"n/{condition}"] = len(part)
        for name, column in {"answered": "correct", "found": "found"}.items():
            right = sum(row[column] for row in part)
            low, high = wilson(right, len(part))
            metrics |= {f"{name}/{condition}": right / len(part)}
            metrics |= {f"{name}_low/{condition}": low, f"{name}_high/{condition}": high}
    return metrics


def plot(result: Result) -> dict[str, Figure]:
    """Questions answered under each condition."""
    names = [name for name in CONDITIONS if f"answered/{name}" in result.metrics]
    with style():
        figure = Figure(figsize=(7.5, 3.2))
        axes = figure.subplots()
        for y, name in enumerate(names):
            rate, low, high = (
                result.metrics[f"{part}/{name}"] for part in ("answered", "answered_low", "answered_high")
            )
            colour = {"on": "blue", "given": "sky"}.get(name, "orange")
            axes.barh(y, rate, height=0.6, color=PALETTE[colour])
            bounds = [[max(rate - low, 0)], [max(high - rate, 0)]]
            axes.errorbar(rate, y, xerr=bounds, color=PALETTE["black"], capsize=2, linewidth=1.0, clip_on=False)
        axes.set_yticks(range(len(names)), [CONDITIONS[name] for name in names])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
        axes.set(xlim=(0, 1), title="Told once, asked in other words in a fresh context")
        axes.set_xlabel(f"answered, with 95 % Wilson interval, n = {int(result.metrics['n/on'])}")
    return {"told": figure}
