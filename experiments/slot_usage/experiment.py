"""Slot usage: which slots a memory really writes and reads, what they hold, and whether those it reads most matter.

Documents of held-out text with facts (as in `experiments.needle`) stream through the model segment by segment. Taken
from the weights of all reads and from what each write changes:

- *read weight* of a slot: the weight with which tokens read it, added up. *Write weight*: how far its contents moved,
  the length of the difference that the write of a segment makes, added up.
- *effective slots*: exp of the entropy of these weights over slots, of one document. Read evenly, all filled slots
  share each read; that is the even expectation which stands beside it. Of writes it is the number of filled slots.
- *slot-slot cosine* of the contents of filled slots, for all pairs of a sample.
- *ablation*: then every fact is asked in a fresh context, and the text goes on for a segment in another. The slots
  that these reads weighed most are forgotten, or as many filled slots drawn at random, and the same tokens are read
  again. If weights say what matters, the loss rises with the former and not with the latter.

An untrained model of the same configuration says what of this needs no learning. A model without memory has no slots,
and all its losses stay as they are.

Shapes: B documents, M slots of a bank, T tokens per segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.needle import Needle, draw
from experiments.slot_usage.settings import MODELS, PROBES, SHARES, USE, SlotUsage
from memlm.analysis.usage import banks, check_slots, read_weights
from memlm.assemble import untrained
from memlm.evaluation.recall import streams
from memlm.evaluation.recall.asking import question
from memlm.evaluation.recall.haystack import Document
from memlm.evaluation.result import Result, Row, evaluating
from memlm.models.base import LanguageModel
from memlm.statistics import effective, interval
from memlm.training.loss import token_nll

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

_N_BIN = 64  # bins of slots in the heat map


def run(
    model: LanguageModel, data: TextData, cfg: SlotUsage, progress: Callable[[float], None] | None = None
) -> Result:
    """Measure how slots are used.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and the ``maker`` of facts, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.

    Returns:
        Rows of three kinds, for each model. ``use``: one per bank and document, with `use`'s columns. ``ablation``: one
        per document, probe, ``share`` of slots forgotten and choice of ``slots`` (``top``, ``random``), with the
        loss before and its change in nats per token. ``bin``: of the trained model, per bank, segment (``token`` is
        its first) and bin of slots (``slot`` is its first), the share of the segment's ``read`` and ``write`` weight
        that falls on it, and of ``even`` reads of all filled slots, averaged over documents. For metrics see
        `summarise`.
    """
    check_slots(model, "slot_usage")
    told = Needle(n_document=cfg.n_document, n_fact=cfg.n_fact, distance=cfg.distance, split=cfg.split, seed=cfg.seed)
    documents, _, (length,) = draw(data, told, model.segment_len)
    rows: list[Row] = []
    for i, (name, measured) in enumerate(zip(MODELS, (model, untrained(model)), strict=True)):

        def share(done: float, i: int = i) -> None:
            if progress is not None:
                progress((i + done) / len(MODELS))

        with evaluating(measured):
            states, found = _stream(measured, documents, length, cfg, lambda done: share(0.6 * done))
            rows += [{"model": name, **row} for row in found if name == "trained" or row["kind"] != "bin"]
            ablated = _ablate(measured, documents, states, length, cfg, lambda done: share(0.6 + 0.4 * done))
            rows += [{"model": name, **row} for row in ablated]
    shapes = {
        label: module.filled(part).shape[1] for label, (module, part) in banks(model, model.init_state(1)).items()
    }
    metadata = {
        "settings": asdict(cfg),
        "seed": cfg.seed,
        "segment_len": model.segment_len,
        "n_token": length,
        "memories": list(model.memory.keys()),
        "n_slot": shapes,
    }
    metrics = summarise(rows)
    return Result(
        "slot_usage", metrics, tuple(rows), metadata | {"headline": _headline(metrics, shapes, cfg.shares[-1])}
    )


def _stream(
    model: LanguageModel, documents: Sequence[Document], length: int, cfg: SlotUsage, progress: Callable[[float], None]
) -> tuple[list[Any], list[Row]]:
    """The states after ``length`` tokens of the documents, and rows of the kinds ``use`` and ``bin``."""
    segment_len, n = model.segment_len, len(documents)
    states = streams.start(model, n)
    held = streams.of_banks(model, states, lambda module, part: module.contents(part))
    totals: dict[str, dict[str, Tensor]] = {}  # by bank: read, even and write weights so far, (B, M)
    shares: dict[str, dict[str, list[np.ndarray]]] = {label: {key: [] for key in SHARES} for label in held}
    tokens: dict[str, Tensor] = {}  # by bank: see `_per_token`
    for begin in range(0, length, segment_len):
        ids = torch.from_numpy(np.stack([document.tokens(begin, begin + segment_len) for document in documents])).long()
        filled = streams.of_banks(model, states, lambda module, part: module.filled(part).float())
        outputs = streams.go_on(model, ids, states)
        reads = streams.joined(
            [read_weights(model, out.reads, state) for out, state in zip(outputs, states, strict=True)]
        )
        for key in outputs[0].reads:
            label = key if key in held else key.partition("/")[0]
            found = _per_token(torch.cat([out.reads[key].weights for out in outputs]))
            tokens[label] = tokens.get(label, 0) + found
        states = [out.state for out in outputs]
        now = streams.of_banks(model, states, lambda module, part: module.contents(part))
        for label, read in reads.items():
            n_filled = filled[label].sum(dim=1, keepdim=True)
            even = read.sum(dim=1, keepdim=True) * filled[label] / n_filled.clamp(min=1)
            parts = {"read": read, "even": even, "write": (now[label] - held[label]).norm(dim=2)}
            known = totals.get(label)
            totals[label] = parts if known is None else {key: known[key] + part for key, part in parts.items()}
            for key, seen in shares[label].items():
                share = parts[key] / parts[key].sum(dim=1, keepdim=True).clamp(min=1e-12)
                seen.append(share.mean(dim=0).cpu().numpy())
        held = now
        progress((begin + segment_len) / length)
    states = [model.new_context(state) for state in states]
    slots = streams.of_banks(model, states, lambda module, part: module.filled(part))
    held = streams.of_banks(model, states, lambda module, part: module.contents(part))
    rows: list[Row] = []
    for label, total in totals.items():
        weights = {key: part.cpu().numpy() for key, part in total.items()}
        for i in range(n):
            entropy, n_read, weight, n_token = tokens[label][i].tolist()
            rows.append(
                {
                    "kind": "use", "bank": label, "document": i, "filled": float(slots[label][i].float().mean()),
                    "effective_reads": effective(weights["read"][i]), "even_reads": effective(weights["even"][i]),
                    "reads_per_token": math.exp(entropy / n_read) if n_read else 0.0, "read_weight": weight / n_token,
                    "effective_writes": effective(weights["write"][i]),
                    "even_writes": int((weights["write"][i] > 0).sum()),
                    **_cosines(held[label][i][slots[label][i]], cfg.n_pair, np.random.default_rng([cfg.seed, 0, i])),
                }
            )  # fmt: skip
        rows += _bins(label, shares[label], slots[label].any(dim=0).cpu().numpy(), segment_len)
    return states, rows


def _per_token(weights: Tensor) -> Tensor:
    """By document, (B, 4), of read weights (B, N, k).

    Sum of the tokens' entropies over slots, tokens that read at all, sum of the weights, tokens.
    """
    total = weights.sum(dim=2, keepdim=True)  # (B, N, 1)
    share = weights / total.clamp(min=1e-12)
    entropy = -torch.xlogy(share, share).sum(dim=2)  # (B, N)
    parts = (entropy, (total[..., 0] > 0).float(), total[..., 0], torch.ones_like(entropy))
    return torch.stack([part.double().sum(dim=1) for part in parts], dim=1).cpu()


def _cosines(contents: Tensor, n_pair: int, rng: np.random.Generator) -> dict[str, float]:
    """Cosine between the contents (n, d) of different slots: mean, and where 5 % and 95 % of the pairs lie."""
    chosen = np.sort(rng.choice(len(contents), size=min(n_pair, len(contents)), replace=False))
    unit = F.normalize(contents[torch.from_numpy(chosen).to(contents.device)].float(), dim=1)
    pairs = (unit @ unit.T).cpu().numpy()[np.triu_indices(len(unit), k=1)]
    if not len(pairs):
        return dict.fromkeys(("cosine", "cosine_p05", "cosine_p95"), math.nan)
    low, high = np.quantile(pairs, [0.05, 0.95])
    return {"cosine": float(pairs.mean(dtype=np.float64)), "cosine_p05": float(low), "cosine_p95": float(high)}


def _bins(label: str, shares: Mapping[str, list[np.ndarray]], filled: np.ndarray, segment_len: int) -> list[Row]:
    """Rows of the heat map, over the slots up to the last one that is filled."""
    n_used = int(filled.nonzero()[0].max(initial=0)) + 1
    edges = np.linspace(0, n_used, min(_N_BIN, n_used) + 1).astype(int)
    pooled = {key: [np.add.reduceat(part[:n_used], edges[:-1]) for part in parts] for key, parts in shares.items()}
    return [
        {
            "kind": "bin", "bank": label, "token": s * segment_len, "slot": int(edges[k]), "n_slot": n_used,
            "read": float(pooled["read"][s][k]), "even": float(pooled["even"][s][k]),
            "write": float(pooled["write"][s][k]),
        }
        for s in range(len(pooled["read"]))
        for k in range(len(edges) - 1)
    ]  # fmt: skip


def _ablate(
    model: LanguageModel,
    documents: Sequence[Document],
    states: list[Any],
    length: int,
    cfg: SlotUsage,
    progress: Callable[[float], None],
) -> list[Row]:
    """Rows of the kind ``ablation``."""
    ids = np.stack([document.tokens(length, length + model.segment_len) for document in documents])
    text = torch.from_numpy(ids).long()
    probes = {
        "answer": [question([document.facts[i] for document in documents]) for i in range(cfg.n_fact)],
        "text": [(text, torch.ones(len(text), text.shape[1] - 1, dtype=torch.bool))],
    }
    random = _random_order(model, states, cfg.seed)
    rows: list[Row] = []
    n_step, step = 2 * len(PROBES) * len(cfg.shares), 0
    for probe, asked in probes.items():
        before, read = _losses(model, asked, states)
        for share in cfg.shares:
            for slots, worth in (("top", read), ("random", random)):
                after, _ = _losses(model, asked, _forget(model, states, worth, share))
                rows += [
                    {
                        "kind": "ablation", "probe": probe, "document": i, "slots": slots, "share": share,
                        "nll": before[i], "delta_nll": after[i] - before[i],
                    }
                    for i in range(len(documents))
                ]  # fmt: skip
                step += 1
                progress(step / n_step)
    return rows


def _losses(
    model: LanguageModel, asked: Sequence[tuple[Tensor, Tensor]], states: list[Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """By document, the mean loss of the tokens that are asked for; by bank, the weight with which slots were read."""
    total = torch.zeros(len(asked[0][0]), dtype=torch.float64)
    count = total.clone()
    read: dict[str, Tensor] = {}
    for ids, wanted in asked:
        outputs = streams.go_on(model, ids, states, write=False)
        nll = token_nll(model, streams.hidden(outputs)[:, :-1], ids[:, 1:].to(model.head_weight.device)).cpu().double()
        total += (nll * wanted).sum(dim=1)
        count += wanted.sum(dim=1)
        masks = F.pad(wanted, (0, 1)).to(model.head_weight.device).chunk(len(states))  # the token before predicts
        parts = zip(outputs, states, masks, strict=True)
        found = streams.joined([read_weights(model, out.reads, state, mask) for out, state, mask in parts])
        read = {label: weight + read.get(label, 0) for label, weight in found.items()}
    return (total / count).tolist(), read


def _random_order(model: LanguageModel, states: list[Any], seed: int) -> dict[str, Tensor]:
    """By bank, a random number for each slot, (B, M)."""
    orders = {}
    for k, (label, filled) in enumerate(
        streams.of_banks(model, states, lambda module, part: module.filled(part)).items()
    ):
        numbers = [np.random.default_rng([seed, 1, k, i]).random(filled.shape[1]) for i in range(len(filled))]
        orders[label] = torch.from_numpy(np.stack(numbers)).to(filled.device)
    return orders


def _forget(model: LanguageModel, states: list[Any], worth: Mapping[str, Tensor], share: float) -> list[Any]:
    """The states without the filled slots that are worth most, a ``share`` of them (at least one) in every bank."""
    done, row = [], 0
    for state in states:
        masks = []
        for label, (module, part) in banks(model, state).items():
            filled = module.filled(part)
            mine = worth[label][row : row + len(filled)].masked_fill(~filled, -torch.inf)
            count = torch.ceil(filled.sum(dim=1, keepdim=True) * share)
            rank = mine.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            masks.append((rank < count) & filled)
        row += len(masks[0]) if masks else 0
        of = iter(masks)
        done.append(model.map_memory(lambda module, part: module.forget(part, next(of)), state))  # noqa: B023
    return done


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each bank ``<column>/<bank>`` of the columns of ``use`` (means over documents): ``filled`` (share of all
        slots), ``effective_reads`` and ``effective_writes`` beside ``even_reads`` and ``even_writes``,
        ``reads_per_token`` (effective slots of one token), ``read_weight`` (what a token reads of slots, the rest it
        reads of nothing), ``cosine`` with ``cosine_p05`` and ``cosine_p95``. ``ablation/<probe>/<slots>/<share>``, by
        how many nats per token the loss rises, and without ``/<share>`` for the largest; ``nll/<probe>``, the loss
        before. ``low/...`` and ``high/...`` are 95 % intervals over ``n_document`` documents; what ends with
        ``/untrained`` is of the untrained model.
    """
    metrics: dict[str, float] = {}
    if not rows:
        return metrics
    for model in MODELS:
        suffix = "" if model == "trained" else f"/{model}"
        mine = [row for row in rows if row["model"] == model]
        use = [row for row in mine if row["kind"] == "use"]
        for bank in dict.fromkeys(row["bank"] for row in use):
            for column in USE:
                part = [row[column] for row in use if row["bank"] == bank]
                metrics |= _interval(f"{column}/{bank}{suffix}", part, -1.0 if column.startswith("cosine") else 0.0)
        ablation = [row for row in mine if row["kind"] == "ablation"]
        shares = sorted({row["share"] for row in ablation})
        for probe in PROBES:
            for slots in ("top", "random"):
                for share in shares:
                    part = [r for r in ablation if (r["probe"], r["slots"], r["share"]) == (probe, slots, share)]
                    found = [row["delta_nll"] for row in part]
                    metrics |= _interval(f"ablation/{probe}/{slots}/{share:g}{suffix}", found)
                    if share == shares[-1]:
                        metrics |= _interval(f"ablation/{probe}/{slots}{suffix}", found)
                        metrics[f"nll/{probe}{suffix}"] = math.fsum(row["nll"] for row in part) / len(part)
        metrics["n_document"] = len({row["document"] for row in ablation})
    return metrics


