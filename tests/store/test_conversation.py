"""Conversations, with a model that is made to read, by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from memlm.app import chat
from memlm.config import ConfigError
from memlm.data.tokenizer import train_tokenizer
from memlm.store.conversation import HELP, Answer, Conversation, found_for
from memlm.store.remembered import Remembered
from tests.store.test_operations import build

FACT = "ba ce is di fo gu."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer("word", [f" {FACT} Who is bad byte ?"], 100)


def reader(tokenizer: Any) -> Any:
    """A model that says the token that followed the present one where memory knows it, and else always the same.

    Keys are embeddings, values are the embeddings of the tokens that follow, and layers do nothing.
    """
    model = build(tokenizer, d_key=32, d_value=32, temperature=60.0, top_k=4)
    module = model.memory["ltm"][0]
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.to_output.weight.zero_()
            layer.feed_forward[3].weight.zero_()
        generator = torch.Generator().manual_seed(0)
        model.embedding.weight.copy_(torch.nn.functional.normalize(torch.randn(model.n_vocab, 32, generator=generator)))
        module.to_key.weight.copy_(torch.eye(32))
        module.read_gate.bias.fill_(10.0)
        module.to_output.weight.copy_(10 * torch.eye(32))
    return model


def test_what_is_told_is_answered_from_memory_after_the_context_is_gone(tokenizer: Any) -> None:
    talk = Conversation(reader(tokenizer))
    assert "memory is empty" in str(talk.respond("ba ce"))
    assert talk.respond(FACT) == "[stored: record 0]"
    assert talk.respond("/clear") == "[context cleared]"
    assert talk.context == []
    reply = str(talk.respond("ba ce is"))
    assert reply.startswith("di fo gu.\n")
    assert f"from record 0: '{FACT}'" in reply
    assert "without memory: 'is is" in reply  # the model repeats what it sees


def test_an_answer_says_when_memory_was_not_read(tokenizer: Any) -> None:
    model = reader(tokenizer)
    talk = Conversation(model)
    talk.tell(FACT)
    with torch.no_grad():
        model.memory["ltm"][0].null_similarity.fill_(2.0)  # nothing is worth a read
    assert "memory was not read (greatest weight 0.0" in str(talk.respond("ba ce is"))
    with torch.no_grad():
        model.memory["ltm"][0].null_similarity.fill_(0.5)
        model.memory["ltm"][0].to_output.weight.zero_()  # it is read, but to no effect
    assert "the answer is the same without memory" in str(talk.respond("ba ce is"))


def test_what_is_shown_was_read_for_the_answer_not_for_the_question(tokenizer: Any) -> None:
    talk = Conversation(reader(tokenizer))
    for text in (FACT, FACT, "Who bad byte."):
        talk.tell(text)
    talk.respond("/clear")
    question = talk.model.query_memory("Who bad ba ce is", top_k=1)[0]
    answer = talk.ask("Who bad ba ce is")
    assert question.id == 2
    assert answer.text == "di fo gu."
    assert answer.read is not None
    assert answer.read.id in (0, 1)
    assert answer.read.weight is not None
    assert 0.3 < answer.read.weight < 0.6 < (question.weight or 0)  # two records share it


def test_what_is_asked_is_not_stored(tokenizer: Any) -> None:
    talk = Conversation(reader(tokenizer))
    talk.tell(FACT)
    before = talk.model.memory["ltm"][0].bank.state().record.clone()
    talk.ask("Who is ba ce?")
    assert torch.equal(talk.model.memory["ltm"][0].bank.state().record, before)


def test_an_answer_ends_with_its_sentence(tokenizer: Any) -> None:
    talk = Conversation(reader(tokenizer))
    talk.tell("ba ce di. fo gu.")
    answer = talk.ask("ba")
    assert answer.text == "ce di."
    assert isinstance(answer.read, Remembered)
    assert isinstance(answer, Answer)


def test_an_answer_comes_piece_by_piece(tokenizer: Any) -> None:
    talk, whole = Conversation(reader(tokenizer)), Conversation(reader(tokenizer))
    for other in (talk, whole):
        other.tell(FACT)
    pieces: list[str] = []
    after = talk.respond("ba ce is", pieces.append)
    assert pieces == ["di", " fo", " gu", "."]
    assert "".join(pieces) + str(after) == whole.respond("ba ce is")
    assert talk.respond("/clear", pieces.append) == "[context cleared]"
    assert len(pieces) == 4


def test_commands(tokenizer: Any, tmp_path: Path) -> None:
    talk = Conversation(reader(tokenizer))
    path = tmp_path / "memory"
    assert talk.respond("/memory") == "[memory is empty]"
    talk.respond(FACT)
    talk.respond("fo fo fo.")
    assert [line.split("'")[1] for line in str(talk.respond("/memory")).splitlines()] == ["fo fo fo.", FACT]
    assert str(talk.respond("/memory ba ce")).startswith(f"  0: '{FACT}' (weight ")
    assert talk.respond(f"/save {path}") == f"[memory saved to {path}]"
    assert talk.respond("/forget 0") == "[forgotten: record 0; the context was cleared]"
    assert FACT not in str(talk.respond("/memory"))
    assert talk.context == []
    assert talk.respond(f"/load {path}") == f"[memory replaced by that of {path}; the context was cleared]"
    assert FACT in str(talk.respond("/memory"))
    assert FACT in str(talk.respond("/memory\tba ce"))
    assert talk.respond("/help") == HELP
    assert all(f"/{name}" in HELP for name in ("clear", "memory", "forget", "save", "load", "help", "quit"))
    assert talk.respond("/quit") is None
    assert talk.respond("  ") == ""


def test_a_loaded_memory_is_not_answered_from_the_context_of_before(tokenizer: Any, tmp_path: Path) -> None:
    talk, fresh = Conversation(reader(tokenizer)), Conversation(reader(tokenizer))
    path = tmp_path / "memory"
    Conversation(reader(tokenizer)).respond(f"/save {path}")
    talk.respond(FACT)
    talk.respond("ba ce is")
    said = list(talk.context)
    assert "no memory file" in str(talk.respond(f"/load {path}.not"))
    assert talk.context == said  # nothing was replaced
    talk.respond(f"/load {path}")
    fresh.respond(f"/load {path}")
    assert talk.ask("ba ce is") == fresh.ask("ba ce is")
    assert talk.context == fresh.context  # all that an answer is made from, beside the memory


def test_what_is_forgotten_while_one_talks_was_never_told(tokenizer: Any) -> None:
    talk, fresh = Conversation(reader(tokenizer)), Conversation(reader(tokenizer))
    for line in (FACT, "ba ce is"):
        talk.respond(line)  # both are in the context now, the answer too
    assert "di fo gu" in str(talk.respond("ba ce is"))
    talk.respond("/forget 0")
    for question in ("ba ce is", "Who is ba ce?", "di"):
        assert talk.ask(question) == fresh.ask(question)
    assert talk.context == fresh.context


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/forgte 1", "no command /forgte: /help lists them. Did you mean 'forget'?"),
        ("/", "no command /: /help lists them."),
        ("/forget", "/forget takes ids"),
        ("/forget x", "/forget takes ids"),
        ("/forget 7", "no record 7"),
        ("/save", "/save takes the path"),
        ("/load nothing", "no memory file at nothing"),
        ("/save .", "is a directory"),
        ("/save a\0b", "null byte"),
        (f"/forget {'9' * 5000}", "limit"),
    ],
)
def test_mistakes_do_not_end_a_conversation(tokenizer: Any, line: str, message: str) -> None:
    talk = Conversation(reader(tokenizer))
    reply = str(talk.respond(line))
    assert reply.startswith("error: ")
    assert message in reply


def test_a_long_line_is_asked_by_its_end(tokenizer: Any) -> None:
    talk = Conversation(reader(tokenizer))
    talk.tell(FACT)
    assert talk.ask("fo " * 500 + "ba ce is").text == "di fo gu."


def test_a_memory_without_records_is_told_and_compared_but_cannot_be_listed(tokenizer: Any) -> None:
    model = build(tokenizer, "stm")
    talk = Conversation(model)
    assert talk.respond("ba ce is") == talk.respond("ba ce is")
    assert talk.respond(FACT) == "[told to memory]"
    talk.respond("/clear")
    assert talk.context == []
    state = model.new_context(model.absorb(torch.tensor([model.encode_text(FACT)])))
    expected = model.memory["stm"][0].filled(state.memory["stm"][0])
    assert talk.state is not None
    assert torch.equal(model.memory["stm"][0].filled(talk.state.memory["stm"][0]), expected)
    assert "without memory" in str(talk.respond("ba ce is"))
    assert str(talk.respond("/memory")).startswith("error: list_memory: no memory of this model keeps records")


def test_a_model_that_has_learned_to_chat_is_asked_as_in_a_chat(tokenizer: Any, monkeypatch: Any) -> None:
    model, heard = build(tokenizer, "stm"), []

    def chat(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        heard.append([(message["role"], message["content"]) for message in messages] + [add_generation_prompt])
        return " ".join(message["content"] for message in messages)

    monkeypatch.setattr(model, "chat", chat)
    model.chat_template, model.ends = "some", [tokenizer.encode(" gu")[0]]
    talk = Conversation(model)
    talk.tell("ba ce is.")
    talk.tell("di fo gu.")
    answer = talk.ask("Who is bad ?")
    told = "ba ce is.\ndi fo gu."
    assert heard == [
        [("user", "ba ce is."), False],
        [("user", "di fo gu."), False],
        [("user", f"{told}\nWho is bad ?"), True],
    ]
    assert "gu" not in answer.text.split()
    talk.ask("ba ?")
    assert [("user", f"{told}\nWho is bad ?"), ("assistant", answer.text), ("user", "ba ?"), True] in heard
    talk.respond("/clear")
    talk.ask("ba ?")
    assert heard[-1] == [("user", "ba ?"), True]


def test_a_model_without_memory_is_refused(tokenizer: Any) -> None:
    model = build(tokenizer, "stm")
    model.memory = torch.nn.ModuleDict()
    with pytest.raises(ConfigError, match="the model has no memory"):
        Conversation(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": None}, "neither is given"),
        ({"checkpoint": "run", "model": {"_target_": "memlm.models.lmcode.LMCode"}}, "both are given"),
        (
            {"checkpoint": None, "model": {"_target_": "memlm.models.lmcode.LMCode"}},
            "says nothing before it is trained",
        ),
    ],
)
def test_with_which_model_to_talk_has_to_be_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat.main({"trust": [], "device": "cpu", "recall": 0, **settings})


def test_the_script_talks_through_a_pipe(tokenizer: Any, monkeypatch: Any, capsys: Any) -> None:
    typed = f"{FACT}\n/clear\nba ce is\nbad \udcff byte\n/quit\nnever reached\n".encode(errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    monkeypatch.setattr("memlm.checkpoint.load", lambda path, trust: {"run": reader(tokenizer)}[path])
    from omegaconf import OmegaConf

    chat.main(OmegaConf.create({"checkpoint": "run", "trust": [], "device": "cpu", "recall": 0}))
    said = capsys.readouterr().out
    assert "> ba ce is\ndi fo gu.\n  [read with weight" in said
    assert "bad \ufffd byte" in said
    assert "never reached" not in said


def test_the_script_ends_where_nothing_can_be_typed(tokenizer: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert list(chat.lines()) == []


def test_what_a_question_finds_is_read_again_before_it(tokenizer: Any) -> None:
    model = reader(tokenizer)
    with torch.no_grad():
        model.memory["ltm"][0].to_output.weight.zero_()  # reads find records, and add nothing
    talk = Conversation(model, recall=1)
    assert "memory is empty" in str(talk.respond("ba ce"))
    talk.tell("fo bad.")
    talk.tell(FACT)
    talk.clear()
    prompts: list[list[int]] = []
    stream = model.stream
    model.stream = lambda ids, *rest, **more: prompts.append(ids[0].tolist()) or stream(ids, *rest, **more)
    answer = talk.ask("ba ce is")
    assert [record.text for record in answer.again] == [FACT]
    assert prompts == [model.encode_text(FACT) + model.encode_text("ba ce is"), model.encode_text("ba ce is")]
    assert talk.context[: len(prompts[1])] == prompts[1]  # what was found is not said
    assert "read again: record 1: 'ba ce is di fo gu.'" in str(talk.respond("ba ce is"))


def test_records_are_read_again_only_where_some_are_kept(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="recall must be a number of records, 0 for none, got -1"):
        Conversation(reader(tokenizer), recall=-1)
    with pytest.raises(ConfigError, match=r"no memory of this model keeps any \(memory: stm\)"):
        Conversation(build(tokenizer, "stm"), recall=2)


def test_what_fits_a_question_as_a_whole_comes_before_what_has_one_of_its_words(tokenizer: Any) -> None:
    model = reader(tokenizer)
    for text in ("gu bad.", "ba ce di is.", "ba ce di fo.", "byte byte."):
        model.store_experience(text)
    ids = model.encode_text("gu ba ce di")  # one has gu alone, two share each of the others
    assert model.recalled(ids)[0].text == "gu bad."
    assert {record.text for record in model.recalled(ids, top_k=2, summed=True)} == {"ba ce di is.", "ba ce di fo."}
    ranked = [record.id for record in model.recalled(ids, top_k=3, summed=True)]
    assert ranked[-1] == 0
    assert [record.id for record in found_for(model, "gu ba ce di", 3)] == ranked[::-1]  # the best right before it
