"""Groups, means and ranks of made-up runs against numbers worked out by hand."""

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest

from memlm.compose import compose, to_dict
from memlm.config import ConfigError
from memlm.evaluation.compare.figure import plot
from memlm.evaluation.compare.groups import Comparison, Line, compare
from memlm.evaluation.compare.printing import markdown, report, rows, write
from memlm.evaluation.result import Result
from memlm.evaluation.runs import Run, Trained
from memlm.statistics import wilson

CONFIG = to_dict(compose([]))
ENTRY = {"low": None, "high": None, "n": None, "percent": False, "better": "lower", "control": False}


def recall(on: float, off: float = 0.0, n: int = 100, **settings: Any) -> Result:
    """What a needle tells: a rate and a control."""
    metrics: dict[str, float] = {}
    for name, rate in {"on": on, "off": off}.items():
        low, high = wilson(rate * n, n)
        metrics |= {f"exact_match/{name}": rate, f"low/{name}": low, f"high/{name}": high, f"n/{name}": n}
    lines = [
        {"label": label, "control": name == "off", "percent": True, "better": "higher"}
        | {"metric": f"exact_match/{name}", "low": f"low/{name}", "high": f"high/{name}", "n": f"n/{name}"}
        for name, label in {"on": "memory on", "off": "reads off"}.items()
    ]
    return Result("needle", metrics, (), {"headline": lines, "settings": {"distance": 100, "seed": 0} | settings})


def loss(value: float) -> Result:
    return Result("loss", {"nll": value}, (), {"headline": [ENTRY | {"label": "nats", "metric": "nll"}]})


def saved(share: float, low: float = math.nan, high: float = math.nan) -> Result:
    """What `worth` tells: a share that may be below 0, in percent, and a control."""
    metrics = {"worth/on": share, "low": low, "high": high, "n": 5000, "worth/swapped": -2.0}
    ends = {"low": "low", "high": "high", "n": "n", "percent": True, "better": "higher", "rate": False}
    none = {"low": None, "high": None, "n": "n", "percent": True, "better": "higher", "control": True, "rate": False}
    entries = [ends | {"label": "saved", "metric": "worth/on", "control": False}]
    entries.append(none | {"label": "by another's", "metric": "worth/swapped"})
    return Result("worth", metrics, (), {"headline": entries})


def run(seed: int = 0, *results: Result, changes: Any = (), **trained: Any) -> Run:
    """A run, with some settings changed."""
    config = copy.deepcopy(CONFIG) | {"seed": seed, "name": f"{seed}", "paths": {"run_dir": f"/runs/{seed}"}}
    config["needle"]["seed"] = config["perplexity"]["limit"] = seed
    config["name"] = None
    for key, value in dict(changes).items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    facts = {"checkpoint": f"/{seed}/{changes}", "step": 500, "config": config, "n_parameter": 1000, "state_bytes": 64}
    facts |= {"text": "a" * 64, "tokenizer": "b" * 64, "tokens_per_second": 10.0, "cpu_seconds": 40.0}
    return Run(Path(f"run{seed}"), Trained(**facts | trained), {result.name: result for result in results})


NONE = {"memory": {}}
SMALL = {"memory.ltm.n_slot": 50}


def line(comparison: Comparison, label: str, experiment: str = "needle") -> Line:
    (found,) = [line for line in comparison.lines if (line.experiment, line.label) == (experiment, label)]
    return found


# -------------------------------------------------------------------------------------------------------------- groups


def test_runs_that_differ_only_in_seed_are_a_group() -> None:
    found = compare([run(0), run(0, changes=NONE), run(1), run(2, changes=SMALL), run(1, changes=NONE)])
    assert [[r.trained.config["seed"] for r in group.runs] for group in found.groups] == [[0, 1], [0, 1], [2]]
    assert [group.label for group in found.groups] == ["ltm n_slot=10000", "none", "ltm n_slot=50"]


def test_other_steps_or_other_measurements_are_other_groups() -> None:
    found = compare([run(0, recall(0.5)), run(1, recall(0.5, distance=9)), run(2, step=400), run(3), run(4, recall(1))])
    assert [[r.trained.config["seed"] for r in group.runs] for group in found.groups] == [[0, 3, 4], [1], [2]]
    assert len({group.label for group in found.groups}) == 3
    assert dict(found.differences) == {"step": ["500", "500", "400"], "needle.distance": ["100", "9", "absent"]}


