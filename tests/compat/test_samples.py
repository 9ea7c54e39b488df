"""Every code sample of the projects that memlm grew from, with nothing but its imports changed, is run.

The samples are in ``samples/``. A test fills their placeholders and makes their numbers smaller, and says so; what a
sample printed in its source is compared with what it gives here.
"""

import doctest
import json
import math
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import memlm
from memlm.analysis.efficiency import Efficiency
from memlm.compat import lmcode
from memlm.compat.lmcode import LMCODE, LMCODEConfig, MemoryDataset
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.training.small import write_text

pytestmark = pytest.mark.slow

SAMPLES = Path(__file__).parent / "samples"
SMALL = {  # of LMCODE
    "vocab_size=50257": "vocab_size=300", "hidden_size=512": "hidden_size=32", "num_layers=6": "num_layers=2",
    "num_heads=8": "num_heads=2", "short_term_memory_size=512": "short_term_memory_size=8",
    "long_term_memory_slots=10000": "long_term_memory_slots=200",
}  # fmt: skip

Names = dict[str, Any]


def sample(name: str, changes: dict[str, str] | None = None) -> str:
    """A sample with some of its text changed."""
    text = (SAMPLES / f"{name}.txt").read_text()
    for old, new in (changes or {}).items():
        assert text.count(old) == 1, f"{old} is not in {name}"
        text = text.replace(old, new)
    return text


