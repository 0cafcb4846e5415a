"""Which units a network has, and that a gate at 0 is a filter of zeros (or an activation of zeros)."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import resnet50

from memlib.errors import InputError
from memlib.gated_network import GatedNetwork, Replay
from memlib.models import ResNet9
from memlib.network_units import network_units

INPUTS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TIMM = ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"]


def seeded(build):
    """A network whose weights hang on no test before: where a ReLU is at 0, rounding decides on its slope."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def vit():
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.0, num_classes=4
    )


def resnet9():
    return ResNet9(in_channels=3, num_classes=4, width=0.125)


def tiny_resnet50():
    return resnet50(num_classes=4, width_per_group=4)


def uneven(model):
    """Give every BatchNorm statistics and weights of a trained network's kind."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
            for tensor in (module.running_var, module.weight):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "n_layers", "first"),
    [(resnet9, 8, ("conv1.conv", 8)), (tiny_resnet50, 53, ("conv1", 64)), (vit, 4, ("blocks.0.attn.qkv", 16))],
)
def test_the_papers_networks_have_the_specified_units(build, n_layers, first):
    units = network_units(build(), INPUTS)
    assert len(units.layers) == n_layers
    assert (units.layers[0].name, units.layers[0].n_units) == first
    assert not {layer.name for layer in units.layers} & {"classifier", "fc", "head"}


def test_a_vits_units_are_value_rows_and_hidden_features():
    layers = network_units(vit(), INPUTS).layers
    assert [layer.name for layer in layers[:2]] == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]
    assert [(layer.first, layer.n_units) for layer in layers[:2]] == [(32, 16), (0, 16)]


@pytest.mark.parametrize("name", TIMM)
def test_of_any_timm_model_all_convolutions_and_linear_layers_but_the_classifier(name):
    size = {"img_size": 32} if name.startswith(("vit", "swin")) else {}
    model = timm.create_model(name, num_classes=4, **size)
    found = {layer.name for layer in network_units(model, INPUTS).layers}
    if name.startswith("vit"):
        assert found == {f"blocks.{i}.{part}" for i in range(12) for part in ("attn.qkv", "mlp.fc1")}
        return
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    heads = {id(m) for m in model.get_classifier().modules()}
    assert found == {n for n in layers if id(model.get_submodule(n)) not in heads}


def remove_by_hand(model, layer, unit, removal):
    """Return a copy of the model without the unit, edited where the specification says."""
    model = copy.deepcopy(model)
    if removal == "filter":
        model.get_submodule(layer.name).weight.data[layer.first + unit] = 0
        return model

    def zero(module, args, output):
        output = output.clone()
        output[(slice(None), layer.first + unit) if layer.dim == 1 else (..., layer.first + unit)] = 0
        return output

    model.get_submodule(layer.site).register_forward_hook(zero)
    return model


def assert_same_logits(actual, expected):
    """Assert that they differ by rounding alone, which makes up to 1e-5 of the largest logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("removal", ["filter", "activation"])
@pytest.mark.parametrize("build", [resnet9, tiny_resnet50, vit])
@given(data=st.data())
@settings(max_examples=8)
def test_a_gate_at_zero_is_a_network_without_the_unit(build, removal, data):
    model = uneven(seeded(build))
    units = network_units(model, INPUTS, removal=removal)
    network = GatedNetwork(model, units)
    positions = data.draw(st.lists(st.integers(0, units.n_units - 1), min_size=1, max_size=3, unique=True))
    gates = torch.ones(3, units.n_units)
    for row, position in enumerate(positions):
        gates[row, position] = 0
    each = network.logits(INPUTS, gates)
    _, outputs = network.record(INPUTS)
    for row, position in enumerate(positions):
        index, unit = units.locate(position)
        expected = remove_by_hand(model, units.layers[index], unit, removal)(INPUTS).detach()
        shared = network.logits(INPUTS, gates[row])
        with torch.no_grad():
            replayed = network.logits(INPUTS, gates[row], replay=Replay(outputs, network.intact_layers(gates[row])))
        assert_same_logits(shared, expected)
        assert_same_logits(replayed, expected)
        assert_same_logits(each[row], expected[row])


