"""Results on an object store, against a real S3 server process: whole, listed in full, with few requests."""

import copy
import itertools
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from pyarrow import fs
from s3_server import BUCKET, credentials, s3_server
from sweeping import ROOT, TIMEOUT, TINY, assert_same_results, read_until, sweep, wait_for

from memlib.errors import InputError
from memlib.results import create_results, open_results
from memlib.schemas import table_from_rows
from memlib.storage import Patience, StorageRefused, open_storage
from sweeps.full_paper import main

OPTIONS = ["--epochs", "12", "--seeds", "0", "--set", "checkpoints.epochs=[0,2]", "--set", "rewinding.limit=20"]
OPTIONS += ["--experiments", "rewinding"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(server).items():
            patch.setenv(name, value)
        host = server.endpoint.removeprefix("http://")
        fs.S3FileSystem(endpoint_override=host, scheme="http", allow_bucket_creation=True).create_dir(BUCKET)
        yield server


def unit_rows(unit_id):
    row = {"run_id": "r", "experiment": "rewinding", "settings": "{}", "code_version": "0", "device": None}
    return table_from_rows("units", [{**row, "seconds": 1.0, "status": "done", "error": unit_id}])


def test_a_file_is_written_read_listed_and_deleted(server):
    storage = open_storage(server.uri("files"))
    storage.write("a/b.bin", b"12")
    storage.write("a/b.bin", b"345")
    assert storage.read("a/b.bin") == b"345"
    assert storage.names("a") == ["b.bin"]
    assert storage.names_by_folder("") == {"a": ["b.bin"]}
    assert storage.exists("a/b.bin")
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    assert storage.names("a") == storage.names("nowhere") == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.bin")


def test_the_uri_tells_another_process_what_the_environment_told_this_one(server, monkeypatch):
    uri = open_storage(server.uri("elsewhere")).uri
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    open_storage(uri).write("x", b"1")
    monkeypatch.undo()
    assert open_storage(server.uri("elsewhere")).read("x") == b"1"
    assert "tests" not in uri.removeprefix(f"s3://{BUCKET}")  # no credentials


def test_more_files_than_one_answer_lists_are_all_found(server):
    store, n = create_results(server.uri("many")), 1005
    for unit in range(n):
        store.storage.write(f"units/{unit:016d}.parquet", b"1")
    with server.counted() as made:
        assert store.units("units") == {f"{unit:016d}" for unit in range(n)}
    assert len(made) == 2


def test_compaction_keeps_every_row_and_one_file(server):
    store, units = create_results(server.uri("compacted")), [f"{unit:016d}" for unit in range(20)]
    for unit in units:
        store.write("units", unit, unit_rows(unit))
    before = sorted(store.read("units")["error"].to_pylist())
    assert store.compact()["units"] == len(before) == 20
    assert [name[:14] for name in store.storage.names("units")] == ["compact-000001"]
    assert store.units("units") == set(units)
    assert sorted(store.read("units")["error"].to_pylist()) == before


def test_a_small_file_costs_one_request_to_write_and_a_file_of_any_size_three_to_read(server):
    storage = open_storage(server.uri("few"))
    with server.counted() as made:
        storage.write("small", b"1")
    assert [method for method, _ in made] == ["PUT"]
    storage.write("large", bytes(20_000_000))
    for name in ("small", "large"):
        with server.counted() as made:
            storage.read(name)
        assert [method for method, _ in made] == ["HEAD", "GET", "HEAD"]


class Meddling:
    """A file system whose files somebody changes between a reader's question for their size and its reading."""

    def __init__(self, filesystem, meddle):
        self._filesystem, self._meddle = filesystem, meddle

    def __getattr__(self, name):
        return getattr(self._filesystem, name)

    def open_input_file(self, path):
        opened = self._filesystem.open_input_file(path)
        self._meddle()
        return opened


def meddled_with(storage, meddle):
    """The storage on such a file system, which is none by type."""
    found = copy.copy(storage)
    object.__setattr__(found, "filesystem", Meddling(storage.filesystem, meddle))
    return found


@pytest.mark.parametrize("size", [1, 3, 300])
def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(server, size):
    storage, times = open_storage(server.uri("replaced")), itertools.count()
    storage.write("x", b"old" * 10)
    meddled = meddled_with(storage, lambda: next(times) or storage.write("x", b"n" * size))
    assert meddled.read("x") == b"n" * size


def test_a_file_that_is_removed_while_it_is_read_is_not_there(server):
    storage = open_storage(server.uri("removed"))
    meddled = meddled_with(storage, lambda: storage.delete("x"))
    for read in (meddled.read, lambda path: meddled.read_parts(path, lambda source: source.read())):
        storage.write("x", b"old" * 10)
        with pytest.raises(FileNotFoundError):
            read("x")


def test_a_file_that_never_rests_is_an_error_and_no_part_of_it(server):
    storage, sizes = open_storage(server.uri("restless")), itertools.count(1)
    storage.write("x", b"old")
    meddled = meddled_with(storage, lambda: storage.write("x", bytes(next(sizes) * 10)))
    with pytest.raises(OSError, match="was replaced or removed while it was read, 30 times"):
        meddled.read("x")


def test_a_store_that_refuses_for_a_while_is_waited_for_and_both_are_said(server):
    said = []

    def told(text):
        said.append(text)
        server.shut.unlink(missing_ok=True)

    storage = open_storage(server.uri("refused"), Patience(300.0, told))
    server.shut.touch()
    storage.write("x", b"1")
    assert storage.read("x") == b"1"
    assert re.search("refuses .* it is tried again$", said[0])
    assert re.search(r"answers again after \d+ s$", said[1])
    assert len(said) == 2


def test_a_store_that_refuses_for_good_is_an_error_when_patience_ends(server):
    storage = open_storage(server.uri("refused"), Patience(1.0))
    server.shut.touch()
    started = time.monotonic()
    try:
        with pytest.raises(StorageRefused, match="refused for .* s: "):
            storage.write("y", b"1")
    finally:
        server.shut.unlink()
    assert time.monotonic() - started < 30
    assert storage.names("") == ["x"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://nobody:secret@bucket/folder", "holds credentials.*AWS_ACCESS_KEY_ID"),
        (f"s3://{BUCKET}/x?endpoint=here", "option in .* 'endpoint' is not known; did you mean 'endpoint_override'"),
        ("s3:///folder", "names no bucket"),
        ("s3://no-such-bucket/folder", "cannot be written: .*NO_SUCH_BUCKET"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_at_once_without_its_secrets(server, uri, message):
    with pytest.raises(InputError, match=message) as caught:
        create_results(uri)
    assert "secret" not in str(caught.value)


def test_a_sweep_on_an_object_store_that_refuses_for_a_while_gives_the_same_rows_and_figures_as_a_folder(
    server, tmp_path, start, capsys
):
    code, out, err = sweep(tmp_path / "results", *OPTIONS)
    assert (code, err) == (0, ""), out + err
    results = server.uri("sweep")
    driver = start(results, *OPTIONS)
    wait_for(lambda: any("last.safetensors" in path for _, path in server.requests()[-50:]))
    server.shut.touch()
    before = read_until(driver, "it is tried again")
    server.shut.unlink()
    out, err = driver.communicate(timeout=TIMEOUT)
    assert (driver.returncode, err) == (0, ""), out + err
    out = before + out
    assert len(re.findall(r"seed 0: s3://.* refuses \(.*\); it is tried again", out)) == 1, out
    assert len(re.findall(r"seed 0: s3://.* answers again after \d+ s", out)) == 1, out
    assert_same_results(results, tmp_path / "results")
    files = open_storage(results).names_by_folder("").values()
    assert {name.rpartition(".")[2] for names in files for name in names} == {"parquet", "safetensors", "json"}
    with server.counted() as made:
        assert main([*TINY, "--results", results, *OPTIONS]) == 0
    assert "everything is already done" in capsys.readouterr().out
    requests = Counter(method for method, _ in made)
    assert sum(requests.values()) <= 30, made  # a listing for each table, however many units there are
    open_results(results).compact()
    assert_same_results(results, tmp_path / "results")
    figures = draw(results, tmp_path / "a")
    assert figures == draw(tmp_path / "results", tmp_path / "b")
    assert len(figures) > 5


def draw(results, folder):
    command = [
        sys.executable,
        str(ROOT / "analysis" / "figures.py"),
        "--results",
        str(results),
        "--figures",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return sorted(path.name for path in folder.iterdir())
