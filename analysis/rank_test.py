"""The rank test of Mann and Whitney: does one kind of examples tend to larger values than the other?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
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
    expected, variance: of u, where neither group tends to larger values.
    """

    u: float
    auc: float
    p: float
    expected: float
    variance: float


def rank_test(first: pl.Series, second: pl.Series) -> RankTest | None:
    """Return the test of two groups of values, of which some may be infinite; None if one is empty."""
    n_first, n_second = len(first), len(second)
    if not n_first or not n_second:
        return None
    ranks = pl.concat([first.cast(pl.Float64), second.cast(pl.Float64)]).rank("average")
    u = float(ranks.head(n_first).sum()) - n_first * (n_first + 1) / 2
    n, n_pairs = n_first + n_second, n_first * n_second
    ties = sum(size**3 - size for size in ranks.value_counts()["count"].to_list())
    variance = max(n_pairs / 12 * (n + 1 - ties / (n * (n - 1))), 0.0)
    return RankTest(u, u / n_pairs, _two_sided(u - n_pairs / 2, variance), n_pairs / 2, variance)


def over_runs(tests: Sequence[RankTest], draws: Sequence[Hashable]) -> RankTest:
    """Return the test of several runs together, in each of which values are compared among themselves alone.

    Stratified (van Elteren's test with equal weights): u, its expectation and its variance add up; `auc` is the mean.

    draws: by what each run's examples were drawn. Runs of one draw judge the same examples and may err together: of
    them standard deviations add up, so that p is at most too large.
    """
    u, expected = (sum(getattr(test, name) for test in tests) for name in ("u", "expected"))
    deviations: dict[Hashable, float] = defaultdict(float)
    for draw, test in zip(draws, tests, strict=True):
        deviations[draw] += math.sqrt(test.variance)
    variance = sum(deviation**2 for deviation in deviations.values())
    auc = sum(test.auc for test in tests) / len(tests)
    return RankTest(u, auc, _two_sided(u - expected, variance), expected, variance)


def _two_sided(deviation: float, variance: float) -> float:
    distance = max(abs(deviation) - 0.5, 0.0)
    return math.erfc(distance / math.sqrt(variance) / math.sqrt(2)) if distance else 1.0


def spell_test(rows: pl.DataFrame, kinds: tuple[str, str], value: str) -> str:
    """Return, for a caption, the test of column `value` between two kinds of examples, its range over runs beside it.

    `rows` has columns kind, run_id and data_seed. Empty where one kind has no examples.
    """
    runs = [
        (found, part["data_seed"][0]) for part in rows.partition_by("run_id") if (found := _test(part, kinds, value))
    ]
    if not runs:
        return ""
    by_run, draws = zip(*runs, strict=True)
    test, areas = over_runs(by_run, draws), [found.auc for found in by_run]
    spread = f" ({min(areas):.3f} to {max(areas):.3f} over {count(len(areas), 'seed')})" if len(areas) > 1 else ""
    p = f"p = {test.p:.2g}" if test.p >= _SMALLEST else f"p < {_SMALLEST:.0e}"
    return f"{kinds[0]} above {kinds[1]}: AUC {test.auc:.3f}{spread}, U = {test.u:.1f}, {p}"


def _test(rows: pl.DataFrame, kinds: tuple[str, str], value: str) -> RankTest | None:
    first, second = (rows.filter(kind=kind)[value] for kind in kinds)
    return rank_test(first, second)
