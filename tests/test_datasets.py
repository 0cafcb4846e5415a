import gzip
import hashlib
import http.server
import io
import json
import pickle
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import sklearn.datasets
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memlib.datasets import Dataset, ImageSet, balanced_subset, check_dataset_name, load_dataset
from memlib.datasets.checks import check_dataset
from memlib.datasets.resizing import resize_images
from memlib.errors import InputError
from memlib.seeds import stream

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


def pixels_of(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list, labels, *, names=None, columns=("image", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [image if isinstance(image, dict) else {"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(dict(zip(columns, (pa.array(encoded, kind), pa.array(labels)), strict=True)))
    if names:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=7)
    return path


def write_images(folder: Path, counts: dict[str, int], *shape: int) -> None:
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(pixels_of(count, *shape, seed=label)):
            (folder / name / f"{i:03}.png").write_bytes(png(pixels))


# --- names ---


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "digits"])
def test_known_names_are_accepted(name):
    check_dataset_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", "data set 'cifar' is not known; did you mean 'cifar10'\\? choose from cifar10, digits"),
        ("parquet", "did you mean 'parquet:PATH'"),
        ("folder:", "names no path; give folder:PATH"),
        ("parquet:no/such/place", "there is no no/such/place; give the path of a parquet that exists"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(name, message):
    for check in (check_dataset_name, load_dataset):
        with pytest.raises(InputError, match=message):
            check(name)


def test_an_empty_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="is empty; put the images there"):
        check_dataset_name(f"folder:{tmp_path}")


def test_a_file_is_no_image_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; give a folder with one subfolder a class"):
        check_dataset_name(f"folder:{tmp_path / 'file'}")


# --- scikit-learn's digits ---


def test_digits_are_scikit_learns_in_256_grey_values_with_every_fifth_held_out():
    digits, source = load_dataset("digits"), sklearn.datasets.load_digits()
    assert (len(digits.train), len(digits.test), digits.image_shape) == (1437, 360, (1, 8, 8))
    assert digits.class_names == tuple("0123456789")
    assert digits.test.ids.tolist() == list(range(0, 1797, 5))
    for split in (digits.train, digits.test):
        expected = np.round(source.images[split.ids] * 255 / 16)
        np.testing.assert_array_equal(split.images[:, 0].numpy(), expected)
        np.testing.assert_array_equal(split.labels.numpy(), source.target[split.ids])


def test_the_train_and_test_ids_of_digits_are_disjoint_and_cover_the_source():
    digits = load_dataset("digits")
    assert sorted([*digits.train.ids.tolist(), *digits.test.ids.tolist()]) == list(range(1797))


# --- Parquet ---


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize("test_name", ["test", "validation", "valid"])
def test_parquet_shards_are_read_in_order_with_rows_as_ids(tmp_path, folder, test_name):
    pixels, labels = pixels_of(40, 6, 5, 3), [i % 3 for i in range(40)]
    encoded = [png(p) for p in pixels]
    place = tmp_path / folder
    write_parquet(place / "train-00000-of-00002.parquet", encoded[:17], labels[:17], names=["a", "b", "c"])
    write_parquet(place / "train-00001-of-00002.parquet", encoded[17:30], labels[17:30])
    write_parquet(place / f"{test_name}-00000-of-00001.parquet", encoded[30:], labels[30:])
    loaded = load_dataset(f"parquet:{tmp_path}")
    assert loaded.name == f"parquet:{tmp_path}"
    assert loaded.class_names == ("a", "b", "c")
    for split, part in ((loaded.train, slice(0, 30)), (loaded.test, slice(30, 40))):
        np.testing.assert_array_equal(split.images.numpy(), pixels[part].transpose(0, 3, 1, 2))
        assert split.labels.tolist() == labels[part]
        assert split.ids.tolist() == list(range(len(labels[part])))


def test_without_a_test_split_every_fifth_row_is_held_out(tmp_path):
    pixels = pixels_of(23, 4, 4)
    file = write_parquet(tmp_path / "some.parquet", [png(p) for p in pixels], [i % 2 for i in range(23)])
    write_parquet(tmp_path / "only" / "train.parquet", [png(p) for p in pixels], [i % 2 for i in range(23)])
    for name in (f"parquet:{file}", f"parquet:{tmp_path / 'only'}"):
        loaded = load_dataset(name)
        assert loaded.test.ids.tolist() == [0, 5, 10, 15, 20]
        assert sorted([*loaded.train.ids.tolist(), *loaded.test.ids.tolist()]) == list(range(23))
        np.testing.assert_array_equal(loaded.train.images[:, 0].numpy(), pixels[loaded.train.ids])


def test_a_class_that_holding_out_would_lose_is_an_error(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(p) for p in pixels_of(6, 4, 4)], [2, 0, 1, 0, 1, 0])
    with pytest.raises(InputError, match="would leave class 2 without a training image; add a test split"):
        load_dataset(f"parquet:{file}")


