"""Tiny geometries: what is measured is right; how fast it is does not matter here."""

import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memlm.config import ConfigError, compose, to_dict
from scripts import benchmark

TINY = [
    "model.n_layer=2", "model.n_head=2", "model.d_model=32", "model.segment_len=16",
    "data.tokenizer.n_vocab=101", "memory.ltm.n_slot=64", "memory.ltm.write_budget=4", "memory.ltm.top_k=8",
]  # fmt: skip


def setup(size: str = "seed", **settings: Any) -> benchmark.Setup:
    given = {"n_row": 2, "n_segment": 3, "device": "cpu", "precision": "fp32", "compile": False, "seed": 0}
    return benchmark.Setup(benchmark.size_config(size, TINY), **given | settings)


def config(*overrides: str) -> dict[str, Any]:
    quoted = ",".join(f'"{line}"' for line in TINY)
    tiny = [f"overrides=[{quoted}]", "n_row=2", "n_segment=2", "rounds=3", "warmup=1", "peak_memory=false"]
    return to_dict(compose([*tiny, *overrides], "benchmark"))


def memoria_config(*overrides: str) -> dict[str, Any]:
    tiny = [
        "benchmark=memoria", "n_row=2", "n_working=4", "d_model=6", "n_slot=40", "n_stm=8", "n_reminded_stm=3",
        "n_reminded_ltm=3", "search_depth=2", "lifespan=5", "warmup=6", "rounds=3",
        'candidates=["memoria-pytorch","memlm","memlm as 1.1.0"]',
    ]  # fmt: skip
    return to_dict(compose([*tiny, *overrides], "benchmark"))


