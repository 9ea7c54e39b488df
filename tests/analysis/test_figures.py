"""Figures: what is drawn is read back from the artists of the axes, never from pixels."""

import math

import matplotlib as mpl
import numpy as np
import pytest

from memlm.analysis.figures import gates, loss_curve, recall_curve, slot_use
from memlm.analysis.run_log import read_history
from memlm.analysis.style import PALETTE, style
from memlm.statistics import effective, wilson

LOSS = "train/loss, answers weigh more"


def line_of(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label().startswith(label)]
    return line


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()


RECALL = [
    {"step": 200, "recall/on": 1.0, "recall/off": 0.0, "recall/unseen": 0.1, "recall/n": 10, "recall/chance": 0.25},
    {"step": 100, "recall/on": 0.0, "recall/off": 0.0, "recall/unseen": 0.0, "recall/n": 10, "recall/chance": 0.25},
]


def test_read_history(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/nll,note\n0,9,2.5,,a\n0,19,nan,2.25,\n")
    first, second = read_history(path)
    assert first == {"epoch": 0, "step": 9, "train/loss": 2.5, "val/nll": None, "note": "a"}
    assert type(first["step"]) is int
    assert math.isnan(second["train/loss"])
    assert second["val/nll"] == 2.25
    assert second["note"] is None


def test_read_history_of_an_empty_and_a_broken_file(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("")
    assert read_history(path) == []
    path.write_text("step,train/loss\n1,2.0\n2,2.0,7\n")
    with pytest.raises(ValueError, match=r"line 3: 1 more field\(s\)"):
        read_history(path)
    path.write_text("step,train/loss\nten,2.0\n")
    with pytest.raises(ValueError, match="line 2: step is 'ten'"):
        read_history(path)
    path.write_text("step,train/loss,val/nll\n1,2.0\n")  # the run is still writing this line
    assert read_history(path) == [{"step": 1, "train/loss": 2.0, "val/nll": None}]


def test_read_history_of_lightnings_own_logger(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 2.5}, step=0)
    logger.log_metrics({"val/nll": 3.0}, step=1)
    logger.save()
    axes = loss_curve(read_history(f"{logger.log_dir}/metrics.csv")).axes[0]
    assert list(line_of(axes, LOSS).get_ydata()) == [2.5]
    assert list(line_of(axes, "val/nll").get_ydata()) == [3.0]


def test_loss_curve_draws_both_series_in_order():
    history = [
        {"step": 20, "train/loss": 2.0, "val/nll": math.nan},
        {"step": 10, "train/loss": 3.0},
        {"step": 20, "val/nll": 2.5, "train/loss": None},
        {"step": 20, "train/loss": 1.5},  # a resumed run repeats the step
    ]
    axes = loss_curve(history).axes[0]
    train, val = line_of(axes, LOSS), line_of(axes, "val/nll")
    assert list(train.get_xdata()) == [10, 20]
    assert list(train.get_ydata()) == [3.0, 1.5]
    assert list(val.get_xdata()) == [20]
    assert list(val.get_ydata()) == [2.5]
    assert val.get_marker() == "o"  # a single point is no visible line
    assert train.get_color() != val.get_color()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("step", "nats per token", "Loss")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [LOSS, "val/nll"]
    assert not axes.spines["top"].get_visible()


def test_loss_curve_shows_a_long_run_raw_and_smoothed():
    history = [{"step": i, "train/loss": 2.0 + (-1) ** i} for i in range(400)]
    axes = loss_curve(history).axes[0]
    raw, smooth = axes.get_lines()
    assert list(raw.get_ydata()[:2]) == [3.0, 1.0]
    assert abs(smooth.get_ydata()[200] - 2.0) < 0.2
    assert smooth.get_label() == LOSS
    line = [{"step": i, "train/loss": float(i)} for i in range(400)]
    # a centred mean leaves a straight line where it is, ends included
    assert np.allclose(loss_curve(line).axes[0].get_lines()[1].get_ydata(), np.arange(400))


def test_loss_curve_takes_lightnings_step_column():
    assert line_of(loss_curve([{"step": 1, "train/loss_step": 2.0}]).axes[0], LOSS)


@pytest.mark.parametrize("history", [[], [{"step": 1}], [{"step": 1, "val/nll": None, "recall/on": math.nan}]])
def test_nothing_to_draw(history):
    assert loss_curve(history) is None
    assert recall_curve(history) is None
    assert gates(history) is None
    assert slot_use({}) is None
    assert slot_use({"layer 2": {}}) is None


def test_a_value_without_a_step_is_refused():
    with pytest.raises(ValueError, match="row 0 of the history holds 'val/nll' but no 'step'"):
        loss_curve([{"val/nll": 2.0}])


def test_recall_curve_with_band_controls_and_chance():
    figure = recall_curve(RECALL)
    axes = figure.axes[0]
    assert list(line_of(axes, "memory on").get_xdata()) == [100, 200]
    assert list(line_of(axes, "memory on").get_ydata()) == [0.0, 1.0]
    assert list(line_of(axes, "fact never shown").get_ydata()) == [0.0, 0.1]
    assert list(line_of(axes, "chance").get_ydata()) == [0.25, 0.25]
    assert axes.get_ylim() == (0, 1)
    labels, title = legend_of(figure)
    assert labels == [
        "memory on, last 100.0 %",
        "reads off, last 0.0 %",
        "fact never shown, last 10.0 %",
        "chance, 25 %",
    ]
    assert title == "band: 95 % Wilson interval, n = 10"
    # The corners of the band of "memory on" are the Wilson bounds of 0 and 10 of 10.
    corners = axes.collections[-1].get_paths()[0].vertices
    assert {round(y, 6) for x, y in corners if x == 100} == {0.0, 0.277533}
    assert {round(y, 6) for x, y in corners if x == 200} == {0.722467, 1.0}
    assert len(axes.collections) == 3


def test_recall_curve_arguments():
    history = [{"step": 1, "recall/on": 0.5, "recall/wiped": 0.0}]
    figure = recall_curve(history)
    assert legend_of(figure)[1] == "n not logged: no interval"
    assert not figure.axes[0].collections
    figure = recall_curve(history, n=1000, chance=0.02)
    labels, title = legend_of(figure)
    assert labels[-1] == "chance, 2 %"
    assert "n = 1,000" in title
    with pytest.raises(ValueError, match="n=0"):
        recall_curve(history, n=0)
    with pytest.raises(ValueError, match=r"'recall/on' is 50\.0 at step 1; expected a rate"):
        recall_curve([{"step": 1, "recall/on": 50.0, "recall/off": 0.0}])


def test_recall_is_not_drawn_without_a_control():
    assert recall_curve([{"step": 1, "recall/on": 1.0, "recall/n": 100}]) is None
    assert recall_curve([{"step": 1, "recall/off": 0.0}]) is None


def test_recall_is_never_rounded_up_to_all():
    history = [{"step": 1, "recall/on": 0.99999, "recall/off": 0.0}]
    assert legend_of(recall_curve(history))[0][0] == "memory on, last >99.9 %"


def test_slot_use_values():
    usage = {
        "ltm": {"filled": [1, 1, 1, 0, 0, 0, 0, 0], "read": [2, 2, 0, 0, 0, 0, 0, 0]},
        "stm": {"filled": [True, True], "read": [0.0, 0.0]},
    }
    filled, read = slot_use(usage, n_bin=4).axes[:2]
    # pairs of slots: 1, 1/2, 0, 0; a bank with two slots shows both
    assert [list(mesh.get_array().ravel()) for mesh in filled.collections] == [[1, 0.5, 0, 0], [1, 1]]
    # mean read of all slots 1/2; of the first pair 2: four times its share
    assert [list(mesh.get_array().ravel()) for mesh in read.collections] == [[4, 0, 0, 0], [0, 0]]
    assert [tick.get_text() for tick in filled.get_yticklabels()] == ["ltm", "stm"]
    (notes,) = filled.child_axes
    assert [tick.get_text() for tick in notes.get_yticklabels()] == ["37.5 % of 8", "100 % of 2"]
    (notes,) = read.child_axes
    assert [tick.get_text() for tick in notes.get_yticklabels()] == ["2 of 8 effective", "never read"]
    assert [mesh.get_clim() for mesh in filled.collections] == [(0, 1), (0, 1)]
    assert [mesh.get_clim() for mesh in read.collections] == [(0, 4), (0, 4)]


def test_effective_number_of_equal_shares():
    assert effective(np.array([2.0, 2.0, 0.0])) == pytest.approx(2.0)
    assert effective(np.array([1.0, 0.0])) == pytest.approx(1.0)
    assert effective(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75)  # exp of the entropy of 3/4 and 1/4
    assert effective(np.zeros(3)) == 0.0


def test_slot_use_bins_cover_every_slot_once():
    filled = np.zeros(10)
    filled[9] = 1
    mesh = slot_use({"layer 2": {"filled": filled}}, n_bin=3).axes[0].collections[0]
    assert list(mesh.get_array().ravel()) == [0, 0, 0.25]  # bins of 3, 3 and 4 slots


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"filled": []}, r"shape \(0,\)"),
        ({"read": [[1.0]]}, r"shape \(1, 1\)"),
        ({"read": [-1.0]}, "negative"),
        ({"read": [math.nan]}, "non-finite"),
        ({"filled": [2.0]}, "goes up to 2"),
    ],
)
def test_slot_use_refuses_wrong_values(entry, message):
    with pytest.raises(ValueError, match=message):
        slot_use({"layer 2": entry})


