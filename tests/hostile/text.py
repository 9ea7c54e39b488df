"""Texts, tables and tokenizers: nothing of them is lost without a word."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import os
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.hostile.base import TINY, Case, Silent, command

WORDS = ("fox", "river", "stone", "bread", "letter", "market", "table", "winter", "lantern", "clock", "door", "grey")
REFUSED: tuple[Any, ...] = ("sentence",)
RIGHT: tuple[Any, ...] = ("right",)


def prose(n_document: int = 40, n_word: int = 40, seed: int = 0) -> list[str]:
    """Documents of some lines."""
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(n_document * n_word)]
    lines = [" ".join(words[i : i + 8]).capitalize() + "." for i in range(0, len(words), 8)]
    n = n_word // 8
    return ["\n".join(lines[i * n : (i + 1) * n]) for i in range(n_document)]


@functools.cache
def _composed(data: str = "text") -> Any:
    from memlm.compose import compose

    place = {"text": ["data.path=x.txt"], "hub": ["data.name=x"], "symbols": []}[data]
    return compose([*TINY, f"data={data}", *place])


def config(path: Any, *, tokenizer: dict[str, Any] | None = None, hub: bool = False, **corpus: Any) -> dict[str, Any]:
    """Settings of a run on a text."""
    from memlm.compose import to_dict

    settings = to_dict(_composed())
    node = {"_target_": "memlm.data.corpora.hub.Hub", "name": str(path)} if hub else {"path": str(path)}
    kept = {} if hub else settings["data"]["corpus"]
    settings["data"]["corpus"] = kept | node | corpus
    settings["data"]["tokenizer"] |= tokenizer or {}
    return settings


def data_of(settings: dict[str, Any]) -> Any:
    """What `train.py` has before it trains: checked and tokenised data."""
    from memlm.assemble import build_corpus, build_data, build_tokenizer

    corpus = build_corpus(settings)
    data = build_data(settings, build_tokenizer(settings, corpus), corpus)
    data.setup()
    return data


def documents(settings: dict[str, Any]) -> list[str]:
    """All documents, in whatever split."""
    from memlm.assemble import build_corpus

    splits = build_corpus(settings)._splits
    return [document for split in splits.values() for document in split]


def logged(do: Callable[[], Any]) -> tuple[Any, str]:
    """What a function returns, and what it logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("memlm").addHandler(handler)
    logging.getLogger("memlm").setLevel(logging.INFO)
    return do(), "\n".join(lines)


def expect(holds: bool, told: str) -> None:
    """Fail as silent."""
    if not holds:
        raise Silent(told)


def same(found: Sequence[str], wanted: Sequence[str]) -> None:
    """Compare documents, in any order (splits are by hash)."""
    expect(
        sorted(found) == sorted(wanted),
        f"{len(found)} documents of {sum(map(len, found))} characters, wanted {len(wanted)} of {sum(map(len, wanted))}",
    )


# --- files ---------------------------------------------------------------------------------------------------------


def files() -> list[Case]:
    """Texts, tables, tokenizers."""
    import datasets  # noqa: F401 - once, before the processes are forked
    import pyarrow.parquet  # noqa: F401
    import tokenizers  # noqa: F401

    _composed()
    return [*_texts(), *_tables(), *_tokenizers(), *_sizes(), *_hub()]