def hide(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name == library:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("transformers", monkeypatch)


# ------------------------------------------------------------------------------------------------ what is measured


def test_sizes_are_those_of_the_configs() -> None:
    seed = benchmark.Setup(benchmark.size_config("seed", []), 8, 4, "cpu", "fp32", False, 0)
    model = seed.config["model"]
    assert (model["n_layer"], model["n_head"], model["d_model"], seed.segment_len) == (6, 8, 512, 128)
    assert (seed.n_vocab, model["memory_layers"], seed.n_token) == (50_257, "all", 4096)
    default = benchmark.Setup(benchmark.size_config("default", []), 8, 4, "cpu", "fp32", False, 0)
    model = default.config["model"]
    assert (model["n_layer"], model["d_model"], default.n_vocab, model["memory_layers"]) == (4, 128, 4096, "middle")
    for one in (seed, default):
        assert list(one.config["memory"]) == ["ltm"]
        assert one.config["memory"]["ltm"]["n_slot"] == 10_000


@pytest.mark.parametrize(("size", "n_layer"), [("seed", 2), ("default", 1)])
def test_ltm_has_full_banks_and_reads_and_writes_them(size: str, n_layer: int) -> None:
    tiny = setup(size)
    candidate = benchmark.Candidate("ltm", tiny)
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
    found = benchmark.evidence(candidate)
    assert found["banks"] == 2 * n_layer
    assert found["filled"] == found["slots"] == 64
    assert found["read"] == 8
    assert found["distinct"] > 8
    assert found["written"] == 3 * 4  # every segment's budget
    for _ in range(8):  # more writes than slots
        candidate.step(text)
    assert benchmark.evidence(candidate)["filled"] == 64
    assert all((bank.record > 0).all() for bank in candidate.state.memory["ltm"])


def test_every_slot_of_a_full_bank_is_searched() -> None:
    tiny = setup("default")
    candidate = benchmark.Candidate("ltm", tiny)
    model: Any = candidate.model
    [module], [bank] = model.memory["ltm"], candidate.state.memory["ltm"]
    x = torch.randn(2, 64, 32)
    with torch.no_grad():
        # Slot i gets the query of token i: each token must find its own slot.
        query = torch.nn.functional.normalize(module.to_key(module.norm(x)), dim=-1)
        read = module.read(x, bank._replace(key=query, log_gate=torch.zeros_like(bank.log_gate)), 0)
    best = read.slots.gather(2, read.weights.argmax(dim=-1, keepdim=True))[..., 0]
    assert (best == torch.arange(64)).all()


def test_empty_bank_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = setup()
    monkeypatch.setattr(benchmark, "fill", lambda model, setup: model.init_state(setup.n_row))
    candidate = benchmark.Candidate("ltm", tiny)
    candidate.step(tiny.batch(0))
    with pytest.raises(ValueError, match="not full"):
        benchmark.evidence(candidate)
    with pytest.raises(ValueError, match="not full"):
        benchmark.measure(["ltm"], tiny, 1, 1, 1)


@pytest.mark.parametrize("name", ["none", "ltm"])
def test_step_is_that_of_the_trainer(name: str) -> None:
    """One step equals the same written plainly: mean loss over all targets, clip at 1, our AdamW."""
    from memlm.training.module import decay_groups

    tiny = setup()
    candidate, twin = benchmark.Candidate(name, tiny), benchmark.Candidate(name, tiny)
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
    tiny = setup()
    peer, ours = benchmark.Candidate("gpt2", tiny), benchmark.Candidate("none", tiny)
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


def test_candidates_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    step = benchmark.Candidate.step

    def note(self: benchmark.Candidate, text: torch.Tensor) -> torch.Tensor:
        order.append(self.name)
        return step(self, text)

    monkeypatch.setattr(benchmark.Candidate, "step", note)
    _, seconds = benchmark.measure(["none", "ltm"], setup(), warmup=1, rounds=2, steps=2)
    assert order == ["none", "ltm"] + 2 * ["none", "none", "ltm", "ltm"]
    assert {name: len(times) for name, times in seconds.items()} == {"none": 2, "ltm": 2}


def test_summary_takes_ratios_per_round() -> None:
    tiny = setup()
    seconds = {"gpt2": [2.0, 4.0, 8.0], "none": [1.0, 4.0, 16.0], "ltm": [2.0, 4.0, 8.0]}
    found = benchmark.summarise("none", seconds, tiny, steps=5)
    assert found["vs_gpt2"] == statistics.median([2.0, 1.0, 0.5])
    assert (found["vs_gpt2_low"], found["vs_gpt2_high"]) == (0.75, 1.5)
    assert found["tokens_per_s"] == tiny.n_token * 5 / 4
    assert "vs_none" not in found
    assert "vs_none" in benchmark.summarise("ltm", seconds, tiny, 5)
    one = benchmark.summarise("none", {"none": [2.0]}, tiny, 1)
    assert one["tokens_per_s_low"] == one["tokens_per_s"] == tiny.n_token / 2


def test_autocast_and_two_threads() -> None:
    """Weights stay fp32; the setting of threads does not outlive the run."""
    before = torch.get_num_threads()
    result, _ = benchmark.run(config("candidates=[none]", "sizes=[default]", "precision=bf16", "threads=2", "rounds=1"))
    assert result.metadata["threads"] == 2
    assert torch.get_num_threads() == before
    candidate = benchmark.Candidate("none", setup(precision="bf16"))
    candidate.step(setup().batch(0))
    assert {p.dtype for p in candidate.model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ the whole run


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
    check(result, text, ["gpt2", "none", "ltm"])
    assert result.metrics["default/none/vs_gpt2"] > 0
    assert all(f"\n{name} " in text for name in ("gpt2", "none", "ltm"))
    assert result.metadata["transformers"]


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    ballast = torch.ones(300 * 2**18)  # 300 MiB that a child must not be charged with
    # 64 MiB of keys and values in each of two banks: 16 times what the tiny bank takes.
    small, large = setup("default"), setup("default")
    large.config["memory"]["ltm"] |= {"n_slot": 64 * 2**10, "d_key": 128}
    found = [benchmark._in_own_process(benchmark.peak, "ltm", one, 1) for one in (small, large)]
    assert benchmark._peak_rss() > found[0]["peak_mib"] + 100
    assert found[0]["peak_mib"] >= found[0]["idle_mib"] > 50
    assert found[1]["peak_mib"] > found[0]["peak_mib"] + 64
    assert ballast.sum() > 0


def test_command_line_writes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["benchmark.py", *benchmark.name_command(["train"]), f"out={tmp_path}", "candidates=[none,ltm]",
         'overrides=["model.n_layer=1","model.d_model=16","model.segment_len=16","memory.ltm.n_slot=32"]',
         "sizes=[default]", "n_row=1", "n_segment=2", "rounds=1", "warmup=1", "peak_memory=false"],
    )  # fmt: skip
    benchmark.main()
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["metrics"]["default/ltm/vs_none"] > 0
    assert stored["metadata"]["settings"]["rounds"] == 1
    assert str(tmp_path / "result.json") in capsys.readouterr().out


def test_engrams_are_measured_side_by_side() -> None:
    names = ["memoria-pytorch", "memlm", "memlm as 1.1.0"]
    result, text = benchmark.run(memoria_config("extension=0"))
    assert {(row["candidate"], row["round"]) for row in result.rows} == {(name, i) for name in names for i in range(3)}
    for name in names:
        times = sorted(row["seconds"] for row in result.rows if row["candidate"] == name)
        assert result.metrics[f"{name}/ms"] == pytest.approx(1000 * times[1])
        assert result.metrics[f"{name}/engrams"] == 4 * 4  # nothing is kept beyond its first lifespan
    theirs, ours = ([row["seconds"] for row in result.rows if row["candidate"] == name] for name in names[:2])
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    assert result.metrics["memlm/speedup"] == pytest.approx(statistics.median(ratios))
    assert "memoria-pytorch/speedup" not in result.metrics
    assert result.metadata["memoria-pytorch"] in text
    longer = benchmark.run(memoria_config("extension=4"))[0]
    assert all(longer.metrics[f"{name}/engrams"] > 4 * 4 for name in names)


# ------------------------------------------------------------------------------------------------ consolidation


def consolidate_config(*overrides: str) -> dict[str, Any]:
    return to_dict(compose(["benchmark=consolidate", *overrides], "benchmark"))


def test_the_pairs_of_the_bank_are_the_only_similar_slots() -> None:
    memory, state, n_pair = benchmark.near_duplicates(1000, 0.1, 0.97, 50, 64, 64, seed=1)
    assert n_pair == 100
    assert memory.filled(state).all()
    similar = [part[0] @ part[0].T - torch.eye(1000) for part in (state.key, state.value)]
    both = (torch.minimum(*similar) >= 0.9).nonzero()
    assert len(both) == 2 * n_pair
    assert len(both[:, 0].unique()) == 2 * n_pair, "each is near one other"
    for part in similar:
        torch.testing.assert_close(part[both[:, 0], both[:, 1]], torch.full((2 * n_pair,), 0.97))
    assert (similar[0] > 0.4).sum() > 1000 * 30, "keys lie in clusters"


def test_consolidation_is_measured_in_a_process_of_its_own() -> None:
    result, text = benchmark.run(consolidate_config("sizes=[2000]", "passes=2", "threads=1"))
    metrics = result.metrics
    assert metrics["2000/found_1"] == metrics["2000/found_2"] == 1.0  # all pairs are compared
    assert [row["merged"] for row in result.rows] == [200, 0]
    assert min(row["seconds"] for row in result.rows) > 0
    # at the least, blocks of similarities in floats, and a copy of keys and values
    assert 2 < metrics["2000/peak_mib"] < 500
    assert metrics["2000/bank_mib"] == pytest.approx(2000 * (256 * 4 + 2 * 4 + 3 * 8 + 6 * 4 + 8 * 4) / 2**20, rel=0.01)
    assert "100.0 %" in text


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("sizes=[]", "sizes must name at least one"),
        ("sizes=[10]", "each in 100"),
        ("duplicates=0.6", "duplicates must be in"),
        ("similarity=0.8", "similarity must be in"),
        ("passes=0", "passes must be at least 1"),
    ],
)
def test_mistakes_about_consolidation_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        benchmark.run(consolidate_config(override))


