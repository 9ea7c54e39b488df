"""Text that grows by one token of each row at a time.

A token that does not end its segment goes through the layers alone: what they have of the open segment, and what
memories will be written from, is changed in place, in copies of its own, and memories are asked once in a segment for
what reads need (`memlm.memory.contract.Memory.prepare`). A token that ends its segment goes the way of all text, with
the rows that it is in. So do tokens that begin one where earlier ones are taken in again with it, and all tokens of
models whose memories stand around the stack or read within a segment.

Shapes: B rows, T tokens per segment, C lookback, n layers with memory, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.memory.contract import Memory
from memlm.memory.state import State, map_tensors
from memlm.models.mixers import ColumnMixer
from memlm.models.stack import Stack
from memlm.models.state import LocalState, ModelState
from memlm.tensors import Host


class Decoder:
    """A text of several rows that goes on token by token.

    Args:
        model: The model.
        state: Where the text stopped; it is given away, as by ``donate`` of the model's ``forward``.
        read: Whether memories are read.
        write: Whether memories are written.
        compile: Whether the step of a token that does not end its segment goes through ``torch.compile``.
    """

    def __init__(self, model: Stack, state: ModelState, read: bool, write: bool, compile: bool = False) -> None:
        self.model, self.read, self.write = model, read, write
        self.by_column = model.by_column and all(_by_column(modules[0]) for modules in model.memory.values())
        self._compiled = compile
        self._step: Callable[..., Tensor] = torch.compile(_step, dynamic=False) if compile else _step
        self._own: bool  # whether states of memories are copies of its own
        self._n_open: list[int]
        self._open: Open
        self._prepared: dict[str, list[Any]]
        self._empty: dict[str, list[Tensor | None]]  # rows without an entry in a memory that is bare then, (B, 1, 1)
        self._take(state)

    def step(self, ids: Tensor) -> Tensor:
        """Take one more token of each row, (B,). Returns the model's hidden states, (B, D)."""
        ends = [n + 1 == self.model.segment_len for n in self._n_open]
        begins = self.model.n_again > 0 and 0 in self._n_open  # what a segment takes in again is not known yet
        if not self.by_column or all(ends) or begins:
            self._prepared = {}  # which may share numbers with banks that are now written in place
            out = self.model(
                ids[:, None], state=self.state(), read=self.read, write=self.write, logits=False, donate=True
            )
            self._take(out.state)
            return out.hidden[:, 0]
        ended = [row for row, end in enumerate(ends) if end]
        after = self._after(ids, torch.tensor(ended, device=ids.device)) if ended else None
        most = self.model.segment_len if self._compiled else max(self._n_open) + 1
        with torch.inference_mode():
            hidden = self._step(self.model, ids, self._open, self._prepared, self._empty, most)
        self._n_open = [n + 1 for n in self._n_open]
        if after is not None:
            self._put(after, ended)
        return hidden

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self._take(self.model.select_rows(self.state(), torch.tensor(rows, device=self._local.ids.device)))

    def state(self) -> ModelState:
        """The state after what was taken so far. Its tensors are changed by the next step."""
        if not self.by_column:
            return ModelState(self._memory, self._local)
        now, n_open = self._open, Host(torch.tensor(self._n_open))
        pairs = zip(self.model.layers, now.layers, strict=True)
        local = self._local._replace(
            cache=tuple(layer.closed(opened) for layer, opened in pairs),
            streams=now.streams,
            ids=now.ids,
            continues=now.continues,
            position=now.begin + now.place,
            document=now.document,
            n_open=n_open,
        )
        return ModelState(self._memory, local)

    def _take(self, state: ModelState) -> None:
        """Go on from ``state``."""
        self._memory, self._local, self._own = state.memory, state.local, False
        self._n_open = state.local.n_open.tensor.tolist()
        if self.by_column:
            self._open = _opened(self.model, state.local)
            self._prepare()

    @torch.no_grad()
    def _prepare(self, rows: Tensor | None = None) -> None:
        """What reads need of memories of which ``rows`` have changed; None for all."""
        before = self._prepared if rows is not None else {}
        self._prepared = {
            name: [
                module.prepare_steps(part, rows, before[name][i] if name in before else None)
                for i, (module, part) in enumerate(zip(modules, self._memory[name], strict=True))
            ]
            for name, modules in self.model.memory.items()
            if self.read
        }
        self._empty = {
            name: [_empty(self.model, module, part) for module, part in zip(modules, self._memory[name], strict=True)]
            for name, modules in self.model.memory.items()
        }

    def _after(self, ids: Tensor, rows: Tensor) -> ModelState:
        """The state of ``rows`` (N,) after their tokens, which end their segments."""
        state = self.model.select_rows(self.state(), rows)
        out = self.model(ids[rows, None], state=state, read=self.read, write=self.write, logits=False)
        return out.state

    def _put(self, state: ModelState, rows: Sequence[int]) -> None:
        """Go on with ``rows`` from ``state``."""
        index = torch.tensor(rows)

        def put(mine: Tensor, new: Tensor) -> Tensor:
            return mine.index_copy_(0, index.to(mine.device), new)

        map_tensors(put, self._open, _opened(self.model, state.local))
        for row in rows:
            self._n_open[row] = 0
        if not self._own:
            self._memory = self._map_memory(lambda part, _: map_tensors(Tensor.clone, part), self._memory)
            self._own = True
        self._memory = self._map_memory(lambda part, new: map_tensors(put, part, new), state.memory)
        self._prepare(index.to(self._local.ids.device))

    def _map_memory(self, function: Callable[[State, State], State], other: dict[str, tuple[State, ...]]) -> Any:
        """``function`` of each memory's state and that of ``other``; of banks that all rows share, the other."""
        return {
            name: tuple(
                new if module.scope == "shared" else function(part, new)
                for module, part, new in zip(modules, self._memory[name], other[name], strict=True)
            )
            for name, modules in self.model.memory.items()
        }


