"""Runs as one web page, read by a parser: numbers beside controls, figures, settings, memory."""

import os
import re

import pytest

from memlm import checkpoint
from memlm.analysis.page import fewer_colors
from memlm.config import ConfigError
from memlm.evaluation import webpage
from memlm.evaluation.compare.groups import compare
from memlm.evaluation.emit import emit
from memlm.evaluation.runs import find_runs, write_evaluation
from tests.analysis.test_page import Page, figure
from tests.evaluation.compare.test_groups import NONE, recall, run
from tests.training import small


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run of a second, and that of an evaluation whose checkpoint is gone."""
    folder = tmp_path_factory.mktemp("runs")
    small.fit(small.config(folder, "run", "trainer.max_steps=3", phases=[small.PLAIN]))
    one, other = run(0, recall(0.9)), run(0, recall(0.1), changes=NONE)
    emit(one.results["needle"], {"recall": None}, folder / "run" / "needle")
    (folder / "run" / "needle" / "recall.png").write_bytes(figure())
    write_evaluation(folder / "other", other.trained)
    emit(other.results["needle"], {}, folder / "other" / "needle")
    return folder


def page_of(folder, *names, **options):
    runs, left_out = find_runs([folder / name for name in names])
    path = folder / "page.html"
    webpage.write(runs, left_out, path, **options)
    return Page(path.read_text(encoding="utf-8")), path


def text_of(parsed):
    return " ".join("".join(parsed.text).split())


def test_one_run_in_one_page(trained):
    parsed, path = page_of(trained, "run")
    text = text_of(parsed)
    assert "90.0 % (82.6 to 94.5)" in text
    assert text.count("reads off") >= 1
    asides = parsed.all("tr", **{"class": "aside"})
    assert len(asides) == 1  # the control of the one rate
    images = [image["alt"] for image in parsed.all("img")]
    assert images == ["needle: recall, ltm, seed 0", next(alt for alt in images if alt.startswith("Dots"))]
    assert "What it holds after the text" in text
    assert "segment_len: 16" in text  # the whole configuration
    assert path.stat().st_size < 5_000_000
    assert not list(trained.glob("*.tmp"))


@pytest.mark.slow
def test_two_runs_say_in_what_they_differ_and_that_a_checkpoint_is_gone(trained):
    text = text_of(page_of(trained, "run", "other")[0])
    assert "What differs" in text
    assert "memory.ltm" in text
    assert "The checkpoint is no longer there" in text
    assert "Every main number beside its controls" in text


def test_a_prompt_is_shown_in_its_contexts_and_an_empty_one_is_refused(trained):
    words = small.write_text(trained).read_text().split()[:40]
    told = []
    parsed, _ = page_of(trained, "run", contexts=[" ".join(words), words[0]], progress=told.append)
    text = text_of(parsed)
    assert "context 2" in text
    assert "The text of the prompt." in text
    assert told == ["memory of ltm", "figures"]
    before = (trained / "page.html").read_bytes()
    with pytest.raises(ConfigError, match="the prompt cannot be shown: the text has no token"):
        page_of(trained, "run", contexts=[""])
    assert (trained / "page.html").read_bytes() == before


def test_figures_that_find_no_room_are_named(trained, monkeypatch):
    whole = figure()
    images = [webpage._Image(name, trained / f"{name}.png", whole, "") for name in "ab"]
    assert webpage._fitting(images, 2 * len(whole)) == (images, [])
    small_one = fewer_colors(whole)
    shown, without = webpage._fitting(images, 2 * len(small_one))
    assert ([image.png for image in shown], without) == ([small_one] * 2, [])
    shown, without = webpage._fitting(images, len(small_one))
    assert ([image.what for image in shown], [image.what for image in without]) == (["a"], ["b"])
    monkeypatch.setattr(webpage, "MOST_BYTES", 0)
    text = text_of(page_of(trained, "run")[0])
    assert re.search(r"Not shown, as the page would be too large: \S+/run/needle/recall.png", text)


def test_a_figure_that_is_none_or_lies_elsewhere_is_not_handed_on(trained, tmp_path):
    (tmp_path / "private").write_bytes(b"private")
    (tmp_path / "own.png").write_bytes(figure())
    folder = trained / "run" / "needle"
    odd = {
        "a private file": lambda path: path.write_bytes(b"private"),
        "a link": lambda path: path.symlink_to(tmp_path / "private"),
        "a link to a picture": lambda path: path.symlink_to(tmp_path / "own.png"),
        "a pipe": os.mkfifo,
        "half": lambda path: path.write_bytes(figure()[:-100]),
    }
    try:
        for name, put in odd.items():
            put(folder / f"{name}.png")
        runs, _ = find_runs([trained / "run"])
        (part,) = webpage._figures(compare(runs), 10**6).parts
    finally:
        for name in odd:
            (folder / f"{name}.png").unlink()
    assert [name for name, _ in part.images] == ["needle: recall, ltm, seed 0"]
    assert len(part.notes) == len(odd)
    assert all(any(f"Not shown: {folder / name}.png is " in note for note in part.notes) for name in odd)


def test_data_that_may_not_be_built_are_left_out_and_the_page_says_so(trained, tmp_path):
    (found,) = (trained / "run" / "checkpoints").glob("*.ckpt")
    content = checkpoint.read(found)
    content["memlm"]["config"]["data"]["corpus"] = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
    checkpoint.write(content, tmp_path / "evil" / "checkpoints" / "step=3.ckpt")
    emit(run(0, recall(0.9)).results["needle"], {}, tmp_path / "evil" / "needle")
    text = text_of(page_of(tmp_path, "evil")[0])
    assert "The data it was trained on is left out" in text
    assert "data.corpus._target_ names os.mkdir, which is no part of memlm" in text
    assert "What memory costs" in text
    assert not (tmp_path / "made").exists()
