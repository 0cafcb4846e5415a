"""The rows of table `rewinding` that figures show: which of them, and apart by their BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import polars as pl

from analysis.drawn import Outcome, Part, draw_each
from analysis.load import Results

_MAIN = "final"  # the paper's handling of BatchNorm; figures of any other carry its name
_STATISTICS = {
    "final": "everything else, BatchNorm's running statistics included, stays final",
    "rewound": "BatchNorm's running statistics go back with it, everything else stays final",
    "recalibrated": "BatchNorm's running statistics are estimated anew, everything else stays final",
}


def rewound_alone(results: Results) -> pl.DataFrame:
    """Return the rows in which one layer group alone is rewound."""
    return _on_most_examples(results.table("rewinding").filter(pl.col("n_groups") == 1))


def rewound_together(results: Results) -> pl.DataFrame:
    """Return the rows in which several layer groups are rewound at once."""
    return _on_most_examples(results.table("rewinding").filter(pl.col("n_groups") > 1))


def final_accuracies(results: Results, rows: pl.DataFrame) -> pl.DataFrame:
    """Return the final accuracies of the runs in `rows`, measured as those of their rewound networks are.

    Columns run_id, model, seed, split, accuracy; with example-tied dropout in mode `scaled`, otherwise from `epochs`.
    """
    columns = ["run_id", "model", "seed", "split", "accuracy"]
    chosen = results.epochs.join(rows.select("run_id").unique(), on="run_id", how="semi")
    last = chosen.filter(pl.col("epoch") == pl.col("epoch").max().over("run_id"))
    scaled = _scaled(results, rows)
    plain = last.join(scaled, on="run_id", how="anti")
    return pl.concat([part.select(columns) for part in (plain, scaled)])


def mode_of(results: Results, rows: pl.DataFrame) -> str:
    """Return the sentence that names the mode in which networks with example-tied dropout are measured, "" if none."""
    return "" if _scaled(results, rows).is_empty() else " All with every neuron on, scaled (mode `scaled`)."


def _scaled(results: Results, rows: pl.DataFrame) -> pl.DataFrame:
    measured = results.table("dropout").filter(mode="scaled", batchnorm="final", rescaled=False)
    return measured.join(rows.select("run_id").unique(), on="run_id", how="semi")


def draw_each_batchnorm(
    name: str,
    rows: pl.DataFrame,
    parts: Sequence[Part],
    draw_part: Callable[..., Outcome],
    *,
    missing: str | None,
) -> Iterator[Outcome]:
    """Yield what `draw_part` makes of each part's rows with final BatchNorm statistics, then of those with others.

    `draw_part` is given `batchnorm=` too; the figures of other statistics are named e.g. figure3_recalibrated.
    missing: the reason a cell without rows with final statistics is skipped; with None it is passed over.
    """
    found = rows["batchnorm"].unique().sort().to_list()
    for value in (_MAIN, *(v for v in found if v != _MAIN)):
        yield from draw_each(
            name if value == _MAIN else f"{name}_{value}",
            rows.filter(batchnorm=value),
            parts,
            partial(draw_part, batchnorm=value),
            missing=missing if value == _MAIN else None,
        )


def title_of(title: str, batchnorm: str) -> str:
    """Return a figure's title, with the BatchNorm statistics where they are not the paper's."""
    return title if batchnorm == _MAIN else f"{title}\nBatchNorm statistics {batchnorm}"


def heading_of(heading: str, batchnorm: str) -> str:
    """Return a figure's heading in the index, likewise."""
    return heading if batchnorm == _MAIN else f"{heading} (BatchNorm statistics {batchnorm})"


def statistics_of(batchnorm: str) -> str:
    """Return what happens to everything but the rewound group's parameters, in the words of a caption."""
    return _STATISTICS.get(batchnorm, f"BatchNorm's running statistics are {batchnorm}, everything else stays final")


def _on_most_examples(rows: pl.DataFrame) -> pl.DataFrame:
    """Return one row a measurement: the one on most examples, where it was made with several limits."""
    measurement = ["run_id", "group", "rewind_epoch", "batchnorm", "split"]
    most = rows.filter(pl.col("n") == pl.col("n").max().over(measurement))
    return most.unique(measurement, keep="first", maintain_order=True)
