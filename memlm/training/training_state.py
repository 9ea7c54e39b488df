"""Whether a checkpoint holds all that its run goes on with: training state that lacks a part trains something else.

Shapes: B rows, N tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from memlm.config import ConfigError
from memlm.data.curriculum import Curriculum
from memlm.tensors import Host
from memlm.version import __version__


class _Unfit(Exception):
    """What does not fit; becomes a ConfigError with the name of the file."""


def check_training_state(path: Path, content: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a run could not go on from exactly.

    Args:
        path: The file, for the errors.
        content: What it holds.
        config: Plain configuration of the run that is to go on, with the model, memories and curriculum of the
            checkpoint.

    Raises:
        ConfigError: If weights, moments, schedule, loops, callbacks, carried rows or replayed windows lack a part, have
            other shapes, types or numbers than such a run has written, or are of another version.
    """
    _check_versions(path, content)
    try:
        step = content["global_step"]
        if type(step) is not int or step < 0:
            raise _Unfit(f"global_step is {step!r}")
        model = _blank_model(config, content["memlm"]["tokenizer"])
        _check_weights(content["state_dict"], model)
        n_batch = step * config["trainer"]["accumulate_grad_batches"]
        _check_loops(content.get("loops"), step, n_batch)
        _check_optimizer(content, model, config["training"], step)
        if content.get("callbacks") != {}:
            raise _Unfit("callbacks is not empty, as it is for callbacks of memlm, which have no state")
        _check_carried(content, model, config["curriculum"], n_batch)
        _check_replay(content, model.n_vocab, config)
    except _Unfit as error:
        raise ConfigError(
            f"{path} cannot be gone on with, it was damaged or changed: {error}; use an earlier checkpoint of the run"
        ) from error