def _texts() -> list[Case]:
    cases = []
    plain, odd = "\n".join(prose()), "Größe, naïve café, «quotes» and more. " * 200
    russian = "лиса река камень хлеб " * 300

    def refused(content: bytes, *, says: str = "", name: str = "a.txt") -> Callable[[], None]:
        def do() -> None:
            from memlm.config import ConfigError

            Path(name).write_bytes(content)
            try:
                found = documents(config(Path(name).absolute()))
            except ConfigError as error:
                expect(says in str(error) and name in str(error), f"told otherwise: {error}")
                raise
            raise Silent(f"read as {found[0][:60]!r}")

        return do

    for text, kind in ((plain, "ascii"), (odd, "latin"), (russian, "cyrillic")):
        for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
            for mark in (False, True):
                content = (("\ufeff" if mark else "") + text).encode(name)
                says = name.upper() if mark or kind != "cyrillic" or "32" in name else "NUL"
                title = f"{kind} text as {name} {'with' if mark else 'without'} a byte order mark"
                cases.append(Case(title, refused(content, says=says)))
                if not mark:
                    cases.append(Case(f"{title}, jsonl", refused(content, says=says, name="a.jsonl")))
    cases += [
        Case(f"text as {name}", refused(text.encode(name), says="not UTF-8"))
        for text, name in (
            (odd, "latin-1"),
            (odd, "cp1252"),
            (russian, "koi8-r"),
            (russian, "cp1251"),
            (odd, "cp437"),
            ("狐狸河石头" * 300, "gb18030"),
            ("狐狸 河" * 300, "shift-jis"),
        )
    ]
    damaged = {
        "a NUL in a text": plain[:99].encode() + b"\0" + plain[99:].encode(),
        "a text with a tail of NULs": plain.encode() + bytes(4096),
        "NULs only": bytes(5000),
        "a text cut within a letter": odd.encode()[:3] + b"\xc3",
        "random bytes": random.Random(1).randbytes(5000),
        "a zip file": b"PK\x03\x04" + random.Random(2).randbytes(5000),
        "an ELF file": b"\x7fELF\x02\x01\x01" + bytes(9) + random.Random(3).randbytes(5000),
        "an overlong form of a slash": b"abc \xc0\xaf " * 100,
        "half of a surrogate pair in UTF-8": b"abc \xed\xa0\x80 " * 100,
        "an empty file": b"",
        "whitespace only": b" \n\t\r\n \n" * 1000,
        "a byte order mark only": b"\xef\xbb\xbf",
        "line ends only": b"\r\n" * 5000,
    }
    cases += [Case(name, refused(content)) for name, content in damaged.items()]

    def read_as(content: bytes, wanted: Sequence[str], **settings: Any) -> Callable[[], None]:
        def do() -> None:
            Path("a.txt").write_bytes(content)
            same(documents(config(Path("a.txt").absolute(), **settings)), wanted)

        return do

    many = prose()
    for name, end in {"line feeds": "\n", "carriage returns with line feeds": "\r\n", "carriage returns": "\r"}.items():
        for shown, separator in {
            "\\n\\n\\n": "\n\n\n",
            "\\n---\\n": "\n---\n",
            "\\r\\n\\r\\n\\r\\n": "\n\n\n",
            "\n\n\n": "\n\n\n",
            "\\t": "\t",
        }.items():
            content = separator.join(many).replace("\n", end).encode()
            title = f"documents apart by {shown!r}, lines end in {name}"
            cases.append(Case(title, read_as(content, many, document_separator=shown), RIGHT))
    mixed = "\n\n\n".join(many)
    for i in range(3):
        rng = random.Random(i)
        content = "".join(rng.choice(("\n", "\r\n")) if c == "\n" else c for c in mixed).encode()
        cases.append(Case(f"mixed line ends, {i}", read_as(content, many, document_separator="\\n\\n\\n"), RIGHT))
    cases.append(
        Case(
            "UTF-8 with a byte order mark",
            read_as(b"\xef\xbb\xbf" + mixed.encode(), many, document_separator="\n\n\n"),
            RIGHT,
        )
    )
    cases.append(
        Case("a backslash as separator", read_as("\\".join(many).encode(), many, document_separator="\\\\"), RIGHT)
    )
    cases.append(
        Case(
            "each line a document",
            read_as(
                "\n".join("ab" * i for i in range(1, 90)).encode(),
                ["ab" * i + ("\n" if i < 89 else "") for i in range(1, 90)],
                document="row",
            ),
            RIGHT,
        )
    )

    def special(make: Callable[[], Any]) -> Callable[[], None]:
        return lambda: documents(config(make()))

    def at(make: Callable[[Path], Any], name: str = "a.txt") -> Callable[[], None]:
        def do() -> None:
            path = Path(name).absolute()
            place = make(path)
            documents(config(path if place is None else place))

        return do

    def bound(path: Path) -> None:
        socket.socket(socket.AF_UNIX).bind(str(path))

    def loop(path: Path) -> None:
        path.symlink_to(path)

    places: dict[str, Callable[[Path], Any]] = {
        "a pipe": lambda path: os.mkfifo(path),
        "a pattern that meets a pipe alone": lambda path: os.mkfifo(path) or path.with_name("*.txt"),
        "a socket": bound,
        "a folder": lambda path: path.mkdir(),
        "an empty folder's pattern": lambda path: path.mkdir() or path / "*.txt",
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "a link to itself": loop,
        "a device that never ends": lambda path: "/dev/zero",
        "a device that is empty": lambda path: "/dev/null",
        "the terminal": lambda path: "/dev/tty",
        "standard input": lambda path: "/dev/stdin",
        "a path of 5,000 characters": lambda path: "x" * 5000 + ".txt",
        "a path of 300 folders": lambda path: "/".join(["folder"] * 900) + "/a.txt",
        "a pattern of 5,000 characters": lambda path: "x" * 5000 + "*.txt",
        "a path with a NUL": lambda path: "a\0.txt",
        "a home of nobody": lambda path: "~nobody-of-this-name/a.txt",
        "a path with half of a surrogate pair": lambda path: "a\udcff.txt",
        "an empty path": lambda path: "",
        "the memory of a process": lambda path: "/proc/self/mem",
        "an address of the network": lambda path: "https://example.org/a.txt",
        "a file without an ending": lambda path: path.with_name("a").write_text("abc") and path.with_name("a"),
        "a csv file": lambda path: path.with_name("a.csv").write_text("text\nabc") and path.with_name("a.csv"),
        "a json file": lambda path: path.with_name("a.json").write_text("[]") and path.with_name("a.json"),
        "a file of gzip": lambda path: (
            path.with_name("a.txt.gz").write_bytes(b"\x1f\x8b") and path.with_name("a.txt.gz")
        ),
        "a pattern that meets a text and an empty file": lambda path: (
            [path.write_text(plain), path.with_name("b.txt").write_text("")] and path.with_name("*.txt")
        ),
    }
    cases += [Case(name, at(make), seconds=20) for name, make in places.items()]

    def brackets() -> None:
        Path("a[1]").mkdir()
        os.chdir("a[1]")
        Path("x.txt").write_text(plain)
        from memlm.compose import compose, to_dict

        for pattern in ("x.txt", "*.txt"):
            settings = to_dict(compose(["data=text", f"data.path='{pattern}'"]))
            os.chdir("/")
            same(["".join(documents(settings))], [plain])
            os.chdir(Path(settings["data"]["corpus"]["path"].replace("[[]", "[")).parent)

    cases.append(Case("a folder whose name is a pattern", brackets, RIGHT))
    return cases


