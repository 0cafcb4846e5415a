"""The one training loop: SGD, by default with gradient accounting, and nothing that a resumed run would miss.

Paper: the experimental setting, and gradient accounting (Figures 1 and 2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from memlib.batches import steps_per_epoch, training_batches
from memlib.checkpoints import Checkpoint, CheckpointFolder, load_model_state
from memlib.config import RunConfig, config_to_dict
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.evaluation import Accuracy, Predictions, accuracy, predict, predict_deployed, predict_in_mode
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
from memlib.training_dynamics import TrainingDynamics, after_epoch, start_dynamics

STEPS_BETWEEN_CHECKS = 16  # for a loss that is no longer finite: each check waits for the device


class Diverged(ArithmeticError):
    """The loss became infinite or not a number; the message says when and which settings to change."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a run trains on and is judged by; `is_noisy` is used for accounting and evaluation only.

    held_out: a part of the training set that is not trained on, with assigned labels; None for none.
    """

    train: ImageSet  # labels are the assigned ones
    is_noisy: Bool[Tensor, " n"]
    test: ImageSet
    digest: str  # of the data set this was drawn from; a run continues on the same one only
    held_out: ImageSet | None = None


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch leaves behind; epoch 0 is the state before training and has no gradients."""

    epoch: int
    accuracies: dict[str, Accuracy]  # by split: clean, noisy, test, validation; absent without examples or evaluation
    gradients: tuple[GroupGradient, ...]  # none without gradient accounting
    seconds: float  # wall time of training and evaluation


@dataclass
class TrainingState:
    """A run between two epochs: everything the next epoch depends on."""

    model: nn.Module
    optimizer: torch.optim.SGD
    precision: Literal["float32", "bfloat16"]
    records: list[EpochRecord] = field(default_factory=list)
    dynamics: TrainingDynamics = field(default_factory=lambda: start_dynamics(0))  # of the training examples, in order

    @property
    def epoch(self) -> int:
        """Return the number of finished epochs."""
        return len(self.records) - 1


def train(
    model: nn.Module,
    data: TrainingData,
    config: RunConfig,
    *,
    device: torch.device,
    checkpoints: CheckpointFolder | None,
    evaluate: Callable[..., dict[str, Accuracy]] | None = None,
) -> Generator[EpochRecord, None, TrainingDynamics]:
    """Train the model in place, yield one record an epoch, from before training (0) to the last, and return
    the dynamics of the training examples.

    Epochs a run had finished when it was interrupted are yielded again from its checkpoint, not repeated. Without
    `checkpoints` no state is kept, and an interrupted training cannot be continued. With `evaluate`, the model is
    judged by evaluate(model, data, device=...) after every epoch, instead of on all splits after the epochs that
    `training.evaluate_every` names, and there are no dynamics.

    Raises:
        Diverged: the loss is no longer finite.
        InputError: a checkpoint to continue from is damaged, or was made from other images or in another precision.
    """
    state = _start(model, config, device)
    state.dynamics = start_dynamics(len(data.train))
    kept = set(config.checkpoint_epochs)
    if checkpoints is not None:
        # What an earlier training of this run kept is written anew too: all states of a run belong together.
        kept |= set(checkpoints.epochs())
        _continue(state, data, config, checkpoints)
    yield from state.records
    for epoch in range(state.epoch + 1, config.training.epochs + 1):
        started = time.monotonic()
        gradients = _train_epoch(state, data, config, epoch=epoch, device=device) if epoch > 0 else ()
        accuracies = {}
        if evaluate is not None:
            accuracies = evaluate(model, data, device=device)
        elif epoch in config.training.evaluated_epochs:
            accuracies = _evaluate(state, data, epoch=epoch, device=device)
        if not all(math.isfinite(a.loss) for a in accuracies.values()):
            raise _diverged(epoch, config)
        state.records.append(EpochRecord(epoch, accuracies, tuple(gradients), time.monotonic() - started))
        if checkpoints is not None:
            _save(state, data, config, checkpoints, keep=epoch in kept)
        yield state.records[-1]
    return state.dynamics


