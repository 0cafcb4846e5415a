"""A finished run trained anew from its row alone: the same on the same machine, and told where it is not."""

import subprocess
import sys
from dataclasses import replace

import pyarrow.compute as pc
import pytest
import torch

from memlib.config import DropoutConfig
from memlib.datasets import load_dataset
from memlib.errors import InputError
from memlib.replay import main, replay
from memlib.results import create_results, open_results
from memlib.runs import perform_run
from memlib.schemas import table_from_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory):
    """A store with one run of example-tied dropout on real digits."""
    run = replace(
        small_run,
        data=replace(small_run.data, limit=100),
        dropout=DropoutConfig(kind="example_tied", p_gen=0.3, p_mem=0.1),
        training=replace(small_run.training, epochs=2),
    )
    folder = tmp_path_factory.mktemp("replay") / "results"
    perform_run(run, load_dataset("digits", image_size=16), create_results(folder), device=CPU)
    return run, folder


def test_on_the_machine_that_trained_it_a_run_is_the_same_to_the_bit(finished, tmp_path, capsys):
    run, folder = finished
    command = [run.run_id, "--results", str(folder), "--into", str(tmp_path / "replays")]
    assert main(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "precision: float32 then, float32 now"
    assert [line.split(":")[0] for line in shown[3:]] == [
        "dropped, test",
        "dropped, train",
        "scaled, test",
        "scaled, train",
        "tied, train",
    ]
    assert all("0 of" in line and "margins by at most 0;" in line for line in shown[3:])
    again = open_results(tmp_path / "replays").read("epochs").sort_by("epoch")
    first = open_results(folder).read("epochs").sort_by("epoch")
    assert again.equals(first)


def test_what_differs_is_counted(finished, tmp_path):
    run, folder = finished
    store, into = open_results(folder), create_results(tmp_path / "replays")
    replay(store, run.run_id, into, device=CPU)
    rows = into.read("examples").to_pylist()
    changed = next(row for row in rows if (row["mode"], row["split"]) == ("dropped", "test"))
    changed.update(prediction=(changed["prediction"] + 1) % 10, margin=changed["margin"] - 3)
    into.write("examples", run.run_id, table_from_rows("examples", rows))
    found = {(one.mode, one.split): one for one in replay(store, run.run_id, into, device=CPU)}
    assert found["dropped", "test"].n_differing == 1
    assert found["dropped", "test"].largest == pytest.approx(3)
    assert found["dropped", "test"].n == 360
    assert {one.largest for kind, one in found.items() if kind != ("dropped", "test")} == {0.0}


def test_bad_input_is_named_before_anything_is_trained(finished, tmp_path, capsys):
    run, folder = finished
    store = open_results(folder)
    with pytest.raises(InputError, match="holds the run itself; replay into another folder"):
        replay(store, run.run_id, store, device=CPU)
    assert main(["0" * 16, "--results", str(folder), "--into", str(tmp_path / "replays")]) == 2
    assert f"has no finished run {'0' * 16}" in capsys.readouterr().err
    row = store.read("runs").filter(pc.field("run_id") == run.run_id).to_pylist()[0]
    other = create_results(tmp_path / "other")
    other.write("runs", run.run_id, table_from_rows("runs", [{**row, "data_digest": "of other images"}]))
    with pytest.raises(InputError, match="other images"):
        replay(other, run.run_id, create_results(tmp_path / "replays"), device=CPU)
    assert not open_results(tmp_path / "replays").finished_runs()


def test_ray_is_not_needed():
    code = "import sys, memlib.replay; sys.exit(any(n in sys.modules for n in ('ray', 'polars', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