@pytest.mark.parametrize("removal", ["filter", "activation"])
@pytest.mark.parametrize("build", [resnet9, tiny_resnet50, vit])
def test_the_slope_of_a_gate_is_the_same_on_every_path(build, removal):
    model = uneven(seeded(build))
    units = network_units(model, INPUTS, removal=removal)
    network = GatedNetwork(model, units)
    labels = torch.tensor([0, 1, 2])

    def slopes(gates, **how):
        gates = gates.clone().requires_grad_()
        loss = F.cross_entropy(network.logits(INPUTS, gates, **how), labels, reduction="sum")
        return torch.autograd.grad(loss, gates)[0]

    ones = torch.ones(units.n_units)
    ones[units.position(len(units.layers) - 1, 0)] = 0
    _, outputs = network.record(INPUTS)
    shared = slopes(ones)
    each = slopes(ones.repeat(3, 1)).sum(dim=0)
    replayed = slopes(ones, replay=Replay(outputs, len(units.layers) - 1))
    kept = ones > 0
    scale = shared.abs().max().item()
    torch.testing.assert_close(each[kept], shared[kept], rtol=1e-3, atol=1e-5 * scale)
    torch.testing.assert_close(replayed[kept], shared[kept], rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("removal", ["filter", "activation"])
@pytest.mark.parametrize("build", [resnet9, tiny_resnet50, vit])
def test_most_units_are_seen_in_the_logits_far_above_rounding(build, removal):
    model = uneven(seeded(build))
    units = network_units(model, INPUTS, removal=removal)
    network, positions = GatedNetwork(model, units), range(0, units.n_units, max(units.n_units // 20, 1))
    with torch.no_grad():
        intact = network.logits(INPUTS, torch.ones(units.n_units))
        moved = []
        for position in positions:
            gates = torch.ones(units.n_units)
            gates[position] = 0
            moved.append((network.logits(INPUTS, gates) - intact).abs().max() / intact.abs().max())
    assert torch.stack(moved).median() > 1e-3


def test_filter_removal_leaves_the_shift_of_the_batchnorm_and_activation_removal_does_not():
    model = uneven(
        nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 4))
    )
    for removal, expected in (("filter", 1), ("activation", 0)):
        model[1].running_mean.data.zero_()
        model[1].bias.data.fill_(1)
        network = GatedNetwork(model, network_units(model, INPUTS, removal=removal))
        _, (intact,) = network.record(INPUTS)
        network._layers[0].gates = torch.zeros(2)
        assert (network._layers[0](INPUTS) == expected).all()
        assert not (intact == expected).all()


def test_the_convolution_batchnorm_and_relu_of_a_block_are_one():
    assert all(layer.fused for layer in network_units(resnet9(), INPUTS).layers)
    layers = {layer.name: layer for layer in network_units(tiny_resnet50(), INPUTS).layers}
    assert layers["layer1.0.conv1"].fused
    assert layers["layer1.0.conv1"].own_relu is None  # shared by the block's three places
    assert not layers["layer1.0.conv3"].fused  # the shortcut is added in between


def test_an_activation_removed_behind_gelu_is_gated_there():
    layers = network_units(vit(), INPUTS, removal="activation").layers
    assert [layer.site for layer in layers[:2]] == ["blocks.0.attn.qkv", "blocks.0.mlp.act"]


class Functional(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.head, self.activation = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), activation

    def forward(self, x):
        return self.head(self.activation(self.conv(x)).mean(dim=(2, 3)))


def test_an_activation_that_is_no_module_is_named():
    with pytest.raises(InputError, match="layer 'conv' is followed by the function gelu"):
        network_units(Functional(F.gelu), INPUTS, removal="activation")
    assert network_units(Functional(F.gelu), INPUTS).n_units == 4
    assert network_units(Functional(F.relu), INPUTS, removal="activation").layers[0].site == "conv"


def test_an_activation_module_that_several_layers_share_is_named():
    act = nn.GELU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3), act, nn.Flatten(), nn.Linear(3136, 2))
    with pytest.raises(InputError, match="layer '0': module '1' behind it is called 2 times"):
        network_units(model, INPUTS, removal="activation")


class Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(3072, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.linear(x.flatten(1), self.hidden.weight))


def test_a_layer_whose_weight_is_used_without_calling_it_is_named():
    with pytest.raises(InputError, match="layer 'hidden' cannot be gated"):
        network_units(Bypassed(), INPUTS)


def test_a_model_without_units_is_named():
    with pytest.raises(InputError, match="Sequential has no units"):
        network_units(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), INPUTS)


def test_a_layer_called_twice_ends_the_shared_prefix():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.Conv2d(3, 3, 3, padding=1), conv, nn.Flatten(), nn.Linear(3072, 2)).eval()
    units = network_units(model, INPUTS)
    gates = torch.ones(units.n_units)
    assert GatedNetwork(model, units).intact_layers(gates) == 0
    gates[4] = 0
    edited = copy.deepcopy(model)
    edited[1].weight.data[1] = 0
    torch.testing.assert_close(GatedNetwork(model, units).logits(INPUTS, gates), edited(INPUTS))


def test_positions_and_locations_are_inverse():
    units = network_units(resnet9(), INPUTS)
    for position in range(units.n_units):
        assert units.position(*units.locate(position)) == position
    with pytest.raises(IndexError):
        units.locate(units.n_units)


class Aliased(nn.Module):
    """The usual way to take a network apart: its layers have a second name, by which they are called."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.norm = self.base[1]
        self.features = nn.Sequential(*self.base)
        self.first = nn.Conv2d(3, 3, 3)
        self.entry = self.first  # two names in one place
        self.head = nn.Linear(6, 5)

    def forward(self, inputs):
        return self.head(self.features(self.entry(inputs)).mean((2, 3)))


@pytest.mark.parametrize("removal", ["filter", "activation"])
def test_a_layer_with_two_names_is_gated_under_both(removal):
    model = uneven(Aliased()).eval()
    inputs = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    units = network_units(model, inputs, removal=removal)
    network = GatedNetwork(model, units)
    with torch.no_grad():
        torch.testing.assert_close(network.logits(inputs, torch.ones(units.n_units)), model(inputs))
        for index, layer in enumerate(units.layers):
            gates = torch.ones(units.n_units)
            gates[units.position(index, 1)] = 0
            expected = remove_by_hand(model, layer, 1, removal)(inputs)
            torch.testing.assert_close(network.logits(inputs, gates), expected)
            assert not torch.allclose(expected, model(inputs))
