"""E1: whose gradient moves which layer, the clean examples' or the noisy ones'?

Paper: Figures 1 and 2. Per epoch and layer group, C is the sum over the epoch's batches
of the gradient of the clean examples' share of the batch-mean loss, N the same for the noisy ones.
C + N is exactly the gradient the optimizer uses, so two backward passes over one forward serve both
the step and the accounting.
Deviations: the released code takes a third backward pass, copies every gradient to the CPU at every
step, and turns a batch without noisy examples into NaN; here its share is simply zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from memlib.errors import InputError
from memlib.grouping import LayerGroups


@dataclass(frozen=True, eq=False)
class SplitGradients:
    """One tensor a parameter, shaped like it: the clean and the noisy examples' share of the gradient."""

    clean: tuple[Tensor, ...]
    noisy: tuple[Tensor, ...]


@dataclass(frozen=True)
class GroupGradient:
    """One layer group's epoch: L2 norms of C, N and C + N, and the cosine of C and N (None if one is zero)."""

    group: str
    group_index: int
    clean_norm: float
    noisy_norm: float
    total_norm: float
    cosine: float | None
    n_parameters: int


def split_gradients(
    logits: Float[Tensor, "b k"],
    labels: Int64[Tensor, " b"],
    is_noisy: Bool[Tensor, " b"],
    parameters: Sequence[nn.Parameter],
) -> tuple[Tensor, SplitGradients]:
    """Return the batch-mean cross-entropy (a detached scalar) and its gradient, split into clean and noisy.

    The graph of `logits` is freed. A parameter the logits do not depend on gets zeros.
    """
    share = F.cross_entropy(logits.float(), labels, reduction="none") / len(labels)
    clean_loss = share.masked_fill(is_noisy, 0).sum()
    noisy_loss = share.masked_fill(~is_noisy, 0).sum()
    clean = torch.autograd.grad(clean_loss, parameters, retain_graph=True, materialize_grads=True)
    noisy = torch.autograd.grad(noisy_loss, parameters, materialize_grads=True)
    return (clean_loss + noisy_loss).detach(), SplitGradients(clean, noisy)


def zero_sums(parameters: Sequence[nn.Parameter]) -> SplitGradients:
    """Return float32 accumulators for one epoch, on the parameters' device."""

    def zeros() -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(p, dtype=torch.float32) for p in parameters)

    return SplitGradients(zeros(), zeros())


@torch.no_grad()
def add_to_sums_(sums: SplitGradients, gradients: SplitGradients) -> None:
    """Add one batch's gradients to the epoch's accumulators, in place."""
    torch._foreach_add_(list(sums.clean), list(gradients.clean))
    torch._foreach_add_(list(sums.noisy), list(gradients.noisy))


def summarize_groups(sums: SplitGradients, names: Sequence[str], groups: LayerGroups) -> list[GroupGradient]:
    """Return the epoch's norms and cosine of every layer group, in order of depth.

    `names` are the parameters' names, in the order of the accumulators. Norms are computed in float64.

    Raises:
        InputError: a parameter of the groups is not among the names.
    """
    position = {name: i for i, name in enumerate(names)}
    missing = [name for members in groups.parameters.values() for name in members if name not in position]
    if missing:
        raise InputError(
            f"no gradient is given of {missing[0]}, which is in a layer group ({len(missing)} are missing); take the "
            "gradients of all of model.parameters()."
        )
    summaries = []
    for index, (group, members) in enumerate(groups.parameters.items()):
        chosen = [position[name] for name in members]
        clean = torch.cat([sums.clean[i].flatten().double() for i in chosen])
        noisy = torch.cat([sums.noisy[i].flatten().double() for i in chosen])
        measures = torch.stack([clean.norm(), noisy.norm(), (clean + noisy).norm(), clean @ noisy])
        clean_norm, noisy_norm, total_norm, product = measures.tolist()
        cosine = product / (clean_norm * noisy_norm) if clean_norm > 0 and noisy_norm > 0 else None
        summaries.append(GroupGradient(group, index, clean_norm, noisy_norm, total_norm, cosine, clean.numel()))
    return summaries
