"""One trial of the search over dropout settings: a run on a part of its training set, judged on the rest.

Paper: the settings of Table 1 are not given; a search finds ours.
A trial that is stopped early is concluded from the state it left: its row says after how many epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from memlib.batches import images_as_trained
from memlib.checkpoints import CheckpointFolder, load_model_state
from memlib.config import RunConfig, config_to_json
from memlib.datasets import Dataset
from memlib.errors import InputError
from memlib.evaluation import accuracy, predict_deployed, predict_in_mode
from memlib.example_tied_dropout import dropout_layers, dropout_mode
from memlib.probes import check_probe
from memlib.recalibration import batchnorms, recalibrate
from memlib.results import ResultStore
from memlib.runs import build_network, place_data, prepare_data
from memlib.schemas import table_from_rows
from memlib.tasks import record_unit
from memlib.training import evaluate_held_out, train
from memlib.training_state import EpochRecord, TrainingData, saved_model, saved_records
from memlib.units import Unit

TABLE = "dropout_search"


@dataclass(frozen=True, eq=False)
class _Ended:
    """A trial that ended: its network as it was left, on the device, and what was recorded on the way."""

    model: nn.Module
    records: list[EpochRecord]
    data: TrainingData


def trial_unit(run: RunConfig) -> Unit:
    """Return the trial of a run's settings as a unit of work."""
    return Unit(run, TABLE, {})


def perform_trial(
    run: RunConfig,
    dataset: Dataset,
    store: ResultStore,
    *,
    device: torch.device,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> None:
    """Train one trial, or continue it where it was interrupted, and write its row; its final state is kept.

    After every epoch only the held-out examples are judged. `on_epoch` is called after every epoch, those finished
    before an interruption included; whatever it raises ends the trial, whose state is kept for `conclude_trial`.

    Raises:
        InputError: the settings do not fit the data, or hold nothing out.
        Diverged: the loss is no longer finite.
        OSError: the storage refuses.
    """
    data = place_data(prepare_data(run, dataset), dataset.digest, device)
    model = build_network(run, dataset)
    for record in train(
        model, data, run, device=device, checkpoints=_checkpoints(run, store), evaluate=evaluate_held_out
    ):
        on_epoch(record)
    conclude_trial(run, dataset, store, device=device)


def conclude_trial(run: RunConfig, dataset: Dataset, store: ResultStore, *, device: torch.device) -> None:
    """Judge a trial as its last epoch left it, write its row, and remove the state it could continue from.

    Raises:
        InputError: there is no such state, it is damaged, or the network's code is another one.
        OSError: the storage refuses.
    """
    unit, checkpoints = trial_unit(run), _checkpoints(run, store)
    last = checkpoints.load_last()
    if last is None:
        if unit.unit_id in store.units(TABLE):  # concluded before its process was lost
            return
        raise InputError(f"trial {unit.unit_id} left no state to judge; run the search again.")
    model = build_network(run, dataset)
    where = f"of trial {unit.unit_id}"
    load_model_state(model, saved_model(last), where=where)
    model.to(device).to(memory_format=torch.channels_last)
    records, data = saved_records(last), place_data(prepare_data(run, dataset), dataset.digest, device)
    check_probe(model, data.train, last.facts, where=where)
    ended = _Ended(model, records, data)
    rows = [{**_facts(run, dataset), **row} for row in _judge(ended, run)]
    record_unit(unit, store, device=device, seconds=sum(record.seconds for record in records))
    store.write(TABLE, unit.unit_id, table_from_rows(TABLE, rows))  # the proof of completion last, as in `perform_task`
    checkpoints.delete_last()


def _checkpoints(run: RunConfig, store: ResultStore) -> CheckpointFolder:
    """Return the trial's own folder: a run of the same settings judges more after an epoch, and has another."""
    return CheckpointFolder(store.storage, trial_unit(run).unit_id)


def _facts(run: RunConfig, dataset: Dataset) -> dict[str, object]:
    dropout = run.dropout
    is_tied = dropout.kind == "example_tied"
    return {
        "run_id": run.run_id,
        "dataset": run.data.name,
        "model": run.model.name,
        "seed": run.seed,
        "noise_fraction": run.noise.fraction,
        "dropout": dropout.kind,
        "p_gen": dropout.p_gen if is_tied else None,
        "p_mem": dropout.p_mem if is_tied else None,
        "width": run.model.width,
        "after": "+".join(dropout.after),
        "peak_lr": run.training.peak_lr,
        "config": config_to_json(run),
        "data_digest": dataset.digest,
    }


def _judge(ended: _Ended, run: RunConfig) -> list[dict[str, object]]:
    """Return the row with the final BatchNorm statistics and, trained to the end, that with recalibrated ones."""
    model, data = ended.model, ended.data
    device = next(model.parameters()).device
    epochs = len(ended.records) - 1
    stopped_early = epochs < run.training.epochs
    shared = {"epochs": epochs, "stopped_early": stopped_early}
    is_tied = bool(dropout_layers(model))
    scaled = _scaled_test_accuracy(model, data, device) if is_tied else None
    found = [
        {
            **shared,
            "batchnorm": "final",
            "validation_curve": [record.accuracies["validation"].accuracy for record in ended.records],
            "scaled_test_accuracy": scaled,
            **_accuracies(model, data, device),
        }
    ]
    if is_tied and not stopped_early and batchnorms(model):
        with dropout_mode(model, "dropped"):
            calibration = images_as_trained(data.train.images, run.training, seed=run.seed)
            recalibrated = recalibrate(model, calibration, device=device)
        measured = _accuracies(recalibrated, data, device)
        found.append({**shared, "batchnorm": "recalibrated", **measured})
    return found


def _accuracies(model: nn.Module, data: TrainingData, device: torch.device) -> dict[str, object]:
    train = predict_deployed(model, data.train, device=device)
    test = predict_deployed(model, data.test, device=device)
    splits = {
        **evaluate_held_out(model, data, device=device),
        "clean": accuracy(train, data.train.labels, ~data.is_noisy),
        "noisy": accuracy(train, data.train.labels, data.is_noisy),
        "test": accuracy(test, data.test.labels),
    }
    found: dict[str, object] = {}
    for split, result in splits.items():
        found[f"{split}_accuracy"] = None if result is None else result.accuracy
        found[f"n_{split}"] = 0 if result is None else result.n
    return found


def _scaled_test_accuracy(model: nn.Module, data: TrainingData, device: torch.device) -> float | None:
    result = accuracy(predict_in_mode(model, data.test, mode="scaled", device=device), data.test.labels)
    return None if result is None else result.accuracy
