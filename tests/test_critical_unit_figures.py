from __future__ import annotations

import math
import random
import statistics
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest
from analysis_rows import LAYERS, SEARCH, add_critical_units, add_finished, add_run, critical_rows, make_config
from hypothesis import given
from hypothesis import strategies as st

from analysis import clean_split, critical_units, shared_units
from analysis.drawn import Drawn, Options, Outcome, Skipped
from analysis.load import load_tables
from analysis.rank_test import over_runs, rank_test, spell_test
from analysis.searched import MAIN_SEARCH, searched_examples
from analysis.style import STROKES
from memlib.config import RunConfig
from memlib.experiments import CriticalUnitsConfig
from memlib.results import ResultStore, create_results
from memlib.schemas import table_from_rows

DRAWING = (critical_units.draw, clean_split.draw, shared_units.draw)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return create_results(tmp_path / "results")


def outcomes(function, store: ResultStore) -> list[Outcome]:
    return list(function(load_tables(store), Options()))


def draw_all(function, store: ResultStore) -> list[Drawn]:
    found = outcomes(function, store)
    assert all(isinstance(outcome, Drawn) for outcome in found), found
    return found


def example(config: RunConfig, example_id: int, units: list[tuple[int, int]], **changes: object) -> tuple:
    """A flipped example with exactly these units (layer index, unit) removed, and its removals."""
    noisy = bool(changes.get("is_noisy", False))
    row, _ = critical_rows(config, random.Random(0), example_id=example_id, is_noisy=noisy, early=True)
    found = {"outcome": "flipped", "flipped": True, "n_removed": len(units), "right_early": True}
    judged = {"clean_accuracy_before": 1.0, "clean_accuracy_after": 0.9, "noisy_accuracy_after": 0.98}
    names = list(LAYERS)
    removals = [
        {
            "run_id": config.run_id,
            "example_id": example_id,
            "is_noisy": noisy,
            "step": step,
            "layer": names[layer],
            "layer_index": layer,
            "n_units": LAYERS[names[layer]],
            "unit": unit,
            "score": 1.0,
        }
        for step, (layer, unit) in enumerate(units, start=1)
    ]
    return {**row, **found, **judged, **changes}, removals


def write(store: ResultStore, examples: list[tuple], unit: str = "unit") -> None:
    store.write("critical_units", unit, table_from_rows("critical_units", [row for row, _ in examples]))
    removals = [removal for _, rows in examples for removal in rows]
    store.write("removed_units", unit, table_from_rows("removed_units", removals))


