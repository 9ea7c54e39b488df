"""What memory is worth, in short: of one seed or several, in a table and a figure that a check holds to the record."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from memlm.app import results
from memlm.config import ConfigError
from memlm.evaluation import worth_table

PAGE = "<!-- results/worth.json in short -->\n<!-- end of results -->\n"


def entry(name: str, seed: int, on: float, **controls: float) -> dict[str, Any]:
    metrics = {}
    for condition, value in {"off": on, "wiped": on, "swapped": on, **controls, "on": on}.items():
        for end, at in {"": value, "_low": value - 1, "_high": value + 2}.items():
            metrics[f"perplexity{end}/{condition}"] = at
    told = {"name": name, "seed": seed, "commit": "abc", "machine": "m", "experiment": "worth", "metrics": metrics}
    return told | {"headline": [], "step": 1, "tokens": None, "state_bytes": 0}


ONE = [
    entry("code-ltm", 0, 30.0, off=60.0, wiped=55.0, swapped=50.0),
    entry("code-none", 0, 45.0),
    entry("code-none-equal-cpu", 0, 40.0),
    entry("code-cache", 0, 44.0),
    entry("books-ltm", 0, 70.0, off=80.0, wiped=90.0, swapped=90.0),
]
THREE = [
    *ONE,
    *(entry(name, seed, on + seed) for seed in (1, 2) for name, on in (("code-ltm", 30.0), ("code-none", 45))),
]


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("docs/figures", "results"):
        Path(folder).mkdir(parents=True)
    Path("README.md").write_text(PAGE)
    return tmp_path


def keep(record: list[dict[str, Any]]) -> None:
    Path("results/worth.json").write_text(json.dumps({"entries": record}))


def lines() -> list[list[str]]:
    rows = [line for line in Path("README.md").read_text().splitlines() if line.startswith("| ")]
    return [row.strip("| ").split(" | ") for row in rows[2:]]


def test_a_memory_stands_beside_its_best_control_and_the_best_model_without(project: Path) -> None:
    keep(ONE)
    results.main([])
    assert lines() == [
        ["Python's source", "`ltm`", "30.0 (29.0 to 32.0)", "50.0, another document's memory",
         "40.0 (39.0 to 42.0), about equal CPU time", "1"],
        ["Python's source", "`cache`", "44.0 (43.0 to 46.0)", "44.0, reads off",
         "40.0 (39.0 to 42.0), about equal CPU time", "1"],
        ["novels", "`ltm`", "70.0 (69.0 to 72.0)", "80.0, reads off", "-", "1"],
    ]  # fmt: skip


def test_of_several_seeds_it_is_their_mean_and_interval(project: Path) -> None:
    keep(THREE)
    results.main([])
    half = 4.303 * 1 / math.sqrt(3)  # Student's t for 30, 31, 32
    assert lines()[0][2] == f"31.0 ± {half:.1f}"
    assert [line[-1] for line in lines()] == ["3; 1 without", "1", "1"]  # the best without memory has one seed
    assert "ltm, memory on: 30.00 (29.00 to 32.00), 31.00 (30.00 to 33.00), 32.00" in worth_table.told(THREE)


def test_documents_that_were_too_few_leave_no_interval(project: Path) -> None:
    few = entry("code-ltm", 0, 30.0)
    few["metrics"] |= {f"perplexity_{end}/on": "NaN" for end in ("low", "high")}
    keep([few, *ONE[1:]])
    results.main([])
    assert lines()[0][2] == "30.0"
    assert "ltm, memory on: 30.00;" in worth_table.told([few, *ONE[1:]])
    results.main(["--check"])


def test_the_figure_says_what_the_record_says_and_a_check_sees_it(project: Path) -> None:
    keep(ONE)
    results.main([])
    results.main(["--check"])
    for name in ("docs/figures/worth-light.svg", "docs/figures/worth-dark.svg"):
        before = Path(name).read_text()
        assert "no memory, equal steps: 45.00 (44.00 to 47.00)" in before
        results.main([])
        assert Path(name).read_text() == before, "drawn again it is the same file"
        assert not re.search(" $", before, re.MULTILINE)
    keep([*ONE[:-1], entry("code-none-context-512", 0, 39.0)])
    with pytest.raises(ConfigError, match=r"README\.md, docs/figures/worth-light\.svg, docs/figures/worth-dark\.svg"):
        results.main(["--check"])
    results.main([])
    results.main(["--check"])
    Path("docs/figures/worth-dark.svg").unlink()
    with pytest.raises(ConfigError, match=r"^docs/figures/worth-dark\.svg does not say"):
        results.main(["--check"])


def test_no_other_record_has_a_small_table(project: Path) -> None:
    Path("README.md").write_text(PAGE.replace("worth", "other"))
    Path("results/other.json").write_text(json.dumps({"entries": [{**ONE[0], "experiment": "needle"}]}))
    with pytest.raises(ConfigError, match="only the record of worth"):
        results.main([])
