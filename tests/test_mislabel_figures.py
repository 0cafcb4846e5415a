"""The figure of the label errors found: means over seeds, the table in its caption, and what is left out."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from analysis_rows import add_run, add_unit, make_config

from analysis.drawn import Drawn, Options, Skipped
from analysis.figures import draw_figures
from analysis.load import load_tables
from analysis.mislabels import MEASURES, draw
from memlib.config import RunConfig
from memlib.mislabel_evaluation import evaluate_mislabels
from memlib.results import ResultStore, create_results
from memlib.run_mislabels import find_mislabels_of_run, trained_examples
from memlib.schemas import table_from_rows

N = 40


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return create_results(tmp_path / "results")


def add_examples(store: ResultStore, config: RunConfig, *, tied: bool = True, folds: int = 0) -> None:
    """Write a run and its examples, a tenth noisy if it has noise: those lose their label when dropped, mostly.

    With `folds` the run is cross-validated, in one unit of work.
    """
    add_run(store, config)
    draw = random.Random(config.run_id)
    tables = {"examples": [], "dynamics": []}
    for i in range(N):
        is_noisy = bool(config.noise.fraction) and i % 10 == 0
        example, assigned = {"run_id": config.run_id, "example_id": i}, {"assigned": int(is_noisy)}
        for mode in ("tied", "scaled", "dropped") if tied else ("plain",):
            margin = draw.gauss(-3 if is_noisy and mode == "dropped" else 3, 2)
            row = {"split": "train", "original": 0, "is_noisy": is_noisy, "mode": mode, "loss": 2 ** (-margin)}
            prediction = int(is_noisy) if margin > 0 else 1 - int(is_noisy)
            tables["examples"].append({**example, **assigned, **row, "margin": margin, "prediction": prediction})
        row = {"aum": draw.gauss(1 - is_noisy, 1), "forgetting_events": draw.randrange(3), "n_epochs": 30}
        tables["dynamics"].append({**example, **row, "first_learned": 2, "last_mistake": None})
    for table, rows in tables.items():
        store.write(table, config.run_id, table_from_rows(table, rows))
    if folds:
        add_folds(store, config, folds=folds)


def add_folds(store: ResultStore, config: RunConfig, *, folds: int, epochs: int = 30, n: int = N) -> None:
    """Write the cross-validation of a run's first n examples, as one unit of work."""
    draw, rows = random.Random(f"{config.run_id}{folds}{epochs}"), []
    for i in range(n):
        is_noisy = bool(config.noise.fraction) and i % 10 == 0
        share = min(max(draw.gauss(0.3 if is_noisy else 0.8, 0.2), 0.01), 0.99)
        row = {"run_id": config.run_id, "example_id": i, "assigned": int(is_noisy), "prediction": 0}
        row |= {"probabilities": [1 - share, share] if is_noisy else [share, 1 - share]}
        rows.append({**row, "fold": i % folds, "folds": folds, "epochs": epochs})
    store.write("cross_validation", f"{config.run_id}-{folds}-{epochs}", table_from_rows("cross_validation", rows))


def drawn_from(store: ResultStore) -> Drawn:
    (drawn,) = draw(load_tables(store), Options())
    assert isinstance(drawn, Drawn), drawn
    return drawn


def test_every_method_stands_at_the_mean_of_its_measures_over_seeds(store):
    configs = [make_config(seed=seed) for seed in (0, 1)]
    for config in configs:
        add_examples(store, config, folds=2)
    drawn = drawn_from(store)
    qualities = []
    for config in configs:
        found = find_mislabels_of_run(store, config.run_id)
        is_noisy = trained_examples(store.read("examples").slice(0, 3 * N)).is_noisy
        qualities.append({method: evaluate_mislabels(each, is_noisy) for method, each in found.items()})
    (axes,) = drawn.figure.axes
    methods = [label.get_text().replace(" ", "_") for label in axes.get_yticklabels()]
    assert methods == ["margin_drop", "loss_rise", "loss", "aum", "forgetting_events", "cleanlab"]
    for container, measure in zip(axes.containers, MEASURES, strict=True):
        for method, x in zip(methods, container[0].get_xdata(), strict=True):
            assert x == pytest.approx(sum(getattr(quality[method], measure) for quality in qualities) / 2)
    (table,) = drawn.tables
    mean = sum(quality["margin_drop"].auroc for quality in qualities) / 2
    assert table.rows[0][:2] == ("margin_drop", "in sample")
    assert table.rows[0][2].startswith(f"{mean:.3f} ± ")
    assert "the 4 examples with a wrong label before the others of 40" in drawn.caption
    assert "Mean and standard deviation over 2 seeds." in drawn.caption
    assert (drawn.source.table, drawn.source.n_rows, drawn.source.seeds) == ("examples", 2 * 3 * N, (0, 1))


