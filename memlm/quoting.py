"""Settings that are text, quoted so that Hydra takes them as they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from hydra._internal.utils import get_args_parser  # the flags of a Hydra command line, which have no public home

_MAY_BE_NONE = ("experiment", "logger")  # groups of which any number is chosen


def nothing(argument: str) -> str:
    """Choose nothing of a group by null too, which Hydra knows as an empty list alone."""
    group, _, value = argument.partition("=")
    return f"{group}=[]" if value == "null" and group in _MAY_BE_NONE else argument


# Settings that are text, whatever it looks like: Hydra never reads what is given for them.
_VERBATIM = ("prompt",)


# Names and paths: text, but null, lists, sweeps, references and quotes are Hydra's.
_TEXTS = (
    "checkpoint", "resume", "output", "push", "out", "name", "cache", "prompt_file", "stop_strings", "data.path",
    "data.name", "data.corpus.path", "data.tokenizer.path", "paths.root", "paths.cache_dir", "paths.run_dir",
    "hydra.run.dir", "hydra.sweep.dir", "logger.wandb.project", "logger.wandb.name", "logger.wandb.group",
)  # fmt: skip


_HYDRAS_OWN = re.compile(
    r"""null | [\[{].*[\]}] | (choice|range|interval|glob|shuffle|sort|tag|str|int|float|bool|json_str)\(.*\) | .*\$\{.*
    | (?P<quote>['"]) ((?!(?P=quote))[^\\] | \\.)* (?P=quote) (,.*)?""",
    re.VERBOSE | re.DOTALL,
)


def quote_texts(arguments: Sequence[str]) -> list[str]:
    """Put quotes around the texts of a command line, so that Hydra takes them as they are.

    Prompts are text throughout. Names and paths may be `null`, lists, sweeps, references, or have quotes already.

    Args:
        arguments: The arguments without the name of the program.
    """
    flags, _ = get_args_parser().parse_known_args([a for a in arguments if not a.startswith("prompt=")])
    several = flags.multirun or any(a.upper() == "HYDRA.MODE=MULTIRUN" for a in arguments)
    return [_quoted(argument, several) for argument in arguments]


def _quoted(argument: str, several: bool) -> str:
    name, equals, value = argument.partition("=")
    key = name.lstrip("+")
    if not equals or key not in (*_VERBATIM, *_TEXTS):
        return argument
    if key in _VERBATIM:
        return f"{name}={quoted(value)}"
    if _HYDRAS_OWN.fullmatch(value) and not os.path.exists(value):
        return argument
    return f"{name}=" + ",".join(map(quoted, _paths(value) if several else [value]))


def quoted(text: str) -> str:
    """Return a text as a value of an override, which Hydra and OmegaConf take as it is."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # refers to nothing
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _paths(value: str) -> Iterator[str]:
    """Split at commas, but not at those of a path that exists."""
    parts = value.split(",")
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:n]))), 1)
        yield ",".join(parts[:n]).strip()
        parts = parts[n:]