def execute(name: str, names: Names, changes: dict[str, str] | None = None) -> Names:
    exec(compile(sample(name, changes), f"{name}.txt", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models of LMCODE have a tokenizer of a short text: that of the built-in text takes long to train."""
    text = write_text(tmp_path_factory.mktemp("text"))
    overrides = LMCODEConfig.overrides
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LMCODEConfig, "overrides", lambda self: [*overrides(self), "data=text", f"data.path={text}"])
        yield


@pytest.fixture(scope="module")
def built(short_text: None) -> Names:
    """What is left after the first sample."""
    torch.manual_seed(0)
    return execute("lmcode_basic_usage", {"torch": torch}, SMALL | {"max_length=100": "max_length=30"})


def test_every_sample_has_a_test() -> None:
    tests = Path(__file__).read_text()
    assert [path.stem for path in SAMPLES.iterdir() if f'"{path.stem}"' not in tests] == []


# --------------------------------------------------------------------------------------------------------------- LMCODE


def test_basic_usage(built: Names) -> None:
    ids, generated, model = built["input_ids"], built["generated"], built["model"]
    assert generated.shape == (1, 30)
    assert torch.equal(generated[:, :10], ids)
    shapes = {name: [tuple(m.init_state(1)[0].shape) for m in model.model.memory[name]] for name in ("stm", "ltm")}
    assert [shape[1] for shape in shapes["stm"]] == [8, 8]
    assert [shape[1] for shape in shapes["ltm"]] == [200, 200]
    assert model.model.head_weight.shape == (300, 32)
    assert model(ids).logits.shape == (1, 10, 300)


def test_the_model_configuration_is_that_of_the_recipe() -> None:
    config = execute("lmcode_model_configuration", {"LMCODEConfig": LMCODEConfig})["config"]
    without_text = config.overrides()[:-2]
    assert to_dict(compose(without_text)) == to_dict(compose(["recipe=lmcode_seed"]))
    assert config == LMCODEConfig()


def test_training(built: Names, folder: Path) -> None:
    names = built | {"model": LMCODE(built["config"])}
    before = {name: part.clone() for name, part in names["model"].named_parameters()}
    fewer = {
        "num_samples=1000": "num_samples=24", "num_epochs=10": "num_epochs=5", "batch_size=32": "batch_size=4",
        "_interval': 1000": "_interval': 4", "'warmup_steps': 1000": "'warmup_steps': 2",
        "'total_steps': 10000": "'total_steps': 100",
    }  # fmt: skip
    execute("lmcode_training", names, fewer)
    history, model = names["history"], names["model"]
    loss = [value for value in history["train/loss"] if value is not None]
    assert len(loss) == 30  # five epochs of six steps
    assert sum(loss[-6:]) / 6 < sum(loss[:6]) / 6 - 0.02
    assert any(value is not None for value in history["train/replay_nll"])
    assert any(value is not None for value in history["memory/ltm/merged"])
    unmoved = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) and "memory" not in n]
    assert unmoved == []
    loaded = memlm.load(folder / "best_model.pt")
    ids = names["train_data"][:2]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    built["history"], built["dataset"] = history, names["train_dataset"]


def test_the_training_configuration_is_the_default() -> None:
    config = execute("lmcode_training_configuration", {})["trainer_config"]
    model = Names()  # not used before training
    given, default = lmcode.MemoryAwareTrainer(model, config), lmcode.MemoryAwareTrainer(model)  # type: ignore[arg-type]
    assert given._settings == default._settings
    assert (given._settings.lr, given._settings.consolidate_every, given._total) == (1e-4, 1000, 10000)
    with pytest.raises(ConfigError, match=r"'learning_rat'.*learning_rate"):
        lmcode.MemoryAwareTrainer(model, {"learning_rat": 1e-4})  # type: ignore[arg-type]


def test_sequences_that_never_read_memory_are_told(built: Names, caplog: pytest.LogCaptureFixture) -> None:
    data = MemoryDataset(lmcode.create_synthetic_dataset(4, 20), memory_sample_ratio=0)
    lmcode.MemoryAwareTrainer(LMCODE(built["config"])).train(data, num_epochs=1, batch_size=4)
    assert "memory is never read while they are trained" in caplog.text
    with pytest.raises(ConfigError, match="at least two tokens"):
        MemoryDataset([[1, 2], [3]])


def test_memory_operations(built: Names) -> None:
    names = {"model": LMCODE(built["config"])}
    text = "This is important information to remember"
    [known] = names["model"].store_experience(text)  # so that there is something to merge
    n_slot = [int(ltm.filled(ltm.bank.state()).sum()) for ltm in names["model"].model.memory["ltm"]]
    execute("lmcode_memory_operations", names)
    assert set(names["indices"]) == {known, known + 1}
    assert [record.id for record in names["retrieved"]] == names["indices"]
    assert all(record.text == text for record in names["retrieved"])
    # The same text twice has the same keys and values: each slot of the second finds its twin.
    assert [int(ltm.filled(ltm.bank.state()).sum()) for ltm in names["model"].model.memory["ltm"]] <= n_slot
    assert names["model"].query_memory("important information")[0][0].origins != ()


def test_memory_monitoring(built: Names, folder: Path) -> None:
    long = torch.randint(300, (1, 300))
    names = execute("lmcode_memory_monitoring", {"model": built["model"], "input_ids": long, "step": 1})
    assert names["stats"]["memory/ltm/0/filled"]["last"] == pytest.approx(128 / 200)  # two segments of at most 64 slots
    assert {part["n"] for part in names["stats"].values()} == {1}
    assert (folder / "memory_stats.png").read_bytes().startswith(b"\x89PNG")


def test_memory_analysis(built: Names) -> None:
    model, dataset = built["model"], MemoryDataset(lmcode.create_synthetic_dataset(4, 50))
    sequences = torch.randint(300, (2, 300))
    names = execute("lmcode_memory_analysis", {"model": model, "test_sequences": sequences, "dataset": dataset})
    assert (names["analysis"].n_text, names["analysis"].n_token) == (2, 256)
    assert names["analysis"].banks["ltm/0"].n_filled == [64, 128]
    cost: Efficiency = names["efficiency"]
    n_memory = sum(part.numel() for part in model.model.memory.parameters())
    assert cost.parameter_share == n_memory / sum(part.numel() for part in model.parameters())
    page = names["report"]
    assert page.startswith("<!doctype html>")
    assert "What memory costs" in page
    assert "context 2" in page


def test_visualization(built: Names) -> None:
    history = {"step": [0, 1], "train/loss": [6.0, 5.0]}
    names = {"model": built["model"], "input_sequence": torch.randint(300, (1, 300)), "history": history}
    exec(sample("lmcode_visualization").partition("# Plot")[0], names)
    titles = " ".join(axes.get_title(loc="left") for axes in names["fig"].axes)
    assert all(f"{name}/{layer}" in titles for name in ("stm", "ltm") for layer in (0, 1))
    execute("lmcode_visualization", names)
    [line] = names["fig"].subfigs[0].axes[0].lines
    assert line.get_ydata().tolist() == [6.0, 5.0]


# ----------------------------------------------------------------------------------------------------- AutoMemoryModule

TEXT = "the cat sat on a mat. one dog ran up my hill. no bird flew over his house. red fish swam under her boat"
SENTENCES = [sentence.split() for sentence in TEXT.split(". ")]
VOCAB = {word: i for i, word in enumerate(word for sentence in SENTENCES for word in sentence)}
FILLED = {"sentences = [...]": "", "vocab = {...}": ""}  # the test gives both: the sample asks for vocab before


def accuracy(names: Names) -> float:
    right = 0
    for tokens, target in names["dataset"]:
        right += int(names["model"](tokens[None], None).argmax()) == int(target)
    return right / len(names["dataset"])


def test_automemory_training(capsys: pytest.CaptureFixture[str]) -> None:
    """With one token kept: the sample has an output for each kept token, and one target."""
    names = {"vocab": VOCAB, "sentences": SENTENCES * 10}
    execute("automemory_training", names, FILLED | {"max_memory_size = 50": "max_memory_size = 1"})
    losses = [float(value) for value in re.findall(r"Loss: (\S+)", capsys.readouterr().out)]
    assert losses == []  # it prints every hundredth step of an epoch, of which there are 40
    assert names["loss"].item() < 0.5 * math.log(len(VOCAB))
    assert accuracy(names) == 1.0  # every word belongs to one sentence, so any of them tells the last


def test_automemory_training_with_our_model() -> None:
    text = sample("automemory_training", FILLED)
    begin, end = text.index("# Define the large language model"), text.index("# Hyperparameters")
    text = "from memlm.compat.automemory import SimpleLanguageModel\n" + text[:begin] + text[end:]
    names: Names = {"vocab": VOCAB, "sentences": SENTENCES * 3}
    exec(text, names)
    assert accuracy(names) == 1.0
    model, other = names["model"], torch.tensor([[VOCAB[word] for word in SENTENCES[1][:-1]]])
    model(other)
    assert int((model.memory_context.memory["auto"][0].ids >= 0).sum()) == 5
    asked = torch.tensor([[VOCAB["the"]]])
    assert not torch.equal(model(asked, model.memory_context), model(asked))


def test_automemory_keeps_the_best_in_order() -> None:
    from memlm.compat.automemory import AutoMemoryModule

    module = AutoMemoryModule(6, 5, 3)
    torch.nn.init.normal_(module.memory.score_net[2].weight)  # scores that differ
    many, nothing = torch.randn(1, 200, 6), torch.zeros(1, 0, dtype=torch.bool)
    least = module.memory.scores(many, torch.zeros(1, 0, 6), nothing).median().item()
    module.memory.threshold = least
    context: torch.Tensor | None = None
    sizes = set()
    for _ in range(20):
        sentence = torch.randn(1, 4, 6)
        before = torch.zeros(0, 6) if context is None else context
        candidates = torch.cat([before, sentence[0]])
        score = module.memory.scores(candidates[None], before[None], torch.ones(1, len(before), dtype=torch.bool))[0]
        best = sorted((i for i in range(len(score)) if score[i] >= least), key=lambda i: -score[i].item())[:3]
        context, scores = module(sentence, context)
        torch.testing.assert_close(context, candidates[sorted(best)])
        torch.testing.assert_close(scores, score[sorted(best)])
        sizes.add(len(context))
    assert {1, 3} <= sizes
    with pytest.raises(ValueError, match="one sentence"):
        module(torch.randn(2, 4, 6))
    with pytest.raises(ValueError, match="4 tokens, more than max_memory_size, 3"):
        module(torch.randn(1, 4, 6), torch.randn(4, 6))


# -------------------------------------------------------------------------------------------------------------- Memoria


def run_printed(text: str, names: Names, name: str) -> int:
    """Run a text; of strings in it that show a session, compare what is printed there. How many were compared."""
    n_compared = 0
    for i, part in enumerate(text.split('"""')):
        if i % 2 == 0:
            exec(compile(part, name, "exec"), names)
            continue
        session = doctest.DocTestParser().get_doctest(part, names, name, None, None)
        session.globs = names
        session.examples = [example for example in session.examples if example.want]
        n_compared += len(session.examples)
        told: list[str] = []
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
            session, out=told.append, clear_globs=False
        )
        assert result.failed == 0, "".join(told)
    return n_compared


def test_the_tutorial_of_memoria_prints_what_its_source_printed() -> None:
    assert run_printed(sample("memoria_tutorial"), {}, "memoria_tutorial") == 19


def test_memoria_forgets_on_request_and_says_what_is_missing() -> None:
    from memlm.compat.memoria import Memoria

    memoria = Memoria(2, 4, 1, 3, 2)
    with pytest.raises(ValueError, match="add_working_memory"):
        memoria.remind()
    memoria.add_working_memory(torch.rand(1, 3, 2))
    assert len(memoria.engrams) == 3
    memoria.reset_memory()
    assert len(memoria.engrams) == 0


# ------------------------------------------------------------------------------------------ IMM, Adaptive Neural Memory


def command(name: str, monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """Run the command of a sample here, with smaller settings."""
    python, flag, module = shlex.split(sample(name))
    assert (python, flag) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *settings])
    runpy.run_module(module, run_name="__main__")


