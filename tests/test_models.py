import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib.config import ModelConfig
from memlib.errors import InputError
from memlib.models import ResNet9, build_model, check_model_name


def build(name="resnet9", shape=(3, 32, 32), num_classes=10, seed=0, width=1.0):
    return build_model(ModelConfig(name=name, width=width), image_shape=shape, num_classes=num_classes, seed=seed)


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "vit", "timm:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_model_takes_grey_and_colour_images_and_gives_one_logit_a_class(name, channels):
    model = build(name, shape=(channels, 32, 32), num_classes=7).eval()
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 7)


def test_resnet9_has_the_parameters_its_description_adds_up_to():
    convolutions = [(3, 64, 3), (64, 128, 5), (128, 128, 3), (128, 128, 3), (128, 256, 3), (256, 256, 3), (256, 256, 3)]
    convolutions.append((256, 128, 3))
    expected = sum(i * o * k * k + 2 * o for i, o, k in convolutions) + 128 * 10
    assert sum(p.numel() for p in build().parameters()) == expected


def test_resnet9_logits_are_a_fifth_of_the_classifiers():
    model = build().eval()
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(logits, seen[0] * 0.2)


@given(width=st.sampled_from([1 / 64, 0.0625, 0.25, 0.5, 2.0]))
@settings(max_examples=5)
def test_the_width_scales_every_channel_count(width):
    model = ResNet9(in_channels=1, num_classes=3, width=width)
    assert model.conv1.conv.out_channels == round(64 * width)
    assert model.conv4.conv.out_channels == round(128 * width)


def test_the_paper_vit_is_width_512_depth_6_heads_8_mlp_512_patch_2_dropout_a_tenth():
    model = build("vit")
    assert len(model.blocks) == 6
    assert model.blocks[0].attn.num_heads == 8
    assert model.blocks[0].mlp.fc1.weight.shape == (512, 512)
    assert model.patch_embed.proj.weight.shape == (512, 3, 2, 2)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1, 0.0}
    assert model.head_drop.p == 0


def test_initialization_is_a_function_of_the_seed_and_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.conv1.conv.weight, other.conv1.conv.weight)


def test_an_image_too_small_for_the_model_is_refused_with_the_smallest_that_fits():
    with pytest.raises(InputError, match=r"images of 8 x 8 pixels do not fit model resnet9.*image_size to 11 or more"):
        build(shape=(1, 8, 8))
    build(shape=(1, 11, 11))


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet", "did you mean 'resnet9'"), ("timm:resnet1", "timm model 'resnet1' is not known; did you mean")],
)
def test_an_unknown_model_is_refused_with_the_nearest_match(name, message):
    with pytest.raises(InputError, match=message):
        check_model_name(name)


def test_a_width_without_channels_is_refused():
    with pytest.raises(InputError, match="model.width is 0.001; give at least 0.015625"):
        build(width=0.001)
