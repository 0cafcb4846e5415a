"""A folder of images in torchvision's ImageFolder layout: one subfolder a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

from memlib.datasets.decoding import EncodedImage, decode_images, match_channels
from memlib.datasets.holdout import hold_out
from memlib.datasets.image_set import Dataset, ImageSet
from memlib.errors import InputError

TRAIN_FOLDERS = ("train", "training")  # in any case of letters; the first that is there
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
WINDOW = 4096  # images decoded at a time


def load_image_folder(name: str, path: Path, *, image_size: int | None = None) -> Dataset:
    """Return the images under `path` as a data set called `name`.

    They lie in PATH/train/CLASS (or training) and PATH/test/CLASS (or testing, val, valid, validation), or all in
    PATH/CLASS.

    Classes are the subfolders in sorted order. An image's id is its position in its split, sorted by
    class and file name. Without a test folder, images 0, 5, 10, ... in that order are the test split
    and ids are positions in the undivided order.

    Raises:
        InputError: no classes, a class without images or named like a test split, a test class that has no training
            images, a file that cannot be decoded, or mixed sizes and image_size is None.
    """
    train_path, test_path = _find_split(path, TRAIN_FOLDERS), _find_split(path, TEST_FOLDERS)
    train_source = _discover(train_path or path)
    class_names = tuple(train_source.classes)
    if train_path is None:
        _check_undivided(path, class_names)
    train = _read(train_source, class_names, image_size)
    if train_path is None or test_path is None:
        return Dataset(name, *hold_out(train, name), class_names)
    test = _read(_discover(test_path), class_names, image_size)
    return Dataset(name, *match_channels(train, test), class_names)


def _find_split(path: Path, names: Sequence[str]) -> Path | None:
    """Return the folder of a split: that of the first of `names`, in whatever case, that has subfolders."""
    folders = {entry.name.casefold(): entry for entry in sorted(path.iterdir())} if path.is_dir() else {}
    return next((folders[name] for name in names if name in folders and _has_folders(folders[name])), None)


def _check_undivided(path: Path, class_names: Sequence[str]) -> None:
    for name in class_names:
        kind = name.casefold()  # trains may be a class; without a test split beside them
        if kind in TEST_FOLDERS or (kind in TRAIN_FOLDERS and _has_folders(path / name)):
            raise InputError(
                f"{path} has a folder {name!r} beside folders that would be classes, too; call the training images' "
                f"folder 'train' (with one subfolder a class), or rename {name!r} if it is a class."
            )


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


def _discover(path: Path) -> ImageFolder:
    try:
        return ImageFolder(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is not an image folder: {error} Give a folder with one subfolder a class.") from error


def _read(source: ImageFolder, class_names: tuple[str, ...], image_size: int | None) -> ImageSet:
    unknown_classes = sorted(set(source.classes) - set(class_names))
    if unknown_classes:
        raise InputError(
            f"{source.root} has a class {unknown_classes[0]!r} without training images; "
            "add them, or remove the class from the test images."
        )
    label_of = {index: class_names.index(name) for name, index in source.class_to_idx.items()}
    labels = torch.tensor([label_of[index] for index in source.targets], dtype=torch.int64)
    images = decode_images(_windows(source), count=len(labels), image_size=image_size)
    return ImageSet(images, labels, torch.arange(len(labels)))


def _windows(source: ImageFolder) -> Iterator[list[EncodedImage]]:
    for begin in range(0, len(source.samples), WINDOW):
        yield [EncodedImage(path, Path(path)) for path, _ in source.samples[begin : begin + WINDOW]]
