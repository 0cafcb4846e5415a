"""The two parts of a unit's score, as slopes of its gate: on the example's own loss and on the others'.

The score of a unit is dJ/d(gate), J = mean cross-entropy of the reference examples minus the example's own,
both under the example's own edited network. Examples whose networks lack the same units share the
reference part: in the first step, all of them.

Paper: the neuron-level experiments (Figure 5), where the score is the sum over the unit's weights of
weight * dJ/dweight: the same number without a weight gradient.
Deviations: none that changes a number beyond float rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from memlib.chunks import ChunkSize, run_in_chunks
from memlib.config import Precision
from memlib.datasets import ImageSet
from memlib.experiments import CriticalUnitsConfig
from memlib.gated_network import GatedNetwork, Replay
from memlib.noisy_copies import mean_over_copies, noisy_copies
from memlib.precision import autocast, exact_float32

GRADIENT_SHARE = 2  # a chunk's activations and, at worst, as much again for their gradients


@dataclass(frozen=True, eq=False)
class GateGradients:
    """What all gradients of one search have in common."""

    network: GatedNetwork
    config: CriticalUnitsConfig
    seed: int  # of the noise
    device: torch.device
    budget: int  # bytes for a chunk's activations and gradients

    def own(
        self, examples: ImageSet, gates: Float32[Tensor, "n u"]
    ) -> tuple[Int64[Tensor, " n"], Float32[Tensor, "n u"]]:
        """Return each example's prediction under its own gates, and the slope of its cross-entropy by each gate.

        Always in float32: an example's few copies cost little, and its own slopes are most of a score.
        """
        size = self._chunk_size(self.config.copies)
        if not self.network.units.one_row_an_image:
            size.items = 1

        def work(chunk: slice) -> tuple[Tensor, Tensor]:
            return self._own_chunk(examples.take(torch.arange(len(examples))[chunk]), gates[chunk])

        predictions, slopes = zip(*run_in_chunks(len(examples), size, work), strict=True)
        return torch.cat(predictions), torch.cat(slopes)

    def reference(
        self,
        inputs: Tensor,
        labels: Int64[Tensor, " r"],
        gates: Float32[Tensor, "n u"],
        *,
        precision: Precision = "float32",
    ) -> Float32[Tensor, "n u"]:
        """Return, per row of `gates`, the slope of the reference examples' mean cross-entropy by each gate.

        `inputs` are the reference examples' noisy copies, on the device, as `labels` and `gates`.
        """
        if len(gates) == 0:
            return torch.zeros_like(gates)
        distinct, row = torch.unique(gates, dim=0, return_inverse=True)
        copies = self.config.reference_copies
        by_copy = inputs.unflatten(0, (copies, len(labels)))
        prefixes = [self.network.intact_layers(own) for own in distinct.cpu()]

        def work(chunk: slice) -> Tensor:
            batch = by_copy[:, chunk].flatten(0, 1).contiguous(memory_format=torch.channels_last)
            with exact_float32(self.device):
                return self._reference_chunk(batch, labels[chunk], _Edited(distinct, prefixes, precision))

        total = torch.zeros_like(distinct)
        for slopes in run_in_chunks(len(labels), self._chunk_size(copies), work):
            total += slopes
        return (total / len(labels))[row]

    def _own_chunk(self, examples: ImageSet, gates: Tensor) -> tuple[Tensor, Tensor]:
        copies, labels = self.config.copies, examples.labels.to(self.device)
        inputs = noisy_copies(examples, copies=copies, noise=self.config.noise, seed=self.seed, device=self.device)
        gates = gates.clone().requires_grad_()
        each = gates[0] if len(gates) == 1 else gates.repeat(copies, 1)
        with exact_float32(self.device):
            logits = mean_over_copies(self.network.logits(inputs, each), copies)
            (slopes,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), gates)
        return logits.detach().argmax(dim=1), slopes

    def _reference_chunk(self, inputs: Tensor, labels: Tensor, edited: _Edited) -> Tensor:
        """Return the slopes of the summed cross-entropy for each distinct gate vector."""
        outputs: list[Tensor | None] = []
        # one more forward pass, which pays where the prefixes it spares add up to more than a network
        if sum(edited.prefixes) > 2 * len(self.network.units.layers):
            with autocast(edited.precision, self.device):
                _, outputs = self.network.record(inputs)
        slopes = []
        for gates, prefix in zip(edited.gates, edited.prefixes, strict=True):
            gates = gates.clone().requires_grad_()
            replay = Replay(outputs, prefix) if outputs else None
            with autocast(edited.precision, self.device):
                logits = self.network.logits(inputs, gates, replay=replay)
            averaged = mean_over_copies(logits, self.config.reference_copies)
            loss = F.cross_entropy(averaged, labels, reduction="sum")
            slopes += torch.autograd.grad(loss, gates)
        return torch.stack(slopes)

    def _chunk_size(self, copies: int) -> ChunkSize:
        bytes_per_example = GRADIENT_SHARE * copies * self.network.units.bytes_per_image
        return ChunkSize(max(1, self.budget // bytes_per_example))


@dataclass(frozen=True, eq=False)
class _Edited:
    """Distinct edited networks [e, u], how many layers of each are the intact network's, and how to compute them."""

    gates: Float32[Tensor, "e u"]
    prefixes: list[int]
    precision: Precision


def reference_inputs(
    reference: ImageSet, config: CriticalUnitsConfig, *, seed: int, device: torch.device
) -> Float[Tensor, "m c h w"]:
    """Return the noisy copies of the reference examples, kept for the whole search."""
    return noisy_copies(reference, copies=config.reference_copies, noise=config.noise, seed=seed, device=device)
