"""Figures from many files: lazily, the same after `compact`, and with the damaged file named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from analysis_rows import add_critical_units, add_everything, add_run, make_config
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import load, scans
from analysis.figures import _TOGETHER, FIGURES, draw_figures, main
from analysis.load import load_tables
from analysis.searched import removed_units, searched_examples
from analysis.shares import shares_above
from analysis.sharing import share_work
from memlib.errors import InputError
from memlib.results import ResultStore, create_results
from memlib.schemas import SCHEMAS, table_from_rows
from memlib.storage import Storage
from sweeps.compact import main as compact


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return create_results(tmp_path / "results")


def add_examples(store: ResultStore, seed: int, *, n: int = 50, noise: float = 0.1) -> str:
    run_id = make_config(seed=seed, noise=noise).run_id
    facts = {"run_id": run_id, "split": "train", "mode": "plain", "assigned": 0, "original": 0, "is_noisy": False}
    rows = [{**facts, "example_id": i, "prediction": 0, "margin": i / 7, "loss": 0.1} for i in range(n)]
    store.write("examples", run_id, table_from_rows("examples", rows))
    return run_id


def test_the_figures_of_compacted_results_are_those_of_the_many_files(store, tmp_path, capsys):
    for seed in (0, 1):
        add_everything(store, make_config(seed=seed), groups=("stem", "head"))
    before, _ = draw_figures(load_tables(store), tmp_path / "before")
    assert compact(["--results", store.storage.location]) == 0
    assert "removed_units: 2 files are 1 now\n" in capsys.readouterr().out
    assert len(list((tmp_path / "results" / "rewinding").iterdir())) == 1
    after, _ = draw_figures(load_tables(store), tmp_path / "after")
    assert [path.name for path in before] == [path.name for path in after]
    for a, b in zip(before, after, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_compacting_what_is_not_there_is_status_2(tmp_path, capsys):
    assert compact(["--results", str(tmp_path / "nowhere")]) == 2
    assert "there are no results at" in capsys.readouterr().err


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.booleans()), max_size=8))
def test_a_scan_holds_the_rows_that_the_store_reads(tmp_path_factory, writes):
    store = create_results(tmp_path_factory.mktemp("results"))
    for unit, value, compacted in writes:
        row = {"run_id": unit, "epoch": value, "split": "clean", "accuracy": 0.5, "loss": 1.0, "n": 5}
        store.write("epochs", unit, table_from_rows("epochs", [row, row]))
        if compacted:
            store.compact()
    found = scans.scan_table(store, "epochs").collect()
    assert found.to_dicts() == store.read("epochs").to_pylist()
    some = scans.scan_table(store, "epochs", units={"a", "b"}).collect()
    assert some.to_dicts() == [row for row in store.read("epochs").to_pylist() if row["unit_id"] in "ab"]


@pytest.mark.parametrize("table", SCHEMAS)
def test_a_table_without_rows_is_scanned_with_its_columns(store, table):
    assert scans.scan_table(store, table).collect().columns == SCHEMAS[table].names


def test_only_columns_that_are_asked_for_are_read_and_only_when_rows_are_collected(store):
    add_run(store, make_config(seed=0))
    path = Path(store.storage.root, "examples", f"{add_examples(store, 0)}.parquet")
    rows = load_tables(store).scan("examples").select("example_id", "seed")
    spoil(path, but=("example_id", "run_id"))
    assert rows.collect()["example_id"].to_list() == list(range(50))
    with pytest.raises(InputError, match=r"examples/\w+.parquet is damaged"):
        load_tables(store).table("examples")


def test_rows_of_a_part_come_from_the_files_of_its_runs_alone(store):
    for seed, noise in ((0, 0.1), (1, 0.2)):
        add_run(store, make_config(seed=seed, noise=noise))
        path = Path(store.storage.root, "examples", f"{add_examples(store, seed, noise=noise)}.parquet")
    spoil(path)
    results = load_tables(store)
    first, second = results.cells
    assert results.collect(results.scan("examples", first))["seed"].unique().to_list() == [0]
    with pytest.raises(InputError, match="is damaged"):
        results.collect(results.scan("examples", second))


def spoil(path: Path, *, but: tuple[str, ...] = ()) -> None:
    """Overwrite the data of a file's columns, its footer left as it is."""
    content, group = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0)
    for chunk in (group.column(i) for i in range(group.num_columns)):
        if chunk.path_in_schema not in but:
            start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
            content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)


def test_a_damaged_file_is_named_and_nothing_is_drawn_of_it(store, tmp_path, monkeypatch, capsys):
    add_everything(store, make_config(seed=0), groups=("stem", "head"))
    (path,) = Path(store.storage.root, "removed_units").iterdir()
    whole = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    spoil(path)
    for content in (whole[:-20], b"", path.read_bytes()):
        path.write_bytes(content)
        assert main(["--only", "shared_units"]) == 2
        assert f"result file results/removed_units/{path.name} is damaged" in capsys.readouterr().err


def test_a_file_of_another_schema_version_is_named(store, tmp_path):
    pl.DataFrame({"a": [1]}).write_parquet(Path(store.storage.root) / "x.parquet")
    folder = Path(store.storage.root, "epochs")
    folder.mkdir()
    (Path(store.storage.root) / "x.parquet").rename(folder / "x.parquet")
    with pytest.raises(InputError, match=r"epochs/x.parquet were written by schema version none"):
        scans.scan_table(store, "epochs")


