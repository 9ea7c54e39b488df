"""Pages are what records say, and records what runs found."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memlm.app import results
from memlm.config import ConfigError
from memlm.evaluation import records, runs
from memlm.evaluation.result import Result

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- results/{}.json -->\n", "<!-- end of results -->"


def pairs(rate: float) -> Result:
    metrics: dict[str, float] = {"held/on": 2 if rate >= 0.9 else 0}
    for n in (1, 2):
        for condition in ("on", "off", "wiped", "swapped", "unseen"):
            value = rate if condition == "on" else 0.01 * n
            numbers = {"accuracy": value, "low": value / 4 + 0.02, "high": value, "n": 7 * n}
            metrics |= {f"{key}/{condition}/{n}": number for key, number in numbers.items()}
    return Result("associative_recall", metrics)


def loss(value: float) -> Result:
    def entry(label: str, metric: str, control: bool) -> dict[str, Any]:
        ends = {"low": None, "high": None} if control else {"low": "low", "high": "high"}
        return {
            "label": label,
            "metric": metric,
            **ends,
            "n": "n",
            "percent": True,
            "better": "higher",
            "control": control,
        }

    metrics = {"saved": value, "low": value - 0.1, "high": float("inf"), "other": 0.01, "n": 12.0}
    headline = [entry("saved", "saved", False), entry("by another's", "other", True)]
    return Result("worth", metrics, (), {"headline": headline, "settings": {"split": "test"}})


def published(rate: float, sizes: list[str]) -> Result:
    """As of a task with published figures: a mean and sizes of tokens and pairs, a share of the published training."""
    ends = ["", *(f"/{size}" for size in sizes)]
    metrics = {
        f"{key}/{condition}{end}": number
        for condition, value in {"on": rate, "wiped": 0.1, "swapped": 0.05}.items()
        for end in ends
        for key, number in {"accuracy": value, "low": value / 2, "high": value, "n": 7}.items()
    }
    return Result("mqar_zoology", metrics, (), {"trained": "1 of 32 epochs"})


def run(path: Path, memory: str, seed: int, result: Result, name: str | None = None) -> Any:
    config = {
        "seed": seed, "memory": {memory: {}} if memory != "none" else {}, "trainer": {"accumulate_grad_batches": 1},
        "curriculum": {"phases": [{"steps": 10, "n_row": 2, "n_segment": 3}]}, "model": {"segment_len": 4},
        "name": name,
    }  # fmt: skip
    costs = {"n_parameter": 5, "state_bytes": 1234, "tokens_per_second": 2.0, "cpu_seconds": 99.6}
    trained = SimpleNamespace(config=config, step=10, memory={}, checkpoint=str(path / "one.ckpt"), **costs)
    return SimpleNamespace(path=path, trained=trained, results={result.name: result})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The runs that are found, in a project with a page for each record."""
    there: list[Any] = []
    monkeypatch.setattr(runs, "find_runs", lambda paths, trust=None: (there, []))
    monkeypatch.chdir(tmp_path)
    Path("docs/deep").mkdir(parents=True)
    Path("results").mkdir()
    Path("README.md").write_text("no table here\n")
    return there


def page(name: str) -> Path:
    path = Path(f"docs/deep/{name}.md")
    path.write_text(f"before\n\n{BEGIN.format(name)}anything\n{END}\nbehind\n")
    return path


def rows(path: Path) -> list[str]:
    text = path.read_text()
    assert text.startswith("before\n\n<!-- results/")
    assert text.endswith(f"\n\n{END}\nbehind\n")
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_pairs_become_a_record_and_its_table(found: list[Any], tmp_path: Path) -> None:
    found += [run(tmp_path, *of) for of in (("stm", 0, pairs(0.9)), ("none", 0, pairs(0.02)), ("stm", 1, pairs(1.0)))]
    path = page("recall")
    results.main(["recall", "anywhere", "--experiment", "associative_recall", "--commit", "abc"])
    found[:] = [run(tmp_path, "stm", 0, pairs(0.95))]
    results.main(["recall", "anywhere", "--commit", "def"])
    record = json.loads(Path("results/recall.json").read_text())["entries"]
    known = [(entry["name"], entry["seed"], entry["commit"]) for entry in record]
    assert known == [("none", 0, "abc"), ("stm", 0, "def"), ("stm", 1, "abc")]
    assert (record[0]["tokens"], record[0]["minutes"], record[0]["cpu_seconds"]) == (240, 2.0, 99.6)
    _, _, *lines = rows(path)
    assert [line.split(" | ")[0] for line in lines] == ["| `stm`", "| `stm`", "| `none`"]
    assert "| 1,234 | 2 or more | 95.0 (25.8 to 95.0) | 95.0 (25.8 to 95.0) | 2.0 | 10 | 240 | 2.0 | def |" in lines[0]