def share_at(axes, label: str, x: float) -> float:
    """The height of a falling curve just after x."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return [y for place, y in zip(*line.get_data(), strict=True) if place <= x][-1]


def hand_made(store: ResultStore) -> RunConfig:
    """Clean examples need 1, 2, 4 units and one never flips; noisy ones 1, 1; one noisy example is skipped."""
    config = make_config(seed=0)
    add_run(store, config)
    never = {"outcome": "step_limit", "flipped": False, "right_early": False}
    skipped = {"outcome": "skipped", "flipped": False, "clean_accuracy_after": None, "noisy_accuracy_after": None}
    write(
        store,
        [
            example(config, 0, [(0, 0)], right_early=False),
            example(config, 1, [(0, 0), (3, 1)], clean_accuracy_after=0.8),
            example(config, 2, [(3, 1), (3, 2), (3, 3), (3, 4)], clean_accuracy_after=0.7, noisy_accuracy_after=0.68),
            example(config, 3, [(2, unit) for unit in range(6)], **never),
            example(config, 4, [(3, 9)], is_noisy=True, right_early=False),
            example(config, 5, [(3, 9)], is_noisy=True, right_early=False),
            example(config, 6, [], is_noisy=True, **skipped),
        ],
    )
    return config


# The rank test


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_u_counts_the_pairs_in_which_the_first_is_larger_ties_half(first, second):
    found = rank_test(pl.Series(first), pl.Series(second))
    u = sum((a > b) + (a == b) / 2 for a in first for b in second)
    assert found.u == pytest.approx(u)
    assert found.auc == pytest.approx(u / len(first) / len(second))
    assert 0 < found.p <= 1
    other_way = rank_test(pl.Series(second), pl.Series(first))
    assert other_way.p == pytest.approx(found.p)
    assert other_way.auc == pytest.approx(1 - found.auc)


def test_p_is_that_of_the_normal_approximation_with_both_corrections():
    from scipy.stats import mannwhitneyu  # a second to import, more on a busy disk

    draw = random.Random(0)
    for shift in (0, 1, 3):
        first = [float(draw.randrange(6) + shift) for _ in range(30)] + [math.inf]
        second = [float(draw.randrange(6)) for _ in range(20)] + [math.inf] * 2
        expected = mannwhitneyu(first, second, method="asymptotic")
        found = rank_test(pl.Series(first), pl.Series(second))
        assert (found.u, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_a_rank_test_without_one_of_the_groups_is_none_and_of_equal_values_says_nothing():
    assert rank_test(pl.Series([1.0]), pl.Series([], dtype=pl.Float64)) is None
    assert rank_test(pl.Series([2, 2]), pl.Series([2])).p == 1.0


def test_runs_together_are_tested_each_within_itself():
    """Van Elteren's test with equal weights, counted by hand: values of different networks are never compared."""
    draw = random.Random(0)
    runs = [([draw.randrange(9) + s for _ in range(12)], [draw.randrange(9) for _ in range(9)]) for s in (0, 3)]
    tests = [rank_test(pl.Series(first), pl.Series(second)) for first, second in runs]
    found = over_runs(tests, draws=(0, 1))
    assert found.u == sum((a > b) + (a == b) / 2 for first, second in runs for a in first for b in second)
    assert found.auc == pytest.approx(statistics.fmean(test.auc for test in tests))
    shuffled = []
    for _ in range(2000):
        total = 0
        for first, second in runs:
            pooled = draw.sample([*first, *second], len(first) + len(second))
            total += sum((a > b) + (a == b) / 2 for a in pooled[: len(first)] for b in pooled[len(first) :])
        shuffled.append(total)
    as_far = [abs(total - 2 * 12 * 9 / 2) >= abs(found.u - found.expected) for total in shuffled]
    assert found.p == pytest.approx(statistics.fmean(as_far), abs=0.03)
    assert over_runs(tests[:1], draws=(0,)).p == pytest.approx(tests[0].p)


def test_runs_on_the_same_examples_are_no_more_evidence_than_one():
    test = rank_test(pl.Series([1, 3, 5, 6, 8, 9]), pl.Series([1, 2, 2, 4, 5]))
    assert over_runs([test] * 9, draws=range(9)).p < 0.01 < test.p / 5
    assert over_runs([test] * 9, draws=[0] * 9).p == pytest.approx(test.p, abs=0.03)  # but for the correction by 0.5


def test_the_area_of_several_runs_lies_between_theirs():
    rows = pl.DataFrame(
        {
            "run_id": ["a", "a", "b", "b"],
            "data_seed": [0, 0, 1, 1],
            "kind": ["clean", "noisy"] * 2,
            "needed": [10.0, 9.0, 3.0, 2.0],
        }
    )
    assert "AUC 1.000 (1.000 to 1.000 over 2 seeds), U = 2.0" in spell_test(rows, ("clean", "noisy"), "needed")


# Figure 5


def test_figure_5_draws_the_share_not_yet_flipped_and_those_never_flipped_at_the_right_end(store):
    hand_made(store)
    (drawn,) = draw_all(critical_units.draw, store)
    assert drawn.name == "figure5-digits-resnet9"
    flips = drawn.figure.axes[0]
    assert [share_at(flips, "clean", x) for x in (0.8, 1, 2, 4, 1000)] == [1, 0.75, 0.5, 0.25, 0.25]
    assert [share_at(flips, "noisy", x) for x in (0.8, 1, 1000)] == [1, 0, 0]
    assert flips.get_xticklabels()[-1].get_text() == "not\nflipped"
    medians = [line for line in flips.lines if line.get_label() == "_median"]
    assert [list(line.get_xdata()) for line in medians] == [[3], [1]]
    assert [line.get_color() for line in medians] == [STROKES[kind].colour for kind in ("clean", "noisy")]


