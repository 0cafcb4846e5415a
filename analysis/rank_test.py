"""The rank test of Mann and Whitney: does one kind of examples tend to larger values than the other?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from analysis.captions import count

_SMALLEST = 1e-300  # below it a p value is only said to be smaller


@dataclass(frozen=True)
class RankTest:
    """A Mann-Whitney U test of two groups of values.

    u: number of pairs in which the first group's value is the larger one; ties count half.
    auc: its share of all pairs, the effect size: 0.5 if neither group tends to larger values.
    p: two-sided, by the normal approximation with corrections for ties and continuity.
    """

    u: float
    auc: float
    p: float


def rank_test(first: pl.Series, second: pl.Series) -> RankTest | None:
    """Return the test of two groups of values, of which some may be infinite; None if one is empty."""
    n_first, n_second = len(first), len(second)
    if not n_first or not n_second:
        return None
    ranks = pl.concat([first.cast(pl.Float64), second.cast(pl.Float64)]).rank("average")
    u = float(ranks.head(n_first).sum()) - n_first * (n_first + 1) / 2
    n, n_pairs = n_first + n_second, n_first * n_second
    ties = sum(size**3 - size for size in ranks.value_counts()["count"].to_list())
    deviation = math.sqrt(max(n_pairs / 12 * (n + 1 - ties / (n * (n - 1))), 0.0))
    distance = max(abs(u - n_pairs / 2) - 0.5, 0.0)
    return RankTest(u, u / n_pairs, math.erfc(distance / deviation / math.sqrt(2)) if distance else 1.0)


def spell_test(rows: pl.DataFrame, kinds: tuple[str, str], value: str) -> str:
    """Return, for a caption, the test of column `value` between two kinds of examples, its range over runs beside it.

    `rows` has columns kind and run_id. Empty where one kind has no examples.
    """
    test = _test(rows, kinds, value)
    if test is None:
        return ""
    by_run = [found.auc for part in rows.partition_by("run_id") if (found := _test(part, kinds, value))]
    spread = f" ({min(by_run):.3f} to {max(by_run):.3f} over {count(len(by_run), 'seed')})" if len(by_run) > 1 else ""
    p = f"p = {test.p:.2g}" if test.p >= _SMALLEST else f"p < {_SMALLEST:.0e}"
    return f"{kinds[0]} above {kinds[1]}: AUC {test.auc:.3f}{spread}, U = {test.u:.1f}, {p}"


def _test(rows: pl.DataFrame, kinds: tuple[str, str], value: str) -> RankTest | None:
    first, second = (rows.filter(kind=kind)[value] for kind in kinds)
    return rank_test(first, second)