def _tables() -> list[Case]:
    cases = []
    many = prose()

    def write(rows: Sequence[Any], kind: str) -> Path:
        import pyarrow
        import pyarrow.parquet

        path = Path(f"a.{kind}").absolute()
        if kind == "jsonl":
            path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"text": list(rows)}), path)
        return path

    def nulls(kind: str, hub: bool, n: int, only: bool = False) -> Callable[[], None]:
        def do() -> None:
            rows = (
                [None] * n
                if only
                else [row for i, text in enumerate(many) for row in ([None, text] if i < n else [text])]
            )
            path = write(rows, kind)
            found, told = logged(lambda: documents(config(path.parent if hub else path, hub=hub)))
            same(found, many)
            expect(f"{n} of {len(rows)} rows are null" in told, f"not told: {told}")

        return do

    for kind, hub in itertools.product(("jsonl", "parquet"), (False, True)):
        name = f"{kind}{' of a hub folder' if hub else ''}"
        cases += [Case(f"{n} null rows, {name}", nulls(kind, hub, n), RIGHT) for n in (1, 40)]
        cases.append(Case(f"null rows only, {name}", nulls(kind, hub, 40, only=True)))

    def kinds_of(value: Any, kind: str) -> Callable[[], None]:
        def do() -> None:
            from memlm.config import ConfigError

            path = write([*many, value] if kind == "jsonl" else [value, value], kind)
            try:
                documents(config(path))
            except ConfigError as error:
                place = "line 41" if kind == "jsonl" else "row 0"
                expect(place in str(error), f"told otherwise: {error}")
                raise

        return do

    for value in (5, 1.5, True, ["a"], {"a": "b"}, [], 10**30):
        cases.append(Case(f"a row of {value!r}, jsonl", kinds_of(value, "jsonl")))
        if value not in ([], 10**30):
            cases.append(Case(f"a row of {value!r}, parquet", kinds_of(value, "parquet")))
    cases.append(Case("a row of bytes, parquet", kinds_of(b"abc", "parquet")))

    lines = {
        "nested 200,000 deep": '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}",
        "objects nested 200,000 deep": '{"text": ' + '{"a":' * 200_000 + "1" + "}" * 200_000 + "}",
        "half of an object": '{"text": "ab',
        "an array": '["abc"]',
        "a string": '"abc"',
        "two objects in a line": '{"text": "a"} {"text": "b"}',
        "single quotes": "{'text': 'a'}",
        "another column": '{"txt": "abc"}',
        "no column": "{}",
        "half of a surrogate pair": '{"text": "\\ud800"}',
        "the other half of a surrogate pair": '{"text": "ab\\udfff"}',
        "NaN": '{"text": NaN}',
        "a number of 5,000 digits": '{"text": ' + "9" * 5000 + "}",
        "a column full of NULs": '{"text": "a\\u0000b\\u0000"}',
        "a trailing comma": '{"text": "a",}',
        "a control character in a string": '{"text": "a\x01b"}',
    }
    for name, line in lines.items():

        def bad(line: str = line) -> None:
            Path("a.jsonl").write_text("\n".join([*(json.dumps({"text": t}) for t in many), line]))
            documents(config(Path("a.jsonl").absolute()))

        cases.append(Case(f"jsonl: {name}", bad))

    def parquet(make: Callable[[Any, Path], None], **settings: Any) -> Callable[[], Any]:
        def do() -> Any:
            import pyarrow

            path = Path("a.parquet").absolute()
            make(pyarrow, path)
            return documents(config(path, **settings))

        return do

    def table(columns: Any, **options: Any) -> Callable[[Any, Path], None]:
        def make(pa: Any, path: Path) -> None:
            pa.parquet.write_table(columns(pa), path, **options)

        return make

    same_text: dict[str, Callable[[Any], Any]] = {
        "large strings": lambda pa: pa.table({"text": pa.array(many, pa.large_string())}),
        "a dictionary": lambda pa: pa.table({"text": pa.array(many).dictionary_encode()}),
        "many columns": lambda pa: pa.table({f"c{i}": [0] * 40 for i in range(300)} | {"text": many}),
    }
    for name, columns in same_text.items():

        def right(columns: Any = columns) -> None:
            same(parquet(table(columns))(), many)

        cases.append(Case(f"parquet: {name}", right, RIGHT))
    not_text: dict[str, Callable[[Any], Any]] = {
        "no rows": lambda pa: pa.table({"text": pa.array([], pa.string())}),
        "no columns": lambda pa: pa.table({}),
        "another column": lambda pa: pa.table({"body": many}),
        "two columns of one name": lambda pa: pa.table([pa.array(many), pa.array(many)], names=["text", "text"]),
        "lists": lambda pa: pa.table({"text": [many]}),
        "times": lambda pa: pa.table({"text": pa.array([1], pa.timestamp("s"))}),
        "a column of nothing": lambda pa: pa.table({"text": pa.nulls(30)}),
        "strings that are not UTF-8": lambda pa: pa.table(
            {
                "text": pa.Array.from_buffers(
                    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfea\xc3")]
                )
            }
        ),
    }
    cases += [Case(f"parquet: {name}", parquet(table(columns))) for name, columns in not_text.items()]
    for share in (0.0, 0.1, 0.5, 0.9, 0.99):

        def cut(pa: Any, path: Path, share: float = share) -> None:
            pa.parquet.write_table(pa.table({"text": many}), path)
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

        cases.append(Case(f"parquet cut at {share:.0%}", parquet(cut)))
    for seed in range(25):

        def flip(seed: int = seed) -> None:
            import pyarrow
            import pyarrow.parquet

            path, rng = Path("a.parquet").absolute(), random.Random(seed)
            pyarrow.parquet.write_table(
                pyarrow.table({"text": many}), path, write_page_checksum=True, compression="none"
            )
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            same(documents(config(path)), many)

        cases.append(Case(f"parquet with checksums, a bit flipped, {seed}", flip, ("right", "sentence")))

    def wikitext(kind: str, hub: bool, end: str) -> Callable[[], None]:
        def do() -> None:
            articles = [
                [
                    f" = Title {i} = {end}",
                    end,
                    *(line + f" {end}" for line in text.split("\n")),
                    f" = = Part = = {end}",
                    end,
                    f" more of {i} {end}",
                ]
                for i, text in enumerate(many)
            ]
            path = write([row for article in articles for row in article], kind)
            found, told = logged(lambda: documents(config(path.parent if hub else path, hub=hub)))
            join = "" if end else "\n"
            expect(
                len(found) == 40 and all(d.startswith(" = Title") for d in found),
                f"{len(found)} documents: {found[0]!r}",
            )
            wanted = [join.join(article) for article in articles]
            expect({d.strip() for d in found} == {d.strip() for d in wanted}, "other text")
            expect("are lines, joined to 40 documents" in told, f"not told: {told}")

        return do

    for kind, hub, end in itertools.product(("jsonl", "parquet"), (False, True), ("\n", "")):
        name = f"{kind}{' of a hub folder' if hub else ''}, lines end in {end!r}"
        cases.append(Case(f"WikiText by lines, {name}", wikitext(kind, hub, end), RIGHT))

    def by(document: str, rows: Sequence[str], wanted: Sequence[str]) -> Callable[[], None]:
        return lambda: same(documents(config(write(rows, "jsonl"), document=document)), wanted)

    single = [text.replace("\n", " ") for text in many]
    cases += [
        Case("rows of a line each are documents", by("auto", single, single), RIGHT),
        Case(
            "documents that end in a line feed are documents",
            by("auto", [t + "\n" for t in many], [t + "\n" for t in many]),
            RIGHT,
        ),
        Case(
            "lines as rows where it is asked for",
            by("row", [t + "\n" for t in single], [t + "\n" for t in single]),
            RIGHT,
        ),
        Case(
            "rows joined where it is asked for",
            lambda: expect(
                "".join(documents(config(write(single, "jsonl"), document="join"))) == "\n".join(single) + "\n",
                "other text",
            ),
            RIGHT,
        ),
        Case("headings where there are none", by("heading", single, single)),
    ]
    return cases


