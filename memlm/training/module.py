"""The LightningModule around any model with any memory."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from memlm import distributed
from memlm.analysis.usage import memory_numbers
from memlm.checkpoint import FOLDER, describe, load
from memlm.config import ConfigError, check_arguments, did_you_mean, instantiate
from memlm.data.stream import Batch
from memlm.memory import state as states
from memlm.memory.contract import Memory
from memlm.memory.sharding import SharedBank
from memlm.models.base import LanguageModel
from memlm.training.loss import linear_cross_entropy, token_nll
from memlm.training.replay import Replay, build_replay, check_sources, retrieved
from memlm.training.settings import Training


class NonFiniteLoss(ValueError):
    """The loss or the weights became infinite or NaN."""


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
        if self._retrieves:
            check_sources(model)
        self._state: Any = None  # where the rows stopped, without shared banks
        self._val_state: Any = None
        self._curriculum: Any = None  # whose phases set memories while they are trained
        self._compiled: Any = None  # the compiled forward pass, while it is trained
        self._plain_layers: list[nn.Module] = []  # without weights, of the layers that are dealt out
        self._whole = contextlib.ExitStack()  # during validation, banks that are sharded at other times
        self._bytes: dict[int, int] = {}  # of all memories, by number of rows

    @property
    def shared(self) -> list[str]:
        """Names of the memories whose bank all rows share."""
        return [name for name, modules in self.model.memory.items() if modules[0].scope == "shared"]

    @property
    def _retrieves(self) -> bool:
        """Whether what is replayed depends on what the batch reads."""
        return self.replay is not None and self.replay.policy == "retrieved"

    def setup(self, stage: str) -> None:
        """Leave shared banks to the writes of all processes: sending them before each step would hide faults.

        Banks of memories with ``shard`` are sharded over the processes, until training ends.

        Raises:
            ConfigError: If a bank cannot be shared or sharded.
        """
        banks = [name for name, _ in self.named_buffers() if name.rpartition(".")[0].endswith(".bank")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, banks)
        n_rank = self.trainer.world_size
        if stage != "fit" or n_rank == 1:
            return
        for name in self.shared:
            for module in self.model.memory[name]:
                if not isinstance(module, SharedBank):
                    raise ConfigError(
                        f"memory.{name}.scope=shared works in one process alone, as a {type(module).__name__} is no "
                        f"SharedBank: set trainer.devices=1, or memory.{name}.scope=sequence"
                    )
                if not module.shard:
                    continue
                if self.device_mesh is not None:
                    raise ConfigError(
                        f"memory.{name}.shard=true needs trainer=ddp: other strategies read checkpoints whole"
                    )
                if module.n_slot < n_rank:
                    raise ConfigError(
                        f"memory.{name}.n_slot ({module.n_slot}) must be at least the number of processes ({n_rank}), "
                        f"which share the slots: raise it, or set memory.{name}.shard=false"
                    )
                if self.replay is not None:
                    raise ConfigError(
                        f"memory.{name}.shard=true cannot be had with replay, whose rows write a copy of the bank in "
                        f"each process: set replay=none, or memory.{name}.shard=false"
                    )
                module.shard_bank(self.global_rank, n_rank)

    def on_fit_start(self) -> None:
        """Check what only the trainer knows, before the first step."""
        self._curriculum = curriculum = getattr(self.trainer.datamodule, "curriculum", None)  # type: ignore[attr-defined]
        for i, phase in enumerate(curriculum.phases if curriculum is not None else []):
            for end in (0, -1):
                settings = {n: v[end] if isinstance(v, list | tuple) else v for n, v in phase.memory.items()}
                check_memory_settings(self.model, settings, f"curriculum.phases[{i}].memory")
        # Not nn.Module.compile: the model itself stays as it is for evaluation, whose shapes vary. Keys stay the same.
        self._compiled = torch.compile(self.model.forward) if self.settings.compile else None

    def configure_model(self) -> None:
        """Under ``trainer=fsdp`` deal the weights of the layers out to the processes of a machine.

        All else (embedding, memories, last norm) is used outside of calls of modules: each process keeps a copy of it.
        """
        if self.device_mesh is None or self._plain_layers:
            return
        layers: Any = self.model.layers
        for layer in layers:
            self._plain_layers.append(_skeleton(layer))
            fully_shard(layer.feed_forward, mesh=self.device_mesh)
            fully_shard(layer, mesh=self.device_mesh)
            for method in ("mix", "next_cache", "heads", "attend", "attend_to", "out", "seen"):
                register_fsdp_forward_method(layer, method)

    def on_after_backward(self) -> None:
        """Average the gradients of what every process has a copy of beside layers that are dealt out."""
        if not self._plain_layers:
            return
        grads = [p.grad for p in self.parameters() if p.grad is not None and not isinstance(p, DTensor)]
        joined = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(joined)
        joined /= self.trainer.world_size
        for grad, mean in zip(grads, joined.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as Lightning does; it cannot where only some of the weights are dealt out."""
        if not self._plain_layers:
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if gradient_clip_val is None or gradient_clip_val <= 0:
            return None
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if gradient_clip_algorithm == "value":
            for grad in grads:
                own = grad.to_local() if isinstance(grad, DTensor) else grad
                own.clamp_(-gradient_clip_val, gradient_clip_val)
            return None
        norms = [torch.linalg.vector_norm(grad) for grad in grads]
        total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        scale = (gradient_clip_val / (total + 1e-6)).clamp(max=1)
        for grad in grads:
            grad.mul_(scale)
        return None

    @property
    def _sharded(self) -> dict[str, SharedBank]:
        """The memories whose bank is sharded over processes now, by the prefix of their buffers."""
        return {
            f"model.memory.{name}.{i}.bank.": module
            for name in self.shared
            for i, module in enumerate(self.model.memory[name])
            if isinstance(module, SharedBank) and module.is_sharded
        }

    @contextlib.contextmanager
    def whole_banks(self) -> Iterator[None]:
        """Hold sharded banks as a whole in each process, for what is no training step.

        Collective. Each process needs room for a whole bank for as long as it takes.
        """
        sharded = list(self._sharded.values())
        for module in sharded:
            module.gather_bank(self.device)
        try:
            yield
        finally:
            for module in sharded:
                module.shard_bank(self.global_rank, self.trainer.world_size)

    @contextlib.contextmanager
    def whole_layers(self) -> Iterator[None]:
        """Hold layers that are dealt out to processes as a whole in each of them, for what they do not all do alike.

        All processes have to enter: layers that are dealt out wait for all processes whenever they are called.
        """
        layers: Any = self.model.layers
        dealt = list(layers)
        for i, layer in enumerate(self._whole_layers()):
            layers[i] = layer
        try:
            yield
        finally:
            for i, layer in enumerate(dealt):
                layers[i] = layer

    def _whole_layers(self) -> list[nn.Module]:
        """Copies, with all weights, of the layers that are dealt out to processes. Every process has to ask."""
        layers: Any = self.model.layers
        copies = [_skeleton(plain) for plain in self._plain_layers]
        for i, plain in enumerate(copies):
            weights = layers[i].state_dict()
            whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
            plain.load_state_dict(whole, assign=True)
            plain.to(self.device)  # tables that are not among the weights
        return copies

    def on_train_end(self) -> None:
        """Put banks and layers that were dealt out together again, in every process."""
        for module in self._sharded.values():
            module.gather_bank("cpu")
        layers: Any = self.model.layers
        for i, layer in enumerate(self._whole_layers()):
            layers[i] = layer
        self._plain_layers = []

    def on_fit_end(self) -> None:
        """Let go of what only training needs."""
        self._compiled = None

    # --- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one window."""
        torch.manual_seed((self.seed * 1_000_003 + batch.step) * 4096 + self.global_rank)
        settings = {} if self._curriculum is None else self._curriculum.memory_settings(batch.step)
        with memory_settings(self.model, settings):
            return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        """The loss; goes on with the carried state, commits shared banks, and replays earlier windows."""
        state = None if batch.fresh else self._state
        if state is not None and state.local.n_row != len(batch.ids):
            state = None
        if state is not None:
            state = self._with_banks(state)
        elif self._retrieves:
            state = self.model.init_state(len(batch.ids))
        with self._all_ranks_write():
            out = self._forward(batch, state, keep_state=not batch.ends or bool(self.shared) or self._retrieves)
        drawn, own = None, self._weight(batch).sum()
        if self.replay is not None:
            reads = retrieved(self.model, state, out.state, out.reads) if self._retrieves else ()
            drawn = self.replay.draw(batch, self.global_rank, reads)
            if self._plain_layers and self._mean_over_ranks(own.new_tensor(float(drawn is not None))) > 0:
                # All processes call layers that are dealt out, or none does: one that drew nothing has a row without
                # weight.
                drawn = drawn or (_weightless(batch), [])
        weight = self._mean_over_ranks(own if drawn is None else own + self._weight(drawn[0]).sum()).clamp(min=1)
        losses, nll, by_row = self._losses(batch, out, weight)
        logged = losses["next-token loss"].detach()
        if self.replay is not None:
            logged = logged * weight / self._mean_over_ranks(own).clamp(min=1)
        if drawn is not None:
            again, places = drawn
            repeated, _, of_rows = self._losses(again, self._forward(again, state=None, keep_state=False), weight)
            if places:
                self.replay.update(places, of_rows)  # type: ignore[union-attr]
            else:
                repeated = {"next-token loss": repeated["next-token loss"]}
            losses |= {f"replayed {name}": value for name, value in repeated.items()}
        total = sum(losses.values(), torch.zeros((), device=nll.device))
        if not torch.isfinite(total):
            raise NonFiniteLoss(self._explain(losses))
        if self.replay is not None:
            n_segment = batch.ids.shape[1] // self.model.segment_len
            self.replay.offer(batch, by_row, n_segment, self.global_rank)
        for name in self.shared:
            for module, part in zip(self.model.memory[name], out.state.memory[name], strict=True):
                module.bank.commit(part)
                if self._parted(part.n_record if isinstance(module, SharedBank) and module.is_sharded else part):
                    raise RuntimeError(
                        f"memory {name!r}: the processes hold different banks after step {self.global_step}, though "
                        "all write the same; go on from the last checkpoint with "
                        f"resume={self.trainer.default_root_dir}"
                    )
        self._state = None if batch.ends else self._without_banks(states.detach(out.state))
        self.log("train/loss", logged, sync_dist=self.trainer.world_size > 1)
        if (batch.step + 1) % self.trainer.accumulate_grad_batches == 0:  # the last batch of an optimizer step
            every = self.settings.consolidate_every
            if every is not None and (self.global_step + 1) % every == 0:
                self._consolidate((self.global_step + 1) // every - 1)
            if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self._log_details(batch, nll, losses, out)
                if drawn is not None and places:
                    self._log_once({"train/replay_nll": of_rows.mean()})
        return total

    def _forward(self, batch: Batch, state: Any, keep_state: bool) -> Any:
        """The model's output for a batch."""
        return (self._compiled or self.model)(
            batch.ids,
            state=state,
            reset=batch.reset,
            mask=batch.mask,
            breaks=batch.breaks,
            logits=False,
            keep_state=keep_state,
        )

    def _weight(self, batch: Batch) -> Tensor:
        """Weight of each target in the loss, (B, N)."""
        return batch.weight * (1 + (self.settings.answer_weight - 1) * batch.answer)

    def _losses(self, batch: Batch, out: Any, total: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses by name, and without gradients the next-token loss of each token (B, N) and each row (B,).

        The next-token loss among the former is a mean over the weight ``total``.
        """
        weight = self._weight(batch)
        loss, nll = linear_cross_entropy(
            out.hidden, self.model.head_weight, batch.targets, weight / total, compiled=self._compiled is not None
        )
        by_row = (nll * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        losses = {"next-token loss": loss} | {
            f"{name}/{key}": value
            for name, modules in self.model.memory.items()
            for key, value in modules[0].losses(out.trace[name], by_row).items()
        }
        return losses, nll, by_row

    @torch.no_grad()
    def _consolidate(self, turn: int) -> None:
        """Consolidate shared banks and what is carried on, and log the counts of what was done.

        A sharded bank is gathered for it: each process consolidates the whole and keeps its shard.
        """
        counts: dict[str, float] = {}

        def consolidate(name: str, module: Memory, part: Any) -> Any:
            new, done = module.consolidate(part, turn=turn)
            for key, count in done.items():
                counts[f"memory/{name}/{key}"] = counts.get(f"memory/{name}/{key}", 0) + count
            return new

        for name, modules in self.model.memory.items():
            if name in self.shared:
                with self.whole_banks():
                    for module in modules:
                        module.bank.commit(consolidate(name, module, module.bank.first(1)))
            elif self._state is not None:
                parts = zip(modules, self._state.memory[name], strict=True)
                new = tuple(consolidate(name, module, part) for module, part in parts)
                self._state = self._state._replace(memory=self._state.memory | {name: new})
        if counts:
            self._log_once(counts)

    def _log_once(self, numbers: Mapping[str, float | Tensor]) -> None:
        """Log what not every step has. Not by `self.log`, which repeats a number in later steps until the next one."""
        plain = {name: float(value) for name, value in numbers.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(plain, step=self.global_step)

    @contextlib.contextmanager
    def _all_ranks_write(self) -> Iterator[None]:
        """Shared banks are written by the rows of all processes, in their order in the global batch."""
        modules = [m for name in self.shared for m in self.model.memory[name]] if self.trainer.world_size > 1 else []
        for module in modules:
            module.over_ranks = True
        try:
            yield
        finally:
            for module in modules:
                module.over_ranks = False

    def _parted(self, bank: Any) -> bool:
        """Whether a bank is not the same in all processes, looked at when something is logged."""
        alone = self.trainer.world_size == 1 or self.global_step % self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return not alone and distributed.differ(states.tensors(bank))

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        """Mean of a scalar over all processes, so that a batch that is dealt out to ranks has the loss of the whole."""
        if self.trainer.world_size == 1:
            return value
        return self.trainer.strategy.reduce(value.clone(), reduce_op="mean")  # which overwrites what it is given

    def _without_banks(self, state: Any) -> Any:
        """``state`` without what all rows share: that is kept in the model, and nowhere else."""
        shared = self.shared
        return state._replace(memory={name: () if name in shared else part for name, part in state.memory.items()})

    def _with_banks(self, state: Any) -> Any:
        """``state`` with every shared bank as it is now."""
        n_row = state.local.n_row
        banks = {name: tuple(module.bank.first(n_row) for module in self.model.memory[name]) for name in self.shared}
        return state._replace(memory=state.memory | banks)

    def _state_bytes(self, n_row: int) -> int:
        """Bytes of all memories of ``n_row`` rows."""
        if n_row not in self._bytes:
            self._bytes[n_row] = states.n_byte(self.model.init_state(n_row).memory)
        return self._bytes[n_row]

    @torch.no_grad()
    def _log_details(self, batch: Batch, nll: Tensor, losses: dict[str, Tensor], out: Any) -> None:
        """Log what the memories do and how well questions are answered."""
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        text = batch.weight * ~batch.answer
        self.log("train/nll_text", (nll * text).sum() / text.sum().clamp(min=1))
        if batch.answer.any():
            right = self.model.head(out.hidden[batch.answer]).argmax(dim=-1) == batch.targets[batch.answer]
            accuracy, answered = right.float().mean(), nll[batch.answer].mean()
            self._log_once({"train/answer_accuracy": accuracy, "train/nll_answer": answered})
        for name, loss in losses.items():
            if name.partition("/")[0] in self.model.memory:
                self.log(f"train/{name}", loss)
        for name, number in memory_numbers(out).items():
            self.log(name, number)
        self.log("memory/state_bytes", float(self._state_bytes(len(batch.ids))))

    def _explain(self, losses: dict[str, Tensor]) -> str:
        """Where the numbers went wrong."""
        bad = [name for name, value in losses.items() if not torch.isfinite(value)]
        weights = [name for name, value in self.model.named_parameters() if not torch.isfinite(value).all()]
        where = f"; weights that are not finite: {', '.join(weights[:5])}" if weights else "; all weights are finite"
        return f"the loss is not finite at step {self.global_step}: {', '.join(bad)}{where}. {self._advice()}"

    def _advice(self) -> str:
        """What to do about numbers that are not finite."""
        folder = Path(self.trainer.default_root_dir) / FOLDER
        kept = "The last good checkpoint is kept. " if folder.is_dir() and any(folder.glob("*.ckpt")) else ""
        return f"{kept}Lower training.lr, or set trainer.gradient_clip_val or trainer.precision=32-true"

    # --- resuming ----------------------------------------------------------------------------------------------------

    # The data position is the trainer's own (its batch progress): the data module begins where that stands, and a batch
    # is a function of its number alone.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the tokenizer and the state that is carried from window to window.

        Raises:
            NonFiniteLoss: If weights are not finite: nothing is written then.
        """
        self._refuse_non_finite(checkpoint)
        if hasattr(self.model, "config"):
            ids = [logger.version for logger in self.trainer.loggers if type(logger).__name__ == "WandbLogger"]
            corpus = getattr(self.trainer.datamodule, "corpus", None)  # type: ignore[attr-defined]
            checkpoint["memlm"] = describe(self.model) | {
                "wandb_id": ids[0] if ids else None,
                "text": None if corpus is None else corpus.fingerprint(),
                "n_moment": sum(len(part.get("state", ())) for part in checkpoint.get("optimizer_states", [])),
            }
        for prefix, module in self._sharded.items():
            bank = module.whole_bank(keep=self.trainer.is_global_zero)  # the process that writes
            checkpoint["state_dict"] |= {f"{prefix}{name}": part for name, part in bank.items()}
        if not self._plain_layers and "optimizer_states" in checkpoint:
            self._number_by_place(checkpoint["optimizer_states"])
        checkpoint["carried"] = None if self._state is None else states.to_dict(self._of_all_ranks(self._state))
        if self.replay is not None:
            checkpoint["replay"] = self._parts_of_all_ranks(self.replay.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the carried state, the replay buffer, and of sharded banks the shard of this process.

        Of other processes than before, each gets its rows.

        Raises:
            ConfigError: If the rows of a batch cannot be dealt out to so many processes.
        """
        for prefix, module in self._sharded.items():
            rank, n_rank = module.rank
            for name in module.by_slot():
                checkpoint["state_dict"][prefix + name] = checkpoint["state_dict"][prefix + name][:, rank::n_rank]
        carried = checkpoint.get("carried")
        self._state = None
        if carried is not None:
            n_row, n_rank = len(carried["local"]["n_open"]), self.trainer.world_size
            if n_row % n_rank:
                raise ConfigError(
                    f"the checkpoint carries {n_row} rows, which cannot be dealt out evenly to {n_rank} processes: set "
                    f"trainer.devices to a divisor of {n_row}"
                )
            state = states.from_dict(carried, self._without_banks(self.model.init_state(n_row)))
            self._check_memories(state)
            own = torch.arange(n_row).chunk(self.trainer.world_size)[self.global_rank]
            self._state = states.select_rows(state, own)
        if self.replay is not None and "replay" in checkpoint:
            self.replay.take_up(checkpoint["replay"], self.global_rank, self.trainer.world_size)

    def _check_memories(self, carried: Any) -> None:
        """Refuse carried memories that no text can have led to: see `memlm.memory.contract.Memory.check`."""
        for name, parts in carried.memory.items():
            for module, part in zip(self.model.memory[name], parts, strict=bool(parts)):  # shared banks are not carried
                try:
                    module.check(part)
                except ValueError as error:
                    raise ConfigError(
                        f"the checkpoint carries a state of the memory {name!r} that no text can have led to "
                        f"({error}): go on from an earlier checkpoint"
                    ) from error

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

    def on_train_start(self) -> None:
        """Bring the carried state to the device of the model."""
        if self._state is not None:
            self._state = states.move(self._state, self.device)

    def _number_by_place(self, optimizer_states: list[dict[str, Any]]) -> None:
        """Number parameters by their place in the model, not in the optimizer: as layers that are dealt out expect."""
        place = {id(p): i for i, p in enumerate(self.parameters())}
        for optimizer, content in zip(self.trainer.optimizers, optimizer_states, strict=True):
            places = [[place[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            flat = [i for group in places for i in group]
            content["state"] = {flat[i]: entry for i, entry in content["state"].items()}
            content["param_groups"] = [
                group | {"params": numbers} for group, numbers in zip(content["param_groups"], places, strict=True)
            ]

    def _of_all_ranks(self, state: Any) -> Any:
        """The rows of all processes, in the order of the global batch."""
        if self.trainer.world_size == 1:
            return state
        parts = self._parts_of_all_ranks(states.to_dict(states.move(state, "cpu")))
        rows = [states.from_dict(part, state) for part in parts]
        return states.map_tensors(lambda *part: torch.cat(part), *rows)

    def _parts_of_all_ranks(self, own: Any) -> list[Any]:
        """What each process has, in rank order."""
        parts = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, own)
        return parts

    def _refuse_non_finite(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise if what is to be saved can never be trained or read again."""
        bad = [name for name, value in self.model.named_parameters() if not _finite(value)]
        bad += [name for name, value in self.model.named_buffers() if value.is_floating_point() and value.isnan().any()]
        for optimizer in checkpoint.get("optimizer_states", []):
            parts = [value for entry in optimizer.get("state", {}).values() for value in entry.values()]
            if not all(torch.isfinite(value).all() for value in parts if isinstance(value, Tensor)):
                bad.append("the state of the optimizer")
        if bad:
            raise NonFiniteLoss(
                f"the update of step {self.global_step} left numbers that are not finite: {', '.join(bad[:5])}. "
                f"{self._advice()}"
            )

    def on_validation_start(self) -> None:
        """Every process validates by itself, so that it needs the whole of a sharded bank."""
        self._whole.enter_context(self.whole_banks())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Perplexity of plain text, memories read and written as the text goes on."""
        state = None if batch_idx == 0 else self._val_state
        out = self.model(batch.ids, state=state, reset=batch.reset, mask=batch.mask, breaks=batch.breaks, logits=False)
        self._val_state = out.state
        nll = (token_nll(self.model, out.hidden, batch.targets) * batch.weight).sum() / batch.weight.sum().clamp(min=1)
        self.log("val/nll", nll, batch_size=int(batch.weight.sum()), sync_dist=True)

    def on_validation_end(self) -> None:
        """Let go of the state: the next validation begins anew."""
        self._val_state = None
        self._whole.close()

    # --- optimisation ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW with decay groups; linear warm-up, then a cosine."""
        total = self.total_steps or self.trainer.max_steps
        if total < 1:
            raise ValueError("the learning-rate schedule needs trainer.max_steps (or total_steps): set it to a number")
        own = self.settings
        optimizer = torch.optim.AdamW(decay_groups(self.model, own.weight_decay), lr=own.lr, betas=own.betas)
        warmup, floor = min(own.warmup_steps, total), own.min_lr_ratio

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            part = min((step - warmup) / max(total - warmup, 1), 1.0)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _skeleton(layer: nn.Module) -> nn.Module:
    """A copy of a layer whose weights take no memory."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)


def _weightless(batch: Batch) -> Batch:
    """The first row of a batch, in which nothing counts in the loss."""
    first: dict[str, Any] = {name: part[:1] for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**first | {"weight": torch.zeros_like(first["weight"])})


def _finite(weight: Tensor) -> bool:
    """Whether all numbers of a weight are finite. If it is dealt out, every process has to ask."""
    finite = torch.isfinite(weight).all()
    return bool(finite.full_tensor() if isinstance(finite, DTensor) else finite)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight matrices are decayed, the rest (and embeddings) is not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@contextlib.contextmanager
def memory_settings(model: LanguageModel, settings: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of memories, ``name.attribute``, for one training step; memories the model lacks are skipped.

    Plain attributes are put back: a model is evaluated, saved and loaded with the settings it was built with. Buffers
    keep the value, as they are part of the model and its checkpoints.

    Raises:
        ConfigError: If a memory has no such attribute.
    """
    _check_attributes(model, settings)
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, attribute, value in _places(model, settings):
            old = getattr(module, attribute)
            if isinstance(old, Tensor):
                with torch.no_grad():
                    old.fill_(value)
            else:
                before.append((module, attribute, old))
                setattr(module, attribute, value)
        yield
    finally:
        for module, attribute, old in before:
            setattr(module, attribute, old)


def _places(model: LanguageModel, settings: Mapping[str, Any]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Module, attribute and value of each setting that concerns the model."""
    for key, value in settings.items():
        name, _, attribute = key.partition(".")
        for module in model.memory[name] if name in model.memory else []:  # noqa: SIM401 - a ModuleDict has no get
            yield module, attribute, value


def check_memory_settings(model: LanguageModel, settings: Mapping[str, Any], key: str) -> None:
    """Check settings of memories, ``name.attribute``, as if the memories were built with them.

    Args:
        model: The model; of memories that it lacks nothing is checked.
        settings: The settings.
        key: Their place in the config, for the errors.

    Raises:
        ConfigError: If a memory has no such setting, refuses the value, or would need other weights for it.
    """
    nodes = model.config["memory"]
    for name in nodes:
        new = {k.partition(".")[2]: value for k, value in settings.items() if k.partition(".")[0] == name}
        new = {attribute: value for attribute, value in new.items() if attribute in nodes[name]}
        if not new:
            continue
        check_arguments(nodes[name]["_target_"], new, f"{key}.{name}", ())
        with torch.random.fork_rng(devices=[]):
            changed = instantiate(
                nodes[name] | new, f"{key}.{name}", model.config["model"]["d_model"], offered={"sizes": model.sizes}
            )
        old = model.memory[name][0]
        shapes, known = ([part.shape for part in module.parameters()] for module in (changed, old))
        fixed = shapes != known or changed.needs.lookback != old.needs.lookback
        fixed = fixed or any(
            getattr(changed, part, None) != getattr(old, part, None) for part in ("scope", "shard", "around")
        )
        if fixed or not all(hasattr(old, attribute) for attribute in new):
            given = ", ".join(f"{name}.{attribute}" for attribute in new)
            raise ConfigError(f"{key}: {given} cannot be changed, as the model was built around it")
    _check_attributes(model, settings)


def _check_attributes(model: LanguageModel, settings: Mapping[str, Any]) -> None:
    """Raise unless the memories have what is to be set."""
    for module, attribute, _ in _places(model, settings):
        if not attribute or not hasattr(module, attribute):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise ConfigError(
                f"there is no setting {attribute!r} of a {type(module).__name__}.{did_you_mean(attribute, names)}"
            )
