"""The table of all memories puts trainings together that were made for different columns."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memlm.app import results
from memlm.config import ConfigError
from memlm.evaluation import memory_table, runs
from memlm.evaluation.result import Result

PAGE = "before\n\n<!-- results/table.json -->\n<!-- end of results -->\nbehind\n"


def trained(
    memory: str, seed: int, *found: Result, size: int | None = None, lr: float = 0.003, text: str = "code", **costs: Any
) -> Any:
    config = {
        "seed": seed, "memory": {} if memory == "none" else {memory: {}}, "trainer": {"accumulate_grad_batches": 1},
        "curriculum": {"phases": [{"steps": 10, "n_row": 2, "n_segment": 3}]}, "model": {"segment_len": 4},
        "name": None, "state_bytes": size, "training": {"lr": lr},
        "data": {"corpus": {"_target_": f"memlm.data.corpora.any.{text.title()}"}},
    }  # fmt: skip
    costs = {"n_parameter": 5, "state_bytes": size or 4000, "tokens_per_second": 2.0, "cpu_seconds": 0.5} | costs
    every = [*found, Result("training", {"flops_per_token": 700.0, "train/loss": 3.0})]
    return SimpleNamespace(
        path=Path("run"),
        trained=SimpleNamespace(config=config, checkpoint="run/checkpoints/a.ckpt", step=10, **costs),
        results={r.name: r for r in every},
    )


def worth(perplexity: float) -> Result:
    metrics = {f"{name}/{of}": 0.25 for name in ("worth", "worth_low", "worth_high") for of in ("on", "swapped")}
    ends = {"perplexity/on": perplexity, "perplexity_low/on": perplexity - 1, "perplexity_high/on": perplexity + 1}
    return Result("worth", metrics | ends | {"nll/on/far": 9.0, "n_token": 100.0})


def pairs(*rates: float) -> Result:
    metrics = {f"accuracy/on/{2**k}": rate for k, rate in enumerate(rates)}
    return Result("associative_recall", metrics | {"held/on": 2.0, "accuracy/on": rates[-1], "nll/on/1": 1.0})


def facts(rate: float, half_life: float) -> list[Result]:
    rates = {"exact_match/on": rate, "low/on": rate - 0.1, "high/on": rate + 0.1}
    controls = {f"exact_match/{of}": 0.02 for of in ("off", "wiped", "swapped")}
    needle = rates | controls | {f"{name}/{n}": value for name, value in rates.items() for n in (10_000, 100_000)}
    overwrite = rates | controls | {f"{name}/10": value for name, value in rates.items()}
    times = {"half_life": half_life, "half_life_low": 8.0, "half_life_high": half_life}
    return [Result("needle", needle), Result("overwrite", overwrite), Result("retention", times)]


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The runs that are found, in a project with a page for the table."""
    there: list[Any] = []
    monkeypatch.setattr(runs, "find_runs", lambda paths, trust=None: (there, []))
    monkeypatch.chdir(tmp_path)
    for folder in ("docs/figures", "results"):
        Path(folder).mkdir(parents=True)
    Path("README.md").write_text("no table here\n")
    Path("docs/table.md").write_text(PAGE)
    return there


