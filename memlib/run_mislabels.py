"""The verdicts on a finished run's labels, from the tables the run and its cross-validation wrote; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from memlib.confident_learning import find_mislabels_out_of_sample
from memlib.errors import InputError
from memlib.mislabels import Judged, Labels, Mislabels, by_dropping, by_dynamics, by_loss, subjects_of
from memlib.results import ResultStore
from memlib.training_dynamics import NEVER, DynamicsSummary

TABLES = ("dynamics", "cross_validation")  # beside the examples
_OF_EXAMPLES = ("example_id", "assigned", "is_noisy", "prediction", "margin", "loss")
_MAY_NEVER_BE = ("first_learned", "last_mistake")


@dataclass(frozen=True, eq=False)
class TrainedExamples:
    """What table `examples` says of a run's training examples, in order of their ids.

    is_noisy: the truth, for evaluation only. judged: by mode, "plain", or "tied", "scaled" and "dropped".
    """

    subjects: Labels
    is_noisy: Bool[np.ndarray, " n"]
    judged: Mapping[str, Judged]


def find_mislabels_of_run(store: ResultStore, run_id: str) -> dict[str, Mislabels]:
    """Return the verdicts on a finished run's training labels, by method: those its tables hold the evidence for.

    Raises:
        InputError: the run has no examples in the store, or it was cross-validated and cleanlab is not installed.
    """
    trained = trained_examples(_examples_of(store, run_id))
    dynamics, folds = (store.read(name).filter(pc.field("run_id") == run_id) for name in TABLES)
    return {**from_training(trained, dynamics), **from_cross_validation(trained, folds)}


def _examples_of(store: ResultStore, run_id: str) -> pa.Table:
    examples = store.read("examples").filter(pc.field("run_id") == run_id)
    if examples.num_rows == 0:
        raise InputError(f"run {run_id} has no examples in {store.storage.location}; it is not there or not finished.")
    return examples


def noise_of_run(store: ResultStore, run_id: str) -> Bool[np.ndarray, " n"]:
    """Return which of a run's training labels label noise made wrong, in order of the ids: for evaluation only.

    Raises:
        InputError: the run has no examples in the store.
    """
    return trained_examples(_examples_of(store, run_id)).is_noisy


def trained_examples(examples: pa.Table) -> TrainedExamples:
    """Return the training examples in one run's rows of table `examples`, of which there is at least one."""
    training = examples.filter(pc.field("split") == "train").select([*_OF_EXAMPLES, "mode"])
    columns: dict[str, np.ndarray] = {}
    judged = {}
    for mode in training["mode"].unique().to_pylist():
        columns = _by_example(training.filter(pc.field("mode") == mode), *_OF_EXAMPLES)
        judged[mode] = Judged(columns["prediction"], columns["margin"], columns["loss"])
    return TrainedExamples(subjects_of(columns["example_id"], columns["assigned"]), columns["is_noisy"], judged)


def from_training(trained: TrainedExamples, dynamics: pa.Table) -> dict[str, Mislabels]:
    """Return the verdicts by a run's own training; without rows of `dynamics`, those that need none."""
    subjects, judged = trained.subjects, trained.judged
    if "dropped" in judged:
        found = by_dropping(subjects, judged["tied"], judged["dropped"])
    else:
        found = {"loss": by_loss(subjects, judged["plain"])}
    if dynamics.num_rows:
        found |= by_dynamics(subjects, _dynamics(dynamics, subjects))
    return found


def from_cross_validation(trained: TrainedExamples, folds: pa.Table) -> dict[str, Mislabels]:
    """Return the verdict by out-of-sample predictions, none where no cross-validation is complete.

    Of several, the one with the most folds, then the most epochs, counts.

    Raises:
        InputError: cleanlab is not installed.
    """
    subjects = trained.subjects
    kinds = folds.group_by(["folds", "epochs"]).aggregate([]).to_pylist()
    for kind in sorted(kinds, key=lambda kind: (kind["folds"], kind["epochs"]), reverse=True):
        chosen = folds.filter((pc.field("folds") == kind["folds"]) & (pc.field("epochs") == kind["epochs"]))
        columns = _by_example(chosen, "example_id", "probabilities")
        if np.array_equal(columns["example_id"], subjects.example_ids):
            probabilities = np.stack(list(columns["probabilities"]))
            return find_mislabels_out_of_sample(
                probabilities=probabilities, labels=subjects.assigned, example_ids=subjects.example_ids
            )
    return {}


def _dynamics(table: pa.Table, subjects: Labels) -> DynamicsSummary:
    columns = _by_example(table, "example_id", "aum", "forgetting_events", *_MAY_NEVER_BE)
    if not np.array_equal(columns["example_id"], subjects.example_ids):
        raise InputError("tables `dynamics` and `examples` hold other training examples; train the run again.")
    return DynamicsSummary(
        aum=columns["aum"],
        forgetting_events=columns["forgetting_events"],
        first_learned=columns["first_learned"],
        last_mistake=columns["last_mistake"],
        n_epochs=table["n_epochs"][0].as_py(),
    )


def _by_example(rows: pa.Table, *names: str) -> dict[str, np.ndarray]:
    """Return columns in order of the example ids; an epoch or label that never was, which tables leave empty: NEVER."""
    order = rows["example_id"].to_numpy().argsort(kind="stable")
    columns = {name: rows[name].fill_null(NEVER) if name in _MAY_NEVER_BE else rows[name] for name in names}
    return {name: column.to_numpy()[order] for name, column in columns.items()}
