"""A class-balanced subset of the training images."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from memlib.datasets.image_set import ImageSet
from memlib.errors import InputError


def balanced_subset(images: ImageSet, limit: int, num_classes: int, generator: torch.Generator) -> ImageSet:
    """Return `limit` of the examples, in ascending position, with class counts that differ by at most 1.

    A class with too few examples gives all it has, and the others share the rest equally. Which
    classes get one more, and which examples stand for a class, is drawn. From a generator in the same
    state, a larger limit gives a superset.

    Raises:
        InputError: limit is above the number of examples or below the number of classes.
    """
    if limit > len(images):
        raise InputError(f"data.limit is {limit}, but there are {len(images)} training images; lower or remove it.")
    if limit < num_classes:
        raise InputError(f"data.limit is {limit}, but there are {num_classes} classes; give at least {num_classes}.")
    draw = {"generator": generator, "device": generator.device}
    class_order = torch.randperm(num_classes, **draw).cpu()
    example_order = torch.randperm(len(images), **draw).cpu()
    labels = images.labels.cpu()
    wanted = _share(limit, torch.bincount(labels, minlength=num_classes), class_order)
    rank = _rank_in_class(labels, example_order, num_classes)
    kept = (rank < wanted[labels]).nonzero().squeeze(1)
    return images.take(kept.to(images.labels.device))


def _share(limit: int, counts: Int64[Tensor, " k"], class_order: Int64[Tensor, " k"]) -> Int64[Tensor, " k"]:
    low, high = 0, limit  # the largest level that all classes can be filled to with `limit` examples
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if counts.clamp(max=level).sum() <= limit else (low, level - 1)
    wanted = counts.clamp(max=low)
    with_more = class_order[counts[class_order] > low]
    wanted[with_more[: limit - int(wanted.sum())]] += 1
    return wanted


def _rank_in_class(labels: Int64[Tensor, " n"], order: Int64[Tensor, " n"], num_classes: int) -> Int64[Tensor, " n"]:
    by_class = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=num_classes)
    begin = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - begin[labels[by_class]]
    return rank
