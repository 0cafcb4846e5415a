from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import polars as pl
import pytest
from analysis_rows import (
    GROUPS,
    RESNET9,
    add_dropout,
    add_epochs,
    add_everything,
    add_finished,
    add_retraining,
    add_rewinding,
    add_run,
    add_unit,
    make_config,
    make_dropout_config,
    retraining_rows,
    rewinding_rows,
)
from hypothesis import given
from hypothesis import strategies as st

from analysis import criticality, retraining, rewinding, rewinding_sets
from analysis.cells import find_cells, find_comparisons
from analysis.drawn import Drawn, Options, Outcome, Skipped
from analysis.figures import draw_figures
from analysis.load import load_tables
from analysis.style import STROKES
from memlib.config import RunConfig
from memlib.results import ResultStore, create_results
from memlib.schemas import table_from_rows

OPTIONS = Options()


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return create_results(tmp_path / "results")


def outcomes(function, store: ResultStore) -> list[Outcome]:
    return list(function(load_tables(store), OPTIONS))


def draw_all(function, store: ResultStore) -> list[Drawn]:
    found = outcomes(function, store)
    assert all(isinstance(outcome, Drawn) for outcome in found), found
    return found


def write(store: ResultStore, table: str, rows: list[dict], unit: str = "unit") -> None:
    store.write(table, unit, table_from_rows(table, rows))


def rewound(config: RunConfig, **changes: object) -> dict:
    row = rewinding_rows(config, ("a",), epochs=(0,), batchnorm="final", n=100)[0]
    return {**row, **changes}


def retrained(config: RunConfig, epoch: int, accuracy: float, **changes: object) -> dict:
    row = retraining_rows(config, ("a",), trained_on="clean", reset_epoch=0, epochs=2)[0]
    return {**row, "epoch": epoch, "accuracy": accuracy, **changes}


def spelled(numbers: list[float]) -> str:
    return f"{statistics.fmean(numbers):.3f} ± {statistics.stdev(numbers):.3f}"


def drawn_curves(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}


# Comparisons: the cells of one dataset and setting


def test_models_of_one_dataset_share_a_figure_and_datasets_do_not(store):
    for dataset, model in (("digits", "resnet9"), ("digits", "vit"), ("mnist", "vit")):
        add_everything(store, make_config(seed=0, dataset=dataset, model=model), groups=GROUPS[model])
    digits, mnist = draw_all(rewinding.draw, store)
    assert (digits.name, mnist.name) == ("figure3-digits", "figure3-mnist")
    assert (digits.title, mnist.title) == ("Figure 3, layer rewinding: digits", "Figure 3, layer rewinding: mnist, vit")
    assert [axes.get_title() for axes in digits.figure.axes[:2]] == ["resnet9", "vit"]
    assert mnist.figure.axes[0].get_title() == ""
    assert [drawn.figure.get_size_inches()[0] for drawn in (digits, mnist)] == pytest.approx([6.9, 3.3])


def test_models_on_other_images_or_noise_are_never_shown_as_if_they_agreed(store):
    for noise, limit, model in ((0.1, None, "resnet9"), (0.2, None, "resnet50"), (0.1, 500, "vit")):
        add_everything(store, make_config(seed=0, model=model, noise=noise, limit=limit), groups=GROUPS[model])
    found = {c.models: c.setting for c in load_tables(store).comparisons}
    assert found == {
        ("resnet9",): "data.limit=none, noise.fraction=0.1",
        ("resnet50",): "data.limit=none, noise.fraction=0.2",
        ("vit",): "data.limit=500, noise.fraction=0.1",
    }


def test_settings_are_told_apart_by_the_label_each_model_has_for_them(store):
    for noise, model in ((0.05, "resnet9"), (0.1, "resnet9"), (0.05, "vit"), (0.1, "vit"), (0.1, "resnet50")):
        add_everything(store, make_config(seed=0, model=model, noise=noise), groups=GROUPS[model])
    found = [(c.stem, c.models) for c in load_tables(store).comparisons]
    assert found == [
        ("digits-noise.fraction=0.05", ("resnet9", "vit")),
        ("digits-noise.fraction=0.1", ("resnet50", "resnet9", "vit")),
    ]
    names = [drawn.name for drawn in draw_all(criticality.draw, store)]
    assert names == [f"criticality-{stem}" for stem, _ in found]


