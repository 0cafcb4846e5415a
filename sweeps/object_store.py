"""Images in Ray's object store, which processes of a node share without copying."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import ray
import torch

from memlib.datasets import Dataset, ImageSet


def put_images(datasets: Mapping[str, Dataset]) -> dict[str, ray.ObjectRef]:
    """Put each data set into the object store once and return its reference, by the same keys."""
    return {key: ray.put(_to_arrays(dataset)) for key, dataset in datasets.items()}


def _to_arrays(dataset: Dataset) -> dict[str, Any]:
    """Return a data set as NumPy arrays, which the object store shares as they are."""
    splits = {split: vars(getattr(dataset, split)) for split in ("train", "test")}
    arrays = {split: {name: t.numpy() for name, t in tensors.items()} for split, tensors in splits.items()}
    return {"name": dataset.name, "class_names": dataset.class_names, **arrays}


def from_arrays(arrays: dict[str, Any]) -> Dataset:
    """Return the data set that `put_images` put there, in shared memory."""
    with warnings.catch_warnings():
        # Shared memory is read-only; nothing here writes to images, labels or ids.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        train, test = (
            ImageSet(**{name: torch.from_numpy(a) for name, a in arrays[split].items()}) for split in ("train", "test")
        )
    return Dataset(arrays["name"], train, test, arrays["class_names"])
