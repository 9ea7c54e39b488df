"""Files of strangers that name code to run, are no files, or whose structure is not what is expected."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import io
import json
import os
import pickle
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import memlm
from memlm import checkpoint
from memlm.assemble import build_model, build_tokenizer
from memlm.checkpoint import load_run
from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from tests.hostile.base import CANARY, Case, Silent, command
from tests.training.small import FACTS, config, fit, overrides

Change = Callable[[dict[str, Any]], object]

TOUCH = f"open({CANARY!r}, 'w')"
SH = ["sh", "-c", f"touch {CANARY}"]

# What would run something if it was called, or only imported, by target: settings with which the call does it. ``mode``
# and the like is what memlm passes by position.
ACTS: dict[str, dict[str, Any]] = {
    "os.system": {"command": f"touch {CANARY}"},
    "os.popen": {"cmd": f"touch {CANARY}"},
    "os.spawnv": {"file": "/bin/sh", "args": SH},
    "os.spawnlp": {"file": "/bin/sh"},
    "os.execv": {"path": "/bin/sh", "argv": SH},
    "os.mkdir": {"path": CANARY},
    "os.rename": {"src": ".printed", "dst": CANARY},
    "os.open": {"path": CANARY, "flags": 65},
    "posix.system": {"command": f"touch {CANARY}"},
    "subprocess.run": {"args": SH},
    "subprocess.call": {"args": SH},
    "subprocess.check_call": {"args": SH},
    "subprocess.check_output": {"args": SH},
    "subprocess.getoutput": {"cmd": f"touch {CANARY}"},
    "subprocess.Popen": {"args": SH},
    "asyncio.subprocess.subprocess.Popen": {"args": SH},
    "multiprocessing.util.spawnv_passfds": {"path": b"/bin/sh".decode(), "args": SH, "passfds": []},
    "pty.spawn": {"argv": SH},
    "timeit.timeit": {"stmt": TOUCH},
    "timeit.Timer": {"stmt": TOUCH},
    "runpy.run_path": {"path_name": "acting.py"},
    "runpy.run_module": {"mod_name": "acting"},
    "importlib.import_module": {"name": "acting"},
    "imp_acting.Nothing": {},
    "acting.Memory": {},
    "acting.sub.Memory": {},
    "acting": {},
    "builtins.exec": {"source": TOUCH},
    "builtins.eval": {"source": TOUCH},
    "builtins.open": {"file": CANARY, "mode": "w"},
    "builtins.__import__": {"name": "acting"},
    "io.open": {"file": CANARY, "mode": "w"},
    "codecs.open": {"filename": CANARY, "mode": "w"},
    "pathlib.Path.touch": {"self": CANARY},
    "logging.FileHandler": {"filename": CANARY},
    "sqlite3.connect": {"database": CANARY},
    "shelve.open": {"filename": CANARY},
    "shutil.copy": {"src": "acting.py", "dst": CANARY},
    "shutil.move": {"src": "acting.py", "dst": CANARY},
    "tempfile.NamedTemporaryFile": {"prefix": CANARY, "dir": ".", "delete": False},
    "zipfile.ZipFile": {"file": CANARY, "mode": "w"},
    "code.InteractiveInterpreter.runsource": {"source": TOUCH},
    "bdb.Bdb.run": {"cmd": TOUCH},
    "cProfile.run": {"statement": TOUCH},
    "trace.Trace.run": {"cmd": TOUCH},
    "doctest.debug_script": {"src": TOUCH},
    "numpy.load": {"file": "acting.pickle", "allow_pickle": True},
    "numpy.save": {"file": CANARY, "arr": [1]},
    "numpy.memmap": {"filename": CANARY, "shape": [1], "mode": "w+"},
    "pickle.loads": {"data": "cacting\nMemory\n."},
    "torch.load": {"f": "acting.pickle", "weights_only": False},
    "torch.save": {"obj": 1, "f": CANARY},
    "torch.hub.load": {"repo_or_dir": ".", "source": "local", "model": "Memory"},
    "torch.hub.download_url_to_file": {"url": "file:acting.py", "dst": CANARY},
    "torch.utils.collect_env.run": {"command": f"touch {CANARY}"},
    "torch.classes.load_library": {"path": "acting.so"},
    "torch.jit.load": {"f": "acting.pickle"},
    "ctypes.CDLL": {"name": "acting.so"},
    "hydra.utils.instantiate": {"config": {"_target_": "os.mkdir", "path": CANARY}},
    "hydra.utils.call": {"config": {"_target_": "os.mkdir", "path": CANARY}},
    "hydra.utils.get_method": {"path": "acting.Memory"},
    "lightning.pytorch.loggers.CSVLogger": {"save_dir": CANARY},
    "yaml.unsafe_load": {"stream": f"!!python/object/apply:os.system ['touch {CANARY}']"},
    "urllib.request.urlretrieve": {"url": "file:acting.py", "filename": CANARY},
    "webbrowser.open": {"url": "acting.py"},
    "os._exit": {},
    "time.sleep": {"secs": 1e9},
    "signal.pause": {},
    "builtins.input": {},
    "functools.partial": {"func": {"_target_": "os.system"}, "command": f"touch {CANARY}"},
    "operator.methodcaller": {"name": "x"},
    # through modules of memlm, which have others in them, and functions of its own
    "memlm.checkpoint.os.system": {"command": f"touch {CANARY}"},
    "memlm.checkpoint.os.mkdir": {"path": CANARY},
    "memlm.config.importlib.import_module": {"name": "acting"},
    "memlm.training.apart.subprocess.Popen": {"args": SH},
    "memlm.app.cli.shutil.copy": {"src": "acting.py", "dst": CANARY},
    "memlm.checkpoint.write": {"content": {}, "path": CANARY},
    "memlm.checkpoint.export": {"model": None, "directory": CANARY},
    "memlm.checkpoint.torch.save": {"obj": 1, "f": CANARY},
    "memlm.checkpoint.tempfile.mkdtemp": {"prefix": CANARY, "dir": "."},
    "memlm.checkpoint.Path.mkdir": {"self": CANARY},
    "memlm.files.atomic_file": {"path": CANARY},
    "memlm.data.corpora.hub.urllib.request.urlretrieve": {"url": "file:acting.py", "filename": CANARY},
    "memlm.config.instantiate": {"node": {"_target_": "os.mkdir", "path": CANARY}, "key": "x"},
    "memlm.import_module": {"name": "acting"},
    "memlm.load": {"path": "acting.pickle"},
    "memlm.build": {},
    "memlm.store.memory_file.write": {"path": CANARY, "content": {}},
    "memlm.training.marks.mark_finished": {"run": ".", "config": {}, "value": 1},
    # of memlm, but not what is built there, or no classes to be built at all
    "memlm.data.corpora.builtin.Builtin": {},
    "memlm.config.ConfigError": {},
    "memlm.memory.contract.Memory": {},
    "memlm.memory.contract.nn.Identity": {},
    "memlm.models.base.LanguageModel": {},
    "memlm.models.segments.SegmentModel": {
        "n_layer": 2,
        "d_model": 16,
        "segment_len": 16,
        "overlap": 4,
        "memory_layers": "middle",
    },
    "memlm.store.operations.save_memory": {"model": None, "path": CANARY},
    "memlm.data.corpora.base.Corpus": {},
    "memlm.no_such.Memory": {},
    "memlm.memory.ltm.NoSuch": {},
    "memlm": {},
    "memlm.": {},
    "memlm.evaluation.emit.emit": {"result": None, "figures": {}, "directory": CANARY},
    "benchmarks.base.in_own_process": {"function": None, "name": "x"},
    "tests.hostile.trust.act": {},
}

# Names that are none, or that something else might take for a name.
NAMES: dict[str, Any] = {
    "empty": "",
    "dot": ".",
    "two dots": "os..system",
    "dot before": ".os.system",
    "dot behind": "os.system.",
    "space": "os .system",
    "line": "os.system\n",
    "tab": "\tos.system",
    "full width": "\uff4f\uff53.system",
    "colon": "os:system",
    "zero width": "memlm.memory.ltm.LongTermMemory\u200b",
    "cyrillic": "memlm.mem\u043ery.ltm.LongTermMemory",
    "right to left": "\u202eos.system",
    "null": "os.system\0",
    "surrogate": "os.system\ud800",
    "path": "../acting.Memory",
    "absolute": "/acting.Memory",
    "prefix": "memlmx.Memory",
    "prefix 2": "memlm_.acting.Memory",
    "number": 5,
    "true": True,
    "none": None,
    "list": ["os.system"],
    "mapping": {"_target_": "os.system"},
    "bytes": b"os.system",
    "long": "a." * 10**5,
    "escape": "os.\x1b[31msystem",
    "dunder": "memlm.checkpoint.__builtins__.exec",
    "class attribute": "memlm.memory.ltm.LongTermMemory.mro",
    "globals": "memlm.load.__globals__",
    "init": "memlm.__init__.Memory",
    "main": "__main__.main",
}


def act(*_: Any, **__: Any) -> None:
    """Shows that it was called."""
    Path(CANARY).touch()


# --- what is changed -------------------------------------------------------------------------------------------------


@functools.cache
def _folder() -> Path:
    """A trained run ``run``, with the text and the cache."""
    folder = Path(tempfile.mkdtemp(prefix="memlm-hostile-trust-"))
    os.environ["MEMLM_CACHE"] = str(folder / "cache")
    fit(config(folder, "run", phases=[FACTS]))
    return folder


@functools.cache
def _contents(memory: str = "ltm") -> dict[str, Any]:
    """Contents of a checkpoint: of the trained run, or of a model with another memory that has a shared bank."""
    if memory == "ltm":
        return checkpoint.read(checkpoint.find(_folder() / "run"))
    lines = [line for line in overrides(_folder(), "none") if not line.startswith("memory=")]
    settings = to_dict(compose([*lines, f"memory={memory}", "curriculum=plain"]))
    model: Any = build_model(settings, build_tokenizer(settings))
    for module in model.memory[memory]:
        module.bank.create()
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {"memlm": checkpoint.describe(model), "state_dict": weights}


def _content(*way: str) -> dict[str, Any]:
    """A copy of `_contents`, to be changed."""
    content = _contents(*way)
    entry = content["memlm"]
    return content | {
        "memlm": entry | {"config": copy.deepcopy(entry["config"])},
        "state_dict": dict(content["state_dict"]),
    }


def _checkpoint(change: Change | None = None, path: str = "evil.ckpt", *way: str) -> Path:
    """Write a changed checkpoint."""
    content = _content(*way)
    if change is not None:
        change(content)
    checkpoint.write(content, path)
    return Path(path)


def _run_of(change: Change, run: str = "RUN") -> Path:
    """A run directory with a changed checkpoint and a result."""
    _checkpoint(change, f"{run}/checkpoints/step=9.ckpt")
    result = Path(run) / "speed" / "result.json"
    result.parent.mkdir()
    result.write_text(json.dumps({"name": "speed", "metrics": {"n": 1.0}, "rows": [], "metadata": {}}))
    return Path(run)


def _evaluation(change: Change) -> Path:
    """The directory of an evaluation of a changed checkpoint elsewhere."""
    run = _run_of(change, "EVALUATION")
    path = (run / "checkpoints" / "step=9.ckpt").rename("elsewhere.ckpt").resolve()
    content = _content()
    told = {
        "checkpoint": str(path),
        "step": 9,
        "config": content["memlm"]["config"],
        "n_parameter": 1,
        "state_bytes": 1,
        "text": "x",
        "tokenizer": "x",
        "tokens_per_second": None,
        "memory": {},
    }
    (run / "evaluation.json").write_text(json.dumps(told))
    return run


def _export(change: Change | None = None, files: dict[str, bytes] | None = None, sums: bool = True) -> Path:
    """Export the model; change its ``config.json``, or replace files; its checksums are right again with ``sums``."""
    folder = Path("exported")
    checkpoint.export(_model(), folder)
    if change is not None:
        entry = json.loads((folder / "config.json").read_text())
        content = {"memlm": entry}
        change(content)
        (folder / "config.json").write_text(json.dumps(content["memlm"]))
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    if sums:
        names = ("config.json", "model.safetensors", "tokenizer.json")
        lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


@functools.cache
def _model() -> Any:
    return memlm.load(_folder() / "run")


def _acting() -> None:
    """Put modules and files into the directory that act when they are imported or loaded, and make them importable."""
    for name in ("acting", "imp_acting", "hubconf"):
        Path(f"{name}.py").write_text(f"{TOUCH}\nclass Memory: pass\n")
    Path("acting.pickle").write_bytes(pickle.dumps(_Evil()))
    sys.path.insert(0, os.getcwd())


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (CANARY,)


def _at(place: str, node: Any) -> Change:
    """Put a node at a place of the configuration."""

    def change(content: dict[str, Any]) -> None:
        *way, last = ["config", *place.split(".")]
        part = content["memlm"]
        for name in way:
            part = part[name]
        part[last] = node

    return change


def _set(**values: Any) -> Change:
    """Replace parts of the configuration."""
    return lambda content: content["memlm"]["config"].update(values)


# --- ways in ---------------------------------------------------------------------------------------------------------


def _load(change: Change) -> None:
    memlm.load(_checkpoint(change))


def _load_run(change: Change) -> None:
    data = load_run(_checkpoint(change))[1]
    data.setup()
    data.task  # noqa: B018 - built when it is asked for


def _resume(change: Change) -> None:
    run = Path("RUN/checkpoints/step=9.ckpt")
    _checkpoint(change, str(run))
    fit(
        config(
            _folder(),
            "again",
            "trainer.max_steps=10",
            f"resume={run}",
            f"paths.run_dir={Path.cwd() / 'new'}",
            phases=[FACTS],
        )
    )


def _resume_auto(change: Change) -> None:
    _checkpoint(change, "root/evil/checkpoints/step=9.ckpt")
    fit(
        config(
            _folder(),
            "again",
            "trainer.max_steps=2",
            "resume=auto",
            f"paths.root={Path.cwd() / 'root'}",
            f"paths.run_dir={Path.cwd() / 'root/new'}",
            phases=[FACTS],
        )
    )


WAYS: dict[str, Callable[[Change], object]] = {
    "load": _load,
    "load_run": _load_run,
    "load of an export": lambda change: memlm.load(_export(change)),
    "generate": lambda change: command(
        "generate", f"checkpoint={_checkpoint(change)}", "prompt=ba", "max_new_tokens=2"
    ),
    "chat": lambda change: command("chat", f"checkpoint={_checkpoint(change)}"),
    "export": lambda change: command("export", f"checkpoint={_checkpoint(change)}", "output=OUT"),
    "evaluate": lambda change: command(
        "evaluate", f"checkpoint={_checkpoint(change)}", "experiment=perplexity", "perplexity.limit=40"
    ),
    "report": lambda change: command("report", str(_run_of(change)), "--out", "page.html"),
    "report of an evaluation": lambda change: command("report", str(_evaluation(change)), "--out", "page.html"),
    "compare": lambda change: command("compare", str(_run_of(change)), "--out", "OUT"),
    "benchmark": lambda change: command(
        "benchmark",
        "retrieval",
        "keys=[trained]",
        f"checkpoint={_checkpoint(change)}",
        "sizes=[1000]",
        "n_query=8",
        "candidates=[exact]",
        "rounds=1",
    ),
    "resume": _resume,
    "resume=auto": _resume_auto,
}
# Where memlm goes on without what it refuses, and says so: that chapter of a page, that neighbour of a run.
GOES_ON = ("report of an evaluation", "resume=auto")
PLACES = ("memory.evil", "memory.ltm", "model", "curriculum", "curriculum.task")


def _executing(way: str, place: str, target: Any, settings: dict[str, Any]) -> Case:
    node = {"_target_": target, **settings}

    def do() -> None:
        _acting()
        WAYS[way](_at(place, node))

    known = target if isinstance(target, str) and target.isprintable() and len(target) < 80 else repr(target)[:40]
    return Case(f"{way}: {place} is {known}", do, ("right", "sentence") if way in GOES_ON else ("sentence",))


def _shown(target: str, settings: dict[str, Any]) -> None:
    """A page of a run whose corpus is of somebody else says so in the place of its text."""
    _acting()
    command("report", str(_run_of(_at("data.corpus", {"_target_": target, **settings}))), "--out", "page.html")
    if f"data.corpus._target_ names {target}, which is no part of memlm" not in Path("page.html").read_text():
        raise Silent("the page does not say what is left out")


def _executes() -> Iterator[Case]:
    for (
        way,
        do,
    ) in WAYS.items():  # each way goes through if nothing is wrong, so that it is not refused for other reasons
        yield Case(f"{way}: nothing is wrong", functools.partial(do, lambda _: None), ("right",))
    for target, settings in ACTS.items():
        yield _executing("load_run", "data.corpus", target, settings)  # called with these settings alone
    for target in (
        "os.system",
        "os.mkdir",
        "subprocess.check_output",
        "timeit.timeit",
        "runpy.run_path",
        "torch.hub.load",
        "acting.Memory",
        "builtins.exec",
        "memlm.checkpoint.os.mkdir",
        "memlm.checkpoint.write",
        "memlm.memory.ltm.LongTermMemory",
    ):
        for place in PLACES:
            yield _executing("load_run", place, target, ACTS.get(target, {}))
    for way in WAYS:
        place = "data.corpus" if way == "evaluate" else "model" if way == "report" else "memory.ltm"
        for target in ("os.mkdir", "subprocess.check_output", "acting.Memory", "memlm.checkpoint.os.mkdir"):
            yield _executing(way, place, target, ACTS[target])
    for target, settings in {"os.mkdir": ACTS["os.mkdir"], "acting.Memory": {}}.items():
        yield _executing("load of an export", "model", target, settings)
        yield Case(f"report: data.corpus is {target}", functools.partial(_shown, target, settings), ("right",))
        yield _executing("evaluate", "curriculum", target, settings)
    for name, target in NAMES.items():
        case = _executing("load", "memory.evil", target, {"path": CANARY})
        yield Case(f"load: a target that is {name}", case.do)
    yield from _nested()


def _nested() -> Iterator[Case]:
    """Nodes inside of nodes, and the keys with which Hydra is told how to build."""
    evil = {"_target_": "os.mkdir", "path": CANARY}
    inside: dict[str, Change] = {
        "a setting of a memory": _at("memory.ltm.span", evil),
        "an unknown setting of a memory": _at("memory.ltm.extra", evil),
        "a list in a setting": _at("model.memory_layers", [evil]),
        "a node in a node of its kind": _at("memory.ltm.n_slot", {"_target_": "memlm.memory.ltm.LongTermMemory"}),
        "a phase": _at("curriculum.phases", [evil]),
        "a task of a phase": _at("curriculum.phases", [{"steps": 1, "n_row": 1, "n_segment": 1, "task": evil}]),
        "memories of a phase": _at("curriculum.phases", [{"steps": 1, "n_row": 1, "n_segment": 1, "memory": evil}]),
        "a task without document": _at("curriculum.task", {"_target_": "memlm.data.corpora.builtin.Builtin"}),
        "the path of the text": _at("data.corpus.path", evil),
        "the column of the text": _at("data.corpus.column", evil),
        "_args_": lambda c: c["memlm"]["config"]["memory"]["ltm"].update(_args_=[evil]),
        "_partial_": lambda c: c["memlm"]["config"]["memory"]["ltm"].update(_partial_=True),
        "_recursive_": lambda c: c["memlm"]["config"]["memory"]["ltm"].update(_recursive_=True, n_slot=evil),
        "_convert_": lambda c: c["memlm"]["config"]["model"].update(_convert_="all"),
        "the memories of the model": _at("model.memories", evil),
        "the size of the vocabulary": _at("model.n_vocab", evil),
        "the whole memory": _at("memory", evil),
        "the whole data": _at("data", evil),
    }
    for name, change in inside.items():

        def do(change: Change = change) -> None:
            _acting()
            _load_run(change)

        yield Case(f"load_run: {name} is a node", do)
    # Parts of a configuration of which nothing is built when a model is loaded.
    for name in (
        "trainer",
        "trainer.strategy",
        "logger",
        "training",
        "replay",
        "watch",
        "hydra",
        "callbacks",
        "experiment",
    ):

        def beside(name: str = name) -> None:
            _acting()
            change = _at(name, evil)
            _load_run(lambda content: (content["memlm"]["config"].setdefault("trainer", {}), change(content)))

        yield Case(f"load_run: {name}, of which nothing is built, is a node", beside, ("right",))


# --- trust -----------------------------------------------------------------------------------------------------------


OWN = """
from pathlib import Path
Path("IMPORTED").touch()
from memlm.memory.ltm import LongTermMemory
from memlm.data.tasks.facts import Facts
class Own(LongTermMemory): pass
class OwnFacts(Facts): pass
def make(*arguments, **settings): return Own(*arguments, **settings)
Alias = LongTermMemory
class Other: pass
"""


def _own(target: str, place: str = "memory.ltm._target_") -> Change:
    Path("mine").mkdir()
    Path("mine/__init__.py").touch()
    Path("mine/memory.py").write_text(OWN)
    sys.path.insert(0, os.getcwd())
    return _at(place, target)


def _trusts() -> Iterator[Case]:
    def unknown() -> None:
        try:
            _load(_own("mine.memory.Own"))
        finally:
            if Path("IMPORTED").exists():
                raise Silent("a module that is not trusted was imported")

    yield Case("trust: own memory without trust", unknown)
    for trust in ("mine", ["mine"], ["mine.memory"], ["other", "mine"], ("mine",)):

        def known(trust: Any = trust) -> None:
            model = memlm.load(_checkpoint(_own("mine.memory.Own")), trust=trust)
            if type(model.memory["ltm"][0]).__module__ != "mine.memory":
                raise Silent("another class was built")

        yield Case(f"trust: own memory with trust={trust!r}", known, ("right",))
    for trust in ("min", "mine.memory.Own.x", ["other"], [], None, "mine.memor"):
        yield Case(
            f"trust: own memory with trust={trust!r}",
            lambda trust=trust: memlm.load(_checkpoint(_own("mine.memory.Own")), trust=trust),
        )
    for trust in (5, [5], [None], "a b", "", ["mine", ""], {"mine": 1}, "mine.", "*", [["mine"]], True, b"mine"):
        yield Case(
            f"trust: no names of packages, {trust!r}",
            lambda trust=trust: memlm.load(_checkpoint(_own("mine.memory.Own")), trust=trust),
        )
    for target in (
        "mine.memory.make",
        "mine.memory.Alias.x",
        "mine.memory.Other",
        "mine.memory.Path",
        "mine.memory",
        "mine.none.Own",
        "mine.memory.None_",
    ):
        yield Case(
            f"trust: {target} of a trusted package is no memory",
            lambda target=target: memlm.load(_checkpoint(_own(target)), trust="mine"),
        )
    yield Case(
        "trust: a function of os",
        lambda: memlm.load(_checkpoint(_at("memory.evil", {"_target_": "os.mkdir", "path": CANARY})), trust="os"),
    )
    yield Case(
        "trust: a class of torch",
        lambda: memlm.load(_checkpoint(_at("memory.evil", {"_target_": "torch.nn.Identity"})), trust="torch"),
    )

    def task() -> None:
        data = load_run(_checkpoint(_own("mine.memory.OwnFacts", "curriculum.task._target_")), trust="mine")[1]
        assert type(data.task).__name__ == "OwnFacts"

    yield Case("trust: own task", task, ("right",))

    def model_only() -> None:
        memlm.load(_checkpoint(_own("mine.memory.OwnFacts", "curriculum.task._target_")))
        if Path("IMPORTED").exists():
            raise Silent("a module that is not trusted was imported")

    yield Case("trust: an own task is not asked for where only the model is loaded", model_only, ("right",))
    own = "mine.memory.Own"
    lines: dict[str, Callable[[], object]] = {
        "generate": lambda: command("generate", f"checkpoint={_checkpoint(_own(own))}", "prompt=ba", "trust=[mine]"),
        "generate, one name": lambda: command(
            "generate", f"checkpoint={_checkpoint(_own(own))}", "prompt=ba", "trust=mine"
        ),
        "chat": lambda: command("chat", f"checkpoint={_checkpoint(_own(own))}", "trust=[mine]"),
        "export": lambda: command("export", f"checkpoint={_checkpoint(_own(own))}", "output=OUT", "trust=[mine]"),
        "evaluate": lambda: command(
            "evaluate",
            f"checkpoint={_checkpoint(_own(own))}",
            "experiment=perplexity",
            "perplexity.limit=40",
            "trust=[mine]",
        ),
        "report": lambda: command("report", str(_run_of(_own(own))), "--out", "page.html", "--trust", "mine"),
        "compare": lambda: command("compare", str(_run_of(_own(own))), "--out", "OUT", "--trust", "mine"),
    }
    for name, do in lines.items():
        yield Case(f"trust: on the command line of {name}", do, ("right",))
    for value in ("5", "[5]", "{a: 1}", "[a b]", "null2.", "[[mine]]"):
        yield Case(
            f"trust: on the command line, trust={value}",
            lambda value=value: command(
                "generate", f"checkpoint={_checkpoint(_own(own))}", "prompt=ba", f"trust={value}"
            ),
        )


def _touches() -> Iterator[Case]:
    """What the arguments of classes that may be built make memlm read and write."""

    def cache() -> None:
        data = load_run(_checkpoint(_at("paths", {"cache_dir": str(Path.cwd() / "elsewhere")})))[1]
        data.setup()
        if Path("elsewhere").exists():
            raise Silent("it wrote where the file said")

    yield Case("load_run: the cache is not where the file says", cache, ("right",))

    def nothing_read() -> None:
        os.mkfifo("pipe.txt")
        memlm.load(_checkpoint(_at("data.corpus.path", "pipe.txt")))

    yield Case("load: the text is not looked at", nothing_read, ("right",), seconds=40)
    texts = {
        "a key": "/etc/shadow",
        "a folder": "/",
        "nothing": "nowhere.txt",
        "a device": "/dev/zero",
        "null": "a\0.txt",
        "all keys": "/etc/*.key",
        "empty": "",
    }
    for name, path in texts.items():
        yield Case(f"load_run: the text is {name}", lambda path=path: _load_run(_at("data.corpus.path", path)))
    hub = {"_target_": "memlm.data.corpora.hub.Hub", "name": "."}

    def script() -> None:
        _acting()
        Path("data.py").write_text(TOUCH)
        Path(f"{Path.cwd().name}.py").write_text(TOUCH)
        _load_run(_at("data.corpus", hub))

    yield Case("load_run: a data set with a script", script)
    yield Case("load_run: a data set of the network", lambda: _load_run(_at("data.corpus", hub | {"name": "a/b"})))


# --- structure -------------------------------------------------------------------------------------------------------


def _loop() -> Any:
    node: list[Any] = []
    node.append(node)
    return node


def _bomb(n: int = 40) -> Any:
    node: Any = [1]
    for _ in range(n):
        node = [node, node]
    return node


def _wide() -> Any:
    node: Any = ["x" * 1000] * 1000
    return {str(i): node for i in range(1000)}


def _deep(n: int) -> Any:
    node: Any = []
    for _ in range(n):
        node = [node]
    return node


ODD: dict[str, Any] = {
    "null": None,
    "a list": [],
    "a text": "x",
    "a number": 5,
    "a mapping": {},
    "a negative number": -1,
    "a fraction": 1.5,
    "true": True,
    "a large number": 2**70,
    "a very large number": 10**2000,
    "not a number": float("nan"),
    "a tensor": torch.zeros(2),
    "bytes": b"x",
    "a set": {1},
    "a loop": _loop(),
    "a bomb": _bomb(),
    "deep": _deep(200),
    "wide": _wide(),
    "a long text": "x" * 30_000_000,
}
PARTS = (
    "model",
    "memory",
    "data",
    "curriculum",
    "seed",
    "n_parameter",
    "model._target_",
    "model.n_layer",
    "model.memory_layers",
    "memory.ltm",
    "memory.ltm.n_slot",
    "memory.ltm.scope",
    "data.tokenizer",
    "data.tokenizer.n_vocab",
    "data.corpus",
    "data.n_worker",
    "curriculum.phases",
    "curriculum.task",
)
# What may be: settings that have such values, or of which loading does not depend.
FINE = {
    *(("n_parameter", odd) for odd in ("null", "a number")),
    *(("data.tokenizer.n_vocab", odd) for odd in ("null",)),
    ("memory", "a mapping"),
    ("curriculum.task", "null"),
    *(("seed", odd) for odd in ("a number", "a negative number")),
    ("data.n_worker", "a number"),
    ("memory.ltm.n_slot", "a number"),
}


def _structures() -> Iterator[Case]:
    for part in PARTS:
        for name, value in ODD.items():
            if (part, name) in FINE:
                continue
            yield Case(f"structure: {part} is {name}", lambda part=part, value=value: _load_run(_at(part, value)))
    for name, value in ODD.items():
        yield Case(
            f"structure: the configuration is {name}",
            lambda value=value: _load(lambda content: content["memlm"].update(config=value)),
        )
        for entry in ("tokenizer", "version"):
            yield Case(
                f"structure: {entry} is {name}",
                lambda value=value, entry=entry: _load(lambda content: content["memlm"].update({entry: value})),
            )
        for entry in ("memlm", "state_dict"):
            yield Case(
                f"structure: {entry} is {name}",
                lambda value=value, entry=entry: _load(lambda content: content.update({entry: value})),
            )
    for version in ("99.0", "99", "1" * 100, "v1", "0.1.0\n", "0.1.0 \x1b[31m", "0.2.0", "-1.0", "0.1.0.0.0.0.0.0.1"):
        case = Case(
            f"structure: the version is {version!r}"[:60],
            lambda version=version: _load(lambda content: content["memlm"].update(version=version)),
        )
        yield case
    for name in ("memlm", "state_dict"):
        yield Case(f"structure: no {name}", lambda name=name: _load(lambda content: content.pop(name)))
    for name in ("config", "tokenizer", "version"):
        yield Case(
            f"structure: no {name} in memlm", lambda name=name: _load(lambda content: content["memlm"].pop(name))
        )
    for name in ("model", "memory", "data", "curriculum", "seed"):
        yield Case(
            f"structure: no {name} in the configuration",
            lambda name=name: _load_run(lambda content: content["memlm"]["config"].pop(name)),
        )
    for name in ("", "a.b", "keys", "x\ny", "\x1b[31m", 5, "a b"):
        yield Case(
            f"structure: a memory called {name!r}",
            lambda name=name: _load(
                lambda content: content["memlm"]["config"]["memory"].update(
                    {name: content["memlm"]["config"]["memory"]["ltm"]}
                )
            ),
        )
    for way, change in {
        "trainer": _set(trainer=_bomb()),
        "watch": _set(watch=_loop()),
        "logger": _set(logger=_deep(200)),
    }.items():
        yield Case(f"structure: {way}, of which nothing is built", lambda change=change: _load(change))
    for place, value in {
        "model.n_layer": 10**9,
        "model.d_model": 10**9,
        "model.segment_len": 10**9,
        "model.n_head": 10**9,
        "model.d_ff": 10**12,
        "model.overlap": 10**9,
        "memory.ltm.n_slot": 10**14,
        "memory.ltm.d_key": 10**9,
        "memory.ltm.write_budget": -5,
        "n_parameter": 10**12,
        "data.tokenizer.n_vocab": 10**12,
    }.items():
        yield Case(f"structure: {place} is {value}", lambda place=place, value=value: _load(_at(place, value)))


def _weights(change: Callable[[dict[str, Any]], object], *way: str) -> Callable[[], object]:
    return lambda: memlm.load(_checkpoint(lambda content: change(content["state_dict"]), "evil.ckpt", *way))


def _weight_cases() -> Iterator[Case]:
    name = "model.embedding.weight"
    values: dict[str, Callable[[torch.Tensor], Any]] = {
        "not a number": lambda t: t.clone().fill_(float("nan")),
        "infinite in one place": lambda t: t.clone().index_fill_(0, torch.tensor([0]), float("inf")),
        "of another shape": lambda t: t[:-1].clone(),
        "of no dimension": lambda t: torch.tensor(1.0),
        "whole numbers": lambda t: t.long(),
        "complex": lambda t: t.to(torch.complex64),
        "sparse": lambda t: t.to_sparse(),
        "compressed": lambda t: t.to_sparse_csr(),
        "of meta": lambda t: t.to("meta"),
        "one number, spread": lambda t: torch.zeros(1).expand(t.shape),
        "empty": lambda t: torch.zeros(0),
        "boolean": lambda t: t > 0,
        "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "nested": lambda t: torch.nested.nested_tensor([t, t]),
        "a list": lambda t: t.tolist(),
        "a number": lambda t: 1.0,
        "a text": lambda t: "x",
        "null": lambda t: None,
        "a bomb": lambda t: _bomb(),
    }
    for kind, make in values.items():
        yield Case(f"weights: {kind}", _weights(lambda state, make=make: state.update({name: make(state[name])})))
    yield Case("weights: none", _weights(lambda state: state.clear()))
    yield Case("weights: one is missing", _weights(lambda state: state.pop(name)))
    yield Case("weights: a foreign one", _weights(lambda state: state.update({"model.evil": torch.zeros(3)})))
    yield Case(
        "weights: foreign names",
        _weights(lambda state: [state.update({f"model.x\n{i}": torch.zeros(1)}) for i in range(2000)]),
    )
    yield Case(
        "weights: names are numbers",
        _weights(lambda state: [state.update({i: state.pop(n)}) for i, n in enumerate(list(state))]),
    )

    def same(state: dict[str, Any]) -> None:
        flat = torch.zeros(max(value.numel() for value in state.values()))
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = flat[: value.numel()].view(value.shape)

    yield Case("weights: all the same numbers", _weights(same))
    yield Case(
        "weights: of half precision",
        _weights(lambda state: state.update({n: v.half() for n, v in state.items() if v.is_floating_point()})),
        ("right",),
    )

    def no_bank() -> None:
        memlm.load(_checkpoint(_at("memory.ltm.scope", "shared")))

    yield Case("weights: without the shared bank that is described", _of_scope(no_bank))
    for memory in ("stm", "auto", "imm", "memoria", "adaptive"):

        def bank(memory: str = memory) -> None:
            memlm.load(_checkpoint(None, "evil.ckpt", memory))

        yield Case(f"weights: {memory} with a shared bank that is not described", _of_scope(bank))


def _of_scope(do: Callable[[], None]) -> Callable[[], None]:
    """Do it, and see that the scope is what is told."""

    def told() -> None:
        try:
            do()
        except ConfigError as error:
            if "scope" not in str(error):
                raise Silent(f"the scope is not what is told: {error}") from error
            raise

    return told


# --- files -----------------------------------------------------------------------------------------------------------


def _repacked(compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None, **replaced: bytes) -> None:
    """The checkpoint as another archive, in which parts are replaced or added."""
    _checkpoint(path="whole.ckpt")
    with zipfile.ZipFile("whole.ckpt") as old, zipfile.ZipFile("evil.ckpt", "w", compression) as new:
        for info in old.infolist():
            part = info.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(info.filename, replaced.get(part, old.read(info)))
        for name, data in (more or {}).items():
            new.writestr(name, data)
    memlm.load("evil.ckpt")


def _zip_bomb() -> None:
    _checkpoint(path="whole.ckpt")
    with zipfile.ZipFile("whole.ckpt") as old, zipfile.ZipFile("evil.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
        with new.open("evil/data/999", "w", force_zip64=True) as part:
            for _ in range(100):
                part.write(bytes(1 << 22))
    memlm.load("evil.ckpt")


def _claimed() -> None:
    """A checkpoint whose directory claims that a part is larger than the file."""
    path = _checkpoint(path="evil.ckpt")
    data = bytearray(path.read_bytes())
    place = data.rfind(b"PK\x01\x02")
    data[place + 20 : place + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(data)
    memlm.load(path)


def _pickled(make: Callable[[], bytes]) -> Callable[[], None]:
    return lambda: _repacked(data_pkl=make())


def _code(protocol: int) -> bytes:
    return pickle.dumps({"memlm": _Evil(), "state_dict": {}}, protocol)


def _deep_pickle() -> bytes:
    return b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


def _legacy() -> bytes:
    file = io.BytesIO()
    torch.save(_content(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _special(kind: str, path: str) -> None:
    """Put something into the place of a file."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_file():
        place.unlink()
    if kind == "a pipe":
        os.mkfifo(place)
    elif kind == "a directory":
        place.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as found:
            found.bind(str(place))
    elif kind == "a link to itself":
        place.symlink_to(place.name)
    elif kind == "a link to nothing":
        place.symlink_to("nowhere")
    elif kind == "a link to a device":
        place.symlink_to("/dev/zero")
    elif kind == "a link to a pipe":
        os.mkfifo("pipe")
        place.symlink_to(Path("pipe").resolve())


