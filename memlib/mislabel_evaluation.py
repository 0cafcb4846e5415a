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
    # Half a second that most users of this module need not wait for.
    from sklearn.metrics import average_precision_score, roc_auc_score  # noqa: PLC0415

    n, n_noisy = len(is_noisy), int(is_noisy.sum())
    if n != len(found.score):
        raise InputError(f"is_noisy has {n} entries for {len(found.score)} scores; give one an example.")
    if n_noisy in (0, n):
        raise InputError(
            f"{n_noisy} of {n} examples are noisy, so no score can tell them apart; judge on examples of both kinds "
            "(noise.fraction above 0)."
        )
    hits = int((found.is_label_issue & is_noisy).sum())
    n_flagged = int(found.is_label_issue.sum())
    return MislabelEvaluation(
        auroc=float(roc_auc_score(is_noisy, found.score)),
        average_precision=float(average_precision_score(is_noisy, found.score)),
        precision_at_noise_count=_precision_at(found.score, is_noisy, n_noisy),
        issue_precision=hits / n_flagged if n_flagged else None,
        issue_recall=hits / n_noisy,
        n=n,
        n_noisy=n_noisy,
    )


def _precision_at(score: Float64[np.ndarray, " n"], is_noisy: Bool[np.ndarray, " n"], k: int) -> float:
    last = np.sort(score)[-k]
    above, tied = score > last, score == last
    expected = is_noisy[above].sum() + is_noisy[tied].mean() * (k - above.sum())
    return float(expected / k)
