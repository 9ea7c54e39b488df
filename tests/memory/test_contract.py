"""The contract carries every kind of memory: small ones of each kind keep the laws, in both schedules."""

from collections.abc import Callable

import pytest

from memlm.memory.contract import Memory
from tests.conformance import laws
from tests.memory import guests

GUESTS: list[type[Memory]] = [
    guests.Cache,
    guests.CacheAtOnce,
    guests.PlacedCache,
    guests.Nearest,
    guests.PerHead,
    guests.Pool,
    guests.Cells,
    guests.TokenWise,
]
LAWS: list[Callable[[laws.Make], None]] = [
    laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.generates_as_parallel,
    laws.schedules_agree, laws.contexts, laws.closed_once, laws.empty_segments, laws.resets, laws.pure, laws.reach,
    laws.every_parameter_learns, laws.round_trip,
]  # fmt: skip


def make_of(*classes: type[Memory]) -> laws.Make:
    return laws.builder_of({cls.__name__.lower(): (cls, {}) for cls in classes}, shrink=False)


@pytest.mark.parametrize("law", LAWS, ids=[law.__name__ for law in LAWS])
@pytest.mark.parametrize("cls", GUESTS, ids=[cls.__name__ for cls in GUESTS])
def test_every_kind_of_memory_keeps_the_laws(cls: type[Memory], law: Callable[[laws.Make], None]) -> None:
    law(make_of(cls))


@pytest.mark.parametrize("law", [laws.chunk_invariant, laws.ragged, laws.schedules_agree, laws.contexts])
def test_memories_of_several_kinds_stand_together(law: Callable[[laws.Make], None]) -> None:
    law(make_of(guests.Cells, guests.Cache))
