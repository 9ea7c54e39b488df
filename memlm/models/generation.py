"""Text that a model goes on with, token by token.

Shapes: B rows, L tokens of the prompt, N continuations of each row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.models import arguments, schedule
from memlm.models.decoding import Decoder
from memlm.models.sampling import Ends, Sampling
from memlm.models.stack import Stack
from memlm.models.state import ModelState
from memlm.tensors import take


def generate(
    model: Stack,
    ids: Tensor,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.9,
    state: ModelState | None = None,
    read: bool = True,
    write: bool = True,
    *,
    do_sample: bool = True,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    mask: Tensor | None = None,
    compile: bool = False,
) -> Tensor:
    """Go on with ``ids`` token by token. Arguments are named as those of ``generate`` of Hugging Face.

    Args:
        model: The model.
        ids: Prompt, (B, L) with L >= 1.
        max_new_tokens: Tokens to add, at most.
        temperature: Softmax temperature; 0 takes the likeliest token.
        top_k: Sample from the k likeliest tokens only; None for all.
        top_p: Sample from the smallest set of tokens whose probability reaches p; None for all.
        state: Where the text before the prompt stopped.
        read: Whether memories are read.
        write: Whether memories are written (in a state of their own, not in ``state``).
        do_sample: Whether tokens are drawn; if not, the likeliest is taken.
        repetition_penalty: By how much logits of tokens that stand in the row already, the prompt included, are
            divided (multiplied, if they are negative); 1 for not at all.
        num_return_sequences: ``N``, continuations of each prompt, side by side.
        eos_token_id: A token, or several, that end the text of a row.
        pad_token_id: What then fills the row up; None for the first of ``eos_token_id``, or the tokenizer's own.
        stop_strings: A string, or several, that end the text of a row once they stand in what is new.
        mask: Tokens of the prompt that are no padding, (B, L), at least one of each row; None if all are.
        compile: Whether the step goes through ``torch.compile``: minutes at first, then faster. The tokens are the
            same, but for rounding.

    Returns:
        Prompt and new tokens, (B * N, L + max_new_tokens), or fewer if all rows end before. Row b * N + n is
        continuation n of prompt b.

    Raises:
        ConfigError: If a setting is out of range or the prompt is empty.
    """
    how = Sampling(
        max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, num_return_sequences, eos_token_id,
        pad_token_id, stop_strings,
    )  # fmt: skip
    new = list(stream(model, ids, how, state, read, write, mask, compile))
    prompt = ids.long().repeat_interleave(num_return_sequences, dim=0)
    return torch.cat([prompt, *(part[:, None] for part in new)], dim=1)


@torch.no_grad()
def stream(
    model: Stack,
    ids: Tensor,
    how: Sampling,
    state: ModelState | None = None,
    read: bool = True,
    write: bool = True,
    mask: Tensor | None = None,
    compile: bool = False,
) -> Generator[Tensor, None, None]:
    """The new tokens of `generate`, (B * N,) at a time, each as soon as it is known.

    Until the last one, or until the iterator is closed, the model is in evaluation mode.

    Args:
        model: The model.
        ids: As for `generate`, as for what follows.
        how: How the text goes on.
        state: See there.
        read: See there.
        write: See there.
        mask: See there.
        compile: See there.

    Raises:
        ConfigError: If a setting is out of range or the prompt is empty.
    """
    ids = arguments.token_ids(ids, model.n_vocab)
    if ids.shape[1] == 0:
        raise ConfigError(f"the prompt must be (rows, tokens) with at least one token, got {tuple(ids.shape)}")
    arguments.sampling(how, model)
    arguments.flags("mask", mask)
    if mask is not None and (mask.shape != ids.shape or not bool(mask.any(dim=1).all())):
        raise ConfigError(f"mask must have the shape of ids {tuple(ids.shape)}, and a true place in each row")
    ends = Ends(how, getattr(model, "tokenizer", None), ids.device)
    if how.max_new_tokens == 0:
        return
    training = model.training
    model.eval()
    try:
        hidden, state = _read(model, ids, state, read, write, mask)
        if how.num_return_sequences > 1:
            rows = torch.arange(len(ids), device=ids.device).repeat_interleave(how.num_return_sequences)
            hidden, state = hidden[rows], model.select_rows(state, rows)
        said = None
        if how.repetition_penalty != 1:
            there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            said = torch.zeros(len(ids), model.n_vocab, dtype=torch.long, device=ids.device)
            said = said.scatter_add(1, ids, there.long()) > 0
            said = said.repeat_interleave(how.num_return_sequences, dim=0)
        yield from _new(model, Decoder(model, state, read, write, compile), hidden, said, how, ends)
    finally:
        model.train(training)


def _read(
    model: Stack, ids: Tensor, state: ModelState | None, read: bool, write: bool, mask: Tensor | None
) -> tuple[Tensor, ModelState]:
    """The prompt: the hidden states of its last tokens, (B, D), and the state after it."""
    hidden = None
    parts = ids.split(schedule.WINDOW, dim=1)  # of a long prompt no more is held than of a window
    masks = [None] * len(parts) if mask is None else mask.split(schedule.WINDOW, dim=1)
    for part, here in zip(parts, masks, strict=True):
        out = model(part, state=state, read=read, write=write, mask=here, logits=False, donate=hidden is not None)
        state, last = out.state, out.hidden[:, -1]
        if here is not None:
            at = torch.where(here, torch.arange(part.shape[1], device=ids.device), -1).amax(dim=1)  # (B,)
            last = take(out.hidden, at.clamp(min=0)[:, None])[:, 0]
            last = last if hidden is None else torch.where(at[:, None] < 0, hidden, last)
        hidden = last
    assert hidden is not None
    assert state is not None
    return hidden, state


def _new(
    model: Stack, text: Decoder, hidden: Tensor, said: Tensor | None, how: Sampling, ends: Ends
) -> Iterator[Tensor]:
    """New tokens (B,) by the step, of ``hidden`` states (B, D) of the last ones. Rows that have ended leave."""
    new = torch.full((len(hidden), how.max_new_tokens), ends.pad_id, device=hidden.device)
    rows = torch.arange(len(hidden), device=hidden.device)  # that have not ended
    for i in range(how.max_new_tokens):
        chosen = how.choose(model.head(hidden), said)
        new[rows, i] = chosen
        yield new[:, i]
        if i + 1 == how.max_new_tokens:
            return
        if said is not None:
            said.scatter_(1, chosen[:, None], True)
        if ends and (ended := ends.ended(new[rows, : i + 1])):
            kept = [row for row in range(len(rows)) if row not in ended]
            if not kept:
                return
            text.keep(kept)
            rows, chosen, said = rows[kept], chosen[kept], None if said is None else said[kept]
        hidden = text.step(chosen)
