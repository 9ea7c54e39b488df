"""The tasks of `continual`: their streams, their vocabulary, how one is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.continual.settings import N_SYMBOL, Continual
from memlm.evaluation.result import evaluating
from memlm.models.base import LanguageModel

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

TASKS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "prose": (None, {}),
    "facts": ("memlm.data.tasks.facts.Facts", {"items": 4}),
    "symbols": ("memlm.data.tasks.mqar.MQAR", {"n_pair": 16}),
    "stories": ("memlm.data.tasks.babi.Babi", {"items": 6, "tasks": [1], "stories": 1}),
}


"""By name, what makes a task's documents (None for text as it is), and its settings."""


_HELD_OUT = 1_000_003  # added to the seed of documents that are only asked


class Stream(NamedTuple):
    """One task.

    Attributes:
        train: Batches by step.
        held_out: Batches that are only asked.
    """

    train: Any
    held_out: list[Any]


def vocabulary(data: TextData, cfg: Continual) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of words and symbols, and with it the text of ``data`` (``train``, ``val``) and ``symbols``."""
    from memlm.data.corpora.symbols import Symbols
    from memlm.data.tokenizer import train_tokenizer
    from memlm.data.tokens import tokenize

    symbols = Symbols(N_SYMBOL)
    documents = [*data.corpus.documents("train"), *symbols.documents("train")]
    tokenizer = train_tokenizer("word", documents, cfg.n_word)
    texts = {split: tokenize(data.corpus, tokenizer, split, data.cache_dir) for split in ("train", "val")}
    return tokenizer, texts | {"symbols": tokenize(symbols, tokenizer, "train", data.cache_dir)}


def streams(tokenizer: Any, texts: Mapping[str, Any], cfg: Continual, segment_len: int, seed: int) -> dict[str, Stream]:
    """The tasks by name, as `vocabulary` tokenised them."""
    from memlm.config import instantiate
    from memlm.data.curriculum import Curriculum
    from memlm.data.stream import TrainingBatches, ValidationBatches

    found: dict[str, Stream] = {}
    for name in cfg.tasks:
        target, settings = TASKS[name]
        phase = {"steps": cfg.n_step, "n_row": cfg.n_row, "n_segment": cfg.n_segment}
        node = None if target is None else {"_target_": target}
        curriculum = Curriculum([phase if node is None else phase | {"task": settings}], node)
        own = texts["symbols" if name == "symbols" else "train"]
        task = None if node is None else instantiate(node, "continual.tasks", tokenizer=tokenizer, train=own)
        filler = texts["train" if node is None else "symbols"]

        def batches(seed: int, filler: Any = filler, curriculum: Any = curriculum, task: Any = task) -> TrainingBatches:
            return TrainingBatches(filler, segment_len, tokenizer.pad_id, curriculum, task, cfg.n_step, seed)

        if node is None:
            held = ValidationBatches(texts["val"], segment_len, tokenizer.pad_id, cfg.n_row, cfg.n_segment)
            asked = [held[i] for i in range(min(cfg.n_batch, len(held)))]
        else:
            other = batches(seed + _HELD_OUT)
            asked = [other[i] for i in range(min(cfg.n_batch, cfg.n_step))]
        found[name] = Stream(batches(seed), asked)
    return found


def measure(model: LanguageModel, batches: Sequence[Any], read: bool = True) -> tuple[float, float, int]:
    """Accuracy, nats per token and number of the tokens that ``batches`` are about: answers, or else all."""
    from torch.nn import functional as F

    right, nll, n, state = 0, 0.0, 0, None
    device = model.head_weight.device
    with evaluating(model):
        for batch in batches:
            flags = {
                name: None if flag is None else flag.to(device)
                for name, flag in (("reset", batch.reset), ("breaks", batch.breaks), ("mask", batch.mask))
            }
            state = None if batch.fresh else state
            out = model(batch.ids.to(device), state=state, read=read, logits=False, donate=True, **flags)
            state = out.state
            asked = (batch.answer if bool(batch.answer.any()) else batch.weight > 0).to(device)
            logits, target = model.head(out.hidden[asked]), batch.targets.to(device)[asked]
            nll += float(F.cross_entropy(logits, target, reduction="sum"))
            right += int((logits.argmax(dim=-1) == target).sum())
            n += len(target)
    return right / max(n, 1), nll / max(n, 1), n
