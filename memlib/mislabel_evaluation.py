"""How well does a score find the labels that are known to be wrong? The only place that compares the two; no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

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


@dataclass(frozen=True, eq=False)
class _Ranking:
    """For each distinct score, from the highest: how many examples reach it and have it, and the noisy of both."""

    n: Int64[np.ndarray, " scores"]
    n_noisy: Int64[np.ndarray, " scores"]
    tied: Int64[np.ndarray, " scores"]
    tied_noisy: Int64[np.ndarray, " scores"]


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
    ranking = _rank(found.score, is_noisy)
    hits = int((found.is_label_issue & is_noisy).sum())
    n_flagged = int(found.is_label_issue.sum())
    return MislabelEvaluation(
        auroc=_auroc(ranking),
        average_precision=_average_precision(ranking),
        precision_at_noise_count=_precision_at(ranking, n_noisy),
        issue_precision=hits / n_flagged if n_flagged else None,
        issue_recall=hits / n_noisy,
        n=n,
        n_noisy=n_noisy,
    )


def _rank(score: Float64[np.ndarray, " n"], is_noisy: Bool[np.ndarray, " n"]) -> _Ranking:
    order = np.argsort(score)[::-1]
    descending = score[order]
    last_of_its_score = np.append(descending[1:] != descending[:-1], True)
    n, n_noisy = np.flatnonzero(last_of_its_score) + 1, np.cumsum(is_noisy[order])[last_of_its_score]
    return _Ranking(n, n_noisy, np.diff(n, prepend=0), np.diff(n_noisy, prepend=0))


def _auroc(ranking: _Ranking) -> float:
    """Return the share of pairs in which the noisy example is above; in whole numbers, a pair counts 2 and a tie 1."""
    n_clean, clean = ranking.n - ranking.n_noisy, ranking.tied - ranking.tied_noisy
    below = 2 * (n_clean[-1] - n_clean) + clean
    return float((ranking.tied_noisy * below).sum() / (2 * ranking.n_noisy[-1] * n_clean[-1]))


def _average_precision(ranking: _Ranking) -> float:
    return float((ranking.tied_noisy * (ranking.n_noisy / ranking.n)).sum() / ranking.n_noisy[-1])


def _precision_at(ranking: _Ranking, k: int) -> float:
    last = np.searchsorted(ranking.n, k)
    n_missing = ranking.n[last] - k
    return float((ranking.n_noisy[last] - n_missing * ranking.tied_noisy[last] / ranking.tied[last]) / k)
