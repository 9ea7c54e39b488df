"""Files that are damaged, cut short, malformed, or no files; and what they hold shown on a terminal and in pages."""

from __future__ import annotations

import codecs
import contextlib
import copy
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memlm.data.corpora import builtin
from memlm.evaluation.compare import printing
from tests.hostile.base import Case, Silent, command

EITHER = ("right", "sentence")
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
EVIL = "\x1b[31m\x00\u202eevil\x9b"


# ---------------------------------------------------------------------------------------------------- what is damaged


@functools.cache
def _trained() -> tuple[Path, dict[str, Any]]:
    """A run that is trained and measured, made in a process of its own, and its settings."""
    import memlm.evaluation.webpage  # noqa: F401 - once, and not in each case
    from tests.evaluation.compare import test_groups
    from tests.training import small

    folder = Path(tempfile.mkdtemp(prefix="memlm-hostile-run-"))
    settings = small.config(folder, "run", "trainer.max_steps=3", "checkpoint.every=3", phases=[small.PLAIN])
    child = os.fork()
    if child == 0:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            from memlm.evaluation.emit import emit
            from memlm.training.marks import mark_finished

            small.fit(settings)
            emit(test_groups.recall(0.9), {}, folder / "run/needle")
            mark_finished(folder / "run", settings, 0.9)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "run/finished.json").exists()
    return folder, settings


def _copy(name: str = "run") -> Path:
    """A copy of the run in the current directory."""
    return Path(shutil.copytree(_trained()[0] / "run", name))


def _checkpoint(run: Path) -> Path:
    return run / "checkpoints/step=3.ckpt"


def _settings(root: str = ".", run: str = "new") -> dict[str, Any]:
    settings = copy.deepcopy(_trained()[1])
    settings["paths"] |= {"root": root, "run_dir": run}
    return settings


def _flip(content: bytes, seed: int, first: int = 0, end: int | None = None) -> bytes:
    rng = random.Random(seed)
    place = rng.randrange(first, len(content) if end is None else end)
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def _plain(value: Any) -> Any:
    """Contents of a checkpoint without the values of tensors."""
    import torch

    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return (str(value.dtype), tuple(value.shape)) if isinstance(value, torch.Tensor) else value


# ------------------------------------------------------------------------------------------------ bits flipped and cut


def _peek(damage: Callable[[bytes], bytes]) -> None:
    from memlm.checkpoint import read

    path = _checkpoint(_copy())
    whole = path.read_bytes()
    expected = _plain(read(path, peek=True))
    path.write_bytes(damage(whole))
    if _plain(read(path, peek=True)) != expected:
        raise Silent("a quick look at a damaged checkpoint shows something else")


def _pickle_span() -> tuple[int, int]:
    path = _checkpoint(_trained()[0] / "run")
    with zipfile.ZipFile(path) as parts:
        entry = next(part for part in parts.infolist() if part.filename.endswith("data.pkl"))
    begin = path.read_bytes().index(b"\x80\x02", entry.header_offset)  # how a pickle begins
    return begin, begin + entry.file_size


def _described(damage: Callable[[bytes], bytes]) -> None:
    """What compare and report read of a damaged checkpoint."""
    from memlm.evaluation.runs import describe

    path = _checkpoint(_copy())
    expected = describe(path)
    path.write_bytes(damage(path.read_bytes()))
    if describe(path) != expected:
        raise Silent("a damaged checkpoint is described as something else")


def _cache(which: str, damage: Callable[[bytes], bytes]) -> None:
    """Tokens or a tokenizer from a damaged cache are those that are made anew."""
    from memlm.data.corpora.files import TextFiles
    from memlm.data.tokenizer import get_tokenizer
    from memlm.data.tokens import tokenize

    base = TextFiles(str(_trained()[0] / "text.txt"))

    def used() -> tuple[Any, ...]:
        tokenizer = get_tokenizer("word", 200, None, base, Path("cache"))
        found = tokenize(base, tokenizer, "val", Path("cache"))
        return tokenizer.to_json(), found.tokens.tolist(), found.offsets.tolist()

    expected = used()
    (path,) = Path("cache").glob("tokenizers/*.json" if which == "tokenizer" else f"tokens/*-{which}.npy")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    if used() != expected:
        raise Silent(f"other {which} from a damaged cache")
    if path.read_bytes() != whole:
        raise Silent("the damaged file is still there")


