"""What every experiment shares: its result, intervals, figure style, terminal table and the one place that writes.

`emit` is the only function here that touches files or loggers. `style`, `PALETTE` and `wilson` come from
`memlm.analysis.figures` and are offered here so that an experiment imports from one place.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from memlm.analysis.figures import PALETTE, style, wilson
from memlm.config import ConfigError
from memlm.files import atomic_file
from memlm.printed import printable

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

__all__ = [
    "ALONE",
    "PALETTE",
    "Result",
    "Share",
    "check_settings",
    "emit",
    "evaluating",
    "mean_interval",
    "style",
    "table",
    "wilson",
]

Row = dict[str, Any]

# JSON has no NaN or infinity: they are stored under these words, which pandas and JavaScript read as numbers too.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# A number that stands in a table as text, in percent or not.
_WRITTEN_OUT = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)? ?%?")

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, eq=False)
class Result:
    """What an experiment found. Plain values only, so that it can be stored as JSON.

    Numpy and torch scalars become Python numbers, tuples become lists; two results are equal when their stored forms
    are (so NaN equals NaN).

    Attributes:
        name: Name of the experiment; prefixes what a logger shows.
        metrics: Metric name -> value, e.g. "exact_match/on".
        rows: One dict of scalars per measured item, holding what identifies the item, the condition and the outcome,
            e.g. {"condition": "on", "document": 0, "fact": 3, "distance": 4100, "correct": True}.
        metadata: What was run: seed, n, settings.

    Raises:
        ValueError: If a value is no plain value, with the place where it stands.
    """

    name: str
    metrics: Mapping[str, float]
    rows: tuple[Row, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name is {self.name!r}; expected a text")
        for part in ("metrics", "metadata"):
            if not isinstance(getattr(self, part), Mapping):
                raise ValueError(f"{part} is a {type(getattr(self, part)).__name__}; expected a dict")
        metrics = _plain(self.metrics, "metrics")
        for key, value in metrics.items():
            if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > sys.float_info.max):
                raise ValueError(f"metrics[{key!r}] is {value!r:.80}; expected a number (NaN where there is none)")
        rows = tuple(_plain(row, f"rows[{i}]") for i, row in enumerate(self.rows))
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"rows[{i}] is a {type(row).__name__}; expected a dict")
            for key, value in row.items():
                if isinstance(value, dict | list):
                    raise ValueError(f"rows[{i}][{key!r}] is a {type(value).__name__}; expected one number or text")
        object.__setattr__(self, "metrics", {key: float(value) for key, value in metrics.items()})
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "metadata", _plain(self.metadata, "metadata"))

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Result) else NotImplemented

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for strict JSON; NaN and infinities become "NaN", "Infinity", "-Infinity"."""
        return {
            "name": self.name,
            "metrics": _encode(self.metrics),
            "rows": [_encode(row) for row in self.rows],
            "metadata": _encode(self.metadata),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Result":
        """Inverse of `to_dict`.

        Raises:
            ValueError: If keys are missing or unknown.
        """
        expected = {"name", "metrics", "rows", "metadata"}
        if set(data) != expected:
            missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
            raise ValueError(f"not a stored Result: missing keys {missing}, unknown keys {unknown}")
        if not isinstance(data["rows"], list):
            raise ValueError(f"rows is a {type(data['rows']).__name__}; expected a list")
        rows = tuple(_decode(row) for row in data["rows"])
        return cls(data["name"], _decode(data["metrics"]), rows, _decode(data["metadata"]))


@dataclass(frozen=True)
class Share:
    """The items of an experiment that fall to one of several processes, which all run it at the same time.

    Attributes:
        rank: Number of this process.
        n_rank: Number of processes.
    """

    rank: int = 0
    n_rank: int = 1

    @classmethod
    def here(cls) -> "Share":
        """That of this process."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def groups(self, n_item: int, size: int) -> list[range]:
        """Numbers of the items that are its own, at most ``size`` of them at a time."""
        begin, end = (n_item * rank // self.n_rank for rank in (self.rank, self.rank + 1))
        return [range(first, min(first + size, end)) for first in range(begin, end, size)]

    def join(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes, in their order. Every process has to ask."""
        if self.n_rank == 1:
            return rows
        from torch import distributed

        parts: list[Any] = [None] * self.n_rank
        distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]


