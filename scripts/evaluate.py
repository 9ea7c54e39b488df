"""Measure what the memory of a trained model remembers: `python scripts/evaluate.py checkpoint=RUN`."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from memlm.config import ConfigError, cli, config_dir, run_dir, to_dict


def name_all(arguments: list[str]) -> list[str]:
    """Put the names of all experiments in place of `experiment=all`."""
    names = ",".join(sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml")))
    return [f"experiment=[{names}]" if argument == "experiment=all" else argument for argument in arguments]


def place(model: Any, device: str) -> Any:
    """Move a model to a device; `auto` is the GPU if there is one."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error


@cli("evaluate")
def main(cfg: DictConfig) -> None:
    """Run the chosen experiments, write their results and print the summary."""
    from experiments import runner
    from experiments.report import summary
    from memlm.checkpoint import load_run

    experiments = runner.chosen(to_dict(cfg))
    model, data = load_run(cfg.checkpoint, paths={"cache_dir": cfg.paths.cache_dir})
    place(model, cfg.device)
    results, written = runner.run_all(model, data, experiments, Path(run_dir()))
    print(summary(results))
    print("\nWritten:", *(f"  {path}" for path in written), sep="\n")


if __name__ == "__main__":
    sys.argv[1:] = name_all(sys.argv[1:])
    main()
