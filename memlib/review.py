"""Write the page on which a run's suspected label errors are gone through: `python -m memlib.review RUN_ID`.

Exit status: 0 written, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool

from memlib.config import config_from_json
from memlib.datasets import load_dataset
from memlib.errors import InputError, unknown
from memlib.holdings import check_same_images
from memlib.mislabel_evaluation import evaluate_mislabels
from memlib.mislabels import Mislabels
from memlib.results import ResultStore, open_results
from memlib.run_mislabels import find_mislabels_of_run, noise_of_run
from memlib.suspects_page import MOST, review_page

PREFERRED = ("cleanlab", "loss_rise", "aum")  # out-of-sample evidence first: docs/mislabels.md


def write_review_page(
    store: ResultStore,
    run_id: str,
    path: Path,
    *,
    data: Path | None = None,
    method: str | None = None,
    most: int = MOST,
) -> Mislabels:
    """Write the page of a finished run's suspects to `path` and return the verdict it shows.

    data: the folder with the run's data set, as for training. method: one of `find_mislabels_of_run`; None for the
    first of PREFERRED that there is evidence for. most: suspects on the page.

    Raises:
        InputError: there is no such run or method, the images are not there or not those the run was made from, or
            the page cannot be written.
    """
    found = find_mislabels_of_run(store, run_id)
    if method is not None and method not in found:
        raise unknown("method of this run", method, sorted(found))
    verdict = found[method or next((name for name in PREFERRED if name in found), "loss")]
    row = store.read("runs").filter(pc.field("run_id") == run_id).to_pylist()[0]
    run = config_from_json(row["config"])
    dataset = load_dataset(run.data.name, root=data, image_size=run.data.image_size)
    check_same_images(run, dataset, store)
    page = review_page(
        verdict,
        dataset.train.images,
        dataset.train.ids,
        class_names=dataset.class_names,
        title=f"Suspected label errors: {run.data.name}, run {run_id}",
        most=most,
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); name another file with --out.") from error
    return verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m memlib.review", description="Write a page to go through a run's suspected label errors by hand."
    )
    parser.add_argument("run_id", help="a finished run, as the sweep names it")
    parser.add_argument("--results", default="results", help="folder or URI of the results (default: results)")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder with the data set, as for the sweep")
    parser.add_argument("--method", help="default: " + ", else ".join(PREFERRED))
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help=f"suspects on the page (default: {MOST})")
    parser.add_argument("--out", type=Path, default=Path("review.html"), help="file to write (default: review.html)")
    given = parser.parse_args(arguments)
    try:
        store = open_results(given.results)
        shown = write_review_page(store, given.run_id, given.out, data=given.data, method=given.method, most=given.most)
        planted = _tell_noise(shown, noise_of_run(store, given.run_id))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{given.out}: suspects by {shown.method}; open it in a browser\n{planted}")
    return 0


def _tell_noise(verdict: Mislabels, is_noisy: Bool[np.ndarray, " n"]) -> str:
    """Say that the run's own label noise is among the suspects, and how well it is found; nothing without noise."""
    if not is_noisy.any():
        return ""
    auroc = evaluate_mislabels(verdict, is_noisy).auroc
    return (
        f"{is_noisy.sum()} of the run's {len(is_noisy)} labels were made wrong on purpose and may be among them (AUROC "
        f"{auroc:.3f}); to look for wrong labels of your own, train with --noise 0\n"
    )


if __name__ == "__main__":
    sys.exit(main())
