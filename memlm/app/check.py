"""Judge a memory by the laws: `memlm check memory=ltm`, also one outside of memlm: `memory=mine --config-dir DIR`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from memlm.app.cli import cli
from memlm.compose import compose, to_dict
from memlm.config import ConfigError, validate

if TYPE_CHECKING:
    pass


@cli("check")
def main(config: Mapping[str, Any]) -> None:
    """Print what each law says.

    Raises:
        ConfigError: If there is no memory to judge, or a law does not hold.
    """
    from rich.progress import Progress

    from memlm.evaluation.table import table
    from memlm.laws.builders import builder, host_of
    from memlm.laws.judge import judge, n_verdict

    if not config["memory"]:
        raise ConfigError("memory=none has nothing to judge: give the name of a memory, as memory=ltm.")
    validate(config["memory"], key="memory")
    model_class = host_of(config["model"])
    try:
        builder(config["memory"], shrink=False, model_class=model_class)()
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"memory: {error}") from error
    sources = HydraConfig.get().runtime.config_sources
    places = [source.path for source in sources if source.provider == "command-line"]
    choice = f"memory={HydraConfig.get().runtime.choices['memory']}"
    written = to_dict(compose([choice], "check", searchpath=places))["memory"]
    verdicts = []
    with Progress(transient=True) as bar:
        task = bar.add_task("laws", total=n_verdict(config["memory"], model_class))
        for verdict in judge(config["memory"], model_class, written):
            verdicts.append(verdict)
            bar.update(task, advance=1, description=f"law {verdict.number}")
    rows = [[verdict.number, verdict.title, "holds" if verdict.why is None else "BROKEN"] for verdict in verdicts]
    print(table(["law", "what holds", ""], rows, ", ".join(config["memory"])))
    broken = [verdict for verdict in verdicts if verdict.why is not None]
    if broken:
        print("\nBroken:", *(f"  law {broken.number}, {broken.title}: {broken.why}" for broken in broken), sep="\n")
        raise ConfigError(f"{len(broken)} of {len(verdicts)} checks failed; docs/architecture.md tells the laws")
    print(f"\nAll {len(verdicts)} hold.")


def start() -> None:
    """What the command line runs."""
    main()


if __name__ == "__main__":
    start()
