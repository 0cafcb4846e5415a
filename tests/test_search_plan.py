"""What a search wants, what of it is done, what Tune's scheduler makes of it, and what the report says."""

import math
from dataclasses import replace

import numpy as np
import pytest
from analysis_rows import search_rows
from test_trials import row

from memlib.config import DataConfig, RunConfig, config_to_json
from memlib.datasets import load_dataset
from memlib.errors import InputError
from memlib.results import create_results
from memlib.schemas import table_from_rows
from memlib.trials import TABLE, trial_unit
from sweeps.cluster import QUIET
from sweeps.costs import image_flops
from sweeps.search_costs import epochs_if_halved, trial_cost
from sweeps.search_plan import Search, continue_search, plan_search, search_defaults, trial_label
from sweeps.search_report import report_lines

SPACE = {"p_gen": [0.2, 0.3, 0.5], "p_mem": [0.1, 0.2], "width": [0.25, 0.5]}


def plan(settings=None, space=None, seeds=(0,)):
    return plan_search("digits", settings or {}, {**SPACE, **(space or {})}, seeds)


def points(trials):
    return {(t.dropout.p_gen, t.dropout.p_mem, t.model.width, t.seed) for t in trials}


def test_a_search_tries_every_combination_and_one_control_a_width_and_seed():
    found = plan(seeds=(0, 1))
    combinations = {(g, m, w, s) for g in (0.2, 0.3, 0.5) for m in (0.1, 0.2) for w in (0.25, 0.5) for s in (0, 1)}
    assert points(found.trials) == combinations
    assert len(found.trials) == len(combinations)
    assert {(c.dropout.kind, c.model.width, c.seed) for c in found.controls} == {
        ("none", w, s) for w in (0.25, 0.5) for s in (0, 1)
    }
    assert len(found.controls) == 4
    assert found.runs[:4] == found.controls


def test_a_control_differs_from_its_trials_in_the_dropout_alone():
    found = plan()
    for trial in found.trials:
        assert replace(trial, dropout=found.controls[0].dropout) in found.controls


def test_rates_and_places_are_axes_too():
    found = plan(space={"width": [0.25], "peak_lr": [0.05, 0.1], "after": ["own", "conv3+conv4"]})
    assert len(found.trials) == 3 * 2 * 2 * 2
    assert {t.dropout.after for t in found.trials} == {(), ("conv3", "conv4")}
    assert {c.training.peak_lr for c in found.controls} == {0.05, 0.1}
    assert len(found.controls) == 2


def test_more_samples_only_add_to_fewer():
    few, more, every = (plan(space={"samples": n}).trials for n in (3, 7, None))
    assert len(few) == 3
    assert points(few) < points(more) < points(every)
    assert every[:7] == more


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10", "folder:somewhere"])
def test_every_data_set_has_defaults_that_hold_something_out_and_make_a_heat_map(dataset):
    found = plan_search(dataset, {}, {}, [0])
    assert len({t.dropout.p_gen for t in found.trials}) >= 3
    assert len({t.dropout.p_mem for t in found.trials}) >= 3
    assert all(run.data.holdout == 0.1 and not run.training.gradient_accounting for run in found.runs)
    assert found.rungs[0] == found.grace == math.ceil(found.epochs / 3)
    assert search_defaults(dataset)[0]["data"]["name"] == dataset


def test_grace_is_a_third_of_the_epochs_that_are_asked_for():
    assert plan_search("cifar10", {"training": {"epochs": 80}}, {}, [0]).rungs == (27,)
    assert plan_search("cifar10", {"training": {"epochs": 1}}, {}, [0]).rungs == ()