@pytest.mark.parametrize("side", [3, 48])  # 100 bytes and 7 kB of noise: decoded one by one, and in threads
def test_more_images_than_a_window_keep_their_order(tmp_path, monkeypatch, side):
    monkeypatch.setattr("memlib.datasets.parquet_files.WINDOW", 10)
    monkeypatch.setattr("memlib.datasets.decoding.CHUNK", 3)
    pixels = pixels_of(57, side, side, 3)
    file = write_parquet(tmp_path / "a.parquet", [png(p) for p in pixels], [i % 2 for i in range(57)])
    train = load_dataset(f"parquet:{file}").train
    np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1).numpy(), pixels[train.ids])


def test_the_image_column_may_be_called_img_and_class_names_fall_back_to_numbers(tmp_path):
    images = [png(p) for p in pixels_of(12, 4, 4)]
    write_parquet(tmp_path / "train.parquet", images, [0, 1, 3] * 4, columns=("img", "label"))
    assert load_dataset(f"parquet:{tmp_path}").class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_images_have_one_channel(tmp_path, mode):
    pixels = pixels_of(12, 4, 4)
    file = write_parquet(tmp_path / "a.parquet", [png(p, mode) for p in pixels], [0, 1] * 6)
    train = load_dataset(f"parquet:{file}").train
    expected = np.where(pixels >= 128, 255, 0) if mode == "1" else pixels
    assert train.images.shape[1] == 1
    if mode != "1":  # black and white is dithered
        np.testing.assert_array_equal(train.images[:, 0].numpy(), expected[train.ids])
    assert mode != "1" or set(train.images.unique().tolist()) <= {0, 255}


