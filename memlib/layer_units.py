"""Rewinding and retraining of a finished run as units of work: which there are, and the rows of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from memlib.batches import images_as_trained, place_images
from memlib.checkpoints import Checkpoint
from memlib.config import RunConfig, build_config
from memlib.errors import InputError
from memlib.experiments import RetrainingConfig, RewindingConfig
from memlib.grouping import check_groups, layer_groups
from memlib.retraining import Retraining, retrain
from memlib.rewinding import Examples, Measurement, rewinding_accuracies
from memlib.runs import RunData
from memlib.seeds import stream
from memlib.units import Task, Unit

LoadCheckpoint = Callable[[int], Checkpoint]  # of the run, by epoch
Rows = dict[str, list[dict[str, object]]]  # of one unit, by table; its experiment's own table is written last


def plan_rewinding(run: RunConfig, config: RewindingConfig, group_names: Sequence[str]) -> list[Task]:
    """Return one task a set of layer groups, with one unit an epoch; raises like `plan_tasks`."""
    kept = run.checkpoint_epochs
    epochs = config.epochs or kept[:-1]
    _check_kept("rewinding.epochs", epochs, run)
    settings = {"batchnorm": config.batchnorm, "limit": config.limit}
    return [
        Task(tuple(Unit(run, "rewinding", {"groups": groups, "rewind_epoch": e, **settings}) for e in epochs))
        for groups in group_sets(config.sets, group_names)
    ]


def group_sets(kinds: Sequence[str], group_names: Sequence[str]) -> list[list[str]]:
    """Return the sets of layer groups that `RewindingConfig.sets` means for a model, each once, groups by depth.

    Raises:
        InputError: a named group does not exist.
    """
    names, n = list(group_names), len(group_names)
    known = {
        "single": [[name] for name in names],
        "prefixes": [names[:k] for k in range(2, n + 1)],
        "suffixes": [names[n - k :] for k in range(2, n + 1)],
    }
    sets = []
    for kind in kinds:
        if kind not in known:
            check_groups(kind.split("+"), names)
        sets += known.get(kind) or [[name for name in names if name in kind.split("+")]]
    return [list(chosen) for chosen in dict.fromkeys(map(tuple, sets))]


def plan_retraining(run: RunConfig, config: RetrainingConfig, group_names: Sequence[str]) -> list[Task]:
    """Return one task of one unit for each layer group and kind of examples; raises like `plan_tasks`."""
    _check_kept("retraining.reset_epoch", [config.reset_epoch], run)
    kinds = [kind for kind in config.on if kind == "clean" or run.noise.fraction > 0]
    # Only what differs from the defaults, so that a setting added later keeps every finished unit valid.
    defaults = asdict(RetrainingConfig(on=config.on))
    settings = {name: value for name, value in asdict(config).items() if value != defaults[name]}
    return [
        Task((Unit(run, "retraining", {"group": group, "trained_on": kind, **settings}),))
        for group in group_names
        for kind in kinds
    ]


def check_retraining(config: RetrainingConfig, data: RunData) -> None:
    """Raise InputError if it is to train on noisy examples, of which label noise made none."""
    noisy = data.noisy_labels
    if "noisy" in config.on and not noisy.is_noisy.any():
        raise InputError(
            f"retraining.on asks for noisy examples, but of {len(noisy.labels)} labels none is wrong; raise "
            "noise.fraction, or set retraining.on to ['clean']."
        )


def _check_kept(setting: str, epochs: Sequence[int], run: RunConfig) -> None:
    missing = sorted(set(epochs) - set(run.checkpoint_epochs))
    last = run.training.epochs
    if missing and missing[-1] > last:
        raise InputError(
            f"{setting} asks for epoch {missing[-1]}, but run {run.run_id} ({run.data.name} {run.model.name}) has "
            f"{last} epochs; give at most {last}, or train longer with --epochs."
        )
    if missing:
        kept = list(run.checkpoint_epochs)
        raise InputError(
            f"{setting} asks for epochs {missing} but the run keeps its states at {kept} only; choose among them, or "
            f"keep more with --set checkpoints.epochs={sorted({*kept, *missing})}."
        )


def perform_rewinding(task: Task, model: nn.Module, data: RunData, load_checkpoint: LoadCheckpoint) -> list[Rows]:
    """Return the rows of each unit of a rewinding task; `model` is the run's final one, on the device to use."""
    shared = task.units[0].settings
    names = layer_groups(model).names
    recalibrated = shared["batchnorm"] == "recalibrated"
    device = next(model.parameters()).device
    found = rewinding_accuracies(
        model,
        {unit.settings["rewind_epoch"]: load_checkpoint(unit.settings["rewind_epoch"]).tensors for unit in task.units},
        _placed(splits_of(data, limit=shared["limit"], seed=task.run.data_seed), device),
        sets=[shared["groups"]],
        measurement=Measurement(
            batchnorm=shared["batchnorm"],
            calibration=_calibration(data, task.run, device) if recalibrated else None,
        ),
    )
    facts = {
        "run_id": task.run.run_id,
        "group": "+".join(shared["groups"]),
        "group_index": names.index(shared["groups"][0]),
        "n_groups": len(shared["groups"]),
        "batchnorm": shared["batchnorm"],
    }
    return [
        {
            "rewinding": [
                {**facts, "rewind_epoch": r.epoch, "split": r.split, "accuracy": r.accuracy, "n": r.n}
                for r in found
                if r.epoch == unit.settings["rewind_epoch"]
            ]
        }
        for unit in task.units
    ]


