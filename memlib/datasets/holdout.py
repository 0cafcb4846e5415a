"""A test split for a source that has none: every fifth example."""

from __future__ import annotations

import torch

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
