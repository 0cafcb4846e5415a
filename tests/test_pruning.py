"""Pruned networks against mode `dropped` of the networks they were made from."""

import copy

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from memlib.config import ModelConfig
from memlib.errors import InputError
from memlib.example_tied_dropout import dropout_layers, set_mode, tie
from memlib.models import ResNet9, build_model
from memlib.places import INSERTED
from memlib.pruning import model_size, prune


@pytest.fixture(autouse=True)
def unchecked_shapes():
    """Tracing hands symbols instead of tensors through `forward`."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def trained(model, shape, steps=3, seed=0):
    """The model after a few steps, so that BatchNorm has statistics and no weight is special."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = {"ids": torch.arange(16)} if dropout_layers(model) else {}
    for _ in range(steps):
        x, labels = torch.randn(16, *shape, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x, **ids), labels).backward()
        optimizer.step()
    return model.eval()


def check_prunes(tied, shape):
    """Prune and compare; returns the pruned model."""
    torch.manual_seed(1)
    x = torch.randn(5, *shape)
    set_mode(tied, "dropped")
    before = {name: t.clone() for name, t in tied.state_dict().items()}
    pruned = prune(tied)
    expected = tied(x)
    torch.testing.assert_close(pruned(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-4  # they could be told apart
    assert all(torch.equal(before[name], t) for name, t in tied.state_dict().items())
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in tied.parameters())
    assert not dropout_layers(pruned)
    return pruned


def resnet9(p_gen=0.25, p_mem=0.3):
    torch.manual_seed(0)
    return trained(tie(ResNet9(in_channels=1, num_classes=3, width=0.25), p_gen=p_gen, p_mem=p_mem), (1, 14, 14))


@pytest.mark.parametrize("p_gen", [0.07, 0.25, 0.6, 1.0])
def test_a_pruned_resnet9_equals_dropped(p_gen):
    tied = resnet9(p_gen)
    x = torch.randn(5, 1, 14, 14)
    set_mode(tied, "dropped")
    torch.testing.assert_close(prune(tied)(x), tied(x), rtol=1e-4, atol=1e-5)


def test_a_pruned_resnet9_is_a_resnet9_with_fewer_channels_and_nothing_else():
    pruned = check_prunes(resnet9(0.25), (1, 14, 14))
    assert type(pruned) is ResNet9
    assert not any(hasattr(module, INSERTED) for module in pruned.modules())
    small = ResNet9(in_channels=1, num_classes=3, width=0.0625)
    inner = {"residual1.first", "residual2.first"}  # between the two blocks of a residual nothing is dropped
    for name, expected in small.state_dict().items():
        if name.startswith(tuple(inner)) or ".second.conv" in name:
            continue
        assert pruned.state_dict()[name].shape == expected.shape, name
    assert pruned.residual1.first.conv.weight.shape == (32, 8, 3, 3)
    assert pruned.residual1.second.conv.weight.shape == (8, 32, 3, 3)
    assert pruned.conv1.conv.out_channels == pruned.conv1.norm.num_features == 4


def test_a_pruned_model_trains_saves_and_needs_no_ids():
    pruned = prune(resnet9())
    trained(pruned.train(), (1, 14, 14))
    copy.deepcopy(pruned).load_state_dict(pruned.state_dict())
    with pytest.raises(TypeError, match="'ids'"):
        pruned(torch.randn(2, 1, 14, 14), ids=torch.arange(2))


def test_rescaling_is_pruned_with_the_rest():
    tied = resnet9()
    set_mode(tied, "dropped", rescale=True)
    x = torch.randn(5, 1, 14, 14)
    torch.testing.assert_close(prune(tied)(x), tied(x), rtol=1e-4, atol=1e-5)


def test_pruning_reports_fewer_parameters_and_flops():
    tied = tie(ResNet9(in_channels=3, num_classes=10), p_gen=0.25)
    set_mode(tied, "dropped")
    trained_enough = copy.deepcopy(tied)
    for module in trained_enough.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked += 1
    whole, small = model_size(tied, (3, 32, 32)), model_size(prune(trained_enough), (3, 32, 32))
    assert small.n_parameters < whole.n_parameters / 3
    assert small.flops < whole.flops / 3
    assert whole.n_parameters == sum(p.numel() for p in tied.parameters())


def perceptron():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3)
    )


