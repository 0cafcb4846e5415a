from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlib.config import NoiseConfig
from memlib.errors import InputError
from memlib.label_noise import add_label_noise, flip_labels, flip_labels_in_pairs, next_class_pairs
from memlib.seeds import stream


def labels_of(n: int, num_classes: int) -> torch.Tensor:
    return torch.randint(num_classes, (n,), generator=stream(1, "test_labels"))


fractions = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)


@given(n=st.integers(0, 300), num_classes=st.integers(2, 12), fraction=fractions, seed=st.integers(0, 99))
def test_exactly_the_requested_share_is_mislabeled(n, num_classes, fraction, seed):
    labels = labels_of(n, num_classes)
    noisy = flip_labels(labels, num_classes=num_classes, fraction=fraction, generator=stream(seed, "label_noise"))
    assert int(noisy.is_noisy.sum()) == int(Decimal(str(fraction)) * n)
    assert torch.equal(noisy.is_noisy, noisy.labels != labels)
    assert torch.equal(noisy.original, labels)
    assert all(0 <= label < num_classes for label in noisy.labels.tolist())


@pytest.mark.parametrize(("fraction", "n", "expected"), [(0.29, 100, 29), (0.57, 100, 57), (0.1, 19, 1), (0.0, 9, 0)])
def test_the_share_is_rounded_down_in_decimal_arithmetic(fraction, n, expected):
    noisy = flip_labels(labels_of(n, 3), num_classes=3, fraction=fraction, generator=stream(0, "label_noise"))
    assert int(noisy.is_noisy.sum()) == expected


def test_symmetric_noise_equals_its_slow_twin():
    labels = labels_of(50, 7)
    noisy = flip_labels(labels, num_classes=7, fraction=0.3, generator=stream(3, "label_noise"))

    generator = stream(3, "label_noise")
    chosen = torch.randperm(50, generator=generator).tolist()[:15]
    steps = torch.randint(1, 7, (15,), generator=generator).tolist()
    expected = labels.tolist()
    for example, step in zip(chosen, steps, strict=True):
        others = [(labels[example].item() + k) % 7 for k in range(1, 7)]
        expected[example] = others[step - 1]
    assert noisy.labels.tolist() == expected


def test_every_example_is_equally_likely_to_be_mislabeled():
    times = torch.zeros(40)
    for seed in range(1000):
        times += flip_labels(
            labels_of(40, 4), num_classes=4, fraction=0.25, generator=stream(seed, "label_noise")
        ).is_noisy
    assert times.min() > 190 and times.max() < 310  # 250 expected, standard deviation 14


def test_noise_is_a_function_of_the_seed():
    labels = labels_of(200, 10)
    first, again, other = (
        flip_labels(labels, num_classes=10, fraction=0.5, generator=stream(seed, "label_noise")) for seed in (5, 5, 6)
    )
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)


@pytest.mark.parametrize("noise", [NoiseConfig(fraction=0.2), NoiseConfig(fraction=0.2, kind="asymmetric")])
def test_drawing_noise_leaves_the_global_random_stream_and_its_input_untouched(noise):
    labels = labels_of(100, 5)
    before, state = labels.clone(), torch.random.get_rng_state()
    add_label_noise(labels, noise, num_classes=5, generator=stream(0, "label_noise"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(labels, before)


@given(n=st.integers(0, 200), num_classes=st.integers(2, 8), fraction=fractions, seed=st.integers(0, 99))
def test_every_class_can_get_the_next_one_as_its_wrong_label(n, num_classes, fraction, seed):
    labels = labels_of(n, num_classes)
    noise = NoiseConfig(fraction=fraction, kind="asymmetric")
    noisy = add_label_noise(labels, noise, num_classes=num_classes, generator=stream(seed, "label_noise"))
    assert int(noisy.is_noisy.sum()) == int(Decimal(str(fraction)) * n)
    for label, original, is_noisy in zip(noisy.labels.tolist(), labels.tolist(), noisy.is_noisy.tolist(), strict=True):
        assert label == ((original + 1) % num_classes if is_noisy else original)


def test_pairs_mislabel_only_examples_of_their_first_classes_but_count_the_whole_set():
    labels = torch.arange(100) % 5
    noise = NoiseConfig(fraction=0.3, kind="asymmetric", pairs=((1, 4), (3, 0)))
    noisy = add_label_noise(labels, noise, num_classes=5, generator=stream(0, "label_noise"))
    assert int(noisy.is_noisy.sum()) == 30
    changes = set(zip(labels[noisy.is_noisy].tolist(), noisy.labels[noisy.is_noisy].tolist(), strict=True))
    assert changes == {(1, 4), (3, 0)}


def test_next_class_pairs_close_the_circle():
    assert next_class_pairs(3) == ((0, 1), (1, 2), (2, 0))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((0, 0),), r"noise.pairs has \(0, 0\), which changes nothing; give two classes"),
        (((0, 1), (0, 2)), "gives class 0 two wrong classes; list each first class once"),
        (((0, 3),), r"noise.pairs has \(0, 3\), but there are 3 classes; give indices from 0 to 2"),
        (((-1, 0),), r"noise.pairs has \(-1, 0\), but there are 3 classes"),
        (((2, 0),), "asks for 4 wrong labels, but the first classes of noise.pairs have 3 examples"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(pairs, message):
    with pytest.raises(InputError, match=message):
        flip_labels_in_pairs(
            torch.arange(9) % 3, num_classes=3, pairs=pairs, fraction=0.5, generator=stream(0, "label_noise")
        )


@pytest.mark.parametrize(
    ("num_classes", "fraction", "message"),
    [
        (1, 0.1, "label noise needs a wrong class to draw, but there is 1 class; give at least 2"),
        (2, 0.1, "labels run from 0 to 2, but there are 2 classes; give labels from 0 to 1"),
        (3, 1.0, r"noise.fraction is 1.0; give a share of the training set in \[0, 1\)"),
        (3, -0.1, "noise.fraction is -0.1"),
    ],
)
@pytest.mark.parametrize("pairs", [None, ((0, 1),)])
def test_noise_that_cannot_be_drawn_is_refused(num_classes, fraction, message, pairs):
    labels, settings = torch.arange(9) % 3, {"num_classes": num_classes, "fraction": fraction}
    with pytest.raises(InputError, match=message):
        if pairs is None:
            flip_labels(labels, generator=stream(0, "label_noise"), **settings)
        else:
            flip_labels_in_pairs(labels, pairs=pairs, generator=stream(0, "label_noise"), **settings)
