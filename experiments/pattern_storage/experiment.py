"""Pattern storage: can what was stored be found again, among other things that were stored?

Patterns are told once each in held-out text: planted facts, or passages of the same split that occur nowhere else in
it. When ever more of them are stored, the local context is dropped and some are looked for, in a fresh context each and
with writes off: given the cue of a pattern (how it begins), which of several candidates goes on with it? Candidates are
its own rest and the rests of other patterns of the same document that are stored as well, so that only what binds a
rest to its cue tells them apart.

The score of a candidate is the memory's own evidence for it: by how many nats memory raises the log-likelihood of the
candidate after the cue, NLL(reads off) - NLL(memory on). What the model itself finds likely cancels out, and any memory
has such a score, whatever its mechanism. Candidates whose scores agree within `TIE` nats share their ranks evenly, so
that one who knows nothing has a top-1 of 1 / n and an MRR of (1 + 1/2 + ... + 1/n) / n of n candidates. The
same is asked with reads off and of a wiped memory (where an empty memory contributes nothing these are chance by
construction), of another document's memory, and for patterns that nobody was told. Ranking by likelihood itself, on
and off, is reported beside it: the latter says how well a pattern can be guessed without memory.

Beside it stands IMM's "pattern similarity": the cosine between the contents of each filled slot and the mean hidden
state (last layer) of the segment just read, its mean and its maximum over slots, over time. The same of an untrained
model, and against the segment of another document, shows how little it says. Memories whose contents are not as wide
as the model have none.

Shapes: B documents, M slots of a bank, T tokens per segment, D model width, n candidates.

Source of the similarity: IMM (Implicit Memory Module), "Pattern Storage Test".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from experiments.needle import Needle, draw
from experiments.pattern_storage.passages import Passage, Passages
from memlm.analysis.style import CONTROLS
from memlm.analysis.usage import check_slots
from memlm.assemble import untrained
from memlm.config import ConfigError
from memlm.evaluation.recall import streams
from memlm.evaluation.recall.asking import question
from memlm.evaluation.recall.haystack import Document
from memlm.evaluation.recall.rates import CONDITIONS
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.models.base import LanguageModel
from memlm.statistics import interval, wilson
from memlm.training.loss import token_nll

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

MODELS = ("trained", "untrained")


TIE = 1e-3


"""Nats within which scores are equal: well above rounding, well below any evidence."""


@dataclass(frozen=True)
class PatternStorage:
    """Settings.

    Attributes:
        pattern: ``fact`` (planted facts) or ``passage`` (spans of held-out text).
        passage_len: Tokens of a passage; the first third is its cue.
        n_document: Documents, each with patterns of its own; at least 2, as one is the other's control.
        n_stored: Numbers of stored patterns at which some are looked for, ascending.
        n_probe: Patterns looked for each time, per document.
        n_candidate: Rests to choose from.
        patterns_per_segment: How densely patterns are told, on average.
        split: Where the text is from: ``val``, or ``test`` for final numbers.
        seed: Of patterns, gaps, passages and candidates.

    Raises:
        ConfigError: If a setting cannot work.
    """

    pattern: Literal["fact", "passage"] = "fact"
    passage_len: int = 9
    n_document: int = 8
    n_stored: list[int] = field(default_factory=lambda: [8, 24, 64])
    n_probe: int = 8
    n_candidate: int = 8
    patterns_per_segment: float = 2.0
    split: Literal["val", "test"] = "val"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pattern not in ("fact", "passage"):
            raise ConfigError(f"pattern_storage.pattern must be 'fact' or 'passage', got {self.pattern!r}")
        check_settings(self, {"passage_len": 3, "n_document": 2, "n_probe": 1, "n_candidate": 2, "seed": 0})
        if not self.n_stored or list(self.n_stored) != sorted(set(self.n_stored)):
            raise ConfigError(f"pattern_storage.n_stored must be ascending numbers, got {list(self.n_stored)}")
        if self.n_stored[0] < max(self.n_probe, self.n_candidate):
            raise ConfigError(
                f"pattern_storage.n_stored must begin with at least n_probe ({self.n_probe}) and n_candidate "
                f"({self.n_candidate}) patterns, got {self.n_stored[0]}"
            )
        if not self.patterns_per_segment > 0:
            raise ConfigError(f"pattern_storage.patterns_per_segment must be positive, got {self.patterns_per_segment}")


def run(
    model: LanguageModel, data: TextData, cfg: PatternStorage, progress: Callable[[float], None] | None = None
) -> Result:
    """Measure whether stored patterns are found again.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and, for facts, their ``maker``, such as
            `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.

    Returns:
        Rows of two kinds, for each model. ``probe``: one per condition, ``n_stored``, document and pattern, with
        ``told`` (patterns told by then), ``lag`` (tokens since it was told), ``top1`` and ``reciprocal_rank`` (ties
        shared evenly) by evidence, the same by likelihood for ``on`` and ``off``, ``evidence`` for the right candidate
        and the best other one in nats. In a ``swapped`` row ``document`` is where the pattern was told, while the
        memory is that of the next document. Of the untrained model only ``on``. ``similarity``: one per bank,
        document and segment. For metrics see `summarise`.
    """
    check_slots(model, "pattern_storage")
    source: Any = data if cfg.pattern == "fact" else Passages(data.tokens(cfg.split), cfg.passage_len)
    told = Needle(
        n_document=cfg.n_document, n_fact=cfg.n_stored[-1], distance=0, facts_per_segment=cfg.patterns_per_segment,
        split=cfg.split, seed=cfg.seed,
    )  # fmt: skip
    documents, unseen, _ = draw(source, told, model.segment_len)
    rows: list[Row] = []
    for i, (name, measured) in enumerate(zip(MODELS, (model, untrained(model)), strict=True)):
        conditions = CONDITIONS if name == "trained" else ("on",)
        with evaluating(measured):
            for done, found in _measure(measured, documents, unseen, cfg, conditions):
                rows += [{"model": name, **row} for row in found]
                if progress is not None:
                    progress(0.75 * i + (0.75 - 0.5 * i) * done)  # the untrained one has fewer conditions
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "width": model.head_weight.shape[1],
    }
    metrics = summarise(rows)
    return Result("pattern_storage", metrics, tuple(rows), metadata | {"headline": _headline(metrics)})


def _measure(
    model: LanguageModel,
    documents: Sequence[Document],
    unseen: Sequence[Sequence[Any]],
    cfg: PatternStorage,
    conditions: Sequence[str],
) -> Iterator[tuple[float, list[Row]]]:
    """Read the documents; after each segment the share of the work that is done, and new rows."""
    segment_len, n = model.segment_len, len(documents)
    ends = {k: max(document.end(k - 1) for document in documents) for k in cfg.n_stored}
    stops = {
        -(-end // segment_len) * segment_len: k for k, end in ends.items()
    }  # the most, where several fall together
    length = max(stops)
    states = streams.start(model, n)
    for begin in range(0, length, segment_len):
        end = begin + segment_len
        ids = torch.from_numpy(np.stack([document.tokens(begin, end) for document in documents])).long()
        outputs = streams.go_on(model, ids, states)
        states = [out.state for out in outputs]
        yield end / length, _similarity(model, states, streams.hidden(outputs).mean(dim=1), end)
        if end in stops:
            closed = [model.new_context(state) for state in states]
            yield end / length, _probe(model, closed, documents, unseen, stops[end], end, cfg, conditions)


def _similarity(model: LanguageModel, states: list[Any], hidden: torch.Tensor, place: int) -> list[Row]:
    """Cosine between slots and the mean hidden states (B, D) of the segments that end at ``place``."""
    contents = streams.of_banks(model, states, lambda module, part: module.contents(part).float())
    filled = streams.of_banks(model, states, lambda module, part: module.filled(part))
    unit, rows = F.normalize(hidden.float(), dim=1), []
    for label, held in contents.items():
        for i in range(len(held)):
            slots = F.normalize(held[i][filled[label][i]], dim=1)  # (M, d)
            if not len(slots) or slots.shape[1] != unit.shape[1]:
                continue
            own, other = (slots @ unit[j % len(unit)] for j in (i, i + 1))
            rows.append(
                {
                    "kind": "similarity", "bank": label, "document": i, "token": place,
                    "mean": float(own.mean()), "max": float(own.max()),
                    "mean_other": float(other.mean()), "max_other": float(other.max()),
                }
            )  # fmt: skip
    return rows


def _probe(
    model: LanguageModel,
    states: list[Any],
    documents: Sequence[Document],
    unseen: Sequence[Sequence[Any]],
    n_stored: int,
    place: int,
    cfg: PatternStorage,
    conditions: Sequence[str],
) -> list[Row]:
    """Look for patterns among the first ``n_stored`` of each document, whose memories are ``states``."""
    n_told = len(documents[0].facts)
    draws = [np.random.default_rng([cfg.seed, n_stored, i]) for i in range(len(documents))]
    wanted = [np.sort(rng.choice(n_stored, size=cfg.n_probe, replace=False)) for rng in draws]
    memories = dict.fromkeys(("on", "off", "unseen", "off unseen"), states)
    memories["wiped"] = [model.wipe(state) for state in states]
    memories["swapped"] = streams.swap(model, states, states, len(documents))
    told = [document.facts for document in documents]
    rows: list[Row] = []
    for p in range(cfg.n_probe):
        asked = [int(numbers[p]) for numbers in wanted]
        others = [
            rng.choice(np.delete(np.arange(n_stored), number), size=cfg.n_candidate - 1, replace=False)
            for rng, number in zip(draws, asked, strict=True)
        ]
        scores: dict[str, np.ndarray] = {}  # log-likelihood of the candidates, the right one first, (B, n)
        for condition in dict.fromkeys(("off", *(["off unseen"] if "unseen" in conditions else []), *conditions)):
            texts, off = (unseen if condition.endswith("unseen") else told), condition.startswith("off")
            found = []
            for choice in (asked, *np.stack(others, axis=1)):
                pairs = [Passage(text[i].cue, text[j].answer) for text, i, j in zip(texts, asked, choice, strict=True)]
                found.append(_log_likelihood(model, memories[condition], pairs, read=not off))
            scores[condition] = np.stack(found, axis=1)
        for condition in conditions:
            prior = scores["off unseen" if condition == "unseen" else "off"]
            evidence = scores[condition] - prior
            for i, document in enumerate(documents):
                row: Row = {
                    "kind": "probe", "condition": condition, "n_stored": n_stored,
                    "n_candidate": cfg.n_candidate, "document": i, "pattern": asked[i],
                    "told": sum(document.end(k) <= place for k in range(n_told)),
                    "lag": None if condition == "unseen" else place - document.end(asked[i]),
                }  # fmt: skip
                row["top1"], row["reciprocal_rank"] = rank(evidence[i])
                row["evidence"], row["best_other"] = float(evidence[i, 0]), float(evidence[i, 1:].max())
                if condition in ("on", "off"):
                    row["likelihood_top1"], row["likelihood_reciprocal_rank"] = rank(scores[condition][i])
                rows.append(row)
    return rows


def _log_likelihood(model: LanguageModel, states: list[Any], patterns: Sequence[Passage], read: bool) -> np.ndarray:
    """Of one rest after its cue for each document, in nats, (B,)."""
    ids, asked = question(patterns)
    out = streams.go_on(model, ids, states, read=read, write=False)
    nll = token_nll(model, streams.hidden(out)[:, :-1], ids[:, 1:].to(model.head_weight.device)).cpu().double()
    return -(nll * asked).sum(dim=1).numpy()


def rank(scores: np.ndarray) -> tuple[float, float]:
    """Whether the first of some scores is the best, and its reciprocal rank, with ties shared evenly.

    Args:
        scores: One per candidate, the right one first, (n,).

    Returns:
        Expected top-1 and reciprocal rank if candidates within `TIE` of the right one are put in random order.
    """
    better = int((scores[1:] > scores[0] + TIE).sum())
    equal = 1 + int((abs(scores[1:] - scores[0]) <= TIE).sum())
    return (1 / equal if better == 0 else 0.0), sum(1 / (better + k) for k in range(1, equal + 1)) / equal


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        ``top1/<condition>`` with ``low/...`` and ``high/...`` (95 % Wilson interval) and ``n/<condition>``;
        ``mrr/<condition>`` with ``low/...`` and ``high/...`` (95 % t interval over documents, cut at 0 and 1);
        ``evidence/<condition>``, mean nats for the right candidate. These are for the most patterns stored, and with
        ``/<n_stored>`` for each number. ``likelihood_top1/on`` and ``/off``, ``likelihood_mrr/...``.
        ``chance/top1`` and ``chance/mrr``. And
        ``similarity_mean``, ``similarity_max``, their ``_other`` (another document's segment) with ``low``, ``high``
        and ``sd`` (over segments and documents, as IMM gives it). What ends with ``/untrained`` is of the untrained
        model.
    """
    metrics: dict[str, float] = {}
    for model in MODELS:
        suffix = "" if model == "trained" else f"/{model}"
        probes = [row for row in rows if row["model"] == model and row["kind"] == "probe"]
        if probes:
            n = probes[0]["n_candidate"]
            metrics |= {"chance/top1": 1 / n, "chance/mrr": sum(1 / k for k in range(1, n + 1)) / n}
        numbers = sorted({row["n_stored"] for row in probes})
        for condition in CONDITIONS:
            for number in numbers:
                part = [row for row in probes if row["condition"] == condition and row["n_stored"] == number]
                if not part:
                    continue
                metrics |= rates_of(part, f"{condition}/{number}{suffix}")
                if number == numbers[-1]:
                    metrics |= rates_of(part, f"{condition}{suffix}")
        for name in ("mean", "max", "mean_other", "max_other"):
            found = [row for row in rows if row["model"] == model and row["kind"] == "similarity"]
            if found:
                key, values = f"similarity_{name}{suffix}", [row[name] for row in found]
                by_document = _by_document(found, name)
                mean, low, high = interval(by_document, -1.0, 1.0)
                metrics |= {key: mean, f"low/{key}": low, f"high/{key}": high}
                metrics |= {f"sd/{key}": float(np.std(values)), "n/similarity": len(by_document)}
    return metrics


def rates_of(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Metrics of one condition."""
    k, n = math.fsum(row["top1"] for row in rows), len(rows)
    low, high = wilson(min(k, n), n)
    mean, *ends = interval(_by_document(rows, "reciprocal_rank"), 0.0, 1.0)
    metrics = {
        f"top1/{name}": k / n, f"low/top1/{name}": low, f"high/top1/{name}": high, f"n/{name}": n,
        f"mrr/{name}": mean, f"low/mrr/{name}": ends[0], f"high/mrr/{name}": ends[1],
        f"evidence/{name}": math.fsum(row["evidence"] for row in rows) / n,
    }  # fmt: skip
    if "likelihood_top1" in rows[0]:
        metrics[f"likelihood_top1/{name}"] = math.fsum(row["likelihood_top1"] for row in rows) / n
        metrics[f"likelihood_mrr/{name}"] = math.fsum(row["likelihood_reciprocal_rank"] for row in rows) / n
    return metrics


def _by_document(rows: Sequence[Row], name: str) -> list[float]:
    """Mean of a column in each document."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row["document"], []).append(row[name])
    return [math.fsum(part) / len(part) for part in values.values()]


def _headline(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """What the terminal and a comparison show first."""
    names = {"on": "memory on", **CONTROLS, "on/untrained": "untrained model"}
    lines = [
        {
            "label": f"{what} of stored patterns, {label}", "metric": f"{name}/{condition}",
            "low": f"low/{name}/{condition}", "high": f"high/{name}/{condition}", "n": f"n/{condition}",
            "percent": name == "top1", "better": "higher", "control": condition != "on",
        }
        for name, what in (("top1", "top-1"), ("mrr", "MRR"))
        for condition, label in names.items()
        if f"{name}/{condition}" in metrics
    ]  # fmt: skip
    lines += [
        {
            "label": f"{what}, chance", "metric": f"chance/{name}", "low": None, "high": None, "n": None,
            "percent": name == "top1", "better": "higher", "control": True,
        }
        for name, what in (("top1", "top-1"), ("mrr", "MRR"))
    ]  # fmt: skip
    lines += [
        {
            "label": f"pattern similarity (cosine), {label}", "metric": name, "low": f"low/{name}",
            "high": f"high/{name}", "n": "n/similarity", "percent": False, "better": None, "control": True,
        }
        for name, label in (
            ("similarity_mean", "trained"), ("similarity_mean/untrained", "untrained"),
            ("similarity_mean_other", "another document's text"),
        )
        if name in metrics
    ]  # fmt: skip
    return lines
