"""What the documents say is executed, so that it stays true."""

import pkgutil
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import memlib
from memlib.config import CheckpointConfig, DataConfig, DropoutConfig, ModelConfig, NoiseConfig, TrainingConfig
from memlib.experiments import CriticalUnitsConfig, CrossValidationConfig, RetrainingConfig, RewindingConfig
from memlib.schemas import SCHEMAS

ROOT = Path(__file__).parent.parent


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("document", "printed"),
    [
        ("README.md", "'group': 'classifier'"),
        ("docs/gradients.md", "noisy over clean norm"),
        ("docs/layers.md", "epoch  0: "),
        ("docs/example_tied_dropout.md", "noisy"),
        ("docs/neurons.md", "without the units of example"),
        ("docs/mislabels.md", "margin_drop"),
    ],
)
def test_the_python_in_a_document_runs_as_it_stands(document, printed, tmp_path):
    code = "\n".join(blocks(document, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_every_option_the_readme_names_exists():
    from sweeps.full_paper import _parser

    known = {option for action in _parser()._actions for option in action.option_strings}
    sweeps = [line for block in blocks("README.md", "") for line in block.splitlines() if "full_paper.py" in line]
    named = {option for line in sweeps for option in re.findall(r"(--[a-z-]+)", line)}
    assert named <= known
    assert len(named) > 5


@pytest.mark.parametrize(
    ("section", "config"),
    [
        ("data", DataConfig),
        ("noise", NoiseConfig),
        ("model", ModelConfig),
        ("dropout", DropoutConfig),
        ("training", TrainingConfig),
        ("checkpoints", CheckpointConfig),
        ("rewinding", RewindingConfig),
        ("retraining", RetrainingConfig),
        ("critical_units", CriticalUnitsConfig),
        ("cross_validation", CrossValidationConfig),
    ],
)
def test_every_setting_is_documented_with_its_default(section, config):
    text = (ROOT / "docs" / "settings.md").read_text()
    for setting in fields(config):
        row = re.search(rf"^\| `{section}\.{setting.name}` \| `(.*?)` \|", text, flags=re.MULTILINE)
        assert row, f"{section}.{setting.name}"
        default = getattr(config(), setting.name)
        shown = "none" if default is None else str(list(default) if isinstance(default, tuple) else default)
        shown = shown.lower() if isinstance(default, bool) else shown  # as TOML writes it
        assert row[1] == shown, setting.name


def test_every_table_and_column_is_documented():
    text = (ROOT / "docs" / "results_format.md").read_text()
    for table, schema in SCHEMAS.items():
        section = text.split(f"## `{table}`")[1].split("\n## ")[0]
        for column in set(schema.names) - {"unit_id", "run_id"}:
            assert f"`{column}`" in section, f"{table}.{column}"


def test_every_public_name_can_be_loaded_and_nothing_heavy_is_before_that():
    assert all(callable(getattr(memlib, name)) for name in dir(memlib))
    code = "import sys, memlib; print(any(m in sys.modules for m in ('torch', 'pyarrow', 'timm')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_public_name_is_never_hidden_by_a_module_of_the_same_name():
    modules = {module.name for module in pkgutil.iter_modules(memlib.__path__)}
    assert len(modules) > 50
    assert not modules & set(dir(memlib))


def test_an_unknown_public_name_lists_those_there_are():
    with pytest.raises(AttributeError, match="no attribute 'rewindd'; it has .*layer_groups"):
        memlib.rewindd  # noqa: B018