names = st.text(st.sampled_from("abAB/:._- é"), min_size=1, max_size=130)


@given(st.lists(st.tuples(names, names, names | st.just("")), min_size=1, max_size=6, unique=True))
def test_every_cell_is_in_one_comparison_which_has_its_own_safe_file_name(keys):
    runs = pl.DataFrame(keys, schema={k: pl.String for k in ("dataset", "model", "setting")}, orient="row")
    cells = find_cells(runs)
    comparisons = find_comparisons(cells)
    assert sorted((c for part in comparisons for c in part.cells), key=cells.index) == list(cells)
    assert len({part.stem.casefold() for part in comparisons}) == len(comparisons)
    for part in comparisons:
        assert {(c.dataset, c.setting) for c in part.cells} == {(part.dataset, part.setting)}
        assert part.rows(runs).height == len(part.cells) == len(set(part.models))
        assert set(part.stem) <= set("abcdefABCDEF0123456789._-")


def test_a_model_without_rows_is_skipped_by_name_and_the_others_are_drawn(store):
    add_everything(store, make_config(seed=0))
    add_finished(store, make_config(seed=0, model="vit"))
    for function, name in ((rewinding.draw, "figure3"), (criticality.draw, "criticality")):
        drawn, skipped = outcomes(function, store)
        assert isinstance(drawn, Drawn)
        assert drawn.figure.axes[0].get_title().startswith("resnet9")
        assert isinstance(skipped, Skipped)
        assert skipped.name == f"{name}-digits-vit"
        assert skipped.reason.startswith("no rows of single groups")
        assert "in table rewinding; run python sweeps/full_paper.py --results" in skipped.reason


# Figure 3


def test_figure_3_draws_mean_and_spread_per_split_group_and_rewind_epoch(store):
    rows = []
    for seed in (0, 1, 2):
        add_finished(store, make_config(seed=seed))
        rows += add_rewinding(store, make_config(seed=seed), epochs=(0, 2, 10))
    (drawn,) = draw_all(rewinding.draw, store)
    for axes, split in zip(drawn.figure.axes, ("clean", "noisy", "test"), strict=True):
        curves = drawn_curves(axes)
        assert list(curves) == ["0", "2", "10"]
        assert axes.get_ylabel() == f"accuracy, {split}"
        for band, (epoch, curve) in zip(axes.collections, curves.items(), strict=True):
            corners = band.get_paths()[0].vertices
            for place, group in enumerate(RESNET9):
                chosen = [
                    r["accuracy"]
                    for r in rows
                    if (r["split"], r["group"], r["rewind_epoch"]) == (split, group, int(epoch))
                ]
                assert len(chosen) == 3
                assert curve[place] == pytest.approx(statistics.fmean(chosen))
                edges = corners[corners[:, 0] == place, 1]
                assert edges.max() - edges.min() == pytest.approx(2 * statistics.stdev(chosen))
    labels = [label.get_text() for label in drawn.figure.axes[-1].get_xticklabels()]
    assert labels == list(RESNET9)
    legend = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert legend == ["0", "2", "10", "final model"]


