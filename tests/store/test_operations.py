"""Memory operations, against plain reading, plain Python, and a model that was never told."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memlm.assemble import build_model
from memlm.config import ConfigError
from memlm.data.tokenizer import Tokenizer, train_tokenizer
from memlm.memory import state as states
from memlm.memory.records import MANY
from memlm.store import memory_file
from memlm.store.passages import passages_of
from tests.experiments.tiny import MEMORIES, tiny

T = 64
A = "The cat lives in a red box."
B = "A dog sleeps under the old tree."
C = "Nine birds sing at night."
LONG = " ".join([A, B, C] * 3)
NAN = float("nan")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer("byte", [A], 300)


def build(tokenizer: Tokenizer, *memories: str, layers: Any = "middle", **settings: Any) -> Any:
    """A tiny untrained model; every token is worth a slot, and reads are soft."""
    ltm = MEMORIES["ltm"] | {"n_slot": 200, "write_budget": None, "top_k": 200, "temperature": 3.0} | settings
    config = {
        "model": {
            "_target_": "memlm.models.lmcode.LMCode", "n_layer": 2, "n_head": 2, "d_model": 32, "segment_len": T,
            "overlap": 4, "memory_layers": layers,
        },
        "memory": {name: {"ltm": ltm, "stm": MEMORIES["stm"]}[name] for name in memories or ("ltm",)},
        "data": {"tokenizer": {"n_vocab": None}},
        "seed": 0,
    }  # fmt: skip
    return build_model(config, tokenizer).eval()


def bank(model: Any, place: int = 0) -> Any:
    return model.memory["ltm"][place].bank.state()


def contents(model: Any, place: int = 0) -> list[tuple[Any, ...]]:
    """What slots hold but for their numbers and those of their records, in an order of its own."""
    state = bank(model, place)
    used = model.memory["ltm"][place].filled(state)[0]
    parts = (state.key, state.value, state.log_gate[..., None], state.position[..., None], state.tokens)
    return sorted(
        tuple(torch.cat([part[0, slot].double() for part in parts]).tolist()) for slot in used.nonzero()[:, 0]
    )


def texts(model: Any) -> list[str]:
    return [record.text for record in reversed(model.list_memory(100))]


# --- store ---------------------------------------------------------------------------------------------------------


def test_stored_text_is_what_reading_it_writes(tokenizer: Tokenizer) -> None:
    model, plain = build(tokenizer, layers="all"), build(tokenizer, layers="all")
    assert model.store_experience(A) == [0]
    state = plain.new_context(plain(torch.tensor([tokenizer.encode(f" {A}")]), read=False).state)
    for module, part in zip(plain.memory["ltm"], state.memory["ltm"], strict=True):
        module.bank.commit(part)
    for place in range(2):
        assert len(contents(model, place)) == len(f" {A}") - 1  # a byte is a token, and all but the last make a slot
        torch.testing.assert_close(torch.tensor(contents(model, place)), torch.tensor(contents(plain, place)))


def test_text_is_stored_in_place_unless_a_state_still_shares_the_bank(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    model.store_experience(A)
    held = model.memory["ltm"][0].bank
    places = {name: part.data_ptr() for name, part in held.named_buffers() if name in ("key", "value", "record")}
    model.store_experience(B)
    assert {name: getattr(held, name).data_ptr() for name in places} == places, "the bank was copied"
    other = build(tokenizer)  # told the same, while states are held
    other.store_experience(A)
    old = [other.init_state(1), other.bank_state()]
    answers = [other(torch.tensor([[5, 6, 7]]), state=state).logits for state in old]
    other.store_experience(B)
    assert contents(other) == contents(model)
    for state, answer in zip(old, answers, strict=True):
        assert torch.equal(other(torch.tensor([[5, 6, 7]]), state=state).logits, answer), "an old state has changed"


@pytest.mark.parametrize("memories", [("ltm",), ("stm", "ltm")])
def test_a_store_that_is_cut_short_leaves_nothing(tokenizer: Tokenizer, monkeypatch: Any, memories: Any) -> None:
    """At any point: between windows, and between the parts of a slot."""
    text = " ".join([B, C] * 2)
    for n_put in (0, 1, 4, 13, 17):
        model = build(tokenizer, *memories)
        model.store_experience(A)
        model.query_memory(A)
        told, count = contents(model), itertools.count()

        class Cut(BaseException):
            pass

        def put(*arguments: Any, n: int = n_put, count: Any = count, plain: Any = torch.Tensor.scatter_) -> Tensor:
            if next(count) == n:
                raise Cut
            return plain(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "scatter_", put)
            patch.setattr("memlm.store.passages._WINDOW", T)
            with pytest.raises(Cut):
                model.store_experience(text)
        assert contents(model) == told
        assert texts(model) == [A]
        assert model.list_memory()[0].uses == 1
        model.store_experience(C)
        assert texts(model) == [A, C]


def test_passages_are_whole_sentences_of_up_to_a_segment(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, n_slot=1000)
    ids = model.store_experience(LONG)
    sentences, packed = [A, B, C] * 3, [""]
    for sentence in sentences:  # greedily, 64 bytes with the spaces before
        fits = len(packed[-1]) + 1 + len(sentence) <= 64
        packed = [*packed[:-1], f"{packed[-1]} {sentence}"] if fits else [*packed, f" {sentence}"]
    assert len(packed) > 2
    assert ids == list(range(len(packed)))
    assert texts(model) == [part.strip() for part in packed]
    assert {record.document for record in model.list_memory()} == {0}
    assert model.store_experience(A) == [len(packed)]
    assert model.list_memory(1)[0].document == len(packed)


def test_a_sentence_longer_than_a_segment_is_cut(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, n_slot=1000)
    text = "x" + "".join(random.Random(0).choices("abc ", k=150)) + "x"
    ids = model.store_experience(text)
    assert len(ids) == 3  # 153 bytes
    assert "".join(texts(model)).replace(" ", "") == text.replace(" ", "")


class Copied(list[int]):
    """A list that counts how many ids are copied out of it, and out of what was copied."""

    n_id = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if not isinstance(key, slice):
            return found
        Copied.n_id += len(found)
        return Copied(found)

    def __radd__(self, before: list[int]) -> Copied:
        return Copied([*before, *self])


def test_a_sentence_without_end_is_cut_without_copying_the_rest_for_each_passage(
    tokenizer: Tokenizer, monkeypatch: Any
) -> None:
    model, ids = build(tokenizer), Copied(range(320 * T))
    monkeypatch.setattr(Copied, "n_id", 0)
    monkeypatch.setattr(type(tokenizer), "encode_batch", lambda _, texts: [ids for _ in texts])
    passages = list(passages_of(model, "x"))
    assert list(itertools.chain.from_iterable(passages)) == ids
    assert {len(passage) for passage in passages} == {T}
    assert 0 < Copied.n_id <= len(ids)


def test_generation_begins_with_what_is_stored(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    ids = torch.tensor([tokenizer.encode(" The cat"), tokenizer.encode(" The dog")])
    before = model(ids).logits
    model.store_experience(A)
    after = model(ids)
    assert (after.logits - before).abs().max() > 1e-3
    torch.testing.assert_close(model(ids, read=False).logits, before)  # an empty memory adds nothing
    torch.testing.assert_close(model(ids, state=model.wipe(model.init_state(2))).logits, before)
    reset = torch.tensor([True, False])
    again = model(ids, state=after.state, reset=reset).logits  # a new document begins with what is stored
    torch.testing.assert_close(again[0], after.logits[0])
    longer = ids.repeat(1, 32)[:, : 4 * T]
    starts = torch.tensor([[False, False, True, False], [False, True, False, False]])
    fast, state = model(longer, reset=starts).logits, None
    for s in range(4):
        part = longer[:, T * s : T * (s + 1)]
        out = model(part, state=state, reset=starts[:, s])
        torch.testing.assert_close(fast[:, T * s : T * (s + 1)], out.logits)
        state = out.state


def test_nothing_but_operations_changes_what_is_stored(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    model.store_experience(A)
    before = contents(model)
    state = model(torch.tensor([tokenizer.encode(LONG)])).state
    model.generate(torch.tensor([tokenizer.encode(B)]), 3, state=state)
    model.query_memory(B)
    assert contents(model) == before


def test_operations_leave_the_mode_of_the_model(tokenizer: Tokenizer) -> None:
    model = build(tokenizer).train()
    model.store_experience(A)
    model.query_memory(A)
    assert model.training
    assert not any(buffer.requires_grad for buffer in model.buffers())


# --- query ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_query_is_the_read_of_each_token_by_hand(tokenizer: Tokenizer, scope: str) -> None:
    model = build(tokenizer, scope=scope)
    for text in (A, B, C):
        model.store_experience(text)
    model.requires_grad_(False)
    module, state = model.memory["ltm"][0], bank(model)
    ids = tokenizer.encode(" A dog sings")
    local = model(torch.tensor([ids]), read=False, write=False).state.local  # the layer's input is before its read
    x = local.streams["mixed"][0, 0, model.lookback :][: len(ids)]
    query = torch.nn.functional.normalize(module.to_key(module.norm(x)), dim=-1)
    temperature = module.log_temperature.exp()
    best: dict[int, tuple[float, float]] = {}
    for token in query:
        cosines = [float(token @ key) for key in state.key[0]]
        scores = [
            float(temperature) * cosine + float(module.bias(gate))
            for cosine, gate in zip(cosines, state.log_gate[0], strict=True)
        ]
        used = [slot for slot in range(200) if state.record[0, slot] >= 0]
        total = float(
            torch.tensor([float(temperature * module.null_similarity), *(scores[s] for s in used)]).logsumexp(0)
        )
        for slot in used:
            weight = float(torch.tensor(scores[slot] - total).exp())
            record = int(state.record[0, slot])
            best[record] = max(best.get(record, (0.0, 0.0)), (weight, cosines[slot]))
    hits = model.query_memory("A dog sings", top_k=2)
    expected = sorted(best, key=lambda record: -best[record][0])[:2]
    assert [hit.id for hit in hits] == expected
    for hit in hits:
        assert (hit.weight, hit.similarity) == pytest.approx(best[hit.id], abs=1e-4)
        assert hit.importance == pytest.approx(float(state.log_gate[0, hit.slot].exp()))
        assert hit.age == 2 - hit.id
        assert hit.text == (A, B, C)[hit.id]
        assert hit.snippet in hit.text


def test_query_longer_than_a_segment(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, n_slot=1000, temperature=30.0)
    for text in (A, B, C):
        model.store_experience(text)
    hits = model.query_memory(f"{A} {'z' * 200}", top_k=3)
    assert {hit.id for hit in hits} == {0, 1, 2}
    assert hits[0].id == 0
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)


def test_uses_count_what_was_shown_and_read(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, temperature=60.0)
    model.store_experience(A)
    model.store_experience(B)
    first = model.query_memory(A, top_k=1)[0]
    second = model.query_memory(A, top_k=1)[0]
    assert (first.id, first.slot, first.uses, second.uses) == (0, second.slot, 1, 2)
    assert first.weight > 0.5
    model.forget(0)
    assert model.memory["ltm"][0].bank.uses().sum() == 0
    model.store_experience(A)
    assert model.memory["ltm"][0].bank.uses().sum() == 0


def test_uses_are_those_of_the_record_whichever_slot_was_read(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, temperature=60.0)
    model.store_experience(A)
    model.store_experience(B)
    shown = [model.query_memory(text, top_k=1)[0] for text in ("The cat", "red box.", B)]
    assert [(hit.id, hit.uses) for hit in shown] == [(0, 1), (0, 2), (1, 1)]
    assert shown[0].slot != shown[1].slot
    assert [(record.id, record.uses) for record in model.list_memory()] == [(1, 1), (0, 2)]


def test_an_empty_memory_has_nothing_to_tell(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    assert model.query_memory(A) == model.list_memory() == []
    assert model.forget(older_than=0) == []
    assert model.consolidate() == {"slots_before": 0, "merged": 0, "slots_after": 0}


# --- forget and edit -------------------------------------------------------------------------------------------------


def test_forgetting_is_done_in_place_unless_a_state_still_shares_the_bank(tokenizer: Tokenizer) -> None:
    model, other, never = (build(tokenizer) for _ in range(3))
    for told in (model, other):
        told.store_experience(A)
        told.store_experience(B)
    held = model.memory["ltm"][0].bank
    places = {name: getattr(held, name).data_ptr() for name in ("key", "value", "record", "tokens", "priority")}
    model.forget(0)
    assert {name: getattr(held, name).data_ptr() for name in places} == places, "the bank was copied"
    old, asked = other.init_state(1), torch.tensor([[5, 6, 7]])
    answer = other(asked, state=old).logits
    other.forget(0)
    assert torch.equal(other(asked, state=old).logits, answer), "an old state has changed"
    never.store_experience(B)
    assert contents(model) == contents(other) == contents(never)


def test_forgetting_that_is_cut_short_is_finished(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    class Cut(BaseException):
        pass

    for n_put in (0, 1, 6, 13):  # of two layers
        model = build(tokenizer, layers="all")
        model.store_experience(A)
        model.store_experience(B)
        count, plain = itertools.count(), torch.Tensor.__setitem__

        def put(*arguments: Any, n: int = n_put, count: Any = count, plain: Any = plain) -> None:
            if next(count) == n:
                raise Cut
            plain(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__setitem__", put)
            with pytest.raises(Cut):
                model.forget(0)
        assert texts(model) == [B]
        for module in model.memory["ltm"]:
            module.check(module.bank.state())  # nothing is left in the slots


@pytest.mark.parametrize(("memories", "layers"), [(("ltm",), "middle"), (("stm", "ltm"), "all")])
def test_after_forgetting_it_is_as_if_never_told(tokenizer: Tokenizer, memories: Any, layers: Any) -> None:
    model, naive = (build(tokenizer, *memories, layers=layers) for _ in range(2))
    model.store_experience(A)
    model.store_experience(f"{B}\n{C}")
    assert model.forget(0) == [0]
    naive.store_experience(f"{B}\n{C}")
    for place in range(len(model.memory["ltm"])):
        assert contents(model, place) == contents(naive, place)


def traces(model: Any, path: Path) -> list[bytes]:
    """What a stored text leaves: keys, values and token ids, as bytes."""
    state = bank(model)
    used = model.memory["ltm"][0].filled(state)[0].nonzero()[:, 0]
    rows = [part[0, slot] for slot in used for part in (state.key, state.value, state.tokens[..., 1:])]
    return [row.contiguous().numpy().tobytes() for row in rows]


def test_no_byte_of_what_is_forgotten_stays(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = build(tokenizer), tmp_path / "memory"
    model.store_experience(A)
    left = traces(model, path)
    model.store_experience("\n1234567")  # not a token, nor a beginning, in common
    model.save_memory(path)
    assert all(trace in path.read_bytes() for trace in left)
    model.forget(0)
    model.save_memory(path)
    held = b"".join(buffer.contiguous().numpy().tobytes() for buffer in model.buffers())
    for content in (path.read_bytes(), held):
        assert not any(trace in content for trace in left)
    state = bank(model)
    empty = ~model.memory["ltm"][0].filled(state)
    assert empty.sum() == 200 - 7  # a new line is a token, and the last one makes no slot
    assert not state.key[empty].any()
    assert not state.value[empty].any()
    assert (state.tokens[empty] == -1).all()


def test_forgetting_by_document_and_age(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, n_slot=1000)
    first, second = model.store_experience(LONG), model.store_experience(C)
    assert model.forget(document=second[0]) == second
    assert model.forget(document=second[0]) == []
    age = len(first + second) - 1 - first[2]  # of the third record
    assert model.forget(older_than=age) == first[:2]
    assert model.forget(older_than=age) == []
    assert [record.id for record in reversed(model.list_memory())] == first[2:]


def test_forgetting_takes_all_or_nothing_of_a_list(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    for text in (A, B, C):
        model.store_experience(text)
    with pytest.raises(ConfigError, match="no record 9: ids are whole numbers below 3"):
        model.forget([0, 9])
    assert texts(model) == [A, B, C]
    assert model.forget([2, 0]) == [0, 2]
    with pytest.raises(ConfigError, match="record 2 is no longer stored"):
        model.forget(2)
    with pytest.raises(ConfigError, match="no record"):
        model.forget([-1])
    with pytest.raises(ConfigError, match="one of ids, document"):
        model.forget()
    with pytest.raises(ConfigError, match="one of ids, document"):
        model.forget(1, older_than=3)
    assert texts(model) == [B]


def test_an_edited_record_holds_the_new_text_alone(tokenizer: Tokenizer) -> None:
    model, naive = build(tokenizer), build(tokenizer)
    for text in (A, B):
        model.store_experience(text)
    assert model.edit_memory(0, C) == 0
    for text in (B, C):
        naive.store_experience(text)
    assert contents(model) == contents(naive)
    assert [(record.id, record.document, record.text) for record in model.list_memory()] == [(1, 1, B), (0, 0, C)]
    assert model.edit_memory(1, LONG) == 1  # of several segments
    assert {record.id for record in model.list_memory()} == {0, 1}
    before = contents(model)
    for number, text, message in ((99, A, "no record 99"), (0, "", "empty")):
        with pytest.raises(ConfigError, match=message):
            model.edit_memory(number, text)
    assert contents(model) == before


def test_an_edit_of_which_nothing_would_be_kept_is_refused(tokenizer: Tokenizer) -> None:
    model = build(train_tokenizer("word", [A, B], 50))
    assert model.store_experience(A) == [0]
    before = contents(model)
    with pytest.raises(ConfigError, match="nothing of the new text would be kept, so record 0 stays as it was"):
        model.edit_memory(0, "cat")  # one token is no slot
    assert contents(model) == before
    full = build(tokenizer, n_slot=20, importance="token")
    full.store_experience(f"{A} {B}")
    assert full.edit_memory(0, B) == 0  # its own slots made room


def test_ids_are_never_given_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(tokenizer, n_slot=60, importance="fifo")
    seen = {number: text for text in (A, B) for number in model.store_experience(text)}
    assert model.store_experience(C) == [2]  # there is room for two
    assert [record.id for record in model.list_memory()][:1] == [2]
    assert all(seen[record.id].endswith(record.text[-8:]) for record in model.list_memory()[1:])
    model.forget(2)
    assert model.store_experience(C) == [3]
    model.save_memory(tmp_path / "memory")
    other = build(tokenizer, n_slot=60, importance="fifo")
    other.store_experience(A)
    other.load_memory(tmp_path / "memory")
    assert [record[:1] for record in other.list_memory()] == [record[:1] for record in model.list_memory()]
    assert other.store_experience(A) == [4]


# --- consolidation ---------------------------------------------------------------------------------------------------


def test_merged_records_list_their_origins_and_are_forgotten_with_any(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    for text in (A, B, A):
        model.store_experience(text)
    n = [len(f" {text}") - 1 for text in (A, B)]
    report = model.consolidate(threshold=0.001)
    assert report == {"slots_before": 2 * n[0] + n[1], "merged": n[0], "slots_after": n[0] + n[1]}
    state = bank(model)
    merged = state.origins[0, :, 0] >= 0
    assert int(merged.sum()) == n[0]
    pairs = {tuple(sorted((int(state.record[0, s]), int(state.origins[0, s, 0])))) for s in merged.nonzero()[:, 0]}
    assert pairs == {(0, 2)}
    gone = {int(state.record[0, s]) for s in merged.nonzero()[:, 0]}
    lost = ({0, 2} - gone).pop() if len(gone) == 1 else 2  # it may live on as an origin alone
    assert model.query_memory(A, top_k=1)[0].origins in ((0,), (2,))
    assert set(model.forget(lost)) == gone
    assert texts(model) == [B]
    with pytest.raises(ConfigError, match="threshold"):
        model.consolidate(threshold=3)


def test_documents_and_ages_reach_into_merged_slots(tokenizer: Tokenizer) -> None:
    for what in ({"document": 0}, {"document": 1}, {"older_than": 1}, {"older_than": 0}):
        model = build(tokenizer)
        for text in (A, A, B):
            model.store_experience(text)
        model.consolidate(threshold=0.001)
        model.forget(**what)
        assert texts(model) == [B], what


def test_what_matches_nothing_forgets_nothing(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    for i in range(12):
        model.store_experience(f"{A} {i}. {B} {C}")  # documents of several records; later some slots are made of many
    model.consolidate(0.6)
    assert (model.memory["ltm"][0].records(bank(model)).origins == MANY).any()
    documents = {record.document for record in model.list_memory(100)}
    no_document = next(record.id for record in model.list_memory(100) if record.id not in documents)
    before = contents(model)
    for nothing in ({"ids": []}, {"document": no_document}, {"document": 999}, {"older_than": 10**6}):
        assert model.forget(**nothing) == []
        assert contents(model) == before
    for wrong in ({"document": -1}, {"older_than": -1}, {"document": 1.5}, {"ids": 1.0}, {"ids": "a"}):
        with pytest.raises(ConfigError):
            model.forget(**wrong)
    assert contents(model) == before


def test_no_key_of_what_is_forgotten_stays_in_lists(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(tokenizer, index="inverted", n_list=60, n_probe=4)
    (secret,) = model.store_experience("Umbrellas are purple.")
    for text in (A, B, C, A, B):
        model.store_experience(text)
    lists = bank(model).lists
    assert int(lists.known_n_list.tensor) > 0
    own = bank(model).record[0] == secret
    keys, others = bank(model).key[0, own], bank(model).key[0, ~own]
    keys = keys[(keys @ others.T).max(dim=1).values < 0.9999]  # those of a first space are alike
    assert (keys @ lists.centroid[0].T).max() > 0.9999  # a centre that is one of its keys
    model.forget(secret)
    model.save_memory(tmp_path / "memory")
    content = (tmp_path / "memory").read_bytes()
    assert not any(key.numpy().tobytes() in content for key in keys)
    assert (keys @ bank(model).lists.centroid[0].T).max() < 0.9999
    model.forget(range(1, 6))
    assert not bank(model).lists.centroid.any()


def test_more_origins_than_are_listed_count_as_all(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, n_slot=500)
    for _ in range(12):
        model.store_experience(A)
    model.store_experience(B)
    model.consolidate(threshold=0.001)
    origins = bank(model).origins[0]
    assert (origins[:, -1] == MANY).sum() == len(A)
    for slot in (origins[:, -1] == MANY).nonzero()[:, 0].tolist():
        others = [number for number in range(12) if number != int(bank(model).record[0, slot])]
        assert origins[slot, :-1].tolist() == others[:7]
    other = copy.deepcopy(model)
    model.forget(12)  # which is in none of them, but that cannot be told
    assert model.list_memory() == []
    other.forget(11)  # which no slot lists
    assert texts(other) == [B]


def test_what_replaces_a_merged_slot_was_merged_with_nothing(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, n_slot=40, importance="fifo")
    for text in ("abcdefghi", "abcdefghi"):
        model.store_experience(text)
    model.consolidate(threshold=0.001)
    assert (bank(model).origins >= 0).any()
    ids = torch.tensor([tokenizer.encode(LONG)])[:, : 2 * T]
    at_once = model(ids).state  # one process of two segments
    one_by_one = model(ids[:, T:], state=model(ids[:, :T]).state).state  # two writes
    for state in (at_once, one_by_one):
        part = state.memory["ltm"][0]
        assert (part.record[0] >= 2).all()
        assert (part.origins == -1).all()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_memory_moves_between_models(tokenizer: Tokenizer, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "folder" / "memory"
    model, other = build(tokenizer, bank_dtype=dtype), build(tokenizer, bank_dtype=dtype)
    for text in (A, B):
        model.store_experience(text)
    model.query_memory(A)
    model.save_memory(path)
    assert [file.name for file in path.parent.iterdir()] == ["memory"]
    other.store_experience(C)
    other.load_memory(path)
    assert contents(other) == contents(model)
    assert other.query_memory(B) == model.query_memory(B)
    prompt = torch.tensor([tokenizer.encode(" The")])
    assert torch.equal(other(prompt).logits, model(prompt).logits)
    tensors = load_file(path)
    assert {str(tensors[f"ltm/1/{name}"].dtype) for name in ("key", "value")} == {f"torch.{dtype}"}
    with safe_open(path, "pt") as opened:  # as the library has it too
        assert torch.equal(opened.get_tensor("ltm/1/key"), bank(model).key)
    first = len(model.list_memory())
    assert len(other.merge_memory(path)) == first == 2
    assert contents(other) == sorted(2 * contents(model))


def test_a_memory_of_another_model_is_refused(tokenizer: Tokenizer, tmp_path: Path, caplog: Any) -> None:
    path, model = tmp_path / "memory", build(tokenizer)
    model.store_experience(A)
    model.save_memory(path)
    words = train_tokenizer("word", [A, B], 50)
    for other, message in (
        (build(tokenizer, d_key=4), r"ltm/1/key is float32 \(1, 200, 8\) there and float32 \(1, 200, 4\) here"),
        (build(tokenizer, bank_dtype="bfloat16"), r"ltm/1/key is float32 .* there and bfloat16 .* here"),
        (build(tokenizer, layers="all"), "ltm/0/.* is absent there"),
        (build(words), "the tokenizer is"),
    ):
        for method in (other.load_memory, other.merge_memory):
            with pytest.raises(ConfigError, match=f"memory of another model: {message}"):
                method(path)
        assert other.list_memory() == []
    other = build(tokenizer)
    with torch.no_grad():
        other.memory["ltm"][0].to_key.weight += 1
    other.load_memory(path)
    assert "other weights" in caplog.text


def test_files_that_are_no_whole_memory_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, model = tmp_path / "memory", build(tokenizer)
    model.store_experience(A)
    before = contents(model)
    model.save_memory(path)
    whole = path.read_bytes()
    for n in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ConfigError, match="cut short"):
            model.load_memory(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="not a memory"):
        model.load_memory(path)
    with pytest.raises(ConfigError, match="no memory file"):
        model.load_memory(tmp_path / "nothing")
    assert contents(model) == before


def test_a_file_that_lacks_a_part_leaves_the_memory_as_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = build(tokenizer), tmp_path / "memory"
    model.store_experience(A)
    model.save_memory(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    whole = {name: part.clone() for name, part in load_file(path).items()}  # the file is written over
    other = build(tokenizer)
    other.store_experience(B)
    for name in ("ltm/1/uses", "ltm/1/key"):
        for tensors in ({k: v for k, v in whole.items() if k != name}, whole | {name: whole[name][..., :1].clone()}):
            save_file(tensors, path, header)
            with pytest.raises(ConfigError, match="damaged or cut short"):
                other.load_memory(path)
            assert texts(other) == [B]


def test_a_place_that_is_no_file_is_refused(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any) -> None:
    model = build(tokenizer)
    for path in ("", ".", tmp_path):
        with pytest.raises(ConfigError, match="is a directory: give the path of the file"):
            model.save_memory(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe' is no regular file"):
        model.save_memory(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_memory("~/memory")
    assert (tmp_path / "memory").is_file()
    model.load_memory("~/memory")


def test_a_save_that_fails_leaves_the_old_file(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any) -> None:
    path, model = tmp_path / "memory", build(tokenizer)
    model.store_experience(A)
    model.save_memory(path)
    whole = path.read_bytes()

    model.store_experience(B)
    for place, error in (("os.fsync", OSError(28, "No space left on device")),
                         ("memlm.store.memory_file._put", OSError(28, "No space left on device"))):  # fmt: skip

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(place, fail)
        with pytest.raises(
            ConfigError, match="cannot be written: No space left on device; what was there is as before"
        ):
            model.save_memory(path)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [whole]


def n_stored(model: Any, *others: Any) -> int:
    """Bytes of all that the banks of a model and some states hold, each storage once."""
    banks = [part for modules in model.memory.values() for module in modules for part in module.bank.held().values()]
    held = [*banks, *(part for state in others for part in states.tensors(state.memory))]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in held}.values())


def test_a_state_at_rest_holds_the_bank_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """After storing, querying and loading, with states that begin with it; files are written and read bit by bit."""
    model, other = (build(tokenizer, n_slot=4000, d_key=64, d_value=64) for _ in range(2))
    model.store_experience(A)
    size = states.n_byte(model.init_state(1).memory)
    model.query_memory(A)
    assert n_stored(model, model.init_state(1), model.bank_state()) == size
    for do in (lambda: model.save_memory(tmp_path / "memory"), lambda: other.load_memory(tmp_path / "memory")):
        tracemalloc.start()  # of what is no tensor of torch
        do()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size / 4, "the file is in memory beside the bank"
    assert n_stored(other, other.init_state(1), other.bank_state()) == size
    assert contents(other) == contents(model)


def test_a_bank_that_is_loaded_with_the_weights_is_held_once_and_changes_no_other(tokenizer: Tokenizer) -> None:
    model, other = (build(tokenizer, n_slot=4000) for _ in range(2))
    model.store_experience(A)
    size, weights = states.n_byte(model.init_state(1).memory), model.state_dict()
    other.load_state_dict(weights)
    assert n_stored(other, model.init_state(1)) == size, "it is there twice"
    other.store_experience(B)
    other.forget(0)
    assert (texts(model), texts(other)) == ([A], [B])
    model.query_memory(A)
    assert other.memory["ltm"][0].bank.uses().sum() == 0


def test_places_that_cannot_be_written_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in ((tmp_path / "file" / "memory", "File exists"), (tmp_path / ("x" * 300), "name too long")):
        with pytest.raises(ConfigError, match=f"{message}"):
            build(tokenizer).save_memory(path)
    with pytest.raises(ConfigError, match="name too long"):
        build(tokenizer).load_memory(tmp_path / ("x" * 300))


def test_a_file_is_for_all_whom_the_umask_lets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build(tokenizer).save_memory(tmp_path / "memory")
    (tmp_path / "other").touch()
    assert (tmp_path / "memory").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_any_changed_byte_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = build(tokenizer, n_slot=20), tmp_path / "memory"
    model.store_experience(A)
    model.save_memory(path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")  # of the header
    content = memory_file.read(path)
    for place in (*range(0, end, 7), *range(end, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = memory_file.read(path)
        except ConfigError:
            continue
        assert place < end  # where only the name of the checksum, or its white space, can be changed to no effect
        assert found[1:] == content[1:]
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in content.tensors.items())
    path.write_bytes(whole)
    model.load_memory(path)


def test_a_file_without_a_checksum_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = build(tokenizer), tmp_path / "memory"
    model.store_experience(A)
    model.save_memory(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    del header["checksum"]
    save_file(load_file(path), path, header)
    with pytest.raises(ConfigError, match="cannot be read: it is no memory file, or damaged"):
        build(tokenizer).load_memory(path)


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("key", (0, 0, 0), NAN, "key is not finite"),
        ("key", (0, 0), 1.0, "a key is longer than 1"),
        ("value", (0, 0, 0), 1e38, "a value is beyond 32768"),
        ("log_gate", (0, 0), 0.1, "importance of a slot is not in"),
        ("priority", (0, 0), float("inf"), "priority is not finite"),
        ("priority", (0, 0), 0.1, "priority of a slot is above 0, the most under importance=span"),
        ("record", (0, 0), 1, "the id of a record is not below their number"),
        ("n_record", (0,), 2**62, "number of records written is not in"),
        ("n_record", (0,), -1, "number of records written is not in"),
        ("origins", (0, 0, 0), 7, "an origin is no id"),
        ("origins", (0, 0, 0), MANY, "an origin is no id"),
        ("document", (0, 0), -1, "number of a document"),
        ("position", (0, 0), 2**40, "place of a token"),
        ("tokens", (0, 0, -1), -1, "id of a token is negative"),
        ("tokens", (0, 0, 0), 300, "not in the vocabulary"),
        ("n_used", (0,), 1, "n_used is not a bound"),
        ("uses", (0,), -1, "uses are out of range"),
        ("key", (0, 199), 0.1, "key holds something where no record is"),
        ("uses", (199,), 1, "uses are out of range, or of a slot that is empty"),
    ],
)
def test_contents_that_no_text_can_have_written_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, field: str, place: Any, value: Any, message: str
) -> None:
    model, path = build(tokenizer), tmp_path / "memory"
    model.store_experience(A)
    model.save_memory(path)
    content = memory_file.read(path)
    content.tensors[f"ltm/1/{field}"][place] = value
    memory_file.write(path, content)  # its checksum is right
    other = build(tokenizer)
    other.store_experience(B)
    before = contents(other)
    for method in (other.load_memory, other.merge_memory):
        with pytest.raises(ConfigError, match=f"memory cannot be read: ltm/1 holds what no text can .*{message}"):
            method(path)
        assert contents(other) == before
    if field not in ("uses", "tokens"):  # which are those of the model, and not of a memory
        weights = {name: part.clone() for name, part in model.state_dict().items()}
        weights[f"memory.ltm.0.bank.{field}"][place] = value
        with pytest.raises(RuntimeError, match=f"memory.ltm.0.bank holds what no text can have written: .*{message}"):
            other.load_state_dict(weights)


@pytest.mark.parametrize("name", ["geometry", "tokenizer", "weights", "version"])
@pytest.mark.parametrize("text", ["null", "[]", "5", "[" * 100_000 + "]" * 100_000])
def test_headers_of_another_type_are_refused(tokenizer: Tokenizer, tmp_path: Path, name: str, text: str) -> None:
    model, path = build(tokenizer), tmp_path / "memory"
    model.save_memory(path)
    with safe_open(path, "pt") as file:
        header = file.metadata() | {name: text}
    tensors = load_file(path)
    save_file(tensors, path, header | {"checksum": memory_file._checksum(tensors, header)})
    with pytest.raises(ConfigError, match="cannot be read"):
        model.load_memory(path)


def test_a_memory_of_another_scope_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    build(tokenizer).save_memory(tmp_path / "memory")
    with pytest.raises(ConfigError, match="scope is ltm/1 sequence there and ltm/1 shared here"):
        build(tokenizer, scope="shared").load_memory(tmp_path / "memory")


def test_a_number_of_records_that_was_made_up_costs_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = build(tokenizer), tmp_path / "memory"
    for text in (A, B, C):
        model.store_experience(text)
    model.save_memory(path)
    content = memory_file.read(path)
    content.tensors["ltm/1/n_record"][0] = 2**30
    memory_file.write(path, content)
    model.load_memory(path)
    tracemalloc.start()
    assert model.forget(2) == [2]
    assert model.forget(older_than=2**30 - 2) == [0]
    assert texts(model) == [B]
    assert tracemalloc.get_traced_memory()[1] < 10**6  # a list of the ids takes gigabytes
    tracemalloc.stop()
    with pytest.raises(ConfigError, match="cannot be merged: 1,073,741,824 records were written to it"):
        model.merge_memory(path)


def test_of_processes_that_save_to_one_path_each_leaves_a_whole_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, children = tmp_path / "memory", []
    for n in range(1, 4):
        model = build(tokenizer, n_slot=1000)
        for text in (A, B, C)[:n]:
            model.store_experience(text)
        process = multiprocessing.get_context("fork").Process(
            target=lambda model=model: [model.save_memory(path) for _ in range(20)], daemon=True
        )
        process.start()
        children.append(process)
    other, seen, end = build(tokenizer, n_slot=1000), set(), time.monotonic() + 60
    while any(process.is_alive() for process in children) and time.monotonic() < end:
        if path.is_file():
            other.load_memory(path)  # is whole at any time
            seen.add(len(texts(other)))
    assert [process.exitcode for process in children] == [0, 0, 0]
    other.load_memory(path)
    assert {len(texts(other)), *seen} <= {1, 2, 3}
    assert list(tmp_path.iterdir()) == [path]


def test_a_merged_memory_gets_new_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, other, naive = (build(tokenizer) for _ in range(3))
    for text in (A, B):
        other.store_experience(text)
    other.save_memory(tmp_path / "memory")
    model.store_experience(C)
    assert model.merge_memory(tmp_path / "memory") == [1, 2]
    for text in (C, A, B):
        naive.store_experience(text)
    assert contents(model) == contents(naive)
    assert [(record.id, record.document, record.text) for record in model.list_memory()] == [
        (2, 2, B),
        (1, 1, A),
        (0, 0, C),
    ]
    assert model.store_experience(A) == [3]


def test_a_full_memory_merges_the_most_important(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = {"n_slot": 20, "importance": "token"}
    model, other = build(tokenizer, **small), build(tokenizer, **small)
    model.store_experience(A)
    other.store_experience(B)
    other.save_memory(tmp_path / "memory")
    worths = [bank(part).priority[0].tolist() for part in (model, other)]
    model.merge_memory(tmp_path / "memory")
    assert sorted(bank(model).priority[0].tolist()) == sorted(sorted(worths[0] + worths[1])[-20:])


def test_checkpoints_hold_what_is_stored(tokenizer: Tokenizer) -> None:
    model, other = build(tokenizer), build(tokenizer)
    empty = {name: value.clone() for name, value in model.state_dict().items()}
    model.store_experience(A)
    model.query_memory(A)
    other.load_state_dict(model.state_dict())
    assert contents(other) == contents(model)
    assert torch.equal(other.memory["ltm"][0].bank.uses(), model.memory["ltm"][0].bank.uses())
    other.load_state_dict(empty)  # of a time when nothing was stored
    assert other.list_memory() == []
    assert set(other.state_dict()) == set(empty)
    old = {name: value for name, value in model.state_dict().items() if not name.endswith("bank.origins")}
    other.load_state_dict(old)  # of a version without that field
    assert contents(other) == contents(model)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " \n\t ", None, b"bytes"])
def test_no_text_is_refused(tokenizer: Tokenizer, text: Any) -> None:
    model = build(tokenizer)
    for method in (model.store_experience, model.query_memory):
        with pytest.raises(ConfigError, match=r"empty|must be a str"):
            method(text)
    assert model.list_memory() == []


def test_any_characters_are_stored(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, n_slot=1000)
    model.store_experience("Fire \U0001f525 and café.")
    model.store_experience("half \ud83d of a pair \udcff")
    assert texts(model) == ["Fire \U0001f525 and café.", "half \ufffd of a pair \ufffd"]
    assert model.query_memory("\udcff", top_k=1)[0].text


def test_one_token_is_no_slot(tokenizer: Tokenizer) -> None:
    model = build(train_tokenizer("word", [A, B], 50))
    assert model.store_experience("cat") == []


@pytest.mark.parametrize("memories", [(), ("stm",)])
def test_models_without_records_say_so(tokenizer: Tokenizer, memories: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny(tokenizer, *memories)
    for method, arguments in (
        (model.store_experience, (A,)), (model.query_memory, (A,)), (model.edit_memory, (0, A)), (model.forget, (0,)),
        (model.consolidate, ()), (model.save_memory, (tmp_path / "x",)), (model.load_memory, (tmp_path / "x",)),
        (model.merge_memory, (tmp_path / "x",)), (model.list_memory, ()),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{method.__name__}: no memory of this model keeps records.*memory=ltm"):
            method(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda m, k=k: m.query_memory(A, top_k=k), rf"top_k must be a whole number of at least 1, got {shown}")
          for k, shown in ((0, "0"), ("3", "'3'"), (2.5, "2.5"), (True, "True"), (None, "None"), (NAN, "nan"))),
        *((lambda m, n=n: m.list_memory(n), "n must be a whole number of at least 0, got")
          for n in ("3", 2.5, None, True, -1)),
        *((lambda m, t=t: m.consolidate(t), "threshold is a cosine distance, so a number in 0..2, got")
          for t in ("x", NAN, None, True, [0.1], 2.1)),
        *((lambda m, i=i: m.forget(i), "there is no record")
          for i in (True, "0", "abc", 1.0, [None], [[0]], {0: 1}, torch.tensor(True), torch.tensor([9]), np.array(9))),
        *((lambda m, d=d: m.forget(document=d), "document .* must be a whole number of at least 0, got")
          for d in (True, "1", [1], 1.5, np.True_)),
        *((lambda m, a=a: m.forget(older_than=a), "older_than .* must be a whole number of at least 0, got")
          for a in (True, "1", -1)),
        *((lambda m, i=i: m.edit_memory(i, B), "there is no record") for i in ("a", True, None, [0], 0.0)),
        (lambda m: m.edit_memory(0, None), "a text must be a str, got NoneType"),
        *((lambda m, name=name, p=p: getattr(m, name)(p), "a path of a file is expected, got")
          for name in ("save_memory", "load_memory", "merge_memory")
          for p in (None, 5, b"bytes", "a\0b", "~nobody.of.this.name/x")),
    ],
)  # fmt: skip
def test_arguments_of_a_wrong_kind_are_refused_and_change_nothing(
    tokenizer: Tokenizer, call: Any, message: str
) -> None:
    model = build(tokenizer)
    for text in (A, B):
        model.store_experience(text)
    with pytest.raises(ConfigError, match=message):
        call(model)
    assert texts(model) == [A, B]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memories", [("ltm",), ("stm", "ltm")])
def test_a_model_of_another_precision_remembers_as_well(
    tokenizer: Tokenizer, dtype: torch.dtype, memories: Any, tmp_path: Path
) -> None:
    plain = build(tokenizer, *memories, layers="all", temperature=30.0)
    model = copy.deepcopy(plain).to(dtype)
    for text in (A, B, C):
        assert model.store_experience(text) == plain.store_experience(text)
    assert [model.query_memory(text, top_k=1)[0].text for text in (A, B, C)] == [A, B, C]
    for place in range(2):
        states = bank(model, place), bank(plain, place)
        assert states[0].key.dtype == torch.float32
        orders = [(state.record * 2**32 + state.position)[0].argsort() for state in states]
        held, expected = (state.key[0, order] for state, order in zip(states, orders, strict=True))
        assert (held - expected).norm() < 0.05 * expected.norm()
    ids = torch.tensor([tokenizer.encode(LONG)]).repeat(2, 1)  # of several segments
    out, exactly = model(ids), plain(ids)
    assert out.logits.dtype == dtype
    assert (out.logits.double() - exactly.logits.double()).norm() < 0.1 * exactly.logits.double().norm()
    assert model.generate(ids[:, :5], 20, state=out.state).shape == (2, 25)
    model.save_memory(tmp_path / "memory")
    plain.load_memory(tmp_path / "memory")
    assert texts(plain) == [A, B, C]


def test_ids_of_32_bits_are_as_good(tokenizer: Tokenizer) -> None:
    model, ids = build(tokenizer), torch.tensor([tokenizer.encode(LONG)])
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    assert torch.equal(model.generate(ids.int(), 5, temperature=0), model.generate(ids, 5, temperature=0))
    for wrong in (ids.bool(), ids.to(torch.uint8), ids.short(), ids.float(), -ids, ids + 1000, [[1]], None):
        for call in (model, model.generate, model.absorb):
            with pytest.raises(ConfigError, match="ids must be"):
                call(wrong)


# --- any order of operations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_slot", "index", "dtype"),
    [pytest.param(4000, "exact", "float32", marks=pytest.mark.slow),
     pytest.param(4000, "inverted", "float32", marks=pytest.mark.slow),
     pytest.param(4000, "inverted", "bfloat16", marks=pytest.mark.slow),
     (150, "exact", "float32"), (150, "inverted", "float32"),
     pytest.param(150, "exact", "bfloat16", marks=pytest.mark.slow), (150, "inverted", "bfloat16")],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_order_of_operations_is_that_of_a_list(
    tokenizer: Tokenizer, tmp_path: Path, n_slot: int, index: Any, dtype: str, seed: int
) -> None:
    """The oracle is a dict of texts by id; where slots are too few for all, what is held is a part of it."""
    model = build(tokenizer, n_slot=n_slot, index=index, n_probe=1000, temperature=30.0, bank_dtype=dtype)
    draw, path, told, document = random.Random(seed), tmp_path / "memory", {}, {}
    n_record, saved = 0, None

    def text() -> str:
        return f"{''.join(draw.choices('abcdefghijklmnopqrstuvwxyz ', k=draw.randint(8, 40))).strip()} {draw.random()}."

    def lose(numbers: Any) -> None:
        for number in numbers:
            told.pop(number, None)

    for turn in range(60):
        held = [record.id for record in model.list_memory(1000)]
        what = draw.choice(["store"] * 4 + ["forget", "forget", "document", "older", "edit", "save", "load", "merge"])
        if what == "store":
            parts = [text() for _ in range(draw.choice([1, 1, 3]))]
            ids = model.store_experience("\n".join(parts))
            passages = [""]
            for part in parts:
                fits = len(passages[-1]) + 1 + len(part) <= T
                passages = [*passages[:-1], f"{passages[-1]} {part}"] if fits and passages[-1] else [*passages, part]
            passages = [part for part in passages if part]
            assert set(ids) <= set(range(n_record, n_record + len(passages)))
            told |= {n_record + i: part for i, part in enumerate(passages)}
            document |= {n_record + i: n_record for i in range(len(passages))}
            n_record += len(passages)
        elif what == "forget" and held:
            numbers = draw.sample(held, min(len(held), draw.randint(1, 3)))
            assert model.forget(numbers) == sorted(numbers)
            lose(numbers)
        elif what == "document" and held:
            number = document[draw.choice(held)]
            gone = [part for part in held if document[part] == number]
            assert model.forget(document=number) == sorted(gone)
            lose([part for part in told if document[part] == number])
        elif what == "older" and held:
            age = n_record - 1 - sorted(held)[len(held) // 4]  # of one that just stays
            assert model.forget(older_than=age) == sorted(part for part in held if n_record - 1 - part > age)
            lose([part for part in told if n_record - 1 - part > age])
        elif what == "edit" and held:
            number, told_now = draw.choice(held), text()
            try:
                model.edit_memory(number, told_now)
                told[number] = told_now
                n_record += 1
            except ConfigError:  # nothing of it would be kept
                assert n_slot < 4000, (turn, what)
        elif what == "save":
            model.save_memory(path)
            saved = dict(told), dict(document), n_record, held
        elif what == "load" and saved:
            model.load_memory(path)
            told, document, n_record = dict(saved[0]), dict(saved[1]), saved[2]
            assert [record.id for record in model.list_memory(1000)] == saved[3]
        elif what == "merge" and saved and draw.random() < 0.5:
            came = model.merge_memory(path)
            assert set(came) <= {n_record + part for part in saved[3]}
            told |= {n_record + part: words for part, words in saved[0].items()}
            document |= {n_record + part: n_record + number for part, number in saved[1].items()}
            n_record += saved[2]
        listed = {record.id: record for record in model.list_memory(1000)}
        assert set(listed) <= set(told)
        if n_slot == 4000:
            assert set(listed) == set(told), (turn, what)
        for number, record in listed.items():
            words = told[number]
            whole = record.text.replace("\n", " ")
            assert (
                whole == words.replace("\n", " ")
                if n_slot == 4000
                else all(part.strip() in words for part in whole.split("…"))
            ), (turn, what)
            assert (record.document, record.age) == (document[number], n_record - 1 - number)
        if listed and turn % 5 == 0:
            number = draw.choice(sorted(listed))
            found = model.query_memory(told[number], top_k=1000)
            assert {record.id for record in found} <= set(listed)
            assert len({record.id for record in found}) == len(found)
            assert n_slot < 4000 or number in {record.id for record in found}, (turn, what)
        lost = [number for number in range(n_record) if number not in listed]
        if lost:
            with pytest.raises(ConfigError, match="no longer stored"):
                model.forget(draw.choice(lost))
        model.memory["ltm"][0].check(bank(model))


def test_numbers_of_numpy_and_torch_are_numbers(tokenizer: Tokenizer) -> None:
    model = build(tokenizer)
    for text in (A, B, C, A):
        model.store_experience(text)
    assert len(model.query_memory(A, top_k=np.int64(2))) == 2
    assert model.edit_memory(np.int32(0), B) == 0
    assert model.forget(torch.tensor(0)) == [0]
    assert model.forget(np.array([1, 2])) == [1, 2]
    assert model.consolidate(np.float32(0.1))["slots_before"] == len(f" {A}") - 1
    assert model.forget(document=np.int64(3)) == [3]


def test_a_file_is_plain_safetensors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(tokenizer)
    model.store_experience(A)
    model.save_memory(tmp_path / "memory")
    held = load_file(tmp_path / "memory")
    assert torch.equal(held["ltm/1/key"], bank(model).key)
