import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlib.errors import InputError
from memlib.experiments import ExperimentsConfig
from memlib.models import check_model_name
from sweeps.plan import (
    DROPOUTS,
    SETTING_FOR,
    load_preset,
    merge,
    parse_preset,
    parse_setting,
    plan_runs,
    preset_names,
    with_axes,
)
from sweeps.progress import run_label

MINIMAL = 'datasets = ["digits"]\nmodels = ["resnet9"]\nseeds = [0, 1]\nnoise = [0.1]\n'


# The main runs of the presets as they were before Table 1 came beside them: what is finished stays valid.
FINISHED = {
    "quick": ["3618e3295a3a4b3b", "68548fe641f999ea"],
    "laptop": ["7629874e9ec6d83c", "0e1be3e76174806d", "6558b23b86bc3048", "738d4db57ea9f983"],
    "paper": [
        *("44136fa355b3678a", "fbe47f6d82b435a8", "a61e75dcd6780103", "427521d8f61927c6", "726beddb64dfe4ad"),
        *("89efb4578b2b5f38", "7b16c09074b2769f", "9cca77f0e2b53a6c", "e104d05fd9afb099", "dc5e00465155eb6f"),
        *("053e32b05eed663c", "070be2bd337f407a", "33aa81d4d544faf6", "e53d81d5a2809dc8", "17606edfe69eb221"),
        *("d8ef82b243748a8d", "278ee19249c261ad", "a8d6728221bf7fb3", "eee01ec3891d9ff9", "6ec3bfacacadc026"),
        *("bada7a54e11a9b97", "8700d0e76933fc60", "a795510159f0d9bb", "2c5ec3a57297af0c", "47d1f7e603b3efb1"),
        *("b713c784ff478633", "e318ef55936463d4"),
    ],
}
CONTROLLED = MINIMAL + (
    'dropouts = ["sparse", "none", "baseline"]\n[settings.rewinding]\n[settings.training]\nepochs = 7\n'
    '[dropout]\nmodels = ["resnet9"]\n[dropout.settings.training]\nschedule = "one_cycle"\n'
    "[dropout.settings.dropout]\np_gen = 0.4\n[dropout.sparse.training]\npeak_lr = 0.3\n"
)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans_each_combination_once(name):
    preset = load_preset(name)
    runs = plan_runs(with_axes(preset, {"dropouts": ["none"]}))
    expected = len(preset.datasets) * len(preset.models) * len(preset.seeds) * len(preset.noise)
    assert len({run.run_id for run in runs}) == len(runs) == expected
    assert all(0 in run.checkpoint_epochs and run.training.epochs in run.checkpoint_epochs for run in runs)
    assert {run.dropout.kind for run in runs} == {"none"}
    for model in preset.models:
        check_model_name(model)


@pytest.mark.parametrize("name", preset_names())
def test_the_main_runs_of_a_preset_are_the_finished_ones_and_come_first_with_their_experiments(name):
    plan = plan_runs(load_preset(name))
    assert [run.run_id for run in plan][: len(FINISHED[name])] == FINISHED[name]
    with_experiments = [run.run_id for run, asked in plan.items() if asked != ExperimentsConfig()]
    assert with_experiments == FINISHED[name]


@pytest.mark.parametrize("name", preset_names())
def test_table_1_is_planned_of_resnet9_with_every_control_on_one_schedule(name):
    preset = load_preset(name)
    table_1 = [run for run in plan_runs(preset) if run.run_id not in FINISHED[name]]
    kinds = {DROPOUTS[dropout] for dropout in preset.dropouts}
    assert kinds >= {"example_tied", "none", "sparse"}
    assert {"baseline", "none"} < set(preset.dropouts)
    cells = {(r.data.name, r.model.name, r.noise.fraction, r.seed, r.dropout.kind) for r in table_1}
    expected = {
        (dataset, "resnet9", p, seed, kind)
        for dataset in preset.datasets
        for p in preset.noise
        for seed in preset.seeds
        for kind in kinds
    }
    assert cells == expected
    assert len(table_1) == len(expected)
    for dataset in preset.datasets:
        alike = {replace(r.training, evaluate_every=1) for r in table_1 if r.data.name == dataset}
        assert {(t.schedule, t.peak_lr, t.gradient_accounting) for t in alike} == {("one_cycle", 0.1, False)}
        assert len(alike) == 1
    # Label errors are scored from every epoch of these.
    assert {r.training.evaluate_every for r in table_1 if r.dropout.kind in ("example_tied", "none")} == {1}


