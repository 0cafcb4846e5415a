import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from memlib.augmentation import OPERATIONS, POLICY, SIGNED, augment, draw_augmentation
from memlib.seeds import stream

ALL_STEPS = ("crop", "flip", "autoaugment")


def images_of(n: int, channels: int = 3, height: int = 12, width: int = 12) -> torch.Tensor:
    shape = (n, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=stream(0, "test_images"))


def draws_of(n: int, *steps, seed: int = 0):
    return draw_augmentation(n, steps, generator=stream(seed, "augmentation", 1))


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 5, 9)])
def test_a_crop_is_a_window_of_the_image_padded_with_four_black_pixels(channels, height, width):
    images, draws = images_of(40, channels, height, width), draws_of(40, "crop")
    cropped = augment(images, draws)
    for image, crop, (row, column) in zip(images, cropped, draws.crop.tolist(), strict=True):
        padded = torch.zeros(channels, height + 8, width + 8, dtype=torch.uint8)
        padded[:, 4 : 4 + height, 4 : 4 + width] = image
        assert torch.equal(crop, padded[:, row : row + height, column : column + width])


def test_crops_begin_at_each_of_nine_rows_and_columns_alike():
    begins = draws_of(9000, "crop").crop
    for axis in range(2):
        counts = torch.bincount(begins[:, axis])
        assert len(counts) == 9
        assert counts.min() > 850 and counts.max() < 1150  # 1000 expected, standard deviation 30


def test_half_of_the_images_are_mirrored_left_to_right():
    images, draws = images_of(2000, 1, 2, 3), draws_of(2000, "flip")
    flipped = augment(images, draws)
    for image, result, flip in zip(images, flipped, draws.flip.tolist(), strict=True):
        assert torch.equal(result, image[:, :, [2, 1, 0]] if flip else image)
    assert 900 < int(draws.flip.sum()) < 1100


def test_the_autoaugment_policy_is_torchvisions_for_cifar10():
    assert list(POLICY) == AutoAugment(AutoAugmentPolicy.CIFAR10)._policies


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 8, 13)])
def test_autoaugment_equals_torchvisions_operations_on_one_image_at_a_time(channels, height, width):
    images, draws = images_of(200, channels, height, width), draws_of(200, "autoaugment")
    # low contrast, so that stretching it shows
    images = images // 2 + 30
    augmented = augment(images, draws)
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)
    for image, result, operations in zip(images, augmented, draws.operations.tolist(), strict=True):
        for operation in operations:
            if operation >= 0:
                name, level = OPERATIONS[operation // 2]
                levels, signed = theirs._AUGMENTATION_SPACE[name]
                magnitudes = levels(10, height, width)
                magnitude = 0.0 if magnitudes is None else float(magnitudes[level])
                if operation % 2:
                    assert signed
                    magnitude *= -1
                image = theirs._apply_image_or_video_transform(
                    image, name, magnitude, interpolation=InterpolationMode.NEAREST, fill=theirs._fill
                )
        assert torch.equal(result, image)


def test_autoaugment_applies_each_operation_as_often_as_its_policy_says():
    n = 50_000
    operations = draws_of(n, "autoaugment").operations
    for slot in range(2):
        expected = {}
        for pair in POLICY:
            name, probability, level = pair[slot]
            for sign in range(2) if name in SIGNED else [0]:
                number = 2 * OPERATIONS.index((name, level or 0)) + sign
                share = probability / len(POLICY) / (2 if name in SIGNED else 1)
                expected[number] = expected.get(number, 0) + share
        found = {number: int((operations[:, slot] == number).sum()) / n for number in range(2 * len(OPERATIONS))}
        assert found == pytest.approx({number: expected.get(number, 0) for number in found}, abs=0.005)


def test_colour_operations_leave_grey_images_alone():
    images, draws = images_of(50, channels=1), draws_of(50, "autoaugment")
    colour = [2 * i for i, (name, _) in enumerate(OPERATIONS) if name == "Color"]
    draws.operations[:] = colour[-1]
    assert torch.equal(augment(images, draws), images)


@settings(max_examples=25)
@given(order=st.permutations(range(12)), batch_size=st.integers(1, 12), channels=st.sampled_from([1, 3]))
def test_what_an_example_becomes_does_not_depend_on_batch_order_or_size(order, batch_size, channels):
    images, draws = images_of(12, channels), draws_of(12, *ALL_STEPS)
    together = augment(images, draws)
    for indices in torch.tensor(order).split(batch_size):
        assert torch.equal(augment(images[indices], draws.take(indices)), together[indices])


def test_the_draws_of_a_step_do_not_depend_on_the_other_steps():
    together = draws_of(30, *ALL_STEPS)
    assert torch.equal(draws_of(30, "crop").crop, together.crop)
    assert torch.equal(draws_of(30, "flip").flip, together.flip)
    assert torch.equal(draws_of(30, "autoaugment", "flip").operations, together.operations)


def test_draws_are_a_function_of_the_seed():
    assert torch.equal(draws_of(100, "crop").crop, draws_of(100, "crop").crop)
    assert not torch.equal(draws_of(100, "crop").crop, draws_of(100, "crop", seed=1).crop)


def test_no_steps_give_a_copy():
    images = images_of(3)
    result = augment(images, draws_of(3))
    assert torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


def test_augmenting_leaves_its_input_and_the_global_random_stream_untouched():
    images = images_of(60)
    before, state = images.clone(), torch.random.get_rng_state()
    augment(images, draws_of(60, *ALL_STEPS))
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_on_a_gpu_equals_that_on_the_cpu(channels):
    device = torch.device("cuda")
    images, draws = images_of(500, channels, 32, 32), draws_of(500, *ALL_STEPS)
    on_gpu = augment(images.to(device), draws.to(device))
    difference = (on_gpu.cpu().int() - augment(images, draws).int()).abs()
    assert (difference > 1).float().mean() < 1e-3  # rounding may move a pixel of a rotated image
