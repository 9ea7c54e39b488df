import functools
import http.server
import inspect
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from memlm.config import ConfigError
from memlm.data.corpora import builtin, hub
from memlm.data.corpora.base import as_documents, split_documents
from memlm.data.corpora.builtin import Builtin
from memlm.data.corpora.files import TextFiles
from memlm.data.corpora.hub import Hub, Shakespeare

SPLITS = ("train", "val", "test")
CONFIGS = Path(__file__).parents[3] / "configs" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    """Keep what `datasets` stores out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "hf" / "downloads"))
    datasets.disable_progress_bars()


@pytest.fixture
def online(monkeypatch):
    """Switch the offline mode of the test run off, for servers on this machine."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def serve(tmp_path, online):
    """Serve a folder over HTTP; yields the folder, its address and a function that stops the server."""
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def stop():
        server.shutdown()
        server.server_close()

    yield folder, f"http://127.0.0.1:{server.server_port}", stop
    stop()


def closed_address() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def documents(corpus) -> dict[str, list[str]]:
    return {split: corpus.documents(split) for split in SPLITS}


# --- builtin ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_builtin_splits_are_large_and_share_no_passage_and_come_back_from_the_cache(cache):
    built = Builtin()
    texts = documents(built)
    size = {split: sum(len(d.encode()) for d in texts[split]) for split in SPLITS}
    assert size["val"] >= 60_000
    assert size["test"] >= 60_000
    assert size["train"] >= 1_000_000
    assert all(len(texts[split]) >= 5 for split in SPLITS)

    def shingles(split, n=20):
        found = set()
        for document in texts[split]:
            words = re.findall(r"\w+", document.lower())
            found.update(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        assert len(found) > 5_000
        return found

    train, val, test = map(shingles, SPLITS)
    assert not train & val
    assert not train & test
    assert not val & test

    paragraphs = [p for split in SPLITS for d in texts[split] for p in d.split("\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert not [p for p in paragraphs if p != " ".join(p.split())]
    # known passages: one of a topic, one of a docstring, their hard line wraps undone
    everything = "\n".join(paragraphs)
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in everything
    assert "Dedent every non-blank line" not in everything  # a comment of textwrap, not a docstring
    assert "Remove any common leading whitespace from every line in `text`." in everything

    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    assert documents(Builtin()) == texts
    assert Builtin().fingerprint() == built.fingerprint()
    assert file.stat().st_mtime_ns == stamp


def small_builtin(monkeypatch, tmp_path):
    """Let the builtin corpus read a small standard library; returns how often it was read."""
    library = tmp_path / "library"
    (library / "pack" / "test").mkdir(parents=True)
    (library / "one.py").write_text(f'"""{"One long docstring. " * 6}"""\nraise SystemExit("imported")\n')
    (library / "pack" / "b.py").write_text(f'def f():\n    """{"Inside a package. " * 6}"""\n')
    (library / "pack" / "c.py").write_text('"""Too short."""\n')
    (library / "pack" / "test" / "d.py").write_text(f'"""{"Never read tests. " * 6}"""\n')
    reads = []
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: reads.append(name) or str(library))
    return reads


def test_builtin_reads_docstrings_without_importing_and_skips_tests_and_short_ones(monkeypatch, tmp_path):
    small_builtin(monkeypatch, tmp_path)
    found = builtin._docstrings()
    assert found == {
        "module one": [("One long docstring. " * 6).strip()],
        "module pack": [("Inside a package. " * 6).strip()],
    }


@pytest.mark.parametrize("damage", [b"", b'{"sha256": "0", "splits"', b'{"sha256": "0", "splits": {}}', b"[]", b"\xff"])
def test_builtin_is_built_again_when_its_cache_is_damaged(monkeypatch, tmp_path, cache, damage):
    reads = small_builtin(monkeypatch, tmp_path)
    expected = Builtin().fingerprint()
    assert len(reads) == 1
    Builtin().fingerprint()
    assert len(reads) == 1
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    assert Builtin().fingerprint() == expected
    assert len(reads) == 2


def test_builtin_cache_with_altered_text_is_noticed(monkeypatch, tmp_path, cache):
    reads = small_builtin(monkeypatch, tmp_path)
    expected = Builtin().fingerprint()
    (file,) = cache.iterdir()
    text = file.read_text()
    assert "One long" in text
    file.write_text(text.replace("One long", "One wrong"))
    assert Builtin().fingerprint() == expected
    assert len(reads) == 2


def test_paragraphs_undo_wraps_and_drop_underlines():
    text = "Title\n=====\n\nOne  line\n   and\tthe next.\n\n\n  - item\n"
    assert builtin._paragraphs(text) == ["Title", "One line and the next.", "- item"]


def test_a_passage_across_two_paragraphs_is_dropped_from_train_too():
    shared = [" ".join(f"w{i}" for i in range(7)), " ".join(f"w{i}" for i in range(7, 14))]
    held = {tuple(f"w{i}" for i in range(13))}
    assert builtin._without_shared(["before", *shared, "after"], held) == ["before", "after"]
    assert builtin._without_shared(["before", shared[0], "after"], held) == ["before", shared[0], "after"]


# --- text files ---------------------------------------------------------------------------------------------------


def test_one_text_file_is_cut_by_position_between_lines(tmp_path):
    text = "".join(f"line {i:04d} of the text\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    texts = documents(TextFiles(str(tmp_path / "a.txt")))
    assert [len(texts[split]) for split in SPLITS] == [1, 1, 1]
    assert texts["train"][0] + texts["val"][0] + texts["test"][0] == text
    assert texts["val"][0].startswith("line 0900")
    assert texts["test"][0].startswith("line 0950")


def test_a_text_without_lines_is_cut_between_words_and_without_words_anywhere():
    words = " ".join(f"word{i:03d}" for i in range(500))
    parts = split_documents([words])
    assert "".join(parts[split][0] for split in SPLITS) == words
    assert all(re.fullmatch(r"(word\d{3} ?)+", parts[split][0]) for split in SPLITS)
    assert [len(parts[split][0]) for split in SPLITS] == [3600, 200, 199]
    assert {s: d[0] for s, d in split_documents(["x" * 100]).items()} == {
        "train": "x" * 90,
        "val": "x" * 5,
        "test": "x" * 5,
    }


def test_many_documents_are_split_whole_by_content_and_equal_ones_stay_together():
    many = [f"document {i}" for i in range(100)]
    parts = split_documents(many)
    assert [len(parts[split]) for split in SPLITS] == [90, 5, 5]
    assert sorted(itertools.chain(*parts.values())) == sorted(many)
    order = {document: i for i, document in enumerate(many)}
    assert all(parts[split] == sorted(parts[split], key=order.__getitem__) for split in SPLITS)
    # neither the order of the documents nor copies of them move one to another split
    again = split_documents([*reversed(many), *many])
    assert {split: set(parts[split]) for split in SPLITS} == {split: set(again[split]) for split in SPLITS}
    assert len(again["val"]) == 10


def test_twenty_documents_are_the_least_to_be_split_whole():
    assert len(split_documents([f"document number {i} of some" for i in range(19)])["train"]) == 19
    assert len(split_documents([f"document number {i} of some" for i in range(20)])["train"]) == 18


def test_glob_jsonl_parquet_and_separator_read_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [f"text number {i} ünï\u2028x" for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"body": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "all.parquet")
    (tmp_path / "joined.txt").write_text("\n--\n".join([*texts, " "]), encoding="utf-8")
    corpora = [
        TextFiles(str(tmp_path / "??.txt")),
        TextFiles(str(tmp_path / "all.jsonl"), column="body"),
        TextFiles(str(tmp_path / "all.parquet"), column="body"),
        TextFiles(str(tmp_path / "joined.txt"), document_separator="\n--\n"),
    ]
    expected = documents(corpora[0])
    assert sorted(itertools.chain(*expected.values())) == sorted(texts)
    assert all(documents(c) == expected for c in corpora[1:])
    assert len({c.fingerprint() for c in corpora}) == 1


def test_fingerprint_follows_the_text_and_the_place_of_its_cuts(tmp_path):
    def fingerprint(*texts):
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
        return TextFiles(str(tmp_path / "a.jsonl")).fingerprint()

    first = fingerprint("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == fingerprint("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert first != fingerprint("a b c d e f g h i j k l m n o p q r s t u v w x y Z")
    assert fingerprint("x" * 40, "x" * 60) != fingerprint("x" * 60, "x" * 40)


def test_byte_order_mark_and_windows_line_ends_are_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"abc def\r\n" * 100)
    assert "".join(itertools.chain(*documents(TextFiles(str(tmp_path / "a.txt"))).values())) == "abc def\n" * 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt' does not exist"),
        ("*.none", None, r"no file matches the pattern .*\*\.none"),
        ("", None, r"is a folder; give a file, or a pattern such as .*\*\.txt"),
        ("a.txt", b" \n", r"a\.txt' holds no text"),
        ("a.jsonl", b"\n", r"a\.jsonl' holds no text"),
        ("a.txt", b"abc\xe4def", r"a\.txt' is not UTF-8: byte 3 is 0xe4"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl' is not UTF-8: byte 24 is 0xff"),
        ("a.jsonl", b'{"text": "x"}\n\n{"texd": "y"}', r"a\.jsonl, line 3: no column 'text'.*Did you mean 'texd'\?"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'"text"', r"a\.jsonl, line 1: expected a JSON object, not str"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl, line 1: column 'text' must be text, not int"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: character 0 .* surrogate"),
        ("a.parquet", b"not parquet", r"a\.parquet' cannot be read as parquet"),
        ("a.json", b"{}", r"a\.json'.*must end in \.txt, \.jsonl, \.parquet.*Did you mean '\.jsonl'\?"),
    ],
)
def test_bad_files_are_told_in_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        TextFiles(str(tmp_path / name)).documents("train")
    assert "\n" not in str(error.value)


def test_parquet_without_the_column_and_with_a_null(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: no column 'text'; there are: body"):
        TextFiles(str(tmp_path / "a.parquet")).documents("train")
    pyarrow.parquet.write_table(pyarrow.table({"body": pyarrow.nulls(2)}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet' holds no text"):
        TextFiles(str(tmp_path / "a.parquet"), column="body").documents("train")


def test_unknown_or_empty_split_and_empty_separator(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ConfigError, match=r"unknown split 'tst'.*Did you mean 'test'"):
        TextFiles(str(tmp_path / "a.txt")).documents("tst")
    with pytest.raises(ConfigError, match="too short to have a val split"):
        TextFiles(str(tmp_path / "a.txt")).documents("val")
    with pytest.raises(ConfigError, match="document_separator is empty"):
        TextFiles(str(tmp_path / "a.txt"), document_separator="")
    with pytest.raises(ConfigError, match=r"document_separator '\\n---\\n' occurs nowhere"):
        TextFiles(str(tmp_path / "a.txt"), document_separator=r"\n---\n").documents("train")
    with pytest.raises(ConfigError, match="both say where a document ends"):
        TextFiles(str(tmp_path / "a.txt"), document_separator=" ", document="row")
    with pytest.raises(ConfigError, match=r"document must be one of auto, row.*Did you mean 'row'"):
        TextFiles(str(tmp_path / "a.txt"), document="rows")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\r\n"])  # the last one: mixed
@pytest.mark.parametrize("written", ["\n\n\n", r"\n\n\n", r"\r\n\r\n\r\n"])
def test_a_separator_is_found_however_it_is_written_and_lines_end(tmp_path, end, written):
    texts = [f"text {i}\nof two lines" for i in range(40)]
    ends = itertools.cycle(["\n", "\r\n"] if len(end) == 3 else [end])
    whole = "".join(next(ends) if letter == "\n" else letter for letter in "\n\n\n".join(texts))
    (tmp_path / "a.txt").write_bytes(whole.encode())
    found = documents(TextFiles(str(tmp_path / "a.txt"), document_separator=written))
    assert sorted(itertools.chain(*found.values())) == sorted(texts)


def test_the_separator_of_the_example_in_the_configs_reaches_the_corpus(tmp_path):
    from memlm.assemble import build_corpus
    from memlm.compose import compose, to_dict

    (tmp_path / "a.txt").write_text("\n\n\n".join(f"text {i}" for i in range(40)))
    (example,) = re.findall(r"e\.g\. '(.*)';", (CONFIGS / "text.yaml").read_text())
    config = to_dict(
        compose(["data=text", f"data.path={tmp_path / 'a.txt'}", f"data.corpus.document_separator={example}"])
    )
    assert sum(map(len, documents(build_corpus(config)).values())) == 40


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_wide_encodings_are_named_with_and_without_a_byte_order_mark(tmp_path, encoding, mark):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes((mark + "A text of Latin letters.\n" * 30).encode(encoding))
        with pytest.raises(ConfigError, match=rf"looks like {encoding.upper()}, not UTF-8"):
            TextFiles(str(tmp_path / name)).documents("train")
    (tmp_path / "b.txt").write_bytes(("лиса и река " * 30).encode("utf-16-le"))
    with pytest.raises(ConfigError, match="it has 90 NUL characters, the first at byte 9"):
        TextFiles(str(tmp_path / "b.txt")).documents("train")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_null_rows_are_left_out_and_counted(tmp_path, caplog, hf_cache, kind):
    import pyarrow
    import pyarrow.parquet

    texts = [f"text {i}" for i in range(30)]
    rows = [None, *texts[:9], None, *texts[9:], None]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    (tmp_path / "hub").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "hub" / "a.jsonl") if kind == "hub" else None
    corpus = Hub(str(tmp_path / "hub")) if kind == "hub" else TextFiles(str(tmp_path / f"a.{kind}"))
    assert sorted(itertools.chain(*documents(corpus).values())) == sorted(texts)
    assert "3 of 33 rows are null and left out" in caplog.text


WIKI = [
    [f" = Title {i} = ", "", f" First line of {i} . ", " = = Part = = ", "", f" Second line of {i} . "]
    for i in range(30)
]


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_of_wikitext_become_articles(end):
    rows = [line + end for article in [["", *WIKI[0]], *WIKI[1:]] for line in article]
    found = as_documents(rows, "auto", "here")
    assert "".join(found) == "".join(line.removesuffix("\n") + "\n" for line in rows)
    blank, *articles = [document.split("\n")[0] for document in found]
    assert blank == ""  # before the first title
    assert articles == [article[0] for article in WIKI]
    assert as_documents(rows, "row", "here") == rows
    assert len(as_documents(rows, "join", "here")) == 1


def test_rows_are_joined_only_where_they_are_lines():
    single = [f"One row of {i}." for i in range(40)]
    assert as_documents(single, "auto", "here") == single
    assert as_documents(single, "auto", "here", of_lines=True) == ["\n".join(single) + "\n"]
    assert len(as_documents([text for text in single for text in (text, "")], "auto", "here")) == 1  # blank ones
    assert len(as_documents([f"{text}\n" for text in single], "auto", "here")) == 1  # line ends
    several = [f"{text}\nAnd a second line.\n" for text in single]
    assert as_documents(several, "auto", "here") == several
    with pytest.raises(ConfigError, match="no row is a title"):
        as_documents(single, "heading", "here")


def test_lines_of_a_hub_folder_are_joined_unless_told_otherwise(tmp_path, hf_cache):
    lines = [f"line {i} of the text" for i in range(60)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("\n".join(lines))
    joined = documents(Hub(str(tmp_path / "set")))
    assert [len(joined[split]) for split in SPLITS] == [1, 1, 1]
    assert "".join(joined[split][0] for split in SPLITS).split("\n")[:-1] == lines
    rows = documents(Hub(str(tmp_path / "set"), document="row"))
    assert sorted(itertools.chain(*rows.values())) == sorted(lines)


def test_a_hub_set_of_several_configurations_names_them(tmp_path, hf_cache):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some lines\n" * 90)
    configs = {"small-raw": "a.txt", "large-raw": "b.txt"}
    head = "".join(f"- config_name: {name}\n  data_files: {file}\n" for name, file in configs.items())
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}---\n")
    for config in (None, "smal-raw"):
        with pytest.raises(ConfigError, match="one of small-raw, large-raw") as error:
            Hub(str(tmp_path), config=config).documents("train")
        assert "\n" not in str(error.value)


def test_folders_that_name_configurations_alike_are_not_taken_for_each_other(
    tmp_path: Path, hf_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLM_CACHE", str(tmp_path / "cache"))
    for place, text in (("a", "the old house\n"), ("b", "a small river\n"), ("a", "a bird in the tree\n")):
        folder = tmp_path / place / "set"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: one\n  data_files: text.txt\n---\n")
        (folder / "text.txt").write_text(text * 20)
        splits = documents(Hub(str(folder), config="one"))
        assert "".join(itertools.chain(*splits.values())).split() == (text * 20).split()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "long", "deep"])
def test_what_is_no_file_neither_waits_nor_fails_otherwise(tmp_path, kind):
    path = tmp_path / ("a.jsonl" if kind == "deep" else "a.txt")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "deep":
        path.write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}")
    place = {"device": "/dev/zero", "long": "x" * 5000 + ".txt"}.get(kind, str(path))
    with pytest.raises(ConfigError) as error:
        TextFiles(place).documents("train")
    assert len(str(error.value)) < 600


# --- Shakespeare and the hub --------------------------------------------------------------------------------------


def test_shakespeare_reads_a_given_file(tmp_path):
    (tmp_path / "mine.txt").write_text("To be, or not to be.\n" * 100)
    given = Shakespeare(str(tmp_path / "mine.txt"))
    assert given.name == "shakespeare"
    assert documents(given) == documents(TextFiles(str(tmp_path / "mine.txt")))


@pytest.mark.slow
def test_shakespeare_is_downloaded_once(serve, hf_cache, monkeypatch):
    folder, address, stop = serve
    text = "".join(f"SPEAKER {i}:\nWords, words, words.\n\n" for i in range(200))
    (folder / "input.txt").write_text(text)
    monkeypatch.setattr(Shakespeare, "URL", f"{address}/input.txt")
    first = documents(Shakespeare())
    assert "".join(first[split][0] for split in SPLITS) == text
    stop()
    (folder / "input.txt").unlink()
    assert documents(Shakespeare()) == first


def test_shakespeare_without_network_fails_fast_and_says_what_to_do(monkeypatch, cache, online):
    monkeypatch.setattr(Shakespeare, "URL", closed_address() + "/input.txt")
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"cannot be reached.*data\.path=FILE"):
        Shakespeare().documents("train")
    assert time.monotonic() - begin < 5
    assert not cache.exists()


def test_a_silent_server_costs_no_more_than_the_time_limit(monkeypatch, online):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        assert not hub._reachable(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert 0.1 < time.monotonic() - begin < 3


def test_a_name_that_is_looked_up_for_ever_costs_no_more_either(monkeypatch, online):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)

    def look_up(*_, **__):
        time.sleep(3)
        raise OSError("found nothing")

    monkeypatch.setattr(hub.urllib.request, "urlopen", look_up)
    begin = time.monotonic()
    assert not hub._reachable("http://nowhere.invalid")
    assert time.monotonic() - begin < 2


def test_a_server_that_answers_with_an_error_is_reachable_unless_offline_is_asked_for(serve, monkeypatch):
    import datasets

    _, address, _ = serve
    assert hub._reachable(f"{address}/no-such-file")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert not hub._reachable(f"{address}/no-such-file")


def test_hub_without_network_fails_fast_and_leaves_the_offline_switch_alone(monkeypatch, hf_cache, online):
    import datasets

    monkeypatch.setenv("HF_ENDPOINT", closed_address())
    before = datasets.config.HF_HUB_OFFLINE
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"'nobody/nothing' cannot be loaded: not in the cache.*data\.path=FILE"):
        Hub("nobody/nothing").documents("train")
    assert time.monotonic() - begin < 5
    assert before == datasets.config.HF_HUB_OFFLINE


