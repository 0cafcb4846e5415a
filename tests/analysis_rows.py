"""Result tables as a sweep would leave them, made up but plausible, for the tests of `analysis`."""

from __future__ import annotations

import math
import random

from memlib.config import DataConfig, ModelConfig, NoiseConfig, RunConfig, TrainingConfig, config_to_json
from memlib.results import ResultStore, table_from_rows

RESNET9 = ("conv1", "conv2", "res1.conv1", "res1.conv2", "conv3", "res2.conv1", "res2.conv2", "conv4", "classifier")


def make_config(
    *,
    seed: int,
    dataset: str = "digits",
    model: str = "resnet9",
    noise: float = 0.1,
    epochs: int = 30,
    limit: int | None = None,
) -> RunConfig:
    return RunConfig(
        data=DataConfig(name=dataset, limit=limit),
        noise=NoiseConfig(fraction=noise),
        model=ModelConfig(name=model),
        training=TrainingConfig(epochs=epochs),
        seed=seed,
    )


def add_run(store: ResultStore, config: RunConfig, *, error: str | None = None) -> str:
    row = {
        "run_id": config.run_id,
        "dataset": config.data.name,
        "model": config.model.name,
        "seed": config.seed,
        "noise_fraction": config.noise.fraction,
        "dropout": "none",
        "config": config_to_json(config),
        "code_version": "0",
        "device": "cpu",
        "precision": "float32",
        "seconds": 1.0,
        "status": "done" if error is None else "failed",
        "error": error,
    }
    store.write("runs", config.run_id, table_from_rows("runs", [row]))
    return config.run_id


def add_epochs(store: ResultStore, config: RunConfig) -> list[dict]:
    rows = epoch_rows(config)
    store.write("epochs", config.run_id, table_from_rows("epochs", rows))
    return rows


def add_gradients(store: ResultStore, config: RunConfig, groups: tuple[str, ...] = RESNET9) -> list[dict]:
    rows = gradient_rows(config, groups)
    store.write("gradients", config.run_id, table_from_rows("gradients", rows))
    return rows


def add_finished(store: ResultStore, config: RunConfig, groups: tuple[str, ...] = RESNET9) -> tuple[list, list]:
    add_run(store, config)
    return add_epochs(store, config), add_gradients(store, config, groups)


def epoch_rows(config: RunConfig) -> list[dict]:
    """Clean examples are learned by epoch 5, noisy ones around the middle, test falls a little."""
    draw = random.Random(config.run_id)
    middle, rows = config.training.epochs / 2, []
    for epoch in range(config.training.epochs + 1):
        shares = {
            "clean": 1 - 0.9 * math.exp(-epoch / 2),
            "noisy": 0.1 + 0.9 / (1 + math.exp(-(epoch - middle + draw.gauss(0, 0.7)) / 2)),
            "test": 0.96 - 0.86 * math.exp(-epoch / 2) - 0.04 * epoch / config.training.epochs,
        }
        for split, share in shares.items():
            accuracy = min(max(share + draw.gauss(0, 0.01), 0), 1)
            loss = 2.6 * (1.002 - share) * math.exp(draw.gauss(0, 0.1))
            rows.append(
                {
                    "run_id": config.run_id,
                    "epoch": epoch,
                    "split": split,
                    "accuracy": accuracy,
                    "loss": loss,
                    "n": 100,
                }
            )
    return rows if config.noise.fraction else [r for r in rows if r["split"] != "noisy"]


def gradient_rows(config: RunConfig, groups: tuple[str, ...]) -> list[dict]:
    """The noisy norm a bit above the clean one, the cosine negative in the middle and null in the last epoch's stem."""
    draw = random.Random(config.run_id + "gradients")
    rows = []
    for epoch in range(1, config.training.epochs + 1):
        for index, group in enumerate(groups):
            n_parameters = 1000 * (index + 1) ** 2
            scale = math.sqrt(n_parameters) * math.exp(-epoch / 20) / (1 + index)
            clean, noisy = scale * math.exp(draw.gauss(0, 0.1)), 1.2 * scale * math.exp(draw.gauss(0, 0.1))
            cosine = 0.5 - 1.4 * math.sin(math.pi * epoch / config.training.epochs) + draw.gauss(0, 0.05)
            cosine = max(-1.0, cosine + 0.03 * index)
            total = math.sqrt(clean**2 + noisy**2 + 2 * clean * noisy * cosine)
            is_null = index == 0 and epoch == config.training.epochs
            rows.append(
                {
                    "run_id": config.run_id,
                    "epoch": epoch,
                    "group": group,
                    "group_index": index,
                    "clean_norm": clean,
                    "noisy_norm": noisy if config.noise.fraction else 0.0,
                    "total_norm": total,
                    "cosine": None if is_null or not config.noise.fraction else cosine,
                    "n_parameters": n_parameters,
                }
            )
    return rows
