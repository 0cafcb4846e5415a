"""Which labels are wrong? A score for each training example, and how well it finds known noise; no torch.

Paper: example-tied dropout, whose authors note that what is lost with the memorization neurons is often mislabelled.
Each method says on what evidence it judges:

- `in_sample`: predictions for the very examples trained on. `margin_drop` and `loss_rise`: how much an example loses
  when the memorization neurons are dropped. `loss`: its loss at the end of training, the obvious baseline.
- `training_dynamics`: the same over all epochs. `aum` (Pleiss et al. 2020), `forgetting_events` (Toneva et al. 2019).
- `out_of_sample`: predictions by networks that were not trained on the example. `cleanlab`: confident learning
  (Northcutt et al. 2021), needs the package of that name.

Every score is the higher, the more suspicious the label is. None sees the true noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float64, Int, Int64

from memlib.errors import InputError
from memlib.training_dynamics import NEVER, DynamicsSummary, after_epoch, start_dynamics

Evidence = Literal["in_sample", "training_dynamics", "out_of_sample"]
NO_SUGGESTION = -1  # in `suggested`


@dataclass(frozen=True, eq=False)
class Labels:
    """The examples that are judged: their ids, each once, and the labels they were trained on."""

    example_ids: Int64[np.ndarray, " n"]
    assigned: Int64[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Judged:
    """What a network says of each example, against its assigned label; as `evaluation.Predictions`, without torch."""

    prediction: Int64[np.ndarray, " n"]
    margin: Float64[np.ndarray, " n"]
    loss: Float64[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Mislabels:
    """One method's verdict on the label of every example.

    score: the higher, the more suspicious; finite.
    suggested: the label the method would give instead, NO_SUGGESTION where it has none or it is the assigned one.
    is_label_issue: what the method would have looked at, by a rule of its own that needs no number of wrong labels.
    """

    method: str
    evidence: Evidence
    example_ids: Int64[np.ndarray, " n"]
    assigned: Int64[np.ndarray, " n"]
    suggested: Int64[np.ndarray, " n"]
    score: Float64[np.ndarray, " n"]
    is_label_issue: Bool[np.ndarray, " n"]

    @property
    def rank(self) -> Int64[np.ndarray, " n"]:
        """Return each example's place, 1 for the most suspicious; equal scores keep the order of the examples."""
        rank = np.empty(len(self.score), np.int64)
        rank[np.argsort(-self.score, kind="stable")] = np.arange(1, len(self.score) + 1)
        return rank

    def to_table(self, class_names: Sequence[str] | None = None) -> pa.Table:
        """Return one row an example, the most suspicious first; `suggested` is null where there is none.

        class_names: by label; with them `assigned_name` and `suggested_name` are columns, too.

        Raises:
            InputError: a label has no name.
        """
        labels = {
            "assigned": pa.array(self.assigned),
            "suggested": pa.array(self.suggested, mask=self.suggested == NO_SUGGESTION),
        }
        if class_names is not None:
            highest = int(max(self.assigned.max(), self.suggested.max()))
            if highest >= len(class_names):
                raise InputError(f"class_names has {len(class_names)} names and the labels go up to {highest}.")
            labels |= {f"{which}_name": pa.array(class_names).take(column) for which, column in labels.items()}
        table = pa.table(
            {
                "rank": self.rank,
                "example_id": self.example_ids,
                **labels,
                "score": self.score,
                "is_label_issue": self.is_label_issue,
                "method": [self.method] * len(self.score),
                "evidence": [self.evidence] * len(self.score),
            }
        )
        return table.sort_by("rank")


def find_mislabels_by_dropping(
    *,
    tied: Float[np.ndarray, "_ _"],
    dropped: Float[np.ndarray, "_ _"],
    labels: Int[np.ndarray, " _"],
    example_ids: Int[np.ndarray, " _"] | None = None,
) -> dict[str, Mislabels]:
    """Return the verdicts `margin_drop`, `loss_rise` and `loss`, by method, from one network's logits in two modes.

    tied: logits of each training example under its own mask. dropped: without memorization neurons.
    example_ids: default 0 to n - 1.

    Raises:
        InputError: shapes do not agree, a label has no logit, there is one class only, a logit is not finite, or an
            id comes twice.
    """
    subjects = subjects_of(np.arange(len(labels)) if example_ids is None else example_ids, labels)
    return by_dropping(subjects, judge(tied, subjects, "tied"), judge(dropped, subjects, "dropped"))