def write_data_set(folder: Path, **splits: list[str | None]) -> str:
    folder.mkdir()
    for split, texts in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    return str(folder)


def test_hub_takes_own_splits_carves_missing_ones_and_drops_empty_rows(tmp_path, hf_cache):
    train = [f"train {i}" + " and so on" * 20 for i in range(40)]
    name = write_data_set(tmp_path / "set", train=[*train, "", None], validation=["val 0", "val 1"])
    texts = documents(Hub(name, column="body"))
    assert texts["val"] == ["val 0", "val 1"]
    assert len(texts["test"]) == 2
    assert sorted(texts["train"] + texts["test"]) == sorted(train)

    few = documents(Hub(name, column="body", max_documents=1))
    assert few["val"] == ["val 0"]
    assert few["train"][0] + few["test"][0] == train[0]

    sliced = documents(Hub(name, column="body", split="train[:50%]"))
    assert sorted(sliced["train"] + sliced["test"]) == sorted(train[:21])


def test_hub_never_evaluates_on_the_split_it_trains_on(tmp_path, hf_cache):
    rows = [f"test {i}" for i in range(40)]
    name = write_data_set(tmp_path / "set", train=["train 0"], validation=["val 0"], test=rows)
    texts = documents(Hub(name, column="body", split="test"))
    assert texts["val"] == ["val 0"]
    assert sorted(texts["train"] + texts["test"]) == sorted(rows)


