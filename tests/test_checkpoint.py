import builtins
import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning
import pytest
import safetensors.torch
import tokenizers
import torch

import memlm
from memlm import files as files_module
from memlm.assemble import build_data, build_model, build_tokenizer
from memlm.checkpoint import checkpoints, describe, export, find, load_run, read, write
from memlm.config import ConfigError
from memlm.machine import no_space
from memlm.training.module import LanguageModeling
from tests.training.small import FACTS, config, fit

ENTRY = {"version": memlm.__version__, "config": {}, "tokenizer": ""}
CONTENT: dict[str, Any] = {"memlm": ENTRY, "state_dict": {"w": torch.arange(10_000.0)}}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_is_killed_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step=1.ckpt"
    write(CONTENT, path)

    def half(content: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write(CONTENT | {"new": 1}, path)
    with pytest.raises(KeyboardInterrupt):
        write(CONTENT, tmp_path / "step=2.ckpt")
    monkeypatch.undo()
    assert files(tmp_path) == ["step=1.ckpt"]
    assert torch.equal(read(path)["state_dict"]["w"], CONTENT["state_dict"]["w"])
    assert read(path, peek=True)["memlm"] == CONTENT["memlm"]

    # killed by signal 9, where nothing can be cleaned up
    child = os.fork()
    if child == 0:
        torch.save = lambda content, file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), 9))  # type: ignore[assignment, func-returns-value]
        write(CONTENT | {"new": 1}, path)
    os.waitpid(child, 0)
    assert len(files(tmp_path)) == 2
    assert checkpoints(tmp_path) == [path]
    assert "new" not in read(path)


def test_no_space_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "step=1.ckpt"
    write(CONTENT, old)

    def fail(number: int) -> None:
        def replace(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "replace", replace)

    for number in (errno.ENOSPC, errno.EDQUOT):
        fail(number)
        with pytest.raises(ConfigError, match=r"no space is left.*step=2\.ckpt.*earlier checkpoints are whole"):
            write(CONTENT, tmp_path / "step=2.ckpt")
        assert files(tmp_path) == ["step=1.ckpt"]
    fail(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(CONTENT, tmp_path / "step=2.ckpt")
    assert files(tmp_path) == ["step=1.ckpt"]
    read(old)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_space_as_the_system_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, *args: Any, **settings: Any) -> Any:
        Path(path).touch()
        return builtins.open("/dev/full", *args, **settings)

    monkeypatch.setattr(files_module, "open", full, raising=False)
    with pytest.raises(ConfigError, match="no space is left"):
        write(CONTENT, tmp_path / "step=2.ckpt")
    assert files(tmp_path) == []


@pytest.mark.parametrize("ending", [".tmp", "step=6.ckpt"])  # as it is written, and when it gets its name
def test_no_space_stops_training_with_a_sentence(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if "step=6.ckpt" in str(target) and str(target).endswith(ending):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConfigError, match=r"no space is left .* free some .*go on with resume=auto") as caught:
        fit(config(tmp_path, "a"))
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "a" / "checkpoints") == ["step=3.ckpt"]
    memlm.load(tmp_path / "a")


def test_an_error_behind_an_error_is_found() -> None:
    error = RuntimeError("while closing")
    error.__context__ = OSError(errno.ENOSPC, "full")
    assert no_space(error)
    assert not no_space(RuntimeError("x"))
    assert not no_space(OSError(errno.EIO, "x"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], torch.Tensor]:
    """A run whose text and cache are gone; its weights, and what it predicts."""
    folder = tmp_path_factory.mktemp("trained")
    cache = folder / "cache"
    settings = config(folder, "run", f"paths.cache_dir={cache}", memory="dual", phases=[FACTS])
    _, module, _ = fit(settings)
    model = module.model.eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert cache.is_dir()
    shutil.rmtree(cache)
    (folder / "text.txt").rename(folder / "moved.txt")
    return folder, weights, model(torch.arange(40).view(1, 40)).logits.detach()


def test_loading_needs_nothing_but_the_path(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, weights, logits = trained
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMLM_CACHE", str(tmp_path / "elsewhere"))
    moved = tmp_path / "moved"
    shutil.copytree(folder / "run", moved)
    for path in (str(folder / "run"), moved, moved / "checkpoints", "moved/checkpoints/step=9.ckpt"):
        model = memlm.load(path)
        assert not model.training
        assert {name: value.shape for name, value in model.state_dict().items()} == {
            name: value.shape for name, value in weights.items()
        }
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(torch.arange(40).view(1, 40)).logits, logits)
        assert model.tokenizer.encode(" x")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ConfigError, match=r"text\.txt' does not exist"):
        load_run(moved)[1].setup()


