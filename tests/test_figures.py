from __future__ import annotations

import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import pyarrow.compute as pc
import pytest
from analysis_rows import (
    RESNET9,
    add_dropout,
    add_epochs,
    add_everything,
    add_finished,
    add_forgotten,
    add_gradients,
    add_run,
    add_unit,
    make_config,
    make_dropout_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import gradients, learning_curves
from analysis.cells import find_cells, over_seeds
from analysis.drawn import Drawn, Options, Skipped
from analysis.figures import FIGURES, draw_figures, main
from analysis.load import load_tables
from analysis.settings import label_settings
from analysis.style import STROKES, house_style, new_figure
from memlib.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    NoiseConfig,
    RunConfig,
    TrainingConfig,
    config_to_json,
)
from memlib.errors import InputError
from memlib.results import ResultStore, create_results
from memlib.schemas import table_from_rows

ROOT = Path(__file__).parents[1]
OPTIONS = Options()


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return create_results(tmp_path / "results")


def draw_all(function, store: ResultStore, options: Options = OPTIONS) -> list[Drawn]:
    outcomes = list(function(load_tables(store), options))
    assert all(isinstance(outcome, Drawn) for outcome in outcomes), outcomes
    return outcomes


def twin(rows: list[dict], column: str) -> tuple[float, float]:
    """Mean and sample standard deviation, one number a run, in plain Python."""
    numbers = [row[column] for row in rows]
    return statistics.fmean(numbers), statistics.stdev(numbers)


# Learning curves


def test_learning_curves_draw_the_mean_and_standard_deviation_over_seeds(store):
    rows = [row for seed in (0, 1) for row in add_finished(store, make_config(seed=seed))[0]]
    (drawn,) = draw_all(learning_curves.draw, store)
    for axes, value in zip(drawn.figure.axes, ("accuracy", "loss"), strict=True):
        for line, band, split in zip(axes.lines, axes.collections, learning_curves.SPLITS, strict=True):
            assert line.get_color() == STROKES[split].colour
            corners = band.get_paths()[0].vertices
            for x, y in zip(*line.get_data(), strict=True):
                chosen = [r for r in rows if r["split"] == split and r["epoch"] == x]
                mean, std = twin(chosen, value)
                assert y == pytest.approx(mean)
                edges = corners[corners[:, 0] == x, 1]
                assert (edges.min(), edges.max()) == pytest.approx((mean - std, mean + std))
            assert list(line.get_xdata()) == list(range(31))


def test_the_caption_names_when_the_noise_is_memorized_and_the_final_accuracies(store):
    rows = [row for seed in (0, 1) for row in add_finished(store, make_config(seed=seed))[0]]
    (drawn,) = draw_all(learning_curves.draw, store)

    def mean(split: str, epoch: int) -> tuple[float, float]:
        return twin([r for r in rows if (r["split"], r["epoch"]) == (split, epoch)], "accuracy")

    half, most = (next(e for e in range(31) if mean("noisy", e)[0] >= share) for share in (0.5, 0.95))
    assert f"reaches 0.5 in epoch {half} and reaches 0.95 in epoch {most}." in drawn.caption
    for split in learning_curves.SPLITS:
        assert f"{split} {mean(split, 30)[0]:.3f} ± {mean(split, 30)[1]:.3f}" in drawn.caption
    assert "over 2 seeds" in drawn.caption
    assert (drawn.source.table, drawn.source.n_rows, drawn.source.n_runs) == ("epochs", len(rows), 2)
    assert drawn.source.seeds == (0, 1)


def test_a_single_seed_is_drawn_without_spread_and_the_caption_says_so(store):
    add_finished(store, make_config(seed=4))
    (drawn,) = draw_all(learning_curves.draw, store)
    assert "One seed, so no spread is shown." in drawn.caption
    assert "±" not in drawn.caption


def test_runs_without_noise_have_no_noisy_curve_and_no_cosine(store):
    add_finished(store, make_config(seed=0, noise=0.0))
    (drawn,) = draw_all(learning_curves.draw, store)
    assert [line.get_label() for line in drawn.figure.axes[0].lines] == ["clean", "test"]
    assert "There are no noisy examples." in drawn.caption
    (figure1,) = draw_all(gradients.draw_norms, store)
    assert "The noisy examples' gradient is zero." in figure1.caption
    (figure2,) = gradients.draw_cosines(load_tables(store), OPTIONS)
    assert isinstance(figure2, Skipped)
    assert "set noise.fraction above 0" in figure2.reason


