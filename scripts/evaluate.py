"""Measure what the memory of a trained model remembers: `python scripts/evaluate.py checkpoint=RUN`."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from memlm.config import ConfigError, cli, config_dir, run_dir, to_dict


def name_all(arguments: list[str]) -> list[str]:
    """Put the names of all experiments, those that apply, in place of `experiment=all`."""
    names = ",".join(sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml")))
    every = [f"experiment=[{names}]", "skip_inapplicable=true"]
    return [word for argument in arguments for word in (every if argument == "experiment=all" else [argument])]


@cli("evaluate")
def main(cfg: DictConfig) -> None:
    """Run the chosen experiments, write their results and print the summary."""
    from experiments import runner
    from experiments.report import not_measured, summary
    from experiments.runs import describe, write_evaluation
    from memlm.checkpoint import find, load_run, place
    from memlm.training.module import memory_settings

    experiments = runner.chosen(to_dict(cfg))
    checkpoint, directory = find(cfg.checkpoint), Path(run_dir())
    model, data = load_run(checkpoint, paths={"cache_dir": cfg.paths.cache_dir})
    place(model, cfg.device)
    print(f"{checkpoint}: measured by {', '.join(experiments)} into {directory}")
    changed = to_dict(cfg.change) or {}
    about = write_evaluation(directory, describe(checkpoint, model)._replace(memory=changed))
    with memory_settings(model, changed):
        results, written, skipped = runner.run_all(model, data, experiments, directory)
    print("\n" + summary(results))
    print("\nWritten:", *(f"  {path}" for path in [about, *written]), sep="\n")
    if skipped and not cfg.skip_inapplicable:
        raise ConfigError("; ".join(f"{name} was not measured: {reason}" for name, reason in skipped.items()))
    if skipped:
        print("\n" + not_measured(skipped))


if __name__ == "__main__":
    sys.argv[1:] = name_all(sys.argv[1:])
    main()
