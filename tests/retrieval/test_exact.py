import math

import pytest
import torch
from torch.nn import functional as F

from memlm.retrieval import exact
from memlm.retrieval.exact import Pool, attend


def naive(query, temperature, null, threshold, top_k, bank, window, recency=0.0):
    """One query at a time, one slot at a time."""
    n_row, n_query, _ = query.shape
    reads = []
    for b in range(n_row):
        for n in range(n_query):
            slots = []
            for pool in (bank, window):
                if pool is None:
                    continue
                row = b if pool.key.shape[0] > 1 else 0
                segment = n // (n_query // pool.visible.shape[1])
                for m in range(pool.key.shape[1]):
                    cosine = sum(float(x) * float(y) for x, y in zip(query[b, n], pool.key[row, m], strict=True))
                    if bool(pool.visible[row, segment, m]) and cosine >= threshold:
                        score = temperature * cosine + float(pool.bias[row, m])
                        slots.append((score, pool.value[row, m], int(pool.time[row, m])))
            found = sorted(slots, key=lambda slot: -slot[0])[:top_k]
            best = [
                (score - recency * sum(math.exp(other - temperature) for other, _, t in found if t > time), value)
                for score, value, time in found
            ]
            total = math.exp(null) + sum(math.exp(score) for score, _ in best)
            reads.append(sum((math.exp(score) / total * value for score, value in best), torch.zeros(3)))
    return torch.stack(reads).view(n_row, n_query, 3)


def pool(n_row, n_slot, n_segment, seed):
    g = torch.Generator().manual_seed(seed)
    return Pool(
        F.normalize(torch.randn(n_row, n_slot, 4, generator=g), dim=-1),
        torch.randn(n_row, n_slot, 3, generator=g),
        -torch.rand(n_row, n_slot, generator=g),
        torch.rand(n_row, n_segment, n_slot, generator=g) < 0.7,
        torch.rand(n_row, n_slot, generator=g).argsort(dim=1) + 100 * seed,
    )


@pytest.mark.parametrize("recency", [None, 6.0])
@pytest.mark.parametrize("threshold", [-1.0, 0.2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pools", ["bank", "window", "both"])
def test_equals_a_loop_over_slots(pools, shared, threshold, recency):
    query = F.normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3)), dim=-1)
    bank = pool(1 if shared else 2, 9, 2, seed=1) if pools != "window" else None
    window = pool(2, 5, 2, seed=2) if pools != "bank" else None
    args = (query, torch.tensor(3.0), torch.tensor(0.5), threshold, 4, bank, window)
    read, slots, weights = attend(*args, recency=None if recency is None else torch.tensor(recency))
    expected = naive(query, 3.0, 0.5, threshold, 4, bank, window, recency or 0.0)
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    values = [torch.cat([p.value.expand(2, -1, -1) for p in (bank, window) if p is not None], dim=1)][0]
    picked = values.gather(1, slots.clamp(min=0).flatten(1)[..., None].expand(-1, -1, 3)).unflatten(1, slots.shape[1:])
    torch.testing.assert_close((weights[..., None] * picked).sum(2), read, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 2, 3, 6, 9], ids="{} at a time".format)
