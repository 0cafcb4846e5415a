"""MNIST, CIFAR-10 and SVHN as torchvision downloads and stores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from memlib.datasets.image_set import Dataset, ImageSet
from memlib.errors import InputError

DIGITS = tuple(str(digit) for digit in range(10))
TORCHVISION_NAMES = ("cifar10", "mnist", "svhn")


def load_torchvision(name: str, root: Path) -> Dataset:
    """Return the data set `name` from torchvision's files under `root`, downloaded if they are not there.

    An example's id is its position in torchvision's order of its split. One process of a node
    downloads; the others wait for it. Checksums are torchvision's; MNIST's unpacked files have none
    and are checked against the sizes in their headers.

    Raises:
        InputError: the download failed, or a file is truncated or has another checksum.
    """
    if not _is_complete(name, root):
        _download(name, root)
    try:
        train, test, class_names = {"mnist": _mnist, "cifar10": _cifar10, "svhn": _svhn}[name](root)
    except Exception as error:  # unpacking a damaged file fails in many ways
        damaged = next((path for path, md5 in _files(name, root) if not check_integrity(path, md5)), None)
        raise InputError(
            f"data set {name} in {root} is damaged: {damaged or error}{' fails its checksum' if damaged else ''}; "
            "delete its files and run again to fetch them."
        ) from error
    return Dataset(name, train, test, class_names)


def _files(name: str, root: Path) -> list[tuple[Path, str | None]]:
    if name == "mnist":
        return [(root / "MNIST" / "raw" / Path(f).stem, None) for f, _ in datasets.MNIST.resources]
    if name == "cifar10":
        kind = datasets.CIFAR10
        listed = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        return [(root / kind.base_folder / f, md5) for f, md5 in listed]
    return [(root / f, md5) for _, f, md5 in (datasets.SVHN.split_list[split] for split in ("train", "test"))]


def _unfinished_mark(name: str, root: Path) -> Path:
    return root / f".{name}_download_unfinished"


def _is_complete(name: str, root: Path) -> bool:
    return not _unfinished_mark(name, root).exists() and all(path.exists() for path, _ in _files(name, root))


def _download(name: str, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}_download.lock"):
            if not _is_complete(name, root):
                _download_alone(name, root)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"data set {name} is not in {root} and could not be downloaded ({str(error).strip()}); check the "
            f"connection, or give --data ROOT with ROOT/{name}/train.parquet and test.parquet or torchvision's files."
        ) from error


def _download_alone(name: str, root: Path) -> None:
    mark = _unfinished_mark(name, root)
    if mark.exists():  # an earlier download was cut off: what has no checksum cannot be trusted
        for path, md5 in _files(name, root):
            if md5 is None:
                path.unlink(missing_ok=True)
    mark.touch()
    if name == "mnist":
        datasets.MNIST(root, download=True)
    elif name == "cifar10":
        datasets.CIFAR10(root, download=True)
    else:
        datasets.SVHN(root, "train", download=True)
        datasets.SVHN(root, "test", download=True)
    mark.unlink()


def _mnist(root: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    train, test = datasets.MNIST(root, train=True), datasets.MNIST(root, train=False)
    return _image_set(train.data[:, None], train.targets), _image_set(test.data[:, None], test.targets), DIGITS


def _cifar10(root: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    train, test = datasets.CIFAR10(root, train=True), datasets.CIFAR10(root, train=False)
    splits = [_image_set(_to_tensor(s.data.transpose(0, 3, 1, 2)), torch.tensor(s.targets)) for s in (train, test)]
    return splits[0], splits[1], tuple(train.classes)


def _svhn(root: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    train, test = datasets.SVHN(root, "train"), datasets.SVHN(root, "test")
    splits = [_image_set(_to_tensor(s.data), torch.from_numpy(s.labels)) for s in (train, test)]
    return splits[0], splits[1], DIGITS


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _image_set(images: torch.Tensor, labels: torch.Tensor) -> ImageSet:
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    return ImageSet(images, labels, torch.arange(len(labels)))