def flattened():
    """A map flattened into features: height x width of them a channel."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(40),
        nn.Linear(40, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 10, 1, bias=False),
        nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False),
        nn.BatchNorm2d(10),
        nn.SiLU(),
        nn.Conv2d(10, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


@pytest.mark.parametrize(
    ("build", "after"),
    [
        (perceptron, ["2", "5"]),
        (perceptron, ["1"]),
        (flattened, ["1", "6"]),
        (flattened, ["2"]),
        (depthwise, ["3", "4"]),
        (depthwise, ["3"]),
    ],
)
def test_convolutions_linear_layers_and_batchnorm_are_pruned(build, after):
    torch.manual_seed(0)
    shape = (3, 2, 2) if build is perceptron else (3, 4, 4)
    if build is flattened and after == ["1", "6"]:
        model = build()
        model[4] = nn.Identity()  # a shift after the drop would make zeros other than zero
    elif build is flattened:
        model = build()
        model[4] = nn.ReLU()
    else:
        model = build()
    check_prunes(trained(tie(model, after, p_gen=0.3), shape), shape)


def test_a_batchnorm_behind_the_drop_cannot_be_pruned():
    """It turns zeros into constants, which the next layer needs."""
    model = trained(tie(flattened(), ["1"], p_gen=0.3), (3, 4, 4))
    with pytest.raises(InputError, match=r"what is dropped after '1' is joined with channels that '5' needs"):
        prune(model)


def test_a_torchvision_resnet_is_pruned_where_its_stages_end():
    """Inside a stage the stream is needed whole; only what follows a place shrinks, a slice stays."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 2, 1, 1], num_classes=3)
    tied = trained(tie(model, ["layer1", "layer3", "layer4"], p_gen=0.25), (3, 32, 32), steps=1)
    pruned = check_prunes(tied, (3, 32, 32))
    assert pruned.layer2[0].conv1.in_channels == 16
    assert pruned.fc.in_features == 128
    assert pruned.layer1[1].bn2.num_features == 64


def test_a_resnet_tied_after_every_block_is_pruned_through_and_through():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 2, 1, 1], num_classes=3)
    after = ["relu", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
    pruned = check_prunes(trained(tie(model, after, p_gen=0.25), (3, 32, 32), steps=1), (3, 32, 32))
    assert pruned.conv1.out_channels == pruned.layer1[0].conv2.out_channels == 16
    assert pruned.layer2[0].downsample[0].weight.shape[:2] == (32, 16)


def test_a_stream_that_something_else_still_needs_is_named():
    torch.manual_seed(0)
    model = ResNet9(in_channels=1, num_classes=3, width=0.25)
    tied = trained(tie(model, ["conv2"], p_gen=0.25), (1, 14, 14))
    with pytest.raises(InputError, match="dropped after 'conv2' is joined with channels that 'conv3.conv' needs.*tie"):
        prune(tied)


def test_a_narrower_place_behind_a_wider_one_is_pruned_and_a_wider_one_refused():
    tied = resnet9()
    set_mode(tied, "dropped")
    place = tied.residual1.get_submodule(INSERTED)
    place.p_gen = 0.1
    x = torch.randn(5, 1, 14, 14)
    torch.testing.assert_close(prune(tied)(x), tied(x), rtol=1e-4, atol=1e-5)
    place.p_gen = 0.5
    with pytest.raises(InputError, match="dropped after 'conv2' is joined with channels that 'residual1' needs"):
        prune(tied)


def test_different_shares_joined_in_one_sum_are_refused():
    torch.manual_seed(0)
    tied = trained(tie(ResNet9(in_channels=1, num_classes=3, width=0.25), ["conv2", "residual1.second"]), (1, 14, 14))
    tied.residual1.second.get_submodule(INSERTED).p_gen = 0.5
    with pytest.raises(InputError, match="'conv2' keeps 6 channels and 'residual1.second' 16, but both are joined"):
        prune(tied)


def test_a_vision_transformer_is_refused_because_its_norms_mix_channels():
    torch.manual_seed(0)
    vit = build_model(ModelConfig(name="timm:vit_tiny_patch16_224"), image_shape=(3, 32, 32), num_classes=3, seed=0)
    with pytest.raises(InputError, match="cannot be (removed|pruned)"):
        prune(tie(vit))


def test_pruning_before_training_is_refused():
    with pytest.raises(InputError, match="BatchNorm 'conv1.norm' has never seen a batch, so the model is not trained"):
        prune(tie(ResNet9(in_channels=1, num_classes=3, width=0.25)))


def test_a_model_without_example_tied_dropout_is_refused():
    with pytest.raises(InputError, match="has no example-tied dropout, so nothing is to be pruned"):
        prune(ResNet9(in_channels=1, num_classes=3, width=0.25))


class Shuffled(nn.Module):
    """Reads a layer in a way that tracing knows nothing of."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(x).flip(1))


def test_an_operation_that_may_mix_channels_is_named():
    with pytest.raises(InputError, match="what is dropped after 'first' reaches 'flip', which may mix channels"):
        prune(tie(Shuffled(), ["first"], p_gen=0.5))


def test_a_place_behind_a_flattening_is_refused_because_it_may_cut_a_channel():
    tied = trained(tie(flattened(), ["3"], p_gen=0.33), (3, 4, 4))
    with pytest.raises(InputError, match="before the dropout after '3' cannot be told"):
        prune(tied)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)

    def forward(self, x):
        return self.first(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_named():
    with pytest.raises(InputError, match="Branching cannot be traced .*; use it in mode 'dropped'"):
        prune(tie(Branching(), ["first"], p_gen=0.5))
