import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memlib.batches import epoch_order, images_as_trained, normalize, split_order, steps_per_epoch, training_batches
from memlib.config import TrainingConfig
from memlib.recalibration import recalibrate

CPU = torch.device("cpu")


def test_the_order_is_a_function_of_seed_and_epoch():
    assert torch.equal(epoch_order(50, seed=0, epoch=3), epoch_order(50, seed=0, epoch=3))
    assert not torch.equal(epoch_order(50, seed=0, epoch=3), epoch_order(50, seed=0, epoch=4))
    assert not torch.equal(epoch_order(50, seed=0, epoch=3), epoch_order(50, seed=1, epoch=3))


@given(n=st.integers(2, 200), batch_size=st.integers(2, 64))
def test_an_epoch_visits_every_example_once_and_never_in_a_batch_of_one(n, batch_size):
    batches = split_order(epoch_order(n, seed=1, epoch=1), batch_size)
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert all(len(b) >= 2 for b in batches)
    assert len(batches) == steps_per_epoch(n, batch_size)


def test_pixels_are_scaled_to_mean_and_standard_deviation_one_half():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = (images.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(normalize(images), expected)
    assert normalize(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).is_contiguous(memory_format=torch.channels_last)


def test_a_batch_holds_the_images_of_its_positions():
    images = torch.randint(0, 256, (20, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(batch_size=8)
    for positions, inputs in training_batches(images, config, seed=0, epoch=1, device=CPU):
        torch.testing.assert_close(inputs, normalize(images[positions]))


def test_images_as_trained_are_shuffled_and_augmented_once_where_training_augments():
    images = torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8)
    shuffled = images_as_trained(images, TrainingConfig(), seed=0)
    assert not torch.equal(shuffled, images)
    assert sorted(image.tolist() for image in shuffled) == sorted(image.tolist() for image in images)
    how = TrainingConfig(augment=("flip",))
    flipped = images_as_trained(images, how, seed=0)
    kinds = [(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(flipped, shuffled, strict=True)]
    assert set(kinds) == {(True, False), (False, True)}
    assert torch.equal(images_as_trained(images, how, seed=0), flipped)
    assert not torch.equal(images_as_trained(images, how, seed=1), flipped)


def test_statistics_of_images_sorted_by_class_are_those_of_mixed_batches():
    """A folder's images are sorted by class; in batches of one class the spread between classes is lost."""
    dark_then_bright = torch.cat([torch.full((1000, 1, 12, 12), value, dtype=torch.uint8) for value in (50, 200)])
    images = images_as_trained(dark_then_bright, TrainingConfig(), seed=0)
    network = recalibrate(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()), images, device=CPU)
    assert network[0].running_var.item() == pytest.approx(normalize(dark_then_bright).var().item(), rel=0.02)


def test_what_augmentation_makes_of_an_example_does_not_depend_on_the_batch_size():
    images = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def augmented(batch_size, epoch):
        config = TrainingConfig(batch_size=batch_size, augment=("crop", "flip"))
        made = torch.empty(20, 3, 12, 12)
        for positions, inputs in training_batches(images, config, seed=0, epoch=epoch, device=CPU):
            made[positions] = inputs
        return made

    assert torch.equal(augmented(4, epoch=1), augmented(20, epoch=1))
    assert not torch.equal(augmented(4, epoch=1), augmented(4, epoch=2))
