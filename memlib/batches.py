"""Batches of a training epoch: shuffled, augmented and normalized where the images lie.

Order and augmentation are pure functions of (seed, epoch, position of the example), so an
interrupted run continues as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from memlib.augmentation import augment, draw_augmentation
from memlib.chunks import free_memory
from memlib.config import TrainingConfig
from memlib.seeds import stream

SHARE_OF_FREE_MEMORY = 0.5  # of a GPU, that images may take; larger sets stay in pinned host memory


def place_images(images: UInt8[Tensor, "n c h w"], device: torch.device) -> UInt8[Tensor, "n c h w"]:
    """Return the images on `device`, or in pinned host memory if they would fill more than half of a GPU."""
    if device.type != "cuda":
        return images
    fits = images.nbytes <= SHARE_OF_FREE_MEMORY * free_memory(device)
    return images.to(device) if fits else images.pin_memory()


def epoch_order(n: int, *, seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """Return the order in which an epoch (1 = the first) visits the n training examples."""
    return torch.randperm(n, generator=stream(seed, "order", epoch))


def split_order(order: Int64[Tensor, " n"], batch_size: int) -> list[Int64[Tensor, " b"]]:
    """Return the order cut into batches; a last batch of one joins the one before (BatchNorm needs two)."""
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of batches `split_order` makes of n examples."""
    return len(split_order(torch.empty(n, dtype=torch.int64), batch_size))


def normalize(images: UInt8[Tensor, "b c h w"]) -> Float32[Tensor, "b c h w"]:
    """Return float32 images in channels-last layout, pixels scaled from [0, 255] to [-1, 1] (mean 0.5, std 0.5)."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def model_inputs(images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b ..."], device: torch.device) -> Tensor:
    """Return what a model takes, on `device`: uint8 images normalized as in training, anything else as it is."""
    images = images.to(device, non_blocking=True)
    return normalize(images) if images.dtype == torch.uint8 else images


def images_as_trained(
    images: UInt8[Tensor, "n c h w"], config: TrainingConfig, *, seed: int
) -> UInt8[Tensor, "n c h w"]:
    """Return the images as training sees them, shuffled, and augmented once if it augments, where they lie.

    What BatchNorm is recalibrated on, batch after batch. Images without the augmentation have other statistics than
    those it was trained with, and batches of one class (a folder's images are sorted by class) too small a variance.
    """
    images = images[torch.randperm(len(images), generator=stream(seed, "calibration")).to(images.device)]
    if not config.augment:
        return images
    draws = draw_augmentation(len(images), config.augment, generator=stream(seed, "augmentation", 0))
    return augment(images, draws.to(images.device))


def training_batches(
    images: UInt8[Tensor, "n c h w"], config: TrainingConfig, *, seed: int, epoch: int, device: torch.device
) -> Iterator[tuple[Int64[Tensor, " b"], Float32[Tensor, "b c h w"]]]:
    """Yield (positions of the examples, model inputs) for one epoch, both on `device`."""
    draws = draw_augmentation(len(images), config.augment, generator=stream(seed, "augmentation", epoch)).to(device)
    order = epoch_order(len(images), seed=seed, epoch=epoch)
    positions = order.to(images.device)
    for batch in split_order(positions, config.batch_size):
        chosen = images[batch].to(device, non_blocking=True)
        batch = batch.to(device, non_blocking=True)
        yield batch, normalize(augment(chosen, draws.take(batch)))
