"""What becomes of tasks that fail or are lost, decided by the driver; Ray's answers are given here."""

import io
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from ray.exceptions import LocalRayletDiedError, WorkerCrashedError
from rich.console import Console

from memlib.experiments import ExperimentsConfig, RewindingConfig
from memlib.results import create_results
from memlib.tasks import plan_tasks
from memlib.units import Task
from sweeps import unit_tasks
from sweeps.cluster import Capacity
from sweeps.failures import RESTARTS, RayDied
from sweeps.progress import SweepProgress
from sweeps.unit_tasks import GIVE_UP_AFTER, IN_FLIGHT_PER_LANE, Outcome, TaskPool

GROUPS = tuple(f"layer{i}" for i in range(30))


@dataclass(frozen=True, eq=False)
class Reference:
    task: Task


@pytest.fixture
def pool(small_run, tmp_path, monkeypatch):
    """A pool of one CPU on a store, whose submitted tasks end at once as `answers(task)` says."""
    create_results(tmp_path)
    answers, submitted = {}, []

    def submit(self, task):
        submitted.append(task)
        return Reference(task)

    def get(reference):
        answer = answers["all"](reference.task)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(TaskPool, "_submit", submit)
    fake = SimpleNamespace(wait=lambda references, **how: (references, []), get=get)
    monkeypatch.setattr(unit_tasks, "ray", fake)
    looks = []
    monkeypatch.setattr(unit_tasks, "MachineWatch", lambda *_: SimpleNamespace(look=lambda: looks.append(1)))
    console = Console(record=True, width=500, file=io.StringIO())
    made = TaskPool({}, str(tmp_path), Capacity(1, 0, 1), SweepProgress([small_run], console))
    tasks = plan_tasks(small_run, ExperimentsConfig(rewinding=RewindingConfig(epochs=(0, 2))), GROUPS)

    def run(answer):
        answers["all"] = answer
        made.add(tasks)
        made.finish()
        return console.export_text().splitlines()

    return SimpleNamespace(
        pool=made, run=run, submitted=submitted, tasks=tasks, store=create_results(tmp_path), looks=looks
    )


def test_a_bug_is_not_tried_for_every_task_of_a_run(pool):
    shown = pool.run(lambda task: Outcome("a bug"))
    assert len(pool.submitted) == len(pool.pool.failures) <= GIVE_UP_AFTER + IN_FLIGHT_PER_LANE
    left = 2 * (len(pool.tasks) - len(pool.submitted))
    given_up = [line for line in shown if line.startswith("gave up")]
    assert given_up == [
        f"gave up: rewinding of digits resnet9 noise 0.2 seed 0: 5 tasks in a row failed, {left} units are not started"
    ]


def test_a_pool_at_work_looks_for_machines_again_and_again(pool):
    pool.run(lambda task: Outcome(None))
    assert len(pool.looks) >= len(pool.tasks) / IN_FLIGHT_PER_LANE


def test_failures_among_successes_give_nothing_up(pool):
    shown = pool.run(lambda task: Outcome("bad luck" if task.units[0].settings["groups"][0][-1] in "02468" else None))
    assert len(pool.submitted) == len(pool.tasks)
    assert len(pool.pool.failures) == len(pool.tasks) / 2
    assert not [line for line in shown if line.startswith("gave up")]


def test_what_is_lost_is_submitted_again_three_times_and_then_recorded(pool):
    lost = pool.tasks[0].units[0].settings["groups"]
    shown = pool.run(lambda t: WorkerCrashedError() if t.units[0].settings["groups"] == lost else Outcome(None))
    again = [line for line in shown if line.startswith("lost: rewinding layer0 of digits")]
    assert [line.rpartition("; ")[2] for line in again] == [f"trying again ({n} of 3)" for n in (1, 2, 3)]
    assert sum(task.units[0].settings["groups"] == lost for task in pool.submitted) == RESTARTS + 1
    (failure,) = pool.pool.failures
    assert failure.error.startswith("it was started 4 times and lost its process or node")
    failed = pool.store.read("units").to_pylist()
    assert [row["status"] for row in failed] == ["failed"] * 2


def test_only_what_a_lost_process_had_not_written_is_submitted_again(pool):
    first, second = pool.tasks[0].units
    answers = iter([WorkerCrashedError(), *[Outcome(None)] * 100])

    def answer(task):
        given = next(answers)
        if isinstance(given, Exception):
            pool.store.storage.write(f"rewinding/{first.unit_id}.parquet", b"done")
        return given

    pool.run(answer)
    again = [task for task in pool.submitted[1:] if second in task.units]
    assert [task.units for task in again] == [(second,)]


def test_a_driver_whose_own_ray_died_ends_instead_of_failing_every_task(pool):
    with pytest.raises(RayDied, match="Ray died on the machine this command runs on"):
        pool.run(lambda task: LocalRayletDiedError())
    assert pool.pool.failures == []
