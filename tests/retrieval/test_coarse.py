import pytest
import torch
from torch.nn import functional as F

from memlm.retrieval import coarse, exact
from memlm.retrieval.exact import Pool


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(coarse, "_LEAST", 100)


def units(*shape, seed, spread=1.0, near=None):
    g = torch.Generator().manual_seed(seed)
    noise = F.normalize(torch.randn(*shape, generator=g), dim=-1)
    if near is None:
        return noise
    chosen = near[torch.randint(len(near), shape[:-1], generator=g)]
    return F.normalize(chosen + spread * noise, dim=-1)


def banks(kind, n_row=2, n_slot=701, n_segment=2, width=12):
    g = torch.Generator().manual_seed(5)
    centres = units(4, width, seed=1)
    spread = {"random": None, "clustered": 0.3, "closer than a step": 1e-3, "equal": 0.0}[kind]
    near = None if spread is None else centres
    key = units(n_row, n_slot, width, seed=2, spread=spread or 0.0, near=near)
    query = units(n_row, n_segment * 40, width, seed=3, spread=0.3, near=near)
    bias = -2 * torch.rand(n_row, n_slot, generator=g)
    if kind == "closer than a step":
        bias = torch.zeros_like(bias)
    return query, Pool(key, key, bias, torch.rand(n_row, n_segment, n_slot, generator=g) < 0.8)


def expected(query, pool, heat, k):
    """Scores of the best, in 64 bits, best first."""
    score = heat * (query.double() @ pool.key.double().mT) + pool.bias[:, None].double()
    visible = pool.visible.repeat_interleave(query.shape[1] // pool.visible.shape[1], dim=1)
    return score.masked_fill(~visible, -torch.inf), score.masked_fill(~visible, -torch.inf).topk(k, dim=2).values


def is_right(query, pool, heat=12.0, k=4):
    score, index = exact.search(query, torch.tensor(heat), -1.0, k, pool)
    all_scores, best = expected(query, pool, heat, k)
    torch.testing.assert_close(score.double().sort(dim=2, descending=True).values, best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(all_scores.gather(2, index), score.double(), rtol=1e-5, atol=1e-5)
    assert all(len(set(found.tolist())) == k for found in index[score.amin(dim=2) > -torch.inf])


@pytest.fixture
def sure(monkeypatch):
    """Counts queries of which it was not known at first that their slots are the best, and in the end."""
    count, best, again = {"at first": 0, "in the end": 0}, coarse.best, coarse._look_again

    def counted(*given):
        found = best(*given)
        count["in the end"] += int((~found[2]).sum())
        return found

    def looked(query, key, hidden, score, least, is_sure, *rest):
        count["at first"] += int((~is_sure).sum())
        again(query, key, hidden, score, least, is_sure, *rest)

    monkeypatch.setattr(coarse, "best", counted)
    monkeypatch.setattr(coarse, "_look_again", looked)
    return count


@pytest.mark.parametrize("alone", [0, 2**16], ids=["in groups", "at once"])
@pytest.mark.parametrize("kind", ["random", "clustered", "closer than a step", "equal"])
def test_finds_the_best(kind, alone, monkeypatch, sure):
    monkeypatch.setattr(coarse, "_ALONE", alone)
    is_right(*banks(kind))
    assert sure["in the end"] == 0
    assert sure["at first"] > 0 or kind in ("random", "clustered")


def test_by_all_scores_where_too_many_may_be_the_best(monkeypatch, sure):
    monkeypatch.setattr(coarse, "_ALSO", 0)
    is_right(*banks("closer than a step"))
    assert sure["in the end"] > 0


def test_without_the_bound_wrong_slots_would_be_found(monkeypatch):
    query, pool = banks("closer than a step")
    made = coarse.coarse
    monkeypatch.setattr(coarse, "coarse", lambda *given: made(*given)._replace(by_sum=torch.full((2, 1, 1), -1e3)))
    with pytest.raises(AssertionError):
        is_right(query, pool)


@pytest.mark.parametrize("n_visible", [0, 1, 3, 11, 13])
def test_few_slots_that_may_be_read(n_visible):
    query, pool = banks("random")
    visible = torch.zeros_like(pool.visible)
    visible[:, :, 50 : 50 + n_visible] = True
    is_right(query, pool._replace(visible=visible))


def test_one_bank_for_all_rows():
    query, pool = banks("random", n_row=3)
    one = Pool(*(part[:1] for part in pool[:4]))
    score, index = exact.search(query, torch.tensor(12.0), -1.0, 4, one)
    each = exact.search(
        query, torch.tensor(12.0), -1.0, 4, Pool(*(part.expand(3, *part.shape[1:]) for part in one[:4]))
    )
    assert torch.equal(score, each[0])
    assert torch.equal(index, each[1])
    torch.testing.assert_close(
        score.double().amax(dim=2), expected(query, one, 12.0, 4)[1][..., 0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_keys_and_queries_of_any_length(scale):
    query, pool = banks("clustered")
    is_right(scale * query, pool._replace(key=scale * pool.key))


@pytest.mark.parametrize("heat", [1e-3, 0.3, 40.0])
def test_at_any_temperature(heat):
    is_right(*banks("clustered"), heat=heat)


def test_a_score_does_not_depend_on_other_queries():
    query, pool = banks("clustered", n_segment=1)
    heat = torch.tensor(12.0)
    pool = pool._replace(coarse=coarse.coarse(pool.key, exact.hidden_by(pool), heat))
    together = exact.search(query, heat, -1.0, 4, pool)[0].sort(dim=2).values
    for n in (1, 5):
        alone = exact.search(query[:, 3 : 3 + n], heat, -1.0, 4, pool)[0].sort(dim=2).values
        assert torch.equal(alone, together[:, 3 : 3 + n])


def test_the_first_slots_of_larger_banks():
    query, pool = banks("random")
    part = Pool(pool.key[:, :500], pool.value[:, :500], pool.bias[:, :500], pool.visible[..., :500])
    is_right(query, part)
    whole = Pool(*(field.contiguous() for field in part[:4]))
    how = (torch.tensor(12.0), torch.tensor(0.5), -1.0, 4)
    assert torch.equal(exact.attend(query, *how, part, None)[0], exact.attend(query, *how, whole, None)[0])


@pytest.mark.parametrize("where", ["query", "key", "bias"])
def test_numbers_that_are_none_stop_nothing(where):
    query, pool = banks("random")
    if where == "query":
        query[0, 3] = torch.nan
    else:
        getattr(pool, where)[0, 3] = torch.nan
    score, index = exact.search(query, torch.tensor(12.0), -1.0, 4, pool)
    assert index.min() >= 0
    assert index.max() < 701
    assert bool(score.isnan().any()) or where != "query"


@pytest.mark.parametrize("kind", ["random", "clustered", "closer than a step", "equal"])
def test_finds_the_best_of_keys_of_16_bits(kind, monkeypatch, sure):
    query, pool = banks(kind)
    pool = pool._replace(key=pool.key.bfloat16(), value=pool.value.bfloat16())
    is_right(query, pool)
    assert sum(sure.values()) > 0 or kind in ("random", "clustered")
    monkeypatch.setattr(coarse, "_ALSO", 0)  # by all scores
    is_right(query, pool)