# Figure 1 and Figure 2


def test_figure_1_draws_norms_over_root_parameters_averaged_over_the_epochs_asked_for(store):
    runs = [add_finished(store, make_config(seed=seed))[1] for seed in (0, 1)]
    (drawn,) = draw_all(gradients.draw_norms, store, Options(gradient_epochs=(3, 7)))
    assert "The gradients are of training steps in float32." in drawn.caption
    (axes,) = drawn.figure.axes
    for container, kind in zip(axes.containers, ("clean", "noisy", "total"), strict=True):
        line, _, (bars,) = container
        assert line.get_color() == STROKES[kind].colour
        for index, (y, bar) in enumerate(zip(line.get_ydata(), bars.get_segments(), strict=True)):
            means = [
                statistics.fmean(
                    row[f"{kind}_norm"] / math.sqrt(row["n_parameters"])
                    for row in rows
                    if row["group_index"] == index and 3 <= row["epoch"] <= 7
                )
                for rows in runs
            ]
            mean, std = statistics.fmean(means), statistics.stdev(means)
            assert y == pytest.approx(mean)
            assert list(bar[:, 1]) == pytest.approx([mean - std, mean + std])
    assert [label.get_text() for label in axes.get_xticklabels()] == list(RESNET9)
    assert axes.get_yscale() == "log"


def test_figure_1_says_how_large_the_noisy_norm_is_beside_the_clean_one(store):
    runs = [add_finished(store, make_config(seed=seed))[1] for seed in (0, 1)]
    (drawn,) = draw_all(gradients.draw_norms, store)

    def norm(kind: str, index: int) -> float:
        rows = [r for rows in runs for r in rows if r["group_index"] == index and 15 <= r["epoch"] <= 20]
        return statistics.fmean(r[f"{kind}_norm"] for r in rows)

    ratios = [norm("noisy", i) / norm("clean", i) for i in range(len(RESNET9))]
    assert f"{statistics.median(ratios):.2f} times the clean one (median over 9 groups" in drawn.caption
    assert drawn.source.n_rows == 2 * 6 * 9


@pytest.mark.parametrize("epochs", [(15, 20), (31, 31), (30, 31)])
def test_figure_1_is_skipped_with_the_option_to_change_where_epochs_are_missing(store, epochs):
    n = 10 if epochs == (15, 20) else 30
    add_finished(store, make_config(seed=0, epochs=n))
    (outcome,) = gradients.draw_norms(load_tables(store), Options(gradient_epochs=epochs))
    assert outcome == Skipped(
        "figure1-digits-resnet9",
        f"its runs have gradients of epochs 1 to {n}, not all of {epochs[0]} to {epochs[1]}; "
        "give --gradient-epochs FIRST LAST within them, or train longer",
    )


def test_figure_2_draws_the_mean_cosine_with_the_first_group_on_top_and_null_as_missing(store):
    runs = [add_finished(store, make_config(seed=seed))[1] for seed in (0, 1)]
    (drawn,) = draw_all(gradients.draw_cosines, store)
    assert "The gradients are of training steps in float32." in drawn.caption
    image = drawn.figure.axes[0].images[0]
    grid = image.get_array()
    assert grid.shape == (9, 30)
    assert image.get_clim() == (-1, 1)
    assert image.get_extent() == [0.5, 30.5, 8.5, -0.5]
    assert grid.mask.sum() == 1
    assert grid.mask[0, -1]
    means = {}
    for a, b in zip(*runs, strict=True):
        if a["cosine"] is not None:
            means[a["group_index"], a["epoch"]] = (a["cosine"] + b["cosine"]) / 2
            assert grid[a["group_index"], a["epoch"] - 1] == pytest.approx(means[a["group_index"], a["epoch"]])
    share = sum(mean < 0 for mean in means.values()) / len(means)
    lowest = min(means, key=means.__getitem__)
    assert f"Negative in {100 * share:.0f} % of the 269 pairs" in drawn.caption
    assert f"lowest at {means[lowest]:.2f} in {RESNET9[lowest[0]]}, epoch {lowest[1]}." in drawn.caption