@pytest.mark.parametrize("name", preset_names())
def test_every_run_of_a_preset_has_its_own_name_in_messages(name):
    labels = [run_label(run) for run in plan_runs(load_preset(name))]
    assert len(set(labels)) == len(labels)
    assert labels[0].endswith("resnet9 noise 0.1 seed 0")


def test_a_dropout_takes_its_settings_over_the_main_ones_and_no_experiments():
    plan = plan_runs(parse_preset(CONTROLLED, name="test"))
    found = [(r.dropout.kind, r.seed, r.training.schedule, r.training.peak_lr, r.training.epochs) for r in plan]
    assert found == [
        *(("none", seed, "cosine", 0.01, 7) for seed in (0, 1)),
        *(("sparse", seed, "one_cycle", 0.3, 7) for seed in (0, 1)),
        *(("none", seed, "one_cycle", 0.01, 7) for seed in (0, 1)),
    ]
    assert {run.dropout.p_gen for run in plan if run.dropout.kind == "sparse"} == {0.4}
    wanted = {run.training.schedule: asked.rewinding is not None for run, asked in plan.items()}
    assert wanted == {"cosine": True, "one_cycle": False}


def test_an_experiment_on_runs_with_dropout_is_wanted_where_their_table_has_it():
    text = CONTROLLED + "[dropout.sparse.rewinding]\nlimit = 5\n"
    plan = plan_runs(parse_preset(text, name="test"))
    assert [asked.rewinding.limit for run, asked in plan.items() if run.dropout.kind == "sparse"] == [5, 5]


def test_the_command_line_replaces_the_dropouts_and_keeps_to_the_models_of_the_preset():
    preset = parse_preset(CONTROLLED, name="test")
    assert {r.training.schedule for r in plan_runs(with_axes(preset, {"dropouts": ["baseline"]}))} == {"one_cycle"}
    assert {r.dropout.kind for r in plan_runs(with_axes(preset, {"dropouts": ["channel"]}))} == {"channel"}
    assert {r.dropout.kind for r in plan_runs(with_axes(preset, {"models": ["vit"]}))} == {"none"}
    both = with_axes(preset, {"models": ["vit"], "dropouts": ["sparse"]})
    assert {(r.model.name, r.dropout.kind) for r in plan_runs(both)} == {("vit", "sparse")}
    with pytest.raises(InputError, match="dropout 'sparce' is not known; did you mean 'sparse'"):
        plan_runs(with_axes(preset, {"dropouts": ["sparce"]}))


def test_a_preset_whose_dropouts_are_for_none_of_its_models_is_refused():
    text = CONTROLLED.replace('"none", ', "").replace('models = ["resnet9"]\nseeds', 'models = ["vit"]\nseeds')
    with pytest.raises(InputError, match="no run is wanted: dropouts are sparse, baseline and models vit, but here"):
        plan_runs(parse_preset(text, name="test"))


def test_a_baseline_that_is_a_main_run_is_planned_once_with_its_experiments():
    text = MINIMAL + 'dropouts = ["baseline", "none"]\n[settings.rewinding]\n'
    plan = plan_runs(parse_preset(text, name="test"))
    assert [asked.rewinding is not None for asked in plan.values()] == [True, True]


def test_the_paper_preset_is_the_papers_setting():
    runs = plan_runs(with_axes(load_preset("paper"), {"dropouts": ["none"]}))
    assert len(runs) == 27
    assert {(r.data.name, r.training.epochs) for r in runs} == {("cifar10", 50), ("svhn", 50), ("mnist", 100)}
    assert {(r.model.name, r.training.batch_size) for r in runs} == {("resnet9", 512), ("resnet50", 512), ("vit", 128)}
    assert {(r.training.peak_lr, r.training.momentum, r.training.weight_decay) for r in runs} == {(0.01, 0.9, 5e-4)}
    assert {(r.noise.fraction, r.model.width, r.training.schedule) for r in runs} == {(0.1, 1.0, "cosine")}


def test_settings_are_laid_over_each_other_from_all_runs_to_the_command_line():
    text = MINIMAL + (
        "[settings.training]\nepochs = 1\nbatch_size = 8\npeak_lr = 0.1\nmomentum = 0.1\n"
        "[dataset.digits.training]\nbatch_size = 16\npeak_lr = 0.2\nmomentum = 0.2\n"
        "[model.resnet9.training]\npeak_lr = 0.3\nmomentum = 0.3\n"
    )
    runs = plan_runs(parse_preset(text, name="test"), parse_setting("training.momentum=0.4"))
    training = next(iter(runs)).training
    assert (training.epochs, training.batch_size, training.peak_lr, training.momentum) == (1, 16, 0.3, 0.4)


