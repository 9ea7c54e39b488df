"""Modern facts: true sentences told once at inference, asked for in the same words and in others.

The facts of `facts.csv` are dealt out to documents of held-out text, in which each is told once. After at
least `distance` more tokens the local context is dropped, and each fact is asked for in a fresh context, with nothing
written: with the sentence up to its value (verbatim), with another statement (paraphrase) and with a question. An
answer counts when greedy decoding gives the whole value and the full stop.

A model may know a fact without being told. So each question is also asked with reads off, of a wiped memory, of
another document's memory, and of the memory of the same text without the facts (never shown). Each document has a twin
that tells the false value of every fact: what counts then is the false one, and the answer must follow what was told.
Facts whose value stands near a word of their cue in the training text, or that the model answers with reads off, are
flagged and left out of all metrics but those named ``_all``.

Beside it: how sharply a question finds something in memory, while facts are told and afterwards, for facts that were
told already and for those that were not yet, and the same for an untrained model.

Shapes: B rows, L tokens of a question, k slots read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.modern_facts.facts import COLUMNS, CUES, Item, Twins, check, lay_out, load, rows_of_file
from memlm.analysis.style import CONTROLS
from memlm.assemble import untrained
from memlm.config import ConfigError
from memlm.data.haystack import Haystack
from memlm.data.tasks.makers import Fact
from memlm.data.tasks.sentences import RELATIONS
from memlm.evaluation.recall.asking import answer
from memlm.evaluation.recall.haystack import Document
from memlm.evaluation.recall.rates import rate
from memlm.evaluation.recall.reading import device_of, is_shared, n_row_of, read
from memlm.evaluation.recall.settings import Telling
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.memory.slots import Slots
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

TWINS = {
    "counterfactual": "told the false value, answers it",
    "true_after_false": "told the false value, answers the true one",
    "false_after_true": "told the true value, answers the false one",
}


"""Conditions about the false values, and how they are called. Only the first is what a memory should do."""


_TRAINED = re.compile("|".join(
    re.escape(text).replace(re.escape("{}"), ".+") for relation in RELATIONS for text in (*relation.tell, *relation.ask)
))  # fmt: skip


"""Cues in a phrasing that training on natural facts may ask."""


CONDITIONS = {"on": "memory on", **CONTROLS, **TWINS}


"""All conditions, and how they are called."""


_WINDOW = 4  # segments between two looks


@dataclass(frozen=True, kw_only=True)
class ModernFacts(Telling):
    """Settings, beside those of `Telling`.

    Attributes:
        n_document: Documents that the facts are dealt out to; at least 2, as one is the other's control.
        distance: Fewest tokens between the end of any fact and the questions.
        n_row: Documents read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_document: int = 4
    distance: int = 4096
    n_row: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"distance": 0})