def _evaluate(state: TrainingState, data: TrainingData, *, epoch: int, device: torch.device) -> dict[str, Accuracy]:
    """Return accuracy and loss on clean, noisy and test examples, in float32; a split without examples is absent.

    Held-out examples, if any, are judged as by `evaluate_held_out`. After an epoch of training, the training examples'
    dynamics take note of it.
    """
    train, test = _predict_splits(state.model, data, device=device)
    splits = {
        "clean": accuracy(train, data.train.labels, ~data.is_noisy),
        "noisy": accuracy(train, data.train.labels, data.is_noisy),
        "test": accuracy(test, data.test.labels),
    }
    if epoch > 0:
        seen = {"margin": train.margin.numpy(), "prediction": train.prediction.numpy()}
        state.dynamics = after_epoch(state.dynamics, epoch, **seen, labels=data.train.labels.cpu().numpy())
    held_out = evaluate_held_out(state.model, data, device=device) if data.held_out is not None else {}
    return {split: result for split, result in splits.items() if result is not None} | held_out


def evaluate_held_out(model: nn.Module, data: TrainingData, *, device: torch.device) -> dict[str, Accuracy]:
    """Return accuracy and loss on the held-out examples, by their assigned labels, as split `validation`.

    Of a model with example-tied dropout in mode `dropped`, in which it would be deployed; in float32.

    Raises:
        InputError: nothing is held out.
    """
    if data.held_out is None:
        raise InputError("nothing is held out to validate on; set data.holdout, e.g. to 0.1.")
    result = accuracy(predict_deployed(model, data.held_out, device=device), data.held_out.labels)
    return {} if result is None else {"validation": result}


def _predict_splits(model: nn.Module, data: TrainingData, *, device: torch.device) -> tuple[Predictions, Predictions]:
    """Return what the model predicts for the training and the test examples.

    With example-tied dropout, training examples are judged under their own masks, test examples in mode `scaled`.
    """
    if dropout_layers(model):
        train = predict_in_mode(model, data.train, mode="tied", device=device)
        test = predict_in_mode(model, data.test, mode="scaled", device=device)
    else:
        train = predict(model, data.train.images, data.train.labels, device=device)
        test = predict(model, data.test.images, data.test.labels, device=device)
    return train, test


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
    parameters = list(state.model.parameters())
    with _step_numerics(state, device):
        logits = _logits(state, inputs, ids, device)
        loss, gradients = split_gradients(logits, labels, is_noisy, parameters)
    _step(state, torch._foreach_add(gradients.clean, gradients.noisy))
    return loss, gradients


def plain_step(
    state: TrainingState,
    batch: tuple[Tensor, Int64[Tensor, " b"]],
    *,
    device: torch.device,
    ids: Int64[Tensor, " b"] | None = None,
) -> Tensor:
    """Take one optimizer step on (inputs, labels) without gradient accounting; return the loss before it.

    The step is `training_step`'s up to rounding, with one backward pass for its two.
    """
    inputs, labels = batch
    with _step_numerics(state, device):
        loss = F.cross_entropy(_logits(state, inputs, ids, device).float(), labels)
        gradients = torch.autograd.grad(loss, list(state.model.parameters()), materialize_grads=True)
    _step(state, gradients)
    return loss.detach()


def _step_numerics(state: TrainingState, device: torch.device) -> AbstractContextManager[object]:
    return exact_float32(device) if state.precision == "float32" else nullcontext()


def _logits(state: TrainingState, inputs: Tensor, ids: Int64[Tensor, " b"] | None, device: torch.device) -> Tensor:
    with_ids = {} if ids is None else {"ids": ids}
    with autocast(state.precision, device):
        return state.model(inputs, **with_ids)


