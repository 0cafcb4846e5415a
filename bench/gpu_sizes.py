"""At what size `bench/gpu.py` works: the paper's, or a tiny one that a CPU does in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memlib.config import ModelConfig
from memlib.datasets import Dataset, load_dataset
from memlib.models import build_model

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """What is computed.

    models: batch size of a training step by model name. evaluation_batches: images a forward pass.
    seeds: numbers of networks trained at once on one card, the first is the reference. steps: of a timed round.
    worker_seconds: for which processes that share the card are timed.
    first_seconds: what training a run and a task of each experiment may take, until one has been timed.
    preset, datasets, run_seeds, dropouts, run_settings: the sweep whose runs are computed; `dropouts` are Table 1's.
    """

    shape: Shape
    width: float
    models: Mapping[str, int]
    evaluation_batches: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    rounds: int
    worker_seconds: float
    first_seconds: Mapping[str, float]
    preset: str
    datasets: tuple[str, ...]
    run_seeds: tuple[int, ...]
    dropouts: tuple[str, ...]
    run_settings: Mapping[str, Any]


PAPER = Sizes(
    shape=(3, 32, 32),
    width=1.0,
    models={"resnet9": 512, "resnet50": 512, "vit": 128},
    evaluation_batches=(1000, 2500, 5000, 10_000),
    seeds=(1, 2, 4, 8),
    steps=20,
    rounds=5,
    worker_seconds=10.0,
    first_seconds={"training": 180, "rewinding": 60, "retraining": 90, "critical_units": 120},
    preset="paper",
    datasets=("cifar10", "mnist"),
    run_seeds=(0, 1, 2),
    dropouts=("example_tied", "baseline", "standard", "channel", "sparse"),
    run_settings={},
)
TINY = Sizes(
    shape=(1, 16, 16),
    width=1 / 16,
    models={"resnet9": 16, "vit": 2},
    evaluation_batches=(2, 4),
    seeds=(2,),
    steps=1,
    rounds=1,
    worker_seconds=0.2,
    first_seconds=dict.fromkeys(("training", "rewinding", "retraining", "critical_units"), 0.0),
    preset="quick",
    datasets=("digits",),
    run_seeds=(0,),
    dropouts=("example_tied",),
    run_settings={
        "data": {"limit": 200},
        "model": {"width": 1 / 16},
        "training": {"epochs": 2, "batch_size": 32, "precision": "float32"},
        "checkpoints": {"epochs": [0, 1]},
        "rewinding": {"limit": 20},
        "retraining": {"epochs": 1, "limit": 20, "on": ["clean"]},
        "critical_units": {"examples": 2, "part_size": 2, "reference_size": 8, "limit": 20, "max_steps": 3},
    },
)


def network(name: str, sizes: Sizes, *, device: torch.device, seed: int = 0, dropout: bool = True) -> nn.Module:
    """Return a fresh network of this name; without `dropout` it computes the same on every device."""
    width = sizes.width if name == "resnet9" else 1.0
    model = build_model(ModelConfig(name=name, width=width), image_shape=sizes.shape, num_classes=10, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return model.to(device).to(memory_format=torch.channels_last)


def load(name: str, sizes: Sizes, root: Path | None) -> Dataset:
    """Return a data set by name, the embedded digits as large as `sizes` asks."""
    return load_dataset(name, root=root, image_size=sizes.shape[1] if name == "digits" else None)