def test_figure_3_names_the_most_critical_groups_with_spread_and_draws_the_final_model(store):
    rows, finals = [], []
    for seed in (0, 1):
        finals += [r for r in add_finished(store, make_config(seed=seed))[0] if r["epoch"] == 30]
        rows += add_rewinding(store, make_config(seed=seed), epochs=(2, 4))
    (drawn,) = draw_all(rewinding.draw, store)

    def accuracies(split: str, group: str) -> list[float]:
        return [r["accuracy"] for r in rows if (r["split"], r["group"], r["rewind_epoch"]) == (split, group, 2)]

    clean, noisy = (
        min(RESNET9, key=lambda group, split=split: statistics.fmean(accuracies(split, group)))
        for split in ("clean", "noisy")
    )
    assert (
        f"Rewound to epoch 2, resnet9 loses most clean accuracy in {clean} ({spelled(accuracies('clean', clean))} is "
        f"left) and noisy accuracy in {noisy} ({spelled(accuracies('noisy', noisy))} is left)."
    ) in drawn.caption
    assert "Mean and standard deviation over 2 seeds." in drawn.caption
    assert "Judged on 1000 clean, 1000 noisy and 1000 test examples." in drawn.caption
    for axes, split in zip(drawn.figure.axes, ("clean", "noisy", "test"), strict=True):
        expected = statistics.fmean(r["accuracy"] for r in finals if r["split"] == split)
        assert axes.lines[0].get_ydata() == pytest.approx([expected, expected])
    assert (drawn.source.table, drawn.source.n_rows, drawn.source.n_runs) == ("rewinding", len(rows), 2)


def test_of_several_limits_the_measurement_on_most_examples_is_drawn(store):
    config = make_config(seed=0)
    add_finished(store, config)
    for n, accuracy in ((100, 0.1), (5000, 0.7), (1000, 0.3)):
        write(store, "rewinding", [rewound(config, n=n, accuracy=accuracy)], f"unit-{n}")
    write(store, "rewinding", [rewound(config, n=5000, accuracy=0.7)], "the-same-again")
    (drawn,) = draw_all(rewinding.draw, store)
    assert drawn_curves(drawn.figure.axes[0]) == {"0": [0.7]}
    assert "Judged on 5000 clean examples." in drawn.caption
    assert drawn.source.n_rows == 1


def test_seeds_that_differ_between_models_are_counted_model_by_model(store):
    for model, seeds in (("resnet9", (0, 1, 2)), ("vit", (0,))):
        for seed in seeds:
            add_everything(store, make_config(seed=seed, model=model), groups=GROUPS[model])
    (drawn,) = draw_all(rewinding.draw, store)
    assert "standard deviation over seeds (3 of resnet9, 1 of vit; no spread is shown for one)." in drawn.caption


def test_one_seed_without_noise_and_without_table_epochs_is_drawn(store):
    config = make_config(seed=3, noise=0.0)
    add_run(store, config)
    add_rewinding(store, config)
    (drawn,) = draw_all(rewinding.draw, store)
    assert [axes.get_ylabel() for axes in drawn.figure.axes] == ["accuracy, clean", "accuracy, test"]
    assert "One seed, so no spread is shown." in drawn.caption
    assert "±" not in drawn.caption
    (skipped,) = outcomes(criticality.draw, store)
    assert skipped == Skipped(
        "criticality-digits", "table epochs has no accuracy of the final models of these runs to compare with"
    )


def test_other_batchnorm_statistics_have_figures_of_their_own_under_the_same_name(store, tmp_path):
    config = make_config(seed=0)
    add_everything(store, config)
    add_rewinding(store, config, (*RESNET9, "conv1+conv2"), batchnorm="recalibrated")
    main, other = draw_all(rewinding.draw, store)
    assert (main.name, other.name) == ("figure3-digits", "figure3_recalibrated-digits")
    assert "BatchNorm" not in main.title
    assert other.title == "Figure 3, layer rewinding (BatchNorm statistics recalibrated): digits, resnet9"
    assert "running statistics are estimated anew" in other.caption
    (sets,) = draw_all(rewinding_sets.draw, store)
    assert sets.name == "rewinding_sets_recalibrated-digits-resnet9"
    index = tmp_path / "figures" / "index.md"
    draw_figures(load_tables(store), tmp_path / "figures", only=["figure3", "figure4", "rewinding_sets"])
    before = index.read_text()
    paths, _ = draw_figures(load_tables(store), tmp_path / "figures", only=["figure3"])
    assert [p.stem for p in paths[:-1:2]] == ["figure3-digits", "figure3_recalibrated-digits"]
    assert index.read_text() == before