def _interval(name: str, values: Sequence[float], least: float = -math.inf) -> dict[str, float]:
    """A mean over documents with its 95 % interval."""
    mean, low, high = interval(values, least)
    return {name: mean, f"low/{name}": low, f"high/{name}": high}


def _headline(metrics: Mapping[str, float], shapes: Mapping[str, int], share: float) -> list[dict[str, Any]]:
    """What the terminal and a comparison show first."""
    part = f"{100 * share:g} % of the slots (at least one)"
    lines: list[tuple[str, str, str | None, bool]] = []
    for suffix, who in (("", ""), ("/untrained", ", untrained")):
        for probe, what in (("answer", "answers"), ("text", "text")):
            for slots, which in (("top", "most read"), ("random", "random")):
                control = slots == "random" or bool(suffix)
                name = f"ablation/{probe}/{slots}{suffix}"
                lines.append((f"rise of the loss of {what} without {part}, {which}{who}", name, "higher", control))
        for bank, n_slot in shapes.items():
            of = f"{bank} ({n_slot:,} slots){who}"
            lines.append((f"effective slots of reads, {of}", f"effective_reads/{bank}{suffix}", None, bool(suffix)))
            lines.append((f"if reads were even, {of}", f"even_reads/{bank}{suffix}", None, True))
    return [
        {
            "label": label, "metric": metric, "low": f"low/{metric}", "high": f"high/{metric}", "n": "n_document",
            "percent": False, "better": better, "control": control,
        }
        for label, metric, better, control in lines
    ]  # fmt: skip
