"""Retraining one group against a plain loop over the whole network, and against what must not move."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlib import prefix_outputs, prefixes
from memlib.batches import normalize, split_order
from memlib.config import ModelConfig
from memlib.errors import InputError
from memlib.experiments import RetrainingConfig
from memlib.grouping import layer_groups
from memlib.models import build_model
from memlib.prefixes import run_prefix
from memlib.retraining import Retraining, retrain
from memlib.schedules import learning_rate
from memlib.seeds import stream
from memlib.training import Diverged

CONFIG = RetrainingConfig(epochs=3, batch_size=16, peak_lr=0.05)


def build(name="resnet9", seed=0, size=16):
    width = 0.0625 if name == "resnet9" else 1.0
    return build_model(ModelConfig(name=name, width=width), image_shape=(1, size, size), num_classes=10, seed=seed)


@pytest.fixture
def examples(digits):
    return digits.train.images[:50], digits.train.labels[:50]


@pytest.fixture
def splits(digits):
    return {
        "clean": (digits.train.images[:50], digits.train.labels[:50]),
        "test": (digits.test.images, digits.test.labels),
    }


def plain_retraining(model, earlier, group, examples, config, seed):
    """The obvious way: the whole network in every step, evaluation mode outside the group."""
    model, groups = copy.deepcopy(model), layer_groups(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in (*groups.parameters[group], *groups.buffers[group]):
            tensors[name].copy_(earlier[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in groups.parameters[group])
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=5e-4
    )
    images, labels = examples
    steps = len(split_order(torch.arange(len(labels)), config.batch_size))
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(len(labels), generator=stream(seed, "retraining_order", epoch))
        for index, batch in enumerate(split_order(order, config.batch_size)):
            step = (epoch - 1) * steps + index
            optimizer.param_groups[0]["lr"] = learning_rate(config, step=step, steps=config.epochs * steps)
            model.eval()
            model.get_submodule(group).train()
            optimizer.zero_grad()
            F.cross_entropy(model(normalize(images[batch])), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("group", ["conv1", "residual1.second", "conv3", "conv4", "classifier"])
@pytest.mark.parametrize("memory_budget", [0, 2**30])
def test_retraining_behind_kept_prefix_outputs_equals_training_through_the_whole_network(
    examples, splits, group, memory_budget
):
    model, earlier = build(), build(seed=7).state_dict()
    how = Retraining(config=CONFIG, seed=3, memory_budget=memory_budget)
    found = retrain(model, earlier, [group], examples, splits, how=how)
    expected = plain_retraining(model, earlier, group, examples, CONFIG, seed=3)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    last = {r.split: r.accuracy for r in found.curve if r.epoch == CONFIG.epochs}
    for split, (images, labels) in splits.items():
        with torch.no_grad():
            assert last[split] == (expected(normalize(images)).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "vit"])
def test_every_frozen_parameter_and_buffer_stays_bit_identical_and_the_group_moves(digits, name):
    size = 16 if name != "resnet50" else 32
    model, earlier = build(name, size=size), build(name, seed=7, size=size).state_dict()
    images = digits.train.images[:12].repeat_interleave(size // 16, 2).repeat_interleave(size // 16, 3)
    labels = digits.train.labels[:12]
    groups = layer_groups(model)
    group = groups.names[-3]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = retrain(
        model,
        earlier,
        [group],
        (images, labels),
        {"clean": (images, labels)},
        how=Retraining(config=replace(CONFIG, epochs=1)),
    )
    inside = {*groups.parameters[group], *groups.buffers[group]}
    for tensor_name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, before[tensor_name]) == (tensor_name not in inside), tensor_name
        assert torch.equal(model.state_dict()[tensor_name], before[tensor_name])
    assert all(p.requires_grad and p.grad is None for p in [*found.model.parameters(), *model.parameters()])


def test_dropout_of_a_frozen_group_is_off_and_that_of_the_learning_group_follows_from_the_seed(digits):
    model, earlier = build("vit"), build("vit", seed=7).state_dict()
    data = (digits.train.images[:12], digits.train.labels[:12])
    how = Retraining(config=replace(CONFIG, epochs=1, batch_size=6), seed=5)
    global_state = torch.get_rng_state()
    first = retrain(model, earlier, ["block6"], data, {"clean": data}, how=how)
    torch.rand(3)
    second = retrain(model, earlier, ["block6"], data, {"clean": data}, how=how)
    other = retrain(model, earlier, ["block6"], data, {"clean": data}, how=replace(how, seed=6))
    same = [torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))
    torch.set_rng_state(global_state)


def test_the_curve_begins_with_the_reset_model_before_any_training(examples, splits):
    model, earlier = build(), build(seed=7).state_dict()
    found = retrain(model, earlier, ["conv2"], examples, splits, how=Retraining(config=CONFIG))
    reset, groups = copy.deepcopy(model).eval(), layer_groups(model)
    inside = {n: earlier[n] for n in (*groups.parameters["conv2"], *groups.buffers["conv2"])}
    reset.load_state_dict(inside, strict=False)
    with torch.no_grad():
        expected = (reset(normalize(examples[0])).argmax(1) == examples[1]).double().mean().item()
    assert [r.accuracy for r in found.curve if (r.epoch, r.split) == (0, "clean")] == [expected]
    assert [(r.epoch, r.split, r.n) for r in found.curve] == [
        (epoch, split, n) for epoch in range(4) for split, n in (("clean", 50), ("test", 60))
    ]


def test_it_stops_after_the_patience_of_perfect_epochs(examples, splits):
    model = build().eval()
    with torch.no_grad():
        known = (examples[0], model(normalize(examples[0])).argmax(1))  # what it says already
    how = Retraining(config=replace(CONFIG, epochs=40, patience=2, peak_lr=1e-9))
    found = retrain(model, model.state_dict(), ["classifier"], known, splits, how=how)
    assert max(r.epoch for r in found.curve) == 2


def test_bad_input_is_named_before_anything_is_computed(examples, splits):
    model, earlier = build(), build(seed=7).state_dict()
    with pytest.raises(InputError, match="layer group 'conv5' is not known"):
        retrain(model, earlier, ["conv5"], examples, splits)
    with pytest.raises(InputError, match="does not belong to this ResNet9"):
        retrain(model, nn.Linear(2, 2).state_dict(), ["conv1"], examples, splits)
    with pytest.raises(InputError, match="split 'noisy' has 0 images"):
        retrain(model, earlier, ["conv1"], examples, {"noisy": (examples[0][:0], examples[1][:0])})
    with pytest.raises(Diverged, match=r"epoch 1 of retraining; lower retraining.peak_lr \(now 1e\+30\)"):
        how = Retraining(config=replace(CONFIG, peak_lr=1e30, warmup=0.0))
        retrain(model, earlier, ["conv1"], examples, splits, how=how)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"epochs": 0}, "retraining.epochs is 0"),
        ({"batch_size": 1}, "retraining.batch_size is 1"),
        ({"peak_lr": 0.0}, "retraining.peak_lr is 0.0"),
        ({"warmup": 1.0}, "retraining.warmup is 1.0"),
        ({"on": ()}, r"retraining.on is \[\]"),
        ({"limit": 0}, "retraining.limit is 0"),
    ],
)
def test_settings_out_of_range_are_named(wrong, text):
    with pytest.raises(InputError, match=text):
        RetrainingConfig(**wrong)


def test_images_that_are_trained_on_and_measured_on_pass_the_frozen_prefix_once(examples, monkeypatch):
    runs = []

    def count(model, crossing, inputs):
        runs.append(len(inputs))
        return run_prefix(model, crossing, inputs)

    monkeypatch.setattr("memlib.prefix_outputs.run_prefix", count)
    splits = {"clean": examples, "as it was": (examples[0], examples[1].flip(0))}
    retrain(build(), build(seed=7).state_dict(), ["conv4"], examples, splits, how=Retraining(config=CONFIG))
    assert sorted(runs) == [2, 50]  # two to see how large the outputs are


def test_images_that_do_not_fit_into_memory_together_change_nothing(examples, splits, monkeypatch):
    model, earlier = build(), build(seed=7).state_dict()
    how = Retraining(config=replace(CONFIG, epochs=1))
    expected = retrain(model, earlier, ["conv3"], examples, splits, how=how)
    run, call, sizes = prefixes.run_prefix, prefixes.Suffix.__call__, []

    def refuse(inputs):
        sizes.append(len(inputs))
        if len(inputs) > 20:  # a batch of 16 fits
            raise torch.OutOfMemoryError("CUDA out of memory")

    def run_short(model, crossing, inputs):
        refuse(inputs)
        return run(model, crossing, inputs)

    def call_short(suffix, boundary, inputs, state=None):
        refuse(inputs)
        return call(suffix, boundary, inputs, state)

    monkeypatch.setattr(prefix_outputs, "run_prefix", run_short)
    monkeypatch.setattr(prefixes.Suffix, "__call__", call_short)
    assert retrain(model, earlier, ["conv3"], examples, splits, how=how).curve == expected.curve
    assert max(sizes) == 60  # it was tried, and refused


def test_without_memory_for_the_prefix_outputs_they_are_computed_batch_by_batch(examples, splits, monkeypatch):
    model, earlier = build(), build(seed=7).state_dict()
    how = Retraining(config=replace(CONFIG, epochs=1))
    expected = retrain(model, earlier, ["conv3"], examples, splits, how=how)

    def refuse(output, n):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prefix_outputs, "_empty_like", refuse)
    assert retrain(model, earlier, ["conv3"], examples, splits, how=how).curve == expected.curve


def test_parameters_of_the_group_that_are_frozen_stay_so_unless_all_are(examples, splits):
    model, earlier = build(), build(seed=7).state_dict()
    how = Retraining(config=replace(CONFIG, epochs=1))
    model.conv3.norm.weight.requires_grad_(False)
    learned = retrain(model, earlier, ["conv3"], examples, splits, how=how).model
    assert torch.equal(learned.conv3.norm.weight, earlier["conv3.norm.weight"])
    assert not torch.equal(learned.conv3.conv.weight, earlier["conv3.conv.weight"])
    model.requires_grad_(False)  # as to use it
    learned = retrain(model, earlier, ["conv3"], examples, splits, how=how).model
    assert not torch.equal(learned.conv3.norm.weight, earlier["conv3.norm.weight"])
