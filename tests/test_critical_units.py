"""The vectorized search against a plain loop: one example at a time, weights edited, full backward passes."""

import copy
import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from memlib import chunks, critical_units
from memlib.batches import normalize
from memlib.critical_units import draw_reference, find_critical_units, take_examples
from memlib.datasets import ImageSet
from memlib.edited_networks import edited_accuracies
from memlib.errors import InputError
from memlib.evaluation import accuracy, predict
from memlib.experiments import CriticalUnitsConfig
from memlib.gate_gradients import GateGradients
from memlib.gated_network import GatedNetwork
from memlib.models import ResNet9
from memlib.network_units import network_units
from memlib.noisy_copies import noisy_copies
from memlib.reference_slopes import ReferenceSlopes

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


def windows():
    """A network whose layers see several windows of an image as rows of one batch, so that no batch mixes gates."""
    size = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return SwinTransformer(num_classes=CLASSES, **size)


NETWORKS = [resnet9, bottlenecks, vit, windows]


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
    result, examples, reference = search(model, data, n=5, max_steps=6)
    assert len(result.found) >= 3
    got = sequences(result)
    lengths = set()
    for i in range(len(examples)):
        example = examples.take(torch.tensor([i]))
        if example.ids.item() in result.skipped:
            continue
        assert got[example.ids.item()] == plain_search(model, example, reference, result.config, seed=0)
        lengths.add(len(got[example.ids.item()][0]))
    assert max(lengths) >= 3  # else this would compare first steps only


