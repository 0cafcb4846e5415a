"""Parquet files in the Hugging Face layout: a column of encoded images and a column of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64
from torch import Tensor

from memlib.datasets.decoding import EncodedImage, decode_images, match_channels
from memlib.datasets.holdout import hold_out
from memlib.datasets.image_set import Dataset, ImageSet
from memlib.errors import InputError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
TEST_PATTERNS = ("test*.parquet", "val*.parquet")
WINDOW = 4096  # rows held in memory at a time


def find_parquet_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of the training and of the test split, in order; the latter empty if there is none.

    `path` is a file, or a folder with train*.parquet (and test*.parquet or val*.parquet),
    directly or in its subfolder `data`. Both lists are empty if there is no training file.
    """
    if path.is_file():
        return [path], []
    for folder in (path, path / "data"):
        train = sorted(folder.glob("train*.parquet"))
        if train:
            return train, next((found for p in TEST_PATTERNS if (found := sorted(folder.glob(p)))), [])
    return [], []


def load_parquet(name: str, path: Path, *, image_size: int | None = None) -> Dataset:
    """Return the images of the Parquet file or folder at `path` as a data set called `name`.

    An example's id is its row in its split, the files of the split taken in sorted order. Without a
    test split, rows 0, 5, 10, ... are held out as the test split and ids are rows of the undivided files.
    Class names come from the schema's `huggingface` metadata; without it they are the labels.

    Raises:
        InputError: a file is missing or unreadable, lacks a column, holds a label that is not a whole
            number or an image that cannot be decoded, or sizes differ and image_size is None.
    """
    train_files, test_files = find_parquet_files(path)
    if not train_files:
        raise InputError(f"{path} holds no train*.parquet, nor does its subfolder data; name a Parquet file instead.")
    train = _read_split(train_files, image_size)
    class_names = _class_names(train_files[0])
    if test_files:
        train, test = match_channels(train, _read_split(test_files, image_size))
    else:
        train, test = hold_out(train, name)
    return Dataset(name, train, test, class_names or _number_names(name, train, test))


def _read_split(files: Sequence[Path], image_size: int | None) -> ImageSet:
    labels = torch.cat([_read_labels(file) for file in files])
    images = decode_images(_windows(files), count=len(labels), image_size=image_size)
    return ImageSet(images, labels, torch.arange(len(labels)))


def _read_labels(file: Path) -> Int64[Tensor, " n"]:
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
        _image_column(file, schema)
        if LABEL_COLUMN not in schema.names:
            raise InputError(f"{file} has no column {LABEL_COLUMN}; its columns are {', '.join(schema.names)}.")
        kind = schema.field(LABEL_COLUMN).type
        if not pa.types.is_integer(kind):
            raise InputError(f"column {LABEL_COLUMN} of {file} has type {kind}; give whole numbers from 0 upwards.")
        column = parquet.read(columns=[LABEL_COLUMN])[LABEL_COLUMN]
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise InputError(f"{file}, row {row} (the first is 0) has no label; fill or remove it.")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _image_column(file: Path, schema: pa.Schema) -> str:
    column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if column is None:
        raise InputError(f"{file} has no column image or img; its columns are {', '.join(schema.names)}.")
    kind = schema.field(column).type
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise InputError(f"column {column} of {file} has type {kind}; give a struct of bytes and path.")
    return column


def _windows(files: Sequence[Path]) -> Iterator[list[EncodedImage]]:
    for file in files:
        with _opened(file) as parquet:
            column = _image_column(file, parquet.schema_arrow)
            begin = 0
            for batch in parquet.iter_batches(batch_size=WINDOW, columns=[column]):
                rows = batch.column(0).to_pylist()
                yield [_encoded(file, begin + i, image or {}) for i, image in enumerate(rows)]
                begin += len(rows)


def _encoded(file: Path, row: int, image: dict[str, Any]) -> EncodedImage:
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is not None:
        content = file.parent / path
    return EncodedImage(f"{file}, row {row} (the first is 0)", content)


@contextmanager
def _opened(file: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except InputError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file} cannot be read as Parquet ({error}); delete it and fetch it again.") from error


def _class_names(file: Path) -> tuple[str, ...] | None:
    with _opened(file) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][LABEL_COLUMN]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):  # no ClassLabel is described there
        return None


def _number_names(name: str, train: ImageSet, test: ImageSet) -> tuple[str, ...]:
    labels = torch.cat([train.labels, test.labels])
    largest = int(labels.max()) if len(labels) else -1
    if largest >= len(labels):
        raise InputError(
            f"data set {name!r} has a label {largest} but only {len(labels)} images; number the classes from 0 upwards."
        )
    return tuple(str(label) for label in range(largest + 1))
