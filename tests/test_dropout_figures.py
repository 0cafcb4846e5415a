"""Table 1, Figure 6 and Figure 7 from rows written by hand, and the tables beside figures."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from analysis_rows import (
    add_dropout,
    add_epochs,
    add_finished,
    add_forgotten,
    add_run,
    dropout_rows,
    make_config,
    make_dropout_config,
)
from hypothesis import given
from hypothesis import strategies as st

from analysis import dropout_schematic, forgotten_images, learning_curves, table1
from analysis.drawn import Drawn, Options, Outcome, Skipped
from analysis.dropouts import controls_of, tied_cells
from analysis.figures import FIGURES, draw_figures
from analysis.load import load_tables
from analysis.style import STROKES
from analysis.tables import Column, Table, save_tables, to_latex, to_markdown
from memlib.results import ResultStore, create_results
from memlib.schemas import table_from_rows

KINDS = ("example_tied", "none", "standard", "channel", "sparse")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return create_results(tmp_path / "results")


def outcomes(function, store: ResultStore) -> list[Outcome]:
    return list(function(load_tables(store), Options()))


def draw_one(function, store: ResultStore) -> Drawn:
    (drawn,) = outcomes(function, store)
    assert isinstance(drawn, Drawn), drawn
    return drawn


def add_table_1(store: ResultStore, *, seeds: tuple[int, ...] = (0, 1), dataset: str = "digits") -> dict[str, list]:
    """Runs of every kind, and their rows of table `dropout`; of the baseline its last epoch's, as mode plain."""
    rows = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for seed in seeds:
            config = make_dropout_config(kind, seed=seed, dataset=dataset)
            rows[kind] += add_dropout(store, config)
            if kind == "none":
                last = [r for r in add_epochs(store, config) if r["epoch"] == config.training.epochs]
                rows[kind] += [{**r, "mode": "plain", "batchnorm": "final", "rescaled": False} for r in last]
    return rows


def spelt(rows: list[dict], mode: str, split: str, batchnorm: str = "final", *, rescaled: bool = False) -> str:
    """Mean and sample standard deviation in percent, in plain Python."""
    how = (mode, split, batchnorm, rescaled)
    found = [100 * r["accuracy"] for r in rows if (r["mode"], r["split"], r["batchnorm"], r["rescaled"]) == how]
    return f"{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}"


# Table 1


def test_table_1_holds_before_and_after_beside_the_papers_numbers_and_the_controls(store):
    rows = add_table_1(store, dataset="mnist")
    drawn = draw_one(table1.draw, store)
    assert drawn.name == "table1-mnist-resnet9"
    table, variants = drawn.tables
    splits = ("clean", "noisy", "test")
    tied = rows["example_tied"]
    before = [spelt(tied, mode, split) for mode, split in zip(("tied", "tied", "scaled"), splits, strict=True)]
    assert table.rows == (
        ("example-tied dropout", *before, *(spelt(tied, "dropped", split) for split in splits)),
        ("the paper's", "100.0", "100.0", "99.0", "99.2", "0.1", "99.3"),
        *(
            (name, *(spelt(rows[kind], "plain", split) for split in splits), "—", "—", "—")
            for kind, name in (
                ("none", "no dropout"),
                ("standard", "standard dropout"),
                ("channel", "channel dropout"),
                ("sparse", "fixed sparse network"),
            )
        ),
    )
    assert [row[1:] for row in variants.rows] == [
        tuple(spelt(tied, mode, split, batchnorm, rescaled=rescaled) for split in splits)
        for mode, batchnorm, rescaled in (
            ("scaled", "final", False),
            ("dropped", "final", False),
            ("dropped", "recalibrated", False),
            ("dropped", "final", True),
        )
    ]


def test_the_papers_table_1_is_its_own():
    assert table1.PAPER == {
        "cifar10": (99.9, 99.3, 79.3, 90.8, 3.1, 82.7),
        "mnist": (100, 100, 99.0, 99.2, 0.1, 99.3),
        "svhn": (99.9, 99.6, 89.5, 95.8, 1.4, 89.6),
    }


