"""Find a data set by its name and read it."""

from __future__ import annotations

from pathlib import Path

from memlib.datasets.checks import check_dataset
from memlib.datasets.embedded import load_embedded_digits
from memlib.datasets.image_folder import load_image_folder
from memlib.datasets.image_set import Dataset
from memlib.datasets.parquet_files import find_parquet_files, load_parquet
from memlib.datasets.resizing import resize_dataset
from memlib.datasets.torchvision_files import TORCHVISION_NAMES, load_torchvision
from memlib.errors import InputError, unknown

PATH_KINDS = ("folder", "parquet")


def load_dataset(name: str, *, root: Path | None = None, image_size: int | None = None) -> Dataset:
    """Return the data set `name`, ready to train on.

    An example's id is its position in the source's own order of its split (of the whole source where
    the test split is held out of it).

    name: `mnist`, `cifar10`, `svhn`, `digits`, `folder:PATH` or `parquet:PATH`.
    root: the folder with ROOT/NAME/train.parquet or torchvision's files, to which torchvision
        downloads if neither is there; None for the user's cache folder.
    image_size: side in pixels that all images are scaled to; None leaves them as they are.

    Raises:
        InputError: the name is unknown, files are missing or damaged, or the images cannot be trained on.
    """
    check_dataset_name(name)
    kind, _, path = name.partition(":")
    if kind == "folder":
        dataset = load_image_folder(name, Path(path).expanduser(), image_size=image_size)
    elif kind == "parquet":
        dataset = load_parquet(name, Path(path).expanduser(), image_size=image_size)
    elif kind == "digits":
        dataset = _resized(load_embedded_digits(), image_size)
    else:
        dataset = _load_named(name, root or _cache_folder(), image_size)
    check_dataset(dataset)
    return dataset


def check_dataset_name(name: str) -> None:
    """Check, without reading any image, that `name` is a known data set or a path with something in it.

    Raises:
        InputError: the name is unknown (with the nearest match), or its path is missing or empty.
    """
    kind, colon, path = name.partition(":")
    if kind in PATH_KINDS and colon:
        _check_path(name, path)
    elif name not in (*TORCHVISION_NAMES, "digits"):
        raise unknown("data set", name, [*TORCHVISION_NAMES, "digits", *(f"{kind}:PATH" for kind in PATH_KINDS)])


def _check_path(name: str, path: str) -> None:
    kind = name.partition(":")[0]
    if not path:
        raise InputError(f"data set {name!r} names no path; give {kind}:PATH.")
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"data set {name!r}: there is no {place}; give the path of a {kind} that exists.")
    if place.is_dir() and not any(place.iterdir()):
        raise InputError(f"data set {name!r}: {place} is empty; put the images there or give another path.")
    if kind == "folder" and not place.is_dir():
        raise InputError(f"data set {name!r}: {place} is a file; give a folder with one subfolder a class.")


def _cache_folder() -> Path:
    from platformdirs import user_cache_dir  # where a root is given, a machine without this package will do

    return Path(user_cache_dir("memlib"))


def _load_named(name: str, root: Path, image_size: int | None) -> Dataset:
    folder = root.expanduser() / name
    if find_parquet_files(folder)[0]:
        return load_parquet(name, folder, image_size=image_size)
    return _resized(load_torchvision(name, root.expanduser()), image_size)


def _resized(dataset: Dataset, image_size: int | None) -> Dataset:
    return dataset if image_size is None else resize_dataset(dataset, image_size)
