"""The Triton kernel beside the search in PyTorch: on a GPU, or in Triton's interpreter (tests/conftest.py)."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from memlm.retrieval import exact

CUDA = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which comes with CUDA builds of torch", allow_module_level=True)

from memlm.retrieval import slot_kernel  # noqa: E402

pytestmark = pytest.mark.cuda
DEVICE = "cuda" if CUDA else "cpu"


def inputs(n_row, n_segment, n_token, n_slot, width, shared=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    n_bank = 1 if shared else n_row
    query = F.normalize(torch.randn(n_row, n_segment * n_token, width, generator=g), dim=-1)
    key = F.normalize(torch.randn(n_bank, n_slot + 3, width, generator=g), dim=-1)[:, :n_slot]  # no dense rows
    bias = -torch.rand(n_bank, n_slot, generator=g)
    visible = torch.rand(n_bank, n_segment, n_slot, generator=g) < 0.7
    return [part.to(DEVICE) for part in (query, key, bias, visible)]


def check(query, key, bias, visible, k, threshold=-1.0):
    temperature, null = torch.tensor(9.0, device=DEVICE), torch.tensor(4.0, device=DEVICE)
    score, index, weight = slot_kernel.find_and_weigh(query, temperature, null, threshold, k, key, bias, visible)
    n_row, n_query = query.shape[:2]
    cosine = query @ key.transpose(1, 2)
    seen = visible.repeat_interleave(n_query // visible.shape[1], dim=1) & (cosine >= threshold)
    plain = (9.0 * cosine + bias[:, None]).masked_fill(~seen, -torch.inf)
    best = plain.topk(min(k, plain.shape[2]), dim=2)
    best = F.pad(best.values, (0, k - best.values.shape[2]), value=-torch.inf)
    torch.testing.assert_close(score.sort(dim=2, descending=True).values, best, rtol=1e-4, atol=1e-5)
    there = score > -torch.inf
    torch.testing.assert_close(plain.gather(2, index)[there], score[there], rtol=1e-4, atol=1e-5)
    assert all(
        len(set(i[t].tolist())) == int(t.sum()) for i, t in zip(index.flatten(0, 1), there.flatten(0, 1), strict=True)
    )
    expected = torch.cat([null.expand(n_row, n_query, 1), score], dim=2).softmax(dim=2)[..., 1:]
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
    assert (weight[~there] == 0).all()


@pytest.mark.parametrize(
    ("n_row", "n_segment", "n_token", "n_slot", "width", "k", "shared"),
    [
        (2, 3, 5, 200, 8, 4, False),  # blocks with fewer queries than they have room for
        (2, 1, 17, 130, 16, 5, True),  # a second block of queries; k no power of two; a width that needs no filling up
        (1, 2, 3, 3, 4, 7, False),  # fewer slots than a query may read
        (1, 1, 2, 65, 24, 1, False),  # one slot beyond a block; one slot read
    ],
)
@pytest.mark.parametrize("threshold", [-1.0, 0.1])
def test_it_finds_the_best_slots_and_weighs_them(n_row, n_segment, n_token, n_slot, width, k, shared, threshold):
    check(*inputs(n_row, n_segment, n_token, n_slot, width, shared), k, threshold)


def test_few_queries_search_parts_of_many_slots(monkeypatch):
    monkeypatch.setattr(slot_kernel, "_PART", 64)
    check(*inputs(1, 1, 1, 300, 8), 6)


def test_queries_that_may_read_nothing_read_nothing():
    query, key, bias, visible = inputs(1, 2, 3, 20, 8)
    check(query, key, bias, visible & torch.tensor([False, True], device=DEVICE)[:, None], 4)


@pytest.mark.parametrize("grad", [False, True])
def test_attention_through_it_is_that_through_pytorch(grad, monkeypatch):
    query, key, bias, visible = inputs(2, 2, 4, 90, 8)
    bank = exact.Pool(key, torch.randn(2, 90, 3, device=DEVICE), bias, visible)
    learned = [query, torch.tensor(9.0, device=DEVICE), torch.tensor(4.0, device=DEVICE)]
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(exact, "has_kernel", lambda *_, kernel=kernel: kernel)
        parts = [part.clone().requires_grad_(grad) for part in learned]
        read, _, weights = exact.attend(*parts, -1.0, 5, bank, None)
        gradients = torch.autograd.grad(read.square().sum(), parts) if grad else ()
        results.append([read, weights, *gradients])
        assert (weights[..., 1:] <= weights[..., :-1]).all()  # the best first
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compilers_know_what_it_gives():
    args = (torch.tensor(9.0, device=DEVICE), torch.tensor(4.0, device=DEVICE), -1.0, 3)
    query, *bank = inputs(1, 1, 2, 20, 8)
    torch.library.opcheck(exact.find_and_weigh, (query, *args, *bank), test_utils=("test_schema", "test_faketensor"))


def test_it_is_used_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(exact, "_HAS_TRITON", True)
    assert not exact.has_kernel(torch.zeros(1, 1, 8), 4)
    if CUDA:
        assert exact.has_kernel(torch.zeros(1, 1, 8, device="cuda"), 4)
        assert not exact.has_kernel(torch.zeros(1, 1, 8, device="cuda"), 1000)


def test_keys_of_16_bits_are_the_same_numbers_in_32():
    query, key, bias, visible = inputs(2, 1, 3, 130, 16)
    key, temperature = key.bfloat16(), torch.tensor(9.0, device=DEVICE)
    found = [
        slot_kernel.find_and_weigh(query, temperature, temperature, -1.0, 5, part, bias, visible)
        for part in (key, key.float())
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
