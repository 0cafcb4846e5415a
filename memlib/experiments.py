"""The settings of the experiments on a finished run: frozen, checked, no torch.

They are no part of a run's identity: asking for another experiment never trains anything again.
As in `config`, a default here is part of the result format and is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlib.config import Precision, Schedule
from memlib.errors import InputError

BatchNorm = Literal["final", "rewound", "recalibrated"]
Kind = Literal["clean", "noisy"]
Removal = Literal["filter", "activation"]


@dataclass(frozen=True, kw_only=True)
class RewindingConfig:
    """E2: which layer groups are put back to which epochs.

    epochs: of the kept checkpoints; empty for all of them but the last.
    sets: `single` (each group alone), `prefixes` (the first two, three, ...), `suffixes` (the last two,
    three, ...), or names joined by `+`, such as `conv4+classifier`.
    batchnorm: running statistics stay `final` (the paper), are `rewound` with their group, or `recalibrated`
    on the training images, augmented if training was.
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
class CriticalUnitsConfig:
    """E4: how the units that hold one example are searched for; the defaults are the paper's, searched exactly.

    examples: how many clean and how many noisy ones a sweep searches, in parts of `part_size`, a task each.
    limit: training examples on which edited networks are judged, a class-balanced draw; None for all.
    early_epoch: the newest kept checkpoint up to this epoch, before noise was memorized, tells clean examples which are
    learned from the others' labels from those that are memorized too; None for no such split.
    removal: `filter` sets a unit's weight row to zero, `activation` what comes out behind its BatchNorm and activation.
    reference_size: other examples whose mean loss is to stay low, drawn once for all examples of a run.
    copies: noisy copies of an example over which its logits are averaged, in gradients and in the flip test.
    reference_copies: the same for the reference examples; fewer is an approximation.
    noise: expected norm of a copy's Gaussian noise, as a share of the norm of the (normalized) input.
    max_steps: units removed at most; an example that has not flipped by then is recorded as not flipped.
    refresh: steps for which the reference part of the gradient is used; above 1 is an approximation.
    precision: of the reference part of the gradient and of the edited networks' accuracies. In bfloat16 the former is
    computed again in float32 wherever bfloat16's measured error leaves open which unit goes; the example's own part
    and the flip test are always float32's.
    """

    examples: int = 1000
    part_size: int = 50
    limit: int | None = None
    early_epoch: int | None = None
    removal: Removal = "filter"
    reference_size: int = 512
    copies: int = 5
    reference_copies: int = 5
    noise: float = 0.01
    max_steps: int = 100
    refresh: int = 1
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("examples", "part_size", "reference_size", "copies", "reference_copies", "max_steps", "refresh"):
            if getattr(self, name) < 1:
                raise InputError(f"critical_units.{name} is {getattr(self, name)}; give at least 1.")
        if self.examples % self.part_size:
            raise InputError(
                f"critical_units.examples is {self.examples}, which is no multiple of critical_units.part_size "
                f"({self.part_size}); give one, so that asking for more examples later repeats none."
            )
        _check_limit("critical_units", self.limit)
        if not 0 <= self.noise < 1:
            raise InputError(
                f"critical_units.noise is {self.noise}; give a share of the input's norm in [0, 1), e.g. 0.01 for 1 %."
            )


@dataclass(frozen=True, kw_only=True)
class CrossValidationConfig:
    """Out-of-sample predictions for the run's training examples, by networks without dropout.

    folds: parts of the training set, and networks: each is trained on all parts but one, and predicts that one.
    epochs: of their training; None for the run's own. The other settings of training are the run's.
    """

    folds: int = 5
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise InputError(
                f"cross_validation.folds is {self.folds}; give at least 2, what is trained on and one more."
            )
        if self.epochs is not None and self.epochs < 1:
            raise InputError(
                f"cross_validation.epochs is {self.epochs}; give at least 1, or leave it out for the run's."
            )


@dataclass(frozen=True, kw_only=True)
class ExperimentsConfig:
    """The experiments wanted of a finished run; None where one is not."""

    rewinding: RewindingConfig | None = None
    retraining: RetrainingConfig | None = None
    critical_units: CriticalUnitsConfig | None = None
    cross_validation: CrossValidationConfig | None = None


def _check_limit(experiment: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"{experiment}.limit is {limit}; give at least 1, or leave it out for all examples.")
