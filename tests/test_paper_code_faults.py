"""Each fault of the paper's released code is pinned here, as the part that could repeat it is written."""

from dataclasses import replace

import torch
from torch import nn

from memlib.checkpoints import Checkpoint
from memlib.config import DropoutConfig, ModelConfig
from memlib.example_tied_dropout import ExampleTiedDropout, dropout_layers, set_mode, tie
from memlib.experiments import RetrainingConfig
from memlib.gradient_accounting import add_to_sums_, split_gradients, zero_sums
from memlib.grouping import layer_groups
from memlib.label_noise import flip_labels
from memlib.layer_units import perform_retraining, plan_retraining
from memlib.models import ResNet9, build_model
from memlib.retraining import Retraining, retrain
from memlib.runs import build_network, prepare_data
from memlib.seeds import stream
from memlib.training import training_step
from memlib.training_state import TrainingState


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


def test_example_tied_dropout_stores_no_masks_whatever_the_number_of_examples():
    """The released code stored a float mask of [examples, channels, height, width] a layer: 15 GB for the first."""
    layer = ExampleTiedDropout(name="first")
    for ids in (torch.tensor([0, 1]), torch.tensor([2**63 - 1, 2**62])):
        assert layer(torch.ones(2, 64, 4, 4), ids).shape == (2, 64, 4, 4)
    held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert held + list(layer.state_dict().values()) == []


def test_an_example_first_met_late_has_a_mask_too():
    """The released code filled its table in the first epoch only; an example met later was zero in silence."""
    layer = ExampleTiedDropout(p_mem=0.5, name="first")
    layer(torch.ones(2, 64), torch.tensor([0, 1]))
    assert layer(torch.ones(1, 64), torch.tensor([1_000_000])).sum() > 13


def test_layers_of_different_shape_share_nothing():
    """The released code was one module for all layers."""
    tied = tie(ResNet9(in_channels=1, num_classes=3, width=0.125))
    layers = dropout_layers(tied)
    assert len(set(map(id, layers))) == len({layer.key for layer in layers}) == 6


def test_masks_leave_the_global_random_stream_alone():
    """The released code reseeded the global generator for every example."""
    before = torch.get_rng_state()
    ExampleTiedDropout(name="first")(torch.ones(2, 64), torch.tensor([0, 1]))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluating_edits_no_activation_in_place():
    """The released code overwrote the caller's tensor in its evaluation modes."""
    layer = ExampleTiedDropout(name="first")
    for mode in ("scaled", "dropped"):
        set_mode(layer, mode)
        activations = torch.ones(2, 64)
        layer(activations)
        assert (activations == 1).all()


def test_a_run_has_example_tied_dropout_where_its_settings_ask_for_it(digits, small_run):
    """In the released code no script did: the line that would was commented out."""
    config = replace(small_run, dropout=DropoutConfig(kind="example_tied", p_gen=0.3))
    assert len(dropout_layers(build_network(config, digits))) == 6


def test_no_tensor_of_the_vit_lies_in_two_groups_and_no_buffer_in_none():
    """The released groups, typed by hand, had one ViT tensor twice and left every BatchNorm buffer out."""
    for name in ("vit", "resnet9", "resnet50"):
        model = build_model(ModelConfig(name=name), image_shape=(3, 32, 32), num_classes=10, seed=0)
        groups = layer_groups(model)
        members = [n for part in (groups.parameters, groups.buffers) for names in part.values() for n in names]
        assert sorted(members) == sorted(model.state_dict())


def test_retraining_on_clean_examples_never_touches_a_noisy_one(digits, small_run, monkeypatch):
    """The released script passed the inverted mask, so it trained on the noisy examples."""
    retrained = []

    def remember(*given, **named):
        retrained.append(retrain(*given, **named))
        return retrained[-1]

    monkeypatch.setattr("memlib.layer_units.retrain", remember)
    data = prepare_data(small_run, digits)
    noisy_positions = data.noisy_labels.is_noisy.nonzero().squeeze(1)
    spoiled = data.train.images.clone()
    spoiled[noisy_positions] = 255 - spoiled[noisy_positions]
    model = build_model(small_run.model, image_shape=digits.image_shape, num_classes=10, seed=0)
    clean, noisy = plan_retraining(
        small_run, RetrainingConfig(on=("clean", "noisy"), epochs=1, batch_size=8), ["conv3"]
    )
    for task in (clean, noisy):
        for images in (data.train.images, spoiled):
            changed = replace(data, train=replace(data.train, images=images))
            perform_retraining(task, model, changed, lambda epoch: Checkpoint(model.state_dict(), {}))
    weights = [found.model.state_dict() for found in retrained]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[2][name], weights[3][name]) for name in weights[2])


def test_retraining_freezes_every_other_group_for_real(digits, small_run):
    """The released script set `requires_grad` on tensors of a state dictionary, which freezes nothing."""
    model = build_model(small_run.model, image_shape=digits.image_shape, num_classes=10, seed=0)
    examples = (digits.train.images[:64], digits.train.labels[:64])
    how = Retraining(config=RetrainingConfig(epochs=1, batch_size=32, peak_lr=0.1))
    after = retrain(model, model.state_dict(), ["conv3"], examples, {"clean": examples}, how=how).model.state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, after[name])}
    groups = layer_groups(model)
    assert moved == {*groups.parameters["conv3"], *groups.buffers["conv3"]}