def retrieval_config(*overrides: str) -> dict[str, Any]:
    tiny = ["benchmark=retrieval", "sizes=[200,400]", "d_key=8", "n_query=6", "top_k=4", "rounds=3", "n_list=8"]
    return to_dict(compose([*tiny, "candidates=[exact,inverted,torch]", *overrides], "benchmark"))


def test_searches_are_measured_side_by_side() -> None:
    pytest.importorskip("faiss")
    names = ["exact", "inverted", "torch", "faiss flat", "faiss ivf", "faiss hnsw"]
    quoted = ",".join(f'"{name}"' for name in names)
    result, text = benchmark.run(retrieval_config(f"candidates=[{quoted}]", "n_probe=8", "hnsw_most=200"))
    for source in ("clustered", "random"):  # no checkpoint is given
        for size in (200, 400):
            for name in names:
                here = f"{source}/{size}/{name}"
                rows = [row["seconds"] for row in result.rows if row["what"] == "ms" and row["candidate"] == name
                        and row["slots"] == size and row["keys"] == source]  # fmt: skip
                if name == "faiss hnsw" and size == 400:
                    assert not rows
                    continue
                assert result.metrics[f"{here}/ms"] == pytest.approx(1000 * statistics.median(rows))
                assert (f"{here}/learn_ms" in result.metrics) == (not name.startswith("faiss"))
                if name != "faiss hnsw":  # all lists are probed
                    assert result.metrics[f"{here}/recall"] == 1
    assert "no checkpoint was given" in text
    assert result.metrics["random/200/exact/vs_faiss_flat"] > 0
    few = benchmark.run(retrieval_config("n_probe=1", "keys=[random]"))[0].metrics
    assert few["random/400/inverted/recall"] < 0.9


