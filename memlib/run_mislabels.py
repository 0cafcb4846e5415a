"""The verdicts on a finished run's labels, from the tables the run and its cross-validation wrote; no torch."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from memlib.confident_learning import find_mislabels_out_of_sample
from memlib.errors import InputError
from memlib.mislabels import Judged, Labels, Mislabels, by_dropping, by_dynamics, by_loss, subjects_of
from memlib.results import ResultStore
from memlib.training_dynamics import NEVER, DynamicsSummary

TABLES = ("examples", "dynamics", "cross_validation")


def find_mislabels_of_run(store: ResultStore, run_id: str) -> dict[str, Mislabels]:
    """Return the verdicts on a finished run's training labels, by method: those its tables hold the evidence for.

    Raises:
        InputError: the run has no examples in the store, or it was cross-validated and cleanlab is not installed.
    """
    tables = {name: store.read(name).filter(pc.field("run_id") == run_id) for name in TABLES}
    if tables["examples"].num_rows == 0:
        raise InputError(f"run {run_id} has no examples in {store.storage.location}; it is not there or not finished.")
    found = from_training(tables["examples"], tables["dynamics"])
    return {**found, **from_cross_validation(tables["examples"], tables["cross_validation"])}


def from_training(examples: pa.Table, dynamics: pa.Table) -> dict[str, Mislabels]:
    """Return the verdicts by a run's own training; `dynamics` may be empty (a run of before that table)."""
    modes = {mode: _judged(examples, mode) for mode in _training_part(examples)["mode"].unique().to_pylist()}
    subjects = subjects_in(examples)
    if "dropped" in modes:
        found = by_dropping(subjects, modes["tied"], modes["dropped"])
    else:
        found = {"loss": by_loss(subjects, modes["plain"])}
    if dynamics.num_rows:
        found |= by_dynamics(subjects, _dynamics(dynamics, subjects))
    return found


def from_cross_validation(examples: pa.Table, folds: pa.Table) -> dict[str, Mislabels]:
    """Return the verdict by out-of-sample predictions, none where no cross-validation is complete.

    Of several, the one with the most folds, then the most epochs, counts.

    Raises:
        InputError: cleanlab is not installed.
    """
    subjects = subjects_in(examples)
    kinds = folds.group_by(["folds", "epochs"]).aggregate([]).to_pylist()
    for kind in sorted(kinds, key=lambda kind: (kind["folds"], kind["epochs"]), reverse=True):
        chosen = folds.filter((pc.field("folds") == kind["folds"]) & (pc.field("epochs") == kind["epochs"]))
        chosen = chosen.sort_by("example_id")
        if np.array_equal(_column(chosen, "example_id"), subjects.example_ids):
            probabilities = np.stack(chosen["probabilities"].to_numpy())
            return find_mislabels_out_of_sample(
                probabilities=probabilities, labels=subjects.assigned, example_ids=subjects.example_ids
            )
    return {}


def subjects_in(examples: pa.Table) -> Labels:
    """Return the run's training examples, in order of their ids."""
    rows = _training_part(examples)
    rows = rows.filter(pc.field("mode") == rows["mode"][0]).sort_by("example_id")
    return subjects_of(_column(rows, "example_id"), _column(rows, "assigned"))


def is_noisy_in(examples: pa.Table) -> np.ndarray:
    """Return which of them are noisy, in the same order: the truth, for evaluation only."""
    rows = _training_part(examples)
    return _column(rows.filter(pc.field("mode") == rows["mode"][0]).sort_by("example_id"), "is_noisy")


def _training_part(examples: pa.Table) -> pa.Table:
    return examples.filter(pc.field("split") == "train")


def _judged(examples: pa.Table, mode: str) -> Judged:
    rows = _training_part(examples).filter(pc.field("mode") == mode).sort_by("example_id")
    return Judged(*(_column(rows, name) for name in ("prediction", "margin", "loss")))


def _dynamics(table: pa.Table, subjects: Labels) -> DynamicsSummary:
    rows = table.sort_by("example_id")
    if not np.array_equal(_column(rows, "example_id"), subjects.example_ids):
        raise InputError("tables `dynamics` and `examples` hold other training examples; train the run again.")
    return DynamicsSummary(
        aum=_column(rows, "aum"),
        forgetting_events=_column(rows, "forgetting_events"),
        first_learned=_column(rows, "first_learned", null=NEVER),
        last_mistake=_column(rows, "last_mistake", null=NEVER),
        n_epochs=rows["n_epochs"][0].as_py(),
    )


def _column(rows: pa.Table, name: str, *, null: int | None = None) -> np.ndarray:
    column = rows[name] if null is None else rows[name].fill_null(null)
    return column.to_numpy()
