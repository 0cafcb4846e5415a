import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlib.errors import InputError
from memlib.results import create_results, open_results
from memlib.schemas import SCHEMAS, table_from_rows
from memlib.storage import Storage


def epochs(run_id, accuracies):
    rows = [
        {"run_id": run_id, "epoch": e, "split": "clean", "accuracy": a, "loss": 1.0, "n": 5}
        for e, a in enumerate(accuracies)
    ]
    return table_from_rows("epochs", rows)


def test_an_empty_store_gives_typed_empty_tables(tmp_path):
    store = create_results(tmp_path)
    for table, schema in SCHEMAS.items():
        assert store.read(table).schema.equals(schema)
        assert store.read(table).num_rows == 0


def test_rows_come_back_with_the_declared_types(tmp_path):
    store = create_results(tmp_path)
    store.write("epochs", "u1", epochs("u1", [0.5, 1]))
    got = store.read("epochs")
    assert got.schema.equals(SCHEMAS["epochs"])
    assert got["accuracy"].to_pylist() == [0.5, 1.0]
    assert got["unit_id"].to_pylist() == ["u1", "u1"]


def test_a_unit_written_again_replaces_its_rows(tmp_path):
    store = create_results(tmp_path)
    store.write("epochs", "u1", epochs("u1", [0.1, 0.2]))
    store.write("epochs", "u1", epochs("u1", [0.9]))
    assert store.read("epochs")["accuracy"].to_pylist() == [0.9]


def test_columns_that_are_missing_or_not_declared_are_refused(tmp_path):
    store = create_results(tmp_path)
    with pytest.raises(InputError, match=r"table 'epochs': columns \['oops'\]"):
        store.write("epochs", "u", epochs("u", [1]).append_column("oops", pa.array([1])))
    with pytest.raises(InputError, match="result table 'epoch' is not known; did you mean 'epochs'"):
        store.read("epoch")


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 1), st.booleans()), max_size=12))
@settings(max_examples=30)
def test_compacting_at_any_moment_changes_no_row(tmp_path_factory, writes):
    store = create_results(tmp_path_factory.mktemp("results"))
    expected = {}
    for unit, value, compact in writes:
        store.write("epochs", unit, epochs(unit, [value, value]))
        expected[unit] = [value, value]
        if compact:
            store.compact()
    got = store.read("epochs").to_pylist()
    assert sorted((r["unit_id"], r["accuracy"]) for r in got) == sorted(
        (u, v) for u, vs in expected.items() for v in vs
    )
    assert store.units("epochs") == set(expected)


def test_compacting_leaves_one_file_a_table(tmp_path):
    store = create_results(tmp_path)
    for unit in "abc":
        store.write("epochs", unit, epochs(unit, [1]))
    assert store.compact()["epochs"] == 3
    assert len(list((tmp_path / "epochs").iterdir())) == 1
    assert store.compact()["epochs"] == 1


def test_a_compaction_interrupted_before_its_clean_up_doubles_no_row(tmp_path, monkeypatch):
    store = create_results(tmp_path)
    for unit in "ab":
        store.write("epochs", unit, epochs(unit, [1]))
    monkeypatch.setattr(type(store.storage), "delete", lambda self, path: None)
    store.compact()
    store.compact()
    assert len(list((tmp_path / "epochs").iterdir())) == 4
    assert store.read("epochs").num_rows == 2


def test_only_runs_that_are_done_count_as_finished(tmp_path):
    store = create_results(tmp_path)
    for run_id, status in (("good", "done"), ("bad", "failed")):
        row = {name: None for name in SCHEMAS["runs"].names if name != "unit_id"} | {"run_id": run_id, "status": status}
        store.write("runs", run_id, table_from_rows("runs", [row]))
    assert store.finished_runs() == {"good"}


def test_results_of_another_schema_version_are_refused(tmp_path):
    create_results(tmp_path)
    (tmp_path / "memlib-results.json").write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(InputError, match="written by schema version 0, this memlib reads 1; give another --results"):
        open_results(tmp_path)


def test_a_file_of_another_schema_version_is_named(tmp_path):
    store = create_results(tmp_path)
    (tmp_path / "epochs").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "epochs" / "foreign.parquet")
    with pytest.raises(InputError, match=r"epochs/foreign.parquet were written by schema version none"):
        store.read("epochs")


