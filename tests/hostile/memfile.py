"""Memory files and banks that hold what no text can have written, and wrong arguments of the operations."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from memlm import checkpoint
from memlm.analysis.filling import analyze_memory_capacity
from memlm.analysis.flow import memory_flow
from memlm.analysis.flow_figure import visualize_memory_flow
from memlm.config import ConfigError
from memlm.data.tokenizer import Tokenizer, train_tokenizer
from memlm.memory.records import MANY
from memlm.store import memory_file
from memlm.store.conversation import Conversation
from memlm.store.memory_file import MemoryFile
from tests.experiments.tiny import tiny
from tests.hostile.base import Case, Silent

TEXTS = ("The cat lives in a red box.", "A dog sleeps under the old tree.", "Nine birds sing at night.")
N_SLOT = 200
INF, NAN = float("inf"), float("nan")
FAR = 2**62
ALSO_DEEP = "[" * 100_000 + "]" * 100_000


@functools.cache
def _tokenizer() -> Tokenizer:
    return train_tokenizer("byte", list(TEXTS), 300)


@functools.cache
def _model(**settings: Any) -> Any:
    """A model that has stored `TEXTS`; made before the cases are forked, each of which may change its own."""
    model = tiny(_tokenizer(), "ltm", **settings).eval()
    for text in TEXTS:
        model.store_experience(text)
    return model


def _inverted() -> Any:
    return _model(index="inverted", n_list=8, n_probe=2, n_slot=60)


@functools.cache
def _content(make: Callable[[], Any] = _model) -> MemoryFile:
    """The file that the model saves."""
    path = Path(os.environ["MEMLM_CACHE"]) / f"memory-{os.getpid()}"
    make().save_memory(path)
    return memory_file.read(path)


def _held(model: Any) -> list[bytes]:
    """All that the model holds, as bytes."""
    return [part.detach().contiguous().numpy().tobytes() for part in model.state_dict().values()]


def _refused(model: Any, method: str, path: str = "memory") -> None:
    """Have the model read the file, which it has to refuse and to stay as it was."""
    before = _held(model)
    try:
        getattr(model, method)(path)
    except ConfigError:
        if _held(model) != before:
            raise Silent("refused, but the memory is another") from None
        raise
    raise Silent(f"{method} took it")


def _slot(model: Any, used: bool) -> int:
    """The first slot that is used, or is not."""
    module = model.memory["ltm"][0]
    return int((module.filled(module.bank.state())[0] == used).nonzero()[0])


def _put(place: tuple[Any, ...], value: Any, part: Tensor) -> Tensor:
    new = part.clone()
    new[place] = value
    return new


# Field, what is wrong, where, the value.
def _bad_values() -> list[tuple[str, str, Callable[[Tensor], Tensor]]]:
    model = _model()
    n, n_vocab = int(model.memory["ltm"][0].bank.state().n_record), model.n_vocab
    used, empty = _slot(model, True), _slot(model, False)
    found: list[tuple[str, str, Callable[[Tensor], Tensor]]] = []

    def at(field: str, place: tuple[Any, ...], *values: Any, where: str = "") -> None:
        found.extend((field, f"{value}{where}", functools.partial(_put, place, value)) for value in values)

    at("key", (0, used, 0), NAN, INF, -INF, 1e38, 1.5, -2.0)
    at("value", (0, used, 0), NAN, INF, -INF, 1e38, -1e38, 1e6)
    at("log_gate", (0, used), NAN, INF, -INF, 1e38, 0.5, 50.0)
    at("priority", (0, used), NAN, INF, -INF, 1e38, 0.1, 1e6)
    at("record", (0, used), -1, -2, n, n + 1, 2**31, FAR, -FAR)
    at("document", (0, used), -1, -2, 2**40, FAR, -FAR)
    at("position", (0, used), -1, -2, 2**40, FAR, -FAR)
    at("tokens", (0, used, -1), -1, -2, n_vocab, 2**31 - 1, -(2**31))
    at("tokens", (0, used, 0), -2, n_vocab, where=" before")
    at("origins", (0, used, 0), -3, MANY, n, 2**31 - 1, -(2**31))
    at("origins", (0, used, -1), -3, n, where=" at the end")
    at("n_record", (0,), 0, 1, -1, -FAR, 2**30 + 1, 2**31, FAR, 2**63 - 1)
    at("n_used", (0,), -1, 0, 1, N_SLOT + 1, FAR, -FAR)
    at("uses", (used,), -1, FAR)
    for field, value in {"key": 0.5, "value": 1.0, "log_gate": -1.0, "record": 0, "document": 0, "position": 0}.items():
        at(field, (0, empty), value, where=" in an empty slot")
    at("tokens", (0, empty), 3, where=" in an empty slot")
    at("origins", (0, empty, 0), 0, where=" in an empty slot")
    at("priority", (0, empty), -3e6, 1.0, NAN, where=" in an empty slot")
    at("uses", (empty,), 1, where=" in an empty slot")
    found += [
        (field, "all NaN", lambda part: torch.full_like(part, NAN))
        for field in ("key", "value", "log_gate", "priority")
    ]
    found += [
        (field, "all 1e38", lambda part: torch.full_like(part, 1e38))
        for field in ("key", "value", "log_gate", "priority")
    ]
    found += [(field, "shuffled", lambda part: part.flip(1)) for field in ("key", "record", "priority", "tokens")]
    found += [("record", "+ 1000", lambda part: part + 1000), ("origins", "all 0", torch.zeros_like)]
    return found


def _bad_lists() -> list[tuple[str, str, Callable[[Tensor], Tensor]]]:
    lists = _inverted().memory["ltm"][0].bank.state().lists
    assert int(lists.n_list) > 0
    cell, full = int((lists.slot[0] >= 0).nonzero()[0]), int(lists.n_held[0].argmax())
    held, free = int(lists.slot[0, cell]), int((lists.slot[0, :-1] < 0).nonzero()[0])
    found: list[tuple[str, str, Callable[[Tensor], Tensor]]] = []

    def at(field: str, place: tuple[Any, ...], *values: Any, where: str = "") -> None:
        found.extend((f"lists/{field}", f"{value}{where}", functools.partial(_put, place, value)) for value in values)

    at("centroid", (0, 0, 0), NAN, INF, 1e38, 3.0)
    at("centroid", (0, -1, 0), 0.5, where=" of a list not in use")
    at("slot", (0, cell), -1, -2, 60, 2**31 - 1, held + 1)
    at("slot", (0, free), held, where=" twice")
    at("slot", (0, -1), held, where=" in the last cell")
    at("key", (0, cell, 0), NAN, 1e38, 0.5)
    at("key", (0, free, 0), NAN, 0.5, where=" in an empty cell")
    at("place", (0, held), -1, -2, 0 if cell else 1, 2**31 - 1)
    at("n_held", (0, full), -1, 0, FAR)
    at("extent", (0, full), -1, 0, FAR)
    at("n_list", (0,), -1, 0, 9, FAR)
    at("known_n_list", (0,), -1, 0, FAR)
    at("left", (0,), -1, FAR)
    at("known_left", (0,), -1, 0, FAR)
    return found


def _bad(make: Callable[[], Any], field: str, change: Callable[[Tensor], Tensor], method: str) -> None:
    content, name = _content(make), f"ltm/1/{field}"
    memory_file.write("memory", content._replace(tensors=content.tensors | {name: change(content.tensors[name])}))
    _refused(make(), method)


# --- headers and whole files -----------------------------------------------------------------------------------------


def _header() -> dict[str, str]:
    content = _content()
    told = {name: json.dumps(part) for name, part in content._asdict().items() if name != "tensors"}
    return told | {"format": memory_file.FORMAT}


def _written(tensors: dict[str, Tensor], header: dict[str, str], checksum: bool = True) -> None:
    """A file with any header, whose checksum is right."""
    if checksum:
        header = header | {"checksum": memory_file._checksum(tensors, header)}
    Path("memory").write_bytes(save(tensors, header))


def _with_header(change: Callable[[dict[str, str]], None], method: str, checksum: bool = True) -> None:
    header = _header()
    change(header)
    _written(_content().tensors, header, checksum)
    _refused(_model(), method)


def _with_tensors(change: Callable[[dict[str, Tensor]], None], method: str, told: bool) -> None:
    """``told``: the header describes the tensors as they are."""
    tensors, header = dict(_content().tensors), _header()
    change(tensors)
    if told:
        geometry = json.loads(header["geometry"])
        geometry = {name: text for name, text in geometry.items() if "/" not in name}
        geometry |= {name: memory_file.describe(tensor) for name, tensor in tensors.items()}
        header["geometry"] = json.dumps(geometry)
    _written(tensors, header)
    _refused(_model(), method)


def _with_bytes(make: Callable[[], object], method: str = "load_memory") -> None:
    make()
    _refused(_model(), method)


def _flipped(seed: int) -> None:
    """After a flipped bit: refused, or the contents are those that were written."""
    model = _model()
    model.save_memory("memory")
    whole = bytearray(Path("memory").read_bytes())
    end = 8 + int.from_bytes(whole[:8], "little")
    draw = np.random.default_rng(seed)
    place = int(draw.integers(0, end)) if seed % 2 else int(draw.integers(0, len(whole)))
    whole[place] ^= 1 << int(draw.integers(8))
    Path("memory").write_bytes(whole)
    other = tiny(_tokenizer(), "ltm").eval()
    other.load_memory("memory")
    if _held(other)[-12:] != _held(model)[-12:]:
        raise Silent(f"byte {place} changed what was read")


def _cut(share: float) -> None:
    _model().save_memory("memory")
    whole = Path("memory").read_bytes()
    Path("memory").write_bytes(whole[: int(share * len(whole))])


def _sparse() -> None:
    with open("memory", "wb") as file:
        file.truncate(2**40)


def _pickled() -> None:
    torch.save({"ltm/1/key": torch.zeros(3)}, "memory")


def _long_header() -> None:
    Path("memory").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _deep_json() -> None:
    text = ('{"__metadata__":' + ALSO_DEEP + "}").encode()
    Path("memory").write_bytes(len(text).to_bytes(8, "little") + text)


def _of_another(**settings: Any) -> None:
    other = tiny(_tokenizer(), *settings.pop("memories", ["ltm"]), **settings).eval()
    other.store_experience(TEXTS[0])
    other.save_memory("memory")
    _refused(_model(), "load_memory")


def _of_layers() -> None:
    """Other numbers of records in two layers."""
    from tests.store.test_operations import build

    model = build(_tokenizer(), layers="all")
    model.store_experience(TEXTS[0])
    model.save_memory("memory")
    content = memory_file.read("memory")
    tensors = content.tensors | {"ltm/0/n_record": content.tensors["ltm/0/n_record"] + 1}
    memory_file.write("memory", content._replace(tensors=tensors))
    _refused(model, "load_memory")


def _many_records() -> None:
    """As many as may be: operations stay quick, and two such memories are not merged."""
    content, model = _content(), _model()
    memory_file.write("memory", content._replace(tensors=content.tensors | {"ltm/1/n_record": torch.tensor([2**30])}))
    model.load_memory("memory")
    model.edit_memory(0, TEXTS[1])
    model.forget(1)
    model.forget(document=0)
    model.forget(older_than=2**29)
    if model.list_memory() or len(model.store_experience(TEXTS[0])) == 0:
        raise Silent("records that are left, or not stored")
    _refused(model, "merge_memory")


def _from_checkpoint(field: str, change: Callable[[Tensor], Tensor]) -> None:
    model = _model()
    weights = {f"model.{name}": part for name, part in model.state_dict().items()}
    name = f"model.memory.ltm.0.bank.{field}"
    weights[name] = change(weights[name])
    torch.save({"memlm": checkpoint.describe(model), "state_dict": weights}, "step=1.ckpt")
    model: Any = checkpoint.load("step=1.ckpt")
    if field != "tokens":  # of which a memory alone cannot tell whether they are in the vocabulary; they do no harm
        raise Silent("it was loaded")
    model.list_memory()
    model.query_memory(TEXTS[0])
    model.forget(0)


def files() -> list[Case]:
    """Damaged and forged files."""
    cases = []
    for method in ("load_memory", "merge_memory"):
        _content(_model), _content(_inverted)
        for make, values in ((_model, _bad_values()), (_inverted, _bad_lists())):
            for field, what, change in values:
                do = functools.partial(_bad, make, field, change, method)
                cases.append(Case(f"{method}, {field} {what}", do))
        for name in ("geometry", "tokenizer", "weights", "version"):
            texts = ("null", "5", "1.5", "true", "[]", '["a"]', "NaN", "", "{", "{}" if name != "geometry" else '""')
            for text in (*texts, ALSO_DEEP, '{"a":' + ALSO_DEEP + "}"):
                do = functools.partial(_with_header, lambda header, n=name, t=text: header.update({n: t}), method)
                cases.append(Case(f"{method}, {name} {text[:9]!r}", do))
            do = functools.partial(_with_header, lambda header, n=name: header.pop(n), method)
            cases.append(Case(f"{method}, no {name}", do))
        for entry in (
            {"d_model": 5},
            {"scope": None},
            {"ltm/1/key": ["x"]},
            {"x/y/z": "float32 (1,)"},
            {"a\nb": "c\nd"},
        ):

            def more(header: dict[str, str], entry: Any = entry) -> None:
                header["geometry"] = json.dumps(json.loads(header["geometry"]) | entry)

            cases.append(Case(f"{method}, geometry with {entry}", functools.partial(_with_header, more, method)))
        cases.append(Case(f"{method}, no checksum", functools.partial(_with_header, lambda _: None, method, False)))
        for text in ("", "0", "00000000", "zz", "null", "9" * 10_000):
            do = functools.partial(_with_header, lambda h, t=text: h.update(checksum=t), method, False)
            cases.append(Case(f"{method}, checksum {text[:9]!r}", do))
        for text in ("memlm.memory.1", "", "5", "memlm.memory.2\n", "x" * 10_000):
            do = functools.partial(_with_header, lambda h, t=text: h.update(format=t), method)
            cases.append(Case(f"{method}, format {text[:16]!r}", do))
        for name in _content().tensors:
            short = name.rpartition("/")[2]
            for told in (True, False):
                changes = {
                    "missing": lambda parts, n=name: parts.pop(n),
                    "in 64 bits": lambda parts, n=name: parts.update({n: parts[n].double()}),
                    "of no slot": lambda parts, n=name: parts.update({n: parts[n][..., :0].clone()}),
                    "of two rows": lambda parts, n=name: parts.update({n: parts[n][None].repeat_interleave(2, dim=0)}),
                }
                for what, change in changes.items() if method == "load_memory" else ():
                    do = functools.partial(_with_tensors, change, method, told)
                    cases.append(Case(f"{method}, {short} {what}{', as told' * told}", do))
    cases += [
        Case(f"flipped bit {seed}", functools.partial(_flipped, seed), ("sentence", "right")) for seed in range(40)
    ]
    wholes: dict[str, Callable[[], object]] = {
        f"cut to {share:.0%}": functools.partial(_cut, share) for share in (0, 0.001, 0.1, 0.5, 0.999)
    }
    wholes |= {
        "a terabyte of nothing": _sparse,
        "a checkpoint of torch": _pickled,
        "a header without end": _long_header,
        "a deep header": _deep_json,
        "a directory": lambda: Path("memory").mkdir(),
        "a pipe": lambda: os.mkfifo("memory"),
        "a link to itself": lambda: Path("memory").symlink_to("memory"),
        "a device": lambda: Path("memory").symlink_to("/dev/zero"),
        "text": lambda: Path("memory").write_text("once upon a time " * 100),
        "json": lambda: Path("memory").write_text("{}"),
        "nothing": lambda: None,
    }
    cases += [Case(f"{what} for a memory", functools.partial(_with_bytes, make)) for what, make in wholes.items()]
    cases += [
        Case(f"memory of another model: {settings}", functools.partial(_of_another, **settings))
        for settings in (
            {"scope": "shared"},
            {"d_key": 4},
            {"n_slot": 7},
            {"span": 2},
            {"index": "inverted", "n_slot": 200},
        )
    ]
    cases.append(Case("other numbers of records in two layers", _of_layers))
    cases.append(Case("a billion records", _many_records))
    for field, what, change in _bad_values():
        if field != "uses" and "vocab" not in what:
            do = functools.partial(_from_checkpoint, field, change)
            cases.append(Case(f"bank of a checkpoint, {field} {what}", do, ("sentence", "right")))
    return cases


# --- arguments -------------------------------------------------------------------------------------------------------

NOT_TEXT = (None, 5, 1.5, True, b"bytes", [], ["a"], {}, "", " \n", torch.zeros(1))
NOT_WHOLE = ("3", 1.5, None, True, NAN, INF, [1], -1, torch.tensor([1, 2]), np.array(1.5), "")
NOT_PATH = (None, 5, b"bytes", "a\0b", [], {}, 1.5, True, "~nobody.of.this.name/x")


def _call(method: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Call a method of the model, whose memory has to stay as it is."""
    model = _model()
    before = _held(model)
    try:
        method(model, *arguments, **named)
    finally:
        if _held(model) != before:
            raise Silent("the memory is another")