def test_rates_by_size_stand_beside_the_share_of_the_published_training(found: list[Any], tmp_path: Path) -> None:
    sizes = ["64_4", "1024_256"]
    found += [run(tmp_path, *of) for of in (("stm", 0, published(0.5, sizes)), ("ltm", 0, published(0.9, sizes)))]
    logged = [{"step": 49, "train/answer_accuracy": 0.25}, {"step": 99, "train/answer_accuracy": None}, {"step": 9}]
    found[0].results["training"] = Result("training", {}, logged)
    path = page("zoology")
    results.main(["zoology", "anywhere", "--experiment", "mqar_zoology", "--commit", "abc"])
    record = json.loads(Path("results/zoology.json").read_text())["entries"]
    assert [(entry["name"], entry["curve"]) for entry in record] == [("ltm", []), ("stm", [[49, 0.25]])]
    head, _, *lines = rows(path)
    assert "| answered | 64 tokens, 4 pairs | 1,024 tokens, 256 pairs | controls at most |" in head
    assert [line.split(" | ")[0] for line in lines] == ["| `ltm`", "| `stm`"]
    rate = "50.0 (25.0 to 50.0)"
    assert f"| 1,234 | {rate} | {rate} | {rate} | 10.0 | 1 of 32 epochs | 10 | 240 | 2.0 | abc |" in lines[1]
    found[:] = [run(tmp_path, "stm", 1, published(0.5, []))]
    results.main(["one", "anywhere", "--experiment", "mqar_zoology", "--commit", "abc"])
    assert f"| `stm` | 1 | 1,234 | {rate} | 10.0 | 1 of 32 epochs |" in records.filled_in(
        BEGIN.format("one") + END, Path("results")
    )


def test_any_experiment_is_shown_by_its_headline_and_controls(found: list[Any], tmp_path: Path) -> None:
    (tmp_path / "run/.hydra").mkdir(parents=True)
    (tmp_path / "run/.hydra/overrides.yaml").write_text("- recipe=worth\n- paths.root=elsewhere\n- seed=3\n")
    found += [run(tmp_path / "run", "ltm", 3, loss(0.4)), run(tmp_path, "none", 3, loss(0.0), name="none-512")]
    path = page("worth")
    results.main(["worth", "anywhere", "--commit", "abc"])
    record = json.loads(Path("results/worth.json").read_text())["entries"]
    assert record[0]["command"] == "python train.py recipe=worth seed=3"
    assert record[1]["command"] is None
    assert record[0]["settings"] == {"split": "test"}
    head, _, first, second = rows(path)
    assert head.startswith("| run | seed | saved | by another's | state of a row, bytes | CPU seconds |")
    assert first.startswith("| `ltm` | 3 | 40.0 % (30.0 to inf) | 1.0 % | 1,234 | 100 | 10 | 240 | 2.0 | abc |")
    assert second.startswith("| `none-512` | 3 | 0.0 %")


def test_controls_of_several_main_numbers_each_keep_a_column(found: list[Any], tmp_path: Path) -> None:
    told = loss(0.4)
    number, control = told.metadata["headline"]
    more = [number | {"label": "saved on names", "metric": "named"}, control | {"metric": "other_named"}]
    told.metadata["headline"] += more
    found.append(
        run(tmp_path, "ltm", 3, Result("worth", told.metrics | {"named": 0.8, "other_named": 0.02}, (), told.metadata))
    )
    path = page("worth")
    results.main(["worth", "anywhere", "--commit", "abc"])
    head, _, line = rows(path)
    assert head.startswith(
        "| run | seed | saved | saved: by another's | saved on names | saved on names: by another's | state"
    )
    assert line.startswith("| `ltm` | 3 | 40.0 % (30.0 to inf) | 1.0 % | 80.0 % (30.0 to inf) | 2.0 % | 1,234 |")


