"""The history of a run in one figure."""

import pytest

from memlm.analysis.history import plot_training_history
from memlm.config import ConfigError

ROWS = [
    {"step": s, "train/loss": 3.0 - s, "recall/on": 0.5, "recall/off": 0.0, "memory/ltm/write_gate": 0.1 * s}
    for s in range(3)
]


def lines(figure):
    return {line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.lines}


def test_all_there_is_one_below_the_other():
    figure = plot_training_history(ROWS)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Loss", "Recall and its controls", "Write gate: how much is stored"]
    assert lines(figure)["train/loss, answers weigh more"] == [3.0, 2.0, 1.0]
    assert lines(figure)["ltm"] == pytest.approx([0, 0.1, 0.2])


def test_columns_files_and_runs_are_read_alike(tmp_path):
    figure = plot_training_history({"train/loss": [3.0, 2.0, 1.0]})
    assert lines(figure) == {"train/loss, answers weigh more": [3.0, 2.0, 1.0]}
    file = tmp_path / "csv" / "metrics.csv"
    file.parent.mkdir()
    file.write_text("step,train/loss\n0,3\n1,2\n2,1\n")
    assert lines(plot_training_history(tmp_path)) == lines(plot_training_history(file)) == lines(figure)


def test_nothing_to_draw_and_mistakes(tmp_path):
    assert plot_training_history([]) is None
    assert plot_training_history({}) is None
    with pytest.raises(ConfigError, match="there is no history at"):
        plot_training_history(tmp_path / "no")
    with pytest.raises(ValueError, match="must be of one length"):
        plot_training_history({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="a column of a history is a list of values, got 5 as 'a'"):
        plot_training_history({"a": 5})
    for history in (None, 5, [1, 2], ["a"], b"path"):
        with pytest.raises(ValueError, match="a history is a list of rows, columns by name, or a path, got"):
            plot_training_history(history)
    with pytest.raises(ValueError, match="row 0 of the history holds 'a' as 'train/loss'; expected a number"):
        plot_training_history({"train/loss": ["a"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has nothing to draw: expected the metrics.csv of a run"),
        (b"step,train/loss\n", "has nothing to draw"),
        (b"a,b\n1,2\n", "has nothing to draw"),
        (b"\x89PNG\xff\n", "is no CSV file"),
        (b"a,b\n1,2,3\n", "more field"),
    ],
)
def test_a_file_that_is_no_history_is_refused(tmp_path, content, message):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"metrics.csv.*{message}"):
        plot_training_history(path)
