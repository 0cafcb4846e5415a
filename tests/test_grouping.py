import pytest
import torch
from torch import nn

from memlib.config import ModelConfig
from memlib.errors import InputError
from memlib.grouping import layer_groups
from memlib.models import build_model
from memlib.rewinding import rewind

SHAPE = (3, 32, 32)
MODELS = ["resnet9", "resnet50", "vit", "timm:resnet18", "timm:vit_tiny_patch16_224", "timm:convnext_atto"]
MODELS += ["timm:mobilenetv3_small_050", "timm:efficientnet_b0", "timm:densenet121", "timm:rdnet_tiny"]


def build(name, num_classes=10):
    return build_model(ModelConfig(name=name), image_shape=SHAPE, num_classes=num_classes, seed=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_of_every_model_partition_its_parameters_and_buffers(name):
    model = build(name)
    groups = layer_groups(model)
    parameters = [n for members in groups.parameters.values() for n in members]
    buffers = [n for members in groups.buffers.values() for n in members]
    assert sorted(parameters) == sorted(n for n, _ in model.named_parameters())
    assert sorted(buffers) == sorted(n for n, _ in model.named_buffers())
    assert groups.parameters.keys() == groups.buffers.keys()
    assert all(groups.parameters.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_running_statistics_of_a_norm_belong_to_the_group_of_its_weight(name):
    groups = layer_groups(build(name))
    for group, buffers in groups.buffers.items():
        for buffer in (b for b in buffers if b.endswith("running_mean")):
            assert buffer.replace("running_mean", "weight") in groups.parameters[group]


def test_resnet9_has_eight_convolution_blocks_and_a_classifier():
    names = layer_groups(build("resnet9")).names
    assert names == (
        "conv1",
        "conv2",
        "residual1.first",
        "residual1.second",
        "conv3",
        "residual2.first",
        "residual2.second",
        "conv4",
        "classifier",
    )


def test_resnet50_has_a_stem_four_layers_and_a_classifier():
    names = layer_groups(build("resnet50")).names
    assert names == ("stem", "layer1", "layer2", "layer3", "layer4", "classifier")


def test_vit_has_a_patch_embedding_six_blocks_and_a_head():
    names = layer_groups(build("vit")).names
    assert names == ("patch_embedding", *(f"block{i}" for i in range(1, 7)), "head")


def test_a_timm_model_is_grouped_by_its_own_stages():
    names = layer_groups(build("timm:resnet18")).names
    assert names == ("stem", "layer1", "layer2", "layer3", "layer4", "fc")


def test_a_users_own_model_is_grouped_by_its_top_level_modules():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert layer_groups(model).names == ("0", "1", "4")


def test_a_user_names_the_groups_and_the_longest_prefix_decides():
    groups = layer_groups(build("resnet50"), {"early": ["conv1", "bn1", "layer1"], "rest": ["layer2", "layer3"]
                                              , "late": ["layer4", "fc"], "middle": ["layer3.0"]})  # fmt: skip
    assert "layer3.0.conv1.weight" in groups.parameters["middle"]
    assert "layer3.1.conv1.weight" in groups.parameters["rest"]


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ({"all": ["0"]}, "parameter '1.weight' lies in no group"),
        ({"a": ["0", "1"], "b": ["1"]}, "'1.weight' lies in groups"),
        ({"a": ["0", "1"], "b": ["7"]}, "match no parameter"),
    ],
)
def test_groups_that_are_no_partition_are_refused(prefixes, message):
    with pytest.raises(InputError, match=message):
        layer_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), prefixes)


def test_a_model_without_parameters_has_no_groups():
    with pytest.raises(InputError, match="has no parameters"):
        layer_groups(nn.Sequential(nn.ReLU()))


def test_a_prefix_ends_at_a_module_boundary():
    model = nn.ModuleDict({"layer1": nn.Linear(1, 1), "layer10": nn.Linear(1, 1)})
    groups = layer_groups(model, {"one": ["layer1"], "ten": ["layer10"]})
    assert groups.parameters["one"] == ("layer1.weight", "layer1.bias")


class WithPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("positions", torch.arange(4.0), persistent=False)

    def forward(self, inputs):
        return self.head(self.embed(inputs) + self.positions)


def test_buffers_that_no_state_dictionary_holds_are_in_no_group():
    model = WithPositions()
    assert layer_groups(model).buffers == {"embed": (), "head": ()}
    earlier = WithPositions().state_dict()
    rewound = rewind(model, earlier, ["head"], buffers=True)
    assert torch.equal(rewound.head.weight, earlier["head.weight"])


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_refused_and_what_to_give_is_said(wrap):
    with pytest.raises(InputError, match=r"wrapped in \w+, all of which is one layer group; give model\.\w+"):
        layer_groups(wrap(WithPositions()))
