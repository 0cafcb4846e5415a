"""What a store holds of runs: which are finished, with all they wrote, and from which images.

A run writes its tables and states, and last its row in `runs` (`perform_run`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import pyarrow as pa

from memlib.checkpoints import CheckpointFolder, kept_epochs
from memlib.config import RunConfig, config_from_json
from memlib.datasets import Dataset
from memlib.errors import InputError
from memlib.results import ResultStore

_TABLES = ("epochs", "gradients", "dynamics", "examples")
_TABLES_WITH_DROPOUT = ("dropout", "forgotten_images")  # the latter with example-tied dropout only


@dataclass(frozen=True)
class Holdings:
    """What a store holds of its runs.

    done: ids of runs whose row says so. written: ids of the runs in each of their tables.
    kept: the epochs whose states each run kept; none of one whose training is under way.
    """

    done: Set[str]
    written: Mapping[str, Set[str]]
    kept: Mapping[str, Sequence[int]]


def holdings(store: ResultStore) -> Holdings:
    """Return what the store holds now, from a few listings; raises InputError if a file is damaged."""
    written = {table: store.units(table) for table in (*_TABLES, *_TABLES_WITH_DROPOUT)}
    return Holdings(store.finished_runs(), written, kept_epochs(store.storage))


def own_holdings(config: RunConfig, store: ResultStore) -> Holdings:
    """Return what the store holds of one run in files of its own; what was merged with others' is not seen."""
    run_id, folder = config.run_id, CheckpointFolder(store.storage, config.run_id)
    if all(row["status"] != "done" for row in store.rows_of("runs", run_id)):
        return Holdings(set(), {}, {})
    written = {t: {run_id} if store.storage.exists(f"{t}/{run_id}.parquet") else set() for t in _tables_of(config)}
    return Holdings({run_id}, written, {} if folder.is_under_way() else {run_id: folder.epochs()})


def is_finished(config: RunConfig, held: Holdings) -> bool:
    """Return whether the run is done, all its tables are there, and every state `config` asks for was kept."""
    kept = held.kept.get(config.run_id, ())
    if config.run_id not in held.done:
        return False
    is_written = all(config.run_id in held.written[table] for table in _tables_of(config))
    return is_written and set(config.checkpoint_epochs) <= set(kept)


def _tables_of(config: RunConfig) -> tuple[str, ...]:
    """Return the tables a run writes before its row in `runs`."""
    n_with_dropout = {"none": 0, "example_tied": 2}.get(config.dropout.kind, 1)
    return (*_TABLES, *_TABLES_WITH_DROPOUT[:n_with_dropout])


def check_same_images(config: RunConfig, dataset: Dataset, store: ResultStore) -> None:
    """Raise InputError if finished runs or trials in the store come from other images of the same name and size."""
    made = [store.read(table, columns=["config", "data_digest"]) for table in ("runs", "dropout_search")]
    for row in pa.concat_tables(made).to_pylist():
        made_from = config_from_json(row["config"]).data
        same_source = (made_from.name, made_from.image_size) == (config.data.name, config.data.image_size)
        if same_source and row["data_digest"] not in (None, dataset.digest):
            raise InputError(
                f"{store.storage.location} holds runs on other images that were also called {config.data.name} "
                "(their digest differs); give the images those were made from, or another --results."
            )