def test_models_of_several_kinds_are_named() -> None:
    found = compare([run(0), run(0, changes={"model._target_": "memlm.models.lstm.LSTM"})])
    assert [group.label for group in found.groups] == ["lmcode-ltm", "lstm-ltm"]


def test_groups_are_told_apart_by_few_settings() -> None:
    many = {**SMALL, "training.lr": 0.5, "training.warmup_steps": 3, "trainer.max_steps": 4}
    found = compare([run(0), run(0, changes=many), run(0, changes={**many, "training.lr": 0.25})])
    assert [group.label for group in found.groups] == ["ltm lr=0.003", "ltm lr=0.5", "ltm lr=0.25"]
    found = compare([run(0), run(0, changes=many), run(0, changes=NONE)])
    assert [group.label for group in found.groups] == ["ltm n_slot=10000", "ltm n_slot=50", "none"]
    texts = [{"data.corpus": {"_target_": "x", "path": "long " * 20 + end}} for end in "ab"]
    assert [group.label for group in compare([run(0, changes=text) for text in texts]).groups] == ["ltm (1)", "ltm (2)"]


def test_the_same_seed_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="run0 and run0 have the same settings and the same seed 0"):
        compare([run(0), run(0, checkpoint="/elsewhere")])


def test_what_differs_is_told_but_for_seeds_and_paths() -> None:
    phases = copy.deepcopy(CONFIG["curriculum"]["phases"])
    phases[2]["n_row"] = 3
    changes = {**SMALL, "curriculum.phases": phases, "training.lr": 0.5}
    found = compare([run(0), run(1, changes=changes), run(2, changes=NONE)])
    assert dict(found.differences) == {
        "memory.ltm": ["given", "given", "absent"],
        "memory.ltm.n_slot": ["10000", "50", "absent"],
        "curriculum.phases.2.n_row": ["8", "3", "8"],
        "training.lr": ["0.003", "0.5", "0.003"],
    }
    labels = [group.label for group in found.groups]
    assert f"memory.ltm.n_slot: 10000 ({labels[0]}); 50 ({labels[1]}); absent (none)" in report(found)
    assert not compare([run(0), run(1)]).differences


# ------------------------------------------------------------------------------------------------------------- numbers


def test_mean_and_interval_over_seeds_by_hand() -> None:
    found = compare([run(seed, recall(rate), loss(rate)) for seed, rate in enumerate((0.5, 0.7, 0.9))])
    cell = line(found, "memory on").cells[0]
    assert cell is not None
    half = 4.303 * 0.2 / math.sqrt(3)  # Student's t of two degrees of freedom, standard deviation 0.2
    assert (cell.values, cell.mean) == ((0.5, 0.7, 0.9), pytest.approx(0.7))
    assert (cell.low, cell.high) == (pytest.approx(0.7 - half), 1.0)  # 1.197 is no rate
    assert line(found, "memory on").text(0) == f"70.0 % ({100 * (0.7 - half):.1f} to 100.0)"
    plain = line(found, "nats", "loss").cells[0]
    assert plain is not None
    assert plain.high == pytest.approx(0.7 + half)
    # equal in all seeds: the spread is no evidence, the 300 items are
    control = line(found, "reads off").cells[0]
    assert control is not None
    assert (control.low, control.high) == wilson(0, 300)
    assert line(found, "reads off").text(0) == "0.0 % (0.0 to 1.3)"
    assert "memory on, n = 100" in report(found)


def test_a_single_seed_has_the_interval_of_its_experiment() -> None:
    found = compare([run(0, recall(0.5), loss(12345.6))])
    assert line(found, "memory on").text(0) == "50.0 % (40.4 to 59.6)"
    assert line(found, "nats", "loss").text(0) == "12,350"


