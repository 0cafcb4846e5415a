"""E3: does a reset layer group learn noisy labels again that it never sees?

Paper: layer retraining (Figure 4). From a converged model, one group goes back to its
initialization (parameters and buffers), every other group is frozen for real (no gradient, running
statistics and dropout in evaluation mode), and that group alone is trained on clean examples only;
accuracies on clean and noisy examples are recorded after every epoch, before the first included.
Deviations: the released code trains on the noisy examples and freezes nothing. Here the frozen
prefix of the network is run once and its outputs are kept where they fit (`prefix_outputs`), so training
is on un-augmented images. Training on the noisy examples only is a control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from memlib.batches import model_inputs, split_order, steps_per_epoch
from memlib.checkpoints import check_state
from memlib.chunks import ChunkSize, images_at_once, memory_budget, run_in_chunks
from memlib.evaluation import evaluation_mode
from memlib.experiments import RetrainingConfig
from memlib.grouping import LayerGroups, check_groups, layer_groups
from memlib.precision import exact_float32
from memlib.prefix_outputs import BatchSource, PrefixOutputs
from memlib.prefixes import State, cut_before
from memlib.rewinding import CHUNK_SIZE, Examples, check_splits, rewind
from memlib.schedules import learning_rate
from memlib.seeds import global_stream, stream
from memlib.training import Diverged

CPU_BUDGET = 2 * 2**30  # bytes of kept prefix outputs; what does not fit is computed batch by batch


@dataclass(frozen=True)
class RetrainingAccuracy:
    """Accuracy in [0, 1] on the `n` examples of a split after `epoch` epochs of retraining (0 = before)."""

    epoch: int
    split: str
    accuracy: float
    n: int


@dataclass(frozen=True, eq=False)
class Retrained:
    """The model with its retrained group, and the accuracies on the way there."""

    model: nn.Module
    curve: tuple[RetrainingAccuracy, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Retraining:
    """How a group is retrained.

    config: schedule, optimizer and patience. Its `on`, `reset_epoch` and `limit` are for sweeps: here the
    examples and the earlier state are handed in.
    seed: of the order of the examples, and of dropout inside the groups.
    groups: the layer groups; None for those `layer_groups` finds.
    memory_budget: bytes of kept prefix outputs; None for 2 GiB on a CPU, and a quarter of what is free of a GPU. Moves
    no number beyond float32 rounding.
    """

    config: RetrainingConfig = field(default_factory=RetrainingConfig)
    seed: int = 0
    groups: LayerGroups | None = None
    memory_budget: int | None = None


def retrain(
    model: nn.Module,
    earlier: State,
    chosen: Sequence[str],
    train_on: Examples,
    splits: Mapping[str, Examples],
    *,
    how: Retraining | None = None,
) -> Retrained:
    """Reset the layer groups `chosen` to the state `earlier`, train them alone on `train_on`, and return the curve.

    `train_on` and `splits` are pairs of uint8 images (or model inputs) and assigned labels. The model is
    left unchanged; everything is computed on its device in float32. Parameters that require no gradient stay
    frozen, unless none of the groups' does. Training stops early after
    `patience` epochs in which every training example was predicted right before its step.

    Raises:
        InputError: a group does not exist, `earlier` is another architecture's or not finite, a split is empty, the
            model returns no logits, or not even one example fits into memory.
        Diverged: the loss is no longer finite.
    """
    how = how or Retraining()
    groups = how.groups or layer_groups(model)
    check_groups(chosen, groups.names)
    check_state(model, model.state_dict(), where="of the final model")
    check_splits({"train_on": train_on, **splits})
    reset = rewind(model, earlier, chosen, groups=groups, buffers=True)
    device = next(reset.parameters()).device
    with exact_float32(device), evaluation_mode(reset), _learning_only(reset, chosen, groups) as parameters:
        suffix = cut_before(reset, [chosen], groups, model_inputs(train_on[0][:2], device))[0]
        modules = _inside(suffix.network, chosen, groups)
        at_once = images_at_once(train_on[0], CHUNK_SIZE, device)
        trained = _Trained(parameters, modules, device, at_once)
        budget = _budget(device) if how.memory_budget is None else how.memory_budget
        prefix = PrefixOutputs(reset, suffix, device, at_once=at_once, budget=budget)
        train_source = (prefix.source(train_on[0]), train_on[1].to(device))
        sources = {name: (prefix.source(images), labels.to(device)) for name, (images, labels) in splits.items()}
        curve = tuple(_train(trained, train_source, sources, how))
    return Retrained(reset, curve)


def _budget(device: torch.device) -> int:
    return memory_budget(device) if device.type == "cuda" else CPU_BUDGET


@dataclass(frozen=True, eq=False)
class _Trained:
    """What learns in a network of which only some groups do: their parameters, and the modules they consist of.

    at_once: examples of a forward pass that nothing is learned from.
    """

    parameters: list[nn.Parameter]
    modules: list[nn.Module]
    device: torch.device
    at_once: int


@contextmanager
def _learning_only(model: nn.Module, chosen: Sequence[str], groups: LayerGroups) -> Iterator[list[nn.Parameter]]:
    """Run a block in which only the chosen groups' parameters, which it gives, require gradients.

    Those that were frozen stay so, unless all were, as in a network that was frozen to be used.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    named = dict(model.named_parameters())
    members = [named[name] for group in chosen for name in groups.parameters[group]]
    learning = [parameter for parameter in members if parameter.requires_grad] or members
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    try:
        yield learning
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


