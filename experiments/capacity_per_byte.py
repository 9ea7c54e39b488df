"""Capacity per byte: how many pairs of characters a memory holds at 90 % exact match, and in how many bytes of state.

The documents are those of `memlm.data.tasks.kv`, where the definition and its source are, of another stream of random
numbers than those of training. Pairs are read segment by segment, each in a context of its own, so what is asked for in
a new context can be answered from memory alone. A question is answered if each of the four characters of the answer is
the likeliest behind those before it, as greedy generation would give it. Each question is asked of the memory as
the pairs left it, and writes nothing.

When a number of pairs is held, and the controls, are those of `experiments.associative_recall`: reads off, the memory
wiped, that of another document, and a key that was never told.

Shapes: B rows, T tokens per segment, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.associative_recall import LABELS, entries, plot, summarise
from memlm.config import ConfigError
from memlm.data.tasks.kv import LETTERS, QUESTION, KeyValues, Pairs
from memlm.evaluation.recall.reading import device_of, n_row_of
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.memory import state as states
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

__all__ = ["CapacityPerByte", "plot", "run"]

_STREAM = 2**31  # keeps documents apart from those of training, whose second number is a phase


@dataclass(frozen=True)
class CapacityPerByte:
    """Settings.

    Attributes:
        n_pair: Pairs told in a document, one measurement each; the largest is the headline.
        n_document: Documents of each number of pairs; at least 2, as one is the other's control.
        n_question: Pairs asked for in each document, at most all of them.
        seed: Of the documents.
        n_row: Documents read at once; the result does not depend on it. One at a time with a shared memory.

    Raises:
        ConfigError: If a setting cannot work.
    """

    n_pair: list[int] = field(default_factory=lambda: [4])
    n_document: int = 256
    n_question: int = 4
    seed: int = 0
    n_row: int = 64

    def __post_init__(self) -> None:
        check_settings(self, {"n_document": 2, "n_question": 1, "seed": 0, "n_row": 1})
        if not self.n_pair or min(self.n_pair) < 1 or sorted(set(self.n_pair)) != list(self.n_pair):
            raise ConfigError(f"capacity_per_byte.n_pair must be numbers from 1 in ascending order, got {self.n_pair}")


def run(
    model: LanguageModel,
    data: TextData,
    cfg: CapacityPerByte,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure exact match and its controls.

    Args:
        model: A language model; it is left as it was.
        data: What gives the ``task``, which must be a `KeyValues`.
        cfg: Settings.
        progress: Called now and then with the share of the documents that are read, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per question, by number of pairs, condition, document and pair: ``gap`` is the number of tokens from the
        pair to the question, ``correct`` the outcome, ``nll`` that of the answer in nats. In a ``swapped`` row
        ``document`` is where the pair was told, while the memory is that of the next document. For metrics see
        `experiments.associative_recall.summarise`; ``accuracy`` is the share of exact matches.

    Raises:
        ConfigError: If the model was not built for the task.
    """
    task = getattr(data, "task", None)
    if not isinstance(task, KeyValues):
        raise ConfigError(
            "capacity_per_byte needs a model that was trained on pairs of characters: train one with recipe=kv_capacity"
        )
    rows: list[Row] = []
    with evaluating(model):
        for i, n_pair in enumerate(cfg.n_pair):
            documents, asked = [], []
            for d in range(cfg.n_document):
                rng = np.random.default_rng([cfg.seed, _STREAM, n_pair, d])
                documents.append(task.draw(rng, n_pair, model.segment_len))
                asked.append(np.sort(rng.permutation(n_pair)[: cfg.n_question]))
            for numbers in share.groups(cfg.n_document, n_row_of(model, cfg.n_row)):
                rows += _read(model, task, documents, asked, numbers, cfg.seed)
                if progress is not None:
                    progress((i + (numbers[-1] + 1) / cfg.n_document) / len(cfg.n_pair))
    rows = share.join(rows)
    names = list(LABELS)
    rows.sort(key=lambda row: (row["n_pair"], names.index(row["condition"]), row["document"], row["pair"]))
    n_byte = states.n_byte(model.init_state(1).memory)
    metrics = summarise(rows, n_byte)
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "n_pairs": cfg.n_pair,
        "task": type(task).__name__,
        "state_bytes": n_byte,
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": entries(metrics, cfg.n_pair),
    }
    return Result("capacity_per_byte", metrics, tuple(rows), metadata)


def _read(
    model: LanguageModel,
    task: KeyValues,
    documents: Sequence[Pairs],
    asked: Sequence[np.ndarray],
    numbers: range,
    seed: int,
) -> list[Row]:
    """Read the documents ``numbers`` side by side, and ask for pairs of each under every condition."""
    device, segment_len = device_of(model), model.segment_len
    context = torch.from_numpy(np.stack([documents[i].context for i in numbers])).to(device)
    state = model.init_state(len(numbers))
    for start in range(0, context.shape[1], segment_len):
        state = model.absorb(context[:, start : start + segment_len], state, donate=True)
        state = model.new_context(state, donate=True)
    before = [(i - 1) % len(documents) for i in numbers]
    rows: list[Row] = []
    for turn in range(len(asked[0])):
        for condition in LABELS:
            told = before if condition == "swapped" else list(numbers)
            pairs = [int(asked[i][turn]) for i in told]
            keys = [documents[i].key[pair] for i, pair in zip(told, pairs, strict=True)]
            if condition == "unseen":
                keys = [
                    _never(documents[i].key, [seed, _STREAM + 1, i, pair]) for i, pair in zip(told, pairs, strict=True)
                ]
            values = [documents[i].value[pair] for i, pair in zip(told, pairs, strict=True)]
            question = np.stack([task.question(key) for key in keys])
            answer = torch.from_numpy(np.stack([task.answer(value) for value in values])).to(device)  # (B, 4)
            memory = model.wipe(state) if condition == "wiped" else state
            ids = torch.cat([torch.from_numpy(question).to(device), answer[:, :-1]], dim=1)
            out = model(ids, state=memory, read=condition != "off", write=False, keep_state=False)
            rows += _rows(out.logits[:, QUESTION - 1 :], answer, condition, documents, told, pairs)
    return rows


def _rows(
    logits: Tensor,
    answer: Tensor,
    condition: str,
    documents: Sequence[Pairs],
    told: Sequence[int],
    pairs: Sequence[int],
) -> list[Row]:
    """Rows of one question of each document; ``logits`` (B, 4, V) are those of the answer."""
    correct = (logits.argmax(dim=2) == answer).all(dim=1).tolist()
    nll = -logits.float().log_softmax(dim=2).gather(2, answer[..., None])[..., 0].sum(dim=1)
    return [
        {
            "condition": condition,
            "n_pair": len(documents[i].key),
            "document": i,
            "pair": pair,
            "gap": len(documents[i].context) - 7 * pair,
            "across": True,
            "correct": right,
            "nll": loss,
            "n_value": LETTERS**2,
        }
        for i, pair, right, loss in zip(told, pairs, correct, nll.tolist(), strict=True)
    ]


def _never(keys: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """A key that was not told, (2,)."""
    rng: Any = np.random.default_rng(seed)
    while True:
        key = rng.integers(LETTERS, size=2)
        if not (keys == key).all(axis=1).any():
            return key
