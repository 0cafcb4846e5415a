"""What the commands share: exit codes, errors in one line, and the options that say where."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from memlib.datasets import Dataset
from memlib.errors import InputError
from sweeps.cluster import Capacity, start_ray
from sweeps.costs import Place
from sweeps.failures import RayDied

DONE, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def run_command(work: Callable[[Console], int]) -> int:
    """Do the command's work and return its exit code: 0 all done, 1 some failed, 2 bad input, 130 interrupted."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        return work(console)
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return BAD_INPUT
    except RayDied as error:
        console.print(f"ended: {error}; what is finished is kept: run the same command again to continue.")
        return SOME_FAILED
    except KeyboardInterrupt:
        console.print("interrupted; finished epochs are kept: run the same command again to continue.")
        return INTERRUPTED


def join_ray(options: argparse.Namespace, console: Console) -> Capacity:
    """Start Ray or join the cluster that the options name, and return what it has or can grow to.

    Raises:
        InputError: no cluster answers, or it lets anybody in and spans several machines.
    """
    capacity = start_ray(options.address, device=options.device, say=console.print)
    if options.address is not None:
        from sweeps.doors import check_doors  # Ray is imported only after its environment is set

        check_doors(insecure=options.insecure)
    return capacity


def share_images(datasets: Mapping[str, Dataset], options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Return references to the images, put where every node can fetch them; none for a dry run on this machine.

    On a cluster, every node is asked first whether it is able to take part.

    Raises:
        InputError: a node lacks something.
    """
    from sweeps.nodes import check_nodes
    from sweeps.object_store import put_images

    if options.address is None and options.dry_run:
        return {}
    images = put_images(datasets)
    if options.address is not None:
        n_nodes = check_nodes(place.store, images, with_gpus=place.capacity.gpus > 0)
        place.console.print(f"checked {n_nodes} nodes: all run this code, write the results and see the images")
    return images


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where images come from, where results go, and where it is computed."""
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. training.peak_lr=0.05")
    add("--data", type=Path, metavar="ROOT", help="folder with NAME/train.parquet or torchvision's files")
    add("--results", default="results", metavar="PLACE", help="folder or s3://BUCKET/FOLDER (default: results)")
    add("--address", metavar="ADDRESS", help="a running Ray cluster (auto, HOST:PORT); default: start Ray here")
    add("--insecure", action="store_true", help="use a cluster of several machines although it asks for no token")
    add(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="cpu: leave GPUs alone; default: use them where they are",
    )
    add("--dry-run", action="store_true", help="show what there is to do and what it will cost, and stop")
