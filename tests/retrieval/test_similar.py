import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.retrieval import similar
from tests.retrieval import naive


def slots(n_row: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, priorities (many are equal) and used slots; keys and values lie around few centres."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(n // 4, (n_row, n), generator=generator)

    def around(d: int, length: float) -> Tensor:
        centres = F.normalize(torch.randn(n // 4, d, generator=generator), dim=-1)
        noise = F.normalize(torch.randn(n_row, n, d, generator=generator), dim=-1)
        return length * F.normalize(centres[centre] + 0.4 * noise, dim=-1)

    priority = torch.randint(n // 2, (n_row, n), generator=generator).float()
    return around(6, 1.0), around(5, 3.0), priority, torch.rand(n_row, n, generator=generator) < 0.8


def groups(found: tuple[Tensor, Tensor, Tensor], row: int) -> dict[int, list[int]]:
    joined: dict[int, list[int]] = {}
    for r, i, j in zip(*(part.tolist() for part in found), strict=True):
        if r == row:
            joined.setdefault(j, []).append(i)
    return joined


def test_slots_of_16_bits_join_as_the_same_numbers_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    key, value, priority, used = slots(2, 999, seed=0)
    small = key.bfloat16(), value.bfloat16()
    for name, number in {"_EXACT": 100, "_PART": 400, "_BLOCK": 16}.items():
        found = similar.joins(*small, priority, used, 0.1, turn=1)
        wide = similar.joins(*(F.normalize(part.float(), dim=-1) for part in small), priority, used, 0.1, turn=1)
        assert all(torch.equal(one, other) for one, other in zip(found, wide, strict=True))
        assert len(found[0]) > 10
        monkeypatch.setattr(similar, name, number)


@pytest.mark.parametrize("cells", [2**22, 400])  # at a time: all similarities, or those of some slots
@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.3, 2.0])
def test_few_slots_join_by_the_rule(threshold: float, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "_CELLS", cells)
    key, value, priority, used = slots(3, 60, seed=0)
    found = similar.joins(key, value, priority, used, threshold, turn=5)
    assert found[0].tolist() == sorted(found[0].tolist())
    for row in range(3):
        wanted = naive.joins(key[row], value[row], priority[row], used[row], threshold)
        assert groups(found, row) == wanted
        if 0 < threshold < 2:  # or none is similar to another, or all are
            assert len(wanted) > 3
            assert max(len(members) for members in wanted.values()) > 1


def test_two_clear_pairs() -> None:
    """Of four keys in two directions the second and the third join; the fifth holds another value, the last nothing."""
    key = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]]])
    value = torch.tensor([[[2.0, 0], [1, 0], [1, 0], [9, 0], [0, 1], [1, 0]]])
    priority = torch.tensor([[2.0, 1, 3, 4, 5, 6]])
    used = torch.tensor([[True, True, True, True, True, False]])
    row, joined, survivor = similar.joins(key, value, priority, used, 0.1)
    assert (row.tolist(), joined.tolist(), survivor.tolist()) == ([0, 0], [1, 2], [0, 3])


def test_turns_in_a_row_look_at_every_slot_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where any two slots are similar, what a turn looks at joins the most important of it."""
    monkeypatch.setattr(similar, "_PART", 260)
    key, value, priority, _ = slots(2, 999, seed=0)
    priority = priority.argsort(dim=1).argsort(dim=1)  # no two are equal
    used = torch.ones(2, 999, dtype=torch.bool)
    assert [similar.n_turn(n) for n in (1, 260, 261, 999, 1040, 1041)] == [1, 1, 2, 4, 4, 8]
    parts = []
    for turn in range(4, 8):
        found = similar.joins(key, value, priority, used, 2.0, turn)
        seen = []
        for row in range(2):
            [(survivor, members)] = groups(found, row).items()
            assert priority[row, survivor] > priority[row, members].max()
            seen.append({survivor, *members})
        assert all(249 <= len(part) <= 250 for part in seen)
        parts.append(seen)
    for row in range(2):
        assert sorted(i for seen in parts for i in seen[row]) == list(range(999))
    again = groups(similar.joins(key, value, priority, used, 2.0, 0), 0)
    assert {i for survivor, members in again.items() for i in (survivor, *members)} != parts[0][0], "other directions"


def test_many_slots_are_compared_within_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where any two slots are similar, one tree leaves one slot of each block, and two trees fewer."""
    for name, number in {"_EXACT": 100, "_BLOCK": 16, "_TREES": 1}.items():
        monkeypatch.setattr(similar, name, number)
    key, value, priority, _ = slots(2, 250, seed=1)
    priority = priority.argsort(dim=1).argsort(dim=1)
    priority[:, 0] = 250  # places that are filled up must not stand for the first slot
    used = torch.ones(2, 250, dtype=torch.bool)
    turns = [similar.joins(key, value, priority, used, 2.0, turn) for turn in range(2)]
    for row in range(2):
        blocks = [{frozenset([i, *members]) for i, members in groups(found, row).items()} for found in turns]
        assert [len(one) for one in blocks] == [8, 8]
        assert blocks[0] != blocks[1]
        for block in blocks[0]:
            assert 26 <= len(block) <= 32, "balanced: 250 slots and six empty places"
        assert sorted(i for block in blocks[0] for i in block) == list(range(250))
    monkeypatch.setattr(similar, "_TREES", 2)
    both = groups(similar.joins(key, value, priority, used, 2.0), 0)
    assert 1 <= len(both) < 8


def test_neighbours_are_seldom_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks find is part of what comparing all pairs finds, and most of it over some turns."""
    for name, number in {"_EXACT": 100, "_BLOCK": 16}.items():
        monkeypatch.setattr(similar, name, number)
    generator = torch.Generator().manual_seed(0)
    first = F.normalize(torch.randn(1, 200, 32, generator=generator), dim=-1)
    key = F.normalize(torch.cat([first, first + 0.02 * torch.randn(1, 200, 32, generator=generator)], dim=1), dim=-1)
    priority, used = -torch.arange(400.0)[None], torch.ones(1, 400, dtype=torch.bool)
    every = naive.joins(key[0], key[0], priority[0], used[0], 0.1)
    assert every == {i: [i + 200] for i in range(200)}
    found = set()
    for turn in range(6):
        once = groups(similar.joins(key, key, priority, used, 0.1, turn), 0)
        assert once.items() <= every.items()
        assert len(once) > 100
        found |= once.keys()
    assert len(found) > 195
