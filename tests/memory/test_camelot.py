"""Consolidated associative memory against the rule told token by token, and attention written out."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.camelot import CamelotMemory, CamelotState
from memlm.memory.contract import Heads, Sizes
from memlm.memory.state import n_byte, where_rows
from memlm.models.segments import SegmentModel
from tests.memory.plain_attention import turned
from tests.memory.segments import segment_of

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("camelot"))
H, E = 2, 3


def memory_of(**settings: Any) -> CamelotMemory:
    return CamelotMemory(H * E, Sizes(H * E, H, 1, 8, 0, 10), **settings)


class Slot:
    """One slot, as the paper has it."""

    def __init__(self, key: Tensor, value: Tensor, count: int, age: float) -> None:
        self.key, self.value, self.count, self.age = key, value, count, age


def empty_bank(n: int) -> list[Slot]:
    return [Slot(torch.zeros(H, E), torch.zeros(H, E), 0, torch.inf) for _ in range(n)]


def token_loop(bank: list[Slot], keys: Tensor, values: Tensor, threshold: float) -> list[Slot]:
    """The bank after tokens (L, H, E), one after the other."""
    for key, value in zip(keys, values, strict=True):
        like = [
            torch.cosine_similarity(key.flatten(), slot.key.flatten(), dim=0).item() if slot.count else -torch.inf
            for slot in bank
        ]
        nearest = like.index(max(like))  # the lower of equal ones
        if max(like) > threshold:
            n, old = bank[nearest].count, bank[nearest]
            new = Slot((n * old.key + key) / (n + 1), (n * old.value + value) / (n + 1), n + 1, 0)
        else:
            ages = [slot.age for slot in bank]
            nearest = ages.index(max(ages))
            new = Slot(key, value, 1, 0)
        bank = [Slot(s.key, s.value, s.count, s.age + 1) for s in bank]
        bank[nearest] = new
    return bank


def same_bank(state: CamelotState, row: int, bank: list[Slot]) -> None:
    assert state.n_part[row].tolist() == [slot.count for slot in bank]
    ages = [float(state.n_token[row] - 1 - last) if last >= 0 else torch.inf for last in state.last[row]]
    assert ages == [slot.age for slot in bank]
    torch.testing.assert_close(state.key[row], torch.stack([slot.key for slot in bank]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.value[row], torch.stack([slot.value for slot in bank]), atol=1e-5, rtol=1e-5)


def written(
    memory: CamelotMemory, state: CamelotState, key: Tensor, value: Tensor, valid: list[int] | None = None
) -> CamelotState:
    """The state after a segment of keys and values (B, H, T, E)."""
    segment = segment_of(torch.zeros(len(key), key.shape[2], H * E), valid)
    return memory.write(segment._replace(heads=Heads(key, key, value)), state)[0]


def keys_of(n_row: int, n_token: int, seed: int, n_topic: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, E), of keys that lie near one of ``n_topic`` topics, or anywhere."""
    draw = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, n_row, H, n_token, E, generator=draw)
    if n_topic is not None:
        topic = torch.randn(n_topic, H, E, generator=torch.Generator().manual_seed(0))
        choice = torch.randint(n_topic, (n_row, n_token), generator=draw)
        key = topic[choice].transpose(1, 2) + 0.3 * key
    return key, value


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("n_mode", [1, 3, 8, 40])
@pytest.mark.parametrize("n_topic", [None, 4])
def test_a_write_is_the_loop_over_tokens(n_topic: int | None, n_mode: int, threshold: float) -> None:
    memory = memory_of(n_mode=n_mode, threshold=threshold)
    state, banks = memory.init_state(3), [empty_bank(n_mode) for _ in range(3)]
    for s, valid in enumerate([[13, 13, 13], [13, 4, 0], [2, 13, 13], [13, 13, 13]]):
        key, value = keys_of(3, 13, s, n_topic)
        state = written(memory, state, key, value, valid)
        for row, n in enumerate(valid):
            at = key[row, :, :n].transpose(0, 1), value[row, :, :n].transpose(0, 1)
            banks[row] = token_loop(banks[row], *at, threshold)
            same_bank(state, row, banks[row])


def test_above_all_cosines_it_is_a_fifo_and_below_all_one_running_mean() -> None:
    key, value = keys_of(1, 9, seed=1)
    fifo = written(memory_of(n_mode=4, threshold=1.5), memory_of(n_mode=4).init_state(1), key, value)
    # Tokens 5 to 8 are left, each where the one 4 tokens before it stood.
    torch.testing.assert_close(fifo.key[0], key[0].transpose(0, 1)[[8, 5, 6, 7]])
    torch.testing.assert_close(fifo.value[0], value[0].transpose(0, 1)[[8, 5, 6, 7]])
    one = written(memory_of(n_mode=4, threshold=-1.0), memory_of(n_mode=4).init_state(1), key, value)
    assert one.n_part.tolist() == [[9, 0, 0, 0]]
    torch.testing.assert_close(one.key[0, 0], key[0].mean(dim=1))
    torch.testing.assert_close(one.value[0, 0], value[0].mean(dim=1))