def _step(state: TrainingState, gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(state.model.parameters(), gradients, strict=True):
        parameter.grad = _laid_out_like(parameter, gradient)
    state.optimizer.step()


def _train_epoch(
    state: TrainingState, data: TrainingData, config: RunConfig, *, epoch: int, device: torch.device
) -> list[GroupGradient]:
    labels, is_noisy = data.train.labels.to(device), data.is_noisy.to(device)
    ids = data.train.ids.to(device) if dropout_layers(state.model) else None
    per_epoch = steps_per_epoch(len(data.train), config.training.batch_size)
    accounting = config.training.gradient_accounting
    sums = zero_sums(list(state.model.parameters()) if accounting else [])
    state.model.train()
    batches = training_batches(data.train.images, config.training, seed=config.seed, epoch=epoch, device=device)
    # Dropout inside a model draws from the global stream: give it one of this run and epoch.
    with global_stream(config.seed, "dropout", epoch, device=device):
        for index, (positions, inputs) in enumerate(batches):
            step = (epoch - 1) * per_epoch + index
            state.optimizer.param_groups[0]["lr"] = learning_rate(
                config.training, step=step, steps=config.training.epochs * per_epoch
            )
            chosen = None if ids is None else ids[positions]
            if accounting:
                batch = (inputs, labels[positions], is_noisy[positions])
                loss, gradients = training_step(state, batch, device=device, ids=chosen)
                add_to_sums_(sums, gradients)
            else:
                loss = plain_step(state, (inputs, labels[positions]), device=device, ids=chosen)
            if index % STEPS_BETWEEN_CHECKS == 0 and not loss.isfinite():
                raise _diverged(epoch, config)
    names = [name for name, _ in state.model.named_parameters()]
    return summarize_groups(sums, names, layer_groups(state.model)) if accounting else []


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
    records = saved_records(saved)
    kept = checkpoints.epochs()
    if any(epoch < len(records) and epoch not in kept for epoch in config.checkpoint_epochs):
        return
    if "dynamics.margin_sum" not in saved.tensors:  # begun by a memlib without them: they cannot be had afterwards
        return
    for fact, ours in _facts(state, data, config).items():
        if fact != "config" and saved.facts[fact] != ours:
            raise InputError(
                f"run {config.run_id} was begun with {fact} {saved.facts[fact]} and would continue with {ours}; give "
                f"the same images and kind of device, or delete checkpoints/{config.run_id} in the results."
            )
    load_model_state(state.model, saved_model(saved), where=f"of run {config.run_id}")
    for name, parameter in state.model.named_parameters():
        momentum = saved.tensors.get(f"momentum.{name}")
        if momentum is not None:
            state.optimizer.state[parameter]["momentum_buffer"] = _laid_out_like(
                parameter, momentum.to(parameter.device)
            )
    state.dynamics = _dynamics(saved)
    state.records = records


def _save(
    state: TrainingState, data: TrainingData, config: RunConfig, checkpoints: CheckpointFolder, *, keep: bool
) -> None:
    facts = _facts(state, data, config)
    if keep:
        checkpoints.save_epoch(state.epoch, state.model, facts)
    buffers = {name: state.optimizer.state[p].get("momentum_buffer") for name, p in state.model.named_parameters()}
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    tensors |= {f"momentum.{name}": t for name, t in buffers.items() if t is not None}
    tensors |= {f"dynamics.{name}": torch.as_tensor(values) for name, values in vars(state.dynamics).items()}
    checkpoints.save_last(Checkpoint(tensors, {**facts, "records": [asdict(r) for r in state.records]}))


def _facts(state: TrainingState, data: TrainingData, config: RunConfig) -> dict[str, Any]:
    return {"config": config_to_dict(config), "images": data.digest, "precision": state.precision}


def saved_model(saved: Checkpoint) -> dict[str, Tensor]:
    """Return the model's state in what an unfinished run would continue from."""
    return {n.removeprefix("model."): t for n, t in saved.tensors.items() if n.startswith("model.")}


def saved_records(saved: Checkpoint) -> list[EpochRecord]:
    """Return the records of the epochs, from before training on, in what an unfinished run would continue from."""
    return [_record(r) for r in saved.facts["records"]]


def _record(saved: dict[str, Any]) -> EpochRecord:
    accuracies = {split: Accuracy(**values) for split, values in saved["accuracies"].items()}
    gradients = tuple(GroupGradient(**group) for group in saved["gradients"])
    return EpochRecord(saved["epoch"], accuracies, gradients, saved["seconds"])


def _dynamics(saved: Checkpoint) -> TrainingDynamics:
    values: dict[str, Any] = {f.name: saved.tensors[f"dynamics.{f.name}"].numpy() for f in fields(TrainingDynamics)}
    return TrainingDynamics(**{**values, "n_epochs": int(values["n_epochs"])})


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the parameter's memory layout: the fused optimizer pairs elements by memory order."""
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter).copy_(tensor)
