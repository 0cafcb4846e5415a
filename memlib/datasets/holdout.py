"""Examples held out of a training set: as the test split of a source that has none, or to validate a run on."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Int64
from torch import Tensor

from memlib.datasets.image_set import ImageSet
from memlib.errors import InputError

EVERY = 5  # examples 0, 5, 10, ... are held out


def hold_out(images: ImageSet, name: str) -> tuple[ImageSet, ImageSet]:
    """Return (train, test): examples 0, 5, 10, ... of the source are the test split.

    Both keep their ids, positions in the undivided source.

    Raises:
        InputError: a class would be left without a training image.
    """
    held_out = torch.arange(len(images)) % EVERY == 0
    train, test = images.take((~held_out).nonzero().squeeze(1)), images.take(held_out.nonzero().squeeze(1))
    lost = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if lost:
        raise InputError(
            f"data set {name!r} has no test split, and holding out every fifth image would leave class {lost[0]} "
            "without a training image; add a test split, or more images of that class."
        )
    return train, test


def draw_holdout(
    n: int, share: float, generator: torch.Generator
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held_out"]]:
    """Return the positions of n examples that are kept, and of the floor(share * n) held out, both ascending.

    Every example is as likely to be held out as any other, whatever its label.

    Raises:
        InputError: that would hold out none, or leave fewer than two.
    """
    count = math.floor(Fraction(str(share)) * n)  # in decimal, as the share of wrong labels
    if not 0 < count <= n - 2:
        raise InputError(
            f"data.holdout is {share}, which holds out {count} of {n} training images; hold out at least 1 and leave 2."
        )
    order = torch.randperm(n, generator=generator, device=generator.device).cpu()
    return order[count:].sort().values, order[:count].sort().values
