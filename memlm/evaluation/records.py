"""Records: what runs found, kept with the project, and the tables of its pages that are made of them.

A record is `results/NAME.json` with a list of entries, one per name of a run and seed. A page has the table of a record
between two marks, `<!-- results/NAME.json -->` and `<!-- end of results -->`; nobody types a number. The record of
`worth` has a small table too: `<!-- results/worth.json in short -->`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlm.config import ConfigError
from memlm.evaluation import memory_table, timings, worth_table
from memlm.evaluation.compare.groups import n_token
from memlm.evaluation.headline import Number, headline, in_brackets, in_percent, shown
from memlm.evaluation.result import Result
from memlm.evaluation.runs import EVALUATION, Run, Trained, run_of
from memlm.files import read_json

FOLDER = "results"
"""Where records are, below the directory of the project."""


Entry = Mapping[str, Any]

_MARKS = re.compile(r"(<!-- results/([\w-]+)\.json( in short)? -->\n).*?(<!-- end of results -->)", re.DOTALL)
_NEEDED = ("name", "seed", "commit", "machine", "experiment", "metrics", "headline", "step", "tokens", "state_bytes")
_TOLD: tuple[tuple[str, Any], ...] = (("trained", None), ("settings", {}), ("headline", []))
_CONTROLS = ("off", "wiped", "swapped")
_OVERRIDES = ".hydra/overrides.yaml"
_PATH = re.compile(r"(?<=[='\"\[,])/(?:[^/\s'\",\]]+/)+")  # the folders of a file
_OF_TRAINING = ("experiment", "step", "tokens", "parameters", "cpu_seconds")


def entries(runs: Sequence[Run], experiment: str, commit: str, machine: str, torch: str) -> list[dict[str, Any]]:
    """What a record keeps of runs.

    Args:
        runs: The runs.
        experiment: Whose result is kept.
        commit: What the runs were made with.
        machine: What they were made on.
        torch: Version of it.

    Raises:
        ConfigError: If the experiment was not measured of a run.
    """
    found = []
    for run in runs:
        trained, stored = run.trained, _stored(run, experiment)
        tokens, speed = n_token(trained), trained.tokens_per_second
        found.append(
            {
                "name": _name(trained),
                "seed": trained.config["seed"],
                "experiment": experiment,
                "commit": commit,
                "machine": machine,
                "torch": torch,
                "command": _command(run.path, trained),
                "step": trained.step,
                "tokens": tokens,
                "minutes": tokens / speed / 60 if tokens and speed else None,
                "cpu_seconds": trained.cpu_seconds,
                "parameters": trained.n_parameter,
                "state_bytes": trained.state_bytes,
                **stored,
                "curve": _curve(run.results.get("training")),
            }
        )
    return found


def _stored(run: Run, experiment: str) -> dict[str, Any]:
    """What was measured of a run."""
    if experiment == memory_table.NAME:
        return {"settings": {}, "headline": [], **memory_table.measured(run)}
    if (result := run.results.get(experiment)) is None:
        raise ConfigError(f"{run.path} has no result of {experiment}; it has: {', '.join(run.results)}")
    stored = result.to_dict()
    told = {name: stored["metadata"].get(name, empty) for name, empty in _TOLD}
    told["settings"] = {
        name: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for name, value in told["settings"].items()
    }
    return {**told, "metrics": stored["metrics"]}


def _curve(training: Result | None) -> list[list[float]]:
    """Steps that were logged, each with the share of its batch's answers that were right."""
    rows = [] if training is None else training.rows
    return [[row["step"], row[rate]] for row in rows if row.get(rate := "train/answer_accuracy") is not None]


def _name(trained: Trained) -> str:
    """What a run is called: by its configuration, or its memories; with what of these an evaluation changed."""
    name = trained.config.get("name") or "+".join(trained.config["memory"]) or "none"
    return ", ".join([name, *(f"{key.rpartition('.')[2]} {value}" for key, value in trained.memory.items())])


def _command(run: Path, trained: Trained) -> str | None:
    """The command that made a run, and that of its evaluation, if they say so; places of files are left out."""
    if not (run / EVALUATION).exists():
        return _called("python train.py", run)
    made = _called("python train.py", run_of(Path(trained.checkpoint)))
    asked = _called("python scripts/evaluate.py checkpoint=RUN", run)
    return None if made is None or asked is None else f"{made}; {asked}"