def test_an_evaluation_of_changed_memories_says_what_was_changed_and_how(found: list[Any], tmp_path: Path) -> None:
    change = "- checkpoint=/a/place\n- 'change={ltm.n_slot: 60}'\n- worth.files=['/my/a.txt',b/c.txt]\n"
    commands = {"trained": "- recipe=worth\n", "asked": change}
    for folder, lines in commands.items():
        (tmp_path / folder / ".hydra").mkdir(parents=True)
        (tmp_path / folder / ".hydra/overrides.yaml").write_text(lines)
    (tmp_path / "asked/evaluation.json").write_text("{}")
    small = run(tmp_path / "asked", "ltm", 0, loss(0.3))
    small.trained.memory = {"ltm.n_slot": 60}
    small.trained.checkpoint = str(tmp_path / "trained/checkpoints/step=10.ckpt")
    small.results["worth"].metadata["settings"] = {"text": "/my/books/a.txt", "n": 3}
    found += [run(tmp_path / "trained", "ltm", 0, loss(0.4)), small]
    page("worth")
    results.main(["worth", "anywhere", "--commit", "abc"])
    record = json.loads(Path("results/worth.json").read_text())["entries"]
    assert [entry["name"] for entry in record] == ["ltm", "ltm, n_slot 60"]
    made, asked = "python train.py recipe=worth", "python scripts/evaluate.py checkpoint=RUN change={ltm.n_slot: 60}"
    asked += " worth.files=['a.txt',b/c.txt]"
    assert record[1]["settings"] == {"text": "a.txt", "n": 3}
    assert [entry["command"] for entry in record] == [made, f"{made}; {asked}"]


def test_a_headline_that_says_where_it_stands_has_several_lines(found: list[Any], tmp_path: Path) -> None:
    told = loss(0.4)
    for number, cell in zip(told.metadata["headline"], (["memory", "at 1"], ["another's", "at 5"]), strict=True):
        number["cell"] = cell
    found.append(run(tmp_path, "ltm", 3, told))
    path = page("worth")
    results.main(["worth", "anywhere", "--commit", "abc"])
    head, _, *lines = rows(path)
    assert head == "| run | seed |  | at 1 | at 5 | n | commit |"
    assert lines[0] == "| `ltm` | 3 | memory | 40.0 % (30.0 to inf) | - | 12 | abc |"
    assert lines[1] == "| `ltm` | 3 | another's | - | 1.0 % | 12 | abc |"


def test_evaluations_of_one_training_are_one_entry(found: list[Any], tmp_path: Path) -> None:
    def record(column: str, value: float, n: int, cpu_seconds: float = 99.6) -> list[str]:
        told = loss(value)
        (number, control), parts = told.metadata["headline"], ("low", "high", "n")
        number |= {"cell": ["memory", column], "metric": column} | {part: f"{part} {column}" for part in parts}
        control |= {"cell": ["another's", column], "n": None}
        metrics = {column: value, f"low {column}": value - 0.1, f"high {column}": value + 0.1, f"n {column}": n}
        told = Result("worth", metrics | {"other": 0.0}, (), told.metadata)
        found[:] = [run(tmp_path, "ltm", 3, told)]
        found[0].trained.cpu_seconds = cpu_seconds
        results.main(["worth", "anywhere", "--commit", "abc"])
        return rows(path)[2:3]

    path = page("worth")
    first = record("at 1", 0.4, 12)
    assert first == ["| `ltm` | 3 | memory | 40.0 % (30.0 to 50.0) | 12 | abc |"]
    both = ["| `ltm` | 3 | memory | 40.0 % (30.0 to 50.0) | 30.0 % (20.0 to 40.0), n = 4 | 12 | abc |"]
    assert record("at 5", 0.3, 4) == record("at 5", 0.3, 4) == both
    assert record("at 1", 0.2, 12, cpu_seconds=7) == ["| `ltm` | 3 | memory | 20.0 % (10.0 to 30.0) | 12 | abc |"]


