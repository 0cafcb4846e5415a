"""One training run as a unit of work: settings and data in, tables and checkpoints in the store out.

The row in `runs` is written last: a run is done when that row says so and all its tables are there. Everything
before it can be written again without leaving a trace twice.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from memlib.batches import images_as_trained, place_images
from memlib.checkpoints import CheckpointFolder
from memlib.code_version import code_version
from memlib.config import RunConfig, config_to_json
from memlib.control_dropouts import check_widths, insert_dropout
from memlib.datasets import Dataset, ImageSet, balanced_subset, draw_holdout
from memlib.dropout_modes import ModePredictions, mode_accuracies, predict_by_mode
from memlib.errors import InputError
from memlib.forgotten_images import forgotten_images
from memlib.label_noise import NoisyLabels, add_label_noise
from memlib.models import build_model
from memlib.precision import resolve_precision
from memlib.results import ResultStore
from memlib.schemas import table_from_rows
from memlib.seeds import stream
from memlib.training import train
from memlib.training_dynamics import NEVER, TrainingDynamics
from memlib.training_state import EpochRecord, TrainingData

DIGIT_SETS = ("digits", "mnist", "svhn")


@dataclass(frozen=True, eq=False)
class RunData:
    """A run's training set with its labels after noise, its test set, and what is held out of training to validate it.

    The labels of `held_out` are the assigned ones, as noisy as the training set's; which are wrong is not told.
    """

    train: ImageSet
    noisy_labels: NoisyLabels
    test: ImageSet
    num_classes: int
    held_out: ImageSet | None = None


def prepare_data(config: RunConfig, dataset: Dataset) -> RunData:
    """Return the run's seeded subset of the training set with its label noise, and the test set as it is.

    What `data.holdout` holds out is drawn from the subset after the noise, and no part of the training set.

    Raises:
        InputError: the subset, the noise or the held-out part cannot be drawn from this dataset; or it has a class
            without a training image, which the noise would still draw.
    """
    train_set = dataset.train
    if config.data.limit is not None:
        generator = stream(config.data_seed, "subset")
        train_set = balanced_subset(train_set, config.data.limit, dataset.num_classes, generator)
    if "flip" in config.training.augment and config.data.name in DIGIT_SETS:
        raise InputError(
            f"training.augment has 'flip', but a mirrored digit is no digit; leave it out for {dataset.name}."
        )
    if config.noise.fraction > 0 and not config.noise.pairs:  # given pairs are what the user wants
        _check_classes(dataset)
    generator = stream(config.data_seed, "label_noise")
    noisy = add_label_noise(train_set.labels, config.noise, num_classes=dataset.num_classes, generator=generator)
    data = RunData(train_set, noisy, dataset.test, dataset.num_classes)
    if config.data.holdout is not None:
        data = _hold_out(data, config.data.holdout, stream(config.data_seed, "holdout"))
    if config.training.batch_size > len(data.train):
        raise InputError(
            f"training.batch_size is {config.training.batch_size} but {dataset.name} has {len(data.train)} training "
            f"images here; give at most {len(data.train)}."
        )
    return data


def _check_classes(dataset: Dataset) -> None:
    missing = sorted(set(range(dataset.num_classes)) - set(dataset.train.labels.tolist()))
    if missing:
        raise InputError(
            f"{len(missing)} of the {dataset.num_classes} classes of data set {dataset.name!r} have no training image, "
            f"first class {missing[0]} ({dataset.class_names[missing[0]]!r}), and label noise would draw them; number "
            "and name only the classes that there are, from 0 upwards, or leave the labels alone (--noise 0)."
        )


def _hold_out(data: RunData, share: float, generator: torch.Generator) -> RunData:
    kept, held_out = draw_holdout(len(data.train), share, generator)
    assigned = replace(data.train, labels=data.noisy_labels.labels)
    return replace(
        data,
        train=data.train.take(kept),
        noisy_labels=data.noisy_labels.take(kept),
        held_out=assigned.take(held_out),
    )


def place_data(data: RunData, digest: str, device: torch.device) -> TrainingData:
    """Return what the training loop takes, images on `device`; `digest` is of the data set they were drawn from."""

    def placed(images: ImageSet) -> ImageSet:
        return replace(images, images=place_images(images.images, device))

    train = placed(replace(data.train, labels=data.noisy_labels.labels))
    held_out = None if data.held_out is None else placed(data.held_out)
    return TrainingData(train, data.noisy_labels.is_noisy, placed(data.test), digest, held_out)


def build_network(config: RunConfig, dataset: Dataset) -> nn.Module:
    """Return the run's freshly initialized network on the CPU, with its dropout inserted.

    Raises:
        InputError: the model does not fit the images, or the dropout does not fit the model.
    """
    model = build_model(
        config.model, image_shape=dataset.image_shape, num_classes=dataset.num_classes, seed=config.seed
    )
    if config.dropout.kind == "none":
        return model
    model = insert_dropout(model, config.dropout, seed=config.seed)
    check_widths(model, dataset.image_shape)
    return model


def perform_run(
    config: RunConfig,
    dataset: Dataset,
    store: ResultStore,
    *,
    device: torch.device,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
) -> None:
    """Train one run, or continue it where it was interrupted, and write its tables and checkpoints.

    `on_epoch` is called after every epoch, those finished before an interruption included.

    Raises:
        InputError: the settings do not fit the data.
        Diverged: the loss is no longer finite; record it with `record_failure`.
        OSError: the storage refuses.
    """
    version_at_start = code_version()
    data = prepare_data(config, dataset)
    model = build_network(config, dataset)
    training_data = place_data(data, dataset.digest, device)
    checkpoints = CheckpointFolder(store.storage, config.run_id)
    epochs = train(model, training_data, config, device=device, checkpoints=checkpoints)
    records, dynamics = _follow(epochs, on_epoch)
    run_id = config.run_id
    store.write("epochs", run_id, _epoch_rows(run_id, records))
    store.write("gradients", run_id, _gradient_rows(run_id, records))
    store.write("dynamics", run_id, _dynamics_rows(run_id, dynamics, data.train.ids))
    calibration = None
    if config.dropout.kind == "example_tied":
        calibration = images_as_trained(training_data.train.images, config.training, seed=config.seed)
    found = predict_by_mode(model, training_data, device=device, calibration=calibration)
    store.write("examples", run_id, _example_rows(run_id, found, data))
    if config.dropout.kind != "none":
        store.write("dropout", run_id, _dropout_rows(run_id, found, training_data))
    if config.dropout.kind == "example_tied":
        store.write("forgotten_images", run_id, _forgotten_rows(run_id, found, data, dataset.class_names))
    seconds = sum(record.seconds for record in records)
    outcome = {"seconds": seconds, "status": "done", "error": None, "data_digest": dataset.digest}
    store.write("runs", run_id, _run_row(config, device, {**outcome, "code_version": version_at_start}))
    checkpoints.delete_last()


def _follow(
    epochs: Generator[EpochRecord, None, TrainingDynamics], on_epoch: Callable[[EpochRecord], None]
) -> tuple[list[EpochRecord], TrainingDynamics]:
    """Return a training's records, each reported as it comes, and its dynamics at the end."""
    records = []
    while True:
        try:
            records.append(next(epochs))
        except StopIteration as ended:
            return records, ended.value
        on_epoch(records[-1])


