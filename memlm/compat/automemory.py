"""AutoMemoryModule and the SimpleLanguageModel of its example, made of memlm's memory ``auto``.

Shapes: B sentences, T tokens, E embedding width, K tokens that are kept, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import memlm
from memlm.memory.auto import AutoMemory, AutoState
from memlm.memory.contract import Flags, Segment


class AutoMemoryModule(nn.Module):
    """The tokens of a sentence, and of those kept before, that a network scores above a threshold.

    Arguments are those of the source's example. Its score network is a linear layer over a whole sentence, so that all
    sentences have to be of one length; here any number of tokens is scored. What is kept is chosen by scores, and no
    gradient goes through a choice: the example's loss trains embedding, LSTM and head but never the scores.
    `memlm.memory.auto` lets scores weigh in the read, so that they are learned: see `SimpleLanguageModel`.

    Args:
        token_dim: Width of the embeddings.
        hidden_dim: Hidden width of the score network.
        max_memory_size: Most tokens that are kept.
        threshold: Least score of a token that is kept, in 0..1.
    """

    def __init__(self, token_dim: int, hidden_dim: int, max_memory_size: int, threshold: float = 0.1) -> None:
        super().__init__()
        self.memory = AutoMemory(token_dim, n_slot=max_memory_size, threshold=threshold, d_score=hidden_dim)

    def forward(self, embedded_tokens: Tensor, memory_context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score a sentence and what was kept, and keep the best.

        Args:
            embedded_tokens: One sentence, (1, T, E).
            memory_context: What was kept before, (K, E); None for nothing.

        Returns:
            What is kept now, in the order of the text, (K, E), and its scores, (K,).

        Raises:
            ValueError: If there are several sentences (what is kept of each may differ in number), or the context has
                more tokens than are kept.
        """
        if embedded_tokens.dim() != 3 or len(embedded_tokens) != 1:
            raise ValueError(
                f"embedded_tokens must be one sentence, (1, tokens, width), got {tuple(embedded_tokens.shape)}: for "
                'several at once use memlm.build("model=lstm", "memory=auto")'
            )
        state = self._state(memory_context)
        new, _ = self.memory.write(_sentence(embedded_tokens, self.memory.n_slot), state)
        kept = self.memory.filled(new)[0]
        return new.hidden[0, kept], new.score[0, kept]

    def _state(self, context: Tensor | None) -> AutoState:
        """A state that holds ``context`` (K, E)."""
        state = self.memory.init_state(1)
        if context is None:
            return state
        n, n_slot = len(context), self.memory.n_slot
        if n > n_slot:
            raise ValueError(f"memory_context has {n} tokens, more than max_memory_size, {n_slot}")
        rest = state.hidden[:, n:]
        number = torch.arange(n_slot, device=state.ids.device)[None]
        ids = torch.where(number < n, number, -1)
        return AutoState(torch.cat([context[None], rest], dim=1), state.score, ids, ids)


def _sentence(embedded: Tensor, first_id: int) -> Segment:
    """A whole sentence (1, T, E) as a memory gets it, each token with an id of its own."""
    yes = torch.ones(1, 1, dtype=torch.bool, device=embedded.device)
    ids = first_id + torch.arange(embedded.shape[1], device=embedded.device)[None]
    return Segment(
        ids=ids, embeddings=embedded, hidden=embedded, valid=torch.ones_like(ids, dtype=torch.bool),
        flags=Flags(yes, ~yes, yes, None, ids[:, :1], yes.long()), signals=None, lookback=0,
        columns=slice(0, ids.shape[1]),
    )  # fmt: skip


class SimpleLanguageModel(nn.Module):
    """Predicts the word after a sentence: ``memlm.build("model=lstm", "memory=auto")`` under the names of the example.

    The model of the example has one output for each kept token and one target, so that its loss works only where one
    token is kept; this one has one output per sentence, for any number of sentences of a length. The example begins
    every sentence with an empty memory; here what is kept may be handed on, and the next sentence then reads it:
    ``model(tokens, model.memory_context)``. Gradients reach back into the sentences before, and all of these are held:
    `memlm.memory.state.detach` cuts that.

    Args:
        vocab_size: Size of the vocabulary.
        token_dim: Width of embeddings.
        hidden_dim: Width of the LSTM, and hidden width of the score network.
        max_memory_size: Most tokens that are kept.

    Attributes:
        model: memlm's model.
        memory_context: Its state after the last sentence, with what is kept of it; None before the first.
    """

    def __init__(self, vocab_size: int, token_dim: int, hidden_dim: int, max_memory_size: int) -> None:
        super().__init__()
        self.model = memlm.build(
            "model=lstm", "memory=auto", "data=symbols", "data.corpus.n_symbol=2", "model.n_layer=1",
            f"data.tokenizer.n_vocab={max(vocab_size, 4)}", f"model.d_model={token_dim}",
            f"model.d_hidden={hidden_dim}", f"memory.auto.n_slot={max_memory_size}",
            f"memory.auto.d_score={hidden_dim}",
        )  # fmt: skip
        self.memory_context: Any = None

    def forward(self, sentence_tokens: Tensor, memory_context: Any = None) -> Tensor:
        """Logits of the word after each sentence.

        Args:
            sentence_tokens: Token ids, (B, T).
            memory_context: `memory_context` after sentences before; None for an empty memory.

        Returns:
            Logits, (B, V).
        """
        out = self.model(sentence_tokens, state=memory_context)
        self.memory_context = self.model.new_context(out.state)
        return out.logits[:, -1]