def _shown(value: Any) -> str:
    return repr(value)[:40]


def _operations() -> list[tuple[str, Callable[[], object]]]:
    found: list[tuple[str, Callable[[], object]]] = []

    def each(name: str, values: Any, call: Callable[[Any, Any], object]) -> None:
        found.extend((f"{name} {_shown(v)}", functools.partial(_call, lambda m, v=v: call(m, v))) for v in values)

    ids = torch.tensor([[1, 2, 3]])
    each("store_experience", NOT_TEXT, lambda m, v: m.store_experience(v))
    each("query_memory", NOT_TEXT, lambda m, v: m.query_memory(v))
    each("encode_text", NOT_TEXT, lambda m, v: m.encode_text(v))
    each("query_memory top_k", (*NOT_WHOLE, 0), lambda m, v: m.query_memory(TEXTS[0], top_k=v))
    each("list_memory", NOT_WHOLE, lambda m, v: m.list_memory(v))
    each("edit_memory", (*NOT_WHOLE, 10**30), lambda m, v: m.edit_memory(v, TEXTS[0]))
    each("edit_memory text", NOT_TEXT, lambda m, v: m.edit_memory(0, v))
    each("forget", ("0", 1.5, True, [None], [[0]], {0: 1}, 99, 10**30, [0, 99], None), lambda m, v: m.forget(v))
    each("forget document", [v for v in NOT_WHOLE if v is not None], lambda m, v: m.forget(document=v))
    each("forget older_than", [v for v in NOT_WHOLE if v is not None], lambda m, v: m.forget(older_than=v))
    each("consolidate", ("x", None, True, NAN, INF, -0.1, 2.1, [0.1]), lambda m, v: m.consolidate(v))
    for name in ("save_memory", "load_memory", "merge_memory"):
        each(name, NOT_PATH, lambda m, v, name=name: getattr(m, name)(v))
    not_ids = (None, [[1]], "a", np.array([[1]]), ids.float(), ids.bool(), ids.to(torch.uint8), ids.short(), ids[0],
               ids[None], ids[:0], -ids, ids * 10**6, ids * FAR)  # fmt: skip
    each("forward", not_ids, lambda m, v: m(v))
    each("generate", (*not_ids, ids[:, :0]), lambda m, v: m.generate(v))
    each("absorb", not_ids, lambda m, v: m.absorb(v))
    other = tiny(_tokenizer(), "stm").eval().init_state(1)
    each("forward state", ("x", 5, {}, other, _model().init_state(2)), lambda m, v: m(ids, state=v))
    each("generate state", ("x", other), lambda m, v: m.generate(ids, state=v))
    for name in ("mask", "reset", "breaks"):
        wrong = ("x", [True], ids, torch.ones(5, 5, dtype=torch.bool))
        each(f"forward {name}", wrong, lambda m, v, name=name: m(ids, **{name: v}))
    each("forward signals", ("x", {"a": 1}, {"a": ids}, [1]), lambda m, v: m(ids, signals=v))
    each("generate max_new_tokens", NOT_WHOLE, lambda m, v: m.generate(ids, v))
    cold = ("x", None, NAN, INF, -1, True, [1], 1e-300)
    each("generate temperature", cold, lambda m, v: m.generate(ids, temperature=v))
    each("generate top_k", [v for v in NOT_WHOLE if v is not None], lambda m, v: m.generate(ids, top_k=v))
    each("generate top_p", ("x", NAN, INF, 0, -1, 1.1, True, [1]), lambda m, v: m.generate(ids, top_p=v))
    not_texts = (None, 5, "text", b"text", [], [5.5], [[]], [None], [[1.5]], [[-1]], [[10**9]], [""], ids, [{}])
    each("memory_flow", not_texts, memory_flow)
    each("memory_flow top", NOT_WHOLE, lambda m, v: memory_flow(m, [TEXTS[0]], top=v))
    each("memory_flow state", ("x", 5, other), lambda m, v: memory_flow(m, [TEXTS[0]], state=v))
    each("visualize_memory_flow", (None, 5.5, "", [None]), visualize_memory_flow)
    each("analyze_memory_capacity", not_texts[:-2], analyze_memory_capacity)
    return found


