"""E5: the clean examples that a network forgets when its memorization neurons are dropped, with their pixels.

Paper: Figure 7. Most of them are mislabelled in the source, ambiguous or unique.
Deviations: the most strongly forgotten ones come first; the paper's gallery is a choice by hand.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from memlib.datasets import ImageSet
from memlib.evaluation import Predictions
from memlib.label_noise import NoisyLabels

MOST = 100  # images kept of a run


@dataclass(frozen=True)
class ForgottenImage:
    """A clean training example predicted as assigned under its own mask, and otherwise without memorization neurons.

    margin: the assigned label's logit minus the largest other when they are dropped, at most 0.
    n_forgotten: how many such examples there are, of which only the first are kept. png: the image as trained on.
    """

    example_id: int
    assigned: int
    original: int
    new_prediction: int
    assigned_name: str
    new_name: str
    margin: float
    n_forgotten: int
    png: bytes


def find_forgotten(tied: Predictions, dropped: Predictions, noisy_labels: NoisyLabels) -> Int64[Tensor, " m"]:
    """Return the positions of the clean examples that are forgotten on dropping, the lowest margin first.

    `tied` and `dropped` are predictions of the same training examples in these modes.
    """
    assigned = noisy_labels.labels
    is_forgotten = (tied.prediction == assigned) & (dropped.prediction != assigned) & ~noisy_labels.is_noisy
    positions = is_forgotten.nonzero().squeeze(1)
    return positions[dropped.margin[positions].argsort(stable=True)]


def forgotten_images(
    examples: ImageSet,
    predictions: tuple[Predictions, Predictions],
    noisy_labels: NoisyLabels,
    *,
    class_names: Sequence[str],
    most: int = MOST,
) -> list[ForgottenImage]:
    """Return the `most` clean examples that are most strongly forgotten; `predictions` are those of `find_forgotten`.

    `examples` are the training set, its images on any device.
    """
    tied, dropped = predictions
    found = find_forgotten(tied, dropped, noisy_labels)
    return [
        ForgottenImage(
            example_id=int(examples.ids[i]),
            assigned=int(noisy_labels.labels[i]),
            original=int(noisy_labels.original[i]),
            new_prediction=int(dropped.prediction[i]),
            assigned_name=class_names[int(noisy_labels.labels[i])],
            new_name=class_names[int(dropped.prediction[i])],
            margin=float(dropped.margin[i]),
            n_forgotten=len(found),
            png=encode_png(examples.images[i]),
        )
        for i in found[:most].tolist()
    ]


def encode_png(image: UInt8[Tensor, "c h w"]) -> bytes:
    """Return an image of 1 or 3 channels as a PNG file."""
    pixels = image.squeeze(0) if image.shape[0] == 1 else image.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(buffer, "png")
    return buffer.getvalue()
