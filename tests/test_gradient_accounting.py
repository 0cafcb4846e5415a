"""Gradient accounting against the slow, obvious way: separate networks, separate losses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memlib.errors import InputError
from memlib.gradient_accounting import add_to_sums_, split_gradients, summarize_groups, zero_sums
from memlib.grouping import layer_groups
from memlib.models import ResNet9


def example(n=12, share_noisy=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 12, 12, generator=generator)
    labels = torch.randint(0, 4, (n,), generator=generator)
    is_noisy = torch.rand(n, generator=generator) < share_noisy
    return images, labels, is_noisy


def network():
    return ResNet9(in_channels=1, num_classes=4, width=0.0625)


def gradient_of(model, images, labels, chosen):
    """The gradient of the chosen examples' share of the batch-mean loss, on a copy of the model."""
    model = copy.deepcopy(model)
    losses = [F.cross_entropy(out[None], y[None]) for out, y in zip(model(images), labels, strict=True)]
    total = sum((loss for loss, use in zip(losses, chosen, strict=True) if use), start=torch.zeros(()))
    if total.requires_grad:
        (total / len(labels)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@given(share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 20))
@settings(max_examples=12)
def test_the_split_equals_two_separate_gradient_computations(share, seed):
    model = network()
    images, labels, is_noisy = example(share_noisy=share, seed=seed)
    expected_clean = gradient_of(model, images, labels, ~is_noisy)
    expected_noisy = gradient_of(model, images, labels, is_noisy)
    _, got = split(model, images, labels, is_noisy)
    torch.testing.assert_close(list(got.clean), expected_clean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(list(got.noisy), expected_noisy, rtol=1e-4, atol=1e-6)


def test_clean_and_noisy_add_up_to_the_gradient_of_the_batch_mean_loss():
    model = network()
    images, labels, is_noisy = example()
    loss, got = split(model, images, labels, is_noisy)
    whole = F.cross_entropy(model(images), labels)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    torch.testing.assert_close(loss, whole.detach())
    for clean, noisy, both in zip(got.clean, got.noisy, expected, strict=True):
        torch.testing.assert_close(clean + noisy, both, rtol=1e-4, atol=1e-6)


def test_a_batch_without_noisy_examples_adds_zero_and_never_nan():
    model = network()
    images, labels, _ = example()
    _, got = split(model, images, labels, torch.zeros(len(labels), dtype=torch.bool))
    assert all((g == 0).all() for g in got.noisy)
    assert any((g != 0).any() for g in got.clean)


def test_a_parameter_without_influence_gets_zeros():
    model = nn.ModuleDict({"used": nn.Linear(2, 3), "unused": nn.Linear(2, 3)})
    logits = model["used"](torch.ones(4, 2))
    labels, is_noisy = torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, False, False])
    _, got = split_gradients(logits, labels, is_noisy, list(model.parameters()))
    assert (got.clean[2] == 0).all()
    assert (got.noisy[3] == 0).all()


def test_an_epoch_is_summarized_as_norms_and_cosine_of_the_summed_gradients():
    model = network()
    groups, names = layer_groups(model), [name for name, _ in model.named_parameters()]
    sums = zero_sums(list(model.parameters()))
    batches = [split(model, *example(seed=seed))[1] for seed in range(3)]
    for batch in batches:
        add_to_sums_(sums, batch)
    for got in summarize_groups(sums, names, groups):
        chosen = [names.index(name) for name in groups.parameters[got.group]]
        clean = torch.cat([sum(b.clean[i] for b in batches).flatten() for i in chosen]).double()
        noisy = torch.cat([sum(b.noisy[i] for b in batches).flatten() for i in chosen]).double()
        assert got.clean_norm == pytest.approx(clean.norm().item(), rel=1e-5)
        assert got.noisy_norm == pytest.approx(noisy.norm().item(), rel=1e-5)
        assert got.total_norm == pytest.approx((clean + noisy).norm().item(), rel=1e-5)
        assert got.cosine == pytest.approx(F.cosine_similarity(clean, noisy, dim=0).item(), abs=1e-5)
        assert got.n_parameters == len(clean)


def test_without_noise_there_is_no_cosine():
    parameters = [nn.Parameter(torch.ones(2))]
    sums = zero_sums(parameters)
    module = nn.Module()
    module.weight = parameters[0]
    (summary,) = summarize_groups(sums, ["weight"], layer_groups(module))
    assert summary.cosine is None
    assert summary.noisy_norm == 0


def split(model, images, labels, is_noisy):
    model = copy.deepcopy(model)
    return split_gradients(model(images), labels, is_noisy, list(model.parameters()))


def test_a_parameter_without_a_gradient_is_named():
    model = network()
    images, labels, is_noisy = example()
    some = dict(list(model.named_parameters())[1:])
    _, gradients = split_gradients(model(images), labels, is_noisy, list(some.values()))
    with pytest.raises(InputError, match=r"no gradient is given of conv1.conv.weight, .* \(1 are missing\)"):
        summarize_groups(gradients, list(some), layer_groups(model))
