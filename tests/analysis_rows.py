"""Result tables as a sweep would leave them, made up but plausible, for the tests of `analysis`."""

from __future__ import annotations

import io
import json
import math
import random

import numpy as np
from PIL import Image

from memlib.config import (
    DataConfig,
    DropoutConfig,
    ModelConfig,
    NoiseConfig,
    RunConfig,
    TrainingConfig,
    config_to_json,
)
from memlib.results import ResultStore
from memlib.schemas import table_from_rows

RESNET9 = ("conv1", "conv2", "res1.conv1", "res1.conv2", "conv3", "res2.conv1", "res2.conv2", "conv4", "classifier")
RESNET50 = ("stem", "layer1", "layer2", "layer3", "layer4", "classifier")
VIT = ("patch_embedding", *(f"block{i}" for i in range(6)), "head")
LAYERS = {"conv1": 32, "conv2": 64, "conv3": 128, "conv4": 256}  # with their numbers of units
SEARCH = {
    "removal": "filter",
    "reference_size": 512,
    "copies": 5,
    "reference_copies": 5,
    "refresh": 1,
    "noise": 0.01,
    "max_steps": 100,
    "precision": "float32",
}
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
        "dropout": config.dropout.kind,
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
    add_critical_units(store, config)


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


def add_unit(
    store: ResultStore, unit_id: str, run_id: str, experiment: str, *, code: str = "0", device: str = "cpu", **settings
) -> None:
    """Write the row of a unit of an experiment that is done; `settings` beside what it is about."""
    row = {"run_id": run_id, "experiment": experiment, "settings": json.dumps(settings), "code_version": code}
    row |= {"device": device, "seconds": 1.0, "status": "done", "error": None}
    store.write("units", unit_id, table_from_rows("units", [row]))


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


def add_critical_units(
    store: ResultStore, config: RunConfig, *, n: int = 40, first_id: int = 0, early: bool = True, **search: object
) -> tuple[list[dict], list[dict]]:
    """Write and return the examples and removals of a search of n clean and n noisy examples, as one unit."""
    draw = random.Random(f"{config.run_id}{search}{first_id}")
    kinds = (False, True) if config.noise.fraction else (False,)
    found = [
        critical_rows(config, draw, example_id=first_id + 2 * i + is_noisy, is_noisy=is_noisy, early=early, **search)
        for i in range(n)
        for is_noisy in kinds
    ]
    examples, removals = [example for example, _ in found], [row for _, rows in found for row in rows]
    unit = f"{config.run_id}-{first_id}-{'-'.join(map(str, search.values()))}"
    store.write("critical_units", unit, table_from_rows("critical_units", examples))
    store.write("removed_units", unit, table_from_rows("removed_units", removals))
    return examples, removals


def critical_rows(
    config: RunConfig, draw: random.Random, *, example_id: int, is_noisy: bool, early: bool, **search: object
) -> tuple[dict, list[dict]]:
    """Noisy examples need few units; two thirds of the clean ones, right early, need more and cost more."""
    settings = {**SEARCH, **search}
    right_early = not is_noisy and draw.random() < 0.66
    needed = 1 + int(draw.lognormvariate(1.6 if right_early else 0.8, 1.3 if right_early else 0.6))
    skipped, flipped = draw.random() < 0.05, needed <= settings["max_steps"]
    n_removed = 0 if skipped else min(needed, settings["max_steps"])
    left = math.exp(-0.01 * n_removed * draw.lognormvariate(0, 1))
    removals = removal_rows(config, draw, example_id=example_id, is_noisy=is_noisy, n=n_removed)
    example = {
        "run_id": config.run_id,
        "example_id": example_id,
        "is_noisy": is_noisy,
        "right_early": right_early if early else None,
        "early_epoch": 5 if early else None,
        "outcome": "skipped" if skipped else "flipped" if flipped else "step_limit",
        "flipped": flipped and not skipped,
        "n_removed": n_removed,
        "assigned": 0,
        "new_prediction": int(flipped),
        "clean_accuracy_before": 1.0,
        "clean_accuracy_after": None if skipped else left,
        "noisy_accuracy_before": 0.98,
        "noisy_accuracy_after": None if skipped else 0.98 * left**3,
        "n_clean": 900,
        "n_noisy": 100,
    }
    return {**example, **settings}, removals


