"""Loading: a Parquet file of encoded images into one uint8 tensor, and from there into batches of inputs.

In turn in one process: (a) ours, decoding by windows of rows; (b) the obvious way: the whole table as
Python rows, each image opened with Pillow, turned into a tensor and stacked. Both give the same tensor. Then
(c) ours: an epoch's batches of model inputs from the uint8 images; (d) the obvious way: one image at a time from
a DataLoader. Floors: Pillow's decoding alone for (a), bytes read and written at the measured bandwidth for (c).
Images are real: scikit-learn's digits as PNG, or ROOT/cifar10/train.parquet with --data. `--save` keeps the
rows in bench/results/loading.json.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from timing import bandwidth, rows_of, save, time_in_turn
from torch import Tensor
from torch.utils.data import DataLoader
from training import PilImages

from memlib.batches import training_batches
from memlib.config import TrainingConfig
from memlib.datasets import load_dataset

CPU = torch.device("cpu")
SIDE = 32
BATCH = 512
FLOAT_BYTES, PASSES_OF_NORMALIZE = 4, 4  # written once by the conversion, read and written by *, read by the model


def write_digits(path: Path, copies: int) -> None:
    """Write scikit-learn's digits as PNG in the Hugging Face layout, several times over."""
    digits = load_dataset("digits", image_size=SIDE).train
    encoded = []
    for image in digits.images[:, 0].numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": encoded * copies, "label": digits.labels.tolist() * copies})
    pq.write_table(table, path)


def load_ours(path: Path) -> Tensor:
    """Return the training images; a test split is held out of them, as nothing else is given."""
    return load_dataset(f"parquet:{path}").train.images


def load_obvious(path: Path) -> Tensor:
    """Return all images as one would first write it."""
    rows = pq.read_table(path).to_pylist()
    column = "image" if "image" in rows[0] else "img"
    arrays = [np.asarray(Image.open(io.BytesIO(row[column]["bytes"]))) for row in rows]
    return torch.stack([torch.tensor(array) for array in arrays])


def decode_alone(path: Path) -> None:
    """Decode every image with Pillow on one thread and keep none."""
    column = pq.read_table(path).column(0)
    for value in column.to_pylist():
        Image.open(io.BytesIO(value["bytes"])).load()


def batches_ours(images: Tensor) -> None:
    """Go through an epoch's batches."""
    for _, inputs in training_batches(images, TrainingConfig(batch_size=BATCH), seed=0, epoch=1, device=CPU):
        inputs.shape  # noqa: B018 - what a step would take


def batches_obvious(pictures: PilImages) -> None:
    """Go through an epoch of a DataLoader."""
    for inputs, _, _ in DataLoader(pictures, batch_size=BATCH, shuffle=True):
        inputs.shape  # noqa: B018


def measure(path: Path, rounds: int) -> dict[str, object]:
    """Return the medians and ratios of all ways, and the floors."""
    started = time.perf_counter()
    images = load_ours(path)
    print(f"{len(images)} images of {tuple(images.shape[1:])} in {time.perf_counter() - started:.2f} s")
    n_threads = torch.get_num_threads()
    loading: Mapping[str, Callable[[], object]] = {
        "(a) ours": lambda: load_ours(path),
        "(b) the obvious way": lambda: load_obvious(path),
        "Pillow's decoding alone": lambda: decode_alone(path),
    }
    rows = rows_of(time_in_turn(loading, rounds, CPU), reference="(b) the obvious way")
    rgb = images.expand(-1, 3, -1, -1)
    none = torch.zeros(len(images), dtype=torch.int64)
    pictures = PilImages(rgb, none, none)
    batching: Mapping[str, Callable[[], object]] = {
        "(c) an epoch's batches, ours": lambda: batches_ours(images),
        "(d) an epoch's batches, the obvious way": lambda: batches_obvious(pictures),
    }
    epochs = rows_of(time_in_turn(batching, rounds, CPU), reference="(d) an epoch's batches, the obvious way")
    moved = images.numel() * (2 + 2 + 1 + PASSES_OF_NORMALIZE * FLOAT_BYTES)  # gathered, augmented, converted
    return {
        "rows": rows,
        "batch_rows": epochs,
        "images": len(images),
        "bytes_decoded": images.numel(),
        "floor_seconds": rows[2]["seconds"],
        "batch_floor_seconds": moved / bandwidth(CPU),
        "torch_threads": n_threads,
    }


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Time the loading of images against the obvious way.")
    parser.add_argument("--data", type=Path, help="folder with cifar10/train.parquet; default: digits as PNG")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="keep the rows in bench/results/loading.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.parquet"
        if options.data:
            path = options.data / "cifar10" / "train.parquet"
        else:
            write_digits(path, copies=5)
        measured = measure(path, options.rounds)
    if options.save:
        save("loading", measured, CPU, source="cifar10" if options.data else "digits as PNG")


if __name__ == "__main__":
    main()
