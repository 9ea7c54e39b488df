"""What is trained when: a fixed sequence of phases, a pure function of the step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from memlm.config import ConfigError, check_arguments, check_kind, did_you_mean, instantiate

_MOST = 10**9
_MOST_SEGMENTS = 10**6  # of a batch


@dataclass(frozen=True)
class Phase:
    """A stretch of training with the same kind of batches.

    Attributes:
        steps: Number of batches.
        n_row: Documents (rows) per batch.
        n_segment: Segments per window, across which gradients flow.
        task: Settings of the curriculum's task, by the parameters of its ``document``; None for plain text.
        n_window: Windows per document of the task; what is told in one may be asked in a later one.
        memory: Settings of memories by ``name.attribute``, such as ``ltm.write_budget``; a pair of numbers goes
            linearly from the first to the second over the phase. Names that the model lacks are skipped.
    """

    steps: int
    n_row: int
    n_segment: int
    task: Mapping[str, Any] | None = None
    n_window: int = 1
    memory: Mapping[str, Any] = field(default_factory=dict)


class Curriculum:
    """Phases, one after the other; the last one goes on as long as training does.

    Args:
        phases: Settings of each `Phase`, in order.
        task: Node (with its ``_target_``) of the `memlm.data.tasks.base.Task` that phases may train; None for none.

    Raises:
        ConfigError: If there is no phase, or one has an unknown or impossible setting.
    """

    def __init__(self, phases: Sequence[Mapping[str, Any]], task: Mapping[str, Any] | None = None) -> None:
        self.task = task
        if not phases:
            raise ConfigError("curriculum.phases is empty: give at least one phase with steps, n_row and n_segment")
        names = [f.name for f in fields(Phase)]
        self.phases: list[Phase] = []
        if task is not None and (not isinstance(task, Mapping) or "_target_" not in task):
            raise ConfigError(f"curriculum.task must be null, or name a task by its _target_, got {task!r}")
        for i, settings in enumerate(phases):
            if not isinstance(settings, Mapping):
                raise ConfigError(f"curriculum.phases[{i}] must be the settings of a phase, got {settings!r}")
            for name in settings:
                if name not in names:
                    raise ConfigError(
                        f"curriculum.phases[{i}] has no setting {name!r}.{did_you_mean(str(name), names)} "
                        f"Known: {', '.join(names)}"
                    )
            missing = [name for name in ("steps", "n_row", "n_segment") if name not in settings]
            if missing:
                raise ConfigError(f"curriculum.phases[{i}] lacks {', '.join(missing)}")
            check_arguments(f"{Phase.__module__}.Phase", settings, f"curriculum.phases[{i}]", ())
            phase = Phase(**settings)
            for name in ("steps", "n_row", "n_segment", "n_window"):
                if getattr(phase, name) < 1:
                    raise ConfigError(f"curriculum.phases[{i}].{name} must be at least 1, got {getattr(phase, name)}")
                if getattr(phase, name) > _MOST:
                    raise ConfigError(f"curriculum.phases[{i}].{name} must be at most {_MOST}")
            if phase.n_row * phase.n_segment > _MOST_SEGMENTS:
                raise ConfigError(
                    f"curriculum.phases[{i}] asks for {phase.n_row:,} rows of {phase.n_segment:,} segments in a batch: "
                    f"give n_row and n_segment of which the product is at most {_MOST_SEGMENTS:,}"
                )
            if phase.task is not None:
                if task is None:
                    raise ConfigError(f"curriculum.phases[{i}].task needs a curriculum.task, which is null")
                key, supplied = f"curriculum.phases[{i}].task", ("self", "rng", "passage", "segment_len")
                check_arguments(f"{task['_target_']}.document", phase.task, key, supplied)
            self.phases.append(phase)

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def starts(self) -> list[int]:
        """The first step of each phase."""
        return [0, *itertools.accumulate(phase.steps for phase in self.phases[:-1])]

    @property
    def has_task(self) -> bool:
        """Whether any phase trains the task."""
        return any(phase.task is not None for phase in self.phases)

    def at(self, step: int) -> tuple[int, Phase, int]:
        """Phase of a step.

        Returns:
            Index of the phase, the phase, and the step within it.
        """
        for i, phase in enumerate(self.phases[:-1]):
            if step < phase.steps:
                return i, phase, step
            step -= phase.steps
        return len(self.phases) - 1, self.phases[-1], step

    def memory_settings(self, step: int) -> dict[str, Any]:
        """Settings of memories at a step, by ``name.attribute``."""
        _, phase, within = self.at(step)
        part = min(within / max(phase.steps - 1, 1), 1.0)
        return {
            name: _between(value[0], value[1], part) if isinstance(value, list | tuple) else value
            for name, value in phase.memory.items()
        }


def build_curriculum(config: Mapping[str, Any]) -> Curriculum:
    """The curriculum of ``config["curriculum"]``.

    Raises:
        ConfigError: If its ``_target_`` is no `Curriculum`, or a setting cannot work.
    """
    check_kind(config["curriculum"], "curriculum", Curriculum)
    return instantiate(config["curriculum"], "curriculum")


def _between(first: float, last: float, part: float) -> float:
    """The number a share ``part`` of the way from ``first`` to ``last``; whole if both are."""
    value = first + (last - first) * part
    return round(value) if isinstance(first, int) and isinstance(last, int) else value