def test_a_cosine_that_is_null_for_one_seed_is_the_mean_of_the_others(store):
    a, b = make_config(seed=0), make_config(seed=1)
    add_finished(store, a, groups=("x", "y"))
    rows = add_finished(store, b, groups=("x", "y"))[1]
    frame = pl.DataFrame([{**r, "cosine": None if r["epoch"] == 5 else 0.25} for r in rows])
    assert over_seeds(frame, by=["epoch"], value="cosine")["epoch"].to_list() == [e for e in range(1, 31) if e != 5]


def test_curves_and_pairs_that_only_some_runs_have_are_named(store):
    complete, rows = add_finished(store, make_config(seed=0), groups=("x", "y"))
    add_finished(store, make_config(seed=1), groups=("x", "y"))
    diverged = [{**row, "loss": math.nan if row["epoch"] > 20 else row["loss"]} for row in complete]
    store.write("epochs", complete[0]["run_id"], table_from_rows("epochs", diverged))
    still = [{**row, "cosine": None if row["epoch"] == 5 else row["cosine"]} for row in rows]
    store.write("gradients", rows[0]["run_id"], table_from_rows("gradients", still))
    (curves,) = draw_all(learning_curves.draw, store)
    assert "Only from 1 of 2 runs: 30 of 186 points (curve loss; epoch 21 to 30). " in curves.caption
    (cosines,) = draw_all(gradients.draw_cosines, store)
    assert "Only from 1 of 2 runs: 2 of 59 points (epoch 5). " in cosines.caption


def test_a_hundred_groups_do_not_crowd_the_axis(store):
    add_gradients(
        store, make_config(seed=0), groups=tuple(f"stages.{i // 50}.blocks.{i}.long_name" for i in range(100))
    )
    add_run(store, make_config(seed=0))
    for function in (gradients.draw_norms, gradients.draw_cosines):
        (drawn,) = draw_all(function, store)
        drawn.figure.draw_without_rendering()
        axes = drawn.figure.axes[0]
        assert axes.get_position().width > 0.3
        labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        shown = [label.get_text() for label in labels if "name" in label.get_text()]
        assert 10 < len(shown) <= 36
        assert len(set(shown)) == len(shown)
        assert drawn.figure.get_size_inches()[0] == pytest.approx(3.3)


# Settings


def test_settings_are_never_mixed_and_spelt_in_name_and_title(store):
    rows = {}
    for seed in (0, 1):
        for noise in (0.05, 0.1):
            rows[seed, noise] = add_finished(store, make_config(seed=seed, noise=noise))[0]
    drawn = draw_all(learning_curves.draw, store)
    assert [d.name for d in drawn] == [
        "learning_curves-digits-resnet9-noise.fraction=0.05",
        "learning_curves-digits-resnet9-noise.fraction=0.1",
    ]
    for noise, one in zip((0.05, 0.1), drawn, strict=True):
        assert f"noise.fraction={noise}" in one.title
        first = [r for seed in (0, 1) for r in rows[seed, noise] if r["split"] == "clean" and r["epoch"] == 3]
        drawn_value = one.figure.axes[0].lines[0].get_ydata()[3]
        assert drawn_value == pytest.approx(twin(first, "accuracy")[0])
        assert one.source.n_runs == 2


def test_seed_and_kept_checkpoints_are_no_settings_and_a_failed_run_sets_no_one_apart(store):
    add_finished(store, make_config(seed=0))
    add_run(store, make_config(seed=5, noise=0.4), error="loss is not finite")
    other = RunConfig(
        data=DataConfig(name="digits"),
        training=TrainingConfig(epochs=30),
        checkpoints=CheckpointConfig(epochs=(0, 5)),
        seed=1,
    )
    add_finished(store, other)
    results = load_tables(store)
    assert [cell.title for cell in results.cells] == ["digits, resnet9"]
    assert results.failed["setting"].to_list() == ["noise.fraction=0.4"]
    assert results.epochs["seed"].unique().sort().to_list() == [0, 1]


