"""Pretrained decoders with memory: against the bare base, the laws, checkpoints, errors."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memlm import laws
from memlm.models.segments import SegmentModel
from tests.laws import test_laws
from tests.models import bases

transformers = pytest.importorskip("transformers")

from memlm.models.pretrained import Pretrained  # noqa: E402

pytestmark = pytest.mark.slow

T, OVERLAP = 12, 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a tiny base of a family is."""
    return functools.cache(lambda family: bases.make_base(family, tmp_path_factory.mktemp("bases")))


def make_of(path: Path, name: str, **settings: Any) -> laws.Make:
    settings = {"path": str(path), "freeze": False} | settings
    return laws.builder(laws.nodes_of(name), model_class=functools.partial(Pretrained, **settings))  # type: ignore[arg-type]


def text(n_row: int, n_token: int, seed: int = 0) -> Tensor:
    return torch.randint(bases.N_VOCAB, (n_row, n_token), generator=torch.Generator().manual_seed(seed))


def by_base(base: Any, ids: Tensor, begin: list[int], overlap: int = OVERLAP) -> Tensor:
    """Logits of the bare base, segment by segment: each a text of its own, with the overlap before it."""
    found = []
    for start in range(0, ids.shape[1], T):
        first = max(start - overlap, 0)
        window = ids[:, first : start + T]
        window = torch.cat([torch.tensor(begin, dtype=torch.long).expand(len(ids), -1), window], dim=1)
        found.append(base(window).logits[:, len(begin) + start - first :])
    return torch.cat(found, dim=1)


# --- the law of pretrained models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", bases.FAMILIES)
@torch.no_grad()
def test_without_memory_logits_are_those_of_the_base(family: str, folder: Callable[[str], Path]) -> None:
    base, ids = bases.loaded(folder(family)), text(2, 3 * T + 5)
    model = Pretrained(40, {}, path=str(folder(family)), segment_len=T, overlap=OVERLAP).eval()
    torch.testing.assert_close(model(ids).logits, by_base(base, ids, []), atol=1e-5, rtol=1e-4)
    state, parts = None, []
    for part in ids.split([1, 1, 12, 3, 20, 4], dim=1):
        out = model(part, state=state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), by_base(base, ids, []), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", bases.FAMILIES)
@torch.no_grad()
def test_one_segment_is_the_base_bit_for_bit(family: str, folder: Callable[[str], Path]) -> None:
    base, ids = bases.loaded(folder(family)), text(2, T)
    model = Pretrained(40, {}, path=str(folder(family)), segment_len=T, overlap=0).eval()
    assert torch.equal(model(ids).logits, base(ids).logits)


def nonzero_gates(model: SegmentModel) -> None:
    for gate in model.gates.values():  # type: ignore[operator, union-attr]
        gate.data.fill_(0.5)


@pytest.mark.parametrize("name", ["ltm", "stm", "delta", "auto", "imm", "memoria", "lm2", "hierarchy", "adaptive"])
@torch.no_grad()
def test_reads_begin_at_zero(name: str, folder: Callable[[str], Path]) -> None:
    """Whatever an untrained memory holds, logits are those of the base, bit for bit; and not once it is let in."""
    model, ids = make_of(folder("llama"), name)(perturb=False), text(2, 5 * T)
    bare = Pretrained(40, {}, path=str(folder("llama")), segment_len=T, overlap=OVERLAP).eval()
    for n_open in (0, 5):
        state = laws.filled(model, n_row=2, n_open=n_open)
        start = bare(laws.text(2, 7 * T + n_open, seed=9)).state
        assert torch.equal(model(ids, state=state).logits, bare(ids, state=start).logits)
    nonzero_gates(model)
    assert not torch.allclose(model(ids, state=state).logits, bare(ids, state=start).logits)


@pytest.mark.parametrize("name", ["cache", "camelot", "compressive"])
@torch.no_grad()
def test_more_keys_change_nothing_while_there_are_none(name: str, folder: Callable[[str], Path]) -> None:
    model, ids = make_of(folder("llama"), name)(perturb=False), text(2, 4 * T)
    bare = Pretrained(40, {}, path=str(folder("llama")), segment_len=T, overlap=OVERLAP).eval()
    torch.testing.assert_close(model(ids[:, :T]).logits, bare(ids[:, :T]).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(ids).logits, bare(ids).logits, atol=1e-3)


# --- the laws --------------------------------------------------------------------------------------------------------

NAMES = ["none", "ltm", "stm", "cache", "delta"]
LAWS = [law for law in [*test_laws.LAWS, laws.closed_once]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", LAWS)
def test_laws_hold(law: Callable[[laws.Make], None], name: str, folder: Callable[[str], Path]) -> None:
    law(make_of(folder("llama"), name))