SPECIAL = (
    "a pipe",
    "a directory",
    "a socket",
    "a link to itself",
    "a link to nothing",
    "a link to a device",
    "a link to a pipe",
)


def _file_cases() -> Iterator[Case]:
    def written(data: bytes) -> None:
        Path("evil.ckpt").write_bytes(data)
        memlm.load("evil.ckpt")

    for name, make in {
        "empty": lambda: b"",
        "zeros": lambda: bytes(1000),
        "a text": lambda: b"hello",
        "a legacy file": _legacy,
        "a pickle with code": lambda: _code(2),
        "a pickle with code, protocol 5": lambda: _code(5),
        "half": lambda: _checkpoint(path="x.ckpt").read_bytes()[:5000],
    }.items():
        yield Case(f"file: {name}", lambda make=make: written(make()))
    for protocol in (0, 2, 4, 5):
        yield Case(
            f"file: code in the archive, protocol {protocol}", _pickled(lambda protocol=protocol: _code(protocol))
        )
    yield Case("file: very deep pickle in the archive", _pickled(_deep_pickle))
    yield Case("file: compressed", lambda: _repacked(zipfile.ZIP_DEFLATED))
    yield Case("file: compressed bomb", _zip_bomb)
    yield Case("file: a part is said to be larger than the file", _claimed)
    yield Case("file: two data.pkl", lambda: _repacked(more={"archive/data.pkl": _code(2), "evil/data.pkl": b"x"}))
    yield Case(
        "file: more parts", lambda: _repacked(more={"../../" + CANARY: b"x", "/tmp/x": b"y"}), ("right", "sentence")
    )
    for kind in SPECIAL:

        def direct(kind: str = kind) -> None:
            _special(kind, "evil.ckpt")
            memlm.load("evil.ckpt")

        def in_run(kind: str = kind) -> None:
            _checkpoint(path="RUN/checkpoints/step=9.ckpt")
            _special(kind, "RUN/checkpoints/step=99.ckpt")
            memlm.load("RUN")

        def beside(kind: str = kind) -> None:
            root = Path.cwd() / "root"
            _special(kind, "root/other/checkpoints/step=99.ckpt")
            fit(
                config(
                    _folder(),
                    "again",
                    "trainer.max_steps=1",
                    "resume=auto",
                    f"paths.root={root}",
                    f"paths.run_dir={root / 'new'}",
                    phases=[FACTS],
                )
            )

        yield Case(f"file: {kind}", direct, seconds=30)
        yield Case(f"file: the newest checkpoint of a run is {kind}", in_run, seconds=30)
        yield Case(f"file: resume=auto beside a run whose checkpoint is {kind}", beside, ("right",), seconds=60)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS"):

            def export(kind: str = kind, name: str = name) -> None:
                folder = _export()
                _special(kind, str(folder / name))
                memlm.load(folder)

            yield Case(f"file: {name} of an export is {kind}", export, seconds=30)

    def lock() -> None:
        _special("a pipe", "RUN/.lock")
        run = Path.cwd() / "RUN"
        fit(config(_folder(), "again", "trainer.max_steps=1", f"paths.run_dir={run}", phases=[FACTS]))

    yield Case("file: .lock of a run is a pipe", lock)
    for name in ("a\0b", "x" * 5000, "", "/", "~nobody/x", "a\nb"):
        yield Case(f"file: the path {name[:20]!r}", lambda name=name: memlm.load(name), ("sentence",))


