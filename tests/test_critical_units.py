"""The vectorized search against a plain loop: one example at a time, weights edited, full backward passes."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.resnet import Bottleneck, ResNet

from memlib.batches import normalize
from memlib.critical_units import draw_reference, find_critical_units
from memlib.datasets import ImageSet
from memlib.experiments import CriticalUnitsConfig
from memlib.models import ResNet9
from memlib.network_units import network_units
from memlib.noisy_copies import noisy_copies

CPU = torch.device("cpu")
CLASSES = 4


def resnet9():
    return ResNet9(in_channels=3, num_classes=CLASSES, width=0.125)


def bottlenecks():
    """torchvision's ResNet-50 with one block a stage and a sixteenth of its width."""
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=4)


def vit():
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.0, num_classes=CLASSES
    )


NETWORKS = [resnet9, bottlenecks, vit]


def images(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(0, CLASSES, (n,), generator=generator), torch.arange(n) * 7 + 3)


@functools.cache
def memorized(build):
    """A network that has learned random labels, and those of its examples."""
    data = images()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(25):
            optimizer.zero_grad()
            F.cross_entropy(model(normalize(data.images)), data.labels).backward()
            optimizer.step()
    return model, data


def plain_search(model, example, reference, config, seed):
    """Return the removed (layer, unit) and the outcome, without gates: what the specification says, word by word."""
    model = copy.deepcopy(model).eval()
    units = network_units(model, torch.zeros(1, 3, 16, 16))
    rows = [
        (layer, unit, model.get_submodule(layer.name).weight) for layer in units.layers for unit in range(layer.n_units)
    ]
    drawn = {"noise": config.noise, "seed": seed, "device": CPU}
    own_inputs = noisy_copies(example, copies=config.copies, **drawn).contiguous()
    reference_inputs = noisy_copies(reference, copies=config.reference_copies, **drawn).contiguous()
    removed = []
    for _ in range(config.max_steps):
        model.zero_grad()
        own = model(own_inputs).mean(dim=0, keepdim=True)
        if own.argmax() != example.labels[0]:
            return removed, "flipped"
        logits = model(reference_inputs).reshape(config.reference_copies, len(reference), -1).mean(dim=0)
        (F.cross_entropy(logits, reference.labels) - F.cross_entropy(own, example.labels)).backward()
        scores = {}
        for layer, unit, weight in rows:
            row = layer.first + unit
            if (layer.name, unit) not in removed:
                scores[layer.name, unit] = (weight[row] * weight.grad[row]).sum().item()
        best = max(scores, key=scores.__getitem__)
        if scores[best] <= 0:
            return removed, "no_positive_score"
        removed.append(best)
        layer = next(layer for layer in units.layers if layer.name == best[0])
        with torch.no_grad():
            model.get_submodule(best[0]).weight[layer.first + best[1]] = 0
    own = model(own_inputs).mean(dim=0)
    return removed, "step_limit" if own.argmax() == example.labels[0] else "flipped"


def search(model, data, n=6, config=None, seed=0, **changes):
    config = config or CriticalUnitsConfig(**{"reference_size": 12, "copies": 2, "reference_copies": 2, **changes})
    examples = data.take(torch.arange(n))
    reference = draw_reference(data, examples.ids, config, seed=seed)
    return find_critical_units(model, examples, reference, config, seed=seed, device=CPU), examples, reference


def sequences(result):
    return {e.example_id: ([(r.layer, r.unit) for r in e.removed], e.outcome) for e in result.found}


@pytest.mark.parametrize("build", NETWORKS)
def test_the_search_removes_what_a_plain_loop_with_edited_weights_removes(build):
    model, data = memorized(build)
    result, examples, reference = search(model, data, max_steps=8)
    assert len(result.found) >= 4
    got = sequences(result)
    lengths = set()
    for i in range(len(examples)):
        example = examples.take(torch.tensor([i]))
        if example.ids.item() in result.skipped:
            continue
        assert got[example.ids.item()] == plain_search(model, example, reference, result.config, seed=0)
        lengths.add(len(got[example.ids.item()][0]))
    assert max(lengths) >= 3, "the networks above are to need several steps"
