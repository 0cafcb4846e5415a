"""Scikit-learn's digits: 1,797 real images that come with an installed package."""

from __future__ import annotations

import torch

from memlib.datasets.holdout import hold_out
from memlib.datasets.image_set import Dataset, ImageSet

LARGEST = 16  # grey values of the source run from 0 to 16


def load_embedded_digits() -> Dataset:
    """Return the 8x8 digits, 1,437 for training and every fifth (360) for testing.

    The ids of both splits are positions in `sklearn.datasets.load_digits()`.
    """
    from sklearn.datasets import load_digits  # takes a second to import, and only this data set needs it

    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels).mul(255 / LARGEST).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.as_tensor(digits, dtype=torch.int64)
    train, test = hold_out(ImageSet(images, labels, torch.arange(len(labels))), "digits")
    return Dataset("digits", train, test, tuple(str(digit) for digit in range(10)))
