"""Out-of-sample predictions for every training example of a run: k networks, each trained on the other folds.

What confident learning (`confident_learning`) judges labels by. The networks are the run's own kind, without
dropout, trained on the assigned labels as the run's settings say; folds are drawn from the data's
seed, networks from the run's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from memlib.batches import place_images
from memlib.config import CheckpointConfig, DropoutConfig, RunConfig
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.evaluation import predict_probabilities
from memlib.experiments import CrossValidationConfig
from memlib.layer_units import LoadCheckpoint, Rows
from memlib.models import build_model
from memlib.runs import RunData
from memlib.seeds import stream, stream_seed
from memlib.training import train
from memlib.training_state import TrainingData
from memlib.units import Task, Unit


def plan_cross_validation(run: RunConfig, config: CrossValidationConfig) -> list[Task]:
    """Return one task of one unit for each fold."""
    settings = {"folds": config.folds, "epochs": config.epochs or run.training.epochs}
    return [Task((Unit(run, "cross_validation", {"fold": fold, **settings}),)) for fold in range(config.folds)]


def perform_cross_validation(
    task: Task, model: nn.Module, data: RunData, load_checkpoint: LoadCheckpoint
) -> list[Rows]:
    """Return the rows of the one unit of a task: the predictions for one fold; `model` tells the device to use.

    Raises:
        InputError: there are more folds than examples.
        Diverged: the loss is no longer finite.
    """
    (unit,) = task.units
    fold, folds, epochs = (unit.settings[name] for name in ("fold", "folds", "epochs"))
    device = next(model.parameters()).device
    assigned = data.noisy_labels.labels
    held_out = assign_folds(assigned, folds, generator=stream(task.run.data_seed, "folds")) == fold
    everything = ImageSet(place_images(data.train.images, device), assigned, data.train.ids)
    split = TrainingData(
        everything.take((~held_out).nonzero().squeeze(1)),
        data.noisy_labels.is_noisy[~held_out],
        everything.take(held_out.nonzero().squeeze(1)),
        digest="",  # it is never continued
    )
    config = fold_config(task.run, fold=fold, epochs=epochs)
    _, channels, height, width = data.train.images.shape
    shape = (channels, height, width)
    network = build_model(config.model, image_shape=shape, num_classes=data.num_classes, seed=config.seed)
    deque(train(network, split, config, device=device, checkpoints=None), maxlen=0)
    probabilities = predict_probabilities(network, split.test.images, device=device)
    facts = {"run_id": task.run.run_id, "fold": fold, "folds": folds, "epochs": epochs}
    columns = (split.test.ids, split.test.labels, probabilities.argmax(dim=1), probabilities)
    return [
        {
            "cross_validation": [
                {**facts, "example_id": i, "assigned": label, "prediction": prediction, "probabilities": shares}
                for i, label, prediction, shares in zip(*(c.tolist() for c in columns), strict=True)
            ]
        }
    ]


def fold_config(run: RunConfig, *, fold: int, epochs: int) -> RunConfig:
    """Return the settings of a fold's training: the run's, without dropout and with what nobody reads left out."""
    training = replace(run.training, epochs=epochs, gradient_accounting=False, evaluate_every=epochs)
    seed = stream_seed(run.seed, "cross_validation", fold)
    kept = CheckpointConfig(epochs=())
    return replace(run, dropout=DropoutConfig(), training=training, checkpoints=kept, seed=seed)


def check_folds(folds: int, n: int) -> None:
    """Raise InputError if there are more folds than examples."""
    if folds > n:
        raise InputError(f"cross_validation.folds is {folds} for {n} examples; give at most one fold each.")


def assign_folds(labels: Int64[Tensor, " n"], folds: int, *, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Return the fold, from 0 to folds - 1, of each example: equally large ones, each label spread over all.

    Raises:
        InputError: there are more folds than examples.
    """
    check_folds(folds, len(labels))
    shuffled = torch.randperm(len(labels), generator=generator)
    dealt = shuffled[labels[shuffled].argsort(stable=True)]  # label by label, at random within each
    assigned = torch.empty_like(labels)
    assigned[dealt] = torch.arange(len(labels)) % folds
    return assigned
