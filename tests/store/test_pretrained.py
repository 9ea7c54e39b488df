"""Operations on a pretrained model with a memory: as on any other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from memlm.store.conversation import Conversation, question_ids
from tests.experiments.tiny import MEMORIES
from tests.models import bases

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

LTM = {"ltm": MEMORIES["ltm"] | {"n_slot": 200, "write_budget": None, "top_k": 20}}
TEXT = "a cat sat on a box. it ran home. a dog is red."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases.with_tokenizer(bases.make_base("llama", tmp_path_factory.mktemp("bases")))


def test_text_is_stored_asked_edited_saved_and_forgotten(llama: Path, tmp_path: Path) -> None:
    model, fresh = bases.attached(llama, LTM, segment_len=24), bases.attached(llama, LTM, segment_len=24)
    ids = model.store_experience(TEXT)
    told = [record.text for record in reversed(model.list_memory())]
    assert told == ["a cat sat on a box.", "it ran home.", "a dog is red."]
    found = model.query_memory("a cat sat on a box.", top_k=1)[0]
    assert (found.id, found.memory) == (ids[0], "ltm/1")
    assert found.similarity == pytest.approx(1.0, abs=1e-4)  # the same token after the same ones
    model.save_memory(tmp_path / "memory")
    fresh.load_memory(tmp_path / "memory")
    assert fresh.query_memory("it ran home.", top_k=3) == model.query_memory("it ran home.", top_k=3)
    assert fresh.merge_memory(tmp_path / "memory") == [3, 4, 5]
    assert model.edit_memory(ids[1], "it ran off.") == ids[1]
    assert "it ran off." in [record.text for record in model.list_memory()]
    assert model.forget(ids) == ids
    assert model.list_memory() == []
    never: Any = bases.attached(llama, LTM, segment_len=24)
    text = model.encode_text(TEXT)[:23]  # one segment, which reads what was stored alone
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([text])).logits, never(torch.tensor([text])).logits)


def test_what_is_found_is_read_again_as_a_message_of_the_chat(llama: Path) -> None:
    model = bases.attached(llama, LTM, segment_len=55)
    for text in ("a cat sat.", "it ran."):
        model.store_experience(text)
    asked: list[str] = []
    stream = model.stream
    model.stream = lambda ids, *rest, **more: (
        asked.append(model.tokenizer.decode(ids[0].tolist())) or stream(ids, *rest, **more)
    )
    answer = Conversation(model, recall=1).ask("a cat?")
    assert [record.text for record in answer.again] == ["a cat sat."]
    whole = model.tokenizer.decode(question_ids(model, "a cat?", ["a cat sat."]))
    asks = "<|u|Context:\na cat sat.\n\nQuestion: a cat?\nAnswer:\n<|a|"
    assert whole == re.sub("[CQ:]", "<unk>", asks)  # letters that its tokenizer lacks
    assert whole.endswith(asked[0])  # cut, as a segment of this base is short
    assert "a cat?" in asked[0]
    assert asked[1:] == ["<|u|a cat?\n<|a|"]
