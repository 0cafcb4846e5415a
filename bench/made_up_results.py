"""A results store as the paper's sweep would leave it, made up in seconds: for benchmarks of what reads results.

3 data sets x 3 models x several seeds, and example-tied dropout in ResNet-9, with the files, layer groups,
units of work, columns and row counts of real sweeps; the numbers are drawn, plausible, and the same for a seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
import pyarrow as pa

from memlib.config import (
    CheckpointConfig,
    DataConfig,
    DropoutConfig,
    ModelConfig,
    NoiseConfig,
    RunConfig,
    TrainingConfig,
    config_to_json,
)
from memlib.results import ResultStore
from memlib.schemas import SCHEMAS
from memlib.units import Unit

SIZES = {"cifar10": (50_000, 10_000), "mnist": (60_000, 10_000), "svhn": (73_257, 26_032)}  # training, test
EPOCHS = {"cifar10": 50, "mnist": 100, "svhn": 50}
CHECKPOINTS = (0, 2, 4, 6, 8, 10, 12, 14, 20, 30, 40)
RESNET9 = ("conv1", "conv2", "residual1.first", "residual1.second", "conv3", "residual2.first", "residual2.second")
GROUPS = {
    "resnet9": (*RESNET9, "conv4", "classifier"),
    "resnet50": ("stem", *(f"layer{i}" for i in range(1, 5)), "classifier"),
    "vit": ("patch_embedding", *(f"block{i}" for i in range(1, 7)), "head"),
}
_BLOCKS = [(f"layer{i}.{j}", 64 * 2**i) for i, n in enumerate((3, 4, 6, 3), start=1) for j in range(n)]
LAYERS = {  # name and number of units
    "resnet9": [(name, 64 * 2 ** (i // 2)) for i, name in enumerate((*RESNET9, "conv4"))],
    "resnet50": [("conv1", 64), *((f"{b}.conv{k}", width) for b, width in _BLOCKS for k in (1, 2, 3))],
    "vit": [(f"blocks.{i}.{part}", n) for i in range(6) for part, n in (("attn", 192), ("mlp.fc1", 768))],
}
PART = 50  # examples of a unit of the search
SEARCHED = 1000  # clean and noisy examples each
ROWS_OF_A_SEED = 2_295_000  # at full size
Columns = Mapping[str, object]  # arrays, or one value for all rows


@dataclass(frozen=True)
class _Write:
    table: str
    unit_id: str
    rows: pa.Table


def make_up_results(store: ResultStore, n_rows: int) -> dict[str, int]:
    """Write about `n_rows` rows into an empty store and return how many each table has.

    Below one seed's rows of the paper's sweep, data sets and searches are that much smaller.
    """
    n_seeds = math.ceil(n_rows / ROWS_OF_A_SEED)
    share = min(1.0, n_rows / n_seeds / ROWS_OF_A_SEED)
    counts = dict.fromkeys(SCHEMAS, 0)
    with ThreadPoolExecutor(4) as pool:
        for config in _runs(n_seeds):
            writes = list(_writes_of(config, share))
            list(pool.map(lambda w: store.write(w.table, w.unit_id, w.rows), writes))
            for write in writes:
                counts[write.table] += write.rows.num_rows
    return {table: n for table, n in counts.items() if n}


def _runs(n_seeds: int) -> Iterator[RunConfig]:
    for seed, dataset, model in product(range(n_seeds), SIZES, GROUPS):
        yield _config(seed, dataset, model)
    for seed, dataset in product(range(n_seeds), SIZES):
        yield _config(seed, dataset, "resnet9", DropoutConfig(kind="example_tied"))


def _config(seed: int, dataset: str, model: str, dropout: DropoutConfig | None = None) -> RunConfig:
    return RunConfig(
        data=DataConfig(name=dataset),
        noise=NoiseConfig(fraction=0.1),
        model=ModelConfig(name=model),
        dropout=dropout or DropoutConfig(),
        training=TrainingConfig(epochs=EPOCHS[dataset]),
        checkpoints=CheckpointConfig(epochs=CHECKPOINTS),
        seed=seed,
    )


def _writes_of(config: RunConfig, share: float) -> Iterator[_Write]:
    draw = np.random.default_rng([config.seed, int(config.run_id, 16)])
    own = [("runs", _run(config)), ("epochs", _epochs(config, draw)), ("gradients", _gradients(config, draw))]
    own += [("examples", _examples(config, draw, share)), ("dynamics", _dynamics(config, draw, share))]
    if config.dropout.kind != "none":
        own.append(("dropout", _dropout(draw)))
    for table, columns in own:
        yield _Write(table, config.run_id, _table(table, config, columns))
    if config.dropout.kind == "none":
        yield from _rewinding(config, draw)
        yield from _retraining(config, draw)
        yield from _critical_units(config, draw, max(2, int(share * SEARCHED) // PART))


def _table(name: str, config: RunConfig, columns: Columns) -> pa.Table:
    """Return columns (an array, or one value for all rows) as a table without `unit_id`; missing ones are null."""
    schema = SCHEMAS[name].remove(0)
    columns = {"run_id": config.run_id, **columns}
    n = max(len(c) for c in columns.values() if isinstance(c, np.ndarray | list))
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        is_array = isinstance(values, np.ndarray | list)
        array = pa.array(values, from_pandas=True) if is_array else pa.repeat(pa.scalar(values, field.type), n)
        arrays.append(array.cast(field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _run(config: RunConfig) -> Columns:
    facts = {"dataset": config.data.name, "model": config.model.name, "seed": config.seed, "status": "done"}
    facts |= {"dropout": config.dropout.kind, "noise_fraction": 0.1, "code_version": "0", "data_digest": "0"}
    return {**facts, "config": [config_to_json(config)], "device": "cpu", "precision": "float32", "seconds": 60.0}


def _grid(*axes: int | range) -> list[np.ndarray]:
    """Return the coordinates of all rows of a grid, the last axis fastest."""
    ranges = [np.arange(axis) if isinstance(axis, int) else np.asarray(axis) for axis in axes]
    return [column.ravel() for column in np.meshgrid(*ranges, indexing="ij")]


def _strings(names: tuple[object, ...], places: np.ndarray) -> np.ndarray:
    return np.asarray(names, dtype=object)[places]


def _epochs(config: RunConfig, draw: np.random.Generator) -> Columns:
    last = config.training.epochs
    epoch, split = _grid(last + 1, 3)
    clean, late = 1 - 0.9 * np.exp(-epoch / 3), 0.1 + 0.9 / (1 + np.exp(-(epoch - last / 2) / (last / 15)))
    share = np.choose(split, [clean, late, 0.93 * clean - 0.08 * epoch / last])
    accuracy = np.clip(share + draw.normal(0, 0.01, len(epoch)), 0, 1)
    splits = _strings(("clean", "noisy", "test"), split)
    return {"epoch": epoch, "split": splits, "accuracy": accuracy, "loss": 2.6 * (1.01 - accuracy), "n": 1000}


def _gradients(config: RunConfig, draw: np.random.Generator) -> Columns:
    groups, last = GROUPS[config.model.name], config.training.epochs
    epoch, index = _grid(range(1, last + 1), len(groups))
    scale = 40.0 * (1 + index) * np.exp(-epoch / 20)
    clean, noisy = scale * draw.lognormal(0, 0.1, len(epoch)), 1.2 * scale * draw.lognormal(0, 0.1, len(epoch))
    cosine = np.clip(0.5 - 1.4 * np.sin(math.pi * epoch / last) + draw.normal(0, 0.05, len(epoch)), -1, 1)
    total = np.sqrt(clean**2 + noisy**2 + 2 * clean * noisy * cosine)
    norms = {"clean_norm": clean, "noisy_norm": noisy, "total_norm": total, "cosine": cosine}
    return {"epoch": epoch, "group": _strings(groups, index), "group_index": index, **norms, "n_parameters": 1000}


def _examples(config: RunConfig, draw: np.random.Generator, share: float) -> Columns:
    n_train, n_test = (int(share * size) for size in SIZES[config.data.name])
    tied = config.dropout.kind != "none"
    modes = ("tied", "scaled", "dropped") if tied else ("plain",)
    parts = [(mode, split, n) for mode in modes for split, n in (("train", n_train), ("test", n_test))]
    parts = [part for part in parts if part[:2] != ("tied", "test")]
    sizes = [n for _, _, n in parts]
    ids = np.concatenate([np.arange(n) for n in sizes])
    original = ids * 7 % 10
    split, mode = (np.repeat(np.asarray([part[k] for part in parts], dtype=object), sizes) for k in (1, 0))
    is_noisy = (ids % 10 == config.seed % 10) & (split == "train")
    assigned = np.where(is_noisy, (original + 1 + ids % 9) % 10, original)
    margin = draw.normal(np.where(is_noisy & (mode == "dropped"), -4, 6), 3)
    right = {"assigned": assigned, "original": original, "is_noisy": is_noisy, "mode": mode}
    prediction = np.where(margin > 0, assigned, (assigned + 1) % 10)
    loss = np.logaddexp(0, -margin)
    return {"example_id": ids, "split": split, **right, "prediction": prediction, "margin": margin, "loss": loss}


def _dynamics(config: RunConfig, draw: np.random.Generator, share: float) -> Columns:
    n = int(share * SIZES[config.data.name][0])
    aum, forgetting = draw.normal(np.where(np.arange(n) % 10 == config.seed % 10, -1, 4), 2), draw.poisson(1.0, n)
    seen = {"first_learned": draw.integers(1, 20, n), "last_mistake": draw.integers(0, 10, n), "n_epochs": 50}
    return {"example_id": np.arange(n), "aum": aum, "forgetting_events": forgetting, **seen}


def _dropout(draw: np.random.Generator) -> Columns:
    modes = (("tied", "final", False), ("scaled", "final", False), ("dropped", "final", False))
    modes += (("dropped", "final", True), ("dropped", "recalibrated", False))
    mode, split = _grid(len(modes), 3)
    accuracy = np.where(mode < 2, 0.99, np.choose(split, [0.9, 0.05, 0.8])) - 0.01 * draw.random(len(mode))
    names = [_strings(tuple(column), mode) for column in zip(*modes, strict=True)]
    splits = _strings(("clean", "noisy", "test"), split)
    return {"mode": names[0], "batchnorm": names[1], "rescaled": names[2].astype(bool), "split": splits} | {
        "accuracy": accuracy,
        "n": 1000,
    }


def _done(unit: Unit, rows: pa.Table) -> Iterator[_Write]:
    """Yield a unit's row in `units` and its rows in its experiment's table."""
    facts = {"experiment": [unit.experiment], "settings": json.dumps(unit.settings), "status": "done"}
    facts |= {"code_version": "0", "device": "cpu", "seconds": 60.0}
    yield _Write("units", unit.unit_id, _table("units", unit.run, facts))
    yield _Write(unit.experiment, unit.unit_id, rows)


def _rewinding(config: RunConfig, draw: np.random.Generator) -> Iterator[_Write]:
    groups = GROUPS[config.model.name]
    index, epoch, split = _grid(len(groups), range(len(CHECKPOINTS)), 3)
    at = np.asarray(CHECKPOINTS)[epoch]
    left = 1 - np.exp(-((index - len(groups) / 3) ** 2) / 3) * np.exp(-at / 6)
    share = np.choose(split, [0.1 + 0.9 * left, 0.1 + 0.88 * left**2, 0.1 + 0.7 * left])
    facts = {"n_groups": 1, "batchnorm": "final", "split": _strings(("clean", "noisy", "test"), split), "n": 1000}
    accuracy = np.clip(share + draw.normal(0, 0.02, len(share)), 0, 1)
    named = {"group": _strings(groups, index), "group_index": index, "rewind_epoch": at, "accuracy": accuracy}
    rows = _table("rewinding", config, {**facts, **named})
    for place, (group, kept) in enumerate(product(groups, CHECKPOINTS)):
        unit = Unit(config, "rewinding", {"groups": [group], "rewind_epoch": kept})
        yield from _done(unit, rows.slice(3 * place, 3))


def _retraining(config: RunConfig, draw: np.random.Generator) -> Iterator[_Write]:
    groups = GROUPS[config.model.name]
    for (index, group), kind in product(enumerate(groups), ("clean", "noisy")):
        epoch, split = _grid(int(draw.integers(20, 51)), 3)
        best = np.asarray([0.98, 0.95 - 0.9 * index / len(groups), 0.75])[split]
        accuracy = 0.1 + (best - 0.1) * (1 - np.exp(-epoch / 5)) + draw.normal(0, 0.01, len(epoch))
        splits = _strings(("clean", "noisy", "test"), split)
        facts = {"group": group, "group_index": index, "trained_on": kind, "reset_epoch": 0, "n": 1000}
        rows = {**facts, "epoch": epoch, "split": splits, "accuracy": np.clip(accuracy, 0, 1)}
        unit = Unit(config, "retraining", {"group": group, "trained_on": kind})
        yield from _done(unit, _table("retraining", config, rows))


def _critical_units(config: RunConfig, draw: np.random.Generator, n_parts: int) -> Iterator[_Write]:
    """Yield each part's removals and examples: noisy ones need few units, most clean ones many."""
    for kind, part in product((0, 1), range(n_parts)):
        ids = (2 * (part * PART + np.arange(PART)) + kind) * 13 % SIZES[config.data.name][0]
        early = (draw.random(PART) < 0.66) & (kind == 0)
        needed = 1 + draw.lognormal(np.where(early, 2.6, 1.2), np.where(early, 1.1, 0.8)).astype(int)
        skipped = draw.random(PART) < 0.03
        n_removed, flipped = np.where(skipped, 0, np.minimum(needed, 100)), (needed <= 100) & ~skipped
        left = np.where(skipped, np.nan, np.exp(-0.002 * n_removed * draw.lognormal(0, 1, PART)))
        facts = {"is_noisy": bool(kind), "assigned": 0, "new_prediction": 1, "n_clean": 9000, "n_noisy": 1000}
        facts |= {"clean_accuracy_before": 1.0, "noisy_accuracy_before": 0.98, "early_epoch": 8}
        facts |= {"removal": "filter", "reference_size": 512, "copies": 5, "noise": 0.01, "max_steps": 100}
        facts |= {"refresh": 1, "reference_copies": 5, "precision": "float32"}
        outcome = _strings(("skipped", "flipped", "step_limit"), np.where(skipped, 0, np.where(flipped, 1, 2)))
        found = {"example_id": ids, "right_early": early, "outcome": outcome, "flipped": flipped}
        after = {"n_removed": n_removed, "clean_accuracy_after": left, "noisy_accuracy_after": 0.98 * left**3}
        rows = _table("critical_units", config, {**facts, **found, **after})
        unit = Unit(config, "critical_units", {"kind": ("clean", "noisy")[kind], "part": part})
        removals = _table("removed_units", config, _removals(config, draw, ids, n_removed, noisy=bool(kind)))
        yield _Write("removed_units", unit.unit_id, removals)
        yield from _done(unit, rows)


def _removals(
    config: RunConfig, draw: np.random.Generator, ids: np.ndarray, n_removed: np.ndarray, *, noisy: bool
) -> Columns:
    """Return a row a removal: deep layers are hit most; clean examples share units of low number."""
    layers, n = LAYERS[config.model.name], int(n_removed.sum())
    index = (len(layers) * draw.random(n) ** (0.4 if noisy else 0.6)).astype(int)
    n_units = np.asarray([size for _, size in layers])[index]
    step = np.arange(n) - np.repeat(np.cumsum(n_removed) - n_removed, n_removed) + 1
    where = {"layer": _strings(tuple(name for name, _ in layers), index), "layer_index": index, "n_units": n_units}
    unit = (n_units * draw.random(n) ** (1 if noisy else 3)).astype(int)
    return {"example_id": np.repeat(ids, n_removed), "is_noisy": noisy, "step": step, **where} | {
        "unit": unit,
        "score": 1 / step,
    }
