"""Decode image files into one uint8 tensor; in threads, but for small ones (Pillow releases the interpreter's lock)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from memlib.datasets.image_set import ImageSet
from memlib.errors import InputError

CHUNK = 128  # images a thread decodes at a time
# Below both, an image in memory is decoded faster than threads hand each other the interpreter's lock: two took twice
# as long as none at 1 to 2 kB, and two thirds as long from 6 kB on.
WORTH_THREADS = 5000  # bytes of a file
WORTH_THREADS_SIDE = 64  # pixels that it is scaled to
GREY_MODES = {"1", "L", "LA", "La"}  # and all that begin with I: 16 bits, of which the upper 8 are kept


class EncodedImage(NamedTuple):
    """An image file's bytes, or where it lies, and what to call it in an error."""

    name: str
    content: bytes | Path | None


def decode_images(
    windows: Iterable[Sequence[EncodedImage]], *, count: int, image_size: int | None
) -> UInt8[Tensor, "n c h w"]:
    """Return the `count` images in order: 1 channel if all are grey, else 3 (red, green, blue).

    windows: the images in pieces, of which one is held in memory at a time.
    image_size: side in pixels that each image is scaled to (bilinear); None leaves them as they are.

    Raises:
        InputError: an image cannot be decoded, or sizes differ and image_size is None.
    """
    images = np.empty((count, 1, 0, 0), dtype=np.uint8)
    first = ""
    for position, (name, pixels) in enumerate(_decode_windows(windows, image_size)):
        if position == 0:
            first = name
            images = np.empty((count, 1, *pixels.shape[:2]), dtype=np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            raise InputError(
                f"images differ in size: {name} has {_size(pixels.shape[:2])} pixels, {first} has "
                f"{_size(images.shape[2:])} (width x height); set data.image_size to scale all to one size."
            )
        if pixels.ndim == 3 and images.shape[1] == 1:
            images = np.repeat(images, 3, axis=1)
        images[position] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def match_channels(train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return both splits with 3 channels if either has 3, grey copied to each."""
    channels = max(train.images.shape[1], test.images.shape[1])
    return _with_channels(train, channels), _with_channels(test, channels)


def _with_channels(split: ImageSet, channels: int) -> ImageSet:
    if split.images.shape[1] == channels:
        return split
    return ImageSet(split.images.repeat(1, channels, 1, 1), split.labels, split.ids)


def _decode_windows(
    windows: Iterable[Sequence[EncodedImage]], image_size: int | None
) -> Iterator[tuple[str, np.ndarray]]:
    threads = min(8, max(2, os.cpu_count() or 2))
    with ThreadPoolExecutor(threads) as pool:
        for window in windows:
            if (image_size or 0) < WORTH_THREADS_SIDE and all(_is_small(image) for image in window):
                yield from ((image.name, _decode(image, image_size)) for image in window)
                continue
            chunks = [window[i : i + CHUNK] for i in range(0, len(window), CHUNK)]
            decoded = pool.map(partial(_decode_chunk, image_size=image_size), chunks)
            for chunk, arrays in zip(chunks, decoded, strict=True):
                yield from zip((image.name for image in chunk), arrays, strict=True)


def _is_small(image: EncodedImage) -> bool:
    return isinstance(image.content, bytes) and len(image.content) < WORTH_THREADS


def _decode_chunk(chunk: Sequence[EncodedImage], *, image_size: int | None) -> list[np.ndarray]:
    return [_decode(image, image_size) for image in chunk]


def _decode(image: EncodedImage, image_size: int | None) -> np.ndarray:
    if image.content is None:
        raise InputError(f"{image.name} holds no image; fill or remove it.")
    source = io.BytesIO(image.content) if isinstance(image.content, bytes) else image.content
    try:
        with Image.open(source) as opened:
            pixels = _grey_or_colour(opened)
    except Exception as error:  # Pillow's many decoders raise many kinds
        raise InputError(f"{image.name} cannot be decoded as an image ({error}); repair or remove it.") from error
    if image_size is not None:
        pixels = pixels.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(pixels)


def _grey_or_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in GREY_MODES else "RGB")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