def run(
    model: LanguageModel,
    data: TextData,
    cfg: ModernFacts,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure recall of true facts and its controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and a ``tokenizer``, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per fact, condition and cue: ``document`` is where the fact was told, ``expected`` the value that
        counts, ``level`` whether natural facts for training are asked in that phrasing (``trained``, else
        ``new_phrasing``), ``flag`` why the fact is left out (``text``, ``known``, or empty), ``value_in_text`` whether
        the training text has the value at all, ``correct`` the outcome, ``nll`` that of the expected value in nats per
        token. For metrics see `summarise`. ``metadata["similarity"]`` holds the curves of `plot`.

    Raises:
        ConfigError: If the tokenizer can write fewer facts than there are documents.
    """
    items = load(data.tokenizer)
    if len(items) < cfg.n_document:
        raise ConfigError(
            f"the tokenizer can write {len(items)} of the modern facts, fewer than modern_facts.n_document "
            f"({cfg.n_document}): use data.tokenizer.kind=bpe"
        )
    in_text, near = check(items, data)
    order = np.random.default_rng([cfg.seed, 0]).permutation(len(items))
    shares = [[items[j] for j in order[i :: cfg.n_document]] for i in range(cfg.n_document)]
    text = data.tokens(cfg.split).tokens
    documents = [
        lay_out([cfg.seed, 1 + i], share, Haystack(text, [cfg.seed, i]), model.segment_len, cfg.facts_per_segment)
        for i, share in enumerate(shares)
    ]
    longest = max(twin.n_head for twins in documents for twin in twins)
    length = -(-(longest + cfg.distance) // model.segment_len) * model.segment_len
    watched = any(isinstance(modules[0], Slots) for modules in model.memory.values())
    blank = untrained(model) if hasattr(model, "config") and watched else None
    show = _shares(progress, cfg.n_document * (len(Twins._fields) + (blank is not None)))
    rows: list[Row] = []
    curves: list[dict[str, Any]] = []
    with evaluating(model):
        for numbers in share.groups(cfg.n_document, n_row_of(model, cfg.n_row)):
            told = [shares[i] for i in numbers]
            others = [shares[i - 1] for i in numbers]  # what the document before told: no other memory need be at hand
            for twin in Twins._fields:
                texts = [getattr(documents[i], twin) for i in numbers]
                if twin == "true" and watched:
                    state = _watch(model, texts, told, length, "trained", curves)
                else:
                    (state,) = read(model, texts, [length])
                for condition, memory, reads, asked, value in _questions(model, state, twin, told, others):
                    where = numbers if asked is told else [(i - 1) % cfg.n_document for i in numbers]
                    rows += _ask(model, memory, reads, asked, value, condition, where)
                show(len(numbers))
            if blank is not None:
                _watch(blank, [documents[i].true for i in numbers], told, length, "untrained", curves)
                show(len(numbers))
    rows, curves = share.join(rows), share.join(curves)
    known = {row["fact"] for row in rows if row["condition"] == "off" and row["correct"]}
    for row in rows:
        row["flag"] = "text" if row["fact"] in near else "known" if row["fact"] in known else ""
        row["value_in_text"] = row["fact"] in in_text
    rows.sort(key=lambda row: (list(CONDITIONS).index(row["condition"]), list(CUES).index(row["cue"]), row["fact"]))
    metrics = summarise(rows)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n": len(items),
        "n_file": len(rows_of_file()),
        "distances": [cfg.distance],
        "length": length,
        "segment_len": model.segment_len,
        "haystack_repetition": length / len(text),  # above 1 a document repeats its own text
        "memories": list(model.memory.keys()),
        "shared": is_shared(model),
        "similarity": _means(curves),
        "told_until": longest,
        "headline": [line for line in HEADLINE if line["metric"] in metrics],  # nothing is left if all is known
    }
    return Result("modern_facts", metrics, tuple(rows), metadata)


def _line(label: str, name: str, control: bool, better: str | None) -> dict[str, Any]:
    """A line of the headline about an exact-match rate."""
    kind, condition = name.split("/")
    return {
        "label": label,
        "metric": f"exact_match{kind}/{condition}",
        "low": f"low{kind}/{condition}",
        "high": f"high{kind}/{condition}",
        "n": f"n{kind}/{condition}",
        "percent": True,
        "better": better,
        "control": control,
    }


HEADLINE = [
    *(_line(f"{words}, memory on", f"{kind}/on", False, "higher") for kind, words in CUES.items()),
    *(_line(words, f"/{name}", True, "lower") for name, words in CONTROLS.items()),
    *(_line(f"{words}, best control", f"{kind}/control", True, "lower") for kind, words in list(CUES.items())[1:]),
    _line("other words, phrasing never trained", "_new_phrasing/on", False, "higher"),
    _line("other words, phrasing never trained, best control", "_new_phrasing/control", True, "lower"),
    _line(TWINS["counterfactual"], "/counterfactual", False, "higher"),
    _line(TWINS["true_after_false"], "/true_after_false", True, "lower"),
    _line(TWINS["false_after_true"], "/false_after_true", True, "lower"),
]


"""What is said of a result in one table."""


def _shares(progress: Callable[[float], None] | None, n: int) -> Callable[[int], None]:
    """Reports that so many more of ``n`` parts of the work are done."""
    done = 0

    def show(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done / n)

    return show


def _watch(
    model: LanguageModel,
    texts: Sequence[Document],
    told: Sequence[Sequence[Item]],
    length: int,
    name: str,
    curves: list[dict[str, Any]],
) -> Any:
    """Read documents, and after each window look for every fact; ``curves`` gets what was found.

    Returns:
        The memories at the end.
    """
    window = _WINDOW * model.segment_len
    places = [*range(window, length, window), length]
    for place, memory in zip(places, read(model, texts, places), strict=True):
        for i in range(max(map(len, told))):
            facts = [items[min(i, len(items) - 1)].true[""] for items in told]  # shares may differ by one fact
            for row, (top, mass) in enumerate(look(model, memory, facts)):
                if i < len(told[row]) and not texts[row].begins[i] < place < texts[row].end(i):  # not in its midst
                    seen = texts[row].end(i) <= place
                    curves.append({"model": name, "place": place, "told": seen, "top": top, "mass": mass})
    return memory


def level(cue: str) -> str:
    """Whether natural facts for training are asked in the phrasing of a cue: ``trained`` or ``new_phrasing``."""
    return "trained" if _TRAINED.fullmatch(cue) else "new_phrasing"


def look(model: LanguageModel, state: Any, facts: Sequence[Fact]) -> list[tuple[float, float]]:
    """How sharply each row of ``state`` is read where the answer to a fact would begin; nothing is written.

    Args:
        model: A language model with memory.
        state: Memories, with no local context.
        facts: One per row.

    Returns:
        For each fact the largest read weight and the sum of the read weights, at the end of its cue; means over
        memories and layers. Empty if no memory tells its weights, as those that are read in attention's softmax.
    """
    longest, device = max(len(fact.cue) for fact in facts), device_of(model)
    ids = torch.tensor([fact.cue + (0,) * (longest - len(fact.cue)) for fact in facts], device=device)  # (B, L)
    last = torch.tensor([len(fact.cue) - 1 for fact in facts], device=device)
    reads = model(ids, state=state, write=False, logits=False).reads.values()
    rows = torch.arange(len(facts), device=device)
    weights = [read.weights[rows, last].float() for read in reads if read.weights is not None]  # (B, k) each
    if not weights:
        return []
    top = torch.stack([weight.amax(dim=1) for weight in weights]).mean(dim=0)
    mass = torch.stack([weight.sum(dim=1) for weight in weights]).mean(dim=0)
    return list(zip(top.tolist(), mass.tolist(), strict=True))


def _means(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean over facts of what was found, by model, whether they were told already, and place."""
    groups: dict[tuple[str, bool, int], list[Mapping[str, Any]]] = {}
    for point in curves:
        groups.setdefault((point["model"], point["told"], point["place"]), []).append(point)
    return [
        {
            "model": model, "told": told, "place": place, "n": len(points),
            "top": math.fsum(point["top"] for point in points) / len(points),
            "mass": math.fsum(point["mass"] for point in points) / len(points),
        }
        for (model, told, place), points in sorted(groups.items())
    ]  # fmt: skip


_Question = tuple[str, Any, bool, Sequence[Sequence[Item]], str]


def _questions(
    model: LanguageModel, state: Any, twin: str, told: Sequence[Sequence[Item]], others: Sequence[Sequence[Item]]
) -> list[_Question]:
    """Conditions that the memory of one twin answers: name, memory, whether it is read, what is asked, which value."""
    if twin == "true":
        return [
            ("on", state, True, told, "true"),
            ("off", state, False, told, "true"),
            ("wiped", model.wipe(state), True, told, "true"),
            ("swapped", state, True, others, "true"),
            ("false_after_true", state, True, told, "false"),
        ]
    if twin == "false":
        return [("counterfactual", state, True, told, "false"), ("true_after_false", state, True, told, "true")]
    return [("unseen", state, True, told, "true")]


def _ask(
    model: LanguageModel,
    memory: Any,
    read: bool,
    asked: Sequence[Sequence[Item]],
    value: str,
    condition: str,
    documents: Sequence[int],
) -> list[Row]:
    """Ask each row of ``memory`` for its facts, with every cue."""
    rows: list[Row] = []
    for cue in CUES:
        for i in range(max(map(len, asked))):  # one question per row at a time, so that no bank has to be copied
            items = [share[min(i, len(share) - 1)] for share in asked]  # shares may differ by one fact
            facts = [getattr(item, value)[cue] for item in items]
            answers = answer(model, memory, facts, read)
            for row, (item, fact, (correct, nll)) in enumerate(zip(items, facts, answers, strict=True)):
                if i < len(asked[row]):
                    rows.append(
                        {
                            "condition": condition, "cue": cue, "fact": item.number, "document": documents[row],
                            "text": item.words["cue"], "level": level(item.words[COLUMNS[cue]]),
                            "expected": fact.value[0], "correct": correct, "nll": nll,
                        }
                    )  # fmt: skip
    return rows


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition ``exact_match/<condition>`` with ``low`` and ``high`` (95 % Wilson interval), ``n`` and
        ``nll``, of facts that are not flagged, asked in the same words; ``exact_match_paraphrase/...`` and
        ``exact_match_question/...`` of the other cues, which ``exact_match_trained/...`` and
        ``exact_match_new_phrasing/...`` have together, by level; ``.../control`` is the most successful of the four
        controls; ``exact_match_all/...`` of all facts, asked in the same words. ``n_flagged_text`` and
        ``n_flagged_known`` say why facts are left out, ``n_value_in_text`` how many values the training text has.
        ``chance`` is the rate of one who knows what a document told and guesses which fact is meant.
    """
    metrics: dict[str, float] = {}
    kept = [row for row in rows if not row["flag"]]
    groups = {cue: [row for row in kept if row["cue"] == cue] for cue in CUES}
    others = [row for row in kept if row["cue"]]
    groups |= {f"_{level}": [row for row in others if row["level"] == level] for level in ("trained", "new_phrasing")}
    groups["_all"] = [row for row in rows if row["cue"] == ""]
    for kind, group in groups.items():
        for condition in CONDITIONS:
            part = [row for row in group if row["condition"] == condition]
            if part:
                metrics |= rate(f"{kind}/{condition}", part)
        found = [name for name in CONTROLS if f"n{kind}/{name}" in metrics]
        if found:
            best = max(found, key=lambda name: metrics[f"exact_match{kind}/{name}"])
            for name in ("exact_match", "low", "high", "n", "nll"):
                metrics[f"{name}{kind}/control"] = metrics[f"{name}{kind}/{best}"]
    facts = {row["fact"]: row for row in rows}
    for reason in ("text", "known"):
        metrics[f"n_flagged_{reason}"] = sum(row["flag"] == reason for row in facts.values())
    metrics["n_value_in_text"] = sum(row["value_in_text"] for row in facts.values())
    told = [row["document"] for row in rows if row["condition"] == "on" and row["cue"] == ""]
    if told:
        metrics["chance"] = sum(1 / told.count(document) for document in told) / len(told)
    return metrics