def test_a_damaged_file_is_named(tmp_path):
    store = create_results(tmp_path)
    store.write("epochs", "u1", epochs("u1", [1]))
    path = tmp_path / "epochs" / "u1.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"epochs/u1.parquet is damaged"):
        store.read("epochs")


def test_a_file_without_the_declared_columns_is_named(tmp_path):
    store = create_results(tmp_path)
    store.write("epochs", "u1", epochs("u1", [1]))
    path = tmp_path / "epochs" / "u1.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["loss"]), path)
    with pytest.raises(InputError, match=r"epochs/u1.parquet does not have the columns of table 'epochs'"):
        store.read("epochs")


def test_a_file_written_during_a_compaction_stays_and_wins(tmp_path, monkeypatch):
    store = create_results(tmp_path)
    for unit in "ab":
        store.write("epochs", unit, epochs(unit, [0.1]))
    write = type(store.storage).write

    def write_and_be_overtaken(storage, path, data):
        write(storage, path, data)
        if "compact" in path:
            monkeypatch.undo()
            store.write("epochs", "a", epochs("a", [0.9]))

    monkeypatch.setattr(type(store.storage), "write", write_and_be_overtaken)
    store.compact()
    assert sorted(store.read("epochs")["accuracy"].to_pylist()) == [0.1, 0.9]


def test_what_an_interrupted_write_left_behind_is_not_read(tmp_path):
    store = create_results(tmp_path)
    store.write("epochs", "u1", epochs("u1", [1]))
    (tmp_path / "epochs" / ".u2.parquet.123").write_bytes(b"half")
    assert store.read("epochs").num_rows == 1


def test_reading_results_that_are_not_there_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="there are no results at .*run python sweeps/full_paper.py"):
        open_results(tmp_path / "nothing")


@pytest.mark.parametrize("moment", ["modified", "_read", "write"])
def test_of_two_compactions_at_once_the_later_one_withdraws_and_no_row_is_lost(tmp_path, monkeypatch, moment):
    store, original = create_results(tmp_path), getattr(Storage, moment)
    for unit in "ab":
        store.write("epochs", unit, epochs(unit, [0.1]))

    def after_another(storage, *arguments):
        monkeypatch.undo()
        store.write("epochs", "b", epochs("b", [0.5]))
        store.write("epochs", "c", epochs("c", [0.9]))
        store.compact()
        return original(storage, *arguments)

    monkeypatch.setattr(Storage, moment, after_another)
    with pytest.raises(InputError, match="epochs is being compacted by another process; run this when it has ended"):
        store.compact()
    for _ in range(2):
        assert sorted(store.read("epochs")["accuracy"].to_pylist()) == [0.1, 0.5, 0.9]
        assert store.units("epochs") == set("abc")
        store.compact()


@pytest.mark.parametrize("look", ["read", "units"])
def test_a_compaction_between_listing_and_reading_is_not_noticed(tmp_path, monkeypatch, look):
    store, names = create_results(tmp_path), Storage.names
    for unit in "ab":
        store.write("epochs", unit, epochs(unit, [0.1]))
    store.compact()
    store.write("epochs", "c", epochs("c", [0.9]))

    def list_before_a_compaction(storage, folder):
        found = names(storage, folder)
        monkeypatch.undo()
        store.compact()
        return found

    monkeypatch.setattr(Storage, "names", list_before_a_compaction)
    assert len(getattr(store, look)("epochs")) == 3


def test_a_units_own_rows_are_read_alone(tmp_path):
    store = create_results(tmp_path)
    for unit in "ab":
        store.write("epochs", unit, epochs(unit, [0.1]))
    (tmp_path / "epochs" / "b.parquet").write_bytes(b"damaged")
    assert [row["accuracy"] for row in store.rows_of("epochs", "a")] == [0.1]
    assert store.rows_of("epochs", "c") == []
    with pytest.raises(InputError, match=r"epochs/b.parquet is damaged"):
        store.rows_of("epochs", "b")


def test_a_damaged_merged_file_says_what_is_computed_again(tmp_path):
    store = create_results(tmp_path)
    for unit in "ab":
        store.write("epochs", unit, epochs(unit, [0.1]))
    store.compact()
    (path,) = (tmp_path / "epochs").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    for look in (store.read, store.units):
        with pytest.raises(InputError, match=r"delete it and run the sweep again \(all that was merged into it is"):
            look("epochs")
