"""The contract carries every kind of memory: small ones of each kind keep the laws, in both schedules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.analysis.usage import banks, check_slots
from memlm.config import ConfigError
from memlm.memory.contract import Context, Memory, Mixer, Needs, Read, Sizes
from memlm.memory.stm import ShortTermMemory
from memlm.models.lmcode import LMCode
from memlm.models.lstm import LSTM
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


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=[law.__name__ for law in LAWS])
@pytest.mark.parametrize("cls", GUESTS, ids=[cls.__name__ for cls in GUESTS])
def test_every_kind_of_memory_keeps_the_laws(cls: type[Memory], law: Callable[[laws.Make], None]) -> None:
    law(make_of(cls))


@pytest.mark.slow
@pytest.mark.parametrize("law", [laws.chunk_invariant, laws.ragged, laws.schedules_agree, laws.contexts])
def test_memories_of_several_kinds_stand_together(law: Callable[[laws.Make], None]) -> None:
    law(make_of(guests.Cells, guests.Cache))


def model_of(*classes: type[Memory], model_class: type = LMCode) -> LMCode | LSTM:
    memories = {cls.__name__.lower(): cls for cls in classes}
    return model_class(30, memories, n_layer=2, d_model=16, segment_len=6, overlap=2, memory_layers="all").eval()


class LooksTooFar(guests.TokenWise):
    needs = Needs(lookback=7)


class TailOfALayer(guests.TokenWise):
    needs = Needs(tail=1)


class EachLayerOfOne(guests.TokenWise):
    needs = Needs(each_layer=True)


class HeadsBeside(ShortTermMemory):
    needs = Needs(heads=True)


@pytest.mark.parametrize(
    ("classes", "model_class", "message"),
    [
        ((guests.PerHead,), LSTM, "'perhead' needs heads of attention, which LSTM does not have: choose model=lmcode"),
        ((guests.Cache,), LSTM, "'cache' needs context of attention, which LSTM does not have"),
        ((guests.Cells,), LSTM, "'cells' needs context of attention"),
        (
            (LooksTooFar,),
            LMCode,
            "looks back 7 tokens, more than a segment: set model.segment_len to at least 7, got 6",
        ),
        ((TailOfALayer,), LMCode, "needs cells behind a segment, so it must stand around the stack"),
        ((EachLayerOfOne,), LMCode, "needs each layer, so it must stand around the stack"),
        ((HeadsBeside,), LMCode, "needs heads, so it must stand around a layer, with a mix of its own"),
        ((guests.Cache, guests.Pool), LMCode, "'cache' and 'pool' both stand around a layer: choose one"),
    ],
)
def test_a_model_refuses_what_it_cannot_give(
    classes: tuple[type[Memory], ...], model_class: type, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as told:
        model_of(*classes, model_class=model_class)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("law", [laws.chunk_invariant, laws.schedules_agree, laws.alive])
def test_a_memory_that_asks_for_nothing_stands_around_any_mixer(law: Callable[[laws.Make], None]) -> None:
    law(laws.builder_of({"tokenwise": (guests.TokenWise, {})}, shrink=False, model_class=LSTM))


def test_a_constructor_is_told_the_sizes_it_asks_for() -> None:
    seen: list[Sizes] = []

    class Asks(guests.TokenWise):
        def __init__(self, d_model: int, sizes: Sizes) -> None:
            super().__init__(d_model)
            seen.append(sizes)

    LMCode(30, {"asks": Asks}, n_layer=1, n_head=2, d_model=16, segment_len=6, overlap=2)
    assert seen == [Sizes(d_model=16, n_head=2, n_layer=1, segment_len=6, overlap=2, n_vocab=30)]


def test_what_looks_into_slots_refuses_a_memory_without() -> None:
    model = model_of(ShortTermMemory, guests.Cache)
    assert list(banks(model, model.init_state(1))) == ["shorttermmemory/0", "shorttermmemory/1"]
    with pytest.raises(ConfigError, match="slot_usage looks into the slots of a memory, but cache has none"):
        check_slots(model, "slot_usage")


@torch.no_grad()
def test_a_context_joins_the_softmax_of_the_segment() -> None:
    """Against attention written out for one query of one head."""
    model = model_of(guests.PlacedCache)
    layer = model.layers[0]
    seen = {}

    class Watch(guests.PlacedCache):
        def mix(self, x: Tensor, prepared: guests.RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
            context = Context.of(mixer, prepared.held, prepared.full, torch.arange(-self.n_slot, 0))
            seen.update(x=x, context=context, found=mixer.attend(mixer.heads(x), context))
            return super().mix(x, prepared, mixer)

    model.memory["placedcache"][0].__class__ = Watch
    ids = torch.arange(12)[None]
    model(ids[:, 6:], state=model(ids[:, :6]).state)
    heads, context = layer.heads(seen["x"]), seen["context"]
    before = layer.heads(model.embed(ids[:, 4:6]))
    t, head, width = 3, 1, heads.q.shape[3]

    def turned(vector: Tensor, place: int) -> Tensor:
        half = width // 2
        angle = torch.tensor([(place + 2) / 10_000 ** (2 * i / width) for i in range(half)])
        a, b = vector[:half], vector[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])

    query = turned(heads.q[0, head, t], t)
    keys = [(before.k[0, head, i], before.v[0, head, i], i - 2) for i in range(2)]
    keys += [(heads.k[0, head, i], heads.v[0, head, i], i) for i in range(t + 1)]
    n = context.key.shape[2]
    keys += [(context.key[0, head, i], context.value[0, head, i], i - n) for i in range(n) if context.mask[0, i]]
    assert len(keys) == 2 + 4 + 6
    score = torch.stack([query @ turned(key, place) for key, _, place in keys]) / width**0.5
    expected = score.softmax(dim=0) @ torch.stack([value for _, value, _ in keys])
    torch.testing.assert_close(seen["found"][0, head, t], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_context_of_other_rows_is_refused() -> None:
    class Wrong(guests.Cache):
        def mix(self, x: Tensor, prepared: guests.RingState, mixer: Mixer) -> tuple[Tensor, Read | None]:
            return super().mix(x, guests.RingState(*(part[:1] for part in prepared)), mixer)

    with pytest.raises(ValueError, match="a context has a row for each segment of each row, 2 here, got 1"):
        model_of(Wrong)(torch.zeros(2, 6, dtype=torch.long))