def perform_retraining(task: Task, model: nn.Module, data: RunData, load_checkpoint: LoadCheckpoint) -> list[Rows]:
    """Return the rows of the one unit of a retraining task; `model` is the run's final one, on the device to use."""
    (unit,) = task.units
    settings = dict(unit.settings)
    group, trained_on = settings.pop("group"), settings.pop("trained_on")
    config = build_config(RetrainingConfig, {**settings, "on": [trained_on]})
    device = next(model.parameters()).device
    everything = _placed(splits_of(data, limit=None, seed=task.run.data_seed), device)
    splits = everything  # the same tensors: their prefix is run once
    if config.limit is not None:
        splits = _placed(splits_of(data, limit=config.limit, seed=task.run.data_seed), device)
    how = Retraining(config=config, seed=task.run.seed)
    found = retrain(
        model, load_checkpoint(config.reset_epoch).tensors, [group], everything[trained_on], splits, how=how
    )
    facts = {
        "run_id": task.run.run_id,
        "group": group,
        "group_index": layer_groups(model).names.index(group),
        "trained_on": trained_on,
        "reset_epoch": config.reset_epoch,
    }
    return [{"retraining": [{**facts, **asdict(result)} for result in found.curve]}]


def splits_of(data: RunData, *, limit: int | None, seed: int) -> dict[str, Examples]:
    """Return the examples that count as clean, noisy and test, at most `limit` of each, drawn from `seed`.

    A split without examples is absent.
    """
    is_noisy, labels = data.noisy_labels.is_noisy, data.noisy_labels.labels
    everything = {
        "clean": (data.train.images, labels, (~is_noisy).nonzero().squeeze(1)),
        "noisy": (data.train.images, labels, is_noisy.nonzero().squeeze(1)),
        "test": (data.test.images, data.test.labels, torch.arange(len(data.test))),
    }
    splits = {}
    for name, (images, assigned, chosen) in everything.items():
        if limit is not None:
            order = torch.randperm(len(chosen), generator=stream(seed, f"evaluated_{name}"))
            chosen = chosen[order[:limit].sort().values]
        if len(chosen):
            splits[name] = (images[chosen], assigned[chosen])
    return splits


def _calibration(data: RunData, run: RunConfig, device: torch.device) -> Tensor:
    return images_as_trained(place_images(data.train.images, device), run.training, seed=run.seed)


def _placed(splits: Mapping[str, Examples], device: torch.device) -> dict[str, Examples]:
    return {name: (place_images(images, device), labels) for name, (images, labels) in splits.items()}
