"""Going on with a run that stopped: which one, and whether it is the same one."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memlm.checkpoint import FOLDER, checkpoints, find, read
from memlm.config import ConfigError, target_of
from memlm.files import remove_leftovers
from memlm.printed import printable
from memlm.training.marks import FINISHED, Finished, finished_content, is_alive, leave_out

if TYPE_CHECKING:
    from memlm.data.datamodule import TextData

# What makes two runs the same run. The rest (loggers, paths, devices, precision) may change.
_SAME = ("model", "memory", "data", "curriculum", "training", "replay", "seed")
_SAME_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
# Where text and base are: which these are their hashes tell, see `check_text` and `LanguageModel.settled`.
_PLACES = ("data.path", "data.name", "data.corpus.path", "data.corpus.name", "model.path")
# Settings of these that say how something is computed, not what; see also `Memory.technical`.
_TECHNICAL = ("data.n_worker", "model.gradient_checkpointing", "training.compile")
# Settings that no two jobs of a sweep differ in if they are the same: where files go, and what is gone on with.
_ASIDE = ("paths", "logger", "resume")
_ASIDE_TRAINER = ("max_time",)


class Origin(NamedTuple):
    """What a run goes on from.

    Attributes:
        path: Checkpoint file.
        step: Optimizer steps made.
        entry: What the checkpoint says of its run: config, tokenizer, text, W&B id.
    """

    path: Path
    step: int
    entry: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.path.parent.parent if self.path.parent.name == FOLDER else self.path.parent


def find_in_sweep(config: Mapping[str, Any], sweep: Path) -> Finished | Origin | None:
    """What an earlier start of a sweep has left of one of its jobs.

    Args:
        config: Plain configuration of the job, steps planned.
        sweep: Directory of the sweep, with one run directory for each job.

    Returns:
        The job if it is finished, else its newest checkpoint; None if it has none. Jobs are known by all of their
        settings, not by their numbers: a sweep may be repeated with more values.
    """
    runs = sorted(path.parent for path in sweep.glob(f"*/{FOLDER}"))
    unfinished: list[Origin] = []
    for run in runs:
        content = finished_content(run)
        if content is not None:
            if _whole(content["config"]) == _whole(config):
                return Finished(run, content["value"])
        elif not _is_alive(run, config):
            origin = _newest_of(run, config, lambda there: _whole(there) == _whole(config))
            unfinished += [origin] if origin is not None else []
    if not unfinished:
        return None
    furthest = max(unfinished, key=lambda origin: origin.step)
    remove_leftovers(furthest.run / FOLDER)
    return furthest


def _whole(config: Mapping[str, Any]) -> Any:
    """A configuration as it can be compared with one that was written to a file, maybe before a setting was there."""
    trainer = {name: value for name, value in config["trainer"].items() if name not in _ASIDE_TRAINER}
    rest = {name: node for name, node in config.items() if name not in _ASIDE and node is not None}
    return json.loads(json.dumps(rest | {"trainer": trainer}))


def find_origin(
    resume: str | None, config: Mapping[str, Any], roots: Sequence[Path], text: Callable[[], str] | None = None
) -> Origin | None:
    """The checkpoint that ``resume`` means.

    Args:
        resume: A run directory or checkpoint; ``auto`` for the unfinished run of this configuration below ``roots``
            (stopped in training, or before it was measured) that has made most steps, unless a newer one is finished;
            None for none.
        config: Plain configuration of this run, steps planned.
        roots: Where runs are kept.
        text: Gives the hash of this run's text; without it a run of ``auto`` must have its text in the same place.

    Returns:
        What to go on from, or None to begin anew.

    Raises:
        ConfigError: If there is no such checkpoint, it belongs to another configuration, lacks something, is of a run
            that is still being trained, or nothing is left to train.
    """
    if resume is None:
        return None
    if resume == "auto":
        return _newest(config, roots, text)
    path = find(resume)
    content = _content(path)
    if differences := _differences(config, content["memlm"]["config"]):
        more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
        raise ConfigError(
            f"{path} was trained with other settings: {'; '.join(differences[:5])}{more}. "
            "Give the settings of that run, or leave out resume"
        )
    origin = _origin(path, content, config)
    if _is_alive(origin.run, config):
        raise ConfigError(f"{origin.run} is still being trained by another process: wait until it ends, or stop it")
    if origin.step >= config["trainer"]["max_steps"] and finished_content(origin.run) is not None:
        raise ConfigError(
            f"{path} has made {origin.step} of {config['trainer']['max_steps']} steps: nothing is left to train. "
            "Set trainer.max_steps higher, or measure it with memlm evaluate"
        )
    remove_leftovers(origin.run / FOLDER)
    return origin


def check_text(origin: Origin, data: TextData) -> None:
    """Refuse to go on with another vocabulary or text.

    Raises:
        ConfigError: If the tokenizer or the text is not that of the checkpoint.
    """
    from memlm.data.tokenizer import Tokenizer

    saved = origin.entry["tokenizer"]
    if saved != data.tokenizer.to_json():
        there, here = Tokenizer.from_json(saved).vocab_size, data.tokenizer.vocab_size
        raise ConfigError(
            f"{origin.path} was trained with another vocabulary ({there} tokens there, {here} here): the text or "
            "tokenizer has changed since; put it back, or leave out resume"
        )
    if origin.entry.get("text") not in (None, data.corpus.fingerprint()):
        raise ConfigError(
            f"{origin.path} was trained on another text than {data.corpus.name!r} holds now: "
            "put it back, or leave out resume"
        )


def _content(path: Path, peek: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, if it has a state of training."""
    content = read(path, peek)
    if "global_step" not in content or "optimizer_states" not in content:
        raise ConfigError(f"{path} holds a model but no state of its training: it cannot be resumed")
    if not isinstance(content["memlm"]["config"], dict):
        raise ConfigError(f"{path} is not a checkpoint of memlm: the configuration in it is none")
    return content


