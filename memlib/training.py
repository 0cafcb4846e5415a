"""The one training loop: SGD with gradient accounting, and nothing that a resumed run would miss.

Paper: the experimental setting, and gradient accounting (Figures 1 and 2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from memlib.batches import steps_per_epoch, training_batches
from memlib.checkpoints import Checkpoint, CheckpointFolder
from memlib.config import RunConfig, config_to_dict
from memlib.datasets import ImageSet
from memlib.evaluation import Accuracy, accuracy, predict
from memlib.gradient_accounting import (
    GroupGradient,
    SplitGradients,
    add_to_sums_,
    split_gradients,
    summarize_groups,
    zero_sums,
)
from memlib.layer_groups import layer_groups
from memlib.precision import autocast
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
        InputError: a checkpoint to continue from is damaged.
    """
    state = start_state(model, config, device=device, checkpoints=checkpoints)
    yield from state.records
    for epoch in range(state.epoch + 1, config.training.epochs + 1):
        started = time.monotonic()
        gradients = _train_epoch(state, data, config, epoch=epoch, device=device) if epoch > 0 else ()
        accuracies = evaluate_splits(model, data, device=device)
        if not all(math.isfinite(a.loss) for a in accuracies.values()):
            raise _diverged(epoch, config)
        state.records.append(EpochRecord(epoch, accuracies, tuple(gradients), time.monotonic() - started))
        _save(state, config, checkpoints)
        yield state.records[-1]


def start_state(
    model: nn.Module, config: RunConfig, *, device: torch.device, checkpoints: CheckpointFolder
) -> TrainingState:
    """Return the state to train from: the last one saved, or the model as it is, before epoch 0 is recorded."""
    model.to(device).to(memory_format=torch.channels_last)
    settings = config.training
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.peak_lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    state = TrainingState(model, optimizer)
    saved = checkpoints.load_last()
    if saved is not None:
        _restore(state, saved)
    return state


def evaluate_splits(model: nn.Module, data: TrainingData, *, device: torch.device) -> dict[str, Accuracy]:
    """Return accuracy and loss on clean, noisy and test examples, in float32; a split without examples is absent."""
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
    config: RunConfig,
    *,
    device: torch.device,
) -> tuple[Tensor, SplitGradients]:
    """Take one optimizer step on (inputs, labels, is_noisy); return the loss before it and the split gradient."""
    inputs, labels, is_noisy = batch
    with autocast(config.training.precision, device):
        logits = state.model(inputs)
    parameters = list(state.model.parameters())
    loss, gradients = split_gradients(logits, labels, is_noisy, parameters)
    totals = torch._foreach_add(list(gradients.clean), list(gradients.noisy))
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total
    state.optimizer.step()
    return loss, gradients


def _train_epoch(
    state: TrainingState, data: TrainingData, config: RunConfig, *, epoch: int, device: torch.device
) -> list[GroupGradient]:
    labels, is_noisy = data.train.labels.to(device), data.is_noisy.to(device)
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
            loss, gradients = training_step(state, batch, config, device=device)
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


def _save(state: TrainingState, config: RunConfig, checkpoints: CheckpointFolder) -> None:
    facts = {"config": config_to_dict(config)}
    if state.epoch in config.checkpoint_epochs:
        checkpoints.save_epoch(state.epoch, state.model, facts)
    momenta = _momenta(state)
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    tensors |= {f"momentum.{name}": t for name, t in momenta.items()}
    checkpoints.save_last(Checkpoint(tensors, {**facts, "records": [asdict(r) for r in state.records]}))


def _momenta(state: TrainingState) -> dict[str, Tensor]:
    buffers = {name: state.optimizer.state[p].get("momentum_buffer") for name, p in state.model.named_parameters()}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _restore(state: TrainingState, saved: Checkpoint) -> None:
    model = {n.removeprefix("model."): t for n, t in saved.tensors.items() if n.startswith("model.")}
    state.model.load_state_dict(model, strict=True)
    for name, parameter in state.model.named_parameters():
        momentum = saved.tensors.get(f"momentum.{name}")
        if momentum is not None:
            state.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    state.records = [_record(r) for r in saved.facts["records"]]


def _record(saved: dict) -> EpochRecord:
    accuracies = {split: Accuracy(**values) for split, values in saved["accuracies"].items()}
    gradients = tuple(GroupGradient(**group) for group in saved["gradients"])
    return EpochRecord(saved["epoch"], accuracies, gradients, saved["seconds"])
