"""A memory before all laws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from memlm.laws import causality, forgetting, learning, state
from memlm.laws.bare import bare
from memlm.laws.builders import Make, Nodes, builder, rounding, takes
from memlm.laws.described import described
from memlm.memory.records import RecordKeeper
from memlm.memory.slots import Slots
from memlm.models.lmcode import LMCode
from memlm.models.segments import SegmentModel


class Law(NamedTuple):
    """A law of the book.

    Attributes:
        number: Its number; several may tell parts of one law.
        title: What holds.
        holds: Raises AssertionError where it does not; called with a builder.
        shared: Whether it holds for banks that all rows share, too.
        of: What a memory has that the law speaks of; None for any memory.
        on_base: Whether it speaks of models that stand on a pretrained one alone.
    """

    number: int
    title: str
    holds: Callable[..., None]
    shared: bool = False
    of: type | None = None
    on_base: bool = False


LAWS = (
    Law(0, "alive: early tokens, and reads, change later outputs", causality.alive),
    Law(0, "bare: an empty or untrained memory leaves the pretrained base as it is", bare, on_base=True),
    Law(1, "causal: a token changes nothing before it", causality.causal, shared=True),
    Law(2, "isolated: rows do not see each other", causality.isolated),
    Law(3, "chunk-invariant: any split into calls gives one result", causality.chunk_invariant, shared=True),
    Law(3, "chunk-invariant: rows of unlike length", causality.ragged),
    Law(3, "chunk-invariant: generation equals the parallel pass", causality.generates_as_parallel),
    Law(3, "chunk-invariant: both schedules agree, gradients too", causality.schedules_agree),
    Law(3, "chunk-invariant: contexts end within a call as between calls", causality.contexts),
    Law(3, "chunk-invariant: a context is closed once", causality.closed_once),
    Law(3, "chunk-invariant: segments without a token", causality.empty_segments),
    Law(4, "reset: a reset row is as fresh, others are untouched", state.resets),
    Law(5, "pure: same input, same output; nothing is changed", state.pure, shared=True),
    Law(5, "pure: given away or kept, a state goes on alike", state.given_away, shared=True),
    Law(6, "gradient reach: through writes, and none across the edge", learning.reach),
    Law(6, "gradient reach: every parameter learns", learning.every_parameter_learns),
    Law(7, "bounded: constant bytes, finite", state.bounded),
    Law(7, "bounded: a full memory admits", state.admits),
    Law(8, "round trip: save, load, go on", state.round_trip, shared=True),
    Law(11, "inspectable: one vector per slot, forgotten alone", state.inspectable, shared=True, of=Slots),
    Law(12, "forgets: stored and forgotten is as never stored", forgetting.forgets, of=RecordKeeper),
)
"""Laws of a small model with the memory; law 9 (useful) and law 10 (described) are asked otherwise, see `judge`."""


class Verdict(NamedTuple):
    """What a law says of a memory.

    Attributes:
        number: Number of the law.
        title: What should hold.
        why: What does not; None if it holds.
    """

    number: int
    title: str
    why: str | None


def judge(
    nodes: Nodes, model_class: Callable[..., SegmentModel] = LMCode, written: Nodes | None = None
) -> Iterator[Verdict]:
    """Put memories before every law, one after the other.

    Args:
        nodes: Settings of each memory by name, with ``_target_``, as in ``configs/memory/*.yaml``.
        model_class: The model around them: see `memlm.laws.builders.host_of`.
        written: Settings as the YAML has them, for law 10; by default ``nodes``.

    Yields:
        A verdict for each law, as soon as it is known; those of shared banks only for memories with ``scope``.
    """
    make = builder(nodes, model_class=model_class)
    for law, shared in _asked(make):
        if not shared:
            yield _verdict(law.number, law.title, partial(law.holds, make), make)
        else:
            holds = partial(law.holds, make, scope="shared")
            yield _verdict(law.number, f"{law.title}; shared bank", holds, make)
    whole = builder(nodes, shrink=False, model_class=model_class)
    yield _verdict(9, "useful: beats a wiped and another row's memory", partial(learning.useful, whole), make)
    title = "described: YAML, constructor and documentation agree"
    yield _verdict(10, title, partial(described, written or nodes), make)


def n_verdict(nodes: Nodes, model_class: Callable[..., SegmentModel] = LMCode) -> int:
    """How many verdicts `judge` gives."""
    return len(_asked(builder(nodes, model_class=model_class))) + 2


def _asked(make: Make) -> list[tuple[Law, bool]]:
    """The laws that speak of what the memories are, each with whether of a shared bank."""
    model = make()
    modules = [modules[0] for modules in model.memory.values()]
    ways = (False, True) if takes(make, "scope") else (False,)
    laws = [law for law in LAWS if law.of is None or all(isinstance(module, law.of) for module in modules)]
    laws = [law for law in laws if model.base_folder is not None or not law.on_base]
    return [(law, shared) for law in laws for shared in ways if law.shared or not shared]


def _verdict(number: int, title: str, holds: Callable[[], None], make: Make) -> Verdict:
    try:
        with rounding(make):
            holds()
    except Exception as error:  # a law of memories calls code of somebody else
        first = str(error).partition("\n")[0]
        return Verdict(
            number, title, first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"
        )
    return Verdict(number, title, None)
