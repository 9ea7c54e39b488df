"""What is minimised: the losses of a batch, and numbers about it that are logged.

Shapes: B rows, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memlm.analysis.usage import memory_numbers
from memlm.data.stream import Batch
from memlm.memory import state as states
from memlm.models.base import LanguageModel
from memlm.training.distillation import distance_from_base
from memlm.training.loss import linear_cross_entropy

_FEW = 0.5  # share of targets with a weight below which the others are left out: copying those that have one pays

_DISTANCE = "distance from the base"


class Objective:
    """Losses of a model's outputs.

    Args:
        model: The model.
        answer_weight: Weight of the tokens of answers in the loss.

    Attributes:
        compiled: The compiled forward pass, while the model is trained; None to run it as it is.
    """

    def __init__(self, model: LanguageModel, answer_weight: float) -> None:
        self._model, self._answer_weight = model, answer_weight
        self.compiled: Any = None
        self._bytes: dict[int, int] = {}  # of all memories, by number of rows

    def compile(self) -> None:
        """Compile the forward pass.

        Not by ``nn.Module.compile``: the model itself stays as it is for evaluation, whose shapes vary. Keys stay the
        same.
        """
        self.compiled = torch.compile(self._model.forward)

    def forward(self, batch: Batch, state: Any, keep_state: bool) -> Any:
        """The model's output for a batch."""
        return (self.compiled or self._model)(
            batch.ids,
            state=state,
            reset=batch.reset,
            mask=batch.mask,
            breaks=batch.breaks,
            told=batch.told,
            logits=False,
            keep_state=keep_state,
        )

    def weight(self, batch: Batch) -> Tensor:
        """Weight of each target in the loss, (B, N)."""
        return batch.weight * (1 + (self._answer_weight - 1) * batch.answer)

    def losses(self, batch: Batch, out: Any, total: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses by name, and without gradients the next-token loss of each token (B, N) and each row (B,).

        The next-token loss among the former is a mean over the weight ``total``. Where few targets have a weight, the
        loss of the others is not worked out, and told as 0.
        """
        model, weight = self._model, self.weight(batch)
        distilled, share = self._distilled(batch, out, weight / total) if model.distill else ({}, 1.0)
        counted = weight != 0
        few = 0 < counted.float().mean() < _FEW  # then the head is not applied where nothing is asked for
        parts = [part[counted] if few else part for part in (out.hidden, batch.targets, share * weight / total)]
        loss, nll = linear_cross_entropy(
            parts[0], model.head_weight, parts[1], parts[2], compiled=self.compiled is not None
        )
        if few:
            nll = torch.zeros_like(weight).masked_scatter(counted, nll)
        by_row = (nll * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        losses = {"next-token loss": loss} | {
            f"{name}/{key}": value
            for name, modules in model.memory.items()
            for key, value in modules[0].losses(out.trace[name], by_row).items()
        }
        return losses | distilled, nll, by_row

    def _distilled(self, batch: Batch, out: Any, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Distance from the bare base, and the share of the other loss, (B, N)."""
        share = self._model.distill
        away, counted = distance_from_base(self._model, batch, out.hidden, weight)
        return {_DISTANCE: share * away}, 1 - share * counted

    @torch.no_grad()
    def answered(self, batch: Batch, nll: Tensor, out: Any) -> dict[str, Tensor]:
        """How well questions are answered; nothing if there are none."""
        if not batch.answer.any():
            return {}
        right = self._model.head(out.hidden[batch.answer]).argmax(dim=-1) == batch.targets[batch.answer]
        return {"train/answer_accuracy": right.float().mean(), "train/nll_answer": nll[batch.answer].mean()}

    @torch.no_grad()
    def details(self, batch: Batch, nll: Tensor, losses: dict[str, Tensor], out: Any) -> dict[str, Any]:
        """How well text is predicted, and what the memories do."""
        text = batch.weight * ~batch.answer
        numbers: dict[str, Any] = {"train/nll_text": (nll * text).sum() / text.sum().clamp(min=1)}
        numbers |= {f"train/{n}": loss for n, loss in losses.items() if n.partition("/")[0] in self._model.memory}
        if _DISTANCE in losses:
            numbers[f"train/{_DISTANCE.replace(' ', '_')}"] = losses[_DISTANCE]
        return numbers | memory_numbers(out) | {"memory/state_bytes": float(self._state_bytes(len(batch.ids)))}

    def _state_bytes(self, n_row: int) -> int:
        """Bytes of all memories of ``n_row`` rows."""
        if n_row not in self._bytes:
            self._bytes[n_row] = states.n_byte(self._model.init_state(n_row).memory)
        return self._bytes[n_row]
