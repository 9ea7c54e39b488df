"""Cells written by gradient against finite differences, and a loop that differentiates a transformer written out."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memlm import laws
from memlm.memory.contract import Needs
from memlm.memory.gradmem import GradientMemory
from memlm.memory.state import n_byte
from memlm.models.lmcode import LMCode
from memlm.models.lstm import LSTM
from memlm.models.segments import SegmentModel
from tests.memory.plain_attention import attend

pytestmark = pytest.mark.slow

T, M = laws.T, 2
MAKE = laws.builder(laws.nodes_of("gradmem"))


def written(n_step: int = 2, rate: float = 3.0, **model: Any) -> SegmentModel:
    return MAKE(memory={"n_cell": M, "n_step": n_step, "rate": rate}, **({"n_layer": 2} | model))


def memory_of(model: SegmentModel) -> GradientMemory:
    memory: Any = model.memory["gradmem"]
    return memory[0]


def changes(model: SegmentModel, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).state.memory["gradmem"][0].change


# --- the same, written out -------------------------------------------------------------------------------------------


def exact(model: SegmentModel) -> SegmentModel:
    """Its weights in double precision."""
    doubled = copy.deepcopy(model).double()
    memory_of(doubled).first.data = memory_of(model).first.data.double()
    return doubled


def stack(
    model: SegmentModel, ids: Tensor, cells: Tensor, before: list[Tensor] | None, head: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits (L, V) of one segment behind its cells; and by layer what entered it at the end, for the overlap."""
    x, ends, n = torch.cat([cells, model.embedding(ids) * model.d_model**0.5]), [], len(ids)
    for i, layer in enumerate(model.layers):
        past = x[:0] if before is None else before[i]
        seen = torch.cat([x[:M], past, x[M:]])
        nowhere = torch.full((M,), torch.nan)
        place, places = (torch.cat([nowhere, torch.arange(-o, n).float()]) for o in (0, len(past)))
        mask = ~(places > place[:, None])  # a place is after none that there is not
        mask[:M] = torch.arange(len(seen)) < M
        ends.append(x[len(x) - model.overlap :])
        x = attend(layer, x, seen, mask, place, places)
    return model.norm(x[M:]) @ (model.embedding.weight if head is None else head).T, ends


def nll(model: SegmentModel, ids: Tensor, cells: Tensor) -> Tensor:
    """Mean next-token loss of a segment alone."""
    logits, _ = stack(model, ids, cells, None, model.embedding.weight.detach())
    return -logits[:-1].log_softmax(dim=1)[torch.arange(len(ids) - 1), ids[1:]].mean()


def steps(model: SegmentModel, ids: Tensor, cells: Tensor, n_step: int, rate: float, graph: bool = True) -> Tensor:
    """The cells after a segment."""
    for _ in range(n_step):
        (gradient,) = torch.autograd.grad(nll(model, ids, cells), cells, create_graph=graph)
        cells = cells - rate * gradient
    return cells


def naive(model: SegmentModel, ids: Tensor, n_step: int, rate: float) -> tuple[Tensor, Tensor]:
    """Logits (L, V) of one row of whole segments, and the change of its cells after it."""
    first = memory_of(model).first
    cells, before, found = first, None, []
    for part in ids.split(T):
        logits, before = stack(model, part, cells, before)
        found.append(logits)
        cells = steps(model, part, cells, n_step, rate)
    return torch.cat(found), cells - first


@pytest.mark.parametrize("overlap", [0, 4])
@pytest.mark.parametrize("n_step", [1, 3])
def test_outputs_states_and_gradients_equal_the_naive_loop(n_step: int, overlap: int) -> None:
    model, ids = written(n_step, overlap=overlap), laws.text(2, 3 * T)
    twin = exact(model)
    out = model(ids)
    logits, change = (torch.stack(parts) for parts in zip(*(naive(twin, row, n_step, 3.0) for row in ids), strict=True))
    torch.testing.assert_close(out.logits, logits.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.state.memory["gradmem"][0].change, change.float(), atol=1e-4, rtol=0)
    assert change.abs().max() > 0.05
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    got, expected = (
        torch.autograd.grad((part * probe.to(part)).sum(), list(of.parameters()))
        for part, of in ((out.logits, model), (logits, twin))
    )
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-4 * float(b.abs().max()), rtol=0, msg=name)


def test_a_step_is_the_finite_difference_of_the_loss() -> None:
    model, ids = written(1, rate=1.0), laws.text(1, T)
    twin, first = exact(model), memory_of(model).first.detach().double()
    with torch.no_grad():
        got = changes(model, ids)[0]
        for i in range(0, first.numel(), 7):
            shift = torch.zeros_like(first)
            shift.view(-1)[i] = 1e-5
            slope = (nll(twin, ids[0], first + shift) - nll(twin, ids[0], first - shift)) / 2e-5
            assert abs(got.view(-1)[i] + slope) < 1e-5


def test_training_goes_through_the_steps_as_finite_differences_say() -> None:
    """A loss of the second segment, along a direction of the learned cells: half of it goes through the gradient."""
    model, ids = written(2), laws.text(1, 2 * T)
    memory, twin = memory_of(model), exact(model)
    draw = torch.Generator().manual_seed(3)
    along, probe = torch.randn(M, model.d_model, generator=draw), torch.randn(T, laws.N_VOCAB, generator=draw)
    (gradient,) = torch.autograd.grad((model(ids).logits[0, T:] * probe).sum(), memory.first)

    def loss(size: float) -> float:
        start = (memory.first.detach() + size * along).double().requires_grad_()
        _, before = stack(twin, ids[0, :T], start, None)
        cells = steps(twin, ids[0, :T], start, 2, 3.0, graph=False)
        return (stack(twin, ids[0, T:], cells, before)[0] * probe).sum().item()

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert abs(float((gradient * along).sum()) - slope) < 1e-3 * abs(slope)


