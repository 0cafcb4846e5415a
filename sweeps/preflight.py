"""Everything that can be wrong with a sweep, found before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from memlib.config import DropoutConfig, ModelConfig, RunConfig
from memlib.datasets import Dataset, check_dataset_name, load_dataset
from memlib.errors import InputError
from memlib.experiments import ExperimentsConfig
from memlib.grouping import layer_groups
from memlib.holdings import check_same_images
from memlib.models import check_model_name
from memlib.recalibration import batchnorms
from memlib.results import ResultStore
from memlib.runs import build_network, prepare_data
from memlib.tasks import check_experiments

DISK_RESERVE = 1.1  # ask for this much more than estimated


def dataset_key(run: RunConfig) -> str:
    """Return the key under which a run's images are shared: runs of one source and size share them."""
    return f"{run.data.name}@{run.data.image_size or 'native'}"


def check_names(runs: Sequence[RunConfig]) -> None:
    """Raise InputError for a data set or model that does not exist, with the nearest match; nothing is loaded."""
    for name in dict.fromkeys(run.data.name for run in runs):
        check_dataset_name(name)
    for name in dict.fromkeys(run.model.name for run in runs):
        check_model_name(name)


def load_datasets(runs: Sequence[RunConfig], root: Path | None) -> dict[str, Dataset]:
    """Return the images the runs need, by `dataset_key`; each source is read (or downloaded) once.

    Raises:
        InputError: a source is missing, damaged or unusable.
    """
    sources = {dataset_key(run): run.data for run in runs}
    return {key: load_dataset(d.name, root=root, image_size=d.image_size) for key, d in sources.items()}


def check_images(runs: Sequence[RunConfig], datasets: Mapping[str, Dataset], store: ResultStore) -> None:
    """Raise InputError if images of the same name and size, but others, were what finished runs were made from."""
    for run in {dataset_key(run): run for run in runs}.values():
        check_same_images(run, datasets[dataset_key(run)], store)


def check_runs(
    wanted: Mapping[RunConfig, ExperimentsConfig], datasets: Mapping[str, Dataset]
) -> dict[RunConfig, tuple[str, ...]]:
    """Return the names of each run's layer groups, by depth; the runs, and the experiments wanted on each, are checked.

    Raises:
        InputError: a run's settings do not fit its images, an experiment asks for more than the run's training set
            has, or statistics of BatchNorm are to be recalibrated in a network that has none.
    """
    for run, experiments in wanted.items():
        check_experiments(run, experiments, prepare_data(run, datasets[dataset_key(run)]))
    asked = [run for run, how in wanted.items() if how.rewinding and how.rewinding.batchnorm == "recalibrated"]
    for run in {(dataset_key(run), run.model): run for run in asked}.values():
        if not batchnorms(build_network(run, datasets[dataset_key(run)])):
            raise InputError(
                f"rewinding.batchnorm is 'recalibrated' but {run.model.name} has no BatchNorm; set it to 'final', or "
                "leave that model out with --models."
            )
    return network_groups(list(wanted), datasets)


def network_groups(runs: Sequence[RunConfig], datasets: Mapping[str, Dataset]) -> dict[RunConfig, tuple[str, ...]]:
    """Return the names of each run's layer groups, by depth, from its freshly built network.

    Raises:
        InputError: a run's network does not fit its images.
    """
    names: dict[tuple[str, ModelConfig, DropoutConfig], tuple[str, ...]] = {}
    for run in runs:
        dataset = datasets[dataset_key(run)]
        key = (dataset_key(run), run.model, run.dropout)
        if key not in names:
            names[key] = layer_groups(build_network(run, dataset)).names
    return {run: names[dataset_key(run), run.model, run.dropout] for run in runs}


def check_disk(store: ResultStore, needed_bytes: int) -> None:
    """Raise InputError if a local results folder lies on a disk without room for the checkpoints."""
    free = store.storage.free_bytes()
    if free is not None and free < DISK_RESERVE * needed_bytes:
        raise InputError(
            f"results need about {needed_bytes / 1e9:.1f} GB but {store.storage.location} has {free / 1e9:.1f} GB "
            "free; free some space, give another --results, or keep fewer states (--set checkpoints.epochs=[])."
        )
