"""The heat map of a search: what is drawn is what the table holds."""

import pytest
from analysis_rows import add_finished, add_search, add_unit, make_config, search_rows
from matplotlib.patches import Rectangle

from analysis import dropout_search
from analysis.drawn import Drawn, Options, Skipped
from analysis.figures import draw_figures
from analysis.load import load_tables
from analysis.saving import save
from memlib.model_selection import best_setting
from memlib.results import create_results
from memlib.schemas import table_from_rows


@pytest.fixture
def store(tmp_path):
    return create_results(tmp_path / "results")


def drawn(store):
    found = list(dropout_search.draw(load_tables(store), Options()))
    assert all(isinstance(outcome, Drawn) for outcome in found)
    return found


def panels(figure):
    """The axes with a heat map, by their titles."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def shown(axes):
    """The drawn values by (p_gen, p_mem)."""
    p_gen = [float(label.get_text()) for label in axes.get_yticklabels()]
    p_mem = [float(label.get_text()) for label in axes.get_xticklabels()]
    values = axes.images[0].get_array()
    return {
        (g, m): float(values[i, k]) for i, g in enumerate(p_gen) for k, m in enumerate(p_mem) if not values.mask[i, k]
    }


def patches(axes, **wanted):
    return [
        p
        for p in axes.patches
        if isinstance(p, Rectangle) and all(getattr(p, f"get_{k}")() == v for k, v in wanted.items())
    ]


def test_each_cell_shows_its_trial_with_final_statistics_and_titles_the_control(store):
    rows = add_search(store, width=(0.25, 0.5), stopped=frozenset({(0.1, 0.05)}))
    (figure,) = drawn(store)
    assert (figure.name, figure.source.n_rows, figure.source.seeds) == (
        "dropout_search-digits-resnet9",
        len(rows),
        (0,),
    )
    found = panels(figure.figure)
    for measure, head in (("noisy_accuracy", "noisy training examples"), ("test_accuracy", "test examples")):
        for width in (0.25, 0.5):
            chosen = [r for r in rows if r["width"] == width and r["batchnorm"] == "final"]
            (control,) = [r[measure] for r in chosen if r["dropout"] == "none"]
            axes = found[f"{head}\nwidth {width}; no dropout: {control:.3f}"]
            expected = {(r["p_gen"], r["p_mem"]): r[measure] for r in chosen if r["dropout"] != "none"}
            assert shown(axes) == pytest.approx(expected)
            texts = [text.get_text() for text in axes.texts]
            assert sum("[3]" in text for text in texts) == 1
            assert len(patches(axes, hatch="////")) == 1


def test_places_have_a_line_of_their_own_and_titles_leave_the_colour_bar_free(store, tmp_path):
    places = ((), ("residual2", "conv4"), ("conv1", "conv2", "residual1", "conv3", "residual2"))
    for rows in (search_rows(), *(search_rows(0.3, 0.1, after=after) for after in places)):
        store.write("dropout_search", rows[0]["run_id"], table_from_rows("dropout_search", rows))
    (found,) = drawn(store)
    save(found.figure, tmp_path, "a")
    titles = [title.splitlines()[1] for title in panels(found.figure)]
    expected = {"after own places", "after residual2+conv4", "after conv1+conv2+re…dual1+conv3+residual2"}
    assert set(titles) == expected
    bars = [axes.get_window_extent() for axes in found.figure.axes if not axes.get_title()]
    for axes in panels(found.figure).values():
        title = axes.title.get_window_extent()
        assert not any(title.overlaps(bar) for bar in bars), axes.get_title()


def test_the_best_setting_by_validation_is_framed_once_a_measure_and_told_with_its_gain(store):
    rows = add_search(store, width=(0.25, 0.5))
    (figure,) = drawn(store)
    (best,) = best_setting(rows)
    framed = {title: patches(axes, linewidth=2) for title, axes in panels(figure.figure).items()}
    assert {title for title, frames in framed.items() if frames} == {
        title for title in framed if f"width {best['width']:g};" in title
    }
    (frame,) = next(frames for frames in framed.values() if frames)
    place = (sorted({r["p_mem"] for r in rows if r["p_mem"]}).index(best["p_mem"]),)
    assert round(frame.get_x() + 0.47) == place[0]
    (control,) = [r for r in rows if r["dropout"] == "none" and r["width"] == best["width"]]
    gain = 100 * (best["test_accuracy"] - control["test_accuracy"])
    assert f"p_gen {best['p_gen']:g}, p_mem {best['p_mem']:g}" in figure.caption
    assert f"the gain on test over that is {gain:+.1f} points" in figure.caption
    (trial,) = [r for r in rows if r["run_id"] == best["run_id"] and r["batchnorm"] == "final"]
    dropping = 100 * (trial["test_accuracy"] - trial["scaled_test_accuracy"])
    assert f"Dropping changes its own test accuracy by {dropping:+.1f} points (the paper's Table 1" in figure.caption


def test_a_search_of_which_only_the_control_has_ended_is_skipped(store):
    found = search_rows()
    store.write("dropout_search", found[0]["run_id"], table_from_rows("dropout_search", found))
    (outcome,) = dropout_search.draw(load_tables(store), Options())
    assert isinstance(outcome, Skipped)
    assert "no trial with dropout has ended yet" in outcome.reason


def test_a_cell_of_which_some_seeds_were_stopped_shows_those_that_were_not(store):
    ended, stopped = search_rows(0.1, 0.1), search_rows(0.1, 0.1, seed=1, stopped=True)
    for found in (ended, stopped):
        store.write("dropout_search", found[0]["run_id"], table_from_rows("dropout_search", found))
    (figure,) = drawn(store)
    (final,) = [r for r in ended if r["batchnorm"] == "final"]
    (axes,) = [axes for title, axes in panels(figure.figure).items() if title.startswith("test")]
    assert shown(axes) == pytest.approx({(0.1, 0.1): final["test_accuracy"]})
    assert not any("[" in text.get_text() for text in axes.texts)
    assert "A cell is the mean over the seeds that were tried" in figure.caption


def test_what_was_not_tried_is_left_grey(store):
    for point in ((0.1, 0.1), (0.3, 0.2), ()):
        found = search_rows(*point)
        store.write("dropout_search", found[0]["run_id"], table_from_rows("dropout_search", found))
    (figure,) = drawn(store)
    for axes in panels(figure.figure).values():
        assert set(shown(axes)) == {(0.1, 0.1), (0.3, 0.2)}


def test_seeds_are_averaged_and_searches_on_other_data_are_not(store):
    rows = [*add_search(store, seed=0), *add_search(store, seed=1)]
    add_search(store, limit=500)
    many, few = sorted(drawn(store), key=lambda figure: figure.source.seeds, reverse=True)
    assert (many.name, few.name) == (
        "dropout_search-digits-resnet9-data.limit=none",
        "dropout_search-digits-resnet9-data.limit=500",
    )
    test = next(axes for title, axes in panels(many.figure).items() if title.startswith("test"))
    cell = [r["test_accuracy"] for r in rows if (r["p_gen"], r["p_mem"], r["batchnorm"]) == (0.3, 0.1, "final")]
    assert len(cell) == 2
    assert shown(test)[0.3, 0.1] == pytest.approx(sum(cell) / 2)


def test_a_search_before_any_trial_has_ended_is_drawn_without_a_choice(store):
    found = search_rows(0.1, 0.1, stopped=True)
    store.write("dropout_search", "unit", table_from_rows("dropout_search", found))
    (figure,) = drawn(store)
    assert "No trial was trained to the end." in figure.caption
    assert all("no control yet" in title for title in panels(figure.figure))


def test_trials_are_in_no_other_figure_and_no_search_is_no_figure(store, tmp_path):
    config = make_config(seed=0)
    add_finished(store, config)
    assert drawn(store) == []
    before, _ = draw_figures(load_tables(store), tmp_path / "before", only=["learning_curves"])
    add_search(store)
    after, _ = draw_figures(load_tables(store), tmp_path / "after", only=["learning_curves"])
    assert [path.name for path in before] == [path.name for path in after]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(before, after, strict=True) if a.suffix == ".png")


def test_trials_that_other_devices_made_are_told_in_the_index(store, tmp_path):
    trials = {row["run_id"] for row in add_search(store)}
    for i, trial in enumerate(sorted(trials)):
        add_unit(store, trial, trial, "dropout_search", device="cuda" if i == 0 else "cpu")
    draw_figures(load_tables(store), tmp_path, only=["dropout_search"])
    assert "The units of work differ in device (cpu, cuda). [PDF]" in (tmp_path / "index.md").read_text()
