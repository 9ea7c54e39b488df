"""The page of a model on the hub."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from memlm.app import export as command
from memlm.assemble import build_model, build_tokenizer
from memlm.checkpoint import describe, load, write
from memlm.config import ConfigError
from memlm.evaluation.card import card_of
from memlm.evaluation.emit import emit
from memlm.evaluation.result import Result
from tests.training.small import config


def entry(label: str, metric: str, control: bool) -> dict[str, object]:
    bounds = {"low": f"low{metric[4:]}", "high": f"high{metric[4:]}", "n": None}
    return {"label": label, "metric": metric, **bounds, "percent": True, "better": "higher", "control": control}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An untrained model as a run that was measured."""
    settings = config(tmp_path, "a")
    model = build_model(settings, build_tokenizer(settings))
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {"memlm": describe(model), "state_dict": weights, "global_step": 3}
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    write(content, tmp_path / "run/checkpoints/step=3.ckpt")
    metrics = {"rate/on": 0.913, "low/on": 0.88, "high/on": 0.94, "rate/off": 0.004, "low/off": 0.0, "high/off": 0.015}
    headline = [entry("told", "rate/on", False), entry("reads off", "rate/off", True)]
    emit(Result("asked", metrics, (), {"headline": headline}), {}, tmp_path / "run/asked")
    return tmp_path / "run"


def test_a_card_has_the_results_beside_their_controls(run: Path) -> None:
    text = card_of(load(run), run, "me/model")
    card = huggingface_hub.ModelCard(text)
    assert card.data.model_name == "me/model"
    assert card.data.base_model is None
    found = {(part.metric_name, part.metric_value) for part in card.data.eval_results}
    assert found == {("told", 91.3), ("reads off", 0.4)}
    lines = [line.split() for line in text.splitlines()]
    assert ["asked", "told", "91.3", "%", "88.0", "%", "94.0", "%", "-"] in lines
    assert lines.index(["asked", "told", "91.3", "%", "88.0", "%", "94.0", "%", "-"]) + 1 == lines.index(
        ["reads", "off", "0.4", "%", "0.0", "%", "1.5", "%", "-"]
    )
    assert "trained with memlm" in text
    assert card_of(load(run), run / "checkpoints/step=3.ckpt", "me/model") == text


def test_a_rate_without_controls_is_not_put_on_a_card(run: Path) -> None:
    path = run / "asked/result.json"
    stored = json.loads(path.read_text())
    stored["metadata"]["headline"].pop()
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="without any control"):
        card_of(load(run), run, "me/model")


def test_the_command_writes_the_card_and_uploads(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr("memlm.hf.hub.push", lambda folder, repo, private: calls.append((folder, repo, private)))
    settings = {"checkpoint": str(run), "trust": [], "output": str(run / "out"), "push": None, "private": None}
    command.main(settings)
    assert calls == []
    assert huggingface_hub.ModelCard.load(run / "out/README.md").data.model_name == "out"
    command.main(settings | {"output": str(run / "two"), "push": "me/model", "private": True})
    assert calls == [(str(run / "two"), "me/model", True)]
    assert huggingface_hub.ModelCard.load(run / "two/README.md").data.model_name == "me/model"
    assert "README.md" in capsys.readouterr().out