def test_keys_are_those_that_a_trained_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a text without memory being read, in order of the text; queries from held-out text; kept in a file."""
    import memlm.checkpoint

    model: Any = benchmark._ours("ltm", setup("default")).eval()
    text = torch.randint(model.n_vocab, (1500,), generator=torch.Generator().manual_seed(0)).numpy()
    data = SimpleNamespace(tokens=lambda split: SimpleNamespace(tokens=text if split == "train" else text[::-1].copy()))
    monkeypatch.setattr(memlm.checkpoint, "load_run", lambda path: (model, data))
    cache = str(tmp_path / "keys.pt")
    keys = benchmark.trained_keys("RUN", 3000, 100, cache)
    assert (len(keys.key), len(keys.bias), len(keys.query)) == (3000, 3000, 100)
    torch.testing.assert_close(keys.key.norm(dim=1), torch.ones(3000))
    assert len(keys.key.unique(dim=0)) > 2900, "segments come twice"
    module = model.memory["ltm"][0]
    monkeypatch.setattr(module, "n_slot", 400)
    monkeypatch.setattr(module, "write_budget", None)
    with torch.no_grad():
        row = torch.from_numpy(text[: len(text) // 8 * 8]).view(8, -1)[:1, :64]
        bank = model.new_context(model(row, read=False).state).memory["ltm"][0]
    own = bank.key[0][module.filled(bank)[0]]
    nearest = (own @ keys.key.T).amax(dim=1)
    assert (nearest > 1 - 1e-4).float().mean() > 0.8  # all but those that a later segment settles
    monkeypatch.setattr(memlm.checkpoint, "load_run", None)
    again = benchmark.trained_keys("RUN", 3000, 100, cache)
    assert torch.equal(again.key, keys.key)
    with pytest.raises(ConfigError, match="remove it, or name another cache"):
        benchmark.trained_keys("RUN", 3001, 100, cache)


# ------------------------------------------------------------------------------------------------ mistakes


def test_missing_faiss_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("faiss", monkeypatch)
    with pytest.raises(ConfigError, match=r"memlm\[bench\].*candidates=\[exact,inverted,torch\]"):
        benchmark.run(retrieval_config('candidates=["faiss flat"]'))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rounds=0", "rounds must be at least 1"),
        ("sizes=[]", "sizes must name at least one"),
        ("sizes=[2]", "sizes must be at least top_k"),
        ("keys=[random,random]", "each once"),
    ],
)
def test_mistakes_about_searches_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        benchmark.run(retrieval_config(override))


def test_missing_memoria_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("memoria", monkeypatch)
    with pytest.raises(ConfigError, match=r"memlm\[bench\].*leave memoria-pytorch out"):
        benchmark.run(memoria_config())
    benchmark.run(memoria_config("candidates=[memlm]"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rounds=0", "rounds must be at least 1"),
        ("candidates=[]", "candidates must name at least one"),
        ("candidates=[memlm,memlm]", "each once"),
        ("n_slot=10", "n_slot must hold"),
        ("lifespan=1", "lifespan must be at least 2"),
    ],
)
def test_mistakes_about_engrams_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        benchmark.run(memoria_config(override))


def test_what_processes_spend_on_a_dealt_bank_is_a_share_of_the_step() -> None:
    quoted = ",".join(f'"{line}"' for line in TINY)
    settings = ["benchmark=exchange", f"overrides=[{quoted}]", "n_row=4", "n_segment=2", "warmup=1", "rounds=2"]
    result, text = benchmark.run(to_dict(compose(settings, "benchmark")))
    assert [(row["process"], row["step"]) for row in result.rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for row in result.rows:
        assert 0 < row["sending"] < row["seconds"]
        assert 0 < row["waiting"] < row["seconds"] - row["sending"]
    shares = sorted(row["sending"] / row["seconds"] for row in result.rows)
    assert shares[1] <= result.metrics["sending"] <= shares[2]
    assert f"{100 * result.metrics['waiting']:.1f} %" in text
    with pytest.raises(ConfigError, match="n_row must be at least 2, got 1"):
        benchmark.run(to_dict(compose([*settings, "n_row=1"], "benchmark")))


def test_missing_transformers_names_the_extra(no_transformers: None) -> None:
    with pytest.raises(ConfigError, match=r"memlm\[bench\].*candidates=\[none,ltm\]"):
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


def test_unknown_settings_and_benchmarks() -> None:
    with pytest.raises(ConfigError, match="rounds"):
        config("ronds=3")
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        benchmark.name_command(["trian"])
    assert benchmark.name_command(["train", "rounds=1"]) == ["benchmark=train", "rounds=1"]
    assert benchmark.name_command(["--help"]) == ["--help"]
    assert benchmark.name_command([]) == []
    for name in benchmark.BENCHMARKS:
        assert compose([f"benchmark={name}"], "benchmark")["benchmark"] == name
