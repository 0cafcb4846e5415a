"""The settings of the experiments on a finished run: frozen, checked, no torch.

They are no part of a run's identity: asking for another experiment never trains anything again.
As in `config`, a default here is part of the result format and is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlib.config import Schedule
from memlib.errors import InputError

BatchNorm = Literal["final", "rewound", "recalibrated"]
Kind = Literal["clean", "noisy"]


@dataclass(frozen=True, kw_only=True)
class RewindingConfig:
    """E2: which layer groups are put back to which epochs.

    epochs: of the kept checkpoints; empty for all of them but the last.
    sets: `single` (each group alone), `prefixes` (the first two, three, ...), `suffixes` (the last two,
    three, ...), or names joined by `+`, such as `conv4+classifier`.
    batchnorm: running statistics stay `final` (the paper), are `rewound` with their group, or `recalibrated`
    on the training images.
    limit: examples of each split that are evaluated, a seeded draw; None for all.
    """

    epochs: tuple[int, ...] = ()
    sets: tuple[str, ...] = ("single",)
    batchnorm: BatchNorm = "final"
    limit: int | None = None

    def __post_init__(self) -> None:
        if any(epoch < 0 for epoch in self.epochs):
            raise InputError(f"rewinding.epochs is {list(self.epochs)}; give epochs from 0 (initialization) upwards.")
        _check_limit("rewinding", self.limit)


@dataclass(frozen=True, kw_only=True)
class RetrainingConfig:
    """E3: each group alone is reset to `reset_epoch` and trained again, everything else frozen.

    on: train on the `clean` examples (the paper), on the `noisy` ones (the control), or both in turn.
    patience: epochs of 100 % training accuracy after which it stops.
    peak_lr: reached after `warmup`, a share of the epochs (0.4 as in the paper's triangular base runs).
    limit: examples of each split that are evaluated after every epoch, a seeded draw; None for all.
    """

    on: tuple[Kind, ...] = ("clean",)
    reset_epoch: int = 0
    epochs: int = 20
    batch_size: int = 512
    peak_lr: float = 0.01
    schedule: Schedule = "triangular"
    warmup: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    patience: int = 3
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, smallest in (("reset_epoch", 0), ("epochs", 1), ("batch_size", 2), ("patience", 1)):
            if getattr(self, name) < smallest:
                raise InputError(f"retraining.{name} is {getattr(self, name)}; give at least {smallest}.")
        if not self.peak_lr > 0:
            raise InputError(f"retraining.peak_lr is {self.peak_lr}; give a value above 0, e.g. 0.01.")
        for name in ("warmup", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"retraining.{name} is {getattr(self, name)}; give a value in [0, 1).")
        if not self.on or len(set(self.on)) < len(self.on):
            raise InputError(f"retraining.on is {list(self.on)}; give 'clean', 'noisy' or both, each once.")
        _check_limit("retraining", self.limit)


@dataclass(frozen=True, kw_only=True)
class ExperimentsConfig:
    """The experiments wanted of a finished run; None where one is not."""

    rewinding: RewindingConfig | None = None
    retraining: RetrainingConfig | None = None


def _check_limit(experiment: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"{experiment}.limit is {limit}; give at least 1, or leave it out for all examples.")
