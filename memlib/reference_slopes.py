"""The reference part of every score: in bfloat16 where that settles which unit goes, in float32 where it does not.

By far most of a search's time goes into these slopes, for the reference batch is passed through each example's
own edited network. In bfloat16 they are off by a few percent of the largest. How much is measured on
the intact network, where both precisions are computed. In an edited one, the unit with the largest score is
float32's if it leads the second by more than both can be off; the networks in which it does not are
computed again. What decides is the network and the reference batch, never the other examples of a call.

Paper: none; the released code computes in float32.
Deviations: with `precision="bfloat16"`, a recorded score is bfloat16's where the lead was clear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from memlib.datasets import ImageSet
from memlib.gate_gradients import GateGradients, reference_inputs
from memlib.precision import resolve_precision


@dataclass(frozen=True, eq=False)
class ReferenceSlopes:
    """The reference batch of a search, on the device, and how far bfloat16 is off on the intact network.

    intact: the slopes of the intact network, in float32; None where everything is computed in float32.
    relative_error: the largest error of a slope in bfloat16 there, as a share of the largest slope.
    """

    gradients: GateGradients
    inputs: Float[Tensor, "m c h w"]
    labels: Int64[Tensor, " r"]
    intact: Float32[Tensor, " u"] | None = None
    relative_error: float = 0.0

    @classmethod
    def of(cls, gradients: GateGradients, reference: ImageSet) -> ReferenceSlopes:
        """Return the slopes' source for a reference batch; in bfloat16, the error is measured here."""
        config, device = gradients.config, gradients.device
        inputs = reference_inputs(reference, config, seed=gradients.seed, device=device)
        labels = reference.labels.to(device)
        if resolve_precision(config.precision, device) == "float32":
            return cls(gradients, inputs, labels)
        ones = torch.ones(1, gradients.network.units.n_units, device=device)
        intact = gradients.reference(inputs, labels, ones)[0]
        error = (gradients.reference(inputs, labels, ones, precision="bfloat16")[0] - intact).abs().max()
        return cls(gradients, inputs, labels, intact, (error / intact.abs().max()).item())

    def under(self, gates: Float32[Tensor, "n u"], own: Float32[Tensor, "n u"]) -> Float32[Tensor, "n u"]:
        """Return the slopes of the reference loss by each gate, good enough to find the largest score in each row.

        `own` are the slopes of the examples' own losses. Removed units have any slope.
        """
        if self.intact is None:
            return self.gradients.reference(self.inputs, self.labels, gates)
        slopes = self.intact.repeat(len(gates), 1)
        edited = (gates == 0).any(dim=1)
        slopes[edited] = self.gradients.reference(self.inputs, self.labels, gates[edited], precision="bfloat16")
        doubtful = edited & self._is_doubtful(slopes, gates, own)
        slopes[doubtful] = self.gradients.reference(self.inputs, self.labels, gates[doubtful])
        return slopes

    def _is_doubtful(self, slopes: Tensor, gates: Tensor, own: Tensor) -> Bool[Tensor, " n"]:
        """Return in which rows the largest score may not be float32's, or may not be positive in float32."""
        scores = (slopes - own).masked_fill(gates == 0, -torch.inf)
        largest = scores.topk(min(2, scores.shape[1])).values
        off = self.relative_error * slopes.masked_fill(gates == 0, 0).abs().amax(dim=1)
        # a comparison with what is not finite is false, and so in doubt
        return ~((largest[:, 0] - largest[:, -1] > 2 * off) & (largest[:, 0].abs() > off))