def test_what_a_run_costs_and_what_is_missing() -> None:
    slow = run(0, changes=NONE, state_bytes=0, n_parameter=None, tokens_per_second=None)
    found = compare([run(0, recall(0.5)), run(1, loss(2.0), tokens_per_second=20.0), slow])
    texts = {line.label: [line.text(i) for i in range(2)] for line in found.lines}
    assert texts == {
        "parameters": ["1,000", "-"],
        "state bytes per row": ["64", "0"],
        "training tokens/s": ["15", "-"],
        "training CPU seconds": ["40", "40"],
        "memory on": ["50.0 % (40.4 to 59.6)", "-"],
        "reads off": ["0.0 % (0.0 to 3.7)", "-"],
        "nats": ["2", "-"],
    }
    assert "50.0 % (40.4 to 59.6) (1 of 2 seeds)" in report(found)


def test_a_share_that_is_no_rate_may_be_below_0() -> None:
    found = compare([run(seed, saved(share)) for seed, share in enumerate((-0.5, -0.4))])
    cell = line(found, "saved", "worth").cells[0]
    assert cell is not None
    half = 12.706 * 0.1 / 2  # two seeds: standard deviation 0.1 / sqrt(2), by sqrt(2)
    assert (cell.low, cell.high) == (pytest.approx(-0.45 - half), pytest.approx(-0.45 + half))
    assert line(found, "saved", "worth").text(0) == f"-45.0 % ± {100 * half:.1f}"
    assert line(found, "by another's", "worth").text(0) == "-200.0 % ± 0.0"  # equal, and no rate of 5,000 items
    (panel,) = [axes for axes in plot(found).axes if axes.get_title(loc="left") == "worth"]
    assert panel.get_xlim()[0] < -2.0  # all points are on the axis


# ------------------------------------------------------------------------------------------------------------- ranking


def test_the_best_is_marked_with_what_is_not_told_from_it() -> None:
    groups = [run(0, recall(0.9), loss(2.0)), run(0, recall(0.85), loss(3.0), changes=NONE)]
    groups.append(run(0, recall(0.2), loss(4.0), changes=SMALL))
    found = compare(groups)
    assert line(found, "memory on").best == {0, 1}  # 82.6 to 94.5 and 76.7 to 90.7
    assert line(found, "nats", "loss").best == {0}  # lower is better
    assert line(found, "reads off").best == set()
    assert not any(line.best for line in found.lines if not line.experiment)
    assert "90.0 % (82.6 to 94.5) *" in report(found)
    assert line(compare(groups[:2]), "memory on").best == set()  # not told apart
    assert line(compare(groups[:1]), "memory on").best == set()


def test_what_has_no_interval_is_not_told_from_the_best() -> None:
    groups = [run(0, saved(0.4, 0.3, 0.5)), run(0, saved(0.1, 0.0, 0.2), changes=NONE)]
    groups.append(run(0, saved(0.2), changes=SMALL))
    found = line(compare(groups), "saved", "worth")
    assert [found.text(i) for i in range(3)] == ["40.0 % (30.0 to 50.0) *", "10.0 % (0.0 to 20.0)", "20.0 % *"]


@pytest.mark.parametrize(
    ("changes", "trained", "reason"),
    [
        ({}, {"text": "c" * 64}, "different texts: aaaaaaaaaa (ltm); cccccccccc (none)"),
        ({}, {"text": None}, "the texts of none are not known"),
        ({}, {"tokenizer": "c" * 64}, "different tokenizers: bbbbbbbbbb"),
        ({}, {"step": 1200}, "different numbers of steps: 500 (ltm); 1,200 (none)"),
        ({"model.segment_len": 64}, {}, "different numbers of tokens: 2,048,000 (ltm); 1,024,000 (none)"),
        ({"trainer.accumulate_grad_batches": 2}, {}, "different numbers of tokens: 2,048,000 (ltm); 4,096,000 (none)"),
        ({"curriculum.task": None}, {}, "different curricula"),
    ],
)
def test_runs_trained_on_other_things_are_not_ranked(changes: Any, trained: Any, reason: str) -> None:
    if "curriculum.task" in changes:
        phases = [{**phase, "task": None} for phase in CONFIG["curriculum"]["phases"]]
        changes = {**changes, "curriculum.phases": phases}
    found = compare([run(0, recall(0.9)), run(0, recall(0.1), changes={**NONE, **changes}, **trained)])
    assert not any(line.best for line in found.lines)
    assert any(note.startswith(f"Not ranked, as training was not the same: {reason}") for note in found.notes)
    assert " *" not in report(found)


