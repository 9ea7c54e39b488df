"""The report about a model's memory: what it costs, how it fills, what it holds, and what a text reads of it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch

from memlm.analysis.efficiency import Efficiency, compute_memory_efficiency
from memlm.analysis.filling import Capacity, analyze_memory_capacity
from memlm.analysis.flow import BankFlow, Flow, Origin, Text, memory_flow, origins
from memlm.analysis.flow_figure import draw_flow
from memlm.analysis.page import Chapter, Figures, Part, Source, Table, Token, Tokens, png, render
from memlm.analysis.usage import banks, slot_fields
from memlm.config import ConfigError
from memlm.files import atomic_file, from_home
from memlm.memory.slots import Slots
from memlm.models.base import LanguageModel, placed

MOST_SLOTS = 2000


"""Slots that a table shows at most, those first that the text read most."""


MOST_TOKENS = 1500


"""Tokens that are shown of a text at most, its last ones."""


_N_SOURCE = 4  # memories told per token and layer


_FAINT = 0.005  # weight times gate of a memory that is not told


_N_SEGMENT = 16  # segments of held-out text that show how the slots fill


def generate_memory_report(
    model: LanguageModel, data: Any, contexts: Sequence[Text] | None = None, path: str | PathLike[str] | None = None
) -> str:
    """A web page about the memory of a model.

    Args:
        model: A language model; it is left as it was.
        data: Its data, such as `memlm.data.datamodule.TextData`; None if it is not at hand.
        contexts: The text whose reads are shown, in one context or several; None for `passage`, which takes data.
        path: Where to write the page too.

    Returns:
        The page, which needs nothing but itself.

    Raises:
        ConfigError: If ``data`` is something else, such as the texts.
    """
    if data is not None and not hasattr(data, "tokens"):
        raise ConfigError(
            "data is what the model was trained on, as memlm.checkpoint.load_run(path) gives it beside the model, or "
            f"None, got {reprlib.repr(data)}; texts of your own are contexts=[text, ...]"
        )
    text = render("Memory report", [Chapter("Memory", *memory_parts(model, data, contexts))])
    if path is not None:
        with atomic_file(from_home(path)) as file:
            file.write(text.encode("utf-8", errors="replace"))
    return text


def passage(model: LanguageModel, data: Any, seed: int = 0) -> tuple[list[list[int]], str]:
    """A held-out text that tells a fact which the model never saw, and in a second context asks for it.

    Args:
        model: A language model.
        data: What gives ``tokens("val")`` and the ``maker`` of facts.
        seed: Of the fact and of the place in the text.

    Returns:
        Token ids of both contexts, and what they are. Data without words for facts gives plain text in one context.
    """
    tokens = data.tokens("val").tokens
    n = 2 * model.segment_len + model.segment_len // 2
    rng = np.random.default_rng([seed, 2])
    begin = int(rng.integers(max(len(tokens) - n, 0) + 1))
    text = [int(i) for i in tokens[begin : begin + n]]
    try:
        fact = data.maker.draw(rng, 1, "evaluation")[0]
    except ConfigError:
        return [text], "Held-out text."
    ends = [i for i, token in enumerate(text, 1) if data.tokenizer.decode([token]).endswith((".", "\n"))]
    where = next((i for i in ends if i >= model.segment_len // 4), len(text) // 4)  # behind a sentence if there is one
    told = [*text[:where], *fact.tokens, *text[where:]]
    return [told, list(fact.tokens)], (
        f"Held-out text in which a fact is told once that the model has never seen, {fact.text!r}; then, with the "
        "local context gone, the same words again: what leads from the name to the value is memory alone."
    )


def memory_parts(
    model: LanguageModel, data: Any | None, contexts: Sequence[Text] | None = None, n_slot: int = MOST_SLOTS
) -> tuple[list[str], list[Part]]:
    """What a page says of the memory of a model.

    Args:
        model: A language model; it is left as it was.
        data: Its data; None if it is not at hand.
        contexts: See `generate_memory_report`; needed where there is no data.
        n_slot: Slots that are shown at most.

    Returns:
        Sentences that lead in, and the parts.
    """
    parts: list[Part] = [cost_table(compute_memory_efficiency(model))]
    if not model.memory:
        return ["This model has no memory."], parts
    slots = any(isinstance(part.module, Slots) for part in placed(model))
    if data is not None and slots:
        tokens = data.tokens("val").tokens[: _N_SEGMENT * model.segment_len]
        if len(tokens) >= model.segment_len:
            parts.append(capacity_table(analyze_memory_capacity(model, [tokens.tolist()])))
    about = "The text of the prompt."
    if contexts is None:
        if data is None:
            return ["The text it was trained on cannot be read here, so no text is shown: give a prompt."], parts
        contexts, about = passage(model, data)
    flow = memory_flow(model, contexts)
    parts.append(token_view(flow, about))
    if not slots:
        return [
            "No memory of this model has slots: what it reads and holds cannot be told, only what it changes."
        ], parts
    parts.append(Figures("What flows through memory", [(_CAPTION, png(draw_flow(flow)))]))
    parts.append(slot_table(model, flow, n_slot))
    return [], parts


_CAPTION = (
    "Dots: a token (across) reads what was made from an earlier token (up), or a slot where the memory does not tell; "
    "larger and darker is stronger. Dotted lines: segments; solid: a new context. Marks below: tokens of which slots "
    "were written, and those whose slots were evicted by a later segment."
)


def cost_table(cost: Efficiency) -> Table:
    """Parameters, bytes and operations of memory beside those of the whole model."""
    together = {"all memories": cost.memory} if len(cost.memories) != 1 else {}
    parts = {**cost.memories, **together, "whole model": cost.model}
    rows = [
        [name, f"{part.parameters:,} ({_share(part.parameters, cost.model.parameters)})",
         f"{part.state_bytes:,} ({_share(part.state_bytes, cost.model.state_bytes)})",
         f"{part.flops_per_token:,} ({_share(part.flops_per_token, cost.model.flops_per_token)})"]
        for name, part in parts.items()
    ]  # fmt: skip
    notes = [
        "In brackets the share of the whole model. Bytes are what is carried of one row of text, full or not; the rest "
        "is local context. Operations of memories as they tell them, with every slot searched; of the rest as torch "
        "counts them.",
    ]
    return Table("What memory costs", ["", "parameters", "bytes of state", "operations per token"], rows, notes)


def capacity_table(found: Capacity) -> Table:
    """How the slots fill."""
    heads = ["bank", "slots", "filled", "written per segment", "evicted per segment", "full after (tokens)",
             "of what was written, kept", "effective slots read", "weight on slots"]  # fmt: skip
    rows: list[list[str | float]] = [
        [label, f"{bank.n_slot:,}", f"{100 * bank.filled_share:.3g} %", f"{np.mean(bank.written):.3g}",
         f"{np.mean(bank.evicted):.3g}", "never" if bank.full_after is None else f"{bank.full_after:,}",
         f"{100 * bank.kept_share:.3g} %", f"{bank.effective_reads:,.1f}", f"{bank.read_weight:.3g}"]
        for label, bank in found.banks.items()
    ]  # fmt: skip
    notes = [
        f"While {found.n_token:,} tokens of held-out text were read. Effective slots: over how many all reads together "
        "would be spread evenly. Weight on slots: the rest was read from nothing."
    ]
    return Table("How it fills", heads, rows, notes)


def token_view(flow: Flow, about: str) -> Tokens:
    """The text, each token with what it read."""
    n = len(flow.ids)
    first = max(n - MOST_TOKENS, 0)
    fates = _fates(flow)
    tokens = [_token(flow, i, first, fates) for i in range(first, n)]
    notes = [
        about,
        "A token reads to predict the one after it. Point at one, or step through them with the arrow keys, to see "
        "what it read.",
    ]
    if first:
        notes.append(f"Only the last {MOST_TOKENS:,} of {n:,} tokens are shown.")
    if not flow.writes:
        notes.append("This memory has no slots, so it cannot be told what a token read, only how much that helped.")
    elif not flow.strength.any():
        notes.append(
            "Nothing was read: memory holds what earlier segments and contexts wrote, so a text must be longer than a "
            "segment, or come in several contexts."
        )
    return Tokens("What a text reads", tokens, notes)


def slot_table(model: LanguageModel, flow: Flow, n_slot: int = MOST_SLOTS) -> Table:
    """What memories hold after a text, with the weight that its last context reads of each slot."""
    held = banks(model, flow.state)
    read = {label: np.zeros(len(last)) for label, last in flow.last_written.items()}
    for key, found in flow.reads.items():
        label = key if key in held else key.partition("/")[0]
        _add_reads(read[label], found, flow, flow.last_written[label])
    entries = sorted(
        (-float(read[label][slot]), label, slot)
        for label, (module, part) in held.items()
        for slot in module.filled(part)[0].nonzero()[:, 0].tolist()
    )
    shown = entries[:n_slot]
    fields, made = {}, {}
    for label, (module, part) in held.items():
        slots = torch.tensor([slot for _, other, slot in shown if other == label], dtype=torch.long)
        fields[label] = {name: value[0].cpu() for name, value in slot_fields(module, part).items()}
        last = torch.from_numpy(flow.last_written[label])
        for origin in origins(model, flow.ids.tolist(), flow.begin, module, part, slots, last):
            made[label, origin.slot] = origin
    names = list(dict.fromkeys(name for part in fields.values() for name in part))
    rows = [
        [
            label, slot, made[label, slot].text, float(f"{-weight:.3g}"), _where(made[label, slot]),
            *(_number(fields[label][name][slot]) if name in fields[label] else "" for name in names),
        ]
        for weight, label, slot in shown
    ]  # fmt: skip
    notes = [
        "Read: the weight, gate included, that the last context of the text put on a slot, summed over its tokens and "
        "layers. Columns to its right: what the memory itself keeps of each slot, see docs/analysis.md.",
    ]
    if len(entries) > len(shown):
        notes.append(f"{len(shown):,} of {len(entries):,} slots are shown, those first that were read most.")
    heads = ["bank", "slot", "made from", "read", "comes from", *names]
    return Table("What it holds after the text", heads, rows, notes, searchable=True)


def _add_reads(total: np.ndarray, read: BankFlow, flow: Flow, last: np.ndarray) -> None:
    """Add to ``total`` (M,) what the last context read of the slots that still hold what it read."""
    mine = flow.context == flow.context[-1]
    slots, weights = read.slots[mine], (read.weights * read.gate[:, None])[mine]
    there = (slots >= 0) & (last[slots] < flow.segment[mine][:, None])
    np.add.at(total, slots[there], weights[there])


def _fates(flow: Flow) -> dict[int, list[str]]:
    """What became of the slots made from a token, in sentences, by its index."""
    fates: dict[int, list[str]] = {}
    for label, writes in flow.writes.items():
        for what, parts in (("Written to", writes.written), ("Evicted from", writes.evicted)):
            for s, part in enumerate(parts):
                for origin in part:
                    if origin.place is not None:
                        fates.setdefault(origin.place, []).append(f"{what} {label} by segment {s}.")
    return fates


def _token(flow: Flow, i: int, first: int, fates: Mapping[int, Sequence[str]]) -> Token:
    sources: list[Source] = []
    for key, read in flow.reads.items():
        found = zip(read.slots[i, :_N_SOURCE].tolist(), read.weights[i].tolist(), strict=False)
        for slot, weight in found:
            if slot >= 0 and (strength := weight * float(read.gate[i])) >= _FAINT:
                origin = read.origins[flow.segment[i]][slot]
                place = origin.place if origin.place is not None and origin.place >= first else None
                sources.append(Source(key, strength, _visible(origin.text, ""), _where(origin), place))
    told = [f"Token {i:,}, segment {flow.segment[i]}."]
    if not math.isnan(flow.nll[i]):
        on, off = math.exp(-flow.nll[i]), math.exp(-flow.nll[i] - flow.gain[i])
        chances = f"{_percent(on)} with memory and {_percent(off)} with reads off"
        told.append(f"Next comes {flow.tokens[i + 1]!r}, expected at {chances}.")
    told += fates.get(i, [])
    starts = i == first or flow.context[i] != flow.context[i - 1]
    begins = f"context {flow.context[i] + 1}, segment {flow.segment[i]}" if starts and flow.context[-1] else ""
    if not begins and i > first and flow.segment[i] != flow.segment[i - 1]:
        begins = f"segment {flow.segment[i]}"
    strength = float(np.clip(flow.strength[i], 0, 1))
    sources.sort(key=lambda source: -source.weight)
    return Token(_visible(flow.tokens[i]), i, strength, float(flow.gain[i]), told, sources, begins)


def _where(origin: Origin) -> str:
    """Where a slot comes from, in words."""
    if origin.segment is None:
        return f"slot {origin.slot}, from before this text"
    if origin.place is None:
        return f"slot {origin.slot}, last written by segment {origin.segment}"
    return f"slot {origin.slot}, token {origin.place:,}, written by segment {origin.segment}"


def _visible(text: str, after: str = "\n") -> str:
    """A text whose line breaks can be seen, with ``after`` after each."""
    return text.replace("\n", "\u21b5" + after)


def _number(value: torch.Tensor) -> float | int:
    number = value.item()
    return float(f"{number:.4g}") if isinstance(number, float) else int(number)


def _percent(rate: float) -> str:
    """A rate in percent, never rounded up to 100."""
    text = f"{100 * rate:.3g}"
    return f"{'>99.9' if text == '100' and rate < 1 else text} %"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "-"
