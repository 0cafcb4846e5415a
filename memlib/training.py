"""The one training loop: SGD, by default with gradient accounting, and nothing that a resumed run would miss.

Paper: the experimental setting, and gradient accounting (Figures 1 and 2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from memlib.batches import steps_per_epoch, training_batches
from memlib.checkpoints import CheckpointFolder
from memlib.config import RunConfig
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
from memlib.grouping import layer_groups
from memlib.precision import autocast, exact_float32, resolve_precision
from memlib.schedules import learning_rate
from memlib.seeds import global_stream
from memlib.training_dynamics import TrainingDynamics, after_epoch, start_dynamics
from memlib.training_state import (
    EpochRecord,
    TrainingData,
    TrainingState,
    continue_training,
    laid_out_like,
    save_training,
)

STEPS_BETWEEN_CHECKS = 16  # for a loss that is no longer finite: each check waits for the device


class Diverged(ArithmeticError):
    """The loss or the network became infinite or not a number; the message says when and which settings to change."""


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
        Diverged: the loss or the network is no longer finite.
        InputError: a parameter of the model is frozen, or it is wrapped and so has no layer groups; or a checkpoint
            to continue from is damaged, or was made from other images or in another precision.
    """
    state = _start(model, config, device)
    state.dynamics = start_dynamics(len(data.train))
    kept = set(config.checkpoint_epochs)
    if checkpoints is not None:
        # What an earlier training of this run kept is written anew too: all states of a run belong together.
        kept |= set(checkpoints.epochs())
        continue_training(state, data, config, checkpoints)
    yield from state.records
    for epoch in range(state.epoch + 1, config.training.epochs + 1):
        started = time.monotonic()
        gradients = _train_epoch(state, data, config, epoch=epoch, device=device) if epoch > 0 else ()
        accuracies = {}
        if evaluate is not None:
            accuracies = evaluate(model, data, device=device)
        elif epoch in config.training.evaluated_epochs:
            accuracies = _evaluate(state, data, epoch=epoch, device=device)
        if not all(math.isfinite(a.loss) for a in accuracies.values()) or not _is_finite(state.model):
            raise _diverged(epoch, config)
        state.records.append(EpochRecord(epoch, accuracies, tuple(gradients), time.monotonic() - started))
        if checkpoints is not None:
            save_training(state, data, config, checkpoints, keep=epoch in kept)
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
        parameter.grad = laid_out_like(parameter, gradient)
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


def _is_finite(model: nn.Module) -> bool:
    """Return whether every parameter and buffer is finite: a state to be continued from or kept."""
    values = [t for t in model.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([t.isfinite().all() for t in values]).all())


def _diverged(epoch: int, config: RunConfig) -> Diverged:
    settings = config.training
    return Diverged(
        f"the loss or the network is no longer finite in epoch {epoch} of {settings.epochs}; lower training.peak_lr "
        f"(now {settings.peak_lr}), lengthen training.warmup (now {settings.warmup}) or set training.precision to "
        "float32."
    )


def _start(model: nn.Module, config: RunConfig, device: torch.device) -> TrainingState:
    """Return the state before epoch 0; the model is moved to `device`.

    Raises:
        InputError: a parameter is frozen, or the model has no layer groups that gradients could be accounted for.
    """
    if config.training.gradient_accounting:
        layer_groups(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise InputError(
            f"{len(frozen)} parameters of {type(model).__name__} require no gradient ({frozen[0]} first), but all are "
            "trained and accounted for; call model.requires_grad_(True), or make what is fixed a buffer."
        )
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
