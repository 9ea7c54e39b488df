"""What a model says of texts after a context of any length: how likely they are, and how it goes on.

The context goes through the model as any text does, so what is older than a segment is known from memory alone.

Shapes: B rows, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.evaluation.result import evaluating
from memlm.models.sampling import Ends, Sampling
from memlm.models.segments import SegmentModel

_AT_ONCE = 256  # tokens of a row whose logits exist at a time


class Score(NamedTuple):
    """How likely a text is.

    Attributes:
        log_likelihood: In nats.
        greedy: Whether each of its tokens is the likeliest.
    """

    log_likelihood: float
    greedy: bool


class Scorer:
    """Asks a model for scores and continuations.

    Args:
        model: The model.
        n_row: Texts that are read side by side.
        local: Tokens of a context's end that stay in view. What is before them is read first, and its context is
            closed, so that it is known from memory alone. None: the context goes on as one text.
        read: Whether memories are read; without, they are a control.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, model: SegmentModel, n_row: int = 1, local: int | None = None, read: bool = True) -> None:
        if n_row < 1:
            raise ConfigError(f"batch_size must be at least 1, got {n_row}")
        if local is not None and local < 1:
            raise ConfigError(f"local must be at least 1 token, or left out, got {local}")
        self.model, self.n_row, self.local, self.read = model, n_row, local, read
        self.device = model.head_weight.device

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """How likely each text is after its context.

        Args:
            pairs: Token ids of contexts and texts. Without a context the first token is predicted from what begins any
                text of the model, and counted as certain where nothing does.
        """
        found: dict[int, Score] = {}
        with evaluating(self.model):
            for rows in self._batches([len(context) + len(text) for context, text in pairs]):
                scores = self._scores([pairs[row] for row in rows])
                found |= dict(zip(rows, scores, strict=True))
        return [found[row] for row in range(len(pairs))]

    def generate(self, contexts: Sequence[list[int]], how: Sampling) -> list[list[int]]:
        """Token ids by which each context goes on, up to what ends it, which is the last of them.

        Args:
            contexts: Token ids, at least one each.
            how: How they go on.
        """
        found: dict[int, list[int]] = {}
        ends = Ends(how, self.model.tokenizer, self.device)
        with evaluating(self.model):
            for rows in self._batches([len(context) for context in contexts]):
                state, near = self._told([contexts[row] for row in rows])
                ids, mask = self._padded(near, left=True)
                steps = list(self.model.stream(ids, how, state, read=self.read, mask=mask))
                new = torch.stack(steps, dim=1) if steps else ids[:, :0]
                for row, tokens in zip(rows, new, strict=True):
                    n = next((n for n in range(1, len(tokens) + 1) if ends and ends.ended(tokens[None, :n])), None)
                    found[row] = tokens[:n].tolist()
        return [found[row] for row in range(len(contexts))]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Numbers of rows of about the same length, the longest first."""
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        yield from (order[i : i + self.n_row] for i in range(0, len(order), self.n_row))

    def _told(self, contexts: list[list[int]]) -> tuple[Any, list[list[int]]]:
        """A state that was told what is not in view, and what is."""
        if self.local is None or all(len(context) <= self.local for context in contexts):
            return None, contexts
        ids, mask = self._padded([context[: -self.local] for context in contexts], left=False)
        state = self.model.absorb(ids, read=self.read, mask=mask)
        return self.model.new_context(state), [context[-self.local :] for context in contexts]

    def _padded(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor | None]:
        """Rows of ids (B, L), and which are no padding; None if all are."""
        n = max(map(len, rows))
        ids = torch.zeros(len(rows), n, dtype=torch.long)
        mask = torch.zeros(len(rows), n, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            part = slice(n - len(tokens), n) if left else slice(len(tokens))
            ids[row, part], mask[row, part] = torch.tensor(tokens, dtype=torch.long), True
        return ids.to(self.device), None if bool(mask.all()) else mask.to(self.device)

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        state, near = self._told([context for context, _ in pairs])
        texts = [text for _, text in pairs]
        ids, mask = self._padded([[*a, *b][:-1] for a, b in zip(near, texts, strict=True)], left=False)
        out = self.model(ids, state=state, read=self.read, mask=mask, logits=False, keep_state=False)
        found = []
        for row, (context, text) in enumerate(zip(near, texts, strict=True)):
            hidden, targets = out.hidden[row, max(len(context) - 1, 0) :][: len(text) - (not context)], text
            if not context:
                opening = self.model.opening()
                if opening is None:
                    targets = text[1:]
                else:
                    hidden = torch.cat([opening[None], hidden])
            found.append(_score(self.model.head, hidden, torch.tensor(targets, device=self.device, dtype=torch.long)))
        return found


def _score(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Score:
    """The score of ``targets`` (L,), of hidden states (L, D) of the tokens before them."""
    total, greedy = 0.0, True
    for part, wanted in zip(hidden.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
        logits = head(part).float().log_softmax(dim=-1)  # (L, V)
        total += float(logits.gather(1, wanted[:, None]).sum())
        greedy = greedy and bool((logits.argmax(dim=-1) == wanted).all())
    return Score(total, greedy)