ALONE = Share()


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % Student-t interval.

    Args:
        values: One value per seed.

    Returns:
        The mean and the half-width: mean ± half-width covers 95 %. The half-width of a single value is NaN. Beyond
        30 degrees of freedom the normal quantile 1.96 is used (up to 4 % too narrow).

    Raises:
        ValueError: If there are no values.
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("mean_interval got no values; expected one per seed")
    mean = math.fsum(values) / len(values)
    df = len(values) - 1
    if df == 0:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / df)
    quantile = _T95[df - 1] if df <= len(_T95) else 1.96
    return mean, quantile * deviation / math.sqrt(len(values))


def emit(
    result: Result,
    figures: Mapping[str, Figure | None],
    directory: str | os.PathLike[str],
    logger: "Logger | None" = None,
    step: int | None = None,
) -> list[Path]:
    """Writes a result and its figures, and shows them in Weights & Biases.

    Every file is written under a temporary name and then renamed, so an interrupted run leaves each old file whole.
    `result.json` is written last: when it is new, the others are. Call it on one rank only.

    Args:
        result: What was found.
        figures: File name without ending -> figure; None (nothing to draw) is skipped.
        directory: Where the files go; created when missing.
        logger: A Lightning `WandbLogger` also gets the rows as a table and the images, under `<result.name>/`. Other
            loggers are left alone: they hold no tables.
        step: Training step the result belongs to, for the x axis of the logger.

    Returns:
        Paths of the written files: one PNG (150 dpi) per figure, rows.csv, result.json.

    Raises:
        ValueError: If the name of a figure is no plain file name.
    """
    directory = Path(directory)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name in drawn:
        if not name or name.startswith(".") or any(char in name for char in '/\\:*?"<>|\0'):
            raise ValueError(f"{name!r} cannot name a figure; expected a plain file name without path or ending")
    columns = list(dict.fromkeys(column for row in result.rows for column in row))
    directory.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, figure in drawn.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
        images[name] = _write(directory / f"{name}.png", image.getvalue())
    written = list(images.values())
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.rows)
    written.append(_write(directory / "rows.csv", text.getvalue().encode()))
    document = json.dumps(result.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    written.append(_write(directory / "result.json", document.encode()))
    if logger is not None:
        _log(result, columns, images, logger, step)
    return written


def check_settings(settings: Any, least: Mapping[str, float]) -> None:
    """Check what the settings of many experiments have in common.

    Args:
        settings: Of an experiment, whose name is that of its module.
        least: By name of a setting, the least it may be; None is always right.

    Raises:
        ConfigError: If one is less, or so much that it would not end, ``facts_per_segment`` is not positive, or
            ``split`` is text of training.
    """
    name = type(settings).__module__.rpartition(".")[2]
    _check_most(name, vars(settings))
    for key, number in least.items():
        given = getattr(settings, key)
        if given is not None and given < number:
            raise ConfigError(f"{name}.{key} must be at least {number}, got {given}")
    if not getattr(settings, "facts_per_segment", 1) > 0:
        raise ConfigError(f"{name}.facts_per_segment must be positive, got {settings.facts_per_segment}")
    if getattr(settings, "split", "val") not in ("val", "test"):
        raise ConfigError(f"{name}.split must be 'val' or 'test', text the model never saw, got {settings.split!r}")


_MOST = 10**8  # of any number but a seed
_MOST_ITEMS = 10**4  # of what is told, asked or read one by one
_ITEMS = frozenset({"n_ask", "n_document", "n_fact", "n_probe", "n_question", "n_statement", "n_stored", "n_story"})
_MOST_TOKENS = 10**9  # in all documents
_SPEED = 10_000  # tokens that a small model reads in a second on a CPU, about


def _check_most(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse what could only run for ever."""
    for key, given in settings.items():
        most = 2**31 - 1 if key in ("seed", "seeds") else _MOST_ITEMS if key in _ITEMS else _MOST
        for number in given if isinstance(given, list | tuple) else [given]:
            if isinstance(number, int | float) and not abs(number) <= most:
                raise ConfigError(f"{name}.{key} must be at most {most:,}, got {number:,}")
    if "distance" in settings and "n_document" in settings:
        distance = settings["distance"]
        n_token = settings["n_document"] * (sum(distance) if isinstance(distance, list | tuple) else distance)
        if n_token > _MOST_TOKENS:
            raise ConfigError(
                f"{name} would read {n_token:,} tokens (n_document * distance) under each condition, about "
                f"{n_token / _SPEED / 86_400:,.1f} days at {_SPEED:,} tokens a second: lower one of them, so that they "
                f"are at most {_MOST_TOKENS:,}"
            )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; then every module is in the mode it was in."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]], title: str = "", width: int | None = None
) -> str:
    """A tidy text table to print: no colour codes, nothing cut off.

    Numbers, also those written out as "97.3 %", stand right and are never broken; text folds where the terminal is
    narrow. Piped into a file the table is as wide as it needs to be. A floating-point column has as many decimals as
    it needs, up to four.

    Args:
        columns: Column heads.
        rows: One sequence of cells, or one mapping from column to cell, per line; None shows as "-".
        title: Line above the table.
        width: Characters per line; by default the terminal's, or unlimited when the output is no terminal. A table
            whose numbers need more gets more.

    Returns:
        The table, without a final line break.

    Raises:
        ValueError: If a row has not one cell per column.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    cells: list[list[Any]] = []
    for i, row in enumerate(rows):
        line = [row.get(column) for column in columns] if isinstance(row, Mapping) else list(row)
        if len(line) != len(columns):
            raise ValueError(
                f"row {i} of the table has {len(line)} cells; expected {len(columns)}: {', '.join(columns)}"
            )
        cells.append([_scalar(cell) for cell in line])
    wide = "utf" in (sys.stdout.encoding or "").lower()
    grid = Table(box=box.SIMPLE_HEAD if wide else _ascii_box(), show_edge=False, pad_edge=False)
    texts = []
    for j, column in enumerate(map(printable, columns)):
        values = [line[j] for line in cells]
        numeric = any(_is_number(value) or _WRITTEN_OUT.fullmatch(str(value)) for value in values)
        texts.append(_texts(values))
        words = [column, *texts[-1]] if numeric else [word for text in (column, *texts[-1]) for word in text.split()]
        grid.add_column(
            Text(column),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
            min_width=max(map(cell_len, words), default=0)
            if numeric
            else min(24, max(map(cell_len, words), default=0)),
        )
    for i in range(len(cells)):
        grid.add_row(*(Text(text[i]) for text in texts))
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    # Measured on a console that never limits, else the need would be cut to that console's own width.
    console = Console(width=10**6, file=io.StringIO(), color_system=None, force_terminal=False, legacy_windows=False)
    need = Measurement.get(console, console.options, grid)
    grid.width = min(max(width, need.minimum), need.maximum)
    console.print(grid, soft_wrap=False)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    return "\n".join(([printable(title)] if title else []) + lines).rstrip("\n")


def _plain(value: Any, where: str) -> Any:
    """The value as plain Python data; mappings become dicts, sequences lists."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; expected text, as JSON has no other keys")
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    value = _scalar(value)
    if isinstance(value, str) and value in _NOT_FINITE:
        raise ValueError(f"{where} is the text {value!r}, which stands for a number in a stored Result; use float(...)")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}; expected a number, text, None, or lists and dicts of those")


def _scalar(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; everything else unchanged."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # numpy's text and enumerations are subclasses
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _encode(value: Any) -> Any:
    """Plain data -> strict JSON data."""
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    """Inverse of `_encode`."""
    if isinstance(value, Mapping):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _write(path: Path, data: bytes) -> Path:
    with atomic_file(path) as file:
        file.write(data)
    return path


def _log(
    result: Result, columns: Sequence[str], images: Mapping[str, Path], logger: "Logger", step: int | None
) -> None:
    """Sends the rows and the written images to Weights & Biases; both imports are slow, hence here."""
    from lightning.pytorch.loggers import WandbLogger

    if not isinstance(logger, WandbLogger):
        return
    import wandb

    record: dict[str, Any] = {f"{result.name}/{name}": value for name, value in result.metrics.items()}
    record |= {f"{result.name}/{name}": wandb.Image(str(path)) for name, path in images.items()}
    if result.rows:
        data = [[row.get(column) for column in columns] for row in result.rows]
        record[f"{result.name}/rows"] = wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
    if not record:
        return
    if step is not None:
        record["trainer/global_step"] = step  # the x axis that WandbLogger itself defines
    logger.experiment.log(record)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(values: Sequence[Any]) -> list[str]:
    """The cells of one column as text, floats with the same number of decimals."""
    floats = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    small = any(value != 0 and abs(value) < 1e-3 for value in floats)  # four decimals would leave one digit or none
    large = any(abs(value) >= 1e9 for value in floats)
    decimals = max((len(f"{value:.4f}".rstrip("0").partition(".")[2]) for value in floats), default=0)

    def text(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int):
            return f"{value:,}"
        if isinstance(value, float):
            if not math.isfinite(value):
                return str(value)
            return f"{value:.4g}" if small or large else f"{value:,.{decimals}f}"
        return printable(value)

    return [text(value) for value in values]


def _ascii_box() -> Any:
    """Heads underlined with dashes, for outputs that cannot show line-drawing characters."""
    from rich.box import Box

    return Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
