"""Runs that take a second: a tiny model on made-up text, trained as train.py does it but measured by nothing."""

import copy
import functools
import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf

from memlm.assemble import build_corpus, build_data, build_model, build_tokenizer
from memlm.compose import compose, to_dict
from memlm.training.fit import make_trainer
from memlm.training.module import LanguageModeling
from memlm.training.replay import build_replay
from memlm.training.resume import check_text, find_origin
from memlm.training.settings import Training, places_of_runs, plan_steps

Rows = list[dict[str, Any]]

FACTS = {"steps": 100, "n_row": 2, "n_segment": 2, "task": {"items": 2}, "n_window": 3}  # three windows a document
SHORT = {"steps": 100, "n_row": 2, "n_segment": 2, "task": {"items": 2}}  # of one
PLAIN = {"steps": 100, "n_row": 2, "n_segment": 2}
CURRICULA = {"facts": FACTS, "short": SHORT, "plain": PLAIN}


def write_text(folder: Path, n_word: int = 12_000, seed: int = 0) -> Path:
    rng = random.Random(seed)
    words = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(150)]
    path = folder / "text.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = (" ".join(rng.choice(words) for _ in range(rng.randint(4, 40))) for _ in range(n_word // 20))
        path.write_text("\n".join(lines) + "\n")
    return path


MODEL = ["n_layer=2", "n_head=2", "d_model=16", "segment_len=16", "overlap=4", "dropout=0.1"]
MEMORY = {
    "ltm": ["n_slot=64", "d_key=8", "top_k=4", "write_budget=6", "span=2"],
    "stm": ["n_slot=3", "n_head=2", "update_rate=0.5"],
}
TRAINER = ["max_steps=9", "log_every_n_steps=1", "val_check_interval=4", "limit_val_batches=2"]


def overrides(folder: Path, memory: str = "ltm") -> list[str]:
    """Of a tiny run below ``folder``, as they may stand on a command line."""
    parts = {"none": [], "dual": ["stm", "ltm"]}.get(memory, [memory])
    return [
        *("data=text", f"data.path={write_text(folder)}", "data.tokenizer.kind=word", "data.tokenizer.vocab_size=400"),
        *(f"model.{setting}" for setting in MODEL),
        *(f"memory={memory}", *(f"memory.{part}.{setting}" for part in parts for setting in MEMORY[part])),
        *("trainer=cpu", *(f"trainer.{setting}" for setting in TRAINER), "trainer.enable_progress_bar=false"),
        *("logger=csv", "watch=null", "checkpoint.every=3", "training.warmup_steps=2", f"paths.root={folder}"),
    ]


@functools.cache
def _composed(groups: tuple[str, ...]) -> DictConfig:
    return compose(groups)


def config(
    folder: Path,
    run: str,
    *more: str,
    memory: str = "ltm",
    logger: str = "csv",
    replay: str = "none",
    phases: Sequence[dict[str, Any]] = (FACTS,),
) -> dict[str, Any]:
    """Plain settings of a tiny run in ``folder / run``. ``more`` are settings, not options of groups."""
    lines = overrides(folder, memory)
    groups = tuple(line for line in lines if line.split("=")[0] in ("data", "memory", "trainer"))
    cfg = copy.deepcopy(_composed((*groups, "data.path=x", f"logger={logger}", f"replay={replay}")))
    settings = [line for line in lines if line not in groups and not line.startswith("logger=")]
    cfg.merge_with_dotlist([*settings, f"paths.run_dir={folder / run}", *more])
    cfg.curriculum.phases = OmegaConf.create(list(phases))
    return plan_steps(to_dict(cfg))


def fit(
    settings: dict[str, Any],
    watch: Any = None,
    before_step: Callable[[LanguageModeling, Any], None] | None = None,
    **changes: Any,
) -> tuple[lightning.Trainer, LanguageModeling, Rows]:
    """Train as train.py does. ``before_step`` is called with the module and each batch."""
    run = Path(settings["paths"]["run_dir"])
    origin = find_origin(settings["resume"], settings, places_of_runs(settings))
    corpus = build_corpus(settings)
    data = build_data(settings, build_tokenizer(settings, corpus), corpus)
    if origin is not None:
        check_text(origin, data)
    training = Training(**{k: v for k, v in settings["training"].items() if k != "_target_"})
    changes = {"seed": settings["seed"], "replay": build_replay(settings)} | changes
    module = LanguageModeling(build_model(settings, data.tokenizer), training, **changes)
    if before_step is not None:
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Any:
            before_step(module, batch)
            return step(batch, batch_idx)

        module.training_step = training_step  # type: ignore[method-assign]
    with make_trainer(settings, run, origin, watch) as (trainer, history):
        trainer.fit(module, data, ckpt_path=origin.path if origin else None)
    return trainer, module, history()


def fit_until_killed(settings: dict[str, Any], step: int) -> None:
    """Train in a process of its own, which is killed with signal 9 before it trains batch ``step``."""

    def kill(module: LanguageModeling, batch: Any) -> None:
        if batch.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    fit_until_it_kills_itself(settings, kill)


def fit_until_it_kills_itself(settings: dict[str, Any], before_step: Any) -> None:
    """Train in a process of its own, which ends itself with signal 9."""
    child = os.fork()
    if child == 0:
        try:
            fit(settings, before_step=before_step)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def curve(rows: Rows, name: str = "train/loss") -> dict[int, float]:
    """What was logged under a name, by step; each step once."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    assert len(found) == len(dict(found)), f"{name} was logged twice for a step"
    return dict(found)
