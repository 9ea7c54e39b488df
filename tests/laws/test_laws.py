"""Every memory that is shipped, against every law."""

from collections.abc import Callable
from typing import Any

import pytest

from memlm import laws
from memlm.memory.ltm import LongTermMemory
from memlm.memory.records import RecordKeeper
from memlm.memory.slots import Slots
from tests.laws.oracles import ORACLES

NAMES = laws.names()
QUICK = {"none", "stm", "ltm", "delta", "cache", "rmt"}  # one of each kind; the others are judged in the slow lane
REMEMBERS = [name for name in NAMES if laws.nodes_of(name)]


def make_of(name: str) -> laws.Make:
    return laws.builder(laws.nodes_of(name))


# Memories of which each part has slots.
SLOTS = [n for n in REMEMBERS if all(issubclass(laws.class_of(node), Slots) for node in laws.nodes_of(n).values())]


def lanes(names: list[str]) -> list[Any]:
    """The names as parameters, those outside of the quick lane marked slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(params=lanes(NAMES))
def make(request: pytest.FixtureRequest) -> laws.Make:
    return make_of(request.param)


@pytest.fixture(params=lanes(REMEMBERS))
def memory(request: pytest.FixtureRequest) -> laws.Make:
    return make_of(request.param)


@pytest.fixture(params=lanes([n for n in REMEMBERS if laws.takes(make_of(n), "scope")]))
def shareable(request: pytest.FixtureRequest) -> laws.Make:
    return make_of(request.param)


def test_every_memory_of_the_first_release_is_found() -> None:
    slots = {"stm", "ltm", "dual", "imm", "auto", "memoria", "adaptive"}
    assert {"none", *slots} <= set(NAMES)
    assert set(REMEMBERS) == set(NAMES) - {"none"}
    assert slots <= {name for name in NAMES if laws.has_slots(name)} < set(REMEMBERS)


def test_0_alive(memory: laws.Make) -> None:
    laws.alive(memory)


def test_1_causal(make: laws.Make) -> None:
    laws.causal(make)


def test_1_causal_shared(shareable: laws.Make) -> None:
    laws.causal(shareable, scope="shared")


def test_2_isolated(make: laws.Make) -> None:
    laws.isolated(make)


def test_3_chunk_invariant(make: laws.Make) -> None:
    laws.chunk_invariant(make)


def test_3_chunk_invariant_shared(shareable: laws.Make) -> None:
    laws.chunk_invariant(shareable, scope="shared")


def test_3_chunk_invariant_ragged(make: laws.Make) -> None:
    laws.ragged(make)


def test_3_generation_equals_the_parallel_pass(make: laws.Make) -> None:
    laws.generates_as_parallel(make)


def test_3_schedules_agree(make: laws.Make) -> None:
    laws.schedules_agree(make)


def test_3_contexts_end_within_a_call_as_between_calls(make: laws.Make) -> None:
    laws.contexts(make)


def test_3_contexts_are_closed_once(make: laws.Make) -> None:
    laws.closed_once(make)


def test_3_contexts_may_begin_with_padding(make: laws.Make) -> None:
    laws.empty_segments(make)


def test_4_reset(make: laws.Make) -> None:
    laws.resets(make)


def test_5_pure(make: laws.Make) -> None:
    laws.pure(make)


def test_5_pure_shared(shareable: laws.Make) -> None:
    laws.pure(shareable, scope="shared")


def test_5_given_away(make: laws.Make) -> None:
    laws.given_away(make)


def test_5_given_away_shared(shareable: laws.Make) -> None:
    laws.given_away(shareable, scope="shared")


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_5_given_away_lists(scope: str) -> None:
    small = {"index": "inverted", "n_list": 4, "n_probe": 2}
    cls, settings = LongTermMemory, laws.settings_of(laws.nodes_of("ltm")["ltm"])
    laws.given_away(laws.builder_of({"ltm": (cls, settings | small)}), scope=scope)


def test_6_gradient_reach(memory: laws.Make) -> None:
    laws.reach(memory)


def test_6_every_parameter_learns(make: laws.Make) -> None:
    laws.every_parameter_learns(make)


def test_7_bounded(make: laws.Make) -> None:
    laws.bounded(make)


def _oracles(name: str) -> list[str]:
    return [cls for cls in (laws.class_of(node).__name__ for node in laws.nodes_of(name).values()) if cls in ORACLES]


DECLARED = [
    pytest.param(name, cls, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in REMEMBERS
    for cls in _oracles(name)
]


@pytest.mark.parametrize(("name", "cls"), DECLARED)
def test_7_evicts_as_declared(name: str, cls: str) -> None:
    ORACLES[cls].evicts_as_declared(make_of(name))


def test_7_a_full_memory_admits(memory: laws.Make) -> None:
    laws.admits(memory)


@pytest.mark.parametrize(("name", "cls"), DECLARED)
def test_7_a_full_memory_admits_what_is_more_important(name: str, cls: str) -> None:
    laws.admits(make_of(name), ORACLES[cls].promote)


def test_8_round_trip(make: laws.Make) -> None:
    laws.round_trip(make)


def test_8_round_trip_shared(shareable: laws.Make) -> None:
    laws.round_trip(shareable, scope="shared")


# Enough for the 24 tokens of the task; what shipped memories hold beyond is only slower.
HELD = {"n_token": 64, "n_compressed": 64, "n_long": 64, "n_mode": 64}


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEMBERS)
def test_9_useful(name: str) -> None:
    make = laws.builder(laws.nodes_of(name), shrink=False)
    laws.useful(lambda memory=None, **model: make(memory=HELD | (memory or {}), **model))


@pytest.mark.parametrize("name", lanes(NAMES))
def test_10_described(name: str) -> None:
    laws.described(laws.nodes_of(name))


@pytest.mark.parametrize("name", lanes([name for name in NAMES if laws.has_slots(name)]))
def test_11_inspectable(name: str) -> None:
    laws.inspectable(make_of(name))


def test_11_inspectable_shared(shareable: laws.Make) -> None:
    laws.inspectable(shareable, scope="shared")


def _keep_records(name: str) -> bool:
    return any(issubclass(laws.class_of(node), RecordKeeper) for node in laws.nodes_of(name).values())


# All lists are searched, as those of a model that was never told are others.
@pytest.mark.parametrize(
    "index", [{}, {"index": "inverted", "n_slot": 24, "n_list": 12, "n_probe": 12}], ids=["exact", "inverted"]
)
@pytest.mark.parametrize("scope", ["sequence", "shared"])
@pytest.mark.parametrize("name", lanes([name for name in NAMES if _keep_records(name)]))
def test_12_forgets(name: str, scope: str, index: dict[str, Any]) -> None:
    laws.forgets(make_of(name), {"LongTermMemory.scope": scope} | index)


LAWS = [
    laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.generates_as_parallel,
    laws.schedules_agree, laws.contexts, laws.empty_segments, laws.resets, laws.pure, laws.reach,
    laws.every_parameter_learns, laws.round_trip, laws.inspectable,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_laws_hold_where_newer_slots_discount_older_ones(law: Callable[[laws.Make], None]) -> None:
    make = make_of("ltm")
    law(lambda memory=None, **settings: make(memory={"recency": 4.0} | (memory or {}), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("law", [laws.causal, laws.chunk_invariant, laws.round_trip])
def test_laws_hold_where_newer_slots_of_a_shared_bank_discount_older_ones(law: Callable[..., None]) -> None:
    make = make_of("ltm")
    law(lambda memory=None, **settings: make(memory={"recency": 4.0} | (memory or {}), **settings), scope="shared")


# So few slots and lists that they are dealt out anew every few segments, and that most are not read.
INVERTED = {"index": "inverted", "n_list": 5, "n_probe": 2, "n_slot": 40}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_laws_hold_where_lists_are_searched(law: Callable[[laws.Make], None]) -> None:
    make = make_of("ltm")
    law(lambda memory=None, **settings: make(memory=INVERTED | (memory or {}), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("law", [laws.causal, laws.chunk_invariant, laws.pure, laws.round_trip, laws.inspectable])
def test_laws_hold_where_lists_of_a_shared_bank_are_searched(law: Callable[..., None]) -> None:
    make = make_of("ltm")
    law(lambda memory=None, **settings: make(memory=INVERTED | (memory or {}), **settings), scope="shared")


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("setting", [{"shared_layers": False, "update": "importance"}, {"reset_every": 3}])
def test_laws_hold_for_every_kind_of_implicit_memory(law: Callable[[laws.Make], None], setting: dict[str, Any]) -> None:
    make = make_of("imm")
    law(lambda memory=None, **settings: make(memory=setting | (memory or {}), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("law", [laws.alive, laws.chunk_invariant, laws.every_parameter_learns])
def test_laws_hold_where_the_gradient_of_reads_teaches_the_controller(law: Callable[[laws.Make], None]) -> None:
    make = make_of("adaptive")
    law(lambda memory=None, **settings: make(memory={"controller": "straight_through"} | (memory or {}), **settings))


# Half as large, and each law as before, up to what rounding does.
ROUNDED = {"bank_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("law", "scope"),
    [
        *(pytest.param(law, "sequence", marks=pytest.mark.slow) for law in LAWS),
        *(pytest.param(law, "shared", marks=pytest.mark.slow) for law in (laws.causal, laws.pure, laws.inspectable)),
        (laws.chunk_invariant, "shared"), (laws.round_trip, "shared"), (laws.given_away, "sequence"),
        (laws.given_away, "shared"), (laws.bounded, "sequence"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("index", [{}, INVERTED], ids=["exact", "inverted"])
def test_laws_hold_where_a_bank_is_of_16_bits(law: Callable[..., None], scope: str, index: dict[str, Any]) -> None:
    made = make_of("ltm")

    def make(memory: Any = None, **settings: Any) -> Any:
        return made(memory=ROUNDED | index | (memory or {}), **settings)

    with laws.rounding(make):
        law(make, **({} if scope == "sequence" else {"scope": scope}))


@pytest.mark.parametrize("index", [{}, {"index": "inverted", "n_slot": 24, "n_list": 12, "n_probe": 12}])
def test_12_forgets_in_a_bank_of_16_bits(index: dict[str, Any]) -> None:
    with laws.rounding(lambda: make_of("ltm")(memory=ROUNDED)):
        laws.forgets(make_of("ltm"), ROUNDED | index)
