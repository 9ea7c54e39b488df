"""MemoRAG: do clues that memory drafts let a retriever find what a question does not name?

Source: H. Qian et al., "MemoRAG: moving towards next-gen RAG via memory-inspired knowledge discovery" (2024,
2409.05591). A memory has read a whole document and drafts clues for a question, a retriever finds passages by question
and clues, and the answer is made from these passages alone. Here all of it can be checked without a judge: a document
tells chains of two facts, ``a is b`` in one place and ``b is c`` in another, and a question gives a and wants c. The
passage of the second fact shares no word with the question. Only b leads there, which has to be drafted.

A draft is what the model says after a, in a fresh context, as many tokens as the first fact has there. Passages are
windows of the document's tokens. The answer is made by the same model, of which a wiped memory reads the passages
found, each in a context of its own: it says what a is, and then what that is.

Passages are ranked by BM25 with question and draft; by the reads of memory while it reads question and draft, where
slots are made of single tokens; and, as controls, by BM25 with the question alone, and with drafts made with reads off,
by a wiped memory and by that of another document. With the right clue it is the most that a draft can do.

Shapes: B documents side by side, P tokens of a passage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from memlm.analysis.style import PALETTE, style
from memlm.config import ConfigError
from memlm.data.haystack import Haystack
from memlm.data.tasks.makers import Fact
from memlm.evaluation.recall.asking import say
from memlm.evaluation.recall.haystack import Document, tell
from memlm.evaluation.recall.reading import device_of, is_shared, visit
from memlm.evaluation.recall.settings import Telling
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.memory.slots import Slots
from memlm.models.base import LanguageModel, placed
from memlm.retrieval.bm25 import Bm25
from memlm.statistics import wilson

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

RETRIEVERS = {
    "clues": "memory's clues",
    "reads": "memory's reads",
    "question": "the question alone",
    "off": "clues with reads off",
    "wiped": "a wiped memory's clues",
    "swapped": "another document's clues",
    "right": "the right clue",
}
"""What passages are found by, and how it is called."""


@dataclass(frozen=True, kw_only=True)
class Memorag(Telling):
    """Settings, beside those of `Telling`.

    Attributes:
        n_question: Chains told and asked for per document.
        distance: Fewest tokens between the last fact and the questions.
        passage_len: Tokens of a passage. A passage begins every half of that.
        k: Passages that are found and read.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_question: int = 8
    distance: int = 4096
    passage_len: int = 96
    k: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"n_question": 1, "distance": 0, "passage_len": 2, "k": 1})


class Chain(NamedTuple):
    """A question.

    Attributes:
        first: The fact that it names.
        second: The fact that answers; its name is the value of the first.
        place: Where the second begins in the document.
    """

    first: Fact
    second: Fact
    place: int