def test_the_caption_of_figure_5_counts_and_tests_the_units_until_the_flip(store):
    hand_made(store)
    (drawn,) = draw_all(critical_units.draw, store)
    # Pairs clean, noisy: 1 ties with 1 and 1; 2, 4 and never are above both.  U = 2 * 0.5 + 3 * 2 = 7 of 8.
    assert "clean median 3, mean 2.333 (4 examples, 1 not flipped, 0 skipped as not predicted" in drawn.caption
    assert "noisy median 1, mean 1.000 (2 examples, 0 not flipped, 1 skipped as not predicted" in drawn.caption
    assert "clean above noisy: AUC 0.875, U = 7.0, p = " in drawn.caption
    assert "One seed, so no spread is shown." in drawn.caption
    assert drawn.source.n_rows == 7


def test_the_drop_in_training_accuracy_weighs_clean_and_noisy_examples_by_their_number(store):
    hand_made(store)
    (drawn,) = draw_all(critical_units.draw, store)
    # Drops of clean accuracy 0.1, 0.2, 0.3 weigh 900 and of noisy ones 0, 0, 0.3 weigh 100: 0.09, 0.18, 0.30.
    assert "Judged on 900 clean and 100 noisy examples." in drawn.caption
    assert "clean median 0.1800, mean 0.190; noisy median 0.0900, mean 0.090; clean above noisy: AUC 0.833" in (
        drawn.caption
    )
    drops = drawn.figure.axes[1]
    assert [share_at(drops, "clean", x) for x in (0, 0.1, 0.2, 0.31)] == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_the_layers_of_flipped_examples_stand_beside_their_share_of_all_units(store):
    hand_made(store)
    (drawn,) = draw_all(critical_units.draw, store)
    layers = drawn.figure.axes[2]
    assert [label.get_text() for label in layers.get_xticklabels()] == ["conv1", "conv4"]
    heights = {c.get_label(): list(c[0].get_ydata()) for c in layers.containers}
    assert heights["clean"] == pytest.approx([2 / 7, 5 / 7])
    assert heights["noisy"] == pytest.approx([0, 1])
    assert heights["all units"] == pytest.approx([32 / 288, 256 / 288])
    assert "Most removed units lie in: clean conv4 (0.714), noisy conv4 (1.000)." in drawn.caption
    assert "differ by 0.286 in all" in drawn.caption


def test_seeds_are_averaged_and_the_caption_gives_their_spread(store):
    means = []
    for seed in (0, 1, 2):
        config = make_config(seed=seed)
        add_run(store, config)
        rows, _ = add_critical_units(store, config)
        means.append(statistics.fmean(r["n_removed"] for r in rows if r["flipped"] and r["is_noisy"]))
    (drawn,) = draw_all(critical_units.draw, store)
    assert f"mean {statistics.fmean(means):.3f} ± {statistics.stdev(means):.3f} (" in drawn.caption
    assert "Mean and standard deviation over 3 seeds." in drawn.caption
    assert " over 3 seeds), U = " in drawn.caption
    assert all(axes.collections for axes in drawn.figure.axes)
    assert drawn.source.seeds == (0, 1, 2)


