"""E4: how few units carry one example? The units whose removal, one after the other, changes its prediction.

For each example on its own, starting from the intact model: remove the unit whose removal, to first order,
most raises this example's loss while least raising the others', until the prediction changes. All examples
of a call are searched side by side, each with its own gates; those that have flipped leave.

Paper: the neuron-level experiments (Figure 5). J = mean over a reference batch of the others' cross-entropy
minus the example's own; the unit with the largest positive dJ/d(gate) goes, never the same twice.
Deviations: the search has a bound, and what has not flipped is a result; the reference batch is drawn once
for all examples, of distinct ids and without any of theirs; an example's noisy copies are the same in every
step. With `refresh` above 1 or fewer reference copies the reference part of the gradient is approximate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from memlib.chunks import memory_budget
from memlib.datasets import ImageSet
from memlib.errors import InputError
from memlib.experiments import CriticalUnitsConfig
from memlib.gate_gradients import GateGradients
from memlib.gated_network import GatedNetwork
from memlib.network_units import NetworkUnits, network_units
from memlib.noisy_copies import noisy_copies
from memlib.reference_slopes import ReferenceSlopes
from memlib.seeds import stream

Outcome = Literal["flipped", "no_positive_score", "step_limit"]


@dataclass(frozen=True)
class RemovedUnit:
    """A unit (counted within its layer's units), its layer (by depth, classifier left out), its score when removed."""

    layer: str
    layer_index: int
    unit: int
    score: float


@dataclass(frozen=True)
class CriticalUnits:
    """One example's search: units in order of removal, how it ended, and the prediction at its end."""

    example_id: int
    assigned: int
    new_prediction: int
    outcome: Outcome
    removed: tuple[RemovedUnit, ...]

    @property
    def flipped(self) -> bool:
        """Return whether the prediction changed."""
        return self.outcome == "flipped"


@dataclass(frozen=True)
class CriticalUnitsSearch:
    """The result of one call: searched examples and, by id, those not predicted as assigned, in the order given."""

    found: tuple[CriticalUnits, ...]
    skipped: tuple[int, ...]
    config: CriticalUnitsConfig
    units: NetworkUnits


def draw_reference(
    train: ImageSet, searched: Int64[Tensor, " n"], config: CriticalUnitsConfig, *, seed: int
) -> ImageSet:
    """Return `config.reference_size` training examples of distinct ids, drawn from those not `searched` (ids).

    Draw it once for all examples of a run, then search them in as many calls as you like.

    Raises:
        InputError: too few examples are left.
    """
    others = (~torch.isin(train.ids, searched)).nonzero().squeeze(1)
    if len(others) < config.reference_size:
        raise InputError(
            f"critical_units.reference_size is {config.reference_size}, but beside the searched examples there are "
            f"{len(others)}; lower it, or search fewer examples."
        )
    order = torch.randperm(len(others), generator=stream(seed, "critical_units_reference"))
    return train.take(others[order[: config.reference_size]].sort().values)


def take_examples(train: ImageSet, ids: Sequence[int]) -> ImageSet:
    """Return the training examples with these ids, in their order.

    Raises:
        InputError: an id repeats, or no training example has it.
    """
    position = {example: i for i, example in enumerate(train.ids.tolist())}
    _check_distinct(list(ids))
    missing = [example for example in ids if example not in position]
    if missing:
        raise InputError(f"example ids {missing[:5]} ({len(missing)} in all) are not in the training set.")
    return train.take(torch.tensor([position[example] for example in ids], dtype=torch.int64))


def find_critical_units(
    model: nn.Module,
    examples: ImageSet,
    reference: ImageSet,
    config: CriticalUnitsConfig,
    *,
    seed: int,
    device: torch.device,
) -> CriticalUnitsSearch:
    """Return each example's critical units; labels of `examples` and `reference` are the assigned ones.

    The model (on `device`) is left as it was. What is found for an example depends on the reference batch,
    the settings and the seed of the noise, and on no other example: calls may be split at will.

    Raises:
        InputError: ids repeat, the reference batch contains an example or is empty, the model has no units, or a
            score is not finite.
    """
    _check_input(examples, reference)
    sample = noisy_copies(reference.take(torch.arange(1)), copies=1, noise=0.0, seed=seed, device=device)
    units = network_units(model, sample, removal=config.removal)
    gradients = GateGradients(GatedNetwork(model, units), config, seed, device, memory_budget(device))
    search = _Search.of(examples, units, device)
    others = ReferenceSlopes.of(gradients, reference)
    for step in range(config.max_steps + 1):
        own = search.leave_flipped(*gradients.own(examples.take(search.active.cpu()), search.gates[search.active]))
        if step < config.max_steps and step % config.refresh == 0:
            search.reference_slopes[search.active] = others.under(search.gates[search.active], own)
        if step < config.max_steps:
            search.remove_best(own)
        if len(search.active) == 0:
            break
    search.leave(search.active, "step_limit")
    return search.result(config)


@dataclass(eq=False)
class _Search:
    """The examples of one call between two steps, a row each; `active` are the rows still searched."""

    examples: ImageSet
    units: NetworkUnits
    labels: Int64[Tensor, " n"]
    gates: Float32[Tensor, "n u"]
    reference_slopes: Float32[Tensor, "n u"]
    active: Int64[Tensor, " a"]
    new_predictions: list[int]
    removed: list[list[RemovedUnit]]
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by row

    @classmethod
    def of(cls, examples: ImageSet, units: NetworkUnits, device: torch.device) -> _Search:
        """Return the state before the first step."""
        n = len(examples)
        ones = torch.ones(n, units.n_units, device=device)
        labels = examples.labels.to(device)
        rows = torch.arange(n, device=device)
        return cls(examples, units, labels, ones, torch.zeros_like(ones), rows, labels.tolist(), [[] for _ in rows])

    def leave_flipped(self, predictions: Int64[Tensor, " a"], own: Float32[Tensor, "a u"]) -> Float32[Tensor, "b u"]:
        """Let the examples go that are not predicted as assigned; return the rows of `own` that remain."""
        flipped = predictions != self.labels[self.active]
        for row, prediction in zip(self.active[flipped].tolist(), predictions[flipped].tolist(), strict=True):
            self.new_predictions[row] = prediction
        self.leave(self.active[flipped], "flipped")
        return own[~flipped]

    def remove_best(self, own: Float32[Tensor, "a u"]) -> None:
        """Remove from each active example's network the unit with the largest positive score, if it has one."""
        gates = self.gates[self.active]
        scores = self.reference_slopes[self.active] - own
        self._check_finite(scores)
        best, position = scores.masked_fill(gates == 0, -torch.inf).max(dim=1)
        found = best > 0
        self.leave(self.active[~found], "no_positive_score")
        rows, position = self.active, position[found]
        self.gates[rows, position] = 0
        for row, unit, score in zip(rows.tolist(), position.tolist(), best[found].tolist(), strict=True):
            index, within = self.units.locate(unit)
            self.removed[row].append(RemovedUnit(self.units.layers[index].name, index, within, score))

    def leave(self, rows: Int64[Tensor, " l"], outcome: Outcome) -> None:
        """Stop searching these rows."""
        self.outcomes |= dict.fromkeys(rows.tolist(), outcome)
        self.active = self.active[~torch.isin(self.active, rows)]

    def result(self, config: CriticalUnitsConfig) -> CriticalUnitsSearch:
        """Return what was found; examples that had another prediction before any removal are the skipped ones."""
        found, skipped = [], []
        for row, (example, assigned) in enumerate(zip(self.examples.ids.tolist(), self.labels.tolist(), strict=True)):
            outcome, removed = self.outcomes[row], tuple(self.removed[row])
            if outcome == "flipped" and not removed:
                skipped.append(example)
            else:
                found.append(CriticalUnits(example, assigned, self.new_predictions[row], outcome, removed))
        return CriticalUnitsSearch(tuple(found), tuple(skipped), config, self.units)

    def _check_finite(self, scores: Tensor) -> None:
        broken = ~scores.isfinite().all(dim=1)
        if broken.any():
            example = self.examples.ids[self.active[broken][0].cpu()].item()
            raise InputError(
                f"example {example} has scores that are not finite ({int(broken.sum())} examples in all): the model's "
                "weights or logits overflow; use a checkpoint that did not diverge, or precision float32."
            )


def _check_input(examples: ImageSet, reference: ImageSet) -> None:
    if len(examples) == 0 or len(reference) == 0:
        raise InputError(
            f"there are {len(examples)} examples to search and {len(reference)} in the reference batch; give at least "
            "one of each."
        )
    _check_distinct(examples.ids.tolist())
    _check_distinct(reference.ids.tolist())
    both = sorted(set(examples.ids.tolist()) & set(reference.ids.tolist()))
    if both:
        raise InputError(
            f"the reference batch contains the examples with ids {both[:5]} ({len(both)} in all), whose loss it is to "
            "leave out; draw it with draw_reference."
        )


def _check_distinct(ids: list[int]) -> None:
    repeated = sorted(example for example, times in Counter(ids).items() if times > 1)
    if repeated:
        raise InputError(f"example ids {repeated[:5]} ({len(repeated)} in all) are given more than once.")