def test_grey_images_of_16_bits_keep_the_upper_8(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (12, 4, 4), dtype=np.uint16)
    file = write_parquet(tmp_path / "a.parquet", [png(p) for p in pixels], [0, 1] * 6)
    train = load_dataset(f"parquet:{file}").train
    np.testing.assert_array_equal(train.images[:, 0].numpy(), pixels[train.ids] // 256)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_images_of_other_kinds_become_red_green_and_blue(tmp_path, mode):
    buffers = []
    for pixels in pixels_of(12, 4, 4, 3):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, "TIFF")
        buffers.append(buffer.getvalue())
    file = write_parquet(tmp_path / "a.parquet", buffers, [0, 1] * 6)
    train = load_dataset(f"parquet:{file}").train
    expected = np.stack([np.asarray(Image.open(io.BytesIO(buffers[i])).convert("RGB")) for i in train.ids])
    np.testing.assert_array_equal(train.images.numpy(), expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("colour_in", ["train", "test"])
def test_a_set_with_grey_and_colour_images_is_all_colour(tmp_path, colour_in):
    grey = [png(p) for p in pixels_of(8, 4, 4)]
    colour = [*grey[:5], png(pixels_of(1, 4, 4, 3)[0]), *grey[6:]]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", colour if split == colour_in else grey, [0, 1] * 4)
    loaded = load_dataset(f"parquet:{tmp_path}")
    assert loaded.train.images.shape == loaded.test.images.shape == (8, 3, 4, 4)
    np.testing.assert_array_equal(loaded.train.images[0].numpy(), np.stack([pixels_of(8, 4, 4)[0]] * 3))


def test_images_stored_as_paths_are_read_beside_the_file(tmp_path):
    pixels = pixels_of(12, 4, 4)
    for i, p in enumerate(pixels):
        (tmp_path / f"{i}.png").write_bytes(png(p))
    rows = [{"bytes": None, "path": f"{i}.png"} for i in range(12)]
    train = load_dataset(f"parquet:{write_parquet(tmp_path / 'a.parquet', rows, [0, 1] * 6)}").train
    np.testing.assert_array_equal(train.images[:, 0].numpy(), pixels[train.ids])


def test_mixed_sizes_are_an_error_that_names_both_rows(tmp_path):
    images = [png(p) for p in (*pixels_of(7, 4, 6), *pixels_of(5, 8, 3))]
    file = write_parquet(tmp_path / "a.parquet", images, [0, 1] * 6)
    with pytest.raises(InputError, match="a.parquet, row 7 .* has 3x8 pixels, .*row 0 .* has 6x4 .*data.image_size"):
        load_dataset(f"parquet:{file}")
    assert load_dataset(f"parquet:{file}", image_size=5).image_shape == (1, 5, 5)


@pytest.mark.parametrize("content", [b"no image", b"", png(pixels_of(1, 9, 9)[0])[:60]])
def test_undecodable_image_bytes_are_named_by_file_and_row(tmp_path, content):
    images = [png(p) for p in pixels_of(12, 9, 9)]
    images[8] = content
    file = write_parquet(tmp_path / "a.parquet", images, [0, 1] * 6)
    with pytest.raises(InputError, match=r"a.parquet, row 8 \(the first is 0\) cannot be decoded as an image"):
        load_dataset(f"parquet:{file}")


@pytest.mark.parametrize("empty", [{"bytes": None, "path": None}, None])
def test_a_row_without_an_image_is_named(tmp_path, empty):
    images = [png(p) for p in pixels_of(11, 4, 4)]
    rows = [*({"bytes": i, "path": None} for i in images), empty or {}]
    with pytest.raises(InputError, match="row 11 .* holds no image; fill or remove it"):
        load_dataset(f"parquet:{write_parquet(tmp_path / 'a.parquet', rows, [0, 1] * 6)}")


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (("picture", "label"), [0, 1] * 5, "has no column image or img; its columns are picture, label"),
        (("image", "class"), [0, 1] * 5, "has no column label; its columns are image, class"),
        (("image", "label"), ["cat", "dog"] * 5, "column label of .* has type string; give whole numbers"),
        (("image", "label"), [0.5, 1.0] * 5, "column label of .* has type double; give whole numbers"),
        (("image", "label"), [0, 1, 0, None, 0, None, 1, 1, 1, 1], "row 3 .* has no label; fill or remove it"),
        (("image", "label"), [0, 10**9] * 5, "has a label 1000000000 but only 10 images; number the classes from 0"),
        (("image", "label"), [0, -1] * 5, "has label -1 at example 1, but there are 1 classes"),
    ],
)
def test_parquet_columns_that_cannot_be_used_are_refused(tmp_path, columns, labels, message):
    file = write_parquet(tmp_path / "a.parquet", [png(p) for p in pixels_of(10, 4, 4)], labels, columns=columns)
    with pytest.raises(InputError, match=message):
        load_dataset(f"parquet:{file}")


def test_an_image_column_of_plain_text_is_refused(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column image of .* has type string; give a struct of bytes and path"):
        load_dataset(f"parquet:{tmp_path / 'a.parquet'}")


def test_a_truncated_parquet_file_is_named(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [png(p) for p in pixels_of(10, 4, 4)], [0, 1] * 5)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"a.parquet cannot be read as Parquet \(.*\); delete it and fetch it again"):
        load_dataset(f"parquet:{file}")


def test_a_folder_without_training_files_is_refused(tmp_path):
    (tmp_path / "test.parquet").touch()
    with pytest.raises(InputError, match="holds no train\\*.parquet"):
        load_dataset(f"parquet:{tmp_path}")


# --- image folders ---