def test_trials_are_compared_at_grace_times_powers_of_the_reduction():
    assert plan({"training": {"epochs": 40}}, {"grace": 4, "reduction": 3.0}).rungs == (4, 12, 36)
    assert plan({"training": {"epochs": 36}}, {"grace": 4, "reduction": 3.0}).rungs == (4, 12)
    assert plan({"training": {"epochs": 12}}, {"grace": 3, "reduction": 1.5}).rungs == (3, 5, 7, 11)


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({"dropout": {"p_gen": 0.2}}, {}, "dropout.p_gen cannot be given with --set.*use --p-gen"),
        ({"seed": 3}, {}, "use --seeds"),
        ({"data": {"holdout": None}}, {}, "nothing is held out to choose by; set --holdout"),
        ({"training": {"epochs": 3}}, {"grace": 4}, "--grace is 4 but trials have 3 epochs; lower it"),
        ({}, {"grace": 0}, "--grace is 0; give at least 1 epoch"),
        ({}, {"reduction": 1.0}, "--reduction is 1.0; give a number above 1"),
        ({}, {"samples": 0}, "--samples is 0; give at least 1"),
        ({}, {"p_gen": []}, "the search has no value for p_gen"),
        ({}, {"p_gen": [1.5]}, "dropout.p_gen is 1.5; give a share in"),
        ({"training": {"epoch": 3}}, {}, "did you mean 'training.epochs'"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(settings, space, message):
    with pytest.raises(InputError, match=message):
        plan(settings, space)


def test_a_trial_is_named_by_what_sets_it_apart():
    found = plan(space={"p_gen": [0.2], "p_mem": [0.1], "width": [0.5], "after": ["conv3"]})
    assert trial_label(found.trials[0]) == "p_gen 0.2 p_mem 0.1 after conv3 width 0.5 lr 0.1 seed 0"
    assert trial_label(found.controls[0]) == "no dropout width 0.5 lr 0.1 seed 0"


# Wanted minus done


def add_result(store, run, *, epochs, accuracy=0.5):
    (found, *_) = search_rows(*((0.2, 0.1) if run.dropout.kind != "none" else ()))
    facts = {"run_id": run.run_id, "config": config_to_json(run), "epochs": epochs}
    outcome = {"stopped_early": epochs < run.training.epochs, "validation_curve": [accuracy] * (epochs + 1)}
    store.write(TABLE, trial_unit(run).unit_id, table_from_rows(TABLE, [{**found, **facts, **outcome}]))


def test_finished_trials_are_done_and_stopped_ones_are_where_they_were_stopped(tmp_path):
    store, found = create_results(tmp_path), plan({"training": {"epochs": 12}}, {"grace": 4})
    finished, stopped, begun = found.trials[:3]
    add_result(store, finished, epochs=12, accuracy=0.8)
    add_result(store, stopped, epochs=4, accuracy=0.3)
    add_result(store, begun, epochs=3)
    add_result(store, found.controls[0], epochs=12)
    search = continue_search(found, store)
    assert search.to_do == (*found.controls[1:], *found.trials[2:])
    assert search.curves == {finished.run_id: [0.8] * 13, stopped.run_id: [0.3] * 5}


def test_a_trial_stopped_before_a_longer_grace_is_over_is_wanted_again(tmp_path):
    store = create_results(tmp_path)
    found = plan({"training": {"epochs": 12}}, {"grace": 4})
    add_result(store, found.trials[0], epochs=4)
    assert found.trials[0] not in continue_search(found, store).to_do
    longer = plan({"training": {"epochs": 12}}, {"grace": 5})
    assert found.trials[0] in continue_search(longer, store).to_do


def test_a_larger_grid_wants_only_what_is_new(tmp_path):
    store, small = create_results(tmp_path), plan(space={"p_gen": [0.2]})
    for run in small.runs:
        add_result(store, run, epochs=36)
    assert continue_search(small, store).to_do == ()
    to_do = continue_search(plan(), store).to_do
    assert points(to_do) == points(plan().trials) - points(small.trials)


# The scheduler


class TuneTrial:
    def __init__(self, run, trial_id):
        self.config, self.trial_id = {"config": config_to_json(run)}, trial_id


@pytest.fixture(scope="module")
def halving_of():
    import os

    os.environ.update(QUIET)  # before Ray is imported
    from sweeps.search_trials import Halving

    return Halving


def report(halving, trial, epoch, accuracy):
    return halving.on_trial_result(None, trial, {"epoch": epoch, "accuracies/validation": accuracy})


def test_a_trial_stops_where_it_is_below_the_best_third_of_those_before_it(halving_of):
    found = plan({"training": {"epochs": 12}}, {"grace": 2, "reduction": 3.0})
    halving = halving_of(Search(found, found.runs, {}))
    draws, at_rung = np.random.default_rng(0).random(12), []
    for i, (run, accuracy) in enumerate(zip(found.trials, draws, strict=True)):
        trial = TuneTrial(run, str(i))
        halving.on_trial_add(None, trial)
        assert [report(halving, trial, epoch, accuracy) for epoch in (0, 1)] == ["CONTINUE"] * 2
        is_low = bool(at_rung) and accuracy < np.percentile(at_rung, 100 * 2 / 3)
        assert report(halving, trial, 2, accuracy) == ("STOP" if is_low else "CONTINUE")
        assert (run.run_id in halving.stopped) == is_low
        at_rung.append(accuracy)
    assert 4 <= len(halving.stopped) < 12


def test_controls_neither_count_nor_stop_and_nothing_stops_after_its_last_epoch(halving_of):
    found = plan({"training": {"epochs": 4}}, {"grace": 2, "reduction": 2.0})
    halving = halving_of(Search(found, found.runs, {}))
    good, bad, control = (TuneTrial(run, run.run_id) for run in (*found.trials[:2], found.controls[0]))
    for trial in (control, good, bad):
        halving.on_trial_add(None, trial)
    assert [report(halving, control, epoch, 0.99) for epoch in range(5)] == ["CONTINUE"] * 5
    assert [report(halving, good, epoch, 0.5) for epoch in range(5)] == ["CONTINUE"] * 5
    halving.on_trial_complete(None, control, {"epoch": 4, "accuracies/validation": 0.99})
    assert report(halving, bad, 2, 0.5) == "CONTINUE"  # not below 0.5: the control did not count
    assert report(halving, bad, 4, 0.1) == "CONTINUE"
    assert halving.on_trial_result(None, bad, {"error": "why"}) == "CONTINUE"
    assert halving.stopped == set()


def test_trials_done_before_count_as_if_they_had_just_reported(halving_of):
    found = plan({"training": {"epochs": 9}}, {"grace": 1, "reduction": 2.0})
    done = {run.run_id: [0.1, *np.linspace(0.2 + 0.1 * i, 0.9, 9)] for i, run in enumerate(found.trials[:3])}
    fresh, continued = halving_of(Search(found, found.runs, {})), halving_of(Search(found, found.runs[5:], done))
    for run in found.trials[:3]:
        trial = TuneTrial(run, run.run_id)
        fresh.on_trial_add(None, trial)
        for epoch, accuracy in enumerate(done[run.run_id]):
            report(fresh, trial, epoch, accuracy)
    for accuracy in (0.25, 0.3, 0.35):
        trial = TuneTrial(found.trials[5], f"new {accuracy}")
        decisions = []
        for halving in (fresh, continued):
            halving.on_trial_add(None, trial)
            decisions.append(report(halving, trial, 1, accuracy))
        assert decisions[0] == decisions[1]
    assert fresh.stopped == continued.stopped == {found.trials[5].run_id}


# Cost


def test_the_least_cost_is_that_of_one_in_so_many_going_on():
    found = plan({"training": {"epochs": 20}}, {"grace": 4, "reduction": 4.0})
    assert epochs_if_halved(found) == {4: 0.75, 16: 0.1875, 20: 0.0625}


def test_a_trials_cost_counts_its_steps_and_what_is_judged():
    found, dataset = plan(), load_dataset("digits", image_size=16)
    run, n = found.trials[0], len(dataset.train)
    held_out, kept, test = n // 10, n - n // 10, len(dataset.test)
    passes = 5 * (3 * kept + held_out) + kept + held_out + 2 * test
    per_image = image_flops(run, dataset)
    assert trial_cost(run, dataset, {5: 1.0}).flops == pytest.approx(passes * per_image, rel=0.01)
    whole = trial_cost(run, dataset, {run.training.epochs: 1.0}).flops
    assert trial_cost(run, dataset, {5: 0.5, run.training.epochs: 0.5}).flops == pytest.approx(
        (passes * per_image + whole) / 2, rel=0.01
    )


# The report


def reported(*args, test, clean=0.9, noisy=0.1, seed=0, data_seed=None, **facts):
    measures = {"clean_accuracy": clean, "noisy_accuracy": noisy, "n_test": 2500, "scaled_test_accuracy": test - 0.01}
    config = config_to_json(RunConfig(data=DataConfig(seed=data_seed), seed=seed))
    return {**row(*args, test=test, seed=seed, **facts), **measures, "run_id": f"{args} {seed}", "config": config}


def test_the_report_says_what_the_choice_is_worth_on_test_and_what_the_test_set_would_have_chosen():
    rows = [
        reported(0.2, 0.80, test=0.80),
        reported(0.3, 0.85, test=0.75),
        reported(0.4, 0.84, test=0.75),
        reported(0.5, 0.40, test=0.90, stopped_early=True),
        reported(None, 0.70, test=0.72, dropout="none", clean=1.0, noisy=1.0),
    ]
    lines = report_lines(rows, "cifar10")
    assert lines[0] == "4 trials: 3 trained to the end, 1 stopped early"
    assert lines[1].startswith("best by validation: p_gen 0.3, p_mem 0.1, width 0.5, after own")
    # sqrt(0.85 * 0.15 / 1000) = 0.011
    assert lines[2] == (
        "  validation 85.0 % (± 1.1: 2 of 3 settings trained to the end lie within that); "
        "memorization neurons dropped: clean 90.0 %, noisy 10.0 %, test 75.0 %"
    )
    # like with like: the paper's 82.7 and 79.3 are of one network, dropped and before
    assert lines[3] == "  dropping changes its own test accuracy by +1.0 points (the paper's Table 1: +3.4)"
    assert lines[4] == "no dropout at the same budget: validation 70.0 %; clean 100.0 %, noisy 100.0 %, test 72.0 %"
    # sqrt((0.75 * 0.25 + 0.72 * 0.28) / 2500) = 0.0125
    assert lines[5].startswith("gain on test over no dropout: +3.0 points (± 1.2, sampling of the test images; 1 seed)")
    assert "+8.0 points with p_gen 0.2" in lines[6]
    assert "too high to expect" in lines[6]


@pytest.mark.parametrize(("data_seed", "error"), [(None, "± 0.8"), (5, "± 1.1")])
def test_images_that_several_seeds_hold_out_alike_count_once(data_seed, error):
    # sqrt(0.85 * 0.15 / 2000) = 0.008
    rows = [reported(0.3, 0.85, test=0.75, seed=seed, data_seed=data_seed) for seed in (0, 1)]
    assert f"validation 85.0 % ({error}: 1 of 1 settings" in report_lines(rows, "cifar10")[2]


def test_the_report_says_when_the_paper_is_silent():
    rows = [reported(0.2, 0.8, test=0.80), reported(None, 0.7, test=0.7, dropout="none")]
    assert "+3.4 on CIFAR-10, nothing for this data set" in "\n".join(report_lines(rows, "digits"))


def test_what_dropping_changes_is_told_with_one_kind_of_statistics_even_if_the_choice_has_others():
    final, recalibrated = reported(0.2, 0.8, test=0.80), reported(0.2, 0.9, test=0.95, batchnorm="recalibrated")
    lines = report_lines([final, {**recalibrated, "run_id": final["run_id"], "scaled_test_accuracy": None}], "mnist")
    assert "BatchNorm recalibrated" in lines[1]
    assert lines[3] == "  dropping changes its own test accuracy by +1.0 points (the paper's Table 1: +0.3)"


def test_the_report_counts_the_seeds_that_have_a_control_alone():
    rows = [reported(0.2, 0.8, test=0.80, seed=seed) for seed in range(3)]
    rows.append(reported(None, 0.7, test=0.7, dropout="none", seed=1))
    # sqrt((0.8 * 0.2 + 0.7 * 0.3) / 2500) = 0.0122
    assert "gain on test over no dropout: +10.0 points (± 1.2, sampling of the test images; 1 seed)" in "\n".join(
        report_lines(rows, "cifar10")
    )


def test_more_seeds_on_the_same_test_images_do_not_make_their_sampling_error_smaller():
    rows = [reported(0.2, 0.8, test=0.80, seed=seed) for seed in range(3)]
    rows += [reported(None, 0.7, test=0.7, dropout="none", seed=seed) for seed in range(3)]
    assert "+10.0 points (± 1.2, sampling of the test images; 3 seeds)" in "\n".join(report_lines(rows, "cifar10"))


def test_the_report_of_an_unfinished_search_claims_nothing():
    trial = reported(0.2, 0.8, test=0.80)
    assert report_lines([], "digits")[-1] == "no trial was trained to the end yet: nothing to choose from."
    assert report_lines([trial], "digits")[-1] == "  its control without dropout is not finished: no gain to report."