def test_rows_of_failed_runs_are_in_no_figure(store):
    add_finished(store, make_config(seed=0))
    add_epochs(store, make_config(seed=1))
    add_run(store, make_config(seed=1), error="out of memory")
    (drawn,) = draw_all(learning_curves.draw, store)
    assert drawn.source.seeds == (0,)
    assert load_tables(store).table("examples").is_empty()


# Built in the test: run-time type checks draw random numbers, which a strategy must not.
configs = st.fixed_dictionaries(
    {
        "limit": st.sampled_from([None, 10, 100]),
        "data_seed": st.sampled_from([None, 0]),
        "pairs": st.sampled_from([(), ((0, 1),), ((0, 1), (1, 2))]),
        "fraction": st.sampled_from([0.05, 0.1]),
        "width": st.sampled_from([0.5, 1.0]),
        "augment": st.sampled_from([(), ("crop",), ("crop", "flip")]),
        "seed": st.integers(0, 3),
    }
)


def config_of(drawn: dict) -> RunConfig:
    kind = "asymmetric" if drawn["pairs"] else "symmetric"
    return RunConfig(
        data=DataConfig(name="digits", limit=drawn["limit"], seed=drawn["data_seed"]),
        noise=NoiseConfig(fraction=drawn["fraction"], kind=kind, pairs=drawn["pairs"]),
        model=ModelConfig(width=drawn["width"]),
        training=TrainingConfig(augment=drawn["augment"]),
        seed=drawn["seed"],
    )


@given(st.lists(configs, min_size=1, max_size=8))
def test_two_runs_share_a_label_exactly_if_they_differ_in_the_seed_alone(chosen):
    labels = label_settings(("digits", "resnet9", config_to_json(config_of(drawn))) for drawn in chosen)
    for a, label_a in zip(chosen, labels, strict=True):
        for b, label_b in zip(chosen, labels, strict=True):
            assert (label_a == label_b) == ({**a, "seed": 0} == {**b, "seed": 0})


names = st.text(st.sampled_from("abAB/:._- é"), min_size=1, max_size=130)


@given(st.lists(st.tuples(names, names, st.just("")), min_size=1, max_size=6, unique=True))
def test_every_cell_has_its_own_safe_file_name(keys):
    runs = pl.DataFrame(keys, schema={k: pl.String for k in ("dataset", "model", "setting")}, orient="row")
    cells = find_cells(runs)
    assert len({cell.stem.casefold() for cell in cells}) == len(cells) == len(keys)
    for cell in cells:
        assert len(cell.stem) <= 140
        assert set(cell.stem) <= set("abcdefABCDEF0123456789._-")


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.none() | st.floats(-1, 1) | st.just(math.nan)), max_size=20))
def test_mean_and_spread_equal_the_plain_ones_over_what_is_finite(rows):
    frame = pl.DataFrame(rows, schema={"epoch": pl.Int64, "value": pl.Float64}, orient="row")
    found = over_seeds(frame, by=["epoch"], value="value")
    groups = {e: [v for x, v in rows if x == e and v is not None and not math.isnan(v)] for e in range(4)}
    expected = {e: values for e, values in groups.items() if values}
    assert found["epoch"].to_list() == list(expected)
    for row, values in zip(found.iter_rows(named=True), expected.values(), strict=True):
        assert row["n_runs"] == len(values)
        assert row["mean"] == pytest.approx(statistics.fmean(values), abs=1e-12)
        spread = statistics.stdev(values) if len(values) > 1 else None
        assert row["std"] == (spread if spread is None else pytest.approx(spread, abs=1e-9))


# The command


