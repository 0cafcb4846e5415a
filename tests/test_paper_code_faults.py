"""Each fault of the paper's released code is pinned here, as the part that could repeat it is written."""

import torch
from torch import nn

from memlib.config import ModelConfig
from memlib.gradient_accounting import add_to_sums_, split_gradients, zero_sums
from memlib.label_noise import flip_labels
from memlib.layer_groups import layer_groups
from memlib.models import build_model
from memlib.seeds import stream
from memlib.training import TrainingState, training_step


def test_every_wrong_label_is_drawn_and_all_equally_often():
    """The released code never drew the last of the K-1 wrong labels, (label + K - 1) % K."""
    num_classes, n = 10, 100_000
    labels = torch.arange(n) % num_classes
    noisy = flip_labels(labels, num_classes=num_classes, fraction=0.9, generator=stream(0, "label_noise"))
    offsets = torch.bincount((noisy.labels - labels)[noisy.is_noisy] % num_classes, minlength=num_classes)
    assert offsets[0] == 0
    expected = 0.9 * n / (num_classes - 1)  # 10,000 each, standard deviation 94
    assert ((offsets[1:] - expected).abs() < 500).all(), offsets.tolist()


def test_a_step_takes_one_forward_and_two_backward_passes():
    """The released code took a third backward pass."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    passes = []
    model[1].register_forward_hook(lambda *_: passes.append("forward"))
    model[1].weight.register_hook(lambda _: passes.append("backward"))
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), "float32")
    batch = (torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, False, False]))
    training_step(state, batch, device=torch.device("cpu"))
    assert passes == ["forward", "backward", "backward"]


def test_accumulated_gradients_stay_on_the_device_of_the_parameters():
    """The released code copied every gradient to the CPU at every step; meta tensors cannot be copied."""
    layer = nn.Linear(4, 3, device="meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    is_noisy = torch.zeros(2, dtype=torch.bool, device="meta")
    logits = layer(torch.zeros(2, 4, device="meta"))
    _, gradients = split_gradients(logits, labels, is_noisy, list(layer.parameters()))
    sums = zero_sums(list(layer.parameters()))
    add_to_sums_(sums, gradients)
    assert {g.device.type for g in (*sums.clean, *sums.noisy)} == {"meta"}


def test_a_batch_without_noisy_examples_is_no_nan():
    """In the released code the mean over no examples turned the epoch's sum into NaN."""
    layer = nn.Linear(4, 3)
    logits, labels = layer(torch.rand(2, 4)), torch.tensor([0, 1])
    _, gradients = split_gradients(logits, labels, torch.zeros(2, dtype=torch.bool), list(layer.parameters()))
    assert all((g == 0).all() for g in gradients.noisy)


def test_no_tensor_of_the_vit_lies_in_two_groups_and_no_buffer_in_none():
    """The released groups, typed by hand, had one ViT tensor twice and left every BatchNorm buffer out."""
    for name in ("vit", "resnet9", "resnet50"):
        model = build_model(ModelConfig(name=name), image_shape=(3, 32, 32), num_classes=10, seed=0)
        groups = layer_groups(model)
        members = [n for part in (groups.parameters, groups.buffers) for names in part.values() for n in names]
        assert sorted(members) == sorted(model.state_dict())
