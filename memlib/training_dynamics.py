"""Training dynamics: how the prediction of each training example went over the epochs; no torch.

AUM (area under the margin): Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking",
2020. Forgetting events: Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network
Learning", 2019.
Deviations: both look at an example when its batch comes up, as it is augmented then and while the network changes
within the epoch. Here all examples are looked at together, un-augmented, in evaluation mode, after each epoch that
is evaluated; the state before training (epoch 0) does not count. Memory is a few numbers an example, whatever the
number of epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from memlib.errors import InputError

NEVER = -1  # in `first_learned` and `last_mistake`


@dataclass(frozen=True, eq=False)
class DynamicsSummary:
    """What became of each example over `n_epochs` epochs; see `TrainingDynamics`.

    aum: the mean margin over the epochs, low where other labels were nearer for long.
    """

    aum: Float64[np.ndarray, " n"]
    forgetting_events: Int64[np.ndarray, " n"]
    first_learned: Int64[np.ndarray, " n"]
    last_mistake: Int64[np.ndarray, " n"]
    n_epochs: int


@dataclass(frozen=True, eq=False)
class TrainingDynamics:
    """Each example's history over the `n_epochs` seen so far.

    margin_sum: of its margins (the assigned label's logit minus the largest other logit).
    forgetting_events: how often it went from predicted as assigned to predicted otherwise, from one epoch to the next.
    first_learned: the first epoch that predicted it as assigned, NEVER if none did.
    last_mistake: the label predicted by the last epoch that did not predict it as assigned, NEVER if all did.
    is_learned: predicted as assigned by the last epoch.
    """

    n_epochs: int
    margin_sum: Float64[np.ndarray, " n"]
    forgetting_events: Int64[np.ndarray, " n"]
    first_learned: Int64[np.ndarray, " n"]
    last_mistake: Int64[np.ndarray, " n"]
    is_learned: Bool[np.ndarray, " n"]

    def summarize(self) -> DynamicsSummary:
        """Return what a training leaves behind of it.

        Raises:
            InputError: no epoch was seen yet.
        """
        if self.n_epochs == 0:
            raise InputError("there are no training dynamics before the first epoch; call after_epoch after each.")
        return DynamicsSummary(
            aum=self.margin_sum / self.n_epochs,
            forgetting_events=self.forgetting_events,
            first_learned=self.first_learned,
            last_mistake=self.last_mistake,
            n_epochs=self.n_epochs,
        )


def start_dynamics(n: int) -> TrainingDynamics:
    """Return the dynamics of n examples before the first epoch."""
    return TrainingDynamics(
        n_epochs=0,
        margin_sum=np.zeros(n),
        forgetting_events=np.zeros(n, np.int64),
        first_learned=np.full(n, NEVER, np.int64),
        last_mistake=np.full(n, NEVER, np.int64),
        is_learned=np.zeros(n, bool),
    )


def after_epoch(
    before: TrainingDynamics,
    epoch: int,
    *,
    margin: Float[np.ndarray, " n"],
    prediction: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
) -> TrainingDynamics:
    """Return the dynamics with one more epoch, later than all before; `before` is left unchanged."""
    right = prediction == labels
    return TrainingDynamics(
        n_epochs=before.n_epochs + 1,
        margin_sum=before.margin_sum + margin,
        forgetting_events=before.forgetting_events + (before.is_learned & ~right),
        first_learned=np.where((before.first_learned == NEVER) & right, epoch, before.first_learned),
        last_mistake=np.where(right, before.last_mistake, prediction.astype(np.int64)),
        is_learned=right,
    )
