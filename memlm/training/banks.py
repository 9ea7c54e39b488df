"""Banks that all rows write, and with several processes the rows of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from memlm import distributed
from memlm.config import ConfigError
from memlm.memory import state as states
from memlm.memory.sharding import SharedBank
from memlm.models.base import LanguageModel


class SharedBanks:
    """The shared banks of a model while it is trained.

    Args:
        model: The model.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @property
    def names(self) -> list[str]:
        """Names of the memories whose bank all rows share."""
        return [name for name, modules in self._model.memory.items() if modules[0].scope == "shared"]

    @property
    def sharded(self) -> dict[str, SharedBank]:
        """The memories whose bank is sharded over processes now, by the prefix of their buffers."""
        return {
            f"model.memory.{name}.{i}.bank.": module
            for name in self.names
            for i, module in enumerate(self._model.memory[name])
            if isinstance(module, SharedBank) and module.is_sharded
        }

    def shard(self, rank: int, n_rank: int, layers_are_dealt: bool, replays: bool) -> None:
        """Shard the banks of memories with ``shard`` over several processes.

        Args:
            rank: This process.
            n_rank: Number of processes.
            layers_are_dealt: Whether a strategy deals layers out, which reads checkpoints whole.
            replays: Whether earlier windows are replayed.

        Raises:
            ConfigError: If a bank cannot be shared or sharded.
        """
        for name in self.names:
            for module in self._model.memory[name]:
                if not isinstance(module, SharedBank):
                    raise ConfigError(
                        f"memory.{name}.scope=shared works in one process alone, as a {type(module).__name__} is no "
                        f"SharedBank: set trainer.devices=1, or memory.{name}.scope=sequence"
                    )
                if not module.shard:
                    continue
                if layers_are_dealt:
                    raise ConfigError(
                        f"memory.{name}.shard=true needs trainer=ddp: other strategies read checkpoints whole"
                    )
                if module.n_slot < n_rank:
                    raise ConfigError(
                        f"memory.{name}.n_slot ({module.n_slot}) must be at least the number of processes ({n_rank}), "
                        f"which share the slots: raise it, or set memory.{name}.shard=false"
                    )
                if replays:
                    raise ConfigError(
                        f"memory.{name}.shard=true cannot be had with replay, whose rows write a copy of the bank in "
                        f"each process: set replay=none, or memory.{name}.shard=false"
                    )
                module.shard_bank(rank, n_rank)

    def gather(self, device: torch.device | str) -> None:
        """Hold sharded banks as a whole again. Collective."""
        for module in self.sharded.values():
            module.gather_bank(device)

    @contextlib.contextmanager
    def whole(self, device: torch.device) -> Iterator[None]:
        """Hold sharded banks as a whole in each process, for what is no training step.

        Collective. Each process needs room for a whole bank for as long as it takes.
        """
        sharded = [(module, *module.rank) for module in self.sharded.values()]
        self.gather(device)
        try:
            yield
        finally:
            for module, rank, n_rank in sharded:
                module.shard_bank(rank, n_rank)

    @contextlib.contextmanager
    def written_by_all(self, n_rank: int) -> Iterator[None]:
        """They are written by the rows of all processes, in their order in the global batch."""
        modules = [m for name in self.names for m in self._model.memory[name]] if n_rank > 1 else []
        for module in modules:
            module.over_ranks = True
        try:
            yield
        finally:
            for module in modules:
                module.over_ranks = False

    def commit(self, state: Any, compare: bool) -> str | None:
        """Make the banks of ``state`` persistent.

        Args:
            state: State of a model.
            compare: Whether to compare banks over all processes; all of them have to.

        Returns:
            Name of a memory whose bank is not the same in all processes; None if there is none, or nothing was
            compared.
        """
        for name in self.names:
            for module, part in zip(self._model.memory[name], state.memory[name], strict=True):
                module.bank.commit(part)
                alike = part.n_record if isinstance(module, SharedBank) and module.is_sharded else part
                if compare and distributed.differ(states.tensors(alike)):
                    return name
        return None

    def left_out(self, state: Any) -> Any:
        """``state`` without them: they are kept in the model, and nowhere else."""
        shared = self.names
        return state._replace(memory={name: () if name in shared else part for name, part in state.memory.items()})

    def put_in(self, state: Any) -> Any:
        """``state`` with each of them as it is now."""
        n_row = state.local.n_row
        banks = {name: tuple(module.bank.first(n_row) for module in self._model.memory[name]) for name in self.names}
        return state._replace(memory=state.memory | banks)
