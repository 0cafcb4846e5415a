"""The one training loop: SGD with gradient accounting, and nothing that a resumed run would miss.

Paper: the experimental setting, and gradient accounting (Figures 1 and 2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from memlib.batches import steps_per_epoch, training_batches
from memlib.checkpoints import Checkpoint, CheckpointFolder, load_model_state
from memlib.config import RunConfig, config_to_dict
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.evaluation import Accuracy, accuracy, predict, predict_in_mode
from memlib.example_tied_dropout import dropout_layers
from memlib.gradient_accounting import (
    GroupGradient,
    SplitGradients,
    add_to_sums_,
    split_gradients,
    summarize_groups,
    zero_sums,
)
from memlib.layer_groups import layer_groups
from memlib.precision import autocast, exact_float32, resolve_precision
from memlib.schedules import learning_rate
from memlib.seeds import global_stream

STEPS_BETWEEN_CHECKS = 16  # for a loss that is no longer finite: each check waits for the device


class Diverged(ArithmeticError):
    """The loss became infinite or not a number; the message says when and which settings to change."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a run trains on and is judged by; `is_noisy` is used for accounting and evaluation only."""

    train: ImageSet  # labels are the assigned ones
    is_noisy: Bool[Tensor, " n"]
    test: ImageSet
    digest: str  # of the data set this was drawn from; a run continues on the same one only


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch leaves behind; epoch 0 is the state before training and has no gradients."""

    epoch: int
    accuracies: dict[str, Accuracy]  # by split: clean, noisy (absent without noise), test
    gradients: tuple[GroupGradient, ...]
    seconds: float  # wall time of training and evaluation


@dataclass
class TrainingState:
    """A run between two epochs: everything the next epoch depends on."""

    model: nn.Module
    optimizer: torch.optim.SGD
    precision: Literal["float32", "bfloat16"]
    records: list[EpochRecord] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Return the number of finished epochs."""
        return len(self.records) - 1


def train(
    model: nn.Module, data: TrainingData, config: RunConfig, *, device: torch.device, checkpoints: CheckpointFolder
) -> Iterator[EpochRecord]:
    """Train the model in place and yield one record an epoch, from before training (0) to the last.

    Epochs a run had finished when it was interrupted are yielded again from its checkpoint, not repeated.

    Raises:
        Diverged: the loss is no longer finite.
        InputError: a checkpoint to continue from is damaged, or was made from other images or in another precision.
    """
    state = _start(model, config, device)
    # What an earlier training of this run kept is written anew too: all states of a run belong together.
    kept = {*config.checkpoint_epochs, *checkpoints.epochs()}
    _continue(state, data, config, checkpoints)
    yield from state.records
    for epoch in range(state.epoch + 1, config.training.epochs + 1):
        started = time.monotonic()
        gradients = _train_epoch(state, data, config, epoch=epoch, device=device) if epoch > 0 else ()
        accuracies = evaluate_splits(model, data, device=device)
        if not all(math.isfinite(a.loss) for a in accuracies.values()):
            raise _diverged(epoch, config)
        state.records.append(EpochRecord(epoch, accuracies, tuple(gradients), time.monotonic() - started))
        facts = _facts(state, data, config)
        if epoch in kept:
            checkpoints.save_epoch(epoch, state.model, facts)
        _save_last(state, facts, checkpoints)
        yield state.records[-1]


def evaluate_splits(model: nn.Module, data: TrainingData, *, device: torch.device) -> dict[str, Accuracy]:
    """Return accuracy and loss on clean, noisy and test examples, in float32; a split without examples is absent.

    With example-tied dropout, training examples are judged under their own masks, test examples in mode `scaled`.
    """
    if dropout_layers(model):
        train = predict_in_mode(model, data.train, mode="tied", device=device)
        test = predict_in_mode(model, data.test, mode="scaled", device=device)
    else:
        train = predict(model, data.train.images, data.train.labels, device=device)
        test = predict(model, data.test.images, data.test.labels, device=device)
    splits = {
        "clean": accuracy(train, data.train.labels, ~data.is_noisy),
        "noisy": accuracy(train, data.train.labels, data.is_noisy),
        "test": accuracy(test, data.test.labels),
    }
    return {split: result for split, result in splits.items() if result is not None}


def training_step(
    state: TrainingState,
    batch: tuple[Tensor, Int64[Tensor, " b"], Bool[Tensor, " b"]],
    *,
    device: torch.device,
    ids: Int64[Tensor, " b"] | None = None,
) -> tuple[Tensor, SplitGradients]:
    """Take one optimizer step on (inputs, labels, is_noisy); return the loss before it and the split gradient.

    `ids` are the examples', for a model with example-tied dropout.
    """
    inputs, labels, is_noisy = batch
    with_ids = {} if ids is None else {"ids": ids}
    parameters = list(state.model.parameters())
    with exact_float32(device) if state.precision == "float32" else nullcontext():
        with autocast(state.precision, device):
            logits = state.model(inputs, **with_ids)
        loss, gradients = split_gradients(logits, labels, is_noisy, parameters)
    for parameter, clean, noisy in zip(parameters, gradients.clean, gradients.noisy, strict=True):
        parameter.grad = _laid_out_like(parameter, clean + noisy)
    state.optimizer.step()
    return loss, gradients