def removal_rows(config: RunConfig, draw: random.Random, *, example_id: int, is_noisy: bool, n: int) -> list[dict]:
    """Deep layers are hit most; units of low number are shared, those of high number nearly an example's own."""
    layers = draw.choices(range(len(LAYERS)), weights=(1, 2, 5, 8 + 4 * is_noisy), k=n)
    names = list(LAYERS)
    return [
        {
            "run_id": config.run_id,
            "example_id": example_id,
            "is_noisy": is_noisy,
            "step": step,
            "layer": names[index],
            "layer_index": index,
            "n_units": LAYERS[names[index]],
            "unit": int(LAYERS[names[index]] * draw.random() ** (1 if is_noisy else 3)),
            "score": 1 / step,
        }
        for step, index in enumerate(layers, start=1)
    ]


def add_search(
    store: ResultStore,
    *,
    p_gen: tuple[float, ...] = (0.1, 0.3, 0.6),
    p_mem: tuple[float, ...] = (0.05, 0.1, 0.3),
    width: tuple[float, ...] = (0.25,),
    seed: int = 0,
    stopped: frozenset[tuple[float, float]] = frozenset(),
    **data: object,
) -> list[dict]:
    """Write and return a search's trials, a unit each, and a control a width; `stopped` are (p_gen, p_mem)."""
    points = [(g, m) for g in p_gen for m in p_mem]
    rows = []
    for factor in width:
        control = search_rows(seed=seed, width=factor, **data)
        trials = [search_rows(g, m, seed=seed, width=factor, stopped=(g, m) in stopped, **data) for g, m in points]
        for unit in (control, *trials):
            store.write("dropout_search", unit[0]["run_id"], table_from_rows("dropout_search", unit))
            rows += unit
    return rows


def search_rows(
    p_gen: float | None = None,
    p_mem: float | None = None,
    *,
    seed: int = 0,
    width: float = 0.25,
    stopped: bool = False,
    after: tuple[str, ...] = (),
    **data: object,
) -> list[dict]:
    """One trial, or the control: more generalization neurons learn more, and leak more; few starve."""
    is_tied = p_gen is not None and p_mem is not None
    tied = {"kind": "example_tied", "p_gen": p_gen, "p_mem": p_mem, "after": after}
    dropout = DropoutConfig(**tied) if is_tied else DropoutConfig()
    config = RunConfig(
        data=DataConfig(name="digits", holdout=0.1, **data),
        model=ModelConfig(width=width),
        dropout=dropout,
        training=TrainingConfig(epochs=9),
        seed=seed,
    )
    draw = random.Random(config.run_id)
    learned = 0.97 - 0.4 * (0.5 - p_gen) ** 2 - 0.2 * p_mem if is_tied else 0.95
    noisy = 0.02 + 0.9 * p_gen**3 if is_tied else 1.0
    row = {
        "run_id": config.run_id,
        "dataset": "digits",
        "model": "resnet9",
        "seed": seed,
        "noise_fraction": 0.1,
        "dropout": config.dropout.kind,
        "p_gen": p_gen,
        "p_mem": p_mem,
        "width": width,
        "after": "+".join(dropout.after),
        "peak_lr": config.training.peak_lr,
        "config": config_to_json(config),
        "data_digest": "0",
        "batchnorm": "final",
        "epochs": 3 if stopped else 9,
        "stopped_early": stopped,
        "validation_accuracy": 0.9 * learned - 0.1 * noisy + draw.gauss(0, 0.003),
        "validation_curve": [learned * epoch / 9 for epoch in range(4 if stopped else 10)],
        "clean_accuracy": learned,
        "noisy_accuracy": noisy,
        "test_accuracy": learned + draw.gauss(0, 0.005),
        "scaled_test_accuracy": learned if is_tied else None,
        "n_validation": 140,
        "n_clean": 1170,
        "n_noisy": 130,
        "n_test": 360,
    }
    if not is_tied or stopped:
        return [row]
    again = {"batchnorm": "recalibrated", "validation_curve": None, "scaled_test_accuracy": None}
    return [row, {**row, **again, "validation_accuracy": row["validation_accuracy"] - 0.01}]