def _called(command: str, folder: Path) -> str | None:
    """A command with the overrides that the folder of its run holds."""
    import yaml

    try:
        lines = yaml.safe_load((folder / _OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    kept = [_PATH.sub("", str(line)) for line in lines or [] if not str(line).startswith(("paths.", "checkpoint="))]
    return " ".join([command, *kept])


def merged(record: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """A record with new entries, sorted by name and seed; of the same name, seed and variant the newer one stays.

    Several evaluations of one training, of which each fills cells of its own, are one entry.

    Raises:
        ConfigError: If the entries are not of one experiment.
    """
    known: dict[tuple[Any, ...], Entry] = {}
    for entry in [*record, *new]:
        key = (entry["name"], entry["seed"], entry.get("variant", ""))
        known[key] = _united(known[key], entry) if key in known else entry
    if len(kinds := sorted({entry["experiment"] for entry in known.values()})) > 1:
        raise ConfigError(f"a record is of one experiment, and here are {', '.join(kinds)}: give each its own record")
    return [known[key] for key in sorted(known)]


def _united(old: Entry, new: Entry) -> Entry:
    """The newer entry, with the cells that another evaluation of the same training filled."""
    cells = [{tuple(told["cell"]): told for told in entry["headline"] if told.get("cell")} for entry in (old, new)]
    if not all(cells) or any(old.get(part) != new.get(part) for part in _OF_TRAINING):
        return new
    kept = {"metrics": old["metrics"] | new["metrics"], "headline": list((cells[0] | cells[1]).values())}
    if old["settings"] != new["settings"]:
        kept["settings"] = {"evaluations": [*old["settings"].get("evaluations", [old["settings"]]), new["settings"]]}
    return {**new, **kept}


def read_record(path: Path) -> list[dict[str, Any]]:
    """The entries of a record.

    Raises:
        ConfigError: If it cannot be read, or an entry lacks something.
    """
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no record {path}: make it with memlm results {path.stem} RUN...") from None
    found = record.get("entries")
    if not isinstance(found, list):
        raise ConfigError(f"{path} is no record: it has no list of entries")
    for i, entry in enumerate(found):
        of_benchmark = isinstance(entry, dict) and str(entry.get("experiment")).startswith(timings.PREFIX)
        needed = timings.NEEDED if of_benchmark else _NEEDED
        missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ConfigError(f"{path} is no record: entry {i} lacks {', '.join(missing)}")
    return found


def written(record: Sequence[Entry]) -> str:
    """A record as the text of its file."""
    return json.dumps({"entries": list(record)}, indent=1, allow_nan=False) + "\n"


def filled_in(page: str, folder: Path) -> str:
    """A page with the tables of all records that it has marks for.

    Args:
        page: Its text.
        folder: Where the records are.

    Raises:
        ConfigError: If there is no such record, or it has no small table.
    """

    def table_of(found: re.Match[str]) -> str:
        record = read_record(folder / f"{found[2]}.json")
        return f"{found[1]}\n{short_table(record) if found[3] else table(record)}\n\n{found[4]}"

    return _MARKS.sub(table_of, page)


def table(record: Sequence[Entry]) -> str:
    """A record as a page has it: a table of all memories, of rates by size or of headlines; or a benchmark's report."""
    if record and str(record[0]["experiment"]).startswith(timings.PREFIX):
        return timings.text(record)
    lines, below = [["nothing was measured yet"], ["---"]], ""
    if record and record[0]["experiment"] == memory_table.NAME:
        lines = memory_table.table(record)
        below = "".join(f"\n\n![{name}](figures/{name}.png)" for name in memory_table.figures(record))
    elif record:
        by_size = _sizes(record) or any(entry.get("trained") for entry in record)
        lines = (_rates if by_size else _headlines)(record)
    return _joined(lines) + below


def short_table(record: Sequence[Entry]) -> str:
    """A record in a few lines.

    Raises:
        ConfigError: If it is not of `worth`.
    """
    if not record or record[0]["experiment"] != worth_table.NAME:
        raise ConfigError("only the record of worth has a table in short: leave 'in short' out of the mark")
    return _joined(worth_table.table(record))


def _joined(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _costs(entry: Entry) -> list[str]:
    """What an entry cost, and what it was made with."""
    minutes = "-" if entry["minutes"] is None else f"{entry['minutes']:.1f}"
    tokens = "-" if entry["tokens"] is None else f"{entry['tokens']:,}"
    return [f"{entry['step']:,}", tokens, minutes, entry["commit"]]


_COSTS = ["steps", "tokens", "minutes", "commit"]


def _headlines(record: Sequence[Entry]) -> list[list[str]]:
    """The headline of each entry: main numbers with their intervals, controls behind them; by name, then by seed."""
    parts = [
        headline(Result.from_dict({"name": e["experiment"], "rows": [], "metrics": e["metrics"]}
                                  | {"metadata": {"headline": e["headline"]}}))
        for e in record
    ]  # fmt: skip
    if any(number.cell for numbers in parts for number in numbers):
        return _cells(record, parts)
    named = [_named(numbers) for numbers in parts]
    labels = list(dict.fromkeys(label for numbers in named for label in numbers))
    lines = [["run", "seed", *labels, "state of a row, bytes", "CPU seconds", *_COSTS]]
    lines.append(["---"] * len(lines[0]))
    for entry, numbers in zip(record, named, strict=True):
        cpu = entry.get("cpu_seconds")
        lines.append(
            [
                *(f"`{entry['name']}`", str(entry["seed"])),
                *(_cell(numbers[label]) if label in numbers else "-" for label in labels),
                *(f"{entry['state_bytes']:,}", "-" if cpu is None else f"{cpu:,.0f}", *_costs(entry)),
            ]
        )
    return lines


def _named(numbers: Sequence[Number]) -> dict[str, Number]:
    """Numbers by their labels; a control that stands behind several main numbers is named with the one before it."""
    times = Counter(number.label for number in numbers)
    found: dict[str, Number] = {}
    main = ""
    for number in numbers:
        main = main if number.control else number.label.removesuffix(", memory on")
        found[f"{main}: {number.label}" if number.control and times[number.label] > 1 else number.label] = number
    return found


def _cells(record: Sequence[Entry], parts: Sequence[Sequence[Number]]) -> list[list[str]]:
    """The same of headlines that say where in a table they stand: several lines for each entry."""
    cells = [{number.cell: number for number in numbers if number.cell} for numbers in parts]
    longest_first = sorted(cells, key=len, reverse=True)  # so that what fewer have does not decide the order
    columns = list(dict.fromkeys(cell[1] for found in longest_first for cell in found))
    lines = [["run", "seed", "", *columns, "n", "commit"]]
    lines.append(["---"] * len(lines[0]))
    for entry, found in zip(record, cells, strict=True):
        for line in dict.fromkeys(cell[0] for cell in found):
            here = [found.get((line, column)) for column in columns]
            most = max((number.n or 0 for number in here if number), default=0)
            texts = ["-" if number is None else _cell(number, most) for number in here]
            lines.append([f"`{entry['name']}`", str(entry["seed"]), line, *texts, str(most or "-"), entry["commit"]])
    return lines


def _cell(number: Number, n: int | None = None) -> str:
    """A number; unless it is a control with its interval, and of how many if of fewer than ``n``."""
    text = shown(number.value, number.percent)
    if n and number.n and number.n < n and not number.control:
        return f"{_cell(number)}, n = {number.n:,}"
    if number.control:
        return text
    return text + in_brackets(number.low, number.high, number.percent)


def _sizes(record: Sequence[Entry]) -> list[tuple[int, ...]]:
    """Sizes of documents with rates of their own: pairs told, or tokens and pairs."""
    names = {name for entry in record for name in entry["metrics"] if name.startswith("accuracy/on/")}
    return sorted(tuple(map(int, name.rpartition("/")[2].split("_"))) for name in names)


def _rates(record: Sequence[Entry]) -> list[list[str]]:
    """Rates by size: those of most pairs held, or else of all sizes, first; then of the fewest bytes."""
    sizes = _sizes(record)
    ends = ["_".join(map(str, size)) for size in sizes]
    held = all("held/on" in entry["metrics"] for entry in record)
    published = any(entry.get("trained") for entry in record)
    first = "pairs held at 90 %" if held else "answered"
    shares = ["of the published training"] * published
    lines = [
        ["memory", "seed", "state of a row, bytes", first, *map(_size, sizes), "controls at most", *shares, *_COSTS]
    ]
    lines.append(["---"] * len(lines[0]))
    best = "held/on" if held else "accuracy/on"
    for entry in sorted(record, key=lambda e: (-e["metrics"][best], e["state_bytes"], e["seed"])):
        metrics = entry["metrics"]
        controls = [
            metrics.get(f"accuracy/{name}{end}") for name in _CONTROLS for end in ("", *(f"/{e}" for e in ends))
        ]
        n = int(metrics.get("held/on", 0))
        lines.append(
            [
                *(f"`{entry['name']}`", str(entry["seed"]), f"{entry['state_bytes']:,}"),
                f"{n}{' or more' if (n,) == sizes[-1] else ''}" if held else _rate(metrics, ""),
                *(_rate(metrics, f"/{end}") for end in ends),
                f"{in_percent(max(rate for rate in controls if rate is not None)):.1f}",
                *(entry["trained"] or "-" for _ in shares),
                *_costs(entry),
            ]
        )
    return lines


def _size(size: tuple[int, ...]) -> str:
    """A size in words."""
    *n_token, n_pair = size
    return "".join(f"{n:,} tokens, " for n in n_token) + f"{n_pair} pair{'s' * (n_pair > 1)}"


def _rate(metrics: Mapping[str, float], end: str) -> str:
    """A rate and its interval, in percent; "-" if it was not measured."""
    if f"accuracy/on{end}" not in metrics:
        return "-"
    rate, low, high = (
        float(metrics[f"{name}/on{end}"]) for name in ("accuracy", "low", "high")
    )  # NaN is a word in JSON
    return shown(rate, percent=True).removesuffix(" %") + in_brackets(low, high, percent=True)
