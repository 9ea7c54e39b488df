"""The LightningModule around any model with any memory."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memlm.checkpoint import describe
from memlm.data.stream import Batch
from memlm.memory import state as states
from memlm.training.loss import linear_cross_entropy, token_nll


class NonFiniteLoss(ValueError):
    """The loss became infinite or NaN."""


class LanguageModeling(lightning.LightningModule):
    """Next-token training over windows of segments, with truncated backpropagation through memory.

    The state goes on from window to window and is detached between them. Works in a plain ``lightning.Trainer``.

    Args:
        model: What `memlm.build` returns.
        lr: Peak learning rate.
        weight_decay: Decay of matrices; vectors, scalars and embeddings are not decayed.
        betas: Of AdamW.
        warmup_steps: Steps of linear warm-up.
        min_lr_ratio: Learning rate at the end of the cosine, as a share of ``lr``.
        answer_weight: Weight in the loss of answers to questions about planted facts; other tokens weigh 1.
        total_steps: Length of the cosine; None for the trainer's ``max_steps``.
        seed: Seed of dropout; each step draws from (seed, step, rank) alone.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 50,
        min_lr_ratio: float = 0.05,
        answer_weight: float = 5.0,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.betas = lr, weight_decay, tuple(betas)
        self.warmup_steps, self.min_lr_ratio, self.answer_weight = warmup_steps, min_lr_ratio, answer_weight
        self.total_steps, self.seed = total_steps, seed
        self._state: Any = None
        self._val_state: Any = None
        self._next_batch = 0

    # --- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one window."""
        torch.manual_seed((self.seed * 1_000_003 + batch.step) * 4096 + self.global_rank)
        apply_memory_settings(self.model, batch.memory)
        state = None if batch.fresh else self._state
        if state is not None and len(state.local.host_open) != len(batch.ids):
            state = None
        out = self.model(batch.ids, state=state, reset=batch.reset, mask=batch.mask, breaks=batch.breaks, logits=False, carry=not batch.ends)
        self._state = None if batch.ends else states.detach(out.state)
        self._next_batch = batch.step + 1
        weight = batch.weight * (1 + (self.answer_weight - 1) * batch.answer)
        share = weight / weight.sum().clamp(min=1)
        loss, nll = linear_cross_entropy(out.hidden, self.model.head_weight, batch.targets, share)
        losses = {
            f"{name}/{key}": value
            for name, modules in self.model.memory.items()
            for key, value in modules[0].losses(out.trace[name], loss).items()
        }
        total = loss + sum(losses.values(), torch.zeros((), device=loss.device))
        if not torch.isfinite(total):
            raise NonFiniteLoss(self._explain(batch, loss, losses))
        self.log("train/loss", loss.detach(), prog_bar=True)
        if self.global_step % self.trainer.log_every_n_steps == 0:
            self._log_details(batch, nll, losses, out)
        return total

    @torch.no_grad()
    def _log_details(self, batch: Batch, nll: Tensor, losses: dict[str, Tensor], out: Any) -> None:
        """Log what the memories do and how well questions are answered."""
        text = batch.weight * ~batch.answer
        self.log("train/nll_text", (nll * text).sum() / text.sum().clamp(min=1))
        if batch.answer.any():
            right = self.model.head(out.hidden[batch.answer]).argmax(dim=-1) == batch.targets[batch.answer]
            self.log("train/answer_accuracy", right.float().mean(), prog_bar=True)
            self.log("train/nll_answer", nll[batch.answer].mean())
        for name, loss in losses.items():
            self.log(f"train/{name}", loss)
        for name, trace in out.trace.items():
            for key, value in trace.items():
                self.log(f"memory/{name}/{key}", value)
        for name, read in out.reads.items():
            mass = read.weights.sum(dim=-1)
            share = read.weights / mass.clamp(min=1e-9)[..., None]
            entropy = -(share * share.clamp(min=1e-9).log()).sum(dim=-1)
            self.log(f"memory/{name}/read_gate", read.gate.mean())
            self.log(f"memory/{name}/read_mass", mass.mean())
            self.log(f"memory/{name}/read_entropy", (entropy * mass).sum() / mass.sum().clamp(min=1e-9))
        self.log("memory/state_bytes", float(states.n_byte(out.state.memory)))

    def _explain(self, batch: Batch, loss: Tensor, losses: dict[str, Tensor]) -> str:
        """Where the numbers went wrong."""
        parts = {"next-token loss": loss, **losses}
        bad = [name for name, value in parts.items() if not torch.isfinite(value)]
        weights = [name for name, value in self.model.named_parameters() if not torch.isfinite(value).all()]
        where = f"; weights that are not finite: {', '.join(weights[:5])}" if weights else "; all weights are finite"
        return (
            f"the loss is not finite at step {self.global_step} (batch {batch.step}): {', '.join(bad)}{where}. "
            "The last good checkpoint is kept. Lower training.lr, or set trainer.gradient_clip_val or precision=32-true"
        )

    # --- resuming ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the tokenizer and the state that is carried from window to window."""
        if hasattr(self.model, "config"):
            checkpoint["memlm"] = describe(self.model)
            ids = [logger.version for logger in self.trainer.loggers if type(logger).__name__ == "WandbLogger"]
            checkpoint["memlm"]["wandb_id"] = ids[0] if ids else None
        carried = None if self._state is None else states.to_dict(self._state)
        checkpoint["carried"] = {"state": carried, "next_batch": self._next_batch}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the carried state."""
        carried = checkpoint["carried"]
        self._next_batch = carried["next_batch"]
        if carried["state"] is not None:
            n_row = len(carried["state"]["local"]["host_open"])
            self._state = states.from_dict(carried["state"], self.model.init_state(n_row))

    def on_train_start(self) -> None:
        """Bring the carried state to the device of the model."""
        if self._state is not None:
            self._state = states.move(self._state, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Perplexity of plain text, memories read and written as the text goes on."""
        state = None if batch_idx == 0 else self._val_state
        out = self.model(batch.ids, state=state, reset=batch.reset, mask=batch.mask, breaks=batch.breaks, logits=False)
        self._val_state = out.state
        nll = (token_nll(self.model, out.hidden, batch.targets) * batch.weight).sum() / batch.weight.sum().clamp(min=1)
        self.log("val/nll", nll, batch_size=int(batch.weight.sum()), sync_dist=True)

    # --- optimisation ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with decay groups; linear warm-up, then a cosine."""
        total = self.total_steps or self.trainer.max_steps
        if total < 1:
            raise ValueError("the learning-rate schedule needs trainer.max_steps (or total_steps): set it to a number")
        optimizer = torch.optim.AdamW(decay_groups(self.model, self.weight_decay), lr=self.lr, betas=self.betas)
        warmup, floor = min(self.warmup_steps, total), self.min_lr_ratio

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            part = min((step - warmup) / max(total - warmup, 1), 1.0)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight matrices are decayed, the rest (and embeddings) is not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def apply_memory_settings(model: nn.Module, settings: dict[str, Any]) -> None:
    """Set attributes of memories, ``name.attribute``; memories the model lacks are skipped.

    Raises:
        ValueError: If a memory has no such attribute.
    """
    for key, value in settings.items():
        name, _, attribute = key.partition(".")
        for module in model.memory[name] if name in model.memory else []:  # type: ignore[operator, union-attr]
            if not hasattr(module, attribute):
                raise ValueError(f"curriculum sets {key}, but memory {name!r} has no setting {attribute!r}")
            if isinstance(getattr(module, attribute), Tensor):
                getattr(module, attribute).fill_(value)
            else:
                setattr(module, attribute, value)
