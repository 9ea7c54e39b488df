"""Text in segments: what models have in common whose layers see a segment and the end of the one before.

Attention, or whatever else mixes the tokens of a segment, sees the current segment and the last ``overlap`` tokens of
the one before; everything older reaches the model only through memory. A call may hold any number of tokens: the model
lays them out on a grid of segments (`memlm.models.grid`) and runs layers and memories over it
(`memlm.models.schedule`).

Shapes: B rows, L tokens of a call, S segments of the grid, T tokens per segment, Q columns computed, D model width,
V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memlm.config import ConfigError
from memlm.memory.contract import Memory, Sizes
from memlm.memory.slots import Slots
from memlm.memory.state import State, select_rows, shared
from memlm.models import arguments, generation, schedule, views
from memlm.models.grid import closing_grid, lay_out
from memlm.models.stack import Stack
from memlm.models.state import LocalState, ModelState, Output, renewed, shapes
from memlm.store import operations, passages
from memlm.tensors import Host

_WIDEST = 2**20  # of a model, and of its segments


class SegmentModel(Stack):
    """A language model that takes its text segment by segment, with memories between its layers.

    Subclasses make ``embedding``, ``layers`` and ``norm``, and then call `attach`.

    Args:
        n_vocab: Size of the vocabulary.
        n_layer: Number of layers.
        d_model: Width.
        segment_len: Tokens per segment.
        overlap: Tokens of the segment before that are still seen.
        memory_layers: Layers with memory: ``middle``, ``all``, or a list of indices from 0.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory.

    Raises:
        ValueError: If a setting cannot work; the message names it.
    """

    def __init__(
        self,
        n_vocab: int,
        n_layer: int,
        d_model: int,
        segment_len: int,
        overlap: int,
        memory_layers: Literal["middle", "all"] | list[int],
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, number, most in (
            ("n_layer", n_layer, 1000),
            ("d_model", d_model, _WIDEST),
            ("segment_len", segment_len, _WIDEST),
        ):
            if number < 1:
                raise ValueError(f"model.{name} must be at least 1, got {number}")
            if number > most:
                raise ValueError(f"model.{name} must be at most {most}, got {number}")
        if not 0 <= overlap <= segment_len:
            raise ValueError(f"model.overlap must be in 0..segment_len ({segment_len}), got {overlap}")
        self.n_vocab, self.d_model, self.n_layer = n_vocab, d_model, n_layer
        self.segment_len, self.overlap = segment_len, overlap
        self.gradient_checkpointing = gradient_checkpointing
        self.memory_layers = arguments.memory_layers(memory_layers, n_layer)
        self.below = nn.ModuleList()

    def attach(self, memories: Mapping[str, Callable[..., Memory]]) -> None:
        """Make the modules of each memory.

        Args:
            memories: By name, a constructor of one memory module, called with ``d_model``, and with ``sizes`` (see
                `memlm.memory.contract.Sizes`) if it has a parameter of that name.

        Raises:
            ValueError: If a memory asks for what this model cannot give.
        """
        self.memory = nn.ModuleDict()
        n_head = max(self.layers[0].n_head, 1)
        sizes = Sizes(self.d_model, n_head, self.n_layer, self.segment_len, self.overlap, self.n_vocab)
        self.sizes = sizes
        for name, make in memories.items():
            first = _made(make, sizes)
            rest = [_made(make, sizes) for _ in self.memory_layers[1:]] if first.around == "layer" else []
            self.memory[name] = nn.ModuleList([first, *rest])
            if first.scope == "shared":
                for module in self.memory[name]:
                    module.bank.create()
        arguments.needs(self)
        self.lookback = max([self.n_again, *(modules[0].needs.lookback for modules in self.memory.values())])
        self._shapes = shapes(self.no_context(1))

    # --- state ---------------------------------------------------------------------------------------------------

    def init_state(self, n_row: int) -> ModelState:
        """State before any text: fresh memories (the persistent bank where there is one), no context."""
        memory = {name: tuple(module.bank.first(n_row) for module in modules) for name, modules in self.memory.items()}
        return ModelState(memory, self.no_context(n_row))

    def bank_state(self) -> ModelState:
        """See `LanguageModel.bank_state`."""
        memory = {name: tuple(module.bank.state() for module in modules) for name, modules in self.memory.items()}
        return ModelState(memory, self.no_context(1))

    def no_context(self, n_row: int) -> LocalState:
        """See `Stack.no_context`."""
        weight = self.embedding.weight
        n_cell = self.lookback + self.segment_len
        return LocalState(
            cache=tuple(layer.init_cache(n_row) for layer in [*self.layers, *self.below]),
            streams={
                name: weight.new_zeros(n_row, n, n_cell, self.d_model) for name, n in _n_stream(self).items() if n
            },
            ids=torch.zeros(n_row, n_cell, dtype=torch.long, device=weight.device),
            continues=torch.zeros(n_row, dtype=torch.bool, device=weight.device),
            position=torch.zeros(n_row, dtype=torch.long, device=weight.device),
            document=torch.zeros(n_row, dtype=torch.long, device=weight.device),
            n_open=Host(torch.zeros(n_row, dtype=torch.long)),
        )

    def map_memory(self, function: Callable[[Memory, State], State], state: ModelState) -> ModelState:
        """``state`` with ``function(module, memory_state)`` in place of every memory state."""
        memory = {
            name: tuple(function(m, part) for m, part in zip(self.memory[name], parts, strict=True))
            for name, parts in state.memory.items()
        }
        return state._replace(memory=memory)

    def wipe(self, state: ModelState) -> ModelState:
        """``state`` with all memories as new; the local context stays."""
        n_row = state.local.n_row
        return self.map_memory(lambda module, _: module.init_state(n_row), state)

    def places(self, state: ModelState) -> list[Tensor]:
        """See `LanguageModel.places`."""
        found = [
            module.places(part)
            for name, modules in self.memory.items()
            for module, part in zip(modules, state.memory[name], strict=True)
            if isinstance(module, Slots)
        ]
        return [part for part in found if part is not None]

    def with_memory(self, state: ModelState, other: ModelState) -> ModelState:
        """``state`` with the memories of ``other``; the local context stays."""
        return state._replace(memory=shared(other.memory))

    def select_rows(self, state: ModelState, index: Tensor) -> ModelState:
        """Rows ``index`` (N,) of ``state``; banks that all rows share stay as they are."""
        state = self.map_memory(
            lambda m, part: shared(part) if m.scope == "shared" else select_rows(part, index), state
        )
        return state._replace(local=select_rows(state.local, index))

    def new_context(self, state: ModelState, write: bool = True, donate: bool = False) -> ModelState:
        """Close the open segment, writing what it holds so far, and drop the local context; memories are kept.

        Args:
            state: Any state.
            write: Whether the open segment is written.
            donate: As in `forward`.
        """
        after = self._close(state, torch.ones(state.local.n_row, dtype=torch.bool), write, _owned(donate))
        return after if donate else after._replace(memory=shared(after.memory, state.memory))

    def _close(self, state: ModelState, rows: Tensor, write: bool, owned: bool) -> ModelState:
        """`new_context` for the given ``rows`` (B,), on the CPU; ``owned`` as in `Segment`."""
        local = state.local
        if write and self.memory:
            embeddings = self.embed(local.ids)
            memory = {name: self._closed(name, state, rows, embeddings, owned) for name in self.memory}
            state = state._replace(memory=memory)
        fresh = self.no_context(len(rows))._replace(position=local.position, document=local.document)
        return state._replace(local=renewed(local, fresh, rows))

    def _closed(self, name: str, state: ModelState, rows: Tensor, embeddings: Tensor, owned: bool) -> tuple[State, ...]:
        """The states of a memory after the open segment of ``rows`` was written."""
        local, modules = state.local, self.memory[name]
        grid = closing_grid(local, rows, self.lookback)
        module: Any = modules[0]
        if module.around == "stack":
            how = schedule.How(read=True, write=True, keep_state=False, closing=True)
            return schedule.at_once(self, grid, state, how).state.memory[name]
        hidden = local.streams[views.stream_of(module)]  # (B, n_layer, C + T, D)
        output = local.streams.get("output", hidden)  # not looked at unless the memory needs it
        cells = (local.ids, embeddings)
        if module.around == "layers":
            streams = hidden.transpose(1, 2), output.transpose(1, 2)
            segment = views.segment_of(self, module, local, grid, *cells, *streams)
            return (module.write(segment._replace(owned=owned), state.memory[name][0])[0],)
        closed = []
        for place, (module, part) in enumerate(zip(modules, state.memory[name], strict=True)):
            streams, layer = (hidden[:, place], output[:, place]), self.writer(self.memory_layers[place])
            segment = views.segment_of(self, module, local, grid, *cells, *streams, layer)
            closed.append(module.write(segment._replace(owned=owned), part)[0])
        return tuple(closed)

    # --- the forward pass ------------------------------------------------------------------------------------------

    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        reset: Tensor | None = None,
        read: bool = True,
        write: bool = True,
        signals: dict[str, Tensor] | None = None,
        mask: Tensor | None = None,
        breaks: Tensor | None = None,
        told: Tensor | None = None,
        logits: bool = True,
        keep_state: bool = True,
        donate: bool = False,
    ) -> Output:
        """Go on with the text.

        Args:
            ids: Token ids, (B, L), any L.
            state: Where the text stopped; None for the beginning (of a shared memory: a copy of the persistent bank).
            reset: Rows that begin a new document with the call's first token, (B,). Where segments are not open and L
                is a whole number of segments it may be (B, S): segments that begin a new document.
            read: Whether memories are read.
            write: Whether memories are written.
            signals: Implicit signals of the text by name, each (B, n), for the memories that use them.
            mask: Tokens that are no padding, (B, L); None if all are.
            breaks: Segments that begin a new context within their document, as `new_context` does between calls,
                (B, S); only where ``reset`` may be given by segment.
            told: Tokens whose successor is worth to be remembered, (B, L), for the losses of memories that learn to
                tell; only where ``reset`` may be given by segment.
            logits: Whether to apply the language-model head.
            keep_state: Whether the text goes on after this call; if not, no state is worked out (``out.state`` is
                None).
            donate: Whether ``state`` is given away. Without gradients its memories are then written in place, where
                large banks would be copied first: use ``out.state`` from now on, and neither ``state`` nor what was
                made of it by `with_memory`.

        Returns:
            An `Output`.

        Raises:
            ConfigError: If types, shapes or ids do not fit, or a signal is used by no memory.
        """
        ids = arguments.token_ids(ids, self.n_vocab)
        n_row = ids.shape[0]
        for name, flags in (("mask", mask), ("reset", reset), ("breaks", breaks), ("told", told)):
            arguments.flags(name, flags)
        arguments.signals(self, signals or {}, n_row)
        owned = _owned(donate or state is None)
        before = state = _state_for(self, state, n_row)
        if breaks is not None and (breaks.dim() != 2 or len(breaks) != n_row):
            raise ConfigError(f"breaks must be ({n_row}, segments), got {tuple(breaks.shape)}")
        if mask is not None and mask.shape != ids.shape:
            raise ConfigError(f"mask must have the shape of ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
        if told is not None and told.shape != ids.shape:
            raise ConfigError(f"told must have the shape of ids {tuple(ids.shape)}, got {tuple(told.shape)}")
        together = any(getattr(modules[0], "over_ranks", False) for modules in self.memory.values())
        if together and reset is None and breaks is None:  # other processes may have some, and all have to write
            reset = torch.zeros(n_row, -(-ids.shape[1] // self.segment_len), dtype=torch.bool, device=ids.device)
        rows, reset = _starts(reset, n_row)
        if rows is not None or reset is not None:
            state = self._begin_documents(state, rows, reset, write, owned)
        if breaks is not None and breaks.shape[1]:
            first = breaks[:, 0].cpu()
            if together or bool(first.any()):
                state = self._close(state, first, write, owned)
                owned = owned or _owned(write)
        if ids.shape[1] == 0:
            if rows is not None:
                state = self.map_memory(lambda module, part: module.start_documents(rows[:, None], part), state)
                state = state._replace(local=state.local._replace(document=state.local.document + rows))
            state = state if donate else state._replace(memory=shared(state.memory, before.memory))
            hidden = self.embedding(ids)
            return Output(self.head(hidden) if logits else None, state, hidden, {}, {})
        if None in state.local.cache:
            raise ConfigError(
                "absorb leaves out the layers that only outputs need, so no text can go on from its state: call "
                "new_context(state) first, which keeps the memories"
            )
        grid = lay_out(ids, state.local, self.segment_len, rows, reset, mask, breaks)
        if told is not None and grid.cell is not None:
            raise ConfigError("told needs rows with no open segment, and whole segments")
        writes = write and (together or any(grid.n_complete))
        how = schedule.How(read, writes, signals, keep_state, owned=owned, told=told)
        x, state, reads, trace = schedule.run(self, grid, state, how)
        if keep_state and not donate:
            state = state._replace(memory=shared(state.memory, before.memory))
        x = self.norm(x)
        if grid.cell is not None:
            index = (grid.cell - grid.columns.start).clamp(0, x.shape[1] - 1)
            x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        return Output(self.head(x) if logits else None, state if keep_state else None, x, reads, trace)

    def absorb(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        read: bool = True,
        mask: Tensor | None = None,
        breaks: Tensor | None = None,
        donate: bool = False,
    ) -> ModelState:
        """See `LanguageModel.absorb`. Memories are as `forward` leaves them, for less work.

        Layers above the last one with memory are not run, and that layer reads nothing, as no write depends on it.
        """
        ids = arguments.token_ids(ids, self.n_vocab)
        within = all(schedule.writes_within(modules[0]) for modules in self.memory.values())
        if ids.shape[1] == 0 or not self.memory or not within:
            return super().absorb(ids, state, read, mask, breaks, donate)
        owned = _owned(donate or state is None)
        before = state = self.init_state(len(ids)) if state is None else state
        if breaks is not None and bool(breaks[:, 0].any()):
            state = self._close(state, breaks[:, 0].cpu(), True, owned)
            owned = _owned(True)
        grid = lay_out(ids, state.local, self.segment_len, None, None, mask, breaks)
        how = schedule.How(read, any(grid.n_complete), storing=True, owned=owned)
        state = schedule.run(self, grid, state, how).state
        return state if donate else state._replace(memory=shared(state.memory, before.memory))

    def _begin_documents(
        self, state: ModelState, rows: Tensor | None, reset: Tensor | None, write: bool, owned: bool
    ) -> ModelState:
        """``state`` with the rows that begin a document at once out of their old context."""
        n_row = state.local.n_row
        begin = (rows if rows is not None else reset[:, :1].any(dim=1)).cpu()  # type: ignore[index]
        if any(modules[0].scope == "shared" for modules in self.memory.values()):
            state = self._close(state, begin, write, owned)
        local = renewed(state.local, self.no_context(n_row), begin)
        return state._replace(local=local._replace(document=state.local.document))

    generate = generation.generate
    stream = generation.stream

    # --- what is stored: see `memlm.store.operations` ---------------------------------------------------------------

    encode_text = passages.encode_text
    store_experience = operations.store_experience
    query_memory = operations.query_memory
    recalled = operations.recalled
    list_memory = operations.list_memory
    edit_memory = operations.edit_memory
    forget = operations.forget
    consolidate = operations.consolidate
    save_memory = operations.save_memory
    load_memory = operations.load_memory
    merge_memory = operations.merge_memory


def _owned(given: bool) -> bool:
    """Whether memories may be written in place in a state that is ``given`` away."""
    return given and not torch.is_grad_enabled()


def _made(make: Callable[..., Memory], sizes: Sizes) -> Memory:
    """A memory module, told the sizes of the model if it asks for them."""
    asks = "sizes" in inspect.signature(make).parameters
    return make(sizes.d_model, sizes=sizes) if asks else make(sizes.d_model)


def _n_stream(model: SegmentModel) -> dict[str, int]:
    """At how many places each stream of `LocalState` is kept."""
    modules = [modules[0] for modules in model.memory.values()]
    inside = [module for module in modules if module.around != "stack"]
    stack = [module for module in modules if module.around == "stack"]
    n = len(model.memory_layers)
    return {
        "input": n * any(not module.reads_beside for module in inside),
        "mixed": n * any(module.reads_beside for module in inside),
        "output": n * any(module.needs.output for module in inside),
        "top": int(any(module.needs.output for module in stack)),
    }


def _state_for(model: SegmentModel, state: ModelState | None, n_row: int) -> ModelState:
    """``state``, if it is one of this model with so many rows; a new one if there is none."""
    if state is None:
        return model.init_state(n_row)
    if not isinstance(state, ModelState):
        raise ConfigError(f"state must be what a call of this model gave, or None, got {type(state).__name__}")
    if state.local.n_row != n_row:
        raise ConfigError(f"ids have {n_row} rows, but the state has {state.local.n_row}")
    known = None in state.local.cache or shapes(state.local) == model._shapes
    if not known or set(state.memory) != set(model.memory):
        raise ConfigError("the state is of another model: its layers, widths, segments or memories differ")
    return state


def _starts(reset: Tensor | None, n_row: int) -> tuple[Tensor | None, Tensor | None]:
    """Rows that begin a document with the call, (B,); or segments that begin one, (B, S)."""
    if reset is None:
        return None, None
    if reset.shape[0] != n_row or reset.dim() > 2:
        raise ConfigError(f"reset must be ({n_row},) or ({n_row}, segments), got {tuple(reset.shape)}")
    return (reset, None) if reset.dim() == 1 else (None, reset)
