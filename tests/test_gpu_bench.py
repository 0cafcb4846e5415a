"""bench/gpu.py at a size for the CPU: every part, so that a GPU finds nothing broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
CPU = torch.device("cpu")
ABSENT = ("ray", "polars", "pydantic", "rich", "platformdirs", "matplotlib", "beartype", "tensorboardX")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCH))
    try:
        import gpu

        yield gpu
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def perform(gpu, tmp_path_factory):
    """Runs the script on the CPU and returns its exit status; everything lands in `perform.folder`."""
    folder = tmp_path_factory.mktemp("gpu")

    def run(*options):
        places = ["--out", str(folder / "out"), "--results", str(folder / "results")]
        return gpu.main(["--tiny", "--device", "cpu", *places, *options])

    run.folder = folder
    return run


def saved(perform, part):
    return json.loads((perform.folder / "out" / f"gpu_{part}.json").read_text())


@pytest.mark.parametrize("part", ["checks", "rates", "sharing"])
def test_a_part_measures_and_keeps_its_rows_with_the_machine(perform, part):
    assert perform("--part", part) == 0
    found = saved(perform, part)
    assert found["rows"]
    assert {"date", "torch", "device", "cpu_model", "cores", "code_version"} <= set(found)
    for row in found["rows"]:
        assert row.get("held") in (True, None)
        assert row.get("reason", "not run: no CUDA device") == "not run: no CUDA device"
        assert row.get("times_as_fast", 1) > 0 and row.get("images_per_second", 1) > 0


def test_a_run_that_time_cuts_off_continues_without_training_again_and_leaves_its_tables(perform, capsys):
    import gpu_paper

    def check(places, seconds, *, what):
        if "task" in what:
            raise gpu_paper.OutOfTime(what)

    assert perform("--part", "digits-0", "--minutes", "0") == 3
    assert "its training may take longer than the" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_paper.Places, "check", check)
        assert perform("--part", "digits-0") == 3
    (trained,) = (perform.folder / "results" / "digits-0" / "runs").iterdir()
    before = trained.stat().st_mtime_ns
    assert perform("--part", "digits-0") == 0
    assert trained.stat().st_mtime_ns == before
    found = saved(perform, "digits-0")
    units = {name: experiment["units"] for name, experiment in found["experiments"].items() if experiment["units"]}
    assert units == {"rewinding": 18, "retraining": 9, "critical_units": 2}
    assert found["search"]["flops_per_second"] > 0
    assert perform("--part", "digits-0-table1", "tables") == 0
    assert [run["dropout"] for run in saved(perform, "digits-0-table1")["runs"]] == ["example_tied"]
    tables = {p.parent.name for p in (perform.folder / "results").glob("*/*.parquet")}
    assert {"runs", "epochs", "gradients", "examples", "rewinding", "retraining", "critical_units", "dropout"} <= tables
    assert not list((perform.folder / "results").glob("**/*.safetensors"))
    capsys.readouterr()
    assert perform("--list") == 0
    listed = dict(line.split()[1:3] for line in capsys.readouterr().out.splitlines())
    assert listed["digits-0"] == listed["tables"] == "done"


def test_the_processes_that_share_a_card_need_memlib_not_installed():
    """As on a machine where the script lies in a checkout and nothing was installed: no editable install is seen."""
    site = Path(torch.__file__).parents[1]
    command = [sys.executable, "-S", str(BENCH / "gpu_sharing.py"), "--help"]
    done = subprocess.run(command, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_fails_is_told_and_neither_its_part_nor_the_next_is_lost(perform, gpu, capsys, monkeypatch):
    import gpu_checks
    import gpu_sharing

    def fail(*_arguments):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_checks, "_masks", fail)
    monkeypatch.setattr(gpu_sharing, "_stacked_rate", fail)
    monkeypatch.setattr(gpu_sharing, "at_once", lambda *_arguments: 7.0)
    monkeypatch.setattr(gpu, "measure_rates", fail)
    assert perform("--again", "--part", "rates", "checks", "sharing") == 1
    shown = capsys.readouterr()
    assert "RuntimeError: no such kernel" in shown.err
    assert "== rates FAILED" in shown.out
    rows = saved(perform, "checks")["rows"]
    assert [row["check"] for row in rows if row["held"] is False] == ["masks"]
    assert len(rows) > 5
    assert saved(perform, "sharing")["skipped"] == ["one program, 2 seeds: no such kernel"]
    assert [row["way"] for row in saved(perform, "sharing")["rows"]] == ["processes"]


def test_a_part_that_does_not_exist_and_a_gpu_that_is_missing_are_named(perform, gpu, capsys, monkeypatch):
    assert perform("--part", "chekcs") == 2
    assert "there is no part 'chekcs'; the parts are checks, rates" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--list"]) == 2
    assert "no CUDA device; give --tiny --device cpu" in capsys.readouterr().err


def test_with_its_few_packages_alone_it_times_the_ways_to_run_a_step_and_they_agree(perform):
    """In a process of its own: shape checks of the tests do not compile."""
    options = ["--tiny", "--device", "cpu", "--part", "ways", "--out", str(perform.folder / "out")]
    code = (
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.path.insert(0, {str(BENCH)!r})\n"
        "import gpu\n"
        f"sys.exit(gpu.main({options}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = saved(perform, "ways")
    assert {row["way"] for row in found["rows"]} == {"as it is", "compiled"}
    assert max(row["distance_of_parameters"] for row in found["rows"]) < 1e-3
    assert found["skipped"] == ["CUDA graph: no CUDA device"]


def test_a_training_step_never_waits_for_a_value_of_the_device(gpu):
    from gpu_checks import host_reads
    from gpu_sizes import TINY, network
    from training import ours, random_batch

    step = ours(random_batch(16, TINY.shape), "float32", CPU, model=network("resnet9", TINY, device=CPU))
    assert host_reads(step) == {}
    assert host_reads(lambda: torch.ones(3).sum().item())["aten::item"] == 1


def test_seeds_trained_in_one_program_end_where_they_end_apart(gpu):
    from gpu_sharing import stacked_step
    from gpu_sizes import TINY, network
    from training import ours, random_batch

    apart = [network("resnet9", TINY, device=CPU, seed=i) for i in range(2)]
    batch = random_batch(16, TINY.shape)
    step, together = stacked_step(
        [network("resnet9", TINY, device=CPU, seed=i) for i in range(2)], [batch] * 2, "float32", CPU
    )
    steps = [ours(batch, "float32", CPU, model=model) for model in apart]
    for _ in range(2):
        step()
        for own in steps:
            own()
    for i, model in enumerate(apart):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][i], parameter, rtol=1e-3, atol=1e-5)
