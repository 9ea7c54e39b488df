"""Settings of optimisation: light, so that a wrong value is told before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from memlm.config import ConfigError


@dataclass(frozen=True)
class Training:
    """How weights are trained: AdamW, linear warm-up, then a cosine.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Decay of matrices; vectors, scalars and embeddings are not decayed.
        betas: Of AdamW.
        warmup_steps: Steps of linear warm-up.
        min_lr_ratio: Learning rate at the end of the cosine, as a share of ``lr``.
        answer_weight: Weight in the loss of answers to questions about planted facts; other tokens weigh 1.
        compile: Compile the model's forward pass for training steps. Evaluation is never compiled.

    Raises:
        ConfigError: If a value cannot work; the message names it.
    """

    lr: float = 3e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    min_lr_ratio: float = 0.05
    answer_weight: float = 5.0
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if not self.lr > 0:
            raise ConfigError(f"training.lr must be above 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"training.betas must be two numbers in [0, 1), got {list(self.betas)}")
        for name in ("weight_decay", "warmup_steps", "answer_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"training.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"training.min_lr_ratio must be in 0..1, got {self.min_lr_ratio}")