def test_rows_of_other_batchnorm_statistics_alone_leave_the_main_figure_to_be_run(store):
    add_finished(store, make_config(seed=0))
    add_rewinding(store, make_config(seed=0), batchnorm="rewound")
    skipped, drawn = outcomes(rewinding.draw, store)
    assert isinstance(skipped, Skipped)
    assert skipped.reason.startswith("no rows of single groups with batchnorm final in table rewinding; run ")
    assert isinstance(drawn, Drawn)
    assert drawn.name == "figure3_rewound-digits"


@pytest.mark.parametrize("n_epochs", [1, 51])
def test_sixty_groups_and_many_epochs_do_not_crowd_figure_3(store, n_epochs):
    groups = tuple(f"stages.{i // 30}.blocks.{i}.long_name" for i in range(60))
    for model in ("one", "timm:a_very_long_model_name.with_a_tag_in1k"):
        add_finished(store, make_config(seed=0, model=model), groups=("stem",))
        add_rewinding(store, make_config(seed=0, model=model), groups, epochs=tuple(range(n_epochs)))
    (drawn,) = draw_all(rewinding.draw, store)
    drawn.figure.draw_without_rendering()
    assert len(drawn.figure.legends[0].get_texts()) <= 14
    for axes in drawn.figure.axes[-2:]:
        shown = [label.get_text() for label in axes.get_xticklabels()]
        assert 10 < len(set(shown)) == len(shown) <= 25
        assert axes.get_position().height > 0.1


# Criticality


def test_criticality_draws_the_drop_from_the_final_accuracy_of_the_same_run(store):
    drops: dict[tuple[str, str], list[float]] = {}
    for seed in (0, 1):
        config = make_config(seed=seed)
        finals = {r["split"]: r["accuracy"] for r in add_finished(store, config)[0] if r["epoch"] == 30}
        for r in add_rewinding(store, config):
            if r["rewind_epoch"] == 0:
                drops.setdefault((r["split"], r["group"]), []).append(finals[r["split"]] - r["accuracy"])
    (drawn,) = draw_all(criticality.draw, store)
    (axes,) = drawn.figure.axes
    containers = {c.get_label(): c for c in axes.containers if c.get_label() in ("clean", "noisy")}
    for split, bars in containers.items():
        assert bars[0].get_facecolor() == pytest.approx(tuple(_rgba(STROKES[split].colour)))
        for bar, group in zip(bars, RESNET9, strict=True):
            assert bar.get_height() == pytest.approx(statistics.fmean(drops[split, group]))
    for split in ("clean", "noisy"):
        group = max(RESNET9, key=lambda g, split=split: statistics.fmean(drops[split, g]))
        assert f"for {split} examples in {group} ({spelled(drops[split, group])})" in drawn.caption
    assert drawn.source.n_rows == 2 * 9 * 2


def _rgba(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1.0]


def test_rewound_networks_with_example_tied_dropout_are_compared_with_their_final_accuracy_in_the_same_mode(store):
    """Table `epochs` has that under each example's own masks, where the noise is memorized."""
    config = make_dropout_config("example_tied", seed=0)
    in_modes = {
        (row["mode"], row["split"], row["batchnorm"], row["rescaled"]): row for row in add_dropout(store, config)
    }
    rows = rewinding_rows(config, ("a", "b", "c"), epochs=(0,), batchnorm="final", n=100)
    write(store, "rewinding", rows)
    (drawn,) = draw_all(criticality.draw, store)
    assert "All with every neuron on, scaled (mode `scaled`)." in drawn.caption
    final = in_modes["scaled", "noisy", "final", False]["accuracy"]
    expected = [final - row["accuracy"] for row in rows if row["split"] == "noisy"]
    (axes,) = drawn.figure.axes
    (bars,) = [container for container in axes.containers if container.get_label() == "noisy"]
    assert [bar.get_height() for bar in bars] == pytest.approx(expected)
    (figure3,) = draw_all(rewinding.draw, store)
    assert "(mode `scaled`)" in figure3.caption