def _cut_in_use() -> None:
    from memlm.data.corpora.files import TextFiles
    from memlm.data.tokenizer import train_tokenizer
    from memlm.data.tokens import tokenize

    found = tokenize(TextFiles(str(_trained()[0] / "text.txt")), train_tokenizer("byte", [], 0), "train", Path("cache"))
    before = int(found.tokens.sum())
    for path in Path("cache").glob("tokens/*"):
        os.truncate(path, 0)
    if int(found.tokens.sum()) != before:
        raise Silent("other tokens")


def _builtin(damage: Callable[[bytes], bytes]) -> None:
    """The builtin text from a damaged cache is made anew."""

    os.environ["MEMLM_CACHE"] = str(Path("cache").resolve())
    builtin._docstrings = lambda: {f"module {i}": [f"Words of module {i} are here. " * 400] for i in range(30)}
    builtin._topics = dict
    expected = builtin.Builtin().fingerprint()
    (path,) = Path("cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    if builtin.Builtin().fingerprint() != expected:
        raise Silent("another text from a damaged cache")


def _damages() -> list[Case]:
    def flipped(seed: int) -> Callable[[bytes], bytes]:
        return lambda whole: _flip(whole, seed)

    def in_pickle(seed: int) -> Callable[[bytes], bytes]:
        return lambda whole: _flip(whole, seed, *_pickle_span())

    def cut(share: float) -> Callable[[bytes], bytes]:
        return lambda whole: whole[: int(len(whole) * share)]

    shares = (0, 0.001, 0.1, 0.5, 0.9, 0.999)
    cases = [Case(f"quick look, bit {i}", functools.partial(_peek, flipped(i)), EITHER) for i in range(60)]
    cases += [Case(f"quick look, bit {i} of the pickle", functools.partial(_peek, in_pickle(i))) for i in range(20)]
    cases += [Case(f"described, bit {i}", functools.partial(_described, flipped(100 + i)), EITHER) for i in range(10)]
    cases += [Case(f"described, bit {i} of the pickle", functools.partial(_described, in_pickle(i))) for i in range(10)]
    cases += [Case(f"quick look, cut at {share}", functools.partial(_peek, cut(share))) for share in shares]
    cases += [Case("quick look, a part twice", functools.partial(_peek, _part_twice))]
    for which, n in {"tokens": 40, "offsets": 20, "tokenizer": 20}.items():
        cases += [Case(f"cached {which}, bit {i}", functools.partial(_cache, which, flipped(i)), ("right",))
                  for i in range(n)]  # fmt: skip
        cases += [Case(f"cached {which}, cut at {share}", functools.partial(_cache, which, cut(share)), ("right",))
                  for share in shares]  # fmt: skip
    cases += [Case(f"cached text, bit {i}", functools.partial(_builtin, flipped(i)), ("right",)) for i in range(10)]
    return [*cases, Case("tokens cut short while they are read", _cut_in_use, ("right",))]


def _part_twice(whole: bytes) -> bytes:
    file = io.BytesIO(whole)
    with zipfile.ZipFile(file, "a") as parts:
        name = next(name for name in parts.namelist() if name.endswith("data.pkl"))
        parts.writestr(name, b"\x80\x02}.")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- malformed structure


_BAD = {
    "null": "null", "list": "[]", "dict": "{}", "number": "5", "text": '"x"', "true": "true", "negative": "-1",
    "400 digits": "1" * 400, "5000 digits": "1" * 5000, "NaN": "NaN", "1e999": "1e999", "deep": "[" * 400 + "]" * 400,
    "deeper": "[" * 50_000 + "]" * 50_000, "nested": '{"a": {"b": [1, null, "x"]}}',
}  # fmt: skip


def _put(document: Any, place: tuple[str | int, ...], text: str) -> str:
    """The document as JSON with something else in one place."""
    mark = "\N{SNOWMAN}"
    document = copy.deepcopy(document)
    if not place:
        return text
    node = document
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = mark
    return json.dumps(document, ensure_ascii=False).replace(f'"{mark}"', text)


def _compared(*runs: Path) -> None:
    """All that compare does but for its figure."""
    from memlm.evaluation.compare import groups
    from memlm.evaluation.runs import find_runs

    comparison = groups.compare(*find_runs(runs))
    printing.report(comparison)
    printing.markdown(comparison)
    printing.rows(comparison)


def _malformed(name: str, place: tuple[str | int, ...], text: str) -> None:
    """A run, or an evaluation of it, one of whose files holds something else in one place."""
    from memlm.evaluation.runs import describe, write_evaluation

    run = _copy()
    if name == "evaluation.json":
        write_evaluation(run, describe(_checkpoint(run)))
    path = run / name
    path.write_text(_put(json.loads(path.read_text()), place, text))
    _compared(run)


def _result_places() -> list[tuple[str | int, ...]]:
    entry = ("metadata", "headline", 0)
    keys = ("label", "metric", "low", "high", "n", "percent", "better", "control")
    places = [("name",), ("metrics",), ("metrics", "exact_match/on"), ("metrics", "n/on"), ("rows",), ("metadata",)]
    return [(), *places, ("metadata", "headline"), ("metadata", "settings"), entry, *((*entry, key) for key in keys)]


def _evaluation_places() -> list[tuple[str | int, ...]]:
    fields = ("checkpoint", "step", "n_parameter", "state_bytes", "text", "tokenizer", "tokens_per_second", "memory")
    nodes = ("model", "memory", "trainer", "curriculum", "seed", "name", "paths", "logger", "needle")
    inner = [("model", "_target_"), ("model", "segment_len"), ("memory", "ltm"), ("curriculum", "phases")]
    inner += [("curriculum", "task"), ("trainer", "accumulate_grad_batches")]
    phase = ("config", "curriculum", "phases", 0)
    return [
        (), ("config",), *((field,) for field in fields), *(("config", node) for node in nodes),
        *(("config", *keys) for keys in inner), phase, *((*phase, key) for key in ("steps", "n_row", "n_segment")),
    ]  # fmt: skip


def _missing(name: str, key: str) -> None:
    from memlm.evaluation.runs import describe, write_evaluation

    run = _copy()
    if name == "evaluation.json":
        write_evaluation(run, describe(_checkpoint(run)))
    document = json.loads((run / name).read_text())
    del document[key]
    (run / name).write_text(json.dumps(document))
    _compared(run)


def _unknown_memory() -> None:
    _malformed("evaluation.json", ("memory",), '{"ltmm.n_slot": 5}')


def _structures() -> list[Case]:
    cases = []
    for name, places in {"needle/result.json": _result_places(), "evaluation.json": _evaluation_places()}.items():
        for place in places:
            for bad, text in _BAD.items():
                do = functools.partial(_malformed, name, place, text)
                cases.append(Case(f"{name}, {'.'.join(map(str, place)) or 'all of it'} = {bad}", do, EITHER))
    keys = {"needle/result.json": ("name", "metrics", "rows", "metadata")}
    keys["evaluation.json"] = ("checkpoint", "config", "step", "tokenizer")
    cases += [
        Case(f"{name} without {key}", functools.partial(_missing, name, key)) for name in keys for key in keys[name]
    ]
    return [*cases, Case("evaluation.json, unknown memory", _unknown_memory)]


_LINES = {
    "not UTF-8": b"step,train/tokens_per_second\n1,\xff\xfe\n",
    "a field of 200,000 characters": b"step,train/tokens_per_second\n1," + b"x" * 200_000 + b"\n",
    "a head of 200,000 characters": b"step," + b"x" * 200_000 + b"\n1,2\n",
    "NUL": b"step,train/tokens_per_second\n1,\x00\n",
    "noise": random.Random(0).randbytes(3000),
    "text for numbers": b"step,train/tokens_per_second\n1,fast\n2,slow\n",
    "a step that is none": b"step,train/tokens_per_second\nten,1.0\n",
    "a step of 5000 digits": b"step,train/tokens_per_second\n" + b"1" * 5000 + b",1.0\n",
    "a superscript step": "step,train/tokens_per_second\n²,1.0\n".encode(),
    "more fields than named": b"step,train/tokens_per_second\n1,2,3\n",
    "an open quote": b'step,train/tokens_per_second\n1,"2\n3,4\n',
    "nothing": b"",
    "one line": b"step",
    "infinite": b"step,train/tokens_per_second\n1,inf\n2,nan\n",
}


def _history(content: bytes, resumed: bool, name: str = "metrics.csv") -> None:
    from memlm.training.logged import keep_earlier_history
    from memlm.training.resume import find_origin

    run = _copy()
    (run / "csv" / name).write_bytes(content)
    if not resumed:
        return _compared(run)
    settings = _settings(run="run")
    settings["trainer"]["max_steps"] = 5
    origin = find_origin(str(run), settings, [])
    assert origin is not None
    return keep_earlier_history(run, origin.run, origin.step)


def _histories() -> list[Case]:
    cases = []
    for name, content in _LINES.items():
        cases.append(Case(f"metrics.csv compared, {name}", functools.partial(_history, content, False), EITHER))
        cases.append(Case(f"metrics.csv resumed, {name}", functools.partial(_history, content, True), EITHER))
    for name in ("earlier-.csv", "earlier-x.csv", "earlier-²" + ".csv", "earlier-99999999999999999999.csv"):
        do = functools.partial(_history, b"step,train/loss\n0,1.0\n", True, name)
        cases.append(Case(f"a history named {name}", do, EITHER))
    return cases


# ----------------------------------------------------------------------------------- neighbours that are gone on beside


def _finished(content: bytes) -> None:
    """A job of a repeated sweep beside one whose finished.json is damaged: its checkpoint is gone on with."""
    from memlm.training.resume import Origin, find_in_sweep, find_origin

    run = _copy("sweep/job")
    (run / "finished.json").write_bytes(content)
    if not isinstance(found := find_in_sweep(_settings(), Path("sweep")), Origin):
        raise Silent(f"taken for finished: {found}")
    if find_origin("auto", _settings(), [Path("sweep")]) is None:
        raise Silent("taken for finished by resume=auto")


def _beside(spoil: Callable[[Path], None]) -> None:
    """``resume=auto`` goes on with a run, whatever is beside it."""
    from memlm.training.resume import find_origin

    (_copy("root/mine") / "finished.json").unlink()
    other = _copy("root/other")
    (other / "finished.json").unlink()
    os.utime(_checkpoint(Path("root/mine")), (1, 1))  # so that the other is looked at first
    spoil(other)
    origin = find_origin("auto", _settings(), [Path("root")])
    if origin is None or origin.run.name != "mine":
        raise Silent(f"gone on with {origin and origin.path}")


def _with_entry(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The checkpoint of a run with another entry."""
    import torch

    content = torch.load(_checkpoint(run), weights_only=True)
    change(content)
    torch.save(content, _checkpoint(run))


def _config(value: Any) -> Callable[[Path], None]:
    return lambda run: _with_entry(run, lambda content: content["memlm"].update(config=value))


def _part(name: str, value: Any) -> Callable[[Path], None]:
    return lambda run: _with_entry(run, lambda content: content["memlm"]["config"].update({name: value}))


def _cyclic() -> dict[str, Any]:
    config = _settings()
    config["model"] = config
    return config


def _in_place(name: str, put: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        path = run / name
        path.unlink(missing_ok=True)
        put(path)

    return spoil


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: os.symlink(path.name, path),
    "a link to nothing": lambda path: os.symlink("/no/such/file", path),
    "a directory": os.mkdir,
    "a socket": lambda path: _socket(path),
    "a link to a device": lambda path: os.symlink("/dev/zero", path),
}


def _socket(path: Path) -> None:
    import socket

    socket.socket(socket.AF_UNIX).bind(str(path))


def _neighbours() -> list[Case]:
    last = "checkpoints/step=3.ckpt"
    spoils: dict[str, Callable[[Path], None]] = {
        "config is a list": _config([]),
        "config is null": _config(None),
        "config is a text": _config("x"),
        "config is empty": _config({}),
        "config is cyclic": _config(_cyclic()),
        "config.trainer is a list": _part("trainer", [1]),
        "config.trainer is null": _part("trainer", None),
        "config.model is 5": _part("model", 5),
        "config.model has keys that are no text": _part("model", {5: 6, None: 7, "a": 8}),
        "no global_step": lambda run: _with_entry(run, lambda content: content.pop("global_step")),
        "no memlm": lambda run: _with_entry(run, lambda content: content.pop("memlm")),
        "memlm is a list": lambda run: _with_entry(run, lambda content: content.update(memlm=[])),
        "an empty checkpoint": lambda run: _checkpoint(run).write_bytes(b"") and None,
        "noise for a checkpoint": lambda run: _checkpoint(run).write_bytes(random.Random(0).randbytes(5000)) and None,
    }
    spoils |= {f"{what} for the checkpoint": _in_place(last, put) for what, put in _SPECIAL.items()}
    cases = [Case(f"resume=auto beside: {name}", functools.partial(_beside, spoil), ("right",), 30)
             for name, spoil in spoils.items()]  # fmt: skip
    for i in range(5):
        damage = functools.partial(_spoil_bits, i)
        cases.append(Case(f"resume=auto beside: bit {i} of the pickle", functools.partial(_beside, damage), ("right",)))
    contents = {"noise": random.Random(0).randbytes(100), "not UTF-8": b'{"config": "\xff"}', "cut": b'{"config": {'}
    contents |= {"nothing": b"", "without value": b'{"config": {}}', "config a list": b'{"config": [], "value": 1}'}
    contents |= {"value a text": b'{"config": {}, "value": "x"}', "deep": b"[" * 100_000}
    contents |= {name: text.encode() for name, text in _BAD.items()}
    cases += [Case(f"finished.json, {name}", functools.partial(_finished, content), ("right",))
              for name, content in contents.items()]  # fmt: skip
    return cases


def _spoil_bits(seed: int, run: Path) -> None:
    path = _checkpoint(run)
    path.write_bytes(_flip(path.read_bytes(), seed, *_pickle_span()))


# ------------------------------------------------------------------------------------------ what is no file, and links


def _special_file(name: str, put: Callable[[Path], object]) -> None:
    """What compare and `memlm.load` read of a run in which something stands where a file belongs."""
    import memlm
    from memlm.app.errors import mistakes_told
    from memlm.evaluation.runs import describe, write_evaluation

    run = _copy()
    if name == "evaluation.json":
        write_evaluation(run, describe(_checkpoint(run)))
    (run / name).unlink()
    put(run / name)
    with mistakes_told():
        if name.endswith(".ckpt"):
            memlm.load(run)
        _compared(run)


def _special_export(name: str) -> None:
    import memlm
    from memlm.checkpoint import export

    export(memlm.load(_trained()[0] / "run"), "out")
    Path("out", name).unlink()
    os.mkfifo(Path("out", name))
    memlm.load("out")


def _lock(put: Callable[[Path], object]) -> None:
    from memlm.training.marks import running

    Path("run").mkdir()
    put(Path("run/.lock"))
    with running(Path("run")):
        pass


def _special_cache(put: Callable[[Path], object]) -> None:
    from memlm.files import checked_file, read_checked

    put(Path("file"))
    if read_checked(Path("file")) is not None:
        raise Silent("taken for a file")
    with checked_file(Path("file")) as file:
        file.write(b"x")


SECRET = b"the private key of somebody"


def _figure(put: Callable[[Path], object]) -> None:
    """No picture is shown, and its bytes are not in the page."""
    from memlm.analysis.page import render
    from memlm.evaluation import webpage
    from memlm.evaluation.compare import groups
    from memlm.evaluation.runs import find_runs

    Path("secret").write_bytes(SECRET)
    run = _copy()
    put(run / "needle/recall.png")
    chapter = webpage._figures(groups.compare(*find_runs([run])), 10**6)
    page = render("x", [chapter])
    if chapter.parts and getattr(chapter.parts[0], "images", ()):
        raise Silent("shown as a picture")
    if "Not shown" not in page:
        raise Silent("left out without a word")
    import base64

    if base64.b64encode(SECRET)[:20].decode() in page:
        raise Silent("the bytes of another file are in the page")


def _png() -> bytes:
    from matplotlib.figure import Figure

    file = io.BytesIO()
    Figure((1, 1)).savefig(file, format="png")
    return file.getvalue()


def _elsewhere(path: Path) -> None:
    Path("own.png").write_bytes(_png())
    os.symlink(Path("own.png").resolve(), path)


def _report(put: Callable[[Path], object]) -> None:
    """The whole command."""
    Path("secret").write_bytes(SECRET)
    run = _copy()
    put(run / "needle/recall.png")
    with contextlib.suppress(SystemExit):
        command("report", "run", "--out", "page.html")
    page = Path("page.html").read_text()
    if "Not shown" not in page or SECRET.decode() in page:
        raise Silent("shown")


def _specials() -> list[Case]:
    cases = []
    for name in ("needle/result.json", "evaluation.json", "checkpoints/step=3.ckpt", "csv/metrics.csv"):
        for what, put in _SPECIAL.items():
            wanted = EITHER if name == "csv/metrics.csv" else ("sentence",)
            do = functools.partial(_special_file, name, put)
            cases.append(Case(f"{what} for {name}", do, (*wanted, "right"), 20))
    names = ("config.json", "tokenizer.json", "model.safetensors")
    cases += [Case(f"a pipe for {name} of an export", functools.partial(_special_export, name), seconds=20)
              for name in names]  # fmt: skip
    cases += [Case(f"{what} for .lock", functools.partial(_lock, put), ("sentence",), 20)
              for what, put in _SPECIAL.items()]  # fmt: skip
    cases += [Case(f"{what} for a cached file", functools.partial(_special_cache, put), EITHER, 20)
              for what, put in _SPECIAL.items()]  # fmt: skip
    figures = {f"{what} for a figure": put for what, put in _SPECIAL.items()}
    figures |= {
        "a figure that is a link to a private file": lambda path: os.symlink(Path("secret").resolve(), path),
        "a figure that is a link to a picture elsewhere": _elsewhere,
        "a figure that is a private file": lambda path: path.write_bytes(SECRET),
        "an empty figure": lambda path: path.write_bytes(b""),
        "a figure that is cut short": lambda path: path.write_bytes(_png()[:-40]),
        "a figure with a flipped bit": lambda path: path.write_bytes(_flip(_png(), 0, 60, 90)),
        "a figure that is a JPEG": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(500)),
        "a figure that is SVG": lambda path: path.write_text("<svg onload='alert(1)'/>"),
        "a figure of enormous size": lambda path: path.write_bytes(_huge_png()),
    }
    cases += [Case(name, functools.partial(_figure, put), ("right",), 20) for name, put in figures.items()]
    for name in ("a figure that is a link to a private file", "a pipe for a figure", "a figure that is a private file"):
        cases.append(Case(f"report.py, {name}", functools.partial(_report, figures[name]), ("right",)))
    return cases


def _huge_png() -> bytes:
    import zlib

    head = (60_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    parts = b""
    for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        parts += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + parts


# --------------------------------------------------------------------------------------------------- text that is shown


def _shown(change: Callable[[Path, dict[str, Any], dict[str, Any]], Path | None], evil: str) -> None:
    """Nothing of a run is obeyed by a terminal, a browser or a spreadsheet."""
    from memlm.analysis.page import render
    from memlm.app.errors import mistakes_told
    from memlm.evaluation import webpage
    from memlm.evaluation.compare import groups
    from memlm.evaluation.runs import describe, find_runs, write_evaluation

    run = _copy()
    write_evaluation(run, describe(_checkpoint(run)))
    told, result = (json.loads((run / name).read_text()) for name in ("evaluation.json", "needle/result.json"))
    run = change(run, told, result) or run
    (run / "evaluation.json").write_text(json.dumps(told))
    next(run.glob("*/result.json")).write_text(json.dumps(result))
    other = _copy("other")
    trained = describe(_checkpoint(other))
    write_evaluation(other, trained._replace(config={**trained.config, "seed": 1}))
    with mistakes_told():
        comparison = groups.compare(find_runs([run, other])[0], [f"left{evil}"])
    texts = {"terminal": printing.report(comparison), "markdown": printing.markdown(comparison)}
    printing.write(comparison, Path("out"))
    texts["csv"] = Path("out/compare.csv").read_text()
    texts["page"] = render(evil, [webpage._results(comparison), webpage._settings(comparison)])
    for kind, text in texts.items():
        if found := _OBEYED.search(text):
            raise Silent(f"{found[0]!r} in what goes to the {kind}")
    for kind in ("markdown", "page"):
        if "<img src=x" in texts[kind]:
            raise Silent(f"markup in what goes to the {kind}")
    import csv

    for row in csv.reader(io.StringIO(texts["csv"])):
        if any(cell[:1] in "=+@" for cell in row if cell):
            raise Silent("a formula in the CSV file")


def _name_it(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    told["config"]["name"] = evil


def _label_it(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    result["metadata"]["headline"][0]["label"] = evil


def _name_the_memory(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    told["config"]["memory"] = {evil: told["config"]["memory"].pop("ltm")}


def _set_it(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    told["config"]["training"] = {**told["config"]["training"], evil: evil}


def _measure_it(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    result["metadata"]["settings"][evil] = evil


def _name_the_model(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    told["config"]["model"]["_target_"] = f"x.{evil}"


def _name_the_checkpoint(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    told["checkpoint"] = evil


def _name_the_text(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    told["text"] = told["tokenizer"] = evil


def _name_the_experiment(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> None:
    os.rename(run / "needle", run / evil.replace("/", " ").replace("\0", ""))


def _name_the_folder(run: Path, told: dict[str, Any], result: dict[str, Any], evil: str) -> Path:
    return run.rename(evil.replace("/", " ").replace("\0", ""))


def _error_of(evil: str) -> None:
    """A sentence about a file whose name is odd."""
    Path(evil).mkdir()
    with contextlib.suppress(SystemExit):
        command("generate", f"checkpoint='{evil}'", "prompt=x")


def _printed_error(name: str) -> None:
    read, write = os.pipe()
    os.dup2(write, 2)
    _error_of(name)
    os.close(write)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    text = os.read(read, 100_000).decode()
    if "error: " not in text or _OBEYED.search(text):
        raise Silent(f"printed: {text!r}")


def _texts() -> list[Case]:
    evils = {
        "escapes": EVIL, "HTML": "<img src=x onerror=alert(1)>", "a formula": '=HYPERLINK("http://x")', "@": "@SUM(1)",
        "markdown": "`[x](http://y) | a |", "line breaks": "a\nerror: b\r\n# c", "math": "$\\frac{a$ $$", "+": "+1+1",
    }  # fmt: skip
    places = [_name_it, _label_it, _name_the_memory, _set_it, _measure_it, _name_the_model, _name_the_checkpoint]
    places += [_name_the_text, _name_the_experiment, _name_the_folder]
    cases = []
    for place in places:
        for name, evil in evils.items():
            do = functools.partial(_shown, functools.partial(place, evil=evil), evil)
            cases.append(Case(f"shown, {name} in {place.__name__.strip('_')}", do, EITHER))
    names = ("a\x1b[31mb", "a\u202eb", "a\x9bb")
    return cases + [
        Case(f"an error about {name!r}", functools.partial(_printed_error, name), ("right",)) for name in names
    ]


def files() -> list[Case]:
    """Damaged, malformed and hostile files."""
    _trained()
    return [*_damages(), *_structures(), *_histories(), *_neighbours(), *_specials(), *_texts()]


# ------------------------------------------------------------------------------------------- settings, and faults


def _out(script: str, out: str, made: Callable[[], object] | None = None) -> None:
    _copy()
    if made is not None:
        made()
    before = {path.name for path in Path().iterdir()}
    try:
        command(script, "run", "--out", out)
    finally:
        if {path.name for path in Path().iterdir()} - before - {".printed"}:
            raise Silent("something was written")


def settings() -> list[Case]:
    """Where compare and report are told to write."""
    _trained()
    return [
        Case("compare --out ''", lambda: _out("compare", "")),
        Case("report --out ''", lambda: _out("report", "")),
        Case("compare --out FILE", lambda: _out("compare", "f", Path("f").touch)),
        Case("compare --out FILE/x", lambda: _out("compare", "f/x", Path("f").touch)),
        Case("report --out DIRECTORY", lambda: _out("report", "d", Path("d").mkdir)),
        Case("report --out FILE/x", lambda: _out("report", "f/x", Path("f").touch)),
        Case("compare a pipe", lambda: (os.mkfifo("p"), command("compare", "p"))),
        Case("report a file", lambda: (Path("f").touch(), command("report", "f"))),
    ]


def _as_somebody(spoil: Callable[[], object], *words: str) -> None:
    """Run a command as a user who may not all."""
    _copy()
    codecs.lookup("unicode-escape")  # of templates; that user may not look into the home in which Python may be
    os.chmod(".", 0o755)
    Path("out").mkdir()
    spoil()
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    command(*words)


def _killed_in_its_first_write() -> None:
    """The next run beside one that was killed in its first write removes what that left."""
    from tests.training import small

    settings = small.config(_trained()[0], "x", "trainer.max_steps=1", phases=[small.PLAIN])
    child = os.fork()
    if child == 0:
        import torch

        def half(content: Any, file: Any) -> None:
            file.write(bytes(10_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half
        from memlm.checkpoint import write

        write({}, Path("runs/killed/checkpoints/step=1.ckpt"))
    os.waitpid(child, 0)
    (left,) = Path("runs/killed/checkpoints").iterdir()
    settings["paths"] |= {"root": "runs", "run_dir": "runs/new"}
    for node in settings["logger"].values():
        node["save_dir"] = "runs/new"
    small.fit(settings)
    if left.exists():
        raise Silent("what the killed run left is still there")


def faults() -> list[Case]:
    """Permissions and kills."""
    _trained()
    cases = [Case("killed in the first write of a run", _killed_in_its_first_write, ("right",))]
    if os.geteuid() != 0:
        return cases
    last = "run/checkpoints/step=3.ckpt"
    for script in ("compare", "report"):
        place = "out/x" if script == "compare" else "out/x.html"
        denied = {"the checkpoint": last, "result.json": "run/needle/result.json", "metrics.csv": "run/csv/metrics.csv"}
        for name, path in denied.items():
            do = functools.partial(_as_somebody, functools.partial(os.chmod, path, 0), script, "run", "--out", place)
            cases.append(Case(f"{script}, {name} is not readable", do))
        do = functools.partial(_as_somebody, lambda: None, script, "run", "--out", place)
        cases.append(Case(f"{script}, the output is not writable", do))
    return cases