def test_an_object_store_is_read_through_the_storage_alone(store, monkeypatch):
    add_everything(store, make_config(seed=0), groups=("stem", "head"))
    expected = searched_examples(load_tables(store))
    read, asked = Storage.read, []
    monkeypatch.setattr(Storage, "is_local", property(lambda self: False))
    monkeypatch.setattr(Storage, "read", lambda self, path: asked.append(path) or read(self, path))
    monkeypatch.setattr(scans, "_scan", lambda sources, schema, scan=scans._scan: scan(_in_memory(sources), schema))
    assert searched_examples(load_tables(store)).equals(expected)
    assert [path.split("/")[0] for path in asked] == ["runs", "critical_units"]


def _in_memory(sources):
    assert all(not isinstance(source, str) for source in sources)
    return sources


def test_several_figures_read_a_table_once(store, monkeypatch):
    add_critical_units(store, make_config(seed=0))
    add_run(store, make_config(seed=0))
    collected = []
    collect = load.Results.collect
    monkeypatch.setattr(load.Results, "collect", lambda self, rows: collected.append(1) or collect(self, rows))
    results = load_tables(store)
    for _ in range(2):
        searched_examples(results)
        removed_units(results)
    assert len(collected) == 2


values = st.floats(allow_nan=False) | st.none() | st.integers(0, 3).map(float)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["clean", "noisy"]), values), max_size=15))
def test_shares_above_a_place_are_counted(rows):
    frame = pl.DataFrame(rows, {"run_id": pl.String, "kind": pl.String, "v": pl.Float64}, orient="row")
    for row in shares_above(frame, "v").iter_rows(named=True):
        of_runs = [[v for r, kind, v in rows if r == run and kind == row["kind"] and v is not None] for run in "ab"]
        shares = [sum(v > row["place"] for v in known) / len(known) for known in of_runs if known]
        assert row["mean"] == pytest.approx(sum(shares) / len(shares))


def test_with_many_runs_other_processes_help_and_the_files_are_the_same(store, tmp_path, monkeypatch):
    for seed in (0, 1):
        add_everything(store, make_config(seed=seed), groups=("stem", "head"))
    monkeypatch.setattr("analysis.figures._MANY_RUNS", 2)
    alone, skipped_alone = draw_figures(load_tables(store), tmp_path / "alone")
    helped, skipped_helped = draw_figures(load_tables(store), tmp_path / "helped", processes=2)
    assert [path.name for path in helped] == [path.name for path in alone]
    assert skipped_helped == skipped_alone
    for a, b in zip(alone, helped, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_whoever_is_free_takes_the_next_piece_of_work(tmp_path):
    names = [str(n) for n in range(7)]
    done, _ = _share_with_a_busy_process([[name] for name in names], tmp_path)
    assert set(done) == set(names)
    assert list(done.values()).count(os.getpid()) == 6  # the busy process was given nothing else meanwhile


def test_a_process_goes_on_with_its_own_groups_and_then_helps_with_those_of_others(tmp_path):
    done, here = _share_with_a_busy_process([["a1", "a2"], ["b1", "b2"], ["c1"]], tmp_path)
    (elsewhere,) = (name for name, process in done.items() if process != os.getpid())
    assert here == {"a1": ["b1", "b2", "c1", "a2"], "b1": ["a1", "a2", "c1", "b2"]}[elsewhere]


def test_what_fails_is_raised_wherever_it_was_tried_and_no_more_is_begun(tmp_path):
    groups, here = [[str(n)] for n in range(999)], []
    with pytest.raises(ValueError, match="cannot draw"):
        share_work(groups, lambda name: here.append(name) or time.sleep(0.1), _fail, others=1)
    assert len(here) < 998
    with pytest.raises(ValueError, match="cannot draw"):
        share_work(groups, _fail, partial(_begin, tmp_path), others=1)
    assert len(list(tmp_path.iterdir())) <= 1


def test_a_helping_process_that_is_killed_is_told(store, tmp_path, monkeypatch, capsys):
    add_run(store, make_config(seed=0))
    monkeypatch.setattr("analysis.figures._MANY_RUNS", 1)
    monkeypatch.setattr("analysis.figures._finish_elsewhere", _be_killed)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert main(["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]) == 2
    assert (
        "a process that helped to draw: was ended from outside, most likely for want of memory"
        in capsys.readouterr().err
    )


def test_what_is_drawn_together_are_figures_each_named_once():
    together = [name for group in _TOGETHER for name in group]
    assert set(together) <= {name for name, _ in FIGURES}
    assert len(set(together)) == len(together)


def _wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


def _share_with_a_busy_process(groups: list[list[str]], folder: Path) -> tuple[dict[str, int], list[str]]:
    """Return which process did each name, and what was done here, in order: the other one is busy with its first."""
    here, n_here = [], sum(map(len, groups)) - 1

    def work_here(name: str) -> int:
        here.append(name)
        _wait_until((folder / "begun elsewhere").exists)
        if len(here) == n_here:
            (folder / "all others").touch()
        return os.getpid()

    return share_work(groups, work_here, partial(_wait_for_others, folder), others=1), here


def _wait_for_others(folder: Path, name: str) -> int:
    (folder / "begun elsewhere").touch()
    _wait_until((folder / "all others").exists)
    return os.getpid()


def _begin(folder: Path, name: str) -> None:
    (folder / name).touch()


def _be_killed(name: str, **_: object) -> None:
    os._exit(1)


def _fail(name: str) -> None:
    raise ValueError(f"cannot draw {name}")