@given(budget=st.sampled_from([1, 500_000, 2_000_000]), first=st.integers(0, 3), n=st.integers(1, 3))
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_results_depend_neither_on_chunks_nor_on_the_other_examples_of_a_call(monkeypatch, budget, first, n):
    model, data = memorized(resnet9)
    whole, examples, reference = search(model, data, max_steps=4)
    monkeypatch.setattr(critical_units, "memory_budget", lambda device: budget)
    part = find_critical_units(
        model, examples.take(torch.arange(first, first + n)), reference, whole.config, seed=0, device=CPU
    )
    assert sequences(part) == {e: found for e, found in sequences(whole).items() if e in sequences(part)}
    assert len(part.found) == n


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_chunk_that_does_not_fit_is_halved_and_the_results_stay(error):
    sizes = []

    def work(chunk):
        sizes.append(chunk.stop - chunk.start)
        if sizes[-1] > 3:
            raise error
        return list(range(10))[chunk]

    size = chunks.ChunkSize(8)
    assert [i for piece in chunks.run_in_chunks(10, size, work) for i in piece] == list(range(10))
    assert size.items == 2
    assert sizes == [8, 4, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_search_that_runs_out_of_memory_finds_the_same_in_smaller_chunks(monkeypatch, error):
    model, data = memorized(resnet9)
    whole, _, _ = search(model, data, max_steps=3)
    is_noisy = torch.arange(len(data)) % 4 == 0
    judged = edited_accuracies(model, whole.units, whole.found, (data, is_noisy), device=CPU)
    compute, sizes = GatedNetwork.logits, []

    def run_short(network, inputs, gates, **how):
        sizes.append(len(inputs))
        if len(inputs) > 7:
            raise error
        return compute(network, inputs, gates, **how)

    monkeypatch.setattr(GatedNetwork, "logits", run_short)
    short, _, _ = search(model, data, max_steps=3)
    assert sequences(short) == sequences(whole)
    assert edited_accuracies(model, whole.units, whole.found, (data, is_noisy), device=CPU) == judged
    assert max(sizes) > 7  # it was tried, and refused


def test_one_example_that_does_not_fit_is_named():
    def work(chunk):
        raise torch.OutOfMemoryError

    with pytest.raises(InputError, match="one example at a time does not fit into memory"):
        list(chunks.run_in_chunks(4, chunks.ChunkSize(4), work))


def test_other_errors_of_a_chunk_are_not_mistaken_for_a_lack_of_memory():
    def work(chunk):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(chunks.run_in_chunks(4, chunks.ChunkSize(4), work))


@pytest.mark.parametrize("changes", [{}, {"refresh": 3}, {"reference_copies": 1}, {"removal": "activation"}])
@pytest.mark.parametrize("build", [resnet9, vit])
def test_no_unit_is_removed_twice_and_no_search_passes_its_bound(build, changes):
    result, _, _ = search(*memorized(build), max_steps=5, **changes)
    for example in result.found:
        units = [(unit.layer_index, unit.unit) for unit in example.removed]
        assert len(set(units)) == len(units) <= 5
        assert all(unit.score > 0 for unit in example.removed)
        assert example.flipped == (example.new_prediction != example.assigned)
        assert example.outcome != "step_limit" or len(units) == 5


def test_a_search_that_reaches_its_bound_is_recorded_as_not_flipped():
    result, _, _ = search(*memorized(vit), max_steps=1)
    assert {(e.outcome, e.flipped, len(e.removed)) for e in result.found} == {("step_limit", False, 1)}


def test_without_a_unit_of_positive_score_the_search_ends_not_flipped():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.zero_()  # removing a filter of zeros changes nothing
        model[1].bias.zero_()  # out - bias is then zero to the last bit
    pixels = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageSet(pixels, model(normalize(pixels)).argmax(dim=1), torch.arange(4))
    config = CriticalUnitsConfig(reference_size=2)
    result = find_critical_units(
        model, data.take(torch.arange(2)), data.take(torch.arange(2, 4)), config, seed=0, device=CPU
    )
    assert [(e.outcome, e.removed, e.flipped) for e in result.found] == [("no_positive_score", (), False)] * 2


def test_examples_that_are_not_predicted_as_assigned_are_skipped_and_counted():
    model, data = memorized(resnet9)
    labels = data.labels.clone()
    labels[1] = (labels[1] + 1) % CLASSES
    whole, _, _ = search(model, data)
    result, _, _ = search(model, ImageSet(data.images, labels, data.ids))
    assert result.skipped == (int(data.ids[1]),)
    expected = sequences(whole)
    expected.pop(int(data.ids[1]))
    assert sequences(result) == expected


def test_when_all_are_skipped_nothing_is_found():
    model, data = memorized(resnet9)
    wrong = ImageSet(data.images, (data.labels + 1) % CLASSES, data.ids)
    result, _, _ = search(model, wrong)
    assert result.found == ()
    assert len(result.skipped) == 6


@pytest.mark.parametrize("removal", ["filter", "activation"])
@pytest.mark.parametrize("build", [resnet9, vit])
def test_the_model_is_left_as_it_was(build, removal):
    model, data = memorized(build)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    search(model, data, n=2, max_steps=2, removal=removal)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_the_reference_batch_has_distinct_ids_and_none_of_the_searched_examples():
    data = images()
    config = CriticalUnitsConfig(reference_size=30)
    reference = draw_reference(data, data.ids[:10], config, seed=1)
    assert sorted(reference.ids.tolist()) == data.ids[10:].tolist()
    with pytest.raises(InputError, match="reference_size is 30, but beside the searched examples there are 29"):
        draw_reference(data, data.ids[:11], config, seed=1)


def test_a_reference_batch_that_contains_an_example_is_named():
    model, data = memorized(resnet9)
    config = CriticalUnitsConfig()
    with pytest.raises(InputError, match=r"reference batch contains the examples with ids \[10, 17\]"):
        find_critical_units(
            model, data.take(torch.arange(3)), data.take(torch.arange(1, 9)), config, seed=0, device=CPU
        )


def test_ids_that_do_not_exist_or_repeat_are_named():
    data = images()
    assert take_examples(data, [17, 3]).ids.tolist() == [17, 3]
    with pytest.raises(InputError, match=r"example ids \[4, 5\] \(2 in all\) are not in the training set"):
        take_examples(data, [3, 4, 5])
    with pytest.raises(InputError, match=r"example ids \[3\] \(1 in all\) are given more than once"):
        take_examples(data, [3, 10, 3])


def test_repeated_ids_are_named_where_a_search_is_given_them():
    model, data = memorized(resnet9)
    config = CriticalUnitsConfig()
    twice, once, others = (data.take(torch.tensor(rows)) for rows in ([0, 0], [0], [5, 6]))
    with pytest.raises(InputError, match=r"example ids \[3\] \(1 in all\) are given more than once"):
        find_critical_units(model, twice, others, config, seed=0, device=CPU)
    with pytest.raises(InputError, match=r"example ids \[3\] \(1 in all\) are given more than once"):
        find_critical_units(model, others, twice, config, seed=0, device=CPU)
    with pytest.raises(InputError, match="0 in the reference batch"):
        find_critical_units(model, once, data.take(torch.arange(0)), config, seed=0, device=CPU)


def test_a_model_without_units_is_named_by_the_search():
    _, data = memorized(resnet9)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))
    with pytest.raises(InputError, match="has no units"):
        search(model, data, n=2)


