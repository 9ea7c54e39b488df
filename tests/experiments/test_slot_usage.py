"""Slot usage, against hand-worked cases, plain loops, and the losses of a wiped memory."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments.needle import Needle, draw
from experiments.slot_usage import experiment
from experiments.slot_usage.experiment import run
from experiments.slot_usage.figures import plot
from experiments.slot_usage.settings import SlotUsage
from memlm.compose import compose
from memlm.config import ConfigError
from memlm.evaluation.recall import asking, reading, streams
from memlm.evaluation.result import Result
from memlm.statistics import effective
from tests.experiments.test_needle import Data
from tests.experiments.tiny import T, tiny

pytestmark = pytest.mark.slow

SMALL = SlotUsage(n_document=3, n_fact=4, distance=40, shares=[0.1, 0.5, 1.0])


@pytest.fixture(scope="module")
def data():
    return Data()


@pytest.fixture(scope="module")
def model(data):
    return tiny(data.tokenizer, "ltm", "stm")


@pytest.fixture(scope="module")
def result(model, data):
    return run(model, data, SMALL)


def rows_of(result, kind, **columns):
    return [r for r in result.rows if r["kind"] == kind and r["model"] == "trained"
            and all(r[name] == value for name, value in columns.items())]  # fmt: skip


@torch.no_grad()
def test_usage_equals_a_plain_loop(model, data, result):
    model.eval()
    documents, _, (length,) = draw(data, Needle(n_document=3, n_fact=4, distance=40), T)
    for i, document in enumerate(documents):  # each alone, bank by bank
        state = model.init_state(1)
        totals = {label: {key: np.zeros(n) for key in ("read", "even", "write")}
                  for label, n in {"ltm/1": 200, "stm/1": 5}.items()}  # fmt: skip
        entropies, weights = {label: [] for label in totals}, {label: [] for label in totals}
        for begin in range(0, length, T):
            ids = torch.from_numpy(document.tokens(begin, begin + T)).long()[None]
            out = model(ids, state=state)
            for label, total in totals.items():
                name = label[:3]
                module, before, after = model.memory[name][0], state.memory[name][0], out.state.memory[name][0]
                filled = module.filled(before)[0].numpy()
                for slots, found in zip(out.reads[label].slots[0], out.reads[label].weights[0], strict=True):
                    for slot, weight in zip(slots.tolist(), found.tolist(), strict=True):
                        total["read"][slot] += weight if slot >= 0 else 0.0
                        total["even"][filled] += weight / max(filled.sum(), 1)
                    share = (found / found.sum()).tolist() if found.sum() else []
                    if share:
                        entropies[label].append(-sum(p * math.log(p) for p in share if p > 0))
                    weights[label].append(float(found.sum()))
                total["write"] += (module.contents(after) - module.contents(before)).norm(dim=2)[0].numpy()
            state = out.state
        for label, total in totals.items():
            (row,) = rows_of(result, "use", bank=label, document=i)
            assert row["effective_reads"] == pytest.approx(effective(total["read"]), rel=1e-3)
            assert row["even_reads"] == pytest.approx(effective(total["even"]), rel=1e-3)
            assert row["effective_writes"] == pytest.approx(effective(total["write"]), rel=1e-3)
            assert row["even_writes"] == (total["write"] > 0).sum()
            assert row["reads_per_token"] == pytest.approx(math.exp(np.mean(entropies[label])), rel=1e-3)
            assert row["read_weight"] == pytest.approx(np.mean(weights[label]), rel=1e-3)
            assert row["effective_reads"] <= row["even_reads"] * 1.5
            module, last = model.memory[label[:3]][0], model.new_context(state).memory[label[:3]][0]
            assert row["filled"] == pytest.approx(float(module.filled(last).float().mean()))
            held = F.normalize(module.contents(last)[module.filled(last)], dim=1)
            pairs = [float(a @ b) for a, b in itertools.combinations(held, 2)]
            assert row["cosine"] == pytest.approx(np.mean(pairs), abs=1e-4)
            assert row["cosine_p95"] == pytest.approx(np.quantile(pairs, 0.95), abs=1e-4)


@torch.no_grad()
def test_without_any_slot_the_loss_is_that_of_a_wiped_memory(model, data, result):
    model.eval()
    documents, _, lengths = draw(data, Needle(n_document=3, n_fact=4, distance=40), T)
    (state,) = reading.read(model, documents, lengths)

    def losses(memory):
        return np.mean(
            [[nll for _, nll in asking.answer(model, memory, [d.facts[i] for d in documents])] for i in range(4)],
            axis=0,
        )

    before, after = losses(state), losses(model.wipe(state))
    for slots in ("top", "random"):
        rows = rows_of(result, "ablation", probe="answer", slots=slots, share=1.0)
        assert [row["nll"] for row in rows] == pytest.approx(before, abs=1e-4)
        assert [row["delta_nll"] for row in rows] == pytest.approx(after - before, abs=1e-4)
    assert max(abs(after - before)) > 1e-3
    assert result.metrics["ablation/answer/top"] == result.metrics["ablation/answer/top/1"]
    assert result.metrics["nll/answer"] == pytest.approx(before.mean(), abs=1e-4)


@torch.no_grad()
def test_the_slots_worth_most_are_forgotten_and_no_others(model, data):
    model.eval()
    documents, _, lengths = draw(data, Needle(n_document=3, n_fact=4, distance=40), T)
    (state,) = reading.read(model, documents, lengths)
    worth = {"ltm/1": torch.arange(200.0).expand(3, -1), "stm/1": -torch.arange(5.0).expand(3, -1)}
    (after,) = experiment._forget(model, [state], worth, 0.25)
    ltm, stm = model.memory["ltm"][0], model.memory["stm"][0]
    for row in range(3):
        held = ltm.filled(state.memory["ltm"][0])[row].nonzero()[:, 0].tolist()
        left = ltm.filled(after.memory["ltm"][0])[row].nonzero()[:, 0].tolist()
        assert left == held[: -math.ceil(len(held) / 4)]
    before, now = (stm.contents(s.memory["stm"][0]) for s in (state, after))
    assert not now[:, :2].any()  # 2 of 5
    assert torch.equal(now[:, 2:], before[:, 2:])
    orders = experiment._random_order(model, [state], 0)
    assert torch.equal(orders["ltm/1"], experiment._random_order(model, [state], 0)["ltm/1"])
    assert not torch.equal(orders["ltm/1"][0], orders["ltm/1"][1])


def test_heat_map_holds_every_segment_whole(result):
    for bank in ("ltm/1", "stm/1"):
        rows = rows_of(result, "bin", bank=bank)
        tokens = sorted({row["token"] for row in rows})
        assert tokens == list(range(0, result.metadata["n_token"], T))
        for token in tokens:
            part = [row for row in rows if row["token"] == token]
            assert sum(row["write"] for row in part) == pytest.approx(1.0, abs=1e-4)
            for key in ("read", "even"):  # nothing can be read in the first segment
                assert sum(row[key] for row in part) == pytest.approx(float(token > 0), abs=1e-4)


def test_without_memory_there_are_no_slots_and_nothing_is_lost(data):
    result = run(tiny(data.tokenizer), data, SMALL)
    assert {row["kind"] for row in result.rows} == {"ablation"}
    assert {row["delta_nll"] for row in result.rows} == {0.0}
    assert result.metadata["n_slot"] == {}
    assert list(plot(result)) == ["slot_usage"]


@pytest.mark.slow
def test_one_bank_for_all_rows_gives_each_document_its_own_copy(data):
    apart, shared = (run(tiny(data.tokenizer, "ltm", scope=scope), data, SMALL) for scope in ("sequence", "shared"))
    for name, value in apart.metrics.items():
        assert shared.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_same_seed_same_numbers_and_the_model_is_left_as_it_was(model, data, result):
    model.train()
    weights, before, shares = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state(), []
    assert run(model, data, SMALL, progress=shares.append) == result
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert {line["metric"] for line in result.metadata["headline"]} <= set(result.metrics)
    assert {line["low"] for line in result.metadata["headline"]} <= set(result.metrics)


def test_figures(result):
    figures = plot(result)
    assert list(figures) == ["slot_usage_heatmap", "slot_usage"]
    meshes = [mesh for axes in figures["slot_usage_heatmap"].axes for mesh in axes.collections]
    assert len([axes for axes in figures["slot_usage_heatmap"].axes if axes.get_title(loc="left")]) == 4
    assert meshes
    assert len(figures["slot_usage"].axes) == 3
    assert plot(Result("slot_usage", {})) == {}
    assert experiment.summarise([]) == {}


def test_documents_side_by_side_take_the_memory_of_the_next(model):
    model.eval()
    ids = torch.arange(3 * 2 * T).view(3, 2 * T) % 50 + 1
    with torch.no_grad():
        states = [out.state for out in streams.go_on(model, ids, streams.start(model, 3))]
        (swapped,) = streams.swap(model, states, states, 3)
    assert torch.equal(swapped.local.ids, states[0].local.ids)
    slot = states[0].memory["stm"][0].slot
    assert torch.equal(swapped.memory["stm"][0].slot, slot[[1, 2, 0]])


def test_yaml_settings_and_refusals():
    node = dict(compose(["checkpoint=x", "experiment=slot_usage"], "evaluate").slot_usage)
    assert node.pop("_target_") == "experiments.slot_usage.SlotUsage"
    assert SlotUsage(**node) == SlotUsage()
    wrong = {"n_document": 1, "n_fact": 0, "distance": -1, "n_pair": 1, "split": "train", "seed": -1}
    for name, value in (*wrong.items(), ("shares", []), ("shares", [0.5, 0.1]), ("shares", [0.0]), ("shares", [2.0])):
        with pytest.raises(ConfigError, match=f"slot_usage.{name}"):
            SlotUsage(**{name: value})
