import logging
from pathlib import Path

import pytest
import torch

import memlm
from memlm import assemble
from memlm.assemble import build_corpus, build_data, build_model, build_tokenizer, check_model, untrained
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError, target_of
from memlm.memory.state import n_byte
from memlm.models.base import LanguageModel
from tests.training.small import config, write_text

SMALL = [
    "data=text",
    "data.tokenizer.kind=word",
    "data.tokenizer.vocab_size=400",
    "model.n_layer=1",
    "model.d_model=16",
]


def test_build_gives_a_model_that_knows_its_text(tmp_path: Path) -> None:
    model = memlm.build(*SMALL, f"data.path={write_text(tmp_path)}", "memory=dual", "model.segment_len=32")
    assert model.config["data"] != {}
    assert (model.segment_len, sorted(model.memory)) == (32, ["ltm", "stm"])
    assert model.n_vocab == model.tokenizer.vocab_size
    assert model(torch.tensor([model.tokenizer.encode("x y z")])).logits.shape == (1, 3, model.n_vocab)


def test_an_untrained_twin_has_the_same_settings_and_other_values(tmp_path: Path) -> None:
    model = memlm.build(*SMALL, f"data.path={write_text(tmp_path)}", "memory=ltm", "seed=3")
    before = torch.random.get_rng_state()
    other, again = untrained(model.train()), untrained(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert other.config == model.config | {"seed": 4}
    assert not other.training
    shapes = [(name, value.shape) for name, value in model.state_dict().items()]
    assert shapes == [(name, value.shape) for name, value in other.state_dict().items()]
    assert not torch.equal(other.head_weight, model.head_weight)
    assert torch.equal(other.head_weight, again.head_weight)


def test_mistakes_are_told_before_anything_is_built(tmp_path: Path) -> None:
    path = f"data.path={write_text(tmp_path)}"
    for wrong, told in {
        "memory=lmt": "memory has no option 'lmt'",
        "model.n_layers=2": "no setting 'model.n_layers'.*Did you mean 'n_layer'",
        "model.n_layer=two": "model.n_layer must be an int",
        "model.d_ff=0": "model.d_ff must be at least 1 or null",
        "n_parameter=abc": "n_parameter must be an int or null",
        "n_parameter=true": "n_parameter must be an int or null",
        "model.dropout=nan": r"model.dropout must be a float, got nan \(not a finite number\)",
        "memory=auto memory.auto.threshold=2": "memory.auto.threshold must be in 0..1, got 2",
        "memory=imm memory.imm.temperature=1e-30": "memory.imm.temperature must be in 1e-6..1e6, got 1e-30",
        "memory.ltm.n_slot=0": "memory.ltm.n_slot must be at least 1",
        "model.n_head=3": "model.n_head must divide",
    }.items():
        with pytest.raises(ConfigError, match=told):
            memlm.build(*SMALL, path, *wrong.split())
    with pytest.raises(ConfigError, match="does not exist"):
        memlm.build(*SMALL, "data.path=/no/such/file.txt")


def test_what_cannot_fit_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, "a", "memory.ltm.n_slot=1000", memory="ltm")
    tokenizer = build_tokenizer(settings)
    model = build_model(settings, tokenizer)
    weights = 16 * (sum(p.numel() for p in model.parameters()) - (tokenizer.vocab_size - 2) * model.d_model)
    banks = max(phase["n_row"] for phase in settings["curriculum"]["phases"]) * n_byte(
        model.memory["ltm"][0].init_state(1)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    needs = []
    monkeypatch.setattr(assemble, "_check_room", lambda found, _: needs.append(found))
    check_model(settings)
    buffers = sum(part.numel() * part.element_size() for part in model.buffers())
    assert needs[0][:2] == (weights + buffers, banks)
    monkeypatch.undo()
    monkeypatch.setattr(assemble, "available_memory", lambda: sum(needs[0]))
    check_model(settings)
    monkeypatch.setattr(assemble, "available_memory", lambda: sum(needs[0]) - 1)
    with pytest.raises(ConfigError, match=r"needs at least .* can be had: make smaller .*memory\.ltm\.n_slot=1000"):
        check_model(settings)
    monkeypatch.setattr(assemble, "available_memory", lambda: 2**30)
    for more in ({"d_model": 10**6}, {"n_layer": 10**9}, {"segment_len": 10**6}):
        with pytest.raises(ConfigError, match=f"{next(iter(more))}=10"):
            check_model(settings | {"model": settings["model"] | more})
    with pytest.raises(ConfigError, match=r"model\.d_model must be at most 1048576, got 10"):
        check_model(settings | {"model": settings["model"] | {"d_model": 10**18}})


def test_initial_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    settings = config(tmp_path, "a")
    tokenizer = build_tokenizer(settings)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(settings, tokenizer).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_model(settings, tokenizer).state_dict()
    other = build_model(settings | {"seed": 1}, tokenizer).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("model_name", ["lmcode", "lstm", "mixer"])
@pytest.mark.parametrize("memory", ["none", "stm", "memoria", "delta"])
def test_models_of_equal_size(tmp_path: Path, memory: str, model_name: str) -> None:
    small = [*SMALL, f"data.path={write_text(tmp_path)}", f"model={model_name}"]
    model = memlm.build(*small, f"memory={memory}", "n_parameter=40000")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(40_000, abs=16)  # half a unit
    twin = untrained(model)
    assert [v.shape for v in twin.state_dict().values()] == [v.shape for v in model.state_dict().values()]


@pytest.mark.parametrize("model_name", ["lmcode", "lstm", "mixer"])
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, model_name: str) -> None:
    small = [*SMALL, f"data.path={write_text(tmp_path)}", f"model={model_name}", "memory=stm"]
    with pytest.raises(ConfigError, match=r"n_parameter must be at least [\d,]+ with this model and memory, got 100"):
        memlm.build(*small, "n_parameter=100")
    with pytest.raises(ConfigError, match=r"d_ff, which is set to 32"):
        memlm.build(*small, "n_parameter=40000", "model.d_ff=32")


