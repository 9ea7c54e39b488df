"""In which order layers, memories and segments are run.

The definition is segment after segment, in each all layers. Where no write needs more than what enters a layer, all
segments of a window go through one layer before the next: `at_once`, which with one segment is the definition.

Shapes: B rows, S segments of the grid, T tokens per segment, Q columns computed, C lookback, N = S * T cells, D model
width, m cells of a memory before a segment, n behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlm.memory.contract import Context, Memory, Mixer, Read, Segment, Trace, join_reads, joined, mean_trace
from memlm.memory.state import where_rows
from memlm.models.grid import Grid, OpenSegment, lay_out
from memlm.models.mixers import Cells, Done, LayerMixer, SegmentLayer, StackMixer, cells_of, heads_of
from memlm.models.stack import Stack
from memlm.models.state import LocalState, ModelState
from memlm.models.views import holding, segment_of, stream_of
from memlm.tensors import Host

WINDOW = 2**12
"""Tokens of a row that go through the layers together where no gradients are asked for, if a segment has fewer."""


class Ran(NamedTuple):
    """What a run gives.

    Attributes:
        x: Output of the last layer, (B, S * Q, D).
        state: The state after it.
        reads: See `Output`.
        trace: See `Output`.
    """

    x: Tensor
    state: ModelState
    reads: dict[str, Read]
    trace: dict[str, Trace]


class How(NamedTuple):
    """How a grid is run.

    Attributes:
        read: Whether memories are read.
        write: Whether memories are written.
        signals: Implicit signals of the text by name, each (B, n).
        keep_state: Whether the state after the grid is needed.
        storing: Whether only the memories after it are needed: all that follows the last write is left out.
        closing: Whether there is no new token: the open segment is closed, for the cells behind it.
        owned: Whether the state is given away: see `Segment.owned`.
        told: Cells whose successor is worth to be remembered, (B, S * T).
    """

    read: bool
    write: bool
    signals: dict[str, Tensor] | None = None
    keep_state: bool = True
    storing: bool = False
    closing: bool = False
    owned: bool = False
    told: Tensor | None = None


def writes_within(module: Memory) -> bool:
    """Whether a write needs nothing but what enters the layer, which then can be run for all segments at once."""
    return module.around == "layer" and not module.needs.output


def run(model: Stack, grid: Grid, state: ModelState, how: How) -> Ran:
    """All layers over one window of segments after the other, joined; see `at_once`.

    What is found does not depend on where windows begin. The definition, and the only way for some memories, is one
    segment after the other. With gradients the whole call is one window.
    """
    n_segment, step = grid.n_segment, segments_at_once(model)
    if step is None or step >= n_segment:
        return at_once(model, grid, state, how)
    windows: list[Ran] = []
    for begin in range(0, n_segment, step):
        end = min(begin + step, n_segment)
        keep_state = how.keep_state or end < n_segment
        told = None if how.told is None else how.told[:, begin * grid.segment_len : end * grid.segment_len]
        window = at_once(model, grid.of(begin, end), state, how._replace(keep_state=keep_state, told=told))
        ended = [n < begin for n in grid.n_complete]  # rows whose last token was in an earlier window
        if any(ended):
            local = where_rows(torch.tensor(ended), state.local, window.state.local)
            window = window._replace(state=window.state._replace(local=local))
        state = window.state
        how = how._replace(owned=how.owned or (how.write and not torch.is_grad_enabled()))
        if how.storing:  # of what is only stored nothing else is kept
            windows.clear()
        windows.append(window)
    each = [window for window in windows for _ in range(window.x.shape[1] // grid.segment_len)]
    return Ran(
        x=joined([window.x for window in windows]),
        state=state,
        reads={key: join_reads([window.reads[key] for window in windows]) for key in windows[0].reads},  # type: ignore[misc]
        trace={name: mean_trace([window.trace[name] for window in each]) for name in windows[0].trace},
    )


def segments_at_once(model: Stack) -> int | None:
    """Segments that layers may run over together; None for any number."""
    if not all(writes_within(modules[0]) for modules in model.memory.values()):
        return 1
    if model.n_together is not None:
        return model.n_together
    return None if torch.is_grad_enabled() else max(1, WINDOW // model.segment_len)


def at_once(model: Stack, grid: Grid, state: ModelState, how: How) -> Ran:
    """All layers over the grid, one layer after the other for all segments."""
    return _Pass(model, grid, state, how).run()


class _Pass:
    """One run of all layers over a grid."""

    def __init__(self, model: Stack, grid: Grid, state: ModelState, how: How) -> None:
        self.model, self.local, self.how = model, state.local, how
        self.lookback = model.lookback
        ids = torch.cat([self.local.ids[:, : self.lookback], grid.ids], dim=1)  # (B, C + N)
        self.grid = model.ready(grid, ids, self.local.cache[len(model.layers) :])
        self.ids, self.embeddings = ids, model.embed(ids)
        self.before = state.memory
        self.memory = {name: list(parts) for name, parts in state.memory.items()}
        self.prepared: dict[str, Any] = {}
        self.caches: list[Any] = []
        self.streams: dict[str, list[Tensor]] = {name: [] for name in self.local.streams}
        self.reads: dict[str, Read] = {}
        self.traces: dict[str, list[Trace]] = {name: [] for name in self.memory}
        self.owned = how.owned and not self.memory_of("stack")  # around which layers may run several times

    def run(self) -> Ran:
        """All of it."""
        embeddings = self.embeddings[:, self.lookback :].unflatten(1, (self.grid.n_segment, -1))
        x = self.model.entered(embeddings, self.grid)  # (B, S, Q, D)
        for name, modules in self.model.memory.items():
            for place, module in enumerate(() if writes_within(modules[0]) or not self.how.read else modules):
                self.prepared[f"{name}/{place}"] = module.prepare(self.begun(name, module, place))
        stack = self.memory_of("stack")
        x = self.around_stack(*stack[0], x) if stack else self.layers(x)[0]
        for name, modules in self.memory_of("layers") if not self.how.closing else ():
            hidden = torch.stack(self.streams[stream_of(modules[0])], dim=2) if self.how.write else None
            output = torch.stack(self.streams["output"], dim=2) if self.how.write and modules[0].needs.output else None
            self.write(name, modules[0], 0, hidden, output)
        memory = {name: tuple(parts) for name, parts in self.memory.items()}
        local = self.next_local() if self.how.keep_state else self.local
        self.caches = []  # mixers refer to the pass: it would live on, and the state before it
        trace = {name: mean_trace(parts) for name, parts in self.traces.items()}
        return Ran(x.flatten(1, 2), ModelState(memory, local), self.reads, trace)

    def memory_of(self, *around: str) -> list[tuple[str, Any]]:
        """The memories that stand there, by name."""
        return [(name, modules) for name, modules in self.model.memory.items() if modules[0].around in around]

    def begun(self, name: str, module: Memory, place: int) -> Any:
        """The state of a memory that is written apart from where it is read; there is one segment then."""
        return module.start_documents(self.grid.flags.reset, self.memory[name][place], self.owned)

    # --- the stack -----------------------------------------------------------------------------------------------

    def around_stack(self, name: str, modules: Any, x: Tensor) -> Tensor:
        """The layers with a memory around them."""
        module = modules[0]
        tail = None
        if module.needs.tail and self.how.write and any(self.grid.n_complete):
            tail = module.tail(module.prepare(self.begun(name, module, 0))).to(x.dtype)
        held = holding(self.model, module, self.memory[name][0], self.grid, self.how.write)
        mixer = StackMixer(self.layers, self.grid.n_column, self.embeddings.dtype, tail, module.needs.each_layer, held)
        if self.how.closing and tail is None:
            y = x
        elif self.how.read:
            mixed, found = module.mix(x[:, 0].float(), self.prepared[f"{name}/0"], mixer)
            y = mixed[:, None].to(x.dtype)
            self.keep(name, found)
        else:
            y = module.off(x[:, 0].float(), mixer)[:, None].to(x.dtype)
        output = None
        if "top" in self.streams:
            output = self.fill("top", 0, y)
            self.streams["top"].append(output)
        ends = not module.needs.tail or mixer.tail is not None
        self.write(name, module, 0, self.embeddings if ends else None, output, tail=mixer.tail)
        return y

    def layers(self, x: Tensor, cells: Cells | None = None) -> tuple[Tensor, Cells]:
        """All layers; and with them the cells of a memory around the stack. What counts is the last call."""
        self.caches = []
        self.streams = {name: [] for name in self.streams}
        for name, _ in self.memory_of("layer", "layers"):
            self.memory[name], self.traces[name] = list(self.before[name]), []
        model, last = self.model, self.model.memory_layers[-1] if self.model.memory else -1
        cells = cells or Cells(None, None)
        for i, layer in enumerate(model.layers):
            if self.how.storing and i > last:
                break
            x, cells = self.entering(i, x, cells)
            entered = x
            contexts = self.beside(i, layer, x.dtype)
            if cells.front is not None:
                heads = layer.heads(cells.front)
                seen = None if cells.seen is None else cells.seen.expand(-1, heads.k.shape[2])
                contexts = (*contexts, Context(heads.k, heads.v, seen))
            mixer = LayerMixer(layer, self.local.cache[i], self.grid, self.checkpointed, x.dtype, contexts)
            attached = bool(model.memory) and i in model.memory_layers and not self.how.closing
            x = self.with_memories(i, mixer, x) if attached else mixer(x)
            self.caches.append(mixer)
            if cells.front is not None or cells.tail is not None:
                cells = self.through(layer, mixer, cells, contexts)
            if self.how.storing and i == last:
                break
            x = model.left(i, entered, x + self.checkpointed(layer.feed_forward, x), self.grid)
            if attached and "output" in self.streams:
                self.keep_output(i, x)
        return x, cells

    def entering(self, i: int, x: Tensor, cells: Cells) -> tuple[Tensor, Cells]:
        """What enters layer ``i``, of the stream (B, S, Q, D) and of cells: see `Memory.enter`."""
        asks = [(name, modules[0]) for name, modules in self.memory_of("stack") if modules[0].needs.each_layer]
        if not asks or not self.how.read:
            return x, cells
        name, module = asks[0]

        def enter(part: Tensor | None) -> Any:
            return None if part is None else module.enter(part.float(), self.prepared[f"{name}/0"], i).to(part.dtype)

        return enter(x[:, 0])[:, None], cells._replace(front=enter(cells.front), tail=enter(cells.tail))

    def beside(self, i: int, layer: SegmentLayer, dtype: torch.dtype) -> tuple[Context, ...]:
        """What a memory around the stack gives layer ``i`` to see beside the segment: see `Memory.beside`."""
        for name, (module, *_) in self.memory_of("stack"):
            if module.needs.each_layer and self.how.read:
                found = module.beside(self.prepared[f"{name}/0"], i, partial(heads_of, layer, dtype=dtype))
                return () if found is None else (found._replace(key=found.key.to(dtype), value=found.value.to(dtype)),)
        return ()

    def through(self, layer: SegmentLayer, mixer: LayerMixer, cells: Cells, contexts: tuple[Context, ...]) -> Cells:
        """The cells behind a layer. Those before a segment see each other; those behind it see all."""
        front, tail, tails, _ = cells
        if tail is not None:
            place = self.grid.segment_len + torch.arange(tail.shape[1], device=tail.device)
            seen = layer.seen(mixer.kept, self.grid)
            tail = cells_of(layer, tail, [*contexts, *seen], place)
            tail = tail + layer.feed_forward(tail)
            tails = (*tails, tail)
        if front is not None:
            front = cells_of(layer, front, [])
            front = front + layer.feed_forward(front)
        return cells._replace(front=front, tail=tail, tails=tails)

    # --- a layer -------------------------------------------------------------------------------------------------

    def with_memories(self, i: int, mixer: LayerMixer, x: Tensor) -> Tensor:
        """The stream behind layer ``i``'s mixer and memories, for ``x`` (B, S, Q, D) before it.

        A memory with a `Memory.mix` of its own stands around the mixer. The others read what comes out, side by side.
        """
        place = self.model.memory_layers.index(i)
        attached = self.memory_of("layer", "layers")
        beside = [(name, modules) for name, modules in attached if modules[0].reads_beside]
        around = [(name, modules) for name, modules in attached if not modules[0].reads_beside]
        if "input" in self.streams:
            self.streams["input"].append(self.fill("input", place, self.model.written("input", i, x, self.grid)))
        if around:
            name, modules = around[0]
            part = place if modules[0].around == "layer" else 0
            held = holding(self.model, modules[part], self.memory[name][part], self.grid, self.how.write)
            mixed, _ = self.step(name, modules, i, x.flatten(1, 2).float(), mixer)
            assert mixed is not None
            y = mixed.view_as(x).to(x.dtype)
            if mixer.kept is None and not mixer.parts and type(modules[0]).off is Memory.off:
                mixer(x)  # the layer has to know the segment, should reads be switched off
            if held is not None:
                y = mixer.instead(held, y, x)
        else:
            y = mixer(x)
        if "mixed" in self.streams:
            self.streams["mixed"].append(self.fill("mixed", place, self.model.written("mixed", i, y, self.grid)))
        flat = y.flatten(1, 2).float()  # (B, S * Q, D)
        values: list[Any] = []
        for name, modules in beside:
            found = self.step(name, modules, i, flat, Done())[1]
            if found is not None and found.value is not None:
                values.append(self.model.let_in(name, place, found.value, flat).to(y.dtype))
        return y + sum(values).view_as(y) if values else y

    def step(self, name: str, modules: Any, i: int, x: Tensor, mixer: Mixer) -> tuple[Tensor | None, Read | None]:
        """One memory at layer ``i``: the stream behind it, unless it is one that only reads; and what it read."""
        each = modules[0].around == "layer"
        place = self.model.memory_layers.index(i)
        module = modules[place if each else 0]
        read = self.how.read and not (self.how.storing and i == self.model.memory_layers[-1])
        y: Tensor | None = None
        found: Read | None = None
        if writes_within(module):
            window = self.segment(module, self.streams[stream_of(module)][place], layer=self.model.writer(i))
            scanned = module.scan(x, window, self.memory[name][place], mixer, read, self.how.write, self.how.keep_state)
            y, found, self.memory[name][place] = scanned.output, scanned.read, scanned.state
            self.traces[name].append(scanned.trace)
        elif not read:
            y = module.off(x, mixer)
        elif module.reads_beside:
            found = module.read(x, self.prepared[f"{name}/{place if each else 0}"])
        else:
            y, found = module.mix(x, self.prepared[f"{name}/{place if each else 0}"], mixer)
        self.keep(f"{name}/{i}", found)
        return y, found

    def keep_output(self, i: int, x: Tensor) -> None:
        """Keep what came out of a layer, and write it where that is what a write needs."""
        place = self.model.memory_layers.index(i)
        self.streams["output"].append(self.fill("output", place, self.model.written("output", i, x, self.grid)))
        for name, modules in self.memory_of("layer"):
            module = modules[place]
            if module.needs.output:
                hidden = self.streams[stream_of(module)][place]
                self.write(name, module, place, hidden, self.streams["output"][place], layer=self.model.writer(i))

    def keep(self, key: str, found: Read | None) -> None:
        """Keep what was read, to be looked at."""
        if found is not None:
            self.reads[key] = found

    def write(
        self,
        name: str,
        module: Memory,
        place: int,
        hidden: Tensor | None,
        output: Tensor | None = None,
        layer: SegmentLayer | None = None,
        tail: Tensor | None = None,
    ) -> None:
        """Write one segment, if anything is written."""
        state = self.begun(name, module, place)
        if self.how.write and hidden is not None:
            state, trace = module.write(self.segment(module, hidden, output, layer, tail), state)
            self.traces[name].append(trace)
        self.memory[name][place] = state

    def segment(
        self,
        module: Memory,
        hidden: Tensor,
        output: Tensor | None = None,
        layer: SegmentLayer | None = None,
        tail: Tensor | None = None,
    ) -> Segment:
        """What ``module`` may use of the grid. ``hidden`` and ``output`` include the model's lookback."""
        signals = self.how.signals
        segment = segment_of(
            self.model, module, self.local, self.grid, self.ids, self.embeddings, hidden, output, layer, tail, signals
        )._replace(owned=self.owned)
        if self.how.told is not None:
            segment = segment._replace(told=F.pad(self.how.told, (segment.lookback, 0)))
        if not module.needs.nll:
            return segment
        return segment._replace(nll=nll_after(self.model, self.ids[:, self.lookback :], self.grid.valid[:, 0]))

    def fill(self, stream: str, place: int, x: Tensor) -> Tensor:
        """All cells of a stream, (B, C + N, D), of those that were computed, (B, S, Q, D)."""
        buffer = self.local.streams[stream][:, place]  # (B, C + T, D)
        cells = self.grid.fill(x, buffer[:, self.lookback :]).flatten(1, 2)
        return torch.cat([buffer[:, : self.lookback], cells], dim=1)

    def checkpointed(self, function: Any, *arguments: Any) -> Any:
        """Call a function of a layer."""
        if self.model.gradient_checkpointing and self.model.training and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def next_local(self) -> LocalState:
        """The local state after the grid."""
        grid, flags, local, open_segment = self.grid, self.grid.flags, self.local, OpenSegment(self.grid)
        cache = [mixer.next_cache() for mixer in self.caches]
        left_out = [None] * (len(self.model.layers) - len(cache))
        streams = {
            name: torch.stack([open_segment.cells(part) for part in parts], dim=1) if parts else local.streams[name]
            for name, parts in self.streams.items()
        }
        open_len = torch.tensor(grid.open_len)
        position = open_segment.of(flags.position, flags.position[:, -1] + grid.segment_len)
        return LocalState(
            cache=(*cache, *left_out, *self.model.below_after(grid, open_segment.of)),
            streams=streams,
            ids=open_segment.cells(self.ids),
            continues=open_segment.of(flags.continues, torch.ones_like(flags.continues[:, 0])),
            position=position + open_len.to(grid.ids.device) if any(grid.open_len) else position,
            document=open_segment.of(flags.document, flags.document[:, -1]),
            n_open=Host(open_len),
        )


def nll_after(model: Stack, ids: Tensor, valid: Tensor) -> Callable[[Tensor], Tensor]:
    """The next-token loss of one segment alone, ids (B, T), as a function of cells before it: see `Segment.nll`."""

    def nll(cells: Tensor) -> Tensor:
        own, counts = ids.clone(), valid[:, 1:].float()  # no inference tensors, through which no gradient goes
        state = ModelState(
            {name: tuple(module.init_state(len(own)) for module in parts) for name, parts in model.memory.items()},
            model.no_context(len(own)),
        )
        grid = lay_out(own, state.local, model.segment_len, None, None, None, None)
        run = _Pass(model, grid, state, How(read=False, write=False, keep_state=False))
        x = model.entered(run.embeddings[:, None, run.lookback :], run.grid)
        x, _ = run.layers(x, Cells(cells.to(x.dtype), None))
        logits = F.linear(model.norm(x[:, 0, :-1]), model.head_weight.detach()).float()
        nats = F.cross_entropy(logits.mT, own[:, 1:], reduction="none")
        return (nats * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)

    return nll
