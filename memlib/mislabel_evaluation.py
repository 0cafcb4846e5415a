"""How well does a score find the labels that are known to be wrong? The only place that compares the two; no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from memlib.errors import InputError
from memlib.mislabels import Mislabels


@dataclass(frozen=True)
class MislabelEvaluation:
    """How well a score finds the known wrong labels; all in [0, 1], better the higher.

    auroc: probability that a noisy example scores above a clean one, ties counted half (0.5: chance).
    average_precision: mean precision over the noisy examples found (chance: their share).
    precision_at_noise_count: share of noisy ones among as many top scores as there are noisy examples; where equal
    scores straddle that place, the mean over their orders.
    issue_precision, issue_recall: of `is_label_issue`; the precision is None if nothing is flagged.
    """

    auroc: float
    average_precision: float
    precision_at_noise_count: float
    issue_precision: float | None
    issue_recall: float
    n: int
    n_noisy: int


def evaluate_mislabels(found: Mislabels, is_noisy: Bool[np.ndarray, " _"]) -> MislabelEvaluation:
    """Return how well the verdict finds the noisy examples, given in the order of `found.example_ids`.

    Raises:
        InputError: the lengths differ, or none or all of the examples are noisy, so that nothing can be ranked.
    """
    n, n_noisy = len(is_noisy), int(is_noisy.sum())
    if n != len(found.score):
        raise InputError(f"is_noisy has {n} entries for {len(found.score)} scores; give one an example.")
    if n_noisy in (0, n):
        raise InputError(
            f"{n_noisy} of {n} examples are noisy, so no score can tell them apart; judge on examples of both kinds "
            "(noise.fraction above 0)."
        )
    noisy, all_ = _counts_by_score(found.score, is_noisy)
    noisy_up_to, up_to = noisy.cumsum(), all_.cumsum()
    below = (all_ - noisy) * (noisy_up_to - noisy / 2)  # noisy ones above each clean one, or level with it
    hits = int((found.is_label_issue & is_noisy).sum())
    n_flagged = int(found.is_label_issue.sum())
    return MislabelEvaluation(
        auroc=float(below.sum() / n_noisy / (n - n_noisy)),
        average_precision=float((noisy * noisy_up_to / up_to).sum() / n_noisy),
        precision_at_noise_count=float(np.interp(n_noisy, np.append(0, up_to), np.append(0, noisy_up_to)) / n_noisy),
        issue_precision=hits / n_flagged if n_flagged else None,
        issue_recall=hits / n_noisy,
        n=n,
        n_noisy=n_noisy,
    )


def _counts_by_score(
    score: Float64[np.ndarray, " n"], is_noisy: Bool[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Return how many noisy ones, and how many at all, have each of the m different scores, the highest first."""
    _, place, counts = np.unique(-score, return_inverse=True, return_counts=True)
    return np.bincount(place, weights=is_noisy, minlength=len(counts)), counts.astype(np.float64)