def _origin(path: Path, content: Mapping[str, Any], config: Mapping[str, Any]) -> Origin:
    from memlm.training.training_state import check_training_state

    check_training_state(path, content, config)
    return Origin(path, content["global_step"], content["memlm"])


def remove_leftovers_of_runs(run: Path, roots: Sequence[Path]) -> None:
    """Remove what runs beside this one have left that were killed while they wrote, which nobody may go on with."""
    places = [run.parent.glob(f"*/{FOLDER}"), *(root.glob(f"*/*/{FOLDER}") for root in roots)]
    for folder in itertools.chain(*places):
        remove_leftovers(folder)


def refuse_other_run(run: Path, origin: Origin | None) -> None:
    """Refuse a directory that holds a run which is not gone on with: its checkpoints would be mixed with new ones.

    Raises:
        ConfigError: If there are checkpoints.
    """
    taken = (run / FOLDER).is_dir() and bool(checkpoints(run))
    if taken and (origin is None or origin.run.resolve() != run.resolve()):
        raise ConfigError(f"{run} holds a run already: give another hydra.run.dir, or go on with it: resume={run}")


def _is_alive(run: Path, config: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is training the run, as another run than the one of ``config``.

    A run that goes on in its own directory may be marked as alive by its first process before the others look.
    """
    return run.resolve() != Path(config["paths"]["run_dir"]).resolve() and is_alive(run)


def _newest(config: Mapping[str, Any], roots: Sequence[Path], text: Callable[[], str] | None) -> Origin | None:
    """The run with this configuration that is furthest, of those that are not finished.

    Runs older than a finished one are left out: it may have gone on from them.
    """
    times: dict[Path, float] = {}  # of the newest checkpoint
    for root in roots:
        for folder in root.rglob(FOLDER):
            remove_leftovers(folder)
            for path in folder.glob("step=*.ckpt"):
                with contextlib.suppress(OSError):  # a run that is alive removes its old ones
                    times[folder.parent] = max(times.get(folder.parent, 0.0), path.stat().st_mtime)
    unfinished: list[Origin] = []
    finished: Path | None = None
    for run in sorted(times, key=times.__getitem__, reverse=True):
        if _is_alive(run, config):
            print(printable(f"resume=auto: {run} is still being trained; left alone"))
        elif (content := finished_content(run)) is not None:
            try:
                if _same_run(config, content["config"]):
                    finished = run
                    break
            except (AttributeError, KeyError, TypeError) as error:  # no settings that a run has written
                leave_out(ConfigError(f"{run / FINISHED}: {error!r}"))
        else:
            origin = _newest_of(run, config, lambda there: _same_run(config, there))
            if origin is not None and _same_text(config, origin, text):
                unfinished.append(origin)
    if unfinished:
        return max(unfinished, key=lambda origin: origin.step)
    if finished is not None:
        print(printable(f"resume=auto: {finished} is finished; beginning anew"))
    else:
        print(f"resume=auto: no unfinished run with these settings in {' or '.join(map(str, roots))}; beginning anew")
    return None


def _newest_of(run: Path, config: Mapping[str, Any], wanted: Callable[[Mapping[str, Any]], bool]) -> Origin | None:
    """The newest whole checkpoint of a run, if its configuration is ``wanted``."""
    try:
        found = checkpoints(run)
    except OSError as error:
        leave_out(error)
        return None
    for path in reversed(found):
        try:
            if not wanted(_content(path, peek=True)["memlm"]["config"]):
                return None
            return _origin(path, _content(path), config)
        except Exception as error:  # a run of anybody: what is in its files may be anything
            leave_out(error if isinstance(error, ConfigError | OSError) else ConfigError(f"{path}: {error!r}"))
    return None


def _same_text(config: Mapping[str, Any], origin: Origin, text: Callable[[], str] | None) -> bool:
    """Whether the text is where it was, or is the same elsewhere."""
    here, there = config["data"]["corpus"], origin.entry["config"]["data"]["corpus"]
    if all(here.get(name) == there.get(name) for name in ("path", "name")):
        return True
    return text is not None and origin.entry.get("text") == text()


def _same_run(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return not _differences(config, other) and config["trainer"]["max_steps"] == other["trainer"]["max_steps"]


def _differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Settings in which two configurations are not the same run."""
    aside = {*_TECHNICAL, *_PLACES, *_technical_of_memories(config)}
    ours, theirs = ({k: v for k, v in _what(part).items() if k not in aside} for part in (config, other))
    keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    here, there = (_memories(part) for part in (config, other))
    told = []
    if set(here) != set(there):  # said once, and not of each setting that one has and the other lacks
        told.append(f"memory is {'+'.join(here) or 'none'} here, {'+'.join(there) or 'none'} there")
        alone = tuple(f"memory.{name}." for name in set(here) ^ set(there))
        keys = [key for key in keys if key != "memory" and not key.startswith(alone)]
    return told + [f"{key} is {_short(ours.get(key))} here, {_short(theirs.get(key))} there" for key in keys]


def _memories(config: Mapping[str, Any]) -> list[str]:
    """Names of the memories of a configuration, which may come from a file of others."""
    nodes = config.get("memory")
    return list(map(str, nodes)) if isinstance(nodes, Mapping) else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _what(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that make a run what it is, by full name."""
    trainer = config.get("trainer", {})
    parts = (
        {key: config.get(key) for key in _SAME}
        | {"replay": config.get("replay") or {}}
        | {"trainer": {key: trainer.get(key) for key in _SAME_TRAINER}}
    )
    return _flat(parts)


def _technical_of_memories(config: Mapping[str, Any]) -> set[str]:
    """Full names of the settings that say how a memory is computed, as its class tells."""
    return {
        f"memory.{name}.{setting}"
        for name, node in config["memory"].items()
        for setting in getattr(target_of(node, f"memory.{name}"), "technical", ())
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: list(value) if isinstance(value, tuple) else value}
