"""The inverted file against exact search, and its lists against lists kept in plain Python."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.memory.ltm import LongTermMemory, LongTermState
from memlm.memory.ltm_write import put
from memlm.memory.state import map_tensors, tensors
from memlm.retrieval.clusters import halves
from memlm.retrieval.exact import Pool, attend
from memlm.retrieval.inverted import InvertedFile
from memlm.retrieval.lists import Lists
from memlm.tensors import Host


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clustered(n_key: int, n_cluster: int, d_key: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    of = torch.randint(n_cluster, (n_key,), generator=g)
    return F.normalize(unit(n_cluster, d_key, seed=99)[of] + 0.06 * torch.randn(n_key, d_key, generator=g), dim=-1)


def dealt_out(file: InvertedFile, key: torch.Tensor, used: torch.Tensor | None = None) -> Lists:
    used = torch.ones(key.shape[:2], dtype=torch.bool) if used is None else used
    return file.rebuild(file.empty(len(key), key.device), key, used, torch.ones(len(key), dtype=torch.bool))


def pool(n_row: int, n_slot: int, n_segment: int, d_key: int = 8) -> Pool:
    g = torch.Generator().manual_seed(5)
    return Pool(
        unit(n_row, n_slot, d_key, seed=1),
        torch.randn(n_row, n_slot, 3, generator=g),
        -torch.rand(n_row, n_slot, generator=g),
        torch.rand(n_row, n_segment, n_slot, generator=g) < 0.7,
        torch.rand(n_row, n_slot, generator=g).argsort(dim=1),
    )


@torch.no_grad()
def test_lists_of_keys_of_16_bits_are_those_of_the_same_numbers_in_32() -> None:
    """From the first slot to a full bank whose slots are replaced: made, mended, searched and checked."""
    key = unit(1, 60, 8).bfloat16()
    files = [InvertedFile(40, 8, n_list=6, n_probe=3, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    lists = [file.own(file.empty(1, key.device)) for file in files]
    assert [each.key.dtype for each in lists] == [torch.bfloat16, torch.float32]
    held = [torch.zeros(1, 40, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    used = torch.zeros(1, 40, dtype=torch.bool)
    for slot in torch.arange(120).view(-1, 6) % 40:
        used[0, slot] = True
        found = []
        for i, file in enumerate(files):
            held[i][0, slot] = key[0, (7 * slot) % 60].to(held[i].dtype)
            new = held[i][:, slot].float()  # as a write has them
            mine = file.own(lists[i], given=True)
            file.fill(mine, file.replace(mine, slot[None], new, torch.ones(1, 6, dtype=torch.bool)), held[i])
            lists[i] = file.settle(mine, 6, held[i], lambda: used)
            file.check(lists[i], held[i], used)
            bank = Pool(held[i], held[i], torch.zeros(1, 40), used[:, None])
            found.append(file.search(lists[i], unit(1, 12, 8, seed=2), torch.tensor(5.0), -1.0, 4, bank))
        for name, one, other in zip(Lists._fields, *lists, strict=True):
            one, other = (part.tensor if isinstance(part, Host) else part for part in (one, other))
            assert torch.equal(one.to(other.dtype), other), name
        torch.testing.assert_close(found[0][0].sort().values, found[1][0].sort().values)
    assert lists[0].n_list.item() > 1


@pytest.mark.parametrize("learned", [False, True], ids=["bank without gradient", "bank with gradient"])
@pytest.mark.parametrize("recency", [None, 4.0])
@pytest.mark.parametrize("threshold", [-1.0, 0.2])
@pytest.mark.parametrize(("n_row", "n_segment"), [(2, 1), (2, 3), (1, 1)], ids=["rows", "segments", "shared"])
def test_with_all_lists_probed_reads_and_gradients_are_those_of_exact_search(
    n_row: int, n_segment: int, threshold: float, recency: float | None, learned: bool
) -> None:
    file = InvertedFile(70, 8, n_list=6, n_probe=6)
    bank = pool(n_row, 70, n_segment)
    lists = dealt_out(file, bank.key)
    query, temperature = unit(2, 12, 8, seed=2).requires_grad_(), torch.tensor(5.0, requires_grad=True)
    leaves = [query, temperature]
    if learned:
        bank = bank._replace(
            key=bank.key.clone().requires_grad_(), value=bank.value.requires_grad_(), bias=bank.bias.requires_grad_()
        )
        leaves += [bank.key, bank.value, bank.bias]
    discount = None if recency is None else torch.tensor(recency)
    found = []
    for find in (None, lambda *arguments: file.search(lists, *arguments)):
        read, _, weights = attend(query, temperature, torch.tensor(0.3), threshold, 4, bank, None, discount, find)
        assert int((weights > 0).sum(dim=2).max()) == 4
        found.append([read, *torch.autograd.grad(read.square().sum(), leaves)])
    for ours, exact in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_only_probed_lists_are_read() -> None:
    """The slots of the nearest lists by a loop, and of these the best."""
    file, bank = InvertedFile(60, 8, n_list=7, n_probe=2), pool(1, 60, 1)
    lists, query = dealt_out(file, bank.key), unit(1, 9, 8, seed=3)
    score, index = file.search(lists, query, torch.tensor(4.0), -1.0, 5, bank)
    for n in range(9):
        centres = [(float(query[0, n] @ c), i) for i, c in enumerate(lists.centroid[0, : int(lists.n_list)])]
        probed = {i for _, i in sorted(centres)[-2:]}
        allowed = [m for m in range(60) if int(lists.place[0, m]) // file.n_cell in probed and bank.visible[0, 0, m]]
        scores = {m: 4 * float(query[0, n] @ bank.key[0, m]) + float(bank.bias[0, m]) for m in allowed}
        best = sorted(scores, key=lambda m: -scores[m])[:5]
        got = {int(m): float(s) for m, s in zip(index[0, n], score[0, n], strict=True) if s > -torch.inf}
        assert set(got) == set(best)
        for m in best:
            assert got[m] == pytest.approx(scores[m], abs=1e-4)


def test_a_query_finds_the_same_whichever_others_are_asked_with_it() -> None:
    file, bank = InvertedFile(600, 16, n_list=9, n_probe=3), pool(1, 600, 1, d_key=16)
    lists, query = dealt_out(file, bank.key), unit(1, 40, 16, seed=4)
    together = file.search(lists, query, torch.tensor(4.0), -1.0, 8, bank)
    for n in (0, 17, 39):
        alone = file.search(lists, query[:, n : n + 1], torch.tensor(4.0), -1.0, 8, bank)
        assert all(torch.equal(a[:, 0], b[:, n]) for a, b in zip(alone, together, strict=True))


def test_recall_on_clustered_keys_with_default_settings() -> None:
    file = InvertedFile(20_000, 32)
    key, query = clustered(20_000, 500, 32)[None], clustered(200, 500, 32, seed=1)[None]
    lists = dealt_out(file, key)
    bank = Pool(key, key, torch.zeros(1, 20_000), torch.ones(1, 1, 20_000, dtype=torch.bool))
    _, index = file.search(lists, query, torch.tensor(10.0), -1.0, 32, bank)
    best = (query[0] @ key[0].T).topk(32, dim=1).indices
    recall = (index[0, :, :, None] == best[:, None]).any(dim=1).float().mean()
    assert file.n_scored < 20_000 / 2, "nearly all slots are searched"
    assert recall >= 0.95


def held(file: InvertedFile, lists: Lists, row: int) -> list[set[int]]:
    """The slots of each list; checks that cells, places, keys and counts tell the same."""
    cells = lists.slot[row, :-1].view(file.n_list, file.n_cell)
    assert lists.slot[row, -1] == -1
    for number, count in enumerate((cells >= 0).sum(dim=1).tolist()):
        assert count == int(lists.n_held[row, number])
    for cell, slot in enumerate(cells.flatten().tolist()):
        assert slot < 0 or int(lists.place[row, slot]) == cell
    inside = [set(line[line >= 0].tolist()) for line in cells]
    assert sum(map(len, inside)) == int((lists.place[row] >= 0).sum()), "a slot is in two lists"
    return inside


def test_lists_after_any_writes_are_those_of_a_loop() -> None:
    """Insertions, replacements, removals and new documents, one slot at a time in plain Python."""
    file, g = InvertedFile(40, 8, n_list=5), torch.Generator().manual_seed(7)
    key = unit(2, 40, 8, seed=8)
    used = torch.rand(2, 40, generator=g) < 0.6
    lists = dealt_out(file, key, used)
    naive = [held(file, lists, row) for row in range(2)]
    n_full = 0
    for step in range(60):
        slot = torch.stack([torch.randperm(40, generator=g)[:9] for _ in range(2)])
        new, accept = unit(2, 9, 8, seed=100 + step), torch.rand(2, 9, generator=g) < 0.7
        if step % 3:  # nearly all to one list, so that it overflows
            new = F.normalize(lists.centroid[:, :1] + 0.1 * new, dim=-1)
        before = [part.clone() for part in tensors(lists)]
        after = file.own(lists)
        cells = file.replace(after, slot, new, accept)
        file.fill(after, cells, put(key, slot, accept, new))
        unchanged = [torch.equal(a, b) for a, b in zip(before, tensors(lists), strict=True)]
        assert all(unchanged), "the state before was changed"
        lists = after
        for row in range(2):
            for i in range(9):
                if accept[row, i]:
                    for inside in naive[row]:
                        inside.discard(int(slot[row, i]))
                    key[row, slot[row, i]] = new[row, i]
            found = held(file, lists, row)
            for i in range(9):
                if accept[row, i]:
                    (where,) = [j for j, inside in enumerate(found) if int(slot[row, i]) in inside]
                    nearest = int((lists.centroid[row, : int(lists.n_list[row])] @ new[row, i]).argmax())
                    assert where == nearest or int(lists.n_held[row, nearest]) == file.n_cell
                    n_full += where != nearest
                    naive[row][where].add(int(slot[row, i]))
            assert found == naive[row]
            stored = lists.place[row] >= 0
            torch.testing.assert_close(lists.key[row, lists.place[row, stored].long()], key[row, stored])
    assert n_full > 20, "no list was ever full"
    file.start(lists, torch.tensor([False, True]))
    assert held(file, lists, 0) == naive[0]
    assert not any(held(file, lists, 1))


def test_searches_after_writes_equal_those_of_lists_made_afresh() -> None:
    file, g = InvertedFile(60, 8, n_list=6, n_probe=6), torch.Generator().manual_seed(9)
    bank = pool(1, 60, 1)
    key, lists = bank.key.clone(), dealt_out(file, bank.key)
    for step in range(8):
        slot, new = torch.randperm(60, generator=g)[None, :11], unit(1, 11, 8, seed=step)
        key = key.scatter(1, slot[..., None].expand_as(new), new)
        lists = file.own(lists)
        file.fill(lists, file.replace(lists, slot, new, torch.ones_like(slot, dtype=torch.bool)), key)
    query, bank = unit(1, 20, 8, seed=50), bank._replace(key=key)
    found = [file.search(each, query, torch.tensor(4.0), -1.0, 5, bank) for each in (lists, dealt_out(file, key))]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])


def test_lists_are_made_once_and_mended_when_an_eighth_of_the_slots_was_written() -> None:
    """Counted by hand: made after half of the slots; 8 lists for 64 slots, fewer by the root of their share."""
    file = InvertedFile(64, 8, n_list=8)
    key, used, lists = unit(1, 64, 8), torch.zeros(1, 64, dtype=torch.bool), file.empty(1, torch.device("cpu"))
    when, waits = [], []
    for step in range(24):  # the bank grows for 16 steps, then slots are replaced
        slot = torch.arange(4 * step, 4 * step + 4)[None] % 64
        new = unit(1, 4, 8, seed=step)
        key, used = key.scatter(1, slot[..., None].expand_as(new), new), used.scatter(1, slot, True)
        lists = file.own(lists)
        file.fill(lists, file.replace(lists, slot, new, torch.ones(1, 4, dtype=torch.bool)), key)
        before, n_list = int(lists.left), int(lists.n_list)
        lists = file.settle(lists, 4, key, lambda used=used: used)
        assert int(lists.known_left.tensor) <= int(lists.left)
        file.check(lists, key, used)
        if int(lists.left) != before:
            waits.append((4 * step + 4, int(lists.left)))
        if int(lists.n_list) != n_list:
            when.append((4 * step + 4, int(lists.n_list)))
    assert waits == [(32, 4), (36, 4), (40, 5), (48, 6), (56, 7), (64, 8), (72, 8), (80, 8), (88, 8), (96, 8)]
    assert when == [(32, math.ceil(8 * math.sqrt(0.5))), (40, 7), (56, 8)]
    assert sum(map(len, held(file, lists, 0))) == 64


def grown(file: InvertedFile, key: Tensor, n_written: int = 100) -> tuple[Lists, list[int]]:
    """Lists of slots (M, d_key) that were written one after the other; how many others moved at each time."""
    used = torch.zeros(1, len(key), dtype=torch.bool)
    lists, moved = file.own(file.empty(1, key.device)), []
    for some in torch.arange(len(key)).split(n_written):
        lists = file.own(lists, given=True)
        accept = torch.ones(1, len(some), dtype=torch.bool)
        file.fill(lists, file.replace(lists, some[None], key[some][None], accept), key[None])
        used[0, some] = True
        before = file.list_of(lists, torch.arange(len(key))[None]).clone()
        lists = file.settle(lists, len(some), key[None], lambda: used)
        after = file.list_of(lists, torch.arange(len(key))[None])
        moved.append(int(((before != after) & (before >= 0)).sum()))
    file.check(lists, key[None], used)
    return lists, moved


def found_of_best(file: InvertedFile, lists: Lists, key: Tensor, query: Tensor) -> float:
    """The share of the best 32 slots that a search finds."""
    bank = Pool(key[None], key[None], torch.zeros(1, len(key)), torch.ones(1, 1, len(key), dtype=torch.bool))
    _, index = file.search(lists, query[None], torch.tensor(10.0), -1.0, 32, bank)
    best = (query @ key.T).topk(32, dim=1).indices
    return float((index[0, :, :, None] == best[:, None]).any(dim=1).float().mean())


def test_a_bank_that_grows_moves_few_slots_and_is_searched_as_well_as_one_that_was_dealt_out() -> None:
    file = InvertedFile(12_000, 32, n_probe=24)
    key, query = clustered(12_000, 300, 32), clustered(200, 300, 32, seed=1)
    lists, moved = grown(file, key)
    assert max(moved) <= 12_000 / 4, "so many are moved at a time"
    assert sum(moved) <= 2 * 12_000, "slots are moved again and again"
    assert int(lists.n_list) >= 0.9 * file.n_list
    assert found_of_best(file, lists, key, query) >= 0.95
    assert file.n_scored < 12_000 / 2, "nearly all slots are searched"


def test_lists_follow_what_is_written() -> None:
    """Slots are replaced, twice, by others elsewhere: lists that get full are parted, and empty ones given up."""
    file = InvertedFile(6_000, 32, n_probe=24)
    key = clustered(6_000, 300, 32)
    elsewhere = F.normalize(unit(1, 32, seed=3) + 0.7 * clustered(6_200, 300, 32, seed=4), dim=1)
    lists, _ = grown(file, key)
    used = torch.ones(1, 6_000, dtype=torch.bool)
    g = torch.Generator().manual_seed(5)
    for some in torch.cat([torch.randperm(6_000, generator=g) for _ in range(2)]).split(100):
        key[some] = elsewhere[some]
        accept = torch.ones(1, len(some), dtype=torch.bool)
        file.fill(lists, file.replace(lists, some[None], key[some][None], accept), key[None])
        lists = file.settle(lists, len(some), key[None], lambda: used)
    file.check(lists, key[None], used)
    assert int((lists.n_held > 0).sum()) > 0.8 * file.n_list
    assert found_of_best(file, lists, key, elsewhere[6_000:]) >= 0.95


def test_groups_are_parted_where_their_keys_are_apart() -> None:
    """Two bundles of keys around two directions: the centres are their means; cells without a key do not count."""
    around = torch.eye(4)[[0, 1, 2, 3]].view(2, 2, 1, 4)
    key = F.normalize(around + 0.1 * torch.rand(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)), dim=3)
    expected = F.normalize(key.mean(dim=2), dim=2)  # (2, 2, 4)
    cells = F.pad(key.flatten(1, 2), (0, 0, 0, 3))
    found = halves(cells, torch.arange(13).expand(2, -1) < 10)
    for group in range(2):
        same = torch.allclose(found[group], expected[group], atol=1e-5)
        assert same or torch.allclose(found[group].flip(0), expected[group], atol=1e-5)
    alike = halves(key[:1, :1, :1].expand(1, 1, 3, 4)[0], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(alike, key[:1, :1, :1].expand(1, 1, 2, 4)[0])


def test_the_device_is_asked_only_when_it_may_be_time() -> None:
    """The bound on the CPU counts slots that were offered, not those that were stored."""
    file = InvertedFile(64, 8, n_list=8)
    lists, used = file.own(file.empty(1, torch.device("cpu"))), torch.zeros(1, 64, dtype=torch.bool)
    refused = torch.zeros(1, 16, dtype=torch.bool)
    left = []
    for _ in range(3):
        file.replace(lists, torch.arange(16)[None], unit(1, 16, 8), refused)
        lists = file.settle(lists, 16, unit(1, 64, 8), lambda: used)
        left.append((int(lists.known_left.tensor), int(lists.left)))
    assert left == [(16, 32), (32, 32), (16, 32)]


def test_the_same_slots_give_the_same_lists() -> None:
    file, key = InvertedFile(300, 16, n_list=12), unit(1, 300, 16)
    a, b = dealt_out(file, key), dealt_out(file, key)
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    assert len({tuple(c.tolist()) for c in a.centroid[0]}) == 12


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"n_list": 0}, "n_list must be at least 1"),
        ({"n_probe": 0}, "n_probe must be at least 1"),
        ({"n_list": 101, "n_slot": 100}, r"n_list must be at most n_slot \(100\), got 101"),
        ({"index": "hnsw"}, "index must be one of exact, inverted, got 'hnsw'"),
    ],
)
def test_mistakes_are_told(settings: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        LongTermMemory(16, **settings)  # type: ignore[arg-type]


def test_a_state_without_lists_is_searched_exactly() -> None:
    """What was saved before there were lists, or with index: exact, goes on."""
    torch.manual_seed(0)
    exact, inverted = (LongTermMemory(16, n_slot=20, d_key=8, d_value=8, index=name) for name in ("exact", "inverted"))
    inverted.load_state_dict(exact.state_dict())
    state = exact.init_state(1)
    state = state._replace(
        key=unit(1, 20, 8), value=unit(1, 20, 8), priority=torch.zeros(1, 20), n_used=Host(torch.tensor([20]))
    )
    x = torch.randn(1, 5, 16)
    found = [memory.read(x, memory.prepare(state)).value for memory in (exact, inverted)]
    assert torch.equal(*found)
    assert exact.init_state(1).lists is None


def bank_with_lists(scope: str = "sequence", index: str = "inverted") -> tuple[LongTermMemory, LongTermState]:
    """A full bank of 20 slots, dealt out, whose first two have the same key and value."""
    torch.manual_seed(0)
    memory = LongTermMemory(16, n_slot=20, d_key=8, d_value=8, n_list=4, scope=scope, index=index)  # type: ignore[arg-type]
    key = unit(1, 20, 8)
    key[:, 1] = key[:, 0]
    fresh, number = memory.init_state(1), torch.arange(20)[None]
    state = fresh._replace(
        key=key, value=key.clone(), log_gate=torch.zeros(1, 20), priority=-number.float(), record=number,
        document=number, position=number, tokens=torch.zeros_like(fresh.tokens), n_record=torch.tensor([20]),
        n_used=Host(torch.tensor([20])),
    )  # fmt: skip
    if index == "inverted":
        state = state._replace(lists=dealt_out(InvertedFile(20, 8, n_list=4), key))
    return memory, state


def test_a_consolidated_bank_is_dealt_out_anew() -> None:
    memory, state = bank_with_lists()
    new, report = memory.consolidate(state, threshold=1e-3)
    assert report == {"merged": 1}
    expected = dealt_out(InvertedFile(20, 8, n_list=4), new.key, memory.filled(new))
    assert all(torch.equal(a, b) for a, b in zip(tensors(new.lists), tensors(expected), strict=True))
    assert int((new.lists.place >= 0).sum()) == 19


def test_forgotten_slots_are_in_no_list() -> None:
    memory, state = bank_with_lists()
    gone = torch.arange(20)[None] % 3 == 0
    new = memory.forget(state, gone)
    assert torch.equal(new.lists.place >= 0, ~gone)
    assert not memory.filled(new)[gone].any()
    expected = dealt_out(InvertedFile(20, 8, n_list=4), new.key, ~gone)  # centres of what is left, too
    assert all(torch.equal(a, b) for a, b in zip(tensors(new.lists), tensors(expected), strict=True))
    none = memory.forget(new, torch.ones_like(gone))
    assert not none.lists.centroid.any()
    assert not none.lists.key.any()


def test_a_shared_bank_that_was_kept_without_lists_is_dealt_out() -> None:
    """As when an evaluation changes ``index`` of an older checkpoint; one kept with lists keeps these."""
    memory, state = bank_with_lists("shared", "exact")
    memory.bank.create()
    memory.bank.commit(state)
    memory.index = "inverted"
    lists = memory.bank.first(3).lists
    expected = dealt_out(InvertedFile(20, 8, n_list=4), state.key)
    assert all(torch.equal(a, b) for a, b in zip(tensors(lists), tensors(expected), strict=True))
    memory, state = bank_with_lists("shared")
    moved = state._replace(lists=state.lists._replace(centroid=-state.lists.centroid))
    memory.bank.create()
    memory.bank.commit(moved)
    restored, _ = bank_with_lists("shared")
    restored.bank.create()
    restored.load_state_dict(memory.state_dict())
    again = restored.bank.first(3).lists
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(moved.lists), strict=True))


@pytest.mark.parametrize(
    ("field", "place", "value"),
    [
        ("centroid", (0, 0, 0), torch.nan), ("centroid", (0, 0), 1.0), ("slot", (0, -1), 3), ("slot", (0, 0), 20),
        ("key", (0, 0, 0), 0.5), ("place", (0, 0), -1), ("place", (0, 0), 2**30), ("n_held", (0, 0), 99),
        ("extent", (0, 0), -1), ("extent", (0, 0), 2**40), ("n_list", (0,), 5), ("known_n_list", (0,), 0),
        ("left", (0,), -1), ("known_left", (0,), 2**40),
    ],
)  # fmt: skip
def test_lists_that_are_not_those_of_the_slots_are_refused(field: str, place: Any, value: float) -> None:
    memory, state = bank_with_lists()
    assert state.lists is not None
    memory.check(state)
    lists = map_tensors(Tensor.clone, state.lists)
    part = getattr(lists, field)
    (part.tensor if isinstance(part, Host) else part)[place] = value
    with pytest.raises(ValueError, match="lists_"):
        memory.check(state._replace(lists=lists))


@pytest.mark.parametrize("n_left", [0, 5])
def test_a_memory_of_which_nearly_all_was_forgotten_has_room_for_what_is_written_then(n_left: int) -> None:
    file, key = InvertedFile(150, 8), unit(1, 150, 8)
    lists = dealt_out(file, key)
    used = torch.arange(150)[None] < n_left
    lists = file.own(file.rebuild(lists, key, used, torch.ones(1, dtype=torch.bool)))
    slot = torch.arange(n_left, 70)[None]  # fewer than after which all are dealt out
    file.fill(lists, file.replace(lists, slot, key[:, n_left:70], torch.ones_like(slot, dtype=torch.bool)), key)
    used[:, :70] = True
    lists = file.settle(lists, 70 - n_left, key, lambda: used)
    file.check(lists, key, used)
    pool = Pool(key, key, torch.zeros(1, 150), used[:, None])
    _, found = file.search(lists, key[:, :70], torch.tensor(1.0), -1.0, 1, pool)
    assert found[0, :, 0].tolist() == list(range(70))
