import importlib
import inspect
import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks import candidates
from memlm.app import benchmark
from memlm.compose import compose, config_dir, to_dict
from memlm.config import ConfigError


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that measures tiny models."""
    monkeypatch.setattr(
        "sys.argv",
        ["benchmark.py", *benchmark.name_command(["train"]), f"out={tmp_path}", "candidates=[none,ltm]",
         'overrides=["model.n_layer=1","model.d_model=16","model.segment_len=16","memory.ltm.n_slot=32"]',
         "sizes=[default]", "n_row=1", "n_segment=2", "rounds=1", "warmup=1", "peak_memory=false"],
    )  # fmt: skip


def test_command_line_writes_the_result(command: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main()
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["metrics"]["default/ltm/vs_none"] > 0
    assert stored["metadata"]["settings"]["rounds"] == 1
    said = capsys.readouterr().out
    assert str(tmp_path / "result.json") in said
    assert said.startswith((tmp_path / "report.txt").read_text().strip())


def test_what_a_benchmark_refuses_to_report_is_told(
    command: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates, "fill", lambda model, setup: model.init_state(setup.n_row))
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert "error: the long-term memory was not full" in capsys.readouterr().err


def test_unknown_settings_and_benchmarks() -> None:
    with pytest.raises(ConfigError, match="rounds"):
        compose(["ronds=3"], "benchmark")
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        benchmark.name_command(["trian"])
    assert benchmark.name_command(["train", "rounds=1"]) == ["benchmark=train", "rounds=1"]
    assert benchmark.name_command(["--help"]) == ["--help"]
    assert benchmark.name_command([]) == []


def test_every_benchmark_has_settings_and_a_module() -> None:
    names = {path.stem for path in (config_dir() / "benchmark").glob("*.yaml")}
    assert names == {path.stem for path in Path(benchmarks.__file__).parent.glob("*.py")} - {
        "__init__",
        "base",
        "candidates",
        "mixer_peers",
        "nanogpt",
        "retrieval_keys",
    }
    for name in names:
        config = to_dict(compose([f"benchmark={name}"], "benchmark"))
        assert config.pop("benchmark") == name
        module = importlib.import_module(f"benchmarks.{name}")
        assert set(inspect.signature(module.run).parameters) == config.keys() - {"out", "paths"}
        assert list(inspect.signature(module.report).parameters) == ["result"]