def test_however_many_cells_are_searched_at_a_time(cells, monkeypatch):
    bank, query = pool(3, 7, 3, seed=6), F.normalize(torch.randn(3, 6, 4), dim=-1)  # 3 rows of 3 segments of 2 tokens
    monkeypatch.setattr(exact, "_ON_CPU", cells * 2 * 7)
    read, _, _ = attend(query, torch.tensor(3.0), torch.tensor(0.5), 0.2, 4, bank, None)
    torch.testing.assert_close(read, naive(query, 3.0, 0.5, 0.2, 4, bank, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_few_tokens_are_searched_at_a_time_in_a_very_large_bank(tokens, monkeypatch):
    bank, query = pool(2, 7, 3, seed=6), F.normalize(torch.randn(2, 15, 4), dim=-1)  # 2 rows of 3 segments of 5 tokens
    monkeypatch.setattr(exact, "_MOST", tokens * 7 + 6)
    monkeypatch.setattr(exact, "_ON_CPU", 1)
    made = []
    monkeypatch.setattr(exact, "top", lambda score, k: made.append(score.numel()) or score.topk(k))
    read, _, _ = attend(query, torch.tensor(3.0), torch.tensor(0.5), 0.2, 4, bank, None)
    torch.testing.assert_close(read, naive(query, 3.0, 0.5, 0.2, 4, bank, None), rtol=1e-4, atol=1e-5)
    assert max(made) == tokens * 7
    assert sum(made) == query.shape[0] * query.shape[1] * 7


@pytest.mark.parametrize("n_slot", [255, 256, 257, 287, 800])  # too few to group; groups, with and without a rest
def test_the_best_of_groups_are_the_best_of_all(n_slot):
    score = torch.randn(3, 5, n_slot, generator=torch.Generator().manual_seed(n_slot))
    score[0, 0] = -torch.inf
    score[0, 1, 3:] = -torch.inf
    score[..., -1] += 5
    values, index = exact.top(score, 1)
    assert torch.equal(index[1:], score[1:].argmax(dim=-1, keepdim=True))
    for k in (1, 2, 3):
        values, index = exact.top(score, k)
        assert torch.equal(values.sort(dim=-1, descending=True).values, score.topk(k).values)
        assert torch.equal(score.gather(-1, index), values)
        assert all(len(set(found.tolist())) == k for found in index.flatten(0, 1))


@pytest.mark.parametrize("recency", [None, 6.0])
def test_gradients_reach_keys_and_values_of_what_is_read(recency):
    bank, query = pool(2, 9, 1, seed=4), F.normalize(torch.randn(2, 3, 4), dim=-1).requires_grad_()
    key, value = bank.key.clone().requires_grad_(), bank.value.clone().requires_grad_()
    discount = None if recency is None else torch.tensor(recency, requires_grad=True)
    args = (torch.tensor(3.0), torch.tensor(0.5), -1.0, 4)
    learned = [part for part in (query, key, value, discount) if part is not None]
    gradients = []
    for pools in ((bank._replace(key=key, value=value), None), (None, bank._replace(key=key, value=value))):
        read, _slots, _weights = attend(query, *args, *pools, recency=discount)
        gradients.append(torch.autograd.grad(read.square().sum(), learned))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.abs().sum() > 0


def test_of_equal_keys_the_latest_has_the_weight():
    key = F.normalize(torch.ones(1, 10, 4), dim=-1)
    time = torch.tensor([[3, 7, 1, 9, 0, 4, 8, 2, 6, 5]])
    bank = Pool(key, torch.randn(1, 10, 3), torch.zeros(1, 10), torch.ones(1, 1, 10, dtype=torch.bool), time)
    args = (key[:, :1], torch.tensor(12.0), torch.tensor(0.0), -1.0, 32, bank, None)
    _, slots, alike = attend(*args)
    torch.testing.assert_close(alike[alike > 0], torch.full((10,), 0.1), rtol=1e-3, atol=0)
    _, slots, weights = attend(*args, recency=torch.tensor(5.0))
    by_slot = torch.zeros(10).scatter(0, slots[0, 0, :10], weights[0, 0, :10])
    expected = torch.tensor([-5.0 * (9 - t) for t in time[0].tolist()]).softmax(dim=0)  # each newer one takes off 5
    torch.testing.assert_close(by_slot, expected, rtol=1e-3, atol=1e-5)
    assert by_slot[3] > 0.99


def test_nothing_visible_reads_nothing():
    bank = pool(2, 9, 1, seed=5)
    bank = bank._replace(visible=torch.zeros_like(bank.visible))
    read, _, weights = attend(torch.randn(2, 3, 4), torch.tensor(3.0), torch.tensor(0.0), -1.0, 4, bank, None)
    assert read.abs().sum() == 0
    assert weights.sum() == 0


@pytest.mark.parametrize("learned", [False, True], ids=["bank without gradient", "bank with gradient"])
@pytest.mark.parametrize(("n_token", "shared"), [(1, False), (1, True), (5, False), (5, True)])
@pytest.mark.parametrize(("threshold", "recency"), [(-1.0, None), (0.2, None), (-1.0, 6.0)])
def test_a_bank_of_16_bits_is_read_as_the_same_numbers_in_32(n_token, shared, threshold, recency, learned, monkeypatch):
    monkeypatch.setattr(exact, "_WIDE", 4)  # keys are made wider in parts, the last of which is smaller
    query = F.normalize(torch.randn(2, 2 * n_token, 4, generator=torch.Generator().manual_seed(3)), dim=-1)
    bank, window = pool(1 if shared else 2, 9, 2, seed=1), pool(2, 5, 2, seed=2)
    small = bank._replace(key=bank.key.bfloat16(), value=bank.value.bfloat16())
    wide = small._replace(key=small.key.float(), value=small.value.float())
    found = []
    for each in (small, wide):
        parts = [query.clone().requires_grad_(), torch.tensor(3.0, requires_grad=True)]
        parts += [part.clone().requires_grad_(learned) for part in each[:3]]
        own = each._replace(key=parts[2], value=parts[3], bias=parts[4])
        for other in (None, window):
            read, slots, weights = attend(
                *parts[:2], torch.tensor(0.5), threshold, 4, own, other, None if recency is None else torch.tensor(6.0)
            )
            gradients = torch.autograd.grad(read.square().sum(), parts if learned else parts[:2])
            assert read.dtype == torch.float32
            by_slot = torch.zeros(2, 2 * n_token, 15).scatter(2, slots.remainder(15), weights)
            found.append([read, by_slot, *gradients])
            with torch.no_grad():
                torch.testing.assert_close(
                    attend(
                        *parts[:2],
                        torch.tensor(0.5),
                        threshold,
                        4,
                        own,
                        other,
                        None if recency is None else torch.tensor(6.0),
                    )[0],
                    read,
                )
    for one, other in zip(found[:2], found[2:], strict=True):
        for mine, theirs in zip(one, other, strict=True):  # a gradient has the type of what it is of
            rough = mine.dtype == torch.bfloat16
            torch.testing.assert_close(mine.float(), theirs, rtol=1e-2 if rough else 1e-5, atol=1e-2 if rough else 1e-6)
