"""What goes on from window to window: the states of this process's rows."""

from __future__ import annotations

from typing import Any

import torch

from memlm.config import ConfigError
from memlm.data.stream import Batch
from memlm.memory import state as states
from memlm.memory.contract import Memory
from memlm.models.base import LanguageModel
from memlm.training.banks import SharedBanks


class Carried:
    """Where the rows of this process stopped.

    Args:
        model: The model that is trained.
        banks: Its shared banks.

    Attributes:
        state: State of the rows, without shared banks; None if all rows begin anew.
    """

    def __init__(self, model: LanguageModel, banks: SharedBanks) -> None:
        self._model, self._banks = model, banks
        self.state: Any = None

    def begin(self, batch: Batch) -> Any:
        """The state that a batch goes on with, shared banks as they are now; None if it begins anew."""
        if batch.fresh or self.state is None or self.state.local.n_row != len(batch.ids):
            return None
        return self._banks.put_in(self.state)

    def keep(self, batch: Batch, state: Any) -> None:
        """Keep the state after a batch, detached, if its text goes on."""
        self.state = None if batch.ends else self._banks.left_out(states.detach(state))

    def to(self, device: torch.device) -> None:
        """Bring the state to a device."""
        if self.state is not None:
            self.state = states.move(self.state, device)

    @torch.no_grad()
    def consolidate(self, turn: int, device: torch.device) -> dict[str, float]:
        """Consolidate shared banks and what is carried on.

        A sharded bank is gathered for it: each process consolidates the whole and keeps its shard.

        Args:
            turn: Number of the call, see `memlm.memory.contract.Memory.consolidate`.
            device: Where a bank is gathered.

        Returns:
            Counts of what was done, by the name under which they are logged.
        """
        counts: dict[str, float] = {}

        def consolidate(name: str, module: Memory, part: Any) -> Any:
            new, done = module.consolidate(part, turn=turn)
            for key, count in done.items():
                counts[f"memory/{name}/{key}"] = counts.get(f"memory/{name}/{key}", 0) + count
            return new

        shared = self._banks.names
        for name, modules in self._model.memory.items():
            if name in shared:
                with self._banks.whole(device):
                    for module in modules:
                        module.bank.commit(consolidate(name, module, module.bank.first(1)))
            elif self.state is not None:
                parts = zip(modules, self.state.memory[name], strict=True)
                new = tuple(consolidate(name, module, part) for module, part in parts)
                self.state = self.state._replace(memory=self.state.memory | {name: new})
        return counts

    def save(self, n_rank: int) -> Any:
        """The rows of all processes as plain data, in the order of the global batch; None if all begin anew."""
        if self.state is None:
            return None
        if n_rank == 1:
            return states.to_dict(self.state)
        parts = of_all_ranks(states.to_dict(states.move(self.state, "cpu")), n_rank)
        rows = [states.from_dict(part, self.state) for part in parts]
        return states.to_dict(states.map_tensors(lambda *part: torch.cat(part), *rows))

    def load(self, content: Any, rank: int, n_rank: int) -> None:
        """Take up this process's rows of what `save` gave, of other processes than before too.

        Raises:
            ConfigError: If the rows cannot be dealt out to so many processes, or no text can have led to them.
        """
        self.state = None
        if content is None:
            return
        n_row = len(content["local"]["n_open"])
        if n_row % n_rank:
            raise ConfigError(
                f"the checkpoint carries {n_row} rows, which cannot be dealt out evenly to {n_rank} processes: set "
                f"trainer.devices to a divisor of {n_row}"
            )
        state = states.from_dict(content, self._banks.left_out(self._model.init_state(n_row)))
        self._check(state)
        self.state = states.select_rows(state, torch.arange(n_row).chunk(n_rank)[rank])

    def _check(self, state: Any) -> None:
        """Refuse memories that no text can have led to: see `memlm.memory.contract.Memory.check`."""
        for name, parts in state.memory.items():
            for module, part in zip(self._model.memory[name], parts, strict=bool(parts)):  # shared banks are left out
                try:
                    module.check(part)
                except ValueError as error:
                    raise ConfigError(
                        f"the checkpoint carries a state of the memory {name!r} that no text can have led to "
                        f"({error}): go on from an earlier checkpoint"
                    ) from error


def of_all_ranks(own: Any, n_rank: int) -> list[Any]:
    """What each process has, in rank order. Collective."""
    parts = [own] * n_rank
    if n_rank > 1:
        torch.distributed.all_gather_object(parts, own)
    return parts
