"""Text in segments: what models have in common whose layers see a segment and the end of the one before.

Attention, or whatever else mixes the tokens of a segment, sees the current segment and the last ``overlap`` tokens of
the one before; everything older reaches the model only through memory. A call may hold any number of tokens: the model
lays them out on a grid of segments, the first of which may have been begun by an earlier call.

Shapes: B rows, L tokens of a call, S segments of the grid, T tokens per segment, Q columns computed, O overlap,
C lookback, N = S * T cells, D model width, V vocabulary.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlm.config import ConfigError
from memlm.memory.base import Memory, Residual, Segment, Trace, join_reads, mean_trace
from memlm.memory.state import State, map_tensors, select_rows, tensors, where_rows
from memlm.models import arguments
from memlm.models.experience import ExperienceModel

_WIDEST = 2**20  # of a model, and of its segments


class LocalState(NamedTuple):
    """What the model itself carries between calls; dropped by `SegmentModel.new_context`.

    Attributes:
        cache: By layer, what it has to know of the segment before and of the open one: see `SegmentLayer`.
        hidden: Input of each memory layer for the open segment and the tokens before it that writes need,
            (B, n_memory_layer, C + T, D).
        ids: Token ids of the same cells, (B, C + T).
        continues: Whether the open segment has a segment before it, (B,).
        position: Place of the next token in its document, (B,).
        document: Number of the document within the row, (B,).
        host_open: Tokens in the open segment, (B,), on the CPU.
    """

    cache: tuple[State, ...]
    hidden: Tensor
    ids: Tensor
    continues: Tensor
    position: Tensor
    document: Tensor
    host_open: Tensor


class ModelState(NamedTuple):
    """Everything the model knows of the text so far.

    Attributes:
        memory: By name of the memory, one state per module (one per layer if layerwise).
        local: Local context.
    """

    memory: dict[str, tuple[State, ...]]
    local: LocalState


class Output(NamedTuple):
    """Result of a call.

    Attributes:
        logits: (B, L, V); None if the head was not asked for.
        state: State after the call; None if it was not to be carried.
        hidden: Output of the last layer, normalised, (B, L, D).
        reads: What each memory read, by ``name/layer``, over the cells of the grid.
        trace: Scalars about reads and writes, by memory name.
    """

    logits: Tensor | None
    state: ModelState | None
    hidden: Tensor
    reads: dict[str, Residual]
    trace: dict[str, Trace]


class Grid(NamedTuple):
    """Where the tokens of a call lie among segments.

    Attributes:
        ids: Token ids, (B, N).
        new: Cells computed by this call, (B, S, T).
        valid: Cells that hold a token after it, (B, S, T).
        complete: Segments that end now, (B, S).
        continues: Segments whose context goes on from the segment before, (B, S).
        closes: Segments after which the context ends, (B, S).
        reset: Segments that begin a new document, (B, S); None if there is none.
        position: Place of the segment's first token in its document, (B, S).
        document: Number of the document within its row, (B, S).
        n_complete: Complete segments of each row.
        open_len: Tokens of each row in the segment that stays open.
        opened: Tokens of each row in the first segment that an earlier call brought.
        columns: Columns that are computed; all unless ``S`` is 1.
        cell: Cell of each token of the call, (B, L); None if they lie in order from cell 0.
    """

    ids: Tensor
    new: Tensor
    valid: Tensor
    complete: Tensor
    continues: Tensor
    closes: Tensor
    reset: Tensor | None
    position: Tensor
    document: Tensor
    n_complete: list[int]
    open_len: list[int]
    opened: list[int]
    columns: slice
    cell: Tensor | None

    @property
    def fresh(self) -> bool:
        """Whether no cell was filled by an earlier call."""
        return not any(self.opened)

    def fill(self, computed: Tensor, opened: Tensor) -> Tensor:
        """All cells (B, S, T, ...): those ``computed`` (B, S, Q, ...), and what was ``opened`` before, (B, T, ...)."""
        new = self.new.view(*self.new.shape, *[1] * (opened.dim() - 2))
        cells = opened[:, None]  # (B, 1, T, ...)
        if computed.shape[2] < self.new.shape[2]:
            here, start, stop = self.columns, self.columns.start, self.columns.stop
            computed = torch.where(new[:, :, here], computed, cells[:, :, here])
            return torch.cat([cells[:, :, :start], computed, cells[:, :, stop:]], dim=2)
        if self.fresh:
            return computed
        return torch.cat([torch.where(new[:, :1], computed[:, :1], cells), computed[:, 1:]], dim=1)


class SegmentLayer(nn.Module):
    """A layer of a `SegmentModel`: it mixes the tokens of a segment; memories follow; then its feed-forward.

    Attributes:
        feed_forward: What is added to the stream after the memories.
    """

    feed_forward: nn.Module

    def init_cache(self, n_row: int) -> State:
        """What `mix` knows where no text came before."""
        raise NotImplementedError

    def mix(self, x: Tensor, cache: State, grid: Grid) -> tuple[Tensor, Any]:
        """Let the tokens of each segment, and the ``overlap`` last ones of the segment before, reach later ones.

        Args:
            x: Hidden states, (B, S, Q, D).
            cache: What is known of the segment before and of the open one.
            grid: Where the tokens lie.

        Returns:
            The new hidden states (B, S, Q, D), and what `carry` needs.
        """
        raise NotImplementedError

    def carry(self, kept: Any, stays_open: Callable[[Tensor, Tensor], Tensor]) -> State:
        """The cache after the grid.

        Args:
            kept: What `mix` kept.
            stays_open: Picks for each row the part (B, ...) of the segment that is not complete, of parts (B, S, ...);
                the second argument (B, ...) is for rows whose segments are all complete.
        """
        raise NotImplementedError


class SegmentModel(ExperienceModel):
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

    embedding: nn.Embedding
    layers: Any  # nn.ModuleList of SegmentLayer, whose items torch types as bare modules
    norm: nn.Module

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
        self.memory_layers = _memory_layers(memory_layers, n_layer)

    def attach(self, memories: Mapping[str, Callable[..., Memory]]) -> None:
        """Make the modules of each memory.

        Args:
            memories: By name, a constructor of one memory module, called with ``d_model``.

        Raises:
            ValueError: If a memory needs more tokens before a segment than a segment has.
        """
        self.memory = nn.ModuleDict()
        for name, make in memories.items():
            first = make(self.d_model)
            rest = [make(self.d_model) for _ in self.memory_layers[1:]] if first.layerwise else []
            self.memory[name] = nn.ModuleList([first, *rest])
            if first.lookback > self.segment_len:
                raise ValueError(
                    f"memory {name!r} looks back {first.lookback} tokens, more than a segment: "
                    f"set model.segment_len to at least {first.lookback}, got {self.segment_len}"
                )
            if first.scope == "shared":
                for module in self.memory[name]:
                    module.keep_bank()
        self.lookback = max((modules[0].lookback for modules in self.memory.values()), default=0)
        self._shapes = _shapes(self._no_context(1))

    def _embed(self, ids: Tensor) -> Tensor:
        """Token embeddings of unit variance, (..., D)."""
        return self.embedding(ids) * self.d_model**0.5

    def _enter(self, embeddings: Tensor, columns: slice) -> Tensor:
        """What the first layer gets, (B, S, Q, D), of the embeddings of the ``columns`` of each segment."""
        return embeddings

    # --- state ---------------------------------------------------------------------------------------------------

    def init_state(self, n_row: int) -> ModelState:
        """State before any text: fresh memories (a copy of the persistent bank where there is one), no context."""
        memory = {name: tuple(module.first_state(n_row) for module in modules) for name, modules in self.memory.items()}
        return ModelState(memory, self._no_context(n_row))

    def bank_state(self) -> ModelState:
        """See `ExperienceModel.bank_state`."""
        memory = {name: tuple(module.bank() for module in modules) for name, modules in self.memory.items()}
        return ModelState(memory, self._no_context(1))

    def _no_context(self, n_row: int) -> LocalState:
        weight = self.embedding.weight
        kept = self.lookback + self.segment_len
        n_memory_layer = len(self.memory_layers) if self.memory else 0
        return LocalState(
            cache=tuple(layer.init_cache(n_row) for layer in self.layers),
            hidden=weight.new_zeros(n_row, n_memory_layer, kept, self.d_model),
            ids=torch.zeros(n_row, kept, dtype=torch.long, device=weight.device),
            continues=torch.zeros(n_row, dtype=torch.bool, device=weight.device),
            position=torch.zeros(n_row, dtype=torch.long, device=weight.device),
            document=torch.zeros(n_row, dtype=torch.long, device=weight.device),
            host_open=torch.zeros(n_row, dtype=torch.long),
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
        n_row = len(state.local.host_open)
        return self.map_memory(lambda module, _: module.init_state(n_row), state)

    def places(self, state: ModelState) -> list[Tensor]:
        """See `LanguageModel.places`."""
        found = [
            module.places(part)
            for name, modules in self.memory.items()
            for module, part in zip(modules, state.memory[name], strict=True)
        ]
        return [part for part in found if part is not None]

    def with_memory(self, state: ModelState, other: ModelState) -> ModelState:
        """``state`` with the memories of ``other``; the local context stays."""
        return state._replace(memory=other.memory)

    def select_rows(self, state: ModelState, index: Tensor) -> ModelState:
        """Rows ``index`` (N,) of ``state``; banks that all rows share stay as they are."""
        state = self.map_memory(lambda m, part: part if m.scope == "shared" else select_rows(part, index), state)
        return state._replace(local=select_rows(state.local, index))

    def new_context(self, state: ModelState, write: bool = True) -> ModelState:
        """Close the open segment, writing what it holds so far, and drop the local context; memories are kept.

        Args:
            state: Any state.
            write: Whether the open segment is written.
        """
        rows = torch.ones(len(state.local.host_open), dtype=torch.bool)
        return self._close(state, rows, write)

    def _close(self, state: ModelState, rows: Tensor, write: bool) -> ModelState:
        """`new_context` for the given ``rows`` (B,)."""
        local = state.local
        n_row, device = len(rows), local.ids.device
        if write and self.memory:
            one = rows.to(device)[:, None]
            open_len = local.host_open.to(device)[:, None]
            grid = Grid(
                ids=local.ids[:, self.lookback :],
                new=torch.zeros(n_row, 1, self.segment_len, dtype=torch.bool, device=device),
                valid=(torch.arange(self.segment_len, device=device) < open_len)[:, None],
                complete=one,
                continues=local.continues[:, None],
                closes=one,
                reset=None,
                position=local.position[:, None] - open_len,
                document=local.document[:, None],
                n_complete=rows.long().tolist(),
                open_len=[0] * n_row,
                opened=[0] * n_row,
                columns=slice(0, 0),
                cell=None,
            )
            hidden = [local.hidden[:, i] for i in range(len(self.memory_layers))]
            embeddings = self._embed(local.ids)
            memory = {}
            for name, modules in self.memory.items():
                layers = hidden if modules[0].layerwise else [torch.stack(hidden, dim=2)]
                memory[name] = tuple(
                    module.write(self._segment(grid, local, embeddings, h, module), part, [])[0]
                    for module, h, part in zip(modules, layers, state.memory[name], strict=True)
                )
            state = state._replace(memory=memory)
        fresh = self._no_context(n_row)._replace(position=local.position, document=local.document)
        return state._replace(local=where_rows(rows, fresh, local))

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
        logits: bool = True,
        carry: bool = True,
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
            logits: Whether to apply the language-model head.
            carry: Whether the text goes on after this call; if not, no state is worked out (``out.state`` is None).

        Returns:
            An `Output`.

        Raises:
            ConfigError: If types, shapes or ids do not fit, or a signal is used by no memory.
        """
        ids = arguments.token_ids(ids, self.n_vocab)
        n_row = ids.shape[0]
        for name, flags in (("mask", mask), ("reset", reset), ("breaks", breaks)):
            arguments.flags(name, flags)
        self._check_signals(signals or {}, n_row)
        if state is None:
            state = self.init_state(n_row)
        elif not isinstance(state, ModelState):
            raise ConfigError(f"state must be what a call of this model gave, or None, got {type(state).__name__}")
        elif len(state.local.host_open) != n_row:
            raise ConfigError(f"ids have {n_row} rows, but the state has {len(state.local.host_open)}")
        elif _shapes(state.local) != self._shapes or set(state.memory) != set(self.memory):
            raise ConfigError("the state is of another model: its layers, widths, segments or memories differ")
        if breaks is not None and (breaks.dim() != 2 or len(breaks) != n_row):
            raise ConfigError(f"breaks must be ({n_row}, segments), got {tuple(breaks.shape)}")
        if mask is not None and mask.shape != ids.shape:
            raise ConfigError(f"mask must have the shape of ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
        together = any(modules[0].over_ranks for modules in self.memory.values())
        if together and reset is None and breaks is None:  # other processes may have some, and all have to write
            reset = torch.zeros(n_row, -(-ids.shape[1] // self.segment_len), dtype=torch.bool, device=ids.device)
        if reset is not None:
            state = self._begin_documents(state, reset, write)
        if breaks is not None and breaks.shape[1]:
            first = breaks[:, 0].cpu()
            if together or bool(first.any()):
                state = self._close(state, first, write)
        if ids.shape[1] == 0:
            if reset is not None and reset.dim() == 1:
                state = self.map_memory(lambda module, part: module.start_documents(reset[:, None], part), state)
                state = state._replace(local=state.local._replace(document=state.local.document + reset))
            hidden = self.embedding(ids)
            return Output(self.head(hidden) if logits else None, state, hidden, {}, {})
        grid = self._lay_out(ids, state.local, reset, mask, breaks)
        write = write and (together or any(grid.n_complete))
        n_segment = grid.complete.shape[1]
        if n_segment == 1 or all(modules[0].layerwise for modules in self.memory.values()):
            x, state, reads, trace = self._run(grid, state, read, write, signals, carry)
        else:
            full = mask is None and grid.cell is None
            x, state, reads, trace = self._run_segments(grid, state, read, write, signals, full)
        x = self.norm(x)
        if grid.cell is not None:
            index = (grid.cell - grid.columns.start).clamp(0, x.shape[1] - 1)
            x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        return Output(self.head(x) if logits else None, state if carry else None, x, reads, trace)

    def _check_signals(self, signals: Mapping[str, Tensor], n_row: int) -> None:
        """Refuse what no memory uses, other shapes than (B, n), and NaN, which is looked for on a CPU alone."""
        known = {name: width for modules in self.memory.values() for name, width in modules[0].signals.items()}
        if not isinstance(signals, Mapping) or not all(isinstance(given, Tensor) for given in signals.values()):
            raise ConfigError(f"signals must be tensors by name, got {reprlib.repr(signals)}")
        for name, given in signals.items():
            if name not in known:
                width = given.shape[-1] if given.dim() else 1
                raise ConfigError(
                    f"signals: {name!r} is used by no memory of this model, which know {', '.join(known) or 'none'}: "
                    f"leave it out, or set memory=adaptive 'memory.adaptive.signals={{{name}: {width}}}'"
                )
            if given.shape != (n_row, known[name]):
                raise ConfigError(
                    f"signals.{name} must be (rows, numbers) = {(n_row, known[name])}, got shape {tuple(given.shape)}"
                )
            if given.device.type == "cpu" and not torch.compiler.is_compiling() and bool(given.isnan().any()):
                raise ConfigError(f"signals.{name} holds NaN: give 0 where it is unknown")

    def absorb(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        read: bool = True,
        mask: Tensor | None = None,
        breaks: Tensor | None = None,
    ) -> ModelState:
        """See `LanguageModel.absorb`. Memories are as `forward` leaves them, for less work.

        Layers above the last one with memory are not run, and that layer reads nothing, as no write depends on it.
        """
        modules = [modules[0] for modules in self.memory.values()]
        ids = arguments.token_ids(ids, self.n_vocab)
        if ids.shape[1] == 0 or not all(module.layerwise for module in modules):
            return super().absorb(ids, state, read, mask, breaks)
        state = self.init_state(len(ids)) if state is None else state
        if breaks is not None and bool(breaks[:, 0].any()):
            state = self._close(state, breaks[:, 0].cpu(), True)
        grid = self._lay_out(ids, state.local, None, mask, breaks)
        return self._run(grid, state, read, any(grid.n_complete), None, storing=True)[1]

    @property
    def head_weight(self) -> Tensor:
        """Weights of the language-model head, (V, D)."""
        return self.embedding.weight

    def _begin_documents(self, state: ModelState, reset: Tensor, write: bool) -> ModelState:
        """``state`` with the rows that begin a document at once out of their old context."""
        n_row = len(state.local.host_open)
        if reset.shape[0] != n_row or reset.dim() > 2:
            raise ConfigError(f"reset must be ({n_row},) or ({n_row}, segments), got {tuple(reset.shape)}")
        rows = (reset if reset.dim() == 1 else reset[:, :1].any(dim=1)).cpu()
        if any(modules[0].scope == "shared" for modules in self.memory.values()):
            state = self._close(state, rows, write)
        fresh = self._no_context(n_row)
        local = where_rows(rows, fresh, state.local)
        return state._replace(local=local._replace(document=state.local.document))

    def _lay_out(
        self, ids: Tensor, local: LocalState, reset: Tensor | None, mask: Tensor | None, breaks: Tensor | None
    ) -> Grid:
        """Place the tokens of a call on the grid of segments."""
        n_row, n_token = ids.shape
        segment_len, device = self.segment_len, ids.device
        opened: list[int] = local.host_open.tolist()
        by_segment = breaks is not None or (reset is not None and reset.dim() == 2)
        in_place = not any(opened) and n_token % segment_len == 0 and (mask is None or by_segment)
        if by_segment and not in_place:
            raise ConfigError("breaks and reset by segment need rows with no open segment, and whole segments")
        if in_place:
            n_segment = n_token // segment_len
            for name, starts in (
                ("reset", reset if reset is not None and reset.dim() == 2 else None),
                ("breaks", breaks),
            ):
                if starts is not None and starts.shape != (n_row, n_segment):
                    raise ConfigError(f"{name} must be ({n_row}, {n_segment}) here, got {tuple(starts.shape)}")
            cell, grid_ids = None, ids
            valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            new = valid = valid.view(n_row, n_segment, segment_len)
            complete, closes = valid.all(dim=2), torch.zeros(n_row, n_segment, dtype=torch.bool, device=device)
            for starts in (reset if reset is not None and reset.dim() == 2 else None, breaks):
                if starts is not None:
                    closes = closes | F.pad(starts[:, 1:], (0, 1))
            complete = complete | closes
            n_complete, open_len = [n_segment] * n_row, [0] * n_row
            if mask is not None:
                if not bool((valid[..., 1:] <= valid[..., :-1]).all() & (complete[:, 1:] <= complete[:, :-1]).all()):
                    raise ConfigError("padding may only end a document: it needs reset or breaks in the next segment")
                n_complete = complete.sum(dim=1).tolist()
                counts = F.pad(valid.sum(dim=2), (0, 1)).tolist()
                open_len = [count[n] for count, n in zip(counts, n_complete, strict=True)]
            columns = slice(0, segment_len)
        else:
            n_valid = [n_token] * n_row if mask is None else mask.sum(dim=1).tolist()
            total = [a + b for a, b in zip(opened, n_valid, strict=True)]
            n_segment = max(1, -(-max(total) // segment_len))
            n_complete, open_len = [t // segment_len for t in total], [t % segment_len for t in total]
            begin = local.host_open.to(device)[:, None]
            end = torch.tensor(total, device=device)[:, None]
            order = torch.arange(n_token, device=device).expand(n_row, -1) if mask is None else mask.cumsum(dim=1) - 1
            cell = begin + order
            nowhere = n_segment * segment_len
            target = cell if mask is None else torch.where(mask, cell, nowhere)
            cells = torch.arange(nowhere, device=device)
            grid_ids = F.pad(local.ids[:, self.lookback :], (0, nowhere + 1 - segment_len))
            grid_ids = grid_ids.scatter(1, target, ids)[:, :-1]
            valid = (cells < end).view(n_row, n_segment, segment_len)
            new = valid & (cells >= begin).view(n_row, n_segment, segment_len)
            complete = torch.arange(n_segment, device=device) < end // segment_len
            closes = torch.zeros_like(complete)
            columns = slice(0, segment_len) if n_segment > 1 else slice(min(opened), max(max(total), min(opened) + 1))
        continues = torch.ones_like(complete)
        continues[:, 0] = local.continues
        if breaks is not None:
            continues = continues & ~breaks
        start = torch.arange(n_segment, device=device) * segment_len
        if in_place and mask is not None:
            start = F.pad(valid.sum(dim=2).cumsum(dim=1), (1, 0))[:, :-1]
        begins = local.position if in_place else local.position - local.host_open.to(device)
        position = begins[:, None] + start
        document = local.document[:, None].expand(-1, n_segment)
        if reset is not None:
            if reset.dim() == 1:
                reset = F.pad(reset[:, None], (0, n_segment - 1))
            continues = continues & ~reset
            last_reset = torch.where(reset, start, -1).cummax(dim=1).values
            position = torch.where(last_reset >= 0, start - last_reset, position)
            document = document + reset.cumsum(dim=1)
        return Grid(
            grid_ids, new, valid, complete, continues, closes, reset, position, document,
            n_complete, open_len, opened, columns, cell,
        )  # fmt: skip

    def _segment(
        self, grid: Grid, local: LocalState, embeddings: Tensor, hidden: Tensor, module: Memory,
        signals: dict[str, Tensor] | None = None,
    ) -> Segment:  # fmt: skip
        """What ``module`` may use of the grid. ``embeddings`` and ``hidden`` include the model's lookback.

        Memories work in 32 bits, whatever the model does.
        """
        skip = self.lookback - module.lookback
        ids = torch.cat([local.ids[:, : self.lookback], grid.ids], dim=1)  # (B, C + N)
        before = grid.continues[:, :1].expand(-1, module.lookback)
        return Segment(
            ids=ids[:, skip:],
            embeddings=embeddings[:, skip:].float(),
            hidden=hidden[:, skip:].float(),
            valid=torch.cat([before, grid.valid.flatten(1)], dim=1),
            complete=grid.complete,
            continues=grid.continues,
            closes=grid.closes,
            reset=grid.reset,
            position=grid.position,
            document=grid.document,
            signals=None if signals is None else {name: signals[name] for name in module.signals if name in signals},
            lookback=module.lookback,
            surprise=self._surprise(hidden, ids)[:, skip:] if module.wants_surprise else None,
        )

    @torch.no_grad()
    def _surprise(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Nats of the token after each cell, predicted from ``hidden`` (B, L, D) as if by the last layer, (B, L)."""
        following = ids.roll(-1, dims=1)[..., None]  # the last cell has none, and no slot
        parts = zip(hidden.split(self.segment_len, dim=1), following.split(self.segment_len, dim=1), strict=True)
        nats = [-self.head(self.norm(part)).log_softmax(dim=-1).gather(2, targets) for part, targets in parts]
        return torch.cat(nats, dim=1)[..., 0].float()

    def _run(
        self,
        grid: Grid,
        state: ModelState,
        read: bool,
        write: bool,
        signals: dict[str, Tensor] | None,
        carry: bool = True,
        storing: bool = False,
    ) -> tuple[Tensor, ModelState, dict[str, Residual], dict[str, Trace]]:
        """All layers over the grid, one layer after the other for all segments.

        With ``S`` = 1 this is the definition; with more it needs layerwise memories. If ``storing``, all that follows
        the last write is left out, and the local state has NaN where its result would be.
        """
        local = state.local
        n_segment, segment_len = grid.complete.shape[1], self.segment_len
        embeddings = self._embed(torch.cat([local.ids[:, : self.lookback], grid.ids], dim=1))  # (B, C + N, D)
        x = embeddings[:, self.lookback :].unflatten(1, (n_segment, segment_len))[:, :, grid.columns]
        x = self._enter(x, grid.columns)  # (B, S, Q, D)
        memory = {name: list(parts) for name, parts in state.memory.items()}
        recalled = {
            name: modules[0].recall(modules[0].start_documents(grid.reset, memory[name][0]))
            for name, modules in self.memory.items()
            if not modules[0].layerwise and read
        }
        kept: list[Any] = []
        hiddens: list[Tensor] = []
        reads: dict[str, Residual] = {}
        traces: dict[str, list[Trace]] = {name: [] for name in memory}
        last = self.memory_layers[-1] if self.memory else -1
        for i, layer in enumerate(self.layers):
            if storing and i > last:
                break
            x, parts = self._maybe_checkpoint(layer.mix, x, local.cache[i], grid)
            kept.append(parts)
            if self.memory and i in self.memory_layers:
                place = self.memory_layers.index(i)
                buffer = local.hidden[:, place]  # (B, C + T, D)
                cells = grid.fill(x, buffer[:, self.lookback :]).flatten(1, 2)
                hidden = torch.cat([buffer[:, : self.lookback], cells], dim=1)  # (B, C + N, D)
                hiddens.append(hidden)
                flat = x.flatten(1, 2).float()  # (B, S * Q, D)
                values = []
                for name, modules in self.memory.items():
                    if modules[0].layerwise:
                        segment = self._segment(grid, local, embeddings, hidden, modules[place], signals)
                        found, memory[name][place], trace = modules[place].process(
                            flat, segment, memory[name][place], i, read and not (storing and i == last), write, carry
                        )
                        traces[name].append(trace)
                    else:
                        found = modules[0].read(flat, recalled[name], i) if read else None
                    if found is not None:
                        reads[f"{name}/{i}"] = found
                        values.append(found.values.to(x.dtype))
                if values:
                    x = x + sum(values).unflatten(1, x.shape[1:3])  # type: ignore[union-attr]
            if not (storing and i == last):
                x = x + self._maybe_checkpoint(layer.feed_forward, x)
        for name, modules in self.memory.items():
            if not modules[0].layerwise:
                memory[name][0] = modules[0].start_documents(grid.reset, memory[name][0])
                if write:
                    segment = self._segment(grid, local, embeddings, torch.stack(hiddens, dim=2), modules[0], signals)
                    mine = [reads[key] for key in reads if key.startswith(f"{name}/")]
                    memory[name][0], trace = modules[0].write(segment, memory[name][0], mine)
                    traces[name].append(trace)
        new_local = self._carry(grid, local, kept, hiddens) if carry else local
        state = ModelState({name: tuple(parts) for name, parts in memory.items()}, new_local)
        return x.flatten(1, 2), state, reads, {name: mean_trace(parts) for name, parts in traces.items()}

    def _run_segments(
        self,
        grid: Grid,
        state: ModelState,
        read: bool,
        write: bool,
        signals: dict[str, Tensor] | None,
        full: bool = False,
    ) -> tuple[Tensor, ModelState, dict[str, Residual], dict[str, Trace]]:
        """All layers over one segment after the other: the definition, and the only way for some memories.

        ``full``: the call is known to bring tokens for all segments of all rows, without asking the device.
        """
        parts, all_reads, traces = [], [], []
        for s in range(grid.complete.shape[1]):
            cells = slice(s * self.segment_len, (s + 1) * self.segment_len)
            active = grid.new[:, s].any(dim=1)  # (B,)
            one = Grid(
                grid.ids[:, cells],
                *(None if part is None else part[:, s : s + 1] for part in grid[1:9]),  # type: ignore[misc, arg-type]
                n_complete=[int(n > s) for n in grid.n_complete],
                open_len=[0 if n > s else o for n, o in zip(grid.n_complete, grid.open_len, strict=True)],
                opened=grid.opened if s == 0 else [0] * len(grid.opened),
                columns=grid.columns,
                cell=None,
            )
            x, after, reads, trace = self._run(one, state, read, write, signals)
            local = after.local if full else where_rows(active, after.local, state.local)
            if s > 0 and not full:  # a context may begin with a segment that holds no token yet
                fresh = self._no_context(len(active))
                fresh = fresh._replace(position=grid.position[:, s], document=grid.document[:, s])
                local = where_rows(~active & ~grid.continues[:, s], fresh, local)
            state = after._replace(local=local)
            parts.append(x)
            all_reads.append(reads)
            traces.append(trace)
        joined = {key: join_reads([reads[key] for reads in all_reads]) for key in all_reads[0]}
        return torch.cat(parts, dim=1), state, joined, {k: mean_trace([t[k] for t in traces]) for k in traces[0]}

    def _maybe_checkpoint(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _carry(self, grid: Grid, local: LocalState, kept: list[Any], hiddens: list[Tensor]) -> LocalState:
        """The local state after the grid; layers that were not run have NaN in their caches."""
        n_segment, segment_len, n_cell = grid.complete.shape[1], self.segment_len, self.lookback + self.segment_len
        device = grid.ids.device
        same = len(set(grid.n_complete)) == 1
        n = grid.n_complete[0]
        # Numbers known to the host are copied to the device only where they are needed: a copy waits for the device.
        done = None if same else torch.tensor(grid.n_complete, device=device)

        def segment_of(parts: Tensor, beyond: Tensor) -> Tensor:
            """Part of the first segment that is not complete, (B, ...), of (B, S, ...); ``beyond`` if all are."""
            if done is None:
                return parts[:, n] if n < n_segment else beyond
            choice = torch.cat([parts, beyond[:, None]], dim=1)
            index = done.view(-1, *[1] * (choice.dim() - 1)).expand(-1, 1, *choice.shape[2:])
            return choice.gather(1, index)[:, 0]

        def cells_from(flat: Tensor) -> Tensor:
            """Cells of that segment and the lookback, (B, C + T, ...), of (B, C + N, ...)."""
            flat = torch.cat([flat, flat.new_zeros(len(flat), segment_len, *flat.shape[2:])], dim=1)
            if done is None:
                return flat[:, n * segment_len : n * segment_len + n_cell]
            index = done[:, None] * segment_len + torch.arange(n_cell, device=device)
            return flat.gather(1, index.view(*index.shape, *[1] * (flat.dim() - 2)).expand(-1, -1, *flat.shape[2:]))

        run, missed = self.layers[: len(kept)], local.cache[len(kept) :]
        cache = [layer.carry(parts, segment_of) for layer, parts in zip(run, kept, strict=True)]
        cache += [map_tensors(lambda part: torch.full_like(part, torch.nan), part) for part in missed]
        hidden = torch.stack([cells_from(h) for h in hiddens], dim=1) if hiddens else local.hidden
        ids = cells_from(torch.cat([local.ids[:, : self.lookback], grid.ids], dim=1))
        open_len = torch.tensor(grid.open_len)
        position = segment_of(grid.position, grid.position[:, -1] + segment_len)
        return LocalState(
            cache=tuple(cache),
            hidden=hidden,
            ids=ids,
            continues=segment_of(grid.continues, torch.ones_like(grid.continues[:, 0])),
            position=position + open_len.to(device) if any(grid.open_len) else position,
            document=segment_of(grid.document, grid.document[:, -1]),
            host_open=open_len,
        )

    # --- generation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float | None = 0.9,
        state: ModelState | None = None,
        read: bool = True,
        write: bool = True,
    ) -> Tensor:
        """Go on with ``ids`` token by token.

        Args:
            ids: Prompt, (B, L) with L >= 1.
            max_new_tokens: Tokens to add.
            temperature: Softmax temperature; 0 takes the likeliest token.
            top_k: Sample from the k likeliest tokens only; None for all.
            top_p: Sample from the smallest set of tokens whose probability reaches p; None for all.
            state: Where the text before the prompt stopped.
            read: Whether memories are read.
            write: Whether memories are written (in a state of their own, not in ``state``).

        Returns:
            Prompt and new tokens, (B, L + max_new_tokens).

        Raises:
            ConfigError: If a setting is out of range or the prompt is empty.
        """
        ids = arguments.token_ids(ids, self.n_vocab)
        if ids.shape[1] == 0:
            raise ConfigError(f"the prompt must be (rows, tokens) with at least one token, got {tuple(ids.shape)}")
        arguments.sampling(max_new_tokens, temperature, top_k, top_p)
        training, tokens = self.training, [ids]
        self.eval()
        try:
            for _ in range(max_new_tokens):
                out = self(tokens[-1], state=state, read=read, write=write, logits=False)
                state = out.state
                tokens.append(_sample(self.head(out.hidden[:, -1]), temperature, top_k, top_p))
        finally:
            self.train(training)
        return torch.cat(tokens, dim=1)


def _shapes(local: LocalState) -> list[torch.Size]:
    """Shapes of all that a model carries, without the rows."""
    return [part.shape[1:] for part in tensors(local)]


def _sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token (B, 1) for each row of ``logits`` (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1)
        drop = mass.cumsum(dim=-1) - mass >= top_p  # the mass before a token already suffices
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1)


def _memory_layers(choice: str | Sequence[int], n_layer: int) -> list[int]:
    """Indices of the layers with memory, ascending."""
    if choice == "middle":
        return [n_layer // 2]
    if choice == "all":
        return list(range(n_layer))
    if isinstance(choice, str):
        raise ValueError(f"model.memory_layers must be 'middle', 'all' or a list of layers, got {choice!r}")
    layers = sorted(choice)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < n_layer for layer in layers):
        raise ValueError(f"model.memory_layers must name different layers of 0..{n_layer - 1}, got {list(choice)}")
    return layers