def find_mislabels_by_dynamics(
    *,
    example_ids: Int[np.ndarray, " _"],
    epochs: Int[np.ndarray, " _"],
    logits: Float[np.ndarray, " *_"],
    labels: Int[np.ndarray, " _"],
) -> dict[str, Mislabels]:
    """Return the verdicts `aum`, `forgetting_events` and `loss`, by method, from logits recorded in any training.

    One row for each example and epoch, in any order: the logits of the example after (or in) that epoch, and the
    label it is trained on. To keep less than that in memory, call `after_epoch` of `training_dynamics` in the loop.

    Raises:
        InputError: as `find_mislabels_by_dropping`; or an example lacks an epoch, has one twice, or two labels.
    """
    lengths = {"example_ids": len(example_ids), "epochs": len(epochs), "logits": len(logits), "labels": len(labels)}
    if len(set(lengths.values())) > 1 or logits.ndim != 2:
        told = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise InputError(
            f"rows do not agree ({told}; logits have {logits.ndim} dimensions); give one row of logits, an id, an "
            "epoch and a label for every example and epoch."
        )
    order = np.lexsort((example_ids, epochs))
    seen, ids = np.unique(epochs), np.unique(example_ids)
    is_full = 0 < len(order) == len(seen) * len(ids)
    rows = order.reshape(len(seen), -1) if is_full else order[None]
    if not is_full or not (example_ids[rows] == ids).all() or not (epochs[rows] == seen[:, None]).all():
        raise InputError(
            f"{len(order)} rows do not hold each of {len(ids)} examples once in each of {len(seen)} epochs; "
            "give one row for every example and epoch."
        )
    subjects = subjects_of(ids, labels[rows[0]])
    if not (labels[rows] == subjects.assigned).all():
        raise InputError("an example has another label in another epoch; give the label it is trained on in each.")
    dynamics = start_dynamics(len(ids))
    for epoch, chosen in zip(seen.tolist(), rows, strict=True):
        judged = judge(logits[chosen], subjects, f"epoch {epoch}")
        seen_now = {"margin": judged.margin, "prediction": judged.prediction, "labels": subjects.assigned}
        dynamics = after_epoch(dynamics, epoch, **seen_now)
    last = judge(logits[rows[-1]], subjects, "the last epoch")
    return {**by_dynamics(subjects, dynamics.summarize()), "loss": by_loss(subjects, last)}


def by_dropping(subjects: Labels, tied: Judged, dropped: Judged) -> dict[str, Mislabels]:
    """Return `margin_drop`, `loss_rise` and `loss`; a label is an issue if dropping leaves another prediction."""
    is_issue = dropped.prediction != subjects.assigned
    scores = {"margin_drop": tied.margin - dropped.margin, "loss_rise": dropped.loss - tied.loss}
    by_method = {
        method: verdict(method, "in_sample", subjects, score, dropped.prediction, is_issue)
        for method, score in scores.items()
    }
    return {**by_method, "loss": by_loss(subjects, tied)}


def by_loss(subjects: Labels, judged: Judged) -> Mislabels:
    """Return `loss`: the loss after training; a label is an issue if it is not what is predicted."""
    is_issue = judged.prediction != subjects.assigned
    return verdict("loss", "in_sample", subjects, judged.loss, judged.prediction, is_issue)