def test_table_1_as_a_figure_draws_each_network_and_the_paper_as_open_markers(store):
    rows = add_table_1(store, dataset="cifar10")
    drawn = draw_one(table1.draw, store)
    left, right = drawn.figure.axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[0] == "no dropout"
    assert names[-2:] == ["example-tied, before", "example-tied, dropped"]
    for axes, split in ((left, "noisy"), (right, "test")):
        (container,) = [c for c in axes.containers if c[0].get_color() == STROKES[split].colour]
        dropped = [100 * r["accuracy"] for r in rows["example_tied"] if (r["mode"], r["split"]) == ("dropped", split)]
        plain = [r for r in rows["example_tied"] if r["mode"] == "dropped" and r["split"] == split]
        main = [100 * r["accuracy"] for r in plain if r["batchnorm"] == "final" and not r["rescaled"]]
        assert set(main) < set(dropped)
        assert container[0].get_xdata()[-1] == pytest.approx(statistics.fmean(main))
        papers = [line.get_xdata()[0] for line in axes.lines if line.get_fillstyle() == "none"]
        assert papers[-1] == {"noisy": 3.1, "test": 82.7}[split]


def test_a_split_that_one_of_the_runs_has_is_named_and_has_no_spread(store):
    for seed, splits in ((0, ("clean", "noisy", "test")), (1, ("clean", "test"))):
        config = make_dropout_config("example_tied", seed=seed)
        rows = [row for row in add_dropout(store, config) if row["split"] in splits]
        store.write("dropout", config.run_id, table_from_rows("dropout", rows))
    drawn = draw_one(table1.draw, store)
    assert "over 2 seeds. Only from 1 of 2 runs: 5 of 14 points (split noisy). " in drawn.caption
    clean, noisy = drawn.figure.axes[0].collections[:2]
    assert [[len(bar) for bar in bars.get_segments()] for bars in (clean, noisy)] == [[2, 2], [0, 0]]


def test_a_single_seed_has_no_spread_and_a_control_of_other_seeds_is_named(store):
    add_table_1(store, seeds=(0,))
    add_dropout(store, make_dropout_config("sparse", seed=1))
    drawn = draw_one(table1.draw, store)
    assert "One seed, so no spread is shown. Other seeds: fixed sparse network 2 seeds." in drawn.caption
    tied, *controls = drawn.tables[0].rows
    assert not any("±" in entry for entry in tied)
    assert "±" in controls[-1][1]


def test_controls_that_differ_in_what_was_recorded_are_one_line_of_all_their_seeds(store):
    rows = add_table_1(store, seeds=(0, 1))
    for seed in (1, 2):  # seed 1 once more, evaluated less often
        config = make_dropout_config("sparse", seed=seed)
        config = replace(config, training=replace(config.training, evaluate_every=7))
        found = add_dropout(store, config)
        rows["sparse"] += found if seed == 2 else []
    cells = tied_cells(load_tables(store))
    assert [len(found) for found in controls_of(load_tables(store), cells[0]).values()] == [1, 1, 1, 2]
    drawn = draw_one(table1.draw, store)
    (line,) = [row for row in drawn.tables[0].rows if row[0] == "fixed sparse network"]
    assert line[1:4] == tuple(spelt(rows["sparse"], "plain", split) for split in ("clean", "noisy", "test"))
    assert "Other seeds: fixed sparse network 3 seeds." in drawn.caption


def test_example_tied_dropout_of_two_settings_is_two_tables_each_with_its_own_controls(store):
    for p_gen in (0.25, 0.5):
        for kind in ("example_tied", "sparse", "standard"):
            add_dropout(store, make_dropout_config(kind, seed=0, p_gen=p_gen))
    add_dropout(store, make_dropout_config("none", seed=0))
    add_dropout(store, make_dropout_config("standard", seed=0, p_drop=0.3))
    results = load_tables(store)
    cells = tied_cells(results)
    assert [cell.title for cell in cells] == [f"digits, resnet9, dropout.p_gen={p}" for p in (0.25, 0.5)]
    for cell, p_gen in zip(cells, ("0.25", "0.5"), strict=True):
        controls = controls_of(results, cell)
        assert list(controls) == ["no dropout", "standard dropout", "standard dropout, p 0.3", "fixed sparse network"]
        for name in ("fixed sparse network", "standard dropout"):
            (control,) = controls[name]
            assert f"dropout.p_gen={p_gen}" in control.setting
    assert [o.name for o in outcomes(table1.draw, store)] == [
        f"table1-digits-resnet9-dropout.p_gen={p}" for p in (0.25, 0.5)
    ]


