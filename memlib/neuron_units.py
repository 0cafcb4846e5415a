"""The search for critical units on a finished run as units of work: parts of its examples, and the rows of each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from memlib.batches import place_images
from memlib.checkpoints import load_model_state
from memlib.config import RunConfig, build_config
from memlib.critical_units import CriticalUnits, CriticalUnitsSearch, draw_reference, find_critical_units
from memlib.datasets import ImageSet, balanced_subset
from memlib.edited_networks import EditedAccuracies, edited_accuracies
from memlib.errors import InputError
from memlib.evaluation import predict
from memlib.experiments import CriticalUnitsConfig
from memlib.layer_units import LoadCheckpoint, Rows
from memlib.runs import RunData
from memlib.seeds import stream
from memlib.units import Task, Unit

KINDS = ("clean", "noisy")
RECORDED = ("removal", "reference_size", "copies", "reference_copies", "refresh", "noise", "max_steps", "precision")


def plan_critical_units(run: RunConfig, config: CriticalUnitsConfig) -> list[Task]:
    """Return one task of one unit for each part of the clean and of the noisy examples; raises like `plan_tasks`.

    The examples are drawn in one fixed order, so asking for more of them leaves the parts there were unchanged.
    """
    config = replace(config, early_epoch=_kept_before(config.early_epoch, run))
    defaults = asdict(CriticalUnitsConfig())
    settings = {n: v for n, v in asdict(config).items() if v != defaults[n] and n != "examples"}
    kinds = KINDS if run.noise.fraction > 0 else ("clean",)
    parts = range(config.examples // config.part_size)
    return [
        Task((Unit(run, "critical_units", {"kind": kind, "part": part, **settings}),))
        for kind in kinds
        for part in parts
    ]


def check_search(config: CriticalUnitsConfig, data: RunData) -> None:
    """Raise InputError if a run has fewer training examples than the search draws, or more classes than it judges."""
    n, num_classes = len(data.train), int(data.noisy_labels.labels.max()) + 1
    if config.reference_size > n:
        raise InputError(
            f"critical_units.reference_size is {config.reference_size}, but the run trains on {n} examples; lower it."
        )
    if config.limit is not None and config.limit < min(n, num_classes):
        raise InputError(
            f"critical_units.limit is {config.limit}, but there are {num_classes} classes; give at least as many."
        )


def search_settings(unit_settings: Mapping[str, Any]) -> CriticalUnitsConfig:
    """Return the settings of the search of one unit, which knows its own part and not how many there are."""
    settings = {name: value for name, value in unit_settings.items() if name not in ("kind", "part")}
    one_part = settings.get("part_size", CriticalUnitsConfig().part_size)
    return build_config(CriticalUnitsConfig, {**settings, "examples": one_part})


def perform_critical_units(task: Task, model: nn.Module, data: RunData, load_checkpoint: LoadCheckpoint) -> list[Rows]:
    """Return the rows of the one unit of a task; `model` is the run's final one, on the device to use."""
    (unit,) = task.units
    kind, part = unit.settings["kind"], unit.settings["part"]
    config = search_settings(unit.settings)
    check_search(config, data)
    device, seed = next(model.parameters()).device, task.run.data_seed
    train = replace(data.train, images=place_images(data.train.images, device), labels=data.noisy_labels.labels)
    is_noisy = data.noisy_labels.is_noisy
    reference = draw_reference(train, torch.empty(0, dtype=torch.int64), config, seed=seed)
    candidates = (is_noisy == (kind == "noisy")) & ~torch.isin(train.ids, reference.ids)
    examples = _part(model, train, candidates, part=part, size=config.part_size, seed=seed)
    if len(examples) == 0:
        return [{"removed_units": [], "critical_units": []}]
    judged = _judged(train, is_noisy, config.limit, seed=seed)
    search = find_critical_units(model, examples, reference, config, seed=task.run.seed, device=device)
    accuracies = edited_accuracies(model, search.units, search.found, judged, device=device, precision=config.precision)
    facts = {"run_id": task.run.run_id, "is_noisy": kind == "noisy"}
    right_early = _right_early(model, examples, config, load_checkpoint)
    measured = {"n_clean": int((~judged[1]).sum()), "n_noisy": int(judged[1].sum())}
    return [
        {
            "removed_units": [{**facts, **row} for row in _removals(search)],
            "critical_units": [
                {**facts, **measured, **right_early[i], "example_id": i, **row}
                for i, row in {**_searched(search, accuracies), **_skipped(search, examples)}.items()
            ],
        }
    ]


