"""Mislabel a known share of the training set.

Paper: arXiv 2307.09542, the label noise of every experiment: a share p of the training labels
(0.10 in the main results, 0.05 and 0.20 in the appendix) is replaced by uniformly drawn wrong ones.
Deviations: every wrong class is equally likely; the released code never draws (label + K - 1) % K.
Asymmetric noise (between given pairs of classes) is an addition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from memlib.config import NoiseConfig
from memlib.errors import InputError


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Labels after noise (`labels`), before it (`original`), and where they differ (`is_noisy`)."""

    labels: Int64[Tensor, " n"]
    original: Int64[Tensor, " n"]
    is_noisy: Bool[Tensor, " n"]

    def take(self, indices: Int64[Tensor, " m"]) -> NoisyLabels:
        """Return those of the examples at `indices`, in that order."""
        return NoisyLabels(self.labels[indices], self.original[indices], self.is_noisy[indices])


def add_label_noise(
    labels: Int64[Tensor, " n"], noise: NoiseConfig, *, num_classes: int, generator: torch.Generator
) -> NoisyLabels:
    """Return the labels with the noise that the settings ask for; the input is left unchanged.

    Raises:
        InputError: as `flip_labels` and `flip_labels_in_pairs`.
    """
    if noise.kind == "symmetric":
        return flip_labels(labels, num_classes=num_classes, fraction=noise.fraction, generator=generator)
    pairs = noise.pairs or next_class_pairs(num_classes)
    return flip_labels_in_pairs(
        labels, num_classes=num_classes, pairs=pairs, fraction=noise.fraction, generator=generator
    )


def flip_labels(
    labels: Int64[Tensor, " n"], *, num_classes: int, fraction: float, generator: torch.Generator
) -> NoisyLabels:
    """Return labels of which exactly floor(fraction * n) are wrong, each uniform over the other classes.

    The examples are drawn without replacement; the input is left unchanged.

    Raises:
        InputError: there is only one class, a label lies outside [0, num_classes), or fraction outside [0, 1).
    """
    _check_labels(labels, num_classes)
    count = _number_of_flips(len(labels), fraction)
    chosen = _draw_without_replacement(len(labels), count, generator).to(labels.device)
    steps = torch.randint(1, num_classes, (count,), generator=generator, device=generator.device)
    wrong = (labels[chosen] + steps.to(labels.device)) % num_classes
    return _replace(labels, chosen, wrong)


def flip_labels_in_pairs(
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    pairs: Sequence[tuple[int, int]],
    fraction: float,
    generator: torch.Generator,
) -> NoisyLabels:
    """Return labels of which exactly floor(fraction * n) are wrong: for a pair (a, b), examples of a get b.

    The examples are drawn without replacement from all examples of the pairs' first classes; n counts
    the whole set. The input is left unchanged.

    Raises:
        InputError: as `flip_labels`; or a pair maps a class to itself, names a class that does not
            exist or repeats a first class; or the first classes have too few examples.
    """
    _check_labels(labels, num_classes)
    _check_pairs(pairs, num_classes)
    count = _number_of_flips(len(labels), fraction)
    wrong_class = torch.arange(num_classes, device=labels.device)
    for source, target in pairs:
        wrong_class[source] = target
    wrong = wrong_class[labels]
    candidates = (wrong != labels).nonzero().squeeze(1)
    if count > len(candidates):
        raise InputError(
            f"noise.fraction {fraction} asks for {count} wrong labels, but the first classes of noise.pairs have "
            f"{len(candidates)} examples; lower noise.fraction or add pairs."
        )
    chosen = candidates[_draw_without_replacement(len(candidates), count, generator).to(labels.device)]
    return _replace(labels, chosen, wrong[chosen])


def next_class_pairs(num_classes: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs (class, next class), the last class followed by class 0."""
    return tuple((k, (k + 1) % num_classes) for k in range(num_classes))


def _number_of_flips(n: int, fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise InputError(f"noise.fraction is {fraction}; give a share of the training set in [0, 1), e.g. 0.1.")
    return math.floor(Fraction(str(fraction)) * n)  # in decimal: 0.29 of 100 is 29, in binary 28.999...


def _draw_without_replacement(n: int, count: int, generator: torch.Generator) -> Int64[Tensor, " count"]:
    return torch.randperm(n, generator=generator, device=generator.device)[:count]


def _replace(labels: Int64[Tensor, " n"], chosen: Int64[Tensor, " m"], wrong: Int64[Tensor, " m"]) -> NoisyLabels:
    noisy = labels.clone()
    noisy[chosen] = wrong
    return NoisyLabels(labels=noisy, original=labels.clone(), is_noisy=noisy != labels)


def _check_labels(labels: Int64[Tensor, " n"], num_classes: int) -> None:
    if num_classes < 2:
        raise InputError(f"label noise needs a wrong class to draw, but there is {num_classes} class; give at least 2.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but there are {num_classes} classes; "
            f"give labels from 0 to {num_classes - 1}."
        )


def _check_pairs(pairs: Sequence[tuple[int, int]], num_classes: int) -> None:
    sources = [source for source, _ in pairs]
    for source, target in pairs:
        if not (0 <= source < num_classes and 0 <= target < num_classes):
            raise InputError(
                f"noise.pairs has ({source}, {target}), but there are {num_classes} classes; "
                f"give indices from 0 to {num_classes - 1}."
            )
        if source == target:
            raise InputError(f"noise.pairs has ({source}, {target}), which changes nothing; give two classes.")
        if sources.count(source) > 1:
            raise InputError(f"noise.pairs gives class {source} two wrong classes; list each first class once.")