class Passages:
    """Windows of a document, to be searched.

    Args:
        tokens: Token ids of the document, (N,).
        length: Tokens of a window.
        decode: Makes text of token ids.
    """

    def __init__(self, tokens: np.ndarray, length: int, decode: Callable[[list[int]], str]) -> None:
        last = max(len(tokens) - length, 0)
        self.begins = np.array(sorted({*range(0, last, max(length // 2, 1)), last}))
        self.length = length
        self.tokens = [tokens[begin : begin + length] for begin in self.begins]
        self._search = Bm25([decode(part.tolist()) for part in self.tokens])

    def by_words(self, text: str) -> np.ndarray:
        """The score of each passage for a text."""
        return np.array(self._search.scores(text))

    def by_places(self, place: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The score of each passage where tokens at some places have weights."""
        inside = (place >= self.begins[:, None]) & (place < self.begins[:, None] + self.length)
        return (inside * weight).sum(axis=1)

    def best(self, scores: np.ndarray, k: int) -> list[int]:
        """The first ``k`` passages, best first; those that score nothing are not found."""
        order = np.argsort(-scores, kind="stable")[:k]
        return [int(i) for i in order if scores[i] > 0]

    def hold(self, begin: int, end: int) -> set[int]:
        """The passages with all of a part of the document."""
        return set(np.flatnonzero((self.begins <= begin) & (end <= self.begins + self.length)).tolist())


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Memorag,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure which passages are found, and what is answered from them.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)``, the ``maker`` of facts and a ``tokenizer``.
        cfg: Settings.
        progress: Called now and then with the share of the text that is read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per condition, document and question: ``drafted`` (whether the draft is right), ``found`` (whether a
        passage with all of the second fact is among the first k) and ``answered``. The condition ``memory`` has no
        passages: memory itself says what a is, and then what that is. For metrics see `summarise`.

    Raises:
        ConfigError: If passages are too short for a fact, or rows share a memory.
    """
    if is_shared(model):
        raise ConfigError("memorag reads the passages of each document into a memory of its own: use scope=sequence")
    documents, chains, length = draw(data, cfg, model.segment_len)
    most = max(len(chain.second.tokens) for part in chains for chain in part)
    if cfg.passage_len < 2 * most:
        raise ConfigError(
            f"memorag.passage_len must be at least {2 * most}, twice the longest fact, so that some passage has all of "
            f"each; got {cfg.passage_len}"
        )
    rows: list[Row] = []
    with evaluating(model):
        for numbers, _, state in visit(model, documents, [length], cfg.n_row, progress, share):
            passages = {
                i: Passages(documents[i].tokens(0, length), cfg.passage_len, data.tokenizer.decode)
                for i in {*numbers, *((i - 1) % len(documents) for i in numbers)}
            }
            for question in range(cfg.n_question):
                asked = _Asked(model, state, cfg, data.tokenizer, passages, chains, numbers, question)
                rows += asked.rows()
    rows = share.join(rows)
    order = {name: i for i, name in enumerate([*RETRIEVERS, "memory"])}
    rows.sort(key=lambda row: (order[row["condition"]], row["document"], row["question"]))
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "length": length,
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": _headline(rows, cfg.k),
    }
    return Result("memorag", summarise(rows), tuple(rows), metadata)


def draw(data: TextData, cfg: Memorag, segment_len: int) -> tuple[list[Document], list[list[Chain]], int]:
    """Documents, the chains that each tells, and their length in tokens, whole segments."""
    n = cfg.n_document * cfg.n_question
    drawn = data.maker.draw(np.random.default_rng([cfg.seed, 0]), 2 * n, "evaluation")
    says = len(data.tokenizer.encode(" is"))
    first = drawn[:n]
    second = [
        other._replace(name=fact.value, cue=fact.answer[says:]) for fact, other in zip(first, drawn[n:], strict=True)
    ]
    documents, chains = [], []
    for i in range(cfg.n_document):
        part = slice(i * cfg.n_question, (i + 1) * cfg.n_question)
        taken = sum(len(fact.tokens) for fact in (*first[part], *second[part]))
        gap = segment_len / cfg.facts_per_segment - taken / (2 * cfg.n_question)
        haystack = Haystack(data.tokens(cfg.split).tokens, [cfg.seed, i])
        rng = np.random.default_rng([cfg.seed, 1 + i])
        document = tell(rng, second[part], first[part], haystack, segment_len, gap, crossing=False)
        documents.append(document)
        chains.append([Chain(*chain) for chain in zip(first[part], second[part], document.begins, strict=True)])
    longest = max(document.n_head for document in documents) + cfg.distance
    return documents, chains, -(-longest // segment_len) * segment_len


class _Asked:
    """One question of each document, under every condition.

    The memory of a document is also asked what the document before it told: no other memory need be at hand.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: Any,
        cfg: Memorag,
        tokenizer: Any,
        passages: Mapping[int, Passages],
        chains: Sequence[Sequence[Chain]],
        numbers: Sequence[int],
        question: int,
    ) -> None:
        self.model, self.state, self.cfg, self.tokenizer = model, state, cfg, tokenizer
        self.passages, self.question, self.numbers = passages, question, list(numbers)
        self.chains = {i: chains[i][question] for i in passages}
        self.says = len(tokenizer.encode(" is"))
        self.before = [(i - 1) % len(chains) for i in numbers]

    def rows(self) -> list[Row]:
        """What comes of all conditions."""
        model, wiped = self.model, self.model.wipe(self.state)
        own = self.said(self.state, self.numbers)
        drafts: dict[str, list[Sequence[int]]] = {
            "clues": own,
            "question": [()] * len(own),
            "off": self.said(self.state, self.numbers, read=False),
            "wiped": self.said(wiped, self.numbers),
            "swapped": self.said(self.state, self.before),
            "right": [self.chains[i].first.answer for i in self.numbers],
        }
        rows = []
        for name, said in drafts.items():
            asked = self.before if name == "swapped" else self.numbers
            scores = [self.passages[i].by_words(self.words(i, draft)) for i, draft in zip(asked, said, strict=True)]
            rows += self.outcome(name, asked, said, scores)
        if any(isinstance(one.module, Slots) and one.module.places(one.module.init_state(1)) is not None
               for one in placed(model)):  # fmt: skip
            rows += self.outcome("reads", self.numbers, own, self.by_reads(own))
        for i, draft, answer in zip(self.numbers, own, self.answers(self.state, self.numbers), strict=True):
            rows.append(self.row("memory", i, draft, None, answer))
        return rows

    def words(self, i: int, draft: Sequence[int]) -> str:
        """What a retriever is given: the question, and a draft without what only links them."""
        return self.tokenizer.decode([*self.chains[i].first.cue, *draft[self.says :]])

    def said(self, state: Any, asked: Sequence[int], read: bool = True) -> list[Sequence[int]]:
        """What is drafted for the questions of documents."""
        chains = [self.chains[i] for i in asked]
        n_new = max(len(chain.first.answer) for chain in chains)
        said = say(self.model, state, [chain.first.cue for chain in chains], n_new, read)
        return [tuple(part[: len(chain.first.answer)]) for part, chain in zip(said, chains, strict=True)]

    def answers(self, state: Any, asked: Sequence[int]) -> list[bool]:
        """Whether memories say what the first name is, and then of that the right thing."""
        chains = [self.chains[i] for i in asked]
        names = [part[self.says :] for part in self.said(state, asked)]
        n_new = max(len(chain.second.answer) for chain in chains)
        said = say(self.model, state, names, n_new, True)
        return [
            tuple(part[: len(chain.second.answer)]) == chain.second.answer
            for part, chain in zip(said, chains, strict=True)
        ]

    def outcome(
        self, name: str, asked: Sequence[int], drafts: Sequence[Sequence[int]], scores: Sequence[np.ndarray]
    ) -> list[Row]:
        """Rows of one retriever: its first passages are read into a wiped memory, which is asked."""
        cfg, model, device = self.cfg, self.model, device_of(self.model)
        best = [self.passages[i].best(score, cfg.k) for i, score in zip(asked, scores, strict=True)]
        state = model.wipe(model.init_state(len(asked)))
        for rank in reversed(range(max(map(len, best)))):  # the best is read last
            mask = torch.tensor([[rank < len(found)] for found in best]).expand(-1, cfg.passage_len)
            parts = [
                self.passages[i].tokens[found[rank] if rank < len(found) else 0]
                for i, found in zip(asked, best, strict=True)
            ]
            ids = torch.from_numpy(np.stack(parts)).long()
            state = model.new_context(model.absorb(ids.to(device), state, mask=mask.to(device)))
        answers = self.answers(state, asked)
        return [self.row(name, *each) for each in zip(asked, drafts, best, answers, strict=True)]

    def row(self, name: str, i: int, draft: Sequence[int], best: list[int] | None, answered: bool) -> Row:
        """A row."""
        chain = self.chains[i]
        holds = self.passages[i].hold(chain.place, chain.place + len(chain.second.tokens))
        return {
            "condition": name,
            "document": i,
            "question": self.question,
            "text": chain.first.text,
            "drafted": tuple(draft) == chain.first.answer,
            "found": None if best is None else bool(holds & set(best)),
            "answered": answered,
        }

    def by_reads(self, drafts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """By document, the weight that memory gives to each passage while it reads question and draft."""
        scores = []
        for row, (i, draft) in enumerate(zip(self.numbers, drafts, strict=True)):
            state = self.model.select_rows(self.state, torch.tensor([row], device=device_of(self.model)))
            ids = torch.tensor([[*self.chains[i].first.cue, *draft]], device=device_of(self.model))
            out = self.model(ids, state=state, write=False, logits=False)
            total = np.zeros(len(self.passages[i].begins))
            for one in placed(self.model):
                places = (
                    one.module.places(state.memory[one.name][one.number]) if isinstance(one.module, Slots) else None
                )
                for read in (out.reads.get(name) for name in one.reads):
                    if places is None or read is None or read.slots is None or read.weights is None:
                        continue
                    slots, weights = read.slots[0].flatten(), read.weights[0].flatten().float()
                    place = places[0][slots.clamp(min=0)].where(slots >= 0, -1)
                    total += self.passages[i].by_places(place.cpu().numpy(), weights.cpu().numpy())
            scores.append(total)
        return scores


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition ``drafted/<condition>``, ``found/<condition>`` and ``answered/<condition>``, shares of
        questions, with their 95 % Wilson intervals ``<name>_low/...`` and ``<name>_high/...``; and ``n``.
    """
    metrics: dict[str, float] = {"n": sum(row["condition"] == "memory" for row in rows)}
    for condition in (*RETRIEVERS, "memory"):
        for name in ("drafted", "found", "answered"):
            part = [row[name] for row in rows if row["condition"] == condition and row[name] is not None]
            if part:
                low, high = wilson(sum(part), len(part))
                metrics |= {f"{name}/{condition}": sum(part) / len(part)}
                metrics |= {f"{name}_low/{condition}": low, f"{name}_high/{condition}": high}
    return metrics


def _headline(rows: Sequence[Row], k: int) -> list[dict[str, Any]]:
    """What is found and answered by each retriever."""
    known = {row["condition"] for row in rows}
    by = [(name, f"by {label}") for name, label in RETRIEVERS.items() if name in known]
    shown = [(f"passage found among {k}", label, "found", name) for name, label in by]
    shown += [("answered from passages found", label, "answered", name) for name, label in by]
    shown.append(("answered", "from memory alone", "answered", "memory"))
    return [
        {"label": f"{what} {label}" if name == "memory" else f"{what}, {label}", "metric": f"{kind}/{name}", "n": "n"}
        | {"low": f"{kind}_low/{name}", "high": f"{kind}_high/{name}", "percent": True, "better": "higher"}
        | {
            "control": name not in ("clues", "reads", "memory"),
            "cell": [label, what.removesuffix(" from passages found")],
        }
        for what, label, kind, name in shown
    ]


def plot(result: Result) -> dict[str, Figure]:
    """Passages found and questions answered, by what they were found by."""
    names = [name for name in RETRIEVERS if f"found/{name}" in result.metrics]
    with style():
        figure = Figure(figsize=(8.5, 3.4))
        axes = figure.subplots()
        for i, (kind, color) in enumerate({"found": "blue", "answered": "orange"}.items()):
            found = [result.metrics[f"{kind}/{name}"] for name in names]
            axes.bar([x + 0.4 * (i - 0.5) for x in range(len(names))], found, 0.4, label=kind, color=PALETTE[color])
        axes.set_xticks(range(len(names)), [RETRIEVERS[name].replace(" ", "\n", 1) for name in names])
        axes.set(ylim=(0, 1), ylabel="share of questions", title="What leads to the passage that answers")
        axes.legend()
    return {"memorag": figure}


def applies(data: TextData) -> bool:
    """Whether facts are planted in the text that a model is trained on."""
    return data.curriculum.has_task