def test_criticality_prints_rank_correlations_in_the_panel_and_in_the_caption(store):
    # Drops of clean 1 2 3 4 tenths and noisy 2 1 3 4: rho = 1 - 6 * 2 / (4 * 15) = 0.8; with depth the same.
    config = make_config(seed=0, epochs=1)
    add_run(store, config)
    final = [{**r, "accuracy": 1.0} for r in add_epochs(store, config)]
    write(store, "epochs", final, config.run_id)
    drops = {"clean": (1, 2, 3, 4), "noisy": (2, 1, 3, 4)}
    rows = [
        rewound(config, group=f"g{i}", group_index=i, split=split, accuracy=1 - drop / 10)
        for split, found in drops.items()
        for i, drop in enumerate(found)
    ]
    write(store, "rewinding", rows)
    (drawn,) = draw_all(criticality.draw, store)
    assert "resnet9, 4 groups: the drop is largest for clean examples in g3 (0.400) and" in drawn.caption
    assert "ρ of noisy and clean drop +0.80, of noisy drop and depth +0.80." in drawn.caption
    assert "noisy and clean drop: ρ = +0.80\nnoisy drop and depth: ρ = +0.80" in drawn.figure.axes[0].get_title()


def test_a_rank_correlation_that_says_nothing_is_called_undefined(store):
    assert criticality.rank_correlation(pl.Series([1.0, 2.0]), pl.Series([1.0, 2.0])) is None
    assert criticality.rank_correlation(pl.Series([1.0, 1.0, 1.0]), pl.Series([1.0, 2.0, 3.0])) is None
    add_everything(store, make_config(seed=0), groups=("stem", "head"))
    (drawn,) = draw_all(criticality.draw, store)
    assert "ρ of noisy and clean drop undefined, of noisy drop and depth undefined." in drawn.caption


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_rank_correlation_is_that_of_mean_ranks(pairs):
    a, b = ([float(x) for x in side] for side in zip(*pairs, strict=True))

    def ranks(values: list[float]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    found = criticality.rank_correlation(pl.Series(a), pl.Series(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(statistics.correlation(ranks(a), ranks(b)), abs=1e-9)


def test_criticality_without_epoch_0_says_what_is_missing(store):
    add_finished(store, make_config(seed=0))
    add_rewinding(store, make_config(seed=0), epochs=(2, 4))
    (skipped,) = outcomes(criticality.draw, store)
    assert isinstance(skipped, Skipped)
    assert skipped.reason.startswith("no rows of single groups at epoch 0 with batchnorm final in table rewinding; run")


# Several groups at once


def test_sets_are_drawn_at_the_earliest_epoch_and_named_by_their_ends_where_they_follow_each_other(store):
    sets = ("conv1+conv2", "conv1+conv2+res1.conv1", "conv1+conv2+classifier", "conv3+res2.conv1+res2.conv2")
    rows = []
    for seed in (0, 1):
        add_finished(store, make_config(seed=seed))
        rows += add_rewinding(store, make_config(seed=seed), (*RESNET9, *sets), epochs=(2, 4))
    (drawn,) = draw_all(rewinding_sets.draw, store)
    assert drawn.name == "rewinding_sets-digits-resnet9"
    (axes,) = drawn.figure.axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["conv1+conv2", "conv1+conv2+classifier", "conv1 to res1.conv1", "conv3 to res2.conv2"]
    clean = [r["accuracy"] for r in rows if (r["group"], r["split"], r["rewind_epoch"]) == (sets[0], "clean", 2)]
    assert axes.containers[0][0].get_xdata()[0] == pytest.approx(statistics.fmean(clean))
    assert axes.containers[0].get_label() == "clean"
    assert drawn.source.n_rows == 2 * 4 * 3
    assert [drawn.source.n_rows for drawn in draw_all(rewinding.draw, store)] == [2 * 9 * 2 * 3]


def test_without_sets_nothing_is_drawn_and_nothing_is_said(store):
    assert outcomes(rewinding_sets.draw, store) == []
    add_everything(store, make_config(seed=0))
    assert outcomes(rewinding_sets.draw, store) == []
    assert outcomes(retraining.draw_control, store) == []


# Figure 4


def test_figure_4_draws_a_panel_a_group_with_mean_and_spread_over_seeds(store):
    groups, rows = ("a", "b"), []  # of these only the first stops early
    for seed in (0, 1, 2):
        add_finished(store, make_config(seed=seed))
        rows += add_retraining(store, make_config(seed=seed), groups)
    (drawn,) = draw_all(retraining.draw, store)
    assert drawn.name == "figure4-digits-resnet9"
    assert [axes.get_title() for axes in drawn.figure.axes] == list(groups)
    axes = drawn.figure.axes[1]
    for split, curve in drawn_curves(axes).items():
        for epoch, mean in enumerate(curve):
            chosen = [r["accuracy"] for r in rows if (r["group"], r["split"], r["epoch"]) == ("b", split, epoch)]
            assert len(chosen) == 3
            assert mean == pytest.approx(statistics.fmean(chosen))
    assert len(curve) == 21
    assert [line.get_color() for line in axes.lines] == [STROKES[s].colour for s in ("clean", "noisy", "test")]


def test_a_retraining_that_stopped_early_keeps_its_last_accuracy_and_the_caption_says_so(store):
    curves = {0: (0.2, 0.6), 1: (0.4, 0.5, 0.6, 0.9)}
    for seed, curve in curves.items():
        config = make_config(seed=seed)
        add_finished(store, config)
        rows = [
            retrained(config, epoch, accuracy, split=split)
            for split in ("clean", "noisy")
            for epoch, accuracy in enumerate(curve)
        ]
        rows += [retrained(config, 0, 0.3, group="b", group_index=1)]
        write(store, "retraining", rows, f"unit-{seed}")
    (drawn,) = draw_all(retraining.draw, store)
    assert drawn_curves(drawn.figure.axes[0])["clean"] == pytest.approx([0.3, 0.55, 0.6, 0.75])
    assert drawn_curves(drawn.figure.axes[1])["clean"] == pytest.approx([0.3])
    assert "1 of 4 retrainings stopped earlier than the longest of their group; their last value" in drawn.caption
    assert f"it is highest in a ({spelled([0.6, 0.9])})" in drawn.caption
    assert drawn.source.n_rows == 2 * 6 + 2


def test_the_caption_counts_the_groups_in_which_noisy_accuracy_comes_back(store):
    config = make_config(seed=0)
    add_finished(store, config)
    ends = {"a": (1.0, 0.5), "b": (1.0, 0.49), "c": (0.4, 0.39)}
    rows = [
        retrained(config, epoch, share, group=group, group_index=i, split=split)
        for i, (group, shares) in enumerate(ends.items())
        for split, share in zip(("clean", "noisy"), shares, strict=True)
        for epoch in (0, 1)
    ]
    write(store, "retraining", rows)
    (drawn,) = draw_all(retraining.draw, store)
    assert "at least half of clean accuracy in 2 of 3 groups; it is highest in a (0.500) and lowest in c (0.390)." in (
        drawn.caption
    )
    assert "stopped earlier" not in drawn.caption


def test_the_control_on_noisy_examples_is_a_figure_of_its_own(store):
    for seed in (0, 1):
        add_everything(store, make_config(seed=seed))
    add_retraining(store, make_config(seed=1), trained_on="noisy")
    (main,) = draw_all(retraining.draw, store)
    (control,) = draw_all(retraining.draw_control, store)
    assert control.name == "figure4_control-digits-resnet9"
    assert control.title == "Control of Figure 4, retraining on noisy examples: digits, resnet9"
    assert "is trained anew on noisy examples only" in control.caption
    assert (main.source.seeds, control.source.seeds) == ((0, 1), (1,))


def test_only_the_control_leaves_figure_4_to_be_run(store):
    add_finished(store, make_config(seed=0))
    add_retraining(store, make_config(seed=0), trained_on="noisy")
    (skipped,) = outcomes(retraining.draw, store)
    assert isinstance(skipped, Skipped)
    assert skipped.reason.startswith("no rows with trained_on clean in table retraining; run python sweeps/")


@pytest.mark.parametrize("with_initialization", [True, False])
def test_groups_reset_to_another_epoch_are_drawn_only_if_none_was_reset_to_initialization(store, with_initialization):
    config = make_config(seed=0)
    add_finished(store, config)
    add_retraining(store, config, reset_epoch=5)
    if with_initialization:
        add_retraining(store, config)
    (drawn,) = draw_all(retraining.draw, store)
    assert ("put back to initialization" in drawn.caption) == with_initialization
    assert ("put back to its parameters after epoch 5" in drawn.caption) != with_initialization


def test_of_two_retrainings_the_one_judged_on_most_examples_is_drawn_with_all_its_epochs(store):
    config = make_config(seed=0)
    add_finished(store, config)
    few = [retrained(config, epoch, 0.1, split=s, n=50) for s in ("clean", "noisy") for epoch in range(4)]
    many = [retrained(config, epoch, 0.8, split=s, n=n) for s, n in (("clean", 90), ("noisy", 50)) for epoch in (0, 1)]
    write(store, "retraining", few, "few")
    write(store, "retraining", many, "many")
    (drawn,) = draw_all(retraining.draw, store)
    assert drawn_curves(drawn.figure.axes[0]) == {"clean": [0.8, 0.8], "noisy": [0.8, 0.8]}


def test_retrainings_with_different_settings_are_never_averaged(store):
    config = make_config(seed=0)
    add_finished(store, config)
    for epochs in (10, 20):
        add_retraining(store, config, epochs=epochs)
    (skipped,) = outcomes(retraining.draw, store)
    assert isinstance(skipped, Skipped)
    assert "some groups were retrained several times, with different settings" in skipped.reason


def retrain_with(store: ResultStore, *settings: dict[str, object], seed: int, n: int = 100, **about: object) -> None:
    """Write a retraining of groups "a" and "b", a unit each, with the settings of its unit that are no defaults."""
    config = make_config(seed=seed)
    add_finished(store, config)
    for index, (group, chosen) in enumerate(zip("ab", settings, strict=True)):
        rows = [retrained(config, epoch, 0.5, group=group, group_index=index, n=n) for epoch in (0, 1)]
        unit = f"{seed}-{group}-{n}"
        write(store, "retraining", rows, unit)
        add_unit(store, unit, config.run_id, "retraining", group=group, trained_on="clean", **about, **chosen)


def test_seeds_that_were_retrained_with_different_settings_are_never_averaged(store):
    retrain_with(store, {"epochs": 10, "peak_lr": 0.1}, {"epochs": 10, "peak_lr": 0.1}, seed=0)
    retrain_with(store, {}, {}, seed=1)
    (skipped,) = outcomes(retraining.draw, store)
    assert skipped == Skipped(
        "figure4-digits-resnet9",
        "its groups were retrained with different settings (epochs=10, peak_lr=0.1 / the defaults), which must not be "
        "averaged; draw from a results folder with one retraining of each group",
    )


def test_groups_of_one_run_that_were_retrained_with_different_settings_are_not_shown_side_by_side(store):
    retrain_with(store, {"epochs": 10}, {"epochs": 20, "patience": 9}, seed=0)
    (skipped,) = outcomes(retraining.draw, store)
    assert isinstance(skipped, Skipped)
    assert "with different settings (epochs=10 / epochs=20, patience=9)" in skipped.reason


def test_retrainings_that_differ_in_what_they_are_about_and_in_the_limit_alone_are_averaged(store):
    for seed, limit in ((0, 50), (1, 100)):
        retrain_with(store, {"epochs": 10}, {"epochs": 10}, seed=seed, n=limit, limit=limit)
    (drawn,) = draw_all(retraining.draw, store)
    assert drawn.source.seeds == (0, 1)
    assert "Judged on 50 to 100 clean examples." in drawn.caption


def test_settings_of_retrainings_that_are_not_drawn_do_not_matter(store):
    retrain_with(store, {"epochs": 10}, {"epochs": 10}, seed=0)
    retrain_with(store, {"epochs": 20}, {"epochs": 20}, seed=0, n=50, limit=50)
    (drawn,) = draw_all(retraining.draw, store)
    assert drawn.source.n_rows == 4


@pytest.mark.parametrize("n_groups", [1, 2, 5, 13, 50])
def test_any_number_of_groups_has_a_panel_each_and_named_axes(store, n_groups):
    config = make_config(seed=0)
    add_finished(store, config)
    add_retraining(store, config, tuple(f"blocks.{i}.with_a_long_name" for i in range(n_groups)))
    (drawn,) = draw_all(retraining.draw, store)
    drawn.figure.draw_without_rendering()
    panels = [axes for axes in drawn.figure.axes if axes.lines]
    assert len(panels) == n_groups
    assert min(axes.get_position().width * drawn.figure.get_size_inches()[0] for axes in panels) > 0.6
    assert len({axes.get_title() for axes in panels}) == n_groups


def test_a_group_that_only_one_of_the_seeds_has_is_drawn_with_what_is_there(store):
    for seed, groups in ((0, ("a", "b", "c")), (1, ("a", "b"))):
        add_finished(store, make_config(seed=seed))
        add_rewinding(store, make_config(seed=seed), groups)
        add_retraining(store, make_config(seed=seed), groups)
    points = {rewinding.draw: "6 of 18", criticality.draw: "2 of 6", retraining.draw: r"\d+ of \d+"}
    for function, few in points.items():
        (drawn,) = draw_all(function, store)
        drawn.figure.draw_without_rendering()
        for axes in drawn.figure.axes:
            assert not any(math.isnan(y) for curve in drawn_curves(axes).values() for y in curve)
        assert re.search(rf"over 2 seeds\. Only from 1 of 2 runs: {few} points \(group c\)\. ", drawn.caption)


def test_a_point_of_one_seed_has_no_spread_which_is_not_a_spread_of_zero(store):
    for seed, groups in ((0, ("a", "b", "c", "a+b", "a+c")), (1, ("a", "b", "a+b"))):
        add_finished(store, make_config(seed=seed))
        add_rewinding(store, make_config(seed=seed), groups, epochs=(0,))
        add_retraining(store, make_config(seed=seed), [group for group in groups if "+" not in group])
    figures = (rewinding.draw, criticality.draw, rewinding_sets.draw, retraining.draw)
    (figure3,), (drops,), (sets,), (figure4,) = (draw_all(function, store) for function in figures)
    for axes in figure3.figure.axes:
        (band,) = axes.collections
        assert {x for path in band.get_paths() for x in path.vertices[:, 0]} == {0, 1}
    for axes, n_both in ((drops.figure.axes[0], 2), (sets.figure.axes[0], 1)):
        for bars in axes.collections:
            assert [len(bar) for bar in bars.get_segments()] == [2] * n_both + [0]
    assert [len(axes.collections) for axes in figure4.figure.axes] == [3, 3, 0]


def test_points_of_fewer_runs_are_named_by_what_they_have_in_common(store):
    for seed, epochs in ((0, (0, 2, 4)), (1, (0, 2)), (2, (0,))):
        add_finished(store, make_config(seed=seed))
        add_rewinding(store, make_config(seed=seed), ("a", "b"), epochs=epochs)
    (drawn,) = draw_all(rewinding.draw, store)
    assert "Only from 1 to 2 of 3 runs: 12 of 18 points (rewind epoch 2, 4). " in drawn.caption


def test_points_of_fewer_runs_are_named_by_model(store):
    for seed, groups in ((0, ("a", "b", "c", "d")), (1, ("a",))):
        for model in ("resnet9", "vit"):
            add_finished(store, make_config(seed=seed, model=model))
            add_rewinding(store, make_config(seed=seed, model=model), groups if model == "vit" else ("a",), epochs=(0,))
    (drawn,) = draw_all(rewinding.draw, store)
    assert "over 2 seeds. Only from 1 of 2 runs: 9 of 12 points of vit (group b to d). " in drawn.caption


def test_where_every_point_is_of_every_run_the_caption_says_no_more(store):
    for seed in (0, 1):
        add_everything(store, make_config(seed=seed))
    for function in (rewinding.draw, criticality.draw, retraining.draw):
        (drawn,) = draw_all(function, store)
        assert "Only from" not in drawn.caption