@pytest.mark.parametrize("function", DRAWING)
def test_searches_of_other_settings_have_figures_of_their_own(store, function):
    config = make_config(seed=0)
    add_run(store, config)
    rows, _ = add_critical_units(store, config)
    add_critical_units(store, config, refresh=4, reference_copies=1)
    add_critical_units(store, config, removal="activation")
    drawn = draw_all(function, store)
    name = drawn[0].name.split("-")[0]
    assert [figure.name for figure in drawn] == [
        f"{name}-digits-resnet9",
        f"{name}_reference_copies=1+refresh=4-digits-resnet9",
        f"{name}_removal=activation-digits-resnet9",
    ]
    assert drawn[0].source.n_rows != 3 * drawn[1].source.n_rows
    assert drawn[0].figure.get_suptitle() == "digits, resnet9"
    assert "search: reference_copies=1, refresh=4" in drawn[1].figure.get_suptitle().replace("\n", " ")
    assert "The search was exact: a unit is removed at its filter;" in drawn[0].caption
    assert "The search was fast, that is approximate:" in drawn[1].caption
    assert "is renewed every 4 steps over 1 noisy copy of it" in drawn[1].caption
    assert "The search was exact: a unit is removed at its activation;" in drawn[2].caption


def test_the_main_search_is_the_default_one():
    defaults = asdict(CriticalUnitsConfig())
    assert dict(MAIN_SEARCH) == {name: defaults[name] for name in MAIN_SEARCH} == SEARCH


def test_an_example_searched_twice_counts_once_with_the_removals_of_the_search_judged_on_most(store):
    config = make_config(seed=0)
    add_run(store, config)
    write(store, [example(config, 0, [(0, 0)], n_clean=10)], "few")
    write(store, [example(config, 0, [(3, 1), (3, 2)], n_clean=900)], "many")
    (row,) = searched_examples(load_tables(store)).rows(named=True)
    assert (row["unit_id"], row["n_removed"]) == ("many", 2)
    (drawn,) = draw_all(shared_units.draw, store)
    assert drawn.source.n_rows == 2


def test_without_noisy_examples_nothing_is_compared(store):
    config = make_config(seed=0, noise=0.0)
    add_run(store, config)
    add_critical_units(store, config)
    for function in DRAWING:
        (drawn,) = draw_all(function, store)
        assert "above noisy" not in drawn.caption
        assert "noisy examples have" not in drawn.caption
    assert [line.get_label() for line in draw_all(critical_units.draw, store)[0].figure.axes[0].lines] == [
        "clean",
        "_median",
    ]


def test_where_no_example_flipped_the_figure_is_skipped_with_what_to_change(store):
    config = make_config(seed=0)
    add_run(store, config)
    write(store, [example(config, 0, [(0, 0)], outcome="step_limit", flipped=False)])
    for function in (critical_units.draw, clean_split.draw):
        (skipped,) = outcomes(function, store)
        assert skipped.reason == "none of 1 searched example flipped; raise critical_units.max_steps"
    (skipped,) = outcomes(shared_units.draw, store)
    assert skipped.reason.startswith("no rows of flipped examples in table removed_units; run python sweeps/")


def test_cells_without_rows_are_skipped_by_name_and_the_split_without_a_word(store):
    for model in ("resnet9", "vit"):
        add_finished(store, make_config(seed=0, model=model))
    add_critical_units(store, make_config(seed=0, model="vit"), refresh=4)
    for function, name in ((critical_units.draw, "figure5"), (shared_units.draw, "shared_units")):
        drawn, skipped = outcomes(function, store)
        assert drawn.name == f"{name}_refresh=4-digits-vit"
        assert skipped.name == f"{name}-digits-resnet9"
        assert "run python sweeps/full_paper.py" in skipped.reason
    assert [drawn.name for drawn in draw_all(clean_split.draw, store)] == ["figure5_clean_split_refresh=4-digits-vit"]


# Clean examples split


def test_clean_examples_are_split_by_whether_an_early_epoch_was_right(store):
    hand_made(store)
    (drawn,) = draw_all(clean_split.draw, store)
    assert drawn.name == "figure5_clean_split-digits-resnet9"
    (axes,) = drawn.figure.axes
    assert [share_at(axes, "clean (right early)", x) for x in (1, 2, 4)] == [1, 0.5, 0]
    assert [share_at(axes, "clean (wrong early)", x) for x in (0.8, 1, 1000)] == [1, 0.5, 0.5]
    assert "the model after epoch 5 predicted them as assigned, as it did 33 % of the noisy ones." in drawn.caption
    assert "clean (right early) median 3, mean 3.000 (2 examples, 0 not flipped" in drawn.caption
    assert "clean (wrong early) median not flipped, mean 1.000 (2 examples, 1 not flipped" in drawn.caption
    assert "clean (wrong early) above noisy: AUC 0.750" in drawn.caption  # 1 ties with both, never is above both