def test_the_command_draws_names_and_indexes_every_figure(store, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        add_everything(store, make_config(seed=seed), groups=("stem", "head"))
    add_run(store, make_config(seed=2, noise=0.3), error="loss is not finite in epoch 3;\nlower training.peak_lr")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == "table1 skipped: no finished run with example-tied dropout; run python sweeps/full_paper.py\n"
    stems = [f"{name}-digits-resnet9" for name in ("learning_curves", "figure1", "figure2")]
    stems += ["figure3-digits", "criticality-digits"]
    stems += [f"{name}-digits-resnet9" for name in ("figure4", "figure5", "figure5_clean_split", "shared_units")]
    files = [f"figures/{stem}.{kind}" for stem in stems for kind in ("png", "pdf")]
    assert printed.out.splitlines() == [*files, "figures/index.md"]
    assert sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "figures").iterdir()) == sorted(
        [*files, "figures/index.md"]
    )
    index = (tmp_path / "figures" / "index.md").read_text()
    assert "9 figures from 2 finished runs in `results`." in index
    for stem in stems:
        assert f"![{stem}]({stem}.png)" in index
        assert f"[PDF]({stem}.pdf)" in index
    assert "Data: 186 rows of table `epochs` from 2 runs; 2 seeds (0, 1)." in index
    assert (
        "- digits, resnet9, noise.fraction=0.3, seed 2: loss is not finite in epoch 3; lower training.peak_lr" in index
    )


def test_drawing_the_same_results_twice_gives_the_same_bytes(store, tmp_path):
    for seed in (0, 1):
        add_everything(store, make_config(seed=seed), groups=("stem", "head"))
    tied = make_dropout_config("example_tied", seed=0)
    add_dropout(store, tied)
    add_forgotten(store, tied, range(3))
    first, _ = draw_figures(load_tables(store), tmp_path / "a")
    second, _ = draw_figures(load_tables(store), tmp_path / "b")
    assert len(first) == 29
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_pictures_the_previous_index_named_and_no_longer_drawn_are_removed_and_nothing_else(store, tmp_path):
    add_finished(store, make_config(seed=0), groups=("stem", "head"))
    folder = tmp_path / "figures"
    draw_figures(load_tables(store), folder, only=["figure1", "figure2"])
    (folder / "mine.png").write_bytes(b"mine")
    later = create_results(tmp_path / "later")
    add_run(later, make_config(seed=0))
    add_gradients(later, make_config(seed=0, epochs=10), groups=("stem", "head"))
    add_run(later, make_config(seed=0, epochs=10))
    draw_figures(load_tables(later), folder)
    assert {path.name for path in folder.iterdir()} == {
        "figure2-digits-resnet9-training.epochs=10.png",
        "figure2-digits-resnet9-training.epochs=10.pdf",
        "index.md",
        "mine.png",
    }


def test_only_redraws_what_is_named_and_keeps_the_rest_of_the_index(store, tmp_path):
    add_everything(store, make_config(seed=0), groups=("stem", "head"))
    folder = tmp_path / "figures"
    draw_figures(load_tables(store), folder, only=["figure1", "figure2", "figure4"])
    index, old = (folder / "index.md").read_text(), (folder / "figure2-digits-resnet9.png").stat().st_mtime_ns
    paths, _ = draw_figures(load_tables(store), folder, only=["figure1"])
    assert [path.name for path in paths] == ["figure1-digits-resnet9.png", "figure1-digits-resnet9.pdf", "index.md"]
    assert (folder / "index.md").read_text() == index
    assert (folder / "figure2-digits-resnet9.png").stat().st_mtime_ns == old


def test_figures_without_rows_are_skipped_by_name_with_what_to_run(store, tmp_path, monkeypatch, capsys):
    add_run(store, make_config(seed=0))
    add_epochs(store, make_config(seed=0))
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    tables = {"figure1": "gradients", "figure2": "gradients", "figure3": "rewinding", "criticality": "rewinding"}
    tables |= {"figure4": "retraining", "figure5": "critical_units", "shared_units": "removed_units"}
    reasons = {name: f"no rows in table {table}" for name, table in tables.items()}
    reasons["table1"] = "no finished run with example-tied dropout"
    assert capsys.readouterr().err.splitlines() == [
        f"{name} skipped: {reason}; run python sweeps/full_paper.py" for name, reason in reasons.items()
    ]
    assert main(["--results", str(tmp_path / "results"), "--only", "figure2"]) == 1
    assert f"run python sweeps/full_paper.py --results {tmp_path / 'results'}\n" in capsys.readouterr().err


