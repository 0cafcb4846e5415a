"""Confident learning: are labels wrong, by networks that were not trained on them? By the package cleanlab; no torch.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from memlib.errors import InputError
from memlib.mislabels import Mislabels, check_outputs, subjects_of, verdict


def find_mislabels_out_of_sample(
    *,
    probabilities: Float[np.ndarray, "_ _"],
    labels: Int[np.ndarray, " _"],
    example_ids: Int[np.ndarray, " _"] | None = None,
) -> dict[str, Mislabels]:
    """Return the verdict `cleanlab` from predicted probabilities by networks that did not train on the example.

    The score is 1 - cleanlab's label quality (self-confidence), that is 1 - the probability of the assigned label;
    `is_label_issue` is confident learning's own choice (`cleanlab.filter.find_label_issues`).

    Raises:
        InputError: cleanlab is not installed; or as `find_mislabels_by_dropping`; or rows do not sum to 1.
    """
    subjects = subjects_of(np.arange(len(labels)) if example_ids is None else example_ids, labels)
    check_outputs(probabilities, subjects, "probabilities")
    probabilities = probabilities.astype(np.float64)
    if (probabilities < 0).any() or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise InputError("probabilities hold rows that are not shares of 1; give softmax outputs, not logits.")
    quality, is_issue = _ask_cleanlab(subjects.assigned, probabilities)
    best = probabilities.argmax(axis=1)
    return {"cleanlab": verdict("cleanlab", "out_of_sample", subjects, 1 - quality, best, is_issue)}


def _ask_cleanlab(
    labels: Int64[np.ndarray, " n"], probabilities: Float64[np.ndarray, "n k"]
) -> tuple[Float64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Return cleanlab's label quality in [0, 1] (low is suspicious), and which labels confident learning rejects."""
    rank, issues = _import_cleanlab()
    quality = rank(labels, probabilities, method="self_confidence")
    return quality, issues(labels, probabilities, n_jobs=1)


def _import_cleanlab() -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    try:
        from cleanlab.filter import find_label_issues  # noqa: PLC0415 - an optional dependency
        from cleanlab.rank import get_label_quality_scores  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            f"confident learning needs the package cleanlab ({error}); make environment installs it, and so does "
            "pip install -e '.[cleanlab]' in a checkout of memlib."
        ) from error
    return get_label_quality_scores, find_label_issues
