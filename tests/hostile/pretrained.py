"""Pretrained models that are none, cannot be taken, are not the ones that a run stands on, or lack what they need."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from memlm.data.tokenizer import train_tokenizer
from tests.hostile.base import CANARY, CHECKOUT, Answer, Case, command

Change = Callable[[Path], object]

TINY = (
    "model=pretrained", "model.segment_len=16", "model.overlap=4", "memory=stm", "memory.stm.n_slot=4", "watch=null",
    "experiment=[]", "logger=csv", "trainer=cpu", "trainer.max_steps=1", "curriculum=plain",
)  # fmt: skip


@functools.cache
def _made() -> Path:
    """A folder with a base, and a run on it, trained in a process of its own: threads must not be forked."""
    from tests.models import bases

    folder = Path(tempfile.mkdtemp(prefix="memlm-hostile-base-"))
    base = bases.with_tokenizer(bases.make_base("llama", folder))
    given = [*TINY, f"model.path={base}", f"hydra.run.dir={folder / 'run'}"]
    subprocess.run([sys.executable, "train.py", *given], cwd=CHECKOUT, check=True, capture_output=True)
    return folder


def _base(change: Change) -> Path:
    """The base, changed, in the case's own directory."""
    folder = Path("base").absolute()
    shutil.copytree(_made() / "llama", folder)
    change(folder)
    return folder


def _train(change: Change, *more: str) -> None:
    command("train", *TINY, f"model.path={_base(change)}", "hydra.run.dir=run", *more)


def _chat(change: Change, *more: str) -> None:
    given = ("model=pretrained", "model.segment_len=16", "model.overlap=4", "memory=cache")
    command("chat", *given, f"model.path={_base(change)}", *more)


def _run_on(change: Change, script: str, *more: str) -> None:
    """A command for a trained run whose base has changed since."""
    run, base = Path("run").absolute(), _base(change)
    shutil.copytree(_made() / "run", run)
    for path in run.rglob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        content["memlm"]["config"]["model"]["path"] = str(base)
        torch.save(content, path)
    command(script, f"checkpoint={run}", *more)


# --- changes of a base -----------------------------------------------------------------------------------------------


def _config(**settings: Any) -> Change:
    """Other values in ``config.json``; None takes a key away."""

    def change(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))

    return change


def _write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def _drop(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def _cut(name: str) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def _other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {name: part + 0.01 for name, part in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _other_tokenizer(folder: Path) -> None:
    (folder / "other.json").write_text(train_tokenizer("char", ["abc "], 0).to_json())


def _another_tokenizer(folder: Path) -> None:
    _other_tokenizer(folder)
    (folder / "other.json").replace(folder / "tokenizer.json")


def _encoder(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=40, **sizes)).save_pretrained(folder)


def _both(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)).save_pretrained(folder)


def _soft_capped(folder: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=48, final_logit_softcapping=0.5,
        )
    ).save_pretrained(folder)  # fmt: skip


def _wide_heads(folder: Path) -> None:
    from tests.models import bases

    bases.make_base("qwen3", folder, head_dim=16)
    for path in (folder / "qwen3").iterdir():
        path.replace(folder / path.name)


class _Acts:
    def __reduce__(self) -> Any:
        return (open, (CANARY, "w"))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Acts()))


def _code(folder: Path) -> None:
    """Code of a stranger, which the settings of the model name."""
    (folder / "acting.py").write_text(f"open({CANARY!r}, 'w')\n")
    _config(auto_map={"AutoConfig": "acting.C", "AutoModelForCausalLM": "acting.M"}, model_type="acting")(folder)


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a model")


