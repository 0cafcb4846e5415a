"""Result tables as a sweep would leave them, made up but plausible, for the tests of `analysis`."""

from __future__ import annotations

import math
import random

from memlib.config import DataConfig, ModelConfig, NoiseConfig, RunConfig, TrainingConfig, config_to_json
from memlib.results import ResultStore, table_from_rows

RESNET9 = ("conv1", "conv2", "res1.conv1", "res1.conv2", "conv3", "res2.conv1", "res2.conv2", "conv4", "classifier")
RESNET50 = ("stem", "layer1", "layer2", "layer3", "layer4", "classifier")
VIT = ("patch_embedding", *(f"block{i}" for i in range(6)), "head")
GROUPS = {"resnet9": RESNET9, "resnet50": RESNET50, "vit": VIT}


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


def add_everything(store: ResultStore, config: RunConfig, groups: tuple[str, ...] = RESNET9) -> None:
    add_finished(store, config, groups)
    add_rewinding(store, config, groups)
    add_retraining(store, config, groups)


def epoch_rows(config: RunConfig) -> list[dict]:
    """Clean examples are learned by epoch 5, noisy ones around the middle, test falls a little."""
    run_id = config.run_id  # a hash of all settings, not to be computed row by row
    draw = random.Random(run_id)
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
                    "run_id": run_id,
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
    run_id = config.run_id
    draw = random.Random(run_id + "gradients")
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
                    "run_id": run_id,
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


def add_rewinding(
    store: ResultStore,
    config: RunConfig,
    groups: tuple[str, ...] = RESNET9,
    *,
    epochs: tuple[int, ...] = (0, 2),
    batchnorm: str = "final",
    n: int = 1000,
) -> list[dict]:
    """Write and return rows of single groups and of sets ("conv1+conv2") rewound, as one unit."""
    rows = rewinding_rows(config, groups, epochs=epochs, batchnorm=batchnorm, n=n)
    unit = f"{config.run_id}-{batchnorm}-{n}"
    store.write("rewinding", unit, table_from_rows("rewinding", rows))
    return rows


def add_retraining(
    store: ResultStore,
    config: RunConfig,
    groups: tuple[str, ...] = RESNET9,
    *,
    trained_on: str = "clean",
    reset_epoch: int = 0,
    epochs: int = 20,
) -> list[dict]:
    """Write and return rows of groups retrained, as one unit; every third group stops early, by seed."""
    rows = retraining_rows(config, groups, trained_on=trained_on, reset_epoch=reset_epoch, epochs=epochs)
    unit = f"{config.run_id}-{trained_on}-{reset_epoch}-{epochs}"
    store.write("retraining", unit, table_from_rows("retraining", rows))
    return rows


def rewinding_rows(
    config: RunConfig, groups: tuple[str, ...], *, epochs: tuple[int, ...], batchnorm: str, n: int
) -> list[dict]:
    """Groups a third into the network matter most; noisy examples suffer more than clean ones; late epochs are mild."""
    run_id = config.run_id
    draw = random.Random(f"{run_id}{batchnorm}{n}")
    order = [name for name in groups if "+" not in name]
    rows = []
    for group in groups:
        members = group.split("+")
        index = order.index(members[0]) if members[0] in order else 0
        weight = 1 - math.prod(
            1 - math.exp(-((order.index(m) - len(order) / 3) ** 2) / 3) for m in members if m in order
        )
        for epoch in epochs:
            left = 1 - weight * math.exp(-epoch / 6)
            shares = {"clean": 0.1 + 0.9 * left, "noisy": 0.1 + 0.88 * left**2, "test": 0.1 + 0.7 * left}
            for split, share in shares.items():
                rows.append(
                    {
                        "run_id": run_id,
                        "group": group,
                        "group_index": index,
                        "n_groups": len(members),
                        "rewind_epoch": epoch,
                        "batchnorm": batchnorm,
                        "split": split,
                        "accuracy": min(max(share + draw.gauss(0, 0.02), 0), 1),
                        "n": n,
                    }
                )
    return rows if config.noise.fraction else [r for r in rows if r["split"] != "noisy"]


def retraining_rows(
    config: RunConfig, groups: tuple[str, ...], *, trained_on: str, reset_epoch: int, epochs: int, n: int = 1000
) -> list[dict]:
    """Clean accuracy comes back in all groups, noisy accuracy less the deeper the group."""
    run_id = config.run_id
    draw = random.Random(f"{run_id}{trained_on}{reset_epoch}")
    rows = []
    for index, group in enumerate(groups):
        stop = epochs - draw.randrange(epochs // 2) if index % 3 == 0 else epochs
        back = {"clean": 0.98, "noisy": 0.95 - 0.9 * index / len(groups), "test": 0.75}
        for epoch in range(stop + 1):
            for split, best in back.items():
                share = 0.1 + (best - 0.1) * (1 - math.exp(-epoch / 3))
                rows.append(
                    {
                        "run_id": run_id,
                        "group": group,
                        "group_index": index,
                        "trained_on": trained_on,
                        "reset_epoch": reset_epoch,
                        "epoch": epoch,
                        "split": split,
                        "accuracy": min(max(share + draw.gauss(0, 0.02), 0), 1),
                        "n": n,
                    }
                )
    return rows if config.noise.fraction else [r for r in rows if r["split"] != "noisy"]
