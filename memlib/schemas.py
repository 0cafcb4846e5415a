"""The result tables: which there are, and their columns.

Every table carries `unit_id` (the unit of work that wrote the row) and `run_id` (joins to `runs`); facts of a run
stand only in `runs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa

from memlib.errors import unknown

SCHEMA_VERSION = 1
VERSION_KEY = b"memlib_schema_version"  # of the version, in a file's metadata


def _schema(**columns: pa.DataType) -> pa.Schema:
    fields = {"unit_id": pa.string(), "run_id": pa.string(), **columns}
    return pa.schema(
        [pa.field(name, kind) for name, kind in fields.items()],
        metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
    )


# Accuracies are fractions in [0, 1]; losses are mean cross-entropies in nats; seconds are wall time.
SCHEMAS: Mapping[str, pa.Schema] = {
    "runs": _schema(
        dataset=pa.string(),
        model=pa.string(),
        seed=pa.int64(),
        noise_fraction=pa.float64(),
        dropout=pa.string(),  # none, example_tied, standard, channel, sparse
        config=pa.string(),  # all settings, JSON
        data_digest=pa.string(),  # of all images, labels and ids of the source; null if a run failed before
        code_version=pa.string(),
        device=pa.string(),
        precision=pa.string(),  # float32 or bfloat16: what training used
        seconds=pa.float64(),
        status=pa.string(),  # done or failed
        error=pa.string(),  # null when done
    ),
    "epochs": _schema(
        epoch=pa.int64(),  # 0 = before training
        split=pa.string(),  # clean, noisy, test
        accuracy=pa.float64(),
        loss=pa.float64(),
        n=pa.int64(),
    ),
    "gradients": _schema(
        epoch=pa.int64(),  # 1 = the first epoch of training
        group=pa.string(),
        group_index=pa.int64(),
        clean_norm=pa.float64(),  # L2 norms of the epoch's summed gradients, not yet divided by anything
        noisy_norm=pa.float64(),
        total_norm=pa.float64(),
        cosine=pa.float64(),  # of the clean and the noisy sum; null where one of them is zero
        n_parameters=pa.int64(),
    ),
    "dynamics": _schema(  # one row a training example, over the evaluated epochs of training
        example_id=pa.int64(),
        aum=pa.float64(),  # area under the margin: the mean of the margins
        forgetting_events=pa.int64(),  # times it went from predicted as assigned to predicted otherwise
        first_learned=pa.int64(),  # epoch; null if it was never predicted as assigned
        last_mistake=pa.int64(),  # the last label predicted instead of the assigned one; null if none was
        n_epochs=pa.int64(),  # over which all this was seen
    ),
    "cross_validation": _schema(  # one row a training example, judged by a network that was not trained on it
        example_id=pa.int64(),
        assigned=pa.int64(),
        fold=pa.int64(),  # 0 = the first of `folds`; all examples of a fold are judged by one network
        folds=pa.int64(),
        epochs=pa.int64(),  # that network's training
        prediction=pa.int64(),
        probabilities=pa.list_(pa.float32()),  # softmax, by class
    ),
    "rewinding": _schema(
        group=pa.string(),  # several groups rewound at once are joined by "+"
        group_index=pa.int64(),  # of the first of them
        n_groups=pa.int64(),
        rewind_epoch=pa.int64(),  # 0 = initialization
        batchnorm=pa.string(),  # running statistics: final, rewound, recalibrated
        split=pa.string(),
        accuracy=pa.float64(),
        n=pa.int64(),
    ),
    "retraining": _schema(
        group=pa.string(),
        group_index=pa.int64(),
        trained_on=pa.string(),  # clean or noisy
        reset_epoch=pa.int64(),  # 0 = initialization
        epoch=pa.int64(),  # 0 = before retraining
        split=pa.string(),
        accuracy=pa.float64(),
        n=pa.int64(),
    ),
    "dropout": _schema(
        mode=pa.string(),  # tied, scaled, dropped; plain: a control dropout, evaluated as usual
        batchnorm=pa.string(),  # running statistics: final, or recalibrated in this mode on the training images
        rescaled=pa.bool_(),  # generalization neurons times (p_gen + p_mem) / p_gen, as in the release
        split=pa.string(),  # under tied masks there is no test
        accuracy=pa.float64(),
        n=pa.int64(),
    ),
    "dropout_search": _schema(  # one row a trial and kind of BatchNorm statistics; a trial is no run: facts stand here
        dataset=pa.string(),
        model=pa.string(),
        seed=pa.int64(),
        noise_fraction=pa.float64(),
        dropout=pa.string(),  # example_tied; none: the control
        p_gen=pa.float64(),  # null for the control
        p_mem=pa.float64(),
        width=pa.float64(),
        after=pa.string(),  # joined by "+"; "" for the model's own places
        peak_lr=pa.float64(),
        config=pa.string(),  # all settings, JSON
        data_digest=pa.string(),
        batchnorm=pa.string(),  # final; recalibrated in mode dropped: trials that were trained to the end only
        epochs=pa.int64(),  # trained
        stopped_early=pa.bool_(),
        validation_accuracy=pa.float64(),  # of held-out images, against assigned labels: what is chosen by
        validation_curve=pa.list_(pa.float64()),  # the same after every epoch from 0; null where recalibrated
        clean_accuracy=pa.float64(),  # in mode dropped, as the validation accuracy; the control's as usual
        noisy_accuracy=pa.float64(),  # null without noise
        test_accuracy=pa.float64(),
        scaled_test_accuracy=pa.float64(),  # in mode scaled; null where recalibrated and for the control
        n_validation=pa.int64(),
        n_clean=pa.int64(),
        n_noisy=pa.int64(),
        n_test=pa.int64(),
    ),
    "critical_units": _schema(  # one row an example
        example_id=pa.int64(),
        is_noisy=pa.bool_(),
        right_early=pa.bool_(),  # predicted as assigned at `early_epoch` already; null if no such state is kept
        early_epoch=pa.int64(),  # the last kept epoch at which few noisy labels were memorized
        outcome=pa.string(),  # flipped, no_positive_score, step_limit; skipped: not predicted as assigned
        flipped=pa.bool_(),
        n_removed=pa.int64(),
        assigned=pa.int64(),
        new_prediction=pa.int64(),
        clean_accuracy_before=pa.float64(),  # on the `n_clean` and `n_noisy` training examples judged
        clean_accuracy_after=pa.float64(),
        noisy_accuracy_before=pa.float64(),
        noisy_accuracy_after=pa.float64(),
        n_clean=pa.int64(),
        n_noisy=pa.int64(),
        removal=pa.string(),  # filter or activation
        reference_size=pa.int64(),
        copies=pa.int64(),
        reference_copies=pa.int64(),
        refresh=pa.int64(),
        noise=pa.float64(),
        max_steps=pa.int64(),
        precision=pa.string(),
    ),
    "removed_units": _schema(  # one row a removal
        example_id=pa.int64(),
        is_noisy=pa.bool_(),
        step=pa.int64(),  # 1 = the first unit removed
        layer=pa.string(),
        layer_index=pa.int64(),  # by depth
        n_units=pa.int64(),  # of the layer
        unit=pa.int64(),
        score=pa.float64(),
    ),
    "units": _schema(  # one row a unit of work on a finished run
        experiment=pa.string(),  # the table it writes
        settings=pa.string(),  # what it is about, JSON
        code_version=pa.string(),
        device=pa.string(),
        seconds=pa.float64(),  # its share of the wall time of the task that computed it
        status=pa.string(),  # done or failed
        error=pa.string(),  # null when done
    ),
    "examples": _schema(
        example_id=pa.int64(),  # position in the source's own order, within its split
        split=pa.string(),  # train or test
        assigned=pa.int64(),
        original=pa.int64(),
        is_noisy=pa.bool_(),
        mode=pa.string(),  # plain; with example-tied dropout: tied, scaled, dropped
        prediction=pa.int64(),
        margin=pa.float64(),  # logit of the assigned label minus the largest other logit
        loss=pa.float64(),
    ),
    "forgotten_images": _schema(  # clean training examples right under tied masks and wrong when dropped
        example_id=pa.int64(),
        assigned=pa.int64(),
        original=pa.int64(),
        new_prediction=pa.int64(),  # in mode dropped
        assigned_name=pa.string(),  # of the class
        new_name=pa.string(),
        margin=pa.float64(),  # in mode dropped; the lowest are kept
        n_forgotten=pa.int64(),  # of the run, kept or not
        png=pa.binary(),  # the image as trained on
    ),
}


def table_from_rows(table: str, rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """Return rows (dictionaries without `unit_id`) as an Arrow table with the declared types."""
    schema = schema_of(table)
    return pa.Table.from_pylist(list(rows), schema=schema.remove(schema.get_field_index("unit_id")))


def schema_of(table: str) -> pa.Schema:
    """Return the columns of a table.

    Raises:
        InputError: there is no such table.
    """
    if table not in SCHEMAS:
        raise unknown("result table", table, SCHEMAS)
    return SCHEMAS[table]