def _inside(network: nn.Module, chosen: Sequence[str], groups: LayerGroups) -> list[nn.Module]:
    """Return the modules all of whose parameters belong to the chosen groups."""
    learning = {name for group in chosen for name in groups.parameters[group]}
    found = []
    for name, module in network.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters()]
        if own and learning.issuperset(own):
            found.append(module)
    return found


def _train(
    trained: _Trained,
    train_on: tuple[BatchSource, Tensor],
    splits: Mapping[str, tuple[BatchSource, Tensor]],
    how: Retraining,
) -> Iterator[RetrainingAccuracy]:
    """Yield the accuracies on every split before training and after every epoch."""
    config = how.config
    optimizer = torch.optim.SGD(
        trained.parameters, lr=config.peak_lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    yield from _measure(splits, trained, epoch=0)
    perfect = 0
    for epoch in range(1, config.epochs + 1):
        n_right = _train_epoch(trained, optimizer, train_on, how, epoch=epoch)
        yield from _measure(splits, trained, epoch=epoch)
        perfect = perfect + 1 if n_right == len(train_on[1]) else 0
        if perfect == config.patience:
            return


def _train_epoch(
    trained: _Trained,
    optimizer: torch.optim.SGD,
    train_on: tuple[BatchSource, Tensor],
    how: Retraining,
    *,
    epoch: int,
) -> int:
    """Train for one epoch and return how many examples were predicted right, each before its step."""
    source, labels = train_on
    per_epoch = steps_per_epoch(len(labels), how.config.batch_size)
    order = torch.randperm(len(labels), generator=stream(how.seed, "retraining_order", epoch)).to(trained.device)
    n_right = torch.zeros((), dtype=torch.int64, device=trained.device)
    loss = torch.zeros((), device=trained.device)
    for module in trained.modules:
        module.train()
    with global_stream(how.seed, "retraining_dropout", epoch, device=trained.device):
        for index, positions in enumerate(split_order(order, how.config.batch_size)):
            optimizer.param_groups[0]["lr"] = learning_rate(
                how.config, step=(epoch - 1) * per_epoch + index, steps=how.config.epochs * per_epoch
            )
            assigned = labels[positions]
            logits = source(positions)
            optimizer.zero_grad()
            loss = F.cross_entropy(logits, assigned)
            loss.backward()
            optimizer.step()
            n_right += (logits.argmax(dim=1) == assigned).sum()
    for module in trained.modules:
        module.eval()
    if not loss.isfinite():
        raise Diverged(
            f"the loss is no longer finite in epoch {epoch} of retraining; lower retraining.peak_lr (now "
            f"{how.config.peak_lr}) or lengthen retraining.warmup (now {how.config.warmup})."
        )
    return int(n_right)


@torch.no_grad()
def _measure(
    splits: Mapping[str, tuple[BatchSource, Tensor]], trained: _Trained, *, epoch: int
) -> Iterator[RetrainingAccuracy]:
    def count_right(chunk: slice, source: BatchSource, labels: Tensor) -> Int64[Tensor, ""]:
        positions = torch.arange(chunk.start, chunk.stop, device=trained.device)
        return (source(positions).argmax(dim=1) == labels[chunk]).sum()

    for split, (source, labels) in splits.items():
        work = partial(count_right, source=source, labels=labels)
        n_right = int(torch.stack(list(run_in_chunks(len(labels), ChunkSize(trained.at_once), work))).sum())
        yield RetrainingAccuracy(epoch, split, n_right / len(labels), len(labels))
