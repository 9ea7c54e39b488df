"""The LightningModule around any model with any memory.

Its parts: `Objective` (losses), `SharedBanks`, `Carried` (states from window to window), `DealtLayers`, `Replay`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from memlm.checkpoint import describe, load
from memlm.config import ConfigError
from memlm.data.stream import Batch
from memlm.models.base import LanguageModel
from memlm.training.banks import SharedBanks
from memlm.training.carrying import Carried, of_all_ranks
from memlm.training.finite import check_loss, check_saved
from memlm.training.layers import DealtLayers, average_gradients, clip_gradients
from memlm.training.loss import token_nll
from memlm.training.memory_settings import check_memory_settings, memory_settings
from memlm.training.objective import Objective
from memlm.training.optimizer import make_optimizer, number_by_place
from memlm.training.replay import Replay, build_replay, check_sources, retrieved, weightless
from memlm.training.settings import Training


class LanguageModeling(lightning.LightningModule):
    """Next-token training over windows of segments, with truncated backpropagation through memory.

    The state goes on from window to window and is detached between them. A memory with scope ``shared`` starts every
    window from its persistent bank, and every training step writes the bank. Works in a plain ``lightning.Trainer``.

    The loss is a mean over the weights of a batch, of all ranks together. ``accumulate_grad_batches=n`` averages the
    gradients of n batches in a row: windows that follow each other, not parts of one, so that the state goes on between
    them, and each batch counts the same whatever its weights.

    Args:
        model: What `memlm.build` returns.
        settings: How weights are trained.
        total_steps: Length of the cosine; None for the trainer's ``max_steps``.
        seed: Seed of dropout; each step draws from (seed, step, rank) alone.
        replay: What is replayed; None for nothing. What it replays reads and writes fresh memories, discarded after.

    Attributes:
        objective: The losses.
        banks: Banks that all rows share.
        carried: Where the rows stopped.
        dealt: The layers, under ``trainer=fsdp`` dealt out to processes.
    """

    def __init__(
        self,
        model: LanguageModel,
        settings: Training | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        replay: Replay | None = None,
    ) -> None:
        super().__init__()
        self.model: LanguageModel = model
        self.settings = settings or Training()
        self.total_steps, self.seed, self.replay = total_steps, seed, replay
        self._retrieves = replay is not None and replay.policy == "retrieved"  # what is replayed depends on reads
        if self._retrieves:
            check_sources(model)
        self.objective = Objective(model, self.settings.answer_weight)
        self.banks, self.dealt = SharedBanks(model), DealtLayers(model)
        self.carried = Carried(model, self.banks)
        self._val_state: Any = None
        self._curriculum: Any = None  # whose phases set memories while they are trained
        self._whole = contextlib.ExitStack()  # during validation, banks that are sharded at other times

    # --- begin and end ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Leave shared banks to the writes of all processes: sending them before each step would hide faults.

        Banks of memories with ``shard`` are sharded over the processes, until training ends.

        Raises:
            ConfigError: If a bank cannot be shared or sharded.
        """
        banks = [name for name, _ in self.named_buffers() if name.rpartition(".")[0].endswith(".bank")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, banks)
        if stage == "fit" and self.trainer.world_size > 1:
            dealt = self.device_mesh is not None
            self.banks.shard(self.global_rank, self.trainer.world_size, dealt, self.replay is not None)

    def configure_model(self) -> None:
        """Under ``trainer=fsdp`` deal the weights of the layers out to the processes of a machine."""
        if self.device_mesh is not None and not self.dealt.are_dealt:
            self.dealt.deal(self.device_mesh)

    def on_fit_start(self) -> None:
        """Check what only the trainer knows, before the first step."""
        self._curriculum = curriculum = getattr(self.trainer.datamodule, "curriculum", None)  # type: ignore[attr-defined]
        for i, phase in enumerate(curriculum.phases if curriculum is not None else []):
            for end in (0, -1):
                settings = {n: v[end] if isinstance(v, list | tuple) else v for n, v in phase.memory.items()}
                check_memory_settings(self.model, settings, f"curriculum.phases[{i}].memory")
        if self.settings.compile:
            self.objective.compile()

    def on_train_start(self) -> None:
        """Bring the carried state to the device of the model."""
        self.carried.to(self.device)

    def on_train_end(self) -> None:
        """Put banks and layers that were dealt out together again, in every process."""
        self.banks.gather("cpu")
        self.dealt.put_together(self.device)

    def on_fit_end(self) -> None:
        """Let go of what only training needs."""
        self.objective.compiled = None

    # --- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one window."""
        torch.manual_seed((self.seed * 1_000_003 + batch.step) * 4096 + self.global_rank)
        settings = {} if self._curriculum is None else self._curriculum.memory_settings(batch.step)
        with memory_settings(self.model, settings):
            return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        """The loss; goes on with the carried state, commits shared banks, and replays earlier windows."""
        objective, n_rank = self.objective, self.trainer.world_size
        state = self.carried.begin(batch)
        if state is None and self._retrieves:
            state = self.model.init_state(len(batch.ids))
        goes_on = not batch.ends or bool(self.banks.names) or self._retrieves
        with self.banks.written_by_all(n_rank):
            out = objective.forward(batch, state, keep_state=goes_on)
        drawn, own = self._drawn(batch, state, out), objective.weight(batch).sum()
        both = own if drawn is None else own + objective.weight(drawn[0]).sum()
        weight = _mean_over_ranks(both, self.trainer).clamp(min=1)
        losses, nll, by_row = objective.losses(batch, out, weight)
        logged, numbers = losses["next-token loss"].detach(), {}
        if self.replay is not None:
            logged = logged * weight / _mean_over_ranks(own, self.trainer).clamp(min=1)
        if drawn is not None:
            again, places = drawn
            repeated, _, of_rows = objective.losses(again, objective.forward(again, None, keep_state=False), weight)
            if places:
                self.replay.update(places, of_rows)  # type: ignore[union-attr]
                numbers = {"train/replay_nll": of_rows.mean()}
            else:
                repeated = {"next-token loss": repeated["next-token loss"]}
            losses |= {f"replayed {name}": value for name, value in repeated.items()}
        total = sum(losses.values(), torch.zeros((), device=nll.device))
        check_loss(total, losses, self.model, self.global_step, Path(self.trainer.default_root_dir))
        if self.replay is not None:
            self.replay.offer(batch, by_row, batch.ids.shape[1] // self.model.segment_len, self.global_rank)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        parted = self.banks.commit(out.state, compare=n_rank > 1 and self.global_step % every == 0)
        if parted is not None:
            raise RuntimeError(
                f"memory {parted!r}: the processes hold different banks after step {self.global_step}, though all "
                f"write the same; go on from the last checkpoint with resume={self.trainer.default_root_dir}"
            )
        self.carried.keep(batch, out.state)
        self.log("train/loss", logged, sync_dist=n_rank > 1)
        if (batch.step + 1) % self.trainer.accumulate_grad_batches == 0:  # the last batch of an optimizer step
            each = self.settings.consolidate_every
            if each is not None and (self.global_step + 1) % each == 0:
                self._log_once(self.carried.consolidate((self.global_step + 1) // each - 1, self.device))
            if (self.global_step + 1) % every == 0:
                self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
                self._log_once(objective.answered(batch, nll, out))
                for name, number in objective.details(batch, nll, losses, out).items():
                    self.log(name, number)
                self._log_once(numbers)
        return total

    def _drawn(self, batch: Batch, state: Any, out: Any) -> tuple[Batch, list[Any]] | None:
        """What is replayed beside a batch: rows, and where they come from."""
        if self.replay is None:
            return None
        reads = retrieved(self.model, state, out.state, out.reads) if self._retrieves else ()
        drawn = self.replay.draw(batch, self.global_rank, reads)
        if self.dealt.are_dealt:
            # All processes call layers that are dealt out, or none does: one that drew nothing has a row without
            # weight.
            any_draws = _mean_over_ranks(batch.weight.new_tensor(float(drawn is not None)), self.trainer) > 0
            return (weightless(batch), []) if drawn is None and any_draws else drawn
        return drawn

    def _log_once(self, numbers: Mapping[str, float | Tensor]) -> None:
        """Log what not every step has. Not by `self.log`, which repeats a number in later steps until the next one."""
        plain = {name: float(value) for name, value in numbers.items()}
        for logger in self.trainer.loggers if plain else []:
            logger.log_metrics(plain, step=self.global_step)

    def on_validation_start(self) -> None:
        """Every process validates by itself, so that it needs the whole of a sharded bank."""
        self._whole.enter_context(self.banks.whole(self.device))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Perplexity of plain text, memories read and written as the text goes on."""
        state, flags = self._val_state, {"reset": batch.reset, "mask": batch.mask, "breaks": batch.breaks}
        out = self.model(batch.ids, state=None if batch_idx == 0 else state, logits=False, donate=True, **flags)
        self._val_state = out.state
        nll = (token_nll(self.model, out.hidden, batch.targets) * batch.weight).sum() / batch.weight.sum().clamp(min=1)
        self.log("val/nll", nll, batch_size=int(batch.weight.sum()), sync_dist=True)

    def on_validation_end(self) -> None:
        """Let go of the state: the next validation begins anew."""
        self._val_state = None
        self._whole.close()

    # --- optimisation ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """See `make_optimizer`."""
        total = self.total_steps or self.trainer.max_steps or 1  # 0: no step is made
        if total < 1:
            raise ValueError("the learning-rate schedule needs trainer.max_steps (or total_steps): set it to a number")
        return make_optimizer(self.model, self.settings, total)

    def on_after_backward(self) -> None:
        """Average the gradients of what every process has a copy of beside layers that are dealt out."""
        if self.dealt.are_dealt:
            average_gradients(self.parameters(), self.trainer.world_size)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as Lightning does; it cannot where only some of the weights are dealt out."""
        if not self.dealt.are_dealt:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None and gradient_clip_val > 0:
            clip_gradients(self.parameters(), gradient_clip_val, by_value=gradient_clip_algorithm == "value")

    # --- resuming ----------------------------------------------------------------------------------------------------

    # The data position is the trainer's own (its batch progress): the data module begins where that stands, and a batch
    # is a function of its number alone.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the tokenizer and the state that is carried from window to window.

        Raises:
            NonFiniteLoss: If weights are not finite: nothing is written then.
        """
        check_saved(checkpoint, self.model, self.global_step, Path(self.trainer.default_root_dir))
        if hasattr(self.model, "config"):
            ids = [logger.version for logger in self.trainer.loggers if type(logger).__name__ == "WandbLogger"]
            corpus = getattr(self.trainer.datamodule, "corpus", None)  # type: ignore[attr-defined]
            checkpoint["memlm"] = describe(self.model) | {
                "wandb_id": ids[0] if ids else None,
                "threads": torch.get_num_threads() if self.trainer.world_size == 1 else None,
                "text": None if corpus is None else corpus.fingerprint(),
                "n_moment": sum(len(part.get("state", ())) for part in checkpoint.get("optimizer_states", [])),
            }
        for prefix, module in self.banks.sharded.items():
            bank = module.whole_bank(keep=self.trainer.is_global_zero)  # the process that writes
            checkpoint["state_dict"] |= {f"{prefix}{name}": part for name, part in bank.items()}
        if not self.dealt.are_dealt and "optimizer_states" in checkpoint:
            number_by_place(self.parameters(), self.trainer.optimizers, checkpoint["optimizer_states"])
        checkpoint["carried"] = self.carried.save(self.trainer.world_size)
        if self.replay is not None:
            checkpoint["replay"] = of_all_ranks(self.replay.state_dict(), self.trainer.world_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the carried state, the replay buffer, and of sharded banks the shard of this process.

        Of other processes than before, each gets its rows.

        Raises:
            ConfigError: If the rows of a batch cannot be dealt out to so many processes.
        """
        for prefix, module in self.banks.sharded.items():
            rank, n_rank = module.rank
            for name in module.by_slot():
                checkpoint["state_dict"][prefix + name] = checkpoint["state_dict"][prefix + name][:, rank::n_rank]
        self.carried.load(checkpoint.get("carried"), self.global_rank, self.trainer.world_size)
        if self.replay is not None and "replay" in checkpoint:
            self.replay.take_up(checkpoint["replay"], self.global_rank, self.trainer.world_size)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", **arguments: Any
    ) -> LanguageModeling:
        """Load the model of a checkpoint with the settings that it was trained with.

        What only a run that goes on needs (optimizer, carried rows, replayed windows) is left to ``resume``.

        Args:
            checkpoint_path: A run directory or a checkpoint file, see `memlm.load`.
            map_location: The device; None for the CPU.
            **arguments: Of the constructor, in place of what the checkpoint says.

        Raises:
            ConfigError: If there is no checkpoint, or it is damaged or not one of memlm.
        """
        if wrong := [name for name in arguments if name not in ("settings", "total_steps", "seed", "replay")]:
            raise ConfigError(
                f"load_from_checkpoint takes no {wrong[0]}: the model is the one of the checkpoint; for a model alone "
                "there is memlm.load(path)"
            )
        model = load(checkpoint_path)
        training = {name: value for name, value in model.config["training"].items() if name != "_target_"}
        own = {"settings": Training(**training), "seed": model.config["seed"], "replay": build_replay(model.config)}
        return cls(model, **own | arguments).to(map_location or "cpu")


def _mean_over_ranks(value: Tensor, trainer: lightning.Trainer) -> Tensor:
    """Mean of a scalar over all processes, so that a batch that is dealt out to ranks has the loss of the whole."""
    if trainer.world_size == 1:
        return value
    return trainer.strategy.reduce(value.clone(), reduce_op="mean")  # which overwrites what it is given
