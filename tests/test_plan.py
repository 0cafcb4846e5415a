import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlib.errors import InputError
from memlib.models import check_model_name
from sweeps.plan import load_preset, merge, parse_preset, parse_setting, plan_runs, preset_names, with_axes

MINIMAL = 'datasets = ["digits"]\nmodels = ["resnet9"]\nseeds = [0, 1]\nnoise = [0.1]\n'


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans_each_combination_once(name):
    preset = load_preset(name)
    runs = plan_runs(preset)
    expected = len(preset.datasets) * len(preset.models) * len(preset.seeds) * len(preset.noise)
    assert len({run.run_id for run in runs}) == len(runs) == expected
    assert all(0 in run.checkpoint_epochs and run.training.epochs in run.checkpoint_epochs for run in runs)
    for model in preset.models:
        check_model_name(model)


def test_the_paper_preset_is_the_papers_setting():
    runs = plan_runs(load_preset("paper"))
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