def test_gates_of_one_memory():
    history = [{"step": 1, "memory/write_gate": 0.5, "memory/read_gate": 0.4}, {"step": 2, "memory/write_gate": 0.1}]
    write, read = gates(history).axes
    assert list(write.get_lines()[0].get_ydata()) == [0.5, 0.1]
    assert list(read.get_lines()[0].get_ydata()) == [0.4]
    assert write.get_title(loc="left").startswith("Write gate")
    assert read.get_xlabel() == "step"
    assert write.get_ylim() == pytest.approx((0, 0.575))
    assert write.get_legend() is None


def test_gates_of_two_memories_keep_their_colours():
    history = [{"step": 1, "memory/stm/write_gate": 0.5, "memory/ltm/write_gate": 0.2, "memory/ltm/read_gate": 0.0}]
    write, read = gates(history).axes
    assert [line.get_label() for line in write.get_lines()] == ["stm", "ltm"]
    assert line_of(read, "ltm").get_color() == line_of(write, "ltm").get_color() != line_of(write, "stm").get_color()
    assert len(gates([{"step": 1, "memory/read_gate": 0.5}]).axes) == 1
    with pytest.raises(ValueError, match=r"'memory/read_gate' is 1\.5"):
        gates([{"step": 1, "memory/read_gate": 1.5}])


def test_style_ends_with_its_block():
    before = dict(mpl.rcParams)
    with style():
        assert mpl.rcParams["axes.spines.top"] is False
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(PALETTE.values())
    assert dict(mpl.rcParams) == before


def test_figures_leave_no_global_state():
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    recall_curve(RECALL)
    slot_use({"layer 2": {"filled": [1.0]}})
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before


def test_wilson_of_95_in_100():
    assert wilson(95, 100) == pytest.approx((0.88825, 0.97846), abs=5e-6)
