import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlib.batches import normalize
from memlib.chunks import images_at_once
from memlib.errors import InputError
from memlib.evaluation import accuracy, evaluation_mode, predict, predict_probabilities
from memlib.models import ResNet9
from memlib.rewinding import Measurement, rewinding_accuracies

CPU = torch.device("cpu")


def small_set(n=23):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 12, 12), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 5, (n,), generator=generator)


def test_predictions_margins_and_losses_equal_one_example_at_a_time():
    model = ResNet9(in_channels=1, num_classes=5, width=0.0625)
    images, labels = small_set()
    got = predict(model, images, labels, device=CPU, batch_size=7)
    model.eval()
    for i, label in enumerate(labels.tolist()):
        logits = model(normalize(images[i : i + 1]))[0]
        others = [x for k, x in enumerate(logits.tolist()) if k != label]
        assert got.prediction[i] == logits.argmax()
        assert got.margin[i].item() == pytest.approx(logits[label].item() - max(others), abs=1e-5)
        assert got.loss[i].item() == pytest.approx(F.cross_entropy(logits[None], labels[i : i + 1]).item(), abs=1e-5)


def test_the_margin_is_positive_exactly_where_the_prediction_is_the_assigned_label():
    model = ResNet9(in_channels=1, num_classes=5, width=0.0625)
    images, labels = small_set(100)
    got = predict(model, images, labels, device=CPU)
    assert torch.equal(got.margin > 0, got.prediction == labels)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 1000])
def test_predictions_do_not_depend_on_the_batch_size(batch_size):
    model = ResNet9(in_channels=1, num_classes=5, width=0.0625)
    images, labels = small_set()
    whole = predict(model, images, labels, device=CPU, batch_size=23)
    parts = predict(model, images, labels, device=CPU, batch_size=batch_size)
    torch.testing.assert_close(parts.margin, whole.margin)


class Cramped(nn.Module):
    """A network on a machine whose memory holds three images."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, inputs):
        self.sizes.append(len(inputs))
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(inputs)


def test_batches_that_do_not_fit_into_memory_are_halved_until_they_do():
    model = Cramped(ResNet9(in_channels=1, num_classes=5, width=0.0625)).train()
    images, labels = small_set()
    got, expected = predict(model, images, labels, device=CPU), predict(model.model, images, labels, device=CPU)
    assert model.sizes[:4] == [23, 11, 5, 2]
    torch.testing.assert_close(got.margin, expected.margin)
    assert torch.equal(got.prediction, expected.prediction)
    probabilities = predict_probabilities(model, images, device=CPU)
    torch.testing.assert_close(probabilities, predict_probabilities(model.model, images, device=CPU))
    assert model.training


def test_predicting_changes_neither_the_model_nor_its_modes():
    model = nn.Sequential(ResNet9(in_channels=1, num_classes=5, width=0.0625), nn.Dropout(0.5)).train()
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    predict(model, *small_set(), device=CPU)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model[0].training
    assert not model[1].training


def test_modes_come_back_after_an_error():
    model = nn.Dropout()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError
    assert model.training


def test_accuracy_is_the_share_predicted_as_assigned_among_the_chosen():
    model = ResNet9(in_channels=1, num_classes=5, width=0.0625)
    images, labels = small_set()
    got = predict(model, images, labels, device=CPU)
    chosen = torch.arange(23) % 3 == 0
    result = accuracy(got, labels, chosen)
    assert result is not None
    right = [int(p == y) for p, y, c in zip(got.prediction, labels, chosen, strict=True) if c]
    assert result.accuracy == pytest.approx(sum(right) / len(right))
    assert result.n == len(right)
    assert accuracy(got, labels, torch.zeros(23, dtype=torch.bool)) is None


class Wrapped(nn.Module):
    """A network that returns its logits inside something else."""

    def __init__(self, wrap):
        super().__init__()
        self.model, self.wrap = nn.Sequential(nn.Flatten(), nn.Linear(144, 5)), wrap

    def forward(self, inputs):
        return self.wrap(self.model(inputs))


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda logits: (logits, None), "a tuple"),
        (lambda logits: {"logits": logits}, "a dict"),
        (lambda logits: logits[..., None], r"a tensor \[23, 5, 1\]"),
    ],
)
def test_a_network_that_returns_no_logits_is_named(wrap, kind):
    images, labels = small_set()
    with pytest.raises(InputError, match=f"Wrapped returns {kind}, not logits .*; wrap it in a module that does"):
        predict(Wrapped(wrap), images, labels, device=CPU)
    with pytest.raises(InputError, match="Wrapped returns"):
        rewinding_accuracies(Wrapped(wrap), {}, {"test": (images, labels)})


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 32, 32), 1000), ((1, 64, 64), 1000), ((3, 224, 224), 81), ((7,), 1000)]
)
def test_of_large_images_fewer_are_computed_at_once(shape, expected):
    assert images_at_once(torch.empty(2, *shape), 1000) == expected
    assert images_at_once(torch.empty(2, *shape), 1) == 1
    assert images_at_once(torch.empty(2, *shape), 1000, torch.device("cuda")) == 1000


@pytest.mark.parametrize("size", [0, -3])
def test_no_images_at_once_are_refused(size):
    images, labels = small_set()
    model = ResNet9(in_channels=1, num_classes=5, width=0.0625)
    with pytest.raises(InputError, match=f"{size} images are to be computed at once; give at least 1"):
        predict(model, images, labels, device=CPU, batch_size=size)
    with pytest.raises(InputError, match=f"{size} images are to be computed at once"):
        how = Measurement(chunk_size=size)
        rewinding_accuracies(model, {0: model.state_dict()}, {"test": (images, labels)}, measurement=how)
