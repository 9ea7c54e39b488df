"""The flow through memory against one parallel pass over the text, and against sets in plain Python."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memlm import laws
from memlm.analysis.efficiency import compute_memory_efficiency
from memlm.analysis.flow import memory_flow
from memlm.analysis.flow_figure import draw_flow, visualize_memory_flow
from memlm.analysis.memory_page import slot_table
from memlm.analysis.usage import banks
from memlm.memory import state as states
from tests.experiments.tiny import T, tiny

V = 30
TOKENIZER = SimpleNamespace(
    pad_id=0,
    vocab_size=V,
    decode=lambda ids: "".join(f"<{i}>" for i in ids),
    decode_each=lambda ids: [f"<{i}>" for i in ids],
    encode=lambda text: [ord(c) % V for c in text],
)
TEXT = torch.randint(V, (4 * T + 5,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model():
    return tiny(TOKENIZER, "ltm", "stm").eval()


@pytest.fixture(scope="module")
def flow(model):
    return memory_flow(model, [TEXT])


@torch.no_grad()
def test_reads_are_those_of_one_parallel_pass(model, flow):
    ids = torch.tensor([TEXT])
    out = model(ids)
    assert set(flow.reads) == set(out.reads)
    for key, read in out.reads.items():
        found, n = flow.reads[key], len(TEXT)
        weights = torch.where(read.slots >= 0, read.weights, 0.0)[0, :n]
        assert np.allclose(found.strength, (read.gate[0, :n] * weights.sum(dim=1)).numpy(), atol=1e-5)
        assert np.allclose(found.norm, read.value[0, :n].norm(dim=1).numpy(), atol=1e-4)
        for i in range(n):  # slot by slot: the order among equal weights is free
            expected = dict(zip(read.slots[0, i].tolist(), weights[i].tolist(), strict=True))
            for slot, weight in zip(found.slots[i].tolist(), found.weights[i].tolist(), strict=True):
                assert weight == pytest.approx(expected[slot] if slot >= 0 else 0.0, abs=1e-5)
            assert found.weights[i].tolist() == sorted(found.weights[i].tolist(), reverse=True)
    assert flow.strength[T:].min() > 0
    assert flow.reads["ltm/1"].strength[:T].max() == 0


@torch.no_grad()
def test_losses_and_gain_are_those_of_the_logits(model, flow):
    ids = torch.tensor([TEXT])
    for read, found in ((True, flow.nll), (False, flow.nll + flow.gain)):
        log_p = model(ids, read=read).logits[0].log_softmax(dim=-1)
        expected = [-log_p[i, TEXT[i + 1]].item() for i in range(len(TEXT) - 1)]
        assert np.allclose(found[:-1], expected, atol=1e-4)
    assert np.isnan(flow.nll[-1])
    assert flow.segment.tolist() == [i // T for i in range(len(TEXT))]


def test_every_slot_comes_from_the_text_before_the_segment_that_reads_it(model, flow):
    span = model.memory["ltm"][0].span
    n = 0
    for i, slots in enumerate(flow.reads["ltm/1"].slots):
        for slot in slots[slots >= 0].tolist():
            origin = flow.reads["ltm/1"].origins[flow.segment[i]][slot]
            assert origin.place < flow.segment[i] * T
            assert origin.segment < flow.segment[i]
            begin = max(origin.place - span + 1, 0)
            assert origin.text == TOKENIZER.decode(TEXT[begin : origin.place + 2])
            n += 1
    assert n > 100
    # a recurrent memory does not tell: all of its slots were written by the segment before
    for i, slots in enumerate(flow.reads["stm/1"].slots):
        for slot in slots[slots >= 0].tolist():
            origin = flow.reads["stm/1"].origins[flow.segment[i]][slot]
            assert (origin.place, origin.text, origin.segment) == (None, "", flow.segment[i] - 1)


@torch.no_grad()
def test_written_and_evicted_are_the_difference_of_the_places_held():
    model = tiny(TOKENIZER, "ltm", n_slot=20).eval()
    flow = memory_flow(model, [TEXT])
    state, held = model.init_state(1), set()
    writes = flow.writes["ltm/1"]
    for s in range(5):
        state = model(torch.tensor([TEXT[s * T : (s + 1) * T]]), state=state).state
        if s == 4:
            state = model.new_context(state)
        places = state.memory["ltm"][0].position[0]
        now = set(places[places >= 0].tolist())
        assert {origin.place for origin in writes.written[s]} == now - held
        assert {origin.place for origin in writes.evicted[s]} == held - now
        assert writes.n_filled[s] == len(now)
        held = now
    assert sum(map(len, writes.evicted)) > 5
    assert all(torch.equal(a, b) for a, b in zip(states.tensors(flow.state), states.tensors(state), strict=True))


@pytest.mark.parametrize("name", [name for name in laws.names() if laws.nodes_of(name)])
def test_every_memory_that_is_shipped_has_a_flow_a_table_and_costs(name):
    model = laws.builder(laws.nodes_of(name))()
    model.tokenizer = TOKENIZER
    n = 5 * model.segment_len
    flow = memory_flow(model, [laws.text(1, n), laws.text(1, 4)])
    assert len(flow.ids) == n + 4
    assert (flow.strength[-4:].min() > 0) == bool(
        flow.reads
    )  # some tell none
    assert np.abs(flow.gain[-4:-1]).max() > 0
    for label, (module, part) in banks(model, flow.state).items():
        writes = flow.writes[label]
        assert writes.n_filled[-1] == int(module.filled(part).sum()) > 0
        if module.places(part) is not None:  # what is written and not evicted is there
            assert sum(map(len, writes.written)) - sum(map(len, writes.evicted)) == writes.n_filled[-1]
    held = sum(int(module.filled(part).sum()) for module, part in banks(model, flow.state).values())
    assert len(slot_table(model, flow).rows) == min(held, 2000)
    assert 0 <= compute_memory_efficiency(model).parameter_share < 1


@torch.no_grad()
def test_a_new_context_leaves_memory_alone(model):
    told, asked = TEXT[: 2 * T + 3], TEXT[T : T + 6]
    flow = memory_flow(model, [told, asked])
    assert flow.context.tolist() == [0] * len(told) + [1] * len(asked)
    assert np.isnan(flow.nll[len(told) - 1])
    state = model.new_context(model(torch.tensor([told])).state)
    out = model(torch.tensor([asked]), state=state)
    log_p = out.logits[0].log_softmax(dim=-1)
    expected = [-log_p[i, asked[i + 1]].item() for i in range(len(asked) - 1)]
    assert np.allclose(flow.nll[len(told) : -1], expected, atol=1e-5)
    origins = flow.reads["ltm/1"].origins[flow.segment[-1]]
    assert {origin.place for origin in origins.values()} <= set(range(len(told)))
    # what was there before the text is said to be from before it
    again = memory_flow(model, [asked], state)
    assert {origin.segment for origin in again.reads["ltm/1"].origins[0].values()} == {None}
    assert {origin.place for origin in again.reads["ltm/1"].origins[0].values()} == {None}
    assert all(origin.text for origin in again.reads["ltm/1"].origins[0].values())


def test_the_model_is_left_as_it_was_also_with_a_shared_bank():
    model = tiny(TOKENIZER, "ltm", scope="shared")
    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flow = memory_flow(model, [TEXT])
    assert model.training
    assert flow.strength.max() > 0
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_shown_is_told(model):
    with pytest.raises(ValueError, match="no token"):
        memory_flow(model, [""])
    with pytest.raises(ValueError, match="contexts has no text: give at least one"):
        memory_flow(model, [])
    for contexts in ("text", None, 5, torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=r"contexts is a list of texts: give \[text\]"):
            memory_flow(model, contexts)
    for text in (None, b"text", ["a", "b"]):
        with pytest.raises(ValueError, match="a text is a str or its token ids, got"):
            visualize_memory_flow(model, text)
    with pytest.raises(ValueError, match="token ids are whole numbers, got float32"):
        memory_flow(model, [torch.rand(3)])
    for top in (-1, "3", 2.5):
        with pytest.raises(ValueError, match="top must be a whole number of at least 0, got"):
            memory_flow(model, [[1, 2]], top=top)
    with pytest.raises(ValueError, match=r"expected ids \(N,\) or \(1, N\), got \(2, 3\)"):
        memory_flow(model, [torch.zeros(2, 3, dtype=torch.long)])
    with pytest.raises(ValueError, match=r"token ids must be in 0..29, got 0..30"):
        memory_flow(model, [[0, 30]])


def test_the_figure_has_a_map_and_a_strip_for_each_layer(model, flow):
    figure = visualize_memory_flow(model, torch.tensor([TEXT]))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles.count("Reads of ltm/1") == titles.count("Reads of stm/1") == 1
    upper = figure.axes[titles.index("Reads of ltm/1")]
    dots = upper.collections[0].get_offsets()
    assert len(dots) > 50
    assert (dots[:, 1] < dots[:, 0]).all()  # made from earlier tokens
    assert upper.get_ylabel() == "made from token"
    assert figure.axes[titles.index("Reads of stm/1")].get_ylabel() == "slot"
    assert len(draw_flow(memory_flow(tiny(TOKENIZER), [TEXT])).axes) == 1
