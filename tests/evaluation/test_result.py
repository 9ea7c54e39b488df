"""What every experiment shares: intervals against hand-worked values, results through storage and ranks, files."""

import csv
import io
import json
import math
import os
import pickle

import numpy as np
import pytest
from matplotlib.figure import Figure

from memlm.analysis.style import PALETTE, style
from memlm.evaluation.emit import emit
from memlm.evaluation.result import Result
from memlm.evaluation.share import Share
from memlm.evaluation.table import table
from memlm.statistics import interval, mean_interval, wilson


def summarise(rows):
    hits = [row["correct"] for row in rows if row["condition"] == "on"]
    return {"exact_match/on": sum(hits) / len(hits) if hits else math.nan}


def make_rows(n=12):
    return tuple(
        {"condition": condition, "fact": fact, "distance": 100 * fact, "correct": condition == "on" and fact % 4 != 0}
        for condition in ("off", "on")
        for fact in range(n)
    )


def make_result(rows=None, **metadata):
    rows = make_rows() if rows is None else rows
    return Result("needle", summarise(rows), rows, {"seed": 0, "n": 12, **metadata})


def make_figure(text="a figure"):
    figure = Figure()
    figure.subplots().set_title(text)
    return figure


# By hand from the published formula: with z^2 = 3.841459 the upper bound of 0 in 10 is z^2 / (n + z^2) = 0.277533.
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (95, 100, 0.888250, 0.978457),
        (5, 10, 0.236593, 0.763407),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_wilson_matches_published_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_bounds_solve_the_score_equation():
    for k, n in [(1, 7), (3, 50), (499, 512)]:
        for bound in wilson(k, n):
            # A bound p lies exactly z standard errors (of p itself) from the observed rate.
            assert abs(k / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(1.959963984540054)


def test_wilson_at_the_ends_is_exact_and_refuses_nonsense():
    assert wilson(0, 3)[0] == 0.0
    assert wilson(3, 3)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    for k, n in [(-1, 5), (6, 5), (math.nan, 5)]:
        with pytest.raises(ValueError, match="0 <= k <= n"):
            wilson(k, n)


def test_mean_interval_by_hand():
    # 1, 2, 3: deviation 1, t(2) = 4.303, 4.303 / sqrt(3) = 2.48434
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.48434), abs=1e-5)
    # 0, 2: deviation sqrt(2), t(1) = 12.706, half-width 12.706
    assert mean_interval([0, 2]) == pytest.approx((1.0, 12.706))
    # 31 values have 30 degrees of freedom, the last of the table; 32 take the normal quantile
    for n, quantile in [(31, 2.042), (32, 1.96)]:
        values = [float(i % 2) for i in range(n)]
        assert mean_interval(values)[1] == pytest.approx(quantile * np.std(values, ddof=1) / math.sqrt(n))
    mean, half = mean_interval([0.7])
    assert mean == 0.7
    assert math.isnan(half)
    with pytest.raises(ValueError, match="one per seed"):
        mean_interval([])


def test_an_interval_ends_where_the_measure_does():
    assert interval([0, 2]) == pytest.approx((1.0, 1.0 - 12.706, 1.0 + 12.706))
    assert interval([0.2, 0.8], 0.0, 1.0) == (0.5, 0.0, 1.0)
    assert interval([0.5, 0.51], 0.0, 1.0) == pytest.approx((0.505, 0.505 - 0.06353, 0.505 + 0.06353))
    assert [math.isnan(number) for number in interval([0.7], 0.0, 1.0)] == [False, True, True]


def test_result_round_trip_with_values_json_lacks():
    rows = ({"condition": "on", "nll": math.nan, "rank": None}, {"condition": "off", "nll": math.inf, "rank": 2})
    metadata = {"seed": 0, "bounds": [-math.inf, 1.5], "memory": {"name": "ltm", "n_slot": 10000}, "note": None}
    result = Result("needle", {"mrr": math.nan, "exact_match/on": 1.0}, rows, metadata)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    again = Result.from_dict(stored)
    assert again == result
    assert math.isnan(again.metrics["mrr"])
    assert math.isnan(again.rows[0]["nll"])
    assert again.rows[0]["rank"] is None
    assert again.rows[1]["nll"] == math.inf
    assert again.metadata["bounds"] == [-math.inf, 1.5]
    assert pickle.loads(pickle.dumps(result)) == result  # ranks send results to each other
    assert again != make_result()