def test_a_method_of_one_run_has_no_spread_and_the_caption_names_it(store):
    for seed, folds in ((0, 2), (1, 0)):
        add_examples(store, make_config(seed=seed), folds=folds)
    drawn = drawn_from(store)
    assert "over 2 seeds. Only from 1 of 2 runs: 1 of 6 points (method cleanlab)." in drawn.caption
    (axes,) = drawn.figure.axes
    for bars in axes.collections:
        assert [len(bar) for bar in bars.get_segments()] == [2, 2, 2, 2, 2, 0]


def test_the_caption_names_the_folds_that_cleanlab_judges_by_and_means_are_over_the_same_ones(store):
    """The largest that every run has: not the five folds of one of them, nor the three that are not finished."""
    configs = [make_config(seed=seed) for seed in (0, 1)]
    for config, epochs in zip(configs, (20, 30), strict=True):
        add_examples(store, config, folds=2)
        add_folds(store, config, folds=2, epochs=20)
        add_folds(store, config, folds=3, n=N // 2)
        add_folds(store, config, folds=5, epochs=epochs)
    expected = []
    for config in configs:
        alone = create_results(Path(store.storage.root).parent / f"alone-{config.seed}")
        add_examples(alone, config, folds=2)
        is_noisy = trained_examples(alone.read("examples").slice(0, 3 * N)).is_noisy
        expected.append(evaluate_mislabels(find_mislabels_of_run(alone, config.run_id)["cleanlab"], is_noisy).auroc)
    drawn = drawn_from(store)
    assert "Cleanlab judges by cross-validation (2 folds, 30 epochs). Mean" in drawn.caption
    assert drawn.figure.axes[0].containers[0][0].get_xdata()[-1] == pytest.approx(sum(expected) / 2)


def test_folds_that_were_trained_by_other_code_are_told_in_the_index(store, tmp_path):
    for seed, code in ((0, "1"), (1, "2")):
        config = make_config(seed=seed)
        add_examples(store, config, folds=2)
        add_unit(store, f"{config.run_id}-2-30", config.run_id, "cross_validation", code=code)
    draw_figures(load_tables(store), tmp_path, only=["mislabels"])
    assert "2 seeds (0, 1). The units of work differ in code (1, 2). [PDF]" in (tmp_path / "index.md").read_text()


def test_cleanlab_is_left_out_where_no_cross_validation_is_the_same_in_all_runs(store):
    for seed, folds in ((0, 2), (1, 5)):
        add_examples(store, make_config(seed=seed), folds=folds)
    drawn = drawn_from(store)
    assert "cleanlab" not in {row[0] for row in drawn.tables[0].rows}
    assert len(drawn.figure.axes[0].get_yticklabels()) == 5
    assert (
        "Not drawn: cleanlab: the runs were cross-validated with different settings (2 folds, 30 epochs / 5 folds, 30 "
        "epochs); give all the same cross_validation.folds and epochs"
    ) in drawn.caption


def test_a_run_without_dropout_and_folds_shows_the_baselines_alone(store):
    add_examples(store, make_config(seed=0), tied=False)
    drawn = drawn_from(store)
    labels = [label.get_text() for label in drawn.figure.axes[0].get_yticklabels()]
    assert labels == ["loss", "aum", "forgetting events"]
    assert "One seed, so no spread is shown." in drawn.caption
    assert [row[0] for row in drawn.tables[0].rows] == ["loss", "aum", "forgetting_events"]


def test_without_cleanlab_the_other_methods_are_drawn_and_the_caption_says_how_to_install_it(store, monkeypatch):
    add_examples(store, make_config(seed=0), folds=2)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    drawn = drawn_from(store)
    assert "Not drawn: confident learning needs the package cleanlab" in drawn.caption
    assert "pip install -e '.[cleanlab]'" in drawn.caption
    assert "cleanlab" not in {row[0] for row in drawn.tables[0].rows}


def test_a_run_without_noise_is_skipped_with_what_to_set(store):
    add_examples(store, make_config(seed=0, noise=0.0))
    (skipped,) = draw(load_tables(store), Options())
    assert skipped == Skipped(
        "mislabels-digits-resnet9", "its runs have no wrong labels to find; set noise.fraction above 0 and train again"
    )