def by_dynamics(subjects: Labels, dynamics: DynamicsSummary) -> dict[str, Mislabels]:
    """Return `aum` (its negative is the score) and `forgetting_events`.

    An example that was never learned counts as forgotten in every epoch, more often than any other can be.
    A label is an issue if its area is negative, or if it was forgotten or never learned. The suggestion is the last
    label that was predicted instead of it: most often the one before memorization.
    """
    suggested = np.where(dynamics.last_mistake == NEVER, NO_SUGGESTION, dynamics.last_mistake)
    never = dynamics.first_learned == NEVER
    forgotten = np.where(never, dynamics.n_epochs, dynamics.forgetting_events)
    scores = {"aum": (-dynamics.aum, dynamics.aum < 0), "forgetting_events": (forgotten, forgotten > 0)}
    return {
        method: verdict(method, "training_dynamics", subjects, score, suggested, is_issue)
        for method, (score, is_issue) in scores.items()
    }


def judge(logits: Float[np.ndarray, "_ _"], subjects: Labels, what: str) -> Judged:
    """Return prediction, margin and loss (nats) of the assigned labels; `what` names the logits in errors.

    Raises:
        InputError: as `find_mislabels_by_dropping`.
    """
    check_outputs(logits, subjects, f"logits ({what})")
    logits = logits.astype(np.float64)
    rows = np.arange(len(logits))
    own = logits[rows, subjects.assigned]
    others = logits.copy()
    others[rows, subjects.assigned] = -np.inf
    top = logits.max(axis=1)
    loss = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - own
    return Judged(logits.argmax(axis=1), own - others.max(axis=1), loss)


def verdict(
    method: str,
    evidence: Evidence,
    subjects: Labels,
    score: np.ndarray,
    suggested: Int64[np.ndarray, " n"],
    is_issue: Bool[np.ndarray, " n"],
) -> Mislabels:
    """Return a method's verdict; suggestions that are the assigned label are none.

    Raises:
        InputError: a score is not finite.
    """
    score = score.astype(np.float64)
    if not np.isfinite(score).all():
        n_broken = int((~np.isfinite(score)).sum())
        raise InputError(f"method {method!r}: {n_broken} of {len(score)} scores are not finite; check the predictions.")
    suggested = np.where(suggested == subjects.assigned, NO_SUGGESTION, suggested)
    return Mislabels(method, evidence, subjects.example_ids, subjects.assigned, suggested, score, is_issue)


def subjects_of(example_ids: Int[np.ndarray, " _"], labels: Int[np.ndarray, " _"]) -> Labels:
    """Return the examples that are judged; raises InputError unless each comes once, with one label, a whole number."""
    example_ids, labels = np.asarray(example_ids), np.asarray(labels)
    for name, given in (("example ids", example_ids), ("labels", labels)):
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
            raise InputError(
                f"the {name} are an array of shape {given.shape} and type {given.dtype}; give one whole number an "
                "example (of several labels an example, judge each label by itself)."
            )
    if len(labels) == 0 or len(example_ids) != len(labels):
        raise InputError(f"there are {len(labels)} labels for {len(example_ids)} examples; give one label an example.")
    ids, counts = np.unique(example_ids, return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"example id {ids[counts > 1][0]} comes {counts[counts > 1][0]} times; give each example once."
        )
    return Labels(example_ids.astype(np.int64), labels.astype(np.int64))


def check_outputs(outputs: Float[np.ndarray, "_ _"], subjects: Labels, what: str) -> None:
    """Raise InputError unless a network's outputs, called `what`, are finite and one row for each label."""
    n, n_classes = outputs.shape
    labels = subjects.assigned
    if n != len(labels):
        raise InputError(f"{what} have {n} rows for {len(labels)} labels; give one row an example.")
    if n_classes < 2:
        raise InputError(f"{what} are of {n_classes} class; a label can only be wrong where there are two or more.")
    if not 0 <= labels.min() <= labels.max() < n_classes:
        raise InputError(
            f"labels run from {labels.min()} to {labels.max()} but {what} are of {n_classes} classes; number the "
            f"classes from 0 to {n_classes - 1}."
        )
    broken = ~np.isfinite(outputs).all(axis=1)
    if broken.any():
        which = subjects.example_ids[broken][0]
        raise InputError(
            f"{what} are not finite for {broken.sum()} examples, the first is {which}; check the training."
        )
