from dataclasses import replace

import pytest
import torch

from memlib.errors import InputError
from sweeps.doors import is_reachable
from sweeps.equipment import CODE_VARIABLE, check_code, equipment
from sweeps.failures import PATIENCE_SECONDS, PATIENCE_VARIABLE, describe_error, describe_loss, storage_patience
from sweeps.nodes import find_differences


def test_processes_of_one_checkout_do_not_differ():
    assert find_differences(equipment(), equipment()) == []


@pytest.mark.parametrize("part", ["python", "ray", "torch", "memlib"])
def test_what_differs_is_named_with_both_versions_and_what_to_do(part):
    here = equipment()
    there = replace(here, **{part: "0.0"})
    expected = f"it has {part} 0.0 and the driver {getattr(here, part)}, install the driver's there"
    assert find_differences(there, here) == [expected]


@pytest.mark.parametrize(
    ("addresses", "reachable"),
    [(["10.0.0.1"], False), (["127.0.0.1"], False), (["10.0.0.1", "10.0.0.2"], True), (["10.0.0.2"], True)],
)
def test_only_a_cluster_of_this_machine_alone_needs_no_token(addresses, reachable):
    assert is_reachable(addresses, "10.0.0.1") is reachable


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "The actor died unexpectedly. Worker unexpectedly exits with a connection error code 2.",
            "its process was lost",
        ),
        ("1 worker(s) were killed due to the node running low on memory.", "its node ran out of memory"),
        ("The actor died because its node has died. Node Id: 12", "its node was lost"),
        (
            "Task failed because the node it was running on is dead or unavailable. Node IP: 10.0.0.2. This can happen "
            "if the node was preempted, had a hardware failure, or its raylet crashed unexpectedly.",
            "its node was lost",
        ),
    ],
)
def test_rays_messages_are_told_in_our_words(message, expected):
    assert describe_loss(message) == expected


def test_a_gpu_that_is_too_small_is_told_in_one_line_with_what_to_change():
    told = describe_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert told.startswith(
        "the GPU's memory is too small for it, or for what shares the card with it; lower training.b"
    )
    assert told.endswith("Tried to allocate 2.00 GiB.")


def test_the_patience_with_the_storage_is_five_minutes_or_what_the_variable_says(monkeypatch):
    monkeypatch.delenv(PATIENCE_VARIABLE, raising=False)
    assert storage_patience() == PATIENCE_SECONDS == 300
    monkeypatch.setenv(PATIENCE_VARIABLE, "7.5")
    assert storage_patience() == 7.5


@pytest.mark.parametrize("given", ["soon", "-1", "inf", "nan"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(given, monkeypatch):
    monkeypatch.setenv(PATIENCE_VARIABLE, given)
    with pytest.raises(InputError, match=f"MEMLIB_STORAGE_PATIENCE is '{given}'; give a number of seconds"):
        storage_patience()


def test_a_process_on_a_node_that_joined_late_refuses_to_run_other_code(monkeypatch):
    check_code()
    monkeypatch.setenv(CODE_VARIABLE, equipment().code)
    check_code()
    monkeypatch.setenv(CODE_VARIABLE, "memlib 0, torch 0")
    with pytest.raises(InputError, match="runs memlib .* and the driver memlib 0, torch 0; install the driver's there"):
        check_code()
