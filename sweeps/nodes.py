"""What every node of a cluster must have, asked of each of them before anything is spent."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memlib.errors import InputError
from memlib.results import ResultStore
from memlib.storage import Storage, open_storage
from sweeps.equipment import Equipment, equipment
from sweeps.object_store import from_arrays

SECONDS_TO_ANSWER = 300.0  # a first process on a node may have to read torch over the network
SHARE_OF_GPU = 0.01  # enough for Ray to show the process a card


@dataclass(frozen=True)
class NodeReport:
    """What a process on a node found."""

    equipment: Equipment
    n_cards: int  # that torch sees
    sees_results: bool  # the file that the driver wrote
    refusal: str  # why the results cannot be written there; empty if they can
    unseen_images: str  # why the images cannot be fetched; empty if they can


def check_nodes(store: ResultStore, images: Mapping[str, ray.ObjectRef], *, with_gpus: bool) -> int:
    """Run a small task on every node, and return their number.

    images: object store references, which every node must be able to fetch. with_gpus: whether GPUs are to be used.

    Raises:
        InputError: a node lacks something; each is named with what it lacks and what to do.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    mark = f".preflight-{uuid.uuid4().hex}"
    storage = store.storage
    storage.write(f"{mark}-driver", b"memlib")
    try:
        found = [(node, _ask(node, storage.uri, mark, list(images.values()))) for node in nodes]
        problems = [(node, _problems(node, reference, storage, mark, with_gpus)) for node, reference in found]
    finally:
        for name in ["driver", *(node["NodeID"] for node in nodes)]:
            storage.delete(f"{mark}-{name}")
    lacking = [f"{_label(node)}: {'; '.join(wrong)}." for node, wrong in problems if wrong]
    if lacking:
        raise InputError(f"{len(lacking)} of {len(nodes)} nodes cannot take part. " + " ".join(lacking))
    return len(nodes)


def find_differences(there: Equipment, here: Equipment) -> list[str]:
    """Return what is not the same, each with what to do."""
    return [
        f"it has {field.name} {getattr(there, field.name)} and the driver {getattr(here, field.name)}, "
        "install the driver's there"
        for field in fields(Equipment)
        if getattr(there, field.name) != getattr(here, field.name)
    ]


def _ask(node: Mapping[str, Any], uri: str, mark: str, images: Sequence[ray.ObjectRef]) -> ray.ObjectRef:
    options = {
        "num_cpus": 0,
        "num_gpus": SHARE_OF_GPU if node["Resources"].get("GPU") else 0,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    }
    return _look_around.options(**options).remote(uri, mark, node["NodeID"], list(images))


@ray.remote
def _look_around(uri: str, mark: str, node_id: str, images: list[ray.ObjectRef]) -> NodeReport:
    refusal, unseen, sees_results = "", "", False
    try:
        storage = open_storage(uri)
        sees_results = storage.exists(f"{mark}-driver")
        storage.write(f"{mark}-{node_id}", b"memlib")
    except (InputError, OSError) as error:
        refusal = str(error)
    try:
        for reference in images:
            from_arrays(ray.get(reference, timeout=SECONDS_TO_ANSWER))
    except RayError as error:
        unseen = str(error)
    n_cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return NodeReport(equipment(), n_cards, sees_results, refusal, unseen)


def _problems(
    node: Mapping[str, Any], reference: ray.ObjectRef, storage: Storage, mark: str, with_gpus: bool
) -> list[str]:
    """Return what is wrong with a node; nothing if it is gone by now."""
    try:
        report = ray.get(reference, timeout=SECONDS_TO_ANSWER)
    except GetTimeoutError:
        return [] if _is_gone(node) else ["it does not answer, wait until it is free or stop Ray there"]
    except RayError as error:
        why = str(error).strip().splitlines()[-1]
        return [] if _is_gone(node) else [f"it cannot run memlib ({why}), install it there as for the driver"]
    wrong = find_differences(report.equipment, equipment())
    if report.refusal:
        wrong.append(f"it cannot write the results ({report.refusal}), give it the mount or the credentials")
    elif not (report.sees_results and storage.exists(f"{mark}-{node['NodeID']}")):
        wrong.append(
            f"{storage.location} there is not {storage.location} here, share the folder among all nodes (NFS) or give "
            "--results s3://BUCKET/FOLDER"
        )
    if report.unseen_images:
        wrong.append(f"it cannot fetch the images ({report.unseen_images}), open the ports between the nodes")
    if with_gpus and node["Resources"].get("GPU") and not report.n_cards:
        wrong.append("Ray counts GPUs there that torch does not see, start Ray there with --num-gpus=0 or mend CUDA")
    return wrong


def _is_gone(node: Mapping[str, Any]) -> bool:
    return not any(other["NodeID"] == node["NodeID"] and other["Alive"] for other in ray.nodes())


def _label(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
