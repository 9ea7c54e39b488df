"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

import statistics
from typing import Any

import pytest
import torch

from benchmarks import base, candidates, train
from memlm.app import benchmark
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.benchmarks.tiny import TINY, hide, tiny_setup

pytestmark = pytest.mark.slow


def config(*overrides: str) -> dict[str, Any]:
    quoted = ",".join(f'"{line}"' for line in TINY)
    tiny = [f"overrides=[{quoted}]", "n_row=2", "n_segment=2", "rounds=3", "warmup=1", "peak_memory=false"]
    return to_dict(compose([*tiny, *overrides], "benchmark"))


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("transformers", monkeypatch)


def test_sizes_are_those_of_the_configs() -> None:
    seed = candidates.Setup(candidates.size_config("seed", []), 8, 4, "cpu", "fp32", False, 0)
    model = seed.config["model"]
    assert (model["n_layer"], model["n_head"], model["d_model"], seed.segment_len) == (6, 8, 512, 128)
    assert (seed.n_vocab, model["memory_layers"], seed.n_token) == (50_257, "all", 4096)
    default = candidates.Setup(candidates.size_config("default", []), 8, 4, "cpu", "fp32", False, 0)
    model = default.config["model"]
    assert (model["n_layer"], model["d_model"], default.n_vocab, model["memory_layers"]) == (4, 128, 4096, "middle")
    for one in (seed, default):
        assert list(one.config["memory"]) == ["ltm"]
        assert one.config["memory"]["ltm"]["n_slot"] == 10_000


@pytest.mark.parametrize(("size", "n_layer"), [("seed", 2), ("default", 1)])
def test_ltm_has_full_banks_and_reads_and_writes_them(size: str, n_layer: int) -> None:
    tiny = tiny_setup(size)
    candidate = candidates.Candidate("ltm", tiny)
    model: Any = candidate.model
    assert len(model.memory_layers) == n_layer
    text, first = tiny.batch(0), candidate.state
    for module, bank in zip(model.memory["ltm"], first.memory["ltm"], strict=True):
        assert module.filled(bank).all()
        assert module.filled(bank).shape == (2, 64)
        for part in (bank.key, bank.value):
            torch.testing.assert_close(part.norm(dim=-1), torch.ones(part.shape[:2]))
        assert len(bank.key.flatten(0, 1).unique(dim=0)) == 2 * 64  # so that a read of each can be told from the others
    with torch.no_grad():
        on = model(text[:, :-1], state=first, logits=False).hidden
        off = model(text[:, :-1], state=first, logits=False, read=False).hidden
        moved = model.map_memory(lambda _, bank: bank._replace(value=bank.value.flip(1)), first)
        other = model(text[:, :-1], state=moved, logits=False).hidden
    assert not torch.allclose(on[:, :16], off[:, :16])  # from the first segment on, which only the old slots can reach
    assert not torch.allclose(on[:, :16], other[:, :16])

    candidate.step(text)
    found = train.evidence(candidate)
    assert found["banks"] == 2 * n_layer
    assert found["filled"] == found["slots"] == 64
    assert found["read"] == 8
    assert found["distinct"] > 8
    assert found["written"] == 3 * 4  # every segment's budget
    for _ in range(8):  # more writes than slots
        candidate.step(text)
    assert train.evidence(candidate)["filled"] == 64
    assert all((bank.record > 0).all() for bank in candidate.state.memory["ltm"])


def test_every_slot_of_a_full_bank_is_searched() -> None:
    tiny = tiny_setup("default")
    candidate = candidates.Candidate("ltm", tiny)
    model: Any = candidate.model
    [module], [bank] = model.memory["ltm"], candidate.state.memory["ltm"]
    x = torch.randn(2, 64, 32)
    with torch.no_grad():
        # Slot i gets the query of token i: each token must find its own slot.
        query = torch.nn.functional.normalize(module.to_key(module.norm(x)), dim=-1)
        bank = bank._replace(key=query, log_gate=torch.zeros_like(bank.log_gate))
        read = module.read(x, module.prepare(bank))
    best = read.slots.gather(2, read.weights.argmax(dim=-1, keepdim=True))[..., 0]
    assert (best == torch.arange(64)).all()


def test_empty_bank_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_setup()
    monkeypatch.setattr(candidates, "fill", lambda model, setup: model.init_state(setup.n_row))
    candidate = candidates.Candidate("ltm", tiny)
    candidate.step(tiny.batch(0))
    with pytest.raises(ValueError, match="not full"):
        train.evidence(candidate)
    with pytest.raises(ValueError, match="not full"):
        train.measure(["ltm"], tiny, 1, 1, 1)


