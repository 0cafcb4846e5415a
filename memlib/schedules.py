"""The learning rate at every step; no torch.

Paper: the experimental setting. `cosine`: linear warm-up, then cosine to 0 (main setting). `triangular`:
linear up, linear down to 0 (base models of layer retraining and the neuron search). `one_cycle`: cosine
up from peak / 25, cosine down to almost 0 (example-tied dropout).
"""

from __future__ import annotations

import math

from memlib.config import TrainingConfig
from memlib.experiments import RetrainingConfig

ONE_CYCLE_START = 1 / 25  # of the peak, as in torch.optim.lr_scheduler.OneCycleLR
ONE_CYCLE_END = 1 / 25e4


def learning_rate(config: TrainingConfig | RetrainingConfig, *, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step` in [0, steps).

    The warm-up takes `config.warmup` of all steps and ends at the peak; its first step already moves.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        rise = (step + 1) / warmup
        return config.peak_lr * (_ease(ONE_CYCLE_START, 1.0, rise) if config.schedule == "one_cycle" else rise)
    fall = (step - warmup) / (steps - warmup)
    if config.schedule == "triangular":
        return config.peak_lr * (1 - fall)
    return config.peak_lr * _ease(1.0, ONE_CYCLE_END if config.schedule == "one_cycle" else 0.0, fall)


def _ease(start: float, end: float, share: float) -> float:
    """Return the value `share` of the way from `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
