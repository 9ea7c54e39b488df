"""LoCoMo by evidence: are the turns that answer a question among those that memory reads when it is asked?

A conversation of many sessions is told turn by turn, each in a context of its own with reads off. Then each question is
read in a fresh context, nothing is written, and turns are ranked by the weight that its tokens give to what memory
made of them, over all layers with memory. Recall at k is the share of a question's evidence that is among the first k,
so no answer has to be judged.

Beside it stand BM25 over the same turns, static embeddings if they are asked for, the ranks of another question of the
same conversation (a memory that reads the same turns whatever is asked is no better than that), and chance, k out of
all turns.

Source: Maharana et al., "Evaluating Very Long-Term Conversational Memory of LLM Agents", 2024. Its file is not shipped
(CC BY-NC 4.0): https://github.com/snap-research/LoCoMo, data/locomo10.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from memlm.analysis.style import PALETTE, style
from memlm.config import ConfigError
from memlm.evaluation.result import Result, Row, check_settings, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.files import from_home, parse_json
from memlm.memory.slots import Slots
from memlm.models.base import LanguageModel, placed
from memlm.retrieval.bm25 import Bm25
from memlm.statistics import interval

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

RANKERS = {
    "memory": "memory's reads",
    "bm25": "BM25",
    "static": "static embeddings",
    "other": "another question's reads",
    "chance": "chance",
}
"""What ranks turns, and how it is called."""

CATEGORIES = {1: "several turns", 2: "time", 3: "common knowledge", 4: "one turn", 5: "not answered"}
"""Kinds of questions by their number in the file."""

KS = (1, 5, 10)
"""Ranks up to which a turn counts as found."""

_TURN = re.compile(r"D(\d+):0*(\d+)")
_SESSION = re.compile(r"session_(\d+)")


@dataclass(frozen=True)
class Locomo:
    """Settings.

    Attributes:
        path: The file, ``locomo10.json``.
        n_conversation: Conversations that are told, the first ones; None for all.
        n_question: Questions of each that are asked, spread evenly over the file; None for all.
        embeddings: The package whose static embeddings rank turns too; None for none.

    Raises:
        ConfigError: If a setting cannot work.
    """

    path: str | None = None
    n_conversation: int | None = None
    n_question: int | None = None
    embeddings: Literal["wordllama"] | None = None

    def __post_init__(self) -> None:
        check_settings(self, {"n_conversation": 1, "n_question": 2})
        if self.embeddings not in (None, "wordllama"):
            raise ConfigError(f"locomo.embeddings must be wordllama, or null for none, got {self.embeddings!r}")


class Question(NamedTuple):
    """A question.

    Attributes:
        text: The question.
        category: Its kind, see `CATEGORIES`.
        evidence: Numbers of the turns that answer it.
    """

    text: str
    category: int
    evidence: tuple[int, ...]


class Conversation(NamedTuple):
    """A conversation.

    Attributes:
        turns: What is said, with the speaker before it, in order.
        questions: Those that name a turn as evidence.
        n_left_out: Questions that name none.
    """

    turns: list[str]
    questions: list[Question]
    n_left_out: int


def read_conversations(path: str | None) -> list[Conversation]:
    """The conversations of a file in the form of ``locomo10.json``.

    Raises:
        ConfigError: If there is none, or it has another form.
    """
    if path is None:
        raise ConfigError(
            "locomo.path is missing: give the file locomo10.json of https://github.com/snap-research/LoCoMo, "
            "which is not shipped"
        )
    try:
        content = parse_json(Path(from_home(path)).read_bytes())
        return [_conversation(part) for part in content]
    except FileNotFoundError as error:
        raise ConfigError(f"locomo.path: there is no file {path}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"locomo.path: {path} is not in the form of locomo10.json, a list of conversations with qa and sessions of "
            f"turns ({type(error).__name__}: {str(error)[:100]})"
        ) from error


def _conversation(part: Mapping[str, Any]) -> Conversation:
    sessions = {
        int(found[1]): turns
        for name, turns in part["conversation"].items()
        if (found := _SESSION.fullmatch(name)) and isinstance(turns, list)
    }
    turns: list[str] = []
    number: dict[tuple[int, int], int] = {}
    for session in sorted(sessions):
        for turn in sessions[session]:
            found = _TURN.fullmatch(turn["dia_id"])
            if found is None:
                raise ValueError(f"dia_id {turn['dia_id']!r}")
            number[int(found[1]), int(found[2])] = len(turns)
            shown = f" (shows {turn['blip_caption']})" if turn.get("blip_caption") else ""
            turns.append(f"{turn['speaker']}: {turn['text']}{shown}")
    questions = []
    for asked in part["qa"]:
        names = [(int(a), int(b)) for a, b in _TURN.findall(" ".join(asked["evidence"]))]
        evidence = tuple(sorted({number[name] for name in names if name in number}))
        questions.append(Question(asked["question"], int(asked["category"]), evidence))
    known = [question for question in questions if question.evidence]
    return Conversation(turns, known, len(questions) - len(known))


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Locomo,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure recall of evidence.

    Args:
        model: A language model; it is left as it was.
        data: Not looked at; the text is that of the file.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per ranker and question: ``conversation``, ``question``, ``category``, ``n_evidence``, and
        ``recall@1``, ``recall@5``, ``recall@10``. For metrics see `summarise`.

    Raises:
        ConfigError: If there is no such file, no memory of the model tells what its slots are made of, or the package
            of the embeddings is missing.
    """
    conversations = read_conversations(cfg.path)[: cfg.n_conversation]
    embed = None if cfg.embeddings is None else _static()
    modules: list[Any] = [one.module for one in placed(model) if isinstance(one.module, Slots)]
    if not any(module.places(module.init_state(1)) is not None for module in modules):
        has = ", ".join(model.memory) or "none"
        raise ConfigError(
            f"locomo ranks turns by what is read of them, and no memory of this model has slots made of single tokens "
            f"(memory: {has}): take one that does, such as ltm or knn"
        )
    rows: list[Row] = []
    with evaluating(model):
        for numbers in share.groups(len(conversations), 1):
            for i in numbers:
                rows += _measure(model, i, conversations[i], cfg.n_question, embed)
                if progress is not None:
                    progress((i + 1) / len(conversations))
    rows = share.join(rows)
    rows.sort(key=lambda row: (list(RANKERS).index(row["condition"]), row["conversation"], row["question"]))
    metrics = summarise(rows)
    metadata = {
        "settings": asdict(cfg) | {"path": None if cfg.path is None else Path(cfg.path).name},
        "n_conversation": len(conversations),
        "n_turn": sum(len(part.turns) for part in conversations),
        "n_left_out": sum(part.n_left_out for part in conversations),  # questions without evidence
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "headline": [
            {"label": f"evidence among the first {k}{of}, {label}", "metric": f"recall@{k}/{name}{suffix}"}
            | {"low": f"low@{k}/{name}{suffix}", "high": f"high@{k}/{name}{suffix}", "n": f"n{suffix}"}
            | {"percent": True, "better": "higher", "control": name != "memory"}
            | {"cell": [label, f"among {k}{of}"]}
            for suffix, of, ks in _parts(metrics)
            for k in ks
            for name, label in RANKERS.items()
            if f"recall@{k}/{name}{suffix}" in metrics
        ],
    }
    return Result("locomo", metrics, tuple(rows), metadata)


