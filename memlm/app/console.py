"""The command ``memlm``: `memlm train memory=ltm`, `memlm evaluate checkpoint=RUN`, ..."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from memlm.config import did_you_mean
from memlm.version import __version__

COMMANDS = {
    "train": "train a model with a memory, and show what the memory remembers",
    "watch": "a run as a web page while it trains",
    "evaluate": "measure what the memory of a trained model remembers",
    "compare": "put runs side by side",
    "report": "runs as one web page",
    "results": "keep what runs found, and make the tables of pages of it",
    "generate": "continue a text",
    "chat": "talk with a model and its memory",
    "export": "write a trained model as safetensors and JSON",
    "lm_eval": "measure with lm-evaluation-harness",
    "check": "judge a memory by the laws, also one outside of memlm",
    "benchmark": "measure speed",
    "search": "search for good settings",
}
"""The commands, each a module of `memlm.app` with a function ``start``, and what they do."""

_WITHOUT_HYDRA = (
    "watch",
    "compare",
    "report",
    "results",
    "lm_eval",
)  # their arguments are paths, which a shell completes itself
_USAGE = (
    "usage: memlm COMMAND [arguments]\n\n"
    + "".join(f"  {name:<10} {what}\n" for name, what in COMMANDS.items())
    + "\nmemlm COMMAND --help tells more. "
    'Completion in bash: eval "$(memlm -sc install=bash)"'
)


def main() -> None:
    """Run the command that the first argument names.

    Raises:
        SystemExit: With code 2 if there is no such command.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(_USAGE)
    elif name == "--version":
        print(f"memlm {__version__}")
    elif name in ("-sc", "--shell-completion"):
        _complete(sys.argv[2:])
    elif name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS)
        print(f"error: there is no command {name!r}.{hint} There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.path.append("")  # a memory of one's own may lie where the command is given
        module = import_module(f"memlm.app.{name}")
        # What starts the command again in other processes, as Lightning does, finds it by the first word.
        sys.argv = [str(module.__file__), *sys.argv[2:]]
        module.start()


def _complete(arguments: list[str]) -> None:
    """Do what Hydra's completion does, for a command line whose first word is a command."""
    line = os.environ.get("COMP_LINE", "").split(" ")
    name = "train"  # any command of Hydra's can install its completion
    if arguments and arguments[0].startswith("query"):
        if len(line) < 3:
            print(*(word for word in COMMANDS if word.startswith(line[-1] if len(line) > 1 else "")))
            return
        name = line[1]
        if name not in COMMANDS or name in _WITHOUT_HYDRA:
            return
        os.environ["COMP_LINE"] = " ".join([line[0], *line[2:]])
    sys.argv = ["memlm", "-sc", *arguments]
    import_module(f"memlm.app.{name}").start()