def test_other_axes_replace_the_presets():
    preset = with_axes(parse_preset(MINIMAL, name="test"), {"seeds": [5], "noise": [0.0, 0.2], "models": None})
    assert [(r.seed, r.noise.fraction) for r in plan_runs(preset)] == [(5, 0.0), (5, 0.2)]


def test_more_seeds_leave_the_runs_there_were_unchanged():
    preset = parse_preset(MINIMAL, name="test")
    before = {r.run_id for r in plan_runs(preset)}
    assert before < {r.run_id for r in plan_runs(with_axes(preset, {"seeds": [0, 1, 2]}))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets = [", "preset test is not valid TOML"),
        (MINIMAL + "seed = 1\n", "key in preset test 'seed' is not known; did you mean 'seeds'"),
        ("datasets = ['digits']\n", "preset test lacks models, seeds, noise"),
        (MINIMAL + "[dropout.chanel]\n", "key in .dropout. of preset test 'chanel' is not known; did you mean 'chann"),
    ],
)
def test_a_broken_preset_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_preset(text, name="test")


def test_an_unknown_preset_is_refused_with_the_nearest_match():
    with pytest.raises(InputError, match="preset 'quik' is not known; did you mean 'quick'"):
        load_preset("quik")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.peak_lr=0.05", {"training": {"peak_lr": 0.05}}),
        ("training.augment=['crop', 'flip']", {"training": {"augment": ["crop", "flip"]}}),
        ("training.schedule=triangular", {"training": {"schedule": "triangular"}}),
        ("seed=3", {"seed": 3}),
    ],
)
def test_a_setting_on_the_command_line_is_read_as_toml_or_text(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise.fraction=0.3", "noise.fraction cannot be given with --set, a sweep has several; use --noise"),
        ("seed=7", "seed cannot be given with --set.*use --seeds"),
        ("model.name=vit", "use --models"),
        ("data.name=mnist", "use --datasets"),
        ("dropout.kind=sparse", "use --dropouts"),
    ],
)
def test_an_axis_cannot_be_set_past_the_sweep(text, message):
    with pytest.raises(InputError, match=message):
        plan_runs(parse_preset(MINIMAL, name="test"), parse_setting(text))


def test_a_setting_without_a_value_is_refused():
    with pytest.raises(InputError, match="has no '='"):
        parse_setting("training.epochs")


nested = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
)
tables = st.dictionaries(st.sampled_from("abc"), nested, max_size=3)


def leaves(table, path=()):
    for key, value in table.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


@given(tables, tables)
def test_merging_keeps_every_setting_of_the_last_layer_and_what_it_does_not_touch(first, second):
    originals = copy.deepcopy((first, second))
    merged = dict(leaves(merge([first, second])))
    last = dict(leaves(second))
    assert last.items() <= merged.items()
    assert {k: v for k, v in merged.items() if k not in last}.items() <= dict(leaves(first)).items()
    assert (first, second) == originals
    assert merge([first, first]) == first


def test_an_experiment_that_is_asked_for_without_settings_is_refused_with_how_to_give_them():
    preset = load_preset("quick")
    with pytest.raises(InputError, match="cross_validation is asked for, .* --set cross_validation.folds=5"):
        plan_runs(preset, experiments=["cross_validation"])
    with pytest.raises(InputError, match="rewinding is asked for, but no run that is wanted has settings for it"):
        plan_runs(with_axes(preset, {"dropouts": ["example_tied"]}), experiments=["rewinding"])
    for wanted in plan_runs(preset, {"cross_validation": {"folds": 5}}, experiments=["cross_validation"]).values():
        assert wanted.rewinding is None
    assert plan_runs(preset, experiments=[])


def test_what_sets_an_experiment_asks_for_it():
    for name, setting in SETTING_FOR.items():
        wanted = plan_runs(load_preset("quick"), parse_setting(setting), experiments=[name])
        assert any(getattr(found, name) is not None for found in wanted.values())


def test_only_the_digits_are_scaled_by_the_quick_preset():
    preset = with_axes(load_preset("quick"), {"datasets": ["digits", "folder:mine"]})
    assert {run.data.name: run.data.image_size for run in plan_runs(preset)} == {"digits": 16, "folder:mine": None}
