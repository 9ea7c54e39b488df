"""Held-out loss of whole documents, each read from its beginning with its own memory, with none, and with another's.

Every condition goes on with a state of its own, segment by segment: wiped before each segment; or with the memory that
another document of about the same length has at the same place.

Shapes: B documents side by side, S segments, T tokens per segment, L = S * T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.worth.kinds import common_words, kinds_of
from experiments.worth.settings import CONDITIONS, FIRST, KINDS, Worth
from memlm.config import ConfigError
from memlm.evaluation.headline import in_percent
from memlm.evaluation.recall.streams import go_on, hidden, start, swap
from memlm.evaluation.result import Result, Row, evaluating
from memlm.evaluation.share import ALONE, Share
from memlm.models.base import LanguageModel
from memlm.statistics import ratio_interval
from memlm.training.loss import token_nll

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

_WIDEST = math.log(10)  # half an interval in nats; if it is wider, perplexity is not even known to a factor of 10


def run(
    model: LanguageModel,
    data: TextData,
    cfg: Worth,
    progress: Callable[[float], None] | None = None,
    share: Share = ALONE,
) -> Result:
    """Measure the loss of the same tokens under each condition.

    Args:
        model: A language model; it is left as it was.
        data: What gives ``tokens(split)`` and a ``tokenizer``, such as `memlm.data.datamodule.TextData`.
        cfg: Settings.
        progress: Called now and then with the share of the work that is done, in 0..1.
        share: What of it this process does, if several run it together.

    Returns:
        One row per condition, document, place (of its part: the first 128 tokens, the next 128, the next 256, ...) and
        kind: ``n_token`` predicted and their mean ``nll`` in nats. For metrics see `summarise`.

    Raises:
        ConfigError: If the split has fewer than two documents with a token to predict.
    """
    corpus = data.tokens(cfg.split)
    every = [i for i in range(corpus.n_document) if len(corpus.document(i)) > 1]
    total = sum(min(len(corpus.document(i)), cfg.length or corpus.n_token) for i in every)
    chosen = every[:: -(-total // (cfg.limit or total))]
    if len(chosen) < 2:
        raise ConfigError(
            f"worth reads each document also with the memory of another, and the {cfg.split} text has "
            f"{len(every)} of more than one token ({len(chosen)} within worth.limit): use more text, or a higher limit"
        )
    documents = {i: torch.from_numpy(corpus.document(i)[: cfg.length].astype(np.int64)) for i in chosen}
    common = common_words(data.tokenizer, data.tokens("train"), cfg.common)
    groups = _groups(documents, cfg.n_row)
    mine = [i for part in share.groups(len(groups), 1) for i in part]
    sizes = [sum(len(documents[i]) for i in groups[g]) for g in mine]
    rows: list[Row] = []
    with evaluating(model):
        for k, g in enumerate(mine):
            before = sum(sizes[:k]) / sum(sizes)

            def tell(done: float, before: float = before, part: float = sizes[k] / sum(sizes)) -> None:
                if progress is not None:
                    progress(before + part * done)

            losses = _losses(model, [documents[i] for i in groups[g]], data.tokenizer.pad_id, tell)
            for row, i in enumerate(groups[g]):
                kinds = kinds_of(documents[i].numpy(), data.tokenizer, common, cfg.distance)
                rows += _rows(i, kinds, {name: loss[row] for name, loss in losses.items()})
    rows = share.join(rows)
    order = {name: k for k, name in enumerate(CONDITIONS)}
    rows.sort(key=lambda row: (order[row["condition"]], row["document"], row["place"], KINDS.index(row["kind"])))
    metrics = summarise(rows)
    metadata = {
        "settings": asdict(cfg),
        "n_token": int(metrics["n_token"]),
        "n_document": int(metrics["n_document"]),
        "segment_len": model.segment_len,
        "memories": list(model.memory.keys()),
        "says": says(metrics, cfg.distance),
        "headline": _headline(metrics, cfg.distance),
    }
    return Result("worth", metrics, tuple(rows), metadata)


def _groups(documents: dict[int, torch.Tensor], n_row: int) -> list[list[int]]:
    """Numbers of documents that are read side by side, two or more of about the same length, the longest first."""
    order = sorted(documents, key=lambda i: (-len(documents[i]), i))
    groups = [order[k : k + n_row] for k in range(0, len(order), n_row)]
    if len(groups[-1]) == 1:
        groups[-1] += [groups[-2].pop()]
    return groups


def _losses(
    model: LanguageModel, documents: Sequence[torch.Tensor], pad_id: int, progress: Callable[[float], None]
) -> dict[str, np.ndarray]:
    """Nats of each next token under each condition, (B, L); of what is no target, anything."""
    n, segment_len = len(documents), model.segment_len
    n_segment = -(-max(map(len, documents)) // segment_len)
    ids = torch.full((n, n_segment * segment_len + 1), pad_id)
    mask = torch.zeros(n, n_segment * segment_len, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document)], mask[row, : len(document)] = document, True
    # Without memory there is one condition.
    states = {name: start(model, n) for name in (CONDITIONS if len(model.memory) else ["on"])}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in states}
    for s in range(n_segment):
        here = slice(s * segment_len, (s + 1) * segment_len)
        targets = ids[:, here.start + 1 : here.stop + 1].to(model.head_weight.device)
        if "swapped" in states:
            states["swapped"] = swap(model, states["swapped"], states["on"], n)
            states["wiped"] = [model.wipe(state) for state in states["wiped"]]
        for name in states:
            # A memory that all rows share is read as it is by others.
            options: dict[str, Any] = {"read": name != "off", "write": name != "off", "donate": len(states[name]) == 1}
            if not mask[:, here].all():
                options["mask"] = mask[:, here]
            outputs = go_on(model, ids[:, here], states[name], **options)
            states[name] = [out.state for out in outputs]
            parts[name].append(token_nll(model, hidden(outputs), targets).double().cpu().numpy())
        progress((s + 1) / n_segment)
    found = {name: np.concatenate(part, axis=1) for name, part in parts.items()}
    return {name: found.get(name, found["on"]) for name in CONDITIONS}


def _rows(document: int, kinds: np.ndarray, losses: dict[str, np.ndarray]) -> list[Row]:
    """Rows of a document of n tokens, given the nats of each token after the first, at least (n - 1,)."""
    n = len(kinds) - 1
    places = np.array([0, *(FIRST * 2**k for k in range(max(n, FIRST).bit_length()))])
    part = np.searchsorted(places, np.arange(1, n + 1), side="right") - 1
    rows = []
    for place in np.unique(part):
        for kind, label in enumerate(KINDS):
            here = np.flatnonzero((part == place) & (kinds[1:] == kind))
            if len(here):
                rows += [
                    {"condition": name, "document": document, "place": int(places[place]), "kind": label}
                    | {"n_token": len(here), "nll": float(loss[here].mean())}
                    for name, loss in losses.items()
                ]
    return rows


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """Metrics of the rows.

    Returns:
        For each condition ``nll/<condition>`` and ``perplexity/<condition>`` over all tokens with 95 % intervals over
        documents (``nll_low/...``, ``perplexity_high/...``); ``n_token``, ``n_document``; ``difference/on-<condition>``
        in nats per token (below 0 memory helps) with its interval.

        ``worth/on``: the share of perplexity that memory saves, 1 - perplexity on / off, with ``worth_low/on`` and
        ``worth_high/on``; ``worth/wiped`` and ``worth/swapped`` are the same for these controls. Intervals of worth and
        perplexity are NaN where documents are too few for one: a single document, or ends farther away than a factor of
        10. All of that also ends in ``/<kind>`` and ``/from<place>``, for these tokens alone, with ``n_token/...``;
        ``share/<kind>`` is the share of tokens and ``gain/<kind>`` what these tokens contribute to the nats that are
        saved.
    """
    metrics = _of_part(rows, "")
    for kind in KINDS:
        metrics |= _of_part([row for row in rows if row["kind"] == kind], f"/{kind}")
        n = metrics.setdefault(f"n_token/{kind}", 0)
        metrics[f"share/{kind}"] = n / metrics["n_token"]
        saved = -metrics["difference/on-off"] * metrics["n_token"]
        gain = -metrics.get(f"difference/on-off/{kind}", 0.0) * n
        metrics[f"gain/{kind}"] = gain / saved if saved else math.nan
    for place in sorted({row["place"] for row in rows}):
        metrics |= _of_part([row for row in rows if row["place"] == place], f"/from{place}")
    return metrics


def _of_part(rows: Sequence[Row], suffix: str) -> dict[str, float]:
    """Metrics of some tokens."""
    if not rows:
        return {}
    documents = sorted({row["document"] for row in rows})
    index = {document: i for i, document in enumerate(documents)}
    nats = {name: np.zeros(len(documents)) for name in CONDITIONS}
    count = np.zeros(len(documents))
    for row in rows:
        nats[row["condition"]][index[row["document"]]] += row["nll"] * row["n_token"]
        count[index[row["document"]]] += row["n_token"] if row["condition"] == "on" else 0
    mean = {name: part / count for name, part in nats.items()}
    metrics = {f"n_token{suffix}": count.sum(), f"n_document{suffix}": len(documents)}

    def add(name: str, of: str, ends: Sequence[float]) -> None:
        low, value, high = sorted(ends) if not math.isnan(ends[0]) else ends
        metrics.update({f"{name}/{of}": value, f"{name}_low/{of}": low, f"{name}_high/{of}": high})

    for name in CONDITIONS:
        middle, half = ratio_interval(count, mean[name])
        add("nll", f"{name}{suffix}", _ends(middle, half))
        ends = _ends(middle, half, _WIDEST)
        add("perplexity", f"{name}{suffix}", [math.inf if end >= 700 else math.exp(end) for end in ends])
        if name != "on":
            middle, half = ratio_interval(count, mean["on"] - mean[name])
            add("difference", f"on-{name}{suffix}", _ends(middle, half))
        if name != "off":
            middle, half = ratio_interval(count, mean[name] - mean["off"])
            add("worth", f"{name}{suffix}", [1 - math.exp(end) for end in _ends(middle, half, _WIDEST)])
    return metrics


def _ends(middle: float, half: float, widest: float = math.inf) -> list[float]:
    """A value between the ends of its interval, which are NaN if half of that is wider."""
    half = half if half <= widest else math.nan
    return [middle - half, middle, middle + half]


def says(metrics: Mapping[str, float], distance: int) -> str:
    """What memory is for, in a sentence or two."""
    worth, low, high = (metrics[f"worth{end}/on"] for end in ("", "_low", "_high"))
    if math.isnan(low):
        return (
            f"What memory is worth cannot be told: {metrics['n_document']:.0f} documents are too few for an interval "
            f"({_percent(worth)} of perplexity saved)."
        )
    if not (low > 0 or high < 0):
        return f"Memory is worth nothing that can be told from 0 on this text ({_percent(worth)} of perplexity)."
    verb = "saves" if worth > 0 else "costs"
    words = {"far": f"names last seen more than {distance:,} tokens ago", "new": "names new to the document"}
    words["rest"] = "all else"
    sign = 1 if worth > 0 else -1
    most = max((k for k in KINDS if metrics[f"n_token/{k}"]), key=lambda kind: sign * metrics[f"worth/on/{kind}"])
    told = f"{_percent(abs(metrics[f'worth/on/{most}']))}, {_percent(metrics[f'share/{most}'])} of the tokens"
    return (
        f"Memory {verb} {_percent(abs(worth))} of perplexity, most on {words[most]} ({told}); "
        f"another document's saves {_percent(metrics['worth/swapped'])}."
    )


def _percent(share: float) -> str:
    return f"{in_percent(share):.1f} %"


def _headline(metrics: Mapping[str, float], distance: int) -> list[dict[str, Any]]:
    """The numbers put forward: what is saved of perplexity, in all and on names, and perplexity itself."""

    def entry(label: str, metric: str, control: bool, percent: bool, n: str = "n_token") -> dict[str, Any]:
        kind, _, of = metric.partition("/")
        ends = {"low": f"{kind}_low/{of}", "high": f"{kind}_high/{of}", "n": n, "percent": percent}
        return {
            "label": label,
            "metric": metric,
            **ends,
            "better": "higher" if percent else "lower",
            "control": control,
            "rate": False,  # below 0 it costs
        }

    entries = [
        entry("perplexity saved by memory", "worth/on", False, True),
        entry("by another document's", "worth/swapped", True, True),
        entry("by a wiped one", "worth/wiped", True, True),
    ]
    if metrics["n_token/far"]:
        label = f"on names last seen over {distance:,} tokens ago"
        entries += [
            entry(f"saved {label}", "worth/on/far", False, True, "n_token/far"),
            entry(f"by another document's {label}", "worth/swapped/far", True, True, "n_token/far"),
        ]
    for name, label in CONDITIONS.items():
        entries.append(entry(f"perplexity, {label}", f"perplexity/{name}", name != "on", False))
    return entries
