"""E2: which layer groups can go back in time, and what is forgotten when they do?

Paper: layer rewinding (Figure 3). From the final model, one group's parameters are put back to
their values at an earlier epoch, everything else stays final, and the accuracies on clean, noisy
and test examples are measured.
Deviations: running statistics of BatchNorm stay final as in the paper, or go back with their group,
or are estimated anew on training inputs; several groups can go back at once. What lies before the
first changed group is computed once for all epochs (`prefixes`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from memlib.batches import model_inputs, split_order
from memlib.checkpoints import check_state
from memlib.chunks import ChunkSize, images_at_once, run_in_chunks
from memlib.config import Precision
from memlib.errors import InputError
from memlib.evaluation import evaluation_mode
from memlib.experiments import BatchNorm
from memlib.grouping import LayerGroups, check_groups, layer_groups
from memlib.precision import autocast, exact_float32
from memlib.prefixes import State, Suffix, cut_before, run_prefix
from memlib.recalibration import batchnorms, empty_statistics, estimating

Examples = tuple[Tensor, Int64[Tensor, " _"]]  # uint8 images or model inputs, and assigned labels

CHUNK_SIZE = 500  # examples; peak memory is that of one chunk's activations


@dataclass(frozen=True)
class RewoundAccuracy:
    """Accuracy in [0, 1] on the `n` examples of a split, with `groups` back at `epoch` (any name of a state)."""

    groups: tuple[str, ...]
    epoch: int
    split: str
    accuracy: float
    n: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """How rewound models are measured.

    batchnorm: running statistics stay `final`, are `rewound` with their group, or `recalibrated` on `calibration`,
    a tensor of training images or inputs: every BatchNorm from the first changed group on is estimated anew, chunk
    by chunk, as the average over chunks (torch's `momentum=None`).
    chunk_size: examples computed at once; on a CPU fewer of more than 64 x 64 pixels, and halved where they do not fit
    into memory. Results do not depend on it, except those of recalibration, whose chunks are the same on every device.
    precision: of the forward passes; parameters stay float32.
    groups: the layer groups; None for those `layer_groups` finds.
    """

    batchnorm: BatchNorm = "final"
    calibration: Tensor | None = None
    chunk_size: int = CHUNK_SIZE
    precision: Precision = "float32"
    groups: LayerGroups | None = None


def rewind(
    model: nn.Module,
    earlier: State,
    chosen: Sequence[str],
    *,
    groups: LayerGroups | None = None,
    buffers: bool = False,
) -> nn.Module:
    """Return a copy of `model` whose layer groups `chosen` have the parameters of the state `earlier`.

    `buffers` also puts back their buffers (BatchNorm's running statistics). The model is left unchanged.

    Raises:
        InputError: a group does not exist, or `earlier` is another architecture's or not finite.
    """
    groups = groups or layer_groups(model)
    check_groups(chosen, groups.names)
    check_state(model, earlier, where="to rewind to")
    rewound = copy.deepcopy(model)
    rewound.load_state_dict(_changes(earlier, chosen, groups, buffers=buffers), strict=False)
    return rewound


@torch.no_grad()
def rewinding_accuracies(
    model: nn.Module,
    earlier: Mapping[int, State],
    splits: Mapping[str, Examples],
    *,
    sets: Sequence[Sequence[str]] | None = None,
    measurement: Measurement | None = None,
) -> list[RewoundAccuracy]:
    """Return the accuracies on every split for every set of groups (default: each alone) and earlier state.

    earlier: state dictionaries of the same model by epoch. splits: examples by name, e.g. clean, noisy, test.
    The model is left unchanged; computed on its device, in evaluation mode.

    Raises:
        InputError: a group does not exist, a state is another architecture's or not finite, a split is empty,
            recalibration is asked of a model without BatchNorm or without `calibration`, `chunk_size` is below 1, the
            model returns no logits, or not even one example fits into memory.
    """
    how = measurement or Measurement()
    groups = how.groups or layer_groups(model)
    chosen = [tuple(names) for names in (sets if sets is not None else [(name,) for name in groups.names])]
    device = next(model.parameters()).device
    _check(model, earlier, splits, chosen, groups, how)
    some = next(iter(splits.values()))[0][:2]
    with evaluation_mode(model), exact_float32(device):
        suffixes = cut_before(model, chosen, groups, model_inputs(some, device))
        rewound = [
            _Rewound(names, epoch, suffix, _changes(state, names, groups, buffers=how.batchnorm == "rewound"))
            for names, suffix in zip(chosen, suffixes, strict=True)
            for epoch, state in earlier.items()
        ]
        rewound = [_move(r, device) for r in rewound]
        if how.batchnorm == "recalibrated":
            rewound = _recalibrate(model, rewound, how)
        return [
            result for split, examples in splits.items() for result in _measure(model, rewound, split, examples, how)
        ]


@dataclass(frozen=True, eq=False)
class _Rewound:
    groups: tuple[str, ...]
    epoch: int
    suffix: Suffix
    state: State  # the tensors that differ from the final model


def _changes(state: State, chosen: Iterable[str], groups: LayerGroups, *, buffers: bool) -> dict[str, Tensor]:
    names = [n for group in chosen for n in (*groups.parameters[group], *(groups.buffers[group] if buffers else ()))]
    return {name: state[name] for name in names}


def _move(rewound: _Rewound, device: torch.device) -> _Rewound:
    state = {
        name: t.to(device, memory_format=torch.channels_last if t.dim() == 4 else torch.preserve_format)
        for name, t in rewound.state.items()
    }
    return _Rewound(rewound.groups, rewound.epoch, rewound.suffix, state)


def _measure(
    model: nn.Module, rewound: Sequence[_Rewound], split: str, examples: Examples, how: Measurement
) -> Iterator[RewoundAccuracy]:
    device = next(model.parameters()).device
    images, labels = examples[0], examples[1].to(device)

    def work(chunk: slice) -> Int64[Tensor, " r"]:
        inputs, boundary = _run_prefix(model, rewound, images[chunk], how)
        assigned = labels[chunk]
        correct = torch.zeros(len(rewound), dtype=torch.int64, device=device)
        for i, r in enumerate(rewound):
            with autocast(how.precision, device):
                logits = r.suffix(boundary, inputs, r.state)
            correct[i] = (logits.argmax(dim=1) == assigned).sum()
        return correct

    size = ChunkSize(images_at_once(images, how.chunk_size, device))
    counts = torch.stack(list(run_in_chunks(len(labels), size, work))).sum(dim=0)
    for r, n_correct in zip(rewound, counts.tolist(), strict=True):
        yield RewoundAccuracy(r.groups, r.epoch, split, n_correct / len(labels), len(labels))


def _run_prefix(
    model: nn.Module, rewound: Sequence[_Rewound], images: Tensor, how: Measurement
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the model's inputs and the prefix outputs that any of `rewound` reads."""
    device = next(model.parameters()).device
    inputs = model_inputs(images, device)
    with autocast(how.precision, device):
        return inputs, run_prefix(model, {name for r in rewound for name in r.suffix.crossing}, inputs)


def _recalibrate(model: nn.Module, rewound: Sequence[_Rewound], how: Measurement) -> list[_Rewound]:
    """Return `rewound` with the running statistics of every BatchNorm of their suffixes estimated anew."""
    if how.calibration is None:  # checked before
        return list(rewound)
    fresh = [
        _Rewound(r.groups, r.epoch, r.suffix, {**r.state, **empty_statistics(r.suffix.network, r.suffix.behind)})
        for r in rewound
    ]
    for batch in split_order(torch.arange(len(how.calibration)), images_at_once(how.calibration, how.chunk_size)):
        inputs, boundary = _run_prefix(model, fresh, how.calibration[batch], how)
        for r in fresh:
            with estimating(r.suffix.network, r.suffix.behind):
                r.suffix(boundary, inputs, r.state)  # BatchNorm writes into the tensors of r.state
    return fresh


def _check(
    model: nn.Module,
    earlier: Mapping[int, State],
    splits: Mapping[str, Examples],
    sets: Sequence[Sequence[str]],
    groups: LayerGroups,
    how: Measurement,
) -> None:
    check_state(model, model.state_dict(), where="of the final model")
    for epoch, state in earlier.items():
        check_state(model, state, where=f"at epoch {epoch}")
    for names in sets:
        check_groups(names, groups.names)
    check_splits(splits)
    if how.batchnorm == "recalibrated" and not batchnorms(model):
        raise InputError(
            f"{type(model).__name__} has no BatchNorm whose statistics could be recalibrated; set batchnorm to 'final'."
        )
    if how.batchnorm == "recalibrated" and (how.calibration is None or len(how.calibration) < 2):
        raise InputError("batchnorm is 'recalibrated' but there are no calibration images; give training images.")


def check_splits(splits: Mapping[str, Examples]) -> None:
    """Raise InputError if there is no split, one is empty, or its images and labels differ in number."""
    if not splits:
        raise InputError("there are no splits to measure on; give at least one, e.g. {'test': (images, labels)}.")
    for name, (images, labels) in splits.items():
        if len(images) != len(labels) or len(labels) == 0:
            raise InputError(
                f"split {name!r} has {len(images)} images and {len(labels)} labels; give as many of both, at least one."
            )