def _said(line: str) -> None:
    """A line of a conversation that is a mistake is answered with one."""
    talk = Conversation(_model())
    before = _held(talk.model)
    reply = str(talk.respond(line))
    if not reply.startswith("error: ") or "\n" in reply or _held(talk.model) != before:
        raise Silent(reply)


def _in_type(dtype: torch.dtype, *memories: str) -> None:
    """All operations of a model of another type, which tells what the model tells."""
    plain = tiny(_tokenizer(), *memories).eval()
    model = copy.deepcopy(plain).to(dtype)
    for text in TEXTS:
        if model.store_experience(text) != plain.store_experience(text):
            raise Silent(f"other records of {text!r}")
    for text in TEXTS:
        if model.query_memory(text, top_k=1)[0].text != plain.query_memory(text, top_k=1)[0].text:
            raise Silent(f"{text!r} is not found")
    model.save_memory("memory")
    plain.load_memory("memory")
    model.merge_memory("memory")
    model.edit_memory(0, TEXTS[1])
    model.consolidate()
    ids = torch.randint(0, model.n_vocab, (2, 50), dtype=torch.int32)
    out = model(ids)
    if out.logits.dtype != dtype or not out.logits.isfinite().all():
        raise Silent(f"{out.logits.dtype}")
    model.generate(ids, 20, state=out.state)
    memory_flow(model, list(TEXTS))
    model.forget(range(3))


def _huge_numbers() -> None:
    model = _model()
    n = len(model.list_memory(10**30))
    if n != len(model.list_memory(100)) or len(model.query_memory(TEXTS[0], top_k=10**30)) < 1:
        raise Silent(f"{n} records")


def settings() -> list[Case]:
    """Wrong arguments of the operations and of the model."""
    cases = [Case(name, do) for name, do in _operations()]
    lines = ("/forget", "/forget x", "/forget -1", "/forget 99", f"/forget {'9' * 5000}", "/save", "/load", "/load x",
             "/save .", "/load .", "/save a\0b", "/x", "/", "/forget 0 99")  # fmt: skip
    cases += [Case(f"chat: {line[:20]!r}", functools.partial(_said, line), ("right",)) for line in lines]
    cases += [
        Case(f"a model with {names} in {dtype}", functools.partial(_in_type, dtype, *names), ("right",))
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
        for names in (("ltm",), ("stm", "ltm"))
    ]
    cases.append(Case("top_k and n without end", _huge_numbers, ("right",)))
    return cases