def test_equal_keys_join_and_the_slot_joined_longest_ago_goes() -> None:
    a, b, c = torch.eye(3)
    key = torch.stack([a, b, a, c])[None, None].expand(1, H, 4, 3)  # a and b fill two slots; a again; c takes that of b
    value = torch.arange(4.0).view(1, 1, 4, 1).expand(1, H, 4, 3)
    state = written(memory_of(n_mode=2), memory_of(n_mode=2).init_state(1), key, value)
    assert state.n_part.tolist() == [[2, 1]]
    assert state.last.tolist() == [[2, 3]]
    assert state.value[0, :, 0, 0].tolist() == [1.0, 3.0]  # the mean of 0 and 2; 3


def test_gradients_of_a_write_are_those_of_the_loop() -> None:
    memory = memory_of(n_mode=5, threshold=0.5, gradient=True)
    parts = [part.requires_grad_() for part in keys_of(1, 13, seed=3, n_topic=4)]
    state = written(memory, memory.init_state(1), *parts)
    bank = token_loop(empty_bank(5), *(part[0].transpose(0, 1) for part in parts), 0.5)
    assert max(slot.count for slot in bank) > 1
    probe = torch.randn(2, 5, H, E, generator=torch.Generator().manual_seed(1))
    loop = torch.stack([torch.stack([slot.key for slot in bank]), torch.stack([slot.value for slot in bank])])
    fast = torch.stack([state.key[0], state.value[0]])
    for got, expected in zip(
        torch.autograd.grad((fast * probe).sum(), parts), torch.autograd.grad((loop * probe).sum(), parts), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    still = written(memory_of(n_mode=5, threshold=0.5), memory.init_state(1), *parts)
    assert not still.key.requires_grad


# --- in a model ------------------------------------------------------------------------------------------------------


def model_of(overlap: int = 4, **memory: Any) -> SegmentModel:
    return MAKE(memory={"n_mode": 9, "threshold": 0.6, "top_k": 2, **memory}, memory_layers="all", overlap=overlap)


def naive(model: SegmentModel, ids: Tensor, memory: dict[str, Any]) -> tuple[Tensor, list[list[Slot]]]:
    """Logits (L, V) of one row, layer by layer and segment by segment, and the banks after it."""
    x, banks = model.embedding(ids) * model.d_model**0.5, []
    for layer in model.layers:
        bank: list[Slot] = []
        after = []
        for begin in range(0, len(ids), T):
            edge = max(0, begin - model.overlap)
            own = x[edge : begin + T]
            heads = layer.heads(x[None, begin : begin + T])
            keys, values = heads.k[0].transpose(0, 1), heads.v[0].transpose(0, 1)  # (T, H, E)
            rows, seen_so_far = [], []
            for t, key in enumerate(keys):
                like = [torch.cosine_similarity(key.flatten(), slot.key.flatten(), dim=0) for slot in bank]
                held = [i for i, slot in enumerate(bank) if slot.count]
                best = sorted(held, key=lambda i: -like[i])[: memory["top_k"]]
                seen_so_far += [i for i in best if i not in seen_so_far]
                rows.append(attended(layer, own, begin - edge, t, [bank[i] for i in seen_so_far]))
            after.append(torch.stack(rows))
            n_head, width = keys.shape[1:]
            zero = torch.zeros(n_head, width)
            bank = bank or [Slot(zero, zero, 0, torch.inf) for _ in range(memory["n_mode"])]
            bank = token_loop(bank, keys, values, memory["threshold"])
        x = torch.cat(after)
        banks.append(bank)
    return model.norm(x) @ model.embedding.weight.T, banks


def attended(layer: Any, own: Tensor, n_before: int, t: int, found: list[Slot]) -> Tensor:
    """Token ``t`` of a segment behind a layer, which sees ``own`` cells up to itself and slots without a place."""
    at = n_before + t
    heads = layer.heads(own[None, : at + 1])
    place = torch.arange(at + 1) - n_before
    q = heads.q[0, :, at]  # (H, E)
    score = (turned(heads.k[0], place) @ turned(heads.q[0], place)[:, at, :, None])[..., 0]  # (H, at + 1)
    beside = [(slot.key * q).sum(dim=1, keepdim=True) for slot in found]  # (H, 1) each
    score = torch.cat([score, *beside], dim=1) / q.shape[1] ** 0.5
    value = torch.cat([heads.v[0], *[slot.value[:, None] for slot in found]], dim=1)
    mixed = (score.softmax(dim=1)[:, None] @ value)[:, 0].flatten()
    x = own[at] + layer.attention.to_output(mixed)
    return x + layer.feed_forward(x)


@torch.no_grad()
@pytest.mark.parametrize(("overlap", "top_k"), [(0, 1), (4, 2)])
def test_outputs_and_slots_equal_the_naive_model(overlap: int, top_k: int) -> None:
    memory = {"n_mode": 9, "threshold": 0.6, "top_k": top_k}
    model, ids = model_of(overlap, **memory), laws.text(2, 4 * T)
    out = model(ids)
    for row in range(2):
        logits, banks = naive(model, ids[row], memory)
        torch.testing.assert_close(out.logits[row], logits, atol=2e-4, rtol=0)
        for i, bank in enumerate(banks):
            same_bank(out.state.memory["camelot"][i], row, bank)
    joined = [count for part in out.state.memory["camelot"] for count in part.n_part.flatten().tolist()]
    assert max(joined) > 1, "the test joins nothing"


@torch.no_grad()
def test_a_token_sees_what_tokens_up_to_itself_found_and_nothing_of_an_empty_memory() -> None:
    memory = memory_of(n_mode=4, top_k=1)
    state = memory.init_state(1)
    key = torch.eye(3)[None, None, [0, 1, 0]].expand(1, H, 3, 3)
    segment = segment_of(torch.zeros(1, 3, H * E))._replace(heads=Heads(key, key, key))
    assert not memory.find(segment, state)[2].any()
    held = where_rows(torch.tensor([True]), written(memory, state, key, key), state)
    assert held.n_part.tolist() == [[2, 1, 0, 0]]
    seen = memory.find(segment, held)[2][0]
    assert seen.sum(dim=1).tolist() == [1, 2, 2]  # token 2 finds again what token 0 found
    short = segment._replace(valid=torch.tensor([[True, False, False]]))
    assert memory.find(short, held)[2][0].sum(dim=1).tolist() == [1, 1, 1]


def test_its_bytes_are_what_the_setting_says_and_it_has_no_parameters() -> None:
    model = model_of()
    assert [n_byte(part) for part in model.init_state(1).memory["camelot"]] == [9 * (8 * model.d_model + 16) + 8] * 3
    assert not list(model.memory.parameters())


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {
        "n_mode=0": "n_mode must be at least 1, got 0",
        "top_k=0": "top_k must be at least 1, got 0",
        "reach=0": "reach must be at least 1, or null for slots without a place, got 0",
        "threshold=-1.5": "threshold is a cosine, so at least -1, got -1.5",
    }.items():
        with pytest.raises(ConfigError, match=rf"memory\.camelot\.{message}"):
            build("memory=camelot", f"memory.camelot.{setting}", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'camelot' needs heads of attention.* choose model=lmcode"):
        build("model=lstm", "memory=camelot", "data.tokenizer.kind=byte")


FEW = [laws.causal, laws.chunk_invariant, laws.ragged, laws.contexts, laws.resets, laws.round_trip, laws.inspectable]
SETTINGS: list[dict[str, Any]] = [{"n_mode": 9, "threshold": 0.6, "top_k": 1}, {"n_mode": 7, "threshold": 1.0}]


@pytest.mark.parametrize(("law", "settings"), list(itertools.product(FEW, SETTINGS)))
def test_laws_hold_where_slots_join_and_go(law: Callable[[laws.Make], None], settings: dict[str, Any]) -> None:
    law(lambda memory=None, **model: MAKE(memory=settings | (memory or {}), **model))


@pytest.mark.parametrize("law", [laws.chunk_invariant, laws.schedules_agree, laws.every_parameter_learns])
def test_laws_hold_with_gradients(law: Callable[[laws.Make], None]) -> None:
    settings = {"gradient": True, "threshold": 0.6}
    law(lambda memory=None, **model: MAKE(memory=settings | (memory or {}), **model))


@torch.no_grad()
def test_with_places_all_tokens_that_are_kept_are_a_cache() -> None:
    """As a FIFO of which all is found: what attention gives over the hidden states of the last tokens."""
    settings = {"n_mode": 40, "threshold": 1.0, "top_k": 40, "reach": 100}
    model, ids = MAKE(memory=settings, memory_layers="all", overlap=0), laws.text(2, 5 * T + 3)
    cache = laws.builder(laws.nodes_of("cache"))(memory={"n_token": 40}, memory_layers="all", overlap=0)
    cache.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).logits, cache(ids).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_slots_stand_where_their_last_token_stood_but_not_further_than_reach() -> None:
    memory = memory_of(n_mode=3, top_k=3, reach=4)
    key = torch.eye(H * E).view(H * E, H, E)[:3]
    state = memory.init_state(1)
    state = state._replace(key=key[None], value=key[None], n_part=torch.ones(1, 3).long(),
                           last=torch.tensor([[1, 9, 7]]), n_token=torch.tensor([10]))  # fmt: skip
    asked = key[:1].transpose(0, 1)[None]  # of slot 0
    segment = segment_of(torch.zeros(1, 1, H * E))._replace(heads=Heads(asked, asked, asked))
    assert sorted(memory.find(segment, state)[3][0].tolist()) == [-4, -3, -1]


PLACED = {"reach": 20}


@pytest.mark.parametrize(
    "law", [laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.schedules_agree, laws.resets]
)
def test_laws_hold_with_places(law: Callable[[laws.Make], None]) -> None:
    law(lambda memory=None, **model: MAKE(memory=PLACED | (memory or {}), **model))
