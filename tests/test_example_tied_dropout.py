"""Masks against a hash in Python's own integers; the layer against the specification's sentences."""

import copy
import hashlib
import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from memlib.config import ModelConfig
from memlib.errors import InputError
from memlib.example_tied_dropout import (
    ExampleTiedDropout,
    active_channels,
    check_ids,
    dropout_layers,
    dropout_mode,
    set_mode,
    tie,
    untie,
)
from memlib.grouping import layer_groups
from memlib.models import ResNet9, build_model
from memlib.seeds import stream_seed

WORD = 2**64 - 1
LARGEST = 2**63 - 1
IDS = st.lists(st.integers(0, LARGEST), min_size=1, max_size=20)


def hash_of(key, example, channel):
    """The hash as one would write it in C, in Python's integers."""
    x = ((example * 0x9E3779B97F4A7C15 + key + channel) * 0xD1342543DE82EF95) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def owned_by_hand(key, example, channels, p_mem):
    hashes = [hash_of(key, example, channel) for channel in range(channels)]
    signed = [h - 2**64 if h >= 2**63 else h for h in hashes]
    return [h + 2**63 < p_mem * 2**64 for h in signed]


def network(seed=0):
    torch.manual_seed(seed)
    return ResNet9(in_channels=1, num_classes=4, width=0.125)


def batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 12, 12, generator=generator), torch.randint(0, LARGEST, (n,), generator=generator)


@given(
    ids=IDS, key=st.integers(0, LARGEST), p_mem=st.sampled_from([0.1, 0.5, 0.999, 1e-9, 1.0]), kept=st.integers(0, 5)
)
def test_masks_equal_the_hash_in_pythons_integers(ids, key, p_mem, kept):
    got = active_channels(torch.tensor(ids), 12, kept=kept, p_mem=p_mem, key=key).tolist()
    for row, example in zip(got, ids, strict=True):
        assert row[:kept] == [True] * kept
        assert row[kept:] == owned_by_hand(key, example, 12, p_mem)[kept:]


@given(ids=IDS, chunk=st.integers(1, 7), seed=st.integers(0, 100))
def test_masks_depend_neither_on_the_order_nor_on_the_size_of_the_batch(ids, chunk, seed):
    ids = torch.tensor(ids)
    whole = masks(ids)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(masks(ids[order]), whole[order])
    assert torch.equal(torch.cat([masks(part) for part in ids.split(chunk)]), whole)


def masks(ids, channels=30, p_mem=0.3, key=7):
    return active_channels(ids, channels, kept=3, p_mem=p_mem, key=key)


@given(first=st.integers(0, LARGEST - 5000), p_mem=st.sampled_from([0.05, 0.1, 0.5]), key=st.integers(0, LARGEST))
@settings(max_examples=8)
def test_memorization_neurons_are_owned_with_probability_p_mem(first, p_mem, key):
    """Within five standard deviations: of all together, of each example's share and of each channel's."""
    n, channels = 5000, 100
    owned = active_channels(torch.arange(first, first + n), channels, kept=0, p_mem=p_mem, key=key).double()
    deviation = (p_mem * (1 - p_mem)) ** 0.5
    assert abs(owned.mean().item() - p_mem) < 5 * deviation / (n * channels) ** 0.5
    assert (owned.mean(dim=0) - p_mem).abs().max() < 5.5 * deviation / n**0.5
    assert owned.mean(dim=1).std().item() == pytest.approx(deviation / channels**0.5, rel=0.06)


