"""What removing an example's critical units costs everyone else: accuracies of the edited networks.

Paper: the neuron-level experiments (Figure 5 b), the drop in training accuracy at the flip.
Deviations: the released code decodes and evaluates the whole training set once for every example; here all
edited networks are evaluated chunk of images by chunk, and what lies before the first unit a network lacks
is computed once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn

from memlib.batches import model_inputs
from memlib.chunks import ChunkSize, memory_budget, run_in_chunks
from memlib.config import Precision
from memlib.critical_units import CriticalUnits, RemovedUnit
from memlib.datasets import ImageSet
from memlib.gated_network import GatedNetwork, Replay
from memlib.network_units import NetworkUnits
from memlib.precision import autocast, exact_float32


@dataclass(frozen=True)
class SplitAccuracy:
    """Shares of the clean and of the noisy examples predicted as assigned, in [0, 1]; None for a split without any."""

    clean: float | None
    noisy: float | None


@dataclass(frozen=True)
class EditedAccuracies:
    """Of the intact network, and of each edited one in the order of the examples whose units it lacks."""

    before: SplitAccuracy
    after: tuple[SplitAccuracy, ...]


def edited_accuracies(
    model: nn.Module,
    units: NetworkUnits,
    found: Sequence[CriticalUnits],
    data: tuple[ImageSet, Bool[Tensor, " n"]],
    *,
    device: torch.device,
    precision: Precision = "float32",
) -> EditedAccuracies:
    """Return the accuracy on `data` (images with assigned labels, is_noisy) with each example's units removed.

    `units` and `found` are those of one search on this model, which is left as it was. Images are seen
    without noise, as in every other accuracy; those that do not fit on `device` are moved chunk by chunk.

    Raises:
        InputError: not even one image fits into memory.
    """
    images, is_noisy = data
    network = GatedNetwork(model, units)
    gates = torch.stack([gates_without(units, ()), *(gates_without(units, example.removed) for example in found)])
    distinct, row = torch.unique(gates, dim=0, return_inverse=True)
    correct = _correct(network, distinct.to(device), images, device=device, precision=precision)[row]
    accuracies = [SplitAccuracy(_share(hits[~is_noisy]), _share(hits[is_noisy])) for hits in correct]
    return EditedAccuracies(accuracies[0], tuple(accuracies[1:]))


def gates_without(units: NetworkUnits, removed: Sequence[RemovedUnit]) -> Float32[Tensor, " u"]:
    """Return the gate vector of the network that lacks these units."""
    gates = torch.ones(units.n_units)
    gates[[units.position(unit.layer_index, unit.unit) for unit in removed]] = 0
    return gates


@torch.no_grad()
def _correct(
    network: GatedNetwork,
    gates: Float32[Tensor, "e u"],
    images: ImageSet,
    *,
    device: torch.device,
    precision: Precision,
) -> Bool[Tensor, "e n"]:
    """Return for each gate vector which examples are predicted as assigned, on the CPU."""
    prefixes = [network.intact_layers(own) for own in gates.cpu()]

    def work(chunk: slice) -> Tensor:
        inputs = model_inputs(images.images[chunk], device)
        labels = images.labels[chunk].to(device)
        with exact_float32(device), autocast(precision, device):
            _, outputs = network.record(inputs)
            predictions = [
                network.logits(inputs, own, replay=Replay(outputs, prefix)).argmax(dim=1)
                for own, prefix in zip(gates, prefixes, strict=True)
            ]
        return (torch.stack(predictions) == labels).cpu()

    size = ChunkSize(max(1, memory_budget(device) // network.units.bytes_per_image))
    return torch.cat(list(run_in_chunks(len(images), size, work)), dim=1)


def _share(hits: Bool[Tensor, " n"]) -> float | None:
    return hits.double().mean().item() if len(hits) else None