def test_hub_errors_name_the_alternatives(tmp_path, hf_cache):
    name = write_data_set(tmp_path / "set", train=["a"], validation=["b"])
    with pytest.raises(ConfigError, match=r"no column 'bodi'; there are: body.*Did you mean 'body'"):
        Hub(name, column="bodi").documents("train")
    with pytest.raises(ConfigError, match=r"no split 'trian': expected one of train, validation.*Did you mean 'train'"):
        Hub(name, column="body", split="trian").documents("train")
    with pytest.raises(ConfigError, match="cannot be streamed"):
        Hub(name, column="body", split="train[:1]", max_documents=3).documents("train")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Hub(name, config="nonesuch", column="body").documents("train")
    with pytest.raises(ConfigError, match="max_documents must be at least 1"):
        Hub(name, max_documents=0)


# --- configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["builtin", "code", "books", "shakespeare", "text", "hub"])
def test_data_configs_build_their_corpus_and_list_every_parameter(name):
    from hydra.utils import instantiate

    import memlm.app.cli  # noqa: F401 - what the configs resolve with

    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / f"{name}.yaml")})
    for key in ("path", "name"):
        if OmegaConf.is_missing(config.data, key) or name == "books":
            config.data[key] = "some/where.txt"
    corpus = instantiate(config.data.corpus)
    given = set(config.data.corpus) - {"_target_"}
    parameters = inspect.signature(type(corpus)).parameters
    assert given == set(parameters)
    resolved = OmegaConf.to_container(config.data.corpus, resolve=True)
    for key, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert resolved[key] == parameter.default
    assert set(config.data.tokenizer) == {"kind", "vocab_size", "path", "n_vocab"}


def test_importing_the_data_modules_loads_nothing_heavy():
    heavy = "{'torch', 'datasets', 'tokenizers', 'pyarrow', 'tqdm'} & set(sys.modules)"
    corpora = ", ".join(f"memlm.data.corpora.{name}" for name in ("base", "builtin", "code", "files", "hub", "symbols"))
    code = f"import sys, {corpora}, memlm.data.tokenizer, memlm.data.tokens; print({heavy})"
    run = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parents[1], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr
