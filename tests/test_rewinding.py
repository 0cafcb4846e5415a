"""Rewinding against copied models that are evaluated one by one, on every kind of network."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memlib.batches import normalize
from memlib.config import ModelConfig
from memlib.errors import InputError
from memlib.evaluation import evaluation_mode
from memlib.grouping import layer_groups
from memlib.models import build_model
from memlib.prefixes import Suffix, cut_before, run_prefix
from memlib.rewinding import Measurement, rewind, rewinding_accuracies

pytestmark = pytest.mark.usefixtures("shallow_vit")
NETWORKS = ["resnet9", "resnet50", "vit", "timm:resnet18", "timm:convnext_atto", "timm:mobilenetv3_small_050"]


def images(n, *, seed=0, size=32):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def labels(n, *, seed=1):
    return torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(seed))


def build(name, seed=0, size=32):
    width = 0.125 if name == "resnet9" else 1.0
    model = build_model(ModelConfig(name=name, width=width), image_shape=(3, size, size), num_classes=10, seed=seed)
    with torch.no_grad():  # running statistics that are not those of a fresh network
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def swapped(model, state, names):
    """The obvious way: copy the model and overwrite the tensors."""
    other = copy.deepcopy(model).eval()
    own = dict(other.named_parameters()) | dict(other.named_buffers())
    with torch.no_grad():
        for name in names:
            own[name].copy_(state[name])
    return other


@torch.no_grad()
def plain_accuracy(model, examples):
    model.eval()
    return (model(normalize(examples[0])).argmax(1) == examples[1]).double().mean().item()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_logits_of_a_cut_network_are_those_of_the_whole_one_with_the_group_swapped(name):
    model, earlier = build(name), build(name, seed=7).state_dict()
    groups, inputs = layer_groups(model), normalize(images(5))
    with evaluation_mode(model), torch.no_grad():
        suffixes = cut_before(model, [[g] for g in groups.names], groups, inputs[:2])
        for group, suffix in zip(groups.names, suffixes, strict=True):
            state = {n: earlier[n] for n in groups.parameters[group]}
            logits = suffix(run_prefix(model, suffix.crossing, inputs), inputs, state)
            expected = swapped(model, earlier, groups.parameters[group])(inputs)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_behind_the_first_shares_a_prefix(name):
    model = build(name)
    groups = layer_groups(model)
    with evaluation_mode(model):
        suffixes = cut_before(model, [[g] for g in groups.names], groups, normalize(images(2)))
    assert [bool(suffix.crossing) for suffix in suffixes] == [False] + [True] * (len(groups.names) - 1)


def test_resnet9_is_cut_where_its_drawing_says():
    model = build("resnet9")
    groups = layer_groups(model)
    with evaluation_mode(model):
        suffixes = cut_before(model, [[g] for g in groups.names], groups, normalize(images(2)))
    assert [set(s.crossing) for s in suffixes] == [
        set(),
        {"conv1"},
        {"conv2"},
        {"conv2", "residual1.first"},  # the shortcut around the block too
        {"residual1"},
        {"pool"},
        {"pool", "residual2.first"},
        {"residual2"},
        {"conv4"},
    ]


class ReadsAWeightAtTheStart(nn.Module):
    """Its second layer's weight is used before its first layer is called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 10)

    def forward(self, x):
        scale = self.second.weight.mean()
        return self.second(self.first(x.flatten(1)) * scale)


class WritesInPlace(nn.Module):
    """What one module returned is overwritten by the next, twice by the same one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.activation = nn.SiLU(inplace=True)

    def forward(self, x):
        x = self.activation(self.first(x.flatten(1)))
        x = self.activation(self.second(x))
        x += 1
        return self.third(x)


class HidesItsOutput(nn.Module):
    """Its first module returns no tensor, and is also used in pieces."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTM(12, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.second(self.first(x.flatten(1))[0])


class AddsInPlace(nn.Module):
    """What two of its modules returned is written into behind them, as by a residual connection."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Linear(12, 8), nn.Linear(8, 8)
        self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x.flatten(1))
        y = self.one(x)
        y += x
        z = self.two(y)
        z += y
        return self.head(z)


@pytest.mark.parametrize("kind", [ReadsAWeightAtTheStart, WritesInPlace, AddsInPlace, HidesItsOutput])
def test_a_network_of_any_make_is_measured_as_if_nothing_were_shared(kind):
    torch.manual_seed(0)
    model, earlier = kind(), {epoch: kind().state_dict() for epoch in (0, 1, 2)}
    examples = (torch.randn(40, 3, 2, 2), labels(40))
    found = rewinding_accuracies(model, earlier, {"test": examples})
    groups = layer_groups(model)
    assert {(r.groups, r.epoch) for r in found} == {((name,), epoch) for name in groups.names for epoch in earlier}
    for result in found:
        other = swapped(model, earlier[result.epoch], groups.parameters[result.groups[0]])
        with torch.no_grad():
            expected = (other(examples[0]).argmax(1) == examples[1]).double().mean().item()
        assert result.accuracy == expected


@settings(max_examples=8)
@given(chunk_size=st.integers(1, 40), n=st.integers(1, 30))
def test_accuracies_equal_those_of_copied_models_for_any_chunk_size(chunk_size, n):
    model, states = (
        build("resnet9", size=16),
        {0: build("resnet9", 7, 16).state_dict(), 4: build("resnet9", 8, 16).state_dict()},
    )
    splits = {"clean": (images(n, size=16), labels(n)), "test": (images(9, seed=3, size=16), labels(9))}
    groups = layer_groups(model)
    sets = [("conv1",), ("residual1.second",), ("conv4", "classifier"), groups.names]
    found = rewinding_accuracies(model, states, splits, sets=sets, measurement=Measurement(chunk_size=chunk_size))
    assert len(found) == len(sets) * len(states) * len(splits)
    for result in found:
        names = [n for group in result.groups for n in groups.parameters[group]]
        other = swapped(model, states[result.epoch], names)
        assert result.accuracy == plain_accuracy(other, splits[result.split])
        assert result.n == len(splits[result.split][1])


@pytest.fixture
def cramped(monkeypatch):
    """A machine whose memory holds seven images behind the cut; gives the sizes that were tried."""
    sizes, call = [], Suffix.__call__

    def run(suffix, boundary, inputs, state=None):
        sizes.append(len(inputs))
        if len(inputs) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(suffix, boundary, inputs, state)

    monkeypatch.setattr(Suffix, "__call__", run)
    return sizes


def test_chunks_that_do_not_fit_into_memory_are_halved_until_they_do(cramped):
    model, earlier = build("resnet9", size=16), build("resnet9", 7, 16).state_dict()
    examples, groups = (images(30, size=16), labels(30)), layer_groups(model)
    found = rewinding_accuracies(model, {0: earlier}, {"test": examples})
    assert cramped[:4] == [2, 2, 2, 2]  # trying the cuts
    assert {30, 15, 7, 2} <= set(cramped)
    for result in found:
        other = swapped(model, earlier, groups.parameters[result.groups[0]])
        assert (result.accuracy, result.n) == (plain_accuracy(other, examples), 30)


def test_recalibration_keeps_its_chunks_on_which_its_result_depends(cramped):
    model, earlier = build("resnet9", size=16), build("resnet9", 7, 16).state_dict()
    how = Measurement(batchnorm="recalibrated", calibration=images(20, size=16), chunk_size=20)
    with pytest.raises(torch.OutOfMemoryError):
        rewinding_accuracies(model, {0: earlier}, {"test": (images(3, size=16), labels(3))}, measurement=how)


def test_rewinding_one_group_leaves_every_other_tensor_alone():
    model, earlier = build("resnet9"), build("resnet9", seed=7).state_dict()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rewound = rewind(model, earlier, ["conv3"]).state_dict()
    chosen = set(layer_groups(model).parameters["conv3"])
    for name, tensor in rewound.items():
        assert torch.equal(tensor, earlier[name] if name in chosen else before[name])
        assert torch.equal(model.state_dict()[name], before[name])


def test_running_statistics_go_back_only_when_asked():
    model, earlier = build("resnet9"), build("resnet9", seed=7).state_dict()
    examples = {"test": (images(60), labels(60))}
    groups = layer_groups(model)
    everything = [*groups.parameters["conv2"], *groups.buffers["conv2"]]
    found = rewinding_accuracies(
        model, {0: earlier}, examples, sets=[("conv2",)], measurement=Measurement(batchnorm="rewound")
    )
    assert found[0].accuracy == plain_accuracy(swapped(model, earlier, everything), examples["test"])
    assert torch.equal(
        rewind(model, earlier, ["conv2"], buffers=True).state_dict()[everything[-2]], earlier[everything[-2]]
    )


def test_recalibrated_statistics_are_the_average_over_chunks_of_what_the_rewound_network_sees():
    model, earlier = build("resnet9"), build("resnet9", seed=7).state_dict()
    examples = {"test": (images(80), labels(80))}
    calibration = images(60, seed=5)
    how = Measurement(batchnorm="recalibrated", calibration=calibration, chunk_size=20)
    found = rewinding_accuracies(model, {0: earlier}, examples, sets=[("conv3",)], measurement=how)
    groups = layer_groups(model)
    plain = swapped(model, earlier, groups.parameters["conv3"])
    behind = groups.names[groups.names.index("conv3") :]
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    for name in behind:
        for module in plain.get_submodule(name).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.train()
    with torch.no_grad():
        for chunk in calibration.split(20):
            plain(normalize(chunk))
    assert found[0].accuracy == plain_accuracy(plain, examples["test"])


class SharedWeight(nn.Module):
    """Its first layer has the weight of its last, under whose name it is registered."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(12, 12, bias=False)
        self.first = nn.Linear(12, 12, bias=False)
        self.first.weight = self.last.weight

    def forward(self, inputs):
        return self.last(self.first(inputs.flatten(1)[:, :12]).relu())[:, :10]


