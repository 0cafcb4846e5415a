"""Scale a whole image set to another size."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional

from memlib.datasets.image_set import Dataset, ImageSet

CHUNK = 4096  # images scaled at once


def resize_dataset(dataset: Dataset, image_size: int) -> Dataset:
    """Return the data set with all images scaled to image_size x image_size pixels."""
    train, test = (
        ImageSet(resize_images(split.images, image_size), split.labels, split.ids)
        for split in (dataset.train, dataset.test)
    )
    return dataclasses.replace(dataset, train=train, test=test)


def resize_images(images: UInt8[Tensor, "n c h w"], image_size: int) -> UInt8[Tensor, "n c s s"]:
    """Return the images scaled to image_size x image_size pixels, bilinear with antialiasing."""
    scaled = torch.empty(*images.shape[:2], image_size, image_size, dtype=torch.uint8)
    for part, target in zip(images.split(CHUNK), scaled.split(CHUNK), strict=True):
        target.copy_(functional.resize(part, [image_size, image_size], antialias=True))
    return scaled