QUANTISED = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BASES: dict[str, Change] = {
    "gone": _gone,
    "a file": _a_file,
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no config.json": _drop("config.json"),
    "config.json is cut off": _cut("config.json"),
    "config.json is a list": _write("config.json", b"[]"),
    "config.json is empty": _write("config.json", b"{}"),
    "config.json is no text": _write("config.json", b"\xff\x00\xfe"),
    "of an unknown family": _config(model_type="nothing", architectures=["NothingForCausalLM"]),
    "of a family with code of its own": _code,
    "no weights": _drop("model.safetensors"),
    "weights are cut off": _cut("model.safetensors"),
    "weights are text": _write("model.safetensors", b"weights"),
    "weights are a pickle": _pickled,
    "of more layers than weights": _config(num_hidden_layers=4),
    "of another width than weights": _config(hidden_size=64),
    "of no layers": _config(num_hidden_layers=0),
    "of heads that do not fit": _config(num_attention_heads=5),
    "sizes are words": _config(hidden_size="wide"),
    "no tokenizer": _drop("tokenizer.json", "tokenizer_config.json"),
    "tokenizer.json is cut off": _cut("tokenizer.json"),
    "tokenizer.json is a list": _write("tokenizer.json", b"[]"),
    "an encoder": _encoder,
    "an encoder with a decoder": _both,
    "its head is capped": _soft_capped,
    "quantised without what reads it": _config(quantization_config=QUANTISED),
    "quantised in no way there is": _config(quantization_config={"quant_method": "nothing"}),
    "quantised says a word": _config(quantization_config="eight bits"),
}
HARMLESS: dict[str, tuple[Answer, ...]] = {
    "quantised in no way there is": ("right", "sentence")
}  # its weights are whole
SETTINGS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "segments are longer than its places": (_config(), ("model.segment_len=61",)),
    "an overlap is longer than its places": (_config(), ("model.segment_len=40", "model.overlap=40")),
    "another tokenizer": (_other_tokenizer, ("data.tokenizer.path=base/other.json",)),
    "a larger vocabulary": (_config(), ("data.tokenizer.n_vocab=1000",)),
    "a quantised base is trained": (_config(quantization_config=QUANTISED), ("model.freeze=false",)),
    "a quantised base with adapters": (_config(quantization_config=QUANTISED), ("model.lora={r: 2}",)),
    "another hash": (_config(), ("model.sha256=abc",)),
    "a revision of a folder": (_config(), ("model.revision=main",)),
    "adapters beside weights that are trained": (_config(), ("model.lora={r: 2}", "model.freeze=false")),
    "adapters without a rank": (_config(), ("model.lora={r: 0}",)),
    "adapters of an unknown setting": (_config(), ("model.lora={rank: 2}",)),
    "adapters where nothing is": (_config(), ("model.lora={r: 2, target_modules: [nothing]}",)),
    "adapters are a number": (_config(), ("model.lora=8",)),
    "layers that are not there": (_config(), ("model.memory_layers=[7]",)),
    "a type that is none": (_config(), ("model.dtype=int8",)),
    "heads as wide as memories do not take them": (_wide_heads, ("memory=infini",)),
}
SINCE: dict[str, Change] = {
    name: BASES[name]
    for name in (
        "gone", "empty", "config.json is cut off", "no weights", "weights are cut off", "no tokenizer",
        "tokenizer.json is cut off", "an encoder", "of more layers than weights",
    )
} | {"other weights": _other_weights, "another tokenizer": _another_tokenizer}  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": ("experiment=perplexity", "perplexity.limit=100"),
    "generate": ("prompt=a cat", "max_new_tokens=3"),
    "chat": (),
    "export": ("output=out",),
}


def settings() -> Iterator[Case]:
    """Settings of a model that stands on a good base."""
    _made()
    for name, (change, more) in SETTINGS.items():
        yield Case(f"train: {name}", functools.partial(_train, change, *more))
    yield Case("train: nothing is wrong", functools.partial(_train, _config()), ("right",))
    yield Case("chat: nothing is wrong", functools.partial(_chat, _config()), ("right",))


def files() -> Iterator[Case]:
    """Folders that are no bases, and bases that have changed since a run was trained on them."""
    _made()
    for name, change in BASES.items():
        yield Case(f"train: {name}", functools.partial(_train, change), HARMLESS.get(name, ("sentence",)))
        yield Case(f"chat: {name}", functools.partial(_chat, change), HARMLESS.get(name, ("sentence",)))
    for script, more in COMMANDS.items():
        for name, change in SINCE.items():
            yield Case(f"{script}: {name}", functools.partial(_run_on, change, script, *more))
        yield Case(f"{script}: nothing is wrong", functools.partial(_run_on, _config(), script, *more), ("right",))


def faults() -> Iterator[Case]:
    """Packages that are not installed."""
    _made()
    for package, more in {"transformers": (), "peft": ("model.lora={r: 2}",)}.items():
        yield Case(f"train: without {package}", functools.partial(_without, package, _train, _config(), *more))
    yield Case("chat: without transformers", functools.partial(_without, "transformers", _chat, _config()))
    for script, more in COMMANDS.items():
        do = functools.partial(_without, "transformers", _run_on, _config(), script, *more)
        yield Case(f"{script}: without transformers", do)


def _without(package: str, do: Callable[..., None], *given: Any) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
    do(*given)
