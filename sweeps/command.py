"""What the commands share: exit codes, errors in one line, and the options that say where."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from memlib.errors import InputError

DONE, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def run_command(work: Callable[[Console], int]) -> int:
    """Do the command's work and return its exit code: 0 all done, 1 some failed, 2 bad input, 130 interrupted."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        return work(console)
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        console.print("interrupted; finished epochs are kept: run the same command again to continue.")
        return INTERRUPTED


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where images come from, where results go, and where it is computed."""
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. training.peak_lr=0.05")
    add("--data", type=Path, metavar="ROOT", help="folder with NAME/train.parquet or torchvision's files")
    add("--results", default="results", metavar="PLACE", help="folder or s3://BUCKET/FOLDER (default: results)")
    add("--address", metavar="ADDRESS", help="a running Ray cluster (auto, HOST:PORT); default: start Ray here")
    add(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="cpu: leave GPUs alone; default: use them where they are",
    )
    add("--dry-run", action="store_true", help="show what there is to do and what it will cost, and stop")
