"""Text that a model goes on with, token by token.

Shapes: B rows, L tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.models import arguments, schedule
from memlm.models.stack import Stack
from memlm.models.state import ModelState


@torch.no_grad()
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
) -> Tensor:
    """Go on with ``ids`` token by token.

    Args:
        model: The model.
        ids: Prompt, (B, L) with L >= 1.
        max_new_tokens: Tokens to add.
        temperature: Softmax temperature; 0 takes the likeliest token.
        top_k: Sample from the k likeliest tokens only; None for all.
        top_p: Sample from the smallest set of tokens whose probability reaches p; None for all.
        state: Where the text before the prompt stopped.
        read: Whether memories are read.
        write: Whether memories are written (in a state of their own, not in ``state``).

    Returns:
        Prompt and new tokens, (B, L + max_new_tokens).

    Raises:
        ConfigError: If a setting is out of range or the prompt is empty.
    """
    ids = arguments.token_ids(ids, model.n_vocab)
    if ids.shape[1] == 0:
        raise ConfigError(f"the prompt must be (rows, tokens) with at least one token, got {tuple(ids.shape)}")
    arguments.sampling(max_new_tokens, temperature, top_k, top_p)
    training, tokens, ours = model.training, [ids], False
    *before, last = ids.split(schedule.WINDOW, dim=1)  # of a long prompt no more is held than of a window
    model.eval()
    try:
        for part in before if max_new_tokens else ():
            state = model(part, state=state, read=read, write=write, logits=False, donate=ours).state
            ours = True
        for _ in range(max_new_tokens):
            out = model(last, state=state, read=read, write=write, logits=False, donate=ours)
            state, ours = out.state, True
            last = _sample(model.head(out.hidden[:, -1]), temperature, top_k, top_p)
            tokens.append(last)
    finally:
        model.train(training)
    return torch.cat(tokens, dim=1)


def _sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token (B, 1) for each row of ``logits`` (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        drop = mass.cumsum(dim=-1) - mass >= top_p  # the mass before a token already suffices
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1)
