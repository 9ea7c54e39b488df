"""Put runs of recipe=pairs into the record behind docs/recall_by_memory.md, and its table into the page.

python scripts/recall_by_memory.py RUN... [--commit HASH]

RUN is the directory of a run or of a sweep. A run of the same memory and seed takes the place of the one before. Nobody
types a number: the page's table is made of docs/recall_by_memory.json alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlm.config import ConfigError
from memlm.files import atomic_file

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- table of recall_by_memory.json -->", "<!-- end of table -->"
CONTROLS = ("off", "wiped", "swapped")


def entries(paths: Sequence[str], commit: str | None) -> list[dict[str, Any]]:
    """What the record keeps of runs.

    Args:
        paths: Directories of runs or sweeps.
        commit: What the runs were made with; None for the checkout as it is.

    Raises:
        ConfigError: If a run is not one of recipe=pairs.
    """
    from benchmarks.base import surroundings
    from experiments.associative_recall import held
    from memlm.evaluation.compare.groups import n_token
    from memlm.evaluation.runs import find_runs

    around = surroundings("cpu")
    found = []
    for run in find_runs(paths)[0]:
        result = run.results.get("associative_recall")
        if result is None or result.metadata.get("task") != "Pairs":
            raise ConfigError(f"{run.path} is no run of recipe=pairs")
        config, tokens = run.trained.config, n_token(run.trained)
        rates = {
            str(n): {
                condition: [result.metrics[f"{key}/{condition}/{n}"] for key in ("accuracy", "low", "high", "n")]
                for condition in ("on", *CONTROLS, "unseen")
            }
            for n in result.metadata["n_pairs"]
        }
        speed = run.trained.tokens_per_second
        found.append(
            {
                "memory": "+".join(config["memory"]) or "none",
                "seed": config["seed"],
                "commit": commit or str(around["commit"])[:7],
                "machine": around["processor"],
                "torch": around["torch"],
                "step": run.trained.step,
                "tokens": tokens,
                "minutes": tokens / speed / 60 if tokens and speed else None,
                "parameters": run.trained.n_parameter,
                "state_bytes": run.trained.state_bytes,
                "held": int(held(result.metrics, result.metadata["n_pairs"], run.trained.state_bytes or 0)["held/on"]),
                "rates": rates,
            }
        )
    return found


def merged(record: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The record with new entries, by memory and seed."""
    known = {(entry["memory"], entry["seed"]): entry for entry in [*record, *new]}
    return [known[key] for key in sorted(known)]


def table(record: Sequence[Mapping[str, Any]]) -> str:
    """The record as a table of Markdown: most pairs held first, of those the fewest bytes."""
    from memlm.evaluation.headline import in_percent

    sizes = sorted({int(n) for entry in record for n in entry["rates"]})
    heads = [
        "memory",
        "seed",
        "state of a row, bytes",
        "pairs held at 90 %",
        *(f"{n} pair{'s' * (n > 1)}" for n in sizes),
    ]
    heads += ["controls at most", "steps", "tokens", "minutes", "commit"]
    lines = [heads, ["---"] * len(heads)]
    for entry in sorted(record, key=lambda entry: (-entry["held"], entry["state_bytes"], entry["seed"])):
        rates = entry["rates"]
        cells = [_rate(*rates[str(n)]["on"][:3]) if str(n) in rates else "-" for n in sizes]
        control = max(rates[n][name][0] for n in rates for name in CONTROLS)
        more = " or more" if entry["held"] == sizes[-1] else ""
        minutes = "-" if entry["minutes"] is None else f"{entry['minutes']:.1f}"
        lines.append(
            [
                f"`{entry['memory']}`", str(entry["seed"]), f"{entry['state_bytes']:,}", f"{entry['held']}{more}",
                *cells, f"{in_percent(control):.1f}", f"{entry['step']:,}", f"{entry['tokens']:,}", minutes,
                entry["commit"],
            ]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rate(rate: float, low: float, high: float) -> str:
    """A rate and its interval in percent."""
    from memlm.evaluation.headline import in_percent

    return f"{in_percent(rate):.1f} ({in_percent(low):.1f} to {in_percent(high):.1f})"


def filled_in(page: str, record: Sequence[Mapping[str, Any]]) -> str:
    """A page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(record)}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, write record and page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="*", help="directory of a run or of a sweep; none: the page anew")
    parser.add_argument("--commit", help="what the runs were made with; by default the commit of this checkout")
    chosen = parser.parse_args(arguments)
    data, page = DOCS / "recall_by_memory.json", DOCS / "recall_by_memory.md"
    record = json.loads(data.read_text()) if data.exists() else []
    record = merged(record, entries(chosen.runs, chosen.commit) if chosen.runs else [])
    for path, text in ((data, json.dumps(record, indent=1) + "\n"), (page, filled_in(page.read_text(), record))):
        with atomic_file(path) as file:
            file.write(text.encode())
        print(path)


if __name__ == "__main__":
    from memlm import threads
    from memlm.app.errors import mistakes_told

    with mistakes_told():
        threads.wait_passively()
        main()