def test_masks_of_neighbouring_examples_channels_layers_and_seeds_are_independent():
    n, channels, p_mem = 10_000, 100, 0.1
    keys = [stream_seed(seed, f"example_tied_dropout/{name}") for seed, name in ((0, "a"), (0, "b"), (1, "a"))]
    first, layer, seed = (
        (active_channels(torch.arange(n), channels, kept=0, p_mem=p_mem, key=key).double() - p_mem) / 0.3
        for key in keys
    )
    pairs = {
        "examples": (first[:-1], first[1:]),
        "channels": (first[:, :-1], first[:, 1:]),
        "diagonal": (first[:-1, :-1], first[1:, 1:]),
        "layers": (first, layer),
        "seeds": (first, seed),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5, name
    between = first.T @ first / n
    assert (between - torch.diag(between.diag())).abs().max() < 5.5 / n**0.5


def test_masks_are_the_same_in_every_process_and_compiled():
    """`fullgraph`: torch.compile takes the model whole, with its ids, in every mode; masks stay equal to the bit."""
    script = """
import torch
from memlib.example_tied_dropout import active_channels, set_mode, tie
from memlib.models import ResNet9
torch.manual_seed(0)
tied = tie(ResNet9(in_channels=1, num_classes=4, width=0.125), seed=3).eval()
compiled = torch.compile(tied, backend="eager", fullgraph=True)
x, ids = torch.randn(4, 1, 12, 12), torch.arange(4) + 2**62
assert torch.equal(compiled(x, ids=ids), tied(x, ids=ids))
assert torch.equal(compiled(x, ids=ids + 4), tied(x, ids=ids + 4))
set_mode(tied, "dropped")
assert torch.equal(compiled(x), tied(x))
mask = torch.compile(active_channels, backend="aot_eager")
print("".join("01"[bit] for bit in mask(ids, 40, kept=2, p_mem=0.3, key=11).flatten().tolist()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    here = active_channels(torch.arange(4) + 2**62, 40, kept=2, p_mem=0.3, key=11)
    assert done.stdout.strip() == "".join("01"[bit] for bit in here.flatten().tolist())


def test_the_mask_of_a_layer_is_that_of_its_seed_and_name():
    layer = ExampleTiedDropout(p_gen=0.25, p_mem=0.4, seed=5, name="conv2")
    key = int.from_bytes(hashlib.sha256(b"5/example_tied_dropout/conv2").digest()[:8], "big") >> 1
    ids = torch.tensor([0, 9, LARGEST])
    for row, example in zip(layer(torch.ones(3, 12), ids).tolist(), ids.tolist(), strict=True):
        assert row == [1.0] * 3 + [float(on) for on in owned_by_hand(key, example, 12, 0.4)[3:]]


@pytest.mark.parametrize("shape", [(3, 10), (3, 4, 10), (3, 10, 4, 5), (3, 10, 2, 2, 2)])
def test_vectors_tokens_and_maps_are_gated_by_channel(shape):
    layer = ExampleTiedDropout(p_gen=0.2, p_mem=0.5, name="here")
    ids = torch.tensor([4, 5, 6])
    gates = layer(torch.ones(3, 10), ids)
    out = layer(torch.ones(shape), ids)
    channels_last = out if len(shape) == 3 else out.movedim(1, -1)
    per_example = channels_last.reshape(3, -1, 10)
    assert torch.equal(per_example, gates[:, None].expand_as(per_example))


def test_scaled_weighs_memorization_neurons_and_dropped_removes_them():
    model = nn.Sequential(nn.Identity(), nn.Linear(10, 10, bias=False))
    nn.init.eye_(model[1].weight)
    tied = tie(model, ["1"], p_gen=0.2, p_mem=0.3)
    x = torch.rand(2, 10) + 1
    with dropout_mode(tied, "scaled"):
        torch.testing.assert_close(tied(x), torch.cat([x[:, :2], 0.3 * x[:, 2:]], dim=1))
    with dropout_mode(tied, "dropped"):
        torch.testing.assert_close(tied(x), torch.cat([x[:, :2], 0 * x[:, 2:]], dim=1))
    with dropout_mode(tied, "dropped", rescale=True):
        torch.testing.assert_close(tied(x), torch.cat([x[:, :2] * 0.5 / 0.2, 0 * x[:, 2:]], dim=1))
    assert tied(x, ids=torch.tensor([1, 2])).shape == (2, 10)  # each layer has its own mode back


def test_the_input_is_left_unchanged_and_gradients_reach_the_owned_channels_only():
    layer = ExampleTiedDropout(p_gen=0.2, p_mem=0.5)
    x = torch.rand(3, 10, requires_grad=True)
    before = x.detach().clone()
    layer(x, torch.arange(3)).sum().backward()
    assert torch.equal(x.detach(), before)
    assert torch.equal(x.grad, layer(torch.ones(3, 10), torch.arange(3)))


def test_the_layer_stores_nothing_and_draws_nothing():
    tied = tie(network())
    random = torch.get_rng_state()
    x, ids = batch()
    tied(x, ids=ids)
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(layer.state_dict()) + len(list(layer.buffers())) for layer in dropout_layers(tied)] == [0] * 6
    assert all(layer.ids is None for layer in dropout_layers(tied))


def test_resnet9_is_tied_in_the_six_places_of_the_specification():
    tied = tie(network())
    assert [layer.name for layer in dropout_layers(tied)] == [
        "conv1",
        "conv2",
        "residual1",
        "conv3",
        "residual2",
        "conv4",
    ]
    seen = {}
    for name in ("residual1", "conv4"):
        tied.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    with dropout_mode(tied, "dropped"):
        tied(batch()[0])
    assert [(out != 0).any(dim=0).flatten(1).any(dim=1).nonzero().max().item() < 3 for out in seen.values()] == [
        True
    ] * 2


def test_tying_leaves_the_model_its_names_and_its_layer_groups_alone():
    model = network()
    before = copy.deepcopy(model)
    tied = tie(model)
    assert tied.state_dict().keys() == model.state_dict().keys()
    assert layer_groups(tied) == layer_groups(model)
    assert not dropout_layers(model)
    x, _ = batch()
    assert torch.equal(model.eval()(x), before.eval()(x))
    model.load_state_dict(tied.state_dict())


def test_untying_gives_the_model_back():
    model = network().eval()
    x, _ = batch()
    plain = untie(tie(model))
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in model.named_modules()]
    assert torch.equal(plain(x), model(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'ids'"):
        plain(x, ids=torch.arange(6))


def test_a_network_tied_with_p_gen_1_is_the_network():
    model = network().eval()
    x, ids = batch()
    torch.testing.assert_close(tie(model, p_gen=1.0)(x, ids=ids), model(x))


@pytest.mark.parametrize("name", ["vit", "timm:resnet18"])
def test_any_model_is_tied_after_its_layer_groups(name):
    model = build_model(ModelConfig(name=name), image_shape=(3, 16, 16), num_classes=5, seed=0).eval()
    tied = tie(model)
    assert dropout_layers(tied)
    x, ids = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    assert not torch.equal(tied(x, ids=ids), tied(x, ids=ids + 2))
    torch.testing.assert_close(tied(x, ids=ids), tied(x.flip(0), ids=ids.flip(0)).flip(0))


def test_places_are_module_names_or_layer_groups():
    assert [layer.name for layer in dropout_layers(tie(network(), ["conv1.norm", "residual1.second"]))] == [
        "conv1.norm",
        "residual1.second",
    ]
    vit = build_model(ModelConfig(name="vit"), image_shape=(1, 4, 4), num_classes=5, seed=0)
    assert [layer.name for layer in dropout_layers(tie(vit, ["block3"]))] == ["blocks.2"]


def test_a_copy_of_a_tied_model_has_layers_of_its_own():
    tied = tie(network())
    other = copy.deepcopy(tied)
    set_mode(other, "dropped")
    assert {layer.mode for layer in dropout_layers(tied)} == {"tied"}
    other(batch()[0])


def test_it_works_under_autocast():
    tied = tie(network()).eval()
    x, ids = batch()
    with torch.autocast("cpu", torch.bfloat16):
        fast = tied(x, ids=ids)
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), tied(x, ids=ids), rtol=0.1, atol=0.02)
    layer = dropout_layers(tied)[0]
    assert layer(torch.ones(6, 8, dtype=torch.bfloat16), ids).dtype == torch.bfloat16


def test_gradients_of_each_example_through_torch_func_equal_those_one_by_one():
    tied = tie(network()).eval()
    x, ids = batch()
    parameters = {name: p.detach() for name, p in tied.named_parameters()}

    def logit(parameters, image, example):
        return functional_call(tied, parameters, (image[None],), {"ids": example[None]})[0, 0]

    together = vmap(grad(logit), in_dims=(None, 0, 0))(parameters, x, ids)
    for i in range(len(x)):
        tied.zero_grad()
        tied(x[i : i + 1], ids=ids[i : i + 1])[0, 0].backward()
        for name, parameter in tied.named_parameters():
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


def test_it_works_under_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        tied = tie(network()).eval()
        parallel = nn.parallel.DistributedDataParallel(tied)
        x, ids = batch()
        out = parallel(x, ids=ids)
        assert torch.equal(out, tied(x, ids=ids))
        out.sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_masks_on_a_gpu_equal_those_on_the_cpu():
    ids = torch.randint(0, LARGEST, (1000,))
    for p_mem in (0.1, 0.5, 1.0):
        assert torch.equal(masks(ids.cuda(), p_mem=p_mem).cpu(), masks(ids, p_mem=p_mem))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x), "'conv1' is in mode 'tied' but was given no example ids; call the model with ids="),
        (lambda m, x: m(x, ids=torch.arange(2)), r"'conv1' was given ids .* shape \(2,\) .* shape \(6,\)"),
        (lambda m, x: m(x, ids=torch.arange(6.0)), "of type torch.float32 .*; give one int64 id an example"),
        (lambda m, x: m(x, ids=torch.arange(6)[:, None]), r"shape \(6, 1\); give one int64 id an example"),
        (lambda m, x: m(x, ids=torch.arange(6) - 1), r"an example id is -1; give ids from 0 to 2\^63 - 1"),
    ],
)
def test_missing_and_wrong_ids_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(tie(network()), batch()[0])


def test_a_layer_of_its_own_names_wrong_ids():
    layer = ExampleTiedDropout(name="mine")
    with pytest.raises(InputError, match="'mine' was given ids of type torch.int32"):
        layer(torch.ones(3, 10), torch.arange(3, dtype=torch.int32))
    with pytest.raises(InputError, match="have no channels"):
        layer(torch.ones(3), torch.arange(3))
    with pytest.raises(InputError, match="an example id is -3"):
        check_ids(torch.tensor([5, -3]))


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["p_gen", "p_mem"])
def test_a_probability_outside_0_to_1_is_refused(name, value):
    with pytest.raises(InputError, match=rf"{name} is .*; give a share in \(0, 1\]"):
        ExampleTiedDropout(**{name: value})


@given(p_gen=st.floats(0.001, 1), channels=st.integers(1, 600))
def test_a_layer_too_narrow_for_p_gen_names_itself_and_the_smallest_width(p_gen, channels):
    layer = ExampleTiedDropout(p_gen=p_gen, name="narrow")
    layer.mode = "dropped"
    smallest = next(c for c in range(1, 1000) if round(p_gen * c) >= 1)
    if channels >= smallest:
        assert layer(torch.ones(1, channels)).sum() == round(p_gen * channels)
    else:
        with pytest.raises(InputError, match=f"layer 'narrow' has {channels} channels.* make it at least {smallest} w"):
            layer(torch.ones(1, channels))


class Pair(nn.Module):
    """Gives two tensors, as attention modules do."""

    def forward(self, x):
        return x, x


class OddSequence(nn.Sequential):
    def forward(self, x):
        return self[0](x)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (["conv5"], "place 'conv5' is not known; did you mean 'conv4'"),
        (["conv1", "conv1"], r"after names \['conv1'\] more than once"),
        ([], "no place to insert dropout"),
    ],
)
def test_a_place_that_is_none_is_refused(after, message):
    with pytest.raises(InputError, match=message):
        tie(network(), after)


def test_a_place_whose_output_cannot_be_gated_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), Pair())
    with pytest.raises(InputError, match="the Pair before an inserted dropout gives a tuple"):
        tie(model, ["1"])(torch.ones(2, 4), ids=torch.arange(2))
    model = nn.Sequential(OddSequence(nn.Linear(4, 4)), nn.ModuleList([nn.Linear(4, 4)]))
    with pytest.raises(InputError, match="'0' is a OddSequence, a sequence with a forward of its own"):
        tie(model, ["0"])
    with pytest.raises(InputError, match="'1' is a list of modules"):
        tie(model, ["1"])
    resnet50 = build_model(ModelConfig(name="resnet50"), image_shape=(3, 32, 32), num_classes=5, seed=0)
    with pytest.raises(InputError, match="layer group 'stem' is not one module"):
        tie(resnet50, ["stem"])


def test_a_model_is_tied_once_and_modes_need_a_tied_model():
    tied = tie(network())
    with pytest.raises(InputError, match="has example-tied dropout already"):
        tie(tied)
    with pytest.raises(InputError, match="mode 'drop' is not known; did you mean 'dropped'"):
        set_mode(tied, "drop")
    with pytest.raises(InputError, match="the model has no example-tied dropout; make one with tie"):
        set_mode(network(), "dropped")


def test_feature_maps_with_their_channels_last_are_refused():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, num_classes=10)
    with pytest.raises(
        InputError, match=r"SwinTransformer keeps its feature maps as \[batch, height, width, channels\]"
    ):
        tie(model, after=["layers.0"])