def test_a_tensor_that_an_earlier_layer_shares_goes_back_there_too():
    torch.manual_seed(0)
    model, earlier = SharedWeight(), SharedWeight().state_dict()
    pixels = images(500, size=4)
    with torch.no_grad():
        rewound = rewind(model, earlier, ["last"])(normalize(pixels)).argmax(1)
    found = rewinding_accuracies(model, {0: earlier}, {"test": (pixels, rewound)}, sets=[("last",)])
    assert found[0].accuracy == 1.0


class Particular(nn.Module):
    """A network that takes nothing in place of its own layers, so it cannot be cut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 10)

    def forward(self, inputs):
        if type(self.stem) is not nn.Sequential or type(self.stem[1]) is not nn.BatchNorm2d:
            raise TypeError("that is not my stem")
        return self.head(self.late(self.stem(inputs)).mean((2, 3)))


def test_recalibration_estimates_statistics_from_the_first_rewound_group_on_even_where_nothing_can_be_cut():
    torch.manual_seed(0)
    model, earlier = Particular(), Particular().state_dict()
    model.stem[1].running_var.fill_(9.0)  # estimated anew they would be others
    model.head.bias.data.zero_()
    brightness = torch.linspace(0, 1, 200)[:, None, None, None]
    calibration, pixels = images(30, seed=5), (images(200) * brightness).to(torch.uint8)

    def predicted(estimated):
        """What the rewound network says with these statistics estimated by hand."""
        plain = swapped(model, earlier, layer_groups(model).parameters["late"])
        for norm in map(plain.get_submodule, estimated):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            plain(normalize(calibration))
            return plain.eval()(normalize(pixels)).argmax(1)

    how = Measurement(batchnorm="recalibrated", calibration=calibration, chunk_size=30)
    splits = {"late": (pixels, predicted(["late.1"])), "all": (pixels, predicted(["stem.1", "late.1"]))}
    found = rewinding_accuracies(model, {0: earlier}, splits, sets=[("late",)], measurement=how)
    accuracies = {result.split: result.accuracy for result in found}
    assert accuracies["late"] == 1.0
    assert accuracies["all"] < 0.95


def test_a_group_whose_module_has_a_second_name_is_cut_all_the_same():
    model = build("resnet9", size=16)
    model.target = model.conv4
    (suffix,) = cut_before(model, [("conv4",)], layer_groups(model), normalize(images(2, size=16)))
    assert suffix.crossing
    assert "conv4.norm" in suffix.behind
    assert "conv1" not in suffix.behind


def test_measuring_leaves_the_model_as_it_was():
    model = build("resnet9").train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    how = Measurement(batchnorm="recalibrated", calibration=images(8), chunk_size=4)
    rewinding_accuracies(
        model, {0: build("resnet9", seed=7).state_dict()}, {"test": (images(6), labels(6))}, measurement=how
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_named_before_anything_is_computed():
    model, earlier = build("resnet9"), build("resnet9", seed=7).state_dict()
    good = {"test": (images(4), labels(4))}
    with pytest.raises(InputError, match="layer group 'conv33' is not known; did you mean 'conv3'"):
        rewinding_accuracies(model, {0: earlier}, good, sets=[("conv33",)])
    with pytest.raises(InputError, match="layer group 'nothing' is not known"):
        rewind(model, earlier, ["nothing"])
    with pytest.raises(
        InputError, match=r"state at epoch 3 does not belong to this ResNet9: 'classifier.weight' is \(5, 16\)"
    ):
        rewinding_accuracies(model, {3: {**earlier, "classifier.weight": torch.zeros(5, 16)}}, good)
    with pytest.raises(InputError, match="state at epoch 3 has non-finite values in 'conv1.conv.weight'"):
        rewinding_accuracies(
            model, {3: {**earlier, "conv1.conv.weight": earlier["conv1.conv.weight"] * torch.nan}}, good
        )
    with pytest.raises(InputError, match="ViT has no BatchNorm whose statistics could be recalibrated"):
        vit = build("vit")
        how = Measurement(batchnorm="recalibrated", calibration=images(4))
        rewinding_accuracies(vit, {0: vit.state_dict()}, good, measurement=how)
    with pytest.raises(InputError, match="there are no calibration images"):
        rewinding_accuracies(model, {0: earlier}, good, measurement=Measurement(batchnorm="recalibrated"))
    with pytest.raises(InputError, match="split 'noisy' has 0 images and 0 labels"):
        rewinding_accuracies(model, {0: earlier}, {"noisy": (images(0), labels(0))})
    with pytest.raises(InputError, match="there are no splits"):
        rewinding_accuracies(model, {0: earlier}, {})
