"""LoCoMo by evidence, on a made-up file and a model that reads, by hand, the tokens that a question repeats."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments import locomo
from experiments.locomo import Locomo, read_conversations
from memlm.config import ConfigError
from memlm.data.tokenizer import train_tokenizer
from memlm.evaluation.headline import headline
from memlm.memory.contract import Sizes
from memlm.memory.knn import KnnMemory
from tests.store.test_conversation import reader
from tests.store.test_operations import build

TURNS = ["ba ce di fo.", "gu is who.", "bad byte mo.", "la lo lu.", "ra ro ru."]


def made_up(path: Path) -> Path:
    def turn(session: int, number: int, text: str) -> dict[str, Any]:
        return {"speaker": "Ann", "dia_id": f"D{session}:{number}", "text": text}

    asked = [
        {"question": "ce di", "evidence": ["D1:1"], "category": 4, "answer": "fo"},
        {"question": "byte mo lo", "evidence": ["D2:1; D2:02", "D9:9"], "category": 1, "answer": 3},
        {"question": "ru", "evidence": [], "category": 3, "answer": "x"},
        {"question": "ro", "evidence": ["D1:2"], "category": 5},
    ]
    conversation = {
        "speaker_a": "Ann",
        "session_2": [turn(2, 1, TURNS[2]), turn(2, 2, TURNS[3]), turn(2, 3, TURNS[4])],
        "session_1_date_time": "noon",
        "session_1": [turn(1, 1, TURNS[0]), turn(1, 2, TURNS[1])],
    }
    path.write_text(json.dumps([{"qa": asked, "conversation": conversation}]))
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    made = reader(train_tokenizer("word", [" Ann: " + " Ann: ".join(TURNS)], 100))
    return made


def test_a_file_is_read_in_order_and_evidence_is_cleaned(tmp_path: Path) -> None:
    (told,) = read_conversations(str(made_up(tmp_path / "made-up.json")))
    assert told.turns == [f"Ann: {text}" for text in TURNS]
    assert [question.evidence for question in told.questions] == [(0,), (2, 3), (1,)]
    assert told.n_left_out == 1


def test_turns_are_ranked_by_what_is_read_of_them(model: Any, tmp_path: Path) -> None:
    before = {name: part.clone() for name, part in model.state_dict().items()}
    cfg = Locomo(str(made_up(tmp_path / "made-up.json")))
    result = locomo.run(model, None, cfg)  # type: ignore[arg-type]
    rows = {(row["condition"], row["question"]): row for row in result.rows}
    assert rows["memory", 0]["recall@1"] == 1
    assert rows["memory", 1]["recall@1"] == 0.5
    assert rows["memory", 1]["recall@5"] == 1
    assert rows["memory", 2]["recall@1"] == 0  # the evidence shares no word with the question
    assert rows["bm25", 0]["recall@1"] == rows["bm25", 1]["recall@5"] == 1
    assert rows["other", 0]["recall@1"] == 0
    assert rows["chance", 0]["recall@1"] == 0.2
    assert result.metrics["recall@1/memory"] == pytest.approx(0.5)
    assert result.metrics["recall@1/memory_4"] == 1
    assert result.metrics["n"] == 3
    assert result.metadata["n_left_out"] == 1
    assert set(locomo.plot(result)) == {"locomo"}
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_static_embeddings_rank_turns_beside(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Locomo(str(made_up(tmp_path / "made-up.json")), embeddings="wordllama")
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ConfigError, match=r"locomo\.embeddings=wordllama needs that package: pip install wordllama"):
        locomo.run(model, None, cfg)  # type: ignore[arg-type]

    def embed(texts: list[str], norm: bool) -> Any:
        """Which of some letters are in a text."""
        there = np.array([[letter in text for letter in "cefgy"] for text in texts], dtype=np.float32)
        return there / np.maximum(np.linalg.norm(there, axis=1, keepdims=True), 1)

    loader = SimpleNamespace(load=lambda cache_dir, disable_download: SimpleNamespace(embed=embed))
    package = SimpleNamespace(WordLlama=loader, __file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "wordllama", package)
    result = locomo.run(model, None, cfg)  # type: ignore[arg-type]
    rows = {row["question"]: row for row in result.rows if row["condition"] == "static"}
    assert rows[0]["recall@1"] == 1  # "ce di" and "ba ce di fo."
    assert rows[1]["recall@1"] == 0.5  # "byte mo lo" and "bad byte mo."
    assert result.metrics["recall@1/static"] == pytest.approx((1 + 0.5 + rows[2]["recall@1"]) / 3)
    shown = [(number.cell, number.control) for number in headline(result)]
    assert (("static embeddings", "among 10, one turn"), True) in shown
    assert set(locomo.plot(result)) == {"locomo"}


def test_what_was_stored_before_plays_no_part(model: Any, tmp_path: Path) -> None:
    cfg = Locomo(str(made_up(tmp_path / "made-up.json")))
    expected = locomo.run(model, None, cfg)  # type: ignore[arg-type]
    model.store_experience("ce di. byte mo lo.")
    try:
        assert locomo.run(model, None, cfg) == expected  # type: ignore[arg-type]
    finally:
        model.forget(document=0)


def test_places_of_knn_are_those_of_its_tokens() -> None:
    memory = KnnMemory(8, Sizes(8, 2, 1, 4, 0, 10), n_token=5, top_k=2)
    state = memory.init_state(2)
    assert memory.places(state).tolist() == [[-1] * 5] * 2
    full = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    state = state._replace(n_chunk=torch.tensor([3, 12]), full=full)
    assert memory.places(state).tolist() == [[0, 1, 2, -1, -1], [10, 11, 7, 8, 9]]


def test_bad_input_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"locomo\.path is missing: give the file locomo10\.json"):
        locomo.run(model, None, Locomo())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no file"):
        read_conversations(str(tmp_path / "none.json"))
    (tmp_path / "other.json").write_text('[{"qa": []}]')
    with pytest.raises(ConfigError, match=r"is not in the form of locomo10\.json"):
        read_conversations(str(tmp_path / "other.json"))
    plain = build(model.tokenizer, "stm")
    with pytest.raises(ConfigError, match=r"no memory of this model has slots made of single tokens \(memory: stm\)"):
        locomo.run(plain, None, Locomo(str(made_up(tmp_path / "made-up.json"))))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"locomo\.n_question must be at least 2"):
        Locomo(n_question=1)
    with pytest.raises(ConfigError, match="embeddings must be wordllama"):
        Locomo(embeddings="bert")  # type: ignore[arg-type]