def test_memory_experiments(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(
        "imm_how_to_run", monkeypatch, "data=text", f"data.path={write_text(folder)}", "data.tokenizer.kind=word",
        "data.tokenizer.vocab_size=400", "model.n_layer=2", "model.n_head=2", "model.d_model=16",
        "model.segment_len=16", "model.overlap=4", "trainer=cpu", "trainer.max_steps=2", "trainer.limit_val_batches=1",
        "trainer.val_check_interval=2", "trainer.enable_progress_bar=false", "logger=csv",
        "pattern_storage.n_stored=[8]", "pattern_storage.n_document=2", "slot_usage.n_document=2",
        "slot_usage.n_fact=2", "slot_usage.distance=32", "context_influence.limit=400",
        "context_influence.n_document=2", "context_influence.n_fact=2", "context_influence.distance=32",
        "needle.n_document=2", "needle.n_fact=2", "needle.distance=32",
        "modern_facts.n_document=2", "modern_facts.distance=32",
    )  # fmt: skip
    out = capsys.readouterr().out
    for plot in ("pattern_similarity.png", "context_influence.png", "slot_usage_heatmap.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
        assert plot in out
    [found] = folder.glob("outputs/*/*/pattern_storage/result.json")
    assert json.loads(found.read_text())["metadata"]["settings"]["pattern"] == "passage"


def test_memory_system(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(
        "adaptive_usage", monkeypatch, "data=text", f"data.path={write_text(folder)}", "data.tokenizer.kind=word",
        "data.tokenizer.vocab_size=400", "preferences.n_user=20", "preferences.n_session=6", "preferences.n_step=3",
        "memory.adaptive.controller=always",
    )  # fmt: skip
    [found] = folder.glob("outputs/*/*/preferences/result.json")
    rows = json.loads(found.read_text())["rows"]
    told = dict(re.findall(r"^(\w+)[^:]*: +(\d+)%", capsys.readouterr().out, re.MULTILINE))

    def rate(hit: str, all_: str) -> str:
        part = [row for row in rows if row["condition"] == "on"]
        return f"{100 * sum(row[hit] for row in part) / sum(row[all_] for row in part):.0f}"

    assert told["learns"] == rate("held", "asked")
    assert told["ignores"] == rate("stored_noise", "stored")
    assert told["retrieves"] == rate("right", "asked")
    dropped = [row["dropped"] for row in rows if row["condition"] == "on" and row["dropped"] >= 0]
    assert told["forgets"] == f"{100 * sum(dropped) / len(dropped):.0f}"