VARIANTS = (  # mode, batchnorm, rescaled
    ("tied", "final", False),
    ("scaled", "final", False),
    ("dropped", "final", False),
    ("dropped", "final", True),
    ("dropped", "recalibrated", False),
)


def make_dropout_config(
    kind: str, *, seed: int, dataset: str = "digits", p_gen: float = 0.25, **dropout: object
) -> RunConfig:
    """A run of Table 1, as the presets have them: its gradients are not recorded."""
    return RunConfig(
        data=DataConfig(name=dataset),
        dropout=DropoutConfig(kind=kind, p_gen=p_gen, **dropout),
        training=TrainingConfig(epochs=20, schedule="one_cycle", peak_lr=0.1, gradient_accounting=False),
        seed=seed,
    )


def add_dropout(store: ResultStore, config: RunConfig) -> list[dict]:
    """Write a finished run with dropout, or its control without, and return its rows in table `dropout`."""
    add_run(store, config)
    add_epochs(store, config)
    if config.dropout.kind == "none":
        return []
    rows = dropout_rows(config)
    store.write("dropout", config.run_id, table_from_rows("dropout", rows))
    return rows


def dropout_rows(config: RunConfig) -> list[dict]:
    """Tied, everything is memorized; dropped, the noise is forgotten; the controls memorize some or all of it."""
    draw = random.Random(config.run_id)
    is_tied = config.dropout.kind == "example_tied"
    noisy = {"tied": 1.0, "scaled": 0.02, "dropped": 0.01, "plain": 0.6}
    rows = []
    for mode, batchnorm, rescaled in VARIANTS if is_tied else (("plain", "final", False),):
        shares = {"clean": 1.0 if mode == "tied" else 0.985, "noisy": noisy[mode], "test": 0.97}
        for split, share in shares.items():
            if (mode, split) == ("tied", "test"):
                continue
            accuracy = min(max(share + draw.gauss(0, 0.005) - 0.03 * rescaled, 0), 1)
            facts = {"run_id": config.run_id, "mode": mode, "batchnorm": batchnorm, "rescaled": rescaled}
            rows.append({**facts, "split": split, "accuracy": accuracy, "n": 1294 if split == "clean" else 143})
    return rows


def add_forgotten(
    store: ResultStore, config: RunConfig, ids: range, *, names: tuple[str, ...] = tuple("0123456789"), colours: int = 1
) -> list[dict]:
    """Write and return clean examples forgotten on dropping, each an image of its own grey or colour."""
    rows = []
    for rank, example_id in enumerate(ids):
        pixels = np.full((8, 8) if colours == 1 else (8, 8, 3), 40 + example_id % 200, np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        assigned, new = example_id % len(names), (example_id + 1) % len(names)
        rows.append(
            {
                "run_id": config.run_id,
                "example_id": example_id,
                "assigned": assigned,
                "original": assigned,
                "new_prediction": new,
                "assigned_name": names[assigned],
                "new_name": names[new],
                "margin": -9.0 + rank / 10,
                "n_forgotten": len(ids),
                "png": buffer.getvalue(),
            }
        )
    store.write("forgotten_images", config.run_id, table_from_rows("forgotten_images", rows))
    return rows