@torch.no_grad()
def test_steps_lower_the_loss_of_their_segment() -> None:
    model, ids = written(4, rate=1.0), laws.text(3, T)
    memory, twin = memory_of(model), exact(model)
    change = changes(model, ids)
    for row, moved in zip(ids, change.double(), strict=True):
        first = memory.first.double()
        assert nll(twin, row, first + moved) < nll(twin, row, first) - 0.01


@torch.no_grad()
def test_without_steps_cells_stay_as_they_were_learned() -> None:
    model, ids = written(0), laws.text(2, 3 * T)
    assert not changes(model, ids).any()
    twin = exact(model)
    logits = torch.stack([naive(twin, row, 0, 1.0)[0] for row in ids])
    torch.testing.assert_close(model(ids).logits, logits.float(), atol=1e-4, rtol=0)


def test_writes_are_the_same_without_gradients_and_in_training() -> None:
    model, ids = written(), laws.text(2, 3 * T)
    found = [changes(model.train(mode), ids) for mode in (True, False)]
    assert found[0].requires_grad
    with torch.no_grad():
        found += [changes(model.train(mode), ids) for mode in (True, False)]
    assert not found[2].requires_grad
    with torch.inference_mode():
        half = model(ids[:, : T + 3])
        found.append(changes(model, ids[:, T + 3 :], state=half.state))
    for change in found[1:]:
        torch.testing.assert_close(change, found[0], atol=1e-5, rtol=0)
    model.requires_grad_(False)
    torch.testing.assert_close(changes(model, ids), found[0], atol=1e-5, rtol=0)


def test_recomputed_activations_change_no_gradient() -> None:
    found = []
    for again in (False, True):
        model = written(gradient_checkpointing=again).train()
        model(laws.text(2, 3 * T)).logits.square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_an_open_segment_runs_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, ran = written(), laws.text(2, T + 3), []
    real = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **k: ran.append(1) or real(*a, **k))
    state = model(ids[:, : T - 1]).state
    assert not ran
    state = model(ids[:, T - 1 :], state=state).state
    assert len(ran) == 2
    torch.testing.assert_close(state.memory["gradmem"][0].change, changes(model, ids))
    model.new_context(state)
    assert len(ran) == 6
    model.new_context(model(ids[:, :1]).state)  # no token has one after it
    assert len(ran) == 6


@torch.no_grad()
def test_a_short_segment_is_written_by_the_tokens_it_has() -> None:
    model, ids = written(1), laws.text(1, 5)
    twin, first = exact(model), memory_of(model).first.detach().double().requires_grad_()
    closed = model.new_context(model(ids).state).memory["gradmem"][0].change[0]
    with torch.enable_grad():
        cells = steps(twin, ids[0], first, 1, 3.0)
    torch.testing.assert_close(closed, (cells - first).float(), atol=1e-5, rtol=0)
    one = model.new_context(model(ids[:, :1]).state).memory["gradmem"][0].change
    assert not one.any()  # no token has one after it


@torch.no_grad()
def test_cells_stay_finite_over_many_segments() -> None:
    model = written(rate=30.0)
    state = model(laws.text(1, 200 * T), logits=False).state
    change = state.memory["gradmem"][0].change
    assert change.isfinite().all()
    assert model(laws.text(1, T), state=state).logits.isfinite().all()


def test_what_it_costs() -> None:
    model = written()
    assert n_byte(model.init_state(1).memory["gradmem"]) == M * model.d_model * 4
    memory = memory_of(model)
    d, n = model.d_model, model.n_layer
    cells = n * M * (24 * d**2 + 4 * d * M) // T
    alone = n * (24 * d**2 + 4 * d * T) + 2 * d * laws.N_VOCAB
    once = cells + 4 * M * d * n
    assert memory.flops_per_token() == once + 3 * 2 * (once + alone)


def test_what_cannot_work_is_refused_in_a_sentence() -> None:
    messages = {"n_cell": "n_cell must be at least 1, got -1", "n_step": "n_step must be at least 0, got -1",
                "rate": "rate must be above 0, got -1"}  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            MAKE(memory={name: -1})
    with pytest.raises(ValueError, match=r"'gradmem' needs context of attention.* choose model=lmcode"):
        laws.builder(laws.nodes_of("gradmem"), model_class=LSTM)()


def test_only_a_memory_around_the_stack_may_run_the_model() -> None:
    class Inside(GradientMemory):
        around = "layer"

    class Blind(GradientMemory):
        needs = Needs(nll=True)

    for cls in (Inside, Blind):
        with pytest.raises(ValueError, match="'mine' runs the model, so it must stand around the stack and need a con"):
            LMCode(laws.N_VOCAB, {"mine": cls}, **laws.MODEL)


@pytest.mark.parametrize("law", [laws.alive, laws.chunk_invariant, laws.contexts, laws.reach])
def test_laws_hold_beside_a_memory_in_a_layer(law: Callable[[laws.Make], None]) -> None:
    make = laws.builder({**laws.nodes_of("gradmem"), **laws.nodes_of("delta")})
    law(lambda memory=None, **model: make(memory={"n_step": 1, "GradientMemory.rate": 3.0} | (memory or {}), **model))
