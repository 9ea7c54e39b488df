"""Continue a text with a trained model: `memlm generate checkpoint=RUN prompt="Once upon a time"`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from memlm.app.cli import cli
from memlm.config import ConfigError
from memlm.printed import printable

_GIVE = "give the beginning of a text, such as prompt='Once upon a time', prompt_file=FILE, or a pipe"


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text to continue: the prompt, a file, or what comes through a pipe, both without a last line break.

    Raises:
        ConfigError: If there is none, or two, or it is no text.
    """
    if prompt_file is not None and prompt is not None:
        raise ConfigError("prompt and prompt_file are both given: leave one of them out.")
    if prompt is not None and prompt != "-":
        text, where = prompt, "prompt"
    else:
        where = "standard input" if prompt_file is None else f"prompt_file={prompt_file}"
        text = _read(prompt_file, where).removesuffix("\n")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are no text
        raise ConfigError(f"{where} is not valid UTF-8: {error}") from error
    if not text:
        raise ConfigError(f"{where} is empty: {_GIVE}.")
    return text


def _read(file: str | None, where: str) -> str:
    if file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError(f"there is no prompt: {_GIVE}.")
        content = sys.stdin.buffer.read()
    else:
        with open(file, "rb") as stream:
            content = stream.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not valid UTF-8: {error}") from error


@cli("generate")
def main(settings: Mapping[str, Any]) -> str:
    """Print the prompt and what the model makes of it, as it comes; returns both.

    Of several continuations each is printed when all have ended.
    """
    prompt = read_prompt(settings["prompt"], settings["prompt_file"])
    import torch

    from memlm.checkpoint import load, place
    from memlm.data.growing import GrowingText
    from memlm.models.sampling import Ends, Sampling

    model: Any = load(settings["checkpoint"], trust=settings["trust"])
    place(model, settings["device"])
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise ConfigError(f"the tokenizer of the model makes nothing of prompt={prompt!r}: give other text.")
    torch.manual_seed(settings["seed"])
    how = Sampling(**{name: settings[name] for name in Sampling._fields if name in settings})
    given = torch.tensor([ids], device=next(model.parameters()).device)
    steps = model.stream(given, how, compile=settings["compile"])
    if how.num_return_sequences == 1:
        growing = GrowingText(model.tokenizer)
        pieces = [_show(growing.add(ids))]
        pieces += [_show(growing.add(tokens.tolist())) for tokens in steps]
        pieces.append(_show(growing.end()))
        print()
        return "".join(pieces)
    new = list(steps)
    ends = Ends(how, model.tokenizer, given.device)
    texts = []
    for row in torch.stack(new, dim=1) if new else given.new_empty(how.num_return_sequences, 0):
        n = next((n for n in range(1, len(row) + 1) if ends and ends.ended(row[None, :n])), len(row))
        texts.append(model.tokenizer.decode(ids + row[:n].tolist()))
    text = _show("\n---\n".join(texts))
    print()
    return text


def _show(text: str) -> str:
    """Print a piece of text; returns it."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)
    return text


def start() -> None:
    """What the command line runs."""
    main()


if __name__ == "__main__":
    start()
