"""Tables for the terminal."""

from __future__ import annotations

import io
import math
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memlm.evaluation.result import scalar
from memlm.printed import printable

# A number that stands in a table as text, in percent or not.
_WRITTEN_OUT = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)? ?%?")


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
        cells.append([scalar(cell) for cell in line])
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
