"""Measure speed: `memlm benchmark train [key=value ...]`, or another name of `configs/benchmark/`.

Each benchmark is a module of `benchmarks/`. What is measured and why is told in `docs/benchmarks/index.md`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.app.cli import cli
from memlm.app.errors import mistakes_told
from memlm.compose import config_dir
from memlm.config import ConfigError, check_settings, did_you_mean, schema_hints, validate
from memlm.schema import Benchmark

if TYPE_CHECKING:
    from memlm.evaluation.result import Result


def name_command(arguments: list[str]) -> list[str]:
    """Put ``benchmark=<name>`` in place of the name of a benchmark, the first word of the command line.

    Raises:
        ConfigError: If there is no such benchmark.
    """
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        return arguments
    name = arguments[0]
    names = sorted(path.stem for path in (config_dir() / "benchmark").glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"There is no benchmark {name!r}.{did_you_mean(name, names)} There are: {', '.join(names)}.")
    return [f"benchmark={name}", *arguments[1:]]


def check(config: Mapping[str, Any]) -> None:
    """Refuse settings that the benchmark does not take."""
    check_settings(config, Benchmark)
    for name, value in _settings(config).items():
        least, most = (0 if name in ("seed", "warmup") else 1), (1024 if name == "threads" else 10**9)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and not least <= number <= most:
                raise ConfigError(f"{name} must be in {least}..{most}, got {number}")
            if isinstance(number, float) and not 0 <= number <= most:
                raise ConfigError(f"{name} must be in 0..{most}, got {number}")


def run(config: Mapping[str, Any]) -> tuple[Result, str]:
    """Run the benchmark of a composed `configs/benchmark.yaml`.

    Returns:
        The result and the text to print.

    Raises:
        ConfigError: If the benchmark does not take the settings.
    """
    module = importlib.import_module(f"benchmarks.{config['benchmark']}")
    result = module.run(**_settings(config))
    return result, module.report(result)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the benchmark itself, as far as its annotations tell."""
    settings = {key: value for key, value in config.items() if key not in schema_hints(Benchmark)}
    validate({"_target_": f"benchmarks.{config['benchmark']}.run", **settings})
    return settings


@cli("benchmark", check)
def main(config: Mapping[str, Any]) -> None:
    """Measure, print, write."""
    result, text = run(config)
    print(text)
    from memlm.evaluation.emit import emit
    from memlm.evaluation.timings import REPORT

    written = emit(result, {}, config["out"])
    written.append(Path(config["out"]) / REPORT)
    written[-1].write_text(text + "\n", encoding="utf-8")
    print("\nWritten:", *(f"  {path}" for path in written), sep="\n")


def start() -> None:
    """What the command line runs."""
    with mistakes_told():
        sys.argv[1:] = name_command(sys.argv[1:])
    main()


if __name__ == "__main__":
    start()