def _check_versions(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another memlm or Lightning, but for its last digits."""
    found = {
        "memlm": (content["memlm"].get("version"), __version__),
        "lightning": (content.get("pytorch-lightning_version"), version("lightning")),
    }
    for name, (there, here) in found.items():
        if not isinstance(there, str) or there.split(".")[:2] != here.split(".")[:2]:
            raise ConfigError(
                f"{path} was written by {name} {there!r}, this is {name} {here}, which may train otherwise: go on with "
                "the version that wrote it, or leave out resume"
            )


def _blank_model(config: Mapping[str, Any], tokenizer: str) -> Any:
    """The model of a configuration, without its numbers."""
    from memlm.assemble import build_model
    from memlm.data.tokenizer import Tokenizer

    try:
        n_vocab = Tokenizer.from_json(tokenizer).vocab_size
    except Exception as error:  # of a parser, on what may be anything
        raise _Unfit("its tokenizer cannot be read") from error
    stub: Any = SimpleNamespace(vocab_size=n_vocab)
    with torch.device("meta"):
        return build_model(dict(config), stub)


def _check_weights(weights: Any, model: Any) -> None:
    wanted = {f"model.{name}": part for name, part in model.state_dict().items()}
    if not isinstance(weights, Mapping):
        raise _Unfit("state_dict is no mapping")
    _check_names("state_dict", weights, wanted)
    trained = {f"model.{name}" for name, _ in model.named_parameters()}
    for name, part in wanted.items():
        # Buffers may hold infinite numbers, such as the priority of an empty slot.
        _check_tensor(f"state_dict[{name}]", weights[name], part, finite=name in trained)


def _check_names(where: str, found: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> None:
    if lacks := [name for name in wanted if name not in found]:
        raise _Unfit(f"{where} lacks {_some(lacks)}")
    if extra := [name for name in found if name not in wanted]:
        raise _Unfit(f"{where} holds {_some(extra)}, which this run has not")


def _some(names: Sequence[Any]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(str(name) for name in names[:3]) + more


def _check_tensor(where: str, part: Any, like: Tensor, finite: bool = True) -> None:
    if not isinstance(part, Tensor):
        raise _Unfit(f"{where} is no tensor but of type {type(part).__name__}")
    if (part.shape, part.dtype) != (like.shape, like.dtype):
        raise _Unfit(
            f"{where} has shape {tuple(part.shape)} of {part.dtype}, expected {tuple(like.shape)} of {like.dtype}"
        )
    if part.is_floating_point() and not (part.isfinite() if finite else ~part.isnan()).all():
        raise _Unfit(f"{where} holds numbers that are not finite")


def _check_optimizer(content: Mapping[str, Any], model: Any, training: Mapping[str, Any], step: int) -> None:
    """AdamW and its schedule, see `memlm.training.optimizer`; parameters are numbered by place."""
    from memlm.training.optimizer import decay_groups

    states, schedules = content["optimizer_states"], content.get("lr_schedulers")
    for name, parts in (("optimizer_states", states), ("lr_schedulers", schedules)):
        if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
            raise _Unfit(f"{name} is not the state of one optimizer")
    optimizer, schedule = states[0], schedules[0]  # type: ignore[index]
    _check_names("optimizer_states[0]", optimizer, {"state": None, "param_groups": None})
    parameters = list(model.parameters())
    place = {id(parameter): i for i, parameter in enumerate(parameters)}
    groups, wanted = optimizer["param_groups"], decay_groups(model, training["weight_decay"])
    if not isinstance(groups, list) or len(groups) != len(wanted) or not all(isinstance(g, dict) for g in groups):
        raise _Unfit(f"optimizer_states[0].param_groups is not a list of {len(wanted)} groups")
    rates = schedule.get("_last_lr")
    for i, (group, own) in enumerate(zip(groups, wanted, strict=True)):
        exact = {
            "params": [place[id(parameter)] for parameter in own["params"]],
            "weight_decay": own["weight_decay"],
            "betas": tuple(training["betas"]),
            "initial_lr": training["lr"],
            "lr": rates[i] if isinstance(rates, list) and len(rates) == len(wanted) else None,
        }
        for name, value in exact.items():
            found = group.get(name)
            if (tuple(found) if name == "betas" and isinstance(found, list) else found) != value:
                raise _Unfit(f"optimizer_states[0].param_groups[{i}].{name} is not that of this run")
    if schedule.get("last_epoch") != step or schedule.get("_step_count") != step + 1:
        raise _Unfit(f"lr_schedulers[0] stands at step {schedule.get('last_epoch')}, global_step is {step}")
    if schedule.get("base_lrs") != [training["lr"]] * len(wanted):
        raise _Unfit("lr_schedulers[0].base_lrs is not training.lr")
    moments = optimizer["state"]
    if not isinstance(moments, dict) or len(moments) != content["memlm"].get("n_moment"):
        raise _Unfit("optimizer_states[0].state lacks moments of weights, or has too many")
    for i, entry in moments.items():
        where = f"optimizer_states[0].state[{i}]"
        if type(i) is not int or not 0 <= i < len(parameters) or not isinstance(entry, dict):
            raise _Unfit(f"{where} is not the state of a weight")
        like = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[i])
        _check_names(where, entry, {"step": None, **like})
        for name, part in like.items():
            _check_tensor(f"{where}.{name}", entry[name], part)
        count = entry["step"]
        if not isinstance(count, Tensor) or count.numel() != 1 or not 1 <= float(count) <= step:
            raise _Unfit(f"{where}.step is not a step of this run")
        if (entry["exp_avg_sq"] < 0).any():
            raise _Unfit(f"{where}.exp_avg_sq holds negative numbers")


def _check_loops(loops: Any, step: int, n_batch: int) -> None:
    """What Lightning says of the place of a run, which is a function of its step."""
    import lightning

    from memlm.training.told import quiet

    with quiet():
        trainer = lightning.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    names = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
    wanted = dict(_leaves({name: getattr(trainer, name).state_dict() for name in names}))
    found = dict(_leaves(loops)) if isinstance(loops, dict) else {}
    _check_names("loops", found, wanted)
    fit = "fit_loop.epoch_loop."
    for name, value in found.items():
        if type(value) is not type(wanted[name]) or (type(value) is int and value < 0):
            raise _Unfit(f"loops.{name} is {value!r}")
        if name.startswith(f"{fit}batch_progress.") and type(value) is int:
            allowed = {n_batch - 1, n_batch} if name.endswith("completed") else {n_batch}
        elif name.startswith((f"{fit}scheduler_progress.", f"{fit}automatic_optimization.optim_progress.")):
            allowed = {step}
        elif name.startswith("fit_loop.epoch_progress."):
            allowed = {0, 1}
        elif name == f"{fit}state_dict._batches_that_stepped":
            allowed = {step - 1, step}
        else:
            continue
        if value not in allowed:
            raise _Unfit(f"loops.{name} is {value}, which is not the place of step {step}")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, part in node.items():
            yield from _leaves(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, node


def _check_carried(content: Mapping[str, Any], model: Any, curriculum: Mapping[str, Any], n_batch: int) -> None:
    """The rows that go on: those of the last batch, unless its documents ended."""
    if "carried" not in content:
        raise _Unfit("carried is missing, the state that rows go on with")
    carried = content["carried"]
    _, phase, within = Curriculum(curriculum["phases"], curriculum["task"]).at(max(n_batch - 1, 0))
    ended = phase.task is not None and within % phase.n_window == phase.n_window - 1
    if n_batch == 0 or ended:
        if carried is not None:
            raise _Unfit("carried holds rows, but all documents ended with the last batch")
        return
    state = model.init_state(phase.n_row)
    shared = [name for name, modules in model.memory.items() if modules[0].scope == "shared"]
    state = state._replace(memory={name: () if name in shared else part for name, part in state.memory.items()})
    _check_like("carried", carried, state)
    _check_range("carried.local.ids", carried["local"]["ids"], model.n_vocab)
    _check_range("carried.local.n_open", carried["local"]["n_open"], model.segment_len)


def _check_like(where: str, found: Any, like: Any) -> None:
    """Raise unless what was saved has the parts, shapes and types of a state."""
    like = like.tensor if isinstance(like, Host) else like
    if isinstance(like, Tensor):
        _check_tensor(where, found, like, finite=False)
    elif like is None:
        if found is not None:
            raise _Unfit(f"{where} holds something, this run has nothing there")
    elif hasattr(like, "_fields") or isinstance(like, dict):
        parts = like._asdict() if hasattr(like, "_fields") else like
        if not isinstance(found, dict):
            raise _Unfit(f"{where} is no mapping")
        _check_names(where, found, parts)
        for name, part in parts.items():
            _check_like(f"{where}.{name}", found[name], part)
    else:
        if not isinstance(found, list) or len(found) != len(like):
            raise _Unfit(f"{where} is not a list of {len(like)} parts")
        for i, (one, part) in enumerate(zip(found, like, strict=True)):
            _check_like(f"{where}[{i}]", one, part)


def _check_range(where: str, part: Tensor, end: int) -> None:
    if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < end:
        raise _Unfit(f"{where} holds numbers outside of 0..{end - 1}")


def _check_replay(content: Mapping[str, Any], n_vocab: int, config: Mapping[str, Any]) -> None:
    """The buffers of all processes, see `memlm.training.replay.Replay.state_dict`."""
    from memlm.training.replay import Window

    settings = config["replay"]
    if ("replay" in content) != bool(settings):
        raise _Unfit("replay is missing" if settings else "it holds windows to replay, this run replays nothing")
    if not settings:
        return
    parts = content["replay"]
    if not isinstance(parts, list) or not parts:
        raise _Unfit("replay is not a list of buffers")
    types = {"ids": torch.int64, "targets": torch.int64, "weight": torch.float32}  # all else is marks
    for i, part in enumerate(parts):
        where = f"replay[{i}]"
        if not isinstance(part, dict):
            raise _Unfit(f"{where} is no mapping")
        _check_names(where, part, {"windows": None, "losses": None, "n_seen": None})
        windows, losses = part["windows"], part["losses"]
        if not isinstance(windows, list) or not isinstance(losses, list) or len(windows) != len(losses):
            raise _Unfit(f"{where} has not a loss for each window")
        if type(part["n_seen"]) is not int or part["n_seen"] < len(windows) or len(windows) > settings["capacity"]:
            raise _Unfit(f"{where} holds more windows than it has seen or has room for")
        if not all(isinstance(loss, float) and abs(loss) < float("inf") for loss in losses):
            raise _Unfit(f"{where}.losses holds something else than finite numbers")
        for j, window in enumerate(windows):
            name = f"{where}.windows[{j}]"
            if not isinstance(window, dict) or not isinstance(window.get("ids"), Tensor):
                raise _Unfit(f"{name} is no window")
            _check_names(name, window, dict.fromkeys(Window._fields))
            n_token = window["ids"].numel()  # N
            n_segment = n_token // config["model"]["segment_len"]
            for field in Window._fields:
                dtype = types.get(field, torch.bool)
                shape = (n_segment if field in ("reset", "breaks") else n_token,)
                _check_tensor(f"{name}.{field}", window[field], torch.empty(shape, dtype=dtype, device="meta"))
            for field in ("ids", "targets"):
                _check_range(f"{name}.{field}", window[field], n_vocab)
