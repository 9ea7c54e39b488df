"""Train a language model with a memory, and show what the memory remembers.

python train.py model=lmcode memory=ltm
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlm.config import cli, to_dict, validate

if TYPE_CHECKING:
    from omegaconf import DictConfig


@cli("train")
def main(cfg: DictConfig) -> float | None:
    """Compose, validate, build, fit, report.

    Returns:
        The share of planted facts that is recalled, for a hyperparameter search; None if it is not measured.
    """
    from pathlib import Path

    from experiments import runner
    from experiments.base import emit
    from experiments.report import not_measured, summary
    from experiments.training import training_result
    from memlm.build import build_corpus, build_data, build_model, build_tokenizer
    from memlm.training.resume import check_text, find_origin
    from memlm.training.settings import Training, places_of_runs, plan_steps

    config = plan_steps(to_dict(cfg))
    run = Path(config["paths"]["run_dir"])
    experiments, watched = runner.chosen(config), runner.watched(config["watch"])
    origin = find_origin(config["resume"], config, places_of_runs(config))

    corpus = build_corpus(config)
    tokenizer = build_tokenizer(config, corpus)
    # From here on with lightning, which takes seconds to import: what can be wrong without it was told by now.
    from memlm.training.fit import make_trainer, save_last, sync_hint, wandb_logger
    from memlm.training.module import LanguageModeling
    from memlm.training.replay import build_replay

    validate(cfg)
    data = build_data(config, tokenizer, corpus)
    if origin is not None:
        check_text(origin, data)
    data.setup()
    model = build_model(config, data.tokenizer)
    settings = {name: value for name, value in config["training"].items() if name != "_target_"}
    module = LanguageModeling(model, Training(**settings), seed=config["seed"], replay=build_replay(config))

    with make_trainer(config, run, origin, runner.watch(watched, data)) as (trainer, history):
        if trainer.is_global_zero:
            n_parameter = sum(parameter.numel() for parameter in model.parameters())
            print(f"{run}: {n_parameter:,} parameters, {trainer.max_steps} steps"
                  + (f", going on after step {origin.step} of {origin.path}" if origin else ""))  # fmt: skip
        trainer.fit(module, data, ckpt_path=origin.path if origin else None)
        written = [save_last(trainer, run)]
        logger = wandb_logger(trainer.loggers) if trainer.is_global_zero else None
        results, files, skipped = runner.run_all(model, data, experiments, run, logger)
        if not trainer.is_global_zero:  # all processes measure, the first one reports
            return None
        files += emit(*training_result(model, data, history()), run / "training", logger)
        hint = sync_hint(logger, origin)
    if results:
        print("\n" + summary(results))
    if skipped:
        print("\n" + not_measured(skipped))
    print("\nWritten:", *(f"  {path}" for path in [*written, *files]), sep="\n")
    if hint:
        print(f"\nW&B ran offline. To upload: {hint}")
    recall = [result.metrics.get("exact_match/on") for result in results if result.name == "needle"]
    return recall[0] if recall else None


if __name__ == "__main__":
    main()