def _train_epoch(
    state: TrainingState, data: TrainingData, config: RunConfig, *, epoch: int, device: torch.device
) -> list[GroupGradient]:
    labels, is_noisy = data.train.labels.to(device), data.is_noisy.to(device)
    ids = data.train.ids.to(device) if dropout_layers(state.model) else None
    per_epoch = steps_per_epoch(len(data.train), config.training.batch_size)
    names = [name for name, _ in state.model.named_parameters()]
    sums = zero_sums(list(state.model.parameters()))
    state.model.train()
    batches = training_batches(data.train.images, config.training, seed=config.seed, epoch=epoch, device=device)
    # Dropout inside a model draws from the global stream: give it one of this run and epoch.
    with global_stream(config.seed, "dropout", epoch, device=device):
        for index, (positions, inputs) in enumerate(batches):
            step = (epoch - 1) * per_epoch + index
            state.optimizer.param_groups[0]["lr"] = learning_rate(
                config.training, step=step, steps=config.training.epochs * per_epoch
            )
            batch = (inputs, labels[positions], is_noisy[positions])
            loss, gradients = training_step(state, batch, device=device, ids=None if ids is None else ids[positions])
            add_to_sums_(sums, gradients)
            if index % STEPS_BETWEEN_CHECKS == 0 and not loss.isfinite():
                raise _diverged(epoch, config)
    return summarize_groups(sums, names, layer_groups(state.model))


def _diverged(epoch: int, config: RunConfig) -> Diverged:
    settings = config.training
    return Diverged(
        f"the loss is no longer finite in epoch {epoch} of {settings.epochs}; lower training.peak_lr (now "
        f"{settings.peak_lr}), lengthen training.warmup (now {settings.warmup}) or set training.precision to float32."
    )


def _start(model: nn.Module, config: RunConfig, device: torch.device) -> TrainingState:
    """Return the state before epoch 0; the model is moved to `device`."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    settings = config.training
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.peak_lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return TrainingState(model, optimizer, resolve_precision(settings.precision, device))


def _continue(state: TrainingState, data: TrainingData, config: RunConfig, checkpoints: CheckpointFolder) -> None:
    """Put the state where an interrupted run was, unless it passed an epoch that is now to be kept."""
    checkpoints.remove_unfinished()
    saved = checkpoints.load_last()
    if saved is None:
        return
    records = [_record(r) for r in saved.facts["records"]]
    kept = checkpoints.epochs()
    if any(epoch < len(records) and epoch not in kept for epoch in config.checkpoint_epochs):
        return
    for fact, ours in _facts(state, data, config).items():
        if fact != "config" and saved.facts[fact] != ours:
            raise InputError(
                f"run {config.run_id} was begun with {fact} {saved.facts[fact]} and would continue with {ours}; give "
                f"the same images and kind of device, or delete checkpoints/{config.run_id} in the results."
            )
    tensors = saved.tensors.items()
    model = {n.removeprefix("model."): t for n, t in tensors if n.startswith("model.")}
    load_model_state(state.model, model, where=f"of run {config.run_id}")
    for name, parameter in state.model.named_parameters():
        momentum = saved.tensors.get(f"momentum.{name}")
        if momentum is not None:
            state.optimizer.state[parameter]["momentum_buffer"] = _laid_out_like(
                parameter, momentum.to(parameter.device)
            )
    state.records = records


def _save_last(state: TrainingState, facts: dict[str, Any], checkpoints: CheckpointFolder) -> None:
    buffers = {name: state.optimizer.state[p].get("momentum_buffer") for name, p in state.model.named_parameters()}
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    tensors |= {f"momentum.{name}": t for name, t in buffers.items() if t is not None}
    checkpoints.save_last(Checkpoint(tensors, {**facts, "records": [asdict(r) for r in state.records]}))


def _facts(state: TrainingState, data: TrainingData, config: RunConfig) -> dict[str, Any]:
    return {"config": config_to_dict(config), "images": data.digest, "precision": state.precision}


def _record(saved: dict[str, Any]) -> EpochRecord:
    accuracies = {split: Accuracy(**values) for split, values in saved["accuracies"].items()}
    gradients = tuple(GroupGradient(**group) for group in saved["gradients"])
    return EpochRecord(saved["epoch"], accuracies, gradients, saved["seconds"])


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the parameter's memory layout: the fused optimizer pairs elements by memory order."""
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter).copy_(tensor)
