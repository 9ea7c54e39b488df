"""A memory from outside the checkout: one module, one YAML, trained by `train.py` and put before the laws."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memlm import laws
from memlm.compose import compose, to_dict
from tests.training.small import overrides

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

MODULE = '''
"""The k best of the last keys and values of each head, mixed with its attention (a Memorizing Transformer)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.contract import Memory, Mixer, Needs, Read, Segment, Sizes, Trace
from memlm.memory.state import where_rows


class MineState(NamedTuple):
    """The last keys and values."""

    kv: Tensor  # (B, 2, H, n, E)
    full: Tensor  # (B, n)


class Mine(Memory):
    """Keys and values of the last tokens, of which each query finds the best.

    Args:
        d_model: Width of the hidden states.
        sizes: Sizes of the model.
        n_token: Tokens that are kept.
        k: Tokens that a query finds.
    """

    needs = Needs(heads=True)

    def __init__(self, d_model: int, sizes: Sizes, n_token: int = 64, k: int = 4) -> None:
        super().__init__()
        self.n_token, self.k, self.shape = n_token, k, (2, sizes.n_head, n_token, d_model // sizes.n_head)
        self.gate = nn.Parameter(torch.zeros(sizes.n_head, 1, 1))

    def init_state(self, n_row: int) -> MineState:
        kv = self.gate.new_zeros(n_row, *self.shape)
        return MineState(kv, torch.zeros(n_row, self.n_token, dtype=torch.bool, device=kv.device))

    def mix(self, x: Tensor, prepared: MineState, mixer: Mixer) -> tuple[Tensor, Read | None]:
        heads = mixer.heads(x)
        key, value = prepared.kv.unbind(1)
        score = heads.q @ key.mT / key.shape[-1] ** 0.5  # (B, H, T, n)
        score = score.masked_fill(~prepared.full[:, None, None], -1e9)
        best = torch.zeros_like(score, dtype=torch.bool).scatter(3, score.topk(self.k, dim=3).indices, True)
        weight = score.masked_fill(~best, -torch.inf).softmax(dim=3)
        gate = self.gate.sigmoid() * prepared.full.any(dim=1)[:, None, None, None]
        return mixer.out(gate * (weight @ value) + (1 - gate) * mixer.attend(heads), x), None

    def write(self, segment: Segment, state: MineState) -> tuple[MineState, Trace]:
        kv = torch.cat([state.kv, torch.stack([segment.heads.k, segment.heads.v], dim=1)], dim=3)
        full = torch.cat([state.full, segment.valid], dim=1)
        last = full.long().argsort(dim=1, stable=True)[:, -self.n_token :]
        kv = (kv * full[:, None, None, :, None]).take_along_dim(last[:, None, None, :, None], dim=3)
        return where_rows(segment.complete[:, 0], MineState(kv, full.gather(1, last)), state), {}
'''
YAML = """
mine:
  _target_: mine.Mine
  n_token: 64
  k: 4
"""
LAWS: list[Callable[[laws.Make], None]] = [
    laws.alive, laws.causal, laws.isolated, laws.chunk_invariant, laws.ragged, laws.generates_as_parallel,
    laws.schedules_agree, laws.contexts, laws.resets, laws.pure, laws.reach, laws.every_parameter_learns,
    laws.admits, laws.round_trip, laws.useful,
]  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the module and the YAML."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "mine.py").write_text(MODULE)
    (folder / "configs/memory").mkdir(parents=True)
    (folder / "configs/memory/mine.yaml").write_text(YAML)
    return folder


def test_it_is_trained_from_the_command_line(elsewhere: Path) -> None:
    settings = [
        setting for setting in overrides(elsewhere, "none") if not setting.startswith(("memory=", "trainer.max"))
    ]
    command = ["train.py", "--config-dir", str(elsewhere / "configs"), "memory=mine", *settings]
    command += ["trainer.max_steps=2", "trainer.limit_val_batches=0", "experiment=[]", "memory.mine.n_token=40"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(elsewhere)))}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.rglob("step=2.ckpt")), done.stdout


@pytest.fixture
def nodes(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[laws.Nodes]:
    """What the YAML says, while its module can be imported."""
    monkeypatch.syspath_prepend(str(elsewhere))
    yield to_dict(compose(["memory=mine"], searchpath=[elsewhere / "configs"]).memory)
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("law", LAWS, ids=[law.__name__ for law in LAWS])
def test_it_keeps_the_laws(nodes: laws.Nodes, law: Callable[[laws.Make], None]) -> None:
    law(laws.builder(nodes, shrink=False))


def test_it_stays_bounded(nodes: laws.Nodes) -> None:
    laws.bounded(laws.builder(nodes, shrink=False))


def test_it_is_described(nodes: laws.Nodes) -> None:
    laws.described(nodes)