@pytest.mark.parametrize("test_name", ["test", "val", "valid"])
def test_an_image_folder_is_read_class_by_class_with_positions_as_ids(tmp_path, test_name):
    write_images(tmp_path / "train", {"cat": 3, "dog": 2, "eel": 2}, 5, 4, 3)
    write_images(tmp_path / test_name, {"dog": 2, "eel": 1}, 5, 4, 3)
    loaded = load_dataset(f"folder:{tmp_path}")
    assert loaded.class_names == ("cat", "dog", "eel")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert loaded.test.labels.tolist() == [1, 1, 2]
    assert loaded.train.ids.tolist() == list(range(7))
    expected = np.concatenate([pixels_of(n, 5, 4, 3, seed=k) for k, n in enumerate((3, 2, 2))])
    np.testing.assert_array_equal(loaded.train.images.numpy(), expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("subfolder", ["", "train"])
def test_an_undivided_image_folder_holds_out_every_fifth_image(tmp_path, subfolder):
    write_images(tmp_path / subfolder, {"cat": 6, "dog": 5}, 4, 4)
    loaded = load_dataset(f"folder:{tmp_path}")
    assert loaded.test.ids.tolist() == [0, 5, 10]
    assert loaded.train.ids.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert loaded.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert loaded.image_shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("train", "validation"), ("TRAIN", "Val"), ("training", "test")]
)
def test_the_splits_of_an_image_folder_are_known_by_their_usual_names(tmp_path, train, test):
    write_images(tmp_path / train, {"cat": 3, "dog": 2}, 4, 4)
    write_images(tmp_path / test, {"cat": 1, "dog": 1}, 4, 4)
    loaded = load_dataset(f"folder:{tmp_path}")
    assert (loaded.class_names, len(loaded.train), len(loaded.test)) == (("cat", "dog"), 5, 2)


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    write_images(tmp_path, {"bus": 5, "train": 5}, 4, 4)
    assert load_dataset(f"folder:{tmp_path}").class_names == ("bus", "train")


@pytest.mark.parametrize("other", ["train", "cat"])
def test_a_test_split_without_classes_is_no_class(tmp_path, other):
    write_images(tmp_path, {other: 3, "test": 3}, 4, 4)
    with pytest.raises(InputError, match="has a folder 'test' beside folders that would be classes"):
        load_dataset(f"folder:{tmp_path}")


def test_a_split_that_would_be_taken_for_a_class_is_named(tmp_path):
    write_images(tmp_path / "trainset", {"cat": 3}, 4, 4)
    write_images(tmp_path / "Testing", {"cat": 3}, 4, 4)
    with pytest.raises(InputError, match="has a folder 'Testing' beside folders that would be classes, too; call the"):
        load_dataset(f"folder:{tmp_path}")


def test_a_damaged_file_of_an_image_folder_is_named(tmp_path):
    write_images(tmp_path, {"cat": 6, "dog": 5}, 4, 4)
    (tmp_path / "dog" / "001.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"dog/001.png cannot be decoded as an image"):
        load_dataset(f"folder:{tmp_path}")


def test_mixed_sizes_in_a_folder_are_named_and_scaled_if_asked(tmp_path):
    write_images(tmp_path, {"cat": 6}, 4, 4)
    write_images(tmp_path / "dog", {"": 6}, 7, 9)
    with pytest.raises(InputError, match="dog/000.png has 9x7 pixels, .*cat/000.png has 4x4 .*set data.image_size"):
        load_dataset(f"folder:{tmp_path}")
    train = load_dataset(f"folder:{tmp_path}", image_size=6).train
    last = Image.open(tmp_path / "dog" / "005.png").resize((6, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(train.images[-1, 0].numpy(), np.asarray(last))


def test_a_folder_without_classes_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(pixels_of(1, 4, 4)[0]))
    with pytest.raises(InputError, match="is not an image folder: .* Give a folder with one subfolder a class"):
        load_dataset(f"folder:{tmp_path}")


def test_a_test_class_without_training_images_is_refused(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 2}, 4, 4)
    write_images(tmp_path / "test", {"eel": 2}, 4, 4)
    with pytest.raises(InputError, match="has a class 'eel' without training images"):
        load_dataset(f"folder:{tmp_path}")


# --- torchvision's files ---


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + values.tobytes())


