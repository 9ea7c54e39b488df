"""Put runs of tasks with published figures into the record behind docs/public_figures.md, and its tables into the page.

python scripts/public_figures.py RUN... [--commit HASH]

RUN is the directory of a run or of a sweep of recipe=mqar_zoology, mqar_zoology_figure2 or kv_capacity. A run of the
same task, model, memory, bytes, seed and steps takes the place of the one before. Nobody types a number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlm import threads
from memlm.config import ConfigError
from memlm.files import atomic_file

DOCS = Path(__file__).resolve().parents[1] / "docs"
TASKS = ("mqar_zoology", "capacity_per_byte")
CONTROLS = ("off", "wiped", "swapped")
CONDITIONS = ("on", *CONTROLS, "unseen")
_KEY = ("task", "sizes", "model", "memory", "state_bytes", "seed", "step")


def mark(task: str) -> str:
    """The line before a table of the page; `END` stands behind it."""
    return f"<!-- table of public_figures.json: {task} -->"


END = "<!-- end of table -->"


def entries(paths: Sequence[str], commit: str | None) -> list[dict[str, Any]]:
    """What the record keeps of runs.

    Args:
        paths: Directories of runs or sweeps.
        commit: What the runs were made with; None for the checkout as it is.

    Raises:
        ConfigError: If a run has none of these tasks.
    """
    from benchmarks.base import surroundings
    from memlm.evaluation.compare.groups import n_token
    from memlm.evaluation.runs import find_runs

    around = surroundings("cpu")
    found = []
    for run in find_runs(paths)[0]:
        task = next((name for name in TASKS if name in run.results), None)
        if task is None:
            raise ConfigError(f"{run.path} is no run of recipe=mqar_zoology, mqar_zoology_figure2 or kv_capacity")
        result, trained = run.results[task], run.trained
        config, tokens, speed = trained.config, n_token(trained), trained.tokens_per_second
        sizes = result.metadata["settings"]["sizes" if task == "mqar_zoology" else "n_pair"]
        ends = [f"{size[0]}_{size[1]}" if isinstance(size, list) else str(size) for size in sizes]
        rates = {
            end: {
                name: [result.metrics[f"{key}/{full}"] for key in ("accuracy", "low", "high", "n")]
                for name in CONDITIONS
                if f"accuracy/{(full := f'{name}/{end}' if len(ends) > 1 else name)}" in result.metrics
            }
            for end in ends
        }
        mean = {
            name: [result.metrics[f"{key}/{name}"] for key in ("accuracy", "low", "high", "n")]
            for name in CONDITIONS
            if task == "mqar_zoology" and f"accuracy/{name}" in result.metrics
        }
        found.append(
            {
                "task": task,
                "sizes": ends,
                "model": config["model"]["_target_"].rpartition(".")[2],
                "memory": "+".join(config["memory"]) or "none",
                "settings": {"model": config["model"], "memory": config["memory"], "training": config["training"]},
                "phases": config["curriculum"]["phases"],
                "trained": result.metadata.get("trained") or _share(config),
                "random_blanks": result.metadata.get("random_blanks"),
                "seed": config["seed"],
                "commit": commit or str(around["commit"])[:7],
                "machine": around["processor"],
                "torch": around["torch"],
                "step": trained.step,
                "tokens": tokens,
                "minutes": tokens / speed / 60 if tokens and speed else None,
                "parameters": trained.n_parameter,
                "state_bytes": trained.state_bytes,
                "curve": _curve(run.results.get("training")),
                "mean": mean,
                "rates": rates,
            }
        )
    return found


def _curve(training: Any) -> list[list[float]]:
    """Steps, and the share of answer tokens of that batch that were right."""
    rows = [] if training is None else training.rows
    found = [(row["step"], row.get("train/answer_accuracy")) for row in rows]
    return [[step, round(rate, 4)] for step, rate in found if rate is not None]


def _share(config: Mapping[str, Any]) -> str | None:
    """What of the published training was made, if the curriculum tells."""
    from memlm.data.epochs import Epochs

    settings = {name: value for name, value in config["curriculum"].items() if name != "_target_"}
    return Epochs(**settings).share if "n_epoch" in settings else None


def merged(record: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The record with new entries, in a fixed order."""
    known = {json.dumps([entry[key] for key in _KEY]): entry for entry in [*record, *new]}
    return [known[key] for key in sorted(known)]


def table(record: Sequence[Mapping[str, Any]], task: str) -> str:
    """The entries of a task as a table of Markdown."""
    from memlm.evaluation.headline import in_percent

    heads = ["model", "memory", "state of a row, bytes", "task", "rate", "controls at most", "n", "trained", "rows"]
    lines = [[*heads, "seed", "steps", "tokens", "minutes", "commit"], ["---"] * 14]
    for entry in record:
        if entry["task"] != task:
            continue
        parts = [("all sizes", entry["mean"])] if entry["mean"] and len(entry["sizes"]) > 1 else []
        rows = "/".join(dict.fromkeys(str(phase["n_row"]) for phase in entry["phases"]))
        minutes = "-" if entry["minutes"] is None else f"{entry['minutes']:.1f}"
        for end, rates in [*parts, *entry["rates"].items()]:
            low, high = (in_percent(rates["on"][i]) for i in (1, 2))
            control = max(in_percent(rates[name][0]) for name in CONTROLS if name in rates)
            lines.append(
                [
                    f"`{entry['model']}`", f"`{entry['memory']}`", f"{entry['state_bytes'] or 0:,}", _size(end, entry),
                    f"{in_percent(rates['on'][0]):.1f} ({low:.1f} to {high:.1f})", f"{control:.1f}",
                    f"{rates['on'][3]:,.0f}", entry["trained"] or "-", rows, str(entry["seed"]), f"{entry['step']:,}",
                    f"{entry['tokens']:,}", minutes, entry["commit"],
                ]
            )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _size(end: str, entry: Mapping[str, Any]) -> str:
    """A size in words."""
    n_token, _, n_pair = end.rpartition("_")
    if not n_pair.isdigit():
        return end
    blanks = {None: "", True: ", random blanks", False: ", no random blanks"}[entry["random_blanks"]]
    return (f"{n_token} tokens, " if n_token else "") + f"{n_pair} pair{'s' * (n_pair != '1')}{blanks}"


def filled_in(page: str, record: Sequence[Mapping[str, Any]]) -> str:
    """A page with the tables between their marks."""
    for task in TASKS:
        before, _, rest = page.partition(mark(task))
        _, _, after = rest.partition(END)
        page = f"{before}{mark(task)}\n\n{table(record, task)}\n\n{END}{after}"
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write record and page."""
    threads.wait_passively()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="*", help="directory of a run or of a sweep; none: the page anew")
    parser.add_argument("--commit", help="what the runs were made with; by default the commit of this checkout")
    chosen = parser.parse_args(arguments)
    data, page = DOCS / "public_figures.json", DOCS / "public_figures.md"
    record = json.loads(data.read_text()) if data.exists() else []
    record = merged(record, entries(chosen.runs, chosen.commit) if chosen.runs else [])
    for path, text in ((data, json.dumps(record, indent=1) + "\n"), (page, filled_in(page.read_text(), record))):
        with atomic_file(path) as file:
            file.write(text.encode())
        print(path)


if __name__ == "__main__":
    from memlm.app.errors import mistakes_told

    with mistakes_told():
        main()