def test_result_takes_numpy_and_torch_scalars_as_plain_numbers():
    torch = pytest.importorskip("torch")
    rows = ({"fact": np.int64(3), "correct": np.bool_(True), "nll": torch.tensor(0.5)},)
    result = Result("needle", {"mrr": np.float32(0.25)}, rows, {"seed": np.int64(1), "lags": (1, 2)})
    assert result.rows == ({"fact": 3, "correct": True, "nll": 0.5},)
    assert [type(value) for value in result.rows[0].values()] == [int, bool, float]
    assert result.metrics == {"mrr": 0.25}
    assert result.metadata == {"seed": 1, "lags": [1, 2]}


def test_result_is_not_changed_through_what_it_was_made_from():
    row, metadata = {"fact": 1}, {"memory": {"n_slot": 4}}
    result = Result("needle", {}, (row,), metadata)
    row["fact"] = 2
    metadata["memory"]["n_slot"] = 8
    assert result.rows[0]["fact"] == 1
    assert result.metadata["memory"]["n_slot"] == 4
    with pytest.raises(AttributeError):
        result.name = "other"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"rows": ({"x": np.zeros(2)},)}, r"rows\[0\]\['x'\] is a ndarray"),
        ({"rows": ({"x": [1, 2]},)}, r"rows\[0\]\['x'\] is a list"),
        ({"metrics": {"mrr": None}}, r"metrics\['mrr'\] is None"),
        ({"metadata": {"path": object()}}, r"metadata\['path'\] is a object"),
        ({"metadata": {1: "x"}}, "has the key 1"),
        ({"metadata": {"x": "NaN"}}, "stands for a number"),
    ],
)
def test_result_names_the_place_of_a_wrong_value(parts, message):
    with pytest.raises(ValueError, match=message):
        Result("needle", **{"metrics": {}, **parts})


def test_from_dict_names_missing_and_unknown_keys():
    with pytest.raises(ValueError, match=r"missing keys \['metadata', 'rows'\], unknown keys \['row'\]"):
        Result.from_dict({"name": "needle", "metrics": {}, "row": []})


@pytest.mark.parametrize(("n_item", "n_rank", "size"), [(8, 1, 3), (8, 2, 3), (7, 4, 8), (3, 4, 1), (0, 2, 4)])
def test_every_item_falls_to_one_process(n_item, n_rank, size):
    groups = [group for rank in range(n_rank) for group in Share(rank, n_rank).groups(n_item, size)]
    assert [item for group in groups for item in group] == list(range(n_item))
    assert all(0 < len(group) <= size for group in groups)
    shares = [sum(map(len, Share(rank, n_rank).groups(n_item, size))) for rank in range(n_rank)]
    assert max(shares) - min(shares) <= 1


