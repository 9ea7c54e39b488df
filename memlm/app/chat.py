"""Talk with a model and its memory: `python scripts/chat.py checkpoint=RUN`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from memlm.app.cli import cli
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


@cli("chat")
def main(config: Mapping[str, Any]) -> None:
    """Answer line after line."""
    from memlm.checkpoint import load, place
    from memlm.store.conversation import HELP, Conversation

    model: Any = place(load(config["checkpoint"], trust=config["trust"]), config["device"])
    conversation = Conversation(model)
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