def test_nothing_to_draw_is_status_1_with_the_reason_and_the_failed_runs_are_listed(
    store, tmp_path, monkeypatch, capsys
):
    add_run(store, make_config(seed=2), error=None)
    add_run(store, make_config(seed=2), error="disk full")
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nothing to draw in results: 0 finished runs, 1 failed; see figures/index.md" in printed.err
    assert "- digits, resnet9, seed 2: disk full\n" in (tmp_path / "figures" / "index.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "figure55"], "figure 'figure55' is not known; did you mean 'figure5'?"),
        (["--gradient-epochs", "20", "15"], "--gradient-epochs is 20 15; give the first and the last epoch"),
        (["--results", "nowhere"], "there are no results at nowhere; run python sweeps/full_paper.py"),
        (["--figures", "taken"], "cannot write figures to taken (File exists); give another folder with --figures."),
        (["--figures", "foreign"], "foreign/index.md was not written by analysis/figures.py"),
    ],
)
def test_bad_input_is_status_2_with_one_message(store, tmp_path, monkeypatch, capsys, arguments, message):
    add_run(store, make_config(seed=0))
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.md").write_text("# My notes\n")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert (tmp_path / "foreign" / "index.md").read_text() == "# My notes\n"


def test_paths_and_colons_in_names_are_drawn_under_safe_file_names(store, tmp_path):
    config = make_config(seed=0, dataset="parquet:/x/y", model="timm:resnet18.a1_in1k")
    add_everything(store, config, groups=("stem", "head"))
    paths, skipped = draw_figures(load_tables(store), tmp_path / "figures")
    assert [skip.name for skip in skipped] == ["table1"]
    assert paths[0].name == "learning_curves-parquet_x_y-timm_resnet18.a1_in1k.png"
    assert {"figure3-parquet_x_y.png", "criticality-parquet_x_y.pdf"} < {path.name for path in paths}
    assert "parquet:/x/y, timm:resnet18.a1_in1k" in (tmp_path / "figures" / "index.md").read_text()


def test_drawing_leaves_the_settings_of_matplotlib_alone(store, tmp_path):
    add_finished(store, make_config(seed=0), groups=("stem", "head"))
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        before = dict(matplotlib.rcParams)
        (drawn,) = draw_all(learning_curves.draw, store)
        assert dict(matplotlib.rcParams) == before
    assert drawn.figure.axes[0].lines[0].get_linewidth() == pytest.approx(1.2)
    with house_style():
        sizes = [matplotlib.rcParams[f"{part}tick.labelsize"] for part in "xy"]
    assert min(sizes) >= 7


def test_the_stored_norms_are_not_divided_twice(store):
    add_run(store, make_config(seed=0))
    rows = add_gradients(store, make_config(seed=0), groups=("only",))
    (drawn,) = draw_all(gradients.draw_norms, store, Options(gradient_epochs=(1, 1)))
    drawn_norm = drawn.figure.axes[0].containers[0][0].get_ydata()[0]
    assert drawn_norm * np.sqrt(rows[0]["n_parameters"]) == pytest.approx(rows[0]["clean_norm"])


def test_figure_names_are_unique_and_have_no_hyphen():
    figure_names = [name for name, _ in FIGURES]
    assert len(set(figure_names)) == len(figure_names)
    assert not any("-" in name for name in figure_names)
    with pytest.raises(InputError, match="from 1 upwards"):
        Options(gradient_epochs=(0, 3))


def test_the_script_runs_from_the_repository_root_and_loads_neither_torch_nor_ray(store, tmp_path):
    add_finished(store, make_config(seed=0), groups=("stem", "head"))
    code = (
        "import runpy, sys\n"
        "sys.argv = ['analysis/figures.py', *sys.argv[1:]]\n"
        "try:\n    runpy.run_path('analysis/figures.py', run_name='__main__')\n"
        "except SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'torchvision', 'timm', 'ray', 'sweeps', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)\n"
    )
    arguments = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path / "f"), "--only", "figure2"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith("f/figure2-digits-resnet9.png")


