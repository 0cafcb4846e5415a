"""Verdicts on labels: scores counted by hand, evaluation against slow references, bad input, and a real run."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

import memlib
from memlib.config import DropoutConfig
from memlib.errors import InputError
from memlib.evaluation import predict
from memlib.experiments import CrossValidationConfig, ExperimentsConfig
from memlib.mislabel_evaluation import evaluate_mislabels
from memlib.mislabels import NO_SUGGESTION, judge, subjects_of, verdict
from memlib.results import create_results
from memlib.run_mislabels import trained_examples
from memlib.runs import perform_run
from memlib.tasks import perform_task, plan_tasks

CPU = torch.device("cpu")

# Scores


def test_dropping_scores_what_the_assigned_label_loses_and_suggests_what_is_predicted_without_memorization():
    tied = np.array([[5.0, 1.0, 0.0], [0.0, 4.0, 1.0], [3.0, 2.0, 0.0]])
    dropped = np.array([[5.0, 1.0, 0.0], [6.0, 1.0, 0.0], [1.0, 3.0, 0.0]])
    found = memlib.find_mislabels_by_dropping(tied=tied, dropped=dropped, labels=np.array([0, 1, 0]))
    got = found["margin_drop"]
    assert got.score.tolist() == [0.0, 3.0 + 5.0, 1.0 + 2.0]
    assert got.suggested.tolist() == [NO_SUGGESTION, 0, 1]
    assert got.is_label_issue.tolist() == [False, True, True]
    assert got.rank.tolist() == [3, 1, 2]

    def loss(logits, label):
        return math.log(sum(math.exp(z) for z in logits)) - logits[label]

    assert found["loss_rise"].score[1] == pytest.approx(loss(dropped[1], 1) - loss(tied[1], 1))
    assert found["loss"].score[2] == pytest.approx(loss(tied[2], 0))
    assert {method: verdict.evidence for method, verdict in found.items()} == dict.fromkeys(found, "in_sample")


def recorded(rows):
    """Arrays from (id, epoch, logits, label)."""
    ids, epochs, logits, labels = zip(*rows, strict=True)
    return {
        "example_ids": np.array(ids),
        "epochs": np.array(epochs),
        "logits": np.array(logits, float),
        "labels": np.array(labels),
    }


ROWS = [
    (7, 1, [2, 0], 0),  # learned, forgotten, learned again
    (7, 2, [0, 1], 0),
    (7, 4, [3, 0], 0),
    (3, 1, [4, 0], 1),  # never learned
    (3, 2, [3, 0], 1),
    (3, 4, [2, 0], 1),
    (5, 1, [0, 1], 1),  # always right
    (5, 2, [0, 5], 1),
    (5, 4, [0, 9], 1),
]


@pytest.mark.parametrize("order", [range(9), (8, 0, 4, 2, 6, 1, 3, 7, 5)])
def test_dynamics_of_recorded_logits_are_those_counted_by_hand_in_any_order(order):
    found = memlib.find_mislabels_by_dynamics(**recorded([ROWS[i] for i in order]))
    area, forgotten = found["aum"], found["forgetting_events"]
    assert area.example_ids.tolist() == [3, 5, 7]
    assert area.score.tolist() == [3.0, -5.0, pytest.approx(-4 / 3)]
    assert area.is_label_issue.tolist() == [True, False, False]
    assert forgotten.score.tolist() == [3, 0, 1]  # never learned: as if forgotten in each of the three epochs
    assert forgotten.is_label_issue.tolist() == [True, False, True]
    assert area.suggested.tolist() == forgotten.suggested.tolist() == [0, NO_SUGGESTION, 1]
    assert found["loss"].score[2] == pytest.approx(math.log(1 + math.exp(-3)))
    assert {v.method: v.evidence for v in found.values()} == {
        "aum": "training_dynamics",
        "forgetting_events": "training_dynamics",
        "loss": "in_sample",
    }


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 2**32))
def test_judging_without_torch_equals_judging_with_it(n_classes, n, seed):
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(size=(n, n_classes)).astype(np.float32) * 10, draw.integers(0, n_classes, n)
    got = judge(logits, subjects_of(np.arange(n), labels), "these")
    expected = predict(nn.Identity(), torch.tensor(logits), torch.tensor(labels), device=CPU)
    assert got.prediction.tolist() == expected.prediction.tolist()
    assert got.margin.tolist() == pytest.approx(expected.margin.tolist(), rel=1e-4, abs=1e-4)
    assert got.loss.tolist() == pytest.approx(expected.loss.tolist(), rel=1e-4, abs=1e-4)


def test_the_table_lists_the_most_suspicious_first_with_no_suggestion_where_there_is_none():
    subjects = subjects_of(np.array([4, 9, 2]), np.array([0, 1, 1]))
    score, is_issue = np.array([0.5, 2.0, 0.5]), np.array([False, True, False])
    found = verdict("mine", "in_sample", subjects, score, np.array([0, 0, 0]), is_issue)
    table = found.to_table()
    assert table["example_id"].to_pylist() == [9, 4, 2]  # equal scores in the order of the examples
    assert table["rank"].to_pylist() == [1, 2, 3]
    assert table["suggested"].to_pylist() == [0, None, 0]
    named = found.to_table(["cat", "dog"])
    assert named["assigned_name"].to_pylist() == ["dog", "cat", "dog"]
    assert named["suggested_name"].to_pylist() == ["cat", None, "cat"]
    assert named.drop_columns(["assigned_name", "suggested_name"]).equals(table)
    with pytest.raises(InputError, match="class_names has 1 names and the labels go up to 1"):
        found.to_table(["cat"])


# Evaluation


def slow_auroc(score, is_noisy):
    noisy, clean = (
        [s for s, of_kind in zip(score, is_noisy, strict=True) if of_kind == kind] for kind in (True, False)
    )
    pairs = list(itertools.product(noisy, clean))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def slow_average_precision(score, is_noisy):
    total, found = 0.0, 0
    for threshold in sorted(set(score), reverse=True):
        above = [noisy for s, noisy in zip(score, is_noisy, strict=True) if s >= threshold]
        total += sum(above) / len(above) * (sum(above) - found)
        found = sum(above)
    return total / found


def slow_precision(score, is_noisy, k):
    """Filled from the top, group of equal scores by group, the last one in proportion."""
    taken = hits = 0.0
    for threshold in sorted(set(score), reverse=True):
        group = [noisy for s, noisy in zip(score, is_noisy, strict=True) if s == threshold]
        here = min(len(group), k - taken)
        taken, hits = taken + here, hits + here * sum(group) / len(group)
    return hits / k


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans(), st.booleans()), min_size=2, max_size=12))
def test_the_measures_equal_slow_references_ties_included(rows):
    score, is_noisy, is_issue = (np.array(column) for column in zip(*rows, strict=True))
    subjects = subjects_of(np.arange(len(rows)), np.zeros(len(rows), int))
    found = verdict("mine", "in_sample", subjects, score, subjects.assigned, is_issue)
    if len(set(is_noisy.tolist())) < 2:
        with pytest.raises(InputError, match=r"examples are noisy, so no score can tell them apart"):
            evaluate_mislabels(found, is_noisy)
        return
    got = evaluate_mislabels(found, is_noisy)
    noisy = is_noisy.tolist()
    assert got.auroc == pytest.approx(slow_auroc(score.tolist(), noisy))
    assert got.average_precision == pytest.approx(slow_average_precision(score.tolist(), noisy))
    assert got.precision_at_noise_count == pytest.approx(slow_precision(score.tolist(), noisy, sum(noisy)))
    hits = sum(a and b for a, b in zip(noisy, is_issue.tolist(), strict=True))
    assert got.issue_recall == pytest.approx(hits / sum(noisy))
    assert got.issue_precision == (pytest.approx(hits / is_issue.sum()) if is_issue.any() else None)
    assert (got.n, got.n_noisy) == (len(rows), sum(noisy))


@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.sampled_from([0, 1, 2, 16]))
def test_the_measures_equal_sklearns_ties_included(seed, n, n_decimals):
    random = np.random.default_rng(seed)
    score, is_noisy = random.normal(size=n).round(n_decimals), random.permutation(np.arange(n) < random.integers(1, n))
    subjects = subjects_of(np.arange(n), np.zeros(n, int))
    got = evaluate_mislabels(verdict("mine", "in_sample", subjects, score, subjects.assigned, is_noisy), is_noisy)
    assert got.auroc == pytest.approx(roc_auc_score(is_noisy, score), rel=1e-12)
    assert got.average_precision == pytest.approx(average_precision_score(is_noisy, score), rel=1e-12)


# Bad input

TWO = np.array([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"tied": TWO[:, :1]},
            r"logits \(tied\) are of 1 class; a label can only be wrong where",
        ),
        ({"labels": np.array([0, 2])}, r"labels run from 0 to 2 but logits \(tied\) are of 2 classes; number"),
        ({"labels": np.array([0])}, r"logits \(tied\) have 2 rows for 1 labels; give one row an example"),
        ({"dropped": TWO * np.nan}, r"logits \(dropped\) are not finite for 2 examples, the first is 0"),
        ({"example_ids": np.array([3, 3])}, "example id 3 comes 2 times; give each example once"),
        ({"example_ids": np.array([3])}, "there are 2 labels for 1 examples; give one label an example"),
        ({"labels": np.array([], int)}, "there are 0 labels for 0 examples"),
    ],
)
def test_unusable_logits_are_named(given, message):
    arrays = {"tied": TWO, "dropped": TWO, "labels": np.array([0, 1]), **given}
    with pytest.raises(InputError, match=message):
        memlib.find_mislabels_by_dropping(**arrays)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:-1], "8 rows do not hold each of 3 examples once in each of 3 epochs"),
        ([*ROWS[:-1], ROWS[0]], "9 rows do not hold each of 3 examples once"),
        ([*ROWS[:-1], (5, 4, [0, 9], 0)], "an example has another label in another epoch"),
        ([*ROWS[:-1], (5, 4, [0, math.inf], 1)], r"logits \(epoch 4\) are not finite for 1 examples, the first is 5"),
    ],
)
def test_records_with_gaps_are_named(rows, message):
    with pytest.raises(InputError, match=message):
        memlib.find_mislabels_by_dynamics(**recorded(rows))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": np.array([0, 1, 1])}, r"rows do not agree \(example_ids 9, epochs 9, logits 9, labels 3"),
        ({"logits": np.zeros((8, 2))}, "rows do not agree .* logits 8"),
        ({"logits": np.zeros(9)}, "logits have 1 dimensions"),
    ],
)
def test_records_that_do_not_fit_together_are_named(given, message):
    with pytest.raises(InputError, match=message):
        memlib.find_mislabels_by_dynamics(**{**recorded(ROWS), **given})


def test_scores_that_are_no_numbers_are_named():
    subjects = subjects_of(np.arange(2), np.zeros(2, int))
    with pytest.raises(InputError, match="method 'mine': 1 of 2 scores are not finite"):
        verdict("mine", "in_sample", subjects, np.array([0.0, np.nan]), subjects.assigned, np.zeros(2, bool))


def test_truth_of_another_length_is_named():
    subjects = subjects_of(np.arange(2), np.zeros(2, int))
    found = verdict("mine", "in_sample", subjects, np.array([0.0, 1.0]), subjects.assigned, np.zeros(2, bool))
    with pytest.raises(InputError, match="is_noisy has 3 entries for 2 scores"):
        evaluate_mislabels(found, np.array([True, False, True]))


# Confident learning


def test_out_of_sample_scores_are_cleanlabs_turned_round():
    shares = np.array([[0.9, 0.1], [0.2, 0.8], [0.95, 0.05], [0.9, 0.1], [0.1, 0.9], [0.15, 0.85]])
    labels = np.array([0, 1, 1, 0, 1, 1])  # the third is wrong
    got = memlib.find_mislabels_out_of_sample(probabilities=shares, labels=labels)["cleanlab"]
    assert got.score.tolist() == pytest.approx((1 - shares[np.arange(6), labels]).tolist())
    assert got.is_label_issue.tolist() == [False, False, True, False, False, False]
    assert got.suggested.tolist() == [-1, -1, 0, -1, -1, -1]
    assert got.evidence == "out_of_sample"


def test_logits_are_not_taken_for_probabilities():
    with pytest.raises(InputError, match="give softmax outputs, not logits"):
        memlib.find_mislabels_out_of_sample(probabilities=TWO * 5, labels=np.array([0, 1]))


def test_without_cleanlab_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(InputError, match=r"needs the package cleanlab .*pip install -e '\.\[cleanlab\]'"):
        memlib.find_mislabels_out_of_sample(probabilities=TWO, labels=np.array([0, 1]))


# A real run


@pytest.fixture(scope="module")
def judged(tmp_path_factory, digits, small_run):
    """A small run with example-tied dropout on digits, cross-validated in two folds."""
    training = replace(small_run.training, epochs=20, gradient_accounting=False, peak_lr=0.1)
    run = replace(
        small_run,
        dropout=DropoutConfig(kind="example_tied", p_gen=0.5),
        training=training,
        model=replace(small_run.model, width=0.125),
    )
    store = create_results(tmp_path_factory.mktemp("judged"))
    perform_run(run, digits, store, device=CPU)
    wanted = ExperimentsConfig(cross_validation=CrossValidationConfig(folds=2, epochs=8))
    for task in plan_tasks(run, wanted, ()):
        perform_task(task, digits, store, device=CPU)
    return run, store


def test_every_method_finds_the_wrong_labels_of_a_real_run_far_better_than_chance(judged):
    run, store = judged
    found = memlib.find_mislabels_of_run(store, run.run_id)
    assert list(found) == ["margin_drop", "loss_rise", "loss", "aum", "forgetting_events", "cleanlab"]
    is_noisy = trained_examples(store.read("examples")).is_noisy
    assert is_noisy.sum() == 40
    quality = {method: evaluate_mislabels(each, is_noisy) for method, each in found.items()}
    for method in ("margin_drop", "loss_rise", "cleanlab"):
        assert quality[method].auroc > 0.8, (method, quality[method])
        assert quality[method].average_precision > 0.5, (method, quality[method])  # chance: 0.2
    assert quality["aum"].auroc > 0.7
    original = {r["example_id"]: r["original"] for r in store.read("examples").to_pylist() if r["split"] == "train"}
    suggested = [
        (s, original[i])
        for i, s, wrong in zip(found["margin_drop"].example_ids, found["margin_drop"].suggested, is_noisy, strict=True)
        if wrong and s != NO_SUGGESTION
    ]
    assert len(suggested) > 20
    assert sum(s == o for s, o in suggested) / len(suggested) > 0.6  # chance: one of nine


def test_every_example_is_predicted_once_by_a_network_that_was_not_trained_on_it(judged):
    run, store = judged
    rows = store.read("cross_validation").to_pylist()
    labels = {r["example_id"]: r["assigned"] for r in store.read("examples").to_pylist() if r["split"] == "train"}
    assert {row["example_id"]: row["assigned"] for row in rows} == labels
    assert len(rows) == 200
    assert {(row["fold"], row["folds"], row["epochs"]) for row in rows} == {(0, 2, 8), (1, 2, 8)}
    for row in rows:
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == int(np.argmax(row["probabilities"]))


def without(table, **values):
    """The table without the rows that hold one of these values."""
    for column, value in values.items():
        table = table.filter(pc.field(column) != value)
    return table


def rewritten(store, folder, **tables):
    """A copy of a store, with other rows in some tables."""
    copy = create_results(folder)
    for name in ("runs", "examples", "dynamics", "cross_validation"):
        rows = tables.get(name, store.read(name))
        copy.write(name, "copy", pa.table(rows).drop_columns(["unit_id"]))
    return copy


def test_a_method_without_its_evidence_is_left_out(judged, tmp_path):
    run, store = judged
    folds = store.read("cross_validation")
    incomplete = rewritten(store, tmp_path / "a", cross_validation=without(folds, fold=1))
    assert "cleanlab" not in memlib.find_mislabels_of_run(incomplete, run.run_id)
    older = rewritten(store, tmp_path / "b", dynamics=store.read("dynamics").slice(0, 0))
    assert {"margin_drop", "cleanlab"} < set(memlib.find_mislabels_of_run(older, run.run_id))
    assert "aum" not in memlib.find_mislabels_of_run(older, run.run_id)
    other = rewritten(store, tmp_path / "c", dynamics=store.read("dynamics").slice(1))
    with pytest.raises(InputError, match="tables `dynamics` and `examples` hold other training examples"):
        memlib.find_mislabels_of_run(other, run.run_id)
    with pytest.raises(InputError, match="run 0123 has no examples"):
        memlib.find_mislabels_of_run(store, "0123")


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ("[0, 1]", "[[1], [0]]", "the labels are an array of shape (2, 1) and type int64; give one whole number an"),
        ("[0, 1]", "[1.0, 0.0]", "the labels are an array of shape (2,) and type float64"),
        ("['a', 'b']", "[1, 0]", "the example ids are an array of shape (2,)"),
    ],
)
def test_labels_of_another_kind_are_named_without_the_tests_shape_checks(ids, labels, message):
    given = f"np.array({ids}), np.array({labels})"
    code = f"import numpy as np; from memlib.mislabels import subjects_of; subjects_of({given})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"InputError: {message}" in done.stderr
