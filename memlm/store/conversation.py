"""A conversation with a model's memory: sentences are told and stored, anything else is asked and continued.

A memory that keeps records gets what is told as such. Any other one reads it, in a context of its own that is closed at
once, and goes along as a state. A model that has learned to chat is asked as in a chat.

With ``recall`` the records that memory reads most for a question are read again, as text, right before it: a model
that was never trained with its memory then answers from what it finds (as MemoRAG does, 2409.05591).

Every answer comes with what was read for it, where the memory can tell, and with the answer that the model gives when
memory is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from memlm.config import ConfigError, did_you_mean
from memlm.memory.records import RecordKeeper
from memlm.models.sampling import Sampling
from memlm.models.segments import SegmentModel
from memlm.models.state import ModelState
from memlm.store.kept import at_rest
from memlm.store.remembered import READ, Remembered

_ANSWER, _ANSWER_IN_CHAT = 24, 64  # most tokens of an answer
_END = re.compile(r"[.!?](?=\s|$)|(?<=\S)\s*\n")
_FROM_CONTEXT = (
    "Context:\n{context}\n\nQuestion: {question}\nAnswer:"  # docs/experiments/told.md: chosen on other sentences
)
_SHORT = 120  # characters of a record that are shown whole
HELP = """\
A sentence (it ends in . or !) is told: it is stored. Anything else is asked: a question, or a sentence to complete.
  /clear           forget what was said in this context; memory stays
  /memory          the latest records
  /memory QUERY    the records that are read for a text
  /forget ID ...   forget records
  /save PATH       write the memory to a file
  /load PATH       replace the memory by that of a file
  /help            this
  /quit            end; what was not saved is gone"""


class Answer(NamedTuple):
    """What the model said.

    Attributes:
        text: The answer, up to the end of its sentence.
        read: The record most read for it; None if memory is empty, or keeps no records.
        without: The answer when memory is not read.
        again: Records that were read again, as text; the one that the question reads most comes last.
    """

    text: str
    read: Remembered | None
    without: str
    again: tuple[Remembered, ...] = ()


def keeps_records(model: SegmentModel) -> bool:
    """Whether a memory of a model keeps records."""
    return any(isinstance(modules[0], RecordKeeper) for modules in model.memory.values())


def check_recall(model: SegmentModel, recall: int) -> None:
    """Refuse to read records again that no memory keeps.

    Raises:
        ConfigError: If it cannot be done.
    """
    if recall < 0:
        raise ConfigError(f"recall must be a number of records, 0 for none, got {recall}")
    if recall and not keeps_records(model):
        raise ConfigError(
            f"recall={recall} reads records again, and no memory of this model keeps any (memory: "
            f"{', '.join(model.memory) or 'none'}): take one that does, such as memory=ltm"
        )


def found_for(model: SegmentModel, question: str, n: int) -> list[Remembered]:
    """The ``n`` records that a question as a whole reads most; the one that it reads most comes last."""
    return model.recalled(model.encode_text(question), top_k=n, summed=True)[::-1]


def question_ids(
    model: SegmentModel, question: str, again: Sequence[str] = (), said: Sequence[dict[str, str]] = ()
) -> list[int]:
    """Token ids of a question that is asked right after some texts.

    Args:
        model: The model. One that has learned to chat gets all of it as what the user says.
        question: What is asked.
        again: Texts that are read before it. In a chat they are called its context.
        said: Messages before these; of a chat only.
    """
    if model.chat_template is None:
        return [token for text in (*again, question) for token in model.encode_text(text)]
    content = _FROM_CONTEXT.format(context="\n".join(again), question=question) if again else question
    return _chat_ids(model, [*said, {"role": "user", "content": content}], True)


def said(model: SegmentModel, ids: Sequence[int]) -> str:
    """The text of an answer, up to what ends it."""
    return _text(model, ids).strip()


def _text(model: SegmentModel, ids: Sequence[int]) -> str:
    end = next((i for i, token in enumerate(ids) if token in model.ends), len(ids))
    return model.tokenizer.decode(ids[:end])


def _chat_ids(model: SegmentModel, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    """Tokens of a chat that begins with the user; what one says in turn is one message, as templates want it."""
    turns: list[dict[str, str]] = []
    for message in messages:
        if turns and turns[-1]["role"] == message["role"]:
            turns[-1] = {**message, "content": f"{turns[-1]['content']}\n{message['content']}"}
        elif turns or message["role"] == "user":
            turns.append(message)
    return model.tokenizer.encode(model.chat(turns, add_generation_prompt))


class Conversation:
    """Turns of a conversation.

    Args:
        model: A model with a memory.
        recall: Records that a question finds and that are read again, as text, before it is answered.

    Attributes:
        context: Token ids of what was said since the context was cleared. What is told also goes into the memory.
        said: The same as messages, of a model that has learned to chat.
        state: What a memory that keeps no records knows; None for nothing.

    Raises:
        ConfigError: If the model has no memory, or records are to be read again of one that keeps none.
    """

    def __init__(self, model: SegmentModel, recall: int = 0) -> None:
        if not model.memory:
            raise ConfigError("there is nothing to talk with: the model has no memory (memory=none)")
        check_recall(model, recall)
        self.recall = recall
        self.keeps = keeps_records(model)
        self.model, self.chats = model, model.chat_template is not None
        self.context: list[int] = []
        self.said: list[dict[str, str]] = []
        self.state: ModelState | None = None

    def tell(self, text: str) -> list[int]:
        """Store a text; returns the ids of its records, none where the memory keeps none."""
        told = {"role": "user", "content": text}
        ids: list[int] = []
        if self.keeps:
            ids = self.model.store_experience(text)
        else:
            tokens = _chat_ids(self.model, [told], False) if self.chats else self._encode(text)
            with at_rest(self.model):
                state = self.model.absorb(torch.tensor([tokens], device=self._device), self.state)
                self.state = self.model.new_context(state)
        self.context += self._encode(text)
        self.said.append(told)
        return ids

    def ask(self, text: str, show: Callable[[str], None] | None = None) -> Answer:
        """Have a text answered, greedily, to the end of a sentence, or of a turn in a chat. Nothing is stored.

        Args:
            text: What is asked.
            show: Gets the answer piece by piece, as it comes.
        """
        room = self.model.segment_len - 1  # one segment, so that what is shown as read is what the answer read
        n_answer = max(min(_ANSWER_IN_CHAT if self.chats else _ANSWER, room // 2), 1)
        again = tuple(found_for(self.model, text, self.recall)) if self.recall else ()
        prompt = self._prompt(text, max(room - n_answer, 1), [record.text for record in again])
        bare = self._prompt(text, max(room - n_answer, 1)) if again else prompt
        answer = self._continue(prompt, n_answer, True, show)
        without = self._continue(bare, n_answer, False)
        hits = again[::-1]
        if self.keeps and not self.recall:
            hits = tuple(self.model.recalled([*prompt, *answer][:-1], first=len(prompt) - 1))
        told = said(self.model, answer)
        self.context += self._encode(text) + answer
        self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": told}]
        return Answer(told, hits[0] if hits else None, said(self.model, without), again)

    def clear(self) -> None:
        """Forget what was said; memory stays."""
        self.context, self.said = [], []

    def _prompt(self, text: str, room: int, again: Sequence[str] = ()) -> list[int]:
        """What an answer is made from: the end of what was said that fits, what is read again, the question."""
        if not self.chats:
            return (self.context + question_ids(self.model, text, again))[-room:]
        kept = self.said
        while True:
            ids = question_ids(self.model, text, again, kept)
            if len(ids) <= room or not kept:
                return ids[-room:]
            kept = kept[1:]

    @property
    def _device(self) -> torch.device:
        return self.model.head_weight.device

    def respond(self, line: str, show: Callable[[str], None] | None = None) -> str | None:
        """What to show for a line that was typed; None to end.

        Args:
            line: The line.
            show: Gets an answer piece by piece, as it comes; what is returned is then shown after it.
        """
        line = line.strip("\ufeff").strip()
        try:
            if line.startswith("/"):
                name, *rest = line[1:].split(maxsplit=1) or [""]
                return self._command(name, "".join(rest))
            if not line:
                return ""
            if line.endswith((".", "!")):
                ids = self.tell(line)
                return _stored(ids) if self.keeps else "[told to memory]"
            answer = self.ask(line, show)
            note = _recalled(answer) if self.recall else _noted(answer) if self.keeps else _compared(answer)
            return note if show else answer.text + note
        except (OSError, ValueError) as error:  # such as of paths; ConfigError is one
            return f"error: {error}"

    def _command(self, name: str, rest: str) -> str | None:
        def forget() -> str:
            if not all(part.isdecimal() for part in rest.split()) or not rest:
                raise ConfigError("/forget takes ids of records, such as /forget 3; /memory shows them")
            gone = self.model.forget([int(part) for part in rest.split()])
            self.clear()  # it may have been said there
            return f"[forgotten: {_numbers(gone)}; the context was cleared]"

        def clear() -> str:
            self.clear()
            return "[context cleared]"

        def path(function: Callable[[str], None], done: str) -> str:
            if not rest:
                raise ConfigError(f"/{name} takes the path of a file")
            function(rest)
            return f"[{done} {rest}]"

        def load() -> str:
            done = path(self.model.load_memory, "memory replaced by that of")
            self.clear()  # what was said there is of the memory that is gone
            return f"{done[:-1]}; the context was cleared]"

        commands: dict[str, Callable[[], str | None]] = {
            "clear": clear,
            "memory": lambda: _listed(self.model.query_memory(rest) if rest else self.model.list_memory()),
            "forget": forget,
            "save": lambda: path(self.model.save_memory, "memory saved to"),
            "load": load,
            "help": lambda: HELP,
            "quit": lambda: None,
        }
        if name not in commands:
            raise ConfigError(f"there is no command /{name}: /help lists them.{did_you_mean(name, commands)}")
        return commands[name]()

    def _encode(self, text: str) -> list[int]:
        return self.model.encode_text(text)

    def _continue(self, prompt: list[int], n: int, read: bool, show: Callable[[str], None] | None = None) -> list[int]:
        """Tokens of the answer, up to the end of a sentence, or to what ends a turn of a chat."""
        ids = torch.tensor([prompt], device=self._device)
        how = Sampling(n, do_sample=False, eos_token_id=list(self.model.ends) or None)
        steps = self.model.stream(ids, how, self.state, read=read, write=False)
        new: list[int] = []
        shown = ""
        for tokens in steps:
            new += tokens.tolist()
            text = _text(self.model, new)
            ends = len(new) == n or new[-1] in self.model.ends
            ends = ends or (not self.chats and _END.search(text.lstrip()) is not None)
            said = text.strip() if ends else text.strip().rstrip("\ufffd")  # of a character that is not whole
            if show is not None:
                show(said[len(shown) :])
            shown = said
            if ends:
                break
        steps.close()
        return new


def _stored(ids: list[int]) -> str:
    return f"[stored: {_numbers(ids)}]" if ids else "[not stored: memory found nothing in it worth keeping]"


def _numbers(ids: list[int]) -> str:
    return f"record{'s' * (len(ids) != 1)} {', '.join(map(str, ids))}"


def _words(record: Remembered) -> str:
    return record.text if len(record.text) <= _SHORT else f"… {record.snippet} …"


def _noted(answer: Answer) -> str:
    read = answer.read
    if read is None or read.weight is None:
        note = "memory is empty: nothing was read"
    elif read.weight < READ:
        note = f"memory was not read (greatest weight {read.weight:.2f})"
    else:
        note = f"read with weight {read.weight:.2f} from record {read.id}: {_words(read)!r}"
        same = answer.without == answer.text
        note += "; the answer is the same without memory" if same else f"; without memory: {answer.without!r}"
    return f"\n  [{note}]"


def _recalled(answer: Answer) -> str:
    if not answer.again:
        return "\n  [memory is empty: nothing was read again]"
    told = "; ".join(f"record {record.id}: {_words(record)!r}" for record in answer.again)
    same = answer.without == answer.text
    note = "the answer is the same without memory" if same else f"without memory: {answer.without!r}"
    return f"\n  [read again: {told}; {note}]"


def _compared(answer: Answer) -> str:
    same = answer.without == answer.text
    return "\n  [the answer is the same without memory]" if same else f"\n  [without memory: {answer.without!r}]"


def _listed(records: list[Remembered]) -> str:
    def line(record: Remembered) -> str:
        asked = "" if record.weight is None else f"weight {record.weight:.2f}, similarity {record.similarity:.2f}, "
        merged = f", merged with {', '.join(map(str, record.origins))}" if record.origins else ""
        return f"  {record.id}: {_words(record)!r} ({asked}age {record.age}, used {record.uses}{merged})"

    return "\n".join(map(line, records)) or "[memory is empty]"