def test_units_of_experiments_that_failed_are_listed_and_counted(store, tmp_path, monkeypatch, capsys):
    config = make_config(seed=0)
    add_everything(store, config)
    for unit, error in (("1", None), ("2", "out of\nmemory"), ("3", "out of\nmemory")):
        row = {"run_id": config.run_id, "experiment": "critical_units", "settings": "{}", "code_version": "0"}
        row |= {"device": "cpu", "seconds": 1.0, "status": "failed" if error else "done", "error": error}
        store.write("units", unit, table_from_rows("units", [row]))
    monkeypatch.chdir(tmp_path)
    assert main(["--only", "figure5"]) == 0
    assert "2 units of experiments failed and are in no figure; see figures/index.md" in capsys.readouterr().err
    listed = (tmp_path / "figures" / "index.md").read_text()
    assert "- digits, resnet9, seed 0: 2 units of critical_units: out of memory\n" in listed


def test_runs_that_differ_in_precision_or_code_are_averaged_only_with_a_word_about_it(store, tmp_path):
    for seed, precision, code in ((0, "float32", "1"), (1, "bfloat16", "1")):
        config = make_config(seed=seed)
        add_finished(store, config)
        row = store.read("runs").filter(pc.field("run_id") == config.run_id).to_pylist()[0]
        row = {**row, "precision": precision, "code_version": code}
        store.write("runs", config.run_id, table_from_rows("runs", [row]))
    draw_figures(load_tables(store), tmp_path, only=["learning_curves"])
    index = (tmp_path / "index.md").read_text()
    assert "2 seeds (0, 1). The runs differ in precision (bfloat16, float32). [PDF]" in index


EXPERIMENT_FIGURES = ["figure3", "criticality", "rewinding_sets", "figure4", "figure5", "shared_units"]


def index_of_two_seeds(store: ResultStore, folder: Path, *made: dict[str, str]) -> str:
    """Return the index of figures of experiments whose units of the first and second seed were made so."""
    for seed, how in enumerate(made):
        config = make_config(seed=seed)
        add_everything(store, config, groups=("stem", "head", "stem+head"))
        for experiment in ("rewinding", "retraining", "critical_units"):
            rows = store.read(experiment).filter(pc.field("run_id") == config.run_id)
            for unit in rows["unit_id"].unique().to_pylist():
                add_unit(store, unit, config.run_id, experiment, **how)
    draw_figures(load_tables(store), folder, only=EXPERIMENT_FIGURES)
    return (folder / "index.md").read_text()


def test_units_made_by_other_code_or_on_another_device_are_averaged_only_with_a_word_about_it(store, tmp_path):
    made = {"code": "0.1+aaa", "device": "cpu: x86_64"}, {"code": "0.1+bbb", "device": "cuda: NVIDIA H200"}
    index = index_of_two_seeds(store, tmp_path, *made)
    told = (
        "2 seeds (0, 1). The units of work differ in code (0.1+aaa, 0.1+bbb) and device (cpu: x86_64, cuda: NVIDIA "
        "H200). [PDF]"
    )
    assert index.count(told) == len(EXPERIMENT_FIGURES)


def test_units_made_alike_are_averaged_without_a_word_whatever_made_those_of_other_figures(store, tmp_path):
    add_unit(store, "another", make_config(seed=0).run_id, "retraining", code="0.1+ccc")
    index = index_of_two_seeds(store, tmp_path, {"code": "0.1+bbb"}, {"code": "0.1+bbb"})
    assert index.count("[PDF]") == len(EXPERIMENT_FIGURES)
    assert "differ in" not in index


def test_a_name_with_dollars_is_no_formula():
    figure = new_figure("a$_b and $c", height=1.0)
    assert not matplotlib.cbook.is_math_text(figure.get_suptitle())
    assert matplotlib.cbook.is_math_text("a$_b and $c")


@pytest.mark.parametrize("data_seed", [None, 0])
def test_runs_that_share_their_examples_are_averaged_with_a_word_about_it(store, tmp_path, data_seed):
    for seed in (0, 1):
        add_finished(store, replace(make_config(seed=seed), data=DataConfig(name="digits", seed=data_seed)))
    draw_figures(load_tables(store), tmp_path, only=["learning_curves"])
    said = "share examples and wrong labels (data.seed)" in (tmp_path / "index.md").read_text()
    assert said == (data_seed is not None)
