"""Python's own source as text, and books of the user's own: documents whole, splits apart."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from memlm.config import ConfigError
from memlm.data.corpora import builtin
from memlm.data.corpora.code import Code, split_packages
from memlm.data.corpora.files import Books, TextFiles


def lines(start: int, stop: int) -> str:
    return "".join(f"value_{i:05d} = compute_something({i})\n" for i in range(start, stop))


def test_packages_are_held_out_whole() -> None:
    modules = {
        (f"package{p}", f"module{m}"): lines(100 * (10 * p + m), 100 * (10 * p + m) + 50)
        for p, m in itertools.product(range(40), range(3))
    }
    splits = split_packages(modules, least=0, longest=0.5)
    homes = {text: split for split, texts in splits.items() for text in texts}
    assert len(homes) == 120
    by_package: dict[str, set[str]] = {}
    for (package, _), text in modules.items():
        by_package.setdefault(package, set()).add(homes[text])
    assert all(len(found) == 1 for found in by_package.values())
    sizes = {split: sum(map(len, texts)) for split, texts in splits.items()}
    assert 0.08 <= sizes["test"] / sum(sizes.values()) <= 0.12
    assert 0.08 <= sizes["val"] / sum(sizes.values()) <= 0.12
    assert split_packages(dict(reversed(modules.items())), least=0, longest=0.5) == splits


def test_copies_with_changes_are_dropped_from_train() -> None:
    modules = {(f"package{p}",): lines(1000 * p, 1000 * p + 50) for p in range(40)}
    held = split_packages(modules, least=0, longest=0.5)["test"][0]
    alike = {("zz_copy",): lines(90_000, 90_030) + "".join(held.splitlines(keepends=True)[:20])}
    apart = {("zz_apart",): lines(91_000, 91_045) + "".join(held.splitlines(keepends=True)[:5])}
    splits = split_packages({**modules, **alike, **apart}, least=0, longest=0.5)
    everything = list(itertools.chain(*splits.values()))
    assert held in everything
    assert alike["zz_copy",] not in everything
    assert apart["zz_apart",] in everything


def test_a_large_package_is_not_held_out() -> None:
    modules = {(f"package{p}",): lines(1000 * p, 1000 * p + 50) for p in range(40)}
    modules["large",] = lines(100_000, 100_500)
    assert modules["large",] in split_packages(modules, least=0, longest=0.5)["train"]


def test_modules_of_this_python_without_tests_and_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "library"
    for folder in ("pack", "pack/tests", "encodings", "site-packages"):
        (library / folder).mkdir(parents=True)
    (library / "pack/a.py").write_bytes(b"# -*- coding: latin-1 -*-\r\n# caf\xe9\r\n" + lines(0, 100).encode())
    (library / "pack/broken.py").write_bytes(b"# \xff\n" + lines(100, 200).encode())
    (library / "pack/short.py").write_text(lines(200, 210))
    for i, name in enumerate(["pack/tests/t.py", "encodings/e.py", "site-packages/s.py"], 3):
        (library / name).write_text(lines(100 * i, 100 * i + 100))
    monkeypatch.setenv("MEMLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(library))
    corpus = Code()
    assert corpus.documents("test") == ["# -*- coding: latin-1 -*-\n# café\n" + lines(0, 100)]
    with pytest.raises(ConfigError, match="too short to have a train split"):
        corpus.documents("train")
    (library / "pack/a.py").unlink()
    assert Code().fingerprint() == corpus.fingerprint()  # from the cache


@pytest.mark.slow
def test_the_standard_library_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMLM_CACHE", str(tmp_path))
    corpus = Code()
    texts = {split: corpus.documents(split) for split in ("train", "val", "test")}
    assert all(len(texts[split]) >= 20 and sum(map(len, texts[split])) >= 900_000 for split in ("val", "test"))
    assert sum(map(len, texts["train"])) >= 4_000_000
    assert not set(texts["train"]) & {*texts["val"], *texts["test"]}


def books(folder: Path, name: str, *texts: str) -> str:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / name)


def test_splits_may_have_files_of_their_own(tmp_path: Path) -> None:
    many = [f"book {i} of many\n\nand more" for i in range(30)]
    train = books(tmp_path, "train.jsonl", *many)
    val, test = books(tmp_path, "val.jsonl", "one to look at"), books(tmp_path, "test.jsonl", "one kept", "and two")
    corpus = Books(train, val=val, test=test)
    assert {split: corpus.documents(split) for split in ("train", "val", "test")} == {
        "train": many, "val": ["one to look at"], "test": ["one kept", "and two"]
    }  # fmt: skip
    held = Books(train, test=test, held_out=0.1)
    assert (len(held.documents("train")), len(held.documents("val"))) == (27, 3)
    assert held.documents("test") == ["one kept", "and two"]
    assert len(Books(train).documents("test")) == 6
    assert len(TextFiles(train, document="row").documents("test")) == 2
    with pytest.raises(ConfigError, match="is named for train and for test"):
        Books(str(tmp_path / "t*.jsonl"), test=test).documents("train")


def test_a_book_is_a_document_whatever_it_looks_like(tmp_path: Path) -> None:
    rows = [f" = Title {i} = \n" for i in range(30)]
    assert sorted(itertools.chain(*_all(Books(books(tmp_path, "a.jsonl", *rows))))) == sorted(rows)
    (tmp_path / "one.txt").write_text("a line\n" * 300)
    assert "".join(itertools.chain(*_all(Books(str(tmp_path / "one.txt"))))) == "a line\n" * 300


def _all(corpus: Any) -> list[list[str]]:
    return [corpus.documents(split) for split in ("train", "val", "test")]


def test_without_files_it_is_said_where_books_are() -> None:
    with pytest.raises(ConfigError, match=r"data\.path=FILE .* Project Gutenberg"):
        Books(None)
    for share in (0, 0.5):
        with pytest.raises(ConfigError, match="held_out must be above 0 and at most"):
            Books("a.txt", held_out=share)
