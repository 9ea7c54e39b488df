"""Talk with a model and its memory: `memlm chat checkpoint=RUN`, or `model=pretrained model.path=DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from memlm.app.cli import cli
from memlm.config import ConfigError
from memlm.printed import printable


def lines() -> Iterator[str]:
    """What is typed, or comes through a pipe."""
    if sys.stdin is None:  # closed
        return
    if sys.stdin.isatty():
        import readline  # noqa: F401  # lines can then be edited

        while True:
            yield input("> ")
    stdin: Any = sys.stdin
    if hasattr(stdin, "reconfigure"):
        stdin.reconfigure(errors="replace")
    for line in stdin:
        print(f"> {line.rstrip()}")
        yield line


def _model(config: Mapping[str, Any]) -> Any:
    """The model of a checkpoint, or a pretrained one with a memory that is not trained.

    Raises:
        ConfigError: If it is said in neither way, or both, or the model would have to be trained.
    """
    from memlm.assemble import build_model, own_tokenizer, settled
    from memlm.checkpoint import load

    chosen = config.get("model") is not None
    if chosen == (config["checkpoint"] is not None):
        both = "both are given" if chosen else "neither is given"
        raise ConfigError(
            f"checkpoint=RUN says with which model to talk, or model=pretrained model.path=DIR memory=NAME: {both}"
        )
    if not chosen:
        return load(config["checkpoint"], trust=config["trust"])
    data = {"tokenizer": {"n_vocab": None}}
    whole = settled({"model": config["model"], "memory": config.get("memory") or {}, "data": data, "seed": 0})
    tokenizer = own_tokenizer(whole)
    if tokenizer is None:
        raise ConfigError("a model that is not pretrained says nothing before it is trained: give checkpoint=RUN")
    return build_model(whole, tokenizer).eval()


@cli("chat")
def main(config: Mapping[str, Any]) -> None:
    """Answer line after line."""
    from memlm.checkpoint import place
    from memlm.store.conversation import HELP, Conversation

    model: Any = place(_model(config), config["device"])
    conversation = Conversation(model, config["recall"])
    print(HELP)
    try:
        for line in lines():
            reply = conversation.respond(line, lambda piece: print(printable(piece), end="", flush=True))
            if reply is None:
                break
            print(printable(reply), flush=True)
    except (EOFError, KeyboardInterrupt):
        print()


def start() -> None:
    """What the command line runs."""
    main()


if __name__ == "__main__":
    start()