def test_emit_writes_files_that_read_back(tmp_path):
    rows = (*make_rows(2), {"condition": "wiped", "note": 'a "quoted", one'})
    result = Result("needle", {"mrr": math.nan}, rows, {"seed": 0})
    directory = tmp_path / "not" / "yet"
    paths = emit(result, {"recall": make_figure(), "empty": None}, directory)
    assert [path.name for path in paths] == ["recall.png", "rows.csv", "result.json"]
    assert sorted(os.listdir(directory)) == sorted(path.name for path in paths)
    assert Result.from_dict(json.loads((directory / "result.json").read_text())) == result
    with open(directory / "rows.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 5
    assert read[0] == {"condition": "off", "fact": "0", "distance": "0", "correct": "False", "note": ""}
    assert read[4]["note"] == 'a "quoted", one'
    image = (directory / "recall.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    # width of a default 6.4 inch figure at 150 dpi, from the PNG header
    assert int.from_bytes(image[16:20], "big") == 960


def test_emit_without_rows(tmp_path):
    paths = emit(Result("needle", {}), {}, tmp_path)
    assert [path.name for path in paths] == ["rows.csv", "result.json"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden"])
def test_emit_refuses_paths_as_figure_names_before_it_writes(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a figure"):
        emit(make_result(), {name: make_figure()}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_interrupted_write_leaves_the_old_files_whole(tmp_path, monkeypatch, broken):
    emit(make_result(), {"recall": make_figure("old")}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls, fails_at = [], [0]
    real = getattr(os, broken)

    def fail(*args):
        calls.append(args)
        if len(calls) == fails_at[0]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(os, broken, fail)
    for target, name in enumerate(["recall.png", "rows.csv", "result.json"], start=1):
        calls.clear()
        fails_at[0] = target
        with pytest.raises(KeyboardInterrupt):
            emit(make_result(make_rows(3), seed=5), {"recall": make_figure("new")}, tmp_path)
        after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert set(after) == set(before)  # no temporary file stays
        assert after[name] == before[name]
        assert after["result.json"] == before["result.json"]  # written last


def test_figure_that_fails_to_draw_leaves_the_old_files_whole(tmp_path):
    class Broken(Figure):
        def savefig(self, file, **options):
            file.write(b"half an image")
            raise RuntimeError("no space")

    emit(make_result(), {"recall": make_figure()}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="no space"):
        emit(make_result(seed=3), {"recall": Broken()}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_emit_logs_table_and_images_to_wandb(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    wandb = pytest.importorskip("wandb")
    logged = []

    class Run:
        log = staticmethod(logged.append)

    class Fake(loggers.WandbLogger):
        def __init__(self):
            pass

        experiment = Run()

    result = make_result()
    emit(result, {"recall": make_figure()}, tmp_path, logger=Fake(), step=40)
    (record,) = logged
    assert {"needle/rows", "needle/recall", "trainer/global_step"} <= set(record)
    assert {name: record[f"needle/{name}"] for name in result.metrics} == dict(result.metrics)
    assert record["trainer/global_step"] == 40
    assert isinstance(record["needle/recall"], wandb.Image)
    assert record["needle/rows"].columns == ["condition", "fact", "distance", "correct"]
    assert record["needle/rows"].data[0] == ["off", 0, 0, False]
    emit(make_result(), {"recall": make_figure()}, tmp_path, logger=loggers.CSVLogger(tmp_path / "log"))
    assert len(logged) == 1


ROWS = [["memory on", 0.99609375, 1000000, True], ["a control with a [bold] name", 0.0, 7, None]]
COLUMNS = ["condition", "exact match", "n", "found"]


def test_table_piped_is_plain_and_whole():
    text = table(COLUMNS, ROWS, "Needle")
    lines = text.split("\n")
    assert lines[0] == "Needle"
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in lines)
    assert lines[1].split() == ["condition", "exact", "match", "n", "found"]
    assert lines[3].split() == ["memory", "on", "0.9961", "1,000,000", "yes"]
    assert lines[4].split() == ["a", "control", "with", "a", "[bold]", "name", "0.0000", "7", "-"]
    # numbers of a column end under each other
    assert lines[3].index("0.9961") == lines[4].index("0.0000")
    assert lines[3].index("1,000,000") + len("1,000,000") == lines[4].index(" 7 ") + 2


@pytest.mark.parametrize("width", [1, 30, 60, 200])
def test_table_in_a_narrow_terminal_breaks_text_only(width):
    text = table(COLUMNS, ROWS, width=width)
    assert "0.9961" in text
    assert "1,000,000" in text
    assert "condition" in text
    assert "…" not in text
    lines = text.split("\n")
    assert max(map(len, lines)) <= max(width, 50)
    assert (len(lines) == 4) == (width == 200)  # the name folds below its natural 62


def test_table_for_outputs_without_unicode(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    text = table(COLUMNS, ROWS, "Needle")
    assert text.isascii()
    assert set(text.split("\n")[2]) == {"-"}


def test_table_numbers():
    def column(*values):
        return [line.strip() for line in table(["x"], [[value] for value in values]).split("\n")[2:]]

    assert column(1.0, 0.5) == ["1.0", "0.5"]
    assert column(1.2e-7, 1.0) == ["1.2e-07", "1"]
    assert column(1234567.5, math.nan, None) == ["1,234,567.5", "nan", "-"]
    assert column(3, np.float32(0.25), np.int64(4)) == ["3", "0.25", "4"]
    assert column() == []


def test_table_rows_as_mappings_and_wrong_length():
    assert table(["a", "b"], [{"b": 2, "a": 1, "c": 3}]).split("\n")[2].split() == ["1", "2"]
    with pytest.raises(ValueError, match="row 0 of the table has 1 cells; expected 2: a, b"):
        table(["a", "b"], [[1]])


def test_style_and_palette_are_offered_here():
    with style():
        figure = Figure()
        (line,) = figure.subplots().plot([0, 1])
    assert line.get_color() == PALETTE["blue"]


def test_a_table_shows_what_a_terminal_would_obey():
    text = table(["a\x1b[1m", "b"], [["\x1b[31mred\x00", 1], ["\u202eright to left", 2]], "title\x9b")
    assert text.splitlines()[0] == r"title\x9b"
    assert not set("\x1b\x00\u202e\x9b") & set(text)
    assert r"\x1b[31mred\x00" in text