def test_a_text_that_was_moved_is_taken_from_where_it_is_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(config(tmp_path, "a", "trainer.max_steps=1"))
    text, now, other = (tmp_path / f"{name}.txt" for name in ("text", "now", "other"))
    text.rename(now)
    other.write_text(now.read_text() + "one more line\n")
    _, data = load_run(tmp_path / "a", text=str(now))
    assert data.tokens("val").n_token > 0
    with pytest.raises(ConfigError, match=r"data.path: .*other\.txt is another text than"):
        load_run(tmp_path / "a", text=str(other))
    with pytest.raises(ConfigError, match=r"text\.txt' does not exist"):
        load_run(tmp_path / "a")[1].tokens("val")
    assert "is another text now" not in caplog.text
    other.rename(text)
    load_run(tmp_path / "a")[1].tokens("val")
    assert "is another text now" in caplog.text


def test_a_checkpoint_of_a_plain_trainer_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, "a")
    overrides = [f"data.path={tmp_path / 'text.txt'}", "data.tokenizer.kind=word", "data.tokenizer.vocab_size=400"]
    small = ["n_layer=1", "n_head=1", "d_model=8", "segment_len=16"]
    model = memlm.build("data=text", *overrides, *(f"model.{s}" for s in small), "memory.ltm.n_slot=50", "seed=3")
    data = build_data(settings, model.tokenizer)
    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, limit_val_batches=1
    )
    trainer.fit(LanguageModeling(model), data)
    path = Path(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert path.name == "epoch=0-step=4.ckpt"
    monkeypatch.chdir("/")
    for place in (path, path.parent, path.parent.parent):
        loaded = memlm.load(place)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    trainer.save_checkpoint(tmp_path / "only.ckpt", weights_only=True)
    memlm.load(tmp_path / "only.ckpt")


def test_the_newest_is_found_by_number(tmp_path: Path) -> None:
    for name in ("step=9.ckpt", "step=10.ckpt", "epoch=0-step=8-v1.ckpt", "last.ckpt", ".step=99.ckpt.x.1.tmp"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch=0-step=8-v1.ckpt", "step=9.ckpt", "step=10.ckpt"]
    assert find(tmp_path).name == "step=10.ckpt"
    assert find(tmp_path / "last.ckpt").name == "last.ckpt"
    with pytest.raises(ConfigError, match="no run or checkpoint at"):
        find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        find(tmp_path / "empty")


def test_what_does_not_fit_is_told_in_a_sentence(trained: Any, tmp_path: Path) -> None:
    content = read(find(trained[0] / "run"))
    entry, settings = content["memlm"], content["memlm"]["config"]
    path = tmp_path / "x.ckpt"
    for changed, told in {
        "layers": (settings | {"model": settings["model"] | {"n_layer": 3}}, "the weights do not fit"),
        "version": (settings | {"model": settings["model"] | {"no_such": 3}}, "no_such is not a setting of"),
        "class": (
            settings | {"model": settings["model"] | {"_target_": "my.own.Model"}},
            r"names my.own.Model, which is no part of memlm, .* say so with trust=\[my\]",
        ),
    }.values():
        write(content | {"memlm": entry | {"config": changed}}, path)
        with pytest.raises(ConfigError, match=told) as caught:
            memlm.load(path)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "data.tokenizer.n_vocab=5")
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.n_vocab \(5\) is smaller"):
        build_model(settings, build_tokenizer(settings))


# --- exported models -------------------------------------------------------------------------------------------------


def _used(model: Any, text: str) -> dict[str, Any]:
    """What a model predicts, generates and, if it has a memory that keeps records, remembers of a text."""
    ids = torch.arange(40)[None] % 50
    found = {"logits": model(ids).logits.detach()}
    if "ltm" in model.config["memory"]:
        found["stored"] = model.store_experience(text)
        found["asked"] = [part._asdict() for part in model.query_memory(text)]
    return found | {"generated": model.generate(ids[:, :8], max_new_tokens=24, temperature=0)}


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["none", "dual"])
def test_an_exported_model_is_the_same_without_what_trained_it(memory: str, tmp_path: Path) -> None:
    scope = ["memory.ltm.scope=shared"] if memory == "dual" else []  # with a bank, which is a part of the model
    fit(config(tmp_path, "a", *scope, "trainer.max_steps=2", memory=memory, phases=[FACTS]))
    model = memlm.load(tmp_path / "a")
    assert [path.name for path in export(model, tmp_path / "out")] == [
        "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert files(tmp_path) == ["a", "out", "text.txt"]  # nothing temporary is left
    again = memlm.load(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.tokenizer.to_json() == model.tokenizer.to_json()

    text = (tmp_path / "text.txt").read_text().splitlines()[0]
    code = f"""
import sys
for name in ("hydra", "omegaconf", "lightning", "lightning_fabric", "pytorch_lightning", "wandb"):
    sys.modules[name] = None  # importing it is an error
import memlm, torch
model = memlm.load({str(tmp_path / "out")!r})
{inspect.getsource(_used)}
torch.save(_used(model, {text!r}), {str(tmp_path / "used.pt")!r})
"""
    code = f"from __future__ import annotations\nfrom typing import Any\n{code}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    expected, found = _used(model, text), torch.load(tmp_path / "used.pt")
    for name in ("logits", "generated"):
        assert torch.equal(found.pop(name), expected.pop(name))
    assert found == expected
    assert memory == "none" or (found["stored"] and any(part["text"] in text for part in found["asked"]))


def test_what_others_read_of_an_export_is_plain(tmp_path: Path) -> None:
    settings = config(tmp_path, "a")
    model = build_model(settings, build_tokenizer(settings))
    export(model, tmp_path / "out")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["embedding.weight"], model.embedding.weight)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["config"]["memory"]["ltm"]["n_slot"] == 64
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab_size() > 0


def test_a_damaged_export_or_a_taken_name_is_told(tmp_path: Path) -> None:
    settings = config(tmp_path, "a")
    model = build_model(settings, build_tokenizer(settings))
    export(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="out exists already: give the name of a new directory"):
        export(model, tmp_path / "out")
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors is not as it was exported: export the model again"):
        memlm.load(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(whole)
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not as it was exported"):
        memlm.load(tmp_path / "out")


def test_a_quick_look_shows_what_was_written_or_refuses(tmp_path: Path) -> None:
    path = tmp_path / "step=1.ckpt"
    content = {
        "memlm": {"version": memlm.__version__, "config": {"a": [1, "two"]}, "tokenizer": "words " * 50},
        "state_dict": {"w": torch.arange(9.0)},
    }
    write(content, path)
    whole, n_refused = path.read_bytes(), 0
    assert read(path, peek=True)["state_dict"]["w"].is_meta  # no value that was not checked is handed out
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = read(path, peek=True)
        except ConfigError:
            n_refused += 1
        else:
            assert found["memlm"] == content["memlm"], place
    assert n_refused > len("words ") * 50 / 7
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as parts, pytest.warns(UserWarning, match="Duplicate"):
        parts.writestr(next(name for name in parts.namelist() if name.endswith("data.pkl")), b"other")
    for peek in (False, True):
        with pytest.raises(ConfigError, match=r"is damaged|is there twice"):
            read(path, peek)


def test_what_has_no_checksums_or_is_no_file_is_refused(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "step=1.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match="damaged or cut short"):
        read(tmp_path / "step=1.ckpt")
    os.mkfifo(tmp_path / "step=2.ckpt")
    for path in (tmp_path, tmp_path / "step=2.ckpt"):
        with pytest.raises(ConfigError, match=r"step=2\.ckpt is a pipe: a regular file"):
            memlm.load(path)


@pytest.mark.parametrize("name", ["SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_of_an_export_is_refused_or_changes_nothing(name: str, tmp_path: Path) -> None:
    settings = config(tmp_path, "a")
    model = build_model(settings, build_tokenizer(settings))
    export(model, tmp_path / "out")
    path, n_refused = tmp_path / "out" / name, 0
    whole = path.read_bytes()
    for place in range(0, len(whole), -(-len(whole) // 12)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=r"is not as it was exported|is damaged or cut short"):
            memlm.load(tmp_path / "out")
        n_refused += 1
    assert n_refused >= 11
    path.write_bytes(whole)
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, check=True)
    assert sums.stdout.decode().split() == ["config.json:", "OK", "model.safetensors:", "OK", "tokenizer.json:", "OK"]
    path.unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing: an export has|there is no checkpoint in"):
        memlm.load(tmp_path / "out")


# --- files of strangers ----------------------------------------------------------------------------------------------


def _changed(trained: Any, path: Path, **parts: Any) -> Path:
    """The trained checkpoint with other parts of its configuration."""
    content = read(find(trained[0] / "run"))
    entry = content["memlm"]
    write(content | {"memlm": entry | {"config": entry["config"] | parts}}, path)
    return path


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("os.mkdir", r"memory\.evil\._target_ names os\.mkdir, which is no part of memlm"),
        ("acting.Memory", r"names acting\.Memory, which is no part of memlm, .* say so with trust=\[acting\]"),
        ("memlm.checkpoint.os.mkdir", "cannot be imported here"),
        ("memlm.checkpoint.write", "must name a Memory, which memlm.checkpoint.write is not"),
        ("memlm.memory.contract.Memory", "must name a Memory"),
        ("memlm.data.corpora.builtin.Builtin", "must name a Memory"),
        ("memlm.memory.ltm.nn.Identity", "cannot be imported here"),
        ("memlm.memory.ltm.Tensor", "must name a Memory"),
        ("memlm..Memory", "must be the dotted name of a class"),
        (["os.mkdir"], "must be the dotted name of a class"),
    ],
)
def test_what_a_file_names_is_neither_imported_nor_called(
    target: Any, told: str, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "acting.py").write_text("import os\nos.mkdir('EXECUTED')\nclass Memory: pass\n")
    memory = {"evil": {"_target_": target, "path": "EXECUTED"}}
    with pytest.raises(ConfigError, match=told) as caught:
        memlm.load(_changed(trained, tmp_path / "x.ckpt", memory=memory))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize("place", ["corpus", "curriculum", "task", "nested"])
def test_data_of_a_file_is_of_memlm_alone(place: str, trained: Any, tmp_path: Path) -> None:
    node = {"_target_": "os.mkdir", "path": str(tmp_path / "EXECUTED")}
    settings = read(find(trained[0] / "run"))["memlm"]["config"]
    parts = {
        "corpus": {"data": settings["data"] | {"corpus": node}},
        "curriculum": {"curriculum": node},
        "task": {"curriculum": settings["curriculum"] | {"task": node}},
        "nested": {"curriculum": settings["curriculum"] | {"phases": [{"task": node}]}},
    }[place]
    path = _changed(trained, tmp_path / "x.ckpt", **parts)
    with pytest.raises(ConfigError, match=r"is no part of memlm|nothing is built there"):
        load_run(path)
    memlm.load(path)  # which builds none of it
    assert not (tmp_path / "EXECUTED").exists()


def test_a_package_that_is_trusted_may_be_named(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "owned").mkdir()
    (tmp_path / "owned" / "__init__.py").touch()
    (tmp_path / "owned" / "memory.py").write_text(
        "from memlm.memory.ltm import LongTermMemory\n"
        "class Own(LongTermMemory): pass\n"
        "def make(*a, **k): return Own(*a, **k)\n"
    )
    memory = read(find(trained[0] / "run"))["memlm"]["config"]["memory"]

    def changed(target: str) -> Path:
        own = memory | {"ltm": memory["ltm"] | {"_target_": target}}
        return _changed(trained, tmp_path / "x.ckpt", memory=own)

    for trust in ("owned", ["owned.memory"], ("other", "owned")):
        model: Any = memlm.load(changed("owned.memory.Own"), trust=trust)
        assert type(model.memory["ltm"][0]).__name__ == "Own"
    for trust in (None, [], "own", ["owned.mem"]):
        with pytest.raises(ConfigError, match=r"names owned\.memory\.Own, which is no part of memlm"):
            memlm.load(changed("owned.memory.Own"), trust=trust)
    for target in ("owned.memory.make", "owned.memory.LongTermMemory.x", "owned.memory"):
        with pytest.raises(ConfigError, match=r"must name a Memory|cannot be imported here"):
            memlm.load(changed(target), trust="owned")
    with pytest.raises(ConfigError, match="trust must be names of packages"):
        memlm.load(changed("owned.memory.Own"), trust="a b")


def test_the_cache_is_where_the_user_has_it(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_CACHE", str(tmp_path / "mine"))
    path = _changed(trained, tmp_path / "x.ckpt", paths={"cache_dir": str(tmp_path / "theirs")})
    assert load_run(path)[1].cache_dir == tmp_path / "mine"
    assert load_run(path, paths={"cache_dir": str(tmp_path / "other")})[1].cache_dir == tmp_path / "other"


def test_what_would_never_end_or_fit_is_refused_by_size(trained: Any, tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    bomb: Any = [1]
    for _ in range(40):
        bomb = [bomb, bomb]
    model = read(find(trained[0] / "run"))["memlm"]["config"]["model"]
    for parts, told in (
        ({"watch": loop}, "nested more than 60 deep"),
        ({"watch": bomb}, "more than 10,000,000 values"),
        ({"watch": "x" * 20_000_000}, "more than 10,000,000 values"),
        ({"seed": 2**70}, "a whole number has 71 bits"),
        ({"model": model | {"n_layer": 10**9}}, "there are no more than"),
        ({"model": model | {"d_model": 10**6}}, "do not fit"),
        ({"model": model | {"overlap": 0, "segment_len": 10**6}}, r"wants [\d,.]+ GiB of memory"),
        ({"memory": []}, "memory must be a mapping"),
    ):
        with pytest.raises(ConfigError, match=told):
            memlm.load(_changed(trained, tmp_path / "x.ckpt", **parts))


def test_weights_of_another_model_or_scope_or_not_finite_are_told(tmp_path: Path) -> None:
    settings = config(tmp_path, "a", "memory.ltm.scope=shared")
    model = build_model(settings, build_tokenizer(settings))
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    path, entry = tmp_path / "x.ckpt", describe(model)

    def told(state_dict: Any) -> str:
        write({"memlm": entry, "state_dict": state_dict}, path)
        with pytest.raises(ConfigError) as caught:
            memlm.load(path)
        return str(caught.value)

    assert "lacking are norm.weight" in told({n: v for n, v in weights.items() if n != "model.norm.weight"})
    assert "not of the model are other" in told(weights | {"model.other": torch.zeros(2)})
    assert "of another size or type are norm.weight" in told(weights | {"model.norm.weight": torch.zeros(2)})
    assert "norm.weight are not all finite" in told(weights | {"model.norm.weight": torch.full((16,), torch.nan)})
    assert "norm.weight has fewer numbers" in told(weights | {"model.norm.weight": torch.zeros(1).expand(16)})
    longest = torch.zeros(max(value.numel() for value in weights.values()))
    same = {n: longest[: v.numel()].view(v.shape) for n, v in weights.items() if v.is_floating_point()}
    assert "most weights are the same numbers" in told(weights | same)
    assert "memory.ltm.scope is shared in the configuration, but no shared bank" in told(
        {name: value for name, value in weights.items() if ".bank." not in name}
    )


def test_a_later_or_odd_version_is_told(trained: Any, tmp_path: Path) -> None:
    content = read(find(trained[0] / "run"))
    for version, told in (("99.0", "install that version"), (99.0, "version is no text"), ("x", "its version is 'x'")):
        write(content | {"memlm": content["memlm"] | {"version": version}}, tmp_path / "x.ckpt")
        with pytest.raises(ConfigError, match=told):
            memlm.load(tmp_path / "x.ckpt")


def test_only_a_regular_file_is_read(trained: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "step=99.ckpt")
    shutil.copy(find(trained[0] / "run"), tmp_path / "step=9.ckpt")
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    (tmp_path / "link.ckpt").symlink_to("step=9.ckpt")
    for name, told in (("step=99.ckpt", "is a pipe"), (".", "is a pipe"), ("zero.ckpt", "is a device"),
                       ("loop.ckpt", "cannot be read")):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            memlm.load(tmp_path / name)
    memlm.load(tmp_path / "link.ckpt")


def test_an_archive_that_grows_or_overlaps_is_refused(trained: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(find(trained[0] / "run")) as old:
        for name, compression, twice in (("packed", zipfile.ZIP_DEFLATED, False), ("twice", zipfile.ZIP_STORED, True)):
            with zipfile.ZipFile(tmp_path / name, "w", compression) as new:
                for info in [*old.infolist(), *old.infolist()[:1]] if twice else old.infolist():
                    new.writestr(info.filename, old.read(info))
    with pytest.raises(ConfigError, match="its parts are compressed"):
        memlm.load(tmp_path / "packed")
    with pytest.raises(ConfigError, match="a part of it is there twice"):
        memlm.load(tmp_path / "twice")
