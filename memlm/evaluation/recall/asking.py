"""What experiments on recall share: documents that tell facts, questions beside every control, and rates.

A document is text in which facts are told. When it is read, its local context is dropped, so that memory is all that
remains, and each fact is asked for in a fresh context of its own, with nothing written. An answer counts when the
likeliest token is right at every place, given the right ones before it: exactly then greedy decoding gives the whole
answer.

A rate says something only beside its controls, so each question is also asked with reads off, of a wiped memory and
of the memory of another document, and facts that nobody was told are asked of the memory as it is. A model whose empty
memory contributes nothing has the same answers off and wiped by construction. Without any memory all conditions run
all the same.

Shapes: B rows, L tokens of a question, V vocabulary, M slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memlm.data.tasks.makers import Fact
from memlm.evaluation.recall.haystack import Document
from memlm.evaluation.recall.reading import device_of, is_shared
from memlm.evaluation.result import Row
from memlm.models.base import LanguageModel

_Asked = list[tuple[int, Sequence[Fact]]]  # by row of a state: number of a document, and facts to ask for

Judge = Callable[[LanguageModel, Any, Sequence[Any], bool], list[Row]]
"""What of each answer goes into its row, ``correct`` and ``nll`` at least. It gets a model, a state, one question for
each of its rows, and whether memories are read."""


def exactly(model: LanguageModel, state: Any, facts: Sequence[Any], read: bool) -> list[Row]:
    """The `Judge` of recall: whether greedy decoding gives the whole answer."""
    return [{"correct": correct, "nll": nll} for correct, nll in answer(model, state, facts, read)]


def ask(
    model: LanguageModel,
    state: Any,
    documents: Sequence[Document],
    unseen: Sequence[Sequence[Fact]],
    numbers: Sequence[int],
    length: int,
    paraphrase: bool = False,
    strangers: Sequence[Sequence[Fact]] | None = None,
    judge: Judge = exactly,
) -> list[Row]:
    """Ask for every fact of the documents ``numbers``, under every condition.

    Args:
        model: A language model.
        state: The memories of these documents, one row each.
        documents: All documents, also those that are not in ``state``.
        unseen: For each document as many facts that nobody was told.
        numbers: Which document each row is.
        length: Tokens that were read.
        paraphrase: Whether to ask in other words than the fact was told in: fact i with its i-th paraphrase, in turn.
        strangers: For each document its facts as if they were of subjects that nobody was told of.
        judge: What is right.

    Returns:
        One row per condition, document and fact: ``text``, ``since`` (tokens between the fact's end and the question),
        ``depth`` (place of the fact in the text, 0 at its beginning, 1 right before the question), ``straddles``
        (whether it lies across a segment boundary), ``alike`` (facts told there that answer such a question: of the
        same relation, itself included), ``stored`` (whether a memory holds every token of its answer; None where
        memories do not tell what they hold, or share a bank with other text), ``correct``, ``nll`` (of the answer, nats
        per token). In a ``stranger`` row the fact is what was told, the question is about somebody else, and
        ``correct`` says that the fact is given all the same. In a ``swapped`` row ``document`` is where the fact was
        told, while the memory is that of the next document.
    """
    n_fact = len(documents[0].facts)
    wiped = model.wipe(state)
    own: _Asked = [(i, documents[i].facts) for i in numbers]
    # The memory of a document is asked for what the document before it told: no other memory need be at hand.
    others: _Asked = [((i - 1) % len(documents), documents[i - 1].facts) for i in numbers]
    never: _Asked = [(i, unseen[i]) for i in numbers]
    questions: dict[str, tuple[Any, bool, _Asked]] = {
        "on": (state, True, own),
        "off": (state, False, own),
        "wiped": (wiped, True, own),
        "swapped": (state, True, others),
        "unseen": (state, True, never),
    }
    if strangers is not None:
        questions["stranger"] = (state, True, [(i, strangers[i]) for i in numbers])
    alike = {i: Counter(map(_relation, (*documents[i].facts, *documents[i].others))) for i, _ in (*own, *others)}
    # A shared bank also holds what was written in training, whose places say nothing about these documents.
    held = [] if is_shared(model) else _held(model.places(state), len(numbers))
    rows: list[Row] = []
    for condition, (memory, reads, asked) in questions.items():
        for i in range(n_fact):  # one question per row at a time, so that no bank has to be copied
            other = [facts[i].paraphrases[i % len(facts[i].paraphrases)] if paraphrase else None for _, facts in asked]
            words = [facts[i] if p is None else facts[i].asked(p) for (_, facts), p in zip(asked, other, strict=True)]
            for row, ((number, facts), judged) in enumerate(
                zip(asked, judge(model, memory, words, reads), strict=True)
            ):
                document = None if condition == "unseen" else documents[number]
                n_token = length if document is None or document.n_token is None else document.n_token
                rows.append(
                    {
                        "condition": condition,
                        "document": number,
                        "fact": i,
                        "text": facts[i].text,
                        "since": None if document is None else n_token - document.end(i),
                        "depth": None if document is None else document.begins[i] / n_token,
                        "straddles": None if document is None else document.straddles(i, model.segment_len),
                        "level": None if (said := other[row]) is None else said.level,
                        "alike": None if document is None else alike[number][_relation(facts[i])],
                        "stored": _stored(documents[number], i, held[row]) if held and condition == "on" else None,
                        **judged,
                    }
                )
    return rows


def _relation(fact: Any) -> str:
    """What a fact says of its subject; facts of words, and those of tasks with their own, are all alike."""
    return getattr(fact, "relation", "")


def _held(places: Sequence[Tensor], n_row: int) -> list[list[set[int]]]:
    """For each row the places in its text that each memory holds; empty if memories do not tell."""
    return [[set(part[row].tolist()) for part in places] for row in range(n_row if places else 0)]


def _stored(document: Document, fact: int, held: Sequence[set[int]]) -> bool:
    """Whether one memory holds the slots that lead to every token of an answer: those of the tokens before them."""
    end = document.end(fact)
    needed = set(range(end - len(document.facts[fact].answer) - 1, end - 1))
    return any(needed <= places for places in held)


def question(facts: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Facts, or anything else with a ``cue`` and all ``tokens``, as rows of tokens.

    Returns:
        Token ids, (B, L), and which of the last L - 1 belong to the answer, (B, L - 1). What follows an answer cannot
        change it (models are causal), so short questions are filled up with anything.
    """
    longest = max(len(fact.tokens) for fact in facts)
    ids = torch.tensor([fact.tokens + (0,) * (longest - len(fact.tokens)) for fact in facts])
    begin = torch.tensor([len(fact.cue) for fact in facts])[:, None]
    end = torch.tensor([len(fact.tokens) for fact in facts])[:, None]
    place = torch.arange(1, longest)
    return ids, (place >= begin) & (place < end)


def answer(
    model: LanguageModel,
    state: Any,
    facts: Sequence[Fact],
    read: bool = True,
) -> list[tuple[bool, float]]:
    """Ask each row of ``state`` for a fact, given its cue; nothing is written.

    Args:
        model: A language model.
        state: Memories, with no local context.
        facts: One per row.
        read: Whether memories are read.

    Returns:
        For each fact whether greedy decoding gives the whole answer, and the answer's mean nats per token.
    """
    ids, asked = (part.to(device_of(model)) for part in question(facts))
    logits = model(ids, state=state, read=read, write=False).logits[:, :-1].float()  # (B, L - 1, V)
    targets = ids[:, 1:]
    nll = -logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]  # (B, L - 1)
    mean = torch.where(asked, nll, 0.0).sum(dim=1) / asked.sum(dim=1)
    correct = ((logits.argmax(dim=-1) == targets) | ~asked).all(dim=1)
    return list(zip(correct.tolist(), mean.tolist(), strict=True))


def say(model: LanguageModel, state: Any, cues: Sequence[Sequence[int]], n_new: int, read: bool) -> list[list[int]]:
    """What a model says by greedy decoding after each cue; nothing is written.

    Args:
        model: A language model.
        state: Memories, one row per cue.
        cues: Token ids of each.
        n_new: Tokens to say.
        read: Whether memories are read.
    """
    device = device_of(model)
    rows = [list(cue) for cue in cues]
    for _ in range(n_new):
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        logits = model(ids, state=state, read=read, write=False).logits
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        best = logits[torch.arange(len(rows), device=device), last].argmax(dim=-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, best, strict=True)]
    return [row[len(cue) :] for row, cue in zip(rows, cues, strict=True)]


SHARED = (
    "scope=shared: all rows write and read one memory, so what one user told may be told to any other; "
    "give each user a memory file of their own, or build the model with scope=sequence"
)


"""What to know of a memory that all rows share, before it is used."""
