"""The one place where a result is written and shown."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from memlm.files import atomic_file

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger
from memlm.evaluation.result import Result


def emit(
    result: Result,
    figures: Mapping[str, Figure | None],
    directory: str | os.PathLike[str],
    logger: Logger | None = None,
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


def _write(path: Path, data: bytes) -> Path:
    with atomic_file(path) as file:
        file.write(data)
    return path


def _log(result: Result, columns: Sequence[str], images: Mapping[str, Path], logger: Logger, step: int | None) -> None:
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
