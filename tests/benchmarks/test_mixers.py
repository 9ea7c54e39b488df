"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import mixer_peers, mixers
from benchmarks.candidates import Setup
from memlm.app import benchmark
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import TINY, hide

pytestmark = pytest.mark.slow

N_PARAMETER = 60_000
OVERRIDES = [
    *(line for line in TINY if "n_layer" not in line), "model.n_layer=3",
    "memory.delta.d_key=8", "memory.delta.d_value=8",
]  # fmt: skip


def config(*overrides: str) -> dict[str, Any]:
    quoted = ",".join(f'"{line}"' for line in OVERRIDES)
    tiny = [
        "benchmark=mixers", "memories=[delta,ltm]", "peers=[]", f"overrides=[{quoted}]", "n_row=2", "n_segment=2",
        "n_read=72", "n_generate=20", "rounds=3", "warmup=1", f"n_parameter={N_PARAMETER}",
    ]  # fmt: skip
    return to_dict(compose([*tiny, *overrides], "benchmark"))


def ours(name: str) -> mixers.Ours:
    setup = Setup(mixers.memory_config(name, N_PARAMETER, OVERRIDES), 2, 2, "cpu", "fp32", False, 0)
    return mixers.Ours(name, setup, 72)


def test_memories_are_measured_beside_none_at_equal_parameters() -> None:
    result, text = benchmark.run(config())
    metrics, names = result.metrics, ["none", "delta", "ltm"]
    assert len(result.rows) == 3 * 2 * 3
    for name in names:
        rows = {what: [row for row in result.rows if (row["candidate"], row["what"]) == (name, what)]
                for what in ("train", "generate")}  # fmt: skip
        assert [row["round"] for row in rows["train"]] == [row["round"] for row in rows["generate"]] == [0, 1, 2]
        assert {row["tokens"] for row in rows["train"]} == {2 * 2 * 16}
        assert {row["tokens"] for row in rows["generate"]} == {20}
        speeds = [64 / row["seconds"] for row in rows["train"]]
        assert metrics[f"{name}/tokens_per_s"] == pytest.approx(statistics.median(speeds))
        times = [1000 * row["seconds"] / 20 for row in rows["generate"]]
        assert metrics[f"{name}/ms_per_token"] == pytest.approx(statistics.median(times))
        assert metrics[f"{name}/parameters"] == pytest.approx(N_PARAMETER, rel=0.01)
        assert name in text
    by_round = [
        {row["candidate"]: row["seconds"] for row in result.rows if (row["round"], row["what"]) == (i, "train")}
        for i in range(3)
    ]
    ratios = [seconds["none"] / seconds["delta"] for seconds in by_round]
    assert metrics["delta/vs_none"] == pytest.approx(statistics.median(ratios))
    assert metrics["none/vs_none"] == metrics["none/generate_vs_none"] == 1
    assert (metrics["none/state_bytes"], metrics["delta/state_bytes"] > 2 * 8 * 8 * 4 - 1) == (0, True)


def test_memories_are_found_by_their_configs() -> None:
    assert mixers.memory_names(None) == sorted(path.stem for path in (config_dir() / "memory").glob("*.yaml"))
    with pytest.raises(ConfigError, match=r"memories names 'delt'\. Did you mean 'delta'"):
        mixers.memory_names(["delt"])
    with pytest.raises(ConfigError, match="each once"):
        mixers.memory_names(["ltm", "ltm"])
    with pytest.raises(ConfigError, match="overrides changes 'memory=ltm'"):
        mixers.memory_config("ltm", N_PARAMETER, ["memory=ltm"])


def test_what_was_read_before_is_remembered_in_training_and_generation() -> None:
    candidate = ours("ltm")
    [module], [bank] = candidate.candidate.model.memory["ltm"], candidate.candidate.state.memory["ltm"]
    assert (module.filled(bank).sum(dim=1) == 4 * 4).all()  # 72 tokens end four segments of 16, 4 slots each
    assert module.filled(candidate.state.memory["ltm"][0]).shape[0] == 1
    heard = []
    model: Any = candidate.candidate.model
    model.generate = lambda prompt, **settings: heard.append(settings["state"]) or torch.zeros(1, prompt.shape[1] + 5)
    assert candidate.generate(torch.zeros(1, 3, dtype=torch.long), 5)
    assert heard == [candidate.state]


def test_a_memory_that_does_nothing_is_no_evidence() -> None:
    candidate = ours("delta")
    candidate.check("delta")
    [module] = candidate.candidate.model.memory["delta"]
    with torch.no_grad():
        module.to_output.weight.zero_()
    with pytest.raises(ValueError, match="delta read nothing"):
        candidate.check("delta")
    candidate = ours("delta")
    model: Any = candidate.candidate.model
    real, state = model.forward, candidate.candidate.state

    def forgets(*args: Any, **settings: Any) -> Any:
        return real(*args, **settings)._replace(state=state)

    model.forward = forgets
    with pytest.raises(ValueError, match="delta wrote nothing"):
        candidate.check("delta")


def test_peers_are_rows_where_their_library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in mixers.PEERS.values():
        hide(peer.module, monkeypatch)
    result, text = benchmark.run(config("peers=null", "memories=[none]", "rounds=1"))
    assert result.metadata["settings"]["peers"] == []
    assert "Not installed, so left out: titans-pytorch, rmt-pytorch, memorizing-pytorch" in text
    with pytest.raises(ConfigError, match="recurrent-memory-transformer-pytorch"):
        benchmark.run(config("peers=[rmt-pytorch]"))


def test_a_peer_is_trained_on_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def build(library: Any, setup: Setup, folder: str) -> mixer_peers.Parts:
        model = torch.nn.Linear(1, 1)

        def loss(text: torch.Tensor) -> torch.Tensor:
            seen.append(text)
            return model(torch.ones(1)).sum()

        return mixer_peers.Parts(model, loss, None)

    monkeypatch.setattr(mixers, "peer_library", lambda peer: SimpleNamespace())
    monkeypatch.setitem(mixer_peers._BUILD, "titans-pytorch", build)
    result, text = benchmark.run(config("peers=[titans-pytorch]", "memories=[none]", "rounds=2"))
    assert [part.shape for part in seen] == [(2, 33)] * 3
    assert "titans-pytorch/tokens_per_s" in result.metrics
    assert "titans-pytorch/ms_per_token" not in result.metrics
    assert "titans-pytorch" in text


@pytest.mark.parametrize("name", sorted(mixers.PEERS))
def test_real_peers_train_and_generate(name: str, tmp_path: Any) -> None:
    peer = mixers.PEERS[name]
    library = pytest.importorskip(peer.module)
    setup = Setup(mixers.memory_config("none", N_PARAMETER, OVERRIDES), 2, 2, "cpu", "fp32", False, 0)
    candidate = mixers.Theirs(mixers.build(name, library, setup, str(tmp_path)), setup)
    losses = [candidate.step(setup.batch(0)).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    prompt = setup.batch(1)[:1, :16]
    assert candidate.generate(prompt, 4) == (name != "memorizing-pytorch")