def bytes_of(model: LanguageModel) -> int:
    return sum(n_byte(module.init_state(1)) for modules in model.memory.values() for module in modules)


@pytest.mark.slow
def test_every_memory_names_settings_that_its_size_is_made_of() -> None:
    for name in (path.stem for path in (config_dir() / "memory").glob("*.yaml")):
        for node in to_dict(compose([f"memory={name}"]))["memory"].values():
            names = target_of(node, name).sized
            assert all(isinstance(node[key], int) for key in names)
            assert names or name == "infini"  # its matrix is as large as the layer's heads


@pytest.mark.parametrize(
    ("memory", "names"),
    [("ltm", ["ltm.n_slot"]), ("delta", ["delta.d_key", "delta.d_value"]), ("dual", ["ltm.n_slot", "stm.n_slot"])],
)
def test_memories_of_equal_bytes(tmp_path: Path, memory: str, names: list[str]) -> None:
    small = [*SMALL, f"data.path={write_text(tmp_path)}", f"memory={memory}"]
    model = memlm.build(*small, "state_bytes=40000", "n_parameter=60000")
    assert bytes_of(model) <= 40_000
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(60_000, abs=40)
    whole = to_dict(compose(small))["memory"]
    changed = {
        f"{name}.{key}": value
        for name, node in model.config["memory"].items()
        for key, value in node.items()
        if value != whole[name][key]
    }
    assert sorted(changed) == names
    larger = [f"memory.{key}={value + 1}" for key, value in changed.items()]
    assert bytes_of(memlm.build(*small, *larger)) > 40_000  # none is left unused


@pytest.mark.slow
def test_a_size_that_changes_nothing_is_none(tmp_path: Path) -> None:
    small = [*SMALL, f"data.path={write_text(tmp_path)}"]
    for memory, most in (("none", 9), ("infini", 10), ("delta", 32_768)):
        model = memlm.build(*small, f"memory={memory}", f"state_bytes={most}")
        assert model.config == memlm.build(*small, f"memory={memory}").config
    least = memlm.build(*small, "memory=knn", "state_bytes=1")
    assert (least.config["memory"]["knn"]["n_token"], least.config["state_bytes"]) == (1, 1)
    least = memlm.build(*small, "memory=armt", "state_bytes=1")  # refuses a width of 1
    assert least.config["memory"]["armt"]["d_mem"] == 2
    most_slots = memlm.build(*small, "memory=lm2", "memory.lm2.n_slot=8", "state_bytes=1000000")  # at most d_model
    assert most_slots.config["memory"]["lm2"]["n_slot"] == 16


def test_the_text_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(tmp_path, "a")
    with caplog.at_level(logging.INFO):
        corpus = build_corpus(settings)
        data = build_data(settings, build_tokenizer(settings, corpus), corpus)
        data.setup()
    assert sum(record.message.startswith("corpus ") for record in caplog.records) == 1


def test_a_text_shorter_than_a_segment_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "model.segment_len=8000")
    with pytest.raises(ConfigError, match="no more than one segment of 8000"):
        build_data(settings, build_tokenizer(settings)).setup()
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ConfigError, match="holds no text"):
        build_tokenizer(config(tmp_path, "a", f"data.path={empty}"))