@pytest.mark.parametrize("name", ["none", "ltm"])
def test_step_is_that_of_the_trainer(name: str) -> None:
    """One step equals the same written plainly: mean loss over all targets, clip at 1, our AdamW."""
    from memlm.training.optimizer import decay_groups

    tiny = tiny_setup()
    candidate, twin = candidates.Candidate(name, tiny), candidates.Candidate(name, tiny)
    text = tiny.batch(0)
    loss = candidate.step(text)
    group = candidate.optimizer.param_groups[0]
    model: Any = twin.model
    out = model(text[:, :-1], state=twin.state)
    plain = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), text[:, 1:].flatten())
    for key, modules in model.memory.items():
        plain = plain + sum(modules[0].losses(out.trace[key], plain.expand(len(text))).values())
    torch.testing.assert_close(loss, plain.detach())
    plain.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    groups = decay_groups(model, group["weight_decay"])
    torch.optim.AdamW(groups, lr=group["lr"], betas=group["betas"]).step()
    for ours, theirs in zip(candidate.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_peer_has_our_shape_and_gets_the_same_tokens() -> None:
    pytest.importorskip("transformers")
    tiny = tiny_setup()
    peer, ours = candidates.Candidate("gpt2", tiny), candidates.Candidate("none", tiny)
    model: Any = peer.model
    given = model.config
    assert (given.n_layer, given.n_head, given.n_embd, given.vocab_size, given.n_positions) == (2, 2, 32, 101, 16)
    assert given._attn_implementation == "sdpa"
    assert not any(part.p for part in model.modules() if isinstance(part, torch.nn.Dropout))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert abs(peer.n_parameter / ours.n_parameter - 1) < 0.1  # biases and learned positions are all that differs
    assert peer.optimizer.defaults == ours.optimizer.defaults
    text = tiny.batch(0)
    before = model.transformer.h[0].mlp.c_fc.weight.clone()
    peer.step(text), ours.step(text)
    assert peer.n_seen == ours.n_seen == tiny.n_token == 2 * 3 * 16
    assert not torch.equal(before, model.transformer.h[0].mlp.c_fc.weight)


def test_nanogpt_is_gpt2_of_transformers_without_biases() -> None:
    """With its weights, biases zero and the exact GELU, GPT-2 of transformers has the same loss."""
    pytest.importorskip("transformers")
    tiny = tiny_setup()
    nano, gpt2 = candidates.Candidate("nanogpt", tiny), candidates.Candidate("gpt2", tiny)
    ours, theirs = nano.model, gpt2.model.transformer
    with torch.no_grad():
        theirs.wte.weight.copy_(ours.embedding.weight)
        theirs.wpe.weight.copy_(ours.position.weight)
        for mine, block in zip(ours.blocks, theirs.h, strict=True):
            block.attn.c_attn.weight.copy_(mine.to_qkv.weight.T)
            block.attn.c_proj.weight.copy_(mine.to_output.weight.T)
            block.mlp.c_fc.weight.copy_(mine.feed_forward[1].weight.T)
            block.mlp.c_proj.weight.copy_(mine.feed_forward[3].weight.T)
            block.mlp.act = torch.nn.GELU()
    text = tiny.batch(0)
    ids, targets = text[:, :-1].reshape(-1, 16), text[:, 1:].reshape(-1, 16)
    torch.testing.assert_close(
        ours(ids, targets), torch.nn.functional.cross_entropy(gpt2.model(ids).logits.flatten(0, 1), targets.flatten())
    )
    before = ours.embedding.weight.clone()
    nano.step(text)
    assert nano.n_seen == tiny.n_token
    assert not torch.equal(before, ours.embedding.weight)


@pytest.mark.parametrize("name", ["delta", "titans"])
def test_other_memories_are_trained_alone(name: str) -> None:
    tiny = candidates.Setup(candidates.size_config("default", TINY, ["ltm", name]), 2, 2, "cpu", "fp32", False, 0)
    candidate = candidates.Candidate(name, tiny)
    candidate.step(tiny.batch(0))
    assert list(candidate.model.memory) == list(candidate.state.memory) == [name]


def test_124m_has_the_parameters_of_gpt2() -> None:
    config = candidates.size_config("124m", [])
    setup = candidates.Setup(config, 1, 1, "meta", "fp32", False, 0)
    shape = config["model"]
    assert (shape["n_layer"], shape["n_head"], shape["d_model"], setup.segment_len) == (12, 12, 768, 1024)
    with torch.device("meta"):
        model = candidates._nanogpt(setup)
    assert sum(part.numel() for part in model.parameters()) == pytest.approx(124.4e6, rel=0.01)


def test_candidates_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    step = candidates.Candidate.step

    def note(self: candidates.Candidate, text: torch.Tensor) -> torch.Tensor:
        order.append(self.name)
        return step(self, text)

    monkeypatch.setattr(candidates.Candidate, "step", note)
    _, seconds = train.measure(["none", "ltm"], tiny_setup(), warmup=1, rounds=2, steps=2)
    assert order == ["none", "ltm"] + 2 * ["none", "none", "ltm", "ltm"]
    assert {name: len(times) for name, times in seconds.items()} == {"none": 2, "ltm": 2}


def test_summary_takes_ratios_per_round() -> None:
    tiny = tiny_setup()
    seconds = {"gpt2": [2.0, 4.0, 8.0], "none": [1.0, 4.0, 16.0], "ltm": [2.0, 4.0, 8.0]}
    found = train.summarise("none", seconds, tiny, steps=5)
    assert found["vs_gpt2"] == statistics.median([2.0, 1.0, 0.5])
    assert (found["vs_gpt2_low"], found["vs_gpt2_high"]) == (0.75, 1.5)
    assert found["tokens_per_s"] == tiny.n_token * 5 / 4
    assert "vs_none" not in found
    assert "vs_none" in train.summarise("ltm", seconds, tiny, 5)
    one = train.summarise("none", {"none": [2.0]}, tiny, 1)
    assert one["tokens_per_s_low"] == one["tokens_per_s"] == tiny.n_token / 2


def test_autocast_and_two_threads() -> None:
    """Weights stay fp32; the setting of threads does not outlive the run."""
    before = torch.get_num_threads()
    result, _ = benchmark.run(config("candidates=[none]", "sizes=[default]", "precision=bf16", "threads=2", "rounds=1"))
    assert result.metadata["threads"] == 2
    assert torch.get_num_threads() == before
    candidate = candidates.Candidate("none", tiny_setup(precision="bf16"))
    candidate.step(tiny_setup().batch(0))
    assert {p.dtype for p in candidate.model.parameters()} == {torch.float32}


def check(result: Any, text: str, names: list[str]) -> None:
    for size in ("seed", "default"):
        assert result.metadata["shapes"][size]["tokens_per_step"] == 2 * 2 * 16
        assert result.metadata["evidence"][size]["filled"] == 64
        for name in names:
            assert result.metrics[f"{size}/{name}/tokens_per_s"] > 0
            assert result.metrics[f"{size}/{name}/parameters"] > 0
        assert result.metrics[f"{size}/ltm/vs_none"] > 0
        assert f"{size}: 2 layers" in text
    assert sum(line.split()[:1] == ["ltm"] for line in text.splitlines()) == 2
    assert {(row["size"], row["candidate"], row["round"]) for row in result.rows} == {
        (size, name, i) for size in ("seed", "default") for name in names for i in range(3)
    }
    assert {row["tokens"] for row in result.rows} == {2 * 2 * 16}
    for key in ("torch", "processor", "date", "commit", "threads", "load_before"):
        assert result.metadata[key] is not None or key == "commit"


def test_run_without_the_peer(no_transformers: None) -> None:
    result, text = benchmark.run(config("candidates=[none,ltm]"))
    check(result, text, ["none", "ltm"])


def test_run_with_the_peer() -> None:
    pytest.importorskip("transformers")
    result, text = benchmark.run(config())
    check(result, text, ["gpt2", "nanogpt", "none", "ltm"])
    assert result.metrics["default/none/vs_gpt2"] > 0
    assert result.metrics["default/ltm/vs_nanogpt"] > 0
    assert all(f"\n{name} " in text for name in ("gpt2", "nanogpt", "none", "ltm"))
    assert result.metadata["transformers"]


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    ballast = torch.ones(300 * 2**18)  # 300 MiB that a child must not be charged with
    # 64 MiB of keys and values in each of two banks: 16 times what the tiny bank takes.
    small, large = tiny_setup("default"), tiny_setup("default")
    large.config["memory"]["ltm"] |= {"n_slot": 64 * 2**10, "d_key": 128}
    found = [base.in_own_process(train.peak, "ltm", one, 1) for one in (small, large)]
    assert base.peak_rss() > found[0]["peak_mib"] + 100
    assert found[0]["peak_mib"] >= found[0]["idle_mib"] > 50
    assert found[1]["peak_mib"] > found[0]["peak_mib"] + 64
    assert ballast.sum() > 0


def test_missing_transformers_names_the_extra(no_transformers: None) -> None:
    with pytest.raises(ConfigError, match=r"memlm\[bench\].*candidates=\[nanogpt,none,ltm\]"):
        benchmark.run(config())


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rounds=0", "rounds must be at least 1"),
        ("n_segment=1", "n_segment must be at least 2"),
        ("threads=0", "threads must be at least 1"),
        ("candidates=[]", "candidates must name at least one"),
        ("candidates=[none,none]", "each once"),
        ("candidates=[gtp2]", "candidates"),
        ("sizes=[huge]", "sizes"),
        ("precision=fp16", "precision"),
        ("n_row=many", "n_row must be an int"),
        ("device=tpu", "device=tpu cannot be used here"),
        ('overrides=["model.n_layr=2"]', "n_layer"),
        ('overrides=["memory=stm"]', "leave it out"),
    ],
)
def test_mistakes_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        benchmark.run(config("candidates=[none,ltm]", override))