def write_mnist(root: Path) -> None:
    for prefix, n in (("train", 20), ("t10k", 10)):
        write_idx(root / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", pixels_of(n, 28, 28))
        write_idx(root / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)


def write_cifar10(root: Path, monkeypatch) -> None:
    folder, kind = root / "cifar-10-batches-py", torchvision.datasets.CIFAR10
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    batch = {"data": pixels_of(12, 3072), "labels": [i % 10 for i in range(12)]}
    monkeypatch.setattr(kind, "train_list", [write("data_batch_1", batch), write("data_batch_2", batch)])
    monkeypatch.setattr(kind, "test_list", [write("test_batch", batch)])
    name, md5 = write("batches.meta", {"label_names": [f"class {k}" for k in range(10)]})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "label_names", "md5": md5})


def write_svhn(root: Path, monkeypatch, url: str = "http://localhost/") -> None:
    root.mkdir(parents=True, exist_ok=True)
    listed = {}
    for split, n in (("train", 20), ("test", 10)):
        file = root / f"{split}_32x32.mat"
        labels = np.arange(1, n + 1, dtype=np.uint8)[:, None] % 10
        labels[labels == 0] = 10  # SVHN calls the digit 0 ten
        scipy.io.savemat(file, {"X": pixels_of(n, 32, 32, 3).transpose(1, 2, 3, 0), "y": labels})
        listed[split] = [url + file.name, file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)


def no_download(monkeypatch) -> None:
    def refuse(*_args, **_settings):
        raise OSError("no network in this test")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", refuse)


def test_torchvisions_mnist_files_are_read(tmp_path, monkeypatch):
    no_download(monkeypatch)
    write_mnist(tmp_path)
    loaded = load_dataset("mnist", root=tmp_path)
    np.testing.assert_array_equal(loaded.train.images[:, 0].numpy(), pixels_of(20, 28, 28))
    assert loaded.test.labels.tolist() == list(range(10))
    assert (loaded.class_names, loaded.train.ids.tolist()) == (tuple("0123456789"), list(range(20)))


def test_torchvisions_cifar10_files_are_read(tmp_path, monkeypatch):
    no_download(monkeypatch)
    write_cifar10(tmp_path, monkeypatch)
    loaded = load_dataset("cifar10", root=tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.image_shape) == (24, 12, (3, 32, 32))
    np.testing.assert_array_equal(loaded.train.images[12:].flatten(1).numpy(), pixels_of(12, 3072))
    assert loaded.class_names[3] == "class 3"


def test_torchvisions_svhn_files_are_read_with_ten_meaning_zero(tmp_path, monkeypatch):
    no_download(monkeypatch)
    write_svhn(tmp_path, monkeypatch)
    loaded = load_dataset("svhn", root=tmp_path)
    np.testing.assert_array_equal(loaded.train.images.numpy(), pixels_of(20, 32, 32, 3).transpose(0, 3, 1, 2))
    assert loaded.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_parquet_under_the_root_comes_before_torchvisions_files(tmp_path, monkeypatch):
    no_download(monkeypatch)
    write_mnist(tmp_path)
    for split in ("train", "test"):
        write_parquet(tmp_path / "mnist" / f"{split}.parquet", [png(p) for p in pixels_of(4, 9, 9)], [0, 1] * 2)
    loaded = load_dataset("mnist", root=tmp_path)
    assert (loaded.name, loaded.image_shape) == ("mnist", (1, 9, 9))


@pytest.mark.parametrize("size", [0, 7, 100, 20 * 28 * 28])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_truncated_mnist_file_is_an_error_before_training(tmp_path, size, file):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 1)])
    with pytest.raises(InputError, match="data set mnist in .* is damaged: .*delete its files and run again"):
        load_dataset("mnist", root=tmp_path)


