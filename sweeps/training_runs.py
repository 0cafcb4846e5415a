"""Training runs as Ray Tune trials.

A trial is one run: it reads the images from the object store, continues from the run's own last
state where there is one, and writes its tables itself. The driver holds no results; Tune only
places the trials and starts again those whose process was lost.
"""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.tune.experiment import Trial

from memlib.config import RunConfig, config_from_json, config_to_json
from memlib.datasets import Dataset, ImageSet
from memlib.errors import InputError
from memlib.results import open_results
from memlib.runs import perform_run, record_failure
from memlib.storage import is_disk_full
from memlib.training import Diverged, EpochRecord
from sweeps.cluster import Capacity
from sweeps.preflight import dataset_key
from sweeps.progress import EpochReport, SweepProgress
from sweeps.scalars import scalar_writer

RESTARTS = 3  # of a trial whose process or node was lost; an error of its own is final
GPU_SHARE = {"resnet9": 0.25, "vit": 0.5}  # of a card, for the models small enough to share one


@dataclass(frozen=True)
class Resources:
    """What one trial asks for; `gpu` is a share of a card, 0 for a run on the CPU."""

    cpus: int
    gpu: float


@dataclass(frozen=True)
class Failure:
    """A run that did not end well, and why."""

    run: RunConfig
    error: str


def trial_resources(run: RunConfig, capacity: Capacity, *, n_runs: int) -> Resources:
    """Return what a run asks for on a cluster with `n_runs` to do.

    On GPUs a small model takes a share of a card and one CPU; without any, the CPUs are divided
    among the runs, at least one and at most a node's each.
    """
    if capacity.gpus:
        return Resources(1, GPU_SHARE.get(run.model.name, 1.0))
    return Resources(max(1, min(capacity.cpus // n_runs, capacity.largest_node_cpus)), 0.0)


def train_runs(
    runs: Sequence[RunConfig],
    datasets: Mapping[str, Dataset],
    *,
    results: str,
    capacity: Capacity,
    progress: SweepProgress,
    tensorboard: bool = False,
) -> list[Failure]:
    """Perform the runs on Ray and return those that failed; each writes its own results.

    datasets: by `dataset_key`. results: the store's location, reachable from every node.
    """
    listener = _Listener(runs, results, progress)
    shared = {key: ray.put(_to_arrays(dataset)) for key, dataset in datasets.items()}
    trainable = tune.with_parameters(_train_trial, datasets=shared, results=results, tensorboard=tensorboard)

    def placement(trial: Mapping[str, str]) -> tune.PlacementGroupFactory:
        wanted = trial_resources(config_from_json(trial["config"]), capacity, n_runs=len(runs))
        return tune.PlacementGroupFactory([{"CPU": wanted.cpus, "GPU": wanted.gpu}])

    with tempfile.TemporaryDirectory(prefix="memlib-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, placement),
            param_space={"config": tune.grid_search([config_to_json(run) for run in runs])},
            tune_config=tune.TuneConfig(reuse_actors=True, trial_dirname_creator=_run_id),
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


class _Listener(tune.Callback):
    """Hands what Tune reports to the progress display and collects failures."""

    def __init__(self, runs: Sequence[RunConfig], results: str, progress: SweepProgress) -> None:
        self._runs = {run.run_id: run for run in runs}
        self._results = results
        self._progress = progress
        self._errors: dict[str, str] = {}

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
        elif "accuracies" in result:
            report = EpochReport(result["epoch"], result["seconds"], result["accuracies"])
            self._progress.epoch(_run_id(trial), report)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        run_id = _run_id(trial)
        self._progress.finished(run_id, self._errors.get(run_id))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Record a run whose process was lost more often than it is restarted."""
        run = self._runs[_run_id(trial)]
        error = f"its process was lost {RESTARTS + 1} times (out of memory, or the node went away)"
        self._errors[run.run_id] = _record(run, self._results, None, error)
        self._progress.finished(run.run_id, self._errors[run.run_id])


def _run_id(trial: Trial) -> str:
    return config_from_json(trial.config["config"]).run_id


def _train_trial(trial: dict[str, str], *, datasets: dict[str, Any], results: str, tensorboard: bool) -> None:
    """Perform one run in a Tune trial; an error of its own is recorded and reported, and not tried again."""
    run = config_from_json(trial["config"])
    granted = tune.get_context().get_trial_resources().required_resources
    device = torch.device("cuda" if granted.get("GPU") else "cpu")
    torch.set_num_threads(int(granted["CPU"]))
    try:
        with scalar_writer(results, run.run_id, enabled=tensorboard) as write_scalars:

            def report(record: EpochRecord) -> None:
                write_scalars(record)
                shares = {split: result.accuracy for split, result in record.accuracies.items()}
                tune.report({"epoch": record.epoch, "seconds": record.seconds, "accuracies": shares})

            dataset = _from_arrays(ray.get(datasets[dataset_key(run)]))
            perform_run(run, dataset, open_results(results), device=device, on_epoch=report)
    except RayError:  # the node that held the images is gone: try again elsewhere
        raise
    except Exception as error:
        tune.report({"error": _record(run, results, device, _explain(error))})


def _explain(error: Exception) -> str:
    if is_disk_full(error):
        return (
            f"the disk or quota holding the results is full ({error}); free some space and run the same command again"
        )
    if isinstance(error, InputError | Diverged):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()


def _record(run: RunConfig, results: str, device: torch.device | None, error: str) -> str:
    """Write the failure where that is possible and return its text; where it is not, the report is all there is."""
    try:
        record_failure(run, open_results(results), device=device, error=error)
    except (InputError, OSError) as refused:
        return f"{error} (and the failure could not be written to {results}: {refused})"
    return error


def _to_arrays(dataset: Dataset) -> dict[str, Any]:
    """Return a data set as NumPy arrays, which Ray's object store shares between processes without copying."""
    splits = {split: vars(getattr(dataset, split)) for split in ("train", "test")}
    arrays = {split: {name: t.numpy() for name, t in tensors.items()} for split, tensors in splits.items()}
    return {"name": dataset.name, "class_names": dataset.class_names, **arrays}


def _from_arrays(arrays: dict[str, Any]) -> Dataset:
    with warnings.catch_warnings():
        # Shared memory is read-only; nothing here writes to images, labels or ids.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        train, test = (
            ImageSet(**{name: torch.from_numpy(a) for name, a in arrays[split].items()}) for split in ("train", "test")
        )
    return Dataset(arrays["name"], train, test, arrays["class_names"])
