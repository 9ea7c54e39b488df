"""A run as one web page while it trains: where it stands, and curves of what it has logged so far."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from memlm.analysis.chart import Chart, Series, shown
from memlm.analysis.page import Chapter, Charts, Fact, Listings, Live, Status, render
from memlm.analysis.run_log import Column, Log
from memlm.analysis.style import CONTROLS
from memlm.config import ConfigError
from memlm.files import ERROR, open_regular
from memlm.printed import one_line
from memlm.training.amount import n_step, n_token
from memlm.training.logged import history_files
from memlm.training.marks import LOCK, finished_content, is_alive

QUIET = 30.0
"""Seconds without a process and without a line until a run counts as ended: it may train on another machine, or be
between its last number and `finished.json`."""

_N_SPEED = 5  # the last logged speeds, of which the median says how long the rest takes
_MOST_LINES = 6  # of a chart; of more layers the mean is shown
_CSV = "CSVLogger"
# Numbers of any memory that are shares and belong in one chart.
_SHARES = {"write_gate": "write gate", "read_gate": "read gate", "read_mass": "weight read from slots"}


class Standing(NamedTuple):
    """Where a run stands.

    Attributes:
        name: ``waiting`` (nothing is logged yet), ``training``, ``measuring``, ``finished`` or ``ended``.
        step: Optimizer steps that are logged.
        total: Steps planned; None if that is not known.
        told: The same as a sentence.
    """

    name: str
    step: int
    total: int | None
    told: str

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.name in ("finished", "ended")


class LiveRun:
    """A run whose directory is looked at again and again.

    Args:
        run: The directory.

    Attributes:
        run: See above.
        config: Settings of the run; empty if they are not there.
        log: What it has logged.

    Raises:
        ConfigError: If there is no run, or it logs no `metrics.csv`.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        refuse_other_than_run(run)
        self.config = _config(run)
        self.log = Log(lambda: history_files(run))
        if self.config and not history_files(run) and not _logs_csv(self.config.get("logger")):
            raise ConfigError(
                f"{run} keeps no metrics.csv, from which it could be watched: it was started without the logger csv; "
                "start it with logger=csv or logger=[csv,wandb]"
            )

    def look(self) -> Standing:
        """Read on, and say where the run stands.

        Raises:
            ConfigError: If its directory is gone.
        """
        if not self.run.is_dir():
            raise ConfigError(f"{self.run} is gone: it was removed, as a run is that ends before its first step")
        alive = is_alive(self.run)  # first: what is logged and written after it is seen
        finished = None if alive else finished_content(self.run)
        self.config = (finished or {}).get("config") or self.config or _config(self.run)
        self.log.read()
        step = 1 + max((column.steps[-1] for column in self.log.columns.values()), default=-1)
        total = self._total()
        of = f"step {step:,}" + (f" of {total:,}" if total is not None else "")
        if finished is not None:
            return Standing("finished", step, total, f"Finished: {of}; trained and measured.")
        if not alive and self._quiet():
            return Standing("ended", step, total, self._how_it_ended(of))
        if not self.log.columns:
            told = "Nothing is logged yet: text and model are made ready, then come the first steps."
            return Standing("waiting", step, total, told)
        if total is not None and step >= total:
            return Standing("measuring", step, total, f"All of its {total:,} steps are made; now it is measured.")
        return Standing("training", step, total, f"Training: {of}.")

    def page(self, standing: Standing, live: Live | None) -> str:
        """The page as HTML.

        Args:
            standing: What `look` said.
            live: If it will be written again.
        """
        now = datetime.now().astimezone()
        notes = [f"As of {now:%Y-%m-%d %H:%M:%S}."]
        if live is not None:
            notes = [f"As of {now:%Y-%m-%d %H:%M:%S}; looks again every {live.refresh} s."]
        elif standing.name == "finished":
            notes.append(f"Its results beside their controls: memlm report {self.run}")
        done = None if not standing.total else (min(standing.step, standing.total), standing.total)
        columns = self.log.columns
        chapters = [Chapter("Where it stands", [standing.told], [Status("Now", self._facts(standing), done, notes)])]
        if charts := list(_charts(columns)):
            chapters.append(Chapter("Curves", [], [Charts("By step of training", charts, _remarks(columns))]))
        if self.config:
            text = yaml.safe_dump(self.config, sort_keys=False)
            chapters.append(Chapter("Settings", [], [Listings("As it was started", [("All settings", text)])]))
        return render(one_line(self.config.get("name") or self.run), chapters, live=live)

    def _total(self) -> int | None:
        try:
            return n_step(self.config)
        except (KeyError, TypeError, ValueError, ArithmeticError):  # of settings that are not those of a run
            return None

    def _quiet(self) -> bool:
        """Whether nothing in the directory was touched for a while."""
        times = []
        for path in (*history_files(self.run), self.run / LOCK, self.run / ".hydra" / "config.yaml"):
            try:
                times.append(os.stat(path).st_mtime)
            except OSError:
                continue
        begun = (self.run / LOCK).exists() or history_files(self.run)
        return bool(begun) and time.time() - max(times, default=0.0) > QUIET

    def _how_it_ended(self, of: str) -> str:
        try:
            with open_regular(self.run / ERROR) as file:
                why = one_line(file.readline().decode("utf-8", errors="replace"))
            return f"Failed at {of}: {why}"
        except (OSError, ConfigError):
            return (
                f"Stopped or killed at {of}: no process of this machine trains it, and it is not finished. "
                f"The same command with resume={self.run} goes on, if there is a checkpoint."
            )

    def _facts(self, standing: Standing) -> list[Fact]:
        """The numbers that are to be seen first."""
        columns = self.log.columns
        total = f"of {standing.total:,}" if standing.total is not None else ""
        facts = [Fact("step", f"{standing.step:,}", total)]
        speed = _last(columns, "train/tokens_per_second", _N_SPEED)
        if standing.name == "training" and (left := self._seconds_left(standing, speed)) is not None:
            facts.append(Fact("training left", _duration(left), "without validation and measuring"))
        if (loss := _last(columns, "train/loss")) is not None:
            facts.append(Fact("training loss", shown(loss), "nats, answers weigh more"))
        if (nll := _last(columns, "val/nll")) is not None:
            perplexity = math.exp(nll) if nll < 700 else math.inf
            facts.append(Fact("held-out perplexity", shown(perplexity), f"{shown(nll)} nats per token"))
        if (on := _last(columns, "recall/on")) is not None:
            controls = {label: _last(columns, f"recall/{name}") for name, label in CONTROLS.items()}
            told = [f"{label} {100 * rate:.3g} %" for label, rate in controls.items() if rate is not None]
            if told:  # a rate without a control claims nothing
                facts.append(Fact("facts recalled", f"{100 * on:.3g} %", "; ".join(told)))
        if speed is not None:
            facts.append(Fact("speed", f"{speed:,.0f}", "tokens per second"))
        if (n_byte := _last(columns, "memory/state_bytes")) is not None:
            facts.append(Fact("memory", f"{n_byte / 1e6:,.3g} MB", "of the rows of a batch, full or not"))
        return facts

    def _seconds_left(self, standing: Standing, speed: float | None) -> float | None:
        if standing.total is None or speed is None or not 0 < speed < math.inf:
            return None
        try:
            left = n_token(self.config, standing.total) - n_token(self.config, standing.step)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return None
        return left / speed