def test_no_examples_are_refused():
    model, data = memorized(resnet9)
    with pytest.raises(InputError, match="0 examples to search"):
        find_critical_units(model, data.take(torch.arange(0)), data, CriticalUnitsConfig(), seed=0, device=CPU)


def test_scores_that_are_not_finite_are_named():
    model, data = memorized(resnet9)
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.classifier.weight.mul_(1e38).mul_(10)
        model.conv4.norm.weight.fill_(torch.nan)
    labels = torch.zeros_like(data.labels)  # the largest of NaNs is the first
    with pytest.raises(InputError, match="example 3 has scores that are not finite"):
        search(model, ImageSet(data.images, labels, data.ids), n=2)


def test_noise_is_a_function_of_seed_example_and_copy_and_has_the_stated_norm():
    data = images()
    drawn = {"noise": 0.01, "device": CPU}
    five = noisy_copies(data, copies=5, seed=0, **drawn)
    assert torch.equal(noisy_copies(data.take(torch.tensor([7, 2])), copies=2, seed=0, **drawn),
                       five.unflatten(0, (5, 40))[:2, [7, 2]].flatten(0, 1))  # fmt: skip
    assert not torch.equal(five, noisy_copies(data, copies=5, seed=1, **drawn))
    inputs = normalize(data.images)
    shares = (five.unflatten(0, (5, 40)) - inputs).flatten(2).norm(dim=2) / inputs.flatten(1).norm(dim=1)
    assert shares.mean().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(noisy_copies(data, copies=1, noise=0.0, seed=0, device=CPU), inputs)


@pytest.mark.parametrize("build", NETWORKS)
def test_bfloat16_finds_the_units_that_float32_finds(monkeypatch, build):
    model, data = memorized(build)
    exact, _, _ = search(model, data, max_steps=5)
    computed = spy_on_reference(monkeypatch)
    result, _, _ = search(model, data, max_steps=5, precision="bfloat16")
    assert sequences(result) == sequences(exact)
    assert result.skipped == exact.skipped
    assert computed["bfloat16"] > 1  # not everything but the intact network was computed in float32


def spy_on_reference(monkeypatch):
    """Count, by precision, the edited networks that the reference batch is passed through."""
    compute, computed = GateGradients.reference, Counter()

    def count(gradients, inputs, labels, gates, *, precision="float32"):
        computed[precision] += len(gates)
        return compute(gradients, inputs, labels, gates, precision=precision)

    monkeypatch.setattr(GateGradients, "reference", count)
    return computed


@given(budget=st.sampled_from([1, 2_000_000]), first=st.integers(0, 3), n=st.integers(1, 3))
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bfloat16_depends_neither_on_chunks_nor_on_the_other_examples_of_a_call(monkeypatch, budget, first, n):
    model, data = memorized(resnet9)
    whole, examples, reference = search(model, data, max_steps=4, precision="bfloat16")
    monkeypatch.setattr(critical_units, "memory_budget", lambda device: budget)
    some = examples.take(torch.arange(first, first + n))
    part = find_critical_units(model, some, reference, whole.config, seed=0, device=CPU)
    assert sequences(part) == {e: found for e, found in sequences(whole).items() if e in sequences(part)}


def slopes_source(**facts):
    """Reference slopes in bfloat16 for edited networks of a small one, with gates and made-up slopes of their own."""
    model, data = memorized(resnet9)
    config = CriticalUnitsConfig(reference_size=12, copies=2, reference_copies=2, precision="bfloat16")
    units = network_units(model, normalize(data.images[:1]))
    source = ReferenceSlopes.of(
        GateGradients(GatedNetwork(model, units), config, 0, CPU, 2**28), data.take(torch.arange(12))
    )
    gates = torch.ones(3, units.n_units)
    gates[1, 5] = gates[2, 7] = 0
    return replace(source, **facts), gates