def table_of() -> dict[tuple[str, str], dict[str, str]]:
    """Lines of the page by memory and size."""
    lines = [line for line in Path("docs/table.md").read_text().splitlines() if line.startswith("| ")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {(row[0].strip("`"), row[1]): dict(zip(head, row, strict=True)) for row in rows}


def test_trainings_become_lines_and_figures(project: list[Any]) -> None:
    project += [
        trained("none", 0, worth(100.0)),
        trained("none", 1, worth(90.0)),
        trained("delta", 0, worth(80.0), cpu_seconds=2.0),
        trained("delta", 1, worth(60.0), cpu_seconds=2.0),
        trained("delta", 0, worth(40.0), text="books"),
        trained("delta", 0, pairs(1.0, 0.5), text="symbols", state_bytes=900),
        trained("delta", 0, pairs(0.4, 0.2), text="symbols", size=8192),
        trained("delta", 0, *facts(0.5, float("inf")), text="builtin"),
    ]
    results.main(["table", "anywhere", "--commit", "abc"])
    lines = table_of()
    assert list(lines) == [("none", "default"), ("delta", "default"), ("delta", "8 KB")]
    line = lines["delta", "default"]
    assert line["perplexity of code"] == "70 (0 to 197.1)"  # Student's t of two: 12.706 * 14.14 / 1.414
    assert line["perplexity of books"] == "40 (39 to 41)"
    assert line["code: saved beside `none`"] == "26.7 % (-58.0 to 100.0)"  # 20 and 33.3 %, each beside its own seed
    assert "books: saved beside `none`" not in line or line["books: saved beside `none`"] == "-"
    assert (line["pairs held at 90 %"], line["pairs answered, mean"]) == ("2", "75.0 %")
    assert line["needle, 100,000 tokens"] == line["latest value after 10 updates"] == "50.0 % (40.0 to 60.0)"
    assert line["half-life, writes"] == "inf (8 to inf)"
    assert line["controls at most"] == "2.0 %"
    assert (line["state of a row, bytes"], line["of the model of pairs"]) == ("4,000", "900")
    assert line["tokens per CPU second"] == "120"  # 10 steps of 24 tokens in 2 seconds
    assert (line["FLOPs a token"], line["seeds"], line["commit"]) == ("700", "2", "abc")
    assert lines["none", "default"]["pairs held at 90 %"] == "-"
    assert lines["delta", "8 KB"]["pairs answered, mean"] == "30.0 %"
    assert "1,000,000" not in str(lines)  # of which nothing was measured
    for name in ("table_bytes", "table_worth"):
        assert f"![{name}](figures/{name}.png)" in Path("docs/table.md").read_text()
        assert Path(f"docs/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    results.main(["--check"])


def test_the_best_rate_on_the_least_seed_counts(project: list[Any]) -> None:
    project += [
        trained("delta", 0, worth(80.0), lr=0.001),
        trained("delta", 0, worth(70.0), lr=0.003),
        trained("delta", 1, worth(50.0), lr=0.001),  # better, but not on the seed that chooses
        trained("delta", 0, pairs(0.2), text="symbols", lr=0.001),
        trained("delta", 0, pairs(0.1), text="symbols", lr=0.003),
    ]
    results.main(["table", "anywhere", "--commit", "abc"])
    line = table_of()["delta", "default"]
    assert line["perplexity of code"] == "70 (69 to 71)"
    assert line["pairs answered, mean"] == "20.0 %"
    assert len(json.loads(Path("results/table.json").read_text())["entries"]) == 5  # all are kept


def test_a_record_grows(project: list[Any]) -> None:
    project.append(trained("stm", 0, pairs(0.2), text="symbols"))
    results.main(["table", "anywhere", "--commit", "abc"])
    project[:] = [
        trained("stm", 0, pairs(0.3), text="symbols"),
        trained("stm", 0, pairs(0.6), text="symbols", size=9000),
    ]
    results.main(["table", "anywhere", "--commit", "def"])
    lines = table_of()
    assert [lines["stm", size]["pairs answered, mean"] for size in ("default", "9 KB")] == ["30.0 %", "60.0 %"]
    entries = json.loads(Path("results/table.json").read_text())["entries"]
    assert [entry["commit"] for entry in entries] == ["def", "def"]
    assert "associative_recall/nll/on/1" not in entries[0]["metrics"]  # the columns' numbers alone
    assert not memory_table.figures(entries).keys() - {"table_bytes"}


def test_a_run_of_something_else_is_refused(project: list[Any]) -> None:
    project.append(trained("stm", 0))
    with pytest.raises(ConfigError, match="run has nothing that the table shows: give runs of table=worth"):
        results.main(["table", "anywhere"])


def test_what_no_rate_can_be_is_in_no_interval(project: list[Any]) -> None:
    unknown = {"perplexity/on": 50.0, "perplexity_low/on": float("nan"), "perplexity_high/on": float("nan")}
    saved = {f"worth/{of}": 0.25 for of in ("on", "swapped")}
    project += [trained("delta", seed, pairs(rate), text="symbols") for seed, rate in enumerate((0.2, 0.8))]
    project += [trained("stm", seed, pairs(rate), text="symbols") for seed, rate in enumerate((0.5, 0.51))]
    project += [trained("delta", 0, Result("worth", unknown | saved))]
    results.main(["table", "anywhere", "--commit", "abc"])
    lines = table_of()
    assert lines["delta", "default"]["pairs answered, mean"] == "50.0 % (0.0 to 100.0)"
    assert lines["stm", "default"]["pairs answered, mean"] == "50.5 % ± 6.4"  # 12.706 * 0.00707 / 1.414
    assert lines["delta", "default"]["perplexity of code"] == "50"
    (axes,) = memory_table.figures(json.loads(Path("results/table.json").read_text())["entries"])["table_bytes"].axes
    low, high = axes.get_ylim()
    assert -10 < low < 0 < 100 < high < 110