def test_without_noise_there_is_no_noisy_column_entry_and_no_word_of_it(store):
    config = make_dropout_config("example_tied", seed=0)
    add_run(store, config)
    rows = [row for row in dropout_rows(config) if row["split"] != "noisy"]
    store.write("dropout", config.run_id, table_from_rows("dropout", rows))
    drawn = draw_one(table1.draw, store)
    entries = drawn.tables[0].rows[0]
    assert (entries[2], entries[5]) == ("—", "—")
    assert "Example-tied dropout: test " in drawn.caption


def test_runs_on_another_schedule_or_share_of_noise_are_no_controls(store):
    add_dropout(store, make_dropout_config("example_tied", seed=0))
    add_finished(store, make_config(seed=0))  # a main run: cosine, other epochs
    results = load_tables(store)
    (cell,) = tied_cells(results)
    assert controls_of(results, cell) == {}
    assert [row[0] for row in draw_one(table1.draw, store).tables[0].rows] == ["example-tied dropout"]


# Main runs beside them


def test_table_1_changes_neither_names_nor_number_of_the_main_figures(store):
    def names() -> list[str]:
        """Of all figures drawn and skipped."""
        results = load_tables(store)
        return [outcome.name for _, draw in FIGURES for outcome in draw(results, Options())]

    for seed in (0, 1):
        add_finished(store, make_config(seed=seed), groups=("stem", "head"))
    before = names()
    add_table_1(store)
    after = names()
    assert [name for name in before if name != "table1"] == [
        n for n in after if not n.startswith(("table1", "figure6", "figure7"))
    ]
    assert {"table1-digits-resnet9", "figure6"} < set(after)
    assert draw_one(learning_curves.draw, store).source.n_runs == 2


def test_a_run_without_dropout_is_a_control_only_beside_dropout_and_without_recorded_gradients(store):
    add_run(store, make_dropout_config("none", seed=0))
    assert [cell.is_main for cell in load_tables(store).cells] == [True]
    add_run(store, make_dropout_config("example_tied", seed=0))
    assert [(c.setting, c.is_main) for c in load_tables(store).cells] == [
        ("dropout.kind=example_tied", False),
        ("dropout.kind=none", False),
    ]
    add_run(store, make_config(seed=0))
    assert [c.setting for c in load_tables(store).cells if c.is_main] == [""]


# Figure 6


def test_figure_6_is_drawn_once_if_there_is_a_run_with_example_tied_dropout(store):
    add_run(store, make_config(seed=0))
    assert outcomes(dropout_schematic.draw, store) == []
    for seed in (0, 1):
        add_run(store, make_dropout_config("example_tied", seed=seed))
    drawn = draw_one(dropout_schematic.draw, store)
    assert (drawn.name, len(drawn.figure.axes)) == ("figure6", 2)
    titles = [axes.get_title(loc="left") for axes in drawn.figure.axes]
    assert [title[:3] for title in titles] == ["(a)", "(b)"]


# Figure 7


@pytest.mark.parametrize(("names", "colours", "columns"), [(tuple("0123456789"), 1, 7), (CIFAR10, 3, 5)])
def test_figure_7_shows_the_images_most_strongly_forgotten_first_with_class_names(store, names, colours, columns):
    config = make_dropout_config("example_tied", seed=0)
    add_dropout(store, config)
    rows = add_forgotten(store, config, range(3, 50), names=names, colours=colours)
    drawn = draw_one(forgotten_images.draw, store)
    assert drawn.name == "figure7-digits-resnet9"
    panels = [axes for axes in drawn.figure.axes if axes.images]
    assert len(panels) == 5 * columns
    for axes, row in zip(panels, rows, strict=False):
        pixels = axes.images[0].get_array()
        assert pixels.shape == ((8, 8) if colours == 1 else (8, 8, 3))
        assert 255 * float(pixels.flat[0]) == pytest.approx(40 + row["example_id"] % 200, abs=0.01)
        assert re.split(r"\s*→\s*", axes.get_title()) == [row["assigned_name"], row["new_name"]]
    assert f"forgotten in all: {len(rows)} of 1294 (seed 0) clean examples." in drawn.caption
    assert drawn.tables[0].rows[0] == ("3", names[3], names[4], "-9.00")


def test_an_example_forgotten_in_several_runs_is_shown_once_at_its_lowest_margin(store):
    for seed, ids in ((0, range(2, 5)), (1, range(4, 7))):
        config = make_dropout_config("example_tied", seed=seed)
        add_dropout(store, config)
        add_forgotten(store, config, ids)
    drawn = draw_one(forgotten_images.draw, store)
    assert sorted(row[0] for row in drawn.tables[0].rows) == ["2", "3", "4", "5", "6"]
    assert [row[3] for row in drawn.tables[0].rows if row[0] == "4"] == ["-9.00"]
    assert "3 of 1294 (seed 0), 3 of 1294 (seed 1)" in drawn.caption