# --- exports ---------------------------------------------------------------------------------------------------------


def _export_cases() -> Iterator[Case]:
    for text in (
        "[]",
        "null",
        "5",
        '""',
        "",
        "{",
        "{}",
        "true",
        "NaN",
        "[" * 100_000,
        '{"config":' * 5000,
        "1" * 5000,
        '{"config": {}, "version": "0.1.0"}',
        '{"config": null, "version": null}',
        "\ufeff{}",
    ):
        yield Case(
            f"export: config.json is {text[:40]!r}, {len(text)} characters",
            lambda text=text: memlm.load(_export(files={"config.json": text.encode()})),
        )
    yield Case("export: config.json is not UTF-8", lambda: memlm.load(_export(files={"config.json": b'{"a": "\xff"}'})))
    for text in ("", "x", "0  config.json", "\n" * 10, "  ", "é", "a  b  c"):
        yield Case(
            f"export: SHA256SUMS is {text!r}",
            lambda text=text: memlm.load(_export(files={"SHA256SUMS": text.encode()}, sums=False)),
        )
    for name in ("config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS"):

        def without(name: str = name) -> None:
            folder = _export()
            (folder / name).unlink()
            memlm.load(folder)

        yield Case(f"export: without {name}", without)
    headers = {
        "empty": b"",
        "too long": (2**62).to_bytes(8, "little") + b"{}",
        "no JSON": (2).to_bytes(8, "little") + b"xx",
        "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    for name, data in headers.items():
        yield Case(
            f"export: the header of the weights is {name}",
            lambda data=data: memlm.load(_export(files={"model.safetensors": data})),
        )
    for name in ("config.json", "model.safetensors", "tokenizer.json", "SHA256SUMS"):
        for seed in range(25):
            yield Case(
                f"export: bit {seed} of {name} is flipped",
                lambda name=name, seed=seed: _flipped(name, seed),
                ("sentence", "right"),
            )
    yield Case("export: whole", lambda: _same(memlm.load(_export())), ("right",))


def _flipped(name: str, seed: int) -> None:
    folder = _export()
    path = folder / name
    data = bytearray(path.read_bytes())
    place = (seed * 7919 + 13) * 104_729 % (len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    _same(memlm.load(folder))


def _same(model: Any) -> None:
    own = _model()
    if model.config != own.config or model.tokenizer.to_json() != own.tokenizer.to_json():
        raise Silent("another configuration or tokenizer")
    if not all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items()):
        raise Silent("other weights")


def _tokenizers() -> Iterator[Case]:
    def with_parts(**parts: Any) -> bytes:
        return json.dumps(json.loads(_model().tokenizer.to_json()) | parts).encode()

    def model_of(**parts: Any) -> bytes:
        content = json.loads(_model().tokenizer.to_json())
        return json.dumps(content | {"model": content["model"] | parts}).encode()

    def split(regex: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}

    charsmap = {
        "short": b"ab",
        "long": b"\xff\xff\xff\xff\x00",
        "none": b"",
    }
    texts: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "null": lambda: b"null",
        "a list": lambda: b"[]",
        "a number": lambda: b"5",
        "deep": lambda: b"[" * 100_000,
        "a text": lambda: b'"x"',
        "no model": lambda: b"{}",
        "not UTF-8": lambda: b'{"a": "\xff"}',
        "model null": lambda: with_parts(model=None),
        "model a list": lambda: with_parts(model=[]),
        "a huge id": lambda: model_of(vocab={"a": 2147483648, "<unk>": 0}),
        "a large id": lambda: model_of(vocab={"a": 10**8, "<unk>": 0}),
        "a negative id": lambda: model_of(vocab={"a": -1, "<unk>": 0}),
        "an id of text": lambda: model_of(vocab={"a": "1", "<unk>": 0}),
        "an id of 5000 digits": lambda: model_of(vocab={"a": 0, "<unk>": 1}).replace(
            b'"a": 0', b'"a": 1' + b"0" * 5000
        ),
        "an empty vocabulary": lambda: model_of(vocab={}),
        "vocabulary null": lambda: model_of(vocab=None),
        "vocabulary a list": lambda: model_of(vocab=[["a", 0.0]]),
        "no unknown": lambda: model_of(unk_token="zz"),
        "unknown a number": lambda: model_of(unk_token=5),
        "unknown a list": lambda: model_of(unk_token=["x"]),
        "another vocabulary": lambda: model_of(vocab={f"w{i}": i for i in range(5000)} | {"<unk>": 5000}),
        "a broken regex": lambda: with_parts(pre_tokenizer=split("(")),
        "an unknown type": lambda: with_parts(normalizer={"type": "Evil"}),
        "type a list": lambda: with_parts(normalizer={"type": ["Precompiled"]}),
        **{
            f"a table that is {name}": lambda data=data: with_parts(
                normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
            )
            for name, data in charsmap.items()
        },
        "a table in a list": lambda: with_parts(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap["long"]).decode()}
                ],
            }
        ),
        "a table that is no base64": lambda: with_parts(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "!"}
        ),
        "a table that is a number": lambda: with_parts(normalizer={"type": "Precompiled", "precompiled_charsmap": 5}),
        "nested normalizers": lambda: with_parts().replace(
            b'"normalizer": null', b'"normalizer": ' + b'{"type":"Sequence","normalizers":[' * 400 + b"]}" * 400
        ),
    }
    for name, make in texts.items():
        yield Case(f"tokenizer: {name}", lambda make=make: memlm.load(_export(files={"tokenizer.json": make()})))

    def catastrophic() -> None:
        model = memlm.load(_export(files={"tokenizer.json": with_parts(pre_tokenizer=split("(a+)+$"))}))
        model.tokenizer.encode("a" * 40 + "!")

    yield Case("tokenizer: a regex that takes for ever", catastrophic, seconds=90)

    def decoding() -> None:
        decoder = {"type": "Replace", "pattern": {"Regex": "(.+)+$ $"}, "content": "x"}
        model = memlm.load(_export(files={"tokenizer.json": with_parts(decoder=decoder)}))
        model.tokenizer.decode(range(5, 40))

    yield Case("tokenizer: a regex that takes for ever to decode", decoding, ("sentence", "right"), seconds=90)