class Open(NamedTuple):
    """What a `Decoder` changes in place.

    Attributes:
        layers: By layer, what it has of the open segment: see `SegmentLayer.opened`.
        streams: As in `LocalState`.
        ids: As in `LocalState`.
        continues: As in `LocalState`.
        begin: Place of the open segment's first token in its document, (B,).
        document: As in `LocalState`.
        place: Place of the next token in the open segment, (B,).
    """

    layers: tuple[Any, ...]
    streams: dict[str, Tensor]
    ids: Tensor
    continues: Tensor
    begin: Tensor
    document: Tensor
    place: Tensor

    def put(self, part: Tensor, number: int, lookback: int, new: Tensor) -> None:
        """Write ``new`` (B, ...) to the next cell of stream ``number`` of ``part`` (B, n, C + T, ...)."""
        n_row, n, n_cell = part.shape[:3]
        first = torch.arange(number * n_cell + lookback, n_row * n * n_cell, n * n_cell, device=part.device)
        part.flatten(0, 2).index_copy_(0, first + self.place, new.to(part.dtype))


def _by_column(module: Memory) -> bool:
    """Whether a memory can do with one token at a time until a segment ends."""
    return module.around != "stack" and not module.within


def _opened(model: Stack, local: LocalState) -> Open:
    """Copies of what is open."""
    place = local.n_open.tensor.to(local.ids.device, copy=True)
    return Open(
        layers=tuple(
            layer.opened(cache, place, local.continues) for layer, cache in zip(model.layers, local.cache, strict=True)
        ),
        streams={name: part.clone() for name, part in local.streams.items()},
        ids=local.ids.clone(),
        continues=local.continues.clone(),
        begin=local.position - place,
        document=local.document.clone(),
        place=place,
    )


def _empty(model: Stack, module: Memory, state: State) -> Tensor | None:
    """Rows (B, 1, 1) that have to be as without the memory; None if there is none."""
    if not model.bare_when_empty or module.reads_beside:
        return None
    empty = ~module.holds(state)[:, None, None]
    return empty if bool(empty.any()) else None


def _step(
    model: Stack,
    ids: Tensor,
    now: Open,
    prepared: dict[str, list[Any]],
    empty: dict[str, list[Tensor | None]],
    most: int,
) -> Tensor:
    """One more token of each row (B,), at a place before ``most``, through all layers and memories."""
    lookback = model.lookback
    now.put(now.ids[:, None], 0, lookback, ids)
    x, column = model.begin_step(ids, now.place, now.continues, most)  # (B, D)
    for i, (layer, opened) in enumerate(zip(model.layers, now.layers, strict=True)):
        number = model.memory_layers.index(i) if model.memory and i in model.memory_layers else None
        if number is not None and "input" in now.streams:
            now.put(now.streams["input"], number, lookback, x)
        if number is None:
            x = layer.step(x, opened, column)
        else:
            x = _mixed(model, number, x, ColumnMixer(layer, opened, column, x.dtype), prepared, empty)
            if "mixed" in now.streams:
                now.put(now.streams["mixed"], number, lookback, x)
            y, values = x[:, None].float(), []
            for name, parts in prepared.items():
                modules = model.memory[name]
                if modules[0].reads_beside:
                    each = number if modules[0].around == "layer" else 0
                    value = model.let_in(name, number, modules[each].read(y, parts[each]).value, y)
                    values.append(value[:, 0].to(x.dtype))
            x = x + sum(values) if values else x
        x = x + layer.feed_forward(x)
        if number is not None and "output" in now.streams:
            now.put(now.streams["output"], number, lookback, x)
    now.place.add_(1)
    return model.norm(x)


def _mixed(
    model: Stack,
    number: int,
    x: Tensor,
    mixer: ColumnMixer,
    prepared: dict[str, list[Any]],
    empty: dict[str, list[Tensor | None]],
) -> Tensor:
    """The stream (B, D) behind a layer's mixer and the memory around it, if there is one."""
    whole = x[:, None].float()
    for name, modules in model.memory.items():
        each = number if modules[0].around == "layer" else 0
        module = modules[each]
        if module.reads_beside:
            continue
        if name not in prepared:
            y = module.off(whole, mixer)
        else:
            y, _ = module.mix(whole, prepared[name][each], mixer)
            if not mixer.ran and type(module).off is Memory.off:
                mixer(whole)  # the layer has to know the token, should reads be switched off
            if (rows := empty[name][each]) is not None:
                y = torch.where(rows, mixer(whole), y)
        return y[:, 0].to(x.dtype)
    return mixer(x[:, None])[:, 0]