def test_long_class_names_leave_room_for_one_image_a_row_at_least(store):
    config = make_dropout_config("example_tied", seed=0)
    add_dropout(store, config)
    add_forgotten(store, config, range(3), names=tuple(f"a very long name of class {i}" for i in range(3)))
    drawn = draw_one(forgotten_images.draw, store)
    titles = [axes.get_title() for axes in drawn.figure.axes if axes.images]
    assert len(set(titles)) == 3
    assert max(len(line) for title in titles for line in title.split("\n")) <= 15


def test_figure_7_without_rows_says_why(store):
    assert outcomes(forgotten_images.draw, store) == []
    add_dropout(store, make_dropout_config("example_tied", seed=0))
    (skipped,) = outcomes(forgotten_images.draw, store)
    assert isinstance(skipped, Skipped)
    assert skipped.reason.startswith("no clean example is forgotten, or these runs are older than table")


# Tables as Markdown and LaTeX

SPECIAL = "&%$#_{}~^\\<>|*`[]±−×→ρ—–…’"
texts = st.text(st.sampled_from(SPECIAL + "ab 1\n"), max_size=12)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), texts, texts)
def test_every_text_is_escaped_so_that_it_stays_in_its_cell(rows, title, group):
    table = Table(title, title, (Column("name"), Column("value", group)), tuple(rows))
    latex, markdown = to_latex(table), to_markdown(table)
    body = latex.split("\\midrule\n")[1].split("\\bottomrule")[0]
    assert body.count("\n") == len(rows)
    for line in body.splitlines():
        assert line.endswith(" \\\\")
        assert len(re.findall(r"(?<!\\)&", line)) == 1
    bare = re.sub(r"\\[&%$#_{}]", "", latex)  # what is left of special characters is LaTeX's own
    assert not set(bare) & set("%#^~*`±−×→ρ—–…’") - ({"*"} if "{*}" in bare else set())
    assert bare.count("$") % 2 == 0
    assert bare.count("{") == bare.count("}")
    lines = markdown.splitlines()
    assert len(lines) == 2 + 2 + len(rows)
    for line in lines[2:]:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
    assert "p_mem" in to_markdown(Table("", "", (Column("p_mem"),), ()))


def test_columns_of_one_group_share_a_head_in_latex_and_say_so_in_markdown():
    columns = (Column("network"), Column("clean", "before"), Column("test", "before"), Column("test", "after"))
    table = Table("Title", "Caption", columns, (("ours", "1", "2", "3"),))
    latex = to_latex(table)
    assert r"\multicolumn{1}{c}{} & \multicolumn{2}{c}{before} & \multicolumn{1}{c}{after} \\" in latex
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-4}" in latex
    assert r"\caption{Title. Caption}" in latex
    assert "| network | before: clean | before: test | after: test |" in to_markdown(table)
    with pytest.raises(ValueError, match="a row has 1 entries, the table 4 columns"):
        Table("Title", "Caption", columns, (("ours",),))


def test_tables_lie_beside_their_picture_and_leave_with_it(store, tmp_path):
    add_table_1(store)
    folder = tmp_path / "figures"
    draw_figures(load_tables(store), folder, only=["table1", "figure6"])
    files = {folder / f"table1-digits-resnet9.{ending}" for ending in ("png", "pdf", "md", "tex")}
    assert all(path.exists() for path in files)
    index = (folder / "index.md").read_text()
    assert "| example-tied dropout |" in index
    assert "[LaTeX](table1-digits-resnet9.tex)" in index
    mine = folder / "figure6.md"
    mine.write_text("my own")  # a figure without tables: this is none of its files
    for kind in KINDS:
        for seed in (0, 1):
            config = make_dropout_config(kind, seed=seed)
            row = {**store.read("runs").to_pylist()[0], "run_id": config.run_id, "status": "failed", "error": "lost"}
            row.pop("unit_id")
            store.write("runs", config.run_id, table_from_rows("runs", [row]))
    draw_figures(load_tables(store), folder)
    assert not any(path.exists() for path in files)
    assert mine.exists()
    assert save_tables((), folder, "nothing") == []
