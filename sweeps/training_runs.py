"""Training runs as Ray Tune trials.

A trial is one run: it reads the images from the object store, continues from the run's own last
state where there is one, and writes its tables itself. The driver holds no results; Tune only
places the trials and starts again those whose process was lost.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from memlib.config import RunConfig, config_from_json, config_to_json
from memlib.holdings import is_finished, own_holdings
from memlib.runs import perform_run, record_failure
from memlib.training_state import EpochRecord
from sweeps.cluster import Capacity
from sweeps.equipment import check_code
from sweeps.failures import RESTARTS, TAKEN_BACK, describe_error, describe_loss, open_patiently, record
from sweeps.object_store import from_arrays
from sweeps.preflight import dataset_key
from sweeps.progress import EpochReport, SweepProgress
from sweeps.resources import Resources, trial_resources
from sweeps.scalars import scalar_writer


@dataclass(frozen=True)
class Failure:
    """A run that did not end well, and why."""

    run: RunConfig
    error: str


def train_runs(
    runs: Sequence[RunConfig],
    images: Mapping[str, ray.ObjectRef],
    *,
    results: str,
    capacity: Capacity,
    watcher: Watcher,
    tensorboard: bool = False,
) -> list[Failure]:
    """Perform the runs on Ray and return those that failed; each writes its own results.

    images: object store references by `dataset_key`. results: the store's location, reachable from every node.
    """
    if not runs:
        return []
    trainable = tune.with_parameters(_train_trial, datasets=dict(images), results=results, tensorboard=tensorboard)
    return fit_trials(
        runs,
        trainable,
        watcher,
        resources=lambda run: trial_resources(run, capacity, n_runs=len(runs)),
        record_lost=lambda run, error: _record(run, results, None, error),
    )


def fit_trials(
    runs: Sequence[RunConfig],
    trainable: Callable[..., None],
    watcher: Watcher,
    *,
    resources: Callable[[RunConfig], Resources],
    record_lost: Callable[[RunConfig, str], str],
    scheduler: TrialScheduler | None = None,
) -> list[Failure]:
    """Let Tune perform `trainable` once for each run, in this order, and return the runs that failed.

    trainable: takes {"config": the run's settings as JSON}. record_lost: writes the failure of a run whose process
    was lost too often, and returns its reason. scheduler: what may stop trials early; None for nothing.
    """
    listener = _Listener(runs, watcher, record_lost)

    def placement(trial: Mapping[str, str]) -> tune.PlacementGroupFactory:
        wanted = resources(config_from_json(trial["config"]))
        return tune.PlacementGroupFactory([{"CPU": wanted.cpus, "GPU": wanted.gpu}])

    with tempfile.TemporaryDirectory(prefix="memlib-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, placement),
            param_space={"config": tune.grid_search([config_to_json(run) for run in runs])},
            tune_config=tune.TuneConfig(reuse_actors=True, trial_dirname_creator=_run_id, scheduler=scheduler),
            run_config=tune.RunConfig(
                name="memlib",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                callbacks=[listener],
            ),
        )
        tuner.fit()
    return listener.failures


@dataclass(frozen=True)
class Watcher:
    """Who is told of what happens to the runs.

    ended: called when a run has ended well. idle: called again and again while runs are under way.
    """

    progress: SweepProgress
    ended: Callable[[RunConfig], None] = lambda run: None
    idle: Callable[[], None] = lambda: None


class _Listener(tune.Callback):
    """Hands what Tune reports to the watcher and collects failures."""

    def __init__(
        self, runs: Sequence[RunConfig], watcher: Watcher, record_lost: Callable[[RunConfig, str], str]
    ) -> None:
        self._runs = {run.run_id: run for run in runs}
        self._watcher = watcher
        self._record_lost = record_lost
        self._progress = watcher.progress
        self._errors: dict[str, str] = {}
        self._losses: dict[str, int] = {}  # counted so far, by run

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Tune pickles its callbacks for a restore that is never made; a terminal cannot be pickled."""
        return tune.Callback, ()

    @property
    def failures(self) -> list[Failure]:
        return [Failure(self._runs[run_id], error) for run_id, error in self._errors.items()]

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        self._progress.started(_run_id(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: object
    ) -> None:
        if "error" in result:
            self._errors[_run_id(trial)] = result["error"]
        elif "note" in result:
            self._progress.note(_run_id(trial), result["note"])
        elif "accuracies" in result:
            report = EpochReport(result["epoch"], result["seconds"], result["accuracies"])
            self._progress.epoch(_run_id(trial), report)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        run_id = _run_id(trial)
        self._progress.finished(run_id, self._errors.get(run_id))
        if run_id not in self._errors:
            self._watcher.ended(self._runs[run_id])

    def on_step_end(self, iteration: int, trials: list[Trial], **info: object) -> None:
        self._watcher.idle()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Say why a trial is started again; a node that was taken back with notice is not counted."""
        run_id, n = _run_id(trial), trial.run_metadata.num_failures
        if n == self._losses.get(run_id, 0):
            self._progress.lost(run_id, TAKEN_BACK, "not counted")
            return
        self._losses[run_id] = n
        message = Path(trial.error_file).read_text() if trial.error_file else ""
        self._progress.lost(run_id, describe_loss(message.rpartition("Failure #")[2]), f"{n} of {RESTARTS}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Record a run whose process was lost more often than it is restarted."""
        run = self._runs[_run_id(trial)]
        error = f"its process was lost {RESTARTS + 1} times (out of memory, or the node went away)"
        self._errors[run.run_id] = self._record_lost(run, error)
        self._progress.finished(run.run_id, self._errors[run.run_id])


def _run_id(trial: Trial) -> str:
    return config_from_json(trial.config["config"]).run_id


def _train_trial(trial: dict[str, str], *, datasets: dict[str, Any], results: str, tensorboard: bool) -> None:
    """Perform one run in a Tune trial; an error of its own is recorded and reported, and not tried again."""

    def work(run: RunConfig, device: torch.device) -> None:
        store = open_patiently(results, report_note)
        if is_finished(run, own_holdings(run, store)):  # its process was lost after its last line
            return
        with scalar_writer(results, run.run_id, enabled=tensorboard) as write_scalars:

            def report(record: EpochRecord) -> None:
                write_scalars(record)
                report_epoch(record)

            dataset = from_arrays(ray.get(datasets[dataset_key(run)]))
            perform_run(run, dataset, store, device=device, on_epoch=report)

    work_in_trial(trial, work, lambda run, device, error: _record(run, results, device, error))


def work_in_trial(
    trial: dict[str, str],
    work: Callable[[RunConfig, torch.device], None],
    record_error: Callable[[RunConfig, torch.device, str], str],
) -> None:
    """Do a trial's work on the device it was granted; an error of its own is recorded, reported and final."""
    run = config_from_json(trial["config"])
    granted = tune.get_context().get_trial_resources().required_resources
    device = torch.device("cuda" if granted.get("GPU") else "cpu")
    torch.set_num_threads(int(granted["CPU"]))
    try:
        check_code()
        work(run, device)
    except RayError:  # the node that held the images is gone: try again elsewhere
        raise
    except Exception as error:
        tune.report({"error": record_error(run, device, describe_error(error))})


def report_note(text: str) -> None:
    """Tell the driver from within a trial what its user should know."""
    tune.report({"note": text})


def report_epoch(record: EpochRecord) -> None:
    """Report an epoch to Tune from within a trial; a scheduler may end the trial here."""
    shares = {split: result.accuracy for split, result in record.accuracies.items()}
    tune.report({"epoch": record.epoch, "seconds": record.seconds, "accuracies": shares})


def _record(run: RunConfig, results: str, device: torch.device | None, error: str) -> str:
    return record(lambda store: record_failure(run, store, device=device, error=error), results, error)