def refuse_other_than_run(run: Path) -> None:
    """Refuse a path that is no directory of a training run.

    Raises:
        ConfigError: Saying what it is instead, or which runs are below it.
    """
    if not run.exists():
        raise ConfigError(f"there is no run at {run}: give the directory that training named")
    if not run.is_dir():
        raise ConfigError(f"{run} is a file: give the directory of a run")
    if _is_run(run):
        return
    below = [path.parent for pattern in ("*/.hydra", "*/*/.hydra") for path in run.glob(pattern)]
    if runs := sorted(filter(_is_run, below), key=lambda path: path.stat().st_mtime):
        raise ConfigError(f"{run} is no run, but holds {len(runs)}: give one of them, such as the newest, {runs[-1]}")
    raise ConfigError(
        f"{run} is no run: expected a directory that memlm train has made, with .hydra/config.yaml or csv/"
    )


def _is_run(folder: Path) -> bool:
    if history_files(folder) or (folder / LOCK).exists():
        return True
    return {"trainer", "curriculum"} <= set(_config(folder))


def _config(run: Path) -> dict[str, Any]:
    """The settings that a run was started with; none if they are not there, or damaged."""
    try:
        with open_regular(run / ".hydra" / "config.yaml") as file:
            content = file.read(2**20)
        text = content.decode("utf-8", errors="replace")
        if "&" in text and "*" in text:  # Hydra writes no aliases, which could stand for anything
            return {}
        found = yaml.safe_load(text)
    except (OSError, ConfigError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _logs_csv(loggers: Any) -> bool:
    nodes = loggers.values() if isinstance(loggers, Mapping) else ()
    return any(isinstance(node, Mapping) and str(node.get("_target_")).endswith(_CSV) for node in nodes)


def _last(columns: Mapping[str, Column], name: str, n: int = 1) -> float | None:
    """The median of the last numbers of a column; None if there are none."""
    return statistics.median(columns[name].values[-n:]) if name in columns else None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _points(column: Column) -> list[tuple[float, float]]:
    """Numbers by the steps made, in order; where a run that goes on repeats a step the later one counts."""
    return sorted(dict(zip((step + 1.0 for step in column.steps), column.values, strict=True)).items())


def _charts(columns: Mapping[str, Column]) -> Iterator[Chart]:
    """What the curves show, of what there is."""
    end = 1.0 + max((max(column.steps) for column in columns.values()), default=0)

    def chart(title: str, unit: str, series: Sequence[Series], **options: Any) -> Iterator[Chart]:
        found = Chart(title, "step", unit, series, across_span=(0.0, end), **options)
        if found.shown:
            yield found

    loss = [*_smoothed(columns, "train/loss", "training"), *_lines(columns, {"val/nll": "held-out text"})]
    yield from chart("Loss", "nats per token", loss)
    controls = _lines(columns, {f"recall/{name}": label for name, label in CONTROLS.items()}, control=True)
    if controls:  # a rate without a control claims nothing
        on = _lines(columns, {"recall/on": "memory on"})
        yield from chart("Recall of held-out facts", "exact match", [*on, *controls], percent=True, span=(0.0, 1.0))
    parts: dict[str, dict[tuple[str, str], Column]] = {}  # number, then memory and layer
    for name, column in columns.items():
        root, _, rest = name.partition("/")
        if root == "memory" and "/" in rest:
            of, _, number = rest.rpartition("/")
            memory, _, layer = of.partition("/")
            parts.setdefault(number, {})[memory, layer] = column
    shares = [
        part._replace(label=f"{part.label}: {label}")
        for number, label in _SHARES.items()
        for part in _of_layers(parts.pop(number, {}))
    ]
    yield from chart("What memory does", "0 to 1", shares, span=(0.0, 1.0))
    for number, found in parts.items():
        if number == "read_entropy":
            slots = {key: Column(c.steps, _exponentials(c.values)) for key, c in found.items()}
            yield from chart("Slots that a read is spread over", "slots", _of_layers(slots))
        else:
            yield from chart(number.replace("_", " "), "as logged, see docs/dashboard.md", _of_layers(found))
    speed = _lines(columns, {"train/tokens_per_second": "training"})
    most = max((y for part in speed for _, y in part.points if math.isfinite(y)), default=0.0)
    yield from chart("Speed", "tokens per second", speed, span=(0.0, 1.1 * most or 1.0))


def _lines(columns: Mapping[str, Column], names: Mapping[str, str], control: bool = False) -> list[Series]:
    return [Series(label, _points(columns[name]), control=control) for name, label in names.items() if name in columns]


def _smoothed(columns: Mapping[str, Column], name: str, label: str) -> Iterator[Series]:
    """A column that is noise around its trend: both, if it is long."""
    if name not in columns:
        return
    points = [point for point in _points(columns[name]) if math.isfinite(point[1])]
    if len(points) >= 50:
        yield Series(label, points, faint=True)
        n = max(5, len(points) // 40)
        sums, total = [0.0], 0.0
        for _, value in points:
            total += value
            sums.append(total)
        firsts = [max(i + 1 - n, 0) for i in range(len(points))]
        points = [
            (x, (sums[i + 1] - sums[k]) / (i + 1 - k)) for i, ((x, _), k) in enumerate(zip(points, firsts, strict=True))
        ]
    yield Series(label, points)


def _of_layers(found: Mapping[tuple[str, str], Column]) -> list[Series]:
    """A number of each memory and layer; of many layers the mean."""
    if len(found) <= _MOST_LINES:
        several = len({layer for _, layer in found}) > 1
        return [
            Series(f"{memory}, layer {layer}" if layer and several else memory, _points(column))
            for (memory, layer), column in found.items()
        ]
    series = []
    for memory in dict.fromkeys(memory for memory, _ in found):
        layers = [_points(column) for (name, _), column in found.items() if name == memory]
        at: dict[float, list[float]] = {}
        for step, value in (point for points in layers for point in points):
            at.setdefault(step, []).append(value)
        label = f"{memory}, mean of {len(layers)} layers" if len(layers) > 1 else memory
        series.append(Series(label, [(step, statistics.fmean(values)) for step, values in sorted(at.items())]))
    return series


def _exponentials(values: Sequence[float]) -> Any:
    return type(values)("d", (math.exp(value) if value < 700 else math.inf for value in values))  # type: ignore[call-arg]


def _remarks(columns: Mapping[str, Column]) -> list[str]:
    """What the curves cannot show."""
    notes = []
    for name, column in columns.items():
        odd = [step for step, value in zip(column.steps, column.values, strict=True) if not math.isfinite(value)]
        if odd:
            notes.append(
                f"{one_line(name)} is no finite number at {len(odd):,} logged steps, first at step {odd[0] + 1:,}."
            )
    if "recall/on" not in columns:
        notes.append("No recall is logged so far: it is measured every trainer.val_check_interval batches (watch=).")
    return notes
