"""Small real images and settings that several test files use."""

from __future__ import annotations

import socket

import hypothesis
import pytest
import torch
from sweeping import launch

from memlib.config import RunConfig, build_config
from memlib.datasets import Dataset, load_dataset
from memlib.storage import Storage
from sweeps.costs import _cached_flops

CPU = torch.device("cpu")

# No test asserts a time: a busy machine takes several times what a quiet one does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Files that take minutes, on real Ray: begun first, so that no process is left with one of them at the end.
LONG = (
    "test_faults.py",
    "test_sweep.py",
    "test_sweep_experiments.py",
    "test_dropout_search.py",
    "test_object_store.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; whatever runs several files at once starts them in this order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Real handwritten digits at 16 x 16: 200 to train on, 60 to test on."""
    full = load_dataset("digits", image_size=16)
    return Dataset("digits", full.train.take(torch.arange(200)), full.test.take(torch.arange(60)), full.class_names)


@pytest.fixture(scope="session")
def small_run() -> RunConfig:
    """A run of a few seconds on those digits."""
    return build_config(
        RunConfig,
        {
            "data": {"name": "digits", "image_size": 16},
            "model": {"width": 0.0625},
            "training": {"epochs": 3, "batch_size": 32, "peak_lr": 0.05, "precision": "float32"},
            "checkpoints": {"epochs": [0, 2]},
            "noise": {"fraction": 0.2},
        },
    )


@pytest.fixture
def shallow_vit(monkeypatch):
    """The vision transformer with two of its six blocks, where the number of blocks tells nothing more."""
    monkeypatch.setattr("memlib.models.vit.DEPTH", 2)
    _cached_flops.cache_clear()
    yield
    _cached_flops.cache_clear()


@pytest.fixture
def kill_after_writes(monkeypatch):
    """Lets this process end, as if killed, at its next write after so many."""

    def kill_after(writes):
        left, write = iter(range(writes)), Storage.write

        def write_until_killed(storage, path, data):
            if next(left, None) is None:
                raise KeyboardInterrupt
            write(storage, path, data)

        monkeypatch.setattr(Storage, "write", write_until_killed)

    return kill_after


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def start():
    """Starts sweeps that do not outlive their test."""
    started = []

    def start_one(results, *options, **script):
        started.append(launch(results, *options, **script))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()