def _tokenizer(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}


def _word_level(**more: Any) -> dict[str, Any]:
    vocab = {word: i for i, word in enumerate([*WORDS, *(word.capitalize() for word in WORDS), ".", "<unk>"])}
    return {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"} | more


def _tokenizers() -> list[Case]:
    cases = []
    space = {"type": "Whitespace"}
    text = "\n".join(prose())

    def with_file(content: Any) -> Callable[[], Any]:
        def do() -> Any:
            Path("a.txt").write_text(text)
            Path("t.json").write_text(content if isinstance(content, str) else json.dumps(content))
            return data_of(config(Path("a.txt").absolute(), tokenizer={"path": str(Path("t.json").absolute())}))

        return do

    whole = json.dumps(_tokenizer(_word_level(), pre_tokenizer=space))
    broken: dict[str, Any] = {
        "words, without the unknown token": _tokenizer(
            {"type": "WordLevel", "vocab": {"fox": 0, "river": 1}, "unk_token": "<unk>"}, pre_tokenizer=space
        ),
        "word pieces, without the unknown token": _tokenizer(
            {
                "type": "WordPiece",
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 9,
                "vocab": {"fox": 0},
            },
            pre_tokenizer=space,
        ),
        "unigrams, without the unknown token": _tokenizer(
            {"type": "Unigram", "unk_id": None, "vocab": [["fox", -1.0]], "byte_fallback": False}
        ),
        "an empty vocabulary": _tokenizer(_word_level(vocab={})),
        "ids that are negative": _tokenizer(_word_level(vocab={"fox": -1, "<unk>": 0})),
        "ids that are no numbers": _tokenizer(_word_level(vocab={"fox": "a", "<unk>": 0})),
        "ids above 32 bits": _tokenizer(_word_level(vocab={"fox": 2**40, "<unk>": 0})),
        "ids with a gap of billions": _tokenizer(_word_level(vocab={"fox": 2**31, "<unk>": 0})),
        "an unknown kind of model": _tokenizer({"type": "Magic", "vocab": {}}),
        "no model": {"version": "1.0"},
        "merges of what is not there": _tokenizer({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        "a pattern that is none": _tokenizer(
            _word_level(),
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        "a normalizer whose table is damaged": _tokenizer(
            _word_level(), normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        ),
        "a normalizer of an unknown kind": _tokenizer(_word_level(), normalizer={"type": "Magic"}),
        "null": "null",
        "a list": "[]",
        "a number": "5",
        "nothing": "",
        "a text": "abc",
        "nested 100,000 deep": "[" * 100_000,
        "a normalizer nested 100,000 deep": '{"version": "1.0", "normalizer": '
        + '{"type":"Sequence","normalizers":[' * 100_000,
        "not UTF-8": "\udcff",
        "a tokenizer that knows nothing of the text": _tokenizer({"type": "BPE", "vocab": {"~": 0}, "merges": []}),
    }
    for name, content in broken.items():
        if name == "not UTF-8":

            def raw() -> None:
                Path("a.txt").write_text(text)
                Path("t.json").write_bytes(b"\xff\xfe{}")
                data_of(config(Path("a.txt").absolute(), tokenizer={"path": str(Path("t.json").absolute())}))

            cases.append(Case("tokenizer: not UTF-8", raw))
        else:
            cases.append(Case(f"tokenizer: {name}", with_file(content), seconds=30))
    cases += [
        Case(f"tokenizer cut at {share:.0%}", with_file(whole[: int(share * len(whole))]))
        for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    ]

    def told(content: Any, lost: bool) -> Callable[[], None]:
        def do() -> None:
            data, lines = logged(with_file(content))
            expect(("the tokenizer loses" in lines) == lost, f"told: {lines}")
            expect("of the characters survive" in lines, f"told: {lines}")
            expect(data.tokens("train").n_token > 100, "no tokens")

        return do

    known = _word_level()
    half = _word_level(vocab={word: i for i, word in enumerate([*WORDS[:8], "<unk>"])})
    letters = sorted(set("".join(WORDS)))[:8]
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for name, content, lost in (
        ("all words known", _tokenizer(known, pre_tokenizer=space, decoder=None), True),  # line ends become spaces
        ("half of the words known", _tokenizer(half, pre_tokenizer=space), True),
        (
            "letters that have no token",
            _tokenizer(
                {"type": "BPE", "unk_token": None, "vocab": {c: i for i, c in enumerate(letters)}, "merges": []},
                pre_tokenizer=space,
            ),
            True,
        ),
        (
            "capital letters lost",
            _tokenizer(
                {"type": "BPE", "vocab": {c: i for i, c in enumerate(sorted(set(text.lower())))}, "merges": []},
                normalizer={"type": "Lowercase"},
                decoder={"type": "Fuse"},
            ),
            True,
        ),
        (
            "every letter",
            _tokenizer(
                {"type": "BPE", "vocab": {c: i for i, c in enumerate(sorted(set(text)))}, "merges": []},
                decoder={"type": "Fuse"},
            ),
            False,
        ),
        (
            "every letter, ids with gaps",
            _tokenizer(
                {"type": "BPE", "vocab": {c: 7 * i for i, c in enumerate(sorted(set(text)))}, "merges": []},
                decoder={"type": "Fuse"},
            ),
            False,
        ),
        (
            "every byte, in words",
            _tokenizer(
                {
                    "type": "BPE",
                    "vocab": {
                        chr(c) if chr(c) not in " \n" else {" ": "Ġ", "\n": "Ċ"}[chr(c)]: i
                        for i, c in enumerate([10, 32, *range(33, 127)])
                    },
                    "merges": [],
                },
                pre_tokenizer=byte,
                decoder=byte,
            ),
            False,
        ),
        (
            "pad named otherwise",
            _tokenizer(
                {"type": "BPE", "vocab": {c: i for i, c in enumerate(["[PAD]", *sorted(set(text))])}, "merges": []},
                decoder={"type": "Fuse"},
            ),
            False,
        ),
        (
            "special tokens that are in the text",
            _tokenizer(
                {"type": "BPE", "vocab": {c: i for i, c in enumerate(sorted(set(text)))}, "merges": []},
                decoder={"type": "Fuse"},
                added_tokens=[
                    {
                        "id": 99,
                        "content": "fox",
                        "single_word": False,
                        "lstrip": True,
                        "rstrip": True,
                        "normalized": False,
                        "special": True,
                    }
                ],
            ),
            True,
        ),
        (
            "white space stripped",
            _tokenizer(
                {"type": "BPE", "vocab": {c: i for i, c in enumerate(sorted(set(text)))}, "merges": []},
                pre_tokenizer={"type": "WhitespaceSplit"},
                decoder={"type": "Fuse"},
            ),
            True,
        ),
        (
            "truncation set",
            _tokenizer(
                {"type": "BPE", "vocab": {c: i for i, c in enumerate(sorted(set(text)))}, "merges": []},
                decoder={"type": "Fuse"},
                truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
            ),
            False,
        ),
    ):
        cases.append(Case(f"tokenizer: {name}", told(content, lost), RIGHT))

    def places(make: Callable[[Path], Any]) -> Callable[[], None]:
        def do() -> None:
            Path("a.txt").write_text(text)
            path = Path("t.json").absolute()
            place = make(path)
            data_of(config(Path("a.txt").absolute(), tokenizer={"path": str(path if place is None else place)}))

        return do

    made: dict[str, Callable[[Path], Any]] = {
        "a pipe": lambda path: os.mkfifo(path),
        "a folder": lambda path: path.mkdir(),
        "nothing": lambda path: None,
        "a device": lambda path: "/dev/zero",
        "a path of 5,000 characters": lambda path: "x" * 5000,
        "a path with a NUL": lambda path: "a\0b",
        "a home of nobody": lambda path: "~nobody-of-this-name/t.json",
    }
    cases += [Case(f"tokenizer file: {name}", places(make), seconds=20) for name, make in made.items()]
    return cases


def _sizes() -> list[Case]:
    """Texts that are short, long, repeated."""
    cases = []

    def with_text(text: str, kind: str = "byte", **settings: Any) -> Callable[[], Any]:
        def do() -> Any:
            Path("a.txt").write_text(text)
            return data_of(config(Path("a.txt").absolute(), tokenizer={"kind": kind}, **settings))

        return do

    for kind in ("char", "byte", "word", "bpe"):
        cases.append(Case(f"a letter, {kind}", with_text("a", kind)))
        cases.append(Case(f"ten words, {kind}", with_text("fox river " * 5, kind)))

        def whole(kind: str = kind) -> None:
            import numpy as np

            text = "\n".join(prose(19, 80))
            data = with_text(text, kind)()
            found = [
                data.tokenizer.decode(np.asarray(data.tokens(split).tokens).tolist())
                for split in ("train", "val", "test")
            ]
            expect("".join(found) == text, "text is lost")

        cases.append(Case(f"all of a text is in the tokens, {kind}", whole, RIGHT))
    cases += [
        Case(
            "documents of one token",
            with_text("\n".join("abcdefghij"[i % 10] for i in range(4000)), document_separator="\\n"),
        ),
        Case(
            "documents of one token, many kinds",
            with_text("\n".join(chr(0x4E00 + i) for i in range(4000)), "char", document_separator="\\n"),
        ),
    ]

    def warned(text: str, says: str, **settings: Any) -> Callable[[], None]:
        def do() -> None:
            _, told = logged(with_text(text, **settings))
            expect(says in told, f"not told: {told}")

        return do

    def few_segments() -> None:
        Path("a.txt").write_text("fox river bread. " * 40)
        settings = config(Path("a.txt").absolute(), tokenizer={"kind": "byte"})
        settings["curriculum"]["phases"] = [{"steps": 9, "n_row": 32, "n_segment": 2}]
        expect("is never read" in logged(lambda: data_of(settings))[1], "not told")

    short = "\n".join(f"fox {i} river" for i in range(400))
    cases += [
        Case(
            "documents shorter than two segments",
            warned(short, "less than two segments", document_separator="\\n"),
            RIGHT,
        ),
        Case("a document per word", warned(short, "memory begins anew in each", document_separator=" "), RIGHT),
        Case("a text of fewer segments than rows", few_segments, RIGHT),
    ]

    def long_line(sign: str, kind: str) -> Callable[[], None]:
        def do() -> None:
            text = sign * 200_000
            data = with_text(text, kind)()
            expect(data.tokens("train").n_token > 1, "lost")
            kept = data.tokenizer.decode(data.tokens("train").tokens[:1000].tolist()).rstrip("\ufffd")  # a letter cut
            expect(kept and kept in text, f"other text: {kept[:50]!r}")

        return do

    for sign, kind in itertools.product(("a", "ab", "漢", "👩‍👩‍👧", ".", "a\u0301"), ("bpe", "byte", "char")):
        cases.append(Case(f"a line of 200,000 times {sign!r}, {kind}", long_line(sign, kind), RIGHT, seconds=120))

    def doubles() -> None:
        many = ["\n".join(prose(1, seed=i % 30)) for i in range(300)]
        Path("a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in many))
        from memlm.assemble import build_corpus

        corpus = build_corpus(config(Path("a.jsonl").absolute()))
        parts = {split: set(corpus.documents(split)) for split in ("train", "val", "test")}
        expect(not parts["train"] & (parts["val"] | parts["test"]), "a document is held out and trained")
        expect(sum(len(corpus.documents(split)) for split in parts) == 300, "documents are lost")

    def all_alike() -> None:
        Path("a.jsonl").write_text("\n".join(json.dumps({"text": "\n".join(prose(1, 400))}) for _ in range(50)))
        found = documents(config(Path("a.jsonl").absolute()))
        expect(sum(map(len, found)) == 50 * len("\n".join(prose(1, 400))), "text is lost")

    cases += [Case("documents that are there ten times", doubles, RIGHT), Case("all documents alike", all_alike, RIGHT)]

    def read_alike(n_document: int) -> Callable[[], None]:
        def do() -> None:
            from memlm.data.stream import ValidationBatches

            texts = prose(n_document, 400)
            data = with_text("\n\n\n".join(texts), document_separator=None if n_document == 1 else "\\n\\n\\n")()
            val = data.tokens("val")
            batches = ValidationBatches(val, 16, data.tokenizer.pad_id)
            n_reset = sum(int(b.reset.sum()) for i in range(len(batches)) if (b := batches[i]).reset is not None)
            n_read = sum(int((b.ids != 0).sum()) for i in range(len(batches)) for b in [batches[i]])
            expect(n_reset <= val.n_document + batches.n_row, f"memory begins anew {n_reset} times")
            expect(n_read >= val.n_token - 16 * batches.n_row, f"{n_read} of {val.n_token} tokens are read")

        return do

    cases += [Case(f"validation reads {n} documents as they are", read_alike(n), RIGHT) for n in (1, 2, 3, 19, 40)]
    return cases


def _hub() -> list[Case]:
    cases = []
    many = prose()

    def folder(
        make: Callable[[Path], Any], check: Callable[[list[str]], None] | None = None, **settings: Any
    ) -> Callable[[], None]:
        def do() -> None:
            place = Path("set").absolute()
            place.mkdir()
            make(place)
            found = documents(config(place, hub=True, **settings))
            if check is not None:
                check(found)

        return do

    lines = "\n".join(many)

    def joined(found: list[str]) -> None:
        expect("".join(found).strip() == lines, "other text")
        expect(len(found) == 3, f"{len(found)} documents")

    def two(place: Path) -> None:
        (place / "a.txt").write_text(lines)
        (place / "b.txt").write_text(lines)
        (place / "README.md").write_text(
            "---\nconfigs:\n- config_name: first-one\n  data_files: a.txt\n"
            "- config_name: second-one\n  data_files: b.txt\n---\n"
        )

    def choose(**settings: Any) -> Callable[[], None]:
        def do() -> None:
            from memlm.config import ConfigError

            try:
                folder(two, **settings)()
            except ConfigError as error:
                expect("first-one, second-one" in str(error), f"configurations are not named: {error}")
                raise

        return do

    cases += [
        Case("hub: lines of a text file are joined", folder(lambda p: (p / "a.txt").write_text(lines), joined), RIGHT),
        Case(
            "hub: lines of a text file, streamed",
            folder(lambda p: (p / "a.txt").write_text(lines), joined, max_documents=10**6),
            RIGHT,
        ),
        Case(
            "hub: lines of a text file as documents",
            folder(
                lambda p: (p / "a.txt").write_text(lines), lambda found: same(found, lines.split("\n")), document="row"
            ),
            RIGHT,
        ),
        Case("hub: two configurations", choose()),
        Case("hub: a configuration that is none", choose(config="first-tow")),
        Case("hub: one of two configurations", folder(two, joined, config="first-one"), RIGHT),
        Case("hub: an empty folder", folder(lambda p: None)),
        Case("hub: a folder of pictures", folder(lambda p: (p / "a.bin").write_bytes(bytes(99)))),
        Case("hub: csv without the column", folder(lambda p: (p / "a.csv").write_text("a,b\n1,2\n"))),
        Case("hub: csv of numbers", folder(lambda p: (p / "a.csv").write_text("text,b\n1,2\n"))),
        Case(
            "hub: csv",
            folder(
                lambda p: (p / "a.csv").write_text("text,b\nfox river,2\nbread,3\n"),
                lambda found: expect(sorted("".join(found)) == sorted("fox riverbread"), "other text"),
            ),
            RIGHT,
        ),
        Case("hub: a broken jsonl", folder(lambda p: (p / "a.jsonl").write_text('{"text": "a"}\n{"te'))),
        Case("hub: a broken parquet", folder(lambda p: (p / "a.parquet").write_bytes(b"PAR1" + bytes(50)))),
        Case("hub: a text that is not UTF-8", folder(lambda p: (p / "a.txt").write_bytes(b"abc \xff\xfe" * 50))),
        Case("hub: a text of NULs", folder(lambda p: (p / "a.txt").write_bytes(("\n".join(many)).encode("utf-16-le")))),
        Case("hub: a split that is none", folder(lambda p: (p / "a.txt").write_text(lines), split="trian")),
        Case(
            "hub: a slice that is streamed",
            folder(lambda p: (p / "a.txt").write_text(lines), split="train[:1%]", max_documents=5),
        ),
        Case("hub: a slice that is none", folder(lambda p: (p / "a.txt").write_text(lines), split="train[:x]")),
        Case("hub: a script", folder(lambda p: (p / "set.py").write_text("open('EXECUTED', 'w')\nimport datasets\n"))),
        Case(
            "hub: a script that is asked for",
            folder(lambda p: (p / "set.py").write_text("open('EXECUTED', 'w')\n"), config="x"),
        ),
        Case("hub: a set that is nowhere", lambda: documents(config("nobody/of-this-name", hub=True))),
        Case("hub: a name that is none", lambda: documents(config("a b/c d/e", hub=True))),
    ]
    return cases


# --- settings ------------------------------------------------------------------------------------------------------


def settings() -> list[Case]:
    """Settings below ``data``."""
    import datasets  # noqa: F401
    import tokenizers  # noqa: F401

    for data in ("text", "hub", "symbols"):
        _composed(data)
    text = "\n\n\n".join(prose(60, 80))

    def tried(*overrides: str, data: str = "text") -> Callable[[], None]:
        def do() -> None:
            Path("a.txt").write_text(text)
            from omegaconf import OmegaConf, open_dict

            from memlm.assemble import build_model
            from memlm.compose import to_dict
            from memlm.config import validate

            cfg = copy.deepcopy(_composed(data))
            with open_dict(cfg):
                for line in (*(["data.path=a.txt"] if data == "text" else []), *overrides):
                    key, _, value = line.partition("=")
                    OmegaConf.update(cfg, key, yaml.safe_load(value), merge=False)
            settings = to_dict(cfg)
            validate(settings["data"], key="data")
            build_model(settings, data_of(settings).tokenizer)

        return do

    refused = [
        *(
            f"data.corpus.document_separator={value}"
            for value in ("''", '""', "'never there'", "5", "[a]", r"'\\n\\n'", r'"\t\t"')
        ),
        *(f"data.corpus.document={value}" for value in ("rows", "null", "5", "[]", "heading", "Row")),
        *(f"data.corpus.column={value}" for value in ("5", "null", "[text]")),
        *(f"data.tokenizer.kind={value}" for value in ("bpee", "null", "5", "''", "[bpe]", "BPE")),
        *(
            f"data.tokenizer.vocab_size={value}"
            for value in (
                "0",
                "-1",
                "256",
                "1.5",
                "abc",
                "null",
                "[300]",
                "true",
                "100000000000000000000",
                "9223372036854775807",
            )
        ),
        *(f"data.tokenizer.n_vocab={value}" for value in ("5", "-1", "abc", "1.5")),
        *(f"data.tokenizer.path={value}" for value in ("nothing.json", "a.txt", "5", "[]", "'.'")),
        *(f"data.n_worker={value}" for value in ("-1", "1.5", "abc", "null", "true")),
        *(
            f"data.path={value}"
            for value in ("''", "nothing.txt", "'*.nothing'", "5", "null", "[a.txt]", "{a: b}", "/dev/zero")
        ),
        "data.corpus=null",
        "data.corpus=5",
        "data.tokenizer=null",
        "data.tokenizer={}",
        "data.tokenizer=bpe",
        "data.corpus.max_documents=5",
        "data.corpus._target_=memlm.data.corpora.hub.Hubb",
    ]
    cases = [Case(line, tried(line)) for line in refused]
    cases += [
        Case(
            "a separator and a way to make documents",
            tried(r'data.corpus.document_separator="\n\n\n"', "data.corpus.document=row"),
        ),
        Case("data=hub without a name", tried(data="hub")),
        *(
            Case(f"hub, {line}", tried("data.name=a.txt", line, data="hub"))
            for line in (
                "data.corpus.max_documents=0",
                "data.corpus.max_documents=-5",
                "data.corpus.max_documents=abc",
                "data.corpus.document=join",
                "data.corpus.split=''",
                "data.corpus.split=5",
            )
        ),
        *(
            Case(f"symbols, n_symbol={value}", tried(f"data.corpus.n_symbol={value}", data="symbols"))
            for value in ("1", "0", "-4", "abc", "null")
        ),
    ]

    def counted(n: int, *overrides: str) -> Callable[[], None]:
        def do() -> None:
            Path("a.txt").write_text(text)
            from memlm.compose import compose, to_dict

            found = documents(to_dict(compose(["data=text", "data.path=a.txt", *overrides])))
            expect(len(found) == n, f"{len(found)} documents, wanted {n}")

        return do

    cases += [
        Case(f"40 documents by {line}", counted(60, f"data.corpus.document_separator={line}"), RIGHT)
        for line in (r'"\n\n\n"', r"'\n\n\n'", r'"\r\n\r\n\r\n"', "'\n\n\n'")
    ]
    cases.append(Case("no separator", counted(3), RIGHT))

    def moved(*where: str) -> Callable[[], None]:
        """Train on a relative path, then measure from another folder."""

        def do() -> None:
            Path("a.txt").write_text(text)
            try:
                command("train", *TINY, "data=text", "data.path=a.txt", "hydra.run.dir=run", "paths.cache_dir=cache")
            except SystemExit as error:
                expect(not error.code, "not trained")
            Path("there").mkdir()
            if where:
                Path("a.txt").rename("there/b.txt")
                Path("there/other.txt").write_text(text.replace("fox", "cat"))
            os.chdir("there")
            command("evaluate", "checkpoint=../run", "experiment=perplexity", "hydra.run.dir=out", *where)

        return do

    cases += [
        Case("a relative path, measured from another folder", moved(), RIGHT),
        Case("a text that was moved, measured where it is", moved("data.path=b.txt"), RIGHT),
        Case("a text that was moved, measured where it was", moved("seed=0"), REFUSED),
        Case("a text that was moved, measured with another", moved("data.path=other.txt"), REFUSED),
        Case("a text that was moved, measured with nothing", moved("data.path=nothing.txt"), REFUSED),
    ]

    def resumed(change: bool, *how: str) -> Callable[[], None]:
        """Go on with the same text, or another, under another path."""

        def do() -> None:
            Path("a.txt").write_text(text)
            Path("b.txt").write_text(text.replace("fox", "cat") if change else text)
            given = [*TINY, "data=text", "paths.cache_dir=cache", "data.tokenizer.kind=byte", "paths.root=."]
            try:
                command("train", *given, "data.path=a.txt", "hydra.run.dir=run")
            except SystemExit as error:
                expect(not error.code, "not trained")
            more = [line for line in given if "max_steps" not in line]
            command("train", *more, "trainer.max_steps=2", "data.path=b.txt", "hydra.run.dir=run2", *how)

        return do

    cases += [
        Case("going on with a text that was moved", resumed(False, "resume=run"), RIGHT),
        Case("going on with another text", resumed(True, "resume=run"), REFUSED),
    ]
    return cases
