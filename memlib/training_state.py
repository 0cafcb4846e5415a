"""What a run is between two epochs, as it is kept on disk and continued from: nothing that a resumed run would miss."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from memlib.checkpoints import Checkpoint, CheckpointFolder, load_model_state
from memlib.config import RunConfig, config_to_dict
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.evaluation import Accuracy
from memlib.gradient_accounting import GroupGradient
from memlib.probes import check_probe, probe_facts
from memlib.training_dynamics import TrainingDynamics, start_dynamics


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


def continue_training(
    state: TrainingState, data: TrainingData, config: RunConfig, checkpoints: CheckpointFolder
) -> None:
    """Put the state, in place, where an interrupted run was, unless it passed an epoch that is now to be kept.

    Raises:
        InputError: the checkpoint is damaged, or was made from other images, in another precision or by other code.
    """
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
    check_probe(state.model, data.train, saved.facts, where=f"of run {config.run_id}")
    for name, parameter in state.model.named_parameters():
        momentum = saved.tensors.get(f"momentum.{name}")
        if momentum is not None:
            state.optimizer.state[parameter]["momentum_buffer"] = laid_out_like(
                parameter, momentum.to(parameter.device)
            )
    state.dynamics = _dynamics(saved)
    state.records = records


def save_training(
    state: TrainingState, data: TrainingData, config: RunConfig, checkpoints: CheckpointFolder, *, keep: bool
) -> None:
    """Write what the run would continue from; with `keep`, also the model as one of its kept states.

    Raises:
        OSError: the storage refuses.
    """
    facts = _facts(state, data, config) | probe_facts(state.model, data.train)
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


def laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` in the parameter's memory layout: the fused optimizer pairs elements by memory order."""
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter).copy_(tensor)