def record_failure(config: RunConfig, store: ResultStore, *, device: torch.device | None, error: str) -> None:
    """Write the run's row with status `failed` and the reason; the next sweep tries the run again.

    A run that was done before (and was repeated to keep more states) stays done. `device` is None
    where it is not known.
    """
    if config.run_id in store.finished_runs():
        return
    outcome = {"seconds": None, "status": "failed", "error": error, "data_digest": None}
    outcome["code_version"] = code_version()
    store.write("runs", config.run_id, _run_row(config, device, outcome))


def _run_row(config: RunConfig, device: torch.device | None, outcome: Mapping[str, object]) -> pa.Table:
    row = {
        "run_id": config.run_id,
        "dataset": config.data.name,
        "model": config.model.name,
        "seed": config.seed,
        "noise_fraction": config.noise.fraction,
        "dropout": config.dropout.kind,
        "config": config_to_json(config),
        "device": None if device is None else device_name(device),
        "precision": None if device is None else resolve_precision(config.training.precision, device),
        **outcome,
    }
    return table_from_rows("runs", [row])


def device_name(device: torch.device) -> str:
    """Return what results call a device, e.g. `cuda: NVIDIA H200`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{device.type}: {name}"


def _epoch_rows(run_id: str, records: list[EpochRecord]) -> pa.Table:
    rows = [
        {"run_id": run_id, "epoch": record.epoch, "split": split, **asdict(result)}
        for record in records
        for split, result in record.accuracies.items()
    ]
    return table_from_rows("epochs", rows)


def _gradient_rows(run_id: str, records: list[EpochRecord]) -> pa.Table:
    rows = [
        {"run_id": run_id, "epoch": record.epoch, **asdict(group)} for record in records for group in record.gradients
    ]
    return table_from_rows("gradients", rows)


def _dynamics_rows(run_id: str, dynamics: TrainingDynamics, ids: Tensor) -> pa.Table:
    found = dynamics.summarize()
    known = {
        name: pa.array(values, mask=values == NEVER)
        for name, values in (("first_learned", found.first_learned), ("last_mistake", found.last_mistake))
    }
    columns = {**vars(found), **known, "n_epochs": [found.n_epochs] * len(ids)}
    return pa.table({"run_id": [run_id] * len(ids), "example_id": ids.numpy(), **columns})


def _dropout_rows(run_id: str, found: list[ModePredictions], data: TrainingData) -> pa.Table:
    rows = [{"run_id": run_id, **asdict(result)} for result in mode_accuracies(found, data)]
    return table_from_rows("dropout", rows)


def _forgotten_rows(run_id: str, found: list[ModePredictions], data: RunData, class_names: Sequence[str]) -> pa.Table:
    by_mode = {predictions.variant.mode: predictions.train for predictions in found if predictions.variant.is_main}
    predictions = (by_mode["tied"], by_mode["dropped"])
    images = forgotten_images(data.train, predictions, data.noisy_labels, class_names=class_names)
    return table_from_rows("forgotten_images", [{"run_id": run_id, **asdict(image)} for image in images])


def _example_rows(run_id: str, found: list[ModePredictions], data: RunData) -> pa.Table:
    noisy = data.noisy_labels
    train_part = {"assigned": noisy.labels, "original": noisy.original, "is_noisy": noisy.is_noisy}
    labels = data.test.labels
    test_part = {"assigned": labels, "original": labels, "is_noisy": torch.zeros(len(labels), dtype=torch.bool)}
    tables = []
    for predictions in found:
        constants = {"run_id": run_id, "mode": predictions.variant.mode}
        if not predictions.variant.is_main:
            continue
        train = {"example_id": data.train.ids, **train_part, **vars(predictions.train)}
        tables.append(_columns(train, split="train", **constants))
        if predictions.test is not None:
            test = {"example_id": data.test.ids, **test_part, **vars(predictions.test)}
            tables.append(_columns(test, split="test", **constants))
    return pa.concat_tables(tables)


def _columns(part: Mapping[str, Any], **constants: str) -> pa.Table:
    """Return equally long tensors and repeated strings as an Arrow table."""
    n = len(part["example_id"])
    columns = {name: v.numpy() if isinstance(v, Tensor) else [v] * n for name, v in {**part, **constants}.items()}
    return pa.table(columns)
