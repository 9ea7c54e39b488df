"""Train a language model with a memory, and show what the memory remembers.

memlm train model=lmcode memory=ltm
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memlm import threads
from memlm.app.cli import cli
from memlm.config import ConfigError, validate
from memlm.printed import printable

if TYPE_CHECKING:
    from memlm.training.stopping import Answer


def check(config: Mapping[str, Any]) -> None:
    """Refuse what can be told to be wrong without a look at text, files or devices."""
    from memlm.assemble import check_model, sized
    from memlm.evaluation import runner
    from memlm.training.replay import build_replay
    from memlm.training.settings import plan_steps

    config = plan_steps(config)
    build_replay(config)
    runner.chosen(config)
    runner.watched(config["watch"])
    check_model(sized(config))


@cli("train", check)
def main(config: Mapping[str, Any]) -> float | None:
    """Compose, validate, build, fit, report.

    Returns:
        The number that ``optimized_metric`` names, for a hyperparameter search; None if it is not measured.
    """
    from memlm.training.stopping import answering

    with answering() as answer:
        return _train(config, answer)


def _train(config: Mapping[str, Any], answer: Answer) -> float | None:
    from pathlib import Path

    from memlm.assemble import build_corpus, build_data, build_model, build_tokenizer, settled
    from memlm.evaluation import runner
    from memlm.evaluation.emit import emit
    from memlm.evaluation.run_figures import training_result
    from memlm.evaluation.summary import not_measured, summary
    from memlm.training.apart import job_overrides, run_apart, starts_processes
    from memlm.training.marks import Finished, mark_finished
    from memlm.training.resume import check_text, find_in_sweep, find_origin, refuse_other_run
    from memlm.training.settings import build_training, check_device, places_of_runs, plan_steps, sweep_dir

    config = settled(plan_steps(config))
    check_device(config)
    run = Path(config["paths"]["run_dir"])
    experiments, watched = runner.chosen(config), runner.watched(config["watch"])
    sweep = sweep_dir()
    if sweep is None and config["resume"] is None:
        refuse_other_run(run, None)  # before minutes of reading text; once more where it is locked
    corpus = build_corpus(config)
    answer.text = f"stopped before {run} began: give the command again"
    earlier = find_in_sweep(config, sweep) if sweep is not None and config["resume"] is None else None
    if isinstance(earlier, Finished):
        print(printable(f"{earlier.run}: finished with these settings, skipped"))
        return earlier.value
    origin = earlier or find_origin(config["resume"], config, places_of_runs(config), corpus.fingerprint)
    if sweep is not None and starts_processes(config):
        lines = [line for line in job_overrides() if not line.startswith("resume=")]
        return run_apart(__file__, [*lines, *([f"resume={origin.path}"] if origin else [])], run)

    if origin is not None:
        answer.text = f"stopped before {run} began: resume={origin.run} goes on after step {origin.step}"
        threads.keep(origin.entry.get("threads"))
    tokenizer = build_tokenizer(config, corpus)
    # From here on with lightning, which takes seconds to import: what can be wrong without it was told by now.
    from memlm.training.fit import make_trainer, save_last
    from memlm.training.loggers import sync_hint, wandb_logger
    from memlm.training.module import LanguageModeling
    from memlm.training.replay import build_replay

    validate(config)
    data = build_data(config, tokenizer, corpus)
    if origin is not None:
        check_text(origin, data)
    data.setup()
    model = build_model(config, data.tokenizer)
    if config["trainer"]["max_steps"] and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "nothing of this model is trained, as its base is frozen and its memory has no weights: set "
            "trainer.max_steps=0 to measure it as it is, model.lora={r: 8}, or model.freeze=false"
        )
    module = LanguageModeling(model, build_training(config), seed=config["seed"], replay=build_replay(config))

    with make_trainer(config, run, origin, runner.watch(watched, data)) as (trainer, history):
        if trainer.is_global_zero:
            n_parameter = sum(parameter.numel() for parameter in model.parameters())
            n_process = f" on {trainer.world_size} processes" if trainer.world_size > 1 else ""
            going_on = f", going on after step {origin.step} of {origin.path}" if origin else ""
            print(printable(f"{run}: {n_parameter:,} parameters, {trainer.max_steps} steps{n_process}{going_on}"))
            print(threads.told())
        answer.text = f"stopped: resume=auto goes on, if there is a checkpoint in {run}"
        trainer.fit(module, data, ckpt_path=origin.path if origin else None)
        answer.text = f"training is complete, measuring was stopped: memlm train resume={run} measures it"
        written = [save_last(trainer, run)]
        logger = wandb_logger(trainer.loggers) if trainer.is_global_zero else None
        results, files, skipped = runner.run_all(model, data, experiments, run, logger)
        if not trainer.is_global_zero:  # all processes measure, the first one reports
            return None
        files += emit(*training_result(model, data, history()), run / "training", logger)
        hint = sync_hint(logger, origin)
        experiment, _, metric = config["optimized_metric"].partition("/")
        value = next((result.metrics.get(metric) for result in results if result.name == experiment), None)
        mark_finished(run, config, value)  # while it is alive, and before what is printed, which may go nowhere
    if value is None and any(result.name == experiment for result in results):
        print(f"\noptimized_metric={experiment}/{metric} was not measured; see result.json for the names of numbers")
    if results:
        print("\n" + summary(results))
    if skipped:
        print("\n" + not_measured(skipped))
    print("\nWritten:", *(f"  {path}" for path in [*written, *files]), sep="\n")
    if hint:
        print(f"\nW&B ran offline. To upload: {hint}")
    return value


def start() -> None:
    """What the command line runs."""
    main()


if __name__ == "__main__":
    start()
