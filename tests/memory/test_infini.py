"""Infini-attention against linear attention to all earlier segments, which has no matrix, and values by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import build, laws
from memlm.config import ConfigError
from memlm.memory.contract import Heads, Segment, Sizes
from memlm.memory.infini import InfiniMemory, InfiniState, positive
from memlm.memory.state import n_byte
from memlm.models.segments import SegmentModel
from tests.memory.gradients import gradients, same_gradients
from tests.memory.plain_attention import behind, heads_of, scores
from tests.memory.segments import segment_of

pytestmark = pytest.mark.slow

T = laws.T
MAKE = laws.builder(laws.nodes_of("infini"))
RULES = ["linear", "delta"]


def infini(rule: str = "linear", **model: Any) -> SegmentModel:
    return MAKE(memory={"rule": rule}, **({"memory_layers": "all"} | model))


def memory_of(rule: str, n_head: int, width: int) -> InfiniMemory:
    return InfiniMemory(n_head * width, Sizes(n_head * width, n_head, 1, 8, 0, 10), rule=rule)  # type: ignore[arg-type]


def written(memory: InfiniMemory, state: InfiniState, k: Tensor, v: Tensor, n_valid: int | None = None) -> InfiniState:
    """The state after a segment of keys and values (B, H, T, E)."""
    segment: Segment = segment_of(torch.zeros(len(k), k.shape[2], 1), None if n_valid is None else [n_valid] * len(k))
    return memory.write(segment._replace(heads=Heads(k, k, v)), state)[0]


def naive(model: SegmentModel, ids: Tensor, segments: list[tuple[int, int, bool]], rule: str) -> Tensor:
    """Logits (L, V) of one row, layer by layer and segment by segment.

    Args:
        model: Its weights.
        ids: Token ids, (L,).
        segments: First token, the one after the last, and whether a context begins.
        rule: How values are written.
    """
    memories: Any = model.memory["infini"]
    x = model.embedding(ids) * model.d_model**0.5
    for layer, memory in zip(model.layers, memories, strict=True):
        q, k, v = heads_of(layer, x)  # (H, L, E)

        def similar(a: Tensor, b: Tensor) -> Tensor:
            a, b = (torch.where(part > 0, part + 1, part.exp()) for part in (a, b))
            return (a[:, :, None] * b[:, None]).sum(dim=3)

        new, found = v, []  # `new`: what each token wrote
        for begin, end, fresh in segments:
            first = begin if fresh else max(0, begin - model.overlap)
            place, seen = torch.arange(begin, end), torch.arange(first, end)
            here = scores(q[:, begin:end], k[:, first:end], seen <= place[:, None], place - begin, seen - begin)
            local = here.softmax(dim=2) @ v[:, first:end]
            known = torch.zeros_like(local)
            if begin:
                weight = similar(q[:, begin:end], k[:, :begin])
                known = weight @ new[:, :begin] / weight.sum(dim=2, keepdim=True)
                if rule == "delta":
                    weight = similar(k[:, begin:end], k[:, :begin])
                    under = weight @ new[:, :begin] / weight.sum(dim=2, keepdim=True)
                    new = torch.cat([new[:, :begin], v[:, begin:end] - under, new[:, end:]], dim=1)
            gate = 1 / (1 + (-memory.gate[:, None, None]).exp())
            found.append(gate * known + (1 - gate) * local)
        x = behind(layer, x, torch.cat(found, dim=1))
    return model.norm(x) @ model.embedding.weight.T


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("overlap", [0, 4])
def test_outputs_and_gradients_equal_attention_to_all_earlier_segments(rule: str, overlap: int) -> None:
    model, ids = infini(rule, overlap=overlap), laws.text(2, 5 * T)
    got = model(ids).logits
    expected = torch.stack([naive(model, row, [(s * T, (s + 1) * T, s == 0) for s in range(5)], rule) for row in ids])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    same_gradients(gradients(model, got), gradients(model, expected))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_it_goes_on_over_the_end_of_a_context_but_not_of_a_document(rule: str) -> None:
    model, ids = infini(rule), laws.text(1, 5 * T)
    edges = [0, T, 2 * T, 3 * T - 2, 4 * T - 2, 4 * T + 3]  # the third segment ends early
    segments = [(edges[s], edges[s + 1], s in (0, 3)) for s in range(5)]
    expected = naive(model, ids[0, : edges[-1]], segments, rule)
    told = model(ids[:, : edges[3]])
    state, asked = model.new_context(told.state), ids[:, edges[3] : edges[-1]]
    got = model(asked, state=state).logits
    torch.testing.assert_close(torch.cat([told.logits, got], dim=1)[0], expected, atol=1e-4, rtol=0)
    fresh = model(asked, state=state, reset=torch.tensor([True])).logits
    torch.testing.assert_close(fresh, model(asked).logits)


def test_both_rules_by_hand() -> None:
    """ELU + 1 makes (1, 1) of the key (0, 0), and (2, 1) of (1, 0)."""
    k, v = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 4.0], [5.0, 1.0]])
    second = {"linear": [[12.0, 6.0], [7.0, 5.0]], "delta": [[8.0, -2.0], [5.0, 1.0]]}
    for rule in RULES:
        memory = memory_of(rule, 1, 2)
        state = memory.init_state(1)
        assert not state.under(positive(k[None, None])).any()  # nothing is known at first
        state = written(memory, state, k[None, None, :1], v[None, None, :1])
        assert state.matrix[0, 0].tolist() == [[2, 4], [2, 4]]
        assert state.under(positive(k[None, None]))[0, 0].tolist() == [[2, 4], [2, 4]]
        state = written(memory, state, k[None, None].flip(2), v[None, None].flip(2), n_valid=1)
        assert state.matrix[0, 0].tolist() == second[rule]
        assert state.total[0, 0].tolist() == [3, 2]


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_matrix_of_infini_transformer_pytorch(rule: str) -> None:
    theirs = pytest.importorskip("infini_transformer_pytorch.infini_transformer")
    memory, other = memory_of(rule, 2, 5), theirs.FastweightMemory(2, use_mem_delta_rule=rule == "delta")
    draw = torch.Generator().manual_seed(0)
    state, expected = memory.init_state(3), None
    for _ in range(4):
        q, k, v = torch.randn(3, 3, 2, 7, 5, generator=draw)
        if expected is not None:
            known = theirs.retrieve_from_kv_memories(F.elu(q) + 1, expected)
            torch.testing.assert_close(state.under(positive(q)), known)
        state, expected = written(memory, state, k, v), other.create_new_memories(k, v, expected)
        torch.testing.assert_close(state.matrix, expected.kv_mem)
        torch.testing.assert_close(state.total, expected.k_norm)


@torch.no_grad()
def test_reads_off_is_attention_alone() -> None:
    model, none, ids = infini(), laws.builder({})(), laws.text(2, 3 * T)
    none.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory")})
    torch.testing.assert_close(model(ids, read=False).logits, none(ids).logits)


@torch.no_grad()
def test_gates_begin_at_the_setting_and_are_told_head_by_head() -> None:
    model = MAKE(memory={"gate": 0.2}, perturb=False)
    trace = model(laws.text(2, 3 * T)).trace["infini"]
    assert list(trace) == ["gate_0", "gate_1", "gate_2", "gate_3"]
    torch.testing.assert_close(torch.stack(list(trace.values())), torch.full((4,), 0.2))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_the_matrix_is_worked_out_in_full_precision_under_autocast(rule: str) -> None:
    memory = memory_of(rule, 2, 5)
    k, v = torch.randn(2, 3, 2, 7, 5, generator=torch.Generator().manual_seed(0))
    exact = written(memory, written(memory, memory.init_state(3), k, v), k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = written(memory, written(memory, memory.init_state(3), k, v), k, v)
        model = infini(rule)
        out = model(laws.text(2, 3 * T))
    torch.testing.assert_close(mixed, exact)
    assert out.state.memory["infini"][0].matrix.dtype == torch.float32
    torch.testing.assert_close(out.logits.float(), model(laws.text(2, 3 * T)).logits, atol=0.2, rtol=0.05)


def test_what_it_costs() -> None:
    model = infini()
    d_model, width = model.d_model, model.d_model // 4
    assert [n_byte(part) for part in model.init_state(1).memory["infini"]] == [4 * d_model * (width + 1)] * 3
    for rule, n_product in {"linear": 2, "delta": 3}.items():
        made = 3 * d_model**2  # queries, keys and values of what is written
        product = 4 * width * (width + 1)  # in four heads, with a matrix and a vector
        assert memory_of(rule, 4, width).flops_per_token() == 2 * (made + n_product * product)


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    for setting, message in {"rule=hebb": "rule must be 'linear' or 'delta'", "gate=1": r"gate must be in \(0"}.items():
        with pytest.raises(ConfigError, match=rf"memory\.infini\.{message}"):
            build("memory=infini", f"memory.infini.{setting}", "data.tokenizer.kind=byte")
    with pytest.raises(ConfigError, match=r"'infini' needs heads of attention.* choose model=lmcode"):
        build("model=lstm", "memory=infini", "data.tokenizer.kind=byte")


@pytest.mark.parametrize(
    "law",
    [
        laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.schedules_agree, laws.contexts,
        laws.resets, laws.reach, laws.every_parameter_learns, laws.bounded,
    ],
)  # fmt: skip
def test_laws_hold_for_the_delta_rule(law: Callable[[laws.Make], None]) -> None:
    law(lambda memory=None, **model: MAKE(memory={"rule": "delta"} | (memory or {}), **model))


def test_the_delta_rule_is_useful() -> None:
    make = laws.builder(laws.nodes_of("infini"), shrink=False)
    laws.useful(lambda memory=None, *args, **model: make({"rule": "delta"} | (memory or {}), *args, **model))
