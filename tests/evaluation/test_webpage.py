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
from tests.evaluation.compare.test_groups import NONE, SMALL, loss, recall, run
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


def test_groups_stand_against_their_bytes_and_can_be_chosen(tmp_path):
    runs = [
        run(0, recall(0.9, off=0.1), state_bytes=10**6),
        run(0, recall(0.5, off=0.2), loss(3), changes=NONE, state_bytes=0),
        run(0, recall(0.7), loss(2), changes=SMALL, state_bytes=10**4),
        run(1, recall(0.1), changes=NONE, state_bytes=0),
    ]
    webpage.write(runs, [], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Page(html)
    labels = ["ltm n_slot=10000", "none", "ltm n_slot=50"]
    assert [a["value"] for a in parsed.all("option")] == ["", "0", "1", "2"]
    assert re.findall(r"<option value=\"\d\">([^<]*)", html) == labels
    # what is of one group alone is marked as such
    columns = [a.get("data-run") for a in parsed.all("th")]
    assert columns[:5] == [None, None, "0", "1", "2"]
    assert [a.get("data-run") for a in parsed.all("details")] == ["0", "1", "1", "2"]
    (all_runs,) = [a for a in parsed.all("figure") if not a.get("class", "").startswith("chart")]
    assert all_runs["data-run"] not in ("", "0", "1", "2")  # the picture of all of them goes when one is chosen
    chapters = re.findall(r'<div data-run="(\d)">\s*<h2 id="c\d">Memory of ([^<]*), seed', html)
    assert chapters == list(zip("012", labels, strict=True))
    # recall: the mean of both seeds without memory, on an axis from -3 to 103 %; loss: of the two that have it
    charts = html.split('<figure class="chart scatter">')[1:]
    assert [re.search("<h4>(.*)</h4>", chart)[1] for chart in charts] == ["loss: nats", "needle: memory on"]
    points = re.findall(r'class="point s\d" data-run="(\d)" style="left:([\d.]+)%;top:([\d.]+)%">(\d)<', charts[1])
    assert [(key, mark) for key, *_, mark in points] == [("0", "1"), ("1", "2"), ("2", "3")]
    assert [float(top) for *_, top, _ in points] == [
        pytest.approx(100 * (1.03 - rate) / 1.06, abs=0.01) for rate in (0.9, 0.3, 0.7)
    ]
    left = [float(left) for _, left, _, _ in points]
    assert left[1] < left[2] < left[0]
    assert "Small: reads off." in charts[1]
    assert [key for key, *_ in re.findall(r'class="point s\d" data-run="(\d)"( )', charts[0])] == ["1", "2"]


def test_one_group_is_not_chosen_nor_compared(trained):
    parsed, _ = page_of(trained, "run")
    assert not parsed.all("select")
    assert not [a for _, a in parsed.found if "data-run" in a]
    assert "Against the bytes" not in text_of(parsed)


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
