"""Whether a data set can be trained on."""

from __future__ import annotations

from memlib.datasets.image_set import Dataset
from memlib.errors import InputError


def check_dataset(dataset: Dataset) -> None:
    """Check that both splits have images of one shape and labels that fit the classes.

    Raises:
        InputError: a split is empty, shapes differ, a label is out of range, there is only one
            class, or there are fewer training images than classes.
    """
    name = f"data set {dataset.name!r}"
    splits = {"training": dataset.train, "test": dataset.test}
    for split, images in splits.items():
        if len(images) == 0:
            raise InputError(f"{name} has no {split} images; add some.")
    train_shape, test_shape = (tuple(images.images.shape[1:]) for images in splits.values())
    if train_shape != test_shape:
        raise InputError(
            f"{name} has training images of shape {train_shape} but test images of shape {test_shape} "
            "(channels, height, width); set data.image_size to scale all to one size."
        )
    for split, images in splits.items():
        _check_labels(f"{name} ({split})", images.labels.tolist(), images.ids.tolist(), dataset.num_classes)
    if len(dataset.train.labels.unique()) < 2:
        raise InputError(f"{name} has training images of one class only; add images of another.")
    if len(dataset.train) < dataset.num_classes:
        raise InputError(
            f"{name} has {len(dataset.train)} training images but {dataset.num_classes} classes; "
            "add images, at least one a class."
        )


def _check_labels(name: str, labels: list[int], ids: list[int], num_classes: int) -> None:
    for label, example_id in zip(labels, ids, strict=True):
        if not 0 <= label < num_classes:
            raise InputError(
                f"{name} has label {label} at example {example_id}, but there are {num_classes} classes; "
                f"labels run from 0 to {num_classes - 1}."
            )
