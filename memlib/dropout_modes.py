"""E5: what a trained network predicts in each mode of its example-tied dropout.

Paper: Table 1. Before: clean and noisy examples under their own masks (`tied`), test in mode
`scaled`; after: all in mode `dropped`.
Deviations: the release rescales when it drops; here that is one variant, recalibrating BatchNorm
another, and neither is the default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from memlib.evaluation import Predictions, accuracy, predict, predict_in_mode
from memlib.example_tied_dropout import dropout_layers, dropout_mode
from memlib.recalibration import batchnorms, recalibrate
from memlib.training_state import TrainingData


@dataclass(frozen=True)
class Variant:
    """A way to evaluate the network: its mode, BatchNorm `final` or `recalibrated`, and the release's rescaling."""

    mode: str
    batchnorm: str = "final"
    rescaled: bool = False

    @property
    def is_main(self) -> bool:
        """Return whether this is the mode as it is, without recalibration or rescaling."""
        return self.batchnorm == "final" and not self.rescaled


MODES = (Variant("tied"), Variant("scaled"), Variant("dropped"))
VARIANTS = (Variant("dropped", rescaled=True), Variant("dropped", batchnorm="recalibrated"))


def variants_of(model: nn.Module) -> list[Variant]:
    """Return the ways to evaluate this network: `plain` alone where it has no example-tied dropout."""
    if not dropout_layers(model):
        return [Variant("plain")]
    with_batchnorm = bool(batchnorms(model))
    return [v for v in (*MODES, *VARIANTS) if with_batchnorm or v.batchnorm == "final"]


@dataclass(frozen=True, eq=False)
class ModePredictions:
    """Predictions of one variant; `test` is None under tied masks, which only training examples have."""

    variant: Variant
    train: Predictions
    test: Predictions | None


@dataclass(frozen=True)
class ModeAccuracy:
    """Accuracy in [0, 1] of one variant on the `n` examples of a split: clean, noisy or test."""

    mode: str
    batchnorm: str
    rescaled: bool
    split: str
    accuracy: float
    n: int


def predict_by_mode(
    model: nn.Module,
    data: TrainingData,
    *,
    device: torch.device,
    calibration: UInt8[Tensor, "m c h w"] | None = None,
) -> list[ModePredictions]:
    """Return the predictions in every mode and variant; of a model without example-tied dropout, mode `plain`.

    calibration: images that BatchNorm is recalibrated on, shuffled and augmented as in training
    (`batches.images_as_trained`); None for the training images as they are. Computed in float32; the model is left
    unchanged.
    """
    if not dropout_layers(model):
        train = predict(model, data.train.images, data.train.labels, device=device)
        test = predict(model, data.test.images, data.test.labels, device=device)
        return [ModePredictions(variant, train, test) for variant in variants_of(model)]
    calibration = data.train.images if calibration is None else calibration
    return [_predict(model, data, variant, calibration, device) for variant in variants_of(model)]


def mode_accuracies(found: Iterable[ModePredictions], data: TrainingData) -> list[ModeAccuracy]:
    """Return the accuracies on clean, noisy and test examples; a split without examples is absent."""
    rows = []
    for predictions in found:
        splits = {
            "clean": accuracy(predictions.train, data.train.labels, ~data.is_noisy),
            "noisy": accuracy(predictions.train, data.train.labels, data.is_noisy),
            "test": None if predictions.test is None else accuracy(predictions.test, data.test.labels),
        }
        how = predictions.variant
        rows += [
            ModeAccuracy(how.mode, how.batchnorm, how.rescaled, split, result.accuracy, result.n)
            for split, result in splits.items()
            if result is not None
        ]
    return rows


def _predict(
    model: nn.Module, data: TrainingData, variant: Variant, calibration: Tensor, device: torch.device
) -> ModePredictions:
    if variant.batchnorm == "recalibrated":
        with dropout_mode(model, variant.mode, rescale=variant.rescaled):
            model = recalibrate(model, calibration, device=device)
        plain = Variant(variant.mode, rescaled=variant.rescaled)
        return replace(_predict(model, data, plain, calibration, device), variant=variant)
    train = predict_in_mode(model, data.train, mode=variant.mode, rescale=variant.rescaled, device=device)
    if variant.mode == "tied":
        return ModePredictions(variant, train, None)
    test = predict_in_mode(model, data.test, mode=variant.mode, rescale=variant.rescaled, device=device)
    return ModePredictions(variant, train, test)