def test_another_schedule_of_memory_settings_is_no_other_data() -> None:
    phases = [{**phase, "memory": {}} for phase in CONFIG["curriculum"]["phases"]]
    found = compare([run(0, recall(0.9)), run(0, recall(0.1), changes={"curriculum.phases": phases})])
    assert line(found, "memory on").best == {0}


def test_what_was_measured_otherwise_is_not_ranked() -> None:
    ours, theirs = [recall(0.9), loss(1.0)], [recall(0.1, distance=5000), loss(2.0)]
    found = compare([run(0, *ours), run(0, *theirs, changes=NONE)])
    assert line(found, "memory on").best == set()
    assert line(found, "nats", "loss").best == {0}
    assert found.notes == ["needle was measured with different settings (needle.distance): not ranked."]
    found = compare([run(0, recall(0.9)), run(0, recall(0.1, seed=7), changes=NONE)])
    assert line(found, "memory on").best == {0}  # other facts of the same kind


# -------------------------------------------------------------------------------------------------------------- files


def test_rows_and_markdown_hold_every_number() -> None:
    found = compare([run(0, recall(0.9)), run(1, recall(0.8)), run(0, recall(0.1), changes={"name": "a|b", **NONE})])
    kept = [row for row in rows(found) if row["experiment"] == "needle" and not row["control"]]
    assert [(row["group"], row["n_seed"], row["n"], row["best"]) for row in kept] == [
        ("ltm", 2, 100, True), ("a|b", 1, 100, False)
    ]  # fmt: skip
    assert kept[0]["mean"] == pytest.approx(0.85)
    text = markdown(found)
    assert "| experiment | number | ltm (2 seeds) | a\\|b (1 seed) |" in text
    assert "| needle | memory on, n = 100 | 85.0 % (21.5 to 100.0) \\* | 10.0 % (5.5 to 17.4) |" in text
    assert "- ltm, seed 1, step 500: run1 " in text


def test_the_figure_has_a_panel_for_each_main_number_and_its_controls() -> None:
    found = compare([run(0, recall(0.9), loss(2.0)), run(0, recall(0.1), changes=NONE, n_parameter=None)])
    figure = plot(found)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == [
        "parameters",
        "state bytes per row",
        "training tokens/s",
        "training CPU seconds",
        "loss",
        "needle",
    ]
    (needle,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "needle"]
    legend = needle.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["memory on", "reads off"]


def test_rates_and_plain_values_share_no_axis_and_what_is_infinite_has_no_place_on_it() -> None:
    def lasting(life: float) -> Result:
        told = recall(0.9)
        first = ENTRY | {"label": "half-life", "metric": "half_life", "better": "higher"}
        return Result(
            "retention", {**told.metrics, "half_life": life}, (), {"headline": [first, *told.metadata["headline"]]}
        )

    found = compare([run(0, lasting(math.inf)), run(1, lasting(50.0)), run(0, lasting(70.0), changes=NONE)])
    assert [line(found, "half-life", "retention").text(i) for i in range(2)] == ["inf", "70"]
    figure = plot(found)
    plain, rates = [axes for axes in figure.axes if axes.get_title(loc="left") == "retention"]
    assert [[*artist.get_ydata()] for artist in plain.get_lines() if len(artist.get_xdata()) == 1] == [[1], [1]]
    assert "inf" in [text.get_text() for text in plain.texts]
    assert rates.get_xlim() == (-0.1, 1.1)


def test_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    evil = '=HYPERLINK("x")\x1b[31m\u202e <img src=x>\n$\\frac{$'
    result = recall(0.9)
    result.metadata["headline"][0]["label"] = evil  # type: ignore[index]
    found = compare([run(0, result, changes={"name": evil}), run(0, recall(0.1), changes=NONE)], [evil])
    write(found, tmp_path)
    texts = [report(found), markdown(found), (tmp_path / "compare.csv").read_text()]
    assert not any(sign in text for text in texts for sign in "\x1b\u202e")
    assert all(r"\x1b[31m" in text.replace("\\[", "[").replace("\\\\", "\\") for text in texts)
    assert "<img" not in texts[1]
    with open(tmp_path / "compare.csv", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not any(cell.startswith("=") for cell in cells)
    assert any(cell.startswith("'=HYPERLINK") for cell in cells)
