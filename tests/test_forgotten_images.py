"""Figure 7's examples: which are forgotten on dropping, in which order, and that their pixels travel."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memlib.config import DropoutConfig
from memlib.datasets import ImageSet
from memlib.evaluation import Predictions
from memlib.forgotten_images import MOST, encode_png, find_forgotten, forgotten_images
from memlib.label_noise import NoisyLabels
from memlib.results import create_results
from memlib.runs import perform_run

CPU = torch.device("cpu")
NAMES = ("zero", "one", "two")


def predictions(prediction, margin):
    return Predictions(torch.tensor(prediction), torch.tensor(margin), torch.zeros(len(margin)))


def slowly_forgotten(tied, dropped, noisy_labels):
    """The definition, one example at a time."""
    found = []
    for i in range(len(noisy_labels.labels)):
        assigned = noisy_labels.labels[i].item()
        if noisy_labels.is_noisy[i] or tied.prediction[i] != assigned or dropped.prediction[i] == assigned:
            continue
        found.append((dropped.margin[i].item(), i))
    return [i for _, i in sorted(found)]


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_the_forgotten_are_the_clean_ones_right_before_and_wrong_after_lowest_margin_first(seed, n):
    draw = torch.Generator().manual_seed(seed)
    labels, tied, dropped = (torch.randint(3, (n,), generator=draw) for _ in range(3))
    original = torch.where(torch.rand(n, generator=draw) < 0.3, (labels + 1) % 3, labels)
    noisy_labels = NoisyLabels(labels, original, labels != original)
    margin = torch.randint(-4, 4, (n,), generator=draw).float()  # with ties: the first example comes first
    before, after = Predictions(tied, margin, margin), Predictions(dropped, margin, margin)
    assert find_forgotten(before, after, noisy_labels).tolist() == slowly_forgotten(before, after, noisy_labels)


def test_only_the_most_strongly_forgotten_are_kept_and_all_are_counted():
    labels = torch.tensor([0, 1, 2, 0])
    examples = ImageSet(torch.arange(4 * 12, dtype=torch.uint8).view(4, 3, 2, 2), labels, torch.tensor([7, 5, 3, 9]))
    noisy_labels = NoisyLabels(labels, labels, torch.zeros(4, dtype=torch.bool))
    tied = predictions([0, 1, 2, 0], [1.0, 1.0, 1.0, 1.0])
    dropped = predictions([1, 2, 0, 0], [-1.0, -3.0, -2.0, 1.0])
    found = forgotten_images(examples, (tied, dropped), noisy_labels, class_names=NAMES, most=2)
    assert [(f.example_id, f.assigned_name, f.new_name, f.margin) for f in found] == [
        (5, "one", "two", -3.0),
        (3, "two", "zero", -2.0),
    ]
    assert {f.n_forgotten for f in found} == {3}
    pixels = np.asarray(Image.open(io.BytesIO(found[0].png)))
    assert np.array_equal(pixels, examples.images[1].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_gives_every_pixel_back(channels):
    image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    decoded = np.asarray(Image.open(io.BytesIO(encode_png(image))))
    assert np.array_equal(decoded.reshape(5, 7, channels).transpose(2, 0, 1), image.numpy())


def test_a_run_with_example_tied_dropout_writes_what_it_forgets(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    training = replace(small_run.training, epochs=2, gradient_accounting=False)
    tied = DropoutConfig(kind="example_tied", p_gen=0.25)
    perform_run(replace(small_run, dropout=tied, training=training), digits, store, device=CPU)
    written = store.read("forgotten_images").to_pylist()
    by_mode = {
        mode: {r["example_id"]: r for r in rows}
        for mode in ("tied", "dropped")
        if (rows := [r for r in store.read("examples").to_pylist() if (r["mode"], r["split"]) == (mode, "train")])
    }
    expected = sorted(
        (by_mode["dropped"][i]["margin"], i)
        for i, before in by_mode["tied"].items()
        if not before["is_noisy"] and before["prediction"] == before["assigned"] != by_mode["dropped"][i]["prediction"]
    )
    assert expected  # after two epochs some are
    assert [(r["margin"], r["example_id"]) for r in written] == expected[:MOST]
    for row in written:
        position = digits.train.ids.tolist().index(row["example_id"])
        assert row["assigned"] == row["original"] == digits.train.labels[position]
        assert row["new_name"] == digits.class_names[row["new_prediction"]]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["png"]))), digits.train.images[position, 0].numpy())


def test_a_run_without_example_tied_dropout_writes_none(digits, small_run, tmp_path):
    store = create_results(tmp_path)
    training = replace(small_run.training, epochs=1)
    perform_run(
        replace(small_run, dropout=DropoutConfig(kind="sparse", p_gen=0.5), training=training),
        digits,
        store,
        device=CPU,
    )
    assert store.read("forgotten_images").num_rows == 0