# --- training --------------------------------------------------------------------------------------------------------


def _resumes() -> Iterator[Case]:
    evil = {"loop": _loop(), "bomb": _bomb(), "deep": _deep(200), "list": [], "null": None}
    for name, value in evil.items():
        yield Case(
            f"resume: the configuration is a {name}",
            lambda value=value: _resume(lambda content: content["memlm"].update(config=value)),
        )
        yield Case(
            f"resume=auto: the configuration of a neighbour is a {name}",
            lambda value=value: _resume_auto(lambda content: content["memlm"].update(config=value)),
            ("right",),
        )
        yield Case(
            f"resume=auto: the memory of a neighbour is a {name}",
            lambda value=value: _resume_auto(_at("memory.ltm", value)),
            ("right",),
        )
    for part in ("optimizer_states", "callbacks", "loops", "lr_schedulers", "carried"):
        for name in ("loop", "bomb", "deep"):
            yield Case(
                f"resume: {part} is a {name}",
                lambda part=part, name=name: _resume(lambda content: content.update({part: evil[name]})),
            )


def files() -> list[Case]:
    """All of them."""
    _model()
    for memory in ("stm", "auto", "imm", "memoria", "adaptive"):
        _contents(memory)
    parts = (
        _executes,
        _trusts,
        _touches,
        _structures,
        _weight_cases,
        _file_cases,
        _export_cases,
        _tokenizers,
        _resumes,
    )
    return [case for part in parts for case in part()]
