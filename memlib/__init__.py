"""Find out where a neural network memorizes, and do something about it.

Public names, by the question they answer; importing this package loads nothing heavy, each name is
loaded when it is first used.

- Whose gradient moves which layer? `split_gradients`, `zero_sums`, `add_to_sums_`, `summarize_groups`
- What are a network's layer groups? `layer_groups`
- Which of them can go back in time? `rewinding_accuracies`, `rewind`, `Measurement`
- Does a reset one learn noisy labels again that it never saw? `retrain`, `Retraining`
- Can memorization be confined, and removed? `tie`, `ExampleTiedDropout`, `set_mode`, `dropout_mode`, `recalibrate`,
  `prune`
- Which labels are made wrong? `add_label_noise`, `flip_labels`, `flip_labels_in_pairs`
- Which labels are wrong? `find_mislabels_of_run`, `find_mislabels_by_dropping`, `find_mislabels_by_dynamics`,
  `find_mislabels_out_of_sample`; and is that so? `evaluate_mislabels`; to go through by hand: `review_page`
- What does the model predict, and by what margin? `predict`, `accuracy`
- How few units carry one example, and what does losing them cost the others? `find_critical_units`,
  `take_examples`, `draw_reference`, `edited_accuracies`
- One training run, with all of it: `perform_run`, `train`
- Images and networks: `load_dataset`, `build_model`
- Settings and results: `RunConfig`, `build_config`, `open_results`, `create_results`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memlib.confident_learning import find_mislabels_out_of_sample as find_mislabels_out_of_sample
    from memlib.config import RunConfig as RunConfig
    from memlib.config import build_config as build_config
    from memlib.critical_units import draw_reference as draw_reference
    from memlib.critical_units import find_critical_units as find_critical_units
    from memlib.critical_units import take_examples as take_examples
    from memlib.datasets import load_dataset as load_dataset
    from memlib.edited_networks import edited_accuracies as edited_accuracies
    from memlib.errors import InputError as InputError
    from memlib.evaluation import accuracy as accuracy
    from memlib.evaluation import predict as predict
    from memlib.example_tied_dropout import ExampleTiedDropout as ExampleTiedDropout
    from memlib.example_tied_dropout import dropout_mode as dropout_mode
    from memlib.example_tied_dropout import set_mode as set_mode
    from memlib.example_tied_dropout import tie as tie
    from memlib.experiments import CriticalUnitsConfig as CriticalUnitsConfig
    from memlib.gradient_accounting import add_to_sums_ as add_to_sums_
    from memlib.gradient_accounting import split_gradients as split_gradients
    from memlib.gradient_accounting import summarize_groups as summarize_groups
    from memlib.gradient_accounting import zero_sums as zero_sums
    from memlib.grouping import layer_groups as layer_groups
    from memlib.label_noise import add_label_noise as add_label_noise
    from memlib.label_noise import flip_labels as flip_labels
    from memlib.label_noise import flip_labels_in_pairs as flip_labels_in_pairs
    from memlib.mislabel_evaluation import evaluate_mislabels as evaluate_mislabels
    from memlib.mislabels import find_mislabels_by_dropping as find_mislabels_by_dropping
    from memlib.mislabels import find_mislabels_by_dynamics as find_mislabels_by_dynamics
    from memlib.models import build_model as build_model
    from memlib.pruning import prune as prune
    from memlib.recalibration import recalibrate as recalibrate
    from memlib.results import create_results as create_results
    from memlib.results import open_results as open_results
    from memlib.retraining import Retraining as Retraining
    from memlib.retraining import retrain as retrain
    from memlib.rewinding import Measurement as Measurement
    from memlib.rewinding import rewind as rewind
    from memlib.rewinding import rewinding_accuracies as rewinding_accuracies
    from memlib.run_mislabels import find_mislabels_of_run as find_mislabels_of_run
    from memlib.runs import perform_run as perform_run
    from memlib.suspects_page import review_page as review_page
    from memlib.training import train as train

_HOMES = {
    "CriticalUnitsConfig": "experiments",
    "ExampleTiedDropout": "example_tied_dropout",
    "InputError": "errors",
    "Measurement": "rewinding",
    "Retraining": "retraining",
    "RunConfig": "config",
    "accuracy": "evaluation",
    "add_label_noise": "label_noise",
    "add_to_sums_": "gradient_accounting",
    "build_config": "config",
    "build_model": "models",
    "create_results": "results",
    "draw_reference": "critical_units",
    "dropout_mode": "example_tied_dropout",
    "edited_accuracies": "edited_networks",
    "evaluate_mislabels": "mislabel_evaluation",
    "find_critical_units": "critical_units",
    "find_mislabels_by_dropping": "mislabels",
    "find_mislabels_by_dynamics": "mislabels",
    "find_mislabels_of_run": "run_mislabels",
    "find_mislabels_out_of_sample": "confident_learning",
    "flip_labels": "label_noise",
    "flip_labels_in_pairs": "label_noise",
    "layer_groups": "grouping",
    "load_dataset": "datasets",
    "open_results": "results",
    "perform_run": "runs",
    "predict": "evaluation",
    "prune": "pruning",
    "recalibrate": "recalibration",
    "retrain": "retraining",
    "review_page": "suspects_page",
    "rewind": "rewinding",
    "rewinding_accuracies": "rewinding",
    "set_mode": "example_tied_dropout",
    "split_gradients": "gradient_accounting",
    "summarize_groups": "gradient_accounting",
    "take_examples": "critical_units",
    "tie": "example_tied_dropout",
    "train": "training",
    "zero_sums": "gradient_accounting",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'memlib' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}.")
    return getattr(import_module(f"memlib.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