def test_who_has_more_columns_decides_their_order(found: list[Any], tmp_path: Path) -> None:
    for name, columns in (("cache", ("at 5", "at 5")), ("ltm", ("at 1", "at 5"))):
        told = loss(0.4)
        for number, column in zip(told.metadata["headline"], columns, strict=True):
            number["cell"] = ["memory", column]
        found.append(run(tmp_path, name, 3, told))
    path = page("worth")
    results.main(["worth", "anywhere", "--commit", "abc"])
    assert rows(path)[0] == "| run | seed |  | at 1 | at 5 | n | commit |"


def test_a_page_that_differs_is_told_and_not_written(found: list[Any], tmp_path: Path) -> None:
    found.append(run(tmp_path, "ltm", 0, loss(0.4)))
    path = page("worth")
    results.main(["worth", "anywhere", "--commit", "abc"])
    results.main(["--check"])
    whole = path.read_text()
    path.write_text(whole.replace("40.0 %", "41.0 %"))
    with pytest.raises(ConfigError, match=r"docs/deep/worth\.md does not say what results/ says: run memlm results"):
        results.main(["--check"])
    assert "41.0 %" in path.read_text()
    results.main([])
    assert path.read_text() == whole


def timing(folder: Path, report: str, *settings: str, changed: bool = False, name: str = "benchmark_write") -> str:
    """A folder as a benchmark writes it."""
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    metadata = {"commit": "0123456789", "uncommitted_changes": changed}
    stored = {"name": name, "metrics": {}, "rows": [], "metadata": metadata}
    (folder / "result.json").write_text(json.dumps(stored))
    (folder / "report.txt").write_text(report + "\n")
    (folder / ".hydra/overrides.yaml").write_text(json.dumps(["benchmark=write", *settings]))
    return str(folder)


def test_a_benchmark_is_shown_as_it_was_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "README.md"
    page.write_text(BEGIN.format("benchmark_write") + END)
    path = "/somewhere/else/run"
    first = timing(tmp_path / "a", f"old: 3 ms of {path}", "rounds=2", f"checkpoint='{path}'")
    other = timing(tmp_path / "b", "5 ms", "rounds=9")
    results.main(["benchmark_write", first, other])
    results.main(["benchmark_write", timing(tmp_path / "c", f"4 ms of {path}", "rounds=2", f"checkpoint='{path}'")])
    assert page.read_text().split("\n\n") == [
        "<!-- results/benchmark_write.json -->",
        "    python scripts/benchmark.py write rounds=2 checkpoint=CHECKPOINT",
        "```text\n4 ms of CHECKPOINT\n```",
        "    python scripts/benchmark.py write rounds=9",
        "```text\n5 ms\n```",
        END,
    ]
    with pytest.raises(ConfigError, match="in no commit"):
        results.main(["benchmark_write", timing(tmp_path / "d", "1 ms", changed=True)])
    with pytest.raises(ConfigError, match="a record is of one benchmark"):
        results.main(["benchmark_write", timing(tmp_path / "e", "1 ms", name="benchmark_query")])
    (tmp_path / "b/report.txt").unlink()
    with pytest.raises(ConfigError, match="does not tell its command and report"):
        results.main(["benchmark_write", other])


def test_mistakes_are_told(found: list[Any], tmp_path: Path) -> None:
    found.append(run(tmp_path, "ltm", 0, loss(0.4)))
    for arguments, told in (
        (["worth"], "no run is named"),
        (["../worth", "run"], "is no name of a record"),
        (["--check", "worth", "run"], "give it alone"),
        (["recall", "run"], "has no result of recall; it has: worth"),
    ):
        with pytest.raises(ConfigError, match=told):
            results.main(arguments)
    page("absent")
    with pytest.raises(ConfigError, match=r"there is no record results/absent\.json"):
        results.main([])
    Path("results/absent.json").write_text('{"entries": [{"name": "a"}]}')
    with pytest.raises(ConfigError, match="entry 0 lacks seed, commit"):
        results.main([])
    mixed = [{"name": "a", "seed": 0, "experiment": "x"}, {"name": "b", "seed": 0, "experiment": "y"}]
    with pytest.raises(ConfigError, match="of one experiment, and here are x, y"):
        records.merged(mixed, [])
    Path("README.md").unlink()
    with pytest.raises(ConfigError, match="call it where they are"):
        results.main([])


def test_the_pages_of_this_project_say_what_its_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results.main(["--check"])