def test_runs_without_an_early_state_are_left_out_of_the_split(store):
    for seed in (0, 1):
        add_run(store, make_config(seed=seed))
        add_critical_units(store, make_config(seed=seed), early=seed == 1)
    (drawn,) = draw_all(clean_split.draw, store)
    assert drawn.source.seeds == (1,)


def test_the_split_without_any_early_state_is_skipped_with_what_to_keep(store):
    add_run(store, make_config(seed=0))
    add_critical_units(store, make_config(seed=0), early=False)
    (skipped,) = outcomes(clean_split.draw, store)
    assert isinstance(skipped, Skipped)
    assert "train again with an early epoch among --set checkpoints.epochs" in skipped.reason


# Shared units


def test_shared_units_counts_over_how_many_examples_a_unit_is_critical(store):
    config = make_config(seed=0)
    add_run(store, config)
    clean = [[(3, 1)], [(3, 1), (3, 2)], [(3, 1), (3, 2), (3, 3), (0, 5)]]
    noisy = [[(3, 1)], [(3, 6)], [(3, 7), (3, 8)]]
    examples = [example(config, i, units) for i, units in enumerate(clean)]
    examples += [example(config, 3 + i, units, is_noisy=True) for i, units in enumerate(noisy)]
    write(store, examples)
    (drawn,) = draw_all(shared_units.draw, store)
    (axes,) = drawn.figure.axes
    assert [share_at(axes, "clean", x) for x in (0.8, 1, 2, 3)] == [1, 0.5, 0.25, 0]
    assert share_at(axes, "noisy", 1) == 0
    # Pairs of clean examples share 1, 1 and 2 units: 4/3.  By chance (1*2 + 1*4 + 2*4) / 3 / 288 = 0.016.
    assert "Of the 4 units removed for clean examples, a share of 0.500 is critical for exactly one; two clean" in (
        drawn.caption
    )
    assert "examples have 1.333 units in common of 2.333 each (0.016 if drawn at random from the" in drawn.caption
    assert "Of the 4 units removed for noisy examples, a share of 1.000 is critical for exactly one" in drawn.caption
    assert "Of the noisy examples' units, a share of 0.250 is a clean one's too." in drawn.caption


def test_shared_units_takes_equally_many_clean_and_noisy_examples_of_each_run(store):
    config = make_config(seed=0)
    add_run(store, config)
    examples = [example(config, i, [(3, i)]) for i in range(9)]
    write(store, [*examples, *(example(config, 20 + i, [(0, i)], is_noisy=True) for i in range(4))])
    (drawn,) = draw_all(shared_units.draw, store)
    assert "flipped clean and noisy examples of each run, 4 of each kind, drawn in the order" in drawn.caption
    assert drawn.source.n_rows == 8


def test_kinds_that_only_some_runs_have_are_named(store):
    for seed, is_noisy in ((0, (False, True)), (1, (False,))):
        config = make_config(seed=seed)
        add_run(store, config)
        found = [example(config, int(noisy), [(0, 0)], is_noisy=noisy, right_early=not noisy) for noisy in is_noisy]
        write(store, found, f"unit-{seed}")
    (figure5,), (split,), (shared,) = (draw_all(function, store) for function in DRAWING)
    only = "over 2 seeds. Only from 1 of 2 runs: 1 of 2 curves"
    assert f"{only} of (a) (kind noisy)." in figure5.caption
    assert "1 of 2 curves of (b) and of (c) (kind noisy)." in figure5.caption
    assert f"{only} (kind noisy)." in split.caption
    assert f"{only} (kind noisy)." in shared.caption
    assert [len(axes.collections) for axes in split.figure.axes] == [1]