def _parts(metrics: Mapping[str, float]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Questions that are told of: end of the names of metrics, in words, and up to which ranks."""
    found = [(f"_{c}", f", {label}", KS[-1:]) for c, label in CATEGORIES.items() if f"n_{c}" in metrics]
    return [("", "", KS), *found]


def _static() -> Callable[[Sequence[str]], Tensor]:
    """Unit vectors (N, E) of texts, by static embeddings that come with a package."""
    try:
        import wordllama
    except ImportError as error:
        raise ConfigError(f"locomo.embeddings=wordllama needs that package: pip install wordllama ({error})") from error
    shipped = Path(wordllama.__file__).parent  # its tokenizer is found there only as if it was in the cache
    embeddings = wordllama.WordLlama.load(cache_dir=shipped, disable_download=True)
    return lambda texts: torch.from_numpy(embeddings.embed(list(texts), norm=True))


def _measure(
    model: LanguageModel,
    number: int,
    told: Conversation,
    n_question: int | None,
    embed: Callable[[Sequence[str]], Tensor] | None,
) -> list[Row]:
    """Rows of a conversation."""
    state, begins = _tell(model, told.turns)
    n = len(told.questions)
    step = 1 if n_question is None else max(n / n_question, 1)
    asked = [told.questions[int(i * step)] for i in range(n if n_question is None else min(n_question, n))]
    reads = [_read(model, state, question.text, begins) for question in asked]
    search = Bm25(told.turns)
    near = None if embed is None else embed([one.text for one in asked]) @ embed(told.turns).T  # (questions, turns)
    rows = []
    for i, question in enumerate(asked):
        scores = {
            "memory": reads[i],
            "bm25": torch.tensor(search.scores(question.text)),
            "other": reads[(i + len(asked) // 2) % len(asked)],
        }
        if near is not None:
            scores["static"] = near[i] + 1  # a cosine, so that none is below 0
        found = {name: _recall(score, question.evidence) for name, score in scores.items()}
        found["chance"] = [min(k / len(told.turns), 1.0) for k in KS]
        about = {"conversation": number, "question": i, "category": question.category}
        about |= {"n_evidence": len(question.evidence)}
        for name, recalls in found.items():
            rows.append({"condition": name} | about | {f"recall@{k}": r for k, r in zip(KS, recalls, strict=True)})
    return rows


def _tell(model: LanguageModel, turns: Sequence[str]) -> tuple[Any, Tensor]:
    """A state that was told each turn in a context of its own; and the place of each turn's first token."""
    state, begins, place = model.wipe(model.init_state(1)), [], 0
    device = model.head_weight.device
    for turn in turns:
        ids = torch.tensor([model.tokenizer.encode(f" {turn}")], device=device)
        begins.append(place)
        place += ids.shape[1]
        state = model.absorb(ids, state, read=False, donate=True)
        state = model.new_context(state, donate=True)
    return state, torch.tensor(begins)


def _read(model: LanguageModel, state: Any, question: str, begins: Tensor) -> Tensor:
    """By turn, the weight that the tokens of a question give to what memory made of it."""
    ids = model.tokenizer.encode(f" {question}")[-max(model.segment_len - 1, 1) :]
    out = model(torch.tensor([ids], device=model.head_weight.device), state=state, write=False, logits=False)
    total = torch.zeros(len(begins))
    for one in placed(model):
        places = one.module.places(state.memory[one.name][one.number]) if isinstance(one.module, Slots) else None
        for name in one.reads:
            read = out.reads.get(name)
            if places is None or read is None or read.slots is None or read.weights is None:
                continue
            slots, weights = read.slots[0].flatten().cpu(), read.weights[0].flatten().float().cpu()
            place = places[0].cpu()[slots.clamp(min=0)]
            there = (slots >= 0) & (place >= 0)
            turn = torch.searchsorted(begins, place[there], right=True) - 1
            total.index_add_(0, turn, weights[there])
    return total


def _recall(scores: Tensor, evidence: Sequence[int]) -> list[float]:
    """The share of the evidence among the first k turns, for each of `KS`; turns that score nothing are not found."""
    ranked = scores.argsort(descending=True, stable=True)
    order = ranked[scores[ranked] > 0].tolist()
    return [len(set(order[:k]) & set(evidence)) / len(evidence) for k in KS]


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each ranker and k ``recall@k/<ranker>``, the mean over questions, with ``low@k/...`` and ``high@k/...``, its
        95 % interval over questions, and ``n``; and the same for each category, as ``recall@k/<ranker>_<category>``.
    """
    metrics: dict[str, float] = {"n": sum(row["condition"] == "memory" for row in rows)}
    for category in (None, *CATEGORIES):
        suffix = "" if category is None else f"_{category}"
        for name in RANKERS:
            part = [row for row in rows if row["condition"] == name and category in (None, row["category"])]
            if not part:
                continue
            metrics[f"n{suffix}"] = len(part)
            for k in KS:
                mean, low, high = interval((row[f"recall@{k}"] for row in part), 0.0, 1.0)
                metrics |= {f"recall@{k}/{name}{suffix}": mean, f"low@{k}/{name}{suffix}": low}
                metrics |= {f"high@{k}/{name}{suffix}": high}
    return metrics


def plot(result: Result) -> dict[str, Figure]:
    """Recall at 10 by category, of memory and of what it is compared with."""
    groups = [("", "all")] + [(f"_{c}", label) for c, label in CATEGORIES.items() if f"n_{c}" in result.metrics]
    there = [name for name in RANKERS if f"recall@{KS[-1]}/{name}" in result.metrics]
    colors = dict(zip(RANKERS, (PALETTE[name] for name in ("blue", "orange", "green", "purple", "black")), strict=True))
    with style():
        figure = Figure(figsize=(8.5, 3.4))
        axes = figure.subplots()
        width = 0.8 / len(there)
        for i, name in enumerate(there):
            found = [result.metrics.get(f"recall@{KS[-1]}/{name}{suffix}", float("nan")) for suffix, _ in groups]
            left = [x + width * (i - (len(there) - 1) / 2) for x in range(len(groups))]
            axes.bar(left, found, width, label=RANKERS[name], color=colors[name])
        axes.set_xticks(range(len(groups)), [label for _, label in groups])
        axes.set(ylim=(0, 1), ylabel=f"evidence among the first {KS[-1]} turns", title="LoCoMo, by evidence")
        axes.legend()
    return {"locomo": figure}