def _kept_before(epoch: int | None, run: RunConfig) -> int | None:
    """Return the newest kept epoch up to `epoch`; None if none was asked for or kept.

    The run's last is left out, and so is initialization, which is right by chance alone.
    """
    kept = [e for e in run.checkpoint_epochs[:-1] if epoch is not None and 0 < e <= epoch]
    return max(kept, default=None)


def _part(
    model: nn.Module, train: ImageSet, candidates: Bool[Tensor, " n"], *, part: int, size: int, seed: int
) -> ImageSet:
    """Return part number `part` of the candidates that the model predicts as assigned, in a drawn order."""
    device = next(model.parameters()).device
    chosen = candidates.nonzero().squeeze(1)
    order = chosen[torch.randperm(len(chosen), generator=stream(seed, "critical_units_examples"))]
    found = order[:0]
    for block in order.split(max(size, 250)):
        if len(found) >= (part + 1) * size:
            break
        some = train.take(block)
        right = predict(model, some.images, some.labels, device=device).prediction == some.labels
        found = torch.cat([found, block[right]])
    return train.take(found[part * size : (part + 1) * size])


def _judged(
    train: ImageSet, is_noisy: Bool[Tensor, " n"], limit: int | None, *, seed: int
) -> tuple[ImageSet, Bool[Tensor, " m"]]:
    """Return the training examples on which edited networks are judged: all, or a class-balanced draw."""
    if limit is None or limit >= len(train):
        return train, is_noisy
    judged = balanced_subset(train, limit, int(train.labels.max()) + 1, stream(seed, "critical_units_judged"))
    noisy_ids = train.ids[is_noisy]
    return judged, torch.isin(judged.ids, noisy_ids)


def _right_early(
    model: nn.Module, examples: ImageSet, config: CriticalUnitsConfig, load_checkpoint: LoadCheckpoint
) -> dict[int, Mapping[str, object]]:
    """Return by example id whether the run's state at `early_epoch` predicted it as assigned already."""
    ids = examples.ids.tolist()
    if config.early_epoch is None:
        return dict.fromkeys(ids, {"right_early": None, "early_epoch": None})
    early = copy.deepcopy(model)
    device = next(model.parameters()).device
    load_model_state(early, load_checkpoint(config.early_epoch).tensors, where=f"at epoch {config.early_epoch}")
    right = predict(early, examples.images, examples.labels, device=device).prediction == examples.labels
    return {i: {"right_early": r, "early_epoch": config.early_epoch} for i, r in zip(ids, right.tolist(), strict=True)}


def _searched(search: CriticalUnitsSearch, accuracies: EditedAccuracies) -> dict[int, dict[str, object]]:
    before = accuracies.before
    return {
        found.example_id: {
            **_settings(search),
            "outcome": found.outcome,
            "flipped": found.flipped,
            "n_removed": len(found.removed),
            "assigned": found.assigned,
            "new_prediction": found.new_prediction,
            "clean_accuracy_before": before.clean,
            "clean_accuracy_after": after.clean,
            "noisy_accuracy_before": before.noisy,
            "noisy_accuracy_after": after.noisy,
        }
        for found, after in zip(search.found, accuracies.after, strict=True)
    }


def _skipped(search: CriticalUnitsSearch, examples: ImageSet) -> dict[int, dict[str, object]]:
    """Return rows of the examples that the model, under noisy copies, does not predict as assigned."""
    assigned = dict(zip(examples.ids.tolist(), examples.labels.tolist(), strict=True))
    return {
        i: {**_settings(search), "assigned": assigned[i], "outcome": "skipped", "flipped": False, "n_removed": 0}
        for i in search.skipped
    }


def _settings(search: CriticalUnitsSearch) -> dict[str, object]:
    return {name: getattr(search.config, name) for name in RECORDED}


def _removals(search: CriticalUnitsSearch) -> list[dict[str, object]]:
    return [row for found in search.found for row in _removals_of(found, search)]


def _removals_of(found: CriticalUnits, search: CriticalUnitsSearch) -> list[dict[str, object]]:
    return [
        {
            "example_id": found.example_id,
            "step": step,
            "n_units": search.units.layers[removed.layer_index].n_units,
            **asdict(removed),
        }
        for step, removed in enumerate(found.removed, start=1)
    ]
