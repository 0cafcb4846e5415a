"""Train a finished run anew, from its row alone, and say what differs: `python -m memlib.replay RUN_ID`.

Exit status: 0 the same to the bit, 1 something differs, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from memlib.config import config_from_json
from memlib.datasets import load_dataset
from memlib.errors import InputError
from memlib.holdings import check_same_images
from memlib.results import ResultStore, create_results, open_results
from memlib.runs import perform_run
from memlib.training import Diverged

EXAMPLE = ("mode", "split", "example_id")
FACTS = ("code_version", "precision", "device")


@dataclass(frozen=True)
class Difference:
    """How the examples of one `mode` and `split` are predicted then and now.

    n: examples. n_differing: predictions that differ. largest: difference of two margins. accuracies: share predicted
    as assigned, then and now.
    """

    mode: str
    split: str
    n: int
    n_differing: int
    largest: float
    accuracies: tuple[float, float]


def replay(
    store: ResultStore, run_id: str, into: ResultStore, *, data: Path | None = None, device: torch.device
) -> list[Difference]:
    """Train a finished run of `store` again into another store, and return how their predictions differ.

    Continues where an earlier replay into the same store was interrupted. `data`: the folder with the run's data set,
    as for training.

    Raises:
        InputError: there is no such finished run, the images are not there or not those it was made from, or `into`
            is the store itself.
        Diverged: the loss is no longer finite.
        OSError: a storage refuses.
    """
    if into.storage.uri == store.storage.uri:
        raise InputError(f"{store.storage.location} holds the run itself; replay into another folder (--into).")
    run = config_from_json(_row(store, run_id)["config"])
    dataset = load_dataset(run.data.name, root=data, image_size=run.data.image_size)
    check_same_images(run, dataset, store)
    if run_id not in into.finished_runs():
        perform_run(run, dataset, into, device=device)
    then, now = (_examples(one, run_id) for one in (store, into))
    kinds = sorted(set(zip(*(column.to_pylist() for column in then.select(EXAMPLE[:2])), strict=True)))
    return [_compare(mode, split, then, now) for mode, split in kinds]


def _row(store: ResultStore, run_id: str) -> dict[str, str]:
    rows = store.read("runs").filter((pc.field("run_id") == run_id) & (pc.field("status") == "done")).to_pylist()
    if not rows:
        raise InputError(f"{store.storage.location} has no finished run {run_id}; give an id of its table runs.")
    return rows[0]


def _examples(store: ResultStore, run_id: str) -> pa.Table:
    rows = store.read("examples").filter(pc.field("run_id") == run_id)
    return rows.sort_by([(name, "ascending") for name in EXAMPLE])


def _compare(mode: str, split: str, *stores: pa.Table) -> Difference:
    chosen = [rows.filter((pc.field("mode") == mode) & (pc.field("split") == split)) for rows in stores]
    then, now = ({name: rows[name].to_numpy() for name in ("prediction", "margin", "assigned")} for rows in chosen)
    return Difference(
        mode,
        split,
        len(then["prediction"]),
        int((then["prediction"] != now["prediction"]).sum()),
        float(np.abs(then["margin"] - now["margin"]).max()),
        (float((then["prediction"] == then["assigned"]).mean()), float((now["prediction"] == now["assigned"]).mean())),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m memlib.replay", description="Train a finished run anew, from its row alone, and compare."
    )
    parser.add_argument("run_id", help="a finished run, as the sweep names it")
    parser.add_argument("--results", default="results", help="folder or URI of the results (default: results)")
    parser.add_argument("--into", default="replays", help="folder or URI for what is computed anew (default: replays)")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder with the data set, as for the sweep")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args(arguments)
    try:
        store, into = open_results(given.results), create_results(given.into)
        found = replay(store, given.run_id, into, data=given.data, device=torch.device(given.device))
    except (InputError, Diverged) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for name, then, now in zip(FACTS, *([_row(s, given.run_id)[n] for n in FACTS] for s in (store, into)), strict=True):
        sys.stdout.write(f"{name}: {then} then, {now} now\n")
    for one in found:
        sys.stdout.write(
            f"{one.mode}, {one.split}: {one.n_differing} of {one.n} predictions differ, margins by at most "
            f"{one.largest:.3g}; accuracy {one.accuracies[0]:.4f} then, {one.accuracies[1]:.4f} now\n"
        )
    return 0 if all(one.largest == 0 for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