def test_the_error_of_bfloat16_is_measured_on_the_intact_network():
    source, gates = slopes_source()
    given = (source.inputs, source.labels, gates[:1])
    exact = source.gradients.reference(*given)
    off = source.gradients.reference(*given, precision="bfloat16") - exact
    assert source.relative_error == pytest.approx((off.abs().max() / exact.abs().max()).item())
    assert 1e-4 < source.relative_error < 0.1
    torch.testing.assert_close(source.intact, exact[0])


@pytest.mark.parametrize(("lead", "computed_again"), [(1.9, True), (2.1, False)])
def test_an_edited_network_is_computed_again_where_the_lead_is_within_the_error_of_two_units(lead, computed_again):
    source, gates = slopes_source()
    given = (source.inputs, source.labels, gates[1:2])
    rough = source.gradients.reference(*given, precision="bfloat16")
    exact = source.gradients.reference(*given)
    error = source.relative_error * rough.masked_fill(gates[1:2] == 0, 0).abs().max()
    own = rough + 1  # every score is -1 ...
    own[0, 5] = -1e6  # ... a removed unit's does not count ...
    own[0, 20] = rough[0, 20] - 100 * error
    own[0, 30] = rough[0, 30] - (100 - lead) * error  # ... and two are close
    found = source.under(gates[1:2], own)
    torch.testing.assert_close(found, exact if computed_again else rough, rtol=0, atol=0)


def test_a_best_score_that_may_not_be_positive_is_computed_again():
    source, gates = slopes_source()
    given = (source.inputs, source.labels, gates[1:2])
    rough = source.gradients.reference(*given, precision="bfloat16")
    own = rough + 1e6
    own[0, 20] = rough[0, 20] - 0.5 * source.relative_error * rough.masked_fill(gates[1:2] == 0, 0).abs().max()
    torch.testing.assert_close(source.under(gates[1:2], own), source.gradients.reference(*given), rtol=0, atol=0)


def test_slopes_that_are_not_finite_in_bfloat16_are_computed_again():
    source, gates = slopes_source(relative_error=float("nan"))
    expected = source.gradients.reference(source.inputs, source.labels, gates)
    torch.testing.assert_close(source.under(gates, torch.zeros_like(gates)), expected)


@pytest.mark.parametrize("build", NETWORKS)
def test_accuracies_of_edited_networks_equal_those_of_models_with_edited_weights(build):
    model, data = memorized(build)
    result, _, _ = search(model, data, max_steps=4)
    is_noisy = torch.arange(len(data)) % 4 == 0
    got = edited_accuracies(model, result.units, result.found, (data, is_noisy), device=CPU)
    for accuracies, example in zip([got.before, *got.after], [None, *result.found], strict=True):
        edited = copy.deepcopy(model)
        for unit in example.removed if example else ():
            layer = result.units.layers[unit.layer_index]
            with torch.no_grad():
                edited.get_submodule(layer.name).weight[layer.first + unit.unit] = 0
        predicted = predict(edited, data.images, data.labels, device=CPU)
        for kind, chosen in (("clean", ~is_noisy), ("noisy", is_noisy)):
            expected = accuracy(predicted, data.labels, chosen)
            assert getattr(accuracies, kind) == pytest.approx(expected.accuracy)


def test_a_split_without_examples_has_no_accuracy():
    model, data = memorized(resnet9)
    result, _, _ = search(model, data, n=1, max_steps=1)
    none = torch.zeros(len(data), dtype=torch.bool)
    got = edited_accuracies(model, result.units, result.found, (data, none), device=CPU)
    assert got.before.noisy is None
    assert got.after[0].clean is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"copies": 0}, "critical_units.copies is 0"), ({"noise": 1.0}, "critical_units.noise is 1.0")],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        CriticalUnitsConfig(**changes)


def test_a_search_on_model_inputs_finds_what_one_on_their_images_finds():
    model, data = memorized(resnet9)
    inputs = ImageSet(normalize(data.images), data.labels, data.ids)
    found, _, _ = search(model, data, max_steps=3)
    on_inputs, _, _ = search(model, inputs, max_steps=3)
    assert sequences(on_inputs) == sequences(found)
    is_noisy = torch.arange(len(data)) % 2 == 0
    judged = [edited_accuracies(model, found.units, found.found, (d, is_noisy), device=CPU) for d in (data, inputs)]
    assert judged[0] == judged[1]
