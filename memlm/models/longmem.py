"""LongMem: a frozen pretrained decoder, and beside it a trained network of some of its layers, which has the memory.

Source: W. Wang et al., "Augmenting language models with long-term memory" (NeurIPS 2023, 2306.07174). As there, the
base stays as it is and only encodes. Side layer l is a copy of every second layer of the base (``every``). The side
network goes on from

    x_(l+1) = f_l(x_l) + H_(2l+2) - H_(2l)

with the states H of the base, and the last x goes through the norm and the head of the base. What memory keeps comes
from the base alone, so it does not age while the side network is trained: keys and values are those of the base's own
layer, the one that the side layer is a copy of, and queries are those of the side layer. Retrieval of chunks, with a
gate for each head between what is retrieved and what attention finds, is ``memory=knn`` with ``chunk``. Other than
there:

- A learned gate g_l stands before what a side layer adds. With x = H + d, what the side network adds to the base, the
  source's step is d_(l+1) = d_l + (f_l(x_l) - x_l); here it is d_l + g_l (f_l(x_l) - x_l). With ``gate=1`` it begins as
  in the source; with 0, the default, it begins as the base, exactly, and whatever memory holds.
- Any memory around a layer can stand in the side network, in as many of its layers as wanted.
- Rows do not share a bank, what is written does not depend on how text is cut into calls (see `memlm.memory.knn`), and
  an empty bank leaves a side layer as it is without one.

Attention of both sees a segment and what it takes in again, as in `memlm.models.pretrained`.

Shapes: R rows, L tokens, B rows, S segments of the grid, Q columns computed, D model width, G heads of keys, E width of
a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from memlm.memory.contract import Memory
from memlm.memory.state import State
from memlm.models.decoder import Attend, DecoderLayer, Keys
from memlm.models.grid import Grid
from memlm.models.mixers import SegmentLayer
from memlm.models.pretrained import Pretrained
from memlm.models.shell import Shell, Told


class SideLayer(DecoderLayer):
    """A copy of a layer of the base, which is trained and therefore has 32 bits."""

    def _run(self, x: Tensor, told: Told, attend: Attend) -> Tensor:
        return super()._run(x, told.map(lambda part: part.float() if part.is_floating_point() else part), attend)

    def _told(self, x: Tensor, places: Tensor) -> Told:
        return super()._told(x.to(self._shell[0].causal.dtype), places)


class LongMem(Pretrained):
    """A frozen decoder of transformers with a side network, which has the memory.

    Args:
        n_vocab: Ids of the tokenizer; at most those of the base.
        memories: By name, a constructor of one memory module, called with ``d_model``.
        path: Folder of the base, or its name on the hub, of which it is in the cache.
        revision: Branch, tag or commit of a base of the hub; None for the newest in the cache.
        sha256: Hash of the weights of the base; see `Pretrained`.
        every: One layer of the base in so many is copied into the side network, the last of each; 2 in the source.
        gate: Share of what a side layer adds at first: 0 for the base as it is, 1 as in the source.
        dtype: Type of the base's numbers; side network and memories are float32.
        segment_len: Tokens per segment.
        overlap: Tokens of the segment before that are taken in again.
        memory_layers: Layers of the side network with memory: ``middle``, ``all``, or a list of indices from 0.
        gradient_checkpointing: Recompute activations of the side network in the backward pass, to save memory.

    Attributes:
        below: The layers of the base.
        side_gates: Share of what each side layer adds, (layers,).

    Raises:
        ValueError: If a setting cannot work; the message names it.
        ConfigError: If there is no such base, or it cannot be taken.
    """

    by_column = False  # the base below has to see each token too

    def __init__(
        self,
        n_vocab: int,
        memories: Mapping[str, Callable[..., Memory]],
        path: str | None = None,
        revision: str | None = None,
        sha256: str | None = None,
        every: int = 2,
        gate: float = 0.0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        segment_len: int = 128,
        overlap: int = 16,
        memory_layers: Literal["middle", "all"] | list[int] = "middle",
        gradient_checkpointing: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"model.every must be at least 1, got {every}")
        self.every = every  # asked for when the layers are made
        super().__init__(
            n_vocab,
            memories,
            path=path,
            revision=revision,
            sha256=sha256,
            dtype=dtype,
            segment_len=segment_len,
            overlap=overlap,
            memory_layers=memory_layers,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.side_gates.data.fill_(gate)
        for name, modules in self.memory.items():
            if modules[0].around == "stack":
                raise ValueError(
                    f"memory {name!r} stands around a whole model, and here only a side network has memory: choose "
                    "model=pretrained, or a memory around a layer, such as knn"
                )

    # --- see `Pretrained` --------------------------------------------------------------------------------------------

    def stacked(self, n_layer: int) -> int:
        """See `Pretrained.stacked`: the layers of the side network."""
        if self.every > n_layer:
            raise ValueError(f"model.every must be at most {n_layer}, the layers of the base, got {self.every}")
        return n_layer // self.every

    def lay(self, layers: Sequence[nn.Module], how: tuple[Shell, str, int, int]) -> None:
        """See `Pretrained.lay`. The gates are closed, so that what is checked of the base holds."""
        kept = {id(getattr(self.base.causal, "config", None)): self.base.causal.config}  # not copied with a layer
        self.below = nn.ModuleList(DecoderLayer(i, layer, *how, 1.0) for i, layer in enumerate(layers))
        copied = range(self.every - 1, len(layers), self.every)
        self.layers = nn.ModuleList(
            SideLayer(i, copy.deepcopy(layers[i], dict(kept)).float(), *how, 1.0) for i in copied
        )
        self.side_gates = nn.Parameter(torch.zeros(len(copied)))

    def trains(self, name: str) -> bool:
        """See `Pretrained.trains`."""
        return name.startswith(("layers.", "side_gates"))

    def through(self, x: Tensor, told: Sequence[Told], mask: Tensor | None) -> tuple[Tensor, list[Keys]]:
        """See `Pretrained.through`. Keys and values of the side network come last."""
        states, keys = [x], []
        for layer, one in zip(self.below, told, strict=True):
            x, kept = layer.again(x, one, mask)
            states.append(x)
            keys.append(kept)
        y = states[0].float()
        for i, layer in enumerate(self.layers):
            after, kept = layer.again(y, told[layer.number], mask)
            y = self._stepped(i, y, after, states)
            keys.append(kept)
        return y, keys

    # --- see `Stack` -------------------------------------------------------------------------------------------------

    def ready(self, grid: Grid, ids: Tensor, below: Sequence[State]) -> Grid:
        """See `Stack.ready`. The base is run here: it knows of no memory."""
        grid = super().ready(grid, ids, below)
        x, states, kept = grid.before.entered, [grid.before.entered], []
        for layer, cache in zip(self.below, below, strict=True):
            x, part = layer.mix(x, cache, grid)
            states.append(x)
            kept.append(part)
        keys = grid.before.keys
        if keys is not None:
            keys, own = keys[: len(self.below)], keys[len(self.below) :]
            for layer, part in zip(self.layers, own, strict=True):
                keys[layer.number] = part
        return grid._replace(before=grid.before._replace(keys=keys, below=tuple(states), kept=tuple(kept)))

    def below_after(self, grid: Grid, stays_open: Callable[[Tensor, Tensor], Tensor]) -> tuple[State, ...]:
        """See `Stack.below_after`."""
        return tuple(
            layer.next_cache(kept, stays_open) for layer, kept in zip(self.below, grid.before.kept, strict=True)
        )

    def entered(self, embeddings: Tensor, grid: Grid) -> Tensor:
        """See `Stack.entered`."""
        return grid.before.entered.float()

    def left(self, i: int, entered: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """See `Stack.left`: the residual connection to the base."""
        return self._stepped(i, entered, x, grid.before.below)

    def written(self, stream: str, i: int, x: Tensor, grid: Grid) -> Tensor:
        """See `Stack.written`: the same stream of the base."""
        number = self.layers[i].number
        return grid.before.below[number if stream == "input" else number + 1]

    def writer(self, i: int) -> SegmentLayer:
        """See `Stack.writer`: the layer of the base that a side layer is a copy of."""
        return self.below[self.layers[i].number]

    def _stepped(self, i: int, entered: Tensor, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """What enters the side layer behind layer ``i``, which made ``x`` of ``entered``.

        Where nothing was added to the base so far, and the gate is closed, it is the state of the base bit for bit.
        """
        is_last = i + 1 == len(self.layers)
        here, there = states[i * self.every], states[-1 if is_last else (i + 1) * self.every]
        y = there + ((entered - here) + self.side_gates[i] * (x - entered))
        return y.to(there.dtype) if is_last else y