@pytest.mark.parametrize(("name", "file"), [("cifar10", "cifar-10-batches-py/test_batch"), ("svhn", "test_32x32.mat")])
def test_a_file_with_another_checksum_is_named(tmp_path, monkeypatch, name, file):
    no_download(monkeypatch)
    {"cifar10": write_cifar10, "svhn": write_svhn}[name](tmp_path, monkeypatch)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{file} fails its checksum; delete its files and run again"):
        load_dataset(name, root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_a_failed_download_says_where_files_can_be_put(tmp_path, monkeypatch, name):
    no_download(monkeypatch)
    with pytest.raises(
        InputError, match=f"could not be downloaded .no network.*--data ROOT with ROOT/{name}/train.par"
    ):
        load_dataset(name, root=tmp_path / "new")


def test_without_a_root_the_users_cache_is_used(tmp_path, monkeypatch):
    no_download(monkeypatch)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda app: str(tmp_path / app))
    write_mnist(tmp_path / "memlib")
    assert len(load_dataset("mnist").train) == 20


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine that counts what is fetched from its folder."""
    fetched = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.headers.get("Method") == "HEAD":  # torchvision's way to ask where a file has moved
                self.do_HEAD()
            else:
                fetched.append(self.path)
                super().do_GET()

        def log_message(self, *_):
            pass

    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}/", fetched
        running.shutdown()
        thread.join()


def test_loads_that_start_together_download_once(tmp_path, monkeypatch, server):
    folder, url, fetched = server
    write_svhn(folder, monkeypatch, url)
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(load_dataset("svhn", root=tmp_path / "root"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 3
    assert sorted(fetched) == ["/test_32x32.mat", "/train_32x32.mat"]


def test_a_download_that_was_cut_off_is_taken_up_again(tmp_path, monkeypatch, server):
    folder, url, fetched = server
    write_mnist(folder)
    resources = []
    for file in sorted((folder / "MNIST" / "raw").iterdir()):
        packed = gzip.compress(file.read_bytes())
        (folder / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    root = tmp_path / "root"
    expected = load_dataset("mnist", root=root)
    assert len(fetched) == 4

    unpacked = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    unpacked.write_bytes(unpacked.read_bytes()[:50])  # as if killed while unpacking
    (root / ".mnist_download_unfinished").touch()
    again = load_dataset("mnist", root=root)
    assert torch.equal(again.test.images, expected.test.images)
    assert len(fetched) == 4  # the packed files are still good
    assert not (root / ".mnist_download_unfinished").exists()


# --- checks that every source passes ---


def small_dataset(*, train_labels=(0, 1, 2), test_labels=(0, 1), test_shape=(1, 4, 4), classes=3) -> Dataset:
    def split(labels, shape):
        images = torch.zeros(len(labels), *shape, dtype=torch.uint8)
        return ImageSet(images, torch.tensor(labels, dtype=torch.int64), torch.arange(len(labels)))

    names = tuple(str(k) for k in range(classes))
    return Dataset("small", split(train_labels, (1, 4, 4)), split(test_labels, test_shape), names)


def test_a_sound_dataset_passes():
    check_dataset(small_dataset())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": ()}, "data set 'small' has no training images; add some"),
        ({"test_labels": ()}, "data set 'small' has no test images; add some"),
        ({"train_labels": (0, 3, 1)}, r"\(training\) has label 3 at example 1, but there are 3 classes; .* 0 to 2"),
        ({"test_labels": (-1, 0)}, r"\(test\) has label -1 at example 0"),
        ({"train_labels": (1, 1, 1)}, "has training images of one class only; add images of another"),
        ({"train_labels": (0, 1)}, "has 2 training images but 3 classes; add images, at least one a class"),
        ({"test_shape": (1, 5, 4)}, r"shape \(1, 4, 4\) but test images of shape \(1, 5, 4\) .*set data.image_size"),
    ],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        check_dataset(small_dataset(**change))


# --- scaling ---


@pytest.mark.parametrize("image_size", [5, 16, 23])
def test_scaling_a_set_is_pillows_bilinear_scaling_of_each_image(image_size, monkeypatch):
    monkeypatch.setattr("memlib.datasets.resizing.CHUNK", 4)
    pixels = pixels_of(11, 16, 16, 3)
    scaled = resize_images(torch.from_numpy(pixels).permute(0, 3, 1, 2), image_size)
    for image, result in zip(pixels, scaled, strict=True):
        theirs = np.asarray(Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR))
        assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_image_size_scales_every_kind_of_source(tmp_path, monkeypatch):
    no_download(monkeypatch)
    write_mnist(tmp_path)
    write_parquet(tmp_path / "a.parquet", [png(p) for p in pixels_of(12, 4, 6)], [0, 1] * 6)
    for name in ("digits", "mnist", f"parquet:{tmp_path / 'a.parquet'}"):
        assert load_dataset(name, root=tmp_path, image_size=10).image_shape == (1, 10, 10)


# --- subsets ---


def set_of(labels: list[int]) -> ImageSet:
    n = len(labels)
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None]
    return ImageSet(images, torch.tensor(labels), 1000 + 3 * torch.arange(n))


def fair_shares(counts: list[int], limit: int) -> list[int]:
    """The obvious twin, up to who gets one more: hand out one a class, round by round."""
    given_out = [0] * len(counts)
    while sum(given_out) < limit:
        for k, count in enumerate(counts):
            if given_out[k] < count and sum(given_out) < limit:
                given_out[k] += 1
    return given_out


@given(labels=st.lists(st.integers(0, 4), min_size=5, max_size=60), seed=st.integers(0, 50), data=st.data())
def test_a_subset_is_class_balanced_and_in_ascending_position(labels, seed, data):
    limit = data.draw(st.integers(5, len(labels)))
    images = set_of(labels)
    subset = balanced_subset(images, limit, 5, stream(seed, "subset"))
    positions = ((subset.ids - 1000) // 3).tolist()
    assert positions == sorted(set(positions))
    assert subset.labels.tolist() == [labels[i] for i in positions]
    assert torch.equal(subset.images, images.images[positions])
    counts = [labels.count(k) for k in range(5)]
    found = [subset.labels.tolist().count(k) for k in range(5)]
    assert sorted(found) == sorted(fair_shares(counts, limit))
    level = max(found)
    assert all(share >= min(count, level - 1) for share, count in zip(found, counts, strict=True))
    if limit > 5:
        smaller = balanced_subset(images, limit - 1, 5, stream(seed, "subset"))
        assert set(smaller.ids.tolist()) < set(subset.ids.tolist())


def test_a_subset_is_a_function_of_the_seed_and_every_example_is_equally_likely():
    images, times = set_of([0, 1] * 20), torch.zeros(40)
    for seed in range(1000):
        times[(balanced_subset(images, 10, 2, stream(seed, "subset")).ids - 1000) // 3] += 1
    assert times.min() > 190 and times.max() < 310  # 250 expected, standard deviation 14
    one, other = (balanced_subset(images, 10, 2, stream(7, "subset")) for _ in range(2))
    assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (41, "data.limit is 41, but there are 40 training images; lower or remove it"),
        (1, "data.limit is 1, but there are 2 classes; give at least 2"),
    ],
)
def test_a_limit_that_cannot_be_met_is_refused(limit, message):
    with pytest.raises(InputError, match=message):
        balanced_subset(set_of([0, 1] * 20), limit, 2, stream(0, "subset"))


def test_drawing_a_subset_leaves_the_global_random_stream_untouched():
    state = torch.random.get_rng_state()
    balanced_subset(set_of([0, 1] * 20), 10, 2, stream(0, "subset"))
    assert torch.equal(torch.random.get_rng_state(), state)


# --- real data, where it lies beside the checkout ---


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real images are not beside this checkout")
@pytest.mark.parametrize(("name", "n", "shape"), [("mnist", 60_000, (1, 28, 28)), ("cifar10", 50_000, (3, 32, 32))])
def test_the_real_images_are_read(name, n, shape):
    loaded = load_dataset(name, root=REAL_DATA)
    assert (len(loaded.train), len(loaded.test), loaded.image_shape, loaded.num_classes) == (n, 10_000, shape, 10)
