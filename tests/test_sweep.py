"""The command on real Ray with 2 CPUs: what it prints, what it leaves, and what no interruption changes."""

import re
import shutil
import signal
import subprocess

import pytest
from sweeping import (
    TIMEOUT,
    TINY,
    assert_same_results,
    finished_epochs,
    kill_outright,
    read_until,
    sweep,
    wait_for,
    worker_processes,
)

from memlib.results import open_results
from sweeps.cluster import FOR_WORKERS

TRAIN_ONLY = ["--experiments"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Two runs of 12 epochs that nothing happened to, and what the command printed."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    code, out, err = sweep(results, *TRAIN_ONLY, "--epochs", "12")
    assert (code, err) == (0, ""), out + err
    return results, out


def test_a_sweep_prints_one_line_an_event_and_nothing_else(undisturbed):
    _, out = undisturbed
    expected = [
        r"2 runs wanted, 0 done, 2 to do; results: .*",
        r"  [0-9a-f]{16}  digits resnet9 noise 0.1 seed [01]: [\d.e-]+ TFLOP",
        r"on \d+ CPUs and 0 GPUs: about .*, \d+ MB of checkpoints",
        r"on one .*, as measured there: about .*",  # where a card was measured
        r"started: digits resnet9 noise 0.1 seed [01]",
        r"digits resnet9 noise 0.1 seed [01]: epoch \d+/12  clean .* left",
        r"done: digits resnet9 noise 0.1 seed [01] in \d+ (s|min) \([01] to go\)",
    ]
    for line in filter(None, out.splitlines()):
        assert any(re.fullmatch(pattern, line) for pattern in expected), line
    assert out.count("done: ") == 2


def test_everything_a_sweep_leaves_is_results_and_checkpoints(undisturbed):
    results, _ = undisturbed
    kinds = {re.sub(r"[0-9a-f]{16}|\d{4}", "*", str(p.relative_to(results))) for p in results.rglob("*") if p.is_file()}
    tables = {f"{table}/*.parquet" for table in ("runs", "epochs", "gradients", "dynamics", "examples")}
    assert kinds == tables | {"memlib-results.json", "checkpoints/*/epoch-*.safetensors"}


def test_a_second_sweep_finds_everything_done_and_touches_nothing(undisturbed, capsys):
    from sweeps.full_paper import main

    results, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*.*")}
    assert main([*TINY, "--results", str(results), *TRAIN_ONLY, "--epochs", "12"]) == 0
    out = capsys.readouterr().out
    assert "2 runs wanted, 2 done, 0 to do" in out
    assert "everything is already done" in out
    after = {p: p.stat().st_mtime_ns for p in results.rglob("*.*")}
    assert {p for p in before if p.name != "memlib-results.json" and before[p] != after[p]} == set()


def test_more_seeds_compute_only_what_is_new(undisturbed):
    results, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*.parquet")}
    code, out, _ = sweep(results, *TRAIN_ONLY, "--epochs", "12", "--seeds", "0", "1", "2", "--dry-run")
    assert code == 0
    assert "3 runs wanted, 2 done, 1 to do" in out
    assert "seed 2: " in out
    assert before == {p: p.stat().st_mtime_ns for p in results.rglob("*.parquet")}


def test_no_process_that_is_killed_changes_a_row(undisturbed, tmp_path, start):
    """The whole sweep outright, then a trial's process of the sweep that continues it.

    What workers are told (to keep their memory and give up idle cores) is read from those at work.
    """
    results = tmp_path / "results"
    driver = start(results, *TRAIN_ONLY, "--epochs", "12")
    # Early: a run left alone gets all CPUs, and other threads add up in another order.
    wait_for(lambda: max(finished_epochs(results), default=0) >= 2)
    workers = worker_processes(driver, "ImplicitFunc")
    assert workers
    for worker in workers:
        assert worker.environ().items() >= FOR_WORKERS.items()
    kill_outright(driver)
    assert not (results / "runs").exists()
    reached = max(finished_epochs(results))
    driver = start(results, *TRAIN_ONLY, "--epochs", "12")
    wait_for(lambda: max(finished_epochs(results), default=0) > reached)
    worker_processes(driver, "ImplicitFunc")[0].kill()
    out, err = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, out + err
    assert "started again: " in out
    assert len(re.findall(r"lost: digits .* \(its process was lost\); trying again \(1 of 3\)", out)) == 1, out
    assert_same_results(results, undisturbed[0])


def test_control_c_ends_a_sweep_in_one_line_and_loses_at_most_the_epoch_in_progress(tmp_path, start):
    results = tmp_path / "results"
    driver = start(results, *TRAIN_ONLY, "--epochs", "500", "--seeds", "0")
    wait_for(lambda: max(finished_epochs(results), default=0) >= 2)
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 130, out + err
    assert out.splitlines()[-1].startswith("interrupted; finished epochs are kept")
    assert "Traceback" not in out + err
    assert max(finished_epochs(results)) >= 2


def test_a_diverged_run_fails_alone_with_the_settings_to_change(tmp_path):
    results = tmp_path / "results"
    code, out, _ = sweep(results, *TRAIN_ONLY, "--epochs", "2", "--seeds", "0", "--set", "training.peak_lr=1e30")
    assert code == 1
    assert "failed: digits resnet9 noise 0.1 seed 0" in out
    assert "lower training.peak_lr (now 1e+30)" in out
    run = open_results(results).read("runs").to_pylist()[0]
    assert run["status"] == "failed"
    assert "no longer finite in epoch 1 of 2" in run["error"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB of its own."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("a small disk cannot be mounted here: " + mount.stderr.decode().strip())
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(ballast):
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_fails_the_run_with_that_reason_or_is_waited_for_and_loses_nothing(
    undisturbed, small_disk, start, monkeypatch
):
    """It fails after a second where patience ends then, and is waited for by default."""
    results, ballast = small_disk / "results", small_disk / "ballast"
    shutil.copytree(undisturbed[0], results)
    options = [*TRAIN_ONLY, "--epochs", "30", "--seeds", "0"]
    monkeypatch.setenv("MEMLIB_STORAGE_PATIENCE", "1")
    driver = start(results, *options)
    wait_for(lambda: max(finished_epochs(results), default=0) >= 2)
    fill(ballast)
    out, err = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 1, out + err
    assert "the disk or quota holding the results is full" in out
    assert [r["status"] for r in open_results(results).read("runs").to_pylist()] == ["done", "done"]
    ballast.unlink()
    reached = max(finished_epochs(results))
    monkeypatch.delenv("MEMLIB_STORAGE_PATIENCE")
    driver = start(results, *options)
    wait_for(lambda: max(finished_epochs(results), default=0) > reached)
    fill(ballast)
    before = read_until(driver, "it is tried again")
    ballast.unlink()
    out, err = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, out + err
    out = before + out
    assert len(re.findall(r"seed 0: .*results refuses \(.*No space left.*\); it is tried again", out)) == 1, out
    assert len(re.findall(r"seed 0: .*results answers again after \d+ s", out)) == 1, out
    assert open_results(results).read("runs").num_rows == 3
    assert open_results(results).read("epochs").num_rows == 2 * 13 * 3 + 31 * 3


def test_a_disk_without_room_is_refused_before_any_compute(small_disk, capsys):
    from sweeps.full_paper import main

    (small_disk / "ballast").write_bytes(bytes(1_900_000))
    assert main([*TINY, *TRAIN_ONLY, "--results", str(small_disk / "results")]) == 2
    assert "free some space, give another --results" in capsys.readouterr().err


def test_a_machine_too_busy_to_start_ray_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    import ray

    from sweeps.full_paper import main

    def slow(**settings):
        raise Exception("The current node timed out during startup.\nThis could happen.")

    monkeypatch.setattr(ray, "init", slow)
    assert main([*TINY, *TRAIN_ONLY, "--results", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err
    assert "Ray did not start on this machine (The current node timed out during startup. This could happen.)" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datasets", "digit"], "data set 'digit' is not known; did you mean 'digits'"),
        (["--models", "resnet", "--set", "model.width=1.0"], "model 'resnet' is not known; did you mean 'resnet9'"),
        (["--noise", "1.0"], "noise.fraction is 1.0"),
        ([*TRAIN_ONLY, "--epochs", "0"], "training.epochs is 0"),
        (["--limit", "5"], "limit"),
        (["--set", "data.image_size=8"], "set data.image_size to 11 or more"),
        (["--address", "127.0.0.1:9"], "nothing answers at --address 127.0.0.1:9"),
        (["--results", "/proc/nothing"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_before_any_compute(options, message, tmp_path, capsys):
    from sweeps.full_paper import main

    code = main([*TINY, "--results", str(tmp_path / "results"), *options])
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not (tmp_path / "results" / "runs").exists()


def test_results_of_another_schema_version_are_refused(tmp_path, capsys):
    from sweeps.full_paper import main

    (tmp_path / "memlib-results.json").write_text('{"schema_version": 0}')
    assert main([*TINY, "--results", str(tmp_path)]) == 2
    assert "written by schema version 0" in capsys.readouterr().err
